"""The ledger against the CPU allocator's own count, and the dry run against the ledger, over real steps.

    python tools/bench/ledger_matrix.py              the whole matrix (some minutes)
    python tools/bench/ledger_matrix.py --family llama

A case is an architecture x what is recomputed (none, all, every second layer, or all with the boundaries
moved out of the allocator) x the loss (whole, or in chunks that are computed again) x the base (NF4 with and
without double quantization, bf16) x rows (padded, or several documents packed into one). Each step runs twice
on a tiny random model: once under the ledger, once under torch's profiler, whose allocation records are
summed up to their highest level. What the ledger does not see: the generator's state that each recomputed
layer keeps (5 KB on a CPU), and numbers of 8 bytes. Then the same step runs on `meta`. Compared are bytes
above the start. Exits with 1 if a bar is missed: 0.5 % for
the allocator, 0 bytes for the dry run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, GradientCheckpointingLayer

from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.engine.arrangement import arrange
from qadapt.engine.ledger import Ledger, Peak
from qadapt.engine.loss import loss_sum
from qadapt.engine.moments import watched
from qadapt.engine.target import Target, kernels_of, on_target, target_functions
from qadapt.model.load import load_base
from qadapt.model.precision import DTYPES
from qadapt.model.skeleton import skeleton_base
from qadapt.plan.setting import Recompute
from qadapt.quiet import quiet_libraries
from qadapt.train.memory import static_tensors
from qadapt.train.optimizer import AdapterOptimizer, make_optimizer

MIB = 1024**2
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "olmo2")
RECOMPUTE = ("none", "all", "every second", "offload")
LOSSES = ("full", "chunked")
BASES = ("nf4-dq", "nf4", "bf16")
ROWS = ("padded", "packed")
CONFIG: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 32, "intermediate_size": 448, "vocab_size": 2003, "max_position_embeddings": 999,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 64},
}
DOCUMENTS = (201, 77, 190)
CHUNK = 100
BAR = 0.005


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    family: str
    recompute: str
    loss: str
    base: str
    rows: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES["bf16" if self.base == "bf16" else "fp32"]

    @property
    def config(self) -> dict[str, Any]:
        return {"model_type": self.family, **CONFIG, **SPECIAL.get(self.family, {})}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes above the start at the highest moment."""

    allocator: int
    ledger: int
    peak: Peak
    dry_peak: Peak

    @property
    def error(self) -> float:
        return self.ledger / self.allocator - 1

    @property
    def is_same(self) -> bool:
        """Whether the dry run has the ledger's bytes in every category, at the same moment."""
        return self.peak == self.dry_peak


def cases(families: tuple[str, ...] = FAMILIES) -> Iterator[Case]:
    """Every cell."""
    yield from itertools.starmap(Case, itertools.product(families, RECOMPUTE, LOSSES, BASES, ROWS))


def measure(case: Case, folder: Path) -> Measured:
    """One step by the ledger, by the allocator, and on `meta`; the folder holds the family's tiny model."""
    ledger = _ledger()
    _step(case, _model(case, folder), ledger)
    model = _model(case, folder)
    allocator = allocated_bytes(_prepared(case, model, _optimizer(model)))
    dry = _ledger()
    with on_target(Target(), is_packed=case.rows == "packed"):
        _step(case, _model(case, None), dry)
    start = ledger.phase_bytes["load"]
    return Measured(allocator, ledger.peak.bytes - start, ledger.peak, dry.peak)


def make_folder(family: str, folder: Path) -> Path:
    """The tiny model of a family."""
    values = Case(family, "none", "full", "bf16", "padded").config
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).save_pretrained(folder)
    return folder


def _ledger() -> Ledger:
    return Ledger(inside=kernels_of(Target()))


def _model(case: Case, folder: Path | None) -> PeftModel:
    """The adapted model: real from its folder, or on `meta`."""
    quantization = "none" if case.base == "bf16" else "nf4"
    how: dict[str, Any] = {"quantization": quantization, "double_quant": case.base == "nf4-dq"}
    if folder is None:
        base = skeleton_base(case.config, dtype=case.dtype, **how)
    else:
        base = load_base(folder, dtype=case.dtype, device=torch.device("cpu"), **how)
    within = contextlib.nullcontext if folder is not None else lambda: target_functions(Target())
    recompute: Recompute = "none" if case.recompute == "none" else "all"
    arrange(base, recompute=recompute, tiles=1, offload=(), within=within)
    if case.recompute == "every second":
        layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
        for layer in layers[1::2]:
            layer.gradient_checkpointing = False
    return attach_lora(base, Lora(rank=8, alpha=16), dtype=case.dtype, seed=0).train()


def _step(case: Case, model: PeftModel, ledger: Ledger) -> None:
    optimizer = _optimizer(model)
    with ledger.during("load"):
        for category, tensors in static_tensors(model, optimizer).items():
            ledger.hold(category, tensors)
    step = _prepared(case, model, optimizer)
    with watched(ledger, model.get_base_model(), optimizer=optimizer.inner), ledger:
        step()


