"""Feed-forward parts and norms computed in pieces along the sequence, so that very long rows fit.

A module that treats every token by itself can be computed a few tokens at a time. Its input is kept and
nothing else; in the backward pass each piece is computed again and goes backward alone, so the three wide
tensors of a feed-forward part, or a norm's copies in fp32, exist for one piece only. The gradients of what is
trained are summed over the pieces in fp32. Where the whole layer recomputes, its recomputation stops at the
kept input, so nothing is computed more often than without pieces.

Only an instance's `forward` is set; names, hooks and classes stay. The idea: Liger's and ALST's tiled MLP
(arXiv:2506.13996). Legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers import GradientCheckpointingLayer, PreTrainedModel

from qadapt.errors import Unsupported
from qadapt.shape import FAMILIES

Context = Callable[[], AbstractContextManager[object]]


def set_tiles(model: PreTrainedModel, tiles: int, *, within: Context = nullcontext) -> None:
    """Has feed-forward parts and norms of the model's width computed in so many pieces from now on.

    Args:
        model: The base, before or after an adapter is attached.
        tiles: Pieces of the tokens of a micro-batch; 1 as the library does it.
        within: Makes a context that each piece is computed again in.

    Raises:
        Unsupported: Nothing shows that this architecture's feed-forward part treats each token by itself.
    """
    if tiles == 1 and not tiles_of(model):
        return
    if not can_tile(model):
        raise Unsupported(
            f"mlp_tiles = {tiles}: the feed-forward part of {model.config.model_type} cannot be computed in "
            f"pieces; that is proven for {', '.join(FAMILIES)}.",
            cure="Leave the feed-forward part whole, and train on shorter rows.",
        )
    for module in _token_wise(model):
        tiled = module.forward
        if isinstance(tiled, Tiled):
            tiled.tiles = tiles
        else:
            module.forward = Tiled(module, tiles, within=within)


def can_tile(model: PreTrainedModel) -> bool:
    """Whether it is proven that a model's feed-forward parts treat each token by itself."""
    return model.config.model_type in FAMILIES


def tiles_of(model: PreTrainedModel) -> int:
    """In how many pieces feed-forward parts are computed; 0 if they never were in more than one."""
    found = (module.forward for module in model.modules())
    return next((each.tiles for each in found if isinstance(each, Tiled)), 0)


def _token_wise(model: PreTrainedModel) -> Iterator[nn.Module]:
    for parent in model.modules():
        is_layer = isinstance(parent, GradientCheckpointingLayer)
        for name, module in parent.named_children():
            is_norm = (is_layer or parent is model.get_decoder()) and type(module).__name__.endswith(
                "RMSNorm"
            )
            if is_norm or (is_layer and name == "mlp"):
                yield module


class Tiled:
    """A module's forward pass in pieces."""

    def __init__(self, module: nn.Module, tiles: int, *, within: Context) -> None:
        self.tiles = tiles
        self._module = module
        self._within = within

    def __call__(self, values: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        """What the module makes of its input."""
        if self.tiles == 1:
            return self.whole(values)
        values = values.contiguous()
        parameters = [each for each in self._module.parameters() if each.requires_grad]
        if not torch.is_grad_enabled() or not (values.requires_grad or parameters):
            return self.in_pieces(values)
        anchor = values.new_empty(0, requires_grad=True)
        kept = _Keep.apply(anchor, values)  # type: ignore[no-untyped-call]
        state = _Pass(self, kept, values.device)
        return cast(Tensor, _InPieces.apply(state, values, *parameters))  # type: ignore[no-untyped-call]

    def whole(self, values: Tensor) -> Tensor:
        """As the library computes it."""
        return cast(Tensor, type(self._module).forward(self._module, values))

    def in_pieces(self, values: Tensor) -> Tensor:
        """The same, a piece at a time."""
        result = torch.empty_like(values)
        for piece, into in zip(self.pieces(values), self.pieces(result), strict=True):
            into.copy_(self.whole(piece))
        return result

    def pieces(self, values: Tensor) -> Sequence[Tensor]:
        """Views of some tokens each, (1, t, D)."""
        flat = values.view(1, -1, values.shape[-1])
        return cast(Sequence[Tensor], flat.split(-(-flat.shape[1] // self.tiles), dim=1))

    def draws(self) -> bool:
        """Whether it draws at random."""
        parts = self._module.modules()
        return any(isinstance(part, nn.Dropout) and part.p > 0 and part.training for part in parts)

    def again(self) -> AbstractContextManager[object]:
        """What a piece is computed again in."""
        return self._within()


class _Pass:
    """One pass through a module: its node with the kept input, and where random numbers stood."""

    def __init__(self, tiled: Tiled, kept: Tensor, device: torch.device) -> None:
        self.tiled = tiled
        self.kept: Tensor | None = kept  # the node lives as long as its result
        self._device = device if device.type == "cuda" else None
        self._random: list[Tensor] = []
        if tiled.draws():
            self._random = [torch.get_rng_state()]
            self._random += [] if self._device is None else [torch.cuda.get_rng_state(self._device)]

    def take_kept(self) -> Tensor:
        """The input; it can be had once, as it is let go with the pass through it."""
        assert self.kept is not None and self.kept.grad_fn is not None, "it is had once"
        (values,) = cast(Any, self.kept.grad_fn).saved_tensors
        self.kept = None
        return cast(Tensor, values)

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """While open, random numbers are those of the forward pass; afterwards they go on from here."""
        with ExitStack() as stack:
            stack.enter_context(self.tiled.again())
            if self._random:
                devices = [] if self._device is None else [self._device]
                stack.enter_context(torch.random.fork_rng(devices))
                torch.set_rng_state(self._random[0])
                if self._device is not None:
                    torch.cuda.set_rng_state(self._random[1], self._device)
            yield


class _Keep(Function):
    """Keeps a tensor before anything is computed of it: where a recomputation may stop."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return values.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("nothing is computed of what it returns")


class _InPieces(Function):
    """A module's output in pieces; its backward pass computes each piece again."""

    @staticmethod
    def forward(ctx: Any, state: _Pass, values: Tensor, *parameters: Tensor) -> Tensor:
        ctx.state, ctx.parameters = state, parameters
        return state.tiled.in_pieces(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        state, parameters = ctx.state, ctx.parameters
        values, tiled = state.take_kept(), state.tiled
        leads_back = ctx.needs_input_grad[1]
        result = torch.empty_like(values) if leads_back else None
        sums = [torch.zeros_like(each, dtype=torch.float32) for each in parameters]
        parts = (values, gradient.contiguous(), values if result is None else result)
        with state.as_it_was():
            for piece, slope, into in zip(*(tiled.pieces(each) for each in parts), strict=True):
                found = _piece_gradients(tiled, piece, slope, parameters=parameters, leads_back=leads_back)
                if leads_back:
                    into.copy_(found.pop(0))
                for total, each in zip(sums, found, strict=True):
                    total += each
        return None, result, *(total.to(each.dtype) for total, each in zip(sums, parameters, strict=True))


def _piece_gradients(
    tiled: Tiled, piece: Tensor, slope: Tensor, *, parameters: Sequence[Tensor], leads_back: bool
) -> list[Tensor]:
    """Of a piece of the input, if that is wanted, and of the parameters."""
    with torch.enable_grad():
        entering = piece.detach().requires_grad_(leads_back)
        leaving = tiled.whole(entering)
    return list(torch.autograd.grad(leaving, [entering] * leads_back + [*parameters], slope))
