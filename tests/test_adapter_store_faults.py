"""The store of adapters under kill -9 at every file operation, power cuts, and several processes at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from killed_store import RECORD, adding, picture, source
from test_power_cut import Disk, Recorder

from qadapt.adapters.store import Store
from qadapt.errors import QadaptError

PROGRAM = Path(__file__).with_name("killed_store.py")


def killed(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), str(place), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is killed at its n-th operation by forking")
def test_a_change_that_is_killed_at_any_file_operation_leaves_before_or_after(tmp_path: Path) -> None:
    done = killed(tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 10, done.stderr
    assert all(line.endswith("times, whole every time") for line in lines), done.stdout
    assert sum(int(line.split()[-5]) for line in lines) > 80


def test_a_name_written_in_place_would_be_seen_torn(tmp_path: Path) -> None:
    assert "does not say which version is meant" in killed(tmp_path, "torn").stderr


class HoldingRecorder(Recorder):
    """Keeps all it has seen open, so that the system gives no number twice."""

    def __init__(self, root: Path, *, flushes: bool, held: ExitStack) -> None:
        self.held, self.numbers = held, set[int]()
        super().__init__(root, flushes=flushes)

    def _now(self) -> Disk:
        for path in self.root.rglob("*"):
            if (number := path.stat().st_ino) not in self.numbers:
                self.numbers.add(number)
                self.held.callback(os.close, os.open(path, os.O_RDONLY))
        return super()._now()


def a_life(recorder: Recorder, place: Path) -> list[tuple[object, ...]]:
    """Every kind of change, one after the other; what a reader sees before the first and after each."""
    store = Store(recorder.root / "adapters")
    changes = [
        adding(place, "one"),
        adding(place, "two"),
        lambda store: store.tag("summaries", "best"),
        lambda store: store.rollback("summaries"),
        lambda store: store.use("other", "best"),
        lambda store: store.remove("summaries"),
        lambda store: store.gc(),
    ]
    seen = [picture(store)]
    for number, change in enumerate(changes, 1):
        change(store)
        recorder.saved = number
        seen.append(picture(store))
    return seen


def losses(recorder: Recorder, seen: list[tuple[object, ...]], place: Path) -> Iterator[str]:
    """What goes wrong on the disks of all moments, each disk looked at once."""
    looked_at, root = set(), recorder.root.stat().st_ino
    for moment in recorder.moments:
        for disk in moment.disks():
            if (key := (moment.saved, disk.picture(root))) in looked_at:
                continue
            looked_at.add(key)
            disk.write(root, place)
            store = Store(place / "adapters")
            try:
                if picture(store) not in seen[moment.saved : moment.saved + 2]:
                    yield f"after change {moment.saved}: {picture(store)}"
            except (QadaptError, OSError, ValueError) as error:
                yield f"after change {moment.saved}: {error}"
            shutil.rmtree(place)
    assert len(looked_at) > 50


@pytest.mark.parametrize("flushes", [True, False])
def test_a_power_cut_at_any_moment_leaves_before_or_after(tmp_path: Path, flushes: bool) -> None:
    for each in ("one", "two"):
        source(tmp_path / "sources", each)
    (tmp_path / "root").mkdir()
    with ExitStack() as held:
        recorder = HoldingRecorder(tmp_path / "root", flushes=flushes, held=held)
        with recorder.watching():
            seen = a_life(recorder, tmp_path / "sources")
    first = next(losses(recorder, seen, tmp_path / "disk"), None)
    assert (first is None) is flushes, first


WORKER = """
import sys
from contextlib import suppress
from pathlib import Path
from killed_store import RECORD, source
from qadapt.adapters.store import Store
from qadapt.errors import BadAdapter
place, number = Path(sys.argv[1]), sys.argv[2]
store = Store(place / "adapters")
for turn in range(6):
    folder = source(place / f"sources-{number}", f"{number}-{turn}")
    added = store.add(folder, RECORD, name="shared")
    store.add(folder, RECORD, name=f"own-{number}")
    store.tag(added.version.id, "last")
    for name in store.names().values():
        store.folder_of(name.current)
    store.gc()
    with suppress(BadAdapter):  # others may have rolled back to the first
        store.rollback("shared")
    store.use("shared", added.version.id)
"""


def test_processes_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    where = os.environ | {"PYTHONPATH": str(PROGRAM.parent)}
    workers = [
        subprocess.Popen([*command, number], env=where, stderr=subprocess.PIPE, text=True)
        for number in ("first", "second", "third")
    ]
    said = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], said
    store = Store(tmp_path / "adapters")
    names = store.names()
    assert len(store.ids()) == 18
    assert {*names["shared"].used, *names["shared"].left} == set(store.ids())
    assert [len(set(names[f"own-{each}"].used)) for each in ("first", "second", "third")] == [6, 6, 6]
    assert store.tags()["last"] in store.ids()
    picture(store)


def test_what_a_killed_process_left_is_cleared_by_the_next_change(tmp_path: Path) -> None:
    store = Store(tmp_path / "adapters")
    store.add(source(tmp_path, "one"), RECORD, name="summaries")
    left = store.path / "versions" / f".{'a' * 64}.partial"
    left.mkdir()
    store.tag("summaries", "best")
    assert not left.exists()
