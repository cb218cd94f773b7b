"""What the loop is told, and where a run stands: plain values, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from qadapt.data.batches import Division
from qadapt.data.rows import Rows


@dataclass(frozen=True)
class LoopSettings:
    """The loop's part of a recipe and of its plan; see `recipe.TrainSection` for each.

    Of `packed` micro-batches none has more than `packed_tokens`, nor learns more than `packed_learned` of
    them: what the plan has room for, in training and in evaluation. Others are filled up to a multiple of
    `length_step` tokens, but not beyond the longest row, which is what the plan has room for, too.
    """

    steps: int
    micro_batch: int
    packed: bool
    packed_tokens: int
    packed_learned: int
    loss_chunk: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    final_share: float
    clip_norm: float | None
    evaluate_every: int | None
    patience: int | None
    checkpoint_every: int | None
    keep_checkpoints: int
    keep_every: int | None
    length_step: int = 1

    def division(self, rows: Rows) -> Division:
        """How the plan divides rows, which are some of these."""
        return Division(
            rows.pad_id,
            self.micro_batch,
            self.packed,
            tokens=self.packed_tokens,
            learned=self.packed_learned,
            loss_chunk=self.loss_chunk,
            length_step=self.length_step,
            most=rows.longest,
        )


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, and the best evaluation so far."""

    step: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_since_best: int = 0
    owes_evaluation: bool = False
    """It left in the middle of the evaluation after `step`, or before it."""
    owes_samples: bool = False
    """Likewise of the sample answers after `step`, which its checkpoint follows."""
