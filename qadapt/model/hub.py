"""A model from a hub, through huggingface_hub: one commit, safetensors only, the disk checked beforehand.

The files land in huggingface_hub's own cache, so what other tools have fetched is not fetched again. Order:
find the commit; list its files with their sizes; fetch configuration and tokenizer; refuse what cannot be
trained; check the disk; fetch the weights, one file after the other, each resumed where it broke off
(`download`). Repository code and pickles are never fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from qadapt.cache import ignore, output_errors, require_free
from qadapt.errors import BadModel, HubRefused
from qadapt.licences import is_licence
from qadapt.model.download import RemoteFile, download, file_bytes, part_of, remote_file
from qadapt.model.folder import check_config, checked_folder, read_config
from qadapt.model.shards import INDEX_NAME, SINGLE_NAME
from qadapt.quiet import quiet_libraries
from qadapt.stage import Report

_SMALL_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|tekken|chat_template)"
    r"\.json|merges\.txt|tokenizer\.model(\.v\d+)?|chat_template\.jinja|README\.md|" + re.escape(INDEX_NAME)
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repository on this disk."""

    folder: Path
    commit: str


@dataclass(frozen=True)
class _Repository:
    """What to ask, where: the arguments that every call shares."""

    name: str
    commit: str
    endpoint: str | None
    cache: Path

    def cached(self, file: str) -> Path | None:
        """The file's path if it is whole in the cache."""
        found = try_to_load_from_cache(self.name, file, cache_dir=self.cache, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, file: str) -> Path:
        """The path of a small file, downloaded if it is not in the cache."""
        return Path(
            hf_hub_download(
                self.name, file, revision=self.commit, cache_dir=self.cache, endpoint=self.endpoint
            )
        )

    def remote(self, file: str, *, listed_bytes: int) -> RemoteFile:
        """A file that is not in the cache, as the hub describes it."""
        url = hf_hub_url(self.name, file, revision=self.commit, endpoint=self.endpoint)
        return remote_file(url, listed_bytes=listed_bytes)


def snapshot(
    name: str,
    *,
    revision: str | None = None,
    cache: Path | None = None,
    endpoint: str | None = None,
    report: Report = ignore,
    needs_weights: bool = True,
) -> Snapshot:
    """A model of a hub on this disk, fetched as far as it is not there yet.

    Without a network, or offline (`HF_HUB_OFFLINE`), the commit fetched last is used if it is whole.

    Args:
        name: `owner/name`.
        revision: Branch, tag or commit; by default the default branch.
        cache: Where to keep files; by default huggingface_hub's cache.
        endpoint: The hub's address; by default huggingface_hub's.
        report: Told of the bytes fetched.
        needs_weights: Fetch the weights, too, and not only what describes the model and its tokens.

    Raises:
        HubRefused: Gated, missing, not allowed, or out of reach.
        BadModel: Quantized already, without safetensors, or in need of repository code.
        BadOutput: The cache is read-only or its disk too full.
        Unsupported: The architecture is not proven here.
    """
    quiet_libraries()
    kept = Path(cache / "hub" if cache else constants.HF_HUB_CACHE)
    with hub_errors(name, revision=revision, endpoint=endpoint), output_errors(kept):
        api = HfApi(endpoint=endpoint)
        try:
            # The first request is the one with a time limit: a firewall may swallow it without an answer.
            info = api.model_info(
                name, revision=revision, files_metadata=True, timeout=constants.DEFAULT_REQUEST_TIMEOUT
            )
        except (httpx2.TransportError, OfflineModeIsEnabled):
            known = api.resolve_revision(name, revision=revision, cache_dir=kept, local_files_only=True)
            repository = _Repository(name, known.resolved, endpoint, kept)
            return Snapshot(_whole_local(repository, needs_weights=needs_weights), known.resolved)
        assert info.sha is not None, "the hub names the commit of every model"
        api.resolve_revision(name, revision=revision, cache_dir=kept)  # notes it for the time without network
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        repository = _Repository(name, info.sha, endpoint, kept)
        folder, weights = _described(repository, sizes)
        if needs_weights:
            _fetch_weights(repository, folder, {file: sizes[file] for file in weights}, report=report)
        return Snapshot(folder, info.sha)


def is_kept(name: str, *, revision: str | None = None, cache: Path | None = None) -> bool:
    """Whether a model's description and the first of its weights are in the cache; asks nobody.

    Args:
        name: `owner/name`.
        revision: Branch, tag or commit; by default the default branch.
        cache: As in `snapshot`.
    """
    kept = Path(cache / "hub" if cache else constants.HF_HUB_CACHE)

    def has(file: str) -> bool:
        return isinstance(try_to_load_from_cache(name, file, cache_dir=kept, revision=revision), str)

    return has("config.json") and (has("model.safetensors") or has("model.safetensors.index.json"))


def _whole_local(repository: _Repository, *, needs_weights: bool) -> Path:
    config = repository.cached("config.json")
    if config is None:
        raise LocalEntryNotFoundError(repository.name)
    if not needs_weights:
        return config.parent
    try:
        checked_folder(config.parent, name=repository.name)
    except BadModel as error:
        raise HubRefused(
            f"{repository.name} is not whole on this disk and the hub is out of reach: {error.problem}",
            cure="Connect to the network (and unset HF_HUB_OFFLINE if it is set), then try again.",
        ) from None
    return config.parent


