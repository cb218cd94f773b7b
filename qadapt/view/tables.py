"""Estimates and plans on the screen. Each is an object that draws itself at the width it is given.

Knows no command and no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from qadapt.methods import METHODS
from qadapt.plan.answer import Answer
from qadapt.plan.categories import CATEGORIES, STATIC, TITLES
from qadapt.plan.inverse import What
from qadapt.plan.ladder import Change
from qadapt.plan.setting import Recompute, Setting
from qadapt.plan.speed import TIME_SPAN
from qadapt.units import GIB, MIB, format_bytes, format_count, format_seconds
from qadapt.view.placing import arranged_words

PHASES = {
    "loss": "at the loss: the logits and their gradient",
    "layer": "while the widest layer goes backward",
    "forward": "in the forward pass",
    "recompute": "in the backward pass, while a layer is recomputed",
    "backward": "in the backward pass",
    "update": "in the optimizer's step",
    "evaluation": "in an evaluation",
    "evaluation loss": "at the loss of an evaluation",
}
CONFIRMED = (
    "an H100 confirmed steps of Llama-3.1-8B, Qwen2.5-7B, Mistral-7B and gemma-2-9b shapes, no other card has"
)
"""What a GPU has been measured to take (`tools/bench/on_card.py`)."""
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class EstimateTable:
    """One answer: a line per category with its share, then the verdict and what else it takes."""

    answer: Answer

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield heading(self.answer)
        yield Text()
        yield self._categories(options.max_width, is_ascii=options.ascii_only)
        yield Text()
        yield verdict(self.answer)
        yield facts(self.answer, options.max_width)
        yield from changes_list(self.answer.changes, is_ascii=options.ascii_only)

    def _categories(self, width: int, *, is_ascii: bool) -> Table:
        estimate = self.answer.estimate
        peak = estimate.peak_allocated_bytes
        largest = max(estimate.categories.values()) or 1
        bar_width = max(0, min(40, width - 24 - 11 - 7 - 4))
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_column(width=24, no_wrap=True, overflow="ellipsis")
        table.add_column(width=10, justify="right", no_wrap=True)
        table.add_column(width=6, justify="right", no_wrap=True, style="dim")
        table.add_column(width=bar_width or None, no_wrap=True)
        for name in CATEGORIES:
            amount = estimate.categories[name]
            style = "cyan" if name in STATIC else "magenta"
            drawn = bar(amount / largest, bar_width, is_ascii=is_ascii)
            row = (TITLES[name], format_bytes(amount), f"{amount / peak:.1%}", Text(drawn, style=style))
            table.add_row(*row, style="" if amount else "dim")
        legend = Text.assemble(("stays ", "cyan"), ("comes and goes", "magenta")) if bar_width >= 20 else ""
        table.add_row("peak, allocated", format_bytes(peak), "", legend, style="bold")
        return table


@dataclass(frozen=True)
class PlanTable:
    """A plan: its estimate, then each choice with its price."""

    table: EstimateTable
    reasons: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table
        yield Text("\nThe plan, each choice with its price:", style="bold")
        yield bullets([Text(reason) for reason in self.reasons], is_ascii=options.ascii_only)


def setting_words(setting: Setting, *, asked: What | None = None) -> str:
    """`NF4, double quant · LoRA rank 16 in bf16 on all linear layers · ...`: a setting in one line.

    Args:
        setting: The setting.
        asked: A field that has no value yet, as its largest one is asked for.
    """
    base = "NF4" + (", double quant" if setting.double_quant else "")
    if setting.quantization == "int8":
        base = "8 bits"
    elif setting.quantization == "none":
        base = f"base in {setting.compute_dtype}"
    where = "on all linear layers" if setting.targets == "all-linear" else f"on {', '.join(setting.targets)}"
    facts = METHODS[setting.method]
    rank = f" {facts.size} {setting.rank}" if facts.size and asked != "rank" else ""
    if facts.has_virtual_tokens:
        rank, where = f", {setting.rank} virtual tokens" if rank else "", "before every row"
    elif facts.is_beside:
        dropped = setting.dropped_layers
        where = f"on layers from {dropped} on" if dropped else "on every layer"
    rows = "rows" if asked == "rows" else "1 row" if setting.rows == 1 else f"{setting.rows} rows"
    length = "" if asked == "length" else f" of {setting.length:,} tokens"
    packed = ", packed" if setting.packed else ""
    learned = "" if setting.supervised_share == 1 else f", {setting.supervised_share:.0%} of them learned"
    parts = (
        base,
        f"{facts.title}{rank} in {setting.adapter_dtype} {where}",
        f"{rows}{length}{packed}{learned}",
        recomputed_words(setting.recompute),
        *arranged_words(
            loss_chunk=setting.loss_chunk,
            mlp_tiles=setting.mlp_tiles,
            offload=setting.offload,
            device=setting.device,
        ),
        setting.optimizer,
        f"{setting.compute_dtype} on {setting.device}",
    )
    return " · ".join(parts)


def recomputed_words(recompute: Recompute) -> str:
    """`every layer recomputed`, `nothing recomputed`, `first 20 layers recomputed`."""
    if isinstance(recompute, int):
        return "first layer recomputed" if recompute == 1 else f"first {recompute} layers recomputed"
    return "every layer recomputed" if recompute == "all" else "nothing recomputed"


def heading(answer: Answer, *, asked: What | None = None) -> Text:
    """The model's name and size, and under it the setting; see `setting_words`."""
    return Text.assemble(
        (answer.name, "bold"),
        (f"  {format_count(answer.parameters)} parameters", "dim"),
        (f"\n{setting_words(answer.estimate.setting, asked=asked)}", "dim"),
    )


