"""The longest row that trains on a card: Llama-3.1-8B in 4 bits, rank 16 on every linear layer, one row.

    python tools/bench/long_rows.py [--budget GIB ...] [--host GIB ...] [--offload PART ...]
                                                                                (about a minute a budget)

For each budget of a card after its CUDA context, and each size of the host's memory, the longest row whose
dry run fits both, in steps of 1,024 tokens up to the model's own limit: all layers recomputed, their inputs
and the input embeddings on the host (or what `--offload` names, such as the head, too), feed-forward parts
and norms in pieces of 4,096 tokens, the loss in chunks of 1,024. The dry run is of two layers and of four:
what a layer adds is the same for all (`--whole` runs all of them once, at the row that was found). Exits with
1 if a bar is missed on the largest host.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from functools import lru_cache
from typing import get_args

from qadapt.hardware.cards import RUNTIME_BYTES
from qadapt.plan.estimate import estimate_step
from qadapt.plan.host import table_bytes
from qadapt.plan.setting import Setting
from qadapt.quiet import quiet_libraries
from qadapt.shape import Part, find_config, find_shape
from qadapt.train.dryrun import dry_run
from qadapt.units import GIB

MODEL = "meta-llama/Llama-3.1-8B"
BARS = {7.3: 16_384, 11.2: 45_056, 15.2: 81_920, 23.3: 131_072}
"""Budget in GiB → tokens that must fit."""
CLAIMED = {7.3: 3_000, 11.2: 22_000, 15.2: 41_000, 23.3: 78_000}
"""The best published claim, itself an extrapolation."""
HOSTS = (16.0, 32.0, 64.0)
STEP = 1024
PIECE = 4096
CAPABILITY = 8.9


def setting_of(length: int, offload: tuple[Part, ...]) -> Setting:
    """A step of one row with everything put away."""
    return Setting(
        rows=1,
        length=length,
        supervised_share=1.0,
        loss_chunk=1024,
        mlp_tiles=max(2, length // PIECE),
        offload=offload,
        accumulates=True,
    )


@lru_cache
def taken(length: int, offload: tuple[Part, ...], layers: int | None = None) -> tuple[int, int]:
    """Bytes on the card and on the host; of all layers by what two more of them add."""
    values = dict(find_config(MODEL).values)
    count = int(values["num_hidden_layers"])
    if layers is None:
        few, more = taken(length, offload, 2), taken(length, offload, 4)
        return tuple(a + (b - a) * (count - 2) // 2 for a, b in zip(few, more, strict=True))  # type: ignore[return-value]
    shape, setting = find_shape(MODEL), setting_of(length, offload)
    dry = dry_run(values | {"num_hidden_layers": layers}, setting, capability=CAPABILITY)
    table = 0 if dry.host_bytes > table_bytes(shape, setting) else table_bytes(shape, setting)
    return dry.peak.bytes, dry.host_bytes + table + RUNTIME_BYTES["cuda"]


def longest(card_bytes: float, host_bytes: float, offload: tuple[Part, ...]) -> int:
    """The longest row that fits both."""
    low, high = 0, int(find_config(MODEL).values["max_position_embeddings"]) // STEP
    while low < high:
        middle = (low + high + 1) // 2
        on_card, on_host = taken(middle * STEP, offload)
        low, high = (middle, high) if on_card <= card_bytes and on_host <= host_bytes else (low, middle - 1)
    return low * STEP


def main() -> int:
    """Prints the table; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, nargs="*", default=list(BARS))
    parser.add_argument("--host", type=float, nargs="*", default=list(HOSTS))
    parser.add_argument("--offload", nargs="*", choices=get_args(Part), default=["embeddings", "boundaries"])
    parser.add_argument("--whole", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet_libraries()
    is_missed, offload = False, tuple(args.offload)
    for budget in args.budget:
        for host in args.host:
            length = longest(budget * GIB, host * GIB, offload)
            on_card, on_host = taken(length, offload) if length else (0, 0)
            setting = setting_of(max(length, STEP), offload)
            closed = estimate_step(find_shape(MODEL), setting).peak_allocated_bytes
            bar = BARS.get(budget, 0)
            is_missed |= host == max(args.host) and length < bar
            print(
                f"{budget:5.1f} GiB card, {host:3.0f} GiB host: {length:8,} tokens; {on_card / GIB:6.2f} GiB "
                f"on the card (closed form {closed / GIB:6.2f}), {on_host / GIB:6.2f} GiB on the host; "
                f"bar {bar:,}, published {CLAIMED.get(budget, 0):,}",
                flush=True,
            )
            if args.whole and length:
                layers = int(find_config(MODEL).values["num_hidden_layers"])
                whole = taken(length, offload, layers)
                print(f"      all layers: {whole[0] / GIB:.2f} GiB, on the host {whole[1] / GIB:.2f}")
    return int(is_missed)


if __name__ == "__main__":
    sys.exit(main())
