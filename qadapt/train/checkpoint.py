"""A saved state a run can go on from: safetensors and JSON only, written whole or not at all.

A checkpoint is built in a temporary folder, its manifest with sizes and SHA-256 last, flushed to disk, then
renamed. What is read is checked against the manifest first. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from qadapt.errors import BadOutput, BadRun

MANIFEST = "manifest.json"
GROUPS = ("adapter", "optimizer", "random")


@dataclass(frozen=True)
class Checkpoint:
    """A saved state: tensors by name and plain values, with the step they stand after."""

    step: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    values: dict[str, Any]


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lives."""
    return run_folder / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(run_folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint and returns its folder.

    Raises:
        BadOutput: The folder cannot be written, or the disk is full; nothing half-written stays.
    """
    target = checkpoint_folder(run_folder, checkpoint.step)
    if target.exists() and find_damage(target) is None:
        return target  # this very state was saved before (an evaluation, then a request to stop)
    building = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        for name, tensors in _groups(checkpoint).items():
            whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(whole, building / f"{name}.safetensors")
        state = {"step": checkpoint.step, **checkpoint.values}
        (building / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        _write_manifest(building)
        if target.exists():
            shutil.rmtree(target)
        building.replace(target)
        _flush_folder(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise BadOutput(
            f"The checkpoint {target} cannot be written: {error}",
            cure="Make room or make the folder writable, then `qadapt resume`.",
        ) from None
    return target


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint after checking every file against the manifest.

    Raises:
        BadRun: A file is missing, cut off or changed; names it.
    """
    damage = find_damage(folder)
    if damage is not None:
        raise BadRun(damage, cure="Use an older checkpoint.")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    # read, not mapped: Windows cannot delete a file that is mapped
    groups = {name: load((folder / f"{name}.safetensors").read_bytes()) for name in GROUPS}
    return Checkpoint(step=state.pop("step"), values=state, **groups)


def find_checkpoints(run_folder: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    return sorted((run_folder / "checkpoints").glob("step-*"), key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder stands after."""
    return int(folder.name.removeprefix("step-"))


def load_newest(run_folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, if any, and a sentence for each newer one that is damaged."""
    problems: list[str] = []
    for folder in reversed(find_checkpoints(run_folder)):
        damage = find_damage(folder)
        if damage is None:
            return load_checkpoint(folder), problems
        problems.append(damage)
    return None, problems


def drop_old(run_folder: Path, *, keep: int, best_step: int | None) -> None:
    """Removes all but the newest `keep` checkpoints and the best one."""
    for folder in find_checkpoints(run_folder)[:-keep]:
        if step_of(folder) != best_step:
            _remove(folder)


def drop_newer(run_folder: Path, step: int) -> None:
    """Removes the checkpoints after `step`: damaged ones that a resumed run went back behind."""
    for folder in find_checkpoints(run_folder):
        if step_of(folder) > step:
            _remove(folder)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise BadOutput(
            f"The old checkpoint {folder} cannot be removed: {error}",
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


def _groups(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    return dict(zip(GROUPS, (checkpoint.adapter, checkpoint.optimizer, checkpoint.random), strict=True))


def _write_manifest(folder: Path) -> None:
    files = {path.name: _facts(path) for path in sorted(folder.iterdir())}
    for name in files:
        _flush(folder / name)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"version": 1, "files": files}, indent=2), encoding="utf-8")
    _flush(manifest)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None: each is compared with the manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        damaged = [name for name, facts in files.items() if _facts(folder / name) != facts]
    except (OSError, ValueError, KeyError) as error:
        return f"The checkpoint {folder} is incomplete: {error}"
    return f"The checkpoint {folder} is damaged: {', '.join(damaged)}." if damaged else None


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and renames are journaled
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
