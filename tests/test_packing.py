"""Packed rows: none sees another, nothing is lost, and a step computes what it computes without packing."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import adapter_of, assert_same, changed, make_recipe, only
from torch import Tensor
from torch.nn import functional

from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.data.batches import MicroBatch, concatenate, micro_batches, packed_batches
from qadapt.data.order import Order
from qadapt.data.packing import pack
from qadapt.data.rows import RowSet
from qadapt.data.step_sample import StepSample
from qadapt.data.tokens import Tokens, tokens_of
from qadapt.engine.documents import documents_of, isolating
from qadapt.engine.recompute import set_recompute
from qadapt.errors import DoesNotFit, Unsupported
from qadapt.estimating.planning import ask_recipe
from qadapt.estimating.question import Question
from qadapt.events import Evaluated, MemoryMeasured, Planned, StepDone
from qadapt.hardware.cards import Card, find_card
from qadapt.hardware.target import find_target
from qadapt.model.generate import generate
from qadapt.model.load import load_base
from qadapt.plan.estimate import estimate_step
from qadapt.plan.packing import PACKABLE, check_packable
from qadapt.plan.setting import Recompute, Setting
from qadapt.plan.speed import micro_batch_count, micro_batch_seconds, step_seconds
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe
from qadapt.run import resume, train
from qadapt.running.plan import plan_rows
from qadapt.shape import FAMILIES, find_shape
from qadapt.train import loop
from qadapt.train.dryrun import dry_run
from qadapt.train.optimizer import make_optimizer
from qadapt.train.step import evaluate_loss, train_step
from qadapt.train.stored_plan import read_plan
from qadapt.view.tables import setting_words

if TYPE_CHECKING:
    from conftest import TinyModel
    from peft import PeftModel

CPU = torch.device("cpu")
WINDOW = 64  # of the tiny gemma2; others are given one
LENGTHS = (13, 2, 97, 31, 5, 71)
"""Two are longer than the window; 2 has a single prediction; no two fill a round number."""


# --- bins -------------------------------------------------------------------------------------------------


def slow_pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing as one would say it."""
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        best, least = None, capacity + 1
        for number, members in enumerate(bins):
            left = capacity - sum(lengths[each] for each in members) - lengths[index]
            if 0 <= left < least:
                best, least = number, left
        if best is None:
            bins.append([index])
        else:
            bins[best].append(index)
    return bins


@st.composite
def rows_and_capacity(draw: st.DrawFn) -> tuple[list[int], int]:
    lengths = draw(st.lists(st.integers(1, draw(st.sampled_from((3, 40, 5000)))), max_size=60))
    longest = max(lengths, default=1)
    return lengths, draw(st.integers(longest, 4 * longest))


