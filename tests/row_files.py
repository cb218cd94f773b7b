"""Files of rows for tests of the readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qadapt.data.conversation import Conversation, Document, Message, Row
from qadapt.data.reading.sources import RowReader
from qadapt.errors import BadData

ASKED = (Message("user", "two plus two?"), Message("assistant", "four"))
PAIR = {"prompt": "two plus two?", "completion": "four"}
TURNS = [{"role": "user", "content": "two plus two?"}, {"role": "assistant", "content": "four"}]


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_conversation(folder: Path, row: object, **rules: Any) -> Conversation:
    """The conversation of a file's only row."""
    [conversation] = RowReader(**rules).read(write_rows(folder / "row.jsonl", row))
    assert isinstance(conversation, Conversation)
    return conversation


def read_row(folder: Path, row: object, **rules: Any) -> tuple[Message, ...]:
    """The messages of a file's only row."""
    return read_conversation(folder, row, **rules).messages


def problem_of(path: Path | str, **rules: Any) -> str:
    with pytest.raises(BadData) as caught:
        RowReader(**rules).read(path)
    return caught.value.problem


def texts(rows: list[Row]) -> list[tuple[Message, ...]]:
    return [row.messages for row in rows if isinstance(row, Conversation)]


def documents(rows: list[Row]) -> list[str]:
    return [row.text for row in rows if isinstance(row, Document)]


def contents(rows: list[Row]) -> list[str]:
    return [message.content for messages in texts(rows) for message in messages]
