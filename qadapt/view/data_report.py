"""What `qadapt data check` says, on the screen: numbers, lengths drawn, rows in colour, problems last.

The words stand here once; the HTML page (`data_page.py`) uses the same. Knows no command and no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from qadapt.data.check import DataReport, Finding, Histogram
from qadapt.data.reasons import LEFT_OUT, NOTES
from qadapt.plan.speed import TIME_SPAN
from qadapt.units import format_bytes, format_seconds
from qadapt.view.data_rows import Look, RowsView
from qadapt.view.tables import bar
from qadapt.view.visible import PLAIN_SIGNS

_CUT_WORDS = {
    "turns": "whole turns left out",
    "inside": "cut inside a turn",
    "pieces": "split into pieces",
}
_LABEL_WIDTH = 10


@dataclass(frozen=True)
class DataReportView:
    """The whole report."""

    report: DataReport
    shows_ids: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        look = Look.of(console, options)
        yield Text(look.line(headline(self.report)), style="bold")
        yield Text()
        yield _facts(self.report, look, options.max_width)
        yield Text()
        yield from _drawn(self.report, options.max_width, is_ascii=options.ascii_only)
        if self.report.examples:
            yield Text()
            yield RowsView(self.report.examples, self.shows_ids)
        yield Text()
        yield _findings(self.report.findings, look)
        yield verdict(self.report.findings)


def headline(report: DataReport) -> str:
    """The recipe's name and its model."""
    return f"{report.name}: rows for {report.model}"


def verdict(findings: tuple[Finding, ...]) -> Text:
    """The last line."""
    if not findings:
        return Text("No problems: this is what the model will see.", style="bold green")
    words = "1 problem" if len(findings) == 1 else f"{len(findings):,} problems"
    return Text(f"{words}: see above what to do.", style="bold yellow")


def _findings(findings: tuple[Finding, ...], look: Look) -> Table:
    """Each problem with its cure below."""
    arrow = "->" if look.signs is PLAIN_SIGNS else "→"
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=1, style="bold yellow")
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(look.line(finding.message), overflow="fold")
        text.append(f"\n{arrow} {look.line(finding.cure)}", style="yellow")
        table.add_row("!", text)
    return table


def _facts(report: DataReport, look: Look, width: int) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=_LABEL_WIDTH, no_wrap=True, style="dim")
    table.add_column(max_width=max(20, width - _LABEL_WIDTH - 2), overflow="fold")
    for name, words in report_lines(report):
        table.add_row(look.line(name), look_text(words, look))
    return table


def look_text(words: str, look: Look) -> Text:
    """Words that may hold names of the user's, made safe."""
    return Text(look.line(words))


Line = tuple[str, str]
"""A name and what is to be said under it."""


def report_lines(report: DataReport) -> Iterator[Line]:
    """Every number of the report in words, a line each."""
    yield from _row_lines(report)
    yield from _lost_lines(report)
    yield from report.prompt
    if report.new_tokens:
        yield "new tokens", ", ".join(f"{token} {times(count)}" for token, count in report.new_tokens.items())
    yield from _step_lines(report)
    yield from _forecast_lines(report)


def _row_lines(report: DataReport) -> Iterator[Line]:
    held_out = f"; {report.held_out_rows:,} held out" if report.held_out_rows else "; none held out"
    made = report.rows + report.held_out_rows
    origin = f"; made of {counted(report.read_rows)}" if report.read_rows < made else ""
    yield "rows", f"{report.rows:,} to train on{held_out}{origin}"
    if report.formats:
        yield "formats", ", ".join(f"{name} {counted(count)}" for name, count in report.formats.items())
    share = f"{report.supervised_tokens:,} of them ({report.supervised_share:.1%}) learned"
    weighed = f"; {report.pass_tokens:,} a pass, by weights" if report.pass_rows != report.rows else ""
    yield "tokens", f"{report.tokens:,} in the training rows, {share}{weighed}"
    facts = report.lengths
    yield (
        "length",
        f"{facts.shortest:,} to {facts.longest:,} tokens, mean {facts.mean:,.0f}, median {facts.median:,}; "
        f"95 % have at most {facts.ninety_fifth:,}",
    )


def _lost_lines(report: DataReport) -> Iterator[Line]:
    everything, made = report.read_rows, report.rows + report.held_out_rows
    cut = sum(report.cut.values())
    yield "cut", f"{share_of(cut, everything)}{_kinds(report.cut, _CUT_WORDS)}" if cut else "no row"
    if report.left_out:
        yield (
            "left out",
            f"{share_of(sum(report.left_out.values()), everything)}{_kinds(report.left_out, LEFT_OUT)}",
        )
    if report.skipped_rows:
        yield "malformed", f"{counted(report.skipped_rows)} skipped, as asked"
    for note, count in report.notes.items():
        yield "note", f"{share_of(count, everything)}: {NOTES.get(note, note)}"
    yield "repeated", share_of(report.duplicates, made)
    if report.held_out_rows:
        yield "overlap", "none: no held-out row is trained on, token for token"


