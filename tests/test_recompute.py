"""Which layers recompute: exactly those asked for, and the same gradients, to the bit, whichever they are."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModel
from peft import PeftModel
from test_dryrun import SETTING, config, counted
from test_estimate import build, folders, shape_of
from torch.nn import functional
from transformers import GradientCheckpointingLayer, PreTrainedModel

from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.engine import boundaries
from qadapt.engine.arrangement import arrange
from qadapt.engine.boundaries import Boundaries, offload_boundaries, offloads_boundaries
from qadapt.engine.documents import documents_of, isolating
from qadapt.engine.ledger import Ledger
from qadapt.engine.recompute import set_recompute
from qadapt.engine.target import Target, on_target
from qadapt.engine.tiles import Tiled, set_tiles, tiles_of
from qadapt.errors import Unsupported
from qadapt.model.load import load_base
from qadapt.plan.estimate import disk_parts, estimate_step
from qadapt.train.dryrun import dry_run
from qadapt.train.pinned import PinnedWatch
from qadapt.train.stored_plan import Ingredients, StoredPlan, read_plan

__all__ = ["folders"]  # a fixture
FAMILIES = ("llama", "gemma2", "phi3")


def base_of(folder: Path) -> PreTrainedModel:
    return load_base(
        folder, quantization="nf4", double_quant=True, dtype=torch.float32, device=torch.device("cpu")
    )


def gradients(
    base: PreTrainedModel, *, dropout: float = 0.0, packed: bool = False, times: int = 1
) -> dict[str, torch.Tensor]:
    """Of the adapter, the cross-entropy of all tokens summed up naively; packed, of two documents."""
    lora = Lora(rank=4, alpha=8, dropout=dropout)
    model: PeftModel = attach_lora(base, lora, dtype=torch.float32, seed=0).train()
    parameters = trainable(model)
    draw = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    ids = torch.randint(3, 90, (1, 46) if packed else (2, 23), generator=draw)
    named: dict[str, Any] = {}
    if packed:
        documents = documents_of((19, 26))
        named = {"documents": documents, "position_ids": documents.position_ids}
    for _ in range(times):
        torch.manual_seed(3)
        with isolating(model) if packed else nullcontext():
            logits = model(input_ids=ids[:, :-1], use_cache=False, **named).logits
            functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_to_the_bit_whichever_layers_recompute(
    family: str, tiny_model: TinyModel
) -> None:
    kept = gradients(base_of(tiny_model(family, layers=4)))
    assert len(kept) > 4
    for recompute in ("none", 1, 3, "all"):
        base = base_of(tiny_model(family, layers=4))
        set_recompute(base, recompute)  # type: ignore[arg-type]
        found = gradients(base)
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[name], kept[name]) for name in kept), recompute


@pytest.mark.parametrize(
    ("recompute", "flags"),
    [
        ("none", [False] * 4),
        (1, [True, False, False, False]),
        (3, [True, True, True, False]),
        ("all", [True] * 4),
    ],
)
def test_the_first_layers_recompute_and_run_twice(
    recompute: Any, flags: list[bool], tiny_model: TinyModel
) -> None:
    base = base_of(tiny_model("llama", layers=4))
    set_recompute(base, recompute)
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert [layer.gradient_checkpointing for layer in layers] == flags
    runs = [0] * len(layers)
    for place, layer in enumerate(layers):
        inner = next(module for name, module in layer.named_modules() if name == "mlp")

        def count(*_: object, place: int = place) -> None:
            runs[place] += 1

        inner.register_forward_pre_hook(count)  # before: the second run stops at the last value needed
    gradients(base)
    assert runs == [1 + recomputes for recomputes in flags]


def test_layers_are_not_renamed(tiny_model: TinyModel) -> None:
    base = base_of(tiny_model("llama", layers=4))
    names = [name for name, _ in base.named_modules()]
    set_recompute(base, 2)
    assert [name for name, _ in base.named_modules()] == names


@pytest.mark.parametrize("recompute", ["all", "none", 2])
def test_a_stored_plan_keeps_which_layers_recompute(recompute: Any, tmp_path: Path) -> None:
    plan = StoredPlan(
        steps=1,
        device="cpu",
        micro_batch=1,
        recompute=recompute,
        compute_dtype="fp32",
        adapter_dtype="fp32",
        optimizer="adamw",
        predicted={},
        predicted_peak_bytes=0,
        budget_bytes=0,
        reasons=("because",),
        revision=None,
        ingredients=Ingredients("a", "b", "c"),
    )
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.values()), encoding="utf-8")
    assert read_plan(path) == plan
    assert plan.event().recompute == recompute


@pytest.mark.parametrize(
    ("recompute", "dropout", "packed"),
    [("all", 0.3, False), ("all", 0.0, True), (2, 0.3, True), ("none", 0.0, False)],
)
def test_boundaries_that_were_away_give_the_same_gradients_to_the_bit(
    recompute: Any, dropout: float, packed: bool, tiny_model: TinyModel
) -> None:
    found = []
    for is_away in (False, True):
        base = base_of(tiny_model("llama", layers=4))
        set_recompute(base, recompute)
        if is_away:
            offload_boundaries(base)
            offload_boundaries(base)  # once is enough
        assert offloads_boundaries(base) is is_away
        found.append(gradients(base, dropout=dropout, packed=packed, times=2))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(("before", "recompute", "layers"), [(None, 1, 1), (1, 3, 3), (2, "all", 4)])
def test_of_each_recomputed_layer_one_tensor_is_put_away_once_a_pass(
    before: Any, recompute: Any, layers: int, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after more layers recompute; whatever the library, which up to 5.20 hooks recomputation, too."""
    away: list[torch.Size] = []
    put_away = Boundaries.put_away

    def count(self: Boundaries, tensor: torch.Tensor) -> Any:
        away.extend([tensor.shape] if tensor.numel() else [])
        return put_away(self, tensor)

    monkeypatch.setattr(Boundaries, "put_away", count)
    base = base_of(tiny_model("llama", layers=4))
    if before is not None:
        set_recompute(base, before)
    offload_boundaries(base)
    set_recompute(base, recompute)
    gradients(base, times=2)
    assert away == [(2, 22, base.config.hidden_size)] * 2 * layers


