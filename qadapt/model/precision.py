"""Which type products, adapters and frozen 16-bit parts have on a device. One table, and one measurement.

| device | compute | adapters |
|---|---|---|
| CUDA, compute capability 8.0 and newer | bf16 | bf16, updates compensated |
| CUDA before that (Turing) | fp16, loss scaled | fp32 |
| CPU where a bf16 product is clearly faster | bf16 | bf16, updates compensated |
| other CPUs | fp32 | fp32 |

Some CPUs multiply bf16 two times as fast as fp32, others half as fast: so it is measured, once for a
processor, a torch and a number of threads; a resumed run keeps its plan's.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from qadapt.errors import BadRecipe
from qadapt.measured import measured_once, processor_name

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

CLEARLY_FASTER = 1.3  # below this ratio the exacter type wins
_ROUNDS = 20  # the best of many: what is kept must not hang on what else the machine did just then


def choose_device(choice: str) -> torch.device:
    """The device of a recipe's `memory.device`.

    Raises:
        BadRecipe: CUDA is asked for and torch finds none.
    """
    has_cuda = torch.cuda.is_available()
    if choice == "cuda" and not has_cuda:
        raise BadRecipe(
            "memory.device is cuda, and torch finds no CUDA device.",
            cure="`qadapt doctor` says why; or set memory.device=cpu.",
        )
    return torch.device("cuda" if has_cuda and choice != "cpu" else "cpu")


def capability_of(device: torch.device) -> float | None:
    """Compute capability of a CUDA device, such as 8.6; None for a CPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major + minor / 10


def choose_compute_dtype(choice: str, device: torch.device) -> str:
    """The name of the type of activations and products: the recipe's, or the table's.

    Raises:
        BadRecipe: The device has no products of that type.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if choice == "bf16" and not has_bf16:
            name = torch.cuda.get_device_name(device)
            raise BadRecipe(
                f"memory.compute_dtype is bf16, which {name} computes only in emulation.",
                cure="Set memory.compute_dtype=auto (fp16 with loss scaling on this card).",
            )
        return choice if choice != "auto" else "bf16" if has_bf16 else "fp16"
    if choice == "fp16":
        raise BadRecipe(
            "memory.compute_dtype is fp16, which CPUs compute many times slower than fp32.",
            cure="Set memory.compute_dtype=auto, bf16 or fp32.",
        )
    return choice if choice != "auto" else known_cpu_dtype()


def choose_adapter_dtype(choice: str, compute_dtype: str) -> str:
    """The name of the stored type of adapters: the recipe's, or bf16 wherever products are.

    Raises:
        BadRecipe: bf16 adapters are asked for where the loss must be scaled.
    """
    if choice == "bf16" and compute_dtype == "fp16":
        raise BadRecipe(
            "adapter.dtype is bf16, but products are fp16 here, whose scaled gradients need fp32 adapters.",
            cure="Set adapter.dtype=auto.",
        )
    if choice != "auto":
        return choice
    return "bf16" if compute_dtype == "bf16" else "fp32"


def known_cpu_dtype() -> str:
    """What `measured_cpu_dtype` found on this processor, now or at an earlier start."""
    machine = f"{processor_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    return measured_once(f"dtype: {machine}", measured_cpu_dtype, answers=("bf16", "fp32"))


def measured_cpu_dtype() -> str:
    """`bf16` if this CPU multiplies it clearly faster than fp32, else `fp32`; takes some 100 ms."""
    left, right = torch.randn(512, 1024), torch.randn(1024, 1024)
    halves = left.bfloat16(), right.bfloat16()
    rounds = [(_product_seconds(left, right), _product_seconds(*halves)) for _ in range(_ROUNDS)]
    single, half = (min(seconds) for seconds in zip(*rounds, strict=True))
    return "bf16" if single > CLEARLY_FASTER * half else "fp32"


def _product_seconds(left: Tensor, right: Tensor) -> float:
    start = time.perf_counter()
    left @ right
    return time.perf_counter() - start
