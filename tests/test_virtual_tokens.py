"""Virtual tokens: PEFT's numbers, each document its own, whatever way rows and prompts are laid out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_bottleneck import FAMILIES, base_of
from test_estimate import CPU, shape_of
from test_packing import loss_and_gradient, rows
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from qadapt.adapters.lora import trainable
from qadapt.adapters.prompt import PROMPT_KINDS, PromptKind, PromptPart, attach_prompt, load_prompt
from qadapt.adapters.side_car import SideCar
from qadapt.adapters.side_car_files import save_side_car
from qadapt.adapters.store import Store
from qadapt.data.batches import micro_batches, packed_batches
from qadapt.data.rows import RowSet
from qadapt.data.tokens import Tokens
from qadapt.engine.arrangement import arrange
from qadapt.engine.front import in_front
from qadapt.errors import BadAdapter, BadRecipe
from qadapt.methods import front_ids, said
from qadapt.model.generate import Kept, generate, stream
from qadapt.plan.estimate import disk_parts, estimate_step
from qadapt.plan.inverse import most
from qadapt.plan.knobs import KNOBS
from qadapt.plan.room import Room
from qadapt.recipe_file import check_recipe
from qadapt.train.evaluation import evaluate_rows
from qadapt.train.step import evaluate_loss
from qadapt.trained.adoption import Said
from qadapt.trained.keeping import add
from qadapt.view.tables import setting_words

if TYPE_CHECKING:
    from conftest import TinyModel

IDS = torch.randint(3, 90, (2, 23), generator=torch.Generator().manual_seed(5))
COUNT = 5
LEAST: dict[str, Any] = {"model": "m", "data": {"sources": [{"path": "p"}]}, "run": {"name": "n"}}


def adapted(base: PreTrainedModel, kind: PromptKind = "prompt") -> SideCar:
    """A model whose virtual tokens are far from any embedding."""
    model = attach_prompt(base, kind, COUNT, seed=3)
    torch.manual_seed(6)
    for parameter in trainable(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


def vectors_of(model: SideCar) -> Tensor:
    part = model.parts["tokens"]
    assert isinstance(part, PromptPart)
    return cast(Tensor, part.source())


def naive_logits(base: PreTrainedModel, vectors: Tensor, ids: Tensor) -> Tensor:
    """(1, T, V) of one row behind the vectors, which are its inputs like embeddings."""
    embedded = torch.cat((vectors[None], base.get_input_embeddings()(ids)), dim=1)
    logits: Tensor = base(inputs_embeds=embedded, use_cache=False).logits
    return logits[:, len(vectors) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_rows_with_the_vectors_in_front(family: str, tiny_model: TinyModel) -> None:
    base = base_of(tiny_model, family)
    before = base(input_ids=IDS).logits
    model = adapted(base)
    found = model(input_ids=IDS).logits
    assert found.shape == before.shape
    for row in range(2):
        wanted = naive_logits(base, vectors_of(model), IDS[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=0, atol=2e-5)  # fp32, logits up to 30
    assert not torch.allclose(found, before, atol=1e-2), "a control"
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, before)
    last = model(input_ids=IDS, logits_to_keep=3).logits
    torch.testing.assert_close(last, found[:, -3:], rtol=0, atol=1e-5)
    chosen = torch.tensor([0, 7])
    torch.testing.assert_close(model(IDS, logits_to_keep=chosen).logits, found[:, chosen], rtol=0, atol=1e-5)


def test_logits_are_pefts(tiny_model: TinyModel) -> None:
    model = adapted(base_of(tiny_model, "gemma2"))
    found, vectors = model(input_ids=IDS).logits, vectors_of(model).detach()
    config = PromptTuningConfig(num_virtual_tokens=COUNT, task_type="CAUSAL_LM")
    theirs = get_peft_model(base_of(tiny_model, "gemma2"), config)
    theirs.prompt_encoder["default"].embedding.weight.data = vectors
    wanted = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, COUNT:]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def naive_step(model: SideCar, chosen: list[Tokens]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of rows without virtual tokens, each alone behind the vectors."""
    count = sum(row.supervised_count for row in chosen)
    total = 0.0
    for row in chosen:
        ids = torch.from_numpy(row.ids).long()
        logits = naive_logits(model.base, vectors_of(model), ids[None])[0, :-1]
        targets = torch.where(torch.from_numpy(row.supervised), ids, -100)[1:]
        loss = functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count
        loss.backward()
        total += loss.item()
    found = {name: value.grad.clone() for name, value in trainable(model).items() if value.grad is not None}
    model.zero_grad()
    return total, found


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(("kind", "family"), [("prompt", "gemma2"), ("ptuning", "qwen2")])
def test_packed_recomputed_and_filled_up_gradients_are_those_of_one_row_at_a_time(
    kind: PromptKind, family: str, quantization: str, tiny_model: TinyModel
) -> None:
    plain = rows()
    behind = [row.behind(COUNT) for row in plain]
    base = base_of(tiny_model, family, quantization=quantization)
    arrange(base, recompute="all", tiles=1, offload=())
    model = adapted(base, kind).train()
    loss, wanted = naive_step(model, plain)
    for batches in (packed_batches(behind, capacity=120), micro_batches(behind, size=2, pad_id=0)):
        found_loss, found = loss_and_gradient(cast(Any, model), batches)
        assert found_loss == pytest.approx(loss, rel=1e-5)  # fp32
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert float((found[name] - value).norm()) <= 1e-4 * float(value.norm()) > 0, name


