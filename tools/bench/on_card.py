"""Real steps on this machine's card against what was predicted: bytes allocated, reserved, the context, time.

    on_card.py                      some layers of known models, many settings
    on_card.py --model gemma-2-9b   one of them
    on_card.py --whole              every layer of the first one, once
    on_card.py --context            what the driver takes besides, stage by stage, in fresh processes
    on_card.py --pace               packed steps of unlike rows: time, and what the driver is asked for

Random weights of the real shapes are written and loaded in 4 bits as for training; each setting takes two
steps and an evaluation of full rows, without and with packing. Allocated and reserved peaks are torch's own,
counted from before the load; the context is what NVML counts as taken since before the first tensor, less
what torch reserves, so the card should be idle. Exits with 1 where an allocated peak is more than `BAR` off
the dry run, or reserved bytes are outside their range. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from step_7b import write_model

from qadapt.batch_shape import packed_shape
from qadapt.data.batches import MicroBatch
from qadapt.engine.documents import documents_of, kernel_problem
from qadapt.errors import QadaptError
from qadapt.hardware.cards import CONTEXT_BYTES, Card, find_card
from qadapt.hardware.probe import gpus
from qadapt.model.precision import DTYPES, capability_of
from qadapt.plan.allocator import RUN_NOISE, reserved_range
from qadapt.plan.estimate import estimate_step
from qadapt.plan.setting import Setting
from qadapt.quiet import quiet_libraries
from qadapt.selftest.trainee import Trainee
from qadapt.shape import find_config, shape_from_config
from qadapt.train.dryrun import dry_run
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
    {"quantization": "int8"},
    {"loss_chunk": 512, "rows": 4},
    {"mlp_tiles": 8, "loss_chunk": 512, "length": 16384},
    {"offload": ("boundaries",), "loss_chunk": 512, "length": 16384},
    {"offload": ("embeddings",)},
    {"offload": ("embeddings", "head")},
    {"offload": ("embeddings", "head", "boundaries"), "loss_chunk": 512, "length": 16384},
    {"offload": ("layers",)},
    {"offload": ("embeddings", "boundaries", "layers"), "mlp_tiles": 8, "loss_chunk": 512, "length": 16384},
)
PACE_ROWS = (
    (613, 540, 400, 380), (350, 320, 300, 250, 200, 180), (410, 600, 90), (512, 512, 512, 300, 200),
    (100,) * 14, (613, 333, 222, 111), (450, 440, 430, 420, 410), (280, 270, 260, 250), (613, 40, 39, 38, 37),
    (512, 256, 128, 64, 32),
)  # fmt: skip
"""Documents of steps, none like the one before."""
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Measured:
    """What a setting took, in bytes and seconds of its second step."""

    allocated: int
    reserved: int
    seconds: float
    loss: float


def step(trainee: Trainee, batch: MicroBatch) -> tuple[float, float]:
    """Seconds and loss of one."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    done = train_step(
        trainee.model, trainee.optimizer, [batch], learning_rate=1e-4, clip_norm=1.0, scaler=None
    )
    torch.cuda.synchronize()
    return time.perf_counter() - started, done.loss


def run_real(folder: Path, setting: Setting) -> Measured:
    """Loads the model and takes two steps and an evaluation."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainee = Trainee(folder, setting, device=CUDA)
    batch = batch_of(setting, vocabulary=find_config(str(folder)).values["vocab_size"])
    step(trainee, batch)
    seconds, loss = step(trainee, batch)
    evaluate_loss(trainee.model, [batch])
    return Measured(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), seconds, loss)


def batch_of(setting: Setting, *, vocabulary: int) -> MicroBatch:
    """Random rows; packed ones are documents of unequal length."""
    if setting.packed:
        return replace(
            packed_batch(packed_lengths(setting), vocabulary=vocabulary), loss_chunk=setting.loss_chunk
        )
    ids = torch.randint(3, vocabulary, (setting.rows, setting.length))
    positions = torch.arange(0, setting.length, round(1 / setting.supervised_share))
    targets = ids[:, positions]
    chunk = setting.loss_chunk
    return MicroBatch(ids, positions, targets, ids.numel(), targets.numel(), loss_chunk=chunk)


def packed_batch(lengths: tuple[int, ...], *, vocabulary: int) -> MicroBatch:
    """Random documents, all of their tokens learned."""
    ids = torch.randint(3, vocabulary, (1, sum(lengths)))
    positions = torch.arange(ids.shape[1])
    return MicroBatch(ids, positions, ids, ids.numel(), ids.numel(), documents_of(lengths))


def packed_lengths(setting: Setting) -> tuple[int, ...]:
    """The documents of a packed row: a full one, and others of half the length and less."""
    left, found = setting.tokens - setting.length, [setting.length]
    while len(found) < setting.documents - 1:
        found.append(left // 2)
        left -= left // 2
    return (*found, left)


@dataclass(frozen=True)
class Compared:
    """A setting's line, and whether it is within its bars."""

    error: float
    is_reserved_inside: bool
    line: str


