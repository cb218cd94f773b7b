"""Host memory beside a card: tensors brought there and back, and how a ledger knows which ones they are.

A ledger counts storages of the host as `host_bytes` and not as the device's. Where a step runs on CUDA, a
storage's device says where it lies; on `meta`, a weak registry does: what `to_host` makes is in it, and
whatever an operation makes of nothing but such tensors. On a CPU there is one memory, and nothing is moved.
Knows no stream: who copies ahead of time brings its own (`engine/boundaries.py`).

torch rounds every request for pinned memory up to a power of two (`CachingHostAllocator.h`): what is far from
one is better not pinned, or in parts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_ON_HOST: dict[int, weakref.ref[torch.UntypedStorage]] = {}
"""id of each storage on `meta` that stands for host memory; a storage lives as long as its memory."""
_IS_MAKING: ContextVar[bool] = ContextVar("is making host memory", default=False)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in ordinary host memory, complete when this returns; a CPU's tensor comes back itself."""
    if tensor.device.type == "cpu":
        return tensor
    if not tensor.is_meta:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)
    return _made_on_host(
        lambda: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    )


def host_buffer(size_bytes: int, device: torch.device) -> Tensor:
    """Bytes for copies to and from a device: pinned for a card, or not where the system gives none.

    From and to ordinary memory copies are slower, and computing waits for them; the numbers are the same.
    Where the device is `meta`, what stands for such bytes.
    """
    if device.type == "meta":
        return _made_on_host(lambda: torch.empty(size_bytes, dtype=torch.uint8, device="meta"))
    if device.type == "cpu":
        return torch.empty(size_bytes, dtype=torch.uint8)
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:  # what CUDA says then names no cause
        return torch.empty(size_bytes, dtype=torch.uint8)


def _made_on_host(make: Callable[[], Tensor]) -> Tensor:
    token = _IS_MAKING.set(True)
    try:
        host = make()
    finally:
        _IS_MAKING.reset(token)
    _mark(host)
    return host


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, in the order of the current stream and not waited for; itself if it is there."""
    if tensor.is_meta and is_on_host(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return tensor.to(device, non_blocking=True)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of what the host just made, itself if it is there; neither waits for what a card is still at."""
    is_crossing = tensor.device.type == "cpu" and device.type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if is_crossing else tensor.to(device)


def is_on_host(tensor: Tensor) -> bool:
    """Whether a tensor lies, or on `meta` stands for one that lies, in the host's memory."""
    return tensor.device.type == "cpu" or id(tensor.untyped_storage()) in _ON_HOST


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: where its parameters lie that do not stay on the host."""
    places = (parameter.device for parameter in model.parameters())
    return next((place for place in places if place.type != "cpu"), torch.device("cpu"))


def place_results(results: Any, arguments: Any) -> None:
    """Puts what an operation made on `meta` of nothing but host memory into the registry; a ledger's duty.

    Arguments without a dimension can be anywhere and say nothing.
    """
    if _IS_MAKING.get() or (_ON_HOST and _are_on_host(arguments)):
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                _mark(leaf)


def _are_on_host(arguments: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.ndim]
    return bool(tensors) and all(is_on_host(each) for each in tensors)


def _mark(tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    place = id(storage)
    if place not in _ON_HOST:
        _ON_HOST[place] = weakref.ref(storage, partial(_forget, place))


def _forget(place: int, _: weakref.ref[torch.UntypedStorage]) -> None:
    del _ON_HOST[place]
