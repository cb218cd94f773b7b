"""Estimate and plan: a model or a recipe in, bytes and seconds out, before anything is loaded. No torch.

The functions `estimate` and `plan` are qadapt's Python surface; the commands of the same names and a run ask
through the same `Question`. A known model is estimated without reading any recipe (pydantic costs start-up
time).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from qadapt.architecture import size
from qadapt.errors import BadModel, BadRecipe, NoClosedForm
from qadapt.fusing import fused_on
from qadapt.hardware.calibration import Calibration, Kind, kind_of, recall
from qadapt.hardware.target import Target, find_target
from qadapt.plan.answer import Answer
from qadapt.plan.estimate import Estimate, disk_parts, estimate_step
from qadapt.plan.fit import Plan, fit
from qadapt.plan.inverse import Freedom, ModelAnswer, Most, What, fitting_models, most
from qadapt.plan.knobs import KNOBS, PLANNED
from qadapt.plan.ladder import ladder
from qadapt.plan.packing import unseen_rows_notes
from qadapt.plan.room import Room
from qadapt.plan.setting import (
    Setting,
    auto_dtypes,
    check_numbers,
    check_setting,
    not_offloaded,
    setting_of,
)
from qadapt.quiet import quiet_libraries
from qadapt.shape import ModelConfig, ModelShape, find_config, known_shapes, shape_from_config
from qadapt.units import parse_bytes

if TYPE_CHECKING:
    from qadapt.exact import ExactAnswer
    from qadapt.recipe import Recipe

ComputeType = Literal["bf16", "fp16", "fp32"]
AdapterType = Literal["bf16", "fp32"]


def estimate(
    model: str,
    overrides: Sequence[str] = (),
    *,
    card: str | None = None,
    vram: str | None = None,
    exact: bool = False,
    **step: object,
) -> Estimate:
    """What one micro-batch takes, by category.

    Args:
        model: A known model, a folder with a config.json, or a recipe (a file or a shipped name).
        overrides: `section.key=value` texts, as in a recipe.
        card: A card's name; default: this machine.
        vram: What is free on the card, such as `7.3GiB`.
        exact: Count it on the step itself, without its memory: takes seconds, and imports torch. A decoder
            without a closed form is always counted so.
        step: Fields of `Setting` to change: `length`, `rows`, `rank`, `recompute`, `supervised_share`.

    Raises:
        QadaptError: The model, the card, an override or a number is wrong.
    """
    question = ask(model, overrides, card=card, vram=vram).changed(step)
    return question.dry_run().estimate if exact or question.shape is None else question.estimate()


def plan(
    recipe: str, overrides: Sequence[str] = (), *, card: str | None = None, vram: str | None = None
) -> Plan:
    """The fastest way to run a recipe within a card's memory.

    Args:
        recipe: A recipe file, or the name of a shipped one.
        overrides: `section.key=value` texts.
        card: A card's name; default: this machine.
        vram: What is free on the card, such as `7.3GiB`.

    Raises:
        DoesNotFit: No setting fits; the cure lists the cheapest changes.
        QadaptError: The recipe, its model or the card is wrong.
    """
    return ask_recipe(recipe, overrides, card=card, vram=vram).plan()


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
            check_numbers(_Outline.of(self.config), setting)
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
        from qadapt.exact import exact_answer

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
        shape, found = self.closed, estimate or self.estimate()
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
        setting, rows, card = answer.estimate.setting, answer.rows_per_step, self.target.card
        changes = ladder(self.shape, setting, room=answer.room, rows_per_step=rows, card=card)
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
        freedom, card = Freedom(self.free, self.rows_per_step), self.target.card
        return most(self.closed, self.setting, what=what, room=self.room(), freedom=freedom, card=card)

    def models(self) -> tuple[ModelAnswer, ...]:
        """Every known model with a closed form at this setting, the largest first."""
        card = self.target.card
        return fitting_models(known_shapes(), self.setting, room=self.room(), free=self.free, card=card)

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


class _Outline(NamedTuple):
    """What a configuration says of the numbers of a setting; what it does not say allows everything."""

    name: str
    layers: int
    context: int

    @staticmethod
    def of(config: ModelConfig | None) -> _Outline:
        if config is None:
            return _Outline("any model", sys.maxsize, sys.maxsize)
        layers = size(config.values, "num_hidden_layers")
        context = size(config.values, "max_position_embeddings")
        return _Outline(config.name, layers or sys.maxsize, context or sys.maxsize)


def kind_of_run(model: str, target: Target, setting: Setting) -> Kind:
    """Which runs a step is compared with."""
    device = target.name if target.device == "cuda" else "cpu"
    return kind_of(model=model, device=device, method=setting.method, quantization=setting.quantization)


def ask(model: str, overrides: Sequence[str], *, card: str | None, vram: str | None) -> Question:
    """What `estimate` is asked: a recipe's step, or a known model with usual settings.

    Raises:
        QadaptError: The model, the card or an override is wrong.
    """
    if Path(model).suffix in (".yaml", ".yml"):
        return ask_recipe(model, overrides, card=card, vram=vram)
    try:
        config = find_config(model)
    except BadModel:
        if not _is_recipe(model):
            raise
        return ask_recipe(model, overrides, card=card, vram=vram)
    if overrides:
        return _ask_overridden(model, overrides, card=card, vram=vram)
    setting, target = _usual(find_target(card, vram), length=min(2048, _Outline.of(config).context))
    return Question(_shape_of(config), setting, target, 0, PLANNED, config)


def ask_models(*, card: str | None, vram: str | None) -> Question:
    """What `estimate --max model` asks without naming a model: usual settings."""
    setting, target = _usual(find_target(card, vram), length=2048)
    return Question(None, setting, target, 0, PLANNED)


def _usual(target: Target, *, length: int) -> tuple[Setting, Target]:
    compute_dtype, adapter_dtype = auto_dtypes(target.device, has_bf16=target.has_bf16)
    setting = Setting(
        length=length,
        compute_dtype=compute_dtype,
        adapter_dtype=adapter_dtype,
        optimizer="adamw-8bit" if target.device == "cuda" else "adamw",
        accumulates=False,
        device=target.device,
    )
    return setting, target


def _shape_of(config: ModelConfig) -> ModelShape | None:
    try:
        return shape_from_config(config.values, name=config.name)
    except NoClosedForm:
        return None


def ask_recipe(recipe: str, overrides: Sequence[str], *, card: str | None, vram: str | None) -> Question:
    """What a recipe asks, on a card, an amount of memory, or this machine.

    Raises:
        QadaptError: The recipe, its model or the card is wrong.
    """
    from qadapt.recipe_file import read_recipe

    read = read_recipe(recipe, overrides)
    question = ask_of(read, card=card, vram=vram)
    notes = unseen_rows_notes(read.data.packing, question.shape, rows_per_step=question.rows_per_step)
    return dataclasses.replace(question, notes=(*question.notes, *notes))


def _ask_overridden(model: str, overrides: Sequence[str], *, card: str | None, vram: str | None) -> Question:
    """A known model with a recipe's defaults, overridden; one row is a step unless an override says more."""
    from qadapt.recipe_file import apply_override, check_recipe

    length = min(2048, _Outline.of(find_config(model)).context)
    values: dict[str, object] = {
        "model": {"source": model},
        "data": {"sources": [{"path": "rows.jsonl"}], "length": length},
        "train": {"rows_per_step": 1},
        "run": {"name": "estimate"},
    }
    for override in overrides:
        apply_override(values, override)
    question = ask_of(check_recipe(values, origin="the overrides"), card=card, vram=vram)
    if any(override.partition("=")[0].strip() == "train.rows_per_step" for override in overrides):
        return question
    return dataclasses.replace(question, rows_per_step=0)


