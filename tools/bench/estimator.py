"""Scores the estimator: `estimator.py [--only PART] [--rows FILE]`; each claim beside its bar.

This file only tells the parts apart; each is a module beside it with a `report` of lines.

ledger            the ledger against the CPU allocator, the dry run against the ledger, over real steps
closed            the closed form against the dry run
fit               the plan against trying everything
published         a dry run of the measured stacks against published peaks and verdicts, row by row
                  (needs `--rows`)
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from qadapt.quiet import quiet_libraries


def published(options: argparse.Namespace) -> Iterable[str]:
    """Published measurements."""
    if options.rows is None:
        return ["published: left out, no file was given with --rows"]
    from published import report

    return report(options.rows, pattern=options.pattern)


def ledger(_: argparse.Namespace) -> Iterable[str]:
    """Real steps."""
    from ledger_matrix import report

    return report()


def closed(_: argparse.Namespace) -> Iterable[str]:
    """Sampled points."""
    from closed_form import report

    return report()


def fit(_: argparse.Namespace) -> Iterable[str]:
    """Sampled budgets."""
    from exhaustive import report

    return report()


PARTS: dict[str, Callable[[argparse.Namespace], Iterable[str]]] = {
    "ledger": ledger,
    "closed": closed,
    "fit": fit,
    "published": published,
}


def main() -> None:
    """Prints the parts asked for, or all; exits with 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description="Scores the estimator, each claim beside its bar.")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be given again")
    parser.add_argument("--rows", type=Path, help="published measurements, one JSON object a line")
    parser.add_argument("--pattern", default="", help="only published rows whose id holds this")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet_libraries()
    missed = False
    for name in options.only or PARTS:
        print(f"== {name}")
        for line in PARTS[name](options):
            print(line, flush=True)
            missed = missed or "MISSED" in line
    sys.exit(missed)


if __name__ == "__main__":
    main()