def _kinds(counts: Mapping[str, int], words: Mapping[str, str]) -> str:
    parts = [f"{count:,} {words.get(name, name)}" for name, count in counts.items() if count]
    return f": {', '.join(parts)}" if parts else ""


def _step_lines(report: DataReport) -> Iterator[Line]:
    per_pass = report.pass_rows / report.rows_per_step
    passes = report.steps / per_pass
    steps = "1 step" if report.steps == 1 else f"{report.steps:,} steps"
    pace = f"{passes:,.2f} passes, {per_pass:,.1f} steps a pass"
    yield "steps", f"{steps} of {counted(report.rows_per_step)} each; {pace}"
    layout = report.layout
    looked = f" (by {layout.steps:,} step{'s' if layout.steps > 1 else ''})"
    packed = (
        f"{layout.packed_passes:.1f} forward passes a step, {layout.packed_share:.1%} of their room of "
        f"{layout.capacity_tokens:,} tokens used"
    )
    padded = (
        f"{layout.padding_share:.1%} of what is computed in micro-batches of {layout.micro_batch}, "
        f"{layout.padded_passes:.1f} a step"
    )
    if report.is_packed:
        yield "packing", f"{packed}{looked}; unpacked, padding would be {padded}"
    else:
        yield "padding", f"{padded}{looked}; packed: {packed}, no padding"


def _forecast_lines(report: DataReport) -> Iterator[Line]:
    forecast = report.forecast
    if forecast.peak_bytes is None:
        yield "memory", f"not planned: {forecast.problem}"
        return
    budget = f" of {format_bytes(forecast.budget_bytes)} free" if forecast.budget_bytes is not None else ""
    where = f" on {forecast.device}" if forecast.device else ""
    yield "memory", f"about {format_bytes(forecast.peak_bytes)}{budget}{where}; `qadapt plan` tells more"
    if forecast.seconds_per_step is None:
        yield "time", f"unknown: {forecast.problem}"
    else:
        whole = format_seconds(forecast.seconds_per_step * report.steps)
        yield (
            "time",
            f"about {whole}, {format_seconds(forecast.seconds_per_step)} a step; {TIME_SPAN}",
        )


def _drawn(report: DataReport, width: int, *, is_ascii: bool) -> Iterator[Text]:
    """The lengths as bars, one line a bin, and where `data.length` is."""
    drawn = report.histogram
    names = bin_names(drawn)
    name_width = max(len(name) for name in names)
    count_width = len(f"{max(drawn.counts):,}")
    room = max(4, min(60, width - name_width - count_width - 5))
    most = max(drawn.counts) or 1
    place = limit_place(report)
    first = next(number for number, count in enumerate(drawn.counts) if count)
    for number, (name, count) in enumerate(zip(names, drawn.counts, strict=True)):
        if number < first:
            continue  # no row is so short
        style = "cyan" if place is None or number < place else "yellow"
        stroke = bar(count / most, room, is_ascii=is_ascii)
        yield Text.assemble(f"{name:>{name_width}}  ", (f"{count:>{count_width},} ", "dim"), (stroke, style))
        if place is not None and number + 1 == place:
            yield limit_line(report.length, name_width + count_width + 3 + room, is_ascii=is_ascii)
    if place is None:
        words = f"data.length {report.length:,} is beyond the longest row"
        yield Text(f"{'':>{name_width}}  {words}", style="dim")


def limit_place(report: DataReport) -> int | None:
    """After which bin `data.length` is; None if it is longer than every bin."""
    place = -(-report.length // report.histogram.width)
    return place if place <= len(report.histogram.counts) else None


def bin_names(drawn: Histogram) -> list[str]:
    """`1 – 128`, `129 – 256`, ...: tokens."""
    ends = drawn.ranges
    width = max(len(f"{high:,}") for _, high in ends)
    return [f"{low:>{width},} - {high:>{width},}" for low, high in ends]


def limit_line(length: int, width: int, *, is_ascii: bool) -> Text:
    """A rule with `data.length` in it."""
    stroke = "-" if is_ascii else "─"
    words = f" data.length {length:,} "
    return Text(f"{stroke * 2}{words}{stroke * max(2, width - len(words) - 2)}", style="bold red")


def share_of(count: int, everything: int) -> str:
    """`12 rows (1.5 %)`."""
    return f"{counted(count)} ({count / everything:.1%})" if count else "no row"


def counted(count: int) -> str:
    """`1 row`, `2,000 rows`."""
    return "1 row" if count == 1 else f"{count:,} rows"


def times(count: int) -> str:
    """`never`, `once`, `17 times`."""
    return {0: "never", 1: "once"}.get(count, f"{count:,} times")
