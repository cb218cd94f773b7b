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


def judged(name: str, said: str, *, is_good: bool) -> Check:
    """A check with its number."""
    return Check(name, said, "ok" if is_good else "FAILED")


def tried(name: str, do: Callable[[], Check]) -> Check:
    """The check that `do` makes; a failed one where it breaks, so that those after it are still made."""
    try:
        return do()
    except BROKEN as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Check(name, f"{type(error).__name__}: {said}", "FAILED")
