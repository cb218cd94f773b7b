"""What an export is made from: trained adapters, read and checked, and what its card may tell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from qadapt.adapters.facts import AdapterFacts, parts_of
from qadapt.data.prompt import PromptContract
from qadapt.export.card import CardFacts, card_facts
from qadapt.fusing import shown_target
from qadapt.model.source import ModelFiles
from qadapt.recipe import Recipe
from qadapt.recipe_file import dump_yaml
from qadapt.trained.adapter import HELD_OUT_LOSS, TRAINING_LOSS, Trained
from qadapt.view.journal import effective, read_events


@dataclass(frozen=True)
class Job:
    """What is exported, in which form, to where.

    Attributes:
        parts: The adapters with the weights of their updates; what is said of data, prompts and base is of
            the first.
        files: The base.
        contract: How the prompts of the first were made.
        form: The form, such as `merged-fp16`.
        target: The folder to be.
        is_shared: Whether it goes to others, so that no file may name a folder of this machine.
    """

    parts: tuple[tuple[Trained, float], ...]
    files: ModelFiles
    contract: PromptContract
    form: str
    target: Path
    is_shared: bool = False

    @property
    def trained(self) -> Trained:
        """The first adapter."""
        return self.parts[0][0]

    @property
    def facts(self) -> AdapterFacts:
        """What it was trained on."""
        return self.trained.facts

    @property
    def recipe(self) -> Recipe | None:
        """Its recipe, where that is known."""
        return self.trained.recipe

    @property
    def adapters(self) -> list[tuple[Path, float]]:
        """The folders of the adapters, each with the weight of its update."""
        return [(trained.adapter, weight) for trained, weight in self.parts]

    @property
    def is_mix(self) -> bool:
        """Whether what is merged was never trained: several adapters, or one that is weighted."""
        return len(self.parts) > 1 or self.parts[0][1] != 1

    @property
    def mixed(self) -> str:
        """What a mix is made of, in a sentence."""
        parts = [f"{weight:g} times that of {trained.said}" for trained, weight in self.parts]
        first = f" Recipe, rows and losses are those of {self.trained.name}." if len(parts) > 1 else ""
        return f"The update that is merged is {' plus '.join(parts)}.{first}"

    @property
    def gguf_name(self) -> str:
        """Name of the one file of a GGUF form."""
        return f"{self.trained.name}-{self.form.removeprefix('gguf-').upper()}.gguf"

    @cached_property
    def card(self) -> CardFacts:
        """What a card tells about the adapter; it names no folder of this machine."""
        trained, recipe = self.trained, self.recipe
        is_hub_model = self.facts.revision is not None
        card = card_facts(
            self.facts,
            () if trained.run is None else effective(read_events(trained.run.path)),
            recipe="" if recipe is None else dump_yaml(_shareable(recipe, is_hub_model=is_hub_model)),
            data=() if recipe is None else tuple(_shown(source.path) for source in recipe.data.sources),
            data_hash=trained.rows,
        )
        if trained.run is None:
            kept = {"training rows": TRAINING_LOSS, "held-out rows": HELD_OUT_LOSS}
            losses = {what: trained.metrics[name] for what, name in kept.items() if name in trained.metrics}
            card = replace(card, losses=losses)
        parts = () if self.is_mix else parts_of(trained.adapter)
        return replace(card, parts=parts).with_licence_of(self.files.folder)


def _shareable(recipe: Recipe, *, is_hub_model: bool) -> Recipe:
    data, model = recipe.data, recipe.model
    sources = tuple(source.model_copy(update={"path": _shown(source.path)}) for source in data.sources)
    held_out = None if data.held_out is None else _shown(data.held_out)
    shown = {"sources": sources, "held_out": held_out, "template": Path(data.template).name}
    source = model.source if is_hub_model else Path(model.source).name
    targets = recipe.adapter.targets  # they may name adapters by their folders
    if not isinstance(targets, str):
        targets = tuple(map(shown_target, targets))
    return recipe.model_copy(
        update={
            "adapter": recipe.adapter.model_copy(update={"targets": targets}),
            "data": data.model_copy(update=shown),
            "model": model.model_copy(update={"source": source}),
            "run": recipe.run.model_copy(update={"folder": "runs"}),
        }
    )


def _shown(path: str) -> str:
    """A source of rows without the folders it lies in."""
    return path if path.startswith(("hub:", "split:")) else Path(path).name