def test_rows_behind_virtual_tokens_learn_what_they_learn_without(tiny_model: TinyModel) -> None:
    plain = rows(share=1.0)
    chosen = RowSet(plain).behind(COUNT)
    for row, own in zip(chosen, plain, strict=True):
        assert row.ids.tolist() == [-1, -2, -3, -4, -5, *own.ids.tolist()]
        assert row.supervised.tolist() == [False] * (COUNT + 1) + own.supervised.tolist()[1:]
        assert (len(row), row.supervised_count) == (len(own) + COUNT, own.supervised_count)
    assert chosen.lengths.tolist() == [len(row) for row in chosen] == [len(row) for row in chosen[:]]
    assert chosen.supervised_tokens == RowSet(plain).supervised_tokens
    assert [row.ids.tolist() for row in chosen.behind(0)] == [row.ids.tolist() for row in plain]
    assert chosen.behind(COUNT).tokens == chosen.tokens

    model = adapted(base_of(tiny_model, "llama"))
    loss, base_loss = evaluate_rows(cast(Any, model), RowSet(plain), size=3, pad_id=0)
    assert loss == pytest.approx(naive_step(model, plain)[0], rel=1e-5)
    alone = base_of(tiny_model, "llama")
    assert base_loss == evaluate_loss(alone, micro_batches(plain, size=3, pad_id=0))


# --- answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_prompts_answered_together_are_answered_as_alone_and_without_a_cache(
    family: str, quantization: str, tiny_model: TinyModel
) -> None:
    model = adapted(base_of(tiny_model, family, quantization=quantization)).eval()
    prompts = [list(range(5, 5 + length)) for length in (3, 17, 9)]
    how: dict[str, Any] = {"max_new_tokens": 8, "end_ids": frozenset({2}), "pad_id": 0}
    alone = [generate(cast(Any, model), [prompt], **how)[0] for prompt in prompts]
    assert generate(cast(Any, model), prompts, **how) == alone
    with model.disable_adapter():
        assert generate(cast(Any, model), prompts, **how) != alone, "a control"
    ids = torch.tensor([prompts[1] + alone[1]])
    with torch.no_grad():
        whole = naive_logits(model.base, vectors_of(model), ids)[0, len(prompts[1]) - 1 : -1].argmax(-1)
    assert whole.tolist() == alone[1]


