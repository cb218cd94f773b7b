"""Rows that are too long: whole turns are left out at the end where that leaves something to learn.

Knows no text and no template: where turns end stands in the row. A document is cut into pieces, which hold
all of its tokens; the first of each is context only, as nothing stands before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from qadapt.data.tokens import Tokens

if TYPE_CHECKING:
    from qadapt.data.rendering.encoding import Encoded

How = Literal["whole", "turns", "inside", "pieces", "nothing"]
Why = Literal["", "truncated", "no learned turn", "empty answers"]


@dataclass(frozen=True)
class Cut:
    """What is left of a row, and how it was cut.

    `whole`: not at all; `turns`: after a whole turn; `inside`: inside the first learned turn, which is longer
    than the length; `pieces`: a document, all its tokens; `nothing`: no row, `why` says the reason.
    """

    rows: tuple[Tokens, ...]
    how: How
    why: Why = ""


def cut(encoded: Encoded, length: int) -> Cut:
    """A row within `length` tokens, at least 2."""
    if encoded.is_document:
        return _pieces(encoded, length)
    if not _learns(encoded, len(encoded.ids)):
        return Cut((), "nothing", encoded.unlearned or "no learned turn")
    if len(encoded.ids) <= length:
        return Cut((_part(encoded, 0, len(encoded.ids)),), "whole")
    fitting = [end for end in encoded.turn_ends if end <= length and _learns(encoded, end)]
    if fitting:
        return Cut((_part(encoded, 0, max(fitting)),), "turns")
    if _learns(encoded, length):
        return Cut((_part(encoded, 0, length),), "inside")
    return Cut((), "nothing", "truncated")


def _learns(encoded: Encoded, length: int) -> bool:
    """Whether the first `length` tokens have a learned one; the very first has nothing to predict it."""
    return bool(encoded.supervised[1:length].any())


def _pieces(encoded: Encoded, length: int) -> Cut:
    """All of a document. A single token left over would teach nothing: it takes one from the piece before.

    Of pieces of two tokens none can be taken; then the last one may be a single token.
    """
    total = len(encoded.ids)
    if total < 2:
        return Cut((), "nothing", "empty answers")
    if total <= length:
        return Cut((_part(encoded, 0, total),), "whole")
    edges = [*range(0, total, length), total]
    if edges[-1] - edges[-2] == 1 and length > 2:
        edges[-2] -= 1
    count = len(edges) - 1
    pieces = (
        _part(encoded, first, last, place=f"{encoded.place}, piece {number} of {count}")
        for number, (first, last) in enumerate(pairwise(edges), 1)
    )
    return Cut(tuple(pieces), "pieces")


def _part(encoded: Encoded, first: int, last: int, *, place: str | None = None) -> Tokens:
    return Tokens(encoded.ids[first:last], encoded.supervised[first:last], place or encoded.place)
