"""The journal: a run as lines in `events.jsonl`, written one by one, read back, followed while it grows.

The writer only appends; what a resumed run replaces is decided when reading (`effective`). Knows no screen
and no training. A power cut may leave half a line at the end: the next writer removes it, a reader leaves it
out and says so. What a resumed run goes on from is on the disk: a checkpoint appears after the lines of its
steps were flushed (`train/checkpoint.py`).
"""

from __future__ import annotations

import io
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from qadapt import control
from qadapt.cache import FULL
from qadapt.durable import flush_file, flush_folder
from qadapt.errors import BadOutput, BadRun, NoRoom
from qadapt.events import (
    CheckpointSaved,
    Continued,
    Eased,
    Evaluated,
    Event,
    MemoryMeasured,
    Paused,
    Resumed,
    RunFinished,
    RunStarted,
    Sampled,
    StageAdvanced,
    StepDone,
    Stopped,
    UpdateSkipped,
    Warned,
    from_line,
    to_line,
)
from qadapt.run_folder import run_names

FILE_NAME = "events.jsonl"
RETRY_SECONDS = 3
LOOKS_PER_PROBE = 20
"""A watched run is looked at so often before it is asked once more whether a process works on it."""
"""Between two tries to write to a full disk."""
STEPPED = (
    StepDone, MemoryMeasured, Evaluated, CheckpointSaved, Resumed, Eased, UpdateSkipped, Paused, Continued,
    Sampled, Stopped, RunFinished,
)  # fmt: skip
# Many, and cheap to lose in a power cut: these reach the disk when the system likes or with the next other
# event.
_FREQUENT = (StepDone, StageAdvanced, MemoryMeasured)


