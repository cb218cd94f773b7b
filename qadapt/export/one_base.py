"""Whether adapters that are put together, into one adapter or into a model, were trained on one base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qadapt.adapters.facts import AdapterFacts
from qadapt.errors import BadExport

_HELD = ("quantization", "double_quant", "load_dtype")


def check_one_base(folders: Sequence[Path], known: Sequence[AdapterFacts], *, is_held: bool) -> None:
    """Checks that adapters were trained on one base.

    Args:
        folders: Theirs.
        known: What is known of each.
        is_held: It must have been held in one way, too, as its dequantized weights are what counts.

    Raises:
        BadExport: They were trained on different ones.
    """
    for folder, facts in zip(folders, known, strict=True):
        first, values, others = known[0], asdict(known[0]), asdict(facts)
        if facts.fingerprint != first.fingerprint:
            alike = ", with other files" if facts.base == first.base else ""
            raise BadExport(
                f"The adapters were trained on different bases: {folders[0]} on {first.base}, {folder} on "
                f"{facts.base}{alike}.",
                cure="Put adapters of one base together.",
            )
        changed = [name for name in _HELD if values[name] != others[name]] if is_held else []
        if changed:
            raise BadExport(
                f"{folders[0]} was trained on {first.base} with {changed[0]} {values[changed[0]]}, {folder} "
                f"with {others[changed[0]]}.",
                cure="Put adapters together whose base was held in one way.",
            )
