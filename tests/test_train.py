"""Training end to end on tiny models: the gradient, the events, resume, what a fault leaves behind."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from qadapt import control
from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.data.batches import MicroBatch, micro_batches
from qadapt.data.conversation import Conversation, Message
from qadapt.data.prompt import load_contract
from qadapt.data.tokens import Tokens, tokens_of
from qadapt.engine.recompute import set_recompute
from qadapt.errors import BadOutput, BadRecipe, BadRun, QadaptError, Unsupported
from qadapt.events import (
    CheckpointSaved,
    DataReady,
    Evaluated,
    Event,
    MemoryMeasured,
    Resumed,
    RunFinished,
    StepDone,
    Stopped,
    Warned,
)
from qadapt.model.generate import generate
from qadapt.model.load import load_base
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe
from qadapt.run import load, resume, train
from qadapt.train import evaluation, loop
from qadapt.train.evaluation import answer_rows, evaluate_rows
from qadapt.train.optimizer import make_optimizer
from qadapt.train.step import evaluate_loss, find_gradient, train_step
from qadapt.view.journal import effective, read_events

if TYPE_CHECKING:
    from conftest import TinyModel
    from peft import PeftModel

CPU = torch.device("cpu")


def write_rows(folder: Path) -> tuple[Path, Path]:
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, numbers in zip(paths, (range(24), range(100, 106)), strict=True):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"say {number}{' please' * (number % 4)}"},
                    {"role": "assistant", "content": str(number)},
                ]
            }
            for number in numbers
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def make_recipe(folder: Path, model: Path, **train_fields: Any) -> Recipe:
    rows, held_out = write_rows(folder)
    section = {"steps": 6, "rows_per_step": 5, "learning_rate": 1e-2, "evaluate_every": 3, "rehearse": False}
    values = {
        "model": str(model),
        "adapter": {"rank": 4, "dropout": 0.1},
        "data": {"sources": [{"path": str(rows)}], "held_out": str(held_out), "length": 128},
        "train": section | train_fields,
        "memory": {"compute_dtype": "fp32", "micro_batch": 2},
        "run": {"name": "first", "folder": str(folder / "runs")},
    }
    return check_recipe(values, origin="the test")


def train_until(recipe: Recipe, *, step: int) -> list[Event]:
    """Trains a recipe that is asked to stop at a step."""
    events = []
    for event in train(recipe):
        events.append(event)
        if isinstance(event, StepDone) and event.step == step:
            control.ask(Path(recipe.run.folder) / recipe.run.name, "stop")
    return events


def train_in_two_runs(recipe: Recipe) -> None:
    """Trains a recipe, stopped after two steps, and goes on with it."""
    train_until(recipe, step=2)
    list(resume(recipe.run.name, folder=recipe.run.folder))


def only(kind: type[Event], events: Iterable[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def adapter_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_learns_and_leaves_everything_it_should(tmp_path: Path, tiny_model: TinyModel) -> None:
    events = list(train(make_recipe(tmp_path, tiny_model("llama"), steps=12)))
    steps = only(StepDone, events)
    assert [step.step for step in steps] == list(range(1, 13))
    assert steps[-1].loss < 0.8 * steps[0].loss
    evaluated = only(Evaluated, events)
    assert [event.step for event in evaluated] == [3, 6, 9, 12]
    assert evaluated[-1].loss < evaluated[0].loss
    finished = events[-1]
    assert isinstance(finished, RunFinished)
    assert finished.best_loss == min(event.loss for event in evaluated)
    run = tmp_path / "runs" / "first"
    for name in (
        "recipe.yaml",
        "plan.json",
        "environment.json",
        "data.json",
        "adapter/adapter_model.safetensors",
    ):
        assert (run / name).is_file(), name
    assert read_events(run) == events, "the journal holds what was yielded"
    config = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tiny_model("llama"))


def test_the_same_recipe_gives_the_same_adapter(tmp_path: Path, tiny_model: TinyModel) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        list(train(make_recipe(tmp_path / name, tiny_model("llama"), steps=3)))
    assert_same(adapter_of(tmp_path / "a/runs/first"), adapter_of(tmp_path / "b/runs/first"))


def test_a_resumed_run_is_the_straight_run_bit_for_bit(tmp_path: Path, tiny_model: TinyModel) -> None:
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
    straight = list(train(make_recipe(tmp_path / "straight", tiny_model("llama"))))
    folder = tmp_path / "broken" / "runs"
    events = train(make_recipe(tmp_path / "broken", tiny_model("llama")))
    for event in events:
        if isinstance(event, StepDone) and event.step == 5:  # after the checkpoint of step 3
            break
    events.close()  # type: ignore[attr-defined]
    resumed = list(resume("first", folder=str(folder)))
    assert only(Resumed, resumed)[0].step == 3
    assert_same(adapter_of(tmp_path / "straight/runs/first"), adapter_of(folder / "first"))
    counted = effective(read_events(folder / "first"))
    assert [(step.step, step.loss) for step in only(StepDone, counted)] == [
        (step.step, step.loss) for step in only(StepDone, straight)
    ]


def test_a_request_to_stop_leaves_a_run_that_goes_on(tmp_path: Path, tiny_model: TinyModel) -> None:
    run = tmp_path / "runs" / "first"
    events = train_until(make_recipe(tmp_path, tiny_model("llama")), step=2)
    assert isinstance(events[-1], Stopped)
    assert events[-1].step == 2
    assert isinstance(events[-2], CheckpointSaved)
    assert not control.is_asked(run, "stop")
    assert isinstance(list(resume("first", folder=str(tmp_path / "runs")))[-1], RunFinished)


def test_a_request_that_an_earlier_process_left_does_not_stop_the_resumed_run(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    events = train(make_recipe(tmp_path, tiny_model("llama")))
    next(event for event in events if isinstance(event, CheckpointSaved))
    events.close()  # type: ignore[attr-defined]
    control.ask(tmp_path / "runs/first", "stop")
    assert isinstance(list(resume("first", folder=str(tmp_path / "runs")))[-1], RunFinished)


def test_two_processes_do_not_work_on_one_run(tmp_path: Path, tiny_model: TinyModel) -> None:
    events = train(make_recipe(tmp_path, tiny_model("llama")))
    next(event for event in events if isinstance(event, StepDone))
    with pytest.raises(BadRun, match="Another process works on the run first"):
        list(resume("first", folder=str(tmp_path / "runs")))
    assert isinstance(list(events)[-1], RunFinished)


def test_a_damaged_best_checkpoint_gives_the_last_step_and_a_warning(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    wild = {"learning_rate": 1.0, "clip_norm": None, "steps": 40, "evaluate_every": 1, "patience": 1}
    best, ending = 0, []
    for event in train(make_recipe(tmp_path, tiny_model("llama"), **wild)):
        ending.append(event)
        if isinstance(event, Evaluated) and event.is_best:
            best = event.step
        elif isinstance(event, CheckpointSaved) and event.step > best > 0:  # the best one was saved before
            (tmp_path / f"runs/first/checkpoints/step-{best:06d}/adapter.safetensors").write_bytes(b"")
    assert any(f"step-{best:06d} is damaged" in warned.message for warned in only(Warned, ending))
    assert isinstance(ending[-1], RunFinished)
    assert ending[-1].best_step == ending[-1].step == best + 1


def test_a_run_goes_on_from_another_folder(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = changed(make_recipe(tmp_path, tiny_model("llama")), "data", held_out="held_out.jsonl")
    events = train(changed(recipe, "data", sources=[{"path": "train.jsonl"}]))
    next(event for event in events if isinstance(event, CheckpointSaved))
    events.close()  # type: ignore[attr-defined]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert isinstance(list(resume("first", folder=str(tmp_path / "runs")))[-1], RunFinished)


def test_patience_stops_a_run_that_no_longer_improves(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = make_recipe(
        tmp_path,
        tiny_model("llama"),
        steps=40,
        evaluate_every=1,
        patience=2,
        learning_rate=1.0,
        clip_norm=None,
    )
    events = list(train(recipe))
    assert isinstance(events[-1], RunFinished)
    assert events[-1].step < 40
    assert events[-1].best_step == events[-1].step - 2


def test_measured_memory_agrees_with_the_prediction_where_it_is_exact(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    events = list(train(make_recipe(tmp_path, tiny_model("llama"), steps=1)))
    measured = only(MemoryMeasured, events)[-1].measured
    plan = json.loads((tmp_path / "runs/first/plan.json").read_text(encoding="utf-8"))
    for category in ("base_weights", "unquantized", "adapters", "optimizer"):
        assert plan["predicted"][category] == pytest.approx(measured[category], rel=0.02), category


def test_a_finished_run_loads_with_its_adapter(tmp_path: Path, tiny_model: TinyModel) -> None:
    list(train(make_recipe(tmp_path, tiny_model("llama"), steps=8)))
    tuned = load("first", folder=str(tmp_path / "runs"), device="cpu")
    trained_under = json.loads((tmp_path / "runs/first/adapter/qadapt.json").read_text(encoding="utf-8"))
    assert tuned.contract.fingerprint == trained_under["prompt_fingerprint"]
    prompt = tuned.contract.prompt_ids([{"role": "user", "content": "say 3"}])
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        with_adapter = tuned.model(input_ids=ids).logits
        with tuned.model.disable_adapter():
            without = tuned.model(input_ids=ids).logits
    assert not torch.allclose(with_adapter, without)


# --- what a step computes ---------------------------------------------------------------------------------


def adapted(model: Path, *, recompute: bool = False, dtype: torch.dtype = torch.float32) -> PeftModel:
    base = load_base(model, quantization="nf4", double_quant=True, dtype=dtype, device=CPU)
    if recompute:
        set_recompute(base, "all")
    made = attach_lora(base, Lora(rank=4, alpha=8), dtype=dtype, seed=0)
    draw = torch.Generator().manual_seed(1)
    for parameter in trainable(made).values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return made.train()


def rows(count: int = 5) -> list[Tokens]:
    draw = torch.Generator().manual_seed(2)
    made = []
    for index in range(count):
        length = 7 + 5 * index
        ids = torch.randint(5, 200, (length,), generator=draw).tolist()
        supervised = (torch.rand(length, generator=draw) < 0.5).tolist()
        made.append(tokens_of(ids, (*supervised[:-1], True), place="row"))
    return made


def gradient(model: PeftModel, *, size: int, length_step: int = 1) -> dict[str, Tensor]:
    """The gradient that a step sees, caught before the update uses it."""
    optimizer = make_optimizer(trainable(model), kind="adamw", betas=(0.9, 0.999), weight_decay=0.0)
    caught: dict[str, Tensor] = {}

    def catch(learning_rate: float) -> None:
        caught.update({name: value.grad.clone() for name, value in optimizer.parameters.items()})  # type: ignore[union-attr]

    optimizer.step = catch  # type: ignore[method-assign]
    train_step(
        model,
        optimizer,
        micro_batches(rows(), size=size, pad_id=0, length_step=length_step, most=31),
        learning_rate=0.0,
        clip_norm=None,
        scaler=None,
    )
    return caught


def naive_gradient(model: PeftModel) -> dict[str, Tensor]:
    """One row at a time, all logits, `F.cross_entropy` over the learned tokens of all rows."""
    chosen = rows()
    count = sum(row.supervised_count for row in chosen)
    for row in chosen:
        logits = model(input_ids=torch.tensor([row.ids.tolist()])).logits[0, :-1]
        targets = torch.tensor([t if s else -100 for t, s in zip(row.ids, row.supervised, strict=True)])[1:]
        (
            functional.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum") / count
        ).backward()
    found = {name: value.grad.clone() for name, value in trainable(model).items() if value.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize(
    ("size", "recompute", "length_step"), [(5, False, 1), (2, False, 1), (2, True, 1), (1, True, 8)]
)
def test_a_steps_gradient_is_the_naive_one(
    tiny_model: TinyModel, family: str, size: int, recompute: bool, length_step: int
) -> None:
    model = adapted(tiny_model(family), recompute=recompute)
    expected, found = naive_gradient(model), gradient(model, size=size, length_step=length_step)
    assert found.keys() == expected.keys()
    assert max(value.abs().max().item() for value in expected.values()) > 1e-3, (
        "a control: there is a gradient"
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)  # fp32


def test_while_it_trains_garbage_is_not_looked_for_among_all_that_was_there(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    for event in (events := train(make_recipe(tmp_path, tiny_model("llama"), steps=2))):
        if isinstance(event, StepDone):
            assert gc.get_freeze_count() > 100_000
            break
    events.close()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_rows_in_16_bits_on_a_cpu_are_filled_up_to_few_lengths(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama"), steps=5, evaluate_every=None)
    values = recipe.model_dump()
    values["memory"] |= {"compute_dtype": dtype, "micro_batch": 1}
    values["data"] |= {"packing": False, "held_out": None}
    lengths: set[int] = set()

    def seen(model: PeftModel, optimizer: Any, batches: list[MicroBatch], **options: Any) -> Any:
        lengths.update(batch.input_ids.shape[1] for batch in batches)
        return find_gradient(model, optimizer, batches, **options)

    monkeypatch.setattr("qadapt.data.batches.LENGTH_STEP", 4)
    monkeypatch.setattr(loop, "find_gradient", seen)
    events = list(train(check_recipe(values, origin="the test")))
    longest = only(DataReady, events)[0].longest_row_tokens
    assert max(lengths) == longest
    assert (dtype == "bf16") == all(length % 4 == 0 or length == longest for length in lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_measured_are_filled_up_likewise(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    lengths: list[int] = []

    def seen(model: PeftModel, batches: Iterable[MicroBatch]) -> float:
        lengths.extend(batch.input_ids.shape[1] for batch in batches)
        return 1.0

    monkeypatch.setattr(evaluation, "evaluate_loss", seen)
    rows = [tokens_of(range(3, 3 + count), [True] * count, place="") for count in (5, 40, 70)]
    evaluate_rows(adapted(tiny_model("llama"), dtype=dtype), rows, size=1, pad_id=0)
    assert sorted(set(lengths)) == ([5, 40, 70] if dtype == torch.float32 else [32, 64, 70])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evaluation_or_an_answer_between_two_steps_changes_nothing(
    tiny_model: TinyModel, dtype: torch.dtype
) -> None:
    model = adapted(tiny_model("llama"), dtype=dtype)
    before = gradient(model, size=3)
    evaluate_loss(model, micro_batches(rows(), size=3, pad_id=0))
    generate(model, [[5, 6, 7]], max_new_tokens=2, end_ids=frozenset({1}), pad_id=0)
    assert_same(before, gradient(model, size=3))


def test_every_four_bit_layer_keeps_its_weights_as_they_are(tiny_model: TinyModel) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes would repack them at the first evaluation."""
    model = adapted(tiny_model("llama"))
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_a_width_that_four_bits_on_a_cpu_compute_wrong_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(Unsupported, match="96 wide"):
        adapted(tiny_model("llama", width=96))


