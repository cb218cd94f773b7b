"""Where memory runs out: the same gradient, the same rows, nothing twice, nothing left behind."""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from oom_matrix import CASES, Case, Outcome, RunsOut, Stage, assert_equals_the_reference, only_rung, rows
from peft import PeftModel
from safetensors import SafetensorError
from test_new_tokens import facts
from test_train import adapter_of, assert_same, changed, make_recipe, only
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qadapt import run as run_module
from qadapt.adapters import lora
from qadapt.adapters.bottleneck import Bottleneck, attach_bottleneck
from qadapt.data.batches import Division
from qadapt.data.tokens import tokens_of
from qadapt.engine import boundaries
from qadapt.engine.ledger import Ledger
from qadapt.engine.moments import watched
from qadapt.engine.out_of_memory import RanOut, attempt, is_out_of_memory
from qadapt.engine.recompute import set_recompute
from qadapt.engine.tiles import tiles_of
from qadapt.errors import BadOutput, BadRun, DoesNotFit, NoRoom
from qadapt.events import (
    Continued,
    Eased,
    Evaluated,
    Event,
    MemoryMeasured,
    Paused,
    Resumed,
    RunFinished,
    StepDone,
)
from qadapt.model.generate import generate
from qadapt.model.load import load_base
from qadapt.plan.knobs import LIVE
from qadapt.run import load, resume, train
from qadapt.train import evaluation, loop, oom, pauses, turns
from qadapt.train.evaluation import evaluate_rows
from qadapt.train.memory import static_tensors
from qadapt.train.oom import FILE_NAME, Beginning, Ladder, Trial, read_rungs, write_rungs
from qadapt.train.step import StepResult, drop_gradients, evaluate_loss, find_gradient
from qadapt.train.turns import LEAST_CHUNK, LEAST_PIECE, Chunking, Splitting, Tiling
from qadapt.units import MIB
from qadapt.view.journal import effective, read_events

if TYPE_CHECKING:
    from conftest import TinyModel


@pytest.fixture(scope="module")
def stage(
    tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Case], Stage]]:
    def make(case: Case) -> Stage:
        return Stage(case, tiny_model("llama", layers=1), tmp_path_factory.mktemp("oom"))

    gc.collect()
    gc.freeze()  # so that looking for garbage after each failure takes no time
    yield make
    gc.unfreeze()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wherever_memory_runs_out_the_step_is_the_same(case: Case, stage: Callable[[Case], Stage]) -> None:
    made = stage(case)
    counting = RunsOut(0)
    expected = made.once(counting)
    assert not expected.eased
    assert counting.count > 60
    phases = set()
    for at in range(1, counting.count + 1, case.stride):
        found = made.once(RunsOut(at))
        assert len(found.eased) == 1, at
        phases.add(found.eased[0].phase)
        assert found.eased[0].knob in (case.rung, "update") or not case.rung
        assert_equals_the_reference(case, found, expected)
        made = made.unless_put_away(found)
    assert phases == ({"training", "update"} if case.dtype == torch.bfloat16 else {"training"})


