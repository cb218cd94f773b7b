"""`qadapt doctor`: can this machine train, and what to do about what it lacks."""

from __future__ import annotations

import dataclasses
import json as json_text
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from qadapt.cli.screen import console
from qadapt.hardware.checks import Facts, Finding, can_train, findings

if TYPE_CHECKING:
    from qadapt.selftest.check import Check
    from qadapt.selftest.report import SelfTest

_MARKS = {"good": ("✓", "green"), "note": ("i", "cyan"), "problem": ("!", "yellow"), "blocks": ("✗", "red")}
_PLAIN_MARKS = {"good": "ok", "note": "note", "problem": "PROBLEM", "blocks": "BLOCKS"}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print facts and findings as JSON.")] = False,
    selftest: Annotated[
        bool,
        typer.Option(
            "--selftest",
            help="Run small training steps and compare them with the CPU and with what is predicted: some "
            "minutes, and what it prints can go into an issue. Close what else uses the card.",
        ),
    ] = False,
) -> None:
    """Checks Python, torch, CUDA, bitsandbytes, memory, disk and cache; each problem comes with its cure.

    Asks no hub. Exit code 0 if this machine can train (be it on the CPU), 2 if not. The self-test's: 0 if
    every check is right, 1 if not, 2 if a library is missing.

    Examples: `qadapt doctor`, `qadapt doctor --json`, `qadapt doctor --selftest`.
    """
    if selftest:
        _run_selftest(as_json=json)
        return
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


def _run_selftest(*, as_json: bool) -> None:
    """Makes the checks of the self-test and prints each as it comes; plain text, to be pasted."""
    try:
        from qadapt.selftest.report import SelfTest
    except (ImportError, OSError) as error:
        typer.echo(f"The self-test needs what `qadapt doctor` looks at first: {error}", err=True)
        raise typer.Exit(2) from None
    test, started = SelfTest(), time.monotonic()
    checks: list[Check] = []
    if not as_json:
        typer.echo("\n".join(heading(test)))
    for check in test.checks():
        checks.append(check)
        if not as_json:
            typer.echo(line(check))
    failed = sum(check.verdict == "FAILED" for check in checks)
    seconds = time.monotonic() - started
    if as_json:
        typer.echo(json_text.dumps(selftest_record(test, checks, seconds=seconds), indent=2))
    else:
        typer.echo(f"{len(checks)} checks in {seconds:.0f} s, {failed} failed.")
    if failed:
        raise typer.Exit(1)


def heading(test: SelfTest) -> list[str]:
    """The lines above the checks: what they were made on."""
    return ["qadapt self-test", *(f"{name:8}  {value}" for name, value in test.facts().items()), ""]


def line(check: Check) -> str:
    """A check's line."""
    return f"{check.verdict:8}  {check.name}: {check.said}"


def selftest_record(test: SelfTest, checks: list[Check], *, seconds: float) -> dict[str, object]:
    """The JSON form: `schema`, `is_right`, `seconds`, `facts`, and `checks` (name, said, verdict)."""
    return {
        "schema": 1,
        "is_right": all(check.verdict != "FAILED" for check in checks),
        "seconds": round(seconds, 1),
        "facts": test.facts(),
        "checks": [dataclasses.asdict(check) for check in checks],
    }


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
