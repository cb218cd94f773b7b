"""What each shipped recipe needs, by the closed form; writes it into the recipe's header.

    python tools/recipe_headers.py    rewrites the `# What it needs:` line of every recipe

Run it after a change of the estimate. `tests/test_recipes.py` checks that the lines are still true.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from qadapt.hardware.cards import Card
from qadapt.methods import Fused, activation_of, dropped_layers, has_norm
from qadapt.plan.estimate import Estimate, estimate_step
from qadapt.plan.recipe_setting import setting_of
from qadapt.recipe import Recipe
from qadapt.recipe_file import read_recipe, shipped_recipes
from qadapt.shape import find_shape
from qadapt.stacking import built_on
from qadapt.units import GIB, format_bytes

LINE = re.compile(r"^# What it needs: .*$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Needs:
    """A recipe's smallest step (one row at a time, every layer recomputed, every token supervised)."""

    estimate: Estimate
    card: Card | None

    @property
    def line(self) -> str:
        """The line of the header."""
        amount = format_bytes(self.estimate.needed_bytes)
        error = format_bytes(self.estimate.error_bytes)
        said = f"{amount} or more (give or take {error}, closed form)"
        if self.card is None:
            return f"# What it needs:  {said}; no GPU, minutes on two CPU cores."
        free = format_bytes(self.card.free_bytes("linux"))
        there = f"{free} are free with {self.card.name}"
        return f"# What it needs:  {said}; {there}."


def needs(name: str) -> Needs:
    """What the shipped recipe of this name needs; its card is the amount of memory its name ends with."""
    recipe = read_recipe(name)
    size = re.search(r"-(\d+)gb$", name)
    card = None
    if size is not None:
        card = Card(name=f"{size[1]} GB and a desktop", memory_bytes=int(size[1]) * GIB)
    setting = setting_of(
        recipe,
        find_shape(recipe.model.source),
        device="cuda" if card else "cpu",
        compute_dtype="bf16" if card else "fp32",
        adapter_dtype="bf16" if card else "fp32",
    )
    setting = replace(setting, fused=fused_of(recipe))
    return Needs(estimate_step(find_shape(recipe.model.source), setting, card=card), card)


def fused_of(recipe: Recipe) -> tuple[Fused, ...]:
    """The adapters that a recipe builds on, as the shipped recipes that its targets name train them."""
    by_run = {(each := read_recipe(name)).run.name: each.adapter for name in shipped_recipes()}
    stages = [(name, by_run[name]) for name in built_on(recipe.adapter.method, recipe.adapter.targets)]
    return tuple(
        Fused(
            name,
            section.method,
            section.rank,
            activation_of(section.method, section.nonlinearity),
            norm=has_norm(section.nonlinearity),
            first_layer=dropped_layers(section.method, section.targets),
        )
        for name, section in stages
    )


def stated_bytes(path: Path) -> int:
    """The amount that the header of a recipe states."""
    line = LINE.search(path.read_text(encoding="utf-8"))
    assert line is not None, f"{path.name} has no line of what it needs"
    amount = re.search(r"needs:\s+([\d.]+) (GiB|MiB)", line[0])
    assert amount is not None, f"{path.name} states no amount"
    return round(float(amount[1]) * (GIB if amount[2] == "GiB" else GIB / 1024))


def main() -> None:
    for name, path in shipped_recipes().items():
        text = path.read_text(encoding="utf-8")
        path.write_text(LINE.sub(needs(name).line, text), encoding="utf-8", newline="\n")
        print(f"{name:<28} {needs(name).line.partition(':')[2].strip()}")


if __name__ == "__main__":
    main()
