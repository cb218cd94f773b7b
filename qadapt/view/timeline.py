"""One step's memory as a picture: stacked areas by category over the order of allocations, as an SVG text.

The picture stands alone (no script, no font, nothing fetched), follows the reader's light or dark theme, and
says in its description what it shows. It is drawn from a trace, as the dry run gives it; it knows no model,
no card and no file. Every point is the highest moment of its stretch of events, so that nothing is smoothed
away (a stretch of one event is drawn as the step it is); a phase of few events is widened, or the loss, where
the peak often is, would be a hair.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from qadapt.plan.categories import CATEGORIES, TITLES
from qadapt.plan.trace import TraceEvent
from qadapt.units import GIB, MIB, format_bytes

MOST_POINTS = 600
WIDTH, HEIGHT = 960, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 684, 74, 428  # the plot's edges
_LEAST_SHARE = 0.09  # of the width, for a phase however few its events are
_OTHER = "other"
_BEFORE = ("load", "outside")
_BANDS = {"recompute": "backward"}
"""Phases that are drawn within another: layers are recomputed as they go backward."""

# Cyan stays, magenta comes and goes: the colours of the terminal's tables, light and dark in turn so that
# neighbours differ without colour, too.
_COLOURS = dict(
    zip(
        (*CATEGORIES, _OTHER),
        (
            *("#0e7490", "#67e8f9", "#0891b2", "#a5f3fc", "#155e75", "#22d3ee"),
            *("#86198f", "#f0abfc", "#c026d3", "#f5d0fe", "#9ca3af"),
        ),
        strict=True,
    )
)
_STYLE = """
svg{--back:#fff;--ink:#1f2937;--soft:#6b7280;--line:#d1d5db;--limit:#b91c1c}
@media (prefers-color-scheme:dark){
svg{--back:#111827;--ink:#f3f4f6;--soft:#9ca3af;--line:#374151;--limit:#f87171}}
text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--ink)}
.soft{fill:var(--soft)}.head{font-size:15px;font-weight:600}.strong{font-weight:600}
.halo{paint-order:stroke;stroke:var(--back);stroke-width:4px;stroke-linejoin:round}
.grid{stroke:var(--line);stroke-width:1}.limit{stroke:var(--limit);stroke-width:1.5;stroke-dasharray:6 4}
.over{fill:var(--limit)}.mark{fill:var(--back);stroke:var(--ink);stroke-width:1.5}
"""


@dataclass(frozen=True)
class Moment:
    """Live bytes by category after an event; `place` is its number among those of its band."""

    place: int
    bytes: Mapping[str, int]

    @property
    def total(self) -> int:
        """All live bytes."""
        return sum(self.bytes.values())


@dataclass
class Band:
    """A phase: the events from one change of phase to the next, and its moments that are drawn."""

    name: str
    events: list[TraceEvent] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    share: float = 0.0


def memory_svg(
    trace: Sequence[TraceEvent],
    *,
    title: str,
    starting: Mapping[str, int] | None = None,
    limit_bytes: int | None = None,
    unit_bytes: int = 1,
) -> str:
    """The picture of a step.

    Args:
        trace: Allocations and releases in the order of time; those of the phase `load` are what is there at
            the start.
        title: What it is a picture of.
        starting: Bytes by category before the first event, where the trace does not hold the loading.
        limit_bytes: What is free for the allocator; a line is drawn there.
        unit_bytes: What every size is rounded up to, as the device's allocator does.

    Raises:
        ValueError: Nothing happens after the loading.
    """
    sized = [event._replace(size_bytes=-(-event.size_bytes // unit_bytes) * unit_bytes) for event in trace]
    before, bands = _bands(sized, starting or {})
    if not bands:
        raise ValueError("the trace holds no event after the loading")
    _measure(bands, before)
    peak_band, peak = max(
        ((band, moment) for band in bands for moment in band.moments), key=lambda each: each[1].total
    )
    plot = _Plot(bands, before, peak_band, peak, limit_bytes)
    body = (*plot.areas(), *plot.grid(), *plot.phases(), *plot.limit(), *plot.marker(), *plot.legend())
    description = plot.description()
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            'aria-labelledby="memory-title memory-words">',
            f'<title id="memory-title">{escape(title)}</title>',
            f'<desc id="memory-words">{escape(description)}</desc>',
            f"<style>{_STYLE}</style>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="var(--back)"/>',
            f'<text x="{_LEFT}" y="26" class="head">{escape(title)}</text>',
            *body,
            "</svg>\n",
        )
    )


def _bands(trace: Sequence[TraceEvent], starting: Mapping[str, int]) -> tuple[dict[str, int], list[Band]]:
    """What is there before the step, and its phases; what happens in between belongs to the one before."""
    live = dict.fromkeys((*CATEGORIES, _OTHER), 0)
    for category, size_bytes in starting.items():
        live[_known(category)] += size_bytes
    bands: list[Band] = []
    sizes: dict[int, TraceEvent] = {}
    for event in trace:
        name = _BANDS.get(event.phase, event.phase)
        if not bands and name in _BEFORE:
            _apply(event, live, sizes)
            continue
        if name not in _BEFORE and (not bands or bands[-1].name != name):
            bands.append(Band(name))
        bands[-1].events.append(event)
    return live, bands


def _measure(bands: Sequence[Band], before: Mapping[str, int]) -> None:
    """Gives every band its share of the width and the moments that are drawn."""
    count = sum(len(band.events) for band in bands)
    wanted = [max(_LEAST_SHARE, len(band.events) / count) for band in bands]
    live = dict(before)
    sizes: dict[int, TraceEvent] = {}
    for band, share in zip(bands, wanted, strict=True):
        band.share = share / sum(wanted)
        stretch = max(1, math.ceil(len(band.events) / max(1, int(MOST_POINTS * band.share))))
        highest: dict[int, Moment] = {}
        for place, event in enumerate(band.events):
            _apply(event, live, sizes)
            total = sum(live.values())
            if place // stretch not in highest or total > highest[place // stretch].total:
                highest[place // stretch] = Moment(place, dict(live))
        band.moments = list(highest.values())


def _apply(event: TraceEvent, live: dict[str, int], sizes: dict[int, TraceEvent]) -> None:
    """A release of a block that was there before the trace is not seen: `starting` has its bytes."""
    if not event.is_release:
        sizes[event.key] = event
        live[_known(event.category)] += event.size_bytes
    elif event.key in sizes:
        made = sizes.pop(event.key)
        live[_known(made.category)] -= made.size_bytes


def _known(category: str) -> str:
    return category if category in CATEGORIES else _OTHER


class _Plot:
    """The bands in the plane; x in pixels from the left, y from the top."""

    def __init__(
        self,
        bands: Sequence[Band],
        before: Mapping[str, int],
        peak_band: Band,
        peak: Moment,
        limit_bytes: int | None,
    ) -> None:
        self.bands, self.before = bands, before
        self.peak_band, self.peak = peak_band, peak
        self.limit_bytes = limit_bytes
        reached = limit_bytes if limit_bytes and limit_bytes <= 2 * peak.total else 0
        self.top_bytes = 1.06 * max(peak.total, reached, 1)
        self.starts = list(itertools.accumulate((band.share for band in bands), initial=0.0))
        self.shown = [
            name
            for name in (*CATEGORIES, _OTHER)
            if any(moment.bytes[name] for band in bands for moment in band.moments)
        ]

    def x(self, band: Band, place: float) -> float:
        start = self.starts[self.bands.index(band)]
        share = start + band.share * place / max(1, len(band.events))
        return _LEFT + share * (_RIGHT - _LEFT)

    def y(self, amount: float) -> float:
        return _BOTTOM - amount / self.top_bytes * (_BOTTOM - _TOP)

    def areas(self) -> Iterator[str]:
        """From the whole stack down to its lowest area, each drawn over the one before."""
        moments: list[tuple[float, Mapping[str, int]]] = [(float(_LEFT), self.before)]
        for band in self.bands:
            for each in band.moments:
                moments.append((self.x(band, each.place), each.bytes))
                if len(band.moments) == len(
                    band.events
                ):  # every event is drawn: its level holds until the next
                    moments.append((self.x(band, each.place + 1), each.bytes))
        moments.append((float(_RIGHT), moments[-1][1]))
        for count in range(len(self.shown), 0, -1):
            below = self.shown[:count]
            line = [(x, self.y(sum(amounts[name] for name in below))) for x, amounts in moments]
            path = f"M{_LEFT} {_BOTTOM}{_path(line)}V{_BOTTOM}Z"
            name = below[-1]
            yield f'<path fill="{_COLOURS[name]}" d="{path}"><title>{_title(name)}</title></path>'

    def grid(self) -> Iterator[str]:
        step = _tick(self.top_bytes)
        unit, word = (GIB, "GiB") if step >= GIB / 10 else (MIB, "MiB")
        for number in range(int(self.top_bytes // step) + 1):
            y = self.y(number * step)
            label = f"{number * step / unit:g}" + (f" {word}" if not number else "")
            yield f'<path class="grid" opacity=".6" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>'
            yield f'<text class="soft" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'

    def phases(self) -> Iterator[str]:
        for band, start in zip(self.bands, self.starts, strict=False):
            left = _LEFT + start * (_RIGHT - _LEFT)
            middle = left + band.share * (_RIGHT - _LEFT) / 2
            yield f'<path class="grid" d="M{left:.1f} {_TOP - 18}V{_BOTTOM + 6}"/>'
            for line, word in enumerate(reversed(band.name.split())):
                y = _TOP - 8 - 14 * line
                yield f'<text x="{middle:.1f}" y="{y}" text-anchor="middle">{escape(word)}</text>'
        yield f'<path class="grid" d="M{_RIGHT} {_TOP - 18}V{_BOTTOM + 6}"/>'
        yield (
            f'<text class="soft" x="{_LEFT}" y="{_BOTTOM + 24}">order of allocations → '
            "(short phases widened; each point the highest moment of its stretch)</text>"
        )

    def limit(self) -> Iterator[str]:
        if self.limit_bytes is None:
            return
        words = f"limit {format_bytes(self.limit_bytes)}"
        if self.limit_bytes > self.top_bytes:
            yield (
                f'<text class="over halo" x="{_RIGHT - 6}" y="{_TOP + 14}" text-anchor="end">'
                f"{words}, far above ↑</text>"
            )
            return
        y = self.y(self.limit_bytes)
        yield f'<path class="limit" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>'
        yield f'<text class="over halo" x="{_LEFT + 6}" y="{y - 6:.1f}">{words}</text>'

    def marker(self) -> Iterator[str]:
        x, y = self.x(self.peak_band, self.peak.place), self.y(self.peak.total)
        side = -1 if x > (_LEFT + _RIGHT) / 2 else 1
        anchor = "end" if side < 0 else "start"
        yield f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        yield (
            f'<text class="halo strong" x="{x + 9 * side:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">'
            f"peak {format_bytes(self.peak.total)}</text>"
        )

    def legend(self) -> Iterator[str]:
        left, y = _RIGHT + 16, _TOP
        yield f'<text class="soft" x="{left}" y="{y}">at the peak</text>'
        for name in reversed(self.shown):
            y += 24
            amount = format_bytes(self.peak.bytes[name])
            yield f'<rect x="{left}" y="{y - 10}" width="12" height="12" rx="2" fill="{_COLOURS[name]}"/>'
            yield f'<text x="{left + 18}" y="{y}">{_title(name)}</text>'
            yield f'<text x="{WIDTH - 12}" y="{y}" text-anchor="end">{amount}</text>'

    def description(self) -> str:
        """The picture in words."""
        words = [f"Live memory of one step, {', '.join(band.name for band in self.bands)}."]
        words.append(f"Peak {format_bytes(self.peak.total)}, in the phase {self.peak_band.name}:")
        parts = (f"{_title(name)} {format_bytes(self.peak.bytes[name])}" for name in self.shown)
        words.append(f"{', '.join(parts)}.")
        if self.limit_bytes is not None:
            place = "above" if self.peak.total > self.limit_bytes else "below"
            words.append(f"That is {place} the limit of {format_bytes(self.limit_bytes)}.")
        return " ".join(words)


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _path(points: Iterable[tuple[float, float]]) -> str:
    """Lines through points, to a tenth of a pixel; those between two of the same height are left out."""
    rounded = [(round(x, 1), round(y, 1)) for x, y in points]
    kept = [
        point
        for index, point in enumerate(rounded)
        if not 0 < index < len(rounded) - 1 or not rounded[index - 1][1] == point[1] == rounded[index + 1][1]
    ]
    return "".join(f"L{x:g} {y:g}" for x, y in kept)


def _tick(top_bytes: float) -> float:
    """A round distance of the grid's lines: four to eight of them."""
    unit = GIB if top_bytes >= GIB else MIB
    rough = top_bytes / 7 / unit
    size = 10.0 ** math.floor(math.log10(rough))
    return unit * next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
