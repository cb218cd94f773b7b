"""What a run that goes on is held against: recipe, base, template and rows as they were when it began.

A difference is named and refused; or it is allowed, and then recorded (`Warned`) and part of the stored plan
from then on. The plan is made anew only when that is asked for, or when an allowed change asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from qadapt.data.prepared import changed_files
from qadapt.errors import BadRecipe, BadRun
from qadapt.events import CheckpointSaved, Event, Planned, Rehearsed, RunFinished, StepDone, Warned
from qadapt.model.precision import choose_adapter_dtype, choose_compute_dtype, choose_device
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe, dump_yaml, read_recipe
from qadapt.run_folder import RunFolder
from qadapt.running.material import Material, prepare, step_count
from qadapt.running.plan import make_plan
from qadapt.stage import passing
from qadapt.train.checkpoint import find_checkpoints
from qadapt.train.environment import environment
from qadapt.train.stored_plan import StoredPlan, read_plan

Result = TypeVar("Result")

FREE = ("run.", "export.")
"""Fields that change no number of the training."""
PLANNED = ("memory.", "data.packing")
"""Fields that only the plan reads."""
SHAPING = (
    "adapter.method", "adapter.rank", "adapter.targets", "adapter.dtype", "adapter.nonlinearity",
    "data.new_tokens", "train.optimizer",
)  # fmt: skip
"""Fields that decide which tensors a saved state has: another value cannot take it over."""
MATERIAL = ("model.", "data.")
"""Fields of which base and rows are made."""


@dataclass(frozen=True)
class Consent:
    """What a resumed run may do differently: be planned anew for this machine, be made of something else."""

    replan: bool = False
    change: bool = False


@dataclass(frozen=True)
class Earlier:
    """What the journal says of a run's earlier processes: its events that count.

    `is_planned_anew` is whether the process that goes on made a plan of its own.
    """

    events: Sequence[Event]
    is_planned_anew: bool = False

    def saved_by_another(self, plan: StoredPlan) -> bool:
        """Whether the newest checkpoint is of another plan: of that before, or before a process that died."""
        saved = [place for place, event in enumerate(self.events) if isinstance(event, CheckpointSaved)]
        before = self.events[: saved[-1]] if saved else ()
        planned = [event for event in before if isinstance(event, Planned)]
        return self.is_planned_anew or (bool(planned) and planned[-1] != plan.event())

    def owes_rehearsal(self, plan: StoredPlan, step: int) -> bool:
        """Whether the plan should be rehearsed after `step`, if the recipe says so."""
        is_rehearsed = any(isinstance(event, Rehearsed) for event in self.events)
        return self.saved_by_another(plan) or (step == 0 and not is_rehearsed)

    @property
    def has_finished(self) -> bool:
        """Whether the run came to its end."""
        return any(isinstance(event, RunFinished) for event in self.events)

    @cached_property
    def _said(self) -> frozenset[tuple[str, str, None]]:
        warnings = [event for event in self.events if isinstance(event, Warned)]
        return frozenset((event.message, event.cure, None) for event in warnings if event.step is None)

    def has_saved(self, saved: CheckpointSaved) -> bool:
        """Whether the journal knows of a checkpoint as it is; not if a kill came between the two."""
        known = [event for event in self.events if isinstance(event, CheckpointSaved)]
        return any((event.step, event.is_best) == (saved.step, saved.is_best) for event in known)

    def unsaid(self, events: Generator[Event, None, Result]) -> Generator[Event, None, Result]:
        """Passes events on, but for warnings of no step that the journal has; the result is theirs."""
        return passing(events, lambda event: not isinstance(event, Warned) or _words(event) not in self._said)


def _words(warned: Warned) -> tuple[str, str, int | None]:
    """What makes two warnings the same; those of a step come again only with the step."""
    return warned.message, warned.cure, warned.step


@dataclass(frozen=True)
class TakenUp:
    """A run's recipe, plan and material, checked; `is_to_plan` if the plan is to be made anew."""

    recipe: Recipe
    plan: StoredPlan
    material: Material
    is_to_plan: bool


def has_begun(run: RunFolder, earlier: Earlier) -> bool:
    """Whether there is a step or a stored plan; not if the first process died while it prepared the run."""
    if find_checkpoints(run.path) or any(isinstance(event, StepDone) for event in earlier.events):
        return True
    try:
        read_plan(run.plan)
    except BadRun:
        return False
    return True


