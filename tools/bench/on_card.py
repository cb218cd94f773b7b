"""Real steps on this machine's card against what was predicted: bytes allocated, reserved, the context, time.

    python tools/bench/on_card.py                   some layers of known models, many settings
    python tools/bench/on_card.py --whole           every layer of the first one, once

Random weights of the real shapes are written and loaded in 4 bits as for training; each setting takes two
steps and an evaluation of full rows, without and with packing. Allocated and reserved peaks are torch's own,
counted from before the load; the context is what the driver takes for this process besides. Exits with 1
where an allocated peak is more than `BAR` off the dry run. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from step_7b import write_model

from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.batch_shape import packed_shape
from qadapt.data.batches import MicroBatch
from qadapt.engine.documents import documents_of
from qadapt.engine.recompute import set_recompute
from qadapt.hardware.cards import Card, find_card
from qadapt.model.load import load_base
from qadapt.model.precision import DTYPES, capability_of
from qadapt.plan.allocator import reserved_range
from qadapt.plan.estimate import estimate_step
from qadapt.plan.setting import Setting
from qadapt.quiet import quiet_libraries
from qadapt.shape import find_config, shape_from_config
from qadapt.train.dryrun import dry_run
from qadapt.train.optimizer import make_optimizer
from qadapt.train.step import evaluate_loss, train_step
from qadapt.units import MIB

MODELS = {"Llama-3.1-8B": 4, "Qwen2.5-7B": 4, "Mistral-7B-v0.1": 4, "gemma-2-9b": 4}
"""With the layers that are run of each."""
BAR = 0.02
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"rows": 4, "length": 1024},
    {"length": 8192},
    {"recompute": "none"},
    {"recompute": 2, "rows": 2},
    {"optimizer": "adamw", "adapter_dtype": "fp32"},
    {"compute_dtype": "fp16", "adapter_dtype": "fp32"},
    {"quantization": "none", "length": 1024},
    {"double_quant": False, "rank": 64},
    {"supervised_share": 0.25, "rows": 2},
    {"packed": True, "rows": 2, "documents": 5},
)


@dataclass(frozen=True)
class Measured:
    """What a setting took, in bytes and seconds of its second step."""

    allocated: int
    reserved: int
    seconds: float
    loss: float


def run_real(folder: Path, setting: Setting) -> Measured:
    """Loads the model and takes two steps and an evaluation."""
    device = torch.device("cuda")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = load_base(
        folder,
        quantization=setting.quantization,
        double_quant=setting.double_quant,
        dtype=DTYPES[setting.compute_dtype],
        device=device,
    )
    set_recompute(base, setting.recompute)
    lora = Lora(rank=setting.rank, alpha=setting.rank)
    model = attach_lora(base, lora, dtype=DTYPES[setting.adapter_dtype], seed=0).train()
    optimizer = make_optimizer(trainable(model), kind=setting.optimizer, betas=(0.9, 0.99), weight_decay=0.0)
    batch, seconds = batch_of(setting, vocabulary=base.config.vocab_size), 0.0
    for _ in range(2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = train_step(model, optimizer, [batch], learning_rate=1e-4, clip_norm=1.0, scaler=None)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    evaluate_loss(model, [batch])
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return Measured(*peaks, seconds, result.loss)


def batch_of(setting: Setting, *, vocabulary: int) -> MicroBatch:
    """Random rows; packed ones are documents of unequal length."""
    if setting.packed:
        lengths = packed_lengths(setting)
        ids = torch.randint(3, vocabulary, (1, sum(lengths)))
        positions = torch.arange(0, ids.shape[1])
        return MicroBatch(ids, positions, ids, ids.numel(), ids.numel(), documents_of(lengths))
    ids = torch.randint(3, vocabulary, (setting.rows, setting.length))
    every = round(1 / setting.supervised_share)
    positions = torch.arange(0, setting.length, every)
    targets = ids[:, positions]
    return MicroBatch(ids, positions, targets, ids.numel(), targets.numel())


def packed_lengths(setting: Setting) -> tuple[int, ...]:
    """The documents of a packed row: a full one, and others of half the length and less."""
    left, found = setting.tokens - setting.length, [setting.length]
    while len(found) < setting.documents - 1:
        found.append(left // 2)
        left -= left // 2
    return (*found, left)


def compare(folder: Path, values: Mapping[str, Any], setting: Setting, card: Card | None) -> Iterator[str]:
    """Predicts, runs and gives the line of one setting, and its error first."""
    shape = shape_from_config(values, name="made")
    closed = estimate_step(shape, setting, card=card)
    batch = packed_shape(packed_lengths(setting), supervised_tokens=setting.tokens) if setting.packed else None
    dry = dry_run(values, setting, capability=capability_of(torch.device("cuda")), batch=batch, steps=2)
    reserved = reserved_range(dry.trace)
    real = run_real(folder, setting)
    off = real.allocated / dry.peak.bytes - 1
    yield str(off)
    inside = "inside" if reserved.holds(real.reserved) else "OUTSIDE"
    predicted = f"{closed.seconds_per_step:.3f}" if closed.seconds_per_step else "?"
    yield (
        f"{real.allocated / MIB:9.1f} {dry.peak.bytes / MIB:9.1f} {off:+8.2%} "
        f"{real.allocated / closed.peak_allocated_bytes - 1:+8.2%} {real.reserved / MIB:9.1f} "
        f"{reserved.low_bytes / MIB:7.0f}-{reserved.high_bytes / MIB:.0f} {inside:7} "
        f"{real.seconds:7.3f} {predicted:>6}  {real.loss:.3f}"
    )


def context_bytes() -> int:
    """What the driver has taken for this process besides what torch holds, on a card of its own."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def run_model(name: str, layers: int | None, *, card: Card | None, settings: tuple[dict[str, Any], ...]) -> float:
    """All settings of one model; the worst error."""
    values = dict(find_config(name).values)
    values["num_hidden_layers"] = layers or values["num_hidden_layers"]
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    errors = []
    with tempfile.TemporaryDirectory() as place:
        started = time.perf_counter()
        write_model(Path(place), values, device="cuda")
        print(f"\n{name}, {values['num_hidden_layers']} layers, written in {time.perf_counter() - started:.0f} s")
        print(f"{'measured':>9} {'dry run':>9} {'off':>8} {'closed':>8} {'reserved':>9} predicted")
        for changes in settings:
            setting = Setting(**{"rows": 1, "length": 2048, "accumulates": False} | changes)
            words = ", ".join(f"{key}={value}" for key, value in changes.items()) or "1 x 2048"
            try:
                error, line = compare(Path(place), values, setting, card)
            except Exception as problem:  # noqa: BLE001 - a bench: say it and go on
                print(f"FAILED {words}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
                errors.append(1.0)
                continue
            errors.append(abs(float(error)))
            print(f"{line}  {words}", flush=True)
    print(f"median {statistics.median(errors):.2%}, worst {max(errors):.2%}")
    return max(errors)


def main() -> int:
    """Runs and compares."""
    parser = argparse.ArgumentParser(description="Real steps on this card against their prediction.")
    parser.add_argument("--whole", action="store_true", help="every layer of the first model, once")
    chosen = parser.parse_args()
    quiet_libraries()
    warnings.simplefilter("ignore", FutureWarning)
    name = torch.cuda.get_device_name()
    card = find_card(name)
    torch.zeros(1, device="cuda")
    print(f"{name}: context {context_bytes() / MIB:.0f} MiB at first")
    if chosen.whole:
        worst = run_model(next(iter(MODELS)), None, card=card, settings=({},))
    else:
        worst = max(run_model(each, layers, card=card, settings=SETTINGS) for each, layers in MODELS.items())
    gc.collect()
    torch.cuda.empty_cache()
    print(f"context {context_bytes() / MIB:.0f} MiB at the end; predicted {card.context_bytes / MIB if card else 0:.0f}")
    return 0 if worst <= BAR else 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main())
