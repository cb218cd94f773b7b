"""Files of a folder or a repository that say on what terms it may be used: known by name, and copied."""

from __future__ import annotations

import re
import shutil
from itertools import chain, count
from pathlib import Path

_NAME = re.compile(
    r"(\w+[-_])?(licen[cs]e|notice|copying|use_policy)s?([-_]\w+)*(\.(txt|md|rst|pdf|html))?", re.IGNORECASE
)
_NUMBER = re.compile(r"-\d+$")


def is_licence(name: str) -> bool:
    """Whether a file holds terms of use, such as LICENSE, licence.md, NOTICE.txt, MODEL_LICENSE."""
    return _NAME.fullmatch(name) is not None


def copy_licences(source: Path, folder: Path) -> None:
    """Copies the terms of use of a folder into another, beside those that are there.

    Other terms of the same name are kept: the later ones get a number, such as LICENSE-2.txt.
    """
    for path in sorted(source.iterdir(), key=lambda path: (path.stem, path.suffix)):
        if path.is_file() and is_licence(path.name):
            stem = _NUMBER.sub("", path.stem)
            numbered = (f"{stem}-{number}{path.suffix}" for number in count(2))
            for name in chain((path.name,), numbered):
                place = folder / name
                if not place.exists():
                    shutil.copyfile(path, place)
                if place.read_bytes() == path.read_bytes():
                    break
