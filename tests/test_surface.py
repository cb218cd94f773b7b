"""What people build on does not change by accident: public names, commands, options, fields, start-up time.

A change here is a change of the interface: make it on purpose, and say it in the README.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer
import typer.core

import qadapt
from qadapt.cli.main import app
from qadapt.recipe_file import field_paths

NAMES = ["Store", "estimate", "export", "load", "load_together", "plan", "train"]

COMMANDS = {
    "estimate": (
        "model overrides --card --vram --length --rows --rank --recompute --supervised "
        "--max --all-cards --exact --plot --models --cards --json"
    ),
    "plan": "recipe overrides --card --vram --supervised --json",
    "data check": "recipe overrides --ids --whole --html --rows --json",
    "data preview": "recipe overrides --rows --row --ids --whole",
    "train": "recipe overrides --quiet --plain --rehearse-only",
    "resume": "run --folder --replan --allow-change --quiet --plain",
    "pause": "run --folder",
    "save": "run --folder",
    "watch": "run --folder --once --json",
    "evaluate": "run --data --answers --longest --folder --store --json",
    "export": "run --form --base --weight --with --to --no-proof --push --private --folder --store --json",
    "verify": "export --run --folder --store --json",
    "chat": "what --prompt --system --beside --temperature --top-p --seed --longest --folder --store --json",
    "recipes": "name --schema --json",
    "doctor": "--json --selftest",
    "adapters add": "what --as --parent --revision --held --base --folder --store --json",
    "adapters list": "--store --json",
    "adapters show": "what --store --json",
    "adapters use": "name what --store --json",
    "adapters rollback": "name --store --json",
    "adapters tag": "what tag --store --json",
    "adapters diff": "first second --store --json",
    "adapters remove": "what --store --json",
    "adapters combine": "parts --to --how --rank --density --seed --folder --store --json",
    "adapters push": "what --to --private --folder --store --json",
    "adapters bisect": "what --prompt --expect --longest --store --json",
    "adapters gc": "--dry-run --store --json",
}

FIELDS = [
    "version",
    "model.source",
    "model.revision",
    "model.quantization",
    "model.double_quant",
    "adapter.method",
    "adapter.rank",
    "adapter.alpha",
    "adapter.dropout",
    "adapter.nonlinearity",
    "adapter.targets",
    "adapter.dtype",
    "data.sources.path",
    "data.sources.limit",
    "data.sources.split",
    "data.sources.subset",
    "data.sources.weight",
    "data.format",
    "data.columns",
    "data.malformed",
    "data.held_out",
    "data.held_out_fraction",
    "data.length",
    "data.learn",
    "data.template",
    "data.date",
    "data.new_tokens",
    "data.packing",
    "data.order",
    "train.steps",
    "train.epochs",
    "train.rows_per_step",
    "train.learning_rate",
    "train.schedule",
    "train.warmup_steps",
    "train.final_share",
    "train.optimizer",
    "train.betas",
    "train.weight_decay",
    "train.clip_norm",
    "train.evaluate_every",
    "train.patience",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.sample_prompts",
    "train.rehearse",
    "train.seed",
    "memory.budget",
    "memory.device",
    "memory.compute_dtype",
    "memory.micro_batch",
    "memory.recompute",
    "memory.offload",
    "export.form",
    "export.base",
    "export.shard",
    "run.name",
    "run.folder",
    "run.pause_when",
]

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")


def command_words() -> dict[str, list[str]]:
    """Every command with the names of its arguments and options; a group's commands after its name."""

    def words(group: object, before: str) -> Iterator[tuple[str, list[str]]]:
        assert isinstance(group, typer.core.TyperGroup)
        for name, command in group.commands.items():
            if isinstance(command, typer.core.TyperGroup):
                yield from words(command, f"{before}{name} ")
            else:
                yield f"{before}{name}", [parameter.opts[0] for parameter in command.params]

    return dict(words(typer.main.get_command(app), ""))


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has imported after some code."""
    program = f"import sys\n{code}\nsys.stdout.write('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_the_public_names_are_these() -> None:
    assert sorted(qadapt.__all__) == NAMES
    assert all(callable(getattr(qadapt, name)) for name in NAMES)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="finetune"):
        qadapt.finetune  # type: ignore[attr-defined]  # noqa: B018


def test_the_commands_and_their_options_are_these() -> None:
    assert command_words() == {name: words.split() for name, words in COMMANDS.items()}


def test_the_fields_of_a_recipe_are_these() -> None:
    assert field_paths() == FIELDS
    assert len(FIELDS) <= 60


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    words = [sys.executable, "-m", "qadapt", *command.split(), "--help"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "qadapt" in said
    assert command == "" or f"qadapt {command}" in said.partition("Usage:")[2].partition("\n")[2], (
        "no example"
    )


def test_importing_qadapt_costs_nothing() -> None:
    assert not modules_after("import qadapt") & {*HEAVY, "pydantic", "rich", "typer", "numpy"}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["estimate", "meta-llama/Llama-3.1-8B", "--card", "RTX 4060 8GB"]],
)
def test_planning_and_help_import_no_heavy_library(arguments: list[str]) -> None:
    quietly = "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):"
    code = f"import contextlib\nimport io\nfrom qadapt.cli.main import run\n{quietly}\n    run({arguments!r})"
    assert not modules_after(code) & set(HEAVY)


@pytest.mark.parametrize(
    "arguments",
    [["train", "--fastest"], ["trian"], ["train"], ["estimate", "--rows", "many", "x"], ["plan", "no"]],
)
def test_a_command_line_that_means_nothing_ends_with_2_and_no_traceback(arguments: list[str]) -> None:
    words = [sys.executable, "-m", "qadapt", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 12
    assert done.stderr.strip()
