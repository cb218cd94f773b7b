"""A check of the self-test: what it found, and whether that is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qadapt.errors import QadaptError

BROKEN = (QadaptError, ImportError, OSError, RuntimeError, AttributeError, ValueError, TypeError)
"""What this package and broken native libraries raise where a machine cannot do something."""


@dataclass(frozen=True)
class Check:
    """One line of the self-test.

    Attributes:
        name: What was looked at.
        said: The number, with what is allowed; or why it was left out.
        verdict: `ok`, `FAILED`, or `left out` where this machine has nothing to look at.
    """

    name: str
    said: str
    verdict: Literal["ok", "FAILED", "left out"]


Found = tuple[str, bool | None]
"""What a check says, and whether that is right; None where there is nothing to look at."""


def tried(name: str, do: Callable[[], Found]) -> Check:
    """The check of what `do` finds; a failed one where it breaks, so that those after it are still made."""
    try:
        said, is_good = do()
    except BROKEN as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Check(name, f"{type(error).__name__}: {said}", "FAILED")
    return Check(name, said, "left out" if is_good is None else "ok" if is_good else "FAILED")
