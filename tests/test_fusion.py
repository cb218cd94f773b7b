"""Attention over trained adapters: at first their mean, then the paper's formula, however it is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModel
from test_bottleneck import (
    IDS,
    TWO_NORMS,
    assert_tiled_and_offloaded_alike,
    base_of,
    close,
    gradients,
    gradients_by_row,
    packed_gradients,
    padded_batch,
    trained,
)
from test_merge import facts
from test_packing import rows
from torch import Tensor
from two_adapters import PAIRS, fused_pair, members_of, redrawn, trained_adapter
from written_layers import beside, write_out, written_adapter

from qadapt.adapters.check import check_adapter
from qadapt.adapters.facts import write_facts
from qadapt.adapters.fusion import (
    FusionPart,
    Member,
    attach_fusion,
    attended_tensors,
    load_fusion,
    watching_weights,
)
from qadapt.adapters.method import adapted_layers, load_adapter
from qadapt.adapters.side_car import SideCar
from qadapt.adapters.side_car_files import save_side_car
from qadapt.adapters.swap import Swap
from qadapt.cli.main import run as command
from qadapt.engine.arrangement import arrange
from qadapt.errors import BadAdapter, BadRecipe
from qadapt.methods import Fused, check_fused
from qadapt.model.skeleton import skeleton_base
from qadapt.train.attended import attended

HELD = [("sum", "nf4"), ("sum", "none"), ("output", "nf4"), ("stream", "none")]
"""What enters the adapters, and how their base is held."""


def members(tiny_model: TinyModel, sees: str = "sum", *, family: str = "llama") -> list[Member]:
    return members_of([base_of(tiny_model, family) for _ in range(2)], fused_pair(PAIRS[sees]))


def fused(
    tiny_model: TinyModel, sees: str = "sum", *, family: str = "llama", quantization: str = "none"
) -> SideCar:
    """A fusion that has learned."""
    base = base_of(tiny_model, family, quantization=quantization)
    model = attach_fusion(base, members(tiny_model, sees, family=family))
    redrawn(model, seed=7, spread=0.1)
    return model


def naive_adapter(member: Member, name: str, values: Tensor) -> Tensor:
    """The formula of one adapter, with the tensors of its own side-car."""
    front = f"{name}."
    part = {
        key.removeprefix(front): tensor for key, tensor in member.tensors.items() if key.startswith(front)
    }
    factors = member.tensors.get("shared.factors")
    return written_adapter(part, factors, member.bottleneck.activation, values)


def naive_fusion(model: SideCar, given: list[Tensor], name: str, values: Tensor) -> Tensor:
    """Query, key and value of each adapter's output apart, as that library computes them."""
    own = dict(model.parts[name].named_parameters())
    query = values @ own["query.weight"].T + own["query.bias"]
    keys = torch.stack([each @ own["key"].T for each in given], 2)  # (B, T, N, D)
    matrix = torch.eye(values.shape[-1]) + own["value"]
    answers = torch.stack([each @ matrix.T for each in given], 2)
    scores = torch.einsum("btd,btnd->btn", query, keys)
    return torch.einsum("btn,btnd->btd", scores.softmax(-1), answers)


def mean_of(_: SideCar, given: list[Tensor], __: str, ___: Tensor) -> Tensor:
    return torch.stack(given).mean(0)


def written_out(
    model: SideCar,
    own: list[Member],
    sees: str,
    *,
    mixed: Callable[[SideCar, list[Tensor], str, Tensor], Tensor] = naive_fusion,
    has_two_norms: bool = False,
) -> None:
    """Decoder layers written out with a mixture in them; the hooks are switched off."""

    def added(name: str, values: Tensor) -> Tensor:
        return mixed(model, [naive_adapter(each, name, values) for each in own], name, values)

    write_out(model, beside(added, sees=sees), has_two_norms=has_two_norms)


