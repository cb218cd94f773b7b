"""Virtual tokens that PEFT saved, read as ours: prompt tuning, and P-tuning, flat on its disk, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from qadapt.adapters.facts import PEFT_FILES
from qadapt.adapters.peft_config import peft_values
from qadapt.adapters.prompt import PromptKind
from qadapt.adapters.side_car_files import write_side_car
from qadapt.errors import BadAdapter

PEFT_PROMPTS: Mapping[str, PromptKind] = {"PROMPT_TUNING": "prompt", "P_TUNING": "ptuning"}
"""PEFT's `peft_type` → the method."""
_VECTORS = "prompt_embeddings"


def import_prompt(source: Path, target: Path, *, model_type: str) -> None:
    """Writes the virtual tokens of a PEFT folder as a side-car of ours into a folder that is there.

    Args:
        source: The folder.
        target: An empty one.
        model_type: Of the base.

    Raises:
        BadAdapter: The folder does not hold what PEFT saves.
    """
    path, kind = source / PEFT_FILES[0], PEFT_PROMPTS[peft_values(source)["peft_type"]]
    try:
        tensors = load_file(path)
        if set(tensors) != {_VECTORS} or tensors[_VECTORS].ndim != 2:
            raise ValueError(f"it has {', '.join(tensors)}, and not {_VECTORS} of two dimensions alone")
    except (OSError, SafetensorError, ValueError) as error:
        raise BadAdapter(
            f"{path} holds no virtual tokens: {error}",
            cure="Take the adapter's files from where they were made.",
        ) from None
    count, width = tensors[_VECTORS].shape
    settings = {"kind": kind, "tokens": count, "model_width": width, "model_type": model_type}
    write_side_car(target, settings=settings, tensors={"tokens.vectors": tensors[_VECTORS]})
