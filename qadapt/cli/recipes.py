"""`qadapt recipes`: the shipped recipes, one of them as text, and the schema for editors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qadapt.cli.screen import console


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe, ready to be saved and changed.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print names and files as JSON.")] = False,
) -> None:
    """Lists the recipes that ship with qadapt, prints one, or prints the schema.

    Examples: `qadapt recipes`, `qadapt recipes llama-3.1-8b-qlora-8gb > mine.yaml`, `qadapt recipes
    --schema`.
    """
    import json as json_text

    from qadapt.recipe_file import find_recipe, shipped_recipes

    if schema:
        from qadapt.recipe import Recipe

        typer.echo(json_text.dumps(Recipe.model_json_schema(), indent=2))
    elif name is not None:
        typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)
    elif json:
        files = {each: str(path) for each, path in shipped_recipes().items()}
        typer.echo(json_text.dumps({"schema": 1, "recipes": files}, indent=2))
    else:
        _print(shipped_recipes())


def _print(files: dict[str, Path]) -> None:
    from rich.table import Table

    table = Table("recipe", "what it trains", box=None, pad_edge=False)
    for each, path in files.items():
        first_line = path.read_text(encoding="utf-8").splitlines()[0]
        table.add_row(each, first_line.removeprefix("#").strip())
    console().print(table)
