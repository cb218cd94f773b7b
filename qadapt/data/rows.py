"""From files to the rows of a run: read, rendered by the contract, cut, checked, held-out ones set apart."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qadapt.data.conversation import Conversation, Document, Row
from qadapt.data.prompt import PromptContract
from qadapt.data.sources import RowReader
from qadapt.data.tokens import Tokens
from qadapt.errors import BadData


@dataclass(frozen=True)
class Rows:
    """All rows of a run as tokens, and the token that fills them up."""

    train: list[Tokens]
    held_out: list[Tokens]
    pad_id: int
    truncated: int = 0
    warnings: tuple[tuple[str, str], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the training rows."""
        return sum(len(row.ids) for row in self.train)

    @property
    def supervised_tokens(self) -> int:
        """Learned tokens of one pass over the training rows."""
        return sum(row.supervised_count for row in self.train)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, held-out ones included."""
        return max(len(row.ids) for row in [*self.train, *self.held_out])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every token and whether it is learned."""
        digest = hashlib.sha256()
        for row in [*self.train, *self.held_out]:
            digest.update(len(row).to_bytes(8, "little") + row.ids.tobytes() + row.supervised.tobytes())
        return digest.hexdigest()


def make_rows(
    train: Sequence[Conversation], held_out: Sequence[Conversation], contract: PromptContract, *, length: int
) -> Rows:
    """Renders and cuts the conversations of a run.

    Args:
        train: Conversations to learn.
        held_out: Conversations to evaluate on, if any.
        contract: How they become tokens.
        length: Longest row in tokens; longer ones are cut at the end.

    Raises:
        BadData: The template refuses a row, or nothing is left to train, or to evaluate on.
    """
    learned, apart = (cut_rows(part, contract, length=length) for part in (train, held_out))
    for part, given, purpose in ((learned, train, "train on"), (apart, held_out, "evaluate on")):
        if given and not part.rows:
            raise no_rows_left(purpose, length=length)
    return Rows(
        train=learned.rows,
        held_out=apart.rows,
        pad_id=contract.pad_id,
        truncated=learned.truncated + apart.truncated,
        warnings=(
            *_cut_warnings(learned, "rows", length=length),
            *_cut_warnings(apart, "held-out rows", length=length),
            *_end_warnings(learned, contract),
        ),
    )


def no_rows_left(purpose: str, *, length: int) -> BadData:
    """The error for rows that were given and all lost their answers."""
    return BadData(
        f"No row is left to {purpose}: within {length} tokens, none has an answer.",
        cure="Raise data.length, or shorten what stands before the answers.",
    )


def split_conversations(
    sources: Sequence[tuple[Path, int | None]],
    *,
    held_out: Path | float,
    seed: int,
    form: str = "auto",
    reader: RowReader | None = None,
) -> tuple[list[Conversation], list[Conversation]]:
    """The conversations to train on, and those to hold out.

    Args:
        sources: Files of training rows, each with how many of its first rows to take (None: all).
        held_out: A file of rows to hold out, or the share of the training rows to.
        seed: Of the draw.
        form: A format's name, or `auto`.
        reader: How files are read; None: by `form`, and a row that cannot be used is an error.

    Raises:
        BadData: A file or a row cannot be used.
    """
    reader = reader or RowReader(form=form)
    conversations = [row for path, limit in sources for row in _conversations(reader.rows(path, limit=limit))]
    if isinstance(held_out, Path):
        return conversations, list(_conversations(reader.rows(held_out)))
    return _hold_out(conversations, held_out, seed=seed)


def _conversations(rows: Iterator[Row]) -> Iterator[Conversation]:
    for row in rows:
        if isinstance(row, Document):
            raise BadData(f"{row.place}: raw text is not trained on yet.", cure="Give conversations.")
        yield row


def _hold_out(
    conversations: list[Conversation], share: float, *, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    count = round(len(conversations) * share) if share else 0
    if share and not 0 < count < len(conversations):
        raise BadData(
            f"data.held_out_fraction {share} of {len(conversations)} rows is {count}; both parts need rows.",
            cure="Change the fraction, or give more rows.",
        )
    apart = set(random.Random(f"held-out/{seed}").sample(range(len(conversations)), count))
    held = [row for index, row in enumerate(conversations) if index in apart]
    return [row for index, row in enumerate(conversations) if index not in apart], held


@dataclass(frozen=True)
class CutRows:
    """Rows within a length; `without_answer` names those that lost all that was to be learned."""

    rows: list[Tokens]
    truncated: int
    without_answer: tuple[str, ...]


def cut_rows(conversations: Sequence[Conversation], contract: PromptContract, *, length: int) -> CutRows:
    """Renders conversations and cuts them to a length.

    Raises:
        BadData: The template refuses a conversation.
    """
    whole = [contract.encode(conversation) for conversation in conversations]
    cut = [Tokens(row.ids[:length], row.supervised[:length], row.place) for row in whole]
    return CutRows(
        rows=[row for row in cut if row.supervised_count],
        truncated=sum(len(row.ids) > length for row in whole),
        without_answer=tuple(row.place for row in cut if not row.supervised_count),
    )


def _cut_warnings(cut: CutRows, kind: str, *, length: int) -> Iterator[tuple[str, str]]:
    if cut.truncated:
        problem = f"{cut.truncated} {kind} are longer than {length} tokens and were cut at the end."
        yield problem, "Raise data.length if the ends matter."
    if cut.without_answer:
        count, places = len(cut.without_answer), ", ".join(cut.without_answer[:3])
        problem = f"{count} {kind} have no answer within {length} tokens and are left out: {places}."
        yield problem, "Raise data.length, or shorten what stands before the answer."


def _end_warnings(cut: CutRows, contract: PromptContract) -> Iterator[tuple[str, str]]:
    if not any(contract.ends_turns(row) for row in cut.rows[:100]):
        problem = "The chat template ends no answer with an end token: the model will not learn to stop."
        yield problem, "Train the instruct form of the model, whose template does."
