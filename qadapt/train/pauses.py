"""What a run does for others between two steps: it saves, waits or leaves, as asked or as its rules say.

Waiting happens in place: the state stays where it is, and what comes after is what would have come without
the wait, bit for bit. Knows no model and no checkpoint: how to save is an argument. Durations are taken
from a clock that never goes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from qadapt import control
from qadapt.errors import NoRoom
from qadapt.events import Continued, Event, Paused
from qadapt.train.guards import Guards, Reason

POLL_SECONDS = 1.0
RETRY_SECONDS = 3.0
"""Between two tries to write to a full disk."""

Save = Callable[[], Iterator[Event]]
Item = TypeVar("Item")


class Leaving(Exception):
    """The run is asked to leave, so what it was doing is given up; nothing was changed by it."""


class Pauses:
    """Requests and rules of one run.

    Args:
        run_folder: Where requests come from.
    """

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder
        self.leave_folder = run_folder
        """Where it is asked to leave; another folder for a part of a run that writes to its own."""
        self.guards = Guards()

    def is_leaving(self) -> bool:
        """Whether the run is asked to save and leave; costs two looks at the folder."""
        return control.is_asked_to_leave(self.leave_folder)

    def unless_leaving(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items one by one.

        Raises:
            Leaving: The run is asked to leave before the next one.
        """
        for item in items:
            if self.is_leaving():
                raise Leaving
            yield item

    def between_steps(self, step: int, save: Save) -> Generator[Event, None, str | None]:
        """Does what is asked for, waits while a rule says so, and gives the reason to leave, if any.

        Args:
            step: The last step that is done.
            save: Writes a checkpoint of that step.
        """
        if control.is_asked(self._run_folder, "save"):
            yield from save()
            control.take(self._run_folder, "save")
        reason = self.guards.reason()
        if reason is not None and not reason.leaves:
            yield from save()
            reason = yield from self._wait(step, reason.text)
        if control.is_asked(self.leave_folder, "pause"):
            return "paused on request"
        if control.is_asked(self.leave_folder, "stop"):
            return "asked to leave, as by Ctrl-C"
        return None if reason is None else reason.text

    def when_room(self, step: int, write: Callable[[], Sequence[Event]]) -> Iterator[Event]:
        """What `write` gives; while the disk is full, waits and tries again.

        Args:
            step: The last step that is done.
            write: Writes something, whole or not at all.

        Raises:
            NoRoom: The disk is full and the run is asked to leave; what was written before is whole.
        """
        start: float | None = None
        while True:
            try:
                written = write()
                break
            except NoRoom as error:
                if self.is_leaving():
                    raise
                problem = error.problem
            if start is None:
                start = time.monotonic()
                yield Paused(step=step, reason=problem)
            self._sleep(RETRY_SECONDS)
        if start is not None:
            yield Continued(step=step, seconds=time.monotonic() - start)
        yield from written

    def _wait(self, step: int, reason: str) -> Generator[Event, None, Reason | None]:
        """Waits while a rule holds; gives the one that makes the run leave meanwhile, if any."""
        yield Paused(step=step, reason=reason)
        start = time.monotonic()
        while (held := self.guards.reason_now()) is not None:
            if held.leaves:
                return held
            control.take(self._run_folder, "save")  # it was saved before the wait
            self._sleep(POLL_SECONDS)
            if self.is_leaving():
                return None
        yield Continued(step=step, seconds=time.monotonic() - start)
        return None

    def _sleep(self, seconds: float) -> None:
        """Waits, less if the run is asked to leave."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.is_leaving():
            time.sleep(min(left, POLL_SECONDS))
