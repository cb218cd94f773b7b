"""How a step is arranged beyond its rows and recomputation: chunks of loss, pieces, what lies elsewhere.

Words for the screen; knows no plan and no event.
"""

from __future__ import annotations

from collections.abc import Sequence

from qadapt.plan.setting import LOSS_CHUNK


def arranged_words(
    *, loss_chunk: int, mlp_tiles: int, offload: Sequence[str], device: str
) -> tuple[str, ...]:
    """What differs from the usual, such as `feed-forward in 4 pieces`, `layers on the host`; else nothing.

    Args:
        loss_chunk: Learned tokens at the head at once; 0: all.
        mlp_tiles: Pieces of a feed-forward part.
        offload: What lies elsewhere.
        device: `cuda` or `cpu`.
    """
    chunk = f"loss of {loss_chunk} tokens at a time" if loss_chunk else "loss of all tokens at once"
    return (
        *((chunk,) if loss_chunk != LOSS_CHUNK else ()),
        *((f"feed-forward in {mlp_tiles} pieces",) if mlp_tiles > 1 else ()),
        *((f"{', '.join(offload)} {elsewhere(device)}",) if offload else ()),
    )


def elsewhere(device: str) -> str:
    """Where what is offloaded lies: `on the host`; beside a CPU it is `in a temporary file`."""
    return "in a temporary file" if device == "cpu" else "on the host"