class Journal:
    """Appends events to a file, one line each, handed to the system before `append` returns.

    A half line that a power cut left at the end is removed when the journal is opened, so that the next line
    is whole.

    Args:
        path: The file; it is made when missing, its folder must exist.
        sleep: The clock to wait by while the disk is full.

    Raises:
        BadOutput: The file cannot be opened for writing.
    """

    def __init__(self, path: Path, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.path = path
        self._sleep = sleep
        self._step = 0
        try:
            _mend_end(path)
            self._file: io.RawIOBase = path.open("ab", buffering=0)
            flush_file(path)
            flush_folder(path.parent)
        except OSError as error:
            raise _not_writable(path, error) from error

    def append(self, event: Event) -> None:
        """Writes one event.

        Raises:
            NoRoom: The disk is full; nothing of the event stands in the file.
            BadOutput: The file cannot be written or went away.
        """
        self._append([event])

    def _append(self, events: Sequence[Event]) -> None:
        lines = "".join(f"{to_line(event)}\n" for event in events).encode()
        try:
            self._write_whole(lines, is_flushed=not all(isinstance(event, _FREQUENT) for event in events))
        except OSError as error:
            raise _not_writable(self.path, error) from error
        self._step = next((event.step for event in events[::-1] if isinstance(event, STEPPED)), self._step)

    def _write_whole(self, lines: bytes, *, is_flushed: bool) -> None:
        start, rest = self.path.stat().st_size, memoryview(lines)
        try:
            while rest:  # a raw file may take less than it was given
                rest = rest[self._file.write(rest) or 0 :]
            if is_flushed:
                os.fsync(self._file.fileno())
        except OSError:
            os.truncate(self.path, start)  # half a line would spoil the next one
            raise

    def record(self, events: Iterable[Event]) -> Iterator[Event]:
        """Passes events on, each after it was written: `show(journal.record(train(...)))`.

        While the disk is full the run waits: it hands out a `Paused`, tries again every few seconds, and
        writes what happened in this order when there is room.

        Raises:
            NoRoom: The disk is full, and the run was asked to leave.
            BadOutput: The file went away, or may not be written any more.
        """
        for event in events:
            try:
                self.append(event)
                problem = None
            except NoRoom as error:
                problem = error
            if problem is not None:
                yield from self._when_room(event, problem)
            yield event

    def _when_room(self, event: Event, problem: NoRoom) -> Iterator[Event]:
        paused = Paused(step=self._step, reason=problem.problem)
        yield paused
        start = time.monotonic()
        while True:
            for _ in range(RETRY_SECONDS):
                if control.is_asked_to_leave(self.path.parent):
                    raise problem
                self._sleep(1)
            continued = Continued(step=self._step, seconds=time.monotonic() - start)
            with suppress(NoRoom):
                self._append([paused, continued, event])
                yield continued
                return

    def close(self) -> None:
        """Closes the file; closing twice is fine."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(run_folder: Path) -> list[Event]:
    """All events of a run, superseded ones included (see `effective`); empty when none is written yet.

    A line that is no event (cut off by a power cut) is left out, and a `Warned` stands in its place. Kinds of
    events that this version does not know are left out.

    Raises:
        BadRun: There is no such run folder.
    """
    _check_folder(run_folder)
    path = run_folder / FILE_NAME
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        event = _parse(line, number, after=events[-1].time if events else 0.0)
        if event is not None:
            events.append(event)
    return events


def effective(events: Iterable[Event]) -> list[Event]:
    """The events that count: those with a step above the step of a later `Resumed` are left out.

    A run that was asked to leave in the middle of an evaluation saves the step before it, and evaluates when
    it is resumed. If that process dies before it has saved again, the next one evaluates once more, with the
    same result: that, its warnings and its sample answers count once. A checkpoint that was saved again
    counts as it is now.
    """
    kept: list[Event] = []
    for event in events:
        if isinstance(event, Resumed):
            kept = [one for one in kept if not _is_after(one, event.step)]
        kept.append(event)
    counting: dict[tuple[object, ...], int] = {}
    for at, event in enumerate(kept):
        deed = _deed(event) or (at,)
        counting[deed] = at if isinstance(event, CheckpointSaved) else counting.get(deed, at)
    return [kept[at] for at in sorted(counting.values())]


def _deed(event: Event) -> tuple[object, ...] | None:
    """What an event says that may be said again; None if it says something else each time."""
    match event:
        case Evaluated() | CheckpointSaved():
            return type(event), event.step
        case Sampled():
            return Sampled, event.step, event.prompt
        case Warned() if event.step is not None:
            return Warned, event.step, event.message, event.cure
        case _:
            return None


def _is_after(event: Event, step: int) -> bool:
    return isinstance(event, (*STEPPED, Warned)) and event.step is not None and event.step > step


def follow(
    run_folder: Path,
    *,
    is_left: Callable[[], bool] = lambda: False,
    poll_seconds: float = 0.5,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Event]:
    """The events of a run from its first, waiting for more until the run has finished, stopped or died.

    The journal may not exist yet, and its last line may be half written: both are waited for. An end that a
    later `Resumed` took back is passed over. The caller may leave at any time.

    Args:
        run_folder: The run's folder.
        is_left: Whether no process works on the run; then its events end without an end of the run.
        poll_seconds: Seconds between two looks at the file.
        sleep: The clock to wait by.

    Raises:
        BadRun: There is no such run folder (raised here, before the first event).
    """
    _check_folder(run_folder)
    return _tail(run_folder / FILE_NAME, is_left=is_left, poll_seconds=poll_seconds, sleep=sleep)


def _tail(
    path: Path, *, is_left: Callable[[], bool], poll_seconds: float, sleep: Callable[[float], None]
) -> Iterator[Event]:
    # Each look opens the file anew and begins after the last whole line: no lock is held (Windows), and a
    # half line that a resumed run removes was never taken.
    whole_bytes, number, last_time, is_over = 0, 0, 0.0, False
    for looks in itertools.count():
        is_last_look = looks % LOOKS_PER_PROBE == 0 and is_left()  # what it wrote is there by now
        for line in _whole_lines(path, whole_bytes):
            whole_bytes += len(line) + 1
            number += 1
            event = _parse(line, number, after=last_time)
            if event is None:
                continue
            last_time = event.time
            if isinstance(event, RunFinished | Stopped):
                is_over = True
            elif isinstance(event, RunStarted | Resumed | StepDone):
                is_over = False
            yield event
        if is_over or is_last_look:
            return
        sleep(poll_seconds)


def _whole_lines(path: Path, start: int) -> list[bytes]:
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(start)
        return file.read().split(b"\n")[:-1]


def _parse(line: bytes, number: int, *, after: float) -> Event | None:
    if not line.strip():
        return None
    try:
        return from_line(line.decode())
    except ValueError:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        return Warned(
            message=f"line {number} of {FILE_NAME} is cut off and was left out",
            cure="a power cut or a full disk does this; the picture lacks one event, the run is not harmed",
            time=after,
        )


def _mend_end(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        whole, line_end, rest = file.read().rpartition(b"\n")
        if rest and isinstance(_parse(rest, 0, after=0.0), Warned):
            file.truncate(len(whole) + len(line_end))
        elif rest:  # whole but for its line end
            file.write(b"\n")


def _check_folder(run_folder: Path) -> None:
    if run_folder.is_dir():
        return
    names = run_names(run_folder.parent)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    if names:
        cure = f"runs in {run_folder.parent}: {shown}"
    else:
        cure = (
            f"there are no runs in {run_folder.parent}; look elsewhere (--folder) or start one: qadapt train"
        )
    raise BadRun(f"there is no run folder {run_folder}", cure=cure)


def _not_writable(path: Path, error: OSError) -> BadOutput:
    kind = NoRoom if error.errno in FULL else BadOutput
    return kind(
        f"the journal {path} cannot be written: {error.strerror or error}",
        cure="free some space or choose a folder you may write to, then go on with `qadapt resume`",
    )
