"""The dry run: the step that trains, without memory, equal to the byte to the real one on a CPU."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_estimate import CPU, build, folders, shape_of, values_of

from qadapt.adapters.lora import trainable
from qadapt.adapters.rates import rate_ratios
from qadapt.batch_shape import BatchShape, worst_routing
from qadapt.data.batches import MicroBatch
from qadapt.engine.ledger import Ledger
from qadapt.engine.moments import watched
from qadapt.engine.target import Target, kernels_of
from qadapt.errors import BadModel, Unsupported
from qadapt.plan.estimate import estimate_step
from qadapt.plan.setting import Setting
from qadapt.plan.trace import peak_of
from qadapt.shape import find_config
from qadapt.train.companion import companion_of
from qadapt.train.dryrun import DryRun, batch_of, dry_run
from qadapt.train.memory import static_tensors
from qadapt.train.optimizer import make_optimizer
from qadapt.train.step import evaluate_loss, train_step

__all__ = ["folders"]  # a fixture
SETTING = dataclasses.replace(CPU, rank=6)


def config(family: str) -> dict[str, Any]:
    return {"model_type": family, **values_of(family)}


def counted(folder: Path, setting: Setting, *, alpha: float = 16) -> Ledger:
    """The ledger of the real step and an evaluation."""
    model = build(folder, setting, alpha=alpha)
    parameters = trainable(model)
    ratios, kind = rate_ratios(setting.method, parameters), setting.optimizer
    optimizer = make_optimizer(parameters, kind=kind, betas=(0.9, 0.99), weight_decay=0.0, ratios=ratios)
    optimizer.companion = companion_of(model)
    count = math.ceil(setting.length * setting.supervised_share)
    batch = MicroBatch(
        input_ids=torch.randint(3, 1003, (setting.rows, setting.length)),
        positions=torch.arange(count),
        targets=torch.randint(3, 1003, (setting.rows, count)),
        tokens=setting.tokens,
        supervised_tokens=setting.rows * count,
        loss_chunk=setting.loss_chunk,
    )
    ledger = Ledger(inside=kernels_of(Target()))
    with ledger.during("load"):
        for category, tensors in static_tensors(model, optimizer).items():
            ledger.hold(category, tensors)
    with watched(ledger, model.get_base_model(), optimizer=optimizer.inner), ledger:
        batches = [batch] * (1 + setting.accumulates)
        train_step(model, optimizer, batches, learning_rate=1e-4, clip_norm=1.0, scaler=None)
        evaluate_loss(model, [batch])
    return ledger


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"recompute": "none", "supervised_share": 1.0}),
        ("llama", {"recompute": 2}),
        ("llama", {"accumulates": True}),
        ("llama", {"dropout": 0.1, "double_quant": False}),
        ("llama", {"compute_dtype": "bf16", "adapter_dtype": "bf16", "quantization": "none"}),
        ("llama", {"compute_dtype": "bf16", "targets": ("q_proj", "down_proj")}),
        ("llama", {"quantization": "int8", "compute_dtype": "bf16", "targets": ("q_proj", "down_proj")}),
        ("mistral", {"rows": 1, "length": 311}),
        ("qwen2", {"recompute": "none"}),
        ("qwen2", {"compute_dtype": "bf16", "adapter_dtype": "bf16"}),
        ("qwen2", {"quantization": "int8", "compute_dtype": "bf16", "targets": ("q_proj", "down_proj")}),
        ("qwen3", {"compute_dtype": "bf16", "adapter_dtype": "bf16"}),
        ("gemma2", {}),
        ("phi3", {"recompute": 1}),
        ("llama", {"new_tokens": 7, "compute_dtype": "bf16", "adapter_dtype": "bf16"}),
        ("gemma2", {"new_tokens": 64, "recompute": "none", "loss_chunk": 50}),
        ("llama", {"compute_dtype": "bf16", "supervised_share": 1.0, "loss_chunk": 100}),
    ],
)
def test_the_dry_run_is_the_real_step_to_the_byte(
    family: str, changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    setting = dataclasses.replace(SETTING, **changes)
    ledger, dry = counted(folders[family], setting), dry_run(config(family), setting)
    assert dry.peak == ledger.peak
    left = 1024 if setting.accumulates else 0  # small numbers of the micro-batch before
    for phase in ("forward", "loss", "recompute", "backward", "update", "evaluation", "evaluation loss"):
        assert dry.phase_bytes.get(phase, 0) == pytest.approx(ledger.phase_bytes.get(phase, 0), abs=left), (
            phase
        )


def test_what_stays_has_the_closed_forms_categories() -> None:
    dry, estimate = dry_run(config("llama"), SETTING), estimate_step(shape_of("llama"), SETTING)
    for category in ("base_weights", "quantization_constants", "unquantized", "adapters", "optimizer"):
        assert dry.static[category] == estimate.categories[category], category


def test_the_peak_says_where_it_is() -> None:
    wide = dry_run(config("llama") | {"vocab_size": 9001}, dataclasses.replace(SETTING, supervised_share=1.0))
    narrow = dry_run(config("llama"), dataclasses.replace(SETTING, supervised_share=0.01))
    assert wide.peak.phase == "loss"
    assert narrow.peak.phase in ("recompute", "backward")
    assert narrow.peak.module == "model.layers.2"


def on_card(capability: float, **changes: Any) -> DryRun:
    setting = dataclasses.replace(
        SETTING, device="cuda", compute_dtype="fp16", length=900, rows=1, supervised_share=0.1, **changes
    )
    return dry_run(config("llama"), setting, capability=capability)


def test_a_card_takes_workspaces_and_rounds_up() -> None:
    dry = on_card(8.6)
    assert dry.static["temporary"] == 2 * 8_519_680
    assert dry.static["adapters"] % 512 == 0
    assert on_card(12.0).static["temporary"] == 2 * 32 * 2**20


def test_dropout_on_a_card_keeps_a_mask_of_one_byte_a_value() -> None:
    card, plain = on_card(8.6, dropout=0.1, recompute="none"), on_card(8.6, recompute="none")
    dropped = 3 * 900 * (6 * 192 + 448)  # inputs of seven adapted layers in each of three decoder layers
    more = card.phase_bytes["forward"] - plain.phase_bytes["forward"]
    assert dropped <= more < 1.4 * dropped  # a mask of two bytes or four would be far above


def test_the_trace_is_a_step_from_loading_on_and_gives_everything_back() -> None:
    dry = dry_run(config("llama"), SETTING, steps=2)
    live: dict[int, int] = {}
    for event in dry.trace:
        if event.is_release:
            live.pop(event.key)
        else:
            live[event.key] = event.size_bytes
    assert sum(live.values()) == pytest.approx(sum(dry.static.values()), abs=4096)
    assert peak_of(dry.trace).bytes == dry.peak.bytes
    phases = list(dict.fromkeys(event.phase for event in dry.trace))
    assert phases[0] == "load"
    assert {"forward", "loss", "recompute", "backward", "evaluation"} <= set(phases)


def test_what_depends_on_data_is_given() -> None:
    few = BatchShape(rows=3, length=117, positions=40, supervised_tokens=99)
    many = BatchShape(rows=3, length=117, positions=116, supervised_tokens=348)
    setting = dataclasses.replace(SETTING, loss_chunk=0)
    dry = [dry_run(config("llama"), setting, batch=batch).phase_bytes["loss"] for batch in (few, many)]
    assert dry[1] - dry[0] == pytest.approx(3 * 76 * 4 * (1003 + 3 * 192), rel=0.01)  # logits; hidden, twice


def test_of_the_logits_one_chunk_is_there_at_once() -> None:
    whole, chunk = (dataclasses.replace(SETTING, supervised_share=1.0, loss_chunk=n) for n in (0, 100))
    phases = [dry_run(config("llama"), setting).phase_bytes for setting in (whole, chunk)]
    fewer = SETTING.tokens - 100
    assert phases[0]["loss"] - phases[1]["loss"] == pytest.approx(fewer * 4 * (1003 + 192), rel=0.01)
    evaluations = [found["evaluation loss"] for found in phases]
    assert evaluations[0] - evaluations[1] == pytest.approx(fewer * 4 * 1003, rel=0.01)


def test_an_architecture_without_a_closed_form_can_be_run() -> None:
    values = find_config("tiiuae/falcon-7b").values | {"num_hidden_layers": 2}
    dry = dry_run(values, dataclasses.replace(SETTING, device="cuda", rank=8), capability=8.9)
    assert dry.peak.bytes > sum(dry.static.values())


def test_an_unknown_architecture_is_a_clear_no() -> None:
    with pytest.raises(Unsupported, match="'nonsense' is not known to transformers"):
        dry_run({"model_type": "nonsense"}, SETTING)


def test_values_that_make_no_model_are_a_clear_no() -> None:
    with pytest.raises(BadModel, match="No model can be built"):
        dry_run(config("llama") | {"hidden_act": "nonsense"}, SETTING)


def test_routing_is_given_from_balanced_to_worst() -> None:
    values = find_config("mistralai/Mixtral-8x7B-v0.1").values | {
        "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 999,
    }  # fmt: skip
    setting = dataclasses.replace(SETTING, device="cuda", compute_dtype="bf16", supervised_share=0.1)
    batch, tokens = batch_of(setting), setting.tokens
    grouped = dry_run(values, setting, capability=8.9, batch=batch)
    routings = (
        (tokens // 4,) * 8,
        worst_routing(tokens=tokens, per_token=2),
    )
    balanced, worst = (
        dry_run(values, setting, capability=8.9, batch=dataclasses.replace(batch, expert_tokens=routing))
        for routing in routings
    )
    assert balanced.phase_bytes["forward"] < worst.phase_bytes["forward"]
    assert balanced.static == worst.static == grouped.static
    assert grouped.static["base_weights"] > 2 * 2 * 8 * 3 * 256 * 896  # experts stay in 16 bits


def test_a_base_can_be_loaded_after_a_dry_run_in_a_fresh_process(folders: dict[str, Path]) -> None:
    code = """
