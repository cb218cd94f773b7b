"""The catalogue of cards: what their driver shows, what a step may use of it, how fast they are.

`cards.json` holds public figures: memory as nvidia-smi shows it (`is_captured`: seen in a capture, else the
vendor's), dense 16-bit TFLOPS from the vendor and from a measured matrix product (fp16 on Turing, which has
no bf16), bandwidth in GB/s, and, where somebody has published or measured it, what a CUDA context takes
(`context_mib`: low, usual, high; `context_source`). The high end of a published one is its figure and
100 MiB assumed for the kernels of libraries that were not loaded there; seen on an H100 with torch 2.11 and
CUDA 13.0 are 276 MiB more by the end of a first step, and 90 more after many kinds of steps. Laptop figures
depend on the power limit. Knows no model and no plan.
"""

from __future__ import annotations

import difflib
import json
import platform
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from qadapt.errors import BadRecipe
from qadapt.units import MIB, parse_bytes

Platform = Literal["headless", "linux", "windows", "wsl"]
"""What shares the card: nothing, a Linux desktop, or Windows' one, which is there under WSL, too."""

CONTEXT_BYTES = 300 * MIB
"""A CUDA context with lazily loaded kernels: a default; seen are 140 MiB (T4) to 982 (H100 under CUDA 13)."""
CONTEXT_RANGE_BYTES = (140 * MIB, 500 * MIB)

DRIVER_BYTES: dict[Platform, int] = {
    "headless": 448 * MIB, "linux": 448 * MIB, "windows": 64 * MIB, "wsl": 64 * MIB,
}  # fmt: skip
"""What the driver keeps of the memory it shows: assumed; torch sees 190 to 540 MiB less on Linux, 0 to 70 on
Windows and under WSL."""
DESKTOP_BYTES: dict[Platform, int] = {
    "headless": 0, "linux": 512 * MIB, "windows": 1280 * MIB, "wsl": 1280 * MIB,
}  # fmt: skip
"""What a desktop takes before you start: assumed; seen are 268 to 860 MiB on Linux, 0.7 to 1.5 GiB on
Windows."""
SPILLING: frozenset[Platform] = frozenset({"windows", "wsl"})
"""Where the driver's memory manager (WDDM) may put what exceeds the card into host memory: many times slower,
and no error, unless the driver is set not to."""

RUNTIME_BYTES = {"cpu": 400 * MIB, "cuda": 1300 * MIB}
"""Host memory of Python with torch, transformers, peft and bitsandbytes imported: measured for the CPU build,
assumed for CUDA builds."""


@dataclass(frozen=True)
class Card:
    """A graphics card.

    `memory_bytes` is what the driver shows; speeds are None where nobody has published them. `context_bytes`
    is what a CUDA context takes, `context_range_bytes` its range.
    """

    name: str
    memory_bytes: int
    compute_capability: float | None = None
    has_bf16: bool = True
    bandwidth_gb: float | None = None
    tflops_spec: float | None = None
    tflops_measured: float | None = None
    context_bytes: int = CONTEXT_BYTES
    context_range_bytes: tuple[int, int] = CONTEXT_RANGE_BYTES

    @property
    def tflops(self) -> float | None:
        """Dense 16-bit TFLOPS of a matrix product: measured, else the vendor's, else unknown."""
        return self.tflops_measured or self.tflops_spec

    def free_bytes(self, platform: Platform) -> int:
        """What a process can take, its CUDA context included, by the assumptions above."""
        return self.memory_bytes - DRIVER_BYTES[platform] - DESKTOP_BYTES[platform]


def this_platform() -> Platform:
    """What to assume about a card that is not in this machine: a desktop of this machine's kind on it."""
    if sys.platform == "win32":
        return "windows"
    return "wsl" if "microsoft" in platform.release().lower() else "linux"


@cache
def cards() -> tuple[Card, ...]:
    """Every card of the catalogue, gaming cards first."""
    text = (Path(__file__).parent / "cards.json").read_text(encoding="utf-8")
    return tuple(_card(values) for values in json.loads(text))


