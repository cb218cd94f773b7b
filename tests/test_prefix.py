"""Prefix tuning: what the paper says, whichever way attention is computed, and what stands on disk of it."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from test_bottleneck import (
    FAMILIES,
    IDS,
    assert_tiled_and_offloaded_alike,
    base_of,
    close,
    gradients,
    trained,
)
from test_packing import WINDOW, assert_close, loss_and_gradient, one_at_a_time, rows
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
)

from qadapt.adapters.prefix import (
    PREFIX_KINDS,
    FlatPrefix,
    PrefixKind,
    attach_prefix,
    load_prefix,
    read_prefix,
)
from qadapt.adapters.side_car import SideCar
from qadapt.adapters.side_car_files import save_side_car
from qadapt.data.batches import packed_batches
from qadapt.engine.arrangement import arrange
from qadapt.engine.documents import documents_of, isolating
from qadapt.engine.loss import loss_sum
from qadapt.engine.prefix import CHILD, Choice, see_prefixes
from qadapt.errors import BadAdapter, Unsupported
from qadapt.model.generate import Kept, generate, stream
from qadapt.plan.setting import Recompute

if TYPE_CHECKING:
    from conftest import TinyModel

LENGTH = 5
HOW: dict[str, Any] = {"max_new_tokens": 8, "end_ids": frozenset({-1})}


def adapted(base: PreTrainedModel, kind: PrefixKind = "prefix-flat", *, length: int = LENGTH) -> SideCar:
    """A model whose prefix matters."""
    model = attach_prefix(base, kind, length)
    draw = torch.Generator().manual_seed(1)
    for parameter in trained(model).values():
        parameter.data += (0.2 if kind == "prefix" else 1.0) * torch.randn(parameter.shape, generator=draw)
    return model


def naive_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, *, pairs: Any, **named: Any
) -> tuple[Tensor, None]:
    """Each token sees the prefix, and of the tokens before it those in its window, written out."""
    length = query.shape[2]
    front = [each.to(query)[None].expand(len(query), -1, -1, -1) for each in pairs[module.layer_idx]]
    key, value = torch.cat((front[0], key), 2), torch.cat((front[1], value), 2)
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scores = query @ key.mT * named["scaling"]
    if (cap := named.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (named.get("sliding_window") or math.inf))
    seen = torch.cat((torch.ones(length, front[0].shape[2], dtype=torch.bool), seen), 1)
    shares = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return (shares @ value).transpose(1, 2), None


def naive(model: SideCar) -> None:
    """Makes a model attend by the formula, with the prefix of the same tensors."""
    parts = [cast(Any, part) for part in model.parts.values()]

    def attend(*given: Any, **named: Any) -> tuple[Tensor, None]:
        return naive_attention(*given, pairs=[part.in_front(torch.float32) for part in parts], **named)

    AttentionInterface.register("naive", attend)
    model.base.set_attn_implementation("naive")


@pytest.mark.parametrize("kind", PREFIX_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_formula(
    family: str, kind: PrefixKind, tiny_model: TinyModel
) -> None:
    model = adapted(base_of(tiny_model, family), kind)
    logits, found = gradients(model)
    with model.disable_adapter():
        assert (model(input_ids=IDS[:, :-1]).logits - logits).abs().max() > 0.1
    naive(model)
    wanted, slopes = gradients(model)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-5)  # fp32, logits up to 30
    assert len(slopes) == len(trained(model)) >= 4
    assert close(found, slopes, within=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_switched_off_it_is_the_base_to_the_bit(family: str, tiny_model: TinyModel) -> None:
    base = base_of(tiny_model, family)
    before = base(input_ids=IDS).logits
    model = attach_prefix(base, "prefix", LENGTH)
    assert not torch.equal(model(input_ids=IDS).logits, before)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_a_flat_prefix_starts_as_drawn_tokens_read_before_the_text(
    family: str, tiny_model: TinyModel
) -> None:
    base = base_of(tiny_model, family)
    ids = torch.randint(
        base.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0)
    ).expand(2, -1)
    with torch.no_grad():
        wanted = base(input_ids=torch.cat((ids, IDS), 1)).logits[:, LENGTH:]
        found = attach_prefix(base, "prefix-flat", LENGTH)(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def test_it_is_the_librarys_cache_and_pefts_prefix(tiny_model: TinyModel) -> None:
    model = adapted(base_of(tiny_model, "llama"))
    parts = [cast(FlatPrefix, part) for part in model.parts.values()]
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        plain, cache = base_of(tiny_model, "llama"), DynamicCache()
        for number, part in enumerate(parts):
            cache.update(*(each[None].expand(2, -1, -1, -1) for each in part.in_front(torch.float32)), number)
        places = torch.arange(IDS.shape[1])[None]
        wanted = plain(input_ids=IDS, past_key_values=cache, position_ids=places).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)

        rotary, ahead = plain.get_decoder().rotary_emb, torch.full((1, LENGTH), LENGTH)
        turns = rotary(parts[0].keys[None], ahead)  # PEFT's tokens stand so much further on
        flat = [turned(part.keys, *turns) for part in parts]
        pairs = torch.stack(
            [torch.stack((keys, part.values)) for keys, part in zip(flat, parts, strict=True)]
        )
        theirs = get_peft_model(plain, PrefixTuningConfig(num_virtual_tokens=LENGTH, task_type="CAUSAL_LM"))
        weight = pairs.permute(3, 0, 1, 2, 4).reshape(LENGTH, -1)  # (P, L x 2 x K x D)
        theirs.prompt_encoder["default"].embedding.weight.copy_(weight)
        torch.testing.assert_close(theirs(input_ids=IDS).logits, found, rtol=0, atol=1e-4)


def turned(keys: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = keys.chunk(2, -1)
    return keys * cosine[0] + torch.cat((-right, left), -1) * sine[0]


# --- however a step is computed ---------------------------------------------------------------------------


def trainee(
    family: str,
    kind: PrefixKind,
    tiny_model: TinyModel,
    *,
    quantization: str = "none",
    recompute: Recompute = "none",
) -> SideCar:
    base = base_of(tiny_model, family, quantization=quantization)
    if family in ("mistral", "phi3"):
        base.config.sliding_window = WINDOW
        for module in base.modules():
            if "sliding_window" in vars(module):
                module.sliding_window = WINDOW  # type: ignore[assignment]
    arrange(base, recompute=recompute, tiles=1, offload=())
    return cast(SideCar, adapted(base, kind).train())


@pytest.mark.parametrize(
    ("family", "kind", "quantization"),
    [
        *((family, kind, "nf4") for family in ("llama", "gemma2") for kind in PREFIX_KINDS),
        *(("llama", kind, "none") for kind in PREFIX_KINDS),
        ("phi3", "prefix-flat", "nf4"),
        ("mistral", "prefix", "none"),
    ],
)
def test_packed_and_recomputed_gradients_are_those_of_the_formula_one_document_at_a_time(
    family: str, kind: PrefixKind, quantization: str, tiny_model: TinyModel
) -> None:
    chosen = rows()  # two are longer than the window
    model = trainee(family, kind, tiny_model, quantization=quantization, recompute="all")
    alone = one_at_a_time(cast(Any, model), chosen)
    packed = loss_and_gradient(cast(Any, model), packed_batches(chosen, capacity=120))
    model = trainee(family, kind, tiny_model, quantization=quantization)
    naive(model)
    wanted = one_at_a_time(cast(Any, model), chosen)
    assert_close(alone, wanted)
    assert_close(packed, wanted)


@pytest.mark.parametrize("kind", PREFIX_KINDS)
def test_recomputed_and_tiled_steps_have_the_same_gradients(kind: PrefixKind, tiny_model: TinyModel) -> None:
    assert_tiled_and_offloaded_alike(lambda: adapted(base_of(tiny_model, "qwen2", quantization="nf4"), kind))


def test_in_bf16_blocks_of_queries_see_it(tiny_model: TinyModel) -> None:
    base, chosen = base_of(tiny_model, "qwen3").to(torch.bfloat16), rows()
    model = adapted(cast(Any, base)).train()
    found = loss_and_gradient(cast(Any, model), packed_batches(chosen, capacity=300))
    exact = trainee("qwen3", "prefix-flat", tiny_model)
    wanted = one_at_a_time(cast(Any, exact), chosen)
    assert found[0] == pytest.approx(wanted[0], rel=1e-2)  # bf16
    for name, value in wanted[1].items():
        assert (found[1][name].float() - value).norm() < 0.05 * value.norm(), name


# --- answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "quantization"), [("llama", "nf4"), ("llama", "none"), ("gemma2", "nf4"), ("mistral", "none")]
)
def test_prompts_answered_together_are_answered_as_alone_and_as_without_a_cache(
    family: str, quantization: str, tiny_model: TinyModel
) -> None:
    model = trainee(family, "prefix", tiny_model, quantization=quantization).eval()
    prompts = [list(range(5, 5 + length)) for length in (3, WINDOW + 9, 17)]
    alone = [generate(cast(Any, model), [prompt], pad_id=0, **HOW)[0] for prompt in prompts]
    assert generate(cast(Any, model), prompts, pad_id=0, **HOW) == alone
    naive(model)
    for prompt, answer in zip(prompts, alone, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert whole.tolist() == answer
    model = trainee(family, "prefix", tiny_model, quantization=quantization).eval()
    with model.disable_adapter():
        assert generate(cast(Any, model), prompts, pad_id=0, **HOW) != alone


def test_a_conversation_goes_on_from_what_was_read(tiny_model: TinyModel) -> None:
    model, kept = trainee("llama", "prefix-flat", tiny_model).eval(), Kept()
    prompt = list(range(5, 25))
    first = list(stream(cast(Any, model), prompt, kept=kept, **HOW))
    longer = [*prompt, *first, 7, 8, 9]
    assert list(stream(cast(Any, model), longer, kept=kept, **HOW)) == list(
        stream(cast(Any, model), longer, **HOW)
    )


def test_rows_of_a_batch_can_see_different_prefixes(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = base_of(tiny_model, "llama", quantization="nf4")
    prompts, alone = [list(range(5, 5 + length)) for length in (3, 11, 17)], []
    folders = [tmp_path / name for name in ("first", "second")]
    for folder, length in zip(folders, (3, 6), strict=True):
        folder.mkdir()
        own = adapted(base_of(tiny_model, "llama", quantization="nf4"), "prefix", length=length)
        save_side_car(own, folder)
        alone.append(generate(cast(Any, own), [prompts[len(alone)]], pad_id=0, **HOW)[0])
    alone.append(generate(base, [prompts[2]], pad_id=0, **HOW)[0])
    see_prefixes(base)
    first, second = (read_prefix(base, folder) for folder in folders)
    choices = [Choice() for _ in first]
    for number, layer in enumerate(base.get_decoder().layers):
        layer.self_attn.add_module(CHILD, choices[number])
        choices[number].rows = (first[number], second[number], None)
    assert generate(base, prompts, pad_id=0, **HOW) == alone
    ids, packed = torch.arange(5, 16)[None], documents_of((5, 6))
    with isolating(base), pytest.raises(Unsupported, match="chosen for 3 rows, and the model computes 1"):
        loss_sum(base, input_ids=ids, positions=torch.arange(10), targets=ids[:, 1:], documents=packed)


# --- on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", PREFIX_KINDS)
def test_on_disk_it_is_flat_and_computes_the_same(
    kind: PrefixKind, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = attach_prefix(base_of(tiny_model, "qwen2", quantization="nf4"), kind, LENGTH, dtype=dtype)
    save_side_car(model, tmp_path)
    tensors = load_file(tmp_path / "side_car.safetensors")
    assert sorted(tensors) == [f"layers.{number}.{name}" for number in (0, 1) for name in ("keys", "values")]
    assert {(each.dtype, each.shape[1]) for each in tensors.values()} == {(dtype, LENGTH)}
    assert json.loads((tmp_path / "side_car.json").read_text("utf-8"))["kind"] == kind
    again = load_prefix(base_of(tiny_model, "qwen2", quantization="nf4"), tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not trained(again)
    assert len(trained(load_prefix(again.base, tmp_path, is_trainable=True))) == 4


@pytest.mark.parametrize(
    ("family", "change", "problem"),
    [
        ("qwen2", {}, "is for a base whose model_type is llama; this base's is qwen2"),
        ("llama", {"length": 4}, r"has the shape .* and must have \(2, 4, 16\) \(4 tensors differ\)"),
        ("llama", {"layers": 3}, "is for a base whose layers is 3; this base's is 2"),
        ("llama", {"length": "5"}, "describe no prefix"),
        ("llama", {"key_heads": 0}, "describe no prefix"),
    ],
)
def test_what_is_damaged_or_of_another_base_is_refused(
    family: str, change: dict[str, Any], problem: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    save_side_car(adapted(base_of(tiny_model, "llama")), tmp_path)
    path = tmp_path / "side_car.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(BadAdapter, match=problem):
        load_prefix(base_of(tiny_model, family), tmp_path)


def test_attention_that_cannot_be_given_a_prefix_is_refused() -> None:
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    config = AutoConfig.for_model("gpt2", **small, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(Unsupported, match=r"Prefix tuning on gpt2: where its layers attend.*\n.*method=lora"):
        attach_prefix(model, "prefix", 3)
    config = AutoConfig.for_model("llama", hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    AttentionInterface.register("own", partial(nn.functional.scaled_dot_product_attention))
    model.set_attn_implementation("own")
    with pytest.raises(Unsupported, match=r"Prefix tuning on llama: its attention, own, cannot be given"):
        attach_prefix(model, "prefix", 3)
