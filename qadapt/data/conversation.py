"""What a row of data says, before any template: a conversation, or a raw text. Knows no files, no tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Message(NamedTuple):
    """One turn: who speaks, and what.

    `name` tells several speakers of one role apart. An assistant's turn may have `reasoning`, which stands
    apart from its content, and `tool_calls`, each `{"type": "function", "id": ..., "function": {"name": ...,
    "arguments": {...}}}` as OpenAI writes them, but with arguments as values, as chat templates take them;
    a tool's turn names the call it answers. An answer that is not `is_learned` is context only (OpenAI's
    `weight` 0).
    """

    role: str
    content: str
    name: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    is_learned: bool = True

    @property
    def turn(self) -> dict[str, Any]:
        """The form that chat templates take: what is not there has no key."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            turn["name"] = self.name
        if self.reasoning is not None:
            turn["reasoning_content"] = self.reasoning
        if self.tool_calls:
            turn["tool_calls"] = list(self.tool_calls)
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn


@dataclass(frozen=True)
class Conversation:
    """The turns of one row; `place` names the row for people, such as `train.jsonl, line 12`.

    `tools` are the functions the assistant may call, as OpenAI describes them (JSON schema).
    """

    messages: tuple[Message, ...]
    place: str
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The form that chat templates take."""
        return [message.turn for message in self.messages]


@dataclass(frozen=True)
class Document:
    """A raw text, all of it learned (continued pre-training)."""

    text: str
    place: str


Row = Conversation | Document
