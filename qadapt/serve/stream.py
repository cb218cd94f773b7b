"""Tokens to text as they come: what was given out stays, and all pieces together are the contract's own text.

A character may be several tokens (UTF-8 bytes), so what ends within one waits for the rest. Of a long answer
only the last tokens are decoded again for each that comes, from a place where decoding the parts gives what
decoding the whole does. Knows no model.
"""

from __future__ import annotations

import re

from qadapt.data.prompt import PromptContract

_UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no character, or none yet."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token of one byte. Decoders read a run of them as one: where a byte of it is wrong, all of it is."""
_WINDOW, _KEPT = 64, 16
"""Tokens that are decoded again at most, where that can be; and how many of them a new window keeps. No rule
of a decoder that tidies blanks reaches so far back."""


class TextStream:
    """The text of an answer whose tokens are not all there yet.

    Args:
        contract: How tokens become text.
    """

    def __init__(self, contract: PromptContract) -> None:
        self._contract = contract
        self._ids: list[int] = []
        self._first, self._longest = 0, _WINDOW  # of the window
        self._given = 0  # characters of it

    @property
    def tokens(self) -> int:
        """How many there are so far."""
        return len(self._ids)

    @property
    def text(self) -> str:
        """All of the text so far, with what waits."""
        return self._contract.text(self._ids)

    def add(self, token: int) -> str:
        """What a further token adds to the text; empty where it is within a character, or a special one."""
        self._ids.append(token)
        text = self._window
        if text.endswith(_UNFINISHED):
            return ""
        piece = self._rest(text)
        if len(self._ids) - self._first > self._longest:
            self._move(text)
        return piece

    def finish(self) -> str:
        """What waited, when no token comes any more."""
        return self._rest(self._window)

    @property
    def _window(self) -> str:
        return self._contract.text(self._ids[self._first :])

    def _rest(self, text: str) -> str:
        # By length: some decoders write all bytes of a broken character anew, which cannot be taken back.
        piece, self._given = text[self._given :], len(text)
        return piece

    def _move(self, text: str) -> None:
        """Begins the window later, where the texts of both parts are the whole; else it grows."""
        for place in range(len(self._ids) - _KEPT, self._first, -1):
            if not self._parts_runs(self._ids[place]):
                continue
            before = self._contract.text(self._ids[self._first : place])
            if before + self._contract.text(self._ids[place:]) == text:
                self._first, self._longest = place, _WINDOW
                self._given -= len(before)
                return
        self._longest = 2 * (len(self._ids) - self._first)

    def _parts_runs(self, token: int) -> bool:
        """Whether a token is neither a byte nor one without text: no run of bytes goes on over it."""
        name = str(self._contract.tokenizer.convert_ids_to_tokens(token) or "<0x00>")
        return not _BYTE.fullmatch(name) and bool(self._contract.text([token]))
