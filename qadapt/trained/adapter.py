"""A trained adapter by whatever name it has, and what is known of how it was trained.

A finished run knows its recipe, its rows and its losses; a version of the store was told them when it was
added; of any other folder (of a hub, or made by `qadapt adapters combine`) only its files speak. What is not
known is left out by whoever would use it, and that is said; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qadapt.adapters.facts import AdapterFacts, below_of, is_side_car, nonlinearity_of, read_facts
from qadapt.adapters.peft_config import peft_values
from qadapt.adapters.side_car_files import read_settings
from qadapt.adapters.store import SHOWN, Store
from qadapt.adapters.versions import Record
from qadapt.cache import ignore
from qadapt.errors import BadAdapter, BadRecipe, BadRun
from qadapt.events import Evaluated, RunFinished, StepDone
from qadapt.methods import METHODS
from qadapt.methods import said as method_in_words
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe, read_recipe
from qadapt.run_folder import RunFolder
from qadapt.running.resumption import Earlier, check_finished
from qadapt.serve.partner import Partner, find_partner
from qadapt.stage import Report
from qadapt.train.stored_plan import read_plan
from qadapt.trained.loading import Tuned, load_run, load_tuned
from qadapt.view.journal import effective, read_events

STEPS, TRAINING_LOSS, HELD_OUT_LOSS = "steps", "training loss", "held-out loss"
"""What is measured of a run, by name; losses are those of the step whose adapter it is."""


@dataclass(frozen=True)
class Trained:
    """An adapter, and what is known of it.

    Attributes:
        name: The run's, the store's or the folder's.
        adapter: Its folder.
        facts: What it was trained on.
        method: Such as `lora`.
        recipe: None where it is not known.
        rows: Hash of the rows it was trained on; empty where that is not known.
        metrics: Losses in nats per learned token and counts, by name.
        run: The run that made it, if it is one.
        version: Its id, if it is of the store; else empty.
    """

    name: str
    adapter: Path
    facts: AdapterFacts
    method: str
    recipe: Recipe | None = None
    rows: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    run: RunFolder | None = None
    version: str = ""

    @property
    def said(self) -> str:
        """What it is, in words."""
        return f"the {'adapter' if self.run is None else 'run'} {self.name}"

    @property
    def said_method(self) -> str:
        """How it was trained, in words, with its size where that is known."""
        if self.recipe is not None:
            words = method_in_words(self.recipe.adapter.method, self.recipe.adapter.rank)
        else:
            words = next((facts.title for name, facts in METHODS.items() if name == self.method), self.method)
        on = below_of(self.adapter).get("name")
        more = nonlinearity_of(self.adapter), f"on {on}" if on else ""
        return ", ".join(each for each in (words, *more) if each)

    @property
    def in_front(self) -> int:
        """Virtual tokens in front of every row."""
        return int(read_settings(self.adapter).get("tokens", 0)) if is_side_car(self.adapter) else 0

    def load(self, device: torch.device, report: Report = ignore) -> Tuned:
        """Its base with it, as it was trained; of a run placed as it was in the end.

        Raises:
            BadRun: Its base or tokenizer is not what it was.
            DoesNotFit: Memory ran out.
        """
        if self.run is None:
            return load_tuned(self.adapter, device=device, report=report)
        return load_run(self.run, device=device, report=report)


def find_trained(what: str, *, folder: str = "runs", store: str = "adapters") -> Trained:
    """The adapter that a name stands for.

    Args:
        what: A run by name or path, an adapter's folder, or a name, tag or version of the store.
        folder: Where the runs are.
        store: Where the store is.

    Raises:
        BadAdapter: A version of the store is damaged, or the name stands for more than one adapter.
        BadRun: There is nothing of that name, it is a model, or the run has not finished.
    """
    kept = Store(Path(store))
    partner = find_partner(what, folder, store=store)
    name = what if partner.version and what in kept.names() else ""
    return trained_of(partner, name=name, store=store)


def trained_of(partner: Partner, *, name: str = "", store: str = "adapters") -> Trained:
    """The adapter that was found.

    Args:
        partner: What was found.
        name: The name in the store that it was found by.
        store: Where the store is.

    Raises:
        BadRun: It is a model, or the run has not finished, or is damaged.
    """
    if partner.kind == "run":
        return of_run(RunFolder(partner.path))
    if partner.version:
        return _of_version(partner, Store(Path(store)).version(partner.version).record, name=name)
    if partner.kind == "adapter":
        facts, method = read_facts(partner.path), method_of(partner.path)
        return Trained(partner.path.resolve().name, partner.path, facts, method)
    raise BadRun(
        f"{partner.path} is a model, and no adapter.",
        cure="Give the run it was made of, an adapter's folder, or a name of the store.",
    )


def of_run(run: RunFolder) -> Trained:
    """The adapter of a finished run.

    Raises:
        BadRun: It has not finished, or is damaged.
    """
    events = effective(read_events(run.path))
    facts = read_facts(run.adapter)
    check_finished(run, Earlier(events))
    recipe = read_recipe(str(run.recipe))
    finished = next(event for event in reversed(events) if isinstance(event, RunFinished))
    trained = {event.step: event.loss for event in events if isinstance(event, StepDone)}
    held_out = {event.step: event.loss for event in events if isinstance(event, Evaluated)}
    metrics: dict[str, float] = {STEPS: finished.step}
    for name, losses in ((TRAINING_LOSS, trained), (HELD_OUT_LOSS, held_out)):
        if finished.best_step in losses:
            metrics[name] = losses[finished.best_step]
    rows = read_plan(run.plan).ingredients.rows
    return Trained(run.name, run.adapter, facts, recipe.adapter.method, recipe, rows, metrics, run)


def method_of(folder: Path) -> str:
    """The method of an adapter, by its own files.

    Raises:
        BadAdapter: They say none.
    """
    if is_side_car(folder):
        return str(read_settings(folder).get("kind"))
    values = peft_values(folder)
    refined = {"use_dora": "dora", "use_rslora": "rslora"}
    known = next((name for setting, name in refined.items() if values.get(setting)), values.get("peft_type"))
    if not isinstance(known, str):
        raise BadAdapter(
            f"{folder} holds no adapter: nothing there says of which method it is.",
            cure="Give the folder of an adapter, or a finished run.",
        )
    return known.lower()


def _of_version(partner: Partner, record: Record, *, name: str) -> Trained:
    return Trained(
        name=name or partner.version[:SHOWN],
        adapter=partner.path,
        facts=record.facts,
        method=record.method,
        recipe=_recipe_of(record.recipe),
        rows=record.data,
        metrics=record.metrics,
        version=partner.version,
    )


def _recipe_of(values: Mapping[str, Any]) -> Recipe | None:
    """A recipe that was kept; None if there is none, or one that this release does not read."""
    try:
        return check_recipe(dict(values), origin="the version") if values else None
    except BadRecipe:
        return None
