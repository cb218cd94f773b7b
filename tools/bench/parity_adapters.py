"""Bottleneck adapters against the library `adapters` 1.3: alone, stacked, attended over; the same logits.

    python tools/bench/parity_adapters.py [--folder DIR]

On a tiny Llama in fp32. That library pins an old transformers, so its side runs in a virtual environment of
its own, made the first time (some minutes). It draws adapters of each kind, saves them as it does, in
safetensors, and writes the logits that it computes; this side imports the folders and computes the same. A
stack is a language's adapter and a task's on it (MAD-X, arXiv:2005.00052). Exit code 1 if any logit differs
by more than 1e-5 times the largest.

Attention over parallel adapters is left out: there that library adds the stream a second time, as it takes it
both for the residual of the attention and for that of the layer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from qadapt.adapters.adapters_library import import_bottleneck
from qadapt.adapters.bottleneck import load_bottleneck
from qadapt.adapters.fusion import FusionPart, Member, attach_fusion, read_member
from qadapt.adapters.side_car import SideCar
from qadapt.adapters.swap import Swap

REQUIREMENTS = ("adapters==1.3.0", "torch==2.13.0", "safetensors")
TOLERANCE = 1e-5
WIDTH, LAYERS, VOCABULARY = 64, 3, 97
PLACES = {"attention": "attention_adapters", "feed_forward": "output_adapters"}
"""Of that library."""

THEIRS = """
import sys
from pathlib import Path
import adapters, torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

place = Path(sys.argv[1])
KINDS = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=16),
    "houlsby-norm": adapters.DoubleSeqBnConfig(reduction_factor=8, non_linearity="gelu", ln_before=True),
    "houlsby-tanh": adapters.DoubleSeqBnConfig(reduction_factor=8, non_linearity="tanh", scaling=2.0),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=16),
    "pfeiffer-gelu": adapters.SeqBnConfig(reduction_factor=4, non_linearity="gelu"),
    "pfeiffer-norm": adapters.SeqBnConfig(reduction_factor=4, non_linearity="swish", ln_before=True),
    "parallel": adapters.ParBnConfig(reduction_factor=2),
    "parallel-norm": adapters.ParBnConfig(reduction_factor=4, ln_before=True, scaling=1.5),
    "pfeiffer-drop": adapters.SeqBnConfig(reduction_factor=4, leave_out=[0]),
    "compacter": adapters.CompacterConfig(reduction_factor=4),
    "compacter-norm": adapters.CompacterConfig(reduction_factor=8, ln_before=True, scaling=1.5),
    "compacter++": adapters.CompacterPlusPlusConfig(reduction_factor=2),
    "compacter++-norm": adapters.CompacterPlusPlusConfig(
        reduction_factor=4, non_linearity="tanh", ln_before=True
    ),
}


def save(model, config, name, folder):
    has_norm = config.ln_before  # which their safetensors writing refuses: two names of one tensor
    model.save_adapter(str(folder), name, use_safetensors=not has_norm)
    if has_norm:
        mine = {key: each.clone() for key, each in model.state_dict().items() if f".{name}." in key}
        save_file(mine, folder / "adapter.safetensors")


ids = torch.arange(3, 3 + 46).view(2, 23)
logits = {"ids": ids}
for name, config in KINDS.items():
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    adapters.init(model)
    model.add_adapter(name, config=config)
    model.set_active_adapters(name)
    draw = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "adapters" in key or "shared_parameters" in key:
            spread = 0.5 if "phm" in key or "W_" in key else 0.2  # of products of three
            parameter.data = spread * torch.randn(parameter.shape, generator=draw)
    model.eval()
    with torch.no_grad():
        logits[name] = model(input_ids=ids).logits.contiguous()
        model.set_active_adapters(None)
        logits["base"] = model(input_ids=ids).logits.contiguous()
    save(model, config, name, place / name)

