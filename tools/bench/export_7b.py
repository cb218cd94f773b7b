"""Time and memory of a merge of real size, next to copying the same bytes.

    python tools/bench/export_7b.py --folder /somewhere/with/room [--shape llama-3.1-8b] [--layers 4]

Makes a random base in bf16, sharded, with a rank-16 adapter on all linear layers, then in turn copies its
weight files with `cp`, merges on both bases, each in a process of its own, and takes weights through 4 bits
and back with bitsandbytes alone, whole tensors on as many threads as torch likes. Copies and exports are
flushed to the disk; on Linux the base is out of the page cache before each. Memory is anonymous memory above
the level after imports. Bars: on the original base 1.5 times the copy, on the dequantized one the copy and
1.2 times the round trip, 1 GiB. Exits with 1 if the medians miss one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from host_memory import Peak

from qadapt.model.shards import TensorEntry, write_shards
from qadapt.model.tensor_values import bytes_of
from qadapt.quiet import quiet_libraries
from qadapt.units import GIB, MIB, format_bytes

RANK, SHARD_BYTES = 16, 5 * GIB
COPIES, ROUND_TRIPS, MOST_BYTES = 1.5, 1.2, GIB
"""The bars."""
TIMED_LAYERS = 4
"""Layers whose round trip is timed; the others take as long."""


@dataclass(frozen=True)
class Widths:
    """Of a decoder."""

    layers: int
    width: int
    mlp: int
    kv: int
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs by name."""
        return {
            "self_attn.q_proj": (self.width, self.width), "self_attn.k_proj": (self.kv, self.width),
            "self_attn.v_proj": (self.kv, self.width), "self_attn.o_proj": (self.width, self.width),
            "mlp.gate_proj": (self.mlp, self.width), "mlp.up_proj": (self.mlp, self.width),
            "mlp.down_proj": (self.width, self.mlp),
        }  # fmt: skip


SHAPES = {
    "llama-2-7b": Widths(layers=32, width=4096, mlp=11008, kv=4096, vocabulary=32000),
    "llama-3.1-8b": Widths(layers=32, width=4096, mlp=14336, kv=1024, vocabulary=128256),
}


def random_pieces(entry: TensorEntry, *, device: str = "cpu") -> Iterator[memoryview]:
    """Random values of about the right size, by pieces."""
    dtype = torch.bfloat16 if entry.dtype == "BF16" else torch.float32
    left = math.prod(entry.shape)
    while left:
        count = min(left, 4 * MIB)
        yield bytes_of((torch.randn(count, device=device) * 0.02).to(dtype).cpu())
        left -= count


def make_model(folder: Path, widths: Widths, *, layers: int) -> int:
    """Writes the base; bytes of its weight files."""
    folder.mkdir(parents=True)
    table = (widths.vocabulary, widths.width)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in widths.linears.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (widths.width,)
    shapes |= {"model.norm.weight": (widths.width,), "lm_head.weight": table}
    entries = [TensorEntry(name, "BF16", shape) for name, shape in shapes.items()]
    for _ in write_shards(folder, entries, values=random_pieces, shard_bytes=SHARD_BYTES):
        pass
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers,
        "hidden_size": widths.width, "intermediate_size": widths.mlp, "vocab_size": widths.vocabulary,
        "num_attention_heads": widths.width // 128, "num_key_value_heads": widths.kv // 128,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def make_adapter(folder: Path, widths: Widths, *, layers: int) -> None:
    folder.mkdir(parents=True)
    entries = []
    for layer in range(layers):
        for name, (outputs, inputs) in widths.linears.items():
            stem = f"base_model.model.model.layers.{layer}.{name}.lora_"
            entries += [
                TensorEntry(f"{stem}A.weight", "F32", (RANK, inputs)),
                TensorEntry(f"{stem}B.weight", "F32", (outputs, RANK)),
            ]
    for _ in write_shards(folder, entries, values=random_pieces, shard_bytes=10 * GIB):
        pass
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in widths.linears]
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "bias": "none",
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    facts = {
        "base": "random", "revision": None, "fingerprint": "", "quantization": "nf4", "double_quant": True,
        "load_dtype": "bf16", "prompt_fingerprint": "",
    }  # fmt: skip
    (folder / "qadapt.json").write_text(json.dumps(facts), encoding="utf-8")


