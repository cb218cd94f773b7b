"""The training loop, a generator of events: what happens between steps (a step itself is `step.py`).

Knows no recipe and no screen: it takes flat settings, and whoever iterates decides what to show or to keep.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from peft import PeftModel

from qadapt import control
from qadapt.adapters.lora import adapter_tensors
from qadapt.collection import short_collections
from qadapt.data.batches import all_batches
from qadapt.data.loader import StepBatches
from qadapt.data.order import Order
from qadapt.data.rows import Rows
from qadapt.engine.host import device_of
from qadapt.errors import BadOutput, DoesNotFit
from qadapt.events import CheckpointSaved, Evaluated, Event, MemoryMeasured, StepDone, Stopped, Warned
from qadapt.train.checkpoint import Checkpoint, drop_newer, random_state, restore_random_state
from qadapt.train.health import Health
from qadapt.train.memory import MemoryMeter
from qadapt.train.oom import Beginning, Ladder, Trial
from qadapt.train.optimizer import AdapterOptimizer
from qadapt.train.pauses import Leaving, Pauses
from qadapt.train.pinned import PinnedWatch
from qadapt.train.replay import Replay
from qadapt.train.samples import Samples
from qadapt.train.saver import Saver, saved_event
from qadapt.train.schedule import learning_rate
from qadapt.train.settings import LoopSettings, Progress
from qadapt.train.spill import Pace, renewing_cap, within_free_memory
from qadapt.train.step import StepResult, apply_gradient, evaluate_loss, find_gradient

MEMORY_EVERY = 50
"""Steps from one whose memory is counted to the next: such a step takes about a quarter more time."""
FIRST_SCALE = 2.0**16
"""Of an fp16 run's loss, as torch begins."""
SAVE_SECONDS = 300
"""After so long without a checkpoint one is written, between the recipe's, too: what a kill costs at most."""


