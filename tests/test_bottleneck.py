"""Bottleneck adapters: the base at the start, what the papers say after it, however a step is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import TinyModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from two_adapters import PAIRS
from written_layers import beside, write_out, written_adapter

from qadapt.adapters.adapters_library import import_bottleneck
from qadapt.adapters.bottleneck import (
    KINDS,
    Bottleneck,
    Kind,
    attach_bottleneck,
    load_bottleneck,
)
from qadapt.adapters.method import load_adapter
from qadapt.adapters.side_car import SideCar
from qadapt.adapters.side_car_files import save_side_car
from qadapt.engine.arrangement import arrange
from qadapt.engine.documents import documents_of, isolating
from qadapt.errors import BadAdapter, BadRecipe, Unsupported
from qadapt.methods import METHODS, Activation
from qadapt.model.load import load_base

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gemma3_text")
TWO_NORMS = ("gemma2", "gemma3_text")
SEES = {kind: sees for sees, kinds in PAIRS.items() for kind in kinds}
IDS = torch.randint(3, 90, (2, 23), generator=torch.Generator().manual_seed(5))


def base_of(
    tiny_model: TinyModel, family: str, *, quantization: str = "none", layers: int = 2
) -> PreTrainedModel:
    if family == "gemma3_text":
        return gemma3()
    return load_base(
        tiny_model(family, layers=layers),
        quantization=quantization,
        double_quant=True,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def gemma3() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        initializer_range=0.08,
    )
    torch.manual_seed(0)
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config)).eval()


def adapted(
    base: PreTrainedModel, kind: Kind, *, activation: Activation = "silu", norm: bool = False
) -> SideCar:
    model = attach_bottleneck(base, Bottleneck(kind, width_of(kind), activation, scale=1.5, norm=norm))
    return drawn(model)


def width_of(kind: Kind) -> int:
    return 8 if METHODS[kind].is_hypercomplex else 5


def drawn(model: SideCar) -> SideCar:
    draw = torch.Generator().manual_seed(1)
    for name, parameter in trained(model).items():
        spread = 0.5 if name.endswith(("factors", "left", "right")) else 0.2  # of products of three
        parameter.data.copy_(spread * torch.randn(parameter.shape, generator=draw))
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def naive_adapter(model: SideCar, name: str, values: Tensor) -> Tensor:
    """The formula of one adapter, with the tensors of the side-car."""
    part = dict(model.parts[name].named_parameters())
    shared = dict(model.parts["shared"].named_parameters()) if "shared" in model.parts else {}
    return written_adapter(part, shared.get("factors"), model.settings["activation"], values)


def naive_layers(model: SideCar, kind: Kind, *, has_two_norms: bool) -> None:
    """Decoder layers written out with the adapters in them; the hooks are switched off."""
    write_out(model, beside(partial(naive_adapter, model), sees=SEES[kind]), has_two_norms=has_two_norms)


def gradients(model: SideCar, *, ids: Tensor = IDS, **named: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids[:, :-1], use_cache=False, **named).logits
    functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    found = {name: each.grad.clone() for name, each in trained(model).items() if each.grad is not None}
    return logits.detach(), found


def packed_gradients(model: SideCar) -> dict[str, Tensor]:
    """Of both rows of `IDS`, packed as two documents."""
    documents, ids = documents_of((23, 22)), torch.cat((IDS[0], IDS[1]))[None]
    targets = ids[0, 1:].clone()
    targets[22] = -100  # the second document's first token is not the first one's next
    with isolating(cast(Any, model)):
        logits = model(
            input_ids=ids[:, :45], use_cache=False, documents=documents, position_ids=documents.position_ids
        ).logits
        functional.cross_entropy(logits[0], targets, reduction="sum").backward()
    return {name: each.grad.clone() for name, each in trained(model).items() if each.grad is not None}


def gradients_by_row(model: SideCar) -> dict[str, Tensor]:
    """Of the same rows, one after the other."""
    for ids in IDS:
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
    return {name: each.grad for name, each in trained(model).items() if each.grad is not None}


def padded_batch() -> tuple[list[Tensor], Tensor, Tensor]:
    """Two prompts of different lengths; both as one batch, filled up on the left; its mask."""
    short = IDS[1:, :9]
    batch = torch.cat((IDS[:1, :14], torch.cat((torch.full((1, 5), 3), short), 1)))
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    return [IDS[:1, :14], short], batch, mask


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], *, within: float) -> bool:
    assert found.keys() == wanted.keys()
    return all(
        float((found[name] - each).norm()) <= within * float(each.norm()) for name, each in wanted.items()
    )


def assert_tiled_and_offloaded_alike(make: Callable[[], SideCar]) -> None:
    """Recomputed and offloaded steps are the kept one to the bit, tiled ones to rounding."""
    whole = make().train()
    arrange(whole.base, recompute="none", tiles=1, offload=())
    logits, kept = gradients(whole)
    for recompute, tiles, offload, within in (
        ("all", 1, (), 0.0), (1, 1, (), 0.0), ("all", 1, ("boundaries",), 0.0), ("all", 3, (), 1e-5),
    ):  # fmt: skip
        model = make().train()
        arrange(model.base, recompute=recompute, tiles=tiles, offload=offload)  # type: ignore[arg-type]
        again, found = gradients(model)
        torch.testing.assert_close(again, logits, rtol=0, atol=1e-5 if within else 0.0)
        assert close(found, kept, within=within)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_forward_pass_is_the_base_to_the_bit(
    family: str, kind: Kind, tiny_model: TinyModel
) -> None:
    base = base_of(tiny_model, family)
    before = base(input_ids=IDS).logits
    has_norm = family != "llama"
    model = attach_bottleneck(base, Bottleneck(kind, width_of(kind), "gelu", scale=2.0, norm=has_norm))
    assert torch.equal(model(input_ids=IDS).logits, before)
    drawn(model)
    assert not torch.allclose(model(input_ids=IDS).logits, before, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_formula(
    family: str, kind: Kind, tiny_model: TinyModel
) -> None:
    model = adapted(base_of(tiny_model, family), kind, norm=kind == "parallel")
    logits, found = gradients(model)
    naive_layers(model, kind, has_two_norms=family in TWO_NORMS)
    wanted, slopes = gradients(model)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-5)  # fp32, logits up to 30
    assert len(slopes) == len(trained(model)) > 4
    assert close(found, slopes, within=1e-4)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_every_nonlinearity_is_what_it_is_called(activation: Activation, tiny_model: TinyModel) -> None:
    model = adapted(base_of(tiny_model, "llama"), "houlsby", activation=activation)
    logits, _ = gradients(model)
    naive_layers(model, "houlsby", has_two_norms=False)
    torch.testing.assert_close(logits, gradients(model)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_recomputed_and_tiled_steps_have_the_same_gradients(
    family: str, kind: Kind, quantization: str, tiny_model: TinyModel
) -> None:
    assert_tiled_and_offloaded_alike(
        lambda: adapted(base_of(tiny_model, family, quantization=quantization), kind)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_as_if_alone(kind: Kind, tiny_model: TinyModel) -> None:
    model = adapted(base_of(tiny_model, "llama", quantization="nf4"), kind).train()
    documents, ids = documents_of((19, 26)), torch.cat((IDS[0], IDS[1]))[None, :46]
    with isolating(cast(Any, model)):
        packed = model(
            input_ids=ids[:, :45], use_cache=False, documents=documents, position_ids=documents.position_ids
        ).logits
    for first, last in ((0, 19), (19, 45)):
        alone = model(input_ids=ids[:, first:last], use_cache=False).logits
        torch.testing.assert_close(packed[:, first:last], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_recomputed_gradients_are_those_of_the_formula_one_document_at_a_time(
    kind: Kind, quantization: str, tiny_model: TinyModel
) -> None:
    base = base_of(tiny_model, "llama", quantization=quantization)
    arrange(base, recompute="all", tiles=1, offload=())
    packed = packed_gradients(adapted(base, kind, activation="gelu", norm=True).train())
    base = base_of(tiny_model, "llama", quantization=quantization)
    naive = adapted(base, kind, activation="gelu", norm=True)
    naive_layers(naive, kind, has_two_norms=False)
    wanted = gradients_by_row(naive)
    assert close(packed, wanted, within=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_a_batch_is_its_own_single_run(kind: Kind, tiny_model: TinyModel) -> None:
    model = adapted(base_of(tiny_model, "llama", quantization="nf4"), kind).eval()
    prompts, batch, mask = padded_batch()
    told = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    together = model.generate(input_ids=batch, attention_mask=mask, **told)[:, 14:]
    for row, prompt in enumerate(prompts):
        alone = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **told)
        assert alone[0, prompt.shape[1] :].tolist() == together[row].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_generates_what_whole_passes_do(kind: Kind, tiny_model: TinyModel) -> None:
    model = adapted(base_of(tiny_model, "llama"), kind).eval()
    prompt = IDS[:1, :7]
    made = model.generate(input_ids=prompt, max_new_tokens=9, do_sample=False, eos_token_id=None)
    ids = prompt
    with torch.no_grad():
        for _ in range(9):
            ids = torch.cat((ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert made.tolist() == ids.tolist()
    with model.disable_adapter():
        base = model.generate(input_ids=prompt, max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert base.tolist() != made.tolist()


def test_a_bottleneck_as_wide_as_the_model_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(
        BadRecipe, match=r"rank is 64; .*narrower than the model, 64 here.\n.*less than 64; 4, "
    ):
        attach_bottleneck(base_of(tiny_model, "llama"), Bottleneck("houlsby", 64, "relu"))


def test_a_decoder_whose_places_are_not_known_is_refused() -> None:
    config = AutoConfig.for_model(
        "gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    with pytest.raises(Unsupported, match=r"on gpt2.*not known.\nKnown are llama.*adapter.method=lora"):
        attach_bottleneck(AutoModelForCausalLM.from_config(config), Bottleneck("pfeiffer", 4, "relu"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back_to_the_bit(kind: Kind, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = adapted(base_of(tiny_model, "qwen3", quantization="nf4"), kind, norm=True)
    for parameter in trained(model).values():
        parameter.data = parameter.data.bfloat16()
    logits = model(input_ids=IDS).logits
    save_side_car(model, tmp_path)
    again = load_bottleneck(base_of(tiny_model, "qwen3", quantization="nf4"), tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, logits)
    assert again.settings == model.settings
    assert not trained(again)
    on = trained(load_bottleneck(base_of(tiny_model, "qwen3"), tmp_path, is_trainable=True))
    assert on.keys() == trained(model).keys()
    assert {each.dtype for each in on.values()} == {torch.bfloat16}


def saved(tiny_model: TinyModel, folder: Path) -> Path:
    save_side_car(adapted(base_of(tiny_model, "llama"), "pfeiffer"), folder)
    return folder


def test_a_loaded_adapter_does_not_hang_on_its_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = load_bottleneck(base_of(tiny_model, "llama"), saved(tiny_model, tmp_path))
    logits = model(input_ids=IDS).logits
    path = tmp_path / "side_car.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(model(input_ids=IDS).logits, logits)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2}, r"is of version 2; this qadapt reads version 1"),
        ({"kind": "lora"}, r"describe no bottleneck: .*'kind': 'lora'"),
        ({"width": "5"}, r"describe no bottleneck: .*'width': '5'"),
        ({"width": 0}, r"describe no bottleneck: .*'width': 0"),
        ({"scale": float("nan")}, r"describe no bottleneck: .*'scale': nan"),
        ({"dropout": 1.5}, r"describe no bottleneck: .*'dropout': 1.5"),
        ({"activation": ["relu"]}, r"describe no bottleneck: .*'activation': \['relu'\]"),
        ({"width": 6}, r"does not fit its settings: layers.0.feed_forward.down.bias has the shape \(5,\)"),
        ({"layers": -1}, r"whose layers is -1; this base's is 2"),
        ({"model_type": "qwen2"}, r"whose model_type is qwen2; this base's is llama"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    change: dict[str, object], problem: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = saved(tiny_model, tmp_path) / "side_car.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **change}), "utf-8")
    with pytest.raises(BadAdapter, match=problem):
        load_bottleneck(base_of(tiny_model, "llama"), tmp_path)


@pytest.mark.parametrize("kind", ["lora", None, ["pfeiffer"]])
def test_a_side_car_of_no_known_kind_is_refused(kind: object, tiny_model: TinyModel, tmp_path: Path) -> None:
    path = saved(tiny_model, tmp_path) / "side_car.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "kind": kind}), "utf-8")
    with pytest.raises(BadAdapter, match=r"is of the kind .*; known are houlsby, .*\n.*or a newer qadapt"):
        load_adapter(base_of(tiny_model, "llama"), tmp_path)


def test_damaged_tensors_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = saved(tiny_model, tmp_path) / "side_car.safetensors"
    tensors = load_file(path)
    name = "layers.1.feed_forward.up.bias"
    for changed, problem in (
        (
            {**tensors, name: torch.full_like(tensors[name], torch.nan)},
            f"has a number in {name} that is none",
        ),
        ({**tensors, "more": torch.zeros(1)}, r"more has the shape \(1,\) and must have None \(1 tensors"),
        ({key: each for key, each in tensors.items() if key != name}, r"up.bias has the shape None and must"),
    ):
        save_file(changed, path)
        with pytest.raises(BadAdapter, match=problem):
            load_bottleneck(base_of(tiny_model, "llama"), tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(BadAdapter, match=r"side_car.safetensors cannot be read"):
        load_bottleneck(base_of(tiny_model, "llama"), tmp_path)
    (tmp_path / "side_car.json").write_text("{", "utf-8")
    with pytest.raises(BadAdapter, match=r"side_car.json cannot be read"):
        load_bottleneck(base_of(tiny_model, "llama"), tmp_path)


LIBRARY_CONFIG: dict[str, Any] = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "inv_adapter": None,
    "is_parallel": False, "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": False,
    "non_linearity": "swish", "original_ln_after": True, "original_ln_before": True, "output_adapter": True,
    "phm_layer": False, "reduction_factor": 12.5, "residual_before_ln": True, "scaling": 1.5,
    "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
"""Of a Pfeiffer adapter as `adapters` 1.3 saves it, without fields that only initialisation reads."""


def of_the_library(model: SideCar, folder: Path, **changes: Any) -> Path:
    """A Pfeiffer adapter's numbers in the files of `adapters` 1.3."""
    folder.mkdir()
    whole = {"hidden_size": 64, "model_type": "llama", "name": "mine", "version": "adapters.1.3.0"}
    whole |= {name: value for name, value in changes.items() if name in whole}
    inner = {name: value for name, value in changes.items() if name not in whole}
    values = {**whole, "config": {**LIBRARY_CONFIG, **inner}}
    (folder / "adapter_config.json").write_text(json.dumps(values), "utf-8")
    theirs = {"down.": "adapter_down.0.", "up.": "adapter_up."}
    tensors = {}
    for name, part in model.parts.items():
        for key, each in part.named_parameters():
            place, _, last = key.partition(".")
            front = f"model.layers.{name.split('.')[1]}.output_adapters.adapters.mine."
            tensors[front + theirs[f"{place}."] + last] = each.detach()
    save_file(tensors, folder / "adapter.safetensors")
    return folder


