"""Which runs train on which card, so that two do not take each other's memory.

A claim is a file lock that its process holds as long as the run lives, and beside it a small JSON file that
says whose it is. The system lets go of the lock when the process ends, however; so a claim whose lock can be
taken is of a dead process, and goes. Knows no driver and no torch: a card is a name that is always the same.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from qadapt.errors import BadRun
from qadapt.units import format_bytes

_GUARD = ".lock"
_CLAIM = "claim-"


@dataclass(frozen=True)
class SharedCard:
    """A card that runs share: what tells it from all others, its name for people, and all its memory."""

    identity: str
    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Claim:
    """A run's share of a card; `budget_bytes` is None where its recipe sets no `memory.budget`."""

    run: str
    process: int
    budget_bytes: int | None


@contextmanager
def claiming(folder: Path, card: SharedCard, *, run: Path, budget_bytes: int | None) -> Iterator[None]:
    """Holds a card for a run of this process.

    Args:
        folder: Where the claims of all runs of this user lie.
        card: The card.
        run: The run's folder.
        budget_bytes: What the run may take, if its recipe says so.

    Raises:
        BadRun: Another run trains on the card, and the two do not share it by explicit budgets.
    """
    place = folder / re.sub(r"[^A-Za-z0-9-]+", "_", card.identity)
    place.mkdir(parents=True, exist_ok=True)
    own = Claim(str(run.absolute()), os.getpid(), budget_bytes)
    path = place / f"{_CLAIM}{uuid.uuid4().hex}.json"
    lock = FileLock(path.with_suffix(".lock"))
    with FileLock(place / _GUARD):
        _check_shared(card, own, _living(place))
        path.write_text(json.dumps(asdict(own)), encoding="utf-8")
        lock.acquire(timeout=0)
    try:
        yield
    finally:
        with FileLock(place / _GUARD):
            lock.release()
            _remove(path)


def _living(place: Path) -> list[Claim]:
    """The claims of living processes; those of dead ones are removed."""
    found = []
    for path in sorted(place.glob(f"{_CLAIM}*.json")):
        lock = FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            found.append(_read(path))
            continue
        lock.release()
        _remove(path)
    return found


def _read(path: Path) -> Claim:
    try:
        return Claim(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # written by another release, or the disk was full
        return Claim("an unknown run", 0, None)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".lock").unlink(missing_ok=True)


def _check_shared(card: SharedCard, own: Claim, others: Sequence[Claim]) -> None:
    if not others:
        return
    listed = " and ".join(f"{other.run} (process {other.process})" for other in others)
    budgets = [claim.budget_bytes for claim in (own, *others)]
    known = [budget for budget in budgets if budget is not None]
    room = format_bytes(card.memory_bytes)
    if len(known) < len(budgets):
        raise BadRun(
            f"Another run trains on this {card.name}: {listed}.",
            cure=f"Wait for its end or stop it; or give every run its own memory.budget, together at most "
            f"{room}.",
        )
    if sum(known) > card.memory_bytes:
        raise BadRun(
            f"Another run trains on this {card.name}: {listed}. Together with this one's, the budgets come "
            f"to {format_bytes(sum(known))}, and the card has {room}.",
            cure="Wait for its end or stop it, or lower memory.budget of one of them.",
        )
