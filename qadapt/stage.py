"""A long call that reports its progress, as a generator of events."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

from qadapt.events import Event, StageAdvanced, StageStarted

Result = TypeVar("Result")
Report = Callable[[str, int, int], None]
"""Called with the stage, the bytes done and the bytes in total."""


def with_progress(stage: str, work: Callable[[Report], Result]) -> Generator[Event, None, Result]:
    """Runs `work(report)` in a thread and yields what it reports; its result is the generator's.

    Use it as `result = yield from with_progress(...)`. An error of the work is raised here.
    """
    reports: queue.Queue[Event | None] = queue.Queue()
    outcome: list[Result] = []
    failure: list[BaseException] = []

    def report(name: str, done: int, total: int) -> None:
        reports.put(StageAdvanced(stage=name, done=done, total=total))

    def run() -> None:
        try:
            outcome.append(work(report))
        except BaseException as error:  # noqa: BLE001  handed over, not swallowed
            failure.append(error)
        reports.put(None)

    yield StageStarted(stage=stage)
    threading.Thread(target=run, name=stage, daemon=True).start()
    while (event := reports.get()) is not None:
        yield event
    if failure:
        raise failure[0]
    return outcome[0]