@settings(max_examples=600)
@given(rows_and_capacity())
def test_bins_lose_no_row_split_none_and_keep_their_capacity(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    bins = pack(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(members and sum(lengths[each] for each in members) <= capacity for members in bins)
    assert bins == slow_pack(lengths, capacity) == pack(list(lengths), capacity)


def test_ten_thousand_rows_are_packed_nearly_full() -> None:
    lengths = torch.randint(20, 2048, (10_000,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = pack(lengths, 4096)
    assert sum(lengths) / (4096 * len(bins)) > 0.99


# --- micro-batches ----------------------------------------------------------------------------------------


def rows(lengths: tuple[int, ...] = LENGTHS, *, share: float = 0.5, seed: int = 2) -> list[Tokens]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(5, 300, (length,), generator=draw).tolist()
        learned = (torch.rand(length, generator=draw) < share).tolist()
        made.append(tokens_of(ids, (*learned[:-1], True), place="row"))
    return made


@st.composite
def some_rows(draw: st.DrawFn) -> list[Tokens]:
    lengths = draw(st.lists(st.integers(2, 30), min_size=1, max_size=12))
    return rows(tuple(lengths), share=draw(st.sampled_from((0.0, 0.3, 1.0))), seed=draw(st.integers(0, 99)))


@settings(max_examples=300)
@given(some_rows(), st.integers(30, 90), st.none() | st.integers(0, 40))
def test_packed_micro_batches_hold_every_token_and_every_prediction_once(
    chosen: list[Tokens], capacity: int, most_learned: int | None
) -> None:
    predictions = []
    for batch in packed_batches(chosen, capacity=capacity, most_learned=most_learned):
        documents = batch.documents
        assert documents is not None
        ids = batch.input_ids[0].tolist()
        assert len(ids) == batch.tokens == documents.bounds[-1] <= capacity
        assert documents.starts.tolist() == list(documents.bounds)
        places = [place for length in documents.lengths for place in range(length)]
        assert documents.position_ids.tolist() == [places]
        learned = dict(zip(batch.positions.tolist(), batch.targets[0].tolist(), strict=True))
        assert batch.supervised_tokens == len(learned)
        if most_learned is not None:
            assert len(learned) <= most_learned or len(documents.lengths) == 1
        for first, end in zip(documents.bounds, documents.bounds[1:], strict=False):
            inner = sorted((place - first, token) for place, token in learned.items() if first <= place < end)
            predictions.append((ids[first:end], inner))
    assert sorted(predictions) == sorted(
        (
            row.ids.tolist(),
            [(at, int(row.ids[at + 1])) for at in range(len(row) - 1) if row.supervised[at + 1]],
        )
        for row in chosen
    )


def test_a_documents_last_token_never_predicts_the_next_documents_first() -> None:
    batch = concatenate(
        [tokens_of([7, 8], [True, True], place="a"), tokens_of([9, 6], [True, True], place="b")]
    )
    assert batch.positions.tolist() == [0, 2]
    assert batch.targets.tolist() == [[8, 6]]
    assert batch.supervised_tokens == 2


def test_unpacked_micro_batches_lie_by_length() -> None:
    batches = micro_batches(rows(), size=2, pad_id=0)
    assert [batch.input_ids.shape[1] for batch in batches] == [97, 31, 5]


# --- what a step computes ---------------------------------------------------------------------------------


def adapted(folder: Path, *, recompute: Recompute = "none", quantization: str = "none") -> PeftModel:
    base = load_base(folder, quantization=quantization, double_quant=True, dtype=torch.float32, device=CPU)
    if base.config.model_type in ("mistral", "phi3"):
        base.config.sliding_window = WINDOW
        for module in base.modules():
            if hasattr(module, "sliding_window"):
                module.sliding_window = WINDOW
    set_recompute(base, recompute)
    model = attach_lora(base, Lora(rank=4, alpha=8), dtype=torch.float32, seed=0)
    draw = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.train()


def loss_and_gradient(model: PeftModel, batches: list[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    """Of one step, caught before the update uses it."""
    optimizer = make_optimizer(trainable(model), kind="adamw", betas=(0.9, 0.999), weight_decay=0.0)
    caught: dict[str, Tensor] = {}

    def catch(learning_rate: float) -> None:
        caught.update({name: value.grad.clone() for name, value in optimizer.parameters.items()})  # type: ignore[union-attr]

    optimizer.step = catch  # type: ignore[method-assign]
    result = train_step(model, optimizer, batches, learning_rate=0.0, clip_norm=None, scaler=None)
    return result.loss, caught


def one_at_a_time(model: PeftModel, chosen: list[Tokens]) -> tuple[float, dict[str, Tensor]]:
    """Each document alone through the library's own attention, all logits."""
    count = sum(row.supervised_count for row in chosen)
    total = 0.0
    for row in chosen:
        ids = torch.from_numpy(row.ids).long()
        logits = model(input_ids=ids[None]).logits[0, :-1]
        targets = torch.where(torch.from_numpy(row.supervised), ids, -100)[1:]
        loss = functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count
        loss.backward()
        total += loss.item()
    found = {name: value.grad.clone() for name, value in trainable(model).items() if value.grad is not None}
    model.zero_grad()
    return total, found


def assert_close(left: tuple[float, dict[str, Tensor]], right: tuple[float, dict[str, Tensor]]) -> None:
    assert left[0] == pytest.approx(right[0], rel=1e-5)  # fp32
    assert left[1].keys() == right[1].keys()
    assert max(value.abs().max().item() for value in right[1].values()) > 1e-3, "a control: there is one"
    for name, value in right[1].items():
        torch.testing.assert_close(left[1][name], value, rtol=1e-3, atol=2e-5)  # fp32


def test_every_family_that_can_be_trained_can_be_packed() -> None:
    assert PACKABLE == FAMILIES


@pytest.mark.parametrize("family", PACKABLE)
def test_a_packed_step_is_the_padded_one_and_one_document_at_a_time(
    family: str, tiny_model: TinyModel
) -> None:
    model, chosen = adapted(tiny_model(family)), rows()
    expected = one_at_a_time(model, chosen)
    packed = packed_batches(chosen, capacity=120)
    assert len(packed) == 2
    assert_close(loss_and_gradient(model, packed), expected)
    assert_close(loss_and_gradient(model, packed_batches(chosen, capacity=999)), expected)
    assert_close(loss_and_gradient(model, micro_batches(chosen, size=3, pad_id=0)), expected)
    assert evaluate_loss(model, packed) == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize(
    ("family", "recompute", "quantization"),
    [
        ("llama", "all", "none"),
        ("llama", 1, "none"),
        ("gemma2", "all", "none"),
        ("mistral", 1, "none"),
        ("qwen3", "all", "nf4"),
        ("llama", "none", "nf4"),
    ],
)
def test_a_packed_step_is_the_same_recomputed_and_on_a_quantized_base(
    family: str, recompute: Recompute, quantization: str, tiny_model: TinyModel
) -> None:
    model = adapted(tiny_model(family), recompute=recompute, quantization=quantization)
    expected = loss_and_gradient(model, micro_batches(rows(), size=1, pad_id=0))
    assert_close(loss_and_gradient(model, packed_batches(rows(), capacity=150)), expected)


@pytest.mark.parametrize("family", PACKABLE)
def test_no_document_sees_another(family: str, tiny_model: TinyModel) -> None:
    model = adapted(tiny_model(family)).eval()
    documents = documents_of(LENGTHS)
    ids = torch.randint(5, 300, (1, sum(LENGTHS)))
    other = ids.clone()
    first, end = documents.bounds[2], documents.bounds[3]
    other[0, first:end] = torch.randint(5, 300, (end - first,))

    def logits(chosen: Tensor) -> Tensor:
        named: dict[str, Any] = {"position_ids": documents.position_ids, "documents": documents}
        with isolating(model), torch.no_grad():
            return model(input_ids=chosen, use_cache=False, **named).logits[0]

    before, after = logits(ids), logits(other)
    assert torch.equal(before[:first], after[:first])
    assert torch.equal(before[end:], after[end:])
    assert not torch.equal(before[first:end], after[first:end]), "a control: the change is seen"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_answers_and_losses_of_padded_rows_are_untouched_afterwards(
    family: str, tiny_model: TinyModel
) -> None:
    model = adapted(tiny_model(family))
    prompts, padded = [[5, 6, 7], [8] * 19, [9, 10]], micro_batches(rows(), size=3, pad_id=0)

    def asked() -> tuple[list[list[int]], float]:
        found = generate(model, prompts, max_new_tokens=8, end_ids=frozenset({1}), pad_id=0)
        return found, evaluate_loss(model, padded)

    before, name = asked(), model.config._attn_implementation
    loss_and_gradient(model, packed_batches(rows(), capacity=200))
    assert model.config._attn_implementation == name
    assert asked() == before


def test_an_architecture_with_attention_of_its_own_is_refused_by_name() -> None:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(Unsupported, match="falcon cannot be packed"), isolating(FalconForCausalLM(config)):
        pass


# --- the plan ---------------------------------------------------------------------------------------------

LLAMA = find_shape("Llama-3.1-8B")
CARD = find_card("RTX 4090")


def sample(lengths: list[int], *, rows_per_step: int = 16, steps: int = 20) -> StepSample:
    chosen = RowSet(rows(tuple(lengths), share=0.4))
    return StepSample(chosen, Order(chosen.lengths, rows_per_step=rows_per_step), steps=steps)


def drawn_lengths(shortest: int, longest: int, *, count: int = 320) -> list[int]:
    draw = torch.Generator().manual_seed(0)
    return [longest, *torch.randint(shortest, longest, (count - 1,), generator=draw).tolist()]


def question(card: Card, length: int) -> Question:
    setting = Setting(length=length, supervised_share=0.6)
    target = find_target(card.name, None)
    return Question(LLAMA, setting, target, 16, frozenset({"micro_batch", "recompute"}))


def test_a_sample_says_what_the_micro_batches_of_the_run_are() -> None:
    lengths = drawn_lengths(5, 90, count=60)
    chosen = RowSet(rows(tuple(lengths), share=0.4))
    order = Order(chosen.lengths, rows_per_step=7)
    steps = [[chosen[index] for index in order.rows_of_step(step)] for step in range(9)]
    looked = StepSample(chosen, order, steps=9, length_step=32)
    made = [packed_batches(step, capacity=180) for step in steps]
    packed, batches = looked.packed(180), [batch for step in made for batch in step]
    assert packed.count == len(batches) / 9
    assert packed.tokens == sum(batch.tokens for batch in batches) / 9
    assert packed.most_head_tokens == max(len(batch.positions) for batch in batches)
    assert packed.most_documents == max(len(batch.documents.lengths) for batch in batches)  # type: ignore[union-attr]
    most = int(chosen.lengths.max())
    made = [micro_batches(step, size=3, pad_id=0, length_step=32, most=most) for step in steps]
    padded, batches = looked.filled_up(3), [batch for step in made for batch in step]
    assert padded.count == len(batches) / 9
    assert padded.tokens == sum(batch.input_ids.numel() for batch in batches) / 9
    assert padded.pairs == sum(batch.input_ids.numel() * batch.input_ids.shape[1] for batch in batches) / 9
    assert padded.head_tokens == pytest.approx(sum(batch.targets.numel() for batch in batches) / 9)


def test_rows_of_unequal_length_are_packed_and_the_reasons_say_what_it_saves() -> None:
    asked = question(find_card("A100 80GB"), 2048)
    plan = plan_rows(asked, sample(drawn_lengths(20, 2048)), packing="auto")
    assert plan.setting.packed
    saved, price = plan.reasons[-2:]
    assert re.fullmatch(
        r"packing: [\d.]+ instead of [\d.]+ forward passes a step, \d+% fewer tokens; [\d.]+ times as fast\.",
        saved,
    )
    assert price.startswith("documents are kept apart: one kernel attends to all documents; it takes ")
    assert plan.estimate.fits(plan.budget_bytes)


def test_rows_of_one_length_are_filled_up_and_the_reasons_say_why() -> None:
    asked = question(find_card("RTX 3060 12GB"), 2048)  # one row at a time, so that none waits for another
    plan = plan_rows(asked, sample([2048] * 320), packing="auto")
    assert not plan.setting.packed
    assert plan.reasons[:-1] == asked.plan().reasons
    assert plan.reasons[-1].startswith("rows are filled up: packing would take")
    assert "0% fewer tokens" in plan.reasons[-1]


@pytest.mark.parametrize(("tokens", "passes"), [(3000, 1), (8192, 2), (9000, 3)])
def test_a_packed_step_takes_the_passes_that_its_tokens_need_and_not_those_of_full_rows(
    tokens: int, passes: int
) -> None:
    setting = Setting(rows=2, length=2048, packed=True, step_tokens=tokens)
    assert micro_batch_count(setting, rows_per_step=16) == passes
    each = micro_batch_seconds(LLAMA, dataclasses.replace(setting, step_tokens=4096), CARD)
    found = step_seconds(LLAMA, setting, rows_per_step=16, card=CARD)
    assert each is not None and found is not None
    assert passes - 1 < found / each <= passes


def test_packing_is_as_the_recipe_says_where_it_says() -> None:
    asked, even, uneven = question(CARD, 2048), sample([2048] * 320), sample(drawn_lengths(20, 2048))
    assert plan_rows(asked, even, packing=True).setting.packed
    assert plan_rows(asked, uneven, packing=False) == asked.plan()


def test_a_packed_plan_has_room_for_the_micro_batch_that_learns_the_most() -> None:
    looked = sample(drawn_lengths(20, 2048))
    for card in ("RTX 3060 12GB", "RTX 4090", "A100 80GB"):
        setting = plan_rows(question(find_card(card), 2048), looked, packing=True).setting
        most = looked.packed(setting.tokens)
        assert most.most_head_tokens <= setting.supervised_tokens
        assert most.most_documents <= setting.documents


def test_a_packed_plan_is_of_the_fullest_step_where_that_does_not_fill_the_capacity() -> None:
    lengths = [2048, *[30] * 63]
    plan = plan_rows(question(CARD, 2048), sample(lengths, steps=4), packing=True)
    fullest = 2048 + 15 * 30
    assert plan.setting.tokens == min(fullest, plan.setting.rows * 2048) == fullest
    full = dataclasses.replace(plan.setting, step_tokens=0)
    assert estimate_step(LLAMA, full, card=CARD).peak_allocated_bytes > plan.estimate.peak_allocated_bytes


def test_an_estimate_of_a_recipe_says_what_it_leaves_open_about_packing(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {source: Llama-3.1-8B}\nrun: {name: first}\ndata: {sources: [{path: rows.jsonl}]}\n"
        "train: {rows_per_step: 16}\n",
        encoding="utf-8",
    )

    def asked(*overrides: str) -> Question:
        return ask_recipe(str(path), overrides, card="RTX 4090", vram=None)

    (note,) = asked().answer().notes
    assert note.startswith("the run may pack its rows")
    packed = asked("data.packing=true")
    assert packed.setting.packed and packed.setting.documents == 16
    assert "taken to be full" in packed.answer().notes[0]
    assert asked("data.packing=false").answer().notes == ()
    assert asked("train.rows_per_step=1").answer().notes == (), "there is nothing to pack"


@pytest.mark.parametrize(
    ("model", "length", "dtype", "is_packed"),
    [
        ("Llama-3.1-8B", 2048, "fp32", False),  # joined outputs take more
        ("Mistral-7B-v0.1", 8192, "bf16", True),  # a window needs no mask
    ],
)
def test_where_only_one_way_fits_it_is_taken(model: str, length: int, dtype: Any, is_packed: bool) -> None:
    shape, looked = find_shape(model), sample(drawn_lengths(20, length))
    share = 0.1 if not is_packed else 0.6
    setting = Setting(length=length, supervised_share=share, compute_dtype=dtype, adapter_dtype=dtype)
    target, least = find_target("RTX 4090", None), {}
    for packed in (True, False):
        way = dataclasses.replace(setting, packed=packed, documents=16 * packed)
        if packed:
            way = dataclasses.replace(way, supervised_share=looked.packed(length).most_head_tokens / length)
        estimate = estimate_step(shape, way, card=target.card)
        least[packed] = estimate.needed_bytes + estimate.error_bytes
    assert least[not is_packed] > least[is_packed] + 2**20, "a control: one takes more"
    narrow = dataclasses.replace(target, free_bytes=least[is_packed] + 2**19)
    asked = Question(shape, setting, narrow, 16, frozenset({"micro_batch", "recompute"}))
    plan = plan_rows(asked, looked, packing="auto")
    assert plan.setting.packed is is_packed
    assert ("not even the smallest packed micro-batch fits" in plan.reasons[-1]) is not is_packed
    with pytest.raises(DoesNotFit):
        plan_rows(asked, looked, packing=not is_packed)


@pytest.mark.parametrize(
    ("model", "card", "words"),
    [
        ("gemma-2-2b", "RTX 4090", "a soft cap has no fused kernel"),
        ("Llama-3.2-1B", "T4", "one document after another"),
    ],
)
def test_a_slower_way_to_keep_documents_apart_is_named_with_its_price(
    model: str, card: str, words: str
) -> None:
    types = ("fp16", "fp32") if card == "T4" else ("bf16", "bf16")
    setting = Setting(length=512, compute_dtype=types[0], adapter_dtype=types[1])  # type: ignore[arg-type]
    asked = Question(find_shape(model), setting, find_target(card, None), 16, frozenset({"micro_batch"}))
    price = plan_rows(asked, sample(drawn_lengths(9, 512)), packing=True).reasons[-1]
    assert words in price
    assert re.search(r"it takes [\d.]+ [KMG]iB (more|less) than the same tokens filled up", price)


@pytest.mark.parametrize("family", ["falcon", "mamba", "qwen3_next"])
def test_an_architecture_that_is_not_shown_is_refused_by_name(family: str) -> None:
    with pytest.raises(Unsupported, match=f"rows of {family} cannot be packed"):
        check_packable(family)
    with pytest.raises(Unsupported, match=f"rows of {family} cannot be packed"):
        dry_run({"model_type": family}, Setting(packed=True))


# --- runs -------------------------------------------------------------------------------------------------


def packed_recipe(folder: Path, model: Path, *, packing: bool, **train_fields: Any) -> Recipe:
    folder.mkdir(exist_ok=True)
    recipe = changed(make_recipe(folder, model, **train_fields), "data", packing=packing)
    return changed(recipe, "adapter", dropout=0.0)  # packed rows draw other masks


def test_a_packed_run_learns_what_the_run_without_packing_learns(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    runs = {
        packing: list(train(packed_recipe(tmp_path / str(packing), tiny_model("gemma2"), packing=packing)))
        for packing in (True, False)
    }
    assert only(Planned, runs[True])[0].packed and not only(Planned, runs[False])[0].packed
    for kind in (StepDone, Evaluated):
        packed, padded = ([event.loss for event in only(kind, runs[each])] for each in (True, False))
        assert packed == pytest.approx(padded, rel=1e-4)  # fp32, six updates
    for event in only(MemoryMeasured, runs[True]):
        assert event.peak_bytes <= only(Planned, runs[True])[0].predicted_peak_bytes * 1.03
    assert [step.tokens for step in only(StepDone, runs[True])] == [
        step.tokens for step in only(StepDone, runs[False])
    ]


def one_long_row_recipe(folder: Path, model: Path) -> Recipe:
    """A long row among short ones, and held-out rows that learn almost all they are."""
    folder.mkdir(exist_ok=True)
    texts = [("x" * 400, "y"), *((f"q{number}", f"a{number}") for number in range(31))]
    held_out = [("q", "long answers " * 9 + str(number)) for number in range(40)]
    for name, pairs in (("rows", texts), ("held_out", held_out)):
        messages = [
            [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            for asked, answer in pairs
        ]
        lines = [json.dumps({"messages": each}) + "\n" for each in messages]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    values = {
        "model": str(model),
        "data": {
            "sources": [{"path": str(folder / "rows.jsonl")}],
            "held_out": str(folder / "held_out.jsonl"),
            "length": 512,
            "packing": True,
        },
        "train": {"epochs": 1, "rows_per_step": 8},
        "memory": {"compute_dtype": "fp32"},
        "run": {"name": "first", "folder": str(folder / "runs")},
    }
    return check_recipe(values, origin="the test")


def test_the_memory_of_a_packed_run_is_that_of_its_fullest_micro_batch(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    recipe = changed(one_long_row_recipe(tmp_path, tiny_model("llama")), "data", held_out=None)
    events = list(train(recipe))
    (planned,) = only(Planned, events)
    measured = max(event.peak_bytes for event in only(MemoryMeasured, events))
    assert planned.micro_batch > 1, "a control: as many of the longest row would be far more"
    assert measured == pytest.approx(planned.predicted_peak_bytes, rel=0.03)


def test_evaluation_takes_no_fuller_micro_batches_than_the_planned_one(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[MicroBatch] = []

    def noted(model: PeftModel, batches: Iterable[MicroBatch]) -> float:
        taken = list(batches)
        seen.extend(taken)
        return evaluate_loss(model, taken)

    monkeypatch.setattr(loop, "evaluate_loss", noted)
    list(train(one_long_row_recipe(tmp_path, tiny_model("llama"))))
    plan = read_plan(tmp_path / "runs/first/plan.json")
    assert sum(batch.supervised_tokens for batch in seen) > 10 * plan.packed_learned
    for batch in seen:
        assert batch.documents is not None and len(batch.documents.lengths) <= 8
        assert batch.tokens <= plan.packed_tokens
        assert batch.supervised_tokens <= plan.packed_learned


def test_a_packed_run_goes_on_bit_for_bit(tmp_path: Path, tiny_model: TinyModel) -> None:
    list(train(packed_recipe(tmp_path / "straight", tiny_model("llama"), packing=True)))
    events = train(packed_recipe(tmp_path / "broken", tiny_model("llama"), packing=True))
    for event in events:
        if isinstance(event, StepDone) and event.step == 5:  # after the checkpoint of step 3
            break
    events.close()  # type: ignore[attr-defined]
    resumed = list(resume("first", folder=str(tmp_path / "broken/runs")))
    assert only(Planned, resumed)[0].packed
    assert_same(adapter_of(tmp_path / "straight/runs/first"), adapter_of(tmp_path / "broken/runs/first"))


def test_a_plan_from_before_packing_is_of_a_run_without_it(tmp_path: Path, tiny_model: TinyModel) -> None:
    list(train(packed_recipe(tmp_path, tiny_model("llama"), packing=True, steps=1, evaluate_every=None)))
    path = tmp_path / "runs/first/plan.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values.pop("packed") is True
    path.write_text(json.dumps(values), encoding="utf-8")
    assert not read_plan(path).packed


def test_a_setting_in_words_says_that_it_is_packed() -> None:
    assert "1 row of 64 tokens, packed · " in setting_words(Setting(length=64, packed=True))
    assert "packed" not in setting_words(Setting(length=64))
