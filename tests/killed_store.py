"""A store whose process is killed right before each of its file operations; what is left is looked at.

Run as a program by `test_adapter_store_faults.py`: a process of its own may fork. It prints one line a
change: how often it was killed, and what went wrong. With `torn` names are written in place, which must be
seen.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qadapt.adapters import pointers
from qadapt.adapters.facts import AdapterFacts, write_facts
from qadapt.adapters.store import Store
from qadapt.adapters.versions import Record
from qadapt.errors import BadAdapter

FACTS = AdapterFacts("owner/base", None, "f" * 64, "nf4", True, "bf16", "e" * 64)
RECORD = Record(FACTS, "lora", "run first")
WATCHED = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.copyfile", "os.truncate")
Change = Callable[[Store], object]


def source(place: Path, weights: str) -> Path:
    folder = place / weights
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_text(weights * 100)
        (folder / "adapter_config.json").write_text("{}")
        write_facts(FACTS, folder)
    return folder


def adding(place: Path, weights: str) -> Change:
    folder = source(place, weights)
    return lambda store: store.add(folder, RECORD, name="summaries")


def die_at(operation: int) -> None:
    """Kills this process right before so many file operations."""
    left = operation

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if event in WATCHED or writes:
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


def is_killed(change: Change, store: Store, operation: int) -> bool:
    child = os.fork()
    if not child:
        die_at(operation)
        change(store)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if status:
        raise SystemExit("the change itself failed")
    return False


def picture(store: Store, *, damaged: str = "") -> tuple[object, ...]:
    """What a reader sees; raises if anything it sees is not whole, but for one version."""
    names, tags = store.names(), store.tags()
    for each in {*(name.current for name in names.values()), *tags.values(), *store.ids()} - {damaged}:
        store.folder_of(each)
    return names, tags


def killed_everywhere(change: Change, before: Path, place: Path, *, damaged: str) -> tuple[int, list[str]]:
    """Kills a change at each operation of its life; how often, and what went wrong."""
    done = place / "done"
    shutil.copytree(before, done)
    start = picture(Store(done), damaged=damaged)
    change(Store(done))
    end, ids, problems, operation = picture(Store(done)), Store(done).ids(), list[str](), 0
    while True:
        shutil.copytree(before, place / "killed")
        store = Store(place / "killed")
        killed = is_killed(change, store, operation)
        seen = picture(store, damaged=damaged)
        if seen not in (start, end):
            problems.append(f"after operation {operation} a reader sees {seen}")
        if seen == start:
            with suppress(BadAdapter):  # what was to be removed is removed
                change(store)
        if (picture(store), store.ids()) != (end, ids):
            problems.append(f"after operation {operation} it cannot be gone on with")
        store.gc()
        if left := [path.name for path in store.path.glob("*/.*")]:
            problems.append(f"after operation {operation} {left} is left")
        shutil.rmtree(place / "killed")
        if not killed:
            shutil.rmtree(done)
            return operation, problems
        operation += 1


def write_in_place(path: Path, text: str) -> None:
    path.write_text(text[:20])
    path.write_text(text)


def main(place: Path) -> None:
    before = place / "before"
    before.mkdir()
    (place / "none").mkdir()
    sources = place / "sources"
    store = Store(before)
    first = store.add(source(sources, "one"), RECORD, name="summaries").version.id
    store.add(source(sources, "two"), RECORD, name="summaries")
    unused = store.add(source(sources, "three"), RECORD, name="other").version.id
    store.remove("other")
    damaged = place / "damaged"
    shutil.copytree(before, damaged)
    (damaged / "versions" / first / "adapter" / "adapter_model.safetensors").unlink()
    # a change that was half done is done again: each is the same when it is done twice
    changes: dict[str, tuple[Change, Path]] = {
        "first": (adding(sources, "one"), place / "none"),
        "add": (adding(sources, "four"), before),
        "again": (adding(sources, "one"), before),
        "use": (lambda store: store.use("fresh", first), before),
        "rollback": (lambda store: store.rollback("summaries"), before),
        "tag": (lambda store: store.tag(first, "best"), before),
        "remove name": (lambda store: store.remove("summaries"), before),
        "remove version": (lambda store: store.remove(unused), before),
        "gc": (lambda store: store.gc(), before),
        "mend": (adding(sources, "one"), damaged),
    }
    for name, (change, start) in changes.items():
        killed, problems = killed_everywhere(change, start, place, damaged=first if start == damaged else "")
        sys.stdout.write(f"{name}: killed {killed} times, {problems or 'whole every time'}\n")


if __name__ == "__main__":
    os.fsync = lambda handle: None  # a kill loses nothing that was written
    if sys.argv[2:] == ["torn"]:
        pointers.write_whole = write_in_place
    main(Path(sys.argv[1]))
