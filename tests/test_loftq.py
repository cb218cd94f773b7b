"""LoftQ: it starts as the best update for what quantizing lost, and is of use on that base alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from test_estimate import CPU, shape_of
from test_methods import FP32, attached, base_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapt.adapters.facts import AdapterFacts, mends_base, read_facts
from qadapt.adapters.loftq import start_from_error
from qadapt.adapters.lora import Lora, attach_lora, save_adapter
from qadapt.adapters.method import Adapter, attach
from qadapt.engine.linear import dense_weight
from qadapt.errors import BadExport, BadRecipe, Unsupported
from qadapt.export.card import CardFacts, Made, card_text
from qadapt.export.combine import combine
from qadapt.export.merge import merge
from qadapt.model.original import original_weights
from qadapt.plan.setting import check_setting
from qadapt.run import load, train

if TYPE_CHECKING:
    from conftest import TinyModel

IDS = torch.arange(3, 43).view(2, 20)


def lost(folder: Path, quantization: str, *, rank: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """What quantizing took from each layer, and what the start gives back."""
    base = base_of(folder, quantization=quantization)
    with original_weights(folder) as originals:
        adapter = Adapter("loftq", rank, 3 * rank)
        model = attach(base, adapter, dtype=FP32, seed=0, originals=originals)
        for path, layer in model.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                error = originals(f"{path}.weight").float() - dense_weight(layer.get_base_layer(), FP32)
                pair = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                yield error, layer.scaling["default"] * pair.detach()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_start_is_the_best_update_of_its_rank_for_what_was_lost(
    quantization: str, tiny_model: TinyModel
) -> None:
    found = list(lost(tiny_model("qwen2"), quantization))
    assert len(found) == 2 * 7
    for error, start in found:
        best = torch.linalg.svdvals(error)[4:].norm()
        left = torch.linalg.norm(error - start)
        assert best <= left * (1 + 1e-5) <= 1.01 * best, "the error's spectrum is nearly flat: 1 % is much"
        assert left < torch.linalg.norm(error)


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
def test_the_first_pass_is_nearer_to_the_unquantized_model(dtype: torch.dtype, tiny_model: TinyModel) -> None:
    folder = tiny_model("qwen2")
    base = base_of(folder, dtype=dtype)
    with original_weights(folder) as originals:
        model = attach(base, Adapter("loftq", 32, 32), dtype=FP32, seed=0, originals=originals).eval()
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32)(input_ids=IDS).logits
        mended = (model(input_ids=IDS).logits.float() - exact).norm()
        with model.disable_adapter():
            plain = (model(input_ids=IDS).logits.float() - exact).norm()
    assert mended < 0.8 * plain


def test_on_a_base_that_lost_nothing_it_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(BadRecipe, match="LoftQ starts from what quantizing took") as refused:
        attached("loftq", tiny_model("llama"), quantization="none")
    assert "model.quantization=nf4" in refused.value.cure
    with pytest.raises(BadRecipe, match=r"model\.quantization = none"):
        check_setting(shape_of("llama"), replace(CPU, method="loftq", quantization="none"))


def test_the_start_is_drawn_by_the_seed_alone(tiny_model: TinyModel) -> None:
    folder, starts = tiny_model("llama"), []
    for noise in (1, 2):
        model = attach_lora(base_of(folder), Lora(4, 8), dtype=FP32, seed=noise)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        with original_weights(folder) as originals:
            start_from_error(model, originals, seed=7)
        assert torch.equal(before, torch.get_rng_state())
        starts.append([p.detach().clone() for n, p in model.named_parameters() if "lora_" in n])
    assert all(torch.equal(*pair) for pair in zip(*starts, strict=True))


def saved(folder: Path, place: Path) -> Path:
    facts = AdapterFacts(str(folder), None, "", "nf4", True, "fp32", "", mends_base=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    save_adapter(attached("loftq", folder), place, facts=facts, tokenizer=tokenizer)
    return place


def test_on_the_published_weights_it_is_merged_by_nobody(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    adapter = saved(folder, tmp_path / "adapter")
    asked = {"model_folder": folder, "adapter_folder": adapter, "form": "merged-fp32"}
    with pytest.raises(BadExport, match=r"what nf4 took from its base \(LoftQ\)") as refused:
        list(merge(target=tmp_path / "out", base="original", **asked))  # type: ignore[arg-type]
    assert "dequantized" in refused.value.cure
    list(merge(target=tmp_path / "out", base="dequantized", **asked))  # type: ignore[arg-type]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=IDS).logits
    live = attached("loftq", folder).eval()(input_ids=IDS).logits
    assert (merged - live).abs().max() < 1e-4 * live.abs().max()


def test_what_mends_the_base_is_not_added_up(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    adapter = saved(folder, tmp_path / "adapter")
    assert mends_base(adapter)
    parts = [(adapter, 0.5), (adapter, 0.5)]
    with pytest.raises(Unsupported, match=r"error of its quantized base \(LoftQ\)"):
        list(combine(parts, tmp_path / "sum"))
    for mix in (parts, [(adapter, 0.5)]):
        with pytest.raises(Unsupported, match=r"error of its quantized base \(LoftQ\)"):
            list(merge(model_folder=folder, adapter_folder=mix, target=tmp_path / "out"))


def test_a_run_says_beside_its_adapter_what_it_mends(tiny_model: TinyModel, tmp_path: Path) -> None:
    from test_method_runs import recipe_of

    list(train(recipe_of("loftq", tmp_path, tiny_model("llama"), steps=2)))
    facts = read_facts(tmp_path / "runs/first/adapter")
    assert facts.mends_base
    assert facts.quantization == "nf4"
    load("first", folder=str(tmp_path / "runs"), device="cpu")


@pytest.mark.parametrize(
    ("quantization", "held"), [("nf4", "in 4 bits (NF4, double quant)"), ("int8", "in 8 bits")]
)
def test_the_card_of_the_adapter_says_on_which_base_it_is_of_use(quantization: str, held: str) -> None:
    facts = AdapterFacts("m", None, "", quantization, True, "fp32", "", mends_base=True)
    card = card_text(CardFacts(), Made("adapter", mended=facts.mended))
    assert f"as it was held in training, by bitsandbytes: {held}." in card
    assert not replace(facts, mends_base=False).mended
    assert "as it was held" not in card_text(CardFacts(), Made("adapter"))
