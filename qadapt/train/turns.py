"""How each live knob of the out-of-memory ladder (`oom.py`) is turned: its next value, and what that costs.

A turn changes how a step is computed and never what. It knows no other knob, no step and no file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import psutil
from peft import PeftModel

from qadapt.cache import free_bytes
from qadapt.data.batches import Division
from qadapt.data.tokens import Tokens
from qadapt.engine.boundaries import offload_boundaries, offloads_boundaries
from qadapt.engine.head import head_of
from qadapt.engine.host import device_of
from qadapt.engine.recompute import recomputed_layers, set_recompute
from qadapt.engine.tiles import can_tile, set_tiles, tiles_of
from qadapt.units import GIB

Value = int | str

LEAST_CHUNK = 32
"""Tokens at the head below which halving wins nothing worth a rung."""
LEAST_PIECE = 256
"""Tokens of a feed-forward part at once where memory has run out; a plan stops earlier."""

SPARE_BYTES = GIB
"""Of the host's memory, or of a disk, that putting away leaves to others: a system without any stops all."""


class Turn(Protocol):
    """How a live knob is turned."""

    def next(self, rows: Sequence[Tokens]) -> Value | None:
        """The next value, with which these rows take less memory; None if there is none."""

    def take(self, value: Value) -> None:
        """Sets the value; one with more memory than now is passed over."""

    def price(self, value: Value) -> str:
        """What the value costs, in words."""


class Splitting:
    """Fewer rows at a time, or tokens where they are packed."""

    def __init__(self, division: Division, *, draws: bool) -> None:
        self.division = division
        self.draws = draws

    def next(self, rows: Sequence[Tokens]) -> Value | None:
        """The next half that divides these rows further; rows that are not known are divided anyhow."""
        if self.draws:
            return None
        smaller = self.division.smaller(rows) if rows else self.division.half()
        return None if smaller is None else smaller.size

    def take(self, value: Value) -> None:
        """Sets the size."""
        self.division = self.division.down_to(int(value))

    def price(self, value: Value) -> str:
        """What smaller micro-batches cost."""
        unit = "token" if self.division.packed else "row"
        many = "" if value == 1 else "s"
        return f"{value:,} {unit}{many} at a time: more and smaller products, so a little slower"


class Recomputing:
    """More layers that compute their activations again; half of those that are left at a time."""

    def __init__(self, model: PeftModel, *, draws: bool) -> None:
        self._base = model.get_base_model()
        self.draws = draws

    def next(self, _: Sequence[Tokens]) -> Value | None:
        """Half of the layers that are left, or all if it is the last one."""
        recomputed, layers = recomputed_layers(self._base)
        if recomputed == layers:
            return None
        more = recomputed + (layers - recomputed + 1) // 2
        return "all" if more == layers else more

    def take(self, value: Value) -> None:
        """Sets how many layers recompute."""
        recomputed, layers = recomputed_layers(self._base)
        if value == "all":
            set_recompute(self._base, "all")
        elif recomputed < int(value) < layers:
            set_recompute(self._base, int(value))

    def price(self, value: Value) -> str:
        """What recomputation costs."""
        layers = "every layer is" if value == "all" else f"{value} layers are"
        text = f"{layers} computed twice, at most a third more time"
        return f"{text}; rows cannot be split, as dropout would draw other masks" if self.draws else text


class Tiling:
    """Feed-forward parts and norms in more pieces, four times as many at a time."""

    def __init__(self, model: PeftModel, splitting: Splitting) -> None:
        self._base = model.get_base_model()
        self._splitting = splitting

    def next(self, rows: Sequence[Tokens]) -> Value | None:
        """Four times as many pieces, if a micro-batch has the tokens for it and no masks are drawn."""
        if self._splitting.draws or not can_tile(self._base):
            return None
        more = 4 * max(1, tiles_of(self._base))
        most = max((batch.input_ids.numel() for batch in self._splitting.division(rows)), default=0)
        return more if most >= more * LEAST_PIECE else None

    def take(self, value: Value) -> None:
        """Sets the number of pieces."""
        set_tiles(self._base, max(int(value), tiles_of(self._base)))

    def price(self, value: Value) -> str:
        """What pieces cost."""
        return f"feed-forward parts in {value} pieces: more and smaller products, so a little slower"


