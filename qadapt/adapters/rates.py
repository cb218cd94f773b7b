"""LoRA+ (arXiv:2402.12354): LoRA whose second factor learns faster than the first.

In wide layers a step of the size that suits A moves the output too little through B, which starts at zero.
All the rest is LoRA, and it stands on disk as LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable

from qadapt.methods import Method

RATIO = 16.0
"""B's learning rate as a multiple of A's, as the paper recommends."""


def rate_ratios(method: Method, names: Iterable[str]) -> dict[str, float]:
    """Name of a trained parameter → its learning rate as a multiple of the step's, where it is not 1.

    Args:
        method: The adapter's.
        names: Of its trained parameters, as PEFT names them.
    """
    return {name: RATIO for name in names if ".lora_B." in name} if method == "loraplus" else {}
