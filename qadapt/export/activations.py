"""How large the numbers inside a model become: the largest magnitude that goes into or out of each module.

fp16 ends at 65,504. Weights that fit say nothing of activations: the products between the two halves of a
feed-forward part are where models made for bf16 leave that range. Knows modules and nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

FP16_LIMIT = float(torch.finfo(torch.float16).max)


class Ranges:
    """The largest magnitude seen at each module; infinite where a number was none.

    Attributes:
        largest: By the path of the module.
    """

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    @contextmanager
    def watching(self, module: nn.Module, *, name: str) -> Iterator[None]:
        """While open, what goes through a module and its parts is seen; `name` is its path."""
        with ExitStack() as held:
            for path, part in module.named_modules(prefix=name):
                held.callback(part.register_forward_hook(partial(self._hook, path)).remove)
            yield

    def see(self, path: str, values: Any) -> None:
        """Takes notice of a tensor, or of the tensors of a tuple; whatever else it is says nothing."""
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                low, high = torch.aminmax(value.detach())
                reach = float(torch.maximum(-low, high))
                self.largest[path] = max(self.largest.get(path, 0.0), math.inf if reach != reach else reach)

    def beyond(self, limit: float = FP16_LIMIT) -> dict[str, float]:
        """The modules whose numbers are larger, in the order in which they were seen."""
        return {path: reach for path, reach in self.largest.items() if reach > limit}

    def _hook(self, path: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if next(module.children(), None) is None:  # of others it is what their parts give
            self.see(path, arguments)
        self.see(path, output)
