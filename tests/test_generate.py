"""Answers at once and token by token are the library's own, and nothing is mixed into them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_train import adapted
from tiny_model import FAMILIES
from transformers import PreTrainedModel

from qadapt.adapters.lora import without_adapter
from qadapt.data.prompt import load_contract
from qadapt.errors import BadModel
from qadapt.model.generate import Kept, Sampling, generate, stream
from qadapt.model.load import load_base

if TYPE_CHECKING:
    from conftest import TinyModel

CPU = torch.device("cpu")
NO_END: frozenset[int] = frozenset()
LONGEST = 12


def plain(folder: Path) -> PreTrainedModel:
    return load_base(folder, quantization="none", double_quant=False, dtype=torch.float32, device=CPU)


def prompts_of(folder: Path) -> list[list[int]]:
    """Three of them, none as long as another."""
    contract = load_contract(folder)
    asked = ("say 3", "Two loaves for Ada, please, and a cake.", "?")
    return [contract.prompt_ids([{"role": "user", "content": each}]) for each in asked]


def of_library(model: Any, prompt: Sequence[int], **settings: Any) -> list[int]:
    """What transformers' own `generate` adds to one prompt."""
    ids = torch.tensor([list(prompt)])
    model.eval()
    settings = {"max_new_tokens": LONGEST, "eos_token_id": None, "pad_token_id": 0} | settings
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    row: list[int] = output[0, len(prompt) :].tolist()
    return row


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers_in_batches_and_streamed(
    tiny_model: TinyModel, family: str
) -> None:
    folder = tiny_model(family)
    model, prompts = plain(folder), prompts_of(folder)
    expected = [of_library(model, prompt, do_sample=False) for prompt in prompts]
    are_different = (
        len({tuple(each) for each in expected}) > 1
    )  # a tiny model with a tied head repeats itself
    assert are_different or FAMILIES[family].tied
    at_once = generate(model, prompts, max_new_tokens=LONGEST, end_ids=NO_END, pad_id=0)
    streamed = [list(stream(model, each, max_new_tokens=LONGEST, end_ids=NO_END)) for each in prompts]
    assert at_once == expected
    assert streamed == expected


def test_an_adapter_in_4_bits_is_streamed_as_it_answers_at_once(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    model, [prompt, *_] = adapted(folder), prompts_of(folder)

    def both() -> list[int]:
        [at_once] = generate(model, [prompt], max_new_tokens=LONGEST, end_ids=NO_END, pad_id=0)
        assert list(stream(model, prompt, max_new_tokens=LONGEST, end_ids=NO_END)) == at_once
        return at_once

    tuned = both()
    with without_adapter(model):
        assert both() != tuned


def test_an_answer_ends_before_its_end_token(tiny_model: TinyModel) -> None:
    model, [prompt, other, _] = plain(tiny_model("llama")), prompts_of(tiny_model("llama"))
    whole = of_library(model, prompt, do_sample=False)
    ends = frozenset({whole[5]})
    expected = whole[: whole.index(whole[5])]
    assert list(stream(model, prompt, max_new_tokens=LONGEST, end_ids=ends)) == expected
    [answer, longer] = generate(model, [prompt, other], max_new_tokens=LONGEST, end_ids=ends, pad_id=0)
    assert answer == expected
    assert len(longer) > len(answer)


def test_penalties_of_the_models_files_play_no_part(tiny_model: TinyModel) -> None:
    model, [prompt, *_] = plain(tiny_model("qwen2")), prompts_of(tiny_model("qwen2"))
    [before] = generate(model, [prompt], max_new_tokens=LONGEST, end_ids=NO_END, pad_id=0)
    assert len(set(before)) < LONGEST, "there is something to be penalized"
    model.generation_config.repetition_penalty = 50.0
    assert of_library(model, prompt, do_sample=False) != before, "a control: the library takes it"
    assert generate(model, [prompt], max_new_tokens=LONGEST, end_ids=NO_END, pad_id=0) == [before]
    assert list(stream(model, prompt, max_new_tokens=LONGEST, end_ids=NO_END)) == before


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.5, 0.8), (1.0, 0.0)])
def test_drawn_tokens_are_those_that_transformers_draws(
    tiny_model: TinyModel, temperature: float, top_p: float
) -> None:
    model, [prompt, *_] = plain(tiny_model("llama")), prompts_of(tiny_model("llama"))
    torch.manual_seed(7)
    drawn = of_library(model, prompt, do_sample=True, temperature=temperature, top_p=top_p, top_k=0)

    def again(seed: int) -> list[int]:
        sampling = Sampling(temperature, top_p, torch.Generator().manual_seed(seed))
        return list(stream(model, prompt, max_new_tokens=LONGEST, end_ids=NO_END, sampling=sampling))

    state = torch.get_rng_state()
    assert again(7) == drawn
    assert torch.equal(state, torch.get_rng_state()), "nobody else's draws are taken"
    assert (again(8) == drawn) == (top_p == 0), "with nothing to choose from, every seed says the same"


