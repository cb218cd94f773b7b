"""Which characters of a rendered conversation belong to which message, shown by rendering it with marks.

No marker string of any template is searched for. A content lies where its marks come out. A turn begins where
the generation prompt for it ends: what the template writes after the last content before it, asked to go on,
must be what stands there in the whole text. It ends with what closes it: what follows its content both where
the conversation stops there and where it goes on. What cannot be shown for a row is refused by name. Knows
templates, no tokens; `layouts.py` does the same at the cost of one rendering for rows of a known kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from jinja2 import TemplateError

from qadapt.data.conversation import Conversation, Message
from qadapt.data.rendering.marks import CALL, Marked, Marker, NoMarks, Part, Reading
from qadapt.data.rendering.template import ChatTemplate
from qadapt.errors import BadData

Note = Literal[
    "reasoning left out",
    "content left out",
    "tools left out",
    "control tokens",
    "asked otherwise",
    "joined with the prompt",
]
"""What a row is not refused for, but people should know: what the template does not print (reasoning of
earlier answers, a content beside calls, descriptions of tools), special tokens written out in a content,
answers that do not begin as the generation prompt ends (with `<think>`, say), and turns whose first token
reaches back over their beginning, so that it is not learned (found where tokens are made)."""
ANOTHER = "Give a template that does it with data.template, or change the rows."
_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class Slot:
    """Characters of a message's content or reasoning, or of a part of it."""

    message: int
    field: str
    start: int
    end: int


