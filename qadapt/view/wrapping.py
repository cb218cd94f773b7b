"""Styled text in lines of a width, no character lost.

rich measures a line as a whole but cuts it by its segments, and these are wider together where they split
one drawn character (an emoji of several code points, its parts in different styles): the end of the line is
gone. Here a line is as wide as its segments are. Knows no tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

Part = tuple[str, Style]
_WORDS = re.compile(r"\n| +|[^ \n]+")


def wrapped(parts: Iterable[Part], width: int) -> Iterator[Text]:
    """The lines; words stay whole where they fit, blanks at the end of a line that is full are dropped.

    Args:
        parts: Text and its style; a line end is a line end.
        width: Columns.
    """
    line = _Line(width)
    word: list[Part] = []
    for text, style in parts:
        for piece in _WORDS.findall(text):
            if piece[0] not in " \n":
                word.append((piece, style))
                continue
            yield from line.add_word(word)
            word = []
            if piece == "\n":
                yield line.take()
            else:
                line.add_blank(piece, style)
    yield from line.add_word(word)
    if line.is_begun:
        yield line.take()


class _Line:
    """The line that is being filled."""

    def __init__(self, width: int) -> None:
        self.width = max(2, width)
        self.used = 0
        self._text = Text(no_wrap=True)

    @property
    def is_begun(self) -> bool:
        """Whether there is anything on it, be it without width."""
        return bool(self._text)

    def take(self) -> Text:
        """The line as it is; the next one is empty."""
        text, self._text, self.used = self._text, Text(no_wrap=True), 0
        return text

    def add_blank(self, blank: str, style: Style) -> None:
        """Blanks, as far as there is room."""
        self._put(blank[: self.width - self.used], style)

    def add_word(self, word: list[Part]) -> Iterator[Text]:
        """A word, and the lines that it fills."""
        size = sum(cell_len(text) for text, _ in word)
        if self.used + size <= self.width:
            for text, style in word:
                self._put(text, style)
            return
        if self.used and size <= self.width:
            yield self.take()
        for text, style in word:
            for character in text:
                if self.used + cell_len(character) > self.width:
                    yield self.take()
                self._put(character, style)

    def _put(self, text: str, style: Style) -> None:
        self._text.append(text, style=style)
        self.used += cell_len(text)