def recipe_never_begun(run: RunFolder) -> Recipe:
    """The recipe of a run that never began.

    Raises:
        BadRun: Its process died before it was written.
        BadRecipe: Something in it is wrong.
    """
    if not run.recipe.is_file():
        raise BadRun(
            f"The run {run.name} never began, and {run.recipe} is gone.",
            cure=f"Delete {run.path}, and start again with `qadapt train`.",
        )
    return read_recipe(str(run.recipe))


def check_finished(run: RunFolder, earlier: Earlier) -> None:
    """Refuses to read the adapter of a run that a resumed process may write at the same moment.

    Raises:
        BadRun: The run has not come to its end.
    """
    if not earlier.has_finished:
        raise BadRun(
            f"The run {run.name} has not finished.", cure=f"`qadapt resume {run.name}` brings it to its end."
        )


def take_up(run: RunFolder, earlier: Earlier, consent: Consent) -> Generator[Event, None, TakenUp]:
    """Reads what a run executes, and checks that it is what it was or may be something else.

    Raises:
        BadRun: The plan is lost, or something changed that is not allowed to; names all of it.
        QadaptError: The base or the rows cannot be used.
    """
    plan = read_plan(run.plan)
    recipe = yield from recipe_of_plan(run, plan)
    fields = changed_fields(plan, recipe)
    _check_fields(run, fields, consent)
    has_other_material = any(name.startswith(MATERIAL) and name not in PLANNED for name in fields)
    is_other_base = any(name.startswith("model.") for name in fields)
    material = yield from earlier.unsaid(
        prepare(
            recipe,
            revision=recipe.model.revision if is_other_base else plan.revision,
            earlier=() if has_other_material else _parts(run),
        )
    )
    made_of = _changed_material(run, plan, material)
    if made_of and not consent.change:
        raise BadRun(
            f"Since the run {run.name} began, what it is made of changed: {'; '.join(made_of)}.",
            cure="Put it back as it was, or go on with it as it is: "
            f"`qadapt resume {run.name} --allow-change`.",
        )
    yield from _recorded([*fields.values(), *made_of], consent)
    yield from _other_versions(run, plan)
    if not fields and not made_of:
        return TakenUp(recipe, plan, material, consent.replan)
    plan = replace(
        plan,
        ingredients=material.ingredients,
        revision=material.files.revision,
        recipe=recipe.model_dump(mode="json"),
        steps=step_count(recipe, material.rows),
    )
    is_small = all(name.startswith("train.") and name != "train.rows_per_step" for name in fields)
    return TakenUp(recipe, plan, material, consent.replan or bool(made_of) or not is_small)


def plan_anew(taken: TakenUp) -> StoredPlan:
    """The plan for the machine as it is now, whose steps take over the saved state.

    The types of the adapter and of its optimizer's states stay; that of products stays on the same device.

    Raises:
        BadRun: The type of products on this device cannot train the saved adapter.
        BadRecipe: The recipe asks for something this device has not.
        DoesNotFit: No setting fits; the cure lists the cheapest changes.
    """
    recipe, plan = taken.recipe, taken.plan
    device = choose_device(recipe.memory.device)
    values = recipe.model_dump()
    values["adapter"]["dtype"] = plan.adapter_dtype
    values["train"]["optimizer"] = plan.optimizer
    if recipe.memory.compute_dtype == "auto" and device.type == plan.device:
        values["memory"]["compute_dtype"] = plan.compute_dtype
    compute_dtype = choose_compute_dtype(values["memory"]["compute_dtype"], device)
    try:
        choose_adapter_dtype(plan.adapter_dtype, compute_dtype)
    except BadRecipe:
        raise BadRun(
            f"The saved adapter is {plan.adapter_dtype}, and products are {compute_dtype} on this device, "
            "whose scaled gradients need a wider one.",
            cure="Set memory.compute_dtype=fp32 in the run's recipe (slower), then `qadapt resume --replan`; "
            "or go on with it on a device like the one it began on.",
        ) from None
    values["memory"]["compute_dtype"] = compute_dtype
    made = make_plan(Recipe.model_validate(values), taken.material)
    return replace(made, recipe=recipe.model_dump(mode="json"))


def recipe_of_plan(run: RunFolder, plan: StoredPlan) -> Generator[Event, None, Recipe]:
    """The recipe of a run's folder; if the file is gone, the one that the plan was made for.

    Raises:
        BadRun: The file is damaged, or gone without a copy.
    """
    if not run.recipe.is_file() and plan.recipe:
        recipe = check_recipe(plan.recipe, origin=str(run.plan))
        run.write(run.recipe, dump_yaml(recipe))
        yield Warned(
            message=f"{run.recipe} was gone; it was written again from the recipe that plan.json keeps.",
            cure="Nothing is lost: it is the recipe that the run was planned for.",
        )
        return recipe
    try:
        return read_recipe(str(run.recipe))
    except BadRecipe as error:
        cure = "delete the file, and the run's own copy is used" if plan.recipe else "put the file back"
        raise BadRun(error.problem, cure=f"Correct it; or {cure}.") from None


