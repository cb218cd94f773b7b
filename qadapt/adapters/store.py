"""The store: adapters kept as versions that never change, under names and tags that move.

A version appears by one rename, a name or a tag moves by one; between any two file operations a reader finds
the store as it was before or as it is after, and so does the next process if this one is killed. Who changes
something holds the lock; who reads needs none. A file that two versions share is on the disk once, where the
disk can link. What nothing points to stays until `gc`. Knows neither runs nor tensors.

```
adapters/
  lock                              held while something is changed
  versions/<sha256>/version.json    what it is
  versions/<sha256>/adapter/        its files, a plain PEFT folder or a side-car
  names/<name>.json  tags/<tag>.json
```
"""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from qadapt.adapters import pointers
from qadapt.adapters.pointers import Name, check_name, read_names, read_tags
from qadapt.adapters.versions import (
    VERSION_FILE,
    FileFacts,
    Record,
    Version,
    fault_of,
    files_of,
    read_version,
    sha256_of,
)
from qadapt.cache import output_errors, require_free
from qadapt.durable import flush_folder, make_folder, put_back, rename, whole_folder
from qadapt.errors import BadAdapter, BadOutput

WAIT_SECONDS = 60.0
"""How long another process may hold the lock: as long as it takes to copy an adapter to a slow disk."""
SHOWN = 12
"""Characters of an id that are shown."""
_ID_CHARACTERS = 64


@dataclass(frozen=True)
class Added:
    """A version under a name, and whether it is new to the store."""

    version: Version
    name: str
    is_new: bool


@dataclass(frozen=True)
class Freed:
    """Versions that nothing points to, and the bytes on the disk that are theirs alone."""

    versions: tuple[str, ...]
    bytes: int