class PuttingAway:
    """Inputs of recomputed layers in host memory, or, on a CPU, in a file."""

    def __init__(self, model: PeftModel, splitting: Splitting) -> None:
        self._base = model.get_base_model()
        self._splitting = splitting

    def next(self, rows: Sequence[Tokens]) -> Value | None:
        """`boundaries`, unless that is so, no layer recomputes, or there is no room for them."""
        recomputed, _layers = recomputed_layers(self._base)
        if not recomputed or offloads_boundaries(self._base):
            return None
        most = max((batch.input_ids.numel() for batch in self._splitting.division(rows)), default=0)
        width = self._base.config.get_text_config().hidden_size
        needed = recomputed * most * width * self._base.dtype.itemsize
        return "boundaries" if needed + SPARE_BYTES <= self._free_bytes() else None

    def _free_bytes(self) -> int:
        if device_of(self._base).type == "cpu":
            return free_bytes(Path(tempfile.gettempdir()))
        return psutil.virtual_memory().available

    def take(self, value: Value) -> None:
        """Has them put away from now on."""
        offload_boundaries(self._base)

    def price(self, value: Value) -> str:
        """What carrying them costs."""
        if device_of(self._base).type == "cpu":
            return "inputs of recomputed layers go to a temporary file and back, and each step waits for it"
        return "inputs of recomputed layers are carried to the host and back, beside computing"


class Chunking:
    """Fewer learned tokens at the head at a time, half as many; rows are divided as the first one does."""

    def __init__(self, model: PeftModel, *splittings: Splitting) -> None:
        self._has_head = head_of(model.get_base_model()) is not None
        self._splittings = splittings

    def next(self, rows: Sequence[Tokens]) -> Value | None:
        """Half of the most tokens that these rows have at the head at once; None where that is little.

        None, too, where all logits are made at once, as nothing is known of the head.
        """
        if not self._has_head:
            return None
        division = self._splittings[0].division
        most = max((batch.targets.numel() for batch in division(rows)), default=0)
        half = min(division.loss_chunk or most, most) // 2
        return half if half >= LEAST_CHUNK else None

    def take(self, value: Value) -> None:
        """Sets the number of tokens."""
        for splitting in self._splittings:
            division = splitting.division
            if not 0 < division.loss_chunk <= int(value):
                splitting.division = replace(division, loss_chunk=int(value))

    def price(self, value: Value) -> str:
        """What smaller chunks cost."""
        return f"the loss of {value} tokens at a time: smaller products with the head, so a little slower"


class Evaluating:
    """How held-out rows are divided: fewer at a time, then fewer learned tokens of each at the head.

    Neither touches how a step is computed.
    """

    def __init__(self, model: PeftModel, division: Division) -> None:
        self.splitting = Splitting(division, draws=False)
        self._turns: dict[str, Turn] = {
            "micro_batch": self.splitting,
            "loss_chunk": Chunking(model, self.splitting),
        }

    def next(self, rows: Sequence[Tokens]) -> tuple[str, Value, str] | None:
        """Which knob is turned next to which value, and what that costs; None if nothing is left."""
        most_learned = max(rows, key=lambda row: row.supervised_count)
        looked_at: dict[str, Sequence[Tokens]] = {"micro_batch": (), "loss_chunk": (most_learned,)}
        for knob, turn in self._turns.items():
            value = turn.next(looked_at[knob])
            if value is not None:
                return knob, value, turn.price(value)
        return None

    def take(self, knob: str, value: Value) -> None:
        """Turns a knob."""
        self._turns[knob].take(value)
