"""Answers to inverse questions and the matrix of all cards. Each is an object that draws itself at its width.

Knows no command and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from qadapt.hardware.target import Target
from qadapt.plan.answer import Answer, CardAnswer
from qadapt.plan.inverse import ModelAnswer, Most, What
from qadapt.plan.room import Room
from qadapt.plan.setting import Setting
from qadapt.units import GIB, MIB, format_bytes, format_count, format_seconds
from qadapt.view.tables import changes_list, facts, heading, needed_words, setting_words, verdict

_UNITS: dict[What, tuple[str, str, str]] = {
    "length": ("longest row", "token", "tokens"),
    "rows": ("most rows at once", "row", "rows"),
    "rank": ("highest rank", "rank", "rank"),
}
_RUNNERS_UP = 5
_TOO_LARGE = 2
_MARKS = {"fits": ("fits", "green"), "close": ("too close to call", "yellow"), "too much": ("no", "red")}


@dataclass(frozen=True)
class MostTable:
    """The largest length, number of rows or rank; `answer` is the step at it, or at the least."""

    answer: Answer
    found: Most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield heading(self.answer)
        yield Text()
        yield self._headline()
        yield verdict(self.answer)
        yield facts(self.answer, options.max_width, is_short=True)
        yield from changes_list(self.answer.changes, is_ascii=options.ascii_only)

    def _headline(self) -> Text:
        found = self.found
        title, one, _ = _UNITS[found.what]
        if found.value is None:
            least = f"rank {found.estimate.setting.rank}" if found.what == "rank" else f"1 {one}"
            return Text.assemble((f"{title}: none", "bold red"), f"; even {least} does not surely fit")
        text = Text.assemble((f"{title}: {_amount(found.what, found.value)}", "bold green"))
        if found.is_at_ceiling:
            return text.append(f", {found.ceiling.reason}; memory would allow more")
        above = found.next_estimate
        assert above is not None
        extra = (above.needed_bytes - self.answer.estimate.needed_bytes) / MIB
        step = above.setting.rank - found.value if found.what == "rank" else 1
        more = "one" if step == 1 else step
        return text.append(f"; {more} more ({extra:.2f} MiB) no longer surely fits")


@dataclass(frozen=True)
class ModelsTable:
    """The largest known model that fits, then the runners-up, and before them the first that do not."""

    answers: tuple[ModelAnswer, ...]
    setting: Setting
    target: Target
    room: Room

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitting = [answer for answer in self.answers if answer.fits]
        yield Text(setting_words(self.setting), style="dim")
        free = f"{format_bytes(self.target.free_bytes)} free on {self.target.name}"
        yield Text.assemble(free, (f" ({self.target.assumption})", "dim"))
        yield Text()
        if fitting:
            yield Text(f"largest model: {fitting[0].shape.name}", style="bold green")
        else:
            yield Text("largest model: none of the known ones surely fits", style="bold red")
        yield Text()
        yield self._table(fitting)
        yield from self._notes(fitting)

    def _table(self, fitting: Sequence[ModelAnswer]) -> Table:
        asked = [answer for answer in self.answers if answer.estimate is not None and not answer.fits]
        least = fitting[0].shape.parameters if fitting else 0
        larger = [answer for answer in asked if answer.shape.parameters >= least][-_TOO_LARGE:]
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("model", overflow="fold")
        table.add_column("parameters", justify="right", no_wrap=True)
        table.add_column("needed, GiB", justify="right", no_wrap=True)
        table.add_column("host, GiB", justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for answer in (*larger, *fitting[: 1 + _RUNNERS_UP]):
            estimate = answer.estimate
            assert estimate is not None
            error = self.room.error_bytes(estimate)
            needed = f"{estimate.needed_bytes / GIB:.2f} ± {error / GIB:.2f}"
            is_close = self.room.may_hold(estimate)
            mark = _MARKS["fits" if answer.fits else "close" if is_close else "too much"]
            table.add_row(
                answer.shape.name,
                format_count(answer.shape.parameters),
                needed,
                f"{estimate.host_bytes / GIB:.1f}",
                Text(*mark),
                style="bold" if fitting and answer is fitting[0] else "",
            )
        return table

    def _notes(self, fitting: Sequence[ModelAnswer]) -> RenderResult:
        if any(answer.estimate and answer.estimate.setting.offload for answer in fitting[: 1 + _RUNNERS_UP]):
            yield Text("host: with what a plan puts there, as little as fits; slow over the bus", style="dim")
        more = len(fitting) - 1 - _RUNNERS_UP
        if more > 0:
            yield Text(f"and {more} smaller one{'s' if more > 1 else ''}", style="dim")
        if fitting and fitting[0].same:
            yield Text(f"\nOf the same shape: {', '.join(fitting[0].same)}", style="dim")
        refused = [answer.shape.name for answer in self.answers if answer.refusal is not None]
        if refused:
            yield Text(f"\nNot asked, as this setting is none of theirs: {', '.join(refused)}", style="dim")


@dataclass(frozen=True)
class CardsMatrix:
    """One model on every card: what is free, what is needed or the largest value, the time."""

    rows: tuple[CardAnswer, ...]
    asked: What | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        first = max(self.rows, key=lambda row: row.answer.target.has_bf16).answer
        yield heading(first, asked=self.asked)
        free = f"free is {first.target.assumption}"
        yield Text(f"Amounts in GiB; {free}; ± is the estimate's own error.", style="dim")
        yield Text()
        yield self._table()
        capped = [row.most for row in self.rows if row.most is not None and row.most.is_at_ceiling]
        if capped:
            yield Text(f"\n* {capped[0].ceiling.reason}; memory would allow more.", style="dim")
        others = [row.answer for row in self.rows if not row.answer.target.has_bf16]
        if others and others[0] is not first:
            types = others[0].estimate.setting
            names = ", ".join(answer.target.name for answer in others)
            words = f"{names}: no bf16, so {types.compute_dtype} with {types.adapter_dtype} adapters."
            yield Text(f"\n{words}", style="dim")

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        table.add_column("card", no_wrap=True)
        table.add_column("free", justify="right", no_wrap=True)
        if self.asked is not None:
            table.add_column(_UNITS[self.asked][0], justify="right", no_wrap=True)
        table.add_column("needed", justify="right", no_wrap=True)
        if self.asked is None:
            table.add_column("verdict", no_wrap=True)
        table.add_column("1,000 steps", justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*self._cells(row))
        return table

    def _cells(self, row: CardAnswer) -> list[str | Text]:
        answer = row.answer
        seconds = answer.seconds_per_1000_steps
        time = "?" if seconds is None else format_seconds(seconds)
        free = f"{answer.target.free_bytes / GIB:.2f}"
        if row.most is None:
            return [answer.target.name, free, needed_words(answer), Text(*_MARKS[answer.verdict]), time]
        if row.most.value is None:
            return [answer.target.name, free, Text("none", "red"), needed_words(answer), ""]
        star = "*" if row.most.is_at_ceiling else ""
        return [answer.target.name, free, f"{row.most.value:,}{star}", needed_words(answer), time]


def _amount(what: What, value: int) -> str:
    _, one, many = _UNITS[what]
    return f"{value:,}" if what == "rank" else f"{value:,} {one if value == 1 else many}"
