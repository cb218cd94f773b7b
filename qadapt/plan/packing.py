"""Whether rows of a step are laid one after another: for which models, and whether it is faster. No torch.

Packing changes no result: a step takes the same rows, and its gradient is the same sum (dropout draws other
masks, as any other micro-batch size would). What it changes is how many forward passes a step takes, and how
many tokens of padding go through them. Whoever has the rows
says how they lie (`data/step_sample.py`); here the two ways are compared.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from qadapt.errors import Unsupported
from qadapt.hardware.cards import Card
from qadapt.plan.attention import NEW_CARD, document_kernel
from qadapt.plan.estimate import estimate_step
from qadapt.plan.fit import Plan
from qadapt.plan.setting import Setting
from qadapt.plan.speed import NOMINAL, Work, micro_batch_seconds
from qadapt.shape import ModelShape
from qadapt.units import format_bytes

PACKABLE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
"""Architectures whose packed rows are shown to give the numbers of one document at a time, by `model_type`
(`tests/test_packing.py`). Not among them, and refused: those whose attention does not come from
transformers' interface (Falcon), and those that carry a state from token to token past it."""

GAIN = 0.02
"""The least share of a step's time that packing must save to be chosen."""


def unseen_rows_notes(
    packing: Literal["auto"] | bool, shape: ModelShape | None, *, rows_per_step: int
) -> tuple[str, ...]:
    """What an estimate of a recipe alone leaves open about packing."""
    if packing == "auto" and shape is not None and shape.family in PACKABLE and rows_per_step > 1:
        return (
            "the run may pack its rows, this is of filled-up ones; `qadapt data check` looks at the rows",
        )
    return ("each forward pass is taken to be full; `qadapt data check` looks at the rows",) * (
        packing is True
    )


def check_packable(family: str) -> None:
    """Refuses an architecture whose documents nobody has shown to be kept apart.

    Raises:
        Unsupported: It is none of `PACKABLE`.
    """
    if family not in PACKABLE:
        raise Unsupported(
            f"data.packing is true, but rows of {family} cannot be packed: nothing shows that its documents "
            f"would not see each other. Shown for: {', '.join(PACKABLE)}.",
            cure="Set data.packing=false.",
        )


@dataclass(frozen=True)
class Passes:
    """The forward passes of an average step, its rows as they are.

    `tokens`, `pairs` and `head_tokens` are of a whole step, as in `Work`; `most_head_tokens` and
    `most_documents` of the one forward pass that has the most.
    """

    count: float
    tokens: float
    pairs: float
    head_tokens: float
    most_head_tokens: int = 0
    most_documents: int = 0

    @property
    def work(self) -> Work:
        """Of one pass."""
        return Work(self.tokens / self.count, self.pairs / self.count, self.head_tokens / self.count)


def cost(shape: ModelShape, setting: Setting, passes: Passes, *, card: Card | None) -> float:
    """Seconds of an average step, or, where no speed is known, a number that compares like them."""
    seconds = micro_batch_seconds(shape, setting, card, work=passes.work)
    if seconds is None:
        seconds = micro_batch_seconds(shape, setting, NOMINAL, work=passes.work)
    assert seconds is not None
    return passes.count * seconds


@dataclass(frozen=True)
class Way:
    """A plan, and how the rows lie in its micro-batches."""

    plan: Plan
    passes: Passes


def choose_way(shape: ModelShape, padded: Way, packed: Way, *, card: Card | None) -> Plan:
    """The faster plan, with why; filled up, unless packing saves at least `GAIN`."""
    before, after = (cost(shape, way.plan.setting, way.passes, card=card) for way in (padded, packed))
    if after <= (1 - GAIN) * before:
        return packed_plan(shape, packed, padded.passes, card=card, faster=before / after)
    word = "faster" if after < before else "slower"
    reason = (
        f"rows are filled up: packing would take {_compared(packed.passes, padded.passes)}, and be "
        f"{abs(1 - after / before):.0%} {word}."
    )
    return dataclasses.replace(padded.plan, reasons=(*padded.plan.reasons, reason))


def packed_plan(
    shape: ModelShape, packed: Way, padded: Passes, *, card: Card | None, faster: float | None = None
) -> Plan:
    """A packed plan with what packing saves and what it costs."""
    gain = f"; {faster:.1f} times as fast" if faster is not None else ""
    saved = f"packing: {_compared(packed.passes, padded)}{gain}."
    return dataclasses.replace(
        packed.plan, reasons=(*packed.plan.reasons, saved, _price(shape, packed.plan.setting, card=card))
    )


def _compared(packed: Passes, padded: Passes) -> str:
    """`3.1 instead of 16 forward passes a step, 41% fewer tokens`."""
    fewer = 1 - packed.tokens / padded.tokens
    return f"{packed.count:.3g} instead of {padded.count:.3g} forward passes a step, {fewer:.0%} fewer tokens"


def _price(shape: ModelShape, setting: Setting, *, card: Card | None) -> str:
    """How documents are kept apart there, and what it takes beside the same tokens filled up."""
    capability = None if setting.device == "cpu" else (card.compute_capability if card else None) or NEW_CARD
    kernel = document_kernel(
        setting.compute_dtype,
        capability=capability,
        head_width=shape.head_width,
        has_softcap=shape.attention_softcap is not None,
        one_by_one=setting.one_by_one,
    )
    how = {
        "varlen": "one kernel attends to all documents",
        "blocks": "attention takes a block of queries of one document after another",
        "documents": "attention takes one document after another and joins them",
        "scores": "a soft cap has no fused kernel: attention makes all scores of one document after another",
    }[kernel]
    full = dataclasses.replace(setting, step_tokens=0)
    both = [  # packed, filled up
        estimate_step(shape, dataclasses.replace(full, packed=each), card=card).peak_allocated_bytes
        for each in (True, False)
    ]
    more = both[0] - both[1]
    bytes_text = f"{format_bytes(abs(more))} {'more' if more > 0 else 'less'} than" if more else "as much as"
    return f"documents are kept apart: {how}; it takes {bytes_text} the same tokens filled up."