def test_an_update_whose_loss_is_no_number_is_left_out(tiny_model: TinyModel) -> None:
    model = adapted(tiny_model("llama"))
    parameters = trainable(model)
    name = next(iter(parameters))
    parameters[name].data.fill_(math.nan)
    others = {key: value.detach().clone() for key, value in parameters.items() if key != name}
    optimizer = make_optimizer(parameters, kind="adamw", betas=(0.9, 0.999), weight_decay=0.0)
    batches = micro_batches(rows(), size=5, pad_id=0)
    result = train_step(model, optimizer, batches, learning_rate=1.0, clip_norm=1.0, scaler=None)
    assert math.isnan(result.loss)
    assert not result.is_applied
    assert_same(others, {key: value.detach() for key, value in parameters.items() if key != name})
    assert all(parameter.grad is None for parameter in parameters.values())


def test_a_step_that_is_left_between_micro_batches_leaves_no_gradient(tiny_model: TinyModel) -> None:
    model = adapted(tiny_model("llama"))
    parameters = trainable(model)
    optimizer = make_optimizer(parameters, kind="adamw", betas=(0.9, 0.999), weight_decay=0.0)
    asked: list[int] = []

    def is_leaving() -> bool:
        asked.append(1)
        return len(asked) == 2

    batches = micro_batches(rows(), size=1, pad_id=0)
    assert len(batches) > 3
    left = find_gradient(model, optimizer, batches, clip_norm=1.0, scaler=None, is_leaving=is_leaving)
    assert left is None
    assert len(asked) == 2
    assert all(parameter.grad is None for parameter in parameters.values())


