"""Names and tags: small files that say which version is meant, replaced as a whole by one rename.

A name is what one asks for day by day; it remembers the versions it meant before, so that it can go back. A
tag says one thing of one version (`best`, `v1`) and remembers nothing. Knows no versions, only their ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from qadapt.durable import flush_folder, make_folder, write_whole
from qadapt.errors import BadAdapter

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ID, _WHOLE_ID = re.compile(r"[0-9a-f]{4,64}"), re.compile(r"[0-9a-f]{64}")
_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9])(\..*)?")
_FORMAT = 1
_Meant = TypeVar("_Meant")


@dataclass(frozen=True)
class Name:
    """What a name means and meant.

    Attributes:
        used: Ids in the order in which they were used; the last is the one in use.
        left: Ids it was rolled back from.
    """

    used: tuple[str, ...]
    left: tuple[str, ...] = ()

    @property
    def current(self) -> str:
        """The id in use."""
        return self.used[-1]

    def moved_to(self, version: str) -> Name:
        """With another version in use."""
        if version == self.current:
            return self
        return Name((*self.used, version), tuple(each for each in self.left if each != version))

    def rolled_back(self) -> Name:
        """With the version before in use."""
        left = tuple(each for each in self.left if each != self.current)
        return Name(self.used[:-1], (*left, self.current))

    def without(self, version: str) -> Name:
        """As if another than the version in use had never been."""
        assert version != self.current
        used = [each for each in self.used if each != version]
        once = [each for number, each in enumerate(used) if number == 0 or used[number - 1] != each]
        return Name(tuple(once), tuple(each for each in self.left if each != version))


def check_name(text: str, *, what: str) -> None:
    """Checks that a text can be a name or a tag, on every system.

    Args:
        text: The name.
        what: `name` or `tag`.

    Raises:
        BadAdapter: It cannot.
    """
    cure = "Use a-z, 0-9, `-`, `_` and `.`, at most 64, such as `summaries-2`."
    if not _NAME.fullmatch(text) or text.endswith(".") or _DEVICES.fullmatch(text):
        raise BadAdapter(f"{text!r} cannot be a {what} in the store.", cure=cure)
    if looks_like_id(text):
        raise BadAdapter(
            f"{text!r} cannot be a {what} in the store: it reads as the beginning of a version's id.",
            cure=f"Give one with another letter or a `-`, such as `{text[:40]}-1`.",
        )


def looks_like_id(text: str) -> bool:
    """Whether a text reads as an id or as the beginning of one."""
    return bool(_ID.fullmatch(text))


def read_names(folder: Path) -> dict[str, Name]:
    """All names of a store, by their files.

    Raises:
        BadAdapter: One is damaged.
    """
    return dict(_pointers(folder, lambda values: Name(_ids(values["used"]), _ids(values["left"], least=0))))


def read_tags(folder: Path) -> dict[str, str]:
    """All tags of a store with the ids they stand for.

    Raises:
        BadAdapter: One is damaged.
    """
    return dict(_pointers(folder, lambda values: _ids([values["id"]])[0]))


def write_name(folder: Path, name: str, value: Name) -> None:
    """Lets a name mean this from now on."""
    _write(folder / f"{name}.json", {"version": _FORMAT, **asdict(value)})


def write_tag(folder: Path, tag: str, version: str) -> None:
    """Lets a tag stand for a version from now on."""
    _write(folder / f"{tag}.json", {"version": _FORMAT, "id": version})


def remove(folder: Path, pointer: str) -> None:
    """Takes a name or a tag away; what it stood for stays."""
    (folder / f"{pointer}.json").unlink()
    flush_folder(folder)


def _write(path: Path, values: dict[str, object]) -> None:
    make_folder(path.parent)
    write_whole(path, json.dumps(values, indent=2) + "\n")


def _pointers(folder: Path, read: Callable[[dict[str, Any]], _Meant]) -> Iterator[tuple[str, _Meant]]:
    """The files of a folder by what they are called; one that is taken away meanwhile is passed over."""
    for path in sorted(folder.glob("*.json")):
        if not _NAME.fullmatch(path.stem):
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["version"] != _FORMAT:
                raise ValueError("it is of another release")
            meant = read(values)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BadAdapter(
                f"{path} does not say which version is meant: {error}.",
                cure=f"Remove that file, then set it again with `qadapt adapters use {path.stem} VERSION` or "
                f"`qadapt adapters tag VERSION {path.stem}`.",
            ) from None
        yield path.stem, meant


def _ids(values: Any, *, least: int = 1) -> tuple[str, ...]:
    """Whole ids as they stand in a file."""
    is_list = isinstance(values, list) and len(values) >= least
    if not is_list or not all(isinstance(each, str) and _WHOLE_ID.fullmatch(each) for each in values):
        raise ValueError(f"{values!r} names no version")
    return tuple(values)
