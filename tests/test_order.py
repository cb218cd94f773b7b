"""The order of rows: each pass takes what its weights say, from any step on, by any number of processes."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qadapt.data.order import Order, OrderKind

KINDS: tuple[OrderKind, ...] = ("shuffled", "by-length", "given")
CASES = settings(max_examples=200)


def lengths_of(count: int) -> np.ndarray:
    return np.random.RandomState(count).randint(1, 900, count).astype(np.int32)


@st.composite
def orders(draw: st.DrawFn) -> tuple[Order, list[tuple[int, float]]]:
    sources = draw(
        st.lists(
            st.tuples(st.integers(1, 40), st.sampled_from([1.0, 1.0, 2.0, 0.5, 0.1, 1.3, 3.75])),
            min_size=1,
            max_size=3,
        )
    )
    order = Order(
        lengths_of(sum(count for count, _ in sources)),
        rows_per_step=draw(st.integers(1, 17)),
        seed=draw(st.integers(0, 3)),
        kind=draw(st.sampled_from(KINDS)),
        sources=sources,
    )
    return order, sources


def passes(order: Order, count: int) -> list[list[int]]:
    steps = -(-count * order.pass_rows // order.rows_per_step)
    taken = list(chain.from_iterable(order.rows_of_step(step) for step in range(steps)))
    return [taken[number * order.pass_rows :][: order.pass_rows] for number in range(count)]


@CASES
@given(orders())
def test_a_pass_takes_each_row_as_often_as_its_weight_says(
    made: tuple[Order, list[tuple[int, float]]],
) -> None:
    order, sources = made
    for taken in passes(order, 2):
        counts = Counter(taken)
        first = 0
        for count, weight in sources:
            times = [counts[row] for row in range(first, first + count)]
            assert set(times) <= {int(weight), int(weight) + 1}
            assert abs(sum(times) - weight * count) <= (0.5 if weight >= 1 else 1)
            first += count
        assert sum(counts.values()) == order.pass_rows


@CASES
@given(orders(), st.integers(0, 40))
def test_from_any_step_on_the_order_is_that_of_an_uninterrupted_run(
    made: tuple[Order, list[tuple[int, float]]], step: int
) -> None:
    order, _ = made
    straight = [order.rows_of_step(number) for number in range(step + 6)]
    fresh: Order = pickle.loads(pickle.dumps(order))
    assert [fresh.rows_of_step(number) for number in range(step, step + 6)] == straight[step:]


@CASES
@given(orders(), st.integers(1, 5), st.integers(0, 9))
def test_several_processes_share_a_step_without_a_row_twice(
    made: tuple[Order, list[tuple[int, float]]], world_size: int, step: int
) -> None:
    order, _ = made
    parts = [order.rows_of_step(step, rank=rank, world_size=world_size) for rank in range(world_size)]
    whole = order.rows_of_step(step)
    assert Counter(chain.from_iterable(parts)) == Counter(whole)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_order_is_the_same_on_every_system_and_in_every_version() -> None:
    order = Order(np.arange(7, dtype=np.int32), rows_per_step=3, seed=1)
    assert [order.rows_of_step(step) for step in range(5)] == [
        [4, 3, 6],
        [2, 0, 1],
        [5, 3, 2],
        [5, 1, 0],
        [4, 6, 5],
    ]
    weighted = Order(np.arange(7, dtype=np.int32), rows_per_step=4, seed=1, sources=[(4, 1.5), (3, 0.5)])
    assert [weighted.rows_of_step(step) for step in range(3)] == [[6, 0, 4, 3], [2, 0, 1, 1], [5, 3, 1, 2]]


def test_another_seed_is_another_order_and_each_pass_has_its_own() -> None:
    lengths = lengths_of(50)
    first, second = passes(Order(lengths, rows_per_step=5, seed=0), 2)
    assert first != second
    assert passes(Order(lengths, rows_per_step=5, seed=1), 1) != [first]
    assert first != sorted(first)


def test_the_given_order_is_that_of_the_files() -> None:
    order = Order(lengths_of(5), rows_per_step=4, kind="given", sources=[(2, 2.0), (3, 1.0)])
    assert passes(order, 1) == [[0, 1, 0, 1, 2, 3, 4]]


def test_passes_draw_rows_of_a_small_weight_that_were_not_drawn_before() -> None:
    order = Order(lengths_of(8), rows_per_step=2, kind="given", sources=[(8, 0.25)])
    taken = list(chain.from_iterable(passes(order, 4)))
    assert sorted(taken) == list(range(8))


def test_rows_of_like_length_stand_in_one_step_and_steps_in_no_order_of_length() -> None:
    lengths = lengths_of(4000)
    by_length = Order(lengths, rows_per_step=8, kind="by-length")
    shuffled = Order(lengths, rows_per_step=8)

    def filled_share(order: Order) -> float:
        steps = [lengths[order.rows_of_step(step)] for step in range(500)]
        return float(lengths.sum() / sum(8 * step.max() for step in steps))

    assert filled_share(by_length) > 0.97
    assert filled_share(shuffled) < 0.65
    means = [lengths[by_length.rows_of_step(step)].mean() for step in range(500)]
    assert abs(np.corrcoef(means, range(500))[0, 1]) < 0.15


def test_the_longest_step_is_the_one_that_has_the_longest_row() -> None:
    lengths = lengths_of(60)
    order = Order(lengths, rows_per_step=7)
    step = order.longest_step(1000)
    assert int(lengths.argmax()) in order.rows_of_step(step)
    assert order.longest_step(1) == 0


@pytest.mark.parametrize(("passes_asked", "steps"), [(1, 4), (0.1, 1), (0.5, 2), (2, 7), (3, 10)])
def test_passes_are_so_many_steps(passes_asked: float, steps: int) -> None:
    assert Order(lengths_of(10), rows_per_step=3).step_count(passes_asked) == steps


def test_a_weight_counts_in_the_steps_of_a_pass() -> None:
    order = Order(lengths_of(10), rows_per_step=3, sources=[(4, 2.5), (6, 0.5)])
    assert order.pass_rows == 13
    assert order.step_count(1) == 5
