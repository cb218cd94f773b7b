"""A run that is not well says so: where a number stopped being finite, in which rows, what else is odd."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_train import CPU, adapter_of, assert_same, make_recipe, only
from torch import Tensor, nn

from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.adapters.method import attach as attach_adapter
from qadapt.data.batches import MicroBatch, micro_batches, packed_batches
from qadapt.data.tokens import Tokens, tokens_of
from qadapt.engine.ledger import Ledger
from qadapt.engine.recompute import set_recompute
from qadapt.errors import Diverged
from qadapt.events import CheckpointSaved, Event, RunFinished, StepDone, UpdateSkipped, Warned
from qadapt.model.load import load_base
from qadapt.run import resume, train
from qadapt.train.checkpoint import load_checkpoint, random_state
from qadapt.train.gauges import History, clipped, dead, diverging, find_ill, learned, spike, stuck
from qadapt.train.health import Health
from qadapt.train.movement import find_unmoved, fingerprints
from qadapt.train.optimizer import make_optimizer
from qadapt.train.replay import Finding, Replay, _is_finite
from qadapt.units import MIB

if TYPE_CHECKING:
    from conftest import TinyModel
    from peft import PeftModel

WHERE = "model.layers.1.self_attn.o_proj"
NAME = f"base_model.model.{WHERE}"


def tiny(folder: Path, *, recompute: bool = False, dropout: float = 0.0) -> PeftModel:
    base = load_base(folder, quantization="nf4", double_quant=True, dtype=torch.float32, device=CPU)
    set_recompute(base, "all" if recompute else "none")
    model = attach_lora(base, Lora(rank=4, alpha=8, dropout=dropout), dtype=torch.float32, seed=0).train()
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def some_rows() -> list[Tokens]:
    rows = []
    for number in range(5):
        ids = [20 + (7 * number + at) % 200 for at in range(10 + 3 * number)]
        learned_at = [at >= 4 for at in range(len(ids))]
        rows.append(tokens_of(ids, learned_at, place=f"train.jsonl, line {number + 1}"))
    return rows


def replay_of(model: PeftModel, rows: Sequence[Tokens], *, is_packed: bool = False) -> Replay:
    def divide(chosen: Sequence[Tokens]) -> list[MicroBatch]:
        if is_packed:
            return packed_batches(chosen, capacity=40)
        return micro_batches(chosen, size=2, pad_id=0)

    return Replay(model, trainable(model), rows=rows, divide=divide, random=random_state(CPU))


def module(model: PeftModel, name: str) -> nn.Module:
    return dict(model.named_modules())[name]


class Poison:
    """Makes what a module gives, or the gradient that goes into it, no number in rows that hold a token."""

    def __init__(self, token: int | None = None) -> None:
        self.token = token
        self.is_hit = False

    def ids_seen(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.is_hit = self.token is None or bool((arguments[0] == self.token).any())

    def output(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * math.nan if self.is_hit else output

    def gradient(self, gradient: Tensor) -> Tensor:
        return gradient * math.nan if self.is_hit else gradient

    def input_gradient(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if arguments[0].requires_grad:
            arguments[0].register_hook(self.gradient)


def poisoned(model: PeftModel, *, kind: str, token: int | None = None) -> None:
    poison = Poison(token)
    module(model, "base_model.model.model.embed_tokens").register_forward_pre_hook(poison.ids_seen)
    if kind == "forward":
        module(model, NAME).register_forward_hook(poison.output)
    elif kind == "backward":
        module(model, NAME).register_forward_pre_hook(poison.input_gradient)
    else:
        trainable(model)[f"{NAME}.lora_A.default.weight"].register_hook(poison.gradient)


@pytest.mark.parametrize("kind", ["forward", "backward", "gradient"])
@pytest.mark.parametrize(("recompute", "is_packed"), [(False, False), (True, False), (False, True)])
def test_the_cause_names_the_module_and_the_row(
    tiny_model: TinyModel, kind: str, recompute: bool, is_packed: bool
) -> None:
    model = tiny(tiny_model("llama"), recompute=recompute)
    rows = some_rows()
    poisoned(model, kind=kind, token=int(rows[2].ids[1]))
    expected = {
        "forward": WHERE,
        "backward": WHERE,
        "gradient": f"{WHERE}.lora_A.default.weight",
    }
    found = replay_of(model, rows, is_packed=is_packed).find_cause()
    carriers = tuple(row.place for row in rows if rows[2].ids[1] in row.ids)
    assert found == Finding(kind, expected[kind], carriers)
    assert 1 <= len(carriers) < len(rows)


def test_a_row_is_named_though_only_recomputation_and_dropout_stand_between(tiny_model: TinyModel) -> None:
    model = tiny(tiny_model("qwen3"), recompute=True, dropout=0.2)
    poisoned(model, kind="backward")
    found = replay_of(model, some_rows()).find_cause()
    assert (found.kind, found.where, found.is_every_row) == ("backward", WHERE, True)


def test_a_broken_adapter_and_a_fault_that_does_not_come_again_are_told_apart(tiny_model: TinyModel) -> None:
    model = tiny(tiny_model("llama"))
    assert replay_of(model, some_rows()).find_cause() == Finding("gone")
    trainable(model)[f"{NAME}.lora_B.default.weight"].data[0, 0] = math.inf
    found = replay_of(model, some_rows()).find_cause()
    assert found == Finding("adapter", f"{WHERE}.lora_B.default.weight")


def test_a_module_whose_input_is_bad_already_is_not_blamed(tiny_model: TinyModel) -> None:
    model = tiny(tiny_model("llama"))
    poison = Poison()
    poison.is_hit = True

    def values(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0] * math.nan,)  # what attention itself gives

    module(model, NAME).register_forward_pre_hook(values)
    found = replay_of(model, some_rows()).find_cause()
    assert found.where == "model.layers.1.self_attn"


def test_masks_of_very_low_numbers_are_not_taken_for_bad_ones(tiny_model: TinyModel) -> None:
    """gemma2 hands its layers such masks; only eager attention has its soft caps."""
    model = tiny(tiny_model("gemma2"))
    poison = Poison()
    poison.is_hit = True
    module(model, NAME).register_forward_hook(poison.output)
    found = replay_of(model, some_rows()).find_cause()
    assert (found.kind, found.where) == ("forward", WHERE)


def test_a_number_among_many_that_is_none_is_seen() -> None:
    lowest = torch.finfo(torch.bfloat16).min
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert _is_finite(torch.full((4, 9), torch.finfo(dtype).min, dtype=dtype))
        for bad in (math.nan, math.inf, -math.inf):
            values = torch.full((4, 9), max(lowest, torch.finfo(dtype).min), dtype=dtype)
            values[2, 3] = bad
            assert not _is_finite(values)
            assert not _is_finite(values.T[3])
    assert _is_finite(torch.empty(0))
    assert not _is_finite(torch.tensor(math.nan))


def test_no_memory_to_look_is_said(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Replay, "_cause", run_out)
    assert replay_of(tiny(tiny_model("llama")), some_rows()).find_cause() == Finding("memory")


@pytest.mark.parametrize("kind", ["forward", "gradient"])
def test_looking_leaves_no_gradient_and_the_random_state_it_found(tiny_model: TinyModel, kind: str) -> None:
    model = tiny(tiny_model("llama"), dropout=0.3)
    replay = replay_of(model, some_rows())
    poisoned(model, kind=kind)
    torch.rand(7)
    before = torch.get_rng_state()
    replay.find_cause()
    replay.find_heaviest()
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(parameter.grad is None for parameter in trainable(model).values())
    assert not any(each._forward_hooks for name, each in model.named_modules() if name != NAME)


def test_the_tokens_that_carry_a_loss_are_those_of_the_odd_row(tiny_model: TinyModel) -> None:
    model = tiny(tiny_model("llama"))
    embedding = model.get_output_embeddings().weight
    rows = some_rows()
    odd = int(rows[4].ids[10])
    with torch.no_grad():
        embedding[odd] *= -40  # a token that the model is sure never comes, or always
    heaviest = replay_of(model, rows).find_heaviest()
    assert heaviest is not None
    assert heaviest.learned == sum(row.supervised_count for row in rows)
    assert 0.3 < heaviest.share <= 1
    assert set(heaviest.places) <= {row.place for row in rows}


# --- the run


ODD_LINE = 25


def odd_recipe(folder: Path, model: Path, **fields: Any) -> Any:
    """The recipe of `test_train`, with one more row, which alone has a z."""
    recipe = make_recipe(folder, model, **{"seed": 1, "rehearse": False, **fields})
    turns = [{"role": "user", "content": "say zz"}, {"role": "assistant", "content": "7"}]
    with (folder / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": turns}) + "\n")
    return recipe


@pytest.fixture
def poison_z(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PeftModel]]:
    """Every model that is adapted has a poisoned gradient in rows with a z."""
    made: list[PeftModel] = []
    from transformers import AutoTokenizer

    [token] = AutoTokenizer.from_pretrained(tiny_model("llama")).encode("z", add_special_tokens=False)

    def attach(*arguments: Any, **named: Any) -> PeftModel:
        model = attach_adapter(*arguments, **named)
        poisoned(model, kind="gradient", token=token)
        made.append(model)
        return model

    monkeypatch.setattr("qadapt.running.model.attach", attach)
    yield made


def frozen_bits(model: PeftModel) -> list[Tensor]:
    return [value.detach().clone() for value in model.parameters() if not value.requires_grad]


def test_a_step_with_a_gradient_that_is_no_number_changes_nothing_and_names_the_row(
    tmp_path: Path, tiny_model: TinyModel, poison_z: list[PeftModel]
) -> None:
    events, base = [], []
    for event in train(odd_recipe(tmp_path, tiny_model("llama"), checkpoint_every=1, keep_checkpoints=9)):
        events.append(event)
        base = base or (frozen_bits(poison_z[0]) if isinstance(event, StepDone) else [])
    [skipped] = only(UpdateSkipped, events)
    assert math.isfinite(skipped.loss)
    assert math.isnan(skipped.gradient_norm)
    assert skipped.cause.startswith(f"in the gradient of {WHERE}.lora_A.default.weight alone (")
    assert skipped.cause.endswith(f"train.jsonl, line {ODD_LINE})"), "no other row is named"
    assert skipped.cause.count(", line ") == 1
    assert isinstance(events[-1], RunFinished)
    before, after = (
        load_checkpoint(tmp_path / f"runs/first/checkpoints/step-{step:06d}")
        for step in (skipped.step - 1, skipped.step)
    )
    assert_same(before.adapter, after.adapter)
    assert_same(before.optimizer, after.optimizer)
    assert all(map(torch.equal, base, frozen_bits(poison_z[0])))
    assert all(torch.isfinite(value).all() for value in adapter_of(tmp_path / "runs/first").values())


def test_a_run_goes_on_after_a_look_as_if_nobody_had_looked(
    tmp_path: Path, tiny_model: TinyModel, poison_z: list[PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("looked", "blind"):
        (tmp_path / name).mkdir()
        recipe = odd_recipe(tmp_path / name, tiny_model("llama"))
        assert len(only(UpdateSkipped, list(train(recipe)))) == 1
        monkeypatch.setattr(Replay, "find_cause", lambda _: Finding("gone"))
    assert_same(adapter_of(tmp_path / "looked/runs/first"), adapter_of(tmp_path / "blind/runs/first"))


def test_three_bad_steps_in_a_row_end_the_run_with_cause_and_cure_and_a_whole_checkpoint(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[PeftModel] = []

    def attach(*arguments: Any, **named: Any) -> PeftModel:
        models.append(attach_adapter(*arguments, **named))
        return models[-1]

    monkeypatch.setattr("qadapt.running.model.attach", attach)
    events: list[Event] = []
    with pytest.raises(Diverged) as raised:
        for event in train(make_recipe(tmp_path, tiny_model("llama"), rehearse=False, steps=9)):
            events.append(event)
            if isinstance(event, CheckpointSaved):
                poisoned(models[0], kind="forward")
    steps = [event.step for event in only(UpdateSkipped, events)]
    assert steps == [steps[0], steps[0] + 1, steps[0] + 2]
    assert "3 updates in a row" in raised.value.problem
    assert f"in the forward pass, in {WHERE} (every row of the step)" in raised.value.problem
    assert "Lower train.learning_rate" in raised.value.cure
    assert isinstance(list(resume("first", folder=str(tmp_path / "runs")))[-1], RunFinished)


def test_a_resumed_run_says_what_the_straight_one_says(
    tmp_path: Path, tiny_model: TinyModel, poison_z: list[PeftModel]
) -> None:
    said = []
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
        fields = {"steps": 6, "checkpoint_every": 1, "evaluate_every": None}
        events = train(odd_recipe(tmp_path / name, tiny_model("llama"), **fields))
        for event in events:
            if name == "broken" and isinstance(event, CheckpointSaved) and event.step == 2:
                break
        events.close()  # type: ignore[attr-defined]
        if name == "broken":
            list(resume("first", folder=str(tmp_path / "broken/runs")))
        last = load_checkpoint(sorted((tmp_path / name / "runs/first/checkpoints").iterdir())[-1])
        said.append(last.values["health"])
    assert said[0] == said[1]
    assert said[0]["skipped"] >= 1


# --- the counting


def fresh(*, clip_norm: float | None = 1.0, steps: int = 100) -> Health:
    parameters = {"a": torch.zeros(4, requires_grad=True), "b": torch.ones(4, requires_grad=True)}
    optimizer = make_optimizer(parameters, kind="adamw", betas=(0.9, 0.99), weight_decay=0.0)
    return Health(optimizer, steps=steps, clip_norm=clip_norm)


def done(step: int, *, loss: float = 1.0, norm: float = 0.5) -> StepDone:
    return StepDone(
        step=step, loss=loss, learning_rate=1e-4, gradient_norm=norm, tokens=10, supervised_tokens=5, rows=2,
        seconds=0.1,
    )  # fmt: skip


def events_of(health: Health, step: StepDone, *, scale: float | None = None) -> list[Event]:
    model = nn.Linear(1, 1)
    gone = Replay(model, {}, rows=[], divide=lambda _: [], random=random_state(CPU))  # type: ignore[arg-type]
    is_applied = math.isfinite(step.loss) and math.isfinite(step.gradient_norm)
    return list(health.after_step(step, is_applied=is_applied, loss_scale=scale, replay=lambda: gone))


@pytest.fixture
def no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replay, "find_cause", lambda _: Finding("gone"))
    monkeypatch.setattr(Replay, "find_heaviest", lambda _: None)


@pytest.mark.usefixtures("no_look")
def test_two_in_a_row_are_borne_and_ten_of_a_short_run_are_not() -> None:
    health, step = fresh(), 0
    for _ in range(4):
        for is_bad in (True, True, False):
            step += 1
            events_of(health, done(step, norm=math.nan if is_bad else 0.5))
    events_of(health, done(step + 1, norm=math.nan))
    with pytest.raises(Diverged, match="10 updates were left out"):
        events_of(health, done(step + 2, norm=math.inf))


@pytest.mark.usefixtures("no_look")
def test_a_long_run_bears_one_in_a_hundred() -> None:
    health = fresh(steps=5000)
    for step in range(1, 99, 2):
        events_of(health, done(step, norm=math.nan))
        events_of(health, done(step + 1))
    with pytest.raises(Diverged, match="50 updates were left out"):
        events_of(health, done(99, norm=math.nan))


@pytest.mark.usefixtures("no_look")
def test_an_overflow_that_lowers_the_loss_scale_is_told_and_not_counted() -> None:
    health = fresh()
    for step in range(16):
        [skipped] = events_of(health, done(step, norm=math.inf), scale=65536 / 2 ** (step + 1))
        assert isinstance(skipped, UpdateSkipped)
        assert "the loss scale falls to" in skipped.cause
    assert health.values()["skipped"] == 0
    events_of(health, done(17, norm=math.inf), scale=0.5)
    events_of(health, done(18, norm=math.inf), scale=0.25)
    with pytest.raises(Diverged):
        events_of(health, done(19, norm=math.inf), scale=0.125)


@pytest.mark.usefixtures("no_look")
def test_health_goes_through_json_at_any_step_and_says_the_same_after_it() -> None:
    draw = random.Random(3)
    losses = [draw.lognormvariate(0, 0.4) * (20 if draw.random() < 0.03 else 1) for _ in range(300)]
    norms = [math.nan if draw.random() < 0.01 else 3 * loss for loss in losses]
    straight, broken = fresh(clip_norm=0.1, steps=300), fresh(clip_norm=0.1, steps=300)
    said = 0
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1):
        events = [repr(event) for event in events_of(straight, done(step, loss=loss, norm=norm))]
        text = json.dumps(broken.values(), allow_nan=False)
        broken = fresh(clip_norm=0.1, steps=300)
        broken.restore(json.loads(text))
        again = [repr(event) for event in events_of(broken, done(step, loss=loss, norm=norm))]
        assert [_untimed(text) for text in again] == [_untimed(text) for text in events]
        said += len(events)
    assert said >= 4, "a control: there was something to say"


def _untimed(event: str) -> str:
    return event.partition(", ")[2]


@pytest.mark.usefixtures("no_look")
def test_a_gauge_speaks_once_and_again_only_after_it_was_well() -> None:
    health = fresh(clip_norm=None)
    spikes = {40, 43, 50, 120}
    warned = [
        event.step
        for step in range(1, 140)
        for event in events_of(health, done(step, loss=9.0 if step in spikes else 1.0 + step % 3 / 100))
        if isinstance(event, Warned) and "jumped" in event.message
    ]
    assert warned == [40, 120]


# --- the gauges


def test_a_loss_far_above_those_before_it_is_a_spike_and_noise_is_none() -> None:
    assert spike([2.0] * 20 + [2.9]) is None
    note = spike([2.0, 2.1, 1.9] * 10 + [6.0])
    assert note is not None
    assert "jumped to 6" in note.message
    assert spike([1.0] * 10 + [3.9]) is None, "too few to compare with"
    exploded = spike([2.7, 2.9, 88.0])
    assert exploded is not None
    assert "from 2.7 to 88 within 3 steps" in exploded.message and "a tenth" in exploded.cure
    assert spike([0.001] * 30 + [0.05]) is None
    draw = random.Random(0)
    noise = [draw.lognormvariate(0.0, 0.3) for _ in range(20_000)]
    false_alarms = sum(spike(noise[at : at + 33]) is not None for at in range(len(noise) - 33))
    assert false_alarms <= 8, "of 20,000 steps"


def after(pairs: list[tuple[float, float]]) -> History:
    history = History()
    for loss, norm in pairs:
        history = history.after(loss, norm)
    return history


def test_a_run_that_climbs_is_diverging_and_harder_rows_alone_are_not() -> None:
    learning = [(2.0 - step / 100, 0.5) for step in range(100)]
    assert diverging(after(learning)) is None
    assert diverging(after(learning + [(1.6, 0.6)] * 40)) is None
    assert diverging(after(learning + [(0.9, 5.0)] * 40)) is None
    note = diverging(after(learning + [(2.5, 4.0)] * 40))
    assert note is not None
    assert "is 2.5 (its lowest was 1.17)" in note.message
    assert "learning_rate" in note.cure


def test_a_run_that_left_its_low_without_a_gradient_to_lead_back_is_stuck() -> None:
    learning = [(2.0 - step / 100, 0.5 + step % 5 / 10) for step in range(100)]
    assert stuck(after(learning)) is None
    assert stuck(after(learning + [(1.6, 0.8)] * 40)) is None, "harder rows"
    note = stuck(after(learning + [(7.5, 0.1)] * 40))
    assert note is not None
    assert "is 7.5 (its lowest was 1.17), and the median gradient norm, 0.1, is the lowest" in note.message
    assert "a tenth of train.learning_rate" in note.cure
    at_once = [(2.0, 1.0)] * 8 + [(9.0, 0.3)] * 32
    assert stuck(after(at_once)) is not None, "a rate far too high shows in the first window"
    ill = dict(find_ill(after(at_once), clip_norm=1.0, trained_values=10))
    assert [name for name, note in ill.items() if note] == ["stuck"], "one cause, one warning"


def test_a_dead_gradient_a_learned_row_and_constant_clipping_are_told() -> None:
    assert dead([1e-9] * 10, trained_values=1000) is not None
    assert dead([1e-9] * 9, trained_values=1000) is None
    assert dead([*[1e-9] * 9, 1e-3], trained_values=1000) is None
    assert learned([1e-4] * 16) is not None
    assert learned([*[1e-4] * 15, 0.1]) is None
    assert clipped([5.0] * 50, clip_norm=1.0) is not None
    assert clipped([1.5] * 50, clip_norm=1.0) is None, "cut a little, as is usual"
    assert clipped([5.0] * 40 + [0.5] * 10, clip_norm=1.0) is None
    assert clipped([5.0] * 50, clip_norm=None) is None
    both = dict(find_ill(History((1e-5,) * 20, (1e-12,) * 20), clip_norm=1.0, trained_values=10))
    assert [name for name, note in both.items() if note] == ["learned"], "one cause, one warning"


# --- what did not move


def stepped(model: PeftModel, *, frozen: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    parameters = trainable(model)
    for parameter in parameters.values():
        parameter.data = parameter.data.to(dtype)
    optimizer = make_optimizer(parameters, kind="adamw", betas=(0.9, 0.99), weight_decay=0.0)
    start = fingerprints(optimizer).tolist()
    for _ in range(3):
        for name, parameter in parameters.items():
            parameter.grad = None if frozen and frozen in name else torch.full_like(parameter, 1e-3)
        optimizer.step(1e-9 if dtype == torch.bfloat16 else 1e-4)
    return find_unmoved(optimizer, start), optimizer, start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_moved_are_not_named_even_if_only_the_lost_part_did(
    tiny_model: TinyModel, dtype: torch.dtype
) -> None:
    model = tiny(tiny_model("llama"))
    assert stepped(model, dtype=dtype)[0] is None


def test_looking_at_a_large_table_takes_little_memory() -> None:
    table = torch.randn(4096, 2048, requires_grad=True)
    optimizer = make_optimizer({"table": table}, kind="adamw", betas=(0.9, 0.99), weight_decay=0.0)
    bits = table.detach().view(torch.int32).long()
    expected = [(bits * bits).sum().item()]
    with Ledger(budget_bytes=56 * MIB):  # 32 of them are the table
        assert fingerprints(optimizer).tolist() == expected


def test_tensors_that_did_not_move_are_named_with_their_cause(tiny_model: TinyModel) -> None:
    note, optimizer, start = stepped(tiny(tiny_model("llama")), frozen="o_proj.lora_A")
    assert note is not None
    assert "2 of 28 adapter tensors have not moved in 3 updates" in note.message
    assert "model.layers.0.self_attn.o_proj.lora_A.default.weight" in note.message
    assert "get no gradient" in note.cure
    for name, parameter in optimizer.parameters.items():
        parameter.requires_grad_("o_proj.lora_A" not in name)
    again = find_unmoved(optimizer, start)
    assert again is not None
    assert "frozen" in again.cure


def test_both_factors_of_lora_move_within_three_steps_of_a_run(tmp_path: Path, tiny_model: TinyModel) -> None:
    events = list(train(make_recipe(tmp_path, tiny_model("llama"), steps=4, rehearse=False)))
    assert not [event for event in only(Warned, events) if "have not moved" in event.message]


def test_a_run_whose_layer_is_not_reached_says_so_after_the_third_step(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attach(*arguments: Any, **named: Any) -> PeftModel:
        model = attach_adapter(*arguments, **named)
        for name, parameter in trainable(model).items():
            if "layers.0.mlp.up_proj" in name:
                parameter.register_hook(torch.zeros_like)
        return model

    monkeypatch.setattr("qadapt.running.model.attach", attach)
    events = list(train(make_recipe(tmp_path, tiny_model("llama"), steps=4, rehearse=False)))
    [warned] = [event for event in only(Warned, events) if "have not moved" in event.message]
    assert warned.step == 3
    assert "2 of 28" in warned.message
