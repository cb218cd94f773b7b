"""Where a step would run: a card of the catalogue, an amount of memory, or what this machine has now.

Knows no model. Free bytes of a card that is not in this machine rest on the assumptions in `cards.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qadapt.errors import BadRecipe
from qadapt.hardware.cards import (
    RUNTIME_BYTES,
    SPILLING,
    Card,
    Platform,
    card_of_memory,
    find_card,
    this_platform,
)
from qadapt.hardware.probe import Device, Machine, probe
from qadapt.units import format_bytes


@dataclass(frozen=True)
class Target:
    """A device and what is free on it.

    Attributes:
        device: Its kind.
        name: The card's name, or `this CPU`.
        free_bytes: What a step may take there.
        assumption: What the free bytes rest on, in words.
        card: The card, if one is known or stands for an amount of memory.
        is_here: Whether it is a device of this machine, as it is now.
        host_bytes: What is free in the memory of the host beside a card of this machine; None: not known.
        may_spill: Whether the driver may put what exceeds the card into host memory instead of failing.
    """

    device: Literal["cpu", "cuda"]
    name: str
    free_bytes: int
    assumption: str
    card: Card | None = None
    is_here: bool = False
    may_spill: bool = False
    host_bytes: int | None = None

    @property
    def has_bf16(self) -> bool:
        """Whether bf16 products are native; assumed where only the memory is known."""
        return self.card is None or self.card.has_bf16


def find_target(
    card: str | None = None,
    vram: str | None = None,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    platform: Platform | None = None,
) -> Target:
    """The target of a card's name, of an amount of free memory, of both, or of this machine.

    Args:
        card: A name of the catalogue.
        vram: What is free, such as `7.3GiB`; overrules what is assumed of the card.
        device: Without card and amount: what of this machine to use.
        platform: What else the card is assumed to carry.

    Raises:
        BadRecipe: The card is unknown, the amount is none, or CUDA is asked for and there is none.
    """
    if card is not None:
        return _card_target(find_card(card), vram, platform or this_platform())
    may_spill = (platform or this_platform()) in SPILLING
    if vram is not None:
        known = card_of_memory(vram)
        free = known.free_bytes("headless")
        return Target("cuda", known.name, free, "as given", known, may_spill=may_spill)
    machine = probe()
    if device != "cpu" and machine.devices:
        first = machine.devices[0]
        return Target(
            "cuda",
            first.name,
            first.free_bytes,
            _free_now(first),
            first.card,
            is_here=True,
            may_spill=may_spill,
            host_bytes=machine.host_available_bytes,
        )
    if device == "cuda":
        raise _no_gpu(machine)
    free = max(0, machine.host_available_bytes - RUNTIME_BYTES["cpu"])
    return Target("cpu", "this CPU", free, "available now, without the libraries' own", is_here=True)


def _card_target(card: Card, vram: str | None, platform: Platform) -> Target:
    may_spill = platform in SPILLING
    if vram is not None:
        free = card_of_memory(vram).free_bytes("headless")
        return Target("cuda", card.name, free, "as given", card, may_spill=may_spill)
    words = {
        "headless": "assumed: nothing else on the card",
        "linux": "assumed: a Linux desktop on the card",
        "windows": "assumed: a Windows desktop on the card",
        "wsl": "assumed: a Windows desktop on the card, WSL beside it",
    }
    free = card.free_bytes(platform)
    return Target("cuda", card.name, free, words[platform], card, may_spill=may_spill)


def _free_now(device: Device) -> str:
    return f"free now; {format_bytes(device.used_bytes)} are the driver's, the desktop's and other programs'"


def _no_gpu(machine: Machine) -> BadRecipe:
    hidden = f" (CUDA_VISIBLE_DEVICES hides {machine.hidden})" if machine.hidden else ""
    return BadRecipe(
        f"memory.device is cuda, and this machine shows no NVIDIA GPU{hidden}.",
        cure="Give a card with --card, an amount with --vram, or set memory.device=cpu.",
    )
