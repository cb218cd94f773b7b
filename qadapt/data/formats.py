"""What a row looks like, and the conversation in it.

A conversation is a list of messages with a role and a text. Knows the shapes of rows, no files and no tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qadapt.errors import BadData

Format = Literal["messages", "prompt-completion"]
ROLES = ("system", "user", "assistant")

_KEYS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
}


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and what."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """The turns of one row; `place` names the row for people, such as `train.jsonl, line 12`."""

    messages: tuple[Message, ...]
    place: str

    @property
    def turns(self) -> list[dict[str, str]]:
        """The form that chat templates take."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


def recognise(row: object, *, place: str) -> Format:
    """The format of a row, by its keys.

    Raises:
        BadData: The row has the keys of no format.
    """
    if isinstance(row, Mapping):
        for name, keys in _KEYS.items():
            if all(key in row for key in keys):
                return name
    found = f"the keys {', '.join(map(repr, row))}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
    raise BadData(
        f"{place}: a row is an object with `messages`, or `prompt` and `completion`; this one has {found}.",
        cure="Correct the row, or remove it.",
    )


def read_conversation(row: object, form: Format, *, place: str) -> Conversation:
    """The conversation of a row.

    Raises:
        BadData: The row is no conversation with at least one assistant turn.
    """
    if not isinstance(row, Mapping) or not all(key in row for key in _KEYS[form]):
        keys = " and ".join(f"`{key}`" for key in _KEYS[form])
        raise BadData(f"{place}: the row has no {keys}.", cure="Correct the row, or remove it.")
    if form == "prompt-completion":
        turns = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    else:
        turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise BadData(f"{place}: `messages` is not a list of turns.", cure="Correct the row, or remove it.")
    messages = tuple(
        _read_message(turn, place=f"{place}, message {number}") for number, turn in enumerate(turns, 1)
    )
    if not any(message.role == "assistant" and message.content for message in messages):
        raise BadData(f"{place}: no assistant turn, so there is nothing to learn.", cure="Remove the row.")
    return Conversation(messages, place)


def _read_message(turn: Any, *, place: str) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
        raise BadData(f"{place}: a message has `role` and `content`.", cure="Correct the row, or remove it.")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise BadData(
            f"{place}: the role {role!r} is not one of {', '.join(ROLES)}.",
            cure="Correct the row, or remove it.",
        )
    if not isinstance(content, str):
        raise BadData(
            f"{place}: `content` is {type(content).__name__}, not a text.",
            cure="Correct the row, or remove it.",
        )
    return Message(role, content)
