"""Where memory runs out: knows it by what libraries raise, leaves its traceback, gives back what is free.

A handler's traceback holds the frames of the failed work and so its tensors: whoever recovers inside `except`
recovers beside them. `attempt` therefore hands the failure back as a value. Knows no step and no ladder.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from qadapt.units import MIB

Result = TypeVar("Result")

SAID = (
    "can't allocate memory",  # torch's allocator on a CPU
    "not enough memory",  # the same on Windows
    "CUDA error: out of memory",  # from the runtime, past torch's allocator
    "CUDA driver error: out of memory",  # from the driver, as with expandable segments
    "Triton Error [CUDA]: out of memory",  # while a kernel is loaded
    "_STATUS_ALLOC_FAILED",  # the own workspace of cuBLAS, cuDNN, cuSOLVER
    "ALLOCATION_FAILED",  # the same of newer cuDNN
)
"""What an ordinary `RuntimeError` says when it means that memory ran out."""
NO_HANDLE = "CUBLAS_STATUS_NOT_INITIALIZED"
"""What cuBLAS says at its first product on a full card, and where CUDA itself is broken."""
HANDLE_BYTES = 256 * MIB
"""With more than this free it is not for memory that it says so."""


@dataclass(frozen=True)
class RanOut:
    """Some work that memory ran out in; `said` is the first line of the error."""

    said: str


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = str(error)
    return any(text in said for text in SAID) or (NO_HANDLE in said and _free_on_card() < HANDLE_BYTES)


def _free_on_card() -> int:
    """Bytes that the driver has left; what torch's allocator keeps unused no other library gets."""
    return torch.cuda.mem_get_info()[0]


def attempt(work: Callable[[], Result]) -> Result | RanOut:
    """What some work returns, or that memory ran out in it; then nothing of its frames is alive any more."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0] or type(error).__name__
    return RanOut(said)


def free_memory(device: torch.device) -> None:
    """Lets go of what only circles of references hold, and hands the allocator's cache back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
