"""One real QLoRA step of a 7B model on a CPU, against what was predicted; and its load, against its bound.

    python tools/bench/step_7b.py                  Llama-2-7B's shape, random weights, 1 x 128 tokens
    python tools/bench/step_7b.py --layers 2       its first layers only
    python tools/bench/step_7b.py --folder DIR     keep the model there, and take it from there the next time

The model is written tensor by tensor (13.5 GB in bf16). In a process of its own the base is then loaded in 4
bits (`load_memory.py`: anonymous memory against the resident model and its two largest source tensors), and
the package's step runs on it: under the ledger, and under torch's profiler, whose allocation records are
summed up as in `ledger_matrix.py`. The records begin with the step: "static" are the tensors that were there
before, "working" is all above them. What neither prediction nor ledger sees is the scratch of oneDNN's bf16
products. Exits with 1 if a predicted peak is more than 1 % off the allocator's, or the load above its bound.

Known: in bf16, embeddings and head stay mapped from the files, so they are resident but not anonymous. In
fp32, where they are anonymous, bitsandbytes' quantizer of the widest layer (432 MiB above its fp32 weight)
breaks the bound of this shape by about 50 MiB. Linux only; 5 GiB and room for 13.5 GB on the disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from export_7b import random_pieces
from ledger_matrix import allocated_bytes
from load_memory import Load, sampled_load

from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.data.batches import MicroBatch
from qadapt.engine.arrangement import arrange
from qadapt.engine.ledger import Ledger, Peak
from qadapt.engine.moments import watched
from qadapt.engine.target import Target, kernels_of
from qadapt.model.precision import DTYPES
from qadapt.model.shards import TensorEntry, write_shards
from qadapt.model.skeleton import skeleton_base
from qadapt.plan.categories import CATEGORIES, STATIC, TITLES
from qadapt.plan.estimate import estimate_step
from qadapt.plan.setting import Setting
from qadapt.quiet import quiet_libraries
from qadapt.shape import ModelShape, find_config, shape_from_config
from qadapt.train.dryrun import dry_run
from qadapt.train.memory import static_tensors
from qadapt.train.optimizer import make_optimizer
from qadapt.train.step import train_step
from qadapt.units import GIB, MIB, format_count

MODEL = "meta-llama/Llama-2-7b-hf"
BAR = 0.01
STAYS = tuple(name for name in STATIC if name != "gradients")  # from step to step


@dataclass(frozen=True)
class Real:
    """What the real step and the load before it took."""

    load: Load
    static: dict[str, int]
    peak: Peak
    phase_bytes: dict[str, int]
    working_bytes: int
    """By the allocator's records."""
    loss: float
    gradient_norm: float
    seconds: dict[str, float]

    @property
    def allocator_bytes(self) -> int:
        return sum(self.static.values()) + self.working_bytes

    @staticmethod
    def read(text: str) -> Real:
        values = json.loads(text)
        return Real(**values | {"load": Load(**values["load"]), "peak": Peak(**values["peak"])})


@dataclass(frozen=True)
class Told:
    """A peak as one of the three tells it."""

    name: str
    categories: dict[str, int]
    static_bytes: int
    place: str

    @property
    def bytes(self) -> int:
        return sum(self.categories.values())

    @property
    def working_bytes(self) -> int:
        return self.bytes - self.static_bytes


def setting_of(dtype: Any) -> Setting:
    """The step: one row of 128 tokens, all of them learned, NF4 with double quantization."""
    return Setting(
        rows=1, length=128, rank=16, compute_dtype=dtype, adapter_dtype=dtype, optimizer="adamw",
        accumulates=False, device="cpu",
    )  # fmt: skip


def write_model(folder: Path, values: Mapping[str, Any], *, device: str = "cpu") -> None:
    """Random weights for a configuration, tensor by tensor, in bf16; config.json last.

    They are drawn on `device`. A table that head and embeddings share is written once, as published files
    have it: transformers ties no two tensors that differ.
    """
    meta = skeleton_base(values, quantization="none", double_quant=False, dtype=torch.bfloat16)
    entries = [TensorEntry(name, "BF16", tuple(one.shape)) for name, one in meta.named_parameters()]
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for _ in write_shards(folder, entries, values=partial(random_pieces, device=device), shard_bytes=5 * GIB):
        pass
    (folder / "config.json").write_text(json.dumps(dict(values), indent=2), encoding="utf-8")


def run_real(folder: Path, dtype: str) -> Real:
    """Loads the model in this process and runs the step twice."""
    quiet_libraries()
    setting, seconds = setting_of(dtype), dict[str, float]()
    with _timed(seconds, "load in 4 bits"):
        load, base = sampled_load(folder, dtype)
    arrange(base, recompute=setting.recompute, tiles=setting.mlp_tiles, offload=setting.offload)
    lora = Lora(rank=setting.rank, alpha=setting.rank)
    model = attach_lora(base, lora, dtype=DTYPES[setting.adapter_dtype], seed=0).train()
    optimizer = make_optimizer(trainable(model), kind=setting.optimizer, betas=(0.9, 0.99), weight_decay=0.0)
    batch = _batch(setting, vocabulary=base.config.vocab_size)

    def step() -> Any:
        return train_step(model, optimizer, [batch], learning_rate=1e-4, clip_norm=1.0, scaler=None)

    ledger = Ledger(inside=kernels_of(Target()))
    with ledger.during("load"):
        for category, tensors in static_tensors(model, optimizer).items():
            ledger.hold(category, tensors)
    static = dict(ledger.live)
    seen = watched(ledger, model.get_base_model(), optimizer=optimizer.inner)
    with _timed(seconds, "step under the ledger"), seen, ledger:
        result = step()
    with _timed(seconds, "step under the profiler"):
        working_bytes = allocated_bytes(step)
    with _timed(seconds, "step alone"):
        step()
    return Real(
        load=load, static=static, peak=ledger.peak, phase_bytes=ledger.phase_bytes,
        working_bytes=working_bytes, loss=result.loss, gradient_norm=result.gradient_norm, seconds=seconds,
    )  # fmt: skip


