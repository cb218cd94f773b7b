"""From files to the rows of a run: read, rendered by the contract, cut, checked, held-out ones set apart."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qadapt.data.formats import Conversation
from qadapt.data.prompt import PromptContract, Tokens
from qadapt.data.sources import read_conversations
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
            digest.update(repr((row.ids, row.supervised)).encode())
        return digest.hexdigest()


def read_rows(
    sources: Sequence[tuple[Path, int | None]],
    contract: PromptContract,
    *,
    form: str,
    held_out: Path | float,
    length: int,
    seed: int,
) -> Rows:
    """Reads the rows of a run.

    Args:
        sources: Files of training rows, each with how many of its first rows to take (None: all).
        contract: How conversations become tokens.
        form: A format's name, or `auto`.
        held_out: A file of rows to hold out, or the share of the training rows to.
        length: Longest row in tokens; longer ones are cut at the end.
        seed: Of the held-out draw.

    Raises:
        BadData: A file or a row cannot be used, or nothing is left to train on.
    """
    kept, apart = split_conversations(sources, form=form, held_out=held_out, seed=seed)
    train, held = (cut_rows(part, contract, length=length) for part in (kept, apart))
    if not train.rows:
        raise BadData(
            f"No row is left to train on: within {length} tokens, none has an answer.",
            cure="Raise data.length, or shorten what stands before the answers.",
        )
    return Rows(
        train=train.rows,
        held_out=held.rows,
        pad_id=contract.pad_id,
        truncated=train.truncated,
        warnings=_warnings(train, contract, length=length),
    )


def split_conversations(
    sources: Sequence[tuple[Path, int | None]], *, form: str, held_out: Path | float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """The conversations to train on, and those to hold out; see `read_rows`."""
    parts = [read_conversations(path, form=form, limit=limit) for path, limit in sources]
    conversations = [row for part in parts for row in part]
    if isinstance(held_out, Path):
        return conversations, read_conversations(held_out, form=form)
    return _hold_out(conversations, held_out, seed=seed)


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
    cut = [row.cut(length) for row in whole]
    return CutRows(
        rows=[row for row in cut if row.supervised_count],
        truncated=sum(len(row.ids) > length for row in whole),
        without_answer=tuple(row.place for row in cut if not row.supervised_count),
    )


def _warnings(train: CutRows, contract: PromptContract, *, length: int) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    if train.truncated:
        problem = f"{train.truncated} rows are longer than {length} tokens and were cut at the end."
        found.append((problem, "Raise data.length if the ends matter."))
    if train.without_answer:
        count, places = len(train.without_answer), ", ".join(train.without_answer[:3])
        problem = f"{count} rows have no answer within {length} tokens and are left out: {places}."
        found.append((problem, "Raise data.length, or shorten what stands before the answer."))
    if not any(contract.ends_turns(row) for row in train.rows[:100]):
        problem = "The chat template ends no answer with an end token: the model will not learn to stop."
        found.append((problem, "Train the instruct form of the model, whose template does."))
    return tuple(found)
