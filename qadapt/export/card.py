"""The card of an exported model: what it was made from, how, and what was measured. Only what is known."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from qadapt.adapters.facts import AdapterFacts
from qadapt.events import Evaluated, Event, StepDone

_BASE_WORDS = {
    "dequantized": "the weights of the base as the adapter saw them in training, dequantized",
    "original": "the published weights of the base",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card can tell beyond the merge itself; what is empty is left out.

    `losses` are mean losses per supervised token, by what they were measured on.
    """

    model: str = ""
    revision: str | None = None
    licence: str | None = None
    recipe: str = ""
    data: tuple[str, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)

    def with_licence_of(self, model_folder: Path) -> CardFacts:
        """The same with the licence that the base's own card names, unless one is given."""
        return replace(self, licence=self.licence or licence_of(model_folder))


def card_facts(
    facts: AdapterFacts, events: Iterable[Event], *, recipe: str, data: tuple[str, ...] = ()
) -> CardFacts:
    """What a card tells about a finished run.

    Args:
        facts: What the adapter was trained on.
        events: The run's events that count (`view.journal.effective`).
        recipe: The recipe as text.
        data: Names of the training data.
    """
    trained: dict[int, float] = {}
    held_out: dict[int, float] = {}
    for event in events:
        if isinstance(event, StepDone):
            trained[event.step] = event.loss
        elif isinstance(event, Evaluated):
            held_out[event.step] = event.loss
    losses = {}
    if trained:
        losses[f"training rows of step {max(trained)}"] = trained[max(trained)]
    if held_out:
        best = min(held_out, key=held_out.__getitem__)
        losses[f"held-out rows after step {best}, the best"] = held_out[best]
    return CardFacts(facts.base, facts.revision, recipe=recipe, data=data, losses=losses)


def licence_of(model_folder: Path) -> str | None:
    """The licence in the front matter of a model folder's card; none if there is no such line."""
    path = model_folder / "README.md"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    line = re.search(r"^license:[ \t]*(\S+)[ \t]*$", front[1], re.MULTILINE) if front else None
    return line[1] if line else None


def card_text(facts: CardFacts, *, form: str, base: str) -> str:
    """The card as Markdown with the front matter that model hubs read.

    Args:
        facts: What is known.
        form: Form of the merged weights, such as `merged-fp16`.
        base: Weights they were merged on, `dequantized` or `original`.
    """
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if facts.model:
        front.append(f"base_model: {facts.model}")
    if facts.licence:
        front.append(f"license: {facts.licence}")
    front += ["tags:", "- qlora", "- qadapt", "---", ""]
    return "\n".join([*front, *_body(facts, form=form, base=base)]) + "\n"


def _body(facts: CardFacts, *, form: str, base: str) -> list[str]:
    name = f"`{facts.model}`" if facts.model else "a base model"
    at = f" at revision `{facts.revision}`" if facts.revision else ""
    lines = [
        f"# A fine-tuned {facts.model or 'model'}",
        "",
        f"Made from {name}{at} by low-rank adaptation; the adapter is merged into the weights.",
        "",
        f"* Form: {form}; every weight computed in fp32 and rounded once.",
        f"* Merged on {_BASE_WORDS[base]}.",
    ]
    lines += [f"* Trained on `{source}`." for source in facts.data]
    lines += [f"* Loss per supervised token, {what}: {loss:.4f}." for what, loss in facts.losses.items()]
    if facts.licence:
        lines.append(f"* Licence of the base: {facts.licence}.")
    lines += ["", "## Use", "", "```python", *_USE.splitlines(), "```"]
    if facts.recipe:
        lines += ["", "## Recipe", "", "```yaml", *facts.recipe.strip().splitlines(), "```"]
    return lines


_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this card lies
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)"""
