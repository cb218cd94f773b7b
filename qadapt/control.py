"""How a watcher asks a running run for something: a small file in the run's folder, on every system.

The run looks between steps and takes the request away when it has done it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Request = Literal["stop"]


def ask(run_folder: Path, request: Request) -> None:
    """Leaves a request in the folder of a running run."""
    folder = run_folder / "control"
    folder.mkdir(exist_ok=True)
    (folder / request).touch()


def is_asked(run_folder: Path, request: Request) -> bool:
    """Whether the request is waiting."""
    return (run_folder / "control" / request).exists()


def take(run_folder: Path, request: Request) -> None:
    """Removes a request that has been done."""
    (run_folder / "control" / request).unlink(missing_ok=True)
