"""Generators of events: a long call that reports its progress, and events that pass a look."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

from qadapt.events import Event, StageAdvanced, StageStarted

_FAREWELL_SECONDS = 5.0
"""How long an abandoned call may take to notice and to clear up."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[str, int, int], None]
"""Called with the stage, how much is done, and how much there is (0: unknown); bytes, if nothing is said."""


class _Abandoned(BaseException):
    """Ends a call that nobody waits for any more; never leaves this file."""


def passing(
    events: Generator[Event, None, Result], passes: Callable[[Event], bool]
) -> Generator[Event, None, Result]:
    """Passes on those events for which `passes(event)` is true; the result is theirs."""
    try:
        while True:
            event = next(events)
            if passes(event):
                yield event
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        events.close()


def go_through(items: Generator[Item, None, Result], see: Callable[[Item], object]) -> Result:
    """Shows `see` all that comes, one by one; the result."""
    try:
        while True:
            see(next(items))
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        items.close()


def with_progress(
    stage: str, work: Callable[[Report], Result], *, unit: str = "bytes"
) -> Generator[Event, None, Result]:
    """Runs `work(report)` in a thread and yields what it reports; its result is the generator's.

    Use it as `result = yield from with_progress(...)`. An error of the work is raised here.
    If the generator is closed or interrupted, the next report ends the work, which so can clear up.
    """
    reports: queue.Queue[Event | None] = queue.Queue()
    outcome: list[Result] = []
    failure: list[BaseException] = []
    is_abandoned = threading.Event()

    def report(name: str, done: int, total: int) -> None:
        if is_abandoned.is_set():
            raise _Abandoned
        reports.put(StageAdvanced(stage=name, done=done, total=total, unit=unit))

    def run() -> None:
        try:
            outcome.append(work(report))
        except BaseException as error:  # noqa: BLE001  handed over, not swallowed
            failure.append(error)
        reports.put(None)

    yield StageStarted(stage=stage)
    thread = threading.Thread(target=run, name=stage, daemon=True)
    thread.start()
    try:
        while (event := reports.get()) is not None:
            yield event
    finally:
        is_abandoned.set()
        thread.join(_FAREWELL_SECONDS)
    if failure:
        raise failure[0]
    return outcome[0]
