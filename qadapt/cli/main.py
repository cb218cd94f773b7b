"""`qadapt`: the commands, and the one place where errors become two lines and an exit code.

Exit codes: 0 done; 1 a bug in qadapt (with its traceback); 2 something to cure (said in one message, nothing
half-written); 130 interrupted (a run is left whole: `qadapt resume`).
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qadapt.cli.adapters import adapters
from qadapt.cli.chat import chat
from qadapt.cli.data import data
from qadapt.cli.doctor import doctor
from qadapt.cli.estimate import estimate, plan
from qadapt.cli.evaluate import evaluate
from qadapt.cli.export import export
from qadapt.cli.pause import pause, save
from qadapt.cli.recipes import recipes
from qadapt.cli.screen import error_console
from qadapt.cli.train import resume, train
from qadapt.cli.verify import verify
from qadapt.cli.watch import watch
from qadapt.errors import QadaptError
from qadapt.quiet import quiet_libraries

CURABLE = 2

app = typer.Typer(
    name="qadapt",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    estimate, plan, train, resume, pause, save, watch, evaluate, export, verify, chat, recipes, doctor,
):  # fmt: skip
    app.command()(command)
app.add_typer(data)
app.add_typer(adapters)


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Fine-tune 7B-class language models on the GPU you already own.

    Know the VRAM before the run (estimate, plan), see the rows as the model will (data check), watch it
    during the run (train, watch), get a merged model after it (export), talk to it (chat), keep its versions
    (adapters). A recipe is a YAML file or the name of a shipped one; any field can be set after it as
    section.key=value.

    First: `qadapt doctor`, then `qadapt estimate meta-llama/Llama-3.1-8B --card "RTX 4060 8GB" --length
    2048`.
    """


def main() -> None:
    """Runs a command and leaves with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs a command and returns its exit code; the only place that catches every qadapt error."""
    if arguments == ["--version"]:
        from importlib.metadata import version

        typer.echo(f"qadapt {version('qadapt')}")
        return 0
    quiet_libraries()
    try:
        app(args=arguments)
    except SystemExit as leaving:  # how Typer ends: 0, its own usage errors (2), or typer.Exit
        return leaving.code if isinstance(leaving.code, int) else 0
    except QadaptError as error:
        screen = error_console()
        screen.print(f"error: {error.problem}", style="bold red", markup=False, soft_wrap=True)
        screen.print(error.cure, markup=False, soft_wrap=True)
        return CURABLE
    return 0
