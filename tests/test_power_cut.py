"""A power cut at every moment of a run's writes: what may be on the disk then, and what a loader makes of it.

The writes, flushes and renames are recorded while they happen. Of every moment all disks are built that POSIX
allows, as bad as they can be: a file's bytes that were not flushed are there, half there or gone; a name that
was made, changed or taken away in a folder that was not flushed since is as before or as after, each for
itself. A rename is one change. On Windows names are journaled, so that there only bytes can be lost.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import state, tensors_of
from test_train import assert_same

from qadapt.events import RunStarted, StepDone, Warned
from qadapt.run_folder import create_run
from qadapt.train import checkpoint
from qadapt.train.checkpoint import load_newest
from qadapt.train.saver import Saver
from qadapt.view.journal import Journal, read_events

Names = dict[str, int]  # of a folder: name → number of what it names
WATCHED = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "truncate")


@dataclass
class Disk:
    """A tree by numbers (inodes): what folders name, and what files hold."""

    folders: dict[int, Names] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)

    def read(self, folder: Path) -> None:
        names = self.folders[folder.stat().st_ino] = {}
        for path in folder.iterdir():
            number = names[path.name] = path.stat().st_ino
            if path.is_dir():
                self.read(path)
            else:
                self.files[number] = path.read_bytes()

    def write(self, number: int, place: Path) -> None:
        place.mkdir()
        for name, each in self.folders.get(number, {}).items():
            if each in self.files:
                (place / name).write_bytes(self.files[each])
            else:
                self.write(each, place / name)

    def picture(self, number: int) -> Any:
        """A value that is equal for equal trees."""
        if number in self.files:
            return self.files[number]
        names = self.folders.get(number, {})
        return tuple((name, self.picture(each)) for name, each in sorted(names.items()))


@dataclass(frozen=True)
class Moment:
    """What programs see, what has reached the disk, and the step of the last save that had returned."""

    seen: Disk
    flushed: Disk
    saved: int

    def disks(self) -> Iterator[Disk]:
        """All that may be there after a power cut now."""
        changes = [
            (folder, group)
            for folder, names in self.seen.folders.items()
            for group in self._changes(self.flushed.folders.get(folder, {}), names)
        ]
        for happened in itertools.product((False, True), repeat=len(changes)):
            folders = {each: dict(self.flushed.folders.get(each, {})) for each in self.seen.folders}
            for (folder, group), has_happened in zip(changes, happened, strict=True):
                for name in group if has_happened else ():
                    folders[folder].pop(name, None)
                    if name in self.seen.folders[folder]:
                        folders[folder][name] = self.seen.folders[folder][name]
            for share in (0.0, 0.5, 1.0):
                yield Disk({**self.flushed.folders, **folders}, self._bytes(share))

    def _changes(self, before: Names, after: Names) -> list[list[str]]:
        """Names that changed, those of one file or folder together; files of a new folder all together."""
        changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        if not before:
            return [changed] if changed else []
        numbers = {after.get(name, before.get(name)) for name in changed}
        return [[n for n in changed if number in (before.get(n), after.get(n))] for number in numbers]

    def _bytes(self, share: float) -> dict[int, bytes]:
        """Every file with this share of what was not flushed."""
        held = dict(self.flushed.files)
        for number, content in self.seen.files.items():
            kept = self.flushed.files.get(number, b"")
            common = len(kept) if content.startswith(kept) else 0
            held[number] = content[: common + int(share * (len(content) - common))]
        return held


class Recorder:
    """Keeps every moment before a call that changes files.

    Args:
        root: The folder that is looked at; all in it now has reached the disk.
        flushes: Whether flushing is believed; otherwise it does nothing.
    """

    def __init__(self, root: Path, *, flushes: bool) -> None:
        self.root = root
        self.flushes = flushes
        self._opened: dict[int, int] = {}
        self.flushed = self._now()
        self.moments: list[Moment] = []
        self.saved = 0

    def _now(self) -> Disk:
        self._keep_numbers()
        disk = Disk()
        disk.read(self.root)
        return disk

    def _keep_numbers(self) -> None:
        """Opens all that is new, so that no number of what is deleted comes again, as on POSIX it may."""
        for path in (self.root, *self.root.rglob("*")) if os.name == "posix" else ():
            number = path.stat().st_ino
            if number not in self._opened:
                self._opened[number] = os.open(path, os.O_RDONLY)

    def look(self) -> None:
        seen = self._now()
        if os.name != "posix":
            self.flushed.folders = seen.folders
        flushed = Disk(dict(self.flushed.folders), dict(self.flushed.files))
        self.moments.append(Moment(seen, flushed, self.saved))

    def flush(self, number: int) -> None:
        now = self._now()
        if number in now.folders:
            self.flushed.folders[number] = now.folders[number]
        elif number in now.files:
            self.flushed.files[number] = now.files[number]

    @contextmanager
    def watching(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in WATCHED:
                patch.setattr(os, name, self._watched(getattr(os, name)))
            yield
        self.look()
        for opened in self._opened.values():
            os.close(opened)

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.look()
            if call.__name__ != "fsync":
                return call(*arguments, **options)
            if self.flushes:
                self.flush(os.fstat(arguments[0]).st_ino)
            return None

        watched.__name__ = call.__name__
        return watched


def step(number: int) -> StepDone:
    return StepDone(
        step=number, loss=1.0, learning_rate=0.1, gradient_norm=1.0, tokens=1, supervised_tokens=1, rows=1,
        seconds=1.0,
    )  # fmt: skip


def a_run(recorder: Recorder) -> None:
    """Three steps, two of them saved: new, with an old one to drop, and in place of one of the same step."""
    run = create_run(recorder.root / "runs", "cut")
    with Journal(run.journal) as journal, Saver(run.path, keep=1, in_background=False) as saver:
        journal.append(RunStarted(name="cut", model="m", method="lora", device="cpu", steps=3))
        for number in range(1, 4):
            journal.append(step(number))
            if number == 2:
                continue
            for event in saver.save(state(number), best_step=None):
                recorder.saved = number
                journal.append(event)
        saver.save(state(3, best=3), best_step=None)


def losses(recorder: Recorder, folder: Path) -> Iterator[str]:
    """What goes wrong on the disks of all moments, the last first, each disk looked at once."""
    looked_at, root = set(), recorder.root.stat().st_ino
    for moment in reversed(recorder.moments):
        for disk in moment.disks():
            if (key := (moment.saved, disk.picture(root))) not in looked_at:
                looked_at.add(key)
                place = folder / "disk"
                disk.write(root, place)
                found = list(problems_of(place / "runs/cut", at_least=moment.saved))
                shutil.rmtree(place)
                yield from found
    assert len(looked_at) > 50


def problems_of(run: Path, *, at_least: int) -> Iterator[str]:
    taken, problems = load_newest(run)
    yield from problems
    reached = 0 if taken is None else taken.step
    if reached < at_least:
        yield f"step {at_least} was saved, {reached} is found"
    if taken is None:
        return
    assert_same(tensors_of(taken), tensors_of(state(taken.step)))
    events = read_events(run)
    steps = [event.step for event in events if isinstance(event, StepDone)]
    if steps[:reached] != list(range(1, reached + 1)):
        yield f"beside the checkpoint of step {reached} the journal has the steps {steps}"
    # half a line may end the file, and nothing else may be wrong
    if any(isinstance(event, Warned) for event in events[:-1]):
        yield "the journal has a gap"


def test_a_power_cut_at_any_moment_loses_no_checkpoint_and_leaves_no_gap(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    recorder = Recorder(tmp_path / "root", flushes=True)
    with recorder.watching():
        a_run(recorder)
    assert recorder.saved == 3
    assert list(losses(recorder, tmp_path)) == []


def test_the_same_without_flushing_would_lose_some(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    recorder = Recorder(tmp_path / "root", flushes=False)
    with recorder.watching():
        a_run(recorder)
    for loss in ("was saved", "is incomplete"):
        assert any(loss in problem for problem in losses(recorder, tmp_path)), loss


def test_a_checkpoint_before_its_steps_are_flushed_would_leave_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root").mkdir()
    monkeypatch.setattr(checkpoint, "_flush_journal", lambda run: None)
    recorder = Recorder(tmp_path / "root", flushes=True)
    with recorder.watching():
        a_run(recorder)
    assert any("the journal has the steps" in problem for problem in losses(recorder, tmp_path))