@pytest.mark.parametrize("sees", PAIRS)
def test_the_first_forward_pass_is_that_of_the_mean_of_the_adapters(sees: str, tiny_model: TinyModel) -> None:
    own = members(tiny_model, sees)
    model = attach_fusion(base_of(tiny_model, "llama"), own)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        with model.disable_adapter():
            off = model(input_ids=IDS).logits
    assert torch.equal(off, base_of(tiny_model, "llama")(input_ids=IDS).logits)
    assert not torch.allclose(found, off, atol=1e-2), "a control: the adapters do something"
    written_out(model, own, sees, mixed=mean_of)
    torch.testing.assert_close(found, model(input_ids=IDS).logits.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("sees", PAIRS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_and_gradients_are_those_of_the_formula(family: str, sees: str, tiny_model: TinyModel) -> None:
    model = fused(tiny_model, sees, family=family)
    logits, found = gradients(model)
    with watching_weights(model.parts) as seen, torch.no_grad():
        model(input_ids=IDS)
    assert all(torch.allclose(each.sum(-1), torch.ones(1)) for passes in seen.values() for each in passes)
    weights = torch.cat([each.flatten() for passes in seen.values() for each in passes])
    assert weights.std() > 0.1, "a control: tokens attend to different adapters"
    own = members(tiny_model, sees, family=family)
    written_out(model, own, sees, has_two_norms=family in TWO_NORMS)
    wanted, slopes = gradients(model)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=5e-5)  # fp32, logits up to 30
    assert len(slopes) == len(trained(model)) == 4 * adapted_layers(model)  # type: ignore[arg-type]
    assert close(found, slopes, within=2e-4)


@pytest.mark.parametrize(("sees", "quantization"), HELD)
def test_packed_and_recomputed_gradients_are_those_of_the_formula_one_document_at_a_time(
    sees: str, quantization: str, tiny_model: TinyModel
) -> None:
    model = fused(tiny_model, sees, quantization=quantization).train()
    arrange(model.base, recompute="all", tiles=1, offload=())
    packed = packed_gradients(model)
    naive = fused(tiny_model, sees, quantization=quantization)
    written_out(naive, members(tiny_model, sees), sees)
    wanted = gradients_by_row(naive)
    assert len(wanted) == len(trained(naive))
    assert close(packed, wanted, within=2e-4)


def test_tiled_and_offloaded_steps_have_the_same_gradients(tiny_model: TinyModel) -> None:
    assert_tiled_and_offloaded_alike(lambda: fused(tiny_model, quantization="nf4"))


def test_each_row_of_a_batch_is_its_own_single_run_with_a_cache(tiny_model: TinyModel) -> None:
    model = fused(tiny_model, quantization="nf4").eval()
    prompts, batch, mask = padded_batch()
    told = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    together = model.generate(input_ids=batch, attention_mask=mask, **told)[:, 14:]
    for row, prompt in enumerate(prompts):
        ids = prompt
        with torch.no_grad():
            for _ in range(8):
                ids = torch.cat((ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        assert ids[0, prompt.shape[1] :].tolist() == together[row].tolist()


def test_only_the_attention_is_trained_and_the_adapters_are_counted(tiny_model: TinyModel) -> None:
    model = fused(tiny_model)
    assert {name.rpartition("feed_forward.")[2] for name in trained(model)} == {
        "query.weight", "query.bias", "key", "value",
    }  # fmt: skip
    frozen = attended_tensors(model.get_base_model())
    own = members(tiny_model)
    assert sum(each.numel() for each in frozen.values()) == sum(
        each.numel() for member in own for each in member.tensors.values()
    )
    assert len(model.stored()) == len(trained(model)) + len(frozen)


@pytest.mark.parametrize("sees", PAIRS)
def test_what_is_saved_comes_back_to_the_bit_without_what_it_was_made_of(
    sees: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = fused(tiny_model, sees, family="qwen3", quantization="nf4")
    for parameter in (*trained(model).values(), *attended_tensors(model.base).values()):
        parameter.data = parameter.data.bfloat16()
    logits = model(input_ids=IDS).logits
    save_side_car(model, tmp_path)
    again = load_fusion(base_of(tiny_model, "qwen3", quantization="nf4"), tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, logits)
    assert again.settings == model.settings
    assert [each["name"] for each in again.settings["adapters"]] == ["one", "two"]
    assert not trained(again)
    on = load_fusion(base_of(tiny_model, "qwen3"), tmp_path, is_trainable=True)
    assert trained(on).keys() == trained(model).keys()
    swap = Swap(base_of(tiny_model, "qwen3", quantization="nf4"))
    swap.add("mine", tmp_path)
    swap.use("mine")
    assert torch.equal(swap(input_ids=IDS).logits, logits)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"adapters": []}, r"describe no attention over adapters: \[\]"),
        ({"adapters": None}, "describe no attention over adapters: None"),
        ({"layers": 3}, "for a base whose layers is 3; this base's is 2"),
        ({"model_type": "qwen2"}, "whose model_type is qwen2; this base's is llama"),
    ],
)
def test_settings_that_describe_none_are_refused(
    change: dict[str, Any], problem: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    save_side_car(fused(tiny_model), tmp_path)
    path = tmp_path / "side_car.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(BadAdapter, match=problem):
        load_adapter(base_of(tiny_model, "llama"), tmp_path)


def test_adapters_that_are_described_wrongly_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    save_side_car(fused(tiny_model), tmp_path / "whole")
    for number, (change, problem) in enumerate(
        (
            ({"width": 6}, r"does not fit its settings: layers.0.feed_forward.adapters.0.down"),
            ({"kind": "lora"}, "describe no bottleneck"),
            ({"kind": "parallel", "first_layer": 1}, "describe no attention over adapters"),
            ({"kind": "parallel"}, "describe no attention over adapters"),
            ({"name": 3}, "describe no attention over adapters"),
        )
    ):
        place = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", place)
        settings = json.loads((place / "side_car.json").read_text("utf-8"))
        settings["adapters"][0] |= change
        (place / "side_car.json").write_text(json.dumps(settings), "utf-8")
        with pytest.raises(BadAdapter, match=problem):
            load_adapter(base_of(tiny_model, "llama"), place)


def test_an_adapter_that_would_drown_its_base_is_found_within_a_fusion(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    save_side_car(fused(tiny_model), tmp_path)
    values = json.loads((tiny_model("llama") / "config.json").read_text("utf-8"))

    def base() -> Any:
        return skeleton_base(values, quantization="none", double_quant=False, dtype=torch.float32)

    check_adapter(tmp_path, base())
    path = tmp_path / "side_car.json"
    settings = json.loads(path.read_text("utf-8"))
    settings["adapters"][1]["scale"] = -3e6
    path.write_text(json.dumps(settings), "utf-8")
    with pytest.raises(BadAdapter, match=r"would drown its base: its scale is -3e\+06, more than 10000"):
        check_adapter(tmp_path, base())


def test_what_is_attended_to_is_the_mean_over_all_tokens_and_takes_no_logits(tiny_model: TinyModel) -> None:
    model, chosen = fused(tiny_model), rows((5, 40, 1))
    with watching_weights(model.parts) as seen, torch.no_grad():
        for row in chosen:
            model(input_ids=torch.from_numpy(row.ids).long()[None])
    wanted = {name: torch.cat(passes, 1)[0].mean(0).tolist() for name, passes in seen.items()}
    made: list[int] = []
    model.base.get_output_embeddings().register_forward_hook(lambda _, __, out: made.append(out.shape[1]))
    found = attended(model, chosen)
    assert made == [1, 1, 1]
    assert [f"layers.{each.layer}.{each.place}" for each in found] == list(wanted)
    for each, mean in zip(found, wanted.values(), strict=True):
        assert list(each.weights) == ["one", "two"]
        assert list(each.weights.values()) == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(
    "words",
    [
        ("both=2",),
        ("both=0.5", "both=0.5"),
        ("one=0.5", "both=0.5"),
        ("both=1", "--rank", "4"),
        ("both=1", "--how", "upper", "--density", "0.5"),
    ],
)
def test_of_a_fusion_no_sum_and_no_mean_is_made_but_a_copy(
    words: tuple[str, ...],
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    lone = trained_adapter(base_of(tiny_model, "llama"), fused_pair()[0], seed=0)
    for name, model in (("both", fused(tiny_model)), ("one", lone)):
        Path(name).mkdir()
        save_side_car(model, Path(name))
        write_facts(facts(), Path(name))
    assert command(["adapters", "combine", *words, "--to", "out"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "both is a fusion, which decides token by token" in said
    assert "Alone with the weight 1 it is copied. For a fusion of" in said
    assert "bottleneck" not in said.lower()
    assert not Path("out").exists()
    assert command(["adapters", "combine", "both=1", "--to", "out"]) == 0
    assert Path("out/side_car.safetensors").read_bytes() == Path("both/side_car.safetensors").read_bytes()


def test_adapters_that_no_attention_can_be_over_are_refused(tiny_model: TinyModel) -> None:
    one, two = fused_pair()
    with pytest.raises(BadRecipe, match=r"two adapters are called one, .*\n.*--as NAME"):
        check_fused([one, Fused("one", *list(vars(two).values())[1:])])
    with pytest.raises(
        BadRecipe,
        match=r"one \(Pfeiffer adapters\) is after the feed-forward part, of the sum, from layer 0 on, two "
        r"\(Compacter\+\+\) after the feed-forward part, of the sum, from layer 3 on; attention is over "
        r"adapters at the same places.\n",
    ):
        check_fused([one, fused_pair(first_layer=3)[1]])
    own = members(tiny_model)
    other = members(tiny_model, "output")
    with pytest.raises(BadRecipe, match=r"two \(Compacter\) after the feed-forward part and after attention"):
        attach_fusion(base_of(tiny_model, "llama"), [own[0], other[1]])


def test_adapters_of_the_upper_layers_alone_are_attended_over_there(tiny_model: TinyModel) -> None:
    own = members_of([base_of(tiny_model, "llama", layers=3) for _ in range(2)], fused_pair(first_layer=1))
    model = attach_fusion(base_of(tiny_model, "llama", layers=3), own)
    parts = [name for name, part in model.parts.items() if isinstance(part, FusionPart)]
    assert parts == ["layers.1.feed_forward", "layers.2.feed_forward"]
    assert gradients(model)[1].keys() == trained(model).keys()
