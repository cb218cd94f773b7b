"""A bottleneck adapter trained on a frozen one: its gradients by hand, its folder, and stacks with others."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import TinyModel
from test_bottleneck import (
    IDS,
    SEES,
    TWO_NORMS,
    assert_tiled_and_offloaded_alike,
    base_of,
    close,
    gradients,
    gradients_by_row,
    packed_gradients,
    padded_batch,
    trained,
    width_of,
)
from test_fusion import naive_adapter
from torch import Tensor
from two_adapters import members_of, redrawn, trained_adapter
from written_layers import beside, write_out

from qadapt.adapters.average import average
from qadapt.adapters.bottleneck import Bottleneck, Kind, load_bottleneck, places_of
from qadapt.adapters.fusion import Member, read_member
from qadapt.adapters.method import adapted_layers, load_adapter
from qadapt.adapters.side_car import SideCar
from qadapt.adapters.side_car_files import save_side_car
from qadapt.adapters.stack import attach_stack, load_stack, lower_tensors
from qadapt.adapters.swap import Swap
from qadapt.engine.arrangement import arrange
from qadapt.errors import BadAdapter, BadRecipe, Unsupported
from qadapt.methods import Fused, Method, dropped_layers
from qadapt.stacking import check_on, stands_on

PAIRS: tuple[tuple[Kind, Kind], ...] = (
    ("pfeiffer", "pfeiffer"),
    ("houlsby", "parallel"),
    ("compacterplus", "houlsby"),
    ("parallel", "compacter"),
)
"""Below, and on it."""


def language(kind: Kind = "pfeiffer", *, first_layer: int = 0) -> Fused:
    return Fused(
        "language", kind, 2 * width_of(kind), "silu", norm=kind == "houlsby", first_layer=first_layer
    )


def task(kind: Kind = "pfeiffer", *, first_layer: int = 0) -> Bottleneck:
    is_normed = kind == "parallel"
    return Bottleneck(kind, width_of(kind), "relu", scale=1.5, norm=is_normed, first_layer=first_layer)


def below(tiny_model: TinyModel, kind: Kind, *, family: str = "llama", layers: int = 2) -> Member:
    return members_of([base_of(tiny_model, family, layers=layers)], [language(kind)])[0]


def stacked(
    tiny_model: TinyModel, pair: tuple[Kind, Kind] = PAIRS[0], *, family: str = "llama", held: str = "none"
) -> SideCar:
    """A stack whose upper adapter has learned."""
    lower = below(tiny_model, pair[0], family=family)
    model = attach_stack(base_of(tiny_model, family, quantization=held), task(pair[1]), lower)
    redrawn(model, seed=7, spread=0.2)
    return model


def written_out(model: SideCar, lower: Member, kind: Kind, *, has_two_norms: bool = False) -> None:
    """Decoder layers written out with both adapters in them; the hooks are switched off."""
    live = {
        f"{name}.{key}": each
        for name, part in model.parts.items()
        for key, each in part.stored().items()
        if not part.is_below
    }
    both = lower, Member("task", task(kind), "", live)

    def changed(name: str, out: Tensor, stream: Tensor) -> Tensor:
        for each in both:
            one = beside(partial(naive_adapter, each), sees=SEES[each.bottleneck.kind])
            out = one(name, out, stream)
        return out

    write_out(model, changed, has_two_norms=has_two_norms)


def saved(tiny_model: TinyModel, folder: Path, *, seed: int, kind: Kind = "pfeiffer") -> Path:
    """The folder of an adapter of the base alone."""
    folder.mkdir()
    save_side_car(trained_adapter(base_of(tiny_model, "llama"), language(kind), seed=seed), folder)
    return folder


def saved_stack(tiny_model: TinyModel, folder: Path, language: Path) -> Path:
    folder.mkdir()
    base = base_of(tiny_model, "llama")
    model = attach_stack(base, task(), read_member(base, language, "language"))
    redrawn(model, seed=7, spread=0.2)
    save_side_car(model, folder)
    return folder


@pytest.mark.parametrize("pair", PAIRS)
def test_the_first_forward_pass_is_that_of_the_lower_adapter_to_the_bit(
    pair: tuple[Kind, Kind], tiny_model: TinyModel
) -> None:
    base = base_of(tiny_model, "gemma2")
    before = base(input_ids=IDS).logits
    model = attach_stack(base, task(pair[1]), below(tiny_model, pair[0], family="gemma2"))
    alone = trained_adapter(base_of(tiny_model, "gemma2"), language(pair[0]), seed=0)
    wanted = alone(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, wanted)
    assert not torch.allclose(wanted, before, atol=1e-2), "a control: the lower one does something"
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_and_gradients_are_those_of_both_written_out(
    family: str, pair: tuple[Kind, Kind], tiny_model: TinyModel
) -> None:
    model = stacked(tiny_model, pair, family=family)
    logits, found = gradients(model)
    lower = below(tiny_model, pair[0], family=family)
    written_out(model, lower, pair[1], has_two_norms=family in TWO_NORMS)
    wanted, slopes = gradients(model)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=5e-5)  # fp32, logits up to 30
    assert len(slopes) == len(trained(model)) > 4
    assert not any("below" in name for name in slopes)
    assert close(found, slopes, within=2e-4)


@pytest.mark.parametrize(("pair", "held"), [(PAIRS[0], "nf4"), (PAIRS[0], "none"), (PAIRS[2], "nf4")])
def test_packed_and_recomputed_gradients_are_those_of_both_one_document_at_a_time(
    pair: tuple[Kind, Kind], held: str, tiny_model: TinyModel
) -> None:
    model = stacked(tiny_model, pair, held=held).train()
    arrange(model.base, recompute="all", tiles=1, offload=())
    packed = packed_gradients(model)
    naive = stacked(tiny_model, pair, held=held)
    written_out(naive, below(tiny_model, pair[0]), pair[1])
    wanted = gradients_by_row(naive)
    assert len(wanted) == len(trained(naive))
    assert close(packed, wanted, within=2e-4)


def test_tiled_and_offloaded_steps_have_the_same_gradients(tiny_model: TinyModel) -> None:
    assert_tiled_and_offloaded_alike(lambda: stacked(tiny_model, held="nf4"))


@pytest.mark.parametrize("pair", PAIRS)
def test_the_lower_adapter_stays_as_it_was_to_the_bit(pair: tuple[Kind, Kind], tiny_model: TinyModel) -> None:
    lower, model = below(tiny_model, pair[0]), stacked(tiny_model, pair).train()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0.1)
    before = {name: each.detach().clone() for name, each in trained(model).items()}
    for _ in range(2):
        gradients(model)
        optimizer.step()
    assert not any(torch.equal(each, before[name]) for name, each in trained(model).items())
    stored = {name: each for name, each in model.stored().items() if name.startswith("below.")}
    assert stored.keys() == {f"below.{name}" for name in lower.tensors}
    assert all(torch.equal(stored[f"below.{name}"], each) for name, each in lower.tensors.items())
    frozen = lower_tensors(model.get_base_model())
    assert {id(each) for each in stored.values()} == {id(each) for each in frozen.values()}
    assert adapted_layers(model) == 2 * len(places_of(pair[1]))  # type: ignore[arg-type]


@pytest.mark.parametrize("pair", PAIRS)
def test_what_is_saved_comes_back_to_the_bit_without_what_it_stands_on(
    pair: tuple[Kind, Kind], tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = stacked(tiny_model, pair, family="qwen3", held="nf4")
    for parameter in (*trained(model).values(), *lower_tensors(model.base).values()):
        parameter.data = parameter.data.bfloat16()
    logits = model(input_ids=IDS).logits
    save_side_car(model, tmp_path)
    again = load_adapter(base_of(tiny_model, "qwen3", quantization="nf4"), tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, logits)
    assert isinstance(again, SideCar)
    assert again.settings == model.settings
    assert (again.settings["below"]["name"], again.settings["kind"]) == ("language", pair[1])
    assert not trained(again)
    on = load_stack(base_of(tiny_model, "qwen3"), tmp_path, is_trainable=True)
    assert trained(on).keys() == trained(model).keys()
    swap = Swap(base_of(tiny_model, "qwen3", quantization="nf4"))
    swap.add("mine", tmp_path)
    assert swap.names == ("mine",)
    swap.use("mine")
    assert swap.chosen == (("mine",),)
    assert torch.equal(swap(input_ids=IDS).logits, logits)
    with swap.disable_adapter():
        bare = swap(input_ids=IDS).logits
    assert torch.equal(bare, base_of(tiny_model, "qwen3", quantization="nf4")(input_ids=IDS).logits)


def test_in_a_stack_another_language_takes_the_place_of_the_one_it_was_trained_on(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    own, other = (saved(tiny_model, tmp_path / name, seed=seed) for seed, name in enumerate(("own", "other")))
    whole = saved_stack(tiny_model, tmp_path / "task", own)
    swap = Swap(base_of(tiny_model, "llama"))
    for name, folder in (("own", own), ("other", other), ("task", whole)):
        swap.add(name, folder)

    def logits(*names: str) -> Tensor:
        swap.stack(names)
        return cast(Tensor, swap(input_ids=IDS).logits)

    loaded = load_stack(base_of(tiny_model, "llama"), whole)
    alone, moved = logits("task"), logits("other", "task")
    assert torch.equal(alone, loaded(input_ids=IDS).logits)
    assert torch.equal(logits("own", "task"), alone)
    assert not torch.allclose(moved, alone, atol=1e-2)
    base = base_of(tiny_model, "llama")
    elsewhere = attach_stack(base, task(), read_member(base, other, "other"))
    redrawn(elsewhere, seed=7, spread=0.2)
    torch.testing.assert_close(moved, elsewhere(input_ids=IDS).logits, rtol=0, atol=2e-5)
    with swap.rows(["task", ("other", "task")]):
        rows = swap(input_ids=IDS).logits
    torch.testing.assert_close(rows, torch.stack((alone[0], moved[1])), rtol=0, atol=2e-5)
    assert swap.chosen == (("own", "task"),)
    swap.remove("task")
    assert swap.names == ("own", "other")
    assert swap.chosen == ()
    swap.use("own")
    only = load_bottleneck(base_of(tiny_model, "llama"), own)
    assert torch.equal(swap(input_ids=IDS).logits, only(input_ids=IDS).logits)
    with pytest.raises(BadAdapter, match="There is no adapter below task in memory"):
        swap.use("below task")
    swap.add("below task", other)  # a name like that of what a stack brings with it
    swap.add("task", whole)
    assert torch.equal(logits("task"), alone)
    swap.remove("task")
    assert swap.names == ("own", "other", "below task")
    assert torch.equal(logits("below task"), logits("other"))


def test_each_row_of_a_batch_is_its_own_single_run_with_a_cache(tiny_model: TinyModel) -> None:
    model = stacked(tiny_model, held="nf4").eval()
    prompts, batch, mask = padded_batch()
    told = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    together = model.generate(input_ids=batch, attention_mask=mask, **told)[:, 14:]
    for row, prompt in enumerate(prompts):
        ids = prompt
        with torch.no_grad():
            for _ in range(8):
                ids = torch.cat((ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        assert ids[0, prompt.shape[1] :].tolist() == together[row].tolist()


def test_each_of_both_is_in_its_own_layers(tiny_model: TinyModel) -> None:
    lower = members_of([base_of(tiny_model, "llama", layers=3)], [language(first_layer=1)])[0]
    model = attach_stack(base_of(tiny_model, "llama", layers=3), task(first_layer=2), lower)
    assert list(model.parts) == [
        "below.layers.1.feed_forward", "below.layers.2.feed_forward", "layers.2.feed_forward",
    ]  # fmt: skip
    redrawn(model, seed=7, spread=0.2)
    assert gradients(model)[1].keys() == trained(model).keys()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"below": None}, "do not say on which other it stands: None"),
        ({"below": {"name": "language"}}, "do not say on which other it stands"),
        ({"below": {"name": "language", "sha256": "0", "kind": "lora"}}, "describe no bottleneck"),
        ({"layers": 3}, "for a base whose layers is 3; this base's is 2"),
        ({"width": 6}, "does not fit its settings: layers.0.feed_forward.down.bias"),
    ],
)
def test_settings_that_describe_no_stack_are_refused(
    change: dict[str, Any], problem: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    save_side_car(stacked(tiny_model), tmp_path)
    path = tmp_path / "side_car.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(BadAdapter, match=problem):
        load_adapter(base_of(tiny_model, "llama"), tmp_path)


def test_stacks_have_no_mean(tiny_model: TinyModel, tmp_path: Path) -> None:
    save_side_car(stacked(tiny_model), tmp_path)
    with pytest.raises(Unsupported, match=r"stands on the adapter language: only .*\n.*without `on:`"):
        average([(tmp_path, 0.5), (tmp_path, 0.5)])


def test_targets_name_what_an_adapter_stands_on_and_its_layers() -> None:
    targets = ("layers.3-", "on:runs/english")
    assert stands_on(targets) == "runs/english"
    assert dropped_layers("pfeiffer", targets) == 3
    assert dropped_layers("pfeiffer", ("on:english",)) == 0
    assert not stands_on("all-linear")
    assert not stands_on(("layers.3-",))


@pytest.mark.parametrize(
    ("method", "targets", "problem"),
    [
        ("lora", ("q_proj", "on:english"), r"on:english: LoRA stands on no other adapter.\nSet .*method to "
         r"one of houlsby, .*`qadapt export english --form merged-fp16`"),
        ("fusion", ("on:english", "b"), "AdapterFusion stands on no other adapter"),
        ("pfeiffer", ("on:a", "on:b"), r"on:a, on:b: an adapter stands on one other.\nName one"),
        ("pfeiffer", ("on:",), "on:: there is no name"),
    ],
)  # fmt: skip
def test_what_cannot_stand_on_another_is_refused(
    method: Method, targets: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(BadRecipe, match=problem):
        check_on(method, targets)
