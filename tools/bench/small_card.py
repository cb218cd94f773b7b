"""The smallest card for a 7B at length 2,048, by the dry run: what each rung wins, and what it costs.

    python tools/bench/small_card.py [--length 2048] [--share 0.4]   (about four minutes)

Llama-2-7B, Mistral-7B, Qwen2.5-7B and Llama-3.1-8B in NF4 with nested constants, rank 16 on all linear
layers, one row of that length at a time of which a share is learned, bf16 adapters, 8-bit AdamW; gradients of
earlier rows lie there. Each line adds one rung to those above it: allocated bytes at the highest moment
by the dry run (`meta`, CUDA meant), what the rung won, what the closed form says, what lies on the host, and
the seconds of one micro-batch on an RTX 3050 8GB by the estimate, whose bus is assumed (`plan/speed.py`).
Exits with 1 where a bar is missed: 4.4 GiB without streamed layers, 2.5 GiB with them. No card has run these
steps here.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from qadapt.hardware.cards import find_card
from qadapt.plan.estimate import estimate_step
from qadapt.plan.setting import Setting
from qadapt.quiet import quiet_libraries
from qadapt.shape import find_shape, known_models
from qadapt.train.dryrun import dry_run
from qadapt.units import GIB

MODELS = (
    "meta-llama/Llama-2-7b-hf",
    "mistralai/Mistral-7B-v0.3",
    "Qwen/Qwen2.5-7B",
    "meta-llama/Llama-3.1-8B",
)
CARD = "RTX 3050 8GB"
PLAIN_BAR_BYTES = round(4.4 * GIB)
STREAMED_BAR_BYTES = round(2.5 * GIB)
CHUNK, TILES = 256, 4
RUNGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("everything kept, learned tokens at the head at once", {"recompute": "none", "loss_chunk": 1 << 30}),
    ("every layer recomputed", {"recompute": "all"}),
    (f"{CHUNK} learned tokens at the head at a time", {"loss_chunk": CHUNK}),
    (f"feed-forward parts in {TILES} pieces", {"mlp_tiles": TILES}),
    ("embeddings on the host", {"offload": ("embeddings",)}),
    ("boundaries on the host", {"offload": ("embeddings", "boundaries")}),
    ("the head on the host, in slices", {"offload": ("embeddings", "head", "boundaries")}),
    ("layers streamed", {"offload": ("embeddings", "head", "boundaries", "layers")}),
)


@dataclasses.dataclass(frozen=True)
class Rung:
    """A line of the table."""

    text: str
    setting: Setting
    dry_bytes: int
    closed_bytes: int
    host_bytes: int
    pinned_bytes: int
    seconds: float | None


def rungs(name: str, start: Setting) -> Iterator[Rung]:
    """The rungs of a model, each with those before it."""
    shape, card, setting = find_shape(name), find_card(CARD), start
    for text, fields in RUNGS:
        setting = dataclasses.replace(setting, **fields)
        dry = dry_run(known_models()[name], setting, capability=card.compute_capability)
        closed = estimate_step(shape, setting, card=card)
        yield Rung(
            text,
            setting,
            dry.peak.bytes,
            closed.peak_allocated_bytes,
            closed.host_bytes,
            closed.pinned_bytes,
            closed.seconds_per_step,
        )


def report(name: str, start: Setting) -> Iterator[tuple[str, bool]]:
    """The table of a model line by line, and whether the line keeps its bar."""
    yield f"\n{name}, {start.length:,} tokens", True
    yield (
        f"{'rung':52} {'dry run':>8} {'won':>7} {'closed':>7} {'host':>6} {'pinned':>7} {'seconds':>8}",
        True,
    )
    before = None
    for rung in rungs(name, start):
        won = 0 if before is None else before - rung.dry_bytes
        error = rung.closed_bytes / rung.dry_bytes - 1
        seconds = "?" if rung.seconds is None else f"{rung.seconds:.2f}"
        yield (
            f"{rung.text:52} {rung.dry_bytes / GIB:8.2f} {won / GIB:7.2f} {error:+7.1%}"
            f" {rung.host_bytes / GIB:6.1f} {rung.pinned_bytes / GIB:7.2f} {seconds:>8}",
            True,
        )
        before = rung.dry_bytes
        yield from _bar(rung)


def _bar(rung: Rung) -> Iterator[tuple[str, bool]]:
    bars = {RUNGS[-2][1]["offload"]: PLAIN_BAR_BYTES, RUNGS[-1][1]["offload"]: STREAMED_BAR_BYTES}
    bar = bars.get(rung.setting.offload)
    if bar is not None:
        is_met = rung.dry_bytes <= bar
        yield f"  bar {bar / GIB:.1f} GiB: {'met' if is_met else 'MISSED'}", is_met


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--share", type=float, default=0.4)
    arguments = parser.parse_args()
    quiet_libraries()
    start = Setting(length=arguments.length, supervised_share=arguments.share)
    is_met = True
    for name in MODELS:
        for line, keeps in report(name, start):
            print(line, flush=True)
            is_met = is_met and keeps
    sys.exit(0 if is_met else 1)


if __name__ == "__main__":
    main()
