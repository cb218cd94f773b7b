"""What a run is made on: versions of what it is built from, and the machine."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from typing import Any

import torch

PACKAGES = ("qadapt", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


def environment() -> dict[str, Any]:
    """Versions and machine, for the run's folder and for reports."""
    return {
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "processor": platform.machine(),
        "cuda": torch.version.cuda,
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in PACKAGES},
    }
