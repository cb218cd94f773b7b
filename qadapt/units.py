"""Bytes, seconds and tokens for people: inside the program one unit each, on the screen these words.

GiB is 1024³ bytes. Standard library only.
"""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_SUFFIX_BYTES = {
    "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024**4,
    "kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Bytes in a text such as `7.3GiB`, `800 MiB` or `16GB`.

    Raises:
        ValueError: The text is no positive number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    unit_bytes = _SUFFIX_BYTES.get(match[2].lower()) if match else None
    if match is None or unit_bytes is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not an amount of memory; write it like 7.3GiB or 800MiB")
    return round(float(match[1]) * unit_bytes)


def format_bytes(amount: float) -> str:
    """`7.31 GiB`, `800.0 MiB`, `512 B`: three or four digits, binary units."""
    magnitude = abs(amount)
    if magnitude >= GIB:
        return f"{amount / GIB:.2f} GiB"
    if magnitude >= MIB:
        return f"{amount / MIB:.1f} MiB"
    if magnitude >= KIB:
        return f"{amount / KIB:.1f} KiB"
    return f"{amount:.0f} B"


def format_seconds(seconds: float) -> str:
    """`12 s`, `3 min 05 s`, `2 h 10 min`; one decimal under ten seconds."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_count(count: float) -> str:
    """`950`, `44.0 k`, `7.24 B`: a count with three digits and the field's short letters."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            scaled = count / size
            return f"{scaled:.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f} {letter}"
    return f"{count:.0f}"
