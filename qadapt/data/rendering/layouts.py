"""Layouts of many rows at the cost of one rendering each.

Rows of one kind (the same roles in the same order, ...) have the same fixed text between their contents. It
is found once, on a row of that kind with made-up contents, by `spans.py`; a row whose rendered text equals
fixed text and contents put together then has its spans at once, and this equality proves them. Whatever does
not agree, or could make a template decide otherwise (tools, names, a content with `</think>`), goes the exact
way. Knows no tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jinja2 import TemplateError

from qadapt.data.conversation import Conversation, Message
from qadapt.data.rendering.spans import Layout, Note, Slot, Span, find_layout, refusal
from qadapt.data.rendering.template import ChatTemplate
from qadapt.errors import BadData

Learn = Literal["answers", "last", "all"] | tuple[str, ...]
_Key = tuple[tuple[str, bool, bool], ...]
_MOST_KINDS = 4096


def wanted_turns(messages: Sequence[Message], learn: Learn) -> tuple[int, ...]:
    """Numbers of the turns whose spans a rule asks for: those learned; under `all` every answer.

    A turn that says nothing is never learned.
    """
    roles = ("assistant",) if isinstance(learn, str) else learn
    said = [
        number for number, message in enumerate(messages) if message.role in roles and not is_empty(message)
    ]
    if learn == "all":
        return tuple(said)
    chosen = tuple(number for number in said if messages[number].is_learned)
    return chosen[-1:] if learn == "last" else chosen


def is_empty(message: Message) -> bool:
    """Whether a turn has neither content nor reasoning nor calls."""
    return not (message.content.strip() or (message.reasoning or "").strip() or message.tool_calls)


@dataclass(frozen=True)
class _Kind:
    """Fixed texts around the contents of rows of one kind, and its spans as (piece, offset in it) pairs."""

    pieces: tuple[str, ...]
    slots: tuple[Slot, ...]
    spans: tuple[tuple[int, tuple[int, int], tuple[int, int]], ...]
    notes: frozenset[Note]
    needs_clean: bool
    """A span begins with a content itself: outer white space then decides where."""


class Layouts:
    """Finds layouts, and remembers the kinds of rows it has met.

    Args:
        template: The chat template.
        learn: Which turns are learned.
        ends: Texts of the tokens that end an answer.
        control: Texts of the tokenizer's special tokens.
    """

    def __init__(
        self, template: ChatTemplate, *, learn: Learn, ends: Sequence[str], control: Sequence[str]
    ) -> None:
        self._template, self._learn, self._ends = template, learn, tuple(ends)
        self._kinds: dict[_Key, _Kind | None] = {}
        self._control = _any_of(control)
        watched = [*control, *template.sought]
        self._watched = _any_of(watched)
        self._first_characters = sorted({text[0] for text in watched})

    def of(self, row: Conversation) -> Layout:
        """The layout of a row.

        Raises:
            BadData: As `find_layout`.
        """
        key = self._key(row)
        if key is not None:
            kind = self._kind(key)
            layout = None if kind is None else self._fitted(row, kind)
            if layout is not None:
                return layout
        return self.exact(row)

    def exact(self, row: Conversation) -> Layout:
        """The layout found on the row itself.

        Raises:
            BadData: As `find_layout`.
        """
        wanted = wanted_turns(row.messages, self._learn)
        layout, _ = find_layout(row, self._template, wanted=wanted, ends=self._ends)
        if any(self._control.search(text) for each in row.messages for text in _texts(each)):
            return replace(layout, notes=layout.notes | {"control tokens"})
        return layout

    def _key(self, row: Conversation) -> _Key | None:
        """The kind of a row; None for rows whose template may look at more than their kind."""
        if row.tools:
            return None
        for message in row.messages:
            if message.name is not None or message.tool_calls or message.tool_call_id is not None:
                return None
            if not all(
                text and not text.isspace() and not self._is_watched(text) for text in _texts(message)
            ):
                return None
        return tuple(
            (message.role, message.reasoning is not None, message.is_learned) for message in row.messages
        )

    def _is_watched(self, text: str) -> bool:
        may_be = any(character in text for character in self._first_characters)
        return may_be and self._watched.search(text) is not None

    def _kind(self, key: _Key) -> _Kind | None:
        if key not in self._kinds:
            if len(self._kinds) == _MOST_KINDS:
                self._kinds.clear()
            self._kinds[key] = self._new_kind(key)
        return self._kinds[key]

    def _new_kind(self, key: _Key) -> _Kind | None:
        """None where the made-up row is refused: real ones then say why."""
        messages = tuple(
            Message(role, f"c{number}", reasoning=f"r{number}" if reasons else None, is_learned=is_learned)
            for number, (role, reasons, is_learned) in enumerate(key)
        )
        wanted = wanted_turns(messages, self._learn)
        try:
            row = Conversation(messages, "")
            layout, slots = find_layout(row, self._template, wanted=wanted, ends=self._ends)
        except BadData:
            return None
        needs_clean = any(key[number][0] != "assistant" or number == 0 for number in wanted)
        return _kind_of(layout, slots, needs_clean=needs_clean)

    def _fitted(self, row: Conversation, kind: _Kind) -> Layout | None:
        """The row's layout, if it is of the kind as it seems to be.

        Raises:
            BadData: The template refuses the row.
        """
        try:
            text = self._template.render(row.turns)
        except TemplateError as error:
            raise refusal(row.place, error) from None
        starts = _starts(text, kind, row.messages)
        if starts is None:
            return None
        spans = tuple(
            Span(number, starts[first[0]] + first[1], starts[last[0]] + last[1])
            for number, first, last in kind.spans
        )
        return Layout(text, spans, kind.notes)


def _starts(text: str, kind: _Kind, messages: Sequence[Message]) -> list[int] | None:
    """Where each fixed piece begins in a text; None if it is not pieces and contents one after another."""
    starts, at = [0], len(kind.pieces[0])
    if not text.startswith(kind.pieces[0]):
        return None
    for slot, piece in zip(kind.slots, kind.pieces[1:], strict=True):
        for value in _forms(_field(messages[slot.message], slot.field), is_clean=kind.needs_clean):
            if text.startswith(value, at) and text.startswith(piece, at + len(value)):
                starts.append(at + len(value))
                at = starts[-1] + len(piece)
                break
        else:
            return None
    return starts if at == len(text) else None


def _forms(value: str, *, is_clean: bool) -> Iterator[str]:
    """A content as templates write it: as it is, or without outer white space."""
    if not is_clean:
        yield value
        yield value.rstrip()
        yield value.lstrip()
    yield value.strip()


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _texts(message: Message) -> tuple[str, ...]:
    return (message.content,) if message.reasoning is None else (message.content, message.reasoning)


def _field(message: Message, field: str) -> str:
    return message.content if field == "content" else message.reasoning or ""


def _kind_of(layout: Layout, slots: Sequence[Slot], *, needs_clean: bool) -> _Kind:
    edges = [0, *(edge for slot in slots for edge in (slot.start, slot.end)), len(layout.text)]
    pieces = tuple(layout.text[first:last] for first, last in zip(edges[::2], edges[1::2], strict=True))

    def placed(position: int) -> tuple[int, int]:
        piece = next(at for at in range(len(pieces)) if position <= edges[2 * at + 1])
        return piece, position - edges[2 * piece]

    spans = tuple((span.message, placed(span.start), placed(span.end)) for span in layout.spans)
    return _Kind(pieces, tuple(slots), spans, layout.notes, needs_clean)
