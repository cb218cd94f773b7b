"""Prepared rows in the user's cache, found by a hash of all that they are made from.

The key is over the bytes of every file of rows, the rules they are read by, the prompt contract and the
length, so that what changed is another key and an old store is never used for it. A store that was damaged is
put aside and made anew. Stores that nobody used for long, or that take too much room, go; one in use never:
its user holds a file lock in it, which the system lets go of when the process ends, however.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qadapt.cache import cache_folder, output_errors, staged, working_folder
from qadapt.data.store import Damaged, Store
from qadapt.errors import BadOutput

FORMAT_VERSION = 3
"""Of the store and of everything that makes tokens of rows; a change of either is another number."""
MOST_BYTES = 20 * 1024**3
LONGEST_UNUSED_SECONDS = 90 * 24 * 3600.0

_LOCK = ".lock"
_USE = ".use-"


@dataclass(frozen=True)
class Prepared:
    """A store in the cache, held as long as this object lives.

    `damage` says what was wrong with the one that stood in its place.
    """

    store: Store
    key: str
    is_new: bool
    damage: str | None
    lock: FileLock


def data_folder() -> Path:
    """Where prepared rows are kept."""
    return cache_folder() / "data"


def key_of(facts: Mapping[str, Any]) -> str:
    """The name of the store that is made from these facts, plain values for JSON."""
    text = json.dumps({"version": FORMAT_VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def find_or_make(key: str, make: Callable[[Path], None]) -> Prepared:
    """The store of a key; made if it is not there or damaged.

    Args:
        key: See `key_of`.
        make: Writes the store into an empty folder.

    Raises:
        BadOutput: The cache cannot be written, or damages what is written.
    """
    root = data_folder()
    with output_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        found = _found(root, key)
        if isinstance(found, tuple):
            return Prepared(found[0], key, False, None, found[1])
        damage = found
        if damage is not None:
            _put_aside(root, key, damage)
        while True:
            with staged(root / key) as folder:
                make(folder)
            found = _found(root, key)
            if isinstance(found, tuple):
                return Prepared(found[0], key, True, damage, found[1])
            if found is not None:
                raise BadOutput(
                    f"Prepared rows are damaged as soon as they are written: {found}",
                    cure="Check that disk, or put the cache on another one.",
                )
            # dropped by another process before it was held: once more


def find(key: str) -> Prepared | None:
    """The store of a key if it is there and whole; nothing is made.

    Raises:
        BadOutput: The cache cannot be written, where a store in use is marked.
    """
    root = data_folder()
    with output_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        found = _found(root, key)
    return Prepared(found[0], key, False, None, found[1]) if isinstance(found, tuple) else None


def drop_unused(
    *, most_bytes: int = MOST_BYTES, longest_seconds: float = LONGEST_UNUSED_SECONDS
) -> list[str]:
    """Deletes stores not used for long, then the longest unused ones until the rest fits; not those in use.

    Returns:
        The keys that are gone.
    """
    root = data_folder()
    dropped = []
    with output_errors(root), _locked(root):
        folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
        used = {path: path.stat().st_mtime for path in folders}
        sizes = {path: sum(map(_bytes_of, path.iterdir())) for path in folders}
        total = sum(sizes.values())
        for path in sorted(folders, key=used.__getitem__):
            is_old = time.time() - used[path] > longest_seconds
            if (is_old or total > most_bytes) and not _is_used(path):
                shutil.rmtree(path, ignore_errors=True)
                total -= sizes[path]
                dropped.append(path.name)
    return dropped


def _bytes_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # the lock of a user who has just finished
        return 0


def _found(root: Path, key: str) -> tuple[Store, FileLock] | str | None:
    """The store of a key, held; what is wrong with it; None if there is none.

    When this returns, the error is gone and with it the mapped file: Windows moves none that is mapped.
    """
    try:
        return _opened(root, key)
    except Damaged as error:
        return str(error)


def _put_aside(root: Path, key: str, damage: str) -> None:
    """Makes room for a new store; what cannot be deleted now is cleared by a later process."""
    with _locked(root), working_folder(root, stem=key) as aside:
        try:
            (root / key).rename(aside / key)
        except FileNotFoundError:  # another process was faster
            pass
        except OSError as error:
            raise BadOutput(
                f"Prepared rows in the cache are damaged and cannot be replaced: {damage} ({error.strerror})",
                cure=f"End the runs that use them, then delete {root / key}.",
            ) from None


def _opened(root: Path, key: str) -> tuple[Store, FileLock] | None:
    folder = root / key
    with _locked(root):
        if not folder.exists():
            return None
        if not folder.is_dir():
            raise Damaged("a file stands in its place")
        os.utime(folder)
        lock = FileLock(folder / f"{_USE}{uuid.uuid4().hex}")
        lock.acquire(timeout=0)
    try:
        store = Store(folder)
        store.check()
    except Damaged:
        lock.release()
        raise
    return store, lock


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Holds the list of stores, for a moment."""
    with FileLock(root / _LOCK):
        yield


def _is_used(folder: Path) -> bool:
    for path in folder.glob(f"{_USE}*"):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        path.unlink(missing_ok=True)
    return False
