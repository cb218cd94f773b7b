"""The outcomes of `peers.py`: what a side's lines come to, the table, and the bars. Pure.

A ratio is the median of the ratios of each repeat, as a repeat's sides ran one after another.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIB = 1024**2
PEERS = ("trl", "llamafactory")
"""The sides that the bars are about; the plain loop is shown beside them."""
FASTER_THAN_DEFAULTS, FASTER_THAN_BEST = 3.0, 2.0
SMALL_SHARE, SMALL_FASTER = 0.5, 1.5


@dataclass(frozen=True)
class Side:
    """Who trains and how; None: its own default. `kind` is `defaults`, `best`, `leanest` or `tried`, of our
    own side `defaults` or `small memory`.
    """

    name: str
    kind: str
    dtype: str | None = None
    is_recomputing: bool | None = None
    padding: str = "filled"

    @property
    def key(self) -> str:
        recompute = {None: "-", True: "recompute", False: "keep"}[self.is_recomputing]
        return f"{self.name} | {self.kind} | {self.dtype or '-'} | {recompute} | {self.padding}"


@dataclass(frozen=True)
class Outcome:
    """One run of a side."""

    dtype: str
    recompute: str
    padding: str
    tokens_per_second: float
    peak_bytes: int

    @property
    def line(self) -> str:
        return (
            f"{self.tokens_per_second:7.1f} tokens/s, peak {self.peak_bytes / MIB:6.0f} MiB "
            f"({self.dtype}, recompute {self.recompute}, rows {self.padding})"
        )


def outcome_of(lines: Sequence[Mapping[str, Any]], *, top_bytes: int, padding: str) -> Outcome:
    """What a side's lines come to: the rate of all steps but the first and those whose memory was counted.

    Args:
        lines: As `side.Telling` writes them.
        top_bytes: The highest anonymous memory of the side's processes.
        padding: As asked for, unless the side says otherwise.
    """
    steps = [line for line in lines if line["kind"] == "step"]
    level_bytes = next(line["level_bytes"] for line in lines if line["kind"] == "imported")
    done = lines[-1]
    tokens = done.get("tokens") or [step["tokens"] for step in steps]
    timed = [place for place, step in enumerate(steps) if place and not step.get("is_watched")]
    seconds = sum(steps[place]["seconds"] for place in timed)
    return Outcome(
        dtype=done["dtype"],
        recompute=done["recompute"],
        padding=done.get("padding", padding),
        tokens_per_second=sum(tokens[place] for place in timed) / seconds,
        peak_bytes=top_bytes - level_bytes,
    )


Outcomes = Mapping[Side, Sequence[Outcome]]
"""Of each side, the repeats in order."""


def faster(outcomes: Outcomes, one: Side, other: Side) -> float:
    """How many times as fast the one is: the median over the repeats."""
    pairs = zip(outcomes[one], outcomes[other], strict=False)
    return statistics.median(ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in pairs)


def smaller(outcomes: Outcomes, one: Side, other: Side) -> float:
    """The one's peak as a share of the other's: the median over the repeats."""
    pairs = zip(outcomes[one], outcomes[other], strict=False)
    return statistics.median(ours.peak_bytes / theirs.peak_bytes for ours, theirs in pairs)


def rate(outcomes: Outcomes, side: Side) -> float:
    return statistics.median(each.tokens_per_second for each in outcomes[side])


def peak(outcomes: Outcomes, side: Side) -> float:
    return statistics.median(each.peak_bytes for each in outcomes[side])


def table(outcomes: Outcomes) -> list[str]:
    """The table: each side's medians, and how our rows compare with it."""
    ours = [side for side in outcomes if side.name == "qadapt"]
    head = ["side", "setting", "dtype", "recompute", "rows", "tokens/s", "peak MiB"]
    head += [f"{column} {side.kind}" for side in ours for column in ("speed of", "peak of")]
    lines = [_row(head), _row(["---"] * len(head))]
    for side, repeats in outcomes.items():
        first = repeats[0]
        spread = "/".join(f"{each.tokens_per_second:.0f}" for each in repeats)
        cells = [side.name, side.kind, first.dtype, first.recompute, first.padding]
        cells += [f"{rate(outcomes, side):.0f} ({spread})", f"{peak(outcomes, side) / MIB:.0f}"]
        for each in ours:
            cells += [f"{faster(outcomes, each, side):.2f} x", f"{smaller(outcomes, each, side):.2f} x"]
        lines.append(_row(cells))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Verdict:
    """A bar and what was measured."""

    claim: str
    measured: float
    bar: float
    is_at_least: bool = True

    @property
    def is_kept(self) -> bool:
        return self.measured >= self.bar if self.is_at_least else self.measured <= self.bar

    @property
    def line(self) -> str:
        sign, word = ">=" if self.is_at_least else "<=", "kept" if self.is_kept else "MISSED"
        return f"{self.claim}: {self.measured:.2f} (bar {sign} {self.bar}): {word}"


def verdicts(outcomes: Outcomes) -> list[Verdict]:
    """Every bar, against the peers that were run."""
    default, small = (_only(outcomes, "qadapt", kind) for kind in ("defaults", "small memory"))
    peers = [side for side in outcomes if side.name in PEERS]
    at_defaults = [side for side in peers if side.kind == "defaults"]
    quickest = max(at_defaults, key=lambda side: rate(outcomes, side))
    leanest = min(peers, key=lambda side: peak(outcomes, side))
    said = [
        Verdict(
            f"speed, the faster peer at its defaults ({quickest.name})",
            faster(outcomes, default, quickest),
            FASTER_THAN_DEFAULTS,
        )
    ]
    for side in peers:
        if side.kind == "best":
            claim = f"speed, {side.name} at its best"
            said.append(Verdict(claim, faster(outcomes, default, side), FASTER_THAN_BEST))
    for side in (side for side in peers if side.kind != "leanest"):  # with that our small setting compares
        claim = f"memory, {side.name} at its {side.kind}"
        said.append(Verdict(claim, smaller(outcomes, default, side), 1.0, is_at_least=False))
    claim = f"small memory: peak, the smaller peer's ({leanest.name}, {leanest.kind})"
    said.append(Verdict(claim, smaller(outcomes, small, leanest), SMALL_SHARE, is_at_least=False))
    claim = f"small memory: speed, the faster peer at its defaults ({quickest.name})"
    said.append(Verdict(claim, faster(outcomes, small, quickest), SMALL_FASTER))
    return said


def _only(outcomes: Outcomes, name: str, kind: str) -> Side:
    [side] = [side for side in outcomes if (side.name, side.kind) == (name, kind)]
    return side
