"""Whether a device computes what a CPU computes: gradients of every policy, updates, kernels.

Each gradient is compared with that of the plain step on the CPU in fp32: nothing recomputed, tiled, offloaded
or packed, all rows filled up. Off is the norm of the difference as a share of the norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qadapt.adapters.lora import trainable
from qadapt.engine.documents import varlen_problem
from qadapt.engine.host import host_buffer, to_device
from qadapt.model.precision import capability_of
from qadapt.plan.setting import Setting, auto_dtypes
from qadapt.selftest.check import Check, Found, tried
from qadapt.selftest.trainee import TINY, Trainee, random_rows
from qadapt.train.optimizer import make_optimizer
from qadapt.units import format_bytes

CPU = torch.device("cpu")
LENGTHS = (31, 66, 2, 49)
PLAIN = Setting(
    rows=4, length=66, rank=8, compute_dtype="fp32", adapter_dtype="fp32", optimizer="adamw",
    recompute="none", accumulates=False, quantization="none", device="cpu",
)  # fmt: skip
POLICIES: tuple[dict[str, Any], ...] = (
    {"recompute": "none"},
    {"recompute": "all"},
    {"recompute": 1},
    {"recompute": "all", "mlp_tiles": 3},
    {"loss_chunk": 20},
    {"packed": True, "recompute": "all"},
    {"offload": ("boundaries",), "recompute": "all"},
)
OFFLOADS: tuple[dict[str, Any], ...] = (
    {"offload": ("embeddings",)},
    {"offload": ("embeddings", "head"), "loss_chunk": 20},
    {"offload": ("layers",), "recompute": "all"},
    {
        "offload": ("embeddings", "head", "boundaries", "layers"),
        "recompute": "all",
        "mlp_tiles": 3,
        "loss_chunk": 20,
    },
)
"""On CUDA alone: on a CPU these parts lie on the host as it is. Layers in 8 bits are not streamed."""
SAME, SAME_QUANTIZED, SAME_IN_16_BITS = 1e-3, 2e-2, 0.1
"""How far a gradient in fp32 may be off; the same where weights in 4 or 8 bits were rounded on another
device; in bf16 or fp16."""
HEAD_WIDTHS = (64, 128)


def equality_checks(folder: Path, *, device: torch.device) -> Iterator[Check]:
    """Gradients, updates and kernels of a device against a CPU's, one after another.

    Args:
        folder: A model of the size `TINY`.
        device: Which device.
    """
    yield from _gradients(folder, device, quantization="none", bar=SAME)
    yield from _gradients(folder, device, quantization="nf4", bar=SAME_QUANTIZED)
    yield from _gradients(folder, device, quantization="int8", bar=SAME_QUANTIZED)
    for tiles in (1, 3):
        yield tried(f"recomputation, dropout, mlp_tiles {tiles}", partial(_dropout, folder, device, tiles))
    yield tried("optimizer states", partial(_states, folder, device))
    if device.type == "cuda":
        yield tried("pinned memory", partial(_pinned, device))
        for width in HEAD_WIDTHS:
            yield tried(f"many documents at once, heads of {width}", partial(_documents, device, width))


def _gradients(
    folder: Path, device: torch.device, *, quantization: Literal["nf4", "int8", "none"], bar: float
) -> Iterator[Check]:
    """Every policy of one kind of base; the half-precision step last."""
    setting = replace(PLAIN, quantization=quantization)
    expected = _gradient(folder, setting, CPU)
    offloads = OFFLOADS if quantization != "int8" else OFFLOADS[:2]
    policies = POLICIES + (offloads if device.type == "cuda" else ())
    for policy in policies:
        name = f"gradient, {quantization}, {_words(policy)}"
        yield tried(name, partial(_compared, folder, replace(setting, **policy), expected, device, bar))
    if device.type == "cuda":
        half, _ = auto_dtypes("cuda", has_bf16=(capability_of(device) or 0) >= 8)
        for policy in ({"recompute": "all"}, {"recompute": "all", "packed": True}):
            name = f"gradient, {quantization}, {half}, {_words(policy)}"
            changed = replace(setting, compute_dtype=half, **policy)
            yield tried(name, partial(_compared, folder, changed, expected, device, SAME_IN_16_BITS))


def _words(policy: dict[str, Any]) -> str:
    texts = {key: "+".join(value) if isinstance(value, tuple) else value for key, value in policy.items()}
    return ", ".join(key if value is True else f"{key} {value}" for key, value in texts.items())


def _gradient(folder: Path, setting: Setting, device: torch.device) -> Tensor:
    on_device = replace(setting, device="cpu" if device.type == "cpu" else "cuda")
    return Trainee(folder, on_device, device=device).gradient(
        random_rows(LENGTHS, vocabulary=TINY.vocabulary)
    )


def _compared(folder: Path, setting: Setting, expected: Tensor, device: torch.device, bar: float) -> Found:
    off = _off(_gradient(folder, setting, device), expected)
    return f"{off:.1e} off, {bar:.0e} allowed", off <= bar


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _dropout(folder: Path, device: torch.device, tiles: int) -> Found:
    """A layer that is computed again must draw what it drew before."""
    found = []
    for recompute in ("none", "all"):
        torch.manual_seed(3)
        setting = replace(PLAIN, dropout=0.2, recompute=recompute, mlp_tiles=tiles)
        found.append(_gradient(folder, setting, device))
    off = _off(found[1], found[0])
    return f"{off:.1e} off, 1e-05 allowed", off <= 1e-5


def _states(folder: Path, device: torch.device) -> Found:
    """States that are saved and read back must lead to the same next update."""
    kind: Literal["adamw", "adamw-8bit"] = "adamw-8bit" if device.type == "cuda" else "adamw"
    setting = replace(PLAIN, rank=256, targets=("up_proj",), optimizer=kind)  # large enough to be paged
    trainee = Trainee(folder, setting, device=device)
    parameters = trainable(trainee.model)

    def update(seed: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter)
        trainee.optimizer.step(1e-3)
        return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}

    update(1)
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    saved = {name: value.detach().cpu().clone() for name, value in trainee.optimizer.tensors().items()}
    expected = update(2)
    trainee.optimizer = make_optimizer(parameters, kind=kind, betas=(0.9, 0.99), weight_decay=0.0)
    trainee.optimizer.load(saved)
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
    again = update(2)
    is_same = all(torch.equal(again[name], value) for name, value in expected.items())
    paged_bytes = trainee.optimizer.paged_bytes
    said = f"{kind}, {format_bytes(paged_bytes)} paged; read back, the next update is "
    said += "the same" if is_same else "another"
    return said, is_same and (kind == "adamw" or paged_bytes > 0)


def _pinned(device: torch.device) -> Found:
    values = torch.randint(0, 256, (1000, 1000), dtype=torch.uint8, device=device)
    host = host_buffer(values.nbytes, device).view(values.shape).copy_(values)
    is_same = host.is_pinned() and torch.equal(to_device(host, device), values)
    return "there and back" + ("" if is_same else ": not the same"), is_same


def _documents(device: torch.device, width: int) -> Found:
    if (capability_of(device) or 0) < 8:
        return "only cards from compute capability 8.0 on have that kernel", None
    problem = varlen_problem(device, torch.bfloat16, head_width=width, groups=4)
    return problem or "as one document at a time", problem is None