def verdict(answer: Answer) -> Text:
    """`fits: 6.90 ± 0.30 of 7.30 GiB free on RTX 4060 8GB (assumed: ...)`."""
    words = {
        "fits": ("fits", "bold green"),
        "close": ("too close to call", "bold yellow"),
        "too much": ("does not fit", "bold red"),
    }
    amounts = f": {needed_words(answer)} of {answer.target.free_bytes / GIB:.2f} GiB free"
    where = f" on {answer.target.name}"
    return Text.assemble(words[answer.verdict], amounts, where, (f" ({answer.target.assumption})", "dim"))


def needed_words(answer: Answer) -> str:
    """`6.90 ± 0.30`, in GiB."""
    return f"{answer.estimate.needed_bytes / GIB:.2f} ± {answer.error_bytes / GIB:.2f}"


def facts(answer: Answer, width: int, *, is_short: bool = False) -> Table:
    """Where the peak is, what else it takes, how long, and what of all this is sure: a line each.

    Args:
        answer: The answer.
        width: Columns there are.
        is_short: Leave out what the step takes besides the memory that the verdict is about.
    """
    besides = () if is_short else _memory(answer)
    if not is_short or answer.estimate.setting.offload:
        besides = (*besides, _disk(answer))
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=9, no_wrap=True, style="dim")
    table.add_column(max_width=max(20, width - 11))
    for name, words in (_peak(answer), *besides, *_doubts(answer), _time(answer), *sureness(answer)):
        table.add_row(name, words)
    return table


def sureness(answer: Answer) -> tuple[Line, ...]:
    """What is exact, what is a range, what nobody has measured: a line each."""
    estimate = answer.estimate
    stays = format_bytes(sum(estimate.categories[name] for name in STATIC))
    is_cuda = estimate.setting.device == "cuda"
    if estimate.exact:
        exact = "every tensor of the step, counted on the step itself without its memory"
        ranges = (
            [f"what kernels take inside, from a table ({estimate.relative_error:.0%})"] if is_cuda else []
        )
    else:
        exact = f"what stays from step to step, {stays}, to the byte"
        ranges = [f"what comes and goes, within {estimate.relative_error:.0%}"]
    ranges += ["context", "reserved bytes"] if is_cuda else []
    ranges += ["time"] if estimate.seconds_per_step is not None else []
    unknown = []
    if is_cuda:
        unknown.append(f"this very step on this card; {CONFIRMED}")
    else:
        unknown.append("± is what the system's allocator may keep beside live tensors, by one run")
    lines = (("exact", exact), ("range", "; ".join(ranges)), ("unknown", "; ".join(unknown)))
    return tuple(line for line in lines if line[1])