def _batch(setting: Setting, *, vocabulary: int) -> MicroBatch:
    sizes = (setting.rows, setting.length)
    return MicroBatch(
        input_ids=torch.randint(3, vocabulary, sizes),
        positions=torch.arange(setting.length),
        targets=torch.randint(3, vocabulary, sizes),
        tokens=setting.tokens,
        supervised_tokens=setting.tokens,
    )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def compare(folder: Path, values: Mapping[str, Any], dtype: str, *, seconds: dict[str, float]) -> bool:
    """Predicts, runs and prints; True if every bar is kept."""
    shape, setting = shape_from_config(values, name=MODEL.rpartition("/")[2]), setting_of(dtype)
    with _timed(seconds, "closed form"):
        closed = estimate_step(shape, setting)
    with _timed(seconds, "dry run (with an evaluation)"):
        dry = dry_run(values, setting)
    program = [sys.executable, __file__, "--one", str(folder), "--dtype", dtype]
    print("loading and running: some minutes for all layers ...", flush=True)
    done = subprocess.run(program, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    real = Real.read(done.stdout.splitlines()[-1])
    told = [
        Told(
            "closed form",
            closed.categories,
            sum(closed.categories[name] for name in STAYS),
            closed.peak_phase,
        ),
        Told("dry run", dry.peak.categories, sum(dry.static.values()), _place(dry.peak)),
        Told("ledger", real.peak.categories, sum(real.static.values()), _place(real.peak)),
    ]
    for line in lines(shape, setting, real, told=told):
        print(line)
    print(f"\nphases, MiB, dry run and ledger: {_phases(dry.phase_bytes, real.phase_bytes)}")
    print("seconds, on this machine as busy as it is: ", end="")
    print(", ".join(f"{name} {taken:.1f}" for name, taken in (seconds | real.seconds).items()))
    is_near = all(abs(one.bytes / real.allocator_bytes - 1) <= BAR for one in told)
    return is_near and real.load.peak_bytes <= real.load.bound_bytes


def lines(shape: ModelShape, setting: Setting, real: Real, *, told: list[Told]) -> Iterator[str]:
    """The report: the load, the peak by category, and how far each is from the allocator."""
    yield (
        f"{shape.name}'s shape, {shape.layers} layers, {format_count(shape.parameters)} random weights; "
        f"{setting.rows} x {setting.length} tokens, NF4 with double quantization, rank {setting.rank} on all "
        f"linear layers, {setting.compute_dtype}, all layers recomputed; loss {real.loss:.4f}, "
        f"norm of the gradient {real.gradient_norm:.3g}"
    )
    yield f"\nload, {real.load.line}"
    yield f"\n{'peak, MiB':26}" + "".join(f"{one.name:>14}" for one in told) + f"{'allocator':>14}"
    for category in CATEGORIES:
        figures = [one.categories.get(category, 0) for one in told]
        if any(figures):
            yield f"{TITLES[category]:26}" + "".join(map(_mib, figures))
    static = sum(real.static.values())
    yield f"{'static':26}" + "".join(_mib(one.static_bytes) for one in told) + _mib(static)
    yield f"{'working':26}" + "".join(_mib(one.working_bytes) for one in told) + _mib(real.working_bytes)
    yield f"{'in all':26}" + "".join(_mib(one.bytes) for one in told) + _mib(real.allocator_bytes)
    shares = [one.bytes / real.allocator_bytes - 1 for one in told]
    yield f"{f'  off (bar {BAR:.0%})':26}" + "".join(f"{share:>+14.4%}" for share in shares)
    shares = [one.working_bytes / real.working_bytes - 1 for one in told]
    yield f"{'  off, working part':26}" + "".join(f"{share:>+14.4%}" for share in shares)
    yield "\nhighest moment: " + "; ".join(f"{one.name}: {one.place}" for one in told)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:14.2f}"


def _place(peak: Peak) -> str:
    return f"{peak.phase} in {peak.module}" if peak.module else peak.phase


def _phases(dry: Mapping[str, int], real: Mapping[str, int]) -> str:
    both = [(name, dry.get(name, 0), real[name]) for name in real if name not in ("load", "outside")]
    return ", ".join(f"{name} {ours / MIB:.2f} {theirs / MIB:.2f}" for name, ours, theirs in both)


def main() -> int:
    """Makes the model, runs and compares."""
    parser = argparse.ArgumentParser(description="A real 7B step on a CPU against its prediction.")
    parser.add_argument("--layers", type=int, help="so many of its layers; default: all")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--folder", type=Path, help="where the model is or will be; default: a temporary one")
    parser.add_argument("--one", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one is not None:
        print(json.dumps(dataclasses.asdict(run_real(chosen.one, chosen.dtype))))
        return 0
    warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
    values = dict(find_config(MODEL).values)
    values["num_hidden_layers"] = chosen.layers or values["num_hidden_layers"]
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = chosen.folder or Path(place)
        if not (folder / "config.json").exists():
            with _timed(seconds, "write the model"):
                write_model(folder, values)
        elif find_config(str(folder)).values != values:
            sys.exit(f"{folder} holds another model; give an empty folder, or remove this one.")
        return 0 if compare(folder, values, chosen.dtype, seconds=seconds) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where tiny_model.py lies
    sys.exit(main())