def test_a_held_out_loss_that_is_no_number_is_never_the_best(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([math.nan, 3.0, math.inf, 2.0])
    monkeypatch.setattr(loop, "evaluate_loss", lambda *_: next(losses))
    events = list(train(make_recipe(tmp_path, tiny_model("llama"), steps=4, evaluate_every=1)))
    assert [event.is_best for event in only(Evaluated, events)] == [False, True, False, True]
    assert only(RunFinished, events)[0].best_step == 4
    said = [event.message for event in only(Warned, events) if "held-out loss" in event.message]
    assert [message.split(",")[0] for message in said] == [
        "The held-out loss after step 1 is nan",
        "The held-out loss after step 3 is inf",
    ]
    assert list(map(repr, read_events(tmp_path / "runs" / "first"))) == list(map(repr, events))


def test_answers_do_not_depend_on_who_else_is_in_the_batch(tiny_model: TinyModel) -> None:
    model = adapted(tiny_model("llama"))
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11, 12, 13, 14]]
    settings: dict[str, Any] = {"max_new_tokens": 8, "end_ids": frozenset({1}), "pad_id": 0}
    together = generate(model, prompts, **settings)
    alone = [generate(model, [prompt], **settings)[0] for prompt in prompts]
    assert together == alone


def test_rows_that_ask_nothing_are_passed_over(tiny_model: TinyModel) -> None:
    folder = tiny_model("gemma2")
    user, answer = Message("user", "say 1"), Message("assistant", "1")
    nothing_asked = [
        Conversation((answer, user), "row 1"),
        Conversation((user,), "row 2"),
        Conversation((Message("system", "be short"), answer), "row 3"),
    ]
    asks = Conversation((user, answer), "row 4")
    contract = load_contract(folder)
    given = answer_rows(adapted(folder), contract, [*nothing_asked, asks], max_new_tokens=2)
    assert [(each.question, each.expected) for each in given] == [("say 1", "1")]
    assert answer_rows(adapted(folder), contract, nothing_asked, max_new_tokens=2) == ()


