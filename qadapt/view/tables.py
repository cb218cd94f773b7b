"""Tables of estimates, plans, cards and models. Each is an object that draws itself at the width it is given.

Knows no command and no file. `CardsTable.markdown` is the README's table of cards against models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from qadapt.architecture import size
from qadapt.hardware.cards import Card
from qadapt.hardware.target import Target
from qadapt.plan.categories import CATEGORIES, STATIC, TITLES
from qadapt.plan.estimate import Estimate, disk_parts, estimate_step
from qadapt.plan.knobs import micro_batches
from qadapt.plan.ladder import Change
from qadapt.plan.setting import Recompute, Setting, auto_dtypes
from qadapt.shape import ModelConfig, ModelShape
from qadapt.units import GIB, format_bytes, format_count, format_seconds

PHASES = {
    "loss": "at the loss: the logits and their gradient",
    "layer": "while the widest layer goes backward",
    "update": "in the optimizer's step",
}
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class EstimateTable:
    """One estimate: a line per category with its share, then the verdict and what else it takes."""

    shape: ModelShape
    estimate: Estimate
    target: Target
    rows_per_step: int
    changes: tuple[Change, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._title()
        yield Text(setting_words(self.estimate.setting), style="dim")
        yield Text()
        yield self._categories(options.max_width, is_ascii=options.ascii_only)
        yield Text()
        yield verdict(self.estimate, self.target)
        yield self._facts(options.max_width)
        if self.changes:
            yield Text("\nWhat would make it fit, cheapest first:", style="bold")
            lines = [
                Text(change.sentence) if change.is_enough else _not_enough(change) for change in self.changes
            ]
            yield bullets(lines, is_ascii=options.ascii_only)

    def _title(self) -> Text:
        text = Text(self.shape.name, style="bold")
        return text.append(f"  {format_count(self.shape.parameters)} parameters", style="dim")

    def _categories(self, width: int, *, is_ascii: bool) -> Table:
        peak = self.estimate.peak_allocated_bytes
        largest = max(self.estimate.categories.values()) or 1
        bar_width = max(0, min(40, width - 24 - 11 - 7 - 4))
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_column(width=24, no_wrap=True, overflow="ellipsis")
        table.add_column(width=10, justify="right", no_wrap=True)
        table.add_column(width=6, justify="right", no_wrap=True, style="dim")
        table.add_column(width=bar_width or None, no_wrap=True)
        for name in CATEGORIES:
            amount = self.estimate.categories[name]
            style = "cyan" if name in STATIC else "magenta"
            drawn = bar(amount / largest, bar_width, is_ascii=is_ascii)
            row = (TITLES[name], format_bytes(amount), f"{amount / peak:.1%}", Text(drawn, style=style))
            table.add_row(*row, style="" if amount else "dim")
        legend = Text.assemble(("stays ", "cyan"), ("comes and goes", "magenta")) if bar_width >= 20 else ""
        table.add_row("peak, allocated", format_bytes(peak), "", legend, style="bold")
        return table

    def _facts(self, width: int) -> Table:
        estimate = self.estimate
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_column(width=9, no_wrap=True, style="dim")
        table.add_column(max_width=max(20, width - 11))
        is_worst = estimate.peak_phase == "loss" and estimate.setting.supervised_share == 1
        note = "; every token counted, the worst case (--supervised)" if is_worst else ""
        table.add_row("peak", f"{PHASES[estimate.peak_phase]}{note}")
        if estimate.context_bytes:
            low, high = (format_bytes(amount) for amount in estimate.context_range_bytes)
            context = f"{format_bytes(estimate.context_bytes)} assumed, {low} to {high} seen"
            table.add_row("context", f"{context}; counted in the verdict")
            low, high = format_bytes(estimate.reserved_low_bytes), format_bytes(estimate.reserved_high_bytes)
            table.add_row("reserved", f"{low} to {high} with memory to spare; less under pressure")
        table.add_row("host", f"{format_bytes(estimate.host_bytes)} of memory, {_disk(self.shape, estimate)}")
        table.add_row("time", self._time())
        table.add_row("precision", precision_words(estimate, self.target))
        return table

    def _time(self) -> str:
        seconds = self.estimate.seconds_per_step
        count = micro_batches(self.rows_per_step, self.estimate.setting.rows)
        if seconds is None:
            return "unknown: nobody has measured this device"
        step = f"{count} micro-batch{'es' if count > 1 else ''} of {format_seconds(seconds)} a step"
        total = format_seconds(1000 * count * seconds)
        return f"about {total} per 1,000 steps ({step}), within a factor of 2"


@dataclass(frozen=True)
class PlanTable:
    """A plan: its estimate, then each choice with its price."""

    table: EstimateTable
    reasons: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table
        yield Text("\nThe plan, each choice with its price:", style="bold")
        yield bullets([Text(reason) for reason in self.reasons], is_ascii=options.ascii_only)


def setting_words(setting: Setting) -> str:
    """`NF4, double quant · LoRA rank 16 in bf16 on all linear layers · ...`: a setting in one line."""
    base = "NF4" + (", double quant" if setting.double_quant else "")
    if setting.quantization == "none":
        base = f"base in {setting.compute_dtype}"
    where = "all linear layers" if setting.targets == "all-linear" else ", ".join(setting.targets)
    rows = "1 row" if setting.rows == 1 else f"{setting.rows} rows"
    learned = "" if setting.supervised_share == 1 else f", {setting.supervised_share:.0%} of them learned"
    parts = (
        base,
        f"LoRA rank {setting.rank} in {setting.adapter_dtype} on {where}",
        f"{rows} of {setting.length:,} tokens{learned}",
        recomputed_words(setting.recompute),
        setting.optimizer,
        f"{setting.compute_dtype} on {setting.device}",
    )
    return " · ".join(parts)


def recomputed_words(recompute: Recompute) -> str:
    """`every layer recomputed`, `nothing recomputed`, `first 20 layers recomputed`."""
    if isinstance(recompute, int):
        return "first layer recomputed" if recompute == 1 else f"first {recompute} layers recomputed"
    return "every layer recomputed" if recompute == "all" else "nothing recomputed"


def verdict(estimate: Estimate, target: Target) -> Text:
    """`fits: 6.90 ± 0.30 of 7.30 GiB free on RTX 4060 8GB (assumed: ...)`."""
    needed, error, free = estimate.needed_bytes, estimate.error_bytes, target.free_bytes
    if estimate.fits(free):
        word, style = "fits", "bold green"
    elif needed - error <= free:
        word, style = "too close to call", "bold yellow"
    else:
        word, style = "does not fit", "bold red"
    amounts = f": {needed / GIB:.2f} ± {error / GIB:.2f} of {free / GIB:.2f} GiB free on {target.name}"
    return Text.assemble((word, style), amounts, (f" ({target.assumption})", "dim"))


def precision_words(estimate: Estimate, target: Target) -> str:
    """What is exact, what is a range, what nobody has measured."""
    shares = f"{estimate.relative_error:.0%}"
    text = f"what stays is exact to the byte, what comes and goes within {shares}"
    if estimate.setting.device == "cuda":
        text += "; context and reserved bytes are ranges; no GPU has confirmed this step"
    if estimate.setting.device == "cuda" and not target.has_bf16:
        text += "; Turing may compute attention with T x T scores, which are not counted"
    return text


def bullets(lines: Sequence[Text], *, is_ascii: bool = False) -> Table:
    """A list whose longer lines go on under their first word."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=3, justify="right")
    table.add_column()
    for line in lines:
        table.add_row("-" if is_ascii else "•", line)
    return table


