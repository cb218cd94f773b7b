"""What an adapter has that is not trained: PiSSA's start, VeRA's projections, the adapters that it builds on.

It is part of the adapter as what is trained is: saved, resumed and counted with it.
"""

from __future__ import annotations

from collections.abc import Mapping

from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn

from qadapt.adapters.fusion import attended_tensors
from qadapt.adapters.pissa import starts_of
from qadapt.adapters.stack import lower_tensors


def frozen_of(model: nn.Module) -> dict[str, Tensor]:
    """The frozen tensors of an adapter by name."""
    return starts_of(model) | projections_of(model) | attended_tensors(model) | lower_tensors(model)


def projections_of(model: nn.Module) -> dict[str, Tensor]:
    """VeRA's two projections, which all layers share; none for other methods."""
    shared = shared_projections(model)
    return {f"{part}.{name}": value for part, held in shared.items() for name, value in held.named_buffers()}


def shared_projections(model: nn.Module) -> Mapping[str, nn.Module]:
    """What holds the two projections, each by the name of the adapter; PEFT gives every layer the same."""
    layer = next((module for module in model.modules() if isinstance(module, VeraLayer)), None)
    if layer is None:
        return {}
    assert layer.vera_A is not None and layer.vera_B is not None
    return {"vera_A": layer.vera_A, "vera_B": layer.vera_B}
