"""`qadapt evaluate`: how good an adapter is on rows of your own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qadapt.cli.screen import console

if TYPE_CHECKING:
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
    """What `--json` prints: losses in nats per learned token, every answer, what became of rows."""
    return {
        "schema": 1,
        "rows": result.rows,
        "supervised_tokens": result.supervised_tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "base_loss": result.base_loss,
        "exact_share": result.exact_share,
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


def _print(result: Evaluation, *, answers: int) -> None:
    from rich.table import Table
    from rich.text import Text

    screen = console()
    for problem, cure in result.notes:
        screen.print(Text(f"warning: {problem}\n         {cure}"))
    screen.print(f"{result.rows} rows, {result.supervised_tokens:,} learned tokens")
    table = Table("", "loss", "perplexity", box=None, pad_edge=False)
    table.add_row("with the adapter", f"{result.loss:.4f}", f"{result.perplexity:.2f}")
    table.add_row("base alone", f"{result.base_loss:.4f}", "")
    screen.print(table)
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
