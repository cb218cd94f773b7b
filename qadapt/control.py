"""How a running run is asked for something: a small empty file in its folder, on every system.

`stop` and `pause` mean: finish the micro-batch, save, leave (they differ in the reason that is given); `save`
means: write a checkpoint and go on. The run looks between micro-batches, which costs a `stat` each, and takes
a request away when it has done it. Knows no process and no signal: whoever can write to the folder may ask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from qadapt.cache import output_errors

Request = Literal["stop", "pause", "save"]


def ask(run_folder: Path, request: Request) -> None:
    """Leaves a request in the folder of a running run.

    Raises:
        BadOutput: The folder is read-only or full.
    """
    folder = run_folder / "control"
    with output_errors(folder):
        folder.mkdir(exist_ok=True)
        (folder / request).touch()


def is_asked(run_folder: Path, request: Request) -> bool:
    """Whether the request is waiting."""
    return (run_folder / "control" / request).exists()


def is_asked_to_leave(run_folder: Path) -> bool:
    """Whether the run is to save and leave, for whatever reason."""
    return is_asked(run_folder, "stop") or is_asked(run_folder, "pause")


def take(run_folder: Path, *requests: Request) -> None:
    """Removes requests that have been done; without a name, all of them.

    Raises:
        BadOutput: The folder is read-only.
    """
    folder = run_folder / "control"
    with output_errors(folder):
        for request in requests or get_args(Request):
            (folder / request).unlink(missing_ok=True)
