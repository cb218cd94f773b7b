"""Tables of what is known without a network: models, cards, and cards against models.

Knows no command and no file. `CardsTable.markdown` is the README's table of cards against models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from qadapt.architecture import size
from qadapt.hardware.cards import Card
from qadapt.plan.inverse import Freedom, least_way
from qadapt.plan.knobs import PLANNED
from qadapt.plan.room import Room
from qadapt.plan.setting import Setting, auto_dtypes
from qadapt.shape import ModelConfig, ModelShape
from qadapt.units import format_bytes, format_count


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
    """Cards against models: the longest row that fits, one row at a time, by what a plan may turn."""

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

    NF4 with double quantization, rank 16 on all linear layers, one row at a time, nothing else on the card,
    and a host with room for what a plan puts there.
    """
    rows = tuple(tuple(_longest(model, card, length, supervised_share) for model in models) for card in cards)
    names = tuple(model.name.rpartition("/")[2] for model in models)
    return CardsTable(names, tuple(card.name for card in cards), rows)


def _longest(shape: ModelShape, card: Card, length: int, supervised_share: float) -> int | None:
    compute_dtype, adapter_dtype = auto_dtypes("cuda", has_bf16=card.has_bf16)
    room, tried = Room(card.free_bytes("headless")), min(length, shape.context)
    while tried >= 256:
        setting = Setting(
            length=tried,
            compute_dtype=compute_dtype,
            adapter_dtype=adapter_dtype,
            supervised_share=supervised_share,
        )
        if room.holds(least_way(shape, setting, room=room, freedom=Freedom(PLANNED, 1), card=card)):
            return tried
        tried //= 2
    return None
