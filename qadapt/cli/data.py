"""`qadapt data check` and `qadapt data preview`: what the model will see of the rows, before any training."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated

import typer

from qadapt.cli.output_file import check_place, write_whole
from qadapt.cli.screen import console, error_console, watched

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Fields of the recipe to change."),
]
IdsOption = Annotated[bool, typer.Option("--ids", help="Show the number of every token behind it.")]
WholeOption = Annotated[bool, typer.Option("--whole", help="Show every token, however long a row is.")]
EXAMPLES = 2
PAGE_ROWS = 20
PREVIEWED = 5
_READING = "reading the rows"

data = typer.Typer(
    name="data",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look at the rows as the model will see them: `qadapt data check my.yaml`.",
)


@data.command()
def check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    ids: IdsOption = False,
    whole: WholeOption = False,
    html: Annotated[Path | None, typer.Option(help="Write the report as one page into this .html.")] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", "-n", min=0, help="Rows to show; default: 2, on a page 20."),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON (qadapt/schemas/data.schema.json).")
    ] = False,
) -> None:
    """Prepares the rows as a run would and says what they come to; loads no weights.

    Numbers, lengths, what is cut, left out or repeated, how full the steps are, how long the run will take;
    and rows in colour: learned, context, special tokens. The prepared rows are kept for the run.

    Exit code 0 if the rows can be trained on, whatever else there is to know; 2 if they cannot.

    Examples: `qadapt data check my.yaml`, `qadapt data check my.yaml data.length=1024 --html rows.html`.
    """
    from qadapt.recipe_file import read_recipe
    from qadapt.view.data_page import data_page

    checked = read_recipe(recipe, overrides or [])
    if html is not None:
        check_place(html, "--html", what="the page is HTML", suffixes=(".html", ".htm"), example="rows.html")
    with error_console().status("starting"):
        from qadapt.running.data_check import MOST_PAGE_TOKENS, MOST_TOKENS, check_data
    most_tokens = None if whole else MOST_TOKENS if html is None else MOST_PAGE_TOKENS
    shown = rows if rows is not None else EXAMPLES if html is None else PAGE_ROWS
    report = watched(check_data(checked, examples=shown, most_tokens=most_tokens), first=_READING)
    if html is not None:
        write_whole(html, data_page(report))
    if json:
        from qadapt.view.data_record import data_record

        typer.echo(json_text.dumps(data_record(report), indent=2))
        return
    from qadapt.view.data_report import DataReportView

    screen_rows = report if html is None else report.without_examples()
    console().print(DataReportView(screen_rows, shows_ids=ids))
    if html is not None:
        console().print(f"The rows are in {html}.", markup=False, soft_wrap=True)


@data.command()
def preview(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    rows: Annotated[
        int | None,
        typer.Option("--rows", "-n", min=1, help="So many rows; default: 5, or one with --row."),
    ] = None,
    row: Annotated[int | None, typer.Option(min=1, help="Begin with this row, from 1.")] = None,
    ids: IdsOption = False,
    whole: WholeOption = False,
) -> None:
    """Shows the first rows as the model will see them; reads no more of the data than that.

    A row that would be left out says why.

    Examples: `qadapt data preview my.yaml -n 3`, `qadapt data preview my.yaml --row 17 --ids`.
    """
    from qadapt.recipe_file import read_recipe

    checked = read_recipe(recipe, overrides or [])
    with error_console().status("starting"):
        from qadapt.running.data_check import MOST_TOKENS, preview_rows
    most_tokens = None if whole else MOST_TOKENS
    count = rows if rows is not None else PREVIEWED if row is None else 1
    shown = watched(
        preview_rows(checked, first=row or 1, count=count, most_tokens=most_tokens), first=_READING
    )
    from qadapt.view.data_rows import RowsView

    console().print(RowsView(shown, shows_ids=ids))