class Watching(RunsOut):
    """Knows which storages were made before it ran out, without keeping them alive."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.made: list[weakref.ref[torch.UntypedStorage]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if self.count < self.at:
            self.made += [weakref.ref(leaf.untyped_storage()) for leaf in leaves]
        return result


@pytest.mark.parametrize("at", [30, 60, 75, 90])
def test_nothing_of_the_failed_try_is_alive_when_it_is_done_again(
    at: int, stage: Callable[[Case], Stage]
) -> None:
    made = stage(CASES[0])
    kept = {id(parameter.untyped_storage()) for parameter in made.model.parameters()}
    kept |= {id(buffer.untyped_storage()) for buffer in made.model.buffers()}
    mode, alive = Watching(at), []

    def look() -> None:
        found = [reference() for reference in mode.made]
        alive.extend(one for one in found if one is not None and id(one) not in kept)

    assert made.once(mode, look).eased
    assert len(mode.made) >= at - 1
    assert not alive


class TooSmall(Ledger):
    """A card that is too small in one phase only."""

    def __init__(self, phase: str, budget_bytes: int) -> None:
        super().__init__(budget_bytes=budget_bytes)
        self.only = phase
        self.refused = 0

    def _check_budget(self, size_bytes: int) -> None:
        if self._phase_now() == self.only:
            try:
                super()._check_budget(size_bytes)
            except torch.OutOfMemoryError:
                self.refused += 1
                raise


@pytest.mark.parametrize("phase", ["forward", "loss", "backward", "recompute", "update"])
def test_a_card_too_small_in_any_phase_finishes_the_step(phase: str, stage: Callable[[Case], Stage]) -> None:
    made = stage(Case("bf16", dtype=torch.bfloat16, layers=1, dropout=0.0))

    def under(ledger: Ledger) -> Outcome:
        with ledger.during("load"):
            for category, tensors in static_tensors(made.model, made.optimizer).items():
                ledger.hold(category, tensors)
        with watched(ledger, made.model.get_base_model(), optimizer=made.optimizer.inner):
            return made.once(ledger)

    if phase == "recompute":
        set_recompute(made.model.get_base_model(), "all")
        made.begins_with_recompute = True
    counting = Ledger()
    expected = under(counting)
    small = TooSmall(phase, counting.phase_bytes[phase] - 1)
    found = under(small)
    assert small.refused
    assert found.eased
    assert_equals_the_reference(made.case, found, expected)


def test_a_step_that_fits_on_no_rung_names_its_longest_row(stage: Callable[[Case], Stage]) -> None:
    made = stage(Case("bf16", dtype=torch.bfloat16))
    with pytest.raises(DoesNotFit, match=r"longest of its rows, train.jsonl, line 1, has 11 tokens") as error:
        made.once(RunsOut(5, again=True))
    assert "data.length below 11" in error.value.cure
    taken = [(rung.knob, rung.value) for rung in read_rungs(made.folder / FILE_NAME)]
    assert taken == [("micro_batch", 2), ("micro_batch", 1), ("recompute", "all"), ("offload", "boundaries")]
    assert all(parameter.grad is None for parameter in made.optimizer.parameters.values())


def test_nothing_is_put_away_where_there_is_no_room_for_it(
    stage: Callable[[Case], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage(Case("bf16", dtype=torch.bfloat16))
    monkeypatch.setattr(turns, "free_bytes", lambda _: turns.SPARE_BYTES)
    with pytest.raises(DoesNotFit):
        made.once(RunsOut(5, again=True))
    taken = [(rung.knob, rung.value) for rung in read_rungs(made.folder / FILE_NAME)]
    assert taken == [("micro_batch", 2), ("micro_batch", 1), ("recompute", "all")]


def test_rows_with_dropout_are_not_split_and_the_price_says_so(stage: Callable[[Case], Stage]) -> None:
    made = stage(Case("dropout", dropout=0.2))
    with pytest.raises(DoesNotFit) as error:
        made.once(RunsOut(5, again=True))
    assert "adapter.dropout=0" in error.value.cure
    only_rung = read_rungs(made.folder / FILE_NAME)[0]
    assert (only_rung.knob, only_rung.value) == ("recompute", "all")
    assert "rows cannot be split" in only_rung.price


@pytest.mark.parametrize("field", ["attention_dropout", "resid_pdrop", "router_jitter_noise"])
def test_rows_are_not_split_where_a_configuration_names_noise_that_no_module_shows(
    field: str, stage: Callable[[Case], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage(CASES[0])
    monkeypatch.setattr(made.model.get_base_model().config, field, 0.1, raising=False)
    ladder = Ladder(made.model, made.optimizer, division=made.division, run_folder=made.folder)
    assert ladder.is_drawing
    monkeypatch.setattr(made.model.get_base_model().config, field, 0.0)
    assert not Ladder(made.model, made.optimizer, division=made.division, run_folder=made.folder).is_drawing


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_rows_are_split_where_a_bottleneck_draws_no_masks(
    dropout: float, stage: Callable[[Case], Stage], tiny_model: TinyModel
) -> None:
    made = stage(CASES[0])
    base = load_base(
        tiny_model("llama", layers=1),
        quantization="none",
        double_quant=True,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    model = attach_bottleneck(base, Bottleneck("pfeiffer", 4, "relu", dropout=dropout))
    ladder = Ladder(model, made.optimizer, division=made.division, run_folder=made.folder)
    assert ladder.is_drawing == (dropout > 0)


def test_an_update_that_never_fits_is_an_error_with_a_cure(stage: Callable[[Case], Stage]) -> None:
    made = stage(Case("bf16", dtype=torch.bfloat16))
    counting = RunsOut(0)
    made.once(counting)
    with pytest.raises(DoesNotFit, match="in the update of step 1"):
        made.once(RunsOut(counting.count - 3, again=True))


def test_smaller_chunks_of_the_loss_keep_the_gradient(stage: Callable[[Case], Stage]) -> None:
    made = stage(CASES[0])
    ladder = Ladder(made.model, made.optimizer, division=made.division, run_folder=made.folder)
    turn, chosen, found = ladder._turns["loss_chunk"], rows(), []
    for value in (None, 7, 1, 50):  # never up again
        if value is not None:
            turn.take(value)
        assert ladder.training.loss_chunk == ladder.evaluation.loss_chunk
        assert find_gradient(made.model, made.optimizer, ladder.training(chosen), clip_norm=None, scaler=None)
        found.append([p.grad.clone() for p in made.optimizer.parameters.values() if p.grad is not None])
        drop_gradients(made.optimizer)
    assert ladder.training.loss_chunk == 1
    for gradients in found[1:]:
        for gradient, expected in zip(gradients, found[0], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_chunk_is_half_of_what_is_at_the_head(stage: Callable[[Case], Stage]) -> None:
    made = stage(CASES[0])
    most = max(batch.targets.numel() for batch in made.division(rows()))
    for chunk in (0, 8 * most):
        division = dataclasses.replace(made.division, loss_chunk=chunk)
        assert Chunking(made.model, Splitting(division, draws=True)).next(rows()) == (
            most // 2 if most >= 2 * LEAST_CHUNK else None
        )
    division = dataclasses.replace(made.division, loss_chunk=most)
    turn = Chunking(made.model, Splitting(division, draws=True))
    turn.take(2 * LEAST_CHUNK - 1)
    assert turn.next(rows()) is None


def test_every_live_knob_can_be_turned(stage: Callable[[Case], Stage]) -> None:
    made = stage(CASES[0])
    ladder = Ladder(made.model, made.optimizer, division=made.division, run_folder=made.folder)
    assert set(ladder.knobs) == set(LIVE)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_what_torch_raises_where_memory_runs_out_is_known(error: Exception) -> None:
    def work() -> None:
        raise error

    assert isinstance(attempt(work), RanOut)


@pytest.mark.parametrize(("free_bytes", "is_known"), [(100 * MIB, True), (2048 * MIB, False)])
def test_a_library_that_does_not_start_is_a_full_card_only_if_it_is_full(
    free_bytes: int, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_bytes, 8192 * MIB))
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
    assert is_out_of_memory(error) is is_known


def test_a_real_refusal_of_the_allocator_is_known() -> None:
    assert isinstance(attempt(lambda: torch.empty(1 << 60, dtype=torch.uint8)), RanOut)


def test_other_errors_are_not_taken_for_it() -> None:
    def work() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        attempt(work)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_divided_further_until_each_is_alone(packed: bool) -> None:
    chosen = rows()
    division: Division | None = Division(0, 4, packed, tokens=64, learned=64)
    counts = []
    while division is not None:
        batches = division(chosen)
        counts.append(len(batches))
        assert sum(batch.tokens for batch in batches) == sum(map(len, chosen))
        assert Division(0, 4, packed, tokens=64, learned=64).down_to(division.size) == division
        division = division.smaller(chosen)
    assert counts[0] == 1
    assert counts[-1] == len(chosen)
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("packed", [False, True])
def test_pieces_are_taken_where_a_micro_batch_has_the_tokens_for_them(
    packed: bool, stage: Callable[[Case], Stage]
) -> None:
    """All rows of a micro-batch go through a feed-forward part together, not the longest alone."""
    made = stage(Case("packed", packed=packed))
    short = [tokens_of(range(3, 4 + LEAST_PIECE), [True] * (1 + LEAST_PIECE), place="row") for _ in range(4)]
    for rows_at_once, value in ((4, 4), (1, None)):
        division = Division(0, rows_at_once, packed, tokens=rows_at_once * len(short[0]), learned=9999)
        assert Tiling(made.model, Splitting(division, draws=False)).next(short) == value


def test_no_chunk_is_offered_where_all_logits_are_made_at_once(
    stage: Callable[[Case], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage(CASES[0])
    monkeypatch.setattr(turns, "LEAST_CHUNK", 1)
    assert Chunking(made.model, Splitting(made.division, draws=False)).next(rows()) is not None
    monkeypatch.setattr(turns, "head_of", lambda _: None)
    assert Chunking(made.model, Splitting(made.division, draws=False)).next(rows()) is None


def run_out(monkeypatch: pytest.MonkeyPatch, *, at: int, call: int) -> None:
    """Memory runs out at one allocation of the n-th gradient from now on."""
    calls = []

    def find(*arguments: Any, **named: Any) -> StepResult | None:
        calls.append(1)
        with RunsOut(at) if len(calls) == call else nullcontext():
            return find_gradient(*arguments, **named)

    monkeypatch.setattr(loop, "find_gradient", find)


RUNGS: dict[str, tuple[int | str, dict[str, Any]]] = {
    "micro_batch": (1, {}),
    "loss_chunk": (3, {}),
    "mlp_tiles": (4, {}),
    "recompute": (1, {}),
    "offload": ("boundaries", {"recompute": "all"}),
}
"""Each rung, its first value in a run of short rows, and what of its memory section the run needs for it."""


@pytest.mark.parametrize("rung", RUNGS)
def test_a_resumed_run_takes_its_rungs_at_the_same_steps(
    rung: str, tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the run that went through: splitting rows, losses, layers changes the rounding of sums."""
    value, memory = RUNGS[rung]

    def begin(name: str) -> Iterator[Event]:
        (tmp_path / name).mkdir()
        recipe = make_recipe(
            tmp_path / name, tiny_model("llama"), checkpoint_every=2, evaluate_every=None, rehearse=False
        )
        run_out(monkeypatch, at=50, call=4)
        sections = {
            "adapter": recipe.adapter.model_copy(update={"dropout": 0.0}),
            "memory": recipe.memory.model_copy(update=memory),
        }
        return train(recipe.model_copy(update=sections))

    with only_rung(rung):
        straight = list(begin("straight"))
    eased = only(Eased, straight)
    assert [(event.step, event.phase, event.knob, event.value) for event in eased] == [
        (4, "training", rung, value)
    ]
    order = [event.step for event in straight if isinstance(event, StepDone | Eased)]
    assert order == [1, 2, 3, 4, 4, 5, 6], "the rung before its step, and no step twice"
    with only_rung(rung):
        broken = begin("broken")
        for event in broken:
            if isinstance(event, StepDone) and event.step == 4:
                break
        broken.close()  # type: ignore[attr-defined]
    list(resume("first", folder=str(tmp_path / "broken/runs")))
    assert_same(adapter_of(tmp_path / "straight/runs/first"), adapter_of(tmp_path / "broken/runs/first"))
    counted = effective(read_events(tmp_path / "broken/runs/first"))
    assert only(Resumed, counted)[0].step == 2
    assert [replace(event, time=0.0) for event in only(Eased, counted)] == [replace(eased[0], time=0.0)]


