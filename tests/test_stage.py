"""A long call as a generator of events: its result, its errors, and its end when nobody waits any more."""

import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from qadapt.cache import staged
from qadapt.errors import BadModel
from qadapt.events import Event, StageAdvanced, StageStarted
from qadapt.stage import Report, with_progress


def drained(generator: Generator[Event, None, str]) -> tuple[list[Event], str]:
    result: list[str] = []

    def whole() -> Generator[Event, None, None]:
        result.append((yield from generator))

    return list(whole()), result[0]


def test_reports_become_events_and_the_result_is_returned() -> None:
    def work(report: Report) -> str:
        report("reading", 1, 2)
        report("reading", 2, 2)
        return "done"

    events, result = drained(with_progress("finding", work))
    assert result == "done"
    assert events == [
        StageStarted(stage="finding"),
        StageAdvanced(stage="reading", done=1, total=2),
        StageAdvanced(stage="reading", done=2, total=2),
    ]


@pytest.mark.parametrize("error", [BadModel("broken", cure="again"), ZeroDivisionError(), SystemExit(3)])
def test_errors_of_the_work_are_raised_to_the_consumer_after_its_reports(error: BaseException) -> None:
    def work(report: Report) -> str:
        report("reading", 1, 2)
        raise error

    generator = with_progress("finding", work)
    assert [next(generator), next(generator)][1] == StageAdvanced(stage="reading", done=1, total=2)
    with pytest.raises(type(error)) as caught:
        next(generator)
    assert caught.value is error


def endless(target: Path, threads: list[threading.Thread], report: Report) -> str:
    threads.append(threading.current_thread())
    with staged(target) as folder:
        (folder / "half").write_text("half", encoding="utf-8")
        for done in range(10_000):
            report("converting", done, 10_000)
            time.sleep(0.005)
    return "never so far"


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_work_that_nobody_waits_for_ends_and_leaves_nothing(tmp_path: Path, is_interrupted: bool) -> None:
    threads: list[threading.Thread] = []
    generator = with_progress("finding", lambda report: endless(tmp_path / "model", threads, report))
    for _ in range(3):
        next(generator)
    assert len(list(tmp_path.iterdir())) == 1
    if is_interrupted:
        with pytest.raises(KeyboardInterrupt):
            generator.throw(KeyboardInterrupt)
    else:
        generator.close()
    assert not threads[0].is_alive()
    assert not list(tmp_path.iterdir())


def test_work_that_is_never_started_is_not_waited_for() -> None:
    generator = with_progress("finding", lambda _: pytest.fail("started"))
    assert next(generator) == StageStarted(stage="finding")
    generator.close()


def test_work_that_reports_nothing_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qadapt.stage._FAREWELL_SECONDS", 0.05)
    release = threading.Event()

    def work(report: Report) -> str:
        report("loading", 0, 1)
        release.wait(30)
        return "late"

    generator = with_progress("finding", work)
    next(generator)
    next(generator)
    before = time.monotonic()
    generator.close()
    assert time.monotonic() - before < 5
    release.set()