def changes_list(changes: Sequence[Change], *, is_ascii: bool) -> RenderResult:
    """The ladder, if there is one."""
    if not changes:
        return
    yield Text("\nWhat would make it fit, cheapest first:", style="bold")
    lines = [Text(change.sentence) if change.is_enough else _not_enough(change) for change in changes]
    yield bullets(lines, is_ascii=is_ascii)


Line = tuple[str, str]
"""A name and what is to be said under it."""


def _peak(answer: Answer) -> Line:
    estimate = answer.estimate
    is_worst = estimate.peak_phase == "loss" and estimate.setting.supervised_share == 1
    note = "; every token counted, the worst case (--supervised)" if is_worst else ""
    module = f", in {answer.module}" if answer.module else ""
    return "peak", f"{PHASES[estimate.peak_phase]}{module}{note}"


def _memory(answer: Answer) -> Iterator[Line]:
    """What CUDA and its allocator take besides."""
    estimate = answer.estimate
    if not estimate.context_bytes:
        return
    least, most = (f"{amount / MIB:.0f}" for amount in estimate.context_range_bytes)
    context = f"{estimate.context_bytes / MIB:.0f} MiB of CUDA's own, {least} to {most} possible"
    yield "context", f"{context}; counted in the verdict"
    low, high = answer.reserved_bytes
    gaps = "" if answer.gap_share is None else f", {answer.gap_share:.0%} of it gaps at the peak"
    yield (
        "reserved",
        f"{low / GIB:.2f} to {format_bytes(high)} with memory to spare{gaps}; less under pressure",
    )


def _doubts(answer: Answer) -> Iterator[Line]:
    """What this very machine adds to the verdict."""
    if answer.target.may_spill and answer.verdict != "fits":
        yield "Windows", "may put what does not fit into host memory: many times slower, and no error"
    if answer.routing_bytes is not None:
        low, high = (format_bytes(amount) for amount in answer.routing_bytes)
        yield "routing", f"peak {low} if balanced, {high} if all tokens choose the same experts"
    for note in answer.notes:
        yield "note", note
    if answer.calibration:
        widened = "; ± is widened to that" if answer.is_widened else ""
        yield "measured", f"{answer.calibration.sentence}{widened}"


def _disk(answer: Answer) -> Line:
    estimate = answer.estimate
    parts = ", ".join(f"{name} {format_bytes(amount)}" for name, amount in answer.disk.items())
    parts += " in the temporary folder" if "boundaries" in answer.disk else ""
    disk = f"{format_bytes(estimate.disk_bytes)} of disk ({parts})"
    pinned = f", {format_bytes(estimate.pinned_bytes)} of it pinned" if estimate.pinned_bytes else ""
    lacking = "" if answer.room.host_holds(estimate) else ", which this machine does not have free"
    return "host", f"{format_bytes(estimate.host_bytes)} of memory{pinned}{lacking}, {disk}"


def _time(answer: Answer) -> Line:
    total = answer.seconds_per_1000_steps
    if total is None or answer.estimate.seconds_per_step is None:
        card = answer.target.card
        is_known = card is not None and card.tflops is not None
        what = (
            "there is no closed form for this architecture" if is_known else "nobody has measured this device"
        )
        return "time", f"unknown: {what}"
    count = answer.micro_batches_per_step
    each = format_seconds(answer.estimate.seconds_per_step)
    step = f"{count} micro-batch{'es' if count > 1 else ''} of {each} a step"
    return "time", f"about {format_seconds(total)} per 1,000 steps ({step}); {TIME_SPAN}"


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