def _not_enough(change: Change) -> Text:
    return Text(f"{change.sentence}; not enough alone", style="dim")


def bar(share: float, width: int, *, is_ascii: bool = False) -> str:
    """A bar of up to `width` columns, to an eighth of a column; something for anything above zero."""
    if is_ascii:
        return "#" * max(round(share * width), int(share > 0 and width > 0))
    eighths = max(round(share * width * 8), int(share > 0 and width > 0))
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _disk(shape: ModelShape, estimate: Estimate) -> str:
    parts = ", ".join(
        f"{name} {format_bytes(amount)}" for name, amount in disk_parts(shape, estimate.setting).items()
    )
    return f"{format_bytes(estimate.disk_bytes)} of disk ({parts})"


def models_table(shapes: Sequence[ModelShape], others: Sequence[ModelConfig] = ()) -> Table:
    """The models that are known without a network; `others` are those without a closed form."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("model", overflow="fold")
    for heading in ("parameters", "layers", "width", "vocabulary", "context"):
        table.add_column(heading, justify="right")
    for shape in shapes:
        numbers = (shape.layers, shape.width, shape.vocabulary, shape.context)
        cells = (f"{number:,}" for number in numbers)
        table.add_row(shape.name, format_count(shape.parameters), *cells)
    fields = ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")
    for config in others:
        sizes = (size(config.values, field) for field in fields)
        table.add_row(config.name, "by --exact", *("?" if each is None else f"{each:,}" for each in sizes))
    return table


def catalogue_table(cards: Sequence[Card]) -> Table:
    """The catalogue of cards."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("card", overflow="fold")
    for heading in ("driver shows", "free, headless", "bf16", "TFLOPS", "GB/s"):
        table.add_column(heading, justify="right")
    for card in cards:
        table.add_row(
            card.name,
            format_bytes(card.memory_bytes),
            format_bytes(card.free_bytes("headless")),
            "yes" if card.has_bf16 else "no",
            "?" if card.tflops is None else f"{card.tflops:.0f}",
            "?" if card.bandwidth_gb is None else f"{card.bandwidth_gb:.0f}",
        )
    return table


