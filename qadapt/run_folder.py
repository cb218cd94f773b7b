"""A run on disk: where its parts lie, made whole or not at all, found again by name or path.

```
runs/<name>/
  recipe.yaml  plan.json  environment.json     resolved, as used
  identity                                     what it was first made of, which its checkpoints carry
  data.json                                    the rows: files and hashes, what became of them, where they lie
  skipped.jsonl                                rows left out, if the recipe asks for that
  events.jsonl                                 the journal
  checkpoints/step-000200/                     saved states
  adapter/                                     the result
  export/<form>/                               merged models
```
"""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qadapt.durable import flush_folder, make_folder, write_whole
from qadapt.errors import BadOutput, BadRun


@dataclass(frozen=True)
class RunFolder:
    """The places of one run."""

    path: Path

    @property
    def name(self) -> str:
        """The folder's name, which is the run's, wherever it was moved."""
        return self.path.absolute().name

    @property
    def identity(self) -> str:
        """What tells this run's checkpoints from another's; empty in a folder that is no run of its own."""
        path = self.path / "identity"
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def identify(self, *made_of: str) -> None:
        """Gives a run that has none an identity, by what it is made of; it keeps it whatever changes later.

        Two runs that are made of the same to the letter are the same run.
        """
        if not self.identity:
            digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()
            self.write(self.path / "identity", f"{digest}\n")

    @property
    def recipe(self) -> Path:
        """The recipe as used, every field written out."""
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """The plan as used, with the hashes of base, template and data."""
        return self.path / "plan.json"

    @property
    def environment(self) -> Path:
        """Versions and machine."""
        return self.path / "environment.json"

    @property
    def data(self) -> Path:
        """What the rows were made from, what became of them, and their place in the cache."""
        return self.path / "data.json"

    @property
    def skipped(self) -> Path:
        """The malformed rows that were left out, one line each; there only if there are any."""
        return self.path / "skipped.jsonl"

    @property
    def journal(self) -> Path:
        """The events, one line each."""
        return self.path / "events.jsonl"

    @property
    def adapter(self) -> Path:
        """The result; there once the run has finished."""
        return self.path / "adapter"

    @property
    def rehearsal(self) -> Path:
        """Where the rehearsal writes; there only while it lasts."""
        return self.path / ".rehearsal"

    def export(self, form: str) -> Path:
        """Where an exported model goes."""
        return self.path / "export" / form

    def write(self, path: Path, text: str) -> None:
        """Writes a file, whole or not at all, also after a power cut."""
        write_whole(path, text)

    def write_json(self, path: Path, values: dict[str, Any]) -> None:
        """Writes a file of plain values, whole or not at all."""
        self.write(path, json.dumps(values, indent=2) + "\n")


def create_run(folder: Path, name: str) -> RunFolder:
    """Makes the folder of a new run.

    Raises:
        BadRun: A run of that name exists.
        BadOutput: The folder cannot be written.
    """
    path = folder / name
    try:
        make_folder(folder)
        path.mkdir()
        flush_folder(folder)
    except OSError as error:
        if path.is_dir() and _is_unborn(path):
            return RunFolder(path)
        if isinstance(error, FileExistsError) and path.exists():
            raise BadRun(
                f"There is a run named {name!r} in {folder} already.",
                cure="Choose another name with run.name=..., or go on with "
                f"`qadapt resume {name}`, or delete {path}.",
            ) from None
        raise BadOutput(
            f"The run cannot be written to {path}: {error}",
            cure="Make the folder writable, or choose another with run.folder=...",
        ) from None
    return RunFolder(path)


def _is_unborn(path: Path) -> bool:
    """Whether a process that died before its first event made the folder: nothing can be resumed there."""
    run = RunFolder(path)
    made = {".lock", "control", run.recipe.name, f".{run.recipe.name}.tmp", run.journal.name}
    is_silent = not run.journal.exists() or not run.journal.stat().st_size
    return is_silent and all(each.name in made for each in path.iterdir())


@contextmanager
def working_on(run: RunFolder, *, wait_seconds: float = 1.0) -> Iterator[None]:
    """Holds a run for this process; the system lets go of it when the process ends, however.

    Args:
        run: The run.
        wait_seconds: Whoever only looks whether it is worked on holds it for a moment, too.

    Raises:
        BadRun: Another process works on it.
        BadOutput: The folder is read-only.
    """
    lock = FileLock(run.path / ".lock")
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout:
        raise BadRun(
            f"Another process works on the run {run.path.name}.",
            cure=f"`qadapt watch {run.path.name}` shows it; wait for its end, or end it with "
            f"`qadapt pause {run.path.name}`.",
        ) from None
    except OSError as error:
        raise BadOutput(
            f"The run {run.path} cannot be written to: {error.strerror or error}.",
            cure="Make the folder writable, or move it to a disk that is.",
        ) from None
    try:
        yield
    finally:
        lock.release()


def is_worked_on(run: RunFolder) -> bool:
    """Whether a process works on the run now."""
    try:
        with working_on(run, wait_seconds=0):
            return False
    except BadRun:
        return True


def discard_run(run: RunFolder) -> None:
    """Removes a run that failed before its first step, so that nothing half-written stays."""
    shutil.rmtree(run.path, ignore_errors=True)


def find_run(run: str, folder: str | Path = "runs") -> RunFolder:
    """The folder of a run given by name, or by path.

    Raises:
        BadRun: There is no such run; says which there are.
    """
    for path in (Path(folder) / run, Path(run)):
        if RunFolder(path).journal.is_file():
            return RunFolder(path)
    names = run_names(Path(folder))
    close = difflib.get_close_matches(run, names, n=1)
    hint = f"Did you mean `{close[0]}`? " if close else ""
    listed = f"In {folder} there are: {', '.join(names[:8])}." if names else f"There are no runs in {folder}."
    raise BadRun(f"There is no run {run!r}.", cure=f"{hint}{listed}")


def run_names(folder: Path) -> list[str]:
    """The names of the runs in a folder, the latest first."""
    journals = [path for path in folder.glob("*/events.jsonl") if path.is_file()]
    journals.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent.name for path in journals]
