"""What of an adapter is not updated as all the rest is.

LoRA+ (arXiv:2402.12354) is LoRA whose second factor learns faster than the first: in wide layers a step of
the size that suits A moves the output too little through B, which starts at zero. All else is LoRA, and it
stands on disk as LoRA.

Weight decay draws to zero. Where an adapter at zero is the base (LoRA's factors, angles, differences) that is
towards the base; a factor of about one at zero switches off what it scales. Factors are spared, and biases
and norms, as the libraries' trainers spare these.
"""

from __future__ import annotations

from collections.abc import Iterable

from qadapt.methods import Method

RATIO = 16.0
"""B's learning rate as a multiple of A's, as the paper recommends."""
_SPARED = ".ia3_l.", ".lora_magnitude_vector.", ".norm."


def rate_ratios(method: Method, names: Iterable[str]) -> dict[str, float]:
    """Name of a trained parameter → its learning rate as a multiple of the step's, where it is not 1.

    Args:
        method: The adapter's.
        names: Of its trained parameters, as PEFT names them.
    """
    return {name: RATIO for name in names if ".lora_B." in name} if method == "loraplus" else {}


def undecayed(names: Iterable[str]) -> set[str]:
    """Trained parameters that weight decay spares: IA3's factors, DoRA's magnitudes, biases and norms."""
    return {name for name in names if name.endswith(".bias") or any(part in name for part in _SPARED)}