def test_an_adapter_of_the_library_is_imported(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = adapted(base_of(tiny_model, "llama"), "pfeiffer")
    theirs = of_the_library(model, tmp_path / "theirs")
    import_bottleneck(theirs, tmp_path)
    again = load_bottleneck(base_of(tiny_model, "llama"), tmp_path)
    assert again.settings == model.settings
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "bert"}, "holds an adapter of another kind on bert"),
        ({"use_gating": True}, "Its use_gating is True; only False is known here"),
        ({"residual_before_ln": "post_add"}, "Its residual_before_ln is post_add; only True"),
        ({"non_linearity": "mish"}, "Its nonlinearity is mish and its scaling 1.5; known are relu"),
        ({"scaling": "learned"}, "and its scaling learned; known are"),
        ({"reduction_factor": {"0": 2, "default": 4}}, "different reduction factors"),
        ({"mh_adapter": True}, r"Its places \(.*: False, True, True\) are none"),
        ({"reduction_factor": 16}, r"down.weight has the shape \(5, 64\) and must have \(4, 64\)"),
        ({"name": "other"}, "has a tensor that is not known: model.0?.*output_adapters.adapters.mine"),
        ({"name": None}, "has a tensor that is not known"),
        ({"reduction_factor": 0}, r"Its reduction_factor is 0; it must be a number from"),
        ({"reduction_factor": 5e-324}, r"Its reduction_factor is 5e-324; it must be a number from"),
        ({"reduction_factor": float("nan")}, "Its reduction_factor is nan"),
        ({"hidden_size": "64"}, "Its hidden_size is .64."),
        ({"dropout": None}, "Its dropout is None; it must be a number from 0 to 1"),
    ],
)
def test_what_the_library_does_otherwise_is_refused_by_name(
    change: dict[str, Any], problem: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    theirs = of_the_library(adapted(base_of(tiny_model, "llama"), "pfeiffer"), tmp_path / "theirs", **change)
    with pytest.raises((BadAdapter, Unsupported), match=problem):
        import_bottleneck(theirs, tmp_path)
    assert not (tmp_path / "side_car.json").exists()


def test_what_the_library_always_says_must_be_there(tiny_model: TinyModel, tmp_path: Path) -> None:
    theirs = of_the_library(adapted(base_of(tiny_model, "llama"), "pfeiffer"), tmp_path / "theirs")
    path = theirs / "adapter_config.json"
    whole = json.loads(path.read_text("utf-8"))
    for field in ("is_parallel", "mh_adapter", "original_ln_before", "ln_before", "scaling", "dropout"):
        config = {name: value for name, value in whole["config"].items() if name != field}
        path.write_text(json.dumps({**whole, "config": config}), "utf-8")
        with pytest.raises(BadAdapter, match=rf"Its configuration lacks {field}\."):
            import_bottleneck(theirs, tmp_path)


def test_a_pickled_adapter_is_never_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    theirs = of_the_library(adapted(base_of(tiny_model, "llama"), "pfeiffer"), tmp_path / "theirs")
    (theirs / "adapter.safetensors").rename(theirs / "pytorch_adapter.bin")
    with pytest.raises(
        Unsupported, match=r"is pickled, and loading it could run any code.\n.*use_safetensors"
    ):
        import_bottleneck(theirs, tmp_path)
    (theirs / "adapter_config.json").write_text("[]", "utf-8")
    with pytest.raises(BadAdapter, match="is no configuration of `adapters`"):
        import_bottleneck(theirs, tmp_path)
