"""The rows that an adapter is measured on: of a file, those that its run held out, or those it was made of.

Read as the run read them, and only where they are what they were: others would be rows it was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qadapt.data.conversation import Conversation
from qadapt.data.prepared import Part, Reading, Source, identify, prepare_part, read_sources
from qadapt.data.prompt import PromptContract
from qadapt.data.reading.sources import RowReader
from qadapt.data.row_notes import Note, no_rows_left, part_notes
from qadapt.data.rows import Rows, RowSet
from qadapt.errors import BadRun
from qadapt.recipe import Recipe
from qadapt.running.material import divided, held_out_sources, reading_of, training_sources, virtual_tokens_of

_LENGTH = 2048
"""The longest row in tokens where no recipe says it, as `data.length` is without a word."""


@dataclass(frozen=True)
class Chosen:
    """Rows to evaluate on, and the first of the conversations that they were made of.

    `parts` hold the stores the rows lie in; `notes` say what became of the rows of a file, with cures.
    """

    rows: RowSet
    conversations: list[Conversation]
    parts: tuple[Part, ...]
    notes: tuple[Note, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.rows.lengths.max(initial=1))


def rows_to_evaluate(
    recipe: Recipe | None,
    contract: PromptContract,
    *,
    data: Path | None,
    fingerprint: str,
    conversations: int,
    in_front: int = 0,
) -> Chosen:
    """The rows of a file, or those that the recipe's run held out.

    Args:
        recipe: The run's; None: it is not known, so a file must be given.
        contract: How rows become tokens.
        data: The file.
        fingerprint: Of the rows that the run was made of.
        conversations: So many are wanted as such, too.
        in_front: Virtual tokens in front of every row, where no recipe says so.

    Raises:
        BadRun: No file is given, and the run held out none or its rows are others today.
        BadData: The file or a row of it cannot be used, or no row has anything to learn.
    """
    if data is not None:
        reading = Reading("auto", (), False, _LENGTH - in_front) if recipe is None else reading_of(recipe)
        front = in_front if recipe is None else virtual_tokens_of(recipe)
        return _rows_of_file(reading, contract, data, front=front, conversations=conversations)
    if recipe is None:
        raise BadRun("Nothing says which rows were held out.", cure="Give a file of rows with --data.")
    return _held_out(recipe, contract, fingerprint=fingerprint, conversations=conversations)


def _rows_of_file(
    reading: Reading, contract: PromptContract, data: Path, *, front: int, conversations: int
) -> Chosen:
    reading, sources = replace(reading, skips_malformed=False), (Source(str(data)),)
    part = prepare_part(identify(sources), reading, contract)
    rows = RowSet(part.prepared.store).behind(front)
    if not len(rows):
        raise no_rows_left("evaluate on", part.tally)
    first = _conversations(sources, reading.reader(), rows=rows, most=conversations)
    return Chosen(rows, first, (part,), tuple(part_notes(part, "rows", length=reading.length)))


def _held_out(recipe: Recipe, contract: PromptContract, *, fingerprint: str, conversations: int) -> Chosen:
    training, own = training_sources(recipe), held_out_sources(recipe)
    if not own and not recipe.data.held_out_fraction:
        raise BadRun(f"The run {recipe.run.name} held out no rows.", cure="Give a file of rows with --data.")
    rows, parts = _rows_of_run(recipe, contract, fingerprint=fingerprint)
    reader = reading_of(recipe).reader()
    first = _conversations(own or training, reader, rows=rows.held_out, most=conversations)
    return Chosen(rows.held_out, first, parts)


def rows_to_prove(
    recipe: Recipe | None, contract: PromptContract, *, fingerprint: str
) -> tuple[Chosen, bool]:
    """The rows that a run held out, or those it trained on if there are none; whether they were held out.

    Args:
        recipe: The run's; None: it is not known.
        contract: How rows become tokens.
        fingerprint: Of the rows that the run was made of.

    Raises:
        BadRun: The rows are others today, or not known.
        BadData: A file or a row of it cannot be used.
    """
    if recipe is None:
        raise BadRun(
            "Nothing says which rows the adapter was trained on.",
            cure="Its run knows them, and so does the store if it was added as a run.",
        )
    rows, parts = _rows_of_run(recipe, contract, fingerprint=fingerprint)
    are_held_out = len(rows.held_out) > 0
    return Chosen(rows.held_out if are_held_out else rows.train, [], parts), are_held_out


def _rows_of_run(
    recipe: Recipe, contract: PromptContract, *, fingerprint: str
) -> tuple[Rows, tuple[Part, ...]]:
    """The rows that a run was made of, and the parts that hold their stores."""
    reading, sources = reading_of(recipe), (training_sources(recipe), held_out_sources(recipe))
    parts = [prepare_part(identify(each), reading, contract) for each in sources if each]
    rows = divided(recipe, parts, contract).rows
    if rows.fingerprint != fingerprint:
        raise BadRun(
            f"The rows are not those that the run {recipe.run.name} was made of: others would be held out, "
            "and some of them were trained on.",
            cure="Put the files of rows back as they were, or give a file of other rows with --data.",
        )
    return rows, tuple(parts)


def _conversations(
    sources: tuple[Source, ...], reader: RowReader, *, rows: RowSet, most: int
) -> list[Conversation]:
    """The first conversations that some rows of these sources were made of."""
    found: list[Conversation] = []
    if not most:
        return found
    wanted, at = np.unique(rows.numbers()), 0
    for number, row in enumerate(read_sources(sources, reader)):
        if number == wanted[at]:
            at += 1
            if isinstance(row, Conversation):
                found.append(row)
            if len(found) == most or at == len(wanted):
                break
    return found
