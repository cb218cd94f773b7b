"""`qadapt evaluate`: how good an adapter is on rows of your own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qadapt.cli.screen import console

if TYPE_CHECKING:
    from rich.table import Table

    from qadapt.train.attended import Attended
    from qadapt.train.evaluation import Evaluation

SAMPLES = 3


def evaluate(
    run: Annotated[
        str,
        typer.Argument(help="A run, an adapter's folder, or a name, tag or version of the store."),
    ],
    data: Annotated[
        Path | None, typer.Option(help="A file of rows; default: the rows that were held out.")
    ] = None,
    answers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also let the model answer so many rows and compare, word for word; what asks nothing (a "
            "document, a conversation that begins with its answer) is passed over.",
        ),
    ] = 0,
    longest: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    folder: Annotated[str, typer.Option(help="Where the runs are.")] = "runs",
    store: Annotated[str, typer.Option(help="Where the store of adapters is.")] = "adapters",
    json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON, and nothing else.")
    ] = False,
) -> None:
    """Measures the loss with the adapter and without it on rows, and compares greedy answers with theirs.

    Of an adapter on another one (`on:`) it shows, too, the loss with that one alone; of a fusion which of its
    adapters each layer attends to in the first rows.

    Examples: `qadapt evaluate my-run`, `qadapt evaluate summaries --data mine.jsonl --answers 20`.
    """
    import json as json_text

    from qadapt.run import evaluate as evaluate_run

    result = evaluate_run(run, data=data, answers=answers, max_new_tokens=longest, folder=folder, store=store)
    if json:
        typer.echo(json_text.dumps(evaluation_values(result), indent=2))
    else:
        _print(result, answers=answers)


def evaluation_values(result: Evaluation) -> dict[str, object]:
    """What `--json` prints: losses in nats per learned token, every answer, what became of rows.

    Of an adapter on another one, too, the name of that one and the loss with it alone; of a fusion the mean
    weight of each adapter at each place; they sum to 1.
    """
    return {
        "schema": 1,
        "rows": result.rows,
        "supervised_tokens": result.supervised_tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "base_loss": result.base_loss,
        "below": None if result.below is None else {"name": result.below.name, "loss": result.below.loss},
        "exact_share": result.exact_share,
        "attended": [
            {"layer": each.layer, "place": each.place, "weights": dict(each.weights)}
            for each in result.attended
        ],
        "answers": [
            {
                "question": each.question,
                "expected": each.expected,
                "given": each.given,
                "exact": each.is_exact,
            }
            for each in result.answers
        ],
        "warnings": [{"problem": problem, "cure": cure} for problem, cure in result.notes],
    }


def _attended_table(found: Sequence[Attended]) -> Table:
    """A line for each place: the share that each adapter has of its attention."""
    from rich.table import Table
    from rich.text import Text

    from qadapt.view.visible import one_line

    names = [*found[0].weights]
    table = Table("attends in layer", box=None, pad_edge=False)
    for name in names:
        table.add_column(Text(one_line(name)), justify="right")
    has_several = len({each.place for each in found}) > 1
    for each in found:
        where = f" ({each.place.replace('_', '-')})" if has_several else ""
        table.add_row(f"{each.layer}{where}", *(f"{each.weights[name]:.1%}" for name in names))
    return table


def _print(result: Evaluation, *, answers: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from qadapt.view.visible import one_line

    screen = console()
    for problem, cure in result.notes:
        screen.print(Text(f"warning: {problem}\n         {cure}"))
    screen.print(f"{result.rows} rows, {result.supervised_tokens:,} learned tokens")
    table = Table("", "loss", "perplexity", box=None, pad_edge=False)
    table.add_row("with the adapter", f"{result.loss:.4f}", f"{result.perplexity:.2f}")
    if result.below is not None:
        table.add_row(Text(f"{one_line(result.below.name)} alone"), f"{result.below.loss:.4f}", "")
    table.add_row("base alone", f"{result.base_loss:.4f}", "")
    screen.print(table)
    if result.attended:
        screen.print(_attended_table(result.attended))
    if result.exact_share is not None:
        exact = sum(answer.is_exact for answer in result.answers)
        screen.print(f"{exact} of {len(result.answers)} answers are exact ({result.exact_share:.0%})")
    if len(result.answers) < answers:
        screen.print(f"{len(result.answers)} of {answers} answers: rows that ask nothing are passed over")
    for answer in result.answers[:SAMPLES]:
        for title, text in (
            ("asked", answer.question),
            ("expected", answer.expected),
            ("given", answer.given),
        ):
            screen.print(Text(f"{title:>9}  {text.strip()}"))
        screen.print()
