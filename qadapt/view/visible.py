"""Text of strangers made fit to be looked at: nothing in it can steer a terminal, and what decides is seen.

White space is shown where it decides (line ends, tabs, spaces at an edge or in a row of them), and characters
that print nothing, steer a terminal, or turn the direction of writing are named by their number. The result
is still text: whoever writes HTML escapes it, too. Knows no screen.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

_JOINERS = "\u200c\u200d"  # they shape letters and emoji, and do nothing else
_HIDDEN_KINDS = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
_PARTS = re.compile(r"\r\n|\n|\t| +|[^\n\t ]+|\r")


@dataclass(frozen=True)
class Signs:
    """How what is not seen is drawn."""

    line_end: str = "↵"
    tab: str = "⇥"
    space: str = "·"
    opens: str = "‹"
    closes: str = "›"
    gap: str = "…"

    def named(self, name: str) -> str:
        """A sign for what has only a name, such as `‹1b›`."""
        return f"{self.opens}{name}{self.closes}"


SIGNS = Signs()
PLAIN_SIGNS = Signs(line_end="\\n", tab="\\t", space="_", opens="<", closes=">", gap="...")
"""For a screen that has ASCII only."""

Part = tuple[str, bool]
"""Some text, and whether it is a sign that stands for something else."""


def visible(text: str, *, starts: bool = False, ends: bool = False, signs: Signs = SIGNS) -> Iterator[Part]:
    """The text in parts; a line end is its sign, then the line end.

    Args:
        text: Anything.
        starts: Spaces at its start decide, as something else stands before it.
        ends: Spaces at its end do.
        signs: What to draw.
    """
    parts = _PARTS.findall(text)
    for place, part in enumerate(parts):
        if part == "\n":
            yield signs.line_end, True
            yield "\n", False
        elif part == "\r\n":
            yield signs.named("0d") + signs.line_end, True
            yield "\n", False
        elif part == "\t":
            yield signs.tab, True
        elif part[0] == " ":
            is_edge = (starts and place == 0) or (ends and place == len(parts) - 1)
            is_seen = is_edge or len(part) > 1 or (place + 1 < len(parts) and parts[place + 1][0] in "\r\n\t")
            yield (signs.space * len(part), True) if is_seen else (part, False)
        else:
            yield from _named(part, signs)


def printable(text: str, *, signs: Signs = SIGNS) -> str:
    """The text as it is, tabs and line ends too; what would steer a terminal or print nothing is a sign."""
    return "".join(
        signs.named(f"{ord(each):02x}") if each not in "\n\t" and _is_hidden(each) else each for each in text
    )


def one_line(text: str, *, signs: Signs = SIGNS) -> str:
    """The text on one line, with signs for what would not print."""
    return "".join(part for part, is_sign in visible(text, signs=signs) if is_sign or part != "\n")


def _named(text: str, signs: Signs) -> Iterator[Part]:
    """A word; its characters that print nothing or steer are named."""
    start = 0
    for place, character in enumerate(text):
        if _is_hidden(character):
            if start < place:
                yield text[start:place], False
            yield signs.named(f"{ord(character):02x}"), True
            start = place + 1
    if start < len(text):
        yield text[start:], False


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN_KINDS and character not in _JOINERS