@dataclass(frozen=True)
class CardsTable:
    """Cards against models: the longest row that fits, one row at a time, every layer recomputed."""

    models: tuple[str, ...]
    cards: tuple[str, ...]
    lengths: tuple[tuple[int | None, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown, a line per card."""
        lines = [f"| card | {' | '.join(self.models)} |", f"|---|{'---:|' * len(self.models)}"]
        for card, lengths in zip(self.cards, self.lengths, strict=True):
            cells = " | ".join("–" if length is None else f"{length:,}" for length in lengths)
            lines.append(f"| {card} | {cells} |")
        return "\n".join(lines) + "\n"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        table.add_column("card", no_wrap=True)
        for model in self.models:
            table.add_column(model, justify="right", overflow="fold")
        for card, lengths in zip(self.cards, self.lengths, strict=True):
            table.add_row(card, *("–" if length is None else f"{length:,}" for length in lengths))
        yield table


def cards_table(
    models: Sequence[ModelShape], cards: Sequence[Card], length: int, *, supervised_share: float = 1.0
) -> CardsTable:
    """The longest row each card can train of each model, by halves from `length` down to 256 tokens.

    NF4 with double quantization, rank 16 on all linear layers, one row at a time, nothing else on the card.
    """
    rows = tuple(tuple(_longest(model, card, length, supervised_share) for model in models) for card in cards)
    names = tuple(model.name.rpartition("/")[2] for model in models)
    return CardsTable(names, tuple(card.name for card in cards), rows)


def _longest(shape: ModelShape, card: Card, length: int, supervised_share: float) -> int | None:
    compute_dtype, adapter_dtype = auto_dtypes("cuda", has_bf16=card.has_bf16)
    tried = min(length, shape.context)
    while tried >= 256:
        setting = Setting(
            length=tried,
            compute_dtype=compute_dtype,
            adapter_dtype=adapter_dtype,
            supervised_share=supervised_share,
        )
        if estimate_step(shape, setting, card=card).fits(card.free_bytes("headless")):
            return tried
        tried //= 2
    return None
