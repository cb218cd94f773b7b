"""How a norm keeps what enters it."""

from __future__ import annotations

from qadapt.plan.setting import Setting

FP32 = 4


def norm_copies(setting: Setting) -> bool:
    """Whether it keeps its input as a copy in fp32, not as it is (`engine/norms.py`)."""
    return setting.compute_bytes < FP32 and setting.device == "cuda"


def norm_value_bytes(setting: Setting) -> int:
    """Bytes of what it keeps of each value of its input."""
    return FP32 if norm_copies(setting) else setting.compute_bytes
