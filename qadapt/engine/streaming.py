"""Frozen layers streamed from the host: the card holds the weights of two decoder layers instead of all.

A layer's frozen matrices, with their quantization constants, lie one after another in one row of pinned host
memory. Before the layer runs, forward or recomputed in the backward pass, the row is copied to one of two
buffers on the card and the layer's tensors are views of that buffer; while it runs, the next row is copied
into the other one, on a stream of its own. A layer that is not in a buffer has its tensors on the host: what
reads them there reads the right numbers.

Needs every layer recomputed: a layer's backward pass finds the weights that its recomputation brought; but a
frozen product may read its weight before anything is recomputed, so the gradient of a layer's output brings
them, too. Layers are not wrapped, only hooked. Knows no model, no adapter. The idea of two buffers: L2L
(arXiv:2002.05645).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn

from qadapt.engine.host import host_buffer

ALIGNED_BYTES = 512
"""Where each tensor of a row begins: as CUDA's allocator would place it, which is enough for every kernel."""
BUFFERS = 2


def stream_layers(layers: Sequence[nn.Module], device: torch.device) -> None:
    """Moves the frozen matrices of layers to the host, from where each comes just before it runs.

    Args:
        layers: In the order in which they run; what they hold besides stays where it is.
        device: Where they run. On a CPU the same is done within one memory; on `meta` nothing is copied.
    """
    stream = _LayerStream([_packed(layer, device) for layer in layers], device)
    for place, layer in enumerate(layers):
        for part in layer.children():  # a layer's own hooks do not see it recomputed
            part.register_forward_pre_hook(partial(_enter, stream, place))
        layer.register_forward_hook(partial(_enter_with_gradient, stream, place))


def is_pinned(layers: Sequence[nn.Module]) -> bool:
    """Whether what lies on the host of streamed layers is pinned; if not, each copy is waited for."""
    return all(piece.tensor.is_pinned() or piece.tensor.is_cuda for each in layers for piece in _pieces(each))


@dataclass(frozen=True)
class _Piece:
    """A tensor that a layer holds, and how another is put into its place."""

    put: Callable[[Tensor], None]
    tensor: Tensor


@dataclass(frozen=True)
class _Packed:
    """A layer's row on the host, and its tensors as views of it, each with its place there."""

    row: Tensor  # bytes
    pieces: tuple[tuple[int, _Piece], ...]

    def lie_in(self, row: Tensor) -> None:
        """Makes the layer's tensors views of a row that holds the same bytes."""
        for start, piece in self.pieces:
            piece.put(_view(row, start, like=piece.tensor))


class _LayerStream:
    def __init__(self, packed: Sequence[_Packed], device: torch.device) -> None:
        self._packed = packed
        longest = max(len(each.row) for each in packed)
        count = min(BUFFERS, len(packed))
        self._buffers = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(count)]
        self._held: list[int | None] = [None] * count  # the layer in each buffer
        self._copier = _SideCopier(device) if device.type == "cuda" else _Copier()
        self._last = -1
        for place in range(count):
            self._bring(place, beside=place - 1)

    def enter(self, place: int, *, is_training: bool) -> None:
        """Makes sure that a layer's weights are there, and begins with those that are wanted next."""
        if place == self._last:
            return
        self._bring(place, beside=self._last)
        self._copier.wait(self._held.index(place))
        following = self._following(place, is_training=is_training)
        self._last = place
        self._bring(following, beside=place)

    def _following(self, place: int, *, is_training: bool) -> int:
        """The layer after this one: upwards in a forward pass, downwards in a backward pass.

        After the last layer a training pass turns round; generation and evaluation begin anew.
        """
        if place not in (0, self._last + 1):
            return place - 1
        if place + 1 < len(self._packed):
            return place + 1
        return max(0, place - 1) if is_training else 0

    def _bring(self, place: int, *, beside: int) -> None:
        """Begins to copy a layer into a buffer, unless it is in one; not into that of the layer beside it."""
        if place in self._held:
            return
        number = next(number for number, held in enumerate(self._held) if held is None or held != beside)
        before = self._held[number]
        if before is not None:
            self._packed[before].lie_in(self._packed[before].row)
        packed, buffer = self._packed[place], self._buffers[number]
        self._copier.copy(number, packed.row, buffer[: len(packed.row)])
        packed.lie_in(buffer)
        self._held[number] = place


class _Copier:
    """Copies in the order of computing."""

    def copy(self, _: int, row: Tensor, buffer: Tensor) -> None:
        buffer.copy_(row)

    def wait(self, _: int) -> None:
        pass


class _SideCopier(_Copier):
    """Copies beside computing, on a stream of its own.

    A copy waits for all that was asked of the card before it. The layer whose buffer it overwrites is among
    that: in a forward pass it has run, and in a backward pass the next layer down is recomputed only when the
    gradient of its output is there, which is the last thing that the layer above it makes with its weights.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._copied = [torch.cuda.Event() for _ in range(BUFFERS)]

    def copy(self, number: int, row: Tensor, buffer: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(row, non_blocking=True)
            self._copied[number].record(self._stream)

    def wait(self, number: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._copied[number])


def _enter(stream: _LayerStream, place: int, part: nn.Module, _: object) -> None:
    stream.enter(place, is_training=part.training)


def _enter_with_gradient(stream: _LayerStream, place: int, _: nn.Module, __: object, output: object) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    if hidden.requires_grad:
        hidden.register_hook(lambda _: stream.enter(place, is_training=True))


def _packed(layer: nn.Module, device: torch.device) -> _Packed:
    places, size = [], 0
    for piece in list(_pieces(layer)):
        places.append((size, piece))
        size += -(-piece.tensor.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES
    row, packed = host_buffer(size, device), []
    for start, piece in places:
        view = _view(row, start, like=piece.tensor)
        view.copy_(piece.tensor)
        piece.put(view)
        packed.append((start, _Piece(piece.put, view)))
    return _Packed(row, tuple(packed))


def _view(row: Tensor, start: int, *, like: Tensor) -> Tensor:
    return row[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _pieces(layer: nn.Module) -> Iterator[_Piece]:
    """The frozen matrices of a layer, and what goes with those in 4 bits."""
    for parameter in layer.parameters():
        if parameter.requires_grad or parameter.ndim < 2:
            continue
        yield _Piece(partial(_put_data, parameter), parameter.data)
        if isinstance(parameter, Params4bit):
            yield from _constants(parameter.quant_state)


def _constants(state: QuantState) -> Iterator[_Piece]:
    held = vars(state)
    for name, value in list(held.items()):
        if isinstance(value, Tensor):
            yield _Piece(partial(held.__setitem__, name), value)
    if state.state2 is not None:
        yield from _constants(state.state2)


def _put_data(parameter: nn.Parameter, tensor: Tensor) -> None:
    parameter.data = tensor