def ask_of(
    recipe: Recipe,
    *,
    card: str | None = None,
    vram: str | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    shape: ModelShape | None = None,
    types: tuple[ComputeType, AdapterType] | None = None,
) -> Question:
    """What a checked recipe asks.

    Args:
        recipe: The recipe.
        card: A card's name; default: this machine.
        vram: What is free on the card.
        device: Where it will run, if that has been chosen; default: the recipe's.
        shape: The model's shape, if it is at hand, with room for new tokens; default: a known model's.
        types: Of products and of adapters, if they have been chosen; default: by the card.

    Raises:
        QadaptError: The model or the card is wrong.
    """
    target = find_target(card, vram, device=device or recipe.memory.device)
    if recipe.memory.budget is not None and vram is None:
        free_bytes = parse_bytes(recipe.memory.budget)
        target = dataclasses.replace(target, free_bytes=free_bytes, assumption="memory.budget")
    compute_dtype, adapter_dtype = types or auto_dtypes(target.device, has_bf16=target.has_bf16)
    tokens = len(recipe.data.new_tokens)
    config = find_config(recipe.model.source).with_room(tokens) if shape is None else None
    chosen = shape if config is None else _shape_of(config)
    setting = setting_of(
        recipe, chosen, device=target.device, compute_dtype=compute_dtype, adapter_dtype=adapter_dtype
    )
    setting = dataclasses.replace(setting, fused=fused_on(recipe, chosen))
    memory = recipe.memory
    wanted = {"micro_batch": memory.micro_batch, "recompute": memory.recompute, "offload": memory.offload}
    free = frozenset(name for name in PLANNED if wanted.get(name, "auto") == "auto")
    if config is not None and chosen is None:
        check_numbers(_Outline.of(config), setting)
    left = not_offloaded(memory.offload, setting.offload)
    notes = () if left is None else (left,)
    return Question(chosen, setting, target, recipe.train.rows_per_step, free, config, notes)


def _is_recipe(name: str) -> bool:
    from qadapt.recipe_file import shipped_recipes

    return Path(name).is_file() or name in shipped_recipes()
