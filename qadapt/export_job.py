"""What an export is made from: finished runs, read and checked, and what its card may tell."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qadapt.adapters.facts import AdapterFacts
from qadapt.data.prompt import PromptContract
from qadapt.export.card import CardFacts, card_facts
from qadapt.model.source import ModelFiles
from qadapt.recipe import Recipe
from qadapt.recipe_file import dump_yaml
from qadapt.run_folder import RunFolder
from qadapt.train.stored_plan import StoredPlan
from qadapt.view.journal import effective, read_events


@dataclass(frozen=True)
class Job:
    """What is exported, in which form, to where.

    Attributes:
        runs: The runs with the weights of their updates; what is said of data, prompts and base is of the
            first.
        recipe: The first run's.
        facts: What the first run's adapter was trained on.
        files: The base.
        contract: How the prompts of the first run were made.
        plan: How the first run was placed, and what it was made of.
        form: The form, such as `merged-fp16`.
        target: The folder to be.
    """

    runs: tuple[tuple[RunFolder, float], ...]
    recipe: Recipe
    facts: AdapterFacts
    files: ModelFiles
    contract: PromptContract
    plan: StoredPlan
    form: str
    target: Path

    @property
    def run(self) -> RunFolder:
        """The first run."""
        return self.runs[0][0]

    @property
    def adapters(self) -> list[tuple[Path, float]]:
        """The folders of the adapters, each with the weight of its update."""
        return [(run.adapter, weight) for run, weight in self.runs]

    @property
    def is_mix(self) -> bool:
        """Whether what is merged was never trained: several runs, or one that is weighted."""
        return len(self.runs) > 1 or self.runs[0][1] != 1

    @property
    def mixed(self) -> str:
        """What a mix is made of, in a sentence."""
        parts = [f"{weight:g} times that of the run {run.name}" for run, weight in self.runs]
        first = f" Recipe, rows and losses are those of {self.run.name}." if len(parts) > 1 else ""
        return f"The update that is merged is {' plus '.join(parts)}.{first}"

    @property
    def gguf_name(self) -> str:
        """Name of the one file of a GGUF form."""
        return f"{self.run.name}-{self.form.removeprefix('gguf-').upper()}.gguf"

    @cached_property
    def card(self) -> CardFacts:
        """What a card tells about the run; it names no folder of this machine."""
        card = card_facts(
            self.facts,
            effective(read_events(self.run.path)),
            recipe=dump_yaml(_shareable(self.recipe, is_hub_model=self.facts.revision is not None)),
            data=tuple(_shown(source.path) for source in self.recipe.data.sources),
            data_hash=self.plan.ingredients.rows,
        )
        return card.with_licence_of(self.files.folder)


def _shareable(recipe: Recipe, *, is_hub_model: bool) -> Recipe:
    data, model = recipe.data, recipe.model
    sources = tuple(source.model_copy(update={"path": _shown(source.path)}) for source in data.sources)
    held_out = None if data.held_out is None else _shown(data.held_out)
    shown = {"sources": sources, "held_out": held_out, "template": Path(data.template).name}
    source = model.source if is_hub_model else Path(model.source).name
    return recipe.model_copy(
        update={
            "data": data.model_copy(update=shown),
            "model": model.model_copy(update={"source": source}),
            "run": recipe.run.model_copy(update={"folder": "runs"}),
        }
    )


def _shown(path: str) -> str:
    """A source of rows without the folders it lies in."""
    return path if path.startswith(("hub:", "split:")) else Path(path).name
