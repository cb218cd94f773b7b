"""What one side of a comparison is told and tells: a task in JSON, and lines of JSON about its steps.

Peers run it in environments of their own, so it knows nothing but psutil and the standard library. The rows
are tokens already, the same for every side, so that nobody's tokenizer is timed and all learn the same.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from host_memory import anonymous_bytes

IGNORED = -100


@dataclass(frozen=True)
class Task:
    """What a side trains, and how; None in `dtype` and `is_recomputing` means whatever its default is.

    `padding` is `filled` (to the longest of a micro-batch), `free` (rows one after another) or `packed`
    (rows packed to the full length first), `micro_batch` the rows that a peer takes at once. `rows` is a file
    of token rows, `conversations` one of the same as text, `report` where the lines go, and `place` an empty
    folder. `adapter` is where the first adapter is kept: the package's side writes it, the plain loop begins
    with it.
    """

    model: str
    rows: str
    conversations: str
    report: str
    place: str
    steps: int
    micro_batch: int
    rows_per_step: int
    length: int = 512
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 2e-4
    dtype: str | None = None
    is_recomputing: bool | None = None
    padding: str = "filled"
    adapter: str | None = None

    @staticmethod
    def read(path: str) -> Task:
        return Task(**json.loads(Path(path).read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def token_rows(self) -> list[dict[str, list[int]]]:
        """`input_ids` and `labels` of each row, as often as the steps need them."""
        lines = Path(self.rows).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [rows[index % len(rows)] for index in range(self.steps * self.rows_per_step)]

    @property
    def passes_per_step(self) -> int:
        return -(-self.rows_per_step // self.micro_batch)


class Telling:
    """Writes the lines: what the imports left in memory, each step's end, and how it was done."""

    def __init__(self, task: Task) -> None:
        self._path = Path(task.report)
        self._last = 0.0

    def imported(self) -> None:
        self._say("imported", level_bytes=anonymous_bytes())

    def begin(self) -> None:
        """The next step's time counts from here."""
        self._last = time.perf_counter()

    def step(self, *, seconds: float | None = None, **values: Any) -> None:
        """A step is done, now if nobody else measured it; `values` may have its tokens and its loss."""
        if seconds is None:
            seconds = time.perf_counter() - self._last
        self._say("step", seconds=seconds, **values)
        self._last = time.perf_counter()

    def done(self, **values: Any) -> None:
        """All steps are done; `values` are facts such as `dtype`, or tokens that were counted elsewhere."""
        self._say("done", **values)

    def _say(self, kind: str, **values: Any) -> None:
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"kind": kind, **values}) + "\n")


def main_task() -> tuple[Task, Telling]:
    """The task named on the command line."""
    task = Task.read(sys.argv[1])
    return task, Telling(task)