def compare(folder: Path, values: Mapping[str, Any], setting: Setting, card: Card | None) -> Compared:
    """Predicts and runs a setting."""
    shape = shape_from_config(values, name="made")
    closed = estimate_step(shape, setting, card=card)
    batch = (
        packed_shape(packed_lengths(setting), supervised_tokens=setting.tokens) if setting.packed else None
    )
    dry = dry_run(values, setting, capability=capability_of(CUDA), batch=batch, steps=2)
    reserved = reserved_range(dry.trace).widened(RUN_NOISE)
    real = run_real(folder, setting)
    off = real.allocated / dry.peak.bytes - 1
    inside = "inside" if reserved.holds(real.reserved) else "OUTSIDE"
    predicted = f"{closed.seconds_per_step:.3f}" if closed.seconds_per_step else "?"
    line = (
        f"{real.allocated / MIB:9.1f} {dry.peak.bytes / MIB:9.1f} {off:+8.2%} "
        f"{real.allocated / closed.peak_allocated_bytes - 1:+8.2%} {real.reserved / MIB:9.1f} "
        f"{reserved.low_bytes / MIB:7.0f}-{reserved.high_bytes / MIB:<7.0f} {inside:7} "
        f"{real.seconds:7.3f} {predicted:>6}  {real.loss:.3f}"
    )
    return Compared(abs(off), reserved.holds(real.reserved), line)


def make_folder(name: str, layers: int | None, place: Path) -> dict[str, Any]:
    """Writes a model of so many layers; its configuration."""
    values = dict(find_config(name).values)
    values["num_hidden_layers"] = layers or values["num_hidden_layers"]
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    write_model(place, values, device="cuda")
    torch.cuda.empty_cache()
    return values


