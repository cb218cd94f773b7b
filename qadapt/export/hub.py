"""An export or adapter on a hub, through huggingface_hub: a repository made if need be, a folder uploaded.

Who may do that is known by huggingface_hub's own login alone (`hf auth login`): the token is never asked for,
kept or shown here. An upload that broke off goes on where it was when it is asked for again. The reading side
is `model/hub.py`. Knows nothing of what is uploaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, get_token, is_offline_mode
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from qadapt.errors import BadRecipe, HubRefused
from qadapt.quiet import quiet_libraries

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NOT_ALLOWED = (401, 403)
_NOT_FOUND = 404


@dataclass(frozen=True)
class HubTarget:
    """A repository to push to.

    Attributes:
        name: `owner/name`.
        is_private: Whether it is private, if it is new; one that is there stays as it is.
        endpoint: Another hub than huggingface_hub's default.
    """

    name: str
    is_private: bool = False
    endpoint: str | None = None

    @property
    def page(self) -> str:
        """Where people see it."""
        return f"{self.endpoint or constants.ENDPOINT}/{self.name}"


def check_target(target: HubTarget) -> None:
    """Finds before a long export what would stop the push after it; asks no hub.

    Raises:
        BadRecipe: The name is none of a repository.
        HubRefused: Nobody is logged in on this machine, or it is to stay offline.
    """
    if not _NAME.fullmatch(target.name):
        raise BadRecipe(
            f"{target.name!r} is no name of a repository on a hub.", cure="Write it as owner/name."
        )
    if is_offline_mode():
        raise HubRefused(
            "Nothing can be pushed: offline mode is on (HF_HUB_OFFLINE).", cure="Unset HF_HUB_OFFLINE."
        )
    if get_token() is None:
        raise HubRefused(
            "Nothing can be pushed: no account is logged in on this machine.",
            cure="Log in with `hf auth login`, with a token that may write.",
        )


def push_folder(
    folder: Path, target: HubTarget, *, message: str, replaces: Sequence[str] = (), again: str = ""
) -> str:
    """Uploads a folder to a repository, which is made if it is not there.

    Args:
        folder: What to upload, whole.
        target: Where to.
        message: First line of the commit.
        replaces: Patterns of what is taken out of the repository where the folder has no such file.
        again: How to push again after a refusal; by default the folder, which stays.

    Returns:
        The commit's address.

    Raises:
        BadRecipe: The name is none of a repository.
        HubRefused: Not logged in, not allowed, or out of reach; the folder stays as it is.
    """
    quiet_libraries()
    api = HfApi(endpoint=target.endpoint)
    again = again or f"The export is whole in {folder}; push it with `hf upload {target.name} {folder}`."
    with _hub_errors(target, again):
        api.create_repo(target.name, private=target.is_private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=target.name,
            folder_path=folder,
            commit_message=message,
            delete_patterns=list(replaces) or None,
        )
    return str(commit.commit_url)


@contextmanager
def _hub_errors(target: HubTarget, again: str) -> Iterator[None]:
    """Says what the hub's answers mean. Tokens and request headers never become text."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise HubRefused(
            f"{target.name} cannot be pushed: no account is logged in on this machine.",
            cure=f"Log in with `hf auth login`. {again}",
        ) from None
    except HfHubHTTPError as error:
        raise HubRefused(_refusal(target, error.response.status_code), cure=again) from None
    except HFValidationError:
        raise BadRecipe(
            f"{target.name!r} is no name of a repository on a hub.",
            cure=f"The hub's rules: letters, digits, `-`, `_`, `.`, at most 96 of them. {again}",
        ) from None
    except PermissionError:  # of hf_xet, which moves the large files
        raise HubRefused(
            f"The hub took no files for {target.name} from this account or token.",
            cure=f"Log in anew with `hf auth login`, with a token that may write. {again}",
        ) from None
    except (
        httpx2.TransportError,
        OfflineModeIsEnabled,
        ConnectionError,
        TimeoutError,
        RuntimeError,
    ) as error:
        raise HubRefused(
            f"{target.name} cannot be pushed: the hub is out of reach ({type(error).__name__}).",
            cure=f"Connect to the network. {again}",
        ) from None


def _refusal(target: HubTarget, status: int) -> str:
    if status in _NOT_ALLOWED:
        return (
            f"The hub does not let this account or token write to {target.page} (status {status}): "
            "`hf auth whoami` says who it is, `hf auth login` takes a token that may write."
        )
    if status == _NOT_FOUND:
        return f"The hub has no {target.name} that this account may see (status {status})."
    return f"The hub answered the push to {target.page} with status {status}: try again later."
