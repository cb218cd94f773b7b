"""The closed form against the real step: what stays equal to the byte, the peak within its stated error.

The step is the one that trains: the package's own loader, adapters, loss and optimizer, on ugly sizes,
counted by a dispatch mode that follows storages.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Int8Params
from peft import PeftModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, GradientCheckpointingLayer

from qadapt.adapters.fusion import Member
from qadapt.adapters.lora import trainable
from qadapt.adapters.method import Adapter, attach
from qadapt.engine.arrangement import arrange
from qadapt.engine.loss import loss_sum
from qadapt.model.load import load_base
from qadapt.model.original import original_weights
from qadapt.model.precision import DTYPES
from qadapt.plan.categories import STATIC
from qadapt.plan.estimate import CLOSED_ERROR, estimate_step
from qadapt.plan.setting import Setting
from qadapt.shape import FAMILIES, ModelShape, shape_from_config
from qadapt.train.optimizer import make_optimizer

CONFIG = {
    "hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 448, "vocab_size": 1003, "max_position_embeddings": 999,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 64},
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 64},
}
CPU = Setting(
    rows=3, length=117, rank=5, compute_dtype="fp32", adapter_dtype="fp32", optimizer="adamw",
    supervised_share=0.3, accumulates=False, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp(family)
        config = AutoConfig.for_model(family, **values_of(family))
        AutoModelForCausalLM.from_config(config).save_pretrained(found[family])
    return found


def values_of(family: str) -> dict[str, Any]:
    return {**CONFIG, "tie_word_embeddings": False, **SPECIAL.get(family, {})}


def shape_of(family: str) -> ModelShape:
    return shape_from_config({"model_type": family, **values_of(family)}, name=f"tiny {family}")


def build(folder: Path, setting: Setting, *, alpha: float = 16) -> PeftModel:
    """A base with the adapters of a setting, of whatever method."""
    base = load_base(
        folder,
        quantization=setting.quantization,
        double_quant=setting.double_quant,
        dtype=DTYPES[setting.compute_dtype],
        device=torch.device("cpu"),
    )
    arrange(base, recompute=setting.recompute, tiles=setting.mlp_tiles, offload=setting.offload)
    what = setting.method, setting.rank, alpha, setting.dropout, setting.targets, setting.nonlinearity
    adapter = Adapter(*what, members=[Member.of(each) for each in setting.fused])
    rows = base.get_input_embeddings().num_embeddings
    new_ids = range(rows - setting.new_tokens, rows)
    dtype = DTYPES[setting.adapter_dtype]
    with original_weights(folder) as originals:
        return attach(base, adapter, dtype=dtype, seed=0, new_ids=new_ids, originals=originals).train()


def quantization_tensors(model: torch.nn.Module) -> list[Tensor]:
    found = []
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if isinstance(parameter, Int8Params):
            found.append(parameter.SCB)
        if state is not None:
            found += [state.absmax, state.code]
            if state.nested:
                found += [state.offset, state.state2.absmax, state.state2.code]
    return found


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def static_bytes(model: torch.nn.Module, setting: Setting) -> dict[str, int]:
    adapters = trainable(model)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    linear = [p for p in frozen if "_proj." in names[id(p)] and p.ndim == 2]
    others = [p for p in frozen if not any(p is each for each in linear)]
    optimizer = make_optimizer(adapters, kind=setting.optimizer, betas=(0.9, 0.99), weight_decay=0.0)
    states = [value for state in optimizer.inner.state.values() for value in state.values()]
    lost = list(getattr(optimizer, "lost", {}).values())
    return {
        "base_weights": stored_bytes(linear),
        "quantization_constants": stored_bytes(quantization_tensors(model)),
        "unquantized": stored_bytes([*others, *model.buffers()]),
        "adapters": stored_bytes(adapters.values()),
        "optimizer": stored_bytes([value for value in [*states, *lost] if isinstance(value, Tensor)]),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_is_exact_to_the_byte_for_every_family(family: str, folders: dict[str, Path]) -> None:
    setting = dataclasses.replace(
        CPU, rank=24, compute_dtype="bf16", adapter_dtype="bf16", optimizer="adamw-8bit"
    )
    expect_exact(family, folders, setting)


@pytest.mark.parametrize(
    "changes",
    [
        {"double_quant": False},
        {"quantization": "int8"},
        {"quantization": "none", "optimizer": "adamw-8bit", "rank": 31},
        {"optimizer": "adamw", "adapter_dtype": "bf16"},
        {"optimizer": "adamw-8bit", "adapter_dtype": "fp32", "rank": 22},
        {"targets": ("q_proj", "down_proj"), "rank": 1},
        {"new_tokens": 3},
        {"new_tokens": 30, "optimizer": "adamw-8bit", "adapter_dtype": "bf16", "rank": 1},
    ],
)
def test_what_stays_is_exact_to_the_byte_for_every_setting(
    changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    expect_exact("llama", folders, dataclasses.replace(CPU, **changes))


def expect_exact(family: str, folders: dict[str, Path], setting: Setting) -> None:
    estimate = estimate_step(shape_of(family), setting)
    found = static_bytes(build(folders[family], setting), setting)
    assert {name: estimate.categories[name] for name in found} == found


class Ledger(TorchDispatchMode):
    """The highest sum of live storages that were made while it was on."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = [tensor.untyped_storage() for tensor in known]
        self._live = {storage._cdata: 0 for storage in self._known}
        self._now = self.peak_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self._now)
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._live:
            self._live[storage._cdata] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self._now -= self._live.pop(key, 0)


