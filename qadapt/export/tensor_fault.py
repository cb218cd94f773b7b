"""What can be wrong with a tensor that was written, in words. Knows no numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LEFT_OUT = "the adapter is left out"
OTHER_STRENGTH = "the adapter counts with another strength"
OTHER_BASE = "merged on the other base"
TRANSPOSED = "transposed"
TIED_HEAD = "embedding and head, which were one table, overwrite each other"
TOO_LARGE = "numbers too large for the type"
NO_NUMBER = "NaN or infinite numbers"
OTHER_TENSOR = "it holds the numbers of another tensor"
CHANGED = "numbers are not those of the merge"
OTHER_CONFIG = "it makes another model of the tensors"
DAMAGED = "the file cannot be read"
WRONG_FILE = "the index names another file"
OTHER_FILE = "it is not the file of the run"
SWAPPED_FILES = "weight files hold each other's tensors"
MISSING = "missing"
UNEXPECTED = "not of this model"
SHAPE = "another shape"
TYPE = "another type"
CAUSES = (
    LEFT_OUT, OTHER_STRENGTH, OTHER_BASE, TRANSPOSED, TIED_HEAD, TOO_LARGE, NO_NUMBER, OTHER_TENSOR, CHANGED,
    OTHER_CONFIG, DAMAGED, WRONG_FILE, OTHER_FILE, SWAPPED_FILES, MISSING, UNEXPECTED, SHAPE, TYPE,
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: `place` is a tensor or a file, `cause` one of `CAUSES`.

    `detail` tells more in a few words; `other` is the tensor or file whose content stands there instead.
    """

    place: str
    cause: str
    detail: str = ""
    other: str = ""

    def __str__(self) -> str:
        return in_words([self])


def in_words(faults: Iterable[Fault]) -> str:
    """The faults as one sentence, those of one cause together; empty if there is none."""
    grouped: dict[str, list[Fault]] = {}
    for fault in faults:
        grouped.setdefault(fault.cause, []).append(fault)
    return "; ".join(_group(cause, found) for cause, found in grouped.items())


def _group(cause: str, found: list[Fault]) -> str:
    first = found[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    detail = f" ({first.detail})" if first.detail else ""
    return f"{first.place}{more}: {cause}{detail}"
