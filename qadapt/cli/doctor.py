"""`qadapt doctor`: can this machine train, and what to do about what it lacks."""

from __future__ import annotations

import dataclasses
import json as json_text
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from qadapt.cli.screen import console
from qadapt.hardware.checks import Facts, Finding, can_train, findings

_MARKS = {"good": ("✓", "green"), "note": ("i", "cyan"), "problem": ("!", "yellow"), "blocks": ("✗", "red")}
_PLAIN_MARKS = {"good": "ok", "note": "note", "problem": "PROBLEM", "blocks": "BLOCKS"}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print facts and findings as JSON.")] = False,
) -> None:
    """Checks Python, torch, CUDA, bitsandbytes, memory, disk and cache; each problem comes with its cure.

    Asks no hub. Exit code 0 if this machine can train (be it on the CPU), 2 if not.

    Examples: `qadapt doctor`, `qadapt doctor --json`.
    """
    from qadapt.cli.doctor_facts import gather_facts

    facts = gather_facts()
    found = findings(facts)
    if json:
        typer.echo(json_text.dumps(record(facts, found), indent=2))
    else:
        screen = console()
        screen.print(table(found, is_ascii=screen.options.ascii_only))
    if not can_train(found):
        raise typer.Exit(2)


def record(facts: Facts, found: tuple[Finding, ...]) -> dict[str, object]:
    """The JSON form: `schema`, `can_train`, `findings` (subject, value, level, cure) and `facts`."""
    return {
        "schema": 1,
        "can_train": can_train(found),
        "findings": [dataclasses.asdict(finding) for finding in found],
        "facts": dataclasses.asdict(facts),
    }


def table(found: tuple[Finding, ...], *, is_ascii: bool = False) -> Group:
    """The findings for the screen: a line each, problems with their cure below, the verdict last."""
    lines = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    lines.add_column(no_wrap=True)
    lines.add_column(no_wrap=True, style="bold")
    lines.add_column(overflow="fold")
    for finding in found:
        mark, style = _MARKS[finding.level]
        value = Text(finding.value)
        if finding.cure is not None:
            value.append(f"\n→ {finding.cure}" if not is_ascii else f"\n-> {finding.cure}", style=style)
        lines.add_row(
            Text(_PLAIN_MARKS[finding.level] if is_ascii else mark, style=style), finding.subject, value
        )
    return Group(lines, Text(), _verdict(found))


def _verdict(found: tuple[Finding, ...]) -> Text:
    problems = sum(finding.level in ("problem", "blocks") for finding in found)
    if not can_train(found):
        return Text("This machine cannot train yet: see the cures above.", style="bold red")
    if problems:
        return Text(
            f"This machine can train; {problems} problem{'s' if problems > 1 else ''} above.",
            style="bold yellow",
        )
    return Text("This machine can train.", style="bold green")
