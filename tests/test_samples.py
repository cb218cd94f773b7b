"""Answers in the middle of a run: with the adapter, without it, how far apart, and no trace of asking."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_train import adapted, adapter_of, assert_same, changed, gradient, make_recipe, only

from qadapt import control
from qadapt.adapters.lora import trainable, without_adapter
from qadapt.data.prompt import load_contract
from qadapt.errors import BadData
from qadapt.events import CheckpointSaved, Evaluated, Event, RunFinished, Sampled, StepDone, Stopped, Warned
from qadapt.model.generate import generate
from qadapt.run import resume, train
from qadapt.train import samples
from qadapt.train.samples import Samples

if TYPE_CHECKING:
    from conftest import TinyModel
    from peft import PeftModel

PROMPTS = ("say 3", "What is the capital of France?")


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "ANSWER_TOKENS", 8)


def pushed(folder: Path, **options: Any) -> PeftModel:
    """A model whose adapter is away from its start."""
    model = adapted(folder, **options)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def ask(model: PeftModel, folder: Path, *prompts: str) -> list[Event]:
    return list(Samples(model, load_contract(folder), prompts or PROMPTS).ask(7))


def test_answers_are_those_of_the_model_with_and_without_the_adapter(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    model, contract = pushed(folder), load_contract(folder)
    sampled = only(Sampled, ask(model, folder))
    assert [(event.step, event.prompt) for event in sampled] == [(7, prompt) for prompt in PROMPTS]

    def answers() -> list[str]:
        prompts = [contract.prompt_ids([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
        found = generate(model, prompts, max_new_tokens=8, end_ids=contract.end_ids, pad_id=contract.pad_id)
        return [contract.text(ids) for ids in found]

    assert [event.answer for event in sampled] == answers()
    with without_adapter(model):
        assert [event.base_answer for event in sampled] == answers()
    assert sampled[0].answer != sampled[0].base_answer, "a control: the adapter does something"


def test_the_divergence_is_the_mean_kl_over_the_answer_of_the_base(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    model, contract = pushed(folder), load_contract(folder)
    prompt = contract.prompt_ids([{"role": "user", "content": PROMPTS[0]}])
    with without_adapter(model):
        [answer] = generate(model, [prompt], max_new_tokens=8, end_ids=contract.end_ids, pad_id=0)
    ids = torch.tensor([prompt + answer])
    model.eval()
    with torch.no_grad():
        tuned = model(input_ids=ids).logits[0, len(prompt) - 1 :].double().softmax(-1)
        with without_adapter(model):
            base = model(input_ids=ids).logits[0, len(prompt) - 1 :].double().softmax(-1)
    expected = (base * (base / tuned).log()).sum(-1).mean().item()
    [sampled] = only(Sampled, ask(model, folder, PROMPTS[0]))
    assert expected > 1e-3
    assert sampled.divergence == pytest.approx(expected, rel=1e-3)


def test_a_new_adapter_answers_as_the_base_and_has_not_diverged(tiny_model: TinyModel) -> None:
    folder = tiny_model("qwen3")
    model = adapted(folder)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            parameter.data.zero_()
    for event in only(Sampled, ask(model, folder)):
        assert event.answer == event.base_answer
        assert event.divergence == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("dtype", "recompute"), [(torch.float32, False), (torch.bfloat16, True)])
def test_asking_leaves_mode_random_state_and_the_next_gradient_bit_identical(
    tiny_model: TinyModel, dtype: torch.dtype, recompute: bool
) -> None:
    folder = tiny_model("llama")
    model = adapted(folder, dtype=dtype, recompute=recompute)
    before, random = gradient(model, size=3), torch.get_rng_state()
    bits = [value.detach().clone() for value in model.parameters()]
    assert len(ask(model, folder)) == 2
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, bits, model.parameters()))
    assert_same(before, gradient(model, size=3))


def test_the_base_is_asked_once(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model("llama")
    asked: list[int] = []

    def counted(*arguments: Any, **named: Any) -> list[list[int]]:
        asked.append(len(arguments[1]))
        return generate(*arguments, **named)

    monkeypatch.setattr(samples, "generate", counted)
    samples_asked = Samples(pushed(folder), load_contract(folder), PROMPTS)
    first, second = list(samples_asked.ask(1)), list(samples_asked.ask(2))
    assert asked == [1] * 6, "two prompts of the base, then of the adapter twice"
    assert [event.base_answer for event in only(Sampled, first)] == [
        event.base_answer for event in only(Sampled, second)
    ]


def test_no_memory_for_answers_is_said_and_leaves_the_model_training(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    model = pushed(folder)

    def run_out(*_: Any, **__: Any) -> None:
        model.eval()
        torch.rand(3)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(samples, "generate", run_out)
    random = torch.get_rng_state()
    [warned] = ask(model, folder)
    assert isinstance(warned, Warned)
    assert "train.sample_prompts: CUDA out of memory. Tried to allocate 2 GiB" in warned.message
    assert warned.step == 7
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)


def test_a_prompt_that_the_template_refuses_is_an_error(tmp_path: Path, tiny_model: TinyModel) -> None:
    folder, template = tiny_model("mistral"), tmp_path / "refusing.jinja"
    template.write_text("{{ raise_exception('no turns today') }}", encoding="utf-8")
    contract = load_contract(folder, template=str(template))
    with pytest.raises(BadData, match="no turns today"):
        Samples(adapted(folder), contract, PROMPTS)


def test_a_run_samples_at_evaluations_and_its_adapter_is_that_of_a_run_that_asks_nothing(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    for name in ("silent", "asked"):
        (tmp_path / name).mkdir()
    plain = make_recipe(tmp_path / "silent", tiny_model("llama"), rehearse=False)
    list(train(plain))
    recipe = make_recipe(tmp_path / "asked", tiny_model("llama"), rehearse=False, sample_prompts=PROMPTS)
    events = []
    for event in train(recipe):
        events.append(event)
        if isinstance(event, StepDone) and event.step == 5:
            break
    events += list(resume("first", folder=str(tmp_path / "asked/runs")))
    assert isinstance(events[-1], RunFinished)
    assert [event.step for event in only(Sampled, events)] == [3, 3, 6, 6]
    kinds = [type(event) for event in events if isinstance(event, Evaluated | Sampled)]
    assert kinds == [Evaluated, Sampled, Sampled] * 2
    last = only(Sampled, events)[-1]
    assert last.divergence > 0
    assert math.isfinite(last.divergence)
    assert_same(adapter_of(tmp_path / "silent/runs/first"), adapter_of(tmp_path / "asked/runs/first"))


def test_a_run_without_held_out_rows_samples_at_the_end(tmp_path: Path, tiny_model: TinyModel) -> None:
    fields = {"evaluate_every": None, "steps": 2, "rehearse": False, "sample_prompts": PROMPTS[:1]}
    recipe = changed(make_recipe(tmp_path, tiny_model("llama"), **fields), "data", held_out=None)
    events = list(train(recipe))
    [sampled] = only(Sampled, events)
    assert sampled.step == 2
    assert events.index(sampled) < events.index(only(CheckpointSaved, events)[-1])


def test_a_run_that_is_paused_between_two_answers_asks_all_of_them_when_it_goes_on(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = tmp_path / "runs/first", 0

    def pausing(*arguments: Any, **named: Any) -> list[list[int]]:
        nonlocal asked
        asked += 1
        control.ask(run, "pause")
        return generate(*arguments, **named)

    fields = {"rehearse": False, "sample_prompts": PROMPTS}
    with monkeypatch.context() as context:
        context.setattr(samples, "generate", pausing)
        events = list(train(make_recipe(tmp_path, tiny_model("llama"), **fields)))
    assert asked == 1
    assert events[-1] == Stopped(step=3, reason="paused on request")
    assert not only(Sampled, events)
    events += list(resume("first", folder=str(tmp_path / "runs")))
    assert [event.step for event in only(Evaluated, events)] == [3, 6]
    assert [event.step for event in only(Sampled, events)] == [3, 3, 6, 6]
