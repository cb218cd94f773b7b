"""Memory that is none: the allocator is given what is free, and steps that page are told from noise."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import psutil
import pytest
import torch

from qadapt.events import Continued, Event, Paused, StepDone, Warned
from qadapt.train import spill
from qadapt.train.spill import CardMemory, Pace, renew_cap, renewing_cap, swapped_in_bytes, within_free_memory
from qadapt.units import GIB, MIB


def test_the_allocator_may_have_what_it_has_and_what_is_free_but_a_little() -> None:
    card = CardMemory(total_bytes=8 * GIB, free_bytes=3 * GIB, reserved_bytes=2 * GIB)
    assert card.usable_share == pytest.approx((5 * GIB - 128 * MIB) / (8 * GIB))
    assert CardMemory(8 * GIB, 0, 2 * GIB).usable_share == 0.25, "never less than it has"
    assert CardMemory(8 * GIB, 8 * GIB, 2 * GIB).usable_share == 1.0


def test_the_cap_is_taken_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: told.append((share, device))
    )
    monkeypatch.setattr(spill, "card_memory", lambda _: CardMemory(8 * GIB, 4 * GIB + 128 * MIB, 2 * GIB))
    card = torch.device("cuda", 0)
    with pytest.raises(KeyError), within_free_memory(card):
        assert told == [(0.75, card)]
        raise KeyError
    assert told == [(0.75, card), (1.0, card)]
    with within_free_memory(torch.device("cpu")):
        assert len(told) == 2


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A card of 8 GiB; its only number is what is free. The allocator's share is asked of it as of torch."""
    shares, free = [1.0], [1 * GIB]
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: shares.append(share))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: shares[-1])
    monkeypatch.setattr(spill, "card_memory", lambda _: CardMemory(8 * GIB, free[0], 2 * GIB))
    yield free


def test_the_cap_follows_what_is_free(card: list[int]) -> None:
    device = torch.device("cuda", 0)
    assert not renew_cap(device), "none was taken"
    with within_free_memory(device):
        assert not renew_cap(device), "as much as before"
        card[0] = 4 * GIB
        assert renew_cap(device)
        assert torch.cuda.get_per_process_memory_fraction(device) == pytest.approx((6 - 1 / 8) / 8)
        card[0] = 2 * GIB
        assert not renew_cap(device), "less"
        assert torch.cuda.get_per_process_memory_fraction(device) == pytest.approx((4 - 1 / 8) / 8)
    assert not renew_cap(torch.device("cpu"))


def test_after_a_wait_the_cap_is_renewed(card: list[int]) -> None:
    device = torch.device("cuda", 0)

    def waits() -> Generator[Event, None, str]:
        yield Paused(step=1, reason="hours")
        card[0] = 5 * GIB
        yield Continued(step=1, seconds=3600)
        return "over"

    found: list[str] = []

    def follow() -> Generator[Event, None, None]:
        found.append((yield from renewing_cap(device, waits())))

    with within_free_memory(device):
        assert [type(event) for event in follow()] == [Paused, Continued]
        assert torch.cuda.get_per_process_memory_fraction(device) == pytest.approx((7 - 1 / 8) / 8)
    assert found == ["over"]


def done(step: int, seconds: float, *, tokens: int = 1000) -> StepDone:
    return StepDone(
        step=step, loss=1.0, learning_rate=1e-4, gradient_norm=1.0, tokens=tokens, supervised_tokens=10,
        rows=4, seconds=seconds,
    )  # fmt: skip


def warnings(
    seconds: list[float], *, is_cuda: bool = True, fetched: int = 0, tokens: int = 1000
) -> list[Warned]:
    asked = iter(range(0, 100 * fetched + 1, max(1, fetched)))
    pace = Pace(is_cuda=is_cuda, swapped_in=lambda: next(asked) if fetched else 0)
    found = []
    for step, each in enumerate(seconds, 1):
        found += list(pace.after_step(done(step, each, tokens=tokens)))
    return [event for event in found if isinstance(event, Warned)]


def test_the_fifth_slow_step_in_a_row_is_told_once() -> None:
    [warned] = warnings([2.0] * 20 + [9.0] * 12)
    assert warned.step == 25
    assert "about 4 times as long per token" in warned.message
    assert "driver moved to the host" in warned.message
    assert "Prefer No Sysmem Fallback" in warned.cure


def test_a_few_slow_steps_slow_starts_long_rows_and_quick_steps_are_no_case() -> None:
    assert not warnings([2.0] * 20 + [30.0] * 4 + [2.0] * 5 + [30.0] * 4)
    assert not warnings([60.0, *[2.0] * 30]), "the first step loads kernels"
    assert not warnings([9.0] * 5)
    assert not warnings([0.01] * 30 + [0.3] * 30), "half a second at least"
    pace = Pace(is_cuda=True, swapped_in=lambda: 0)
    for step in range(30):
        assert not list(pace.after_step(done(step, 2.0)))
    for step in range(30, 60):
        assert not list(pace.after_step(done(step, 20.0, tokens=10_000))), "as fast per token"


def test_slow_steps_do_not_become_the_usual_ones_and_are_told_again_after_good_ones() -> None:
    told = warnings([2.0] * 20 + [9.0] * 100 + [2.0] * 3 + [9.0] * 5)
    assert [warned.step for warned in told] == [25, 128]


def test_a_system_that_fetches_memory_from_the_disk_is_told_from_one_that_is_only_busy() -> None:
    [paging] = warnings([2.0] * 10 + [9.0] * 5, is_cuda=False, fetched=300 * MIB)
    assert "fetched 300.0 MiB of memory back from the disk" in paging.message
    [busy] = warnings([2.0] * 10 + [9.0] * 5, is_cuda=False)
    assert "other programs or heat" in busy.message


def test_the_system_says_how_much_it_has_fetched() -> None:
    assert 0 <= swapped_in_bytes() <= psutil.swap_memory().sin
