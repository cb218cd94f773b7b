"""Tokens to text as they come: what was given out stays, and all pieces together are the contract's own text.

A character may be several tokens (UTF-8 bytes), so what ends within one waits for the rest. Knows no model.
"""

from __future__ import annotations

from qadapt.data.prompt import PromptContract

_UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no character, or none yet."""


class TextStream:
    """The text of an answer whose tokens are not all there yet.

    Args:
        contract: How tokens become text.
    """

    def __init__(self, contract: PromptContract) -> None:
        self._contract = contract
        self._ids: list[int] = []
        self._given = 0  # characters

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
        text = self.text
        return "" if text.endswith(_UNFINISHED) else self._rest(text)

    def finish(self) -> str:
        """What waited, when no token comes any more."""
        return self._rest(self.text)

    def _rest(self, text: str) -> str:
        # By length: some decoders write all bytes of a broken character anew, which cannot be taken back.
        piece, self._given = text[self._given :], len(text)
        return piece
