"""What this machine has: GPUs with their free memory, host memory, disk. No torch: NVML and psutil.

Knows no model. Without an NVIDIA driver there are simply no GPUs. Under WSL NVML answers as on Linux; under
Windows the free memory is what the driver's memory manager would still give without spilling.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import pynvml

from qadapt.errors import BadRecipe
from qadapt.hardware.cards import Card, find_card
from qadapt.units import GIB


@dataclass(frozen=True)
class Device:
    """One GPU now: `used_bytes` is the desktop's and other processes' share."""

    index: int
    name: str
    memory_bytes: int
    free_bytes: int
    compute_capability: float
    driver: str
    temperature_celsius: int | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes that are taken before qadapt starts."""
        return self.memory_bytes - self.free_bytes

    @property
    def card(self) -> Card:
        """This GPU as a card: with the catalogue's speeds where its name is listed, else without."""
        known = self._listed(f"{self.name} {round(self.memory_bytes / GIB)}GB") or self._listed(self.name)
        return Card(
            name=self.name,
            memory_bytes=self.memory_bytes,
            compute_capability=self.compute_capability,
            has_bf16=self.compute_capability >= 8,
            bandwidth_gb=known.bandwidth_gb if known else None,
            tflops_spec=known.tflops_spec if known else None,
            tflops_measured=known.tflops_measured if known else None,
        )

    @staticmethod
    def _listed(name: str) -> Card | None:
        try:
            return find_card(name)
        except BadRecipe:
            return None


@dataclass(frozen=True)
class Machine:
    """A machine: GPUs in NVML's order, memory and disk in bytes."""

    devices: tuple[Device, ...]
    host_total_bytes: int
    host_available_bytes: int
    disk_free_bytes: int


def probe(folder: Path | None = None) -> Machine:
    """Asks the driver, the system and the disk of `folder` (default: the current one)."""
    memory = psutil.virtual_memory()
    return Machine(
        devices=gpus(),
        host_total_bytes=memory.total,
        host_available_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(folder or Path.cwd()).free,
    )


def gpus() -> tuple[Device, ...]:
    """The NVIDIA GPUs of this machine; none without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        return tuple(_device(index, driver) for index in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _device(index: int, driver: str) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    try:
        temperature = int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
    except pynvml.NVMLError:  # virtual GPUs have no sensor
        temperature = None
    return Device(
        index=index,
        name=str(pynvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(memory.total),
        free_bytes=int(memory.free),
        compute_capability=major + minor / 10,
        driver=driver,
        temperature_celsius=temperature,
    )
