"""Inputs of recomputed layers outside the device's memory: pinned host memory, or, on a CPU, a file.

While a layer goes forward its input is copied out; while it goes backward the input of the layer before comes
in. On CUDA both run on a stream of their own, and every buffer of the device belongs to the stream that
computes: it is let go only after that stream has waited for the copy, so that the allocator's order is
enough, and never more than two of these inputs lie on the device. Host buffers are kept for the next step. On
a CPU inputs are written to a temporary file that has no name (POSIX) or goes with its last handle (Windows).

Copies keep every bit. Tensors are seen by `torch.autograd.graph.saved_tensors_hooks` around a layer's
checkpoint, an attribute of the layer: what recomputes saves nothing but its input where those hooks can see
it; other layers are left alone.
The idea: `torch.autograd.graph.save_on_cpu`, which copies on the computing stream.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import GradientCheckpointingLayer, PreTrainedModel

from qadapt.cache import FULL
from qadapt.engine.host import host_buffer
from qadapt.engine.target import capability_for
from qadapt.errors import BadOutput, NoRoom

LEAST_PIECE_BYTES = 1 << 20
"""Of host memory: torch rounds a request up to a power of two, so buffers are made of such powers."""

_CHECKPOINT = "_gradient_checkpointing_func"
"""Where the library keeps the function that each recomputing layer calls. A layer's hook would not do: up
to 5.20 it runs inside that function, and again when the layer is recomputed."""

_OFFLOADED: weakref.WeakKeyDictionary[PreTrainedModel, Boundaries] = weakref.WeakKeyDictionary()


def offload_boundaries(model: PreTrainedModel) -> None:
    """From now on inputs of layers that recompute wait outside the device's memory; once is enough.

    Args:
        model: The base, before or after an adapter is attached; names and modules stay.
    """
    boundaries = _OFFLOADED.setdefault(model, Boundaries())
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            checkpoint = vars(module).get(_CHECKPOINT)
            if checkpoint is not None and not isinstance(checkpoint, _PuttingAway):
                setattr(module, _CHECKPOINT, _PuttingAway(checkpoint, boundaries))


def offloads_boundaries(model: PreTrainedModel) -> bool:
    """Whether `offload_boundaries` was called for a base."""
    return model in _OFFLOADED


def lacks_pinned_memory(model: PreTrainedModel) -> bool:
    """Whether inputs of a base's layers had to wait in ordinary memory of the host, which is slower."""
    return model in _OFFLOADED and _OFFLOADED[model].lacks_pinned


class _PuttingAway:
    """A layer's checkpoint, with its input put away."""

    def __init__(self, checkpoint: Callable[..., Any], boundaries: Boundaries) -> None:
        self._checkpoint = checkpoint
        self._boundaries = boundaries

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with saved_tensors_hooks(self._boundaries.put_away, self._boundaries.bring_back):
            return self._checkpoint(*arguments, **named)


class Place(Protocol):
    """Somewhere outside the device's memory."""

    is_beside: bool
    """Whether copies run beside computing: then one that is needed soon is fetched ahead."""

    def write(self, tensor: Tensor) -> object:
        """Begins to copy a tensor there; what is returned holds its room."""

    def read(self, room: Any, into: Tensor) -> None:
        """Begins to copy what was written into a tensor."""

    def wait(self) -> None:
        """Lets the computing stream wait for all copies that were begun."""


class Kept:
    """A tensor that is put away; `tensor` as long as it is, or is again, on the device, too."""

    def __init__(self, tensor: Tensor, room: object, before: Kept | None) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.room = room
        self.before = before
        self.tensor: Tensor | None = None


class Boundaries:
    """Puts tensors away in one order and brings them back in the other."""

    def __init__(self) -> None:
        self._place: Place | None = None
        self._moving: Kept | None = None  # held here, too, as its copy may run on after a step that failed
        self._last: weakref.ref[Kept] | None = None

    @property
    def lacks_pinned(self) -> bool:
        """Whether some of what is put away lay in ordinary memory of the host."""
        return isinstance(self._place, _Host) and self._place.lacks_pinned

    def put_away(self, tensor: Tensor) -> Kept | Tensor:
        """Begins to copy a tensor; beside computing, it stays on the device until the next call.

        An empty one, such as recomputation keeps for the graph's sake, on a CPU, is handed on as it is.
        """
        if not tensor.numel():
            return tensor
        tensor = tensor.detach().contiguous()
        place = self._place = self._place or _place_for(tensor)
        self._settle(place)
        before = None if self._last is None else self._last()
        kept = Kept(tensor, place.write(tensor), before)
        self._last = weakref.ref(kept)
        if place.is_beside:
            kept.tensor, self._moving = tensor, kept
        return kept

    def bring_back(self, kept: Kept | Tensor) -> Tensor:
        """The tensor on its device; the one that was put away before it is begun to be fetched."""
        if isinstance(kept, Tensor):
            return kept
        place = self._place
        assert place is not None, "something was put away"
        tensor = kept.tensor if kept.tensor is not None else _fetch(kept, place)
        kept.tensor = None
        self._settle(place)
        before = kept.before
        if place.is_beside and before is not None:
            before.tensor, self._moving = _fetch(before, place), before
        return tensor

    def _settle(self, place: Place) -> None:
        place.wait()
        if self._moving is not None:
            self._moving.tensor = None
            self._moving = None


