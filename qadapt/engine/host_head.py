"""A frozen head on the host: its weight comes to the card in slices of the vocabulary, one at a time.

The slices lie in pinned memory, each as long as fits a power of two, which is what torch gives. They come
in the order of computing: a copy waits for the products with the slice before it, and those with it wait for
it. Who asks for all logits pays one way of the head over the bus, a loss that never has them two
(`engine/sliced_loss.py`). Knows no model, no loss.

Legend: D width, V vocabulary, v rows of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from qadapt.engine.host import host_buffer, to_device
from qadapt.plan.host import slice_rows


class HostHead(nn.Module):
    """In the place of a frozen linear layer, with the same logits.

    Args:
        head: The layer; its weight is copied.
        device: Where it computes. On a CPU the same is done within one memory; on `meta` nothing is copied.
    """

    bias: nn.Parameter | None

    def __init__(self, head: nn.Linear, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = head.in_features, head.out_features
        weight = head.weight.data  # (V, D)
        parts = weight.split(slice_rows(self.out_features, self.in_features, weight.itemsize))
        self.slices = nn.ParameterList(_on_host(part, device) for part in parts)
        starts = range(0, len(weight), len(self.slices[0]))
        self.places = [slice(at, at + len(part)) for at, part in zip(starts, self.slices, strict=True)]
        self.register_parameter("bias", head.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """All logits, (..., V)."""
        parts = zip(self.places, self.slices, strict=True)
        return torch.cat([self.logits(hidden, at, to_device(part, hidden.device)) for at, part in parts], -1)

    def logits(self, hidden: Tensor, place: slice, weight: Tensor) -> Tensor:
        """Those of a slice that was brought, (..., v)."""
        return functional.linear(hidden, weight, None if self.bias is None else self.bias[place])

    def brought(self, beside: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Each slice (v, D) on a tensor's device, and its place in the vocabulary; the next overwrites it."""
        first = self.slices[0]
        buffer = torch.empty(tuple(first.shape), dtype=first.dtype, device=beside.device)
        for place, part in zip(self.places, self.slices, strict=True):
            yield place, buffer[: len(part)].copy_(part, non_blocking=True)


def _on_host(part: Tensor, device: torch.device) -> nn.Parameter:
    copy = host_buffer(part.nbytes, device).view(part.dtype).view(part.shape).copy_(part)
    return nn.Parameter(copy, requires_grad=False)