def test_the_librarys_generation_gives_the_same_answers_behind_left_padding(tiny_model: TinyModel) -> None:
    model = adapted(base_of(tiny_model, "gemma2")).eval()
    prompts = [list(range(5, 5 + length)) for length in (3, 17)]
    wanted = generate(cast(Any, model), prompts, max_new_tokens=8, end_ids=frozenset(), pad_id=0)
    ids = torch.tensor([[0] * 14 + prompts[0], prompts[1]])
    mask = torch.tensor([[0] * 14 + [1] * 3, [1] * 17])
    told = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(input_ids=ids, attention_mask=mask, **told)
    assert found[:, 17:].tolist() == wanted
    assert found[:, :17].tolist() == ids.tolist()


def test_what_was_read_of_a_conversation_is_not_read_again(tiny_model: TinyModel) -> None:
    model = adapted(base_of(tiny_model, "llama")).eval()
    seen: list[int] = []
    model.base.get_decoder().register_forward_pre_hook(
        lambda _, __, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    how: dict[str, Any] = {"max_new_tokens": 4, "end_ids": frozenset()}
    kept, prompt = Kept(), list(range(5, 25))
    first = list(stream(cast(Any, model), prompt, kept=kept, **how))
    assert seen == [COUNT + 20, 1, 1, 1]
    longer = [*prompt, *first, 50, 51]
    again = list(stream(cast(Any, model), longer, kept=kept, **how))
    assert seen[4:] == [3, 1, 1, 1]
    assert again == list(stream(cast(Any, model), longer, **how))
    with model.disable_adapter():
        assert list(stream(cast(Any, model), longer, kept=kept, **how)) != again
        assert seen[12:] == [26, 1, 1, 1]


def test_a_prompt_has_them_in_front_once_and_only_where_they_are_on(tiny_model: TinyModel) -> None:
    model = adapted(base_of(tiny_model, "llama"))
    assert in_front(model, [7, 8]) == in_front(model, [*front_ids(COUNT), 7, 8]) == [-1, -2, -3, -4, -5, 7, 8]
    assert in_front(model.base, [7]) == [7]
    with model.disable_adapter():
        assert in_front(model, [7]) == [7]


# --- on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_what_is_saved_is_flat_and_comes_back_to_the_bit(
    kind: PromptKind, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = adapted(base_of(tiny_model, "qwen3", quantization="nf4"), kind)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.bfloat16()
    save_side_car(model, tmp_path)
    stored = load_file(tmp_path / "side_car.safetensors")
    assert {name: (each.shape, each.dtype) for name, each in stored.items()} == {
        "tokens.vectors": ((COUNT, 64), torch.bfloat16)
    }
    again = load_prompt(base_of(tiny_model, "qwen3", quantization="nf4"), tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not trainable(again)
    assert again.settings == model.settings
    on = load_prompt(base_of(tiny_model, "qwen3"), tmp_path, is_trainable=True)
    assert [each.shape for each in trainable(on).values()] == [(COUNT, 64)]


def test_they_start_as_embeddings_of_the_base(tiny_model: TinyModel) -> None:
    base = base_of(tiny_model, "gemma3_text")
    start = vectors_of(attach_prompt(base, "prompt", COUNT, seed=1))
    table = base.get_input_embeddings()(torch.arange(97))
    assert all(bool((table == row).all(-1).any()) for row in start)
    other = vectors_of(attach_prompt(base_of(tiny_model, "gemma3_text"), "prompt", COUNT, seed=2))
    assert not torch.equal(start, other)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kind": "lora"}, "describe no virtual tokens"),
        ({"tokens": "5"}, "describe no virtual tokens"),
        ({"tokens": 0}, "describe no virtual tokens"),
        ({"tokens": 6}, r"tokens.vectors has the shape \(5, 64\) and must have \(6, 64\)"),
        ({"model_width": 32}, "whose model_width is 32; this base's is 64"),
        ({"model_type": "qwen2"}, "whose model_type is qwen2; this base's is llama"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    change: dict[str, Any], problem: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    save_side_car(adapted(base_of(tiny_model, "llama")), tmp_path)
    path = tmp_path / "side_car.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **change}), "utf-8")
    with pytest.raises(BadAdapter, match=problem):
        load_prompt(base_of(tiny_model, "llama"), tmp_path)


def test_a_number_that_is_none_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    save_side_car(adapted(base_of(tiny_model, "llama")), tmp_path)
    save_file({"tokens.vectors": torch.full((COUNT, 64), torch.nan)}, tmp_path / "side_car.safetensors")
    with pytest.raises(BadAdapter, match=r"has a number in tokens\.vectors that is none"):
        load_prompt(base_of(tiny_model, "llama"), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(num_virtual_tokens=COUNT, task_type="CAUSAL_LM"),
        PromptEncoderConfig(num_virtual_tokens=COUNT, encoder_hidden_size=16, task_type="CAUSAL_LM"),
    ],
    ids=PROMPT_KINDS,
)
def test_what_peft_saved_is_kept_and_answers_as_there(
    config: Any, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model("llama")
    theirs = get_peft_model(base_of(tiny_model, "llama"), config)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, COUNT:]
    store = Store(tmp_path / "store")
    kept = add(str(tmp_path / "theirs"), store, said=Said(held="none", base=str(base))).version
    assert kept.record.method == ("ptuning" if isinstance(config, PromptEncoderConfig) else "prompt")
    found = load_prompt(base_of(tiny_model, "llama"), store.folder_of(kept.id))
    torch.testing.assert_close(found(input_ids=IDS).logits, wanted, rtol=0, atol=2e-5)
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.zeros(COUNT), "more": torch.zeros(1)}, path)
    with pytest.raises(
        BadAdapter, match=r"adapter_model\.safetensors holds no virtual tokens: it has .*more"
    ):
        add(str(tmp_path / "theirs"), store, said=Said(held="none", base=str(base)))