def _card(values: dict[str, Any]) -> Card:
    default = (CONTEXT_RANGE_BYTES[0] // MIB, CONTEXT_BYTES // MIB, CONTEXT_RANGE_BYTES[1] // MIB)
    low, usual, high = values.get("context_mib", default)
    return Card(
        name=values["name"],
        memory_bytes=values["memory_mib"] * MIB,
        compute_capability=values["compute_capability"],
        has_bf16=values["has_bf16"],
        bandwidth_gb=values["bandwidth_gb"],
        tflops_spec=values["tflops_spec"],
        tflops_measured=values["tflops_measured"],
        context_bytes=usual * MIB,
        context_range_bytes=(low * MIB, high * MIB),
    )


def find_card(name: str) -> Card:
    """The card of a name such as `RTX 4060`, `4060 8GB`, `4060 Ti 16GB`, `rtx4060 laptop`, `A100 80GB`.

    Case, blanks and the words NVIDIA, GeForce, RTX do not matter. The amount of memory may be left out where
    one card has the rest of the name; a laptop card is only meant when the name says so.

    Raises:
        BadRecipe: No card, or more than one, has that name.
    """
    wanted = _words(name)
    found = [card for card in cards() if wanted and _means(wanted, _words(card.name))]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(card.name for card in found)
        raise BadRecipe(
            f"{name!r} may be several cards: {listed}.", cure="Give the whole name of one of them."
        )
    keys = {_key(card.name): card.name for card in reversed(cards())}
    close = difflib.get_close_matches(_key(name), keys, n=1, cutoff=0.5)
    hint = f"Did you mean `{keys[close[0]]}`? " if close else ""
    raise BadRecipe(
        f"There is no card {name!r} in the catalogue.",
        cure=f"{hint}`qadapt estimate --cards` lists them; or give its free memory: --vram 7.3GiB.",
    )


def card_of_memory(text: str) -> Card:
    """A card of which only the free memory is known, as `--vram 7.3GiB` gives it.

    Raises:
        BadRecipe: The text is no amount of memory.
    """
    try:
        free = parse_bytes(text)
    except ValueError as error:
        raise BadRecipe(f"--vram: {error}.", cure="Give what is free, such as --vram 7.3GiB.") from None
    return Card(name=f"a card with {text.strip()} free", memory_bytes=free + DRIVER_BYTES["headless"])


_NOISE = frozenset({"nvidia", "geforce", "rtx", "gpu", "tesla", "mobile"})


def _words(name: str) -> tuple[str, ...]:
    """`NVIDIA GeForce RTX4060Ti Laptop 8 GB` → ("4060", "ti", "laptop", "8gb")."""
    text = re.sub(r"mobile|max-q", " laptop ", name.lower())
    text = re.sub(r"(\d+)\s*gi?b\b", r" \1gb ", text)
    text = re.sub(r"(\d{4})(?=ti|super)", r"\1 ", text)
    text = re.sub(r"(ti)(?=super)", r"\1 ", text)
    text = re.sub(r"sxm\d|hbm3", "sxm", text)  # the driver's `H100 80GB HBM3` is the SXM form
    text = re.sub(r"(nvidia|geforce|rtx)", r" \1 ", text)
    return tuple(word for word in re.findall(r"[a-z0-9]+", text) if word not in _NOISE)


def _means(wanted: tuple[str, ...], offered: tuple[str, ...]) -> bool:
    """Whether `offered` is `wanted`, but for an amount of memory and a form (SXM, PCIe) left out."""
    left_out = [word for word in offered if word not in wanted]
    return set(wanted) <= set(offered) and all(
        word.endswith("gb") or word in ("sxm", "pcie") for word in left_out
    )


def _key(name: str) -> str:
    """The words of a name without its amount of memory, which misleads a comparison by letters."""
    return " ".join(word for word in _words(name) if not word.endswith("gb"))
