"""Whether a run is well: looks at each step's result and says so when it is not, each thing once.

An update whose loss or gradient is not finite was left out by the step; here it is counted, its cause looked
for (`replay.py`), and the run ended when they become many. Everything else is a gauge of `gauges.py` over the
few numbers that a step gives anyway, so nothing here waits for the device, but in a step that went wrong.
Which tokens dominate a loss is asked only when the loss spikes: in every step it would cost a second pass
over the logits. What decides later events is in `values`, for the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qadapt.errors import Diverged
from qadapt.events import Event, StepDone, UpdateSkipped, Warned
from qadapt.train.gauges import History, Note, find_ill
from qadapt.train.movement import UPDATES, find_unmoved, fingerprints
from qadapt.train.optimizer import AdapterOptimizer
from qadapt.train.replay import Finding, Heaviest, Replay

SKIPPED_IN_ROW = 3
"""One odd row is one update, a broken adapter is every one; the third in a row is no accident."""
SKIPPED_SHARE, SKIPPED_AT_LEAST = 0.01, 10
"""Of all steps so many may be left out before the run is no longer the one that was asked for."""
LOWEST_SCALE = 1.0
"""An fp16 gradient that overflows at this loss scale overflows by itself."""
WELL_STEPS = 32
"""A gauge that was ill speaks again after so many steps in which it was well."""
HEAVY_SHARE = 0.5
_SHOWN_ROWS = 3


class Health:
    """How a run's steps go.

    Args:
        optimizer: Over the trained parameters, at the start of the run.
        steps: Of the whole run.
        clip_norm: Largest norm of a step's gradient, if there is one.
    """

    def __init__(self, optimizer: AdapterOptimizer, *, steps: int, clip_norm: float | None) -> None:
        self._optimizer = optimizer
        self._steps = steps
        self._clip_norm = clip_norm
        self._trained_values = sum(value.numel() for value in optimizer.parameters.values())
        self._history = History()
        self._start = fingerprints(optimizer)
        self._updates = 0
        self._skipped, self._skipped_in_row = 0, 0
        self._well_steps: dict[str, int] = {}  # of gauges that have spoken

    def after_step(
        self, done: StepDone, *, is_applied: bool, loss_scale: float | None, replay: Callable[[], Replay]
    ) -> Iterator[Event]:
        """What there is to say about a step.

        Args:
            done: The step.
            is_applied: Whether its update was finite and made.
            loss_scale: For the next step (fp16), if losses are scaled.
            replay: Makes the step's rows and random state ready to be looked at again.

        Raises:
            Diverged: Too many updates were not finite; names the cause, the rows and the cure.
        """
        if not is_applied:
            yield from self._after_skipped(done, loss_scale, replay)
            return
        self._skipped_in_row = 0
        self._updates += 1
        if self._updates == UPDATES:
            note = find_unmoved(self._optimizer, self._start.tolist())
            yield from self._said("unmoved", note, done.step)
        self._history = self._history.after(done.loss, done.gradient_norm)
        gauges = find_ill(self._history, clip_norm=self._clip_norm, trained_values=self._trained_values)
        for name, note in gauges:
            if name == "spike" and note is not None and name not in self._well_steps:
                note = _with_tokens(note, replay().find_heaviest())
            yield from self._said(name, note, done.step)

    def _said(self, gauge: str, note: Note | None, step: int) -> Iterator[Warned]:
        """A note, unless the gauge has spoken and was not well for a while since."""
        if note is not None:
            if gauge not in self._well_steps:
                yield Warned(message=note.message, cure=note.cure, step=step)
            self._well_steps[gauge] = 0
        elif gauge in self._well_steps:
            self._well_steps[gauge] += 1
            if self._well_steps[gauge] == WELL_STEPS:
                del self._well_steps[gauge]

    def _after_skipped(
        self, done: StepDone, loss_scale: float | None, replay: Callable[[], Replay]
    ) -> Iterator[Event]:
        counts = loss_scale is None or not math.isfinite(done.loss) or loss_scale < LOWEST_SCALE
        finding = replay().find_cause() if counts else None
        cause = (
            _cause(finding)
            if finding is not None
            else f"the gradient was too large for fp16; the loss scale falls to {loss_scale:,g}"
        )
        yield UpdateSkipped(step=done.step, loss=done.loss, gradient_norm=done.gradient_norm, cause=cause)
        if finding is None:
            return
        self._skipped += 1
        self._skipped_in_row += 1
        allowed = max(SKIPPED_AT_LEAST, math.ceil(SKIPPED_SHARE * self._steps))
        if self._skipped_in_row < SKIPPED_IN_ROW and self._skipped < allowed:
            return
        in_row = self._skipped_in_row >= SKIPPED_IN_ROW
        many = f"{self._skipped_in_row} updates in a row" if in_row else f"{self._skipped} updates"
        raise Diverged(
            f"Training diverged at step {done.step}: {many} were left out because the loss or the gradient "
            f"was not finite (loss {done.loss:g}, norm {done.gradient_norm:g}). Where it began: {cause}.",
            cure=f"{_cure(finding)} Nothing of these steps is in the adapter; checkpoints before are whole.",
        )

    def values(self) -> dict[str, Any]:
        """What a resumed run needs to say the same, as plain JSON."""
        history = self._history
        lowest = [history.lowest_loss, history.lowest_norm]
        return {
            "losses": list(history.losses),
            "norms": list(history.norms),
            "lowest": lowest if all(map(math.isfinite, lowest)) else None,
            "start": self._start.tolist() if self._updates < UPDATES else None,
            "updates": self._updates,
            "skipped": self._skipped,
            "skipped_in_row": self._skipped_in_row,
            "well_steps": dict(self._well_steps),
        }

    def restore(self, values: Mapping[str, Any]) -> None:
        """Takes over what `values` gave."""
        lowest_loss, lowest_norm = values["lowest"] or (math.inf, math.inf)
        self._history = History(tuple(values["losses"]), tuple(values["norms"]), lowest_loss, lowest_norm)
        if values["start"] is not None:
            self._start = self._start.new_tensor(values["start"])
        self._updates = values["updates"]
        self._skipped, self._skipped_in_row = values["skipped"], values["skipped_in_row"]
        self._well_steps = dict(values["well_steps"])


def _with_tokens(note: Note, heaviest: Heaviest | None) -> Note:
    if heaviest is None or heaviest.share < HEAVY_SHARE:
        return note
    tokens = f"{heaviest.tokens} of its {heaviest.learned:,} learned tokens"
    where = _listed(heaviest.places)
    return Note(f"{note.message} {tokens} carry {heaviest.share:.0%} of it: {where}.", note.cure)


def _listed(places: tuple[str, ...]) -> str:
    more = f" and {len(places) - _SHOWN_ROWS} more" if len(places) > _SHOWN_ROWS else ""
    return "; ".join(places[:_SHOWN_ROWS]) + more


def _cause(finding: Finding) -> str:
    where = {
        "adapter": f"the adapter's {finding.where} holds numbers that are not finite",
        "forward": f"in the forward pass, in {finding.where}",
        "loss": "in the loss; the output of every module is finite",
        "backward": f"in the backward pass, in the gradient that comes out of {finding.where}",
        "gradient": f"in the gradient of {finding.where} alone",
        "sum": "in the sum; each row's gradient is finite",
        "gone": "unknown; the same rows gave finite numbers when they were done again",
        "memory": "unknown; there was no memory to do the rows again",
    }[finding.kind]
    if finding.kind in ("adapter", "sum", "gone", "memory"):
        return where
    if finding.is_every_row:
        return f"{where} (every row of the step)"
    return f"{where} ({_listed(finding.places) or 'no row gives it alone'})"


def _cure(finding: Finding) -> str:
    if finding.kind == "gone":
        return (
            "What does not come again points to the machine: take back any overclocking, look at the "
            "temperature, test the memory; then `qadapt resume`."
        )
    if finding.kind in ("adapter", "sum", "memory"):
        return "Start again with a lower train.learning_rate or a longer train.warmup_steps."
    is_of_rows = finding.places and not finding.is_every_row
    rows = "Look at these rows (qadapt data preview), l" if is_of_rows else "L"
    return (
        f"{rows}ower train.learning_rate, or give memory.compute_dtype a wider type than it has (bf16, fp32)."
    )
