"""Every method side by side on one base in memory: bytes, seconds to load, to switch, and what stays behind.

    python tools/bench/swap_adapters.py                         the demo's model, in 4 bits
    python tools/bench/swap_adapters.py --quantization none --rank 64

Each method's adapter is made with random numbers, saved as a run saves it, and brought in beside the others.
A switch is timed from one adapter to the next. What each computes is compared with the adapter loaded alone,
the base's logits with those of the base before anything was loaded, to the bit, and memory with the bytes of
the adapters' own tensors.

Bars: a switch within 10 ms, logits equal to 1e-4 of the largest, base logits the same to the bit, memory
grown by no more than the adapters' files. Exits with 1 beyond them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from qadapt.adapters.facts import AdapterFacts, own_files
from qadapt.adapters.fusion import read_member
from qadapt.adapters.lora import save_adapter, trainable
from qadapt.adapters.method import Adapter, attach, load_adapter
from qadapt.adapters.swap import Swap
from qadapt.methods import METHODS, Method
from qadapt.model.load import load_base
from qadapt.model.original import original_weights
from qadapt.model.source import find_model
from qadapt.quiet import quiet_libraries

SWITCH_SECONDS, TOLERANCE = 0.010, 1e-4
SWITCHES = 50
IDS = torch.arange(3, 43).view(2, 20)
FUSED = "pfeiffer", "compacterplus"


@dataclass(frozen=True)
class Shown:
    """What was measured of a method."""

    method: Method
    file_bytes: int
    load_seconds: float
    switch_seconds: float
    error: float
    moved: float


def main() -> int:
    """Measures every method; says each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantization", default="nf4", choices=["nf4", "int8", "none"])
    parser.add_argument("--rank", type=int, default=16)
    given = parser.parse_args()
    quiet_libraries()
    model = find_model(given.model).folder
    with tempfile.TemporaryDirectory() as name:
        folders = {
            method: made(method, model, Path(name), quantization=given.quantization, rank=given.rank)
            for method in METHODS
            if given.quantization != "none" or not METHODS[method].mends_base
        }
        return measure(model, folders, quantization=given.quantization)


def made(method: Method, model: Path, place: Path, *, quantization: str, rank: int) -> Path:
    """The folder of an adapter with random numbers; of a fusion over two that were made before."""
    print(f"making {method} ...", flush=True)
    base = base_of(model, quantization)
    members = [read_member(base, place / each, each) for each in FUSED] if METHODS[method].attends else []
    adapter = Adapter(method, rank, 2 * rank, members=members)
    with original_weights(model) as originals:
        adapted = attach(base, adapter, dtype=torch.float32, seed=0, originals=originals)
    draw = torch.Generator().manual_seed(1)
    for parameter in trainable(adapted).values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=draw)
    mends = METHODS[method].mends_base
    facts = AdapterFacts(str(model), None, "", quantization, True, "fp32", "", mends_base=mends)
    save_adapter(adapted, place / method, facts=facts, tokenizer=AutoTokenizer.from_pretrained(model))
    return place / method


def measure(model: Path, folders: dict[Method, Path], *, quantization: str) -> int:
    """Brings all of them in, switches, compares, takes them out again."""
    base = base_of(model, quantization)
    before = logits(base)
    swap = Swap(base)
    empty_bytes, loads = live_bytes(), {}
    for method, folder in folders.items():
        begun = time.perf_counter()
        swap.add(method, folder)
        loads[method] = time.perf_counter() - begun
    grown_bytes = live_bytes() - empty_bytes
    switches = switch_seconds(swap, list(folders))
    shown = []
    for method in folders:
        alone = load_adapter(base_of(model, quantization), folders[method])
        error, moved = compared(swap, method, alone=alone, before=before)
        del alone
        file_bytes = (folders[method] / own_files(folders[method])[0]).stat().st_size
        shown.append(Shown(method, file_bytes, loads[method], switches[method], error, moved))
    is_same = torch.equal(before, logits(swap))
    for method in folders:
        swap.remove(method)
    is_same = is_same and torch.equal(before, logits(swap))
    return verdict(shown, grown_bytes=grown_bytes, left_bytes=live_bytes() - empty_bytes, is_same=is_same)


def compared(swap: Swap, method: Method, *, alone: nn.Module, before: Tensor) -> tuple[float, float]:
    """How far a method's logits are from those of its adapter loaded alone, and these from the base's."""
    with swap.using(method):
        found = logits(swap)
    expected = logits(alone)
    error, moved = (float((expected - other).abs().max() / expected.abs().max()) for other in (found, before))
    return error, moved


def switch_seconds(swap: Swap, methods: list[Method]) -> dict[Method, float]:
    """The median of switches to each from the one before it."""
    seconds: dict[Method, list[float]] = {method: [] for method in methods}
    for _ in range(SWITCHES):
        for method in methods:
            begun = time.perf_counter()
            swap.use(method)
            seconds[method].append(time.perf_counter() - begun)
    swap.none()
    return {method: statistics.median(each) for method, each in seconds.items()}


def base_of(model: Path, quantization: str) -> PreTrainedModel:
    return load_base(
        model,
        quantization=quantization,
        double_quant=True,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found.float()


def live_bytes() -> int:
    """Of all tensors that there are."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def verdict(shown: list[Shown], *, grown_bytes: int, left_bytes: int, is_same: bool) -> int:
    """Says all of it, and whether it is within the bars."""
    print(f"\n{'method':12} {'file':>10} {'load':>8} {'switch':>9} {'off by':>8} {'it moves':>9}")
    for each in shown:
        print(
            f"{each.method:12} {each.file_bytes / 2**20:6.2f} MiB {each.load_seconds * 1e3:5.0f} ms "
            f"{each.switch_seconds * 1e6:6.1f} µs {each.error:8.1e} {each.moved:9.1e}"
        )
    file_bytes = sum(each.file_bytes for each in shown)
    print(f"\nmemory grew by {grown_bytes:,} bytes; the files of the adapters have {file_bytes:,}")
    print(f"{left_bytes:,} bytes stayed when all were taken out")
    print(f"the base's logits are {'the same to the bit' if is_same else 'OTHERS'} afterwards")
    is_good = is_same and not left_bytes and grown_bytes <= file_bytes
    for each in shown:
        is_good = is_good and each.switch_seconds <= SWITCH_SECONDS and each.error <= TOLERANCE < each.moved
    print("within the bars" if is_good else "BEYOND the bars")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