class Loop:
    """One run's steps.

    Args:
        model: The adapted model, on its device.
        optimizer: Over the trained parameters.
        rows: What is trained and evaluated on.
        order: Which of them each step takes.
        settings: How.
        run_folder: Where checkpoints go and requests come from.
    """

    def __init__(
        self,
        model: PeftModel,
        optimizer: AdapterOptimizer,
        *,
        rows: Rows,
        order: Order,
        settings: LoopSettings,
        run_folder: Path,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.rows = rows
        self.order = order
        self.settings = settings
        self.run_folder = run_folder
        self.progress = Progress()
        self._saver = Saver(run_folder, keep=settings.keep_checkpoints, keep_every=settings.keep_every)
        self.pauses = Pauses(run_folder)
        self.ladder = Ladder(
            model,
            optimizer,
            division=settings.division(rows),
            run_folder=run_folder,
            pauses=self.pauses,
        )
        self._memory = MemoryMeter(model, optimizer)
        self._health = Health(optimizer, steps=settings.steps, clip_norm=settings.clip_norm)
        self._is_applied = True
        self._save_started = time.monotonic()
        self._samples: Samples | None = None
        self._longest_step = order.longest_step(settings.steps) + 1  # likely to take the most memory
        self._device = device_of(model)
        self._pace = Pace(is_cuda=self._device.type == "cuda")
        self._pinned = PinnedWatch(model.get_base_model())
        self._beginning = Beginning(self._device, None)
        self._scaler: torch.amp.GradScaler | None = None

    def scale_loss(self, scale: float = FIRST_SCALE) -> None:
        """Scales the loss from now on, for fp16 products."""
        self._scaler = torch.amp.GradScaler(self._device.type, init_scale=scale)
        self._scaler.scale(torch.zeros((), device=self._device))  # makes the scale that a step begins with

    @property
    def peak_bytes(self) -> int:
        """The highest memory measured so far; 0 before the first step. On a CPU, of watched steps only."""
        return self._memory.measured()[1]

    def ask_samples(self, samples: Samples) -> None:
        """Asks the model these prompts from now on, after every evaluation and at the end."""
        self._samples = samples

    def events(self) -> Iterator[Event]:
        """Trains from where the run stands to its last step, an early stop, or a reason to leave."""
        self.model.train()
        yield from self.pauses.guards.warnings()
        with self._saver, within_free_memory(self._device), short_collections():
            while True:
                yield from self._look_at_save(self._saver.finished)
                waits = self.pauses.between_steps(self.progress.step, self._saved)
                reason = yield from renewing_cap(self._device, waits)
                if reason is not None:
                    yield from self._leave(reason)
                    return
                if self.progress.owes_evaluation:
                    yield from self._evaluation()
                elif self.progress.owes_samples:
                    yield from self._sampled()
                elif self.progress.step >= self.settings.steps or self._has_lost_patience():
                    yield from self._look_at_save(self._saver.wait)
                    return
                else:
                    yield from self._next_step()

    def _next_step(self) -> Iterator[Event]:
        """One step and what is said about it; nothing if the run is asked to leave in the middle of it."""
        is_watched = self._is_watched(self.progress.step + 1)
        done = yield from self._step(is_watched=is_watched)
        if done is None:
            return
        yield done
        yield from self._pace.after_step(done)
        yield from self._pinned.after_step(done.step)
        yield from self._health.after_step(
            done, is_applied=self._is_applied, loss_scale=self._loss_scale(), replay=self._replay
        )
        step = self.progress.step
        if is_watched:
            measured, peak_bytes = self._memory.measured()
            yield MemoryMeasured(step=step, measured=measured, peak_bytes=peak_bytes)
        is_last = step == self.settings.steps
        if self.rows.held_out and (is_last or _is_due(step, self.settings.evaluate_every)):
            self.progress = replace(self.progress, owes_evaluation=True)
            if self._is_long_unsaved():  # it takes its time, too
                yield from self._begin_save()
        elif is_last:
            self.progress = replace(self.progress, owes_samples=True)
        elif _is_due(step, self.settings.checkpoint_every) or self._is_long_unsaved():
            yield from self._begin_save()

    def _is_long_unsaved(self) -> bool:
        return time.monotonic() - self._save_started >= SAVE_SECONDS

    def _step(self, *, is_watched: bool) -> Generator[Event, None, StepDone | None]:
        """One step; None, and all is as before it, if this process is asked to leave in the middle of it."""
        settings, step = self.settings, self.progress.step
        start = time.perf_counter()
        rate = learning_rate(
            step,
            steps=settings.steps,
            highest=settings.learning_rate,
            schedule=settings.schedule,
            warmup_steps=settings.warmup_steps,
            final_share=settings.final_share,
        )
        self._beginning = Beginning(self._device, self._scaler)
        trial = Trial(
            find=lambda: self._find_gradient(step),
            apply=lambda found: apply_gradient(
                self.optimizer, found, learning_rate=rate, scaler=self._scaler
            ),
            around=self._memory.watching if is_watched else nullcontext,
        )
        rows = [self.rows.train[index] for index in self.order.rows_of_step(step)]
        result = yield from self.ladder.climb_step(trial, step=step + 1, rows=rows, beginning=self._beginning)
        if result is None:
            return None
        self._is_applied = result.is_applied
        self.progress = replace(self.progress, step=step + 1)
        return StepDone(
            step=step + 1,
            loss=result.loss,
            learning_rate=rate,
            gradient_norm=result.gradient_norm,
            tokens=result.tokens,
            supervised_tokens=result.supervised_tokens,
            rows=self.order.rows_per_step,
            seconds=time.perf_counter() - start,
        )

    def _find_gradient(self, step: int) -> StepResult | None:
        batches = StepBatches(self.rows.train, self.order, self.ladder.training)[step]
        return find_gradient(
            self.model,
            self.optimizer,
            batches,
            clip_norm=self.settings.clip_norm,
            scaler=self._scaler,
            is_leaving=self.pauses.is_leaving,
        )

    def _loss_scale(self) -> float | None:
        """The loss scale, if there is one and its last step says something about it; asking a card waits."""
        return None if self._scaler is None or self._is_applied else self._scaler.get_scale()

    def _replay(self) -> Replay:
        """The last step, to be looked at again."""
        scale = self._loss_scale()
        return Replay(
            self.model,
            self.optimizer.parameters,
            rows=[self.rows.train[index] for index in self.order.rows_of_step(self.progress.step - 1)],
            divide=self.ladder.training,
            random=self._beginning.random,
            loss_scale=1.0
            if scale is None or self._scaler is None
            else scale / self._scaler.get_backoff_factor(),
        )

    def _is_watched(self, step: int) -> bool:
        is_known = step in (1, self.settings.steps, self._longest_step)
        return is_known or step % MEMORY_EVERY == 0

    def _evaluation(self) -> Iterator[Event]:
        """An evaluation; nothing if the run is asked to leave meanwhile."""
        try:
            evaluated = yield from self._evaluate()
        except Leaving:
            return
        except DoesNotFit:
            yield from self._saved()
            raise
        yield evaluated
        if not math.isfinite(evaluated.loss):
            yield Warned(
                message=f"The held-out loss after step {evaluated.step} is {evaluated.loss}, which is never "
                "the best one.",
                cure="Look at the held-out rows (qadapt data preview); if the loss of the steps rises, too, "
                "lower train.learning_rate.",
                step=evaluated.step,
            )

    def _evaluate(self) -> Generator[Event, None, Evaluated]:
        start = time.perf_counter()
        loss = yield from self.ladder.climb_evaluation(
            self._held_out_loss, step=self.progress.step, rows=self.rows.held_out
        )
        best = self.progress.best_loss
        is_best = math.isfinite(loss) and (best is None or loss < best)
        if is_best:
            self.progress = replace(
                self.progress, best_step=self.progress.step, best_loss=loss, evaluations_since_best=0
            )
        else:
            since = self.progress.evaluations_since_best + 1
            self.progress = replace(self.progress, evaluations_since_best=since)
        self.progress = replace(self.progress, owes_evaluation=False, owes_samples=True)
        return Evaluated(
            step=self.progress.step, loss=loss, is_best=is_best, seconds=time.perf_counter() - start
        )

    def _held_out_loss(self) -> float:
        at_once = self.order.rows_per_step if self.settings.packed else None  # no more documents than planned
        batches = all_batches(self.rows.held_out, self.ladder.evaluation, at_once=at_once)
        return evaluate_loss(self.model, self.pauses.unless_leaving(batches))

    def _sampled(self) -> Iterator[Event]:
        """Sample answers, if asked for, and a checkpoint after them; nothing if asked to leave meanwhile."""
        if self._samples is not None:
            try:
                sampled = list(self._samples.ask(self.progress.step, self.pauses.unless_leaving))
            except Leaving:
                return
            yield from sampled
        self.progress = replace(self.progress, owes_samples=False)
        yield from self._begin_save()

    def _has_lost_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def _leave(self, reason: str) -> Iterator[Event]:
        yield from self._saved()
        control.take(self.run_folder)
        yield Stopped(step=self.progress.step, reason=reason)

    def when_room(self, write: Callable[[], Sequence[Event]]) -> Iterator[Event]:
        """What `write` gives; while the disk is full, waits and tries again."""
        return self.pauses.when_room(self.progress.step, write)

    def _begin_save(self) -> Iterator[Event]:
        """Saves where the run stands, beside what comes next."""
        return self.pauses.when_room(self.progress.step, self._save)

    def _saved(self) -> Iterator[Event]:
        """Saves where the run stands, and returns when that is on the disk."""
        return self.pauses.when_room(self.progress.step, lambda: self._save(is_awaited=True))

    def _look_at_save(self, look: Callable[[], list[Event]]) -> Iterator[Event]:
        """What became of a save; if it could not be written, where the run stands now is saved instead."""
        try:
            events: Iterable[Event] = look()
        except BadOutput:
            events = self._saved()  # begun outside of the handler, which holds the copy that had no room
        yield from events

    def _save(self, *, is_awaited: bool = False) -> list[Event]:
        progress = self.progress
        values = {
            "progress": asdict(progress),
            "memory": self._memory.values(),
            "health": self._health.values(),
        }
        if self._scaler is not None:
            values["loss_scale"] = self._scaler.state_dict()
        checkpoint = Checkpoint(
            step=progress.step,
            adapter=adapter_tensors(self.model),
            optimizer=self.optimizer.tensors(),
            random=random_state(self._device),
            values=values,
        )
        self._save_started = time.monotonic()
        return self._saver.save(checkpoint, best_step=progress.best_step, is_awaited=is_awaited)

    def saved(self, folder: Path) -> CheckpointSaved:
        """What the journal says of the checkpoint of where the run stands."""
        return saved_event(folder, is_best=self.progress.best_step == self.progress.step)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to a checkpoint: the next step is the one the saved run would have done."""
        drop_newer(self.run_folder, checkpoint.step)
        self.restore_adapter(checkpoint)
        self.optimizer.load(checkpoint.optimizer)
        restore_random_state(checkpoint.random, self._device)
        self.progress = Progress(**checkpoint.values["progress"])
        self.ladder.go_to(self.progress.step)
        if "memory" in checkpoint.values:  # came with a later release
            self._memory.restore(checkpoint.values["memory"])
        if "health" in checkpoint.values:  # so did this
            self._health.restore(checkpoint.values["health"])
        if self._scaler is not None and "loss_scale" in checkpoint.values:  # else products had another type
            self._scaler.load_state_dict(checkpoint.values["loss_scale"])

    @torch.no_grad()
    def restore_adapter(self, checkpoint: Checkpoint) -> None:
        """Takes over the adapter of a checkpoint alone."""
        for name, tensor in adapter_tensors(self.model).items():
            tensor.copy_(checkpoint.adapter[name])


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
