"""Every shipped recipe: read, its header checked, trained for two steps on a tiny model of its kind."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from demo_task import make_rows
from recipe_headers import needs, stated_bytes

from qadapt.events import Evaluated, RunFinished, StepDone
from qadapt.methods import METHODS
from qadapt.plan.ranks import LEAST_STEPS
from qadapt.recipe import Recipe
from qadapt.recipe_file import apply_override, read_recipe, shipped_recipes
from qadapt.shape import find_shape
from qadapt.stacking import built_on

if TYPE_CHECKING:
    from conftest import TinyModel

NAMES = [
    "gemma-2-9b-qlora-16gb",
    "llama-3.1-8b-qlora-12gb",
    "llama-3.1-8b-qlora-16gb",
    "llama-3.1-8b-qlora-24gb",
    "llama-3.1-8b-qlora-8gb",
    "mistral-7b-qlora-12gb",
    "phi-3-mini-qlora-8gb",
    "quickstart-smollm2-135m",
    "qwen2.5-7b-qlora-12gb",
    "qwen3-8b-qlora-16gb",
    "adapters/adalora",
    "adapters/compacter",
    "adapters/compacterplus",
    "adapters/dora",
    "adapters/fusion",
    "adapters/houlsby",
    "adapters/ia3",
    "adapters/loftq",
    "adapters/loraplus",
    "adapters/oft",
    "adapters/parallel",
    "adapters/pfeiffer",
    "adapters/pissa",
    "adapters/prefix-flat",
    "adapters/prefix",
    "adapters/prompt",
    "adapters/ptuning",
    "adapters/rslora",
    "adapters/stacked",
    "adapters/vera",
]
DEMO = [name for name in NAMES if name.startswith(("quickstart", "adapters/"))]
"""Those on the quick-start model, for the demo's rows."""


def header(name: str) -> dict[str, str]:
    """The `# title: text` lines at the head of a recipe."""
    lines = shipped_recipes()[name].read_text(encoding="utf-8").splitlines()
    titled = [line[2:].partition(":") for line in lines if line.startswith("# ") and ":" in line]
    return {title: text.strip() for title, _, text in titled}


def test_recipes_are_ascii_so_that_any_shell_can_redirect_them() -> None:
    assert all(path.read_bytes().isascii() for path in shipped_recipes().values())


