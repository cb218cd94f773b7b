"""Real steps on very long rows, by the policies of `long_rows.py`: what each further token takes is the same.

    python tools/bench/long_steps.py                     8,192 to 65,536 tokens, three minutes on two cores
    python tools/bench/long_steps.py --lengths 2048 4096 a trial

A small random Llama in NF4 on a CPU takes a step on one row of each length: all layers recomputed, their
inputs in a file, feed-forward parts and norms in pieces, the loss in chunks. The ledger counts the step; the
dry run of the same setting must count the very same. The slope is what a token more takes at the highest
moment. It must not grow: no step may hold anything that grows faster than the row. Beside it the slope with
all activations kept, by the dry run, and anonymous memory as the system counts it. Exits with 1 if the slope
grows by more than a hundredth, or ledger and dry run differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from host_memory import Peak
from transformers import AutoConfig, AutoModelForCausalLM

from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.data.batches import MicroBatch
from qadapt.engine.arrangement import arrange
from qadapt.engine.ledger import Ledger
from qadapt.engine.moments import watched
from qadapt.engine.target import Target, kernels_of
from qadapt.model.load import load_base
from qadapt.plan.setting import Setting
from qadapt.quiet import quiet_libraries
from qadapt.train.dryrun import dry_run
from qadapt.train.memory import static_tensors
from qadapt.train.optimizer import make_optimizer
from qadapt.train.step import train_step
from qadapt.units import MIB

LENGTHS = (8192, 16384, 32768, 65536)
PIECE = 4096
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 704, "vocab_size": 2003,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROWTH = 0.01


def setting_of(length: int) -> Setting:
    """A step of one row with everything put away that a CPU can put away."""
    return Setting(
        length=length,
        rank=16,
        compute_dtype="fp32",
        adapter_dtype="fp32",
        optimizer="adamw",
        loss_chunk=1024,
        mlp_tiles=max(2, length // PIECE),
        offload=("boundaries",),
        accumulates=False,
        device="cpu",
    )


def counted(folder: Path, setting: Setting) -> tuple[Ledger, int, float]:
    """The ledger of a real step, the anonymous memory it took, and its seconds."""
    base = load_base(
        folder, quantization="nf4", double_quant=True, dtype=torch.float32, device=torch.device("cpu")
    )
    arrange(base, recompute=setting.recompute, tiles=setting.mlp_tiles, offload=setting.offload)
    model = attach_lora(base, Lora(rank=setting.rank, alpha=16), dtype=torch.float32, seed=0).train()
    optimizer = make_optimizer(trainable(model), kind=setting.optimizer, betas=(0.9, 0.99), weight_decay=0.0)
    length = setting.length
    batch = MicroBatch(
        input_ids=torch.randint(3, CONFIG["vocab_size"], (1, length)),
        positions=torch.arange(length),
        targets=torch.randint(3, CONFIG["vocab_size"], (1, length)),
        tokens=length,
        supervised_tokens=length,
        loss_chunk=setting.loss_chunk,
    )
    ledger = Ledger(inside=kernels_of(Target()))
    with ledger.during("load"):
        for category, tensors in static_tensors(model, optimizer).items():
            ledger.hold(category, tensors)
    began = time.perf_counter()
    with Peak() as peak, watched(ledger, base, optimizer=optimizer.inner), ledger:
        train_step(model, optimizer, [batch], learning_rate=1e-4, clip_norm=1.0, scaler=None)
    return ledger, peak.bytes, time.perf_counter() - began


def measure(folder: Path, lengths: Sequence[int]) -> bool:
    """Prints a line for each length, then the slopes; whether they are flat and the dry run agrees."""
    found: list[int] = []
    is_same = True
    for length in lengths:
        setting = setting_of(length)
        ledger, anonymous, seconds = counted(folder, setting)
        dry = dry_run(CONFIG, setting).phase_bytes
        step = {phase: value for phase, value in ledger.phase_bytes.items() if not _is_evaluation(phase)}
        differ = {phase: (value, dry.get(phase)) for phase, value in step.items() if dry.get(phase) != value}
        is_same &= not differ
        found.append(ledger.peak.bytes)
        print(
            f"{length:7,} tokens: ledger {ledger.peak.bytes / MIB:7.1f} MiB ({ledger.peak.phase}), dry run "
            f"{f'NOT THE SAME: {differ}' if differ else 'the same'}, anonymous memory +{anonymous / MIB:.0f} "
            f"MiB, {seconds:.0f} s",
            flush=True,
        )
    slopes = []
    for (short, long), (before, after) in zip(pairwise(lengths), pairwise(found), strict=True):
        slopes.append((after - before) / (long - short))
        kept = [
            dry_run(
                CONFIG, replace(setting_of(each), recompute="none", offload=(), mlp_tiles=1, loss_chunk=0)
            )
            for each in (short, long)
        ]
        slope = (kept[1].peak.bytes - kept[0].peak.bytes) / (long - short)
        print(f"{short:7,} to {long:7,}: {slopes[-1]:,.0f} bytes a token; with all kept {slope:,.0f}")
    is_flat = max(slopes) <= (1 + GROWTH) * slopes[0]
    print(f"slope {'flat' if is_flat else 'GROWS'}, dry run {'the same' if is_same else 'NOT THE SAME'}")
    return is_flat and is_same


def _is_evaluation(phase: str) -> bool:
    return phase.startswith("evaluation")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG)).save_pretrained(folder)
        is_kept = measure(folder, arguments.lengths)
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
