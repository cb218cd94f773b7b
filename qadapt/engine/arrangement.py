"""How a base is computed: what is recomputed, in how many pieces, and what waits outside the device's memory.

One function, so that a run, its dry run and the self-test cannot disagree. What of a base lies on the host
from the start is decided where it is read (`model/placement.py`). Knows no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from transformers import PreTrainedModel

from qadapt.engine.boundaries import offload_boundaries
from qadapt.engine.gated import set_gated
from qadapt.engine.norms import set_norms
from qadapt.engine.recompute import set_recompute
from qadapt.engine.tiles import set_tiles
from qadapt.plan.setting import Recompute


def arrange(
    base: PreTrainedModel,
    *,
    recompute: Recompute,
    tiles: int,
    offload: Sequence[str],
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Arranges the steps of a base.

    Args:
        base: Before or after an adapter is attached; modules and names stay.
        recompute: As of `set_recompute`.
        tiles: As of `set_tiles`.
        offload: Of it `boundaries` is of concern here.
        within: Makes a context that whatever is computed again runs in.

    Raises:
        Unsupported: The architecture's feed-forward part cannot be computed in pieces.
    """
    set_recompute(base, recompute, within=within)
    set_tiles(base, tiles, within=within)
    set_norms(base)
    set_gated(base)
    if "boundaries" in offload:
        offload_boundaries(base)
