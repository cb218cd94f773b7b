"""A saved state a run can go on from: safetensors and JSON only, written whole or not at all.

The manifest, last, has size and SHA-256 of every file as it was meant; what is read is checked against it
first. Nothing is ever unpickled. Files that are not in the manifest are never looked at. A checkpoint is
shown (`durable.py`) after the journal of its steps has reached the disk, so that no power cut leaves a gap
there.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from qadapt.cache import FULL, require_free
from qadapt.durable import flush_file, put_back, whole_folder
from qadapt.errors import BadOutput, BadRun, NoRoom
from qadapt.model.shards import TensorEntry, header_bytes
from qadapt.model.tensor_values import FORMAT_NAMES, bytes_of
from qadapt.run_folder import RunFolder
from qadapt.units import MIB

MANIFEST = "manifest.json"
STATE = "state.json"
GROUPS = ("adapter", "optimizer", "random")
FILES = (*(f"{group}.safetensors" for group in GROUPS), STATE)
VERSION = 1
_NAME = re.compile(r"step-\d+")
_ROOM_BESIDE_TENSORS_BYTES = MIB


@dataclass(frozen=True)
class Checkpoint:
    """A saved state: tensors by name and plain values, with the step they stand after."""

    step: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    values: dict[str, Any]

    @property
    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The tensors by the name of their file."""
        return dict(zip(GROUPS, (self.adapter, self.optimizer, self.random), strict=True))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, which is nearly what a checkpoint takes on the disk."""
        return sum(tensor.nbytes for tensors in self.groups.values() for tensor in tensors.values())


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lives."""
    return run_folder / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(run_folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint and returns its folder.

    Raises:
        NoRoom: The disk is too full; nothing half-written stays, older checkpoints are as they were.
        BadOutput: The folder cannot be written; likewise.
    """
    target = checkpoint_folder(run_folder, checkpoint.step)
    state = {"step": checkpoint.step, "run": RunFolder(run_folder).identity, **checkpoint.values}
    if target.exists() and find_damage(target) is None and _read_state(target) == state:
        return target  # this very state was saved before (by plan, then because of a request to stop)
    for left in target.parent.glob(".step-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    check_room(run_folder, checkpoint)
    try:
        with whole_folder(target) as folder:
            _write_files(folder, checkpoint, state)
            _flush_journal(run_folder)
    except OSError as error:
        kind = NoRoom if error.errno in FULL else BadOutput
        raise kind(
            f"The checkpoint {target} cannot be written: {error}",
            cure="Make room or make the folder writable, then `qadapt resume`.",
        ) from None
    return target


def check_room(run_folder: Path, checkpoint: Checkpoint) -> None:
    """Looks whether a checkpoint has room on the disk, before its first byte.

    Raises:
        NoRoom: It has not.
    """
    require_free(
        run_folder,
        checkpoint.tensor_bytes + _ROOM_BESIDE_TENSORS_BYTES,
        purpose=f"The checkpoint after step {checkpoint.step}",
        or_else="move the run to a larger one, then `qadapt resume`",
    )


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint after checking every file against the manifest.

    Raises:
        BadRun: A file is missing, cut off, changed or not readable for this user, or the checkpoint is of
        another run; says which.
    """
    damage = find_damage(folder)
    if damage is not None:
        raise BadRun(damage, cure="Use an older checkpoint.")
    state = _read_state(folder)
    run, identity = state.pop("run"), RunFolder(folder.parent.parent).identity
    if identity and run != identity:
        raise BadRun(
            f"The checkpoint {folder} is of another run: it was copied here.",
            cure="Move it away, then `qadapt resume` goes on from this run's own.",
        )
    # read, not mapped: Windows cannot delete a file that is mapped
    groups = {name: load((folder / f"{name}.safetensors").read_bytes()) for name in GROUPS}
    return Checkpoint(step=state.pop("step"), values=state, **groups)


def find_checkpoints(run_folder: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    named = (run_folder / "checkpoints").glob("step-*")
    return sorted((path for path in named if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder stands after."""
    return int(folder.name.removeprefix("step-"))


def load_newest(run_folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, if any, and a sentence for each newer one that is damaged.

    For the one process that works on the run.

    Raises:
        BadRun: A checkpoint cannot be read by this user, or is of another run.
    """
    put_back(run_folder / "checkpoints")
    problems: list[str] = []
    for folder in reversed(find_checkpoints(run_folder)):
        damage = find_damage(folder)
        if damage is None:
            return load_checkpoint(folder), problems
        problems.append(damage)
    return None, problems


def drop_newer(run_folder: Path, step: int) -> None:
    """Removes the checkpoints after `step`: damaged ones that a resumed run went back behind.

    The one it went back to is not touched, so that a process that is killed here loses nothing; what is left
    of a damaged one is no less damaged.

    Raises:
        BadOutput: One cannot be removed.
    """
    for folder in find_checkpoints(run_folder):
        if step_of(folder) > step:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise BadOutput(
                    f"The damaged checkpoint {folder} cannot be removed: {error}",
                    cure="Close what has its files open, then `qadapt resume`.",
                ) from None


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts back what `random_state` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


_GONE = FileNotFoundError, NotADirectoryError, IsADirectoryError
"""Errors that say that a file is not there, and not that it could not be read."""


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: each file is compared with the manifest, name with content.

    Raises:
        BadRun: It cannot be read now, or not by this user, which says nothing about it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = {name: _facts(folder / name) for name in FILES}
        damaged = [name for name in FILES if manifest["files"][name] != found[name]]
        if not damaged and manifest != _manifest(found):
            damaged = [MANIFEST]
        step = None if damaged else _read_state(folder)["step"]
    except (*_GONE, ValueError, KeyError, TypeError) as error:
        return f"The checkpoint {folder} is incomplete: {error}"
    except OSError as error:
        raise BadRun(
            f"The checkpoint {folder} cannot be read: {error}",
            cure="Make its files readable for this user, or resume as the user who trained. If the disk has "
            "lost it, move it away: the one before it is used.",
        ) from None
    if damaged:
        return f"The checkpoint {folder} is damaged: {', '.join(damaged)}."
    return None if step == step_of(folder) else f"The checkpoint {folder} was renamed: it is of step {step}."


def _write_files(folder: Path, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
    """Writes all files; each tensor is brought to the host by itself: there is no second copy of all."""
    found = {}
    for group, tensors in checkpoint.groups.items():
        entries = [
            TensorEntry(name, FORMAT_NAMES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in tensors.items()
        ]
        pieces = (bytes_of(tensor.detach().cpu()) for tensor in tensors.values())
        name = f"{group}.safetensors"
        found[name] = _write(folder / name, chain([header_bytes(entries)], pieces))
    found[STATE] = _write(folder / STATE, [json.dumps(state, indent=2).encode()])
    _write(folder / MANIFEST, [json.dumps(_manifest(found), indent=2).encode()])


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file and returns what the manifest says of it: of the bytes as meant, not as they arrived."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _manifest(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {"version": VERSION, "files": files}


def _read_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(MIB):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _flush_journal(run_folder: Path) -> None:
    """Steps are written to the journal one by one and reach the disk when the system likes, or here."""
    journal = RunFolder(run_folder).journal
    if journal.exists():
        flush_file(journal)