def changed_fields(plan: StoredPlan, recipe: Recipe) -> dict[str, str]:
    """The fields of a recipe that are others than the plan's, each with a sentence; none in free sections."""
    if not plan.recipe:
        return {}
    before = dict(_flat(check_recipe(plan.recipe, origin="plan.json").model_dump(mode="json")))
    now = dict(_flat(recipe.model_dump(mode="json")))
    names = [name for name in {**before, **now} if not name.startswith(FREE)]
    return {
        name: f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in names
        if before.get(name) != now.get(name)
    }


def _flat(values: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from _flat(value, f"{place}.{name}" if place else name)
    elif isinstance(values, list) and any(isinstance(value, dict) for value in values):
        for index, value in enumerate(values):
            yield from _flat(value, f"{place}.{index}")
    else:
        yield place, values


def _check_fields(run: RunFolder, fields: dict[str, str], consent: Consent) -> None:
    shaping = [text for name, text in fields.items() if name.startswith(SHAPING)]
    if shaping:
        raise BadRun(
            f"The recipe of the run {run.name} changed, and its saved state fits only the old one: "
            f"{'; '.join(shaping)}.",
            cure=f"Put it back in {run.recipe}, or start a new run with run.name=...",
        )
    planned = [text for name, text in fields.items() if name.startswith(PLANNED)]
    others = [text for name, text in fields.items() if not name.startswith(PLANNED)]
    refused = (planned if not consent.replan else []) + (others if not consent.change else [])
    if refused:
        options = ("--replan " if planned else "") + ("--allow-change" if others else "")
        raise BadRun(
            f"The recipe of the run {run.name} changed: {'; '.join(refused)}.",
            cure=f"Put it back in {run.recipe}, or go on with it as it is: "
            f"`qadapt resume {run.name} {options.strip()}`.",
        )


def _parts(run: RunFolder) -> list[dict[str, Any]]:
    """What `data.json` says of the rows; nothing if it cannot be read, which only costs the fallback."""
    try:
        parts: list[dict[str, Any]] = json.loads(run.data.read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError):
        return []
    return parts


def _changed_material(run: RunFolder, plan: StoredPlan, material: Material) -> list[str]:
    """A text for each of base, template, rows and adapters that is another one now."""
    before, now = asdict(plan.ingredients), asdict(material.ingredients)
    texts = []
    for name in plan.ingredients.changed(material.ingredients):
        detail = f"was {before[name][:12]} and is {now[name][:12]}"
        if name == "base":
            detail = f"{material.files.name}, whose files' hash {detail}"
        if name in ("template", "adapters"):
            detail = f"its hash {detail}"
        if name == "rows":
            stored = [source for part in _parts(run) for source in part["sources"]]
            files = changed_files(stored, [source for part in material.parts for source in part.sources])
            detail = ", ".join(files) or "the same files give other rows now"
        texts.append(f"{name} ({detail})")
    return texts


def _recorded(changes: Sequence[str], consent: Consent) -> Iterator[Event]:
    if changes:
        given = [
            name for name, is_given in (("--replan", consent.replan), ("--allow-change", consent.change))
        ]
        yield Warned(
            message=f"The run is no longer what it began as: {'; '.join(changes)}.",
            cure=f"Allowed by {' '.join(given)}; steps that are done stay as they are.",
        )


def _other_versions(run: RunFolder, plan: StoredPlan) -> Iterator[Event]:
    """Says which versions and which machine are others than the run's last process had."""
    try:
        before: dict[str, Any] = json.loads(run.environment.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    now = environment()
    seen = {**before, **before.get("packages", {})}, {**now, **now["packages"]}
    matter = [*now["packages"], "cuda", "card", *(("processor", "threads") if plan.device == "cpu" else ())]
    texts = [
        f"{name} was {seen[0][name]} and is {seen[1][name]}"
        for name in matter
        if name in seen[0] and seen[0][name] != seen[1][name]
    ]
    if texts:
        yield Warned(
            message=f"The run goes on in another environment: {'; '.join(texts)}.",
            cure="Later steps may differ in their last bits from those of a run that was not interrupted.",
        )
        run.write_json(run.environment, now)