@dataclass(frozen=True)
class Span:
    """Characters of a turn as the model has to write it: from the generation prompt to the end token."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """A rendered conversation: its text, and the spans of the turns asked for."""

    text: str
    spans: tuple[Span, ...]
    notes: frozenset[Note] = frozenset()


def find_layout(
    row: Conversation, template: ChatTemplate, *, wanted: Sequence[int], ends: Sequence[str]
) -> tuple[Layout, tuple[Slot, ...]]:
    """Renders a conversation; finds the spans of some of its turns, and where all contents lie.

    Args:
        row: The conversation.
        template: The chat template.
        wanted: Numbers of the messages whose spans are needed.
        ends: Texts of the tokens that end an answer.

    Raises:
        BadData: The template refuses the row, or leaves out, doubles or moves what it says, or a span cannot
        be shown, or no end token closes an answer.
    """
    return _Finder(row, template, ends=ends).layout(wanted)


class _Finder:
    """One conversation on its way to a layout."""

    def __init__(self, row: Conversation, template: ChatTemplate, *, ends: Sequence[str]) -> None:
        self.row, self.template, self.ends = row, template, ends
        self.messages = row.messages
        self.notes: set[Note] = set()
        try:
            self.text = template.render(row.turns, tools=row.tools)
        except TemplateError as error:
            raise refusal(row.place, error) from None
        try:
            texts = [
                self.text,
                *(text for each in row.messages for text in (each.content, each.reasoning or "")),
            ]
            self.marker = Marker(template.sought, texts)
            self.marked: Marked = self.marker.mark(row.messages)
        except NoMarks:
            raise self._error(
                "the row uses up all private characters, so nothing in it can be marked", ANOTHER
            ) from None
        self.full = self._whole()

    def layout(self, wanted: Sequence[int]) -> tuple[Layout, tuple[Slot, ...]]:
        """Text, the wanted spans, and the slots."""
        self._note_lost()
        self._check_order()
        spans = tuple(self._span(number) for number in wanted)
        for span in spans:
            self._check_sides(span)
        slots = [
            Slot(part.message, part.field, self._place(part.opening), self._place(part.closing))
            for part in self.marked.parts
            if part.opening in self.full.places
        ]
        slots.sort(key=lambda slot: slot.start)
        return Layout(self.text, spans, frozenset(self.notes)), tuple(slots)

    def _whole(self) -> Reading:
        full = self._read(len(self.messages), asks=False)
        if full is None or full.text != self.text:
            raise self._error(
                "the model's chat template writes the row differently when its contents are marked, so what "
                "belongs to which message cannot be told for sure",
                "Change the row's contents, or leave it out.",
            )
        if not full.is_once:
            raise self._error("the model's chat template prints a message twice", ANOTHER)
        return full

    def _read(self, count: int, *, asks: bool) -> Reading | None:
        """The first messages rendered; None if the template does not take them alone."""
        try:
            text = self.template.render(self.marked.turns[:count], tools=self.row.tools, asks=asks)
        except TemplateError:
            return None
        return self.marker.read(text)

    def _place(self, mark: str) -> int:
        return self.full.places[mark]

    def _parts(self, number: int) -> list[Part]:
        """The parts of a message that are printed."""
        return [
            part for part in self.marked.parts if part.message == number and part.opening in self.full.places
        ]

    def _note_lost(self) -> None:
        """Notes what the template leaves out and may leave out.

        Raises:
            BadData: It leaves out something else.
        """
        for part in self.marked.parts:
            if part.opening in self.full.places and part.closing in self.full.places:
                continue
            message = self.messages[part.message]
            may_drop = message.role == "assistant" and part.opening not in self.full.places
            if may_drop and not part.is_answer:
                if message.is_learned and part.message == self._last_answer():
                    raise self._error(
                        "the model's chat template does not print the reasoning of message "
                        f"{part.message + 1}, the last answer, so the model would learn to answer without it",
                        "Give a template that prints it with data.template, or take it out of the rows.",
                    )
                self.notes.add("reasoning left out")
            elif may_drop and message.tool_calls and part.field != CALL:
                self.notes.add("content left out")
            else:
                raise self._lost(part, message)
        if self.row.tools and not self.template.knows_tools:
            self.notes.add("tools left out")

    def _last_answer(self) -> int:
        return max(number for number, each in enumerate(self.messages) if each.role == "assistant")

    def _lost(self, part: Part, message: Message) -> BadData:
        what = "system prompt" if message.role in _SYSTEM else f"content of message {part.message + 1}"
        if part.field == CALL:
            what = f"tool calls of message {part.message + 1}"
        return self._error(
            f"the model's chat template does not print the {what} ({message.role}) as the row has it", ANOTHER
        )

    def _span(self, number: int) -> Span:
        if self.messages[number].role == "assistant":
            start = self._start(number)
        else:
            start = self._content_start(number)
        return Span(number, start, self._end(number))

    def _content_start(self, number: int) -> int:
        parts = self._parts(number)
        if not parts:
            raise self._unproven(number)
        return min(self._place(part.opening) for part in parts)

    def _start(self, number: int) -> int:
        """Where the generation prompt for a turn ends."""
        prompt = self._read(number, asks=True)
        content = self._content_start(number)
        if prompt is None or number == 0:  # nothing can be asked: the answer's own text is all that is sure
            return content
        anchor = prompt.last()
        base = 0 if anchor is None else self.full.places.get(anchor)
        tail = prompt.after(anchor)
        if base is not None and self.text.startswith(tail, base):
            return base + len(tail)
        if self.text.startswith(prompt.text):
            return len(prompt.text)
        if base is not None:
            start = base + len(self._common(tail, base, until=content))
            if start > base and not self.text[start:content].strip():
                self.notes.add("asked otherwise")
                return start
        raise self._unproven(number)

    def _end(self, number: int) -> int:
        """Where what closes a turn ends."""
        closing = max((part.closing for part in self._parts(number)), key=self._place)
        base = self._place(closing)
        until = self._read(number + 1, asks=False)
        if until is not None and until.last() == closing:
            return base + self._closed(number, self._common(until.after(closing), base))
        if until is not None and self.messages[number].role == "assistant":
            raise self._unproven(number)
        return base + self._closed(number, self._next_end(base))

    def _common(self, rest: str, base: int, *, until: int | None = None) -> str:
        """How much of a text stands at a place of the whole one, too."""
        if until is None and self.text.startswith(rest, base):
            return rest
        pairs = zip(rest, self.text[base : min(base + len(rest), until or len(self.text))], strict=False)
        return rest[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))]

    def _next_end(self, base: int) -> str:
        """The end token right after a content, white space aside: for turns that never stand last."""
        rest = self.text[base:]
        for end in self.ends:
            if rest.lstrip().startswith(end):
                return rest[: rest.index(end) + len(end)]
        return ""

    def _closed(self, number: int, ending: str) -> int:
        """Length of an ending up to its end token."""
        message = self.messages[number]
        if message.tool_calls:  # their arguments may quote an end token
            after = max((ending.rfind(end) + len(end) for end in self.ends if end in ending), default=0)
        else:
            _, after = min(
                ((ending.find(end), ending.find(end) + len(end)) for end in self.ends if end in ending),
                default=(0, 0),
            )
        if after:
            return after
        if message.role == "assistant" and message.is_learned:
            raise self._error(
                f"no end token closes the answer in message {number + 1}: the model would not learn to stop",
                "Give a template that ends answers with data.template; or set data.learn=last, if only the "
                "last answer is closed.",
            )
        return len(ending.rstrip())

    def _check_order(self) -> None:
        """Contents stand in the row's order; but a system prompt may stand in a later turn (Mistral's)."""
        places: list[int] = []
        for number, message in enumerate(self.messages):
            if message.role not in _SYSTEM:
                places += sorted(self._place(part.opening) for part in self._parts(number))
        if places != sorted(places):
            raise self._error("the model's chat template changes the order of the messages", ANOTHER)

    def _check_sides(self, span: Span) -> None:
        """A span stands behind all that comes before it in the row, and before the rest."""
        for part in self.marked.parts:
            if part.opening not in self.full.places or part.message == span.message:
                continue
            is_before = self._place(part.closing) <= span.start
            is_after = self._place(part.opening) >= span.end
            if not (is_before if part.message < span.message else is_after):
                raise self._error(
                    f"the model's chat template moves message {part.message + 1} across the turn in "
                    f"message {span.message + 1}",
                    "Give a template that keeps the order with data.template; or set data.learn=last.",
                )

    def _unproven(self, number: int) -> BadData:
        return self._error(
            f"the model's chat template does not render the turn in message {number + 1} as a continuation "
            "of what stands before it, so what to learn cannot be told for sure",
            "Keep one question and one answer per row for this model, or give another template with "
            "data.template.",
        )

    def _error(self, problem: str, cure: str) -> BadData:
        return BadData(f"{self.row.place}: {problem}.", cure=cure)


def refusal(place: str, error: TemplateError) -> BadData:
    """The error for a conversation that the template refuses itself."""
    return BadData(
        f"{place}: the model's chat template refuses the conversation: {error}",
        cure="Change the roles of the row to what the model knows.",
    )
