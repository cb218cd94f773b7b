"""A large file over HTTP, taken up where it broke off, in this process or the last one; its sha256 verified.

huggingface_hub 2.4 resumes only within a process and only some failures, and a 7B model comes in files of
5 GB: on a home line that is half an hour lost. So weights are streamed here, over huggingface_hub's own
session, headers and error check; what is there already is asked for no more (HTTP Range). Knows no models.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, get_session

# Documented under `huggingface_hub.utils`, but not marked as exported there.
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    WeakFileLock,
    build_hf_headers,
    hf_raise_for_status,
)

from qadapt.errors import BadModel

_READ_BYTES = 1024**2
_FRUITLESS_ATTEMPTS = 5
_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class RemoteFile:
    """A file of a hub: where it is, how long, and its sha256 (None if the hub names none)."""

    url: str
    etag: str
    size_bytes: int
    sha256: str | None


def remote_file(url: str, *, listed_bytes: int) -> RemoteFile:
    """Asks the hub for a file's identity; for large files the etag is their sha256.

    Args:
        url: The file.
        listed_bytes: Its length in the repository's list, used if the file's own answer names none.

    Raises:
        HfHubHTTPError: The hub refused.
    """
    answer = get_hf_file_metadata(url)
    etag = answer.etag or ""
    size_bytes = answer.size or listed_bytes
    sha256 = etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None
    return RemoteFile(url, etag or hashlib.sha256(url.encode()).hexdigest(), size_bytes, sha256)


def part_of(remote: RemoteFile, folder: Path) -> Path:
    """Where the bytes that have arrived are kept until the file is whole."""
    return folder / f"{remote.etag}.qadapt.incomplete"


def download(
    remote: RemoteFile,
    target: Path,
    *,
    parts: Path,
    advance: Callable[[int], None],
) -> None:
    """Downloads a file, continuing what an earlier attempt left, and moves it to `target` when it is whole.

    Args:
        remote: The file.
        target: Where it appears, at once; on the same disk as `parts`.
        parts: The folder of unfinished files.
        advance: Told how many bytes of the file have arrived.

    Raises:
        BadModel: What arrived has another sha256; it is deleted.
        HfHubHTTPError: The hub refused.
        TransportError: The connection broke again and again without a new byte.
    """
    parts.mkdir(parents=True, exist_ok=True)
    part = part_of(remote, parts)
    with WeakFileLock(part.with_suffix(".lock")):
        fruitless = 0
        while file_bytes(part) < remote.size_bytes:
            before = file_bytes(part)
            try:
                _continue(remote, part, advance=advance)
            except httpx2.TransportError:
                fruitless = 0 if file_bytes(part) > before else fruitless + 1
                if fruitless >= _FRUITLESS_ATTEMPTS:
                    raise
                time.sleep(_PAUSE_SECONDS * (1 + fruitless))
        if remote.sha256 is not None and _sha256(part) != remote.sha256:
            part.unlink()
            raise BadModel(
                f"{remote.url} arrived damaged: its sha256 is not {remote.sha256}.",
                cure="The damaged file is deleted; try again.",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
    part.with_suffix(".lock").unlink(missing_ok=True)


def _continue(remote: RemoteFile, part: Path, *, advance: Callable[[int], None]) -> None:
    have = file_bytes(part)
    headers = {**build_hf_headers(), "Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    with get_session().stream(
        "GET", remote.url, headers=headers, follow_redirects=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    ) as response:
        hf_raise_for_status(response)
        # 206 continues; 200 means that the server ignores ranges and sends everything again.
        with part.open("ab" if response.status_code == 206 else "wb") as file:
            for piece in response.iter_raw():
                file.write(piece)
                advance(file.tell())


def file_bytes(path: Path) -> int:
    """The file's length; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
