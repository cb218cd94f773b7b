"""A row of tokens as pieces of text that people can look at: whole characters, never half ones.

With byte-level BPE one character may be several tokens: tokens are decoded together until their text is
whole, and bytes that never become a character are named (`‹e2›`). Every token is in exactly one piece, or in
a stretch that is left out and counted. Knows no screen, no template, no file. Decoding with the tokens before
it, so that a decoder's rules for the start of a text do not apply in its middle: as text generation servers
stream their answers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qadapt.data.tokens import Flags, Tokens

Decode = Callable[[Sequence[int]], str]
"""The text of tokens, special ones written out."""

_BROKEN = "\ufffd"  # what decoders write for bytes that are no character
_MOST_TOGETHER = 8
"""Tokens of one character at the most: its four bytes, and some for what a normalizer takes apart."""
_LEAST_SHOWN = 6
"""Tokens of a stretch that are shown at the least, however many are left out."""


@dataclass(frozen=True)
class Piece:
    """Some text and the tokens it is made of: mostly one.

    `is_special` says that it is one of the tokens added to the vocabulary; `is_broken` that its bytes are no
    whole character, or that it has no text where it stands (`text` then names the bytes, such as `e2 9c`, or
    spells it as the vocabulary does).
    """

    text: str
    ids: tuple[int, ...]
    is_supervised: bool = False
    is_special: bool = False
    is_broken: bool = False


@dataclass(frozen=True)
class Gap:
    """So many tokens that are not shown, and how many of them are learned."""

    tokens: int
    supervised_tokens: int


@dataclass(frozen=True)
class Alphabet:
    """What is needed of a tokenizer: decoding, the ids of added tokens, how its vocabulary spells a token."""

    decode: Decode
    special_ids: frozenset[int]
    spelled: Callable[[int], str]


def row_pieces(row: Tokens, alphabet: Alphabet, *, most: int | None = None) -> tuple[Piece | Gap, ...]:
    """The row as pieces in their order.

    Args:
        row: The row; its first token is context, as nothing predicts it.
        alphabet: Of its tokenizer.
        most: Leave out the middle of long stretches so that about so many tokens are shown; None: show all.
    """
    learned = row.supervised.copy()
    learned[:1] = False
    ids: list[int] = row.ids.tolist()
    found: list[Piece | Gap] = []
    for start, end, is_shown in _whole(_stretches(learned, most), ids, alphabet):
        if is_shown:
            found += _pieces(ids, start, end, is_learned=bool(learned[start]), alphabet=alphabet)
        else:
            found.append(Gap(end - start, int(np.count_nonzero(learned[start:end]))))
    return tuple(found)


Stretch = tuple[int, int, bool]
"""First token, end, and whether it is shown."""


def _stretches(learned: Flags, most: int | None) -> list[Stretch]:
    """The row by where learning begins and ends; the middles of long stretches apart, as hidden ones."""
    if not len(learned):
        return []
    turns = np.flatnonzero(np.diff(learned)) + 1
    bounds = [0, *turns.tolist(), len(learned)]
    runs = list(itertools.pairwise(bounds))
    if most is None or len(learned) <= most:
        return [(start, end, True) for start, end in runs]
    each = _fair_share([end - start for start, end in runs], most)
    split: list[Stretch] = []
    for start, end in runs:
        if end - start <= each + 1:  # a sign for one hidden token is no shorter than the token
            split.append((start, end, True))
            continue
        head, tail = start + (each + 1) // 2, end - each // 2
        split += [(start, head, True), (head, tail, False), (tail, end, True)]
    return _without_middle(split, most)


def _fair_share(sizes: Sequence[int], most: int) -> int:
    """The longest that a stretch may be so that all together are about `most`; short ones stay whole."""
    left, count = most, len(sizes)
    for size in sorted(sizes):
        if size * count > left:
            return max(_LEAST_SHOWN, left // count)
        left, count = left - size, count - 1
    return max(sizes)


def _without_middle(split: list[Stretch], most: int) -> list[Stretch]:
    """The stretches; where they are too many to be shown, only the first and the last of them."""
    shown = np.cumsum([end - start if is_shown else 0 for start, end, is_shown in split])
    if shown[-1] <= 2 * most:
        return split
    first = int(np.searchsorted(shown, most // 2)) + 1
    last = int(np.searchsorted(shown, shown[-1] - most // 2))
    return [*split[:first], (split[first][0], split[last][0], False), *split[last:]]


def _whole(split: list[Stretch], ids: list[int], alphabet: Alphabet) -> Iterator[Stretch]:
    """The stretches; hidden ones begin and end between characters."""
    first = 0
    for number, (_, end, is_shown) in enumerate(split):
        if number + 1 == len(split):
            yield first, end, is_shown
            return
        is_next_shown = split[number + 1][2]
        if is_shown and not is_next_shown:
            while end > first + 1 and _is_split(ids, end, alphabet):
                end -= 1
        elif is_next_shown and not is_shown:
            while end < split[number + 1][1] - 1 and _is_split(ids, end, alphabet):
                end += 1
        yield first, end, is_shown
        first = end


def _is_split(ids: list[int], place: int, alphabet: Alphabet) -> bool:
    """Whether a character has tokens on both sides of a place."""
    return alphabet.decode(ids[max(0, place - _MOST_TOGETHER) : place]).endswith(_BROKEN)


def _pieces(ids: list[int], start: int, end: int, *, is_learned: bool, alphabet: Alphabet) -> list[Piece]:
    """The tokens from `start` to `end`, decoded after those before them."""
    found: list[Piece] = []
    first = start  # of the tokens that wait for the rest of their character
    context = max(0, start - _MOST_TOGETHER)
    for last in range(start, end):
        is_special = ids[last] in alphabet.special_ids
        text = _added(ids, context, first, last, is_special=is_special, alphabet=alphabet)
        if first < last and (is_special or (_BROKEN in text and not text.endswith(_BROKEN))):
            found += _broken(ids[first:last], is_learned=is_learned, alphabet=alphabet)
            first = last
            text = alphabet.decode(ids[last : last + 1])
        if text and not text.endswith(_BROKEN):
            found.append(Piece(text, tuple(ids[first : last + 1]), is_learned, is_special))
        elif last + 1 - first >= _MOST_TOGETHER or last + 1 == end:
            found += _broken(ids[first : last + 1], is_learned=is_learned, alphabet=alphabet)
        else:
            continue
        context, first = first, last + 1
    return found


def _added(
    ids: list[int], context: int, first: int, last: int, *, is_special: bool, alphabet: Alphabet
) -> str:
    """What the tokens from `first` to `last` add to the text of those before them."""
    if is_special:
        return alphabet.decode(ids[last : last + 1])
    before, text = alphabet.decode(ids[context:first]), alphabet.decode(ids[context : last + 1])
    return text[len(before) :] if text.startswith(before) else alphabet.decode(ids[first : last + 1])


def _broken(ids: list[int], *, is_learned: bool, alphabet: Alphabet) -> list[Piece]:
    return [
        Piece(
            byte_names(alphabet.spelled(token)),
            (token,),
            is_learned,
            token in alphabet.special_ids,
            is_broken=True,
        )
        for token in ids
    ]


def byte_names(token: str) -> str:
    """The bytes of a token as `e2 9c`, from either spelling of vocabularies: `<0xE2>`, or GPT-2's letters."""
    if named := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return named[1].lower()
    known = [_BYTES.get(letter) for letter in token]
    return " ".join(f"{byte:02x}" for byte in known if byte is not None) if None not in known else token


def _byte_letters() -> dict[str, int]:
    """Letter → byte: what prints stands for itself, the others for the letters from 256 on (GPT-2, 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()
