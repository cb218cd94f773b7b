"""The ledger: live bytes by category, at every operation of a step, on CPU, CUDA and `meta` alike.

A dispatch mode sees every tensor that an operation makes and follows its storage by weak reference, so what
counts is what is really alive. Beside it stand what kernels take inside an operation (`inside`, from
`engine/target.py`) and what was there before (`hold`). Where a tensor is made decides its category: in the
forward pass `activations`, around the head `loss`, in the backward pass `temporary`; inputs of recomputed
layers and gradients of parameters are told apart by hooks.

What lies in host memory beside a card is no byte of the device and counts by itself (`engine/host.py`).

Not seen: what a kernel allocates inside and `inside` does not know, memory outside the framework's allocator.
The idea of counting by dispatch: `torch.utils._python_dispatch.TorchDispatchMode`, as in
`torch.distributed._tools.mem_tracker`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qadapt.engine.host import is_on_host, place_results
from qadapt.plan.categories import CATEGORIES
from qadapt.plan.trace import TraceEvent

Inside = Callable[[Any, tuple[Any, ...], dict[str, Any]], int]
"""(operation, arguments, keyword arguments) → bytes its kernel takes besides its results."""
_Forget = Callable[[weakref.ref[torch.UntypedStorage]], None]

BORN = {
    "load": "unquantized",
    "forward": "activations",
    "recompute": "activations",
    "loss": "loss",
    "evaluation": "activations",
    "evaluation loss": "loss",
}
"""Phase → category of what is made in it; `temporary` in all others."""


@dataclass(frozen=True)
class Peak:
    """The highest moment: bytes in all and by category, the phase, and the module that ran."""

    bytes: int
    categories: dict[str, int]
    phase: str
    module: str


class Ledger(TorchDispatchMode):
    """Counts live bytes while it is on.

    Args:
        step: What a tensor's bytes are rounded up to: 512 as CUDA's allocator does, 1 on a CPU.
        inside: What kernels take inside operations; None counts nothing.
        budget_bytes: Above it, `torch.OutOfMemoryError` is raised as a card would raise it.
        is_recording: Keep the trace of every allocation and release.
        has_host_apart: The step runs on CUDA: a CPU's tensors are the host's, and count as `host_bytes` only.
    """

    def __init__(
        self,
        *,
        step: int = 1,
        inside: Inside | None = None,
        budget_bytes: int | None = None,
        is_recording: bool = False,
        has_host_apart: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "outside"
        self.module = ""
        self.trace: list[TraceEvent] = []
        self.live = dict.fromkeys(CATEGORIES, 0)
        self.live_bytes = 0
        self.host_bytes = 0  # alive in host memory beside the device, and the most there were
        self.host_peak_bytes = 0
        self.phase_bytes: dict[str, int] = {}
        self._step = step
        self._inside = inside
        self._budget_bytes = budget_bytes
        self._is_recording = is_recording
        self._has_host_apart = has_host_apart
        self._blocks: dict[int, _Block] = {}  # id of a storage, which lives as long as its memory
        self._peak_bytes = 0
        self._peak: tuple[dict[str, int], str, str] = (dict(self.live), "outside", "")
        self._next_key = 0
        self.is_paused = False  # while it is, nothing that is made counts
        self._places: dict[int, int] = {}  # key of a block → index of its allocation in the trace

    @property
    def peak(self) -> Peak:
        """The highest moment since the start or the last `reset_peak`."""
        categories, phase, module = self._peak
        return Peak(self._peak_bytes, dict(categories), phase, module)

    def reset_peak(self) -> None:
        """Starts anew from what is alive now."""
        self._peak_bytes = 0
        self.phase_bytes = {}
        self._look()

    def hold(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made before under a category; each storage once."""
        for tensor in tensors:
            self._add(tensor, category)
        self._look()

    def tell_apart(self, category: str, tensor: Tensor) -> None:
        """Moves a tensor's storage to another category, as if it had been made in it."""
        block = self._blocks.get(id(tensor.untyped_storage()))
        if block is not None and not block.is_on_host:
            self.live[block.category] -= block.size_bytes
            self.live[category] += block.size_bytes
            block.category = category
            if self._is_recording and block.key:
                place = self._places[block.key]
                self.trace[place] = self.trace[place]._replace(category=category)

    def keep(self, category: str, size_bytes: int) -> None:
        """Counts bytes that no tensor shows and that stay, such as a library's workspace."""
        self._count(category, self._round(size_bytes))
        self._record(size_bytes, category)
        self._look()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase; the one before comes back at its end."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.is_paused:
            return func(*args, **(kwargs or {}))
        inside_bytes = 0 if self._inside is None else self._inside(func, args, kwargs or {})
        key = self._begin_inside(inside_bytes) if inside_bytes else 0  # before the results, as kernels do
        try:
            result = func(*args, **(kwargs or {}))
            place_results(result, (args, kwargs))
            if self._count_new(result) or inside_bytes:
                self._look()
        finally:  # also where memory ran out: a smaller step may follow
            if inside_bytes:
                self._release(key, self._round(inside_bytes), "temporary")
        return result

    def _count_new(self, result: Any) -> bool:
        """Counts the storages an operation made; True if there are any."""
        category = BORN.get(self._phase_now(), "temporary")
        is_new = False
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):  # a tree takes its time
            if isinstance(leaf, Tensor):
                is_new = self._add(leaf, category) or is_new
        return is_new

    def _phase_now(self) -> str:
        """The phase; within a backward pass only what is computed again builds a graph."""
        return "recompute" if self.phase == "backward" and torch.is_grad_enabled() else self.phase

    def _begin_inside(self, size_bytes: int) -> int:
        self._check_budget(self._round(size_bytes))
        self._count("temporary", self._round(size_bytes))
        return self._record(size_bytes, "temporary")

    def _add(self, tensor: Tensor, category: str) -> bool:
        """Counts a tensor's storage unless it is known; True if it was not, and is the device's."""
        storage = tensor.untyped_storage()
        place = id(storage)
        if place in self._blocks:
            return False
        size_bytes = storage.nbytes()
        if is_on_host(tensor) and (tensor.is_meta or self._has_host_apart):
            self._blocks[place] = _Block(storage, self._forget, size_bytes, category, is_on_host=True)
            self.host_bytes += size_bytes
            self.host_peak_bytes = max(self.host_peak_bytes, self.host_bytes)
            return False
        rounded_bytes = self._round(size_bytes)
        self._check_budget(rounded_bytes)
        key = self._record(size_bytes, category) if rounded_bytes else 0
        self._blocks[place] = _Block(storage, self._forget, rounded_bytes, category, key=key)
        self._count(category, rounded_bytes)
        return True

    def _forget(self, block: weakref.ref[torch.UntypedStorage]) -> None:
        assert isinstance(block, _Block)
        del self._blocks[block.place]
        if block.is_on_host:
            self.host_bytes -= block.size_bytes
        elif block.size_bytes:
            self._release(block.key, block.size_bytes, block.category)

    def _release(self, key: int, size_bytes: int, category: str) -> None:
        self._count(category, -size_bytes)
        if self._is_recording:
            self.trace.append(TraceEvent(key, 0, category, self._phase_now()))

    def _record(self, size_bytes: int, category: str) -> int:
        self._next_key += 1
        if self._is_recording:
            self._places[self._next_key] = len(self.trace)
            self.trace.append(TraceEvent(self._next_key, size_bytes, category, self._phase_now()))
        return self._next_key

    def _count(self, category: str, size_bytes: int) -> None:
        self.live[category] += size_bytes
        self.live_bytes += size_bytes

    def _round(self, size_bytes: int) -> int:
        return -(-size_bytes // self._step) * self._step

    def _look(self) -> None:
        phase = self._phase_now()
        if self.live_bytes > self.phase_bytes.get(phase, 0):
            self.phase_bytes[phase] = self.live_bytes
        if self.live_bytes > self._peak_bytes:
            self._peak_bytes = self.live_bytes
            self._peak = (dict(self.live), phase, self.module)

    def _check_budget(self, size_bytes: int) -> None:
        if self._budget_bytes is not None and self.live_bytes + size_bytes > self._budget_bytes:
            raise torch.OutOfMemoryError(
                f"The ledger's budget is passed: {self.live_bytes:,} bytes are live, {size_bytes:,} more are "
                f"asked for, {self._budget_bytes:,} are allowed."
            )


class _Block(weakref.ref[torch.UntypedStorage]):
    """A storage that is alive.

    One small object for each, as `weakref.KeyedRef` is: thousands are alive at once, and with every few
    hundred thousand objects Python's garbage collection looks through all of the process, for a second.
    """

    __slots__ = ("category", "is_on_host", "key", "place", "size_bytes")

    def __new__(cls, storage: torch.UntypedStorage, forget: _Forget, *_: Any, **__: Any) -> _Block:
        return super().__new__(cls, storage, forget)

    def __init__(
        self,
        storage: torch.UntypedStorage,
        forget: _Forget,
        size_bytes: int,
        category: str,
        *,
        key: int = 0,
        is_on_host: bool = False,
    ) -> None:
        self.place = id(storage)
        self.size_bytes = size_bytes
        self.category = category
        self.key = key
        self.is_on_host = is_on_host
