"""Reads rows from files: JSON (lines) with the place of every mistake, CSV and Parquet through `datasets`.

Knows files, not tokens. A file is read row by row; paths are relative to the folder the command runs in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from qadapt.data.formats import Conversation, Format, read_conversation, recognise
from qadapt.errors import BadData

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_conversations(path: Path, *, form: str = "auto", limit: int | None = None) -> list[Conversation]:
    """All conversations of a file, in its order.

    Args:
        path: A `.jsonl`, `.json`, `.csv` or `.parquet` file.
        form: A format's name, or `auto`: that of the first row.
        limit: Read only so many rows.

    Raises:
        BadData: The file is missing, empty, unreadable, or a row is no conversation; names file and line.
    """
    if not path.exists():
        raise BadData(
            f"There is no data file {str(path)!r} (looked at {path.absolute()}).",
            cure="Correct the path; it is relative to the folder you run the command in.",
        )
    conversations: list[Conversation] = []
    known: Format | None = None if form == "auto" else cast("Format", form)
    for place, row in _rows(path):
        known = known or recognise(row, place=place)
        conversations.append(read_conversation(row, known, place=place))
        if len(conversations) == limit:
            break
    if not conversations:
        raise BadData(f"{path} has no rows.", cure="Give a file with at least one conversation.")
    return conversations


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _json_lines(path)
    if suffix == ".json":
        return _json_list(path)
    if suffix in (".csv", ".parquet"):
        return _table(path)
    raise BadData(
        f"{path} ends in {suffix!r}, which is not read.",
        cure=f"Give one of: {', '.join(SUFFIXES)}.",
    )


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _json(line, place=place)
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is not UTF-8 text: {error}", cure="Save the file as UTF-8.") from None
    except OSError as error:
        raise BadData(f"{path} cannot be read: {error}", cure="Give a readable file.") from None


def _json(text: str, *, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadData(f"{place}: not JSON: {error}", cure="Correct the line, or remove it.") from None
    except RecursionError:
        raise BadData(f"{place}: nested too deeply.", cure="Correct the line, or remove it.") from None


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"{path} cannot be read: {error}", cure="Give a readable UTF-8 file.") from None
    rows = _json(text, place=str(path)) if text.strip() else []
    if not isinstance(rows, list):
        raise BadData(
            f"{path} holds no list of rows.", cure="Wrap the rows in [ ], or use JSON lines (.jsonl)."
        )
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from datasets import Dataset  # a second of imports that JSON does not need

    try:
        read = Dataset.from_parquet if path.suffix.lower() == ".parquet" else Dataset.from_csv
        table = read(str(path), keep_in_memory=True)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise BadData(f"{path} cannot be read: {error}", cure="Give a readable file.") from None
    for number, row in enumerate(table, 1):
        yield f"{path}, row {number}", row
