"""One row as tokens: what the rest of the program trains on. Knows no text, no template, no file.

Legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qadapt.methods import front_ids

Ids = NDArray[np.int32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Tokens:
    """One row; `supervised[t]` says whether token t is learned. Both are (T,).

    `place` names the row for people, such as `train.jsonl, line 12`.
    """

    ids: Ids
    supervised: Flags
    place: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def supervised_count(self) -> int:
        """How many tokens are learned; the first token has no predecessor and never is."""
        return int(np.count_nonzero(self.supervised[1:]))

    def behind(self, count: int) -> Tokens:
        """The row behind so many virtual tokens; its own first token is no more learned than without them."""
        supervised = self.supervised.copy()
        supervised[:1] = False
        front = np.asarray(front_ids(count), np.int32)
        return Tokens(
            np.concatenate((front, self.ids)),
            np.concatenate((np.zeros(count, np.bool_), supervised)),
            self.place,
        )


def tokens_of(ids: Sequence[int], supervised: Sequence[bool], *, place: str) -> Tokens:
    """A row out of plain numbers."""
    return Tokens(np.asarray(ids, np.int32), np.asarray(supervised, np.bool_), place)