def working_peak(folder: Path, setting: Setting) -> int:
    """Bytes that one real micro-batch adds at its highest moment, its first gradients among them."""
    return peak_of(build(folder, setting), setting)


def peak_of(model: torch.nn.Module, setting: Setting) -> int:
    ids = torch.randint(3, 1003, (setting.rows, setting.length))
    count = math.ceil(setting.length * setting.supervised_share)
    positions = torch.arange(setting.length - count, setting.length)
    targets = torch.randint(3, 1003, (setting.rows, count))
    known = [*model.parameters(), *model.buffers(), *quantization_tensors(model), ids, positions, targets]
    with Ledger(known) as ledger:
        loss = loss_sum(model, input_ids=ids, positions=positions, targets=targets, chunk=setting.loss_chunk)
        loss.backward()
    return ledger.peak_bytes


def expect_close(family: str, folders: dict[str, Path], setting: Setting) -> None:
    estimate = estimate_step(shape_of(family), setting)
    static = sum(estimate.categories[name] for name in STATIC if name != "gradients")
    predicted = max(estimate.phase_bytes["loss"], estimate.phase_bytes["layer"]) - static
    measured = working_peak(folders[family], setting)
    assert predicted == pytest.approx(measured, rel=CLOSED_ERROR), f"{predicted / measured - 1:+.2%}"


@pytest.mark.parametrize(
    ("family", "dtype", "recompute"),
    [
        *itertools.product(("llama", "gemma2", "phi3"), ("fp32", "bf16"), ("all", "none")),
        ("mistral", "bf16", "all"),
        ("qwen2", "fp32", "none"),
        ("qwen3", "bf16", "all"),
        ("qwen3", "fp32", "none"),
        *itertools.product(("llama", "gemma2", "qwen3"), ("fp32", "bf16"), (1, 2)),
    ],
)
def test_the_peak_of_a_real_step_is_met_for_every_family(
    family: str, dtype: Any, recompute: Any, folders: dict[str, Path]
) -> None:
    setting = dataclasses.replace(CPU, compute_dtype=dtype, adapter_dtype=dtype, recompute=recompute)
    expect_close(family, folders, setting)


@pytest.mark.parametrize(
    "changes",
    [
        {"supervised_share": 1.0},
        {"supervised_share": 1.0, "loss_chunk": 300},
        {"supervised_share": 1.0, "compute_dtype": "bf16", "recompute": "none"},
        {"compute_dtype": "bf16", "adapter_dtype": "fp32"},
        {"targets": ("q_proj", "v_proj"), "rows": 1, "length": 411},
        {"dropout": 0.1},
        {"compute_dtype": "bf16", "adapter_dtype": "bf16", "supervised_share": 0.02, "recompute": "none"},
        {"compute_dtype": "bf16", "adapter_dtype": "bf16", "supervised_share": 0.02, "recompute": 2},
        {"supervised_share": 1.0, "recompute": 1},
        {"double_quant": False, "rank": 37},
        {"quantization": "int8", "compute_dtype": "bf16", "targets": ("q_proj", "up_proj")},
        {"quantization": "none", "rows": 1, "length": 700, "supervised_share": 0.05},
        {"new_tokens": 30, "quantization": "none"},
        {"new_tokens": 30, "recompute": "none", "dropout": 0.1},
    ],
)
def test_the_peak_of_a_real_step_is_met_for_every_setting(
    changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    expect_close("llama", folders, dataclasses.replace(CPU, **changes))


@pytest.mark.parametrize(("share", "count"), [(0.05, 1), (0.05, 2), (1.0, 2)])
def test_recomputing_the_first_layers_takes_no_more_than_recomputing_the_last(
    share: float, count: int, folders: dict[str, Path]
) -> None:
    setting = dataclasses.replace(CPU, supervised_share=share, recompute=count)
    first = build(folders["llama"], setting)
    last = build(folders["llama"], dataclasses.replace(setting, recompute="all"))
    layers = [module for module in last.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[: len(layers) - count]:
        layer.gradient_checkpointing = False
    highest, other = peak_of(first, setting), peak_of(last, setting)
    assert highest <= other
    if share < 1:  # elsewhere the logits are the peak, before any layer goes backward
        layer_bytes = setting.tokens * CONFIG["hidden_size"] * 4  # type: ignore[operator]
        assert other - highest > layer_bytes


def test_gradients_are_there_at_the_loss_only_if_steps_accumulate() -> None:
    shape = shape_of("llama")
    alone = estimate_step(shape, CPU)
    later = estimate_step(shape, dataclasses.replace(CPU, accumulates=True))
    assert later.phase_bytes["loss"] - alone.phase_bytes["loss"] == alone.categories["adapters"]
    assert later.phase_bytes["update"] == alone.phase_bytes["update"]


def test_cuda_rounds_every_tensor_up_and_keeps_a_workspace() -> None:
    shape = shape_of("llama")
    cpu, cuda = (estimate_step(shape, dataclasses.replace(CPU, device=device)) for device in ("cpu", "cuda"))
    assert cuda.categories["quantization_constants"] % 512 == 0
    assert cuda.categories["quantization_constants"] > cpu.categories["quantization_constants"]
    assert cuda.categories["temporary"] >= 8_519_680
    assert cpu.context_bytes == 0 < cuda.context_bytes
    assert cpu.reserved_high_bytes == cpu.peak_allocated_bytes < cuda.reserved_low_bytes