def test_exactly_these_recipes_are_shipped() -> None:
    assert list(shipped_recipes()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_what_the_recipe_is_for_and_is_true(name: str) -> None:
    recipe, said = read_recipe(name), header(name)
    shape = find_shape(recipe.model.source)
    facts = METHODS[recipe.adapter.method]
    if facts.has_rank:
        size = rf"(rank|width|length|block) {recipe.adapter.rank}[ ,]|\({recipe.adapter.rank} virtual tokens"
        assert re.search(size, said["What it trains"])
    assert name in DEMO[:1] or facts.title in said["What it trains"].replace("QLoRA", "LoRA")
    if name not in DEMO:
        assert recipe.model.source.rpartition("/")[2].lower() in said["What it trains"].lower()
        assert f"{recipe.data.length:,} tokens" in said["What it trains"]
    assert recipe.data.length <= shape.context
    assert said["Command"].startswith(f"qadapt train {name}")
    override = said["An override"].removeprefix(f"qadapt train {name} ")
    assert read_recipe(name, [override]) != recipe, f"{override} changes nothing"


@pytest.mark.parametrize("name", NAMES)
def test_a_header_states_the_estimate_within_its_error(name: str) -> None:
    found = needs(name)
    stated = stated_bytes(shipped_recipes()[name])
    cure = "python tools/recipe_headers.py rewrites the headers"
    assert abs(stated - found.estimate.needed_bytes) <= found.estimate.error_bytes, cure


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("gb")])
def test_a_recipe_fits_the_card_in_its_name(name: str) -> None:
    found = needs(name)
    assert found.card is not None
    assert found.estimate.fits(found.card.free_bytes("linux"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_states_only_what_differs_from_the_defaults(name: str) -> None:
    from qadapt.recipe_file import load_yaml

    values = load_yaml(shipped_recipes()[name].read_text(encoding="utf-8"))
    least = {"model": values["model"], "data": {"sources": values["data"]["sources"]}, "run": values["run"]}
    defaults = Recipe.model_validate(least)
    for section, fields in values.items():
        for key, value in fields.items() if isinstance(fields, dict) else ():
            if (section, key) not in {("data", "sources"), ("run", "name")}:
                assert getattr(getattr(defaults, section), key) != value, f"{section}.{key} is the default"


def rows_for(family: str, folder: Path, *, count: int, held_out: bool) -> Path:
    """Rows of the demo's task; without system turns, which Mistral and Gemma refuse."""
    rows = make_rows(count, 5, held_out=held_out)
    if family in ("mistral", "gemma2"):
        rows = [{"messages": row["messages"][1:]} for row in rows]
    path = folder / ("held_out.jsonl" if held_out else "rows.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def steps_of(name: str) -> int:
    return LEAST_STEPS if METHODS[read_recipe(name).adapter.method].starts_wider else 2


def on_tiny_model(name: str, folder: Path, tiny_model: TinyModel) -> Recipe:
    """The recipe as shipped, but for the size of the model, the rows and the number of steps."""
    family = find_shape(read_recipe(name).model.source).family
    kind = "smollm2" if name in DEMO else family
    tiny = tiny_model(kind, width=128)  # the narrowest layer takes rank 64
    values = {
        "model.source": tiny.as_posix(),
        "data.sources": f"[{{path: {rows_for(family, folder, count=8, held_out=False).as_posix()}}}]",
        "data.held_out": rows_for(family, folder, count=2, held_out=True).as_posix(),
        "data.held_out_fraction": 0.0,
        "data.length": 256,
        "train.steps": steps_of(name),
        "train.rows_per_step": 4,
        "train.warmup_steps": 0,
        "train.evaluate_every": 2,
        "memory.device": "cpu",
        "memory.budget": "2GiB",
        "run.folder": (folder / "runs").as_posix(),
    }
    return read_recipe(name, [f"{key}={value}" for key, value in values.items()])


def first_stages(recipe: Recipe) -> list[str]:
    """The shipped recipes whose adapters it builds on."""
    wanted = built_on(recipe.adapter.method, recipe.adapter.targets)
    found = [name for name in DEMO if read_recipe(name).run.name in wanted]
    assert len(found) == len(wanted)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_two_steps_on_a_tiny_model(name: str, tmp_path: Path, tiny_model: TinyModel) -> None:
    from qadapt.run import train

    recipe = on_tiny_model(name, tmp_path, tiny_model)
    for stage in first_stages(recipe):
        list(train(on_tiny_model(stage, tmp_path, tiny_model)))
    events = list(train(recipe))
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [event.step for event in steps] == list(range(1, steps_of(name) + 1))
    assert all(math.isfinite(event.loss) and event.gradient_norm > 0 for event in steps)
    assert steps[1].loss != steps[0].loss
    assert any(isinstance(event, Evaluated) and math.isfinite(event.loss) for event in events)
    assert isinstance(events[-1], RunFinished)
    adapter = Path(recipe.run.folder) / recipe.run.name / "adapter"
    (weights,) = adapter.glob("*.safetensors")
    assert weights.stat().st_size > 1000
    method, rank = recipe.adapter.method, recipe.adapter.rank
    if METHODS[method].has_rank:
        beside = METHODS[method].is_beside
        config = json.loads(
            (adapter / ("side_car.json" if beside else "adapter_config.json")).read_text(encoding="utf-8")
        )
        kept = "r" if not beside else METHODS[method].size
        kept = {"oft": "oft_block_size", "adalora": "target_r"}.get(method, kept)
        assert config[kept] == rank * (2 if method == "pissa" else 1)


def test_an_override_of_a_shipped_recipe_starts_from_its_short_model_form() -> None:
    values = {"model": "smollm2-135m"}
    apply_override(values, "model.quantization=none")
    assert values == {"model": {"source": "smollm2-135m", "quantization": "none"}}
