from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadapt.events import (
    EVENTS,
    VERSION,
    CheckpointSaved,
    Evaluated,
    Event,
    Resumed,
    StepDone,
    Warned,
    from_line,
    to_line,
)

TEXTS = st.text(max_size=20)
NUMBERS = st.floats(allow_nan=False, width=64)
STRATEGIES: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXTS,
    int: st.integers(min_value=-(2**63), max_value=2**63),
    float: NUMBERS,
    bool: st.booleans(),
    str | int: TEXTS | st.integers(min_value=1, max_value=200),
    int | str: TEXTS | st.integers(min_value=1, max_value=200),
    float | None: st.none() | NUMBERS,
    int | None: st.none() | st.integers(min_value=0, max_value=2**40),
    dict[str, float]: st.dictionaries(TEXTS, NUMBERS, max_size=4),
    dict[str, int]: st.dictionaries(TEXTS, st.integers(min_value=0, max_value=2**48), max_size=4),
    tuple[str, ...]: st.lists(TEXTS, max_size=3).map(tuple),
}


@st.composite
def events(draw: st.DrawFn) -> Event:
    """An event of any kind, its fields drawn by their types."""
    kind = draw(st.sampled_from(sorted(EVENTS)))
    hints = get_type_hints(EVENTS[kind])
    fields = {field.name: draw(STRATEGIES[hints[field.name]]) for field in dataclasses.fields(EVENTS[kind])}
    return EVENTS[kind](**fields)


@given(events())
def test_an_event_survives_its_line(event: Event) -> None:
    line = to_line(event)
    assert "\n" not in line
    restored = from_line(line)
    assert restored == event
    assert restored is not None
    assert restored.time == event.time  # which equality leaves out


def test_every_kind_of_event_is_registered() -> None:
    def kinds(kind: type[Event]) -> set[type[Event]]:
        return {kind}.union(*(kinds(inner) for inner in kind.__subclasses__()))

    assert set(EVENTS.values()) == kinds(Event) - {Event}


def test_a_loss_that_is_no_number_survives() -> None:
    restored = from_line(to_line(Evaluated(step=1, loss=math.nan, is_best=False, seconds=1.0)))
    assert isinstance(restored, Evaluated)
    assert math.isnan(restored.loss)


def test_a_line_names_its_kind_and_version() -> None:
    values = json.loads(to_line(Resumed(step=3, time=5.0)))
    assert values == {"event": "Resumed", "version": VERSION, "step": 3, "time": 5.0}


def test_a_kind_from_a_newer_version_is_passed_over() -> None:
    assert from_line('{"event": "Teleported", "version": 9, "where": "up"}') is None


def test_a_field_from_a_newer_version_is_passed_over() -> None:
    values = json.loads(to_line(Warned(message="m", cure="c"))) | {"colour": "red"}
    assert from_line(json.dumps(values)) == Warned(message="m", cure="c")


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", "7", '"text"', '{"event": "Warned", "message": "m"}'])
def test_a_line_that_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        from_line(line)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_line_cut_off_by_a_crash_is_refused(share: float) -> None:
    line = to_line(CheckpointSaved(step=1, folder="checkpoints/step-000001", is_best=True, bytes=10))
    with pytest.raises(ValueError):
        from_line(line[: int(len(line) * share)])


def test_events_are_equal_whenever_they_happened() -> None:
    first = Warned(message="m", cure="c", time=1.0)
    assert first == Warned(message="m", cure="c", time=2.0)
    assert first != Warned(message="other", cure="c", time=1.0)


def test_events_do_not_change() -> None:
    event = StepDone(
        step=1,
        loss=1.0,
        learning_rate=1.0,
        gradient_norm=1.0,
        tokens=1,
        supervised_tokens=1,
        rows=1,
        seconds=1.0,
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.step = 2  # type: ignore[misc]