class Store:
    """A folder of versions. It need not be there yet.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._versions, self._names, self._tags = path / "versions", path / "names", path / "tags"

    def names(self) -> dict[str, Name]:
        """Every name with what it means and meant."""
        return read_names(self._names)

    def tags(self) -> dict[str, str]:
        """Every tag with the id it stands for."""
        return read_tags(self._tags)

    def ids(self) -> list[str]:
        """The ids of all versions."""
        if not self._versions.is_dir():
            return []
        return sorted(path.name for path in self._versions.iterdir() if len(path.name) == _ID_CHARACTERS)

    def version(self, version_id: str) -> Version:
        """A version by its whole id.

        Raises:
            BadAdapter: It is not in the store, or its description is damaged.
        """
        return read_version(self._versions / version_id)

    def find(self, what: str) -> str:
        """The id of the version that is meant.

        Args:
            what: A name, a tag, or the beginning of an id, four characters at least.

        Raises:
            BadAdapter: Nothing, or more than one version, is meant.
        """
        meant = self.meant(what)
        if len(meant) > 1:
            shown = ", ".join(each[: max(SHOWN, len(what) + 4)] for each in meant)
            raise BadAdapter(
                f"{what} is the beginning of {len(meant)} versions: {shown}.", cure="Give more characters."
            )
        if not meant:
            raise self._unknown(what, [*self.names(), *self.tags()])
        if meant[0] not in self.ids():
            raise BadAdapter(
                f"{what} stands for the version {meant[0][:SHOWN]}, which is not in {self.path} any more.",
                cure="Add that adapter again, or let it stand for another with `qadapt adapters use`.",
            )
        return meant[0]

    def meant(self, what: str) -> list[str]:
        """The ids that a text may stand for, as `find` reads it; none if it says nothing here."""
        names, tags = self.names(), self.tags()
        if what in names or what in tags:
            return [names[what].current if what in names else tags[what]]
        return [each for each in self.ids() if pointers.looks_like_id(what) and each.startswith(what)]

    def folder_of(self, version_id: str) -> Path:
        """The folder with a version's files, every byte of which is as it was added.

        Raises:
            BadAdapter: The version is not in the store, or a file is missing or damaged.
        """
        version = self.version(version_id)
        if damaged := fault_of(version, self._versions / version_id):
            raise BadAdapter(
                f"The version {version_id[:SHOWN]} is damaged: {damaged} is not what was added.",
                cure="Add the adapter again from where it came from, which mends it; or use another version.",
            )
        return self._adapter(version_id)

    def add(self, folder: Path, record: Record, *, name: str, parent: str | None = None) -> Added:
        """Keeps an adapter and lets a name mean it. What is in the store already is not added twice.

        Args:
            folder: The adapter's; only files that belong to an adapter are taken.
            record: What is known of it.
            name: The name; new, or one that moves.
            parent: What it followed, as `find` takes it; by default the version that the name means now, or
                what it followed when it was added before.

        Raises:
            BadAdapter: The folder holds no adapter, or the name cannot be one.
            BadOutput: The store is read-only, full, or held by another process.
        """
        check_name(name, what="name")
        files = files_of(folder)
        if parent:
            self.find(parent)  # ahead, so that without it no store is made
        with output_errors(self.path):
            make_folder(self._versions)
        with self._changing():
            former = self.names().get(name)
            self._check_free(name, among=self.tags(), kind="tag")
            followed = self.find(parent) if parent else former.current if former else None
            version = Version(files, record, followed)
            version = version if parent else self._same(version)
            is_new = not (self._versions / version.id).exists()
            if is_new or fault_of(version, self._versions / version.id):
                self._write(version, folder)
            moved = Name((version.id,)) if former is None else former.moved_to(version.id)
            pointers.write_name(self._names, name, moved)
        return Added(version, name, is_new)

    def use(self, name: str, what: str) -> str:
        """Lets a name mean a version that is in the store; its id.

        Raises:
            BadAdapter: There is no such version, it is damaged, or the name cannot be one.
        """
        check_name(name, what="name")
        with self._changing():
            version_id = self.find(what)
            self._check_free(name, among=self.tags(), kind="tag")
            self.folder_of(version_id)
            former = self.names().get(name)
            moved = Name((version_id,)) if former is None else former.moved_to(version_id)
            pointers.write_name(self._names, name, moved)
        return version_id

    def rollback(self, name: str) -> Name:
        """Lets a name mean the version before again: one rename.

        Raises:
            BadAdapter: There is no such name, nothing before, or what was before is damaged.
        """
        with self._changing():
            former = self._name(name)
            if len(former.used) == 1:
                raise BadAdapter(
                    f"{name} never meant another version than {former.current[:SHOWN]}.",
                    cure=f"`qadapt adapters use {name} VERSION` lets it mean any version of the store.",
                )
            moved = former.rolled_back()
            self.folder_of(moved.current)
            pointers.write_name(self._names, name, moved)
        return moved

    def tag(self, what: str, tag: str) -> str:
        """Lets a tag stand for a version; its id.

        Raises:
            BadAdapter: There is no such version, or the tag cannot be one.
        """
        check_name(tag, what="tag")
        with self._changing():
            self._check_free(tag, among=self.names(), kind="name")
            version_id = self.find(what)
            pointers.write_tag(self._tags, tag, version_id)
        return version_id

    def remove(self, what: str) -> str:
        """Takes a name or a tag away, or a version that neither means; what it was, in words.

        Raises:
            BadAdapter: There is no such thing, or the version is in use.
        """
        with self._changing():
            names, tags = self.names(), self.tags()
            if what in names:
                pointers.remove(self._names, what)
                return f"the name {what}"
            if what in tags:
                pointers.remove(self._tags, what)
                return f"the tag {what}"
            version_id = self.find(what)
            users = [each for each, name in names.items() if name.current == version_id]
            users += [each for each, tagged in tags.items() if tagged == version_id]
            if users:
                raise BadAdapter(
                    f"The version {version_id[:SHOWN]} is in use: {', '.join(users)} "
                    f"mean{'s' if len(users) == 1 else ''} it.",
                    cure="Let that mean another version first, or remove it.",
                )
            for each, name in names.items():
                if version_id in (*name.used, *name.left):
                    pointers.write_name(self._names, each, name.without(version_id))
            self._drop([version_id])
        return f"the version {version_id[:SHOWN]}"

    def gc(self, *, is_trial: bool = False) -> Freed:
        """Removes versions that no name means or meant and no tag stands for.

        Args:
            is_trial: Only say which.
        """
        with self._changing():
            kept = {each for name in self.names().values() for each in (*name.used, *name.left)}
            kept |= set(self.tags().values())
            ids = self.ids()
            unused = tuple(each for each in ids if each not in kept)
            own_bytes = self._disk_bytes(ids) - self._disk_bytes(set(ids) - set(unused))
            if not is_trial:
                self._drop(unused)
        return Freed(unused, own_bytes)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the store for this process, tidied up after one that was killed."""
        if not self._versions.is_dir():
            raise self._unknown("", [])
        with output_errors(self.path):
            lock = FileLock(self.path / "lock", thread_local=False)
            try:
                lock.acquire(timeout=WAIT_SECONDS)
            except Timeout:
                raise BadOutput(
                    f"Another process has been changing the store {self.path} for {WAIT_SECONDS:.0f} s.",
                    cure="Wait for its end, then try again.",
                ) from None
            try:
                put_back(self._versions)
                for left in self._versions.glob(".*"):
                    shutil.rmtree(left, ignore_errors=True)
                yield
            finally:
                lock.release()

    def _write(self, version: Version, folder: Path) -> None:
        require_free(
            self.path,
            version.bytes,
            purpose="The adapter",
            or_else="give a store on a larger one with --store",
        )
        donors = self._donors(version)
        with whole_folder(self._versions / version.id) as building:
            for name, facts in version.files.items():
                target = building / "adapter" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if not _linked(donors.get(facts, []), target, facts):
                    _copy(folder / name, target, facts)
            (building / VERSION_FILE).write_text(version.text(), encoding="utf-8", newline="\n")

    def _donors(self, version: Version) -> dict[FileFacts, list[Path]]:
        """The files of other versions by what recognizes them."""
        found: dict[FileFacts, list[Path]] = {}
        for each in self._others(version):
            for name, facts in each.files.items():
                found.setdefault(facts, []).append(self._adapter(each.id) / name)
        return found

    def _same(self, version: Version) -> Version:
        """The version in the store that is the same but for what it followed; else this one.

        One whose description is damaged is known by its id, which only the version it followed can make.
        """
        sound = {each.id: each for each in self._others(None)}
        damaged = set(self.ids()) - set(sound)
        parents = (None, *self.ids()) if damaged else ()
        mended = (each for parent in parents if (each := replace(version, parent=parent)).id in damaged)
        alike = (each for each in sound.values() if each.has_content_of(version))
        return next(mended, None) or next(alike, version)

    def _others(self, version: Version | None) -> Iterator[Version]:
        """The versions whose descriptions are sound, without this one."""
        for each in self.ids():
            try:
                other = self.version(each)
            except BadAdapter:
                continue
            if version is None or each != version.id:
                yield other

    def _drop(self, ids: Iterable[str]) -> None:
        """Takes versions away, each by one rename."""
        for each in ids:
            hidden = self._versions / f".{each}.removed"
            rename(self._versions / each, hidden)
            flush_folder(self._versions)
            shutil.rmtree(hidden, ignore_errors=True)

    def _disk_bytes(self, ids: Iterable[str]) -> int:
        """Bytes on the disk of some versions, a file that they share counted once."""
        stats = [path.stat() for each in ids for path in (self._versions / each).rglob("*") if path.is_file()]
        return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())

    def _adapter(self, version_id: str) -> Path:
        return self._versions / version_id / "adapter"

    def _name(self, name: str) -> Name:
        names = self.names()
        if name not in names:
            raise self._unknown(name, list(names), kind="name")
        return names[name]

    def _check_free(self, text: str, *, among: Iterable[str], kind: str) -> None:
        if text in among:
            raise BadAdapter(
                f"{text} is a {kind} in {self.path} already.", cure=f"Choose another, or remove that {kind}."
            )

    def _unknown(self, what: str, known: list[str], *, kind: str = "name, tag or version") -> BadAdapter:
        if not known:
            return BadAdapter(
                f"There is no store in {self.path}, or nothing has a name there.",
                cure="`qadapt adapters add RUN` keeps the adapter of a run; --store names another store.",
            )
        close = difflib.get_close_matches(what, known, n=1)
        hint = f"Did you mean `{close[0]}`? " if close else ""
        return BadAdapter(
            f"There is no {kind} {what!r} in the store {self.path}.",
            cure=f"{hint}There are: {', '.join(sorted(known)[:8])}.",
        )


def _linked(donors: Iterable[Path], target: Path, facts: FileFacts) -> bool:
    """Whether a file of another version that has the same bytes could be shared."""
    for donor in donors:
        if donor.is_file() and sha256_of(donor) == facts.sha256:
            try:
                os.link(donor, target)
            except OSError:  # this disk has no links, or no more of this file
                return False
            return True
    return False


def _copy(source: Path, target: Path, facts: FileFacts) -> None:
    shutil.copyfile(source, target)
    if sha256_of(target) != facts.sha256:
        raise BadAdapter(
            f"{source} was changed while it was being added.", cure="Wait until its writer has ended."
        )