def measured_merge(model: Path, adapter: Path, target: Path, *, base: str) -> dict[str, float]:
    """One merge in this process: seconds and peak bytes."""
    from qadapt.export.merge import merge

    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # the thread pool belongs to the level after imports
    started, busy = time.perf_counter(), time.process_time()
    with Peak() as peak:
        for _ in merge(model_folder=model, adapter_folder=adapter, target=target, base=base):
            pass
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - busy,
        "peak_bytes": peak.bytes,
    }


def round_trip_seconds(widths: Widths, *, layers: int) -> float:
    """What bitsandbytes alone takes for storing all linear layers in 4 bits and restoring them."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    timed, seconds = min(layers, TIMED_LAYERS), 0.0
    for _ in range(timed):
        for shape in widths.linears.values():
            weight = torch.randn(shape, dtype=torch.bfloat16)
            started = time.perf_counter()
            packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
            dequantize_4bit(packed, state)
            seconds += time.perf_counter() - started
    return seconds * layers / timed


def copy_seconds(model: Path, target: Path) -> float:
    """Copying the weight files, each flushed as an export is."""
    started = time.perf_counter()
    target.mkdir()
    for path in sorted(model.glob("*.safetensors")):
        if shutil.which("cp"):
            subprocess.run(["cp", str(path), str(target / path.name)], check=True)
        else:
            shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb+") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - started


def leave_page_cache(folder: Path) -> None:
    """Takes a folder's files out of the page cache, where the system can be asked to."""
    if sys.platform == "linux":
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_own_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def one(kind: str, *arguments: str) -> dict[str, float]:
    """What a process of its own measures."""
    if kind == "round trip":
        shape, layers = arguments
        return {"seconds": round_trip_seconds(SHAPES[shape], layers=int(layers))}
    model, adapter, target = map(Path, arguments)
    return measured_merge(model, adapter, target, base=kind)


@dataclass(frozen=True)
class Turn:
    """Seconds of everything, once each, and the largest peak of the two merges."""

    copy: float
    original: float
    dequantized: float
    round_trip: float
    peak_bytes: float

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of the three bars."""
        allowed = self.copy + ROUND_TRIPS * self.round_trip
        return self.original / (COPIES * self.copy), self.dequantized / allowed, self.peak_bytes / MOST_BYTES


def turn(root: Path, shape: str, *, layers: int) -> Turn:
    model, adapter, target = root / "model", root / "adapter", root / "out"
    leave_page_cache(model)
    copied = copy_seconds(model, target)
    shutil.rmtree(target)
    print(f"  cp           {copied:7.1f} s", flush=True)
    merges = {}
    for base in ("original", "dequantized"):
        leave_page_cache(model)
        merges[base] = in_own_process(base, str(model), str(adapter), str(target))
        shutil.rmtree(target)
        print(
            f"  {base:12} {merges[base]['seconds']:7.1f} s = {merges[base]['seconds'] / copied:5.2f} x cp, "
            f"{merges[base]['processor_seconds']:.1f} s of processors, "
            f"peak {format_bytes(int(merges[base]['peak_bytes']))}",
            flush=True,
        )
    trip = in_own_process("round trip", shape, str(layers))["seconds"]
    print(f"  round trip   {trip:7.1f} s", flush=True)
    peak = max(merge["peak_bytes"] for merge in merges.values())
    return Turn(copied, merges["original"]["seconds"], merges["dequantized"]["seconds"], trip, peak)


def compare(root: Path, shape: str, *, layers: int, repeats: int) -> bool:
    """Prints everything; whether the bars hold."""
    widths = SHAPES[shape]
    values = 2 * widths.vocabulary * widths.width + layers * sum(map(math.prod, widths.linears.values()))
    needed = 2 * 2 * values + GIB
    if shutil.disk_usage(root).free < needed:
        raise SystemExit(f"{root} has less than {format_bytes(needed)} free: use --folder or --layers.")
    size = make_model(root / "model", widths, layers=layers)
    make_adapter(root / "adapter", widths, layers=layers)
    print(f"{shape}, {layers} layers, {format_bytes(size)}, {torch.get_num_threads()} threads", flush=True)
    turns = [turn(root, shape, layers=layers) for _ in range(repeats)]
    medians = [statistics.median(shares) for shares in zip(*(each.shares for each in turns), strict=True)]
    for name, share in zip(("original base", "dequantized base", "memory"), medians, strict=True):
        print(f"{name}: {share:.2f} of the bar, {'holds' if share <= 1 else 'MISSED'}")
    return max(medians) <= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="decoder layers; default: all")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    if options.one:
        print(json.dumps(one(*options.one)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        layers = options.layers or SHAPES[options.shape].layers
        holds = compare(Path(name), options.shape, layers=layers, repeats=options.repeats)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
