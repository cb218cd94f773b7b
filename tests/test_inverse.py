"""Inverse questions: what is found by halving is what asking every value finds."""

from __future__ import annotations

import dataclasses
import random

import pytest

from qadapt.errors import DoesNotFit
from qadapt.hardware.cards import find_card
from qadapt.plan.estimate import estimate_step
from qadapt.plan.fit import fit
from qadapt.plan.inverse import Freedom, fitting_models, largest, most
from qadapt.plan.knobs import PLANNED
from qadapt.plan.room import Room
from qadapt.plan.setting import MOST_ROWS, Setting
from qadapt.shape import ModelShape, find_shape, known_shapes
from qadapt.units import GIB

LLAMA = find_shape("Llama-3.1-8B")
SMALL = find_shape("SmolLM2-135M")


def test_halving_finds_what_asking_everything_finds() -> None:
    for ceiling in (1, 2, 3, 7, 64):
        for threshold in range(ceiling + 2):
            expected = max((n for n in range(1, ceiling + 1) if n <= threshold), default=None)
            assert largest(lambda n, t=threshold: n <= t, ceiling) == expected  # type: ignore[misc]


def test_nothing_below_the_least_is_asked() -> None:
    asked: list[int] = []
    assert largest(lambda n: asked.append(n) or n <= 7, 20, least=3, stops=(2, 16)) == 7  # type: ignore[func-returns-value]
    assert largest(lambda n: asked.append(n) or n <= 2, 20, least=3) is None  # type: ignore[func-returns-value]
    assert min(asked) == 3


def test_a_ceiling_that_fits_again_is_found() -> None:
    assert largest(lambda n: n in (1, 2, 8), 8) == 8


@pytest.mark.parametrize("what", ["length", "rows", "rank"])
@pytest.mark.parametrize(
    "setting", [Setting(length=512), Setting(length=300, recompute="none", quantization="none")]
)
def test_the_answer_fits_and_one_more_does_not(what: str, setting: Setting) -> None:
    card = find_card("RTX 4060 8GB") if setting.quantization == "nf4" else find_card("RTX 4090")
    budget = card.free_bytes("headless")
    answer = most(LLAMA, setting, what=what, room=Room(budget), card=card)  # type: ignore[arg-type]
    assert answer.value is not None
    assert answer.value >= 1
    assert vars(answer.estimate.setting)[what] == answer.value
    assert answer.estimate.fits(budget)
    assert answer.next_estimate is not None
    assert not answer.next_estimate.fits(budget)


def test_halving_agrees_with_every_length_of_a_small_model() -> None:
    shape = dataclasses.replace(SMALL, context=600)
    for seed in range(4):
        budget = random.Random(seed).randrange(int(0.55 * GIB), int(1.2 * GIB))
        every = [
            length
            for length in range(1, shape.context + 1)
            if estimate_step(shape, Setting(length=length)).fits(budget)
        ]
        assert every == list(range(1, len(every) + 1)), "fits up to there and not above"
        answer = most(shape, Setting(), what="length", room=Room(budget))
        assert answer.value == (every[-1] if every else None)