PAIRS = {
    "stack": (KINDS["pfeiffer"], KINDS["pfeiffer-gelu"]),
    "stack-houlsby": (KINDS["houlsby"], KINDS["houlsby-tanh"]),
    "fusion": (KINDS["pfeiffer"], KINDS["pfeiffer-gelu"]),
    "fusion-houlsby": (KINDS["houlsby"], KINDS["houlsby-tanh"]),
    "fusion-compacter": (KINDS["pfeiffer"], KINDS["compacter++"]),
    "fusion-norm": (KINDS["pfeiffer-norm"], KINDS["compacter++-norm"]),
    "fusion-drop": (KINDS["pfeiffer-drop"], KINDS["pfeiffer-drop"]),
}
for name, configs in PAIRS.items():
    model = LlamaForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    adapters.init(model)
    for each, config in zip(("one", "two"), configs):
        model.add_adapter(each, config=config)
    if "fusion" in name:
        model.add_adapter_fusion(["one", "two"], "dynamic")
        model.set_active_adapters(adapters.composition.Fuse("one", "two"))
    else:
        model.set_active_adapters(adapters.composition.Stack("one", "two"))
    draw = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        if "adapter_fusion" in key:
            noise = 0.05 * torch.randn(parameter.shape, generator=draw)
            parameter.data = noise + torch.eye(len(noise)) if "value" in key else noise
        elif "adapters" in key or "shared_parameters" in key:
            spread = 0.5 if "phm" in key or "W_" in key else 0.2
            parameter.data = spread * torch.randn(parameter.shape, generator=draw)
    model.eval()
    with torch.no_grad():
        logits[name] = model(input_ids=ids).logits.contiguous()
    (place / name).mkdir()
    for each, config in zip(("one", "two"), configs):
        save(model, config, each, place / name / each)
    fused = {key: each.clone() for key, each in model.state_dict().items() if "adapter_fusion" in key}
    if fused:
        save_file(fused, place / name / "fusion.safetensors")
save_file(logits, place / "logits.safetensors")
"""


def their_python(folder: Path) -> Path:
    """The interpreter of their environment, which is made the first time."""
    place = folder / "adapters-1.3"
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (place / "whole").exists():
        print(f"making the environment of adapters 1.3 in {place}: some minutes ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
        (place / "whole").write_text("", encoding="utf-8")
    return python


def make_base(folder: Path) -> None:
    """A random Llama that both sides read."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def imported(folder: Path, name: str) -> SideCar | Swap:
    """The base with one of their adapters, two stacked, or their attention over two."""
    model, names = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), ("one", "two")
    with tempfile.TemporaryDirectory() as given:
        place = Path(given)
        if not (folder / name / "one").exists():
            import_bottleneck(folder / name, place)
            return load_bottleneck(model, place)
        for each in names:
            (place / each).mkdir()
            import_bottleneck(folder / name / each, place / each)
        if (folder / name / "fusion.safetensors").exists():
            return fused_as_theirs(
                model, [read_member(model, place / each, each) for each in names], folder / name
            )
        swap = Swap(model)
        for each in names:
            swap.add(each, place / each)
        swap.stack(names)
        return swap


def fused_as_theirs(model: LlamaForCausalLM, members: list[Member], folder: Path) -> SideCar:
    """An attention with their matrices."""
    fused = attach_fusion(model, members)
    theirs = load_file(folder / "fusion.safetensors")
    for place_name, part in fused.parts.items():
        if not isinstance(part, FusionPart):
            continue
        _, number, where = place_name.split(".")
        there = f"model.layers.{number}.{PLACES[where]}.adapter_fusion_layer.one,two"
        part.query.weight.data = theirs[f"{there}.query.weight"]
        part.query.bias.data = theirs[f"{there}.query.bias"]
        part.key.data = theirs[f"{there}.key.weight"]
        part.value.data = theirs[f"{there}.value.weight"] - torch.eye(WIDTH)
    return fused


def largest_difference(folder: Path, name: str, theirs: dict[str, torch.Tensor]) -> float:
    """Between their logits and ours of one imported adapter, as a share of the largest logit."""
    adapted = imported(folder, name).eval()
    with torch.no_grad():
        ours = adapted(input_ids=theirs["ids"]).logits
    return float((ours - theirs[name]).abs().max() / theirs[name].abs().max())


def main() -> int:
    """Compares every kind; says each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "qadapt-parity")
    place = parser.parse_args().folder
    python, is_good = their_python(place), True
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        make_base(folder / "base")
        (folder / "theirs.py").write_text(THEIRS, encoding="utf-8")
        subprocess.run([str(python), str(folder / "theirs.py"), str(folder)], check=True, capture_output=True)
        theirs = load_file(folder / "logits.safetensors")
        for name in sorted(set(theirs) - {"ids", "base"}):
            moved = float((theirs[name] - theirs["base"]).abs().max() / theirs["base"].abs().max())
            difference = largest_difference(folder, name, theirs)
            is_good = is_good and difference <= TOLERANCE < moved
            print(f"{name:16} differs by {difference:.1e}; the adapter moves the logits by {moved:.1e}")
    print(f"the same to {TOLERANCE}" if is_good else f"NOT the same to {TOLERANCE}")
    return not is_good


if __name__ == "__main__":
    sys.exit(main())