@pytest.mark.parametrize(
    ("family", "recompute", "packed"),
    [
        ("llama", "none", True),
        ("llama", "all", True),
        ("llama", 2, False),
        ("gemma2", "none", False),
        ("gemma2", "all", False),
        ("phi3", "all", False),
    ],
)
def test_pieces_give_the_gradients_of_the_whole(
    packed: bool, recompute: Any, family: str, tiny_model: TinyModel
) -> None:
    whole = gradients(base_of(tiny_model(family, layers=4)), packed=packed)
    for tiles in (3, 64):  # one with a smaller last piece, one with pieces of one token
        base = base_of(tiny_model(family, layers=4))
        arrange(base, recompute=recompute, tiles=tiles, offload=("boundaries",))
        found = gradients(base, packed=packed)
        for name, gradient in whole.items():
            torch.testing.assert_close(
                found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()
            )


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_masks_of_pieces_are_the_same_when_they_are_computed_again(
    recompute: Any, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for is_naive in (True, False):
        base = base_of(tiny_model("llama", layers=4))
        set_tiles(base, 5)
        if is_naive:  # the pieces one after another in plain autograd

            def plain(self: Tiled, values: torch.Tensor) -> torch.Tensor:
                return torch.cat([self.whole(piece) for piece in self.pieces(values)], dim=1).view(
                    values.shape
                )

            monkeypatch.setattr(Tiled, "__call__", plain)
        else:
            set_recompute(base, recompute)
            monkeypatch.undo()
        found.append(gradients(base, dropout=0.3))
    for name, gradient in found[0].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()
        )


def test_gradients_of_pieces_are_summed_in_fp32() -> None:
    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values * self.weight

    module = Scale()
    tiled = Tiled(module, 1024, within=nullcontext)
    tiled(torch.ones(1, 1024, 1, dtype=torch.bfloat16)).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.item() == 1024  # one at a time in bf16 it would stop at 256


def test_names_stay_and_one_piece_is_the_librarys_own(tiny_model: TinyModel) -> None:
    base = base_of(tiny_model("llama", layers=4))
    names, kept = (
        [name for name, _ in base.named_modules()],
        gradients(base_of(tiny_model("llama", layers=4))),
    )
    set_tiles(base, 1)
    assert tiles_of(base) == 0
    set_tiles(base, 4)
    set_tiles(base, 1)
    assert (tiles_of(base), [name for name, _ in base.named_modules()]) == (1, names)
    found = gradients(base)
    assert all(torch.equal(found[name], kept[name]) for name in kept)


def test_pieces_of_an_unproven_architecture_are_refused(tiny_model: TinyModel) -> None:
    base = base_of(tiny_model("llama", layers=4))
    base.config.model_type = "mixtral"
    with pytest.raises(
        Unsupported, match="the feed-forward part of mixtral cannot be computed in pieces"
    ) as error:
        set_tiles(base, 2)
    assert "shorter rows" in error.value.cure


POLICIES = [
    ("llama", {"offload": ("boundaries",)}),
    ("llama", {"offload": ("boundaries",), "mlp_tiles": 4}),
    ("llama", {"offload": ("boundaries",), "compute_dtype": "bf16", "adapter_dtype": "bf16", "recompute": 2}),
    ("gemma2", {"mlp_tiles": 3, "recompute": "none"}),
    ("phi3", {"mlp_tiles": 3, "offload": ("boundaries",), "accumulates": True}),
    ("llama", {"mlp_tiles": 4, "dropout": 0.1}),
]