# --- what is refused before anything is loaded ------------------------------------------------------------


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_no_shorter_row_is_offered_that_virtual_tokens_fill(kind: PromptKind) -> None:
    setting = dataclasses.replace(CPU, method=kind, rank=300, length=2048)
    (lengths,) = (knob.values(shape_of("llama"), setting, 1) for knob in KNOBS if knob.name == "length")
    assert lengths == (2048, 1536, 1024, 768)


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_virtual_tokens_that_leave_no_room_are_refused(kind: PromptKind) -> None:
    values = {**LEAST, "adapter": {"method": kind, "rank": 249}}
    values["data"] = {**LEAST["data"], "length": 256}
    with pytest.raises(BadRecipe, match=r"rank = 249 virtual tokens leave 7 of data.length = 256"):
        check_recipe(values, origin="the test")
    setting = dataclasses.replace(CPU, method=kind, rank=117)
    with pytest.raises(BadRecipe, match=r"rank = 117: so many virtual tokens leave nothing of a row of 117"):
        estimate_step(shape_of("llama"), setting)
    largest = most(shape_of("llama"), setting, what="rank", room=Room(1 << 40))
    assert largest.value == 116
    longest = most(shape_of("llama"), setting, what="length", room=Room(1 << 40))
    assert longest.value == shape_of("llama").context
    assert most(shape_of("llama"), setting, what="length", room=Room(1)).value is None
    assert "merged-fp16" not in disk_parts(shape_of("llama"), setting), "it merges into nothing"
    assert said(kind, 8).endswith(", 8 virtual tokens")
    assert ", 8 virtual tokens in fp32 before every row" in setting_words(
        dataclasses.replace(setting, rank=8)
    )


@pytest.mark.parametrize(("field", "value"), [("alpha", 8.0), ("dropout", 0.1), ("targets", ["q_proj"])])
def test_fields_that_mean_nothing_to_them_are_refused(field: str, value: object) -> None:
    values = {**LEAST, "adapter": {"method": "prompt", field: value}}
    with pytest.raises(BadRecipe, match=f"{field} = .* means nothing to prompt tuning"):
        check_recipe(values, origin="the test")
