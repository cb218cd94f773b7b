"""The plan a run executes, as it is stored: what was chosen, what was predicted, and on what it was trained.

A resumed run reads it back and plans nothing anew; what changed since is told by its hashes, and by the
recipe that is kept beside them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qadapt.errors import BadRun
from qadapt.events import Planned
from qadapt.plan.setting import Recompute
from qadapt.shape import Part


@dataclass(frozen=True)
class Ingredients:
    """SHA-256 of what a run is made of; of adapters, if it builds on some."""

    base: str
    template: str
    rows: str
    adapters: str = ""

    def changed(self, now: Ingredients) -> list[str]:
        """The names of those that are others now."""
        return [name for name, stored in asdict(self).items() if stored != asdict(now)[name]]


@dataclass(frozen=True)
class StoredPlan:
    """How a run's steps are placed on a device.

    `packed` came with a later release: a plan without it is of a run whose rows are filled up. Packed
    micro-batches have at most `packed_tokens`, and learn at most `packed_learned` of them; later still came
    `loss_chunk`, `mlp_tiles` and `offload`, which are those of `plan.setting.Setting`. `recipe` is the
    one it was made for, as plain values; empty in a plan of an earlier release.
    """

    steps: int
    device: str
    micro_batch: int
    recompute: Recompute
    compute_dtype: str
    adapter_dtype: str
    optimizer: str
    predicted: dict[str, int]
    predicted_peak_bytes: int
    budget_bytes: int
    reasons: tuple[str, ...]
    revision: str | None
    ingredients: Ingredients
    packed: bool = False
    packed_tokens: int = 0
    packed_learned: int = 0
    loss_chunk: int = 0
    mlp_tiles: int = 1
    offload: tuple[Part, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)

    def event(self) -> Planned:
        """The plan as an event."""
        return Planned(
            micro_batch=self.micro_batch,
            recompute=self.recompute,
            compute_dtype=self.compute_dtype,
            adapter_dtype=self.adapter_dtype,
            optimizer=self.optimizer,
            predicted=self.predicted,
            predicted_peak_bytes=self.predicted_peak_bytes,
            budget_bytes=self.budget_bytes,
            reasons=self.reasons,
            packed=self.packed,
            device=self.device,
            loss_chunk=self.loss_chunk,
            mlp_tiles=self.mlp_tiles,
            offload=self.offload,
        )

    def rows_at_once(self, longest: int) -> int:
        """How many rows, filled up to so many tokens, take no more than was planned; at least 1."""
        return max(1, self.packed_tokens // longest) if self.packed else self.micro_batch

    def values(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"version": 1, **asdict(self)}


def read_plan(path: Path) -> StoredPlan:
    """Reads a stored plan.

    Raises:
        BadRun: The file is missing or damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        del values["version"]
        ingredients = Ingredients(**values.pop("ingredients"))
        reasons, offload = tuple(values.pop("reasons")), tuple(values.pop("offload", ()))
        return StoredPlan(ingredients=ingredients, reasons=reasons, offload=offload, **values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"The plan {path} cannot be read: {error}"
        cure = (
            "Put the file back, or start a new run with run.name=...; the checkpoints are whole without it."
        )
        raise BadRun(problem, cure=cure) from None
