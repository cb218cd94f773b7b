"""Memory and speed of a merge on a base of real widths, next to copying the same bytes.

    python tools/bench/export_memory.py --layers 4 --folder /somewhere/with/room

Makes a random Llama of 8B widths (embedding 1 GiB in bf16) with a rank-16 adapter on all linear layers, then
merges it on both bases, each in a process of its own, and prints seconds against copying (both flushed to the
disk) and the highest anonymous memory above the level after imports (Linux; elsewhere resident memory).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from host_memory import Peak

from qadapt.model.shards import TensorEntry, write_shards
from qadapt.model.tensor_values import bytes_of
from qadapt.units import GIB, MIB, format_bytes

WIDTH, MLP_WIDTH, KV_WIDTH, VOCABULARY, RANK = 4096, 14336, 1024, 128256, 16
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KV_WIDTH, WIDTH),
    "self_attn.v_proj": (KV_WIDTH, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (MLP_WIDTH, WIDTH), "mlp.up_proj": (MLP_WIDTH, WIDTH),
    "mlp.down_proj": (WIDTH, MLP_WIDTH),
}  # fmt: skip


def random_pieces(entry: TensorEntry, *, device: str = "cpu") -> Iterator[memoryview]:
    """Random values of about the right size, by pieces."""
    dtype = torch.bfloat16 if entry.dtype == "BF16" else torch.float32
    left = math.prod(entry.shape)
    while left:
        count = min(left, 4 * MIB)
        yield bytes_of((torch.randn(count, device=device) * 0.02).to(dtype).cpu())
        left -= count


def make_model(folder: Path, *, layers: int) -> None:
    folder.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEARS.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (WIDTH,)
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}
    entries = [TensorEntry(name, "BF16", shape) for name, shape in shapes.items()]
    for _ in write_shards(folder, entries, values=random_pieces, shard_bytes=5 * GIB):
        pass
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers,
        "hidden_size": WIDTH, "intermediate_size": MLP_WIDTH, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 8192,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def make_adapter(folder: Path, *, layers: int) -> None:
    folder.mkdir(parents=True)
    entries = []
    for layer in range(layers):
        for name, (outputs, inputs) in LINEARS.items():
            stem = f"base_model.model.model.layers.{layer}.{name}.lora_"
            entries += [
                TensorEntry(f"{stem}A.weight", "F32", (RANK, inputs)),
                TensorEntry(f"{stem}B.weight", "F32", (outputs, RANK)),
            ]
    for _ in write_shards(folder, entries, values=random_pieces, shard_bytes=10 * GIB):
        pass
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
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


def copy_seconds(model: Path, target: Path) -> float:
    """Copying the weight files, each flushed as an export is."""
    started = time.perf_counter()
    target.mkdir()
    for path in model.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb+") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - started


def in_own_process(model: Path, adapter: Path, target: Path, base: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", base, str(model), str(adapter), str(target)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=4, help="decoder layers; 32 is the whole 8B (16 GB, twice)"
    )
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        base, *folders = options.one
        print(json.dumps(measured_merge(*map(Path, folders), base=base)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        compare(Path(name), layers=options.layers, repeats=options.repeats)


def compare(root: Path, *, layers: int, repeats: int) -> None:
    model, adapter, target = root / "model", root / "adapter", root / "out"
    make_model(model, layers=layers)
    make_adapter(adapter, layers=layers)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    print(f"{layers} layers of 8B widths, {format_bytes(size)}")
    for _ in range(repeats):
        copied = copy_seconds(model, target)
        shutil.rmtree(target)
        print(f"  copy          {copied:7.1f} s")
        for base in ("original", "dequantized"):
            result = in_own_process(model, adapter, target, base)
            shutil.rmtree(target)
            print(
                f"  {base:12}  {result['seconds']:7.1f} s = {result['seconds'] / copied:5.2f} x copy, "
                f"{result['processor_seconds']:.1f} s of processors, "
                f"peak {format_bytes(result['peak_bytes'])}"
            )


if __name__ == "__main__":
    main()
