"""Draws the dashboard of a run as SVG: `python tools/picture.py runs/my-run dashboard.svg --at 0.7`."""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console

from qadapt.events import Event, StepDone
from qadapt.view.dashboard import Dashboard
from qadapt.view.journal import effective, read_events
from qadapt.view.state import fold_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder, with its events.jsonl")
    parser.add_argument("target", type=Path, help="the SVG to write")
    parser.add_argument("--at", type=float, default=0.7, help="share of the steps done (default: 0.7)")
    parser.add_argument("--width", type=int, default=100, help="columns (default: 100)")
    parser.add_argument("--height", type=int, default=30, help="lines (default: 30)")
    options = parser.parse_args()
    events = events_until(effective(read_events(options.run)), share=options.at)
    if not events:
        parser.error(f"{options.run} has no events")
    svg = picture(events, width=options.width, height=options.height)
    options.target.write_text(svg, encoding="utf-8")


def events_until(events: list[Event], *, share: float) -> list[Event]:
    """The events up to the step after which `share` of the steps were done."""
    steps = [position for position, event in enumerate(events) if isinstance(event, StepDone)]
    if share >= 1 or not steps:
        return events
    return events[: steps[max(0, round(share * len(steps)) - 1)] + 1]


def picture(events: list[Event], *, width: int, height: int) -> str:
    """The dashboard right after the last event, as SVG text that fetches no fonts."""
    console = Console(
        width=width,
        height=height,
        record=True,
        file=io.StringIO(),
        force_terminal=True,
        color_system="standard",
        legacy_windows=False,
        _environ={},
    )
    console.print(Dashboard(fold_all(events), events[-1].time, height=height))
    svg = console.export_svg(title="qadapt train", unique_id="dashboard")
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    main()