def test_a_row_is_asked_with_its_tools(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = tiny_model("qwen3"), []
    monkeypatch.setattr(
        evaluation, "generate", lambda _, prompts, **__: asked.extend(prompts) or [[] for _ in prompts]
    )
    turns = (Message("user", "say 1"), Message("assistant", "1"))
    tools = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
    contract = load_contract(folder)
    row = Conversation(turns, "row", tools)
    answer_rows(adapted(folder), contract, [row], max_new_tokens=2)
    trained = contract.encode(row)
    assert asked == [trained.ids[: int(trained.supervised.argmax())].tolist()]


# --- bad input --------------------------------------------------------------------------------------------


def refused(recipe: Recipe) -> QadaptError:
    with pytest.raises(QadaptError) as caught:
        list(train(recipe))
    return caught.value


def changed(recipe: Recipe, section: str, **fields: Any) -> Recipe:
    values = recipe.model_dump()
    values[section].update(fields)
    return check_recipe(values, origin="the test")


def test_an_existing_run_name_is_refused_and_the_run_left_alone(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama"), steps=1)
    list(train(recipe))
    before = sorted(path for path in (tmp_path / "runs").rglob("*"))
    error = refused(recipe)
    assert isinstance(error, BadRun)
    assert "There is a run named 'first'" in error.problem
    assert sorted(path for path in (tmp_path / "runs").rglob("*")) == before


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama"))
    missing = changed(recipe, "data", sources=[{"path": str(tmp_path / "none.jsonl")}])
    assert "There is no data file" in refused(missing).problem
    wrong_target = changed(recipe, "adapter", targets=["q_prj"])
    assert "q_prj" in refused(wrong_target).problem
    too_long = changed(recipe, "data", length=1_000_000)
    assert "context" in refused(too_long).problem
    wide = changed(recipe, "adapter", rank=4096)
    assert "rank" in refused(wide).problem
    assert not (tmp_path / "runs" / "first").exists()


def test_a_budget_that_is_too_small_says_what_would_fit(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = changed(make_recipe(tmp_path, tiny_model("llama")), "memory", budget="100KiB")
    error = refused(recipe)
    assert type(error).__name__ == "DoesNotFit"
    assert not (tmp_path / "runs" / "first").exists()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, tiny_model: TinyModel) -> None:
    (tmp_path / "runs").write_text("a file stands where the folder should be", encoding="utf-8")
    error = refused(make_recipe(tmp_path, tiny_model("llama")))
    assert isinstance(error, BadOutput)


def test_a_run_with_changed_rows_is_not_resumed(tmp_path: Path, tiny_model: TinyModel) -> None:
    events = train(make_recipe(tmp_path, tiny_model("llama")))
    for event in events:
        if isinstance(event, CheckpointSaved):
            break
    events.close()  # type: ignore[attr-defined]
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text(encoding="utf-8").replace("say 7", "say 8"), encoding="utf-8")
    with pytest.raises(BadRun, match="changed: rows"):
        list(resume("first", folder=str(tmp_path / "runs")))


def test_resume_refuses_what_cannot_be_resumed(tmp_path: Path, tiny_model: TinyModel) -> None:
    folder = str(tmp_path / "runs")
    with pytest.raises(BadRun, match="There is no run 'first'"):
        list(resume("first", folder=folder))
    list(train(make_recipe(tmp_path, tiny_model("llama"), steps=1)))
    with pytest.raises(BadRun, match="has finished"):
        list(resume("first", folder=folder))
    journal = tmp_path / "runs/first/events.jsonl"
    journal.write_text(journal.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    (tmp_path / "runs/first/plan.json").write_text('{"version": 1', encoding="utf-8")
    with pytest.raises(BadRun, match=r"plan.*cannot be read"):
        list(resume("first", folder=folder))


def test_a_run_killed_before_its_first_checkpoint_starts_again_the_same(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
    list(train(make_recipe(tmp_path / "straight", tiny_model("llama"))))
    events = train(make_recipe(tmp_path / "broken", tiny_model("llama")))
    for event in events:
        if isinstance(event, StepDone) and event.step == 2:
            break
    events.close()  # type: ignore[attr-defined]
    resumed = list(resume("first", folder=str(tmp_path / "broken/runs")))
    assert only(Resumed, resumed)[0].step == 0
    assert_same(adapter_of(tmp_path / "straight/runs/first"), adapter_of(tmp_path / "broken/runs/first"))


def test_cuda_is_refused_where_there_is_none(tmp_path: Path, tiny_model: TinyModel) -> None:
    if torch.cuda.is_available():
        return
    recipe = changed(make_recipe(tmp_path, tiny_model("llama")), "memory", device="cuda")
    error = refused(recipe)
    assert isinstance(error, BadRecipe)
    assert "no CUDA device" in error.problem
