"""Rows to tokens, many at a time: some are rendered, then the tokenizer works on all of them at once.

Spans of the text become tokens by where their characters went (`places.py`). Knows no template and no file:
layouts are handed in.

Legend: T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from qadapt.data.conversation import Conversation, Document, Message, Row
from qadapt.data.rendering.layouts import Learn, is_empty
from qadapt.data.rendering.places import Places, Tracked, counted, token_widths, tokens_between
from qadapt.data.rendering.spans import Layout, Note, Span
from qadapt.data.rendering.tokenizer import starts_with_bos
from qadapt.data.tokens import Flags, Ids
from qadapt.errors import BadData

_BATCH_ROWS = 4096
_BATCH_CHARACTERS = 8_000_000
"""Of one batch: long enough to keep all threads of the tokenizer busy to its end; its own record of a token
takes some 100 bytes, of four characters as a rule."""
Unlearned = Literal["", "no learned turn", "empty answers"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """A row as tokens, whole: `supervised[t]` says whether token t is learned. Both are (T,).

    `turn_ends` are the numbers of tokens up to and with the end of each learned turn: where a row that is too
    long may be cut. A document may be cut anywhere. `unlearned` says why nothing is learned, if nothing is;
    `notes` what the template leaves out, or finds in contents.
    """

    ids: Ids
    supervised: Flags
    place: str
    turn_ends: tuple[int, ...] = ()
    is_document: bool = False
    unlearned: Unlearned = ""
    notes: frozenset[Note] = frozenset()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def supervised_count(self) -> int:
        """How many tokens are learned; the first token has no predecessor and never is."""
        return int(np.count_nonzero(self.supervised[1:]))


@dataclass(frozen=True)
class Refused:
    """A row that cannot be trained on, and why."""

    place: str
    error: BadData


@dataclass(frozen=True)
class Rules:
    """What decides the mask, and which ids there may be.

    `rows` are those of the model's embedding table, if known; `new_ids` may lie beyond: the table grows.
    `control` are the tokens that no text should hold written out, with their texts.
    """

    learn: Learn
    end_ids: frozenset[int]
    new_ids: tuple[int, ...]
    control: Mapping[int, str]
    rows: int | None


@dataclass(frozen=True)
class _Prepared:
    """A row whose text goes to the tokenizer."""

    row: Row
    layout: Layout


class Encoder:
    """Makes tokens of rows.

    Args:
        tokenizer: The model's, which neither cuts nor fills up.
        layout: The layout of a conversation.
        rules: The mask rule, and the ids.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        layout: Callable[[Conversation], Layout],
        *,
        rules: Rules,
    ) -> None:
        self._tokenizer, self._layout, self._rules = tokenizer, layout, rules
        self._backend = tokenizer.backend_tokenizer
        self._widths = token_widths(tokenizer)
        # the fast one keeps no offsets
        self._encode_batch = (
            self._backend.encode_batch if self._widths is None else self._backend.encode_batch_fast
        )
        self._bos_token, self._bos = tokenizer.bos_token, tokenizer.bos_token_id
        self._starts_with_bos = starts_with_bos(tokenizer)

    def encode(self, rows: Iterable[Row]) -> Iterator[Encoded | Refused]:
        """The rows as tokens, in their order, each whole or refused; a batch of them is in memory."""
        for prepared in self._batches(rows):
            texts = [each.layout.text for each in prepared if isinstance(each, _Prepared)]
            encodings = iter(self._encode_batch(texts, add_special_tokens=False))
            for each in prepared:
                yield each if isinstance(each, Refused) else self._checked(each, next(encodings))

    def _batches(self, rows: Iterable[Row]) -> Iterator[list[_Prepared | Refused]]:
        """The rows with their layouts, some at a time."""
        batch: list[_Prepared | Refused] = []
        characters = 0
        for row in rows:
            prepared = self._prepared(row)
            batch.append(prepared)
            characters += len(prepared.layout.text) if isinstance(prepared, _Prepared) else 0
            if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_ROWS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _prepared(self, row: Row) -> _Prepared | Refused:
        try:
            if isinstance(row, Document):
                layout = Layout(row.text, ())
                self._check_start(row.place, row.text, is_opened=self._starts_with_bos)
            else:
                layout = self._layout(row)
                is_opened = bool(self._bos_token) and layout.text.startswith(self._bos_token)
                for message in row.messages:
                    self._check_start(row.place, message.content, is_opened=is_opened)
            _check_writable(layout.text, row.place)
        except BadData as error:
            return Refused(row.place, error)
        return _Prepared(row, layout)

    def _check_start(self, place: str, text: str, *, is_opened: bool) -> None:
        if is_opened and text.lstrip().startswith(self._bos_token):
            raise BadData(
                f"{place}: a text begins with {self._bos_token!r}, which opens the row already (double BOS).",
                cure=f"Remove {self._bos_token!r} from the row: it is written for you.",
            )

    def _checked(self, prepared: _Prepared, encoding: Encoding) -> Encoded | Refused:
        row = prepared.row
        try:
            if isinstance(row, Document):
                encoded = self._document(row, encoding)
            else:
                encoded = self._conversation(row, prepared.layout, encoding)
            self._check_ids(encoded)
        except BadData as error:
            return Refused(row.place, error)
        return encoded

    def _document(self, row: Document, encoding: Encoding) -> Encoded:
        eos, written = self._tokenizer.eos_token_id, encoding.ids
        opening = [self._bos] if self._starts_with_bos else []
        ending = [] if eos is None else [eos]
        if ending and written[-1:] == ending:  # the text says itself where it ends
            written.pop()
        control = self._rules.control
        # the token for what the tokenizer does not know is one of them, and stands for any text
        is_noted = any(control[token] in row.text for token in control.keys() & written)
        notes: frozenset[Note] = frozenset({"control tokens"} if is_noted else ())
        ids = np.array([*opening, *written, *ending], np.int32)
        supervised = np.ones(len(ids), np.bool_)
        supervised[: len(opening)] = False
        return Encoded(ids, supervised, row.place, is_document=True, notes=notes)

    def _conversation(self, row: Conversation, layout: Layout, encoding: Encoding) -> Encoded:
        ids = np.array(encoding.ids, np.int32)
        learns_all = self._rules.learn == "all"
        supervised = np.full(len(ids), learns_all, np.bool_)
        turn_ends, notes = [], set(layout.notes)
        places = self._places(layout.text, ids, encoding)
        for span in layout.spans:
            message = row.messages[span.message]
            first, after, is_joined = tokens_between(
                places, span.start, span.end, ids=ids, ends=self._rules.end_ids
            )
            supervised[first:after] = message.is_learned
            if message.is_learned:
                self._check_end(row, span, ids[first:after])
                turn_ends.append(after)
                if is_joined and not learns_all:
                    notes.add("joined with the prompt")
        if learns_all and len(ids) and ids[0] == self._bos:
            supervised[0] = False
        return Encoded(
            ids,
            supervised,
            row.place,
            turn_ends=tuple(turn_ends),
            unlearned="" if turn_ends or learns_all else self._unlearned(row.messages),
            notes=frozenset(notes),
        )

    def _places(self, text: str, ids: Ids, encoding: Encoding) -> Places:
        if self._widths is None:
            return Tracked(encoding, len(text))
        places = counted(text, ids, self._widths)
        if places is not None:
            return places
        return Tracked(self._backend.encode(text, add_special_tokens=False), len(text))

    def _unlearned(self, messages: Sequence[Message]) -> Unlearned:
        roles = ("assistant",) if isinstance(self._rules.learn, str) else self._rules.learn
        would = [message for message in messages if message.role in roles and message.is_learned]
        return "empty answers" if would and all(map(is_empty, would)) else "no learned turn"

    def _check_end(self, row: Conversation, span: Span, ids: Ids) -> None:
        is_answer = row.messages[span.message].role == "assistant"
        if is_answer and not (len(ids) and int(ids[-1]) in self._rules.end_ids):
            raise BadData(
                f"{row.place}: the tokenizer joins the end token of message {span.message + 1} with the text "
                "around it, so the model would not learn to stop.",
                cure="Change the end of this answer, or leave the row out.",
            )

    def _check_ids(self, encoded: Encoded) -> None:
        ids, rows = encoded.ids, self._rules.rows
        if len(ids) > 1 and self._bos is not None and ids[0] == self._bos == ids[1]:
            raise BadData(
                f"{encoded.place}: the row begins with {self._bos_token!r} twice (double BOS).",
                cure="Remove it from the chat template, or from the row.",
            )
        if rows is None or not len(ids) or int(ids.max()) < rows:
            return
        beyond = sorted({int(each) for each in ids[ids >= rows]} - set(self._rules.new_ids))
        if beyond:
            name = self._tokenizer.convert_ids_to_tokens(beyond[0])
            raise BadData(
                f"{encoded.place}: the token {name!r} is number {beyond[0]}, beyond the model's embedding "
                f"table of {rows} rows.",
                cure="Remove its text from the row, or give a template that does not write it.",
            )


def _check_writable(text: str, place: str) -> None:
    """Half a surrogate pair, which JSON can hold, is no character: no tokenizer takes it."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadData(
            f"{place}: {text[error.start]!r} is half a character (a lone surrogate).", cure="Correct the row."
        ) from None
