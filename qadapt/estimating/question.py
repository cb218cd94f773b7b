"""What is asked of an estimate or a plan: a model, a step of it, where, and what may be turned. No torch.

`planning.py` makes a `Question` of a model's name or a recipe; the answers are `plan/`'s, or `exact.py`'s.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from qadapt.architecture import size
from qadapt.errors import BadRecipe, NoClosedForm
from qadapt.hardware.calibration import Calibration, Kind, kind_of, recall
from qadapt.hardware.target import Target
from qadapt.plan.answer import Answer
from qadapt.plan.estimate import Estimate, disk_parts, estimate_step
from qadapt.plan.fit import Plan, fit
from qadapt.plan.inverse import Freedom, ModelAnswer, Most, What, fitting_models, most
from qadapt.plan.knobs import KNOBS
from qadapt.plan.ladder import ladder
from qadapt.plan.room import Room
from qadapt.plan.setting import Setting, check_numbers, check_setting
from qadapt.quiet import quiet_libraries
from qadapt.shape import ModelConfig, ModelShape, known_shapes

if TYPE_CHECKING:
    from qadapt.estimating.exact import ExactAnswer


@dataclass(frozen=True)
class Question:
    """What is asked: a model, a step of it, where, and how many rows one optimizer step has.

    `rows_per_step` is 0 where nobody said: one forward pass is a step then. `shape` is None for a decoder
    without a closed form: only the exact dry run, which needs `config`, can answer. `config` is None where a
    run asks with a shape that it has at hand.
    """

    shape: ModelShape | None
    setting: Setting
    target: Target
    rows_per_step: int
    free: frozenset[str]
    config: ModelConfig | None = None
    notes: tuple[str, ...] = ()

    def changed(self, step: dict[str, object]) -> Question:
        """The question with fields of its setting changed; without a recipe, one forward pass is a step."""
        setting = dataclasses.replace(self.setting, **step)  # type: ignore[arg-type]
        if setting.supervised_share == 0:
            raise BadRecipe(
                "supervised share = 0: a step learns from at least one token.",
                cure="Give a share such as 0.4.",
            )
        if self.shape is not None:
            check_setting(self.shape, setting)
        else:
            check_numbers(Outline.of(self.config), setting)
        rows_per_step = max(self.rows_per_step, setting.rows) if self.rows_per_step else 0
        setting = dataclasses.replace(setting, accumulates=rows_per_step > setting.rows)
        free = self.free - {knob.name for knob in KNOBS if knob.field in step}
        return dataclasses.replace(self, setting=setting, rows_per_step=rows_per_step, free=free)

    @property
    def name(self) -> str:
        """The model's."""
        if self.shape is not None:
            return self.shape.name
        assert self.config is not None
        return self.config.name

    @property
    def closed(self) -> ModelShape:
        """The shape whose closed form answers.

        Raises:
            NoClosedForm: Only the exact dry run can.
        """
        if self.shape is not None:
            return self.shape
        assert self.config is not None
        raise NoClosedForm(
            f"{self.config.name} has the architecture {self.config.family!r}, which has no closed form here.",
            cure="`qadapt estimate` asks the exact dry run about one step, without --max or --all-cards.",
        )

    def estimate(self) -> Estimate:
        """What one micro-batch takes, by the closed form.

        Raises:
            NoClosedForm: The model has none.
        """
        return estimate_step(self.closed, self.setting, card=self.target.card)

    def dry_run(self) -> ExactAnswer:
        """What one micro-batch takes, counted on the step itself without its memory. Imports torch.

        Raises:
            QadaptError: The model cannot be built, or an adapter does not suit it.
        """
        from qadapt.estimating.exact import exact_answer

        quiet_libraries()
        assert self.config is not None, "a run's own question has no configuration at hand"
        found = exact_answer(
            self.config,
            self.setting,
            shape=self.shape,
            target=self.target,
            rows_per_step=max(self.rows_per_step, self.setting.rows),
            calibration=self.calibration(),
        )
        return dataclasses.replace(found, answer=self._with_changes(found.answer))

    def answer(self, estimate: Estimate | None = None) -> Answer:
        """The estimate with its verdict; with the cheapest changes, where it does not surely fit.

        Args:
            estimate: A step of this model, if it has been estimated; default: the one that is asked.

        Raises:
            NoClosedForm: The model has no closed form.
        """
        shape = self.closed
        found = estimate or self.estimate()
        answer = Answer(
            name=shape.name,
            parameters=shape.parameters,
            disk=disk_parts(shape, found.setting),
            estimate=found,
            target=self.target,
            rows_per_step=max(self.rows_per_step, found.setting.rows),
            calibration=self.calibration(),
        )
        return self._with_changes(answer)

    def _with_changes(self, answer: Answer) -> Answer:
        """With the question's notes; with the cheapest changes, if it does not surely fit and has a shape."""
        answer = dataclasses.replace(answer, notes=(*answer.notes, *self.notes))
        if answer.verdict == "fits" or self.shape is None:
            return answer
        changes = ladder(
            self.shape,
            answer.estimate.setting,
            room=answer.room,
            rows_per_step=answer.rows_per_step,
            card=self.target.card,
        )
        return dataclasses.replace(answer, changes=changes)

    def calibration(self) -> Calibration | None:
        """What earlier runs on this machine measured; None for another one."""
        if not self.target.is_here:
            return None
        return recall(kind_of_run(self.name, self.target, self.setting))

    def room(self) -> Room:
        """What there is for the step."""
        known = self.calibration()
        return Room(self.target.free_bytes, known.above if known else 0.0, self.target.host_bytes)

    def most(self, what: What) -> Most:
        """The largest length, number of rows or rank that fits, the free knobs turned as a plan may.

        Raises:
            NoClosedForm: The model has no closed form.
        """
        return most(
            self.closed,
            self.setting,
            what=what,
            room=self.room(),
            freedom=Freedom(self.free, self.rows_per_step),
            card=self.target.card,
        )

    def models(self) -> tuple[ModelAnswer, ...]:
        """Every known model with a closed form at this setting, the largest first."""
        return fitting_models(
            known_shapes(), self.setting, room=self.room(), free=self.free, card=self.target.card
        )

    def plan(self) -> Plan:
        """The fastest setting of the free knobs that fits.

        Raises:
            DoesNotFit: None does.
            NoClosedForm: The model has no closed form.
        """
        return fit(
            self.closed,
            self.setting,
            room=self.room(),
            rows_per_step=self.rows_per_step,
            free=self.free,
            card=self.target.card,
        )


class Outline(NamedTuple):
    """What a configuration says of the numbers of a setting; what it does not say allows everything."""

    name: str
    layers: int
    context: int

    @staticmethod
    def of(config: ModelConfig | None) -> Outline:
        """That of a configuration; None where there is none."""
        if config is None:
            return Outline("any model", sys.maxsize, sys.maxsize)
        layers = size(config.values, "num_hidden_layers")
        context = size(config.values, "max_position_embeddings")
        return Outline(config.name, layers or sys.maxsize, context or sys.maxsize)


def kind_of_run(model: str, target: Target, setting: Setting) -> Kind:
    """Which runs a step is compared with."""
    device = target.name if target.device == "cuda" else "cpu"
    return kind_of(model=model, device=device, method=setting.method, quantization=setting.quantization)
