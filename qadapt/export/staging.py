"""A new folder that appears whole or not at all, and that a second call goes on with if the first was killed.

Everything is written into a hidden folder beside the target and shown by one rename at the end
(`durable.py`). An error or an interruption leaves no trace, not even the folders the target was to lie in. A
killed process leaves its hidden folder: files that had reached the disk stand in a manifest with size and
sha256, and are kept if the next call makes the same thing; the rest is cleared away. Knows nothing of models.

```
.<target>.partial/
  manifest.json    what is made, as a hash, and the files of `made` that are whole
  lock             held by the process that writes
  made/            what becomes <target>
```
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from qadapt.adapters.versions import sha256_of
from qadapt.cache import output_errors, require_free
from qadapt.durable import make_folder, missing_way, publish, write_whole
from qadapt.errors import BadOutput

_VERSION = 1


@dataclass(frozen=True)
class _Facts:
    """Of a file that is whole."""

    bytes: int
    sha256: str


class Building:
    """The hidden folder, and those of its files that need not be made again.

    Attributes:
        path: Where to write.

    Args:
        place: The folder that holds it and its manifest; what does not belong there is cleared away.
        identity: What is made, as a hash; files of an earlier call stay if theirs is the same, and not empty.
    """

    def __init__(self, place: Path, identity: str) -> None:
        self.path = place / "made"
        self._manifest, self._identity = place / "manifest.json", identity
        self._files = self._noted() if identity else {}
        make_folder(self.path)
        for path in place.iterdir():
            if path.name not in ("made", "manifest.json", "lock"):
                _remove(path)
        for path in self.path.iterdir():
            facts = self._files.get(path.name)
            if facts is None or not path.is_file() or path.stat().st_size != facts.bytes:
                _remove(path)
        self._files = {name: facts for name, facts in self._files.items() if (self.path / name).exists()}

    @property
    def kept_bytes(self) -> int:
        """Bytes of the files that are there."""
        return sum(facts.bytes for facts in self._files.values())

    def has(self, name: str) -> bool:
        """Whether a file is whole: read again and compared. A damaged one is removed."""
        facts = self._files.get(name)
        if facts is None:
            return False
        is_whole = sha256_of(self.path / name) == facts.sha256
        if not is_whole:
            del self._files[name]
            _remove(self.path / name)
        return is_whole

    def add(self, name: str, sha256: str) -> None:
        """Notes that a file has reached the disk."""
        self._files[name] = _Facts((self.path / name).stat().st_size, sha256)
        files = {each: asdict(facts) for each, facts in list(self._files.items())}
        values = {"version": _VERSION, "identity": self._identity, "files": files}
        write_whole(self._manifest, json.dumps(values, indent=2) + "\n")

    def _noted(self) -> dict[str, _Facts]:
        """What an earlier call noted, if it made the same; nothing if it cannot be read."""
        try:
            values = json.loads(self._manifest.read_text(encoding="utf-8"))
            if (values["version"], values["identity"]) != (_VERSION, self._identity):
                return {}
            return {name: _Facts(**facts) for name, facts in values["files"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}


@contextmanager
def new_folder(target: Path, *, needed_bytes: int, identity: str = "") -> Iterator[Building]:
    """A folder to write into; it becomes `target` if the block ends well, and vanishes otherwise.

    What an earlier call left behind because it was killed is gone on with, or cleared away.

    Args:
        target: The folder to be; it must not exist.
        needed_bytes: What the whole folder takes; less what is there already, it is checked against the disk
            before the first byte.
        identity: A hash of all that decides the bytes of the files; none: they are made anew.

    Raises:
        BadOutput: The target exists, or appeared meanwhile; another process makes it; the place is read-only.
        NoRoom: The place is too full.
    """
    refuse_existing(target)
    place, made = _place_of(target), list[Path]()
    try:
        with output_errors(target.parent):
            made += (folder for folder in (place, *target.parents) if not folder.exists())
            _make(place)
            with _alone(place):
                _refuse(target)  # another process may have made it meanwhile
                building = Building(place, identity)
                _require_free(target, needed_bytes - building.kept_bytes)  # what is kept stays
                try:
                    yield building
                    _refuse(target)  # it may have appeared meanwhile, and publishing would replace it
                    publish(building.path, target)
                finally:
                    shutil.rmtree(building.path, ignore_errors=True)
    finally:
        if not os.path.lexists(target):
            _remove_empty(made)


def refuse_full(target: Path, *, needed_bytes: int) -> None:
    """Checks the disk for a new folder ahead of long work; what a killed call left makes room, or serves.

    Args:
        target: The folder to be.
        needed_bytes: What the whole folder takes.

    Raises:
        NoRoom: The place is too full.
    """
    left = (path for path in _place_of(target).rglob("*") if path.is_file())
    _require_free(target, needed_bytes - sum(path.stat().st_size for path in left))


def _require_free(target: Path, needed_bytes: int) -> None:
    require_free(
        target.parent,
        needed_bytes,
        purpose=f"An export to {target.name}",
        or_else="give a folder on a larger one with --to",
    )


def refuse_existing(target: Path) -> None:
    """Checks that there is nothing yet where a new folder is to be, and a way to it.

    Raises:
        BadOutput: There is; or the path goes up from a folder that is not there.
    """
    if (way := missing_way(target)) is not None:
        raise BadOutput(
            f"{target} goes up from {way}, which is no folder.",
            cure="Give the folder to be without `..`, or make that one first.",
        )
    if target.name and os.path.lexists(target) and (place := _place_of(target)).is_dir():
        with (
            suppress(OSError, BadOutput),
            _alone(place),
        ):  # left by a process that was killed; none is at work
            shutil.rmtree(place / "made", ignore_errors=True)
    _refuse(target)


def _refuse(target: Path) -> None:
    if os.path.lexists(target):
        raise BadOutput(
            f"{target} exists already; an export never overwrites.",
            cure="Give another folder with --to, or remove this one.",
        )


def _place_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _make(folder: Path) -> None:
    try:
        make_folder(folder)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        is_missing = isinstance(error, FileNotFoundError)  # as of a drive that there is none of
        reason = "a part of that path cannot be made" if is_missing else "a part of that path is a file"
        raise BadOutput(
            f"{folder.parent} cannot hold a folder: {reason}.",
            cure="Give another folder with --to.",
        ) from None


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Holds a hidden folder for this process; in the end it is gone if no file is in `made`.

    Raises:
        BadOutput: Another process holds it.
    """
    lock = FileLock(place / "lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadOutput(
            f"Another process is exporting to {place.name.removeprefix('.').removesuffix('.partial')}.",
            cure="Wait for its end, or give another folder with --to.",
        ) from None
    try:
        yield
    finally:
        lock.release()
        if not any((place / "made").glob("*")):
            shutil.rmtree(place, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _remove_empty(folders: list[Path]) -> None:
    """Removes folders, innermost first, as long as they are empty."""
    for folder in folders:
        if folder.is_dir():
            if any(folder.iterdir()):
                return
            folder.rmdir()
