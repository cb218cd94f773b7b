"""What this machine has: GPUs with their free memory, host memory, disk. No torch: NVML and psutil.

Knows no model. Without an NVIDIA driver there are simply no GPUs, and those that CUDA_VISIBLE_DEVICES hides
from CUDA are left out; its numbers are taken as the driver's, as torch does without asking CUDA (with cards
of several kinds CUDA may count the fastest first, unless CUDA_DEVICE_ORDER is PCI_BUS_ID). Under WSL NVML
answers as on Linux; under Windows the free memory is what the driver's memory manager would still give
without spilling.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qadapt.errors import BadRecipe
from qadapt.hardware.cards import CONTEXT_BYTES, CONTEXT_RANGE_BYTES, Card, find_card
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
    uuid: str = ""

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
            context_bytes=known.context_bytes if known else CONTEXT_BYTES,
            context_range_bytes=known.context_range_bytes if known else CONTEXT_RANGE_BYTES,
        )

    @staticmethod
    def _listed(name: str) -> Card | None:
        try:
            return find_card(name)
        except BadRecipe:
            return None


@dataclass(frozen=True)
class Machine:
    """A machine: GPUs in the order CUDA is given them, memory and disk in bytes.

    `hidden` is how many GPUs CUDA_VISIBLE_DEVICES hides.
    """

    devices: tuple[Device, ...]
    host_total_bytes: int
    host_available_bytes: int
    disk_free_bytes: int
    hidden: int = 0


def probe(folder: Path | None = None) -> Machine:
    """Asks the driver, the system and the disk of `folder` (default: the current one)."""
    import psutil  # here, and NVML below, as `--help` asks no machine

    memory = psutil.virtual_memory()
    every = gpus()
    devices = visible(every, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(
        devices=devices,
        host_total_bytes=memory.total,
        host_available_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(folder or Path.cwd()).free,
        hidden=len(every) - len(devices),
    )


def visible(devices: Sequence[Device], wanted: str | None) -> tuple[Device, ...]:
    """The devices that CUDA shows to a program, in its order.

    CUDA reads up to the first entry that names no device, and shows nothing if one is named twice.

    Args:
        devices: All of them, in the driver's order.
        wanted: The value of CUDA_VISIBLE_DEVICES: numbers, or beginnings of UUIDs (`GPU-8932f937`), with
            commas between them; None if it is not set.
    """
    if wanted is None:
        return tuple(devices)
    found: list[Device] = []
    for entry in (part.strip() for part in wanted.split(",")):
        named = [device for device in devices if _is_named(device, entry)]
        if len(named) != 1:
            break
        if named[0] in found:
            return ()
        found += named
    return tuple(found)


def _is_named(device: Device, entry: str) -> bool:
    if entry.isdecimal():
        return device.index == int(entry)
    return entry.startswith("GPU-") and device.uuid.startswith(entry)


def gpus() -> tuple[Device, ...]:
    """The NVIDIA GPUs of this machine, hidden ones too, in the driver's order; none without a driver."""
    import pynvml

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
    import pynvml

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
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
    )