def run_model(
    name: str, layers: int | None, *, card: Card | None, settings: tuple[dict[str, Any], ...]
) -> bool:
    """All settings of one model; whether all are within their bars."""
    found: list[Compared | None] = []
    with tempfile.TemporaryDirectory() as place:
        values = make_folder(name, layers, Path(place))
        shape = shape_from_config(values, name=name)
        problem = kernel_problem(shape, device=CUDA, dtype=torch.bfloat16)
        print(f"\n{name}, {shape.layers} layers; kernel for many documents: {problem or 'as one at a time'}")
        print(
            f"{'measured':>9} {'dry run':>9} {'off':>8} {'closed':>8} {'reserved':>9} {'predicted':>15} "
            f"{'':7} {'seconds':>7} {'pred.':>6}  loss"
        )
        for changes in settings:
            is_one_end = len({"embeddings", "head"} & set(changes.get("offload", ()))) == 1
            if (is_one_end and shape.tied) or changes.get("length", 0) > shape.context:
                continue  # refused
            base = {"rows": 1, "length": 2048, "accumulates": False, "one_by_one": problem is not None}
            words = ", ".join(f"{key}={value}" for key, value in changes.items()) or "1 x 2048"
            try:
                found.append(compare(Path(place), values, Setting(**base | changes), card))
            except (QadaptError, RuntimeError) as error:  # out of memory, or a kernel's own: the others go on
                found.append(None)
                print(f"FAILED {words}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            else:
                print(f"{found[-1].line if found[-1] else ''}  {words}", flush=True)
    errors = [one.error for one in found if one is not None]
    print(f"median {statistics.median(errors):.2%}, worst {max(errors):.2%}" if errors else "nothing ran")
    return all(one is not None and one.error <= BAR and one.is_reserved_inside for one in found)


class Context:
    """What the driver takes for this process besides what torch reserves, on a card of its own."""

    def __init__(self) -> None:
        self._before = gpus()[0].free_bytes

    @property
    def now_bytes(self) -> int:
        """So many bytes."""
        torch.cuda.synchronize()
        return self._before - gpus()[0].free_bytes - torch.cuda.memory_reserved()


def context_stages(dtype: Literal["bf16", "fp16"]) -> Iterator[str]:
    """Each stage of a small run with the context after it; in a process that has not touched the card."""
    context = Context()

    def stage(name: str, do: Callable[[], object]) -> str:
        do()
        return f"{dtype} {name:28} {context.now_bytes / MIB:7.0f} MiB"

    yield stage("first tensor", lambda: torch.zeros(1, device=CUDA))
    half = torch.randn(256, 256, device=CUDA, dtype=DTYPES[dtype])
    yield stage("first product", lambda: half @ half)
    with tempfile.TemporaryDirectory() as place:
        values = make_folder("Llama-3.1-8B", 2, Path(place))
        yield stage("weights drawn (torch's)", torch.cuda.synchronize)
        adapter: Literal["bf16", "fp32"] = "bf16" if dtype == "bf16" else "fp32"
        setting = Setting(length=1024, compute_dtype=dtype, adapter_dtype=adapter)
        trainee = Trainee(Path(place), setting, device=CUDA)
    yield stage("load in NF4, optimizer", torch.cuda.synchronize)
    vocabulary: int = values["vocab_size"]
    rows = batch_of(setting, vocabulary=vocabulary)
    yield stage("first step", lambda: step(trainee, rows))
    yield stage("second step", lambda: step(trainee, rows))
    yield stage("other length", lambda: step(trainee, packed_batch((777,), vocabulary=vocabulary)))
    yield stage("packed", lambda: step(trainee, packed_batch((500, 300, 200), vocabulary=vocabulary)))
    yield stage("evaluation", lambda: evaluate_loss(trainee.model, [rows]))


def run_pace(name: str) -> None:
    """Packed steps of unlike rows through a whole model: seconds, and how often the driver is asked."""
    with tempfile.TemporaryDirectory() as place:
        vocabulary: int = make_folder(name, None, Path(place))["vocab_size"]
        trainee = Trainee(Path(place), Setting(recompute="none"), device=CUDA)
    before = torch.cuda.memory_stats()
    for number, lengths in enumerate(PACE_ROWS * 2):
        seconds, _ = step(trainee, packed_batch(lengths, vocabulary=vocabulary))
        now = torch.cuda.memory_stats()
        asked, freed, retries = (
            now.get(key, 0) - before.get(key, 0)
            for key in ("num_device_alloc", "num_device_free", "num_alloc_retries")
        )
        before = now
        print(
            f"step {number:2} {sum(lengths):5} tokens {len(lengths):2} documents {seconds:6.3f} s  driver: "
            f"{asked:4} allocations {freed:4} releases {retries} retries; reserved "
            f"{torch.cuda.memory_reserved() / MIB:.0f} MiB",
            flush=True,
        )


def main() -> int:
    """Runs and compares."""
    parser = argparse.ArgumentParser(description="Real steps on this card against their prediction.")
    parser.add_argument("--model", choices=MODELS, help="this one alone")
    parser.add_argument("--whole", action="store_true", help="every layer of the first model, once")
    parser.add_argument("--context", action="store_true", help="what the driver takes besides, by stage")
    parser.add_argument(
        "--pace", action="store_true", help="packed steps of unlike rows through a whole model"
    )
    parser.add_argument("--context-of", choices=("bf16", "fp16"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    quiet_libraries()
    warnings.simplefilter("ignore", FutureWarning)
    if chosen.context:
        programs = [[sys.executable, __file__, "--context-of", dtype] for dtype in ("bf16", "fp16")]
        return max(subprocess.run(program).returncode for program in programs)
    if chosen.context_of:
        for line in context_stages(chosen.context_of):
            print(line, flush=True)
        return 0
    models = {chosen.model: MODELS[chosen.model]} if chosen.model else MODELS
    if chosen.pace:
        run_pace(next(iter(models)))
        return 0
    context, card = Context(), _card()
    if chosen.whole:
        good = run_model(next(iter(models)), None, card=card, settings=({},))
    else:
        each = [run_model(name, layers, card=card, settings=SETTINGS) for name, layers in models.items()]
        good = all(each)
    predicted = card.context_bytes if card else CONTEXT_BYTES
    print(f"context {context.now_bytes / MIB:.0f} MiB at the end; predicted {predicted / MIB:.0f}")
    return 0 if good else 1


def _card() -> Card | None:
    name = torch.cuda.get_device_name()
    print(name)
    try:
        return find_card(name)
    except QadaptError:
        return None


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main())
