"""The kernel for many documents at once: how it is called, and that a card where it errs is not believed.

No CPU has it, so a slow stand-in that follows its documentation takes its place; on a card: `test_gpu.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_packing import packed_recipe
from test_train import only
from torch import Tensor, nn

from qadapt.engine import documents as engine
from qadapt.engine.documents import attend_documents, documents_of, varlen_problem
from qadapt.events import StepDone, Warned
from qadapt.run import train
from qadapt.shape import ModelShape

if TYPE_CHECKING:
    from conftest import TinyModel

CPU = torch.device("cpu")
LENGTHS = (1, 37, 2, 53, 8)


def slow_varlen(
    query: Tensor,  # (T, H, D)
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_key: int,
    **named: Any,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, a query and a head at a time."""
    assert starts.dtype == key_starts.dtype == torch.int32
    left, right = named["window_size"]
    assert right == 0, "causal"
    groups = query.shape[1] // key.shape[1]
    assert named.get("enable_gqa", True) is (groups > 1)  # torch 2.11 does not know the name
    bounds = starts.tolist()
    assert longest == longest_key == max(b - a for a, b in pairwise(bounds))
    found = []
    for first, end in pairwise(bounds):
        for at in range(first, end):
            seen = slice(first if left < 0 else max(first, at - left), at + 1)
            heads = []
            for head in range(query.shape[1]):
                keys, values = key[seen, head // groups].float(), value[seen, head // groups].float()
                shares = (keys @ query[at, head].float() * named["scale"]).softmax(0)
                heads.append(shares @ values)
            found.append(torch.stack(heads))
    return torch.stack(found).to(query.dtype)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The engine takes the CPU for a card of compute capability 8.9 with the kernel."""
    monkeypatch.setattr(engine, "capability_for", lambda tensor: 8.9)
    monkeypatch.setattr(engine, "varlen_attn", slow_varlen)
    monkeypatch.setattr(engine, "HAS_VARLEN", True)
    varlen_problem.cache_clear()
    yield monkeypatch
    varlen_problem.cache_clear()


def problem_here() -> str | None:
    return varlen_problem(CPU, torch.bfloat16, head_width=16, groups=2)


def attend(**named: Any) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), 16, generator=draw) for heads in (4, 2, 2))
    halves = (each.to(torch.bfloat16) for each in (query, key, value))
    found, _ = attend_documents(
        nn.Module(), *halves, None, documents=documents_of(LENGTHS), scaling=0.25, **named
    )
    return found.float()


@pytest.mark.parametrize("window", [None, 1, 20, 53, 500])
def test_the_kernel_is_called_so_that_it_gives_what_one_document_at_a_time_gives(
    window: int | None, card: pytest.MonkeyPatch
) -> None:
    assert problem_here() is None
    at_once = attend(sliding_window=window)
    card.setattr(engine, "capability_for", lambda tensor: None)
    one_by_one = attend(sliding_window=window)
    torch.testing.assert_close(at_once, one_by_one, rtol=2e-2, atol=2e-2)  # bf16
    assert at_once.shape == (1, sum(LENGTHS), 4, 16)


def varlen_of_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    named: dict[str, Any] = {"scale": scale, "window_size": window_size}
    return slow_varlen(query, key, value, starts, key_starts, longest, longest_key, **named)


def test_the_kernel_of_a_torch_without_a_word_for_groups_is_called_without_it(
    card: pytest.MonkeyPatch,
) -> None:
    card.setattr(engine, "varlen_attn", varlen_of_2_11)
    card.setattr(engine, "SAYS_GROUPS", False)
    assert problem_here() is None
    card.setattr(engine, "SAYS_GROUPS", True)
    varlen_problem.cache_clear()
    found = problem_here()
    assert found is not None and "enable_gqa" in found


def see_everything(*tensors: Tensor, **named: Any) -> Tensor:
    whole = torch.tensor([0, tensors[0].shape[0]], dtype=torch.int32)
    length = tensors[0].shape[0]
    return slow_varlen(*tensors[:3], whole, whole, length, length, **named)


def fail(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def fail_without_a_word(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError


def give_no_gradient(query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Tensor:
    """Right, but what goes back to the values is NaN."""
    value = value.clone()
    if value.requires_grad:
        value.register_hook(lambda gradient: gradient * math.nan)
    return slow_varlen(query, key, value, *others, **named)


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        (see_everything, "it differs by"),
        (fail, "no kernel image is available"),
        (fail_without_a_word, "RuntimeError"),
        (give_no_gradient, "it gives values that are not finite"),
    ],
)
def test_a_card_whose_kernel_errs_takes_one_document_after_another(
    kernel: Any, problem: str, card: pytest.MonkeyPatch
) -> None:
    card.setattr(engine, "varlen_attn", kernel)
    found = problem_here()
    assert found is not None and found.startswith(problem) and "\n" not in found
    fallen_back = attend()
    card.setattr(engine, "capability_for", lambda tensor: None)
    torch.testing.assert_close(fallen_back, attend(), rtol=2e-2, atol=2e-2)  # bf16


def test_the_check_is_of_the_heads_of_the_model(card: pytest.MonkeyPatch) -> None:
    asked = set()

    def noted(query: Tensor, key: Tensor, *others: Any, **named: Any) -> Tensor:
        asked.add((query.shape[1:], key.shape[1:], named["scale"]))
        return slow_varlen(query, key, *others, **named)

    card.setattr(engine, "varlen_attn", noted)
    assert varlen_problem(CPU, torch.bfloat16, head_width=24, groups=3) is None
    assert asked == {((6, 24), (2, 24), 24**-0.5)}


def test_the_check_leaves_the_random_numbers_of_the_run_alone(card: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    with torch.no_grad():
        assert problem_here() is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_says_that_the_kernel_cannot_be_used(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def problem(shape: ModelShape, *, device: torch.device, dtype: torch.dtype) -> str:
        asked.append((device.type, dtype))
        return "no kernel image"

    for asking in ("plan", "model"):
        monkeypatch.setattr(f"qadapt.running.{asking}.kernel_problem", problem)
    planned = []
    monkeypatch.setattr(
        "qadapt.running.plan.packed_plan",
        lambda shape, way, *others, **named: planned.append(way) or way.plan,
    )
    events = list(train(packed_recipe(tmp_path, tiny_model("llama"), packing=True, steps=1)))
    assert [way.plan.setting.one_by_one for way in planned] == [True], "the plan knows it"
    assert set(asked) == {("cpu", torch.float32)}
    messages = [event.message for event in only(Warned, events)]
    assert any(message.endswith("cannot be used on this card: no kernel image.") for message in messages)
    assert only(StepDone, events)