def allocated_bytes(step: Callable[[], object]) -> int:
    """The highest sum of the CPU allocator's records over a step; what was there before counts nothing."""
    gc.collect()  # what earlier steps left would be recorded as released in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    level = highest = 0
    records = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for record in sorted(records, key=lambda record: record.start_ns()):
        level += record.nbytes()
        highest = max(highest, level)
    return highest or allocated_bytes(step)  # now and then the profiler hands over nothing


def _optimizer(model: PeftModel) -> AdapterOptimizer:
    return make_optimizer(trainable(model), kind="adamw", betas=(0.9, 0.99), weight_decay=0.0)


def _prepared(case: Case, model: PeftModel, optimizer: AdapterOptimizer) -> Callable[[], None]:
    """A step whose inputs are there before it begins."""
    device = model.device
    if case.rows == "packed":
        ids = torch.randint(3, 2000, (1, sum(DOCUMENTS)))
        places = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
        named = {"position_ids": places.to(device)}
    else:
        ids, named = torch.randint(3, 2000, (3, 217)), {}
    length = ids.shape[1]
    positions = torch.arange(length // 2, length - 1)
    targets = ids[:, positions + 1]
    inputs = [tensor.to(device) for tensor in (ids, positions, targets)]
    lose = _full if case.loss == "full" else _chunked

    def step() -> None:
        with _offloading() if case.recompute == "offload" else contextlib.nullcontext():
            loss = lose(model, *inputs, named=named) / targets.numel()
        loss.backward()
        optimizer.step(1e-3)
        for parameter in optimizer.parameters.values():
            parameter.grad = None

    return step


def _full(
    model: PeftModel, ids: Tensor, positions: Tensor, targets: Tensor, *, named: dict[str, Tensor]
) -> Tensor:
    if not named:
        return loss_sum(model, input_ids=ids, positions=positions, targets=targets)
    logits = model(input_ids=ids, logits_to_keep=positions, use_cache=False, **named).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def _chunked(
    model: PeftModel, ids: Tensor, positions: Tensor, targets: Tensor, *, named: dict[str, Tensor]
) -> Tensor:
    base = model.get_base_model()
    head = base.get_output_embeddings()
    hidden = base.get_decoder()(input_ids=ids, use_cache=False, **named).last_hidden_state[:, positions]

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(head(rows).float(), wanted, reduction="sum")

    chunks = zip(hidden.flatten(0, 1).split(CHUNK), targets.flatten().split(CHUNK), strict=True)
    return torch.stack([checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks]).sum()


@contextlib.contextmanager
def _offloading() -> Iterator[None]:
    """Moves what is saved for the backward pass out of the allocator, as an offload to the host would."""

    def move_out(tensor: Tensor) -> tuple[Any, Tensor | None]:
        if not tensor.requires_grad or tensor.numel() < 4096:  # weights stay where they are
            return None, tensor
        kept = None if tensor.is_meta else _bytes_of(tensor).copy()
        return (kept, tensor.shape, tensor.dtype, tensor.device), None

    def bring_back(packed: tuple[Any, Tensor | None]) -> Tensor:
        place, tensor = packed
        if tensor is not None:
            return tensor
        kept, shape, dtype, device = place
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if kept is not None:
            numpy.copyto(_bytes_of(tensor), kept)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(move_out, bring_back):
        yield


def _bytes_of(tensor: Tensor) -> numpy.ndarray[Any, Any]:
    return tensor.detach().contiguous().view(torch.uint8).numpy()


def report(families: tuple[str, ...] = FAMILIES) -> Iterator[str]:
    """Every cell, then typical and worst."""
    found: dict[Case, Measured] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = {family: make_folder(family, Path(place) / family) for family in families}
        for case in cases(families):
            found[case] = each = measure(case, folders[case.family])
            mark = "same" if each.is_same else f"NOT SAME: {each.dry_peak} against {each.peak}"
            yield (
                f"{case.family:8} {case.recompute:12} {case.loss:8} {case.base:7} {case.rows:7}"
                f" {each.allocator / MIB:7.2f} MiB  ledger {each.error:+7.3%}  dry run {mark}"
            )
    errors = [abs(each.error) for each in found.values()]
    same = sum(each.is_same for each in found.values())
    met = "met" if max(errors) <= BAR else "MISSED"
    yield f"\n{len(found)} cells; ledger against the allocator: median {statistics.median(errors):.3%},"
    yield f"worst {max(errors):.3%} (bar {BAR:.1%}): {met}"
    met = "met" if same == len(found) else "MISSED"
    yield f"dry run the same to the byte in {same} of {len(found)}: {met}"


def main() -> None:
    """Prints it."""
    parser = argparse.ArgumentParser(description="The ledger and the dry run against the allocator.")
    parser.add_argument("--family", choices=FAMILIES)
    chosen = parser.parse_args().family
    warnings.simplefilter("ignore")
    quiet_libraries()
    missed = False
    for line in report((chosen,) if chosen else FAMILIES):
        print(line, flush=True)
        missed = missed or "MISSED" in line
    sys.exit(missed)


if __name__ == "__main__":
    main()
