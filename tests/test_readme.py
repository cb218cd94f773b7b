"""What README and CONTRIBUTING say is so: their commands parse, their files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import typer.core

from qadapt.cli.main import app
from qadapt.recipe_file import shipped_recipes

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(text: str, start: str) -> list[list[str]]:
    """Every command line that starts with a word, in code blocks and between backticks, as its arguments."""
    blocks = "\n".join(re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line.strip().removeprefix("$ ") for line in (*blocks.splitlines(), *inline)]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{start} ")]


def problem_of(arguments: list[str]) -> str | None:
    """Why a `qadapt` command line would not parse, or None; nothing is run."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    if arguments[0].startswith("-"):
        return None if arguments[0] in ("--help", "--version") else f"no option {arguments[0]}"
    command = group.commands.get(arguments[0])
    if command is None:
        return f"no command {arguments[0]}"
    if isinstance(command, typer.core.TyperGroup):
        inner = command.commands.get(arguments[1]) if len(arguments) > 1 else None
        if inner is None:
            return f"no command {' '.join(arguments[:2])}"
        arguments, command = [" ".join(arguments[:2]), *arguments[2:]], inner
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [
        word for word in arguments[1:] if word.startswith("-") and word.partition("=")[0] not in options
    ]
    return f"no option {unknown[0]} of {arguments[0]}" if [w for w in unknown if w != "--help"] else None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_shown_exists_with_its_options(document: str) -> None:
    shown = commands(text_of(document), "qadapt")
    problems = [f"qadapt {' '.join(words)}: {problem_of(words)}" for words in shown if problem_of(words)]
    assert not problems, "\n" + "\n".join(problems)


def test_the_readme_shows_the_commands_that_matter() -> None:
    shown = {words[0] for words in commands(text_of("README.md"), "qadapt")}
    assert {"estimate", "plan", "train", "export"} <= shown


def test_the_readme_starts_with_the_two_programs() -> None:
    programs = [words[0] for words in commands(text_of("README.md"), "python")]
    assert {"tools/demo", "tools/check"} <= set(programs)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_program_shown_exists(document: str) -> None:
    programs = [words[0] for words in commands(text_of(document), "python") if not words[0].startswith("-")]
    assert all((ROOT / program).is_file() for program in programs), programs


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_named_exists(document: str) -> None:
    text = re.sub(r"^```.*?^```", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`((?:qadapt|tools|tests|recipes|docs|\.ci)/[A-Za-z0-9_./-]*)`", text))
    named |= {link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link}
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert named, f"{document} names no file"
    assert not missing, f"{document} names {missing}"


def test_every_recipe_the_readme_names_is_shipped() -> None:
    named = re.findall(r"\b([a-z0-9.]+(?:-[a-z0-9.]+)*-qlora-\d+gb)\b", text_of("README.md"))
    assert named
    assert set(named) <= set(shipped_recipes())


def test_the_table_of_cards_is_what_the_estimate_says() -> None:
    from readme import table

    assert table() in text_of("README.md"), "run `python tools/readme.py`"


def test_a_wrong_command_would_be_found() -> None:
    assert problem_of(["estimat", "x"]) == "no command estimat"
    assert problem_of(["train", "x", "--fastest"]) == "no option --fastest of train"
    assert problem_of(["data", "chek", "x"]) == "no command data chek"
    assert problem_of(["data", "check", "x", "--fastest"]) == "no option --fastest of data check"
    assert problem_of(["train", "quickstart-smollm2-135m", "train.steps=2"]) is None
    found = commands(
        "Text `qadapt plan x`.\n```sh\n$ qadapt train a  # why\npython tools/demo\n```\n", "qadapt"
    )
    assert found == [["train", "a"], ["plan", "x"]]