@pytest.mark.parametrize(("family", "changes"), POLICIES)
def test_the_dry_run_is_the_step_to_the_byte_whatever_the_policy(
    family: str, changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    setting = dataclasses.replace(SETTING, **changes)
    assert dry_run(config(family), setting).peak == counted(folders[family], setting).peak


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_the_device_boundaries_take_no_more_with_more_layers(device: Any) -> None:
    def peak(layers: int, offload: Any) -> tuple[int, int]:
        setting = dataclasses.replace(
            SETTING, device=device, length=900, rows=1, supervised_share=0.01, offload=offload
        )
        dry = dry_run(config("llama") | {"num_hidden_layers": layers}, setting, capability=8.6)
        return dry.peak.bytes - sum(dry.static.values()), dry.host_bytes

    boundary, gradients_bytes = 900 * 192 * 4, 5 * 80_000
    assert peak(9, ())[0] - peak(4, ())[0] >= 5 * boundary
    away = [peak(layers, ("boundaries",)) for layers in (4, 9)]
    assert away[1][0] - away[0][0] < gradients_bytes
    if device == "cuda":
        assert [host for _, host in away] == [4 << 20, 9 << 20]  # whole pieces of 1 MiB


def test_rooms_are_used_again_and_only_two_tensors_are_on_the_card() -> None:
    boundaries, on_card = Boundaries(), Target(8.6)
    there = torch.empty(3, 1_000_000, device="meta")
    with on_target(on_card), Ledger() as ledger:
        for rows in (3, 2, 3, 1):
            kept = [boundaries.put_away(torch.empty(rows, 1_000_000, device="meta")) for _ in range(5)]
            assert ledger.live_bytes == rows * 4_000_000  # the last one
            while kept:
                boundaries.bring_back(kept.pop())
        assert ledger.peak.bytes <= 2 * there.nbytes
        assert ledger.host_bytes == ledger.host_peak_bytes == 5 * 12 << 20


def test_without_pinned_memory_boundaries_wait_in_ordinary_memory_and_that_is_said_once(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for is_away in (False, True):
        base = base_of(tiny_model("llama", layers=4))
        set_recompute(base, "all")
        if is_away:
            monkeypatch.setattr(boundaries, "_place_for", lambda tensor: boundaries._Host(tensor.device))
            offload_boundaries(base)
        watch = PinnedWatch(base)
        assert list(watch.after_step(0)) == [], "nothing has been put away yet"
        found.append(gradients(base, times=2))
        said = [event.message for event in (*watch.after_step(1), *watch.after_step(2))]
        assert len(said) == is_away
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert said[0].startswith("The system gave too little pinned memory")


def test_the_file_of_boundaries_has_no_name_and_its_room_is_used_again() -> None:
    boundaries = Boundaries()
    tensors = [torch.randn(3, 50).to(torch.bfloat16) for _ in range(4)]
    for _ in range(3):
        kept = [boundaries.put_away(each) for each in tensors]
        for each in reversed(tensors):
            assert torch.equal(boundaries.bring_back(kept.pop()), each)
        assert boundaries._place._end == 4 * 300  # type: ignore[union-attr]
    if os.name == "posix":
        assert os.fstat(boundaries._place._file.fileno()).st_nlink == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(("recompute", "dtype"), [("all", "fp32"), (2, "bf16")])
def test_the_disk_that_a_cpu_s_boundaries_take_is_counted_to_the_byte(
    recompute: Any, dtype: Any, folders: dict[str, Path]
) -> None:
    setting = dataclasses.replace(
        SETTING, device="cpu", compute_dtype=dtype, recompute=recompute, offload=("boundaries",)
    )
    model = build(folders["llama"], setting)
    ids = torch.randint(3, 1003, (setting.rows, setting.length))
    model(input_ids=ids, use_cache=False).logits.float().sum().backward()
    taken = boundaries._OFFLOADED[model.get_base_model()]._place._end  # type: ignore[union-attr]
    estimate, disk = estimate_step(shape_of("llama"), setting), disk_parts(shape_of("llama"), setting)
    assert disk["boundaries"] == taken > 0
    assert estimate.disk_bytes == sum(disk.values())
    assert "boundaries" not in disk_parts(shape_of("llama"), dataclasses.replace(setting, device="cuda"))


def test_a_file_of_boundaries_that_was_cut_is_an_error() -> None:
    boundaries = Boundaries()
    kept = boundaries.put_away(torch.randn(3, 50))
    boundaries._place._file.truncate(100)  # type: ignore[union-attr]
    with pytest.raises(EOFError, match="ends before what was written"):
        boundaries.bring_back(kept)


def test_only_the_host_has_more_where_rows_get_longer_and_the_closed_form_says_so() -> None:
    from qadapt.shape import shape_from_config

    def both(**changes: Any) -> tuple[int, int]:
        setting = dataclasses.replace(
            SETTING, device="cuda", compute_dtype="bf16", adapter_dtype="bf16", rows=1, length=999, **changes
        )
        dry = dry_run(config("llama"), setting, capability=8.9)
        shape = shape_from_config(config("llama"), name="tiny")
        estimate = estimate_step(shape, setting)
        assert estimate.peak_allocated_bytes == pytest.approx(dry.peak.bytes, rel=0.03)
        assert estimate.pinned_bytes == dry.host_bytes
        return dry.peak.bytes, dry.host_bytes

    plain, away = both(), both(offload=("boundaries",), mlp_tiles=4)
    assert away[0] < plain[0]
    assert away[1] > 0 == plain[1]