def test_a_run_that_recomputes_more_ends_as_if_there_had_been_memory(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout rows are not split, so every number is the same."""
    for name in ("enough", "short"):
        (tmp_path / name).mkdir()
    options: dict[str, Any] = {"steps": 3, "rehearse": False}
    list(train(make_recipe(tmp_path / "enough", tiny_model("llama"), **options)))
    run_out(monkeypatch, at=70, call=2)
    found = list(train(make_recipe(tmp_path / "short", tiny_model("llama"), **options)))
    assert [event.knob for event in only(Eased, found)] == ["recompute"]
    assert_same(adapter_of(tmp_path / "enough/runs/first"), adapter_of(tmp_path / "short/runs/first"))


def test_an_evaluation_goes_on_with_fewer_rows_at_a_time(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama"), steps=1, evaluate_every=None, rehearse=False)
    events = []
    mode = RunsOut(9)
    for_all = train(recipe)
    while True:
        with mode if events and isinstance(events[-1], MemoryMeasured) else nullcontext():
            event = next(for_all, None)
        if event is None:
            break
        events.append(event)
    eased, evaluated = only(Eased, events)[0], only(Evaluated, events)[0]
    assert (eased.step, eased.phase, eased.value) == (1, "evaluation", 1)
    (tmp_path / "runs/first").rename(tmp_path / "runs/other")
    plain = only(Evaluated, train(recipe))[0]
    assert evaluated.loss == pytest.approx(plain.loss, rel=1e-6)


def test_an_evaluation_of_single_rows_takes_fewer_learned_tokens_at_a_time(
    stage: Callable[[Case], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out wherever more than two are at the head at once."""
    made, held_out = stage(CASES[0]), rows()
    monkeypatch.setattr(turns, "LEAST_CHUNK", 1)

    def make() -> Ladder:
        return Ladder(made.model, made.optimizer, division=made.division, run_folder=made.folder)

    def evaluate(division: Division) -> float:
        batches = division(held_out)
        if max(min(batch.targets.numel(), division.loss_chunk or 99) for batch in batches) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return evaluate_loss(made.model, batches)

    ladder = make()
    found: list[float] = []

    def climb() -> Iterator[Event]:
        found.append(
            (yield from ladder.climb_evaluation(lambda: evaluate(ladder.evaluation), step=3, rows=held_out))
        )

    taken = only(Eased, list(climb()))
    assert [(rung.phase, rung.knob, rung.value) for rung in taken] == [
        ("evaluation", "micro_batch", 2),
        ("evaluation", "micro_batch", 1),
        ("evaluation", "loss_chunk", 4),
        ("evaluation", "loss_chunk", 2),
    ]
    assert found[0] == pytest.approx(evaluate_loss(made.model, made.division(held_out)), rel=1e-6)
    assert ladder.training == made.division, "no step is touched"
    again = make()
    again.go_to(3)
    assert again.evaluation == ladder.evaluation, "as is a resumed run's"


def test_a_held_out_row_that_never_fits_is_named(stage: Callable[[Case], Stage]) -> None:
    made = stage(CASES[0])
    ladder = Ladder(made.model, made.optimizer, division=made.division, run_folder=made.folder)

    def evaluate() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(DoesNotFit, match=r"the longest, train.jsonl, line 1, has 11 tokens"):
        list(ladder.climb_evaluation(evaluate, step=3, rows=rows()))


def test_a_rung_of_another_release_is_told(tmp_path: Path) -> None:
    write_rungs(tmp_path / FILE_NAME, [Eased(step=1, phase="training", knob="magic", value=1, price="")])
    with pytest.raises(BadRun, match="this release has no magic"):
        read_rungs(tmp_path / FILE_NAME)


def test_a_card_that_has_more_room_by_now_is_tried_once_more_before_a_rung(
    stage: Callable[[Case], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage(CASES[0])
    monkeypatch.setattr(oom, "renew_cap", lambda _: True)
    expected = made.once(RunsOut(0))
    found = made.once(RunsOut(50))
    assert not found.eased
    assert_equals_the_reference(made.case, found, expected)
    with pytest.raises(DoesNotFit):
        made.once(RunsOut(5, again=True))


def test_an_evaluation_rung_of_a_rehearsal_is_said_before_step_1_is_done_again(
    stage: Callable[[Case], Stage],
) -> None:
    made = stage(CASES[0])
    rung = Eased(step=1, phase="evaluation", knob="micro_batch", value=1, price="")
    write_rungs(made.folder / FILE_NAME, [rung])
    ladder = Ladder(made.model, made.optimizer, division=made.division, run_folder=made.folder)
    ladder.go_to(0)
    trial = Trial(find=lambda: None, apply=lambda _: None, around=nullcontext)
    said = list(ladder.climb_step(trial, step=1, rows=rows(), beginning=Beginning(torch.device("cpu"), None)))
    assert [(type(event), event.step) for event in said if isinstance(event, Eased)] == [(Eased, 1)]
    assert ladder.evaluation.size == 1


def full_disk(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, *, times: int) -> None:
    """The disk is full when the function is called, so many times."""
    real, calls = getattr(module, name), []

    def write(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) <= times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **named)

    monkeypatch.setattr(module, name, write)
    monkeypatch.setattr(pauses, "RETRY_SECONDS", 0.01)


def test_a_rung_and_an_adapter_that_find_the_disk_full_wait_for_room(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, oom, "write_whole", times=2)
    full_disk(monkeypatch, lora, "write_facts", times=1)
    run_out(monkeypatch, at=70, call=2)
    found = list(train(make_recipe(tmp_path, tiny_model("llama"), steps=3, rehearse=False)))
    told = [(type(event), event.step) for event in found if isinstance(event, Paused | Eased | Continued)]
    assert told == [(Paused, 2), (Continued, 2), (Eased, 2), (Paused, 3), (Continued, 3)]
    assert isinstance(found[-1], RunFinished)
    assert len(read_rungs(tmp_path / "runs/first" / FILE_NAME)) == 1


def test_a_step_whose_boundaries_find_the_disk_full_waits_and_is_the_same(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, so that what is drawn is drawn again."""
    real, calls = boundaries._bytes_of, []

    def full(tensor: torch.Tensor) -> memoryview:
        calls.append(1)
        if is_full and len(calls) in (14, 15):  # in the middle of a pass, and at once when it begins anew
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(tensor)

    monkeypatch.setattr(boundaries, "_bytes_of", full)
    monkeypatch.setattr(pauses, "RETRY_SECONDS", 0.01)
    for is_full, name in ((False, "room"), (True, "none")):
        (tmp_path / name).mkdir()
        recipe = make_recipe(tmp_path / name, tiny_model("llama"), steps=3, rehearse=False)
        calls.clear()
        found = list(train(changed(recipe, "memory", recompute="all", offload=("boundaries",))))
        waits = [type(event) for event in found if isinstance(event, Paused | Continued)]
        assert waits == ([Paused, Continued] if is_full else [])
    assert "temporary folder" in only(Paused, found)[0].reason
    assert_same(adapter_of(tmp_path / "room/runs/first"), adapter_of(tmp_path / "none/runs/first"))


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, NoRoom), (errno.EROFS, BadOutput)])
def test_a_full_disk_is_told_from_one_that_cannot_be_written(
    number: int, kind: type[BadOutput], tmp_path: Path, stage: Callable[[Case], Stage]
) -> None:
    def write(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    made = stage(CASES[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oom, "write_whole", write)
        with pytest.raises(BadOutput) as error:
            write_rungs(tmp_path / FILE_NAME, [])
        assert type(error.value) is kind
        patch.setattr(PeftModel, "save_pretrained", _safetensors_error(number))
        with pytest.raises(BadOutput) as error:
            lora.save_adapter(made.model, tmp_path / "adapter", facts=facts(), tokenizer=cast(Any, None))
        assert type(error.value) is kind


def _safetensors_error(number: int) -> Callable[..., None]:
    def save(*_: Any, **__: Any) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: no (os error {number}) at path")

    return save


def test_damaged_rungs_are_refused_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("{", encoding="utf-8")
    with pytest.raises(BadRun, match=r"rungs.json cannot be read") as error:
        read_rungs(tmp_path / FILE_NAME)
    assert "Delete the file" in error.value.cure


def test_answers_are_the_same_with_fewer_prompts_at_a_time(stage: Callable[[Case], Stage]) -> None:
    model = stage(CASES[0]).model

    def answers() -> list[list[int]]:
        prompts = [row.ids.tolist() for row in rows()]
        return generate(model, prompts, max_new_tokens=4, end_ids=frozenset({1}), pad_id=0)

    expected = answers()
    with RunsOut(40):
        assert answers() == expected
    assert model.training
    with RunsOut(40, again=True), pytest.raises(torch.OutOfMemoryError):
        answers()
    assert model.training


def test_a_loss_on_rows_is_found_with_fewer_at_a_time(stage: Callable[[Case], Stage]) -> None:
    model = stage(CASES[0]).model
    expected = evaluate_rows(model, rows(), size=4, pad_id=0)
    with RunsOut(40):
        assert evaluate_rows(model, rows(), size=4, pad_id=0) == pytest.approx(expected, rel=1e-6)
    with RunsOut(40, again=True), pytest.raises(DoesNotFit, match="one row at a time"):
        evaluate_rows(model, rows(), size=4, pad_id=0)


def test_a_loss_on_single_rows_is_found_with_fewer_learned_tokens_at_a_time(
    stage: Callable[[Case], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stage(CASES[0]).model
    expected = evaluate_rows(model, rows(), size=4, pad_id=0)
    asked: list[int] = []

    def evaluate(model: Any, batches: Any) -> float:
        found = list(batches)
        asked.append(found[0].loss_chunk)
        if found[0].loss_chunk > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return evaluate_loss(model, found)

    monkeypatch.setattr(turns, "LEAST_CHUNK", 1)
    monkeypatch.setattr(evaluation, "evaluate_loss", evaluate)
    assert evaluate_rows(model, rows(), size=4, pad_id=0, loss_chunk=5) == pytest.approx(expected, rel=1e-6)
    assert asked[:4] == [5, 5, 5, 2], "of four rows, two, one; then fewer tokens"


def test_an_adapter_is_loaded_as_its_run_was_in_the_end(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(train(make_recipe(tmp_path, tiny_model("llama"), steps=1, evaluate_every=None)))
    run = tmp_path / "runs/first"
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    plan |= {"mlp_tiles": 3, "offload": ["embeddings", "boundaries", "layers"], "loss_chunk": 5}
    (run / "plan.json").write_text(json.dumps(plan), encoding="utf-8")

    def pieces() -> int:
        return tiles_of(load("first", folder=str(run.parent), device="cpu").model.get_base_model())

    assert pieces() == 3
    write_rungs(run / FILE_NAME, [Eased(step=1, phase="training", knob="mlp_tiles", value=12, price="")])
    assert pieces() == 12
    seen: list[Any] = []
    real = evaluate_rows
    monkeypatch.setattr(run_module, "evaluate_rows", lambda *_, **how: seen.append(how) or real(*_, **how))
    run_module.evaluate("first", folder=str(run.parent))
    assert seen[0]["loss_chunk"] == 5

    def too_large(*_: Any, **how: Any) -> None:
        seen.append(how)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("qadapt.trained.loading.load_base", too_large)
    monkeypatch.setattr(run_module, "choose_device", lambda _: torch.device("cuda"))
    with pytest.raises(DoesNotFit, match="does not fit the memory of cuda"):
        load("first", folder=str(run.parent))
    assert {"embeddings", "layers"} <= set(seen[1]["offload"])


def test_a_loss_scale_goes_back_to_where_the_step_began(stage: Callable[[Case], Stage]) -> None:
    made = stage(CASES[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    beginning = Beginning(torch.device("cpu"), scaler)
    batches = made.division(rows())
    for _ in range(2):  # a second time is refused by torch unless the first is forgotten
        assert find_gradient(made.model, made.optimizer, batches, clip_norm=1.0, scaler=scaler)
        drop_gradients(made.optimizer)
        beginning.restore()
    assert scaler.get_scale() == 8.0
