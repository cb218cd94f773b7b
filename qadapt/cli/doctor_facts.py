"""Gathers the facts of this machine for `doctor`: loads the heavy libraries and tries them.

A broken installation shows itself in many ways (missing library, wrong driver, failed load), and the doctor's
work is to say which; so what an import or a first use raises is kept as a fact.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import psutil
import pynvml

from qadapt.hardware.cards import this_platform
from qadapt.hardware.checks import Facts, FourBit, Gpu
from qadapt.hardware.probe import gpus
from qadapt.quiet import quiet_libraries

_BROKEN = (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError, ValueError)
"""What broken native libraries raise at import or first use."""


def gather_facts(cache: Path | None = None) -> Facts:
    """Looks at this machine; takes some seconds, as torch and bitsandbytes are loaded.

    Args:
        cache: The cache to look at; by default the user's.
    """
    from qadapt.cache import cache_folder, free_bytes

    quiet_libraries()
    folder = cache or cache_folder()
    torch, failure = _torch()
    memory = psutil.virtual_memory()
    sees_gpu = torch is not None and bool(torch.cuda.is_available())
    devices = ("cpu", "cuda") if sees_gpu else ("cpu",)
    driver, driver_cuda = _driver()
    return Facts(
        python=sys.version_info[:3],
        system="wsl" if this_platform() == "wsl" else sys.platform,
        torch=str(torch.__version__) if torch is not None else None,
        torch_failure=failure,
        torch_cuda=torch.version.cuda if torch is not None else None,
        torch_architectures=tuple(torch.cuda.get_arch_list()) if torch is not None else (),
        sees_gpu=sees_gpu,
        driver=driver,
        driver_cuda=driver_cuda,
        gpus=tuple(Gpu(g.name, g.memory_bytes, g.free_bytes, g.compute_capability) for g in gpus()),
        four_bit=tuple(four_bit_round_trip(device) for device in devices) if torch is not None else (),
        threads=torch.get_num_threads() if torch is not None else 0,
        cores=_cores(),
        host_total_bytes=memory.total,
        host_available_bytes=memory.available,
        cache_folder=str(folder),
        cache_failure=_write_failure(folder),
        cache_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        cached_models=tuple(sorted(path.name for path in (folder / "models").glob("[!.]*"))),
        disk_free_bytes=free_bytes(folder),
    )


def four_bit_round_trip(device: str) -> FourBit:
    """Quantizes a small matrix to NF4 on a device and back."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return FourBit(device, None, "bitsandbytes is not installed")
    try:
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        quiet_libraries()
        values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
        packed, state = quantize_4bit(values, quant_type="nf4")
        back = dequantize_4bit(packed, state)
        return FourBit(device, float((back - values).norm() / values.norm()))
    except _BROKEN as error:
        return FourBit(device, None, _first_line(error))


def _torch() -> tuple[ModuleType | None, str | None]:
    try:
        import torch
    except _BROKEN as error:
        return None, _first_line(error)
    return torch, None


def _cores() -> int:
    """Physical cores that this process may use; 0 if the system does not say."""
    cores = psutil.cpu_count(logical=False) or 0
    if psutil.MACOS:
        return cores  # it binds no process to cores
    return min(cores, len(psutil.Process().cpu_affinity() or ()))


def _driver() -> tuple[str | None, tuple[int, int] | None]:
    """The driver's version and the newest CUDA it runs: 13020 stands for 13.2."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, None
    try:
        number = int(pynvml.nvmlSystemGetCudaDriverVersion())
        return str(pynvml.nvmlSystemGetDriverVersion()), (number // 1000, number % 1000 // 10)
    finally:
        pynvml.nvmlShutdown()


def _write_failure(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