def _described(repository: _Repository, sizes: dict[str, int]) -> tuple[Path, list[str]]:
    """The folder with configuration and tokenizer, fetched; and the files of weights that belong to it."""
    name = repository.name
    if "config.json" not in sizes:
        raise _no_model(name, list(sizes))
    folder = repository.fetch("config.json").parent
    check_config(read_config(folder, name=name), name=name)
    for file in sizes:
        if _SMALL_FILES.fullmatch(file) or is_licence(file):
            repository.fetch(file)
    return folder, _weight_names(folder, name=name, files=list(sizes))


def _fetch_weights(
    repository: _Repository, folder: Path, sizes: Mapping[str, int], *, report: Report
) -> None:
    """Fetches the weight files that are not there yet, into the snapshot folder itself.

    A regular file in the place of a link is what huggingface_hub's cache holds where links are not possible.
    """
    parts = folder.parent.parent / "blobs"
    remotes = {
        file: repository.remote(file, listed_bytes=size)
        for file, size in sizes.items()
        if repository.cached(file) is None
    }
    total = sum(sizes.values())
    missing = sum(remote.size_bytes for remote in remotes.values())
    arrived = sum(file_bytes(part_of(remote, parts)) for remote in remotes.values())
    require_free(repository.cache, missing - arrived, purpose=f"Fetching {repository.name}")
    done, stage = total - missing, f"fetching {repository.name}"
    for file, remote in remotes.items():
        download(
            remote,
            folder / file,
            parts=parts,
            advance=_advance(report, stage, before=done, total=total),
        )
        done += remote.size_bytes


def _advance(report: Report, stage: str, *, before: int, total: int) -> Callable[[int], None]:
    return lambda arrived: report(stage, before + arrived, total)


def _weight_names(folder: Path, *, name: str, files: Sequence[str]) -> list[str]:
    if SINGLE_NAME in files:
        return [SINGLE_NAME]
    if INDEX_NAME not in files:
        raise _no_model(name, files)
    try:
        weight_map = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadModel(
            f"{name}: {INDEX_NAME} is no index of weights.", cure="Choose another revision."
        ) from None
    missing = sorted(set(shards) - set(files))
    if missing:
        raise BadModel(
            f"{name}: the index names {missing[0]}, which the repository does not hold.",
            cure="Choose another revision.",
        )
    return shards


def _no_model(name: str, files: Sequence[str]) -> BadModel:
    if any(file.endswith(_PICKLED) for file in files):
        return BadModel(
            f"{name} has only pickled weights, which can run code when they are read (safetensors only).",
            cure="Choose a revision or repository with *.safetensors; conversions are often offered as a "
            "pull request of the repository: revision `refs/pr/<number>`.",
        )
    if any(file.endswith(".gguf") for file in files):
        return BadModel(
            f"{name} holds GGUF files only.",
            cure="Give the 16-bit model it was made from; or download one .gguf file and give its path.",
        )
    return BadModel(f"{name} holds no model (config.json and *.safetensors).", cure="Check the name.")


@contextmanager
def hub_errors(name: str, *, revision: str | None, endpoint: str | None) -> Iterator[None]:
    """Says what the hub's answers mean for the user. Tokens and request headers never become text."""
    page = f"{endpoint or constants.ENDPOINT}/{name}"
    try:
        yield
    except GatedRepoError:
        raise _gated(name, page) from None
    except RevisionNotFoundError:
        raise HubRefused(
            f"{name} has no revision {revision!r}.", cure=f"See which there are on {page}."
        ) from None
    except RepositoryNotFoundError:
        raise HubRefused(
            f"{name} is no folder here, and it does not exist on the hub, "
            "or is private and not for this account.",
            cure=f"Check the spelling on {page}; for a private model log in with `hf auth login`.",
        ) from None
    except HfHubHTTPError as error:
        raise _refused(name, page, status=error.response.status_code) from None
    except HFValidationError as error:
        raise BadModel(
            f"{name!r} is no name of a hub model: {error}", cure="Write it as owner/name."
        ) from None
    except (
        httpx2.TransportError,
        OfflineModeIsEnabled,
        RevisionResolutionError,
        LocalEntryNotFoundError,
    ) as error:
        reason = "offline mode is on (HF_HUB_OFFLINE)" if is_offline_mode() else type(error).__name__
        raise HubRefused(
            f"{name} is not on this disk and the hub is out of reach: {reason}.",
            cure="Connect to the network, or give a model folder, a .gguf file, or `smollm2-135m`.",
        ) from None


def _gated(name: str, page: str) -> HubRefused:
    if get_token() is None:
        return HubRefused(
            f"{name} is gated and no account is logged in on this machine.",
            cure=f"Accept its conditions on {page}, then log in here with `hf auth login`.",
        )
    return HubRefused(
        f"{name} is gated and the account logged in here has not been granted access.",
        cure=f"Accept its conditions on {page} with that account (`hf auth whoami`); approval can take time.",
    )


def _refused(name: str, page: str, *, status: int) -> HubRefused:
    if status in (401, 403):
        return HubRefused(
            f"The hub does not let this account or token read {name} (status {status}).",
            cure=f"Log in anew with `hf auth login`, with a token that may read {page}.",
        )
    return HubRefused(
        f"The hub answered {name} with status {status}.", cure="That is the hub's side: try again later."
    )
