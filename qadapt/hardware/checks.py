"""What `doctor` concludes: facts of a machine in, findings out, each problem with its cure. No torch.

Pure: the facts are gathered elsewhere (`cli/doctor_facts.py`), so every conclusion is a test without the
machine. CUDA's rules: a build runs on a driver of the same CUDA major version or a later one, on cards that
it has code for (docs.nvidia.com/deploy/cuda-compatibility); `torch.cuda.get_arch_list()` lists those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qadapt.units import GIB, format_bytes

OLDEST_PYTHON = (3, 10)
_WANTED_DISK_BYTES = 30 * GIB
_LEAST_DISK_BYTES = GIB
_LEAST_HOST_BYTES = 4 * GIB
_LARGEST_NF4_ERROR = 0.15
_TAKEN_SHARE = 0.15


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it."""

    name: str
    memory_bytes: int
    free_bytes: int
    compute_capability: float


@dataclass(frozen=True)
class FourBit:
    """A tiny NF4 round trip on a device: its relative error (about 0.09), or why there was none."""

    device: str
    relative_error: float | None
    failure: str | None = None


@dataclass(frozen=True)
class Facts:
    """What was found on a machine.

    Attributes:
        python: Version.
        system: `linux`, `win32`, `darwin`, or `wsl`: Linux within Windows.
        torch: Version; None if it cannot be imported.
        torch_failure: Why it cannot.
        torch_cuda: The CUDA version torch was built with; None for a CPU build.
        torch_architectures: The GPU architectures the build has code for (`sm_86`).
        sees_gpu: Whether torch can use a GPU.
        driver: Version of the NVIDIA driver; None without one.
        driver_cuda: The newest CUDA version the driver runs.
        gpus: The driver's GPUs.
        four_bit: One round trip per device that torch can use.
        threads: On so many torch computes an operation; 0 without torch.
        cores: Physical cores, of those that this process may use; 0 if the system does not say.
        host_total_bytes: Memory of the machine.
        host_available_bytes: What is free of it.
        cache_folder: Where qadapt keeps models.
        cache_failure: Why it cannot be written.
        cache_bytes: What it holds.
        cached_models: Names of the models converted in it.
        disk_free_bytes: Free on its disk.
    """

    python: tuple[int, int, int]
    system: str
    torch: str | None
    torch_failure: str | None
    torch_cuda: str | None
    torch_architectures: tuple[str, ...]
    sees_gpu: bool
    driver: str | None
    driver_cuda: tuple[int, int] | None
    gpus: tuple[Gpu, ...]
    four_bit: tuple[FourBit, ...]
    threads: int
    cores: int
    host_total_bytes: int
    host_available_bytes: int
    cache_folder: str
    cache_failure: str | None
    cache_bytes: int
    cached_models: tuple[str, ...]
    disk_free_bytes: int


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table; a problem that `blocks` means that nothing can be trained."""

    subject: str
    value: str
    level: Literal["good", "note", "problem", "blocks"] = "good"
    cure: str | None = None


def can_train(findings: tuple[Finding, ...]) -> bool:
    """Whether nothing that was found keeps this machine from training, be it on the CPU."""
    return all(finding.level != "blocks" for finding in findings)


def findings(facts: Facts) -> tuple[Finding, ...]:
    """What the facts mean for training, in the order of the table."""
    return (
        _python(facts),
        _torch(facts),
        *_cuda(facts),
        *(_gpu(gpu, facts) for gpu in facts.gpus),
        *(_four_bit(trip) for trip in facts.four_bit),
        *_threads(facts),
        _host(facts),
        _disk(facts),
        _cache(facts),
        *_system(facts),
    )


def cuda_build_command(torch_version: str) -> str:
    """The command that brings the CUDA build of torch that fits this machine's driver.

    uv knows where those builds are and picks one by the driver. Without `--reinstall-package` it would take
    the CPU build of the same version as good enough (tried with uv 0.13).
    """
    version = torch_version.partition("+")[0]
    return (
        "python -m pip install uv, then "
        f"python -m uv pip install torch=={version} --torch-backend=auto --reinstall-package torch"
    )


def _python(facts: Facts) -> Finding:
    version = ".".join(map(str, facts.python))
    if facts.python[:2] < OLDEST_PYTHON:
        return Finding(
            "Python", version, "blocks", "Install Python 3.10 or newer and make a new .venv with it."
        )
    return Finding("Python", version)


def _torch(facts: Facts) -> Finding:
    if facts.torch is None:
        return Finding(
            "torch",
            facts.torch_failure or "not installed",
            "blocks",
            "Install qadapt anew into a fresh .venv: `python -m pip install .` in its folder.",
        )
    build = f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "CPU"
    return Finding("torch", f"{facts.torch}, {build} build")


def _cuda(facts: Facts) -> Iterator[Finding]:
    """The driver against the build of torch."""
    if facts.torch is None:
        return
    if facts.driver is None:
        yield Finding(
            "NVIDIA driver", "none: trains on the CPU, which suits small models", "note", _no_driver(facts)
        )
        return
    newest = ".".join(map(str, facts.driver_cuda)) if facts.driver_cuda else "unknown"
    value = f"{facts.driver}, runs CUDA up to {newest}"
    if facts.torch_cuda is None:
        yield Finding(
            "NVIDIA driver",
            f"{value}; but this torch is a CPU build and leaves the GPU idle",
            "problem",
            f"Get the CUDA build: {cuda_build_command(facts.torch)}",
        )
    elif facts.driver_cuda is not None and facts.driver_cuda[0] < int(facts.torch_cuda.partition(".")[0]):
        yield Finding(
            "NVIDIA driver",
            f"{value}; too old for this torch, built with CUDA {facts.torch_cuda}",
            "problem",
            f"Update the NVIDIA driver, or get the build for it: {cuda_build_command(facts.torch)}",
        )
    elif not facts.sees_gpu:
        yield Finding(
            "NVIDIA driver",
            f"{value}; but torch cannot use the GPU",
            "problem",
            "Restart the machine after a driver update; see that CUDA_VISIBLE_DEVICES does not hide the GPU.",
        )
    else:
        yield Finding("NVIDIA driver", value)


def _no_driver(facts: Facts) -> str:
    if facts.system == "darwin":
        return "On a Mac only the CPU is used."
    return "If there is an NVIDIA card in this machine, install its driver."


def _gpu(gpu: Gpu, facts: Facts) -> Finding:
    half = "bf16" if gpu.compute_capability >= 8 else "no bf16: fp16 with loss scaling"
    value = f"{gpu.name}, {format_bytes(gpu.free_bytes)} of {format_bytes(gpu.memory_bytes)} free, {half}"
    built_for = [
        int(name[3:].rstrip("af")) / 10 for name in facts.torch_architectures if name.startswith("sm_")
    ]
    if built_for and gpu.compute_capability < min(built_for):
        return Finding(
            "GPU",
            f"{value}; this torch has no code for compute capability {gpu.compute_capability}, "
            f"only from {min(built_for)}",
            "problem",
            "Train on the CPU, or on a newer card.",
        )
    taken = gpu.memory_bytes - gpu.free_bytes
    if taken > _TAKEN_SHARE * gpu.memory_bytes:
        return Finding(
            "GPU",
            value,
            "note",
            f"Other programs hold {format_bytes(taken)}: close browsers and games, or put the screen on "
            "the other graphics chip.",
        )
    return Finding("GPU", value)


def _four_bit(trip: FourBit) -> Finding:
    subject = f"bitsandbytes, {trip.device}"
    if trip.relative_error is None:
        return Finding(
            subject,
            f"no 4-bit round trip: {trip.failure}",
            "blocks",
            "Install it anew: `python -m pip install --force-reinstall --no-deps bitsandbytes`.",
        )
    value = f"NF4 round trip, relative error {trip.relative_error:.3f}"
    if trip.relative_error > _LARGEST_NF4_ERROR:
        return Finding(
            subject,
            f"{value}; 0.09 is right",
            "blocks",
            "This build computes wrongly here: install another version of bitsandbytes.",
        )
    return Finding(subject, value)


def _threads(facts: Facts) -> Iterator[Finding]:
    if not (facts.threads and facts.cores):
        return
    threads = "1 thread" if facts.threads == 1 else f"{facts.threads} threads"
    value = f"torch computes on {threads}; the cores it may use: {facts.cores}"
    if facts.threads == facts.cores:
        yield Finding("Threads", value)
    elif facts.threads > facts.cores:
        yield Finding(
            "Threads",
            value,
            "note",
            f"A core's second thread wins next to nothing in products: OMP_NUM_THREADS={facts.cores} leaves "
            "it to other programs.",
        )
    else:
        yield Finding(
            "Threads",
            value,
            "note",
            "On a CPU training is slower so: look at OMP_NUM_THREADS where you start it.",
        )


def _host(facts: Facts) -> Finding:
    value = f"{format_bytes(facts.host_available_bytes)} of {format_bytes(facts.host_total_bytes)} free"
    if facts.host_available_bytes < _LEAST_HOST_BYTES:
        return Finding(
            "Memory", value, "problem", "Close other programs: loading a 7B model wants about 4 GiB."
        )
    return Finding("Memory", value)


def _disk(facts: Facts) -> Finding:
    value = f"{format_bytes(facts.disk_free_bytes)} free where the cache is"
    if facts.disk_free_bytes < _LEAST_DISK_BYTES:
        return Finding("Disk", value, "blocks", "Free at least 1 GiB; a 7B model and its export want 30 GiB.")
    if facts.disk_free_bytes < _WANTED_DISK_BYTES:
        return Finding("Disk", value, "problem", "A 7B model is 15 GiB to fetch, and as much to export.")
    return Finding("Disk", value)


def _cache(facts: Facts) -> Finding:
    held = ", ".join(facts.cached_models) if facts.cached_models else "no models"
    value = f"{facts.cache_folder}: {format_bytes(facts.cache_bytes)}, {held}"
    if facts.cache_failure is not None:
        return Finding(
            "Cache",
            f"{value}; cannot be written: {facts.cache_failure}",
            "blocks",
            "Make it writable for you.",
        )
    return Finding("Cache", value)


def _system(facts: Facts) -> Iterator[Finding]:
    if facts.system in ("win32", "wsl"):
        yield Finding(
            "Windows",
            "the driver may spill a full card into host memory, many times slower, instead of failing",
            "note",
            "NVIDIA Control Panel, Manage 3D settings: set CUDA - Sysmem Fallback Policy to "
            "Prefer No Sysmem Fallback.",
        )