def test_more_tokens_or_rank_never_take_less() -> None:
    """What halving rests on, for every known architecture."""
    for shape in one_of_each_family():
        for recompute in ("all", "none", shape.layers // 2):
            base = Setting(recompute=recompute)  # type: ignore[arg-type]
            for what, values in (("length", range(1, 2048, 173)), ("rank", range(1, 257, 17))):
                needed = [
                    estimate_step(shape, dataclasses.replace(base, **{what: value})) for value in values
                ]
                sums = [each.needed_bytes + each.error_bytes for each in needed]
                assert sums == sorted(sums), (shape.name, what, recompute)


def one_of_each_family() -> list[ModelShape]:
    return list({shape.family: shape for shape in known_shapes()}.values())


def test_the_context_ends_the_search_and_is_said() -> None:
    answer = most(SMALL, Setting(), what="length", room=Room(80 * GIB))
    assert (answer.value, answer.is_at_ceiling, answer.next_estimate) == (SMALL.context, True, None)
    assert answer.ceiling.reason == f"the context of {SMALL.name}"


def test_the_rank_ends_at_the_narrowest_adapted_layer() -> None:
    answer = most(SMALL, Setting(length=64), what="rank", room=Room(80 * GIB))
    assert answer.value == SMALL.kv_heads * SMALL.head_width
    only = Setting(length=64, targets=("down_proj",))
    assert most(SMALL, only, what="rank", room=Room(80 * GIB)).value == SMALL.width


def test_rows_end_at_those_of_one_step() -> None:
    setting = Setting(length=64)
    answer = most(SMALL, setting, what="rows", room=Room(80 * GIB), freedom=Freedom(rows_per_step=12))
    assert (answer.value, answer.estimate.setting.accumulates) == (12, False)
    assert most(SMALL, setting, what="rows", room=Room(10**15)).value == MOST_ROWS


def test_if_nothing_fits_the_least_step_is_shown() -> None:
    answer = most(LLAMA, Setting(), what="length", room=Room(2 * GIB))
    assert answer.value is None
    assert answer.estimate.setting.length == 1
    assert answer.next_estimate is None
    assert not answer.is_at_ceiling


def test_what_this_machine_measured_narrows_the_answer() -> None:
    plain = most(SMALL, Setting(), what="length", room=Room(GIB))
    narrowed = most(SMALL, Setting(), what="length", room=Room(GIB, seen_error=1.0))
    assert plain.value is not None
    assert narrowed.value is not None
    assert narrowed.value < plain.value
    assert 2 * narrowed.estimate.peak_allocated_bytes < GIB


def test_models_come_largest_first_and_those_of_one_shape_once() -> None:
    card = find_card("RTX 4060 8GB")
    answers = fitting_models(known_shapes(), Setting(length=1024), room=Room(7 * GIB), card=card)
    sizes = [answer.shape.parameters for answer in answers]
    assert sizes == sorted(sizes, reverse=True)
    names = [name for answer in answers for name in (answer.shape.name, *answer.same)]
    assert sorted(names) == sorted(shape.name for shape in known_shapes())
    assert len(answers) < len(names)
    fitting = [answer for answer in answers if answer.fits]
    assert fitting
    assert not answers[0].fits
    for answer in fitting:
        assert answer.estimate is not None
        assert answer.estimate.fits(7 * GIB)


def test_a_model_that_cannot_take_the_length_says_so() -> None:
    answers = fitting_models([find_shape("TinyLlama-1.1B-Chat-v1.0")], Setting(length=5000), room=Room(GIB))
    assert answers[0].estimate is None
    assert "above the context" in str(answers[0].refusal)


def test_beyond_a_stop_it_may_fit_again() -> None:
    assert largest(lambda n: n <= 3 or 8 <= n <= 9, 20, stops=(8, 16)) == 9
    assert largest(lambda n: n <= 3 or 8 <= n <= 9, 20) == 3, "a control"
    assert largest(lambda n: n <= 3, 20, stops=(8, 16, 64)) == 3


@pytest.mark.parametrize(("name", "gib"), [("Llama-3.1-8B", 7.0), ("Llama-3.1-8B", 3.6), ("Gemma-2-2B", 3.0)])
def test_the_longest_row_is_the_longest_that_a_plan_takes(name: str, gib: float) -> None:
    shape, card, room = find_shape(name), find_card("RTX 4060 8GB"), Room(round(gib * GIB))
    found = most(shape, Setting(), what="length", room=room, freedom=Freedom(PLANNED, 4), card=card)
    assert found.value is not None and found.next_estimate is not None
    plain = most(shape, Setting(), what="length", room=room, card=card).value or 0
    assert found.value > plain, "knobs are turned"
    planned = dataclasses.replace(Setting(), length=found.value)
    assert fit(shape, planned, room=room, rows_per_step=4, free=PLANNED, card=card)
    longer = dataclasses.replace(planned, length=found.value + 64)
    with pytest.raises(DoesNotFit):
        fit(shape, longer, room=room, rows_per_step=4, free=PLANNED, card=card)


def test_a_host_without_room_shortens_the_row() -> None:
    card, free = find_card("RTX 4060 8GB"), Freedom(PLANNED)
    roomy, small = (
        most(
            LLAMA, Setting(), what="length", room=Room(6 * GIB, host_bytes=host), freedom=free, card=card
        ).value
        for host in (None, 6 * GIB)
    )
    assert roomy is not None and small is not None and small < roomy


def test_the_largest_model_is_one_that_a_plan_takes() -> None:
    card, room = find_card("RTX 4060 8GB"), Room(round(5.5 * GIB))
    answers = {
        free: fitting_models(known_shapes(), Setting(length=1024), room=room, free=free, card=card)
        for free in (frozenset[str](), PLANNED)
    }
    plain, planned = (next(each for each in found if each.fits) for found in answers.values())
    assert planned.shape.parameters > plain.shape.parameters
    setting = Setting(length=1024)
    assert fit(planned.shape, setting, room=room, rows_per_step=1, free=PLANNED, card=card)
