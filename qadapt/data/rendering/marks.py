"""Contents with marks: characters nobody writes, which a template carries to where it prints a content.

A mark stands inside the outer white space of a content and around every text that the template may look for
in it (`</think>`, say), so that a template that trims or splits does with marks what it does without. Knows
nothing of roles that are learned, of tokens or of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qadapt.data.conversation import Message

_PLANES = ((0xF0000, 0xFFFFD), (0x100000, 0x10FFFD), (0xE000, 0xF8FF))
"""Code points that Unicode leaves to private use; each range is either all free in a row, or not used."""
CALL = "tool_calls"
_FIELDS = ("reasoning_content", "content")


class NoMarks(Exception):
    """A row has so many private-use characters, or contents, that no marks are left."""


@dataclass(frozen=True)
class Part:
    """A piece of a message's content or reasoning, or the name of a call, that has marks around it.

    `is_answer` is False for what a template may leave out of history: reasoning, apart or before `</think>`.
    """

    message: int
    field: str
    is_answer: bool
    opening: str
    closing: str


@dataclass(frozen=True)
class Marked:
    """Turns with marks in their contents, and the parts between marks in their order."""

    turns: tuple[dict[str, Any], ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Reading:
    """A rendered text without its marks, and where each of them stood; `is_once`: none stood twice."""

    text: str
    places: dict[str, int]
    is_once: bool

    def last(self) -> str | None:
        """The last mark of the text."""
        return next(reversed(self.places), None)

    def after(self, mark: str | None) -> str:
        """What follows a mark; without one, all of it."""
        return self.text if mark is None else self.text[self.places[mark] :]


class Marker:
    """Puts marks into messages and finds them again.

    Args:
        sought: Texts that the template may look for in contents, the longest first.
        texts: Everything that may be printed: marks are characters that none of it has.

    Raises:
        NoMarks: There are no such characters.
    """

    def __init__(self, sought: Sequence[str], texts: Iterable[str]) -> None:
        everything = "\0".join(texts)
        for first, last in _PLANES:
            self._plane = re.compile(f"[{chr(first)}-{chr(last)}]")
            if not self._plane.search(everything):
                break
        else:
            raise NoMarks
        self._range = range(first, last + 1)
        self._edges = re.compile(f"({'|'.join(map(re.escape, sought))})")

    def mark(self, messages: Sequence[Message]) -> Marked:
        """The turns of some messages with marks.

        Raises:
            NoMarks: There are more parts than marks.
        """
        marks = iter(self._range)
        turns, parts = [], []
        for number, message in enumerate(messages):
            turn = message.turn
            for field in _FIELDS:
                if turn.get(field):
                    turn[field], found = self._marked(turn[field], number, field, marks)
                    parts += found
            if message.tool_calls:
                turn["tool_calls"], found = self._marked_calls(message.tool_calls, number, marks)
                parts += found
            turns.append(turn)
        return Marked(tuple(turns), tuple(parts))

    def _marked(self, text: str, message: int, field: str, marks: Iterator[int]) -> tuple[str, list[Part]]:
        pieces = self._edges.split(text)
        if not any(pieces[::2]) or "".join(pieces[::2]).isspace():
            pieces = [text]  # nothing but edges: there is no other place for marks
        thought_end = max((at for at, piece in enumerate(pieces) if piece == "</think>"), default=-1)
        parts = []
        for at in range(0, len(pieces), 2):  # the others are the edges
            core = pieces[at].strip()
            if not core:
                continue
            opening, closing = _pair(marks)
            start = pieces[at].index(core)
            end = start + len(core)
            pieces[at] = f"{pieces[at][:start]}{opening}{core}{closing}{pieces[at][end:]}"
            parts.append(Part(message, field, field == "content" and at > thought_end, opening, closing))
        return "".join(pieces), parts

    def _marked_calls(
        self, calls: Sequence[Mapping[str, Any]], message: int, marks: Iterator[int]
    ) -> tuple[list[dict[str, Any]], list[Part]]:
        """Calls with marks around the names of their functions."""
        marked, parts = [], []
        for call in calls:
            opening, closing = _pair(marks)
            function = call["function"]
            name = f"{opening}{function['name']}{closing}"
            marked.append({**call, "function": {**function, "name": name}})
            parts.append(Part(message, CALL, True, opening, closing))
        return marked, parts

    def read(self, text: str) -> Reading:
        """A rendered text taken apart."""
        places: dict[str, int] = {}
        count = 0
        for found in self._plane.finditer(text):
            places[found.group()] = found.start() - count
            count += 1
        return Reading(self._plane.sub("", text), places, len(places) == count)


def _pair(marks: Iterator[int]) -> tuple[str, str]:
    try:
        return chr(next(marks)), chr(next(marks))
    except StopIteration:
        raise NoMarks from None