def _fetch(kept: Kept, place: Place) -> Tensor:
    tensor = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
    place.read(kept.room, tensor)
    return tensor


def _place_for(tensor: Tensor) -> Place:
    if capability_for(tensor) is not None:
        return _Host(tensor.device)
    return _Nowhere() if tensor.is_meta else _File()


class _Room:
    """Host buffers for so many bytes; those that are free are taken first, and are free again with it."""

    def __init__(self, free: list[Tensor], size_bytes: int, device: torch.device) -> None:
        self.buffers: list[Tensor] = []
        self._free = free
        while size_bytes > 0:
            self.buffers.append(_room_for(free, size_bytes, device))
            size_bytes -= len(self.buffers[-1])

    def __del__(self) -> None:
        self._free += self.buffers

    def pieces(self, tensor: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Parts of these buffers and of a tensor's bytes, in pairs."""
        rest, found = tensor.view(-1).view(torch.uint8), []
        for buffer in self.buffers:
            part, rest = rest[: len(buffer)], rest[len(buffer) :]
            found.append((buffer[: len(part)], part))
        return found


def _room_for(free: list[Tensor], size_bytes: int, device: torch.device) -> Tensor:
    """The largest free buffer that is no larger than needed, else the smallest; a new one if none is free."""
    if not free:
        return host_buffer(max(LEAST_PIECE_BYTES, 1 << size_bytes.bit_length() - 1), device)
    sizes = [(len(buffer), place) for place, buffer in enumerate(free)]
    fitting = [each for each in sizes if each[0] <= size_bytes]
    return free.pop((max(fitting) if fitting else min(sizes))[1])


class _Host:
    """Pinned memory, copied on a stream of its own; on `meta` what stands for it, without a stream.

    Where the system pins no more, ordinary memory, whose copies the host waits for.
    """

    is_beside = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Tensor] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.lacks_pinned = False

    def write(self, tensor: Tensor) -> _Room:
        room = _Room(self._free, tensor.nbytes, self._device)
        self.lacks_pinned = self.lacks_pinned or not all(map(_is_quick, room.buffers))
        with self._beside():
            for buffer, part in room.pieces(tensor):
                buffer.copy_(part, non_blocking=True)
        return room

    def read(self, room: _Room, into: Tensor) -> None:
        with self._beside():
            for buffer, part in room.pieces(into):
                part.copy_(buffer, non_blocking=True)

    def wait(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _beside(self) -> AbstractContextManager[object]:
        """On the stream of the copies, after what the computing stream has been told so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)


def _is_quick(buffer: Tensor) -> bool:
    return buffer.is_meta or buffer.is_pinned()


class _File:
    """A file without a name; room that is free again is written over.

    Raises:
        NoRoom: The disk of the temporary folder is full.
        BadOutput: It cannot be written for another reason.
    """

    is_beside = False

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed with this)
        weakref.finalize(self, self._file.close)
        self._free: list[tuple[int, int]] = []
        self._end = 0

    def write(self, tensor: Tensor) -> _Region:
        region = _Region(self._free, self._take(tensor.nbytes))
        try:
            self._file.seek(region.start)
            left = _bytes_of(tensor)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            kind = NoRoom if error.errno in FULL else BadOutput
            raise kind(
                f"Inputs of layers cannot be put into the temporary folder {tempfile.gettempdir()}: {error}",
                cure="Make room there, or leave boundaries out of memory.offload.",
            ) from None
        return region

    def read(self, region: _Region, into: Tensor) -> None:
        self._file.seek(region.start)
        left = _bytes_of(into)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise EOFError("the file of boundaries ends before what was written to it")
            left = left[count:]

    def wait(self) -> None:
        pass

    def _take(self, size_bytes: int) -> tuple[int, int]:
        for place, (_, room_bytes) in enumerate(self._free):
            if room_bytes >= size_bytes:
                return self._free.pop(place)
        start, self._end = self._end, self._end + size_bytes
        return start, size_bytes


class _Region:
    """A part of a file, free again with it."""

    def __init__(self, free: list[tuple[int, int]], part: tuple[int, int]) -> None:
        self.start = part[0]
        self._free, self._part = free, part

    def __del__(self) -> None:
        self._free.append(self._part)


class _Nowhere:
    """Stands for the file where tensors have no memory."""

    is_beside = False

    def write(self, tensor: Tensor) -> None:
        pass

    def read(self, room: None, into: Tensor) -> None:
        pass

    def wait(self) -> None:
        pass


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
