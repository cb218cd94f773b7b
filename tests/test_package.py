"""What the wheel carries: the package, recipes, schemas and data; and nothing of the repository besides."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

from qadapt.recipe import Recipe
from qadapt.recipe_file import shipped_recipes

ROOT = Path(__file__).parent.parent


def test_the_wheel_carries_recipes_schemas_and_data(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"qadapt/recipes/{name}.yaml" for name in shipped_recipes()} <= names
    for needed in (
        "qadapt/run.py",
        "qadapt/known_models.json",
        "qadapt/hardware/cards.json",
        "qadapt/schemas/data.schema.json",
        "qadapt/schemas/estimate.schema.json",
        "qadapt/schemas/recipe.schema.json",
        "qadapt/py.typed",
    ):
        assert needed in names
    strays = [name for name in names if not name.startswith(("qadapt/", "qadapt-"))]
    assert not strays


def test_the_schema_for_editors_is_the_recipes_own() -> None:
    stored = json.loads((ROOT / "qadapt/schemas/recipe.schema.json").read_text(encoding="utf-8"))
    assert stored == Recipe.model_json_schema(), (
        "run `qadapt recipes --schema > qadapt/schemas/recipe.schema.json`"
    )
