"""The ranks of a method that gives some up on the way (AdaLoRA, arXiv:2303.10512): how many, and when.

No tensors: `adapters/rank_budget.py` decides which.
"""

from __future__ import annotations

from dataclasses import dataclass

from qadapt.errors import BadRecipe
from qadapt.methods import METHODS, Method

LEAST_BEFORE = 3
"""Steps of AdaLoRA before it gives anything up: λ moves in the first, P and Q by λ in the second."""
RANK_EPSILON = 1e-5
"""PEFT adds it to the ranks at the start before it divides alpha by them."""
LEAST_STEPS = 2 * LEAST_BEFORE + 1
"""Of a run of AdaLoRA's."""


@dataclass(frozen=True)
class RankSchedule:
    """When ranks are given up: from step `before` on, every so many steps, until `after` steps are left."""

    before: int
    after: int
    every: int


def rank_schedule(steps: int) -> RankSchedule:
    """AdaLoRA's schedule: of a run's steps a tenth, and then half of them, about as in its paper's runs.

    At least three go before, in which all that is trained has moved once; the way between has at least one.

    Raises:
        BadRecipe: There are fewer steps than that takes.
    """
    schedule = RankSchedule(max(LEAST_BEFORE, steps // 10), steps // 2, max(1, steps // 1000))
    if schedule.before >= steps - schedule.after:
        raise BadRecipe(
            f"The run has {steps} steps; AdaLoRA, which gives ranks up on the way, needs {LEAST_STEPS}.",
            cure=f"Set train.steps={LEAST_STEPS} or more, or adapter.method=lora.",
        )
    return schedule


def check_steps(method: Method, steps: int) -> None:
    """Refuses fewer steps than a method has a schedule for.

    Raises:
        BadRecipe: They are fewer.
    """
    if METHODS[method].starts_wider:
        rank_schedule(steps)


def trained_rank(method: Method, rank: int) -> int:
    """How many ranks each layer starts with."""
    return rank + (rank + 1) // 2 if METHODS[method].starts_wider else rank


def check_start(method: Method, rank: int, *, narrowest: int) -> None:
    """Refuses a rank whose start is wider than the narrowest side of an adapted layer.

    Raises:
        BadRecipe: It is.
    """
    start = trained_rank(method, rank)
    if start > narrowest:
        raise BadRecipe(
            f"adapter.rank is {rank}, with which {METHODS[method].title} starts at {start}; the narrowest "
            f"adapted layer is {narrowest} wide.",
            cure=f"Set adapter.rank to at most {narrowest * 2 // 3}; 8 to 64 is usual.",
        )