import sys
from pathlib import Path

import torch

from qadapt.model.load import load_base
from qadapt.model.skeleton import skeleton_base
from qadapt.shape import find_config

options = {"quantization": "nf4", "double_quant": True, "dtype": torch.float32}
skeleton_base(find_config(sys.argv[1]).values, **options)
base = load_base(Path(sys.argv[1]), device=torch.device("cpu"), **options)
assert not any(parameter.is_meta for parameter in base.parameters())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folders["llama"])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_card_normalizes_fp16_scores_without_an_fp32_copy() -> None:
    def scores(dtype: str) -> int:
        setting = dataclasses.replace(
            SETTING, device="cuda", compute_dtype=dtype, length=900, rows=1, supervised_share=0.1
        )
        dry = dry_run(config("gemma2"), setting, capability=7.5)
        return dry.phase_bytes["forward"]

    half_bytes = 2 * 6 * 900 * 900  # without the copy the highest moment is the next one, with half of it
    assert scores("bf16") - scores("fp16") == pytest.approx(half_bytes, rel=0.05)


def test_an_unknown_card_is_dry_run_with_the_kernels_that_the_closed_form_assumes() -> None:
    setting = dataclasses.replace(
        SETTING, device="cuda", compute_dtype="bf16", adapter_dtype="bf16", dropout=0.1
    )
    unknown, new = (dry_run(config("llama"), setting, capability=each) for each in (None, 8.9))
    assert unknown.peak == new.peak
    assert unknown.static["temporary"] == new.static["temporary"] > 0
