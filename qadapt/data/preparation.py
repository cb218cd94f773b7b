"""Rows to tokens, one after another: rendered by the contract, cut, and what became of each counted.

Knows no file and no store: takes rows, gives tokens, and holds none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from qadapt.data.conversation import Row
from qadapt.data.cutting import cut
from qadapt.data.prompt import PromptContract
from qadapt.data.reading.sources import MOST_CHARACTERS, MOST_LISTED, Skipped
from qadapt.data.rendering.encoding import Refused
from qadapt.data.tokens import Tokens

_MOST_PLACES = 3


@dataclass
class Found:
    """How many rows something was found in; `places` are the first three."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """One more."""
        self.count += 1
        if len(self.places) < _MOST_PLACES:
            self.places.append(place)


@dataclass
class Tally:
    """What became of the rows of one part of the data, training rows or held-out ones.

    Attributes:
        read: Rows that were read.
        cut: How they were cut (`turns`, `inside`, `pieces`) → which.
        left_out: Why they have nothing to learn → which.
        notes: What the template leaves out of them, or finds in them → which.
        refused: Rows that cannot be trained on, left out as asked; at most `MOST_LISTED`.
        refused_rows: All of them.
    """

    read: int = 0
    cut: dict[str, Found] = field(default_factory=dict)
    left_out: dict[str, Found] = field(default_factory=dict)
    notes: dict[str, Found] = field(default_factory=dict)
    refused: list[Skipped] = field(default_factory=list)
    refused_rows: int = 0

    def values(self) -> dict[str, Any]:
        """Plain values for JSON, without the list."""
        return {name: value for name, value in asdict(self).items() if name != "refused"}


def tally_of(values: dict[str, Any]) -> Tally:
    """The tally of plain values, without the list."""
    cut, left_out, notes = (
        {what: Found(**each) for what, each in values[name].items()} for name in ("cut", "left_out", "notes")
    )
    return Tally(values["read"], cut, left_out, notes, refused_rows=values["refused_rows"])


def token_rows(
    rows: Iterable[Row], contract: PromptContract, *, length: int, skips_refused: bool, tally: Tally
) -> Iterator[tuple[int, Tokens]]:
    """The rows as tokens, each with the number (by `tally.read`, from 0) of the row that it was made of.

    Args:
        rows: Read a batch ahead.
        contract: How they become tokens.
        length: Longest row in tokens.
        skips_refused: Leave out a row that the contract refuses instead of raising its error.
        tally: Counts go on from where they are.

    Raises:
        BadData: The contract refuses a row.
    """
    for encoded in contract.encode_all(rows):
        number, tally.read = tally.read, tally.read + 1
        if isinstance(encoded, Refused):
            if not skips_refused:
                raise encoded.error
            _refuse(encoded, tally)
            continue
        made = cut(encoded, length)
        if made.how == "nothing":
            tally.left_out.setdefault(made.why, Found()).add(encoded.place)
        elif made.how != "whole":
            tally.cut.setdefault(made.how, Found()).add(encoded.place)
        for note in sorted(encoded.notes):
            tally.notes.setdefault(note, Found()).add(encoded.place)
        for row in made.rows:
            yield number, row


def _refuse(refused: Refused, tally: Tally) -> None:
    tally.refused_rows += 1
    if len(tally.refused) < MOST_LISTED:
        problem = refused.error.problem
        text = problem if len(problem) <= MOST_CHARACTERS else f"{problem[:MOST_CHARACTERS]}..."
        tally.refused.append(Skipped(refused.place, text))
