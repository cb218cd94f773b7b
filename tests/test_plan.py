"""The plan against exhaustive search, the ladder's prices against two estimates, and what is refused."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import pytest
from exhaustive import FIRST, all_ways, compare_all
from hypothesis import given, settings
from hypothesis import strategies as st

from qadapt.errors import BadRecipe, DoesNotFit
from qadapt.hardware.cards import find_card
from qadapt.plan.adapters import trainable
from qadapt.plan.estimate import disk_parts, estimate_step
from qadapt.plan.fit import Plan, fit
from qadapt.plan.knobs import KNOBS, PLANNED, micro_batches
from qadapt.plan.ladder import ladder
from qadapt.plan.recipe_setting import setting_of
from qadapt.plan.room import Room
from qadapt.plan.setting import Setting, auto_dtypes
from qadapt.plan.speed import micro_batch_seconds, operations
from qadapt.recipe import Recipe
from qadapt.shape import ModelShape, find_shape, known_shapes
from qadapt.units import GIB
from qadapt.view.catalogue import cards_table

LLAMA = find_shape("meta-llama/Llama-3.1-8B")
SMALL = find_shape("HuggingFaceTB/SmolLM2-135M")
CARD = find_card("RTX 4060")
KNOB = {knob.name: knob for knob in KNOBS}
TIGHT = 1.0  # GiB: less than the small model takes with everything kept, one row at a time


def plan_of(budget: float, setting: Setting = Setting(length=512), rows_per_step: int = 12) -> Plan:  # noqa: B008
    return fit(
        SMALL, setting, room=Room(round(budget * GIB)), rows_per_step=rows_per_step, free=PLANNED, card=CARD
    )


@settings(max_examples=15)
@given(
    place=st.floats(0, 1.1),
    rows_per_step=st.integers(1, 12),
    length=st.integers(64, 2048),
    share=st.floats(0.0, 1.0),
    name=st.sampled_from(["SmolLM2-135M", "Llama-3.2-1B", "Gemma-2-2B"]),
    card=st.sampled_from(["RTX 4060", "T4", "RTX 4090"]),
)
def test_the_plan_is_the_fastest_of_all_that_fit(
    place: float, rows_per_step: int, length: int, share: float, name: str, card: str
) -> None:
    shape, found = find_shape(name), find_card(card)
    setting = Setting(length=length, supervised_share=share)
    tried = list(all_ways(shape, setting, rows_per_step=rows_per_step, card=found))
    needed = [way.needed_bytes for way in tried]
    budget_bytes = round(min(needed) + place * (max(needed) - min(needed)))  # from too little to plenty
    fitting = [way.seconds for way in tried if way.needed_bytes <= budget_bytes]
    plan = fit(shape, setting, room=Room(budget_bytes), rows_per_step=rows_per_step, free=FIRST, card=found)
    assert plan.estimate.fits(budget_bytes)
    assert plan.micro_batches_per_step == micro_batches(rows_per_step, plan.setting.rows)
    assert plan.seconds_per_step == pytest.approx(min(fitting), rel=1e-4)  # whole learned tokens, rounded up
    with pytest.raises(DoesNotFit):
        fit(
            shape,
            setting,
            room=Room(min(needed) - 1),
            rows_per_step=rows_per_step,
            free=FIRST,
            card=found,
        )


def test_drawn_plans_are_as_fast_as_the_best_of_everything() -> None:
    points = compare_all(8)
    assert max(point.ratio for point in points) < 1.0001
    assert min(point.ratio for point in points) > 0.9999


@settings(max_examples=30)
@given(st.floats(0.8, 20), st.floats(1.0, 2.0))
def test_more_memory_is_never_slower(budget: float, factor: float) -> None:
    try:
        less = plan_of(budget)
    except DoesNotFit:
        return
    more = plan_of(budget * factor)
    assert less.seconds_per_step is not None and more.seconds_per_step is not None
    assert more.seconds_per_step <= less.seconds_per_step


def test_a_roomy_card_keeps_everything_and_a_tight_one_recomputes() -> None:
    roomy, tight = plan_of(40), plan_of(TIGHT)
    assert (roomy.setting.recompute, roomy.setting.rows, roomy.setting.accumulates) == ("none", 12, False)
    assert tight.setting.recompute in range(1, 30)
    assert tight.setting.rows < 12
    assert tight.setting.accumulates


def test_between_them_only_as_many_layers_recompute_as_have_to() -> None:
    setting = Setting(length=512, rows=4)
    counts: list[Any] = []
    for budget in (0.9, 1.1, 1.3, 1.5):
        plan = fit(
            SMALL,
            setting,
            room=Room(round(budget * GIB)),
            rows_per_step=4,
            free=frozenset({"recompute"}),
            card=CARD,
        )
        counts.append(plan.setting.recompute)
        one_less = dataclasses.replace(plan.setting, recompute=counts[-1] - 1)
        assert not estimate_step(SMALL, one_less, card=CARD).fits(plan.budget_bytes)
    assert counts == sorted(set(counts), reverse=True)


def test_every_choice_is_given_with_its_price() -> None:
    reasons = plan_of(TIGHT).reasons
    assert len(reasons) == len(FIRST)  # last resorts are not spoken of where they are not needed
    assert "rows at a time would take" in reasons[0] and "too much" in reasons[0]
    assert re.fullmatch(
        r"recompute \d+ of 30 layers: keeping another layer's activations would take [\d.]+ MiB more, "
        r"too much, and be [12]% faster\.",
        reasons[1],
    )
    assert plan_of(40).reasons == (
        "12 rows at a time: there is room for it.",
        "keep every layer's activations: there is room for it.",
    )


def test_knobs_that_are_not_free_stay_where_they_stand() -> None:
    setting = Setting(length=512, rows=2, recompute="all")
    plan = fit(SMALL, setting, room=Room(40 * GIB), rows_per_step=8, free=frozenset(), card=CARD)
    assert (plan.setting, plan.micro_batches_per_step, plan.reasons) == (setting, 4, ())


def test_without_a_known_speed_the_plan_has_no_seconds_but_is_made() -> None:
    setting = Setting(length=300, device="cpu", compute_dtype="fp32", adapter_dtype="fp32", optimizer="adamw")
    plan = fit(SMALL, setting, room=Room(20 * GIB), rows_per_step=4, free=PLANNED)
    assert plan.seconds_per_step is None
    assert plan.setting.recompute == "none"


def test_micro_batches_of_a_step_are_never_needlessly_large() -> None:
    values = KNOBS[0].values(SMALL, Setting(), 10)
    assert values == (10, 5, 4, 3, 2, 1)
    assert [micro_batches(10, rows) for rows in values] == [1, 2, 3, 4, 5, 10]  # type: ignore[arg-type]


@given(st.integers(1, 131_072))
def test_shorter_lengths_fall_in_steps_of_a_quarter_or_so(length: int) -> None:
    lengths = KNOB["length"].values(SMALL, Setting(length=length), 1)
    assert lengths[0] == length
    assert list(lengths) == sorted(set(lengths), reverse=True)  # type: ignore[type-var]
    assert all(each >= 256 and each % 64 == 0 for each in lengths[1:])  # type: ignore[operator]
    assert KNOB["length"].values(SMALL, Setting(length=2048), 1) == (
        2048,
        1536,
        1024,
        768,
        512,
        384,
        256,
    )


def test_what_mends_a_base_is_offered_no_base_without_errors() -> None:
    setting = Setting(length=2048, method="loftq", quantization="int8")
    assert KNOB["quantization"].values(LLAMA, setting, 1) == ("int8", "nf4")
    changes = ladder(LLAMA, setting, room=Room(GIB), rows_per_step=1, card=CARD)
    assert "model.quantization=nf4" in [change.text for change in changes]


def test_what_does_not_fit_says_what_it_needs_and_the_cheapest_change() -> None:
    with pytest.raises(DoesNotFit) as caught:
        fit(
            LLAMA,
            Setting(length=8192),
            room=Room(round(7.3 * GIB)),
            rows_per_step=16,
            free=FIRST,
            card=CARD,
        )
    problem, cure = caught.value.problem, caught.value.cure
    assert problem.startswith("meta-llama/Llama-3.1-8B at 8,192 tokens needs 9.")
    assert problem.endswith("7.30 GiB are free on RTX 4060 8GB.")
    assert cure.startswith("Cheapest change: memory.offload=[embeddings,boundaries] (-")
    assert "a larger card, such as the RTX 3060 12GB" in cure


def test_the_ladder_prices_each_change_as_the_difference_of_two_estimates() -> None:
    setting = Setting(length=2048, rows=8, recompute="none", double_quant=False, optimizer="adamw")
    changes = ladder(LLAMA, setting, room=Room(round(15 * GIB)), rows_per_step=8, card=CARD)
    now = estimate_step(LLAMA, setting, card=CARD)
    by_text = {change.text: change for change in changes}
    for text, changed in {
        "memory.recompute=31": dataclasses.replace(setting, recompute=31),
        "model.double_quant=true": dataclasses.replace(setting, double_quant=True),
        "train.optimizer=adamw-8bit": dataclasses.replace(setting, optimizer="adamw-8bit"),
    }.items():
        then = estimate_step(LLAMA, changed, card=CARD)
        assert by_text[text].bytes_won == now.needed_bytes - then.needed_bytes > 0
        assert by_text[text].seconds_lost == pytest.approx(then.seconds_per_step - now.seconds_per_step)  # type: ignore[operator]
    assert by_text["memory.recompute=31"].sentence.endswith("s slower per step)")
    enough = [change.is_enough for change in changes]
    assert enough == sorted(enough, reverse=True)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"length": 0}, "length = 0: a row needs at least one token."),
        ({"length": -4}, "length = -4: a row needs at least one token."),
        ({"rows": 0}, "rows = 0: a step needs at least one row."),
        ({"rows": 4097}, "rows = 4,097: one forward pass takes at most 4,096 here."),
        (
            {"length": 9000},
            "length = 9,000 is above the context of HuggingFaceTB/SmolLM2-135M, 8,192 tokens.",
        ),
        ({"rank": 0}, "rank = 0: an adapter needs at least rank 1."),
        (
            {"rank": 193},
            "rank = 193 is above 192, the narrowest adapted layer of HuggingFaceTB/SmolLM2-135M.",
        ),
        ({"supervised_share": 1.5}, "supervised share = 1.5: a share lies between 0 and 1."),
        ({"recompute": 0}, "recompute = 0: HuggingFaceTB/SmolLM2-135M has 30 layers."),
        ({"recompute": -1}, "recompute = -1: HuggingFaceTB/SmolLM2-135M has 30 layers."),
        ({"recompute": 30}, "recompute = 30: HuggingFaceTB/SmolLM2-135M has 30 layers."),
        ({"recompute": "half"}, "recompute = half: HuggingFaceTB/SmolLM2-135M has 30 layers."),
        ({"targets": ("q_prj",)}, "adapter target 'q_prj' is no linear layer of HuggingFaceTB/SmolLM2-135M."),
    ],
)
def test_a_setting_that_is_no_step_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRecipe) as caught:
        estimate_step(SMALL, dataclasses.replace(Setting(), **changes))
    assert caught.value.problem == problem
    assert caught.value.cure


def test_a_misspelt_target_is_answered_with_the_nearest_layer() -> None:
    with pytest.raises(BadRecipe) as caught:
        estimate_step(SMALL, Setting(targets=("q_prj",)))
    assert caught.value.cure.startswith("Did you mean `q_proj`?")


def recipe(**sections: dict[str, Any]) -> Recipe:
    values = {"model": "smollm2-135m", "data": {"sources": [{"path": "a.jsonl"}]}, "run": {"name": "a"}}
    return Recipe.model_validate({**values, **sections})


def test_a_recipe_becomes_a_setting_by_the_devices_rules() -> None:
    setting = setting_of(recipe(), SMALL, device="cuda", compute_dtype="bf16", adapter_dtype="bf16")
    assert (setting.optimizer, setting.rows, setting.recompute) == ("adamw-8bit", 1, "all")
    assert (setting.length, setting.rank, setting.accumulates) == (2048, 16, True)
    setting = setting_of(recipe(), SMALL, device="cpu", compute_dtype="fp32", adapter_dtype="fp32")
    assert setting.optimizer == "adamw"
    named = recipe(
        adapter={"dtype": "fp32", "rank": 4},
        memory={"micro_batch": 3, "recompute": "none", "compute_dtype": "fp16"},
        train={"rows_per_step": 3, "optimizer": "adamw"},
    )
    setting = setting_of(named, SMALL, device="cuda", compute_dtype="bf16", adapter_dtype="bf16")
    assert (setting.adapter_dtype, setting.compute_dtype, setting.optimizer) == ("fp32", "fp16", "adamw")
    assert (setting.rows, setting.recompute, setting.accumulates) == (3, "none", False)


def test_a_recipe_may_say_how_many_layers_recompute() -> None:
    counted = recipe(memory={"recompute": 29})
    setting = setting_of(counted, SMALL, device="cuda", compute_dtype="bf16", adapter_dtype="bf16")
    assert setting.recompute == 29
    with pytest.raises(BadRecipe, match="recompute = 31"):
        setting_of(
            recipe(memory={"recompute": 31}),
            SMALL,
            device="cuda",
            compute_dtype="bf16",
            adapter_dtype="bf16",
        )


def test_types_follow_what_the_card_computes_natively() -> None:
    assert auto_dtypes("cuda", has_bf16=True) == ("bf16", "bf16")
    assert auto_dtypes("cuda", has_bf16=False) == ("fp16", "fp32")
    assert auto_dtypes("cpu", has_bf16=True) == ("fp32", "fp32")


def test_operations_are_two_per_weight_token_and_pass() -> None:
    setting = Setting(length=256, recompute="none", supervised_share=0.5)
    weights = LLAMA.parameters - 2 * LLAMA.embedding_weights - LLAMA.norm_weights
    dense = 2 * 2 * weights * 256 + 4 * LLAMA.embedding_weights * 128
    assert operations(LLAMA, setting) == pytest.approx(dense, rel=0.03)  # the rest: scores and adapters
    recomputed = dataclasses.replace(setting, recompute="all")
    assert 1.45 < operations(LLAMA, recomputed) / operations(LLAMA, setting) < 1.5
    half = dataclasses.replace(setting, recompute=LLAMA.layers // 2)
    average = (operations(LLAMA, recomputed) + operations(LLAMA, setting)) / 2
    assert operations(LLAMA, half) == pytest.approx(average)


def test_an_unknown_speed_gives_no_time() -> None:
    assert micro_batch_seconds(SMALL, Setting(), find_card("RTX 4050 laptop")) is None
    assert micro_batch_seconds(SMALL, Setting(), None) is None


@given(
    shape=st.sampled_from(known_shapes()),
    length=st.integers(1, 2000),
    rows=st.integers(1, 9),
    recompute=st.sampled_from(["all", "none", 1, 7, 15]),
    share=st.floats(0, 1),
)
def test_an_estimate_is_whole_and_grows_with_the_batch(
    shape: ModelShape, length: int, rows: int, recompute: Any, share: float
) -> None:
    setting = Setting(length=length, rows=rows, recompute=recompute, supervised_share=share)
    estimate = estimate_step(shape, setting)
    assert all(amount >= 0 for amount in estimate.categories.values())
    assert estimate.peak_allocated_bytes == max(estimate.phase_bytes.values())
    assert estimate.disk_bytes == sum(disk_parts(shape, setting).values())
    assert not estimate.exact
    larger = estimate_step(shape, dataclasses.replace(setting, rows=rows + 1))
    assert larger.peak_allocated_bytes >= estimate.peak_allocated_bytes
    assert trainable(shape, setting) > 0


def test_a_thousand_estimates_take_seconds() -> None:
    start = time.process_time()
    for rows in range(1, 1001):
        estimate_step(LLAMA, Setting(rows=rows, length=1024))
    assert time.process_time() - start < 3


def test_cards_against_models_gives_the_longest_row_that_fits() -> None:
    names = ("RTX 4060", "RTX 3060 12GB", "RTX 4090")
    table = cards_table([SMALL, LLAMA], [find_card(name) for name in names], 4096, supervised_share=0.5)
    assert table.lengths[2] == (4096, 4096)
    eight, twelve = cards_table([LLAMA], [find_card(name) for name in names[:2]], 131_072).lengths
    assert eight[0] is not None and twelve[0] is not None and 16_384 < eight[0] < twelve[0]
    lines = table.markdown().splitlines()
    assert lines[0] == "| card | SmolLM2-135M | Llama-3.1-8B |"
    assert lines[-1] == "| RTX 4090 24GB | 4,096 | 4,096 |"
    assert len(lines) == 5


def test_a_model_that_no_length_fits_is_a_dash() -> None:
    tiny = dataclasses.replace(CARD, memory_bytes=GIB)
    assert "–" in cards_table([LLAMA], [tiny], 4096).markdown()


def test_a_plan_keeps_the_distance_that_runs_on_this_machine_showed() -> None:
    def planned(seen_error: float) -> Plan:
        room = Room(round(12 * GIB), seen_error)
        return fit(LLAMA, Setting(length=1024), room=room, rows_per_step=8, free=PLANNED, card=CARD)

    bold, careful = planned(0.0), planned(0.25)
    assert careful.estimate.peak_allocated_bytes * 1.25 <= 12 * GIB
    assert bold.estimate.peak_allocated_bytes * 1.25 > 12 * GIB


def test_where_no_single_change_is_enough_several_together_are_offered() -> None:
    setting = Setting(rows=3, length=1000, rank=8)
    changes = ladder(LLAMA, setting, room=Room(round(1.6 * GIB)), rows_per_step=3, card=CARD)
    assert changes[0].is_enough
    assert changes[0].text.startswith("memory.micro_batch=1 and memory.offload=[embeddings,")
    assert "layers]" in changes[0].text
    assert not any(change.is_enough for change in changes[1:-1])


def test_every_cure_can_be_typed_or_is_the_plans_own() -> None:
    """What no recipe names, smaller chunks and pieces, is said once, as what `qadapt plan` does by itself."""
    setting = Setting(length=16_384, rows=2, recompute="none", optimizer="adamw")
    changes = ladder(LLAMA, setting, room=Room(6 * GIB), rows_per_step=2, card=CARD)
    typed = re.compile(
        r"([a-z]+\.[a-z_]+=\S+)( and [a-z]+\.[a-z_]+=\S+)*|a larger card, .*|`qadapt plan`, .*"
    )
    assert all(typed.fullmatch(change.text) for change in changes)
    own = [change.text for change in changes if change.text.startswith("`qadapt plan`")]
    tiles = "feed-forward parts and norms in 16 pieces"
    recomputed = dataclasses.replace(setting, recompute="all", loss_chunk=0)
    more = ladder(LLAMA, recomputed, room=Room(6 * GIB), rows_per_step=2, card=CARD)
    assert len(own) <= 1
    assert any(tiles in change.text and "the loss of" in change.text for change in more)


def test_a_cure_that_a_recipe_takes_makes_it_fit() -> None:
    setting, room = Setting(length=1024, offload=()), Room(4 * GIB)
    with pytest.raises(DoesNotFit, match=r"Cheapest change: memory\.offload=\[embeddings,layers\] \(-4"):
        fit(LLAMA, setting, room=room, rows_per_step=16, free=PLANNED - {"offload"}, card=CARD)
    cured = dataclasses.replace(setting, offload=("embeddings", "layers"))
    assert fit(LLAMA, cured, room=room, rows_per_step=16, free=PLANNED - {"offload"}, card=CARD)


def test_layers_that_are_streamed_are_never_offered_in_8_bits() -> None:
    setting = Setting(length=1024, quantization="none", offload=("layers",))
    texts = [each.text for each in ladder(LLAMA, setting, room=Room(GIB), rows_per_step=1, card=CARD)]
    assert not any("int8" in text for text in texts)


def test_without_a_known_speed_no_reason_speaks_of_one() -> None:
    reasons = fit(SMALL, Setting(length=512), room=Room(GIB), rows_per_step=12, free=FIRST).reasons
    assert any("would take" in reason for reason in reasons)
    assert not any(word in reason for reason in reasons for word in ("faster", "slower"))


def test_smaller_chunks_of_the_loss_cost_reading_the_head_more_often() -> None:
    seconds = [micro_batch_seconds(LLAMA, Setting(loss_chunk=chunk), CARD) for chunk in (0, 256, 128, 32)]
    assert seconds == sorted(seconds)  # type: ignore[type-var]
    assert len(set(seconds)) == len(seconds)
    plan = fit(LLAMA, Setting(), room=Room(round(6.9 * GIB)), rows_per_step=16, free=PLANNED, card=CARD)
    assert plan.setting.loss_chunk == 256, "none smaller than it must be"
