"""The out-of-memory ladder: where memory runs out in a run, the same rows again with less of it.

A step is two halves. If memory runs out before its update, nothing has changed yet: its gradients are
dropped, the next rung is taken, random state and loss scale go back to where the step began, and it is done
again, the same sum over the same rows. If it runs out in the update, the update is gone on with where it
stopped (`optimizer.py`). A rung changes how a step is computed and never what: which ones there are, and
their order, is in `plan/knobs.py`, how they are turned in `turns.py`. Each is an event and is on the disk
(`rungs.json`, with the step from which it counts) before anything is done again, so a resumed run takes it at
the same step.

Rows are split only where nothing is drawn at random: a step's dropout masks depend on its shapes. More
recomputation draws the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from qadapt.cache import FULL
from qadapt.data.batches import Division
from qadapt.data.tokens import Tokens
from qadapt.durable import write_whole
from qadapt.engine.host import device_of
from qadapt.engine.out_of_memory import RanOut, attempt, free_memory
from qadapt.errors import BadOutput, BadRun, DoesNotFit, NoRoom
from qadapt.events import Eased, Event
from qadapt.plan.knobs import LIVE
from qadapt.train.checkpoint import random_state, restore_random_state
from qadapt.train.optimizer import AdapterOptimizer
from qadapt.train.pauses import Pauses
from qadapt.train.spill import renew_cap
from qadapt.train.step import StepResult, drop_gradients
from qadapt.train.turns import Chunking, Evaluating, PuttingAway, Recomputing, Splitting, Tiling, Turn

FILE_NAME = "rungs.json"
NOISE = ("dropout", "pdrop", "layerdrop", "jitter")
"""What names fields of configurations whose noise no module shows."""


@dataclass
class Trial:
    """A step that can be tried again: `find` from the start, `apply` from where it stopped.

    Attributes:
        find: Finds the gradient; None if the run is asked to leave.
        apply: Applies it.
        around: Makes a context for each try.
        found: What `find` gave, once it did.
    """

    find: Callable[[], StepResult | None]
    apply: Callable[[StepResult], None]
    around: Callable[[], AbstractContextManager[object]]
    found: StepResult | None = None

    def __call__(self) -> StepResult | None:
        """Tries."""
        with self.around():
            if self.found is None:
                self.found = self.find()
            if self.found is not None:
                self.apply(self.found)
        return self.found


class Beginning:
    """Random state and loss scale as they are where a step begins.

    Args:
        device: Of the model.
        scaler: Its scale must have been used once.
    """

    def __init__(self, device: torch.device, scaler: torch.amp.GradScaler | None) -> None:
        self.random = random_state(device)
        self._device = device
        self._scaler = scaler
        self._scale = None if scaler is None else scaler.state_dict()

    def restore(self) -> None:
        """Goes back to it."""
        restore_random_state(self.random, self._device)
        if self._scaler is not None and self._scale is not None:
            self._scaler.load_state_dict(self._scale)
            self._scaler.update(self._scale["scale"])  # forgets that gradients were unscaled


class Ladder:
    """The rungs of one run.

    Args:
        model: The adapted model, on its device.
        optimizer: Over its trained parameters.
        division: How the plan divides rows.
        run_folder: Where rungs are kept.
        pauses: Wait while there is no room for them on the disk; none of a run that nobody can ask anything.
    """

    def __init__(
        self,
        model: PeftModel,
        optimizer: AdapterOptimizer,
        *,
        division: Division,
        run_folder: Path,
        pauses: Pauses | None = None,
    ) -> None:
        draws = _draws_at_random(model)
        self._splitting = Splitting(division, draws=draws)
        self._evaluating = Evaluating(model, division)
        self._turns: dict[str, Turn] = {
            "micro_batch": self._splitting,
            "loss_chunk": Chunking(model, self._splitting, self._evaluating.splitting),
            "mlp_tiles": Tiling(model, self._splitting),
            "recompute": Recomputing(model, draws=draws),
            "offload": PuttingAway(model, self._splitting),
        }
        self._optimizer = optimizer
        self._device = device_of(model)
        self._path = run_folder / FILE_NAME
        self._pauses = pauses or Pauses(run_folder)
        self._taken = read_rungs(self._path)
        self._waiting = list(self._taken)
        self._update_stopped: tuple[int, int] | None = None

    @property
    def training(self) -> Division:
        """How the rows of a step are divided now."""
        return self._splitting.division

    @property
    def evaluation(self) -> Division:
        """How held-out rows are divided now."""
        return self._evaluating.splitting.division

    @property
    def knobs(self) -> Sequence[str]:
        """What can be turned."""
        return tuple(self._turns)

    @property
    def is_drawing(self) -> bool:
        """Whether a step draws at random, so that its rows cannot be split."""
        return self._splitting.draws

    @property
    def is_taken(self) -> bool:
        """Whether any rung was taken in this run: its plan was too large for this machine."""
        return bool(self._taken)

    def go_to(self, step: int) -> None:
        """Takes the rungs that a run had taken when `step` was done."""
        for rung in self._due(lambda rung: rung.step <= step):
            self._turn(rung)

    def begin_with(self, other: Ladder) -> None:
        """Takes over from step 1 on what a rehearsal had to take."""
        for rung in other._taken:
            self._keep(rung)

    def climb_step(
        self, trial: Trial, *, step: int, rows: Sequence[Tokens], beginning: Beginning
    ) -> Generator[Event, None, StepResult | None]:
        """Tries a step until it is done, or the run is asked to leave; then all is as where it began.

        Raises:
            DoesNotFit: Memory ran out on the last rung; names the longest row.
            NoRoom: What is put into a file finds the disk full, and the run is asked to leave.
        """
        yield from self._take_again(lambda rung: rung.step <= step)  # a rehearsal's, too
        has_more = False
        while isinstance(done := (yield from self._tried(trial, step=step, beginning=beginning)), RanOut):
            if trial.found is None:
                drop_gradients(self._optimizer)
            free_memory(self._device)
            if trial.found is None:
                beginning.restore()
            if not has_more and (has_more := renew_cap(self._device)):
                continue  # once a step: the card has more than when the cap was taken
            rung = self._ease(step, rows) if trial.found is None else self._ease_update(step)
            yield from self._take(rung)
        if done is None:
            beginning.restore()
        return done

    def _tried(
        self, trial: Trial, *, step: int, beginning: Beginning
    ) -> Generator[Event, None, StepResult | RanOut | None]:
        """What a try gives; one that found the disk full is begun anew once there is room."""
        tries: list[StepResult | RanOut | None] = []

        def once() -> tuple[Event, ...]:
            try:
                tries.append(attempt(trial))
            except NoRoom:
                drop_gradients(self._optimizer)
                beginning.restore()
                raise
            return ()

        yield from self._pauses.when_room(step - 1, once)
        return tries[0]

    def climb_evaluation(
        self, evaluate: Callable[[], float], *, step: int, rows: Sequence[Tokens]
    ) -> Generator[Event, None, float]:
        """Tries an evaluation until it is done.

        Each time memory runs out its rows are divided further, and when each is alone, fewer of its learned
        tokens are at the head at a time: neither touches how a step is computed.

        Raises:
            DoesNotFit: A single row does not fit.
        """
        yield from self._take_again(lambda rung: rung.step <= step)
        beginning = Beginning(self._device, None)
        while isinstance(done := attempt(evaluate), RanOut):
            free_memory(self._device)
            beginning.restore()
            yield from self._take(self._ease_evaluation(step, rows))
        return done

    def _ease(self, step: int, rows: Sequence[Tokens]) -> Eased:
        for knob in LIVE:
            turn = self._turns[knob]
            value = turn.next(rows)
            if value is not None:
                price = turn.price(value)
                return Eased(step=step, phase="training", knob=knob, value=value, price=price)
        longest = max(rows, key=len)
        raise DoesNotFit(
            f"Memory ran out in step {step} on the last rung; the longest of its rows, {longest.place}, has "
            f"{len(longest):,} tokens.",
            cure=f"Start anew with data.length below {len(longest):,}, a smaller adapter.rank, "
            "train.optimizer=adamw-8bit or model.quantization=nf4 (`qadapt estimate` prices each)"
            + (", or adapter.dropout=0, with which rows can be split." if self._splitting.draws else "."),
        )

    def _ease_evaluation(self, step: int, rows: Sequence[Tokens]) -> Eased:
        turned = self._evaluating.next(rows)
        if turned is not None:
            knob, value, price = turned
            return Eased(step=step, phase="evaluation", knob=knob, value=value, price=price)
        longest = max(rows, key=len)
        raise DoesNotFit(
            f"Memory ran out in the evaluation after step {step}, with one held-out row at a time; the "
            f"longest, {longest.place}, has {len(longest):,} tokens.",
            cure="Leave the longest held-out rows out, then `qadapt resume --allow-change`.",
        )

    def _ease_update(self, step: int) -> Eased:
        stopped = (step, self._optimizer.progress)
        value, price = "one tensor at a time", "a little time for each; the numbers are the same"
        if not self._optimizer.ease():
            if stopped == self._update_stopped:
                raise DoesNotFit(
                    f"Memory ran out in the update of step {step}, where nothing can be spared any more.",
                    cure="Close what else uses the card, then `qadapt resume`; or start anew with a smaller "
                    "adapter.rank or train.optimizer=adamw-8bit.",
                )
            value, price = "the rest of it", "nothing; unused memory was given back"
        self._update_stopped = stopped
        return Eased(step=step, phase="update", knob="update", value=value, price=price)

    def _take(self, rung: Eased) -> Iterator[Event]:
        """Takes a rung, after waiting for room on the disk if there is none."""
        return self._pauses.when_room(rung.step, lambda: [self._keep(rung)])

    def _keep(self, rung: Eased) -> Eased:
        write_rungs(self._path, [*self._taken, rung])
        self._taken.append(rung)
        self._turn(rung)
        return rung

    def _take_again(self, is_due: Callable[[Eased], bool]) -> Iterator[Eased]:
        """What this run took here before it was resumed; said again, as what it said then counts no more."""
        for rung in self._due(is_due):
            self._turn(rung)
            yield Eased(**_values(rung))

    def _due(self, is_due: Callable[[Eased], bool]) -> list[Eased]:
        due = [rung for rung in self._waiting if is_due(rung)]
        self._waiting = [rung for rung in self._waiting if not is_due(rung)]
        return due

    def _turn(self, rung: Eased) -> None:
        if rung.phase == "evaluation":
            self._evaluating.take(rung.knob, rung.value)
        elif rung.phase == "update":
            self._optimizer.ease()
        else:
            self._turns[rung.knob].take(rung.value)


def _values(rung: Eased) -> dict[str, Any]:
    """All of a rung but when it was taken."""
    return {name: value for name, value in vars(rung).items() if name != "time"}


def read_rungs(path: Path) -> list[Eased]:
    """The rungs that a run took, by step.

    Raises:
        BadRun: The file is damaged.
    """
    if not path.exists():
        return []
    try:
        rungs = [Eased(**values) for values in json.loads(path.read_text(encoding="utf-8"))["rungs"]]
        if unknown := {rung.knob for rung in rungs} - {*LIVE, "update"}:
            raise ValueError(f"this release has no {', '.join(sorted(unknown))}")
        return sorted(rungs, key=lambda rung: rung.step)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRun(
            f"The rungs {path} cannot be read: {error}",
            cure="Delete the file; the run goes on, and where memory runs out it finds them again.",
        ) from None


def write_rungs(path: Path, rungs: Sequence[Eased]) -> None:
    """Writes the rungs that a run took, whole or not at all.

    Raises:
        NoRoom: The disk is full.
        BadOutput: The folder cannot be written.
    """
    values = {"version": 1, "rungs": [_values(rung) for rung in rungs]}
    try:
        write_whole(path, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        kind = NoRoom if error.errno in FULL else BadOutput
        raise kind(
            f"The rungs {path} cannot be written: {error}",
            cure="Make room or make the folder writable, then `qadapt resume`.",
        ) from None


def _draws_at_random(model: PeftModel) -> bool:
    """Whether a step in training may draw masks or noise; functional ones are known by their field."""
    if any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules()):
        return True
    return _names_noise(model.get_base_model().config.to_dict())


def _names_noise(values: Mapping[str, Any]) -> bool:
    """Whether a field of a model's configuration, at any depth, asks for dropout or noise."""
    return any(
        _names_noise(value)
        if isinstance(value, dict)
        else isinstance(value, int | float) and value > 0 and any(word in name for word in NOISE)
        for name, value in values.items()
    )
