"""Where the characters of a text went among its tokens: by the tokenizer's offsets, or by counting bytes.

A byte-level BPE tokenizer (GPT-2's kind: Llama 3, Qwen, SmolLM2 ...) changes no byte of a text, so its
tokens one after another are the text, and where each begins is the sum of the widths before it. That spares
the tokenizer the keeping of offsets. A text whose widths do not add up to its length is not counted. Knows no
rows and no templates.

Legend: T tokens of a text, V tokens of the vocabulary.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
from tokenizers import Encoding
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from qadapt.data.tokens import Ids


class Places(Protocol):
    """Which token has a character, and whether a token begins before one."""

    def token_at(self, character: int) -> int:
        """The first token with this character, or else with the next that any token has; T after the last."""

    def begins_before(self, token: int, character: int) -> bool:
        """Whether a token begins before a character; the one behind the last does not."""


class Tracked:
    """By the tokenizer's own offsets.

    Args:
        encoding: A text's tokens, with offsets.
        size: Characters of the text.
    """

    def __init__(self, encoding: Encoding, size: int) -> None:
        self._encoding, self._size = encoding, size

    def token_at(self, character: int) -> int:
        """As `Places`."""
        for position in range(character, self._size):
            token = self._encoding.char_to_token(position)
            if token is not None:
                return token
        return len(self._encoding)

    def begins_before(self, token: int, character: int) -> bool:
        """As `Places`."""
        characters = self._encoding.token_to_chars(token) if token < len(self._encoding) else None
        return characters is not None and characters[0] < character


class Counted:
    """By the bytes of the tokens.

    Args:
        text: The text; each of its bytes is in one token.
        edges: (T + 1,) where each token begins, in bytes, and where the last ends.
    """

    def __init__(self, text: str, edges: Ids) -> None:
        self._text, self._edges = text, edges
        self._is_ascii = text.isascii()

    def token_at(self, character: int) -> int:
        """As `Places`."""
        return int(np.searchsorted(self._edges, self._byte(character), "right")) - 1

    def begins_before(self, token: int, character: int) -> bool:
        """As `Places`."""
        return bool(self._edges[token] < self._byte(character))

    def _byte(self, character: int) -> int:
        return character if self._is_ascii else len(self._text[:character].encode())


def counted(text: str, ids: Ids, widths: Ids) -> Counted | None:
    """The places by counting; None if the tokens are not the bytes of the text.

    Args:
        text: The text.
        ids: (T,) its tokens.
        widths: See `token_widths`.
    """
    edges = np.zeros(len(ids) + 1, np.int32)
    np.cumsum(widths[ids], out=edges[1:])
    is_ascii = text.isascii()
    size = len(text) if is_ascii else len(text.encode())
    if edges[-1] != size or not (is_ascii or unicodedata.is_normalized("NFC", text)):
        return None
    return Counted(text, edges)


def token_widths(tokenizer: PreTrainedTokenizerFast) -> Ids | None:
    """The bytes of text that each token stands for (V,); None if this tokenizer may change a text's bytes."""
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    if not _keeps_bytes(facts):
        return None
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    widths = np.zeros(max(vocabulary.values()) + 1, np.int32)
    for token, index in vocabulary.items():  # one character stands for one byte, but in added tokens
        widths[index] = len(token.encode()) if index in added else len(token)
    return widths


def _keeps_bytes(facts: dict[str, Any]) -> bool:
    """Whether it is byte-level BPE that adds nothing, and normalizes nothing but to NFC."""
    model, splits = facts["model"], facts["pre_tokenizer"] or {}
    last = splits["pretokenizers"][-1] if splits.get("type") == "Sequence" else splits
    has_all_bytes = model.get("vocab", {}) and all(byte in model["vocab"] for byte in ByteLevel.alphabet())
    return (
        model.get("type") == "BPE"
        and (model.get("unk_token") is None or bool(has_all_bytes))
        and not any(model.get(key) for key in ("byte_fallback", "continuing_subword_prefix"))
        and not model.get("end_of_word_suffix")
        and (facts["normalizer"] or {}).get("type") in (None, "NFC")
        and last.get("type") == "ByteLevel"
        and not last["add_prefix_space"]
    )


def tokens_between(
    places: Places, start: int, end: int, *, ids: Ids, ends: Collection[int]
) -> tuple[int, int, bool]:
    """The tokens of the characters from `start` to `end`: number of the first, and of the first after them.

    A token that reaches over either edge is left out; but not an end token that swallows the white space
    behind it, as Phi-3's does. Whether one reaches over `start` comes third.

    Args:
        places: Of the text.
        start: First character.
        end: Character after the last.
        ids: (T,) the text's tokens.
        ends: Ids of the end tokens.
    """
    first = places.token_at(start)
    is_joined = places.begins_before(first, start)
    first += is_joined
    after = places.token_at(end)
    if places.begins_before(after, end) and int(ids[after]) in ends:
        after += 1
    return first, max(first, after), is_joined
