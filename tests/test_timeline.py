"""The picture of a step's memory: well formed, small, true at its peak, the same words as elsewhere."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadapt.plan.categories import CATEGORIES, TITLES
from qadapt.plan.trace import TraceEvent, peak_of
from qadapt.units import GIB, MIB, format_bytes
from qadapt.view import timeline
from qadapt.view.timeline import memory_svg

NAME = "{http://www.w3.org/2000/svg}"


def step() -> list[TraceEvent]:
    """Two GiB of weights; activations come, the loss is the peak, gradients stay, the update passes."""
    events = [TraceEvent(1, 2 * GIB, "base_weights", "load")]
    events += [TraceEvent(10 + n, 64 * MIB, "activations", "forward") for n in range(8)]
    events += [TraceEvent(50, GIB, "loss", "loss"), TraceEvent(50, 0, "loss", "loss")]
    for n in reversed(range(8)):
        events += [
            TraceEvent(60 + n, 32 * MIB, "activations", "recompute"),
            TraceEvent(80 + n, 4 * MIB, "gradients", "backward"),
            TraceEvent(60 + n, 0, "activations", "backward"),
            TraceEvent(10 + n, 0, "activations", "backward"),
        ]
    events += [TraceEvent(99, 8 * MIB, "temporary", "update"), TraceEvent(99, 0, "temporary", "update")]
    return events


def texts(svg: str) -> list[str]:
    return [str(each.text) for each in ElementTree.fromstring(svg).iter(f"{NAME}text")]


def test_the_peak_its_phase_and_the_categories_are_named() -> None:
    svg = memory_svg(step(), title="a step", limit_bytes=3 * GIB)
    words = texts(svg)
    assert "peak 3.50 GiB" in words
    assert [name for name in words if name in ("forward", "loss", "backward", "update")] == [
        "forward", "loss", "backward", "update", "loss",
    ]  # fmt: skip
    assert {TITLES[name] for name in ("base_weights", "activations", "loss", "gradients")} <= set(words)
    assert TITLES["optimizer"] not in words, "what is never there is not in the legend"
    assert "limit 3.00 GiB" in words
    assert "512.0 MiB" in words, "activations at the peak"


def test_the_picture_says_in_words_what_it_shows() -> None:
    root = ElementTree.fromstring(memory_svg(step(), title="a <step> & more", limit_bytes=3 * GIB))
    assert root.get("role") == "img"
    title, words = (root.find(f"{NAME}{name}") for name in ("title", "desc"))
    assert title is not None
    assert words is not None
    assert title.text == "a <step> & more"
    assert str(root.get("aria-labelledby")).split() == [title.get("id"), words.get("id")]
    assert "Peak 3.50 GiB, in the phase loss" in str(words.text)
    assert "above the limit of 3.00 GiB" in str(words.text)


def test_it_stands_alone_and_follows_the_theme() -> None:
    svg = memory_svg(step(), title="a step")
    assert "prefers-color-scheme:dark" in svg
    assert not re.search(r"href|url\(|@import|<script|<image", svg)


def test_a_long_trace_stays_small_and_keeps_its_peak() -> None:
    events = [TraceEvent(0, GIB, "base_weights", "load")]
    for n in range(40_000):
        phase = "forward" if n < 10_000 else "backward"
        size = 700 * MIB if n == 23_457 else (n * 7919 % 97 + 1) * MIB
        events += [TraceEvent(n + 1, size, "temporary", phase), TraceEvent(n + 1, 0, "temporary", phase)]
    svg = memory_svg(events, title="long")
    assert f"peak {format_bytes(GIB + 700 * MIB)}" in texts(svg)
    assert len(svg) < 60_000
    points = max(path.get("d", "").count("L") for path in ElementTree.fromstring(svg).iter(f"{NAME}path"))
    assert 300 < points <= timeline.MOST_POINTS + 4


def test_what_is_there_before_may_be_given_instead_of_traced() -> None:
    traced = memory_svg(step(), title="a step")
    given_ = memory_svg(step()[1:], title="a step", starting={"base_weights": 2 * GIB})
    assert traced == given_


def test_sizes_are_rounded_as_the_device_rounds_them() -> None:
    events = [TraceEvent(n, MIB - 1, "activations", "forward") for n in range(4)]
    assert "4.0 MiB" in texts(memory_svg(events, title="a step", unit_bytes=512))


def test_a_limit_far_above_does_not_flatten_the_picture() -> None:
    assert "limit 78.00 GiB, far above ↑" in texts(memory_svg(step(), title="a step", limit_bytes=78 * GIB))


def test_an_unknown_category_is_drawn_as_other() -> None:
    svg = memory_svg([TraceEvent(1, 5 * MIB, "novel", "forward")], title="a step")
    assert "other" in texts(svg)


def test_a_trace_without_a_step_is_no_picture() -> None:
    with pytest.raises(ValueError, match="no event after the loading"):
        memory_svg(step()[:1], title="nothing")


def test_neighbours_in_the_stack_have_different_colours_and_all_have_one() -> None:
    colours = [timeline._COLOURS[name] for name in CATEGORIES]
    assert len(set(colours)) == len(colours)


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 10 * GIB), st.sampled_from(CATEGORIES)),
        min_size=1,
        max_size=40,
    )
)
def test_any_trace_gives_a_well_formed_picture_of_its_own_peak(
    moves: list[tuple[int, int, str]],
) -> None:
    live: dict[int, str] = {}
    events = []
    for key, size, category in moves:
        if key in live:
            events.append(TraceEvent(key, 0, live.pop(key), "backward"))
        else:
            live[key] = category
            events.append(TraceEvent(key, max(1, size), category, "forward"))
    svg = memory_svg(events, title="any")
    assert f"peak {format_bytes(peak_of(events).bytes)}" in texts(svg)
    ys = [float(y) for d in re.findall(r' d="([^"]+)"', svg) for y in re.findall(r"L[\d.]+ (-?[\d.]+)", d)]
    assert all(timeline._TOP <= y <= timeline._BOTTOM for y in ys)
