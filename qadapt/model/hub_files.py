"""Some small files of a hub's repository, of one commit, into a folder: what is not asked for is not fetched.

Names of files are the hub's word: one that is no plain name inside the folder is never written. Knows nothing
of what the files hold; whole models are `hub.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download

from qadapt.cache import require_free
from qadapt.errors import BadModel
from qadapt.model.hub import hub_errors
from qadapt.quiet import quiet_libraries


def fetch_files(
    name: str,
    place: Path,
    *,
    choose: Callable[[Sequence[str]], Sequence[str]],
    revision: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Fetches files of a repository.

    Args:
        name: `owner/name`.
        place: An empty folder that they are written into.
        choose: Of all names those to fetch; what it raises is passed on.
        revision: Branch, tag or commit; by default the default branch.
        endpoint: The hub's address; by default huggingface_hub's.

    Returns:
        The commit.

    Raises:
        HubRefused: Gated, missing, not allowed, or out of reach.
        BadModel: A name leads out of the folder.
        NoRoom: The disk is too full.
    """
    quiet_libraries()
    with hub_errors(name, revision=revision, endpoint=endpoint):
        info = HfApi(endpoint=endpoint).model_info(
            name, revision=revision, files_metadata=True, timeout=constants.DEFAULT_REQUEST_TIMEOUT
        )
        assert info.sha is not None, "the hub names the commit of every model"
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        chosen = choose(list(sizes))
        for file in chosen:
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\\" in file:
                raise BadModel(
                    f"{name} holds a file named {file!r}, which lies outside its folder.",
                    cure="Leave it alone: no honest repository has such a file.",
                )
        require_free(place, sum(sizes[file] for file in chosen), purpose=f"Fetching {name}")
        for file in chosen:
            hf_hub_download(name, file, revision=info.sha, local_dir=place, endpoint=endpoint)
        return info.sha
