"""The learning rate of a step: a pure function, so there is nothing to save."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, steps: int, highest: float, schedule: str, warmup_steps: int, final_share: float
) -> float:
    """The learning rate of step `step` (from 0 to steps - 1).

    It rises linearly over the warm-up, whose last step has the highest rate, then falls to `final_share` of
    it at the last step: along a half cosine (arXiv:1608.03983), linearly, or not at all.
    """
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    if schedule == "constant":
        return highest
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    falling = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return highest * (final_share + (1 - final_share) * falling)