def test_a_very_low_temperature_draws_the_likeliest(tiny_model: TinyModel) -> None:
    model, [prompt, *_] = plain(tiny_model("llama")), prompts_of(tiny_model("llama"))
    cold = Sampling(1e-30, 1.0, torch.Generator().manual_seed(3))
    drawn = list(stream(model, prompt, max_new_tokens=LONGEST, end_ids=NO_END, sampling=cold))
    assert drawn == list(stream(model, prompt, max_new_tokens=LONGEST, end_ids=NO_END))


def test_each_token_but_the_first_goes_through_the_model_alone(tiny_model: TinyModel) -> None:
    model, [prompt, *_] = plain(tiny_model("llama")), prompts_of(tiny_model("llama"))
    lengths: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: lengths.append(ids[0].shape[1]))  # type: ignore[operator, union-attr]
    assert len(list(stream(model, prompt, max_new_tokens=4, end_ids=NO_END))) == 4
    assert lengths == [len(prompt), 1, 1, 1]


def test_whoever_stops_early_finds_the_model_as_it_was(tiny_model: TinyModel) -> None:
    model, [prompt, *_] = adapted(tiny_model("llama")), prompts_of(tiny_model("llama"))
    assert model.training
    tokens = stream(model, prompt, max_new_tokens=LONGEST, end_ids=NO_END)
    next(tokens)
    assert not model.training
    assert not torch.is_inference_mode_enabled(), "between two tokens nothing of it is left"
    tokens.close()
    assert model.training


@pytest.mark.parametrize("sampling", [None, Sampling(1.0)])
def test_scores_that_are_no_numbers_are_an_error_and_no_answer(
    tiny_model: TinyModel, sampling: Sampling | None
) -> None:
    model, [prompt, *_] = plain(tiny_model("llama")), prompts_of(tiny_model("llama"))
    model.model.norm.weight.data[3] = torch.nan  # type: ignore[union-attr, index, operator]
    with pytest.raises(BadModel, match="no numbers") as error:
        list(stream(model, prompt, max_new_tokens=LONGEST, end_ids=NO_END, sampling=sampling))
    assert "merged-bf16" in error.value.cure


@pytest.mark.parametrize("family", FAMILIES)
def test_what_two_prompts_begin_with_is_read_once(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    model, kept, read = plain(folder), Kept(), list[int]()
    begin, *_ = prompts_of(folder)
    model.register_forward_pre_hook(
        lambda _module, _args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )

    def answer(prompt: list[int]) -> list[int]:
        read.clear()
        return list(stream(model, prompt, max_new_tokens=LONGEST, end_ids=NO_END, kept=kept))

    first = answer(begin)
    longer = [*begin, *first, *begin[:5]]
    assert kept.cache is not None
    is_windowed = any(kept.cache.is_sliding)
    for prompt in (longer, [*begin, *first[:4], 7, 8, 9], begin, longer):
        assert answer(prompt) == of_library(model, prompt, do_sample=False)
    answer(longer)
    assert read[0] == (len(longer) if is_windowed else 1)


def test_what_a_broken_off_pass_left_is_not_read_on_from(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    model, kept = plain(folder), Kept()
    prompt = prompts_of(folder)[0]
    answer = stream(model, prompt, max_new_tokens=LONGEST, end_ids=NO_END, kept=kept)
    next(answer)

    def run_out(*_: object) -> None:
        hook.remove()
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = model.get_decoder().layers[1].register_forward_pre_hook(run_out)
    with pytest.raises(torch.OutOfMemoryError):
        next(answer)
    assert kept.cache is not None and kept.cache.get_seq_length(0) != kept.cache.get_seq_length(1), (
        "a control"
    )
    found = list(stream(model, prompt, max_new_tokens=LONGEST, end_ids=NO_END, kept=kept))
    assert found == of_library(model, prompt, do_sample=False)
