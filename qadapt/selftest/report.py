"""The self-test as a whole: its checks in order, the machine they were made on, and what is kept of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from qadapt.hardware.calibration import SELF_TEST, kind_of, remember
from qadapt.hardware.probe import probe
from qadapt.model.precision import choose_device
from qadapt.quiet import quiet_libraries
from qadapt.selftest.check import Check, tried
from qadapt.selftest.equality import equality_checks
from qadapt.selftest.measures import Measures, found_context
from qadapt.selftest.trainee import MIDDLING, TINY, Size, make_model
from qadapt.train.environment import environment
from qadapt.units import GIB, format_bytes

MIDDLING_BYTES = 6 * GIB
"""With less than this free, the small model is measured."""


class SelfTest:
    """One self-test of this machine: of its card, or, where there is none, of its processor.

    To be made before the process touches the card: what the context takes is counted from here on.
    """

    def __init__(self) -> None:
        found = probe().devices
        self._card = found[0] if found else None
        device = choose_device("auto")
        self.device = device if device.type == "cpu" else torch.device("cuda", torch.cuda.current_device())
        quiet_libraries()

    def facts(self) -> dict[str, str]:
        """What the checks were made on: a line each."""
        values = environment()
        packages = ", ".join(f"{name} {version}" for name, version in values["packages"].items())
        return {
            "machine": f"{values['system']}, {values['processor']}, {values['threads']} threads",
            "versions": f"Python {values['python']}, CUDA {values['cuda'] or 'none'}, {packages}",
            "card": "none: the checks are of the CPU" if self.device.type == "cpu" else self._card_words(),
        }

    def _card_words(self) -> str:
        card = self._card
        if card is None:
            return f"{torch.cuda.get_device_name()}; its driver cannot be asked for more"
        return (
            f"{card.name}, {format_bytes(card.free_bytes)} of {format_bytes(card.memory_bytes)} free, "
            f"compute capability {card.compute_capability}, driver {card.driver}"
        )

    def checks(self) -> Iterator[Check]:
        """Makes them, one after another; what a step took is kept for later estimates on this machine."""
        size = self._size()
        card = self._card.card if self._card and self.device.type == "cuda" else None
        measures = Measures(self.device, card=card, size=size)
        with tempfile.TemporaryDirectory() as place:
            measured = make_model(Path(place) / "measured", size, device=self.device)
            yield from measures.step_checks(measured)
            yield from self._context("CUDA context, after these steps")
            yield from measures.other_checks(measured)
            tiny = make_model(Path(place) / "tiny", TINY, device=torch.device("cpu"))
            yield from equality_checks(tiny, device=self.device)
        yield from self._context("CUDA context, after all")
        if size is MIDDLING and measures.residual is not None:
            kind = kind_of(
                model=SELF_TEST, device=torch.cuda.get_device_name(), method="lora", quantization="nf4"
            )
            remember(
                kind,
                predicted_bytes=measures.residual.predicted_bytes,
                measured_bytes=measures.residual.measured_bytes,
                run=SELF_TEST,
            )

    def _size(self) -> Size:
        """Of the model whose steps are measured."""
        if self.device.type == "cpu":
            return TINY
        free_bytes = torch.cuda.mem_get_info()[0] if self._card is None else self._card.free_bytes
        return MIDDLING if free_bytes >= MIDDLING_BYTES else TINY

    def _context(self, name: str) -> Iterator[Check]:
        before = self._card
        if before is not None and self.device.type == "cuda":
            yield tried(name, lambda: found_context(before))
