"""`qadapt.json`, which stands beside an adapter's own files: what it was trained on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from qadapt.errors import BadRun

FACTS_FILE = "qadapt.json"
PEFT_FILES = "adapter_model.safetensors", "adapter_config.json"
SIDE_CAR_FILES = "side_car.safetensors", "side_car.json"
"""Tensors and settings of an adapter whose modules stand beside the base's layers."""
_QUANTIZATIONS, _DTYPES = ("nf4", "int8", "none"), ("bf16", "fp16", "fp32")


def is_side_car(folder: Path) -> bool:
    """Whether a folder holds a side-car, and not an adapter of PEFT's."""
    return (folder / SIDE_CAR_FILES[1]).is_file()


def own_files(folder: Path) -> tuple[str, str]:
    """Names of the two files that an adapter's folder has: its tensors and its settings."""
    return SIDE_CAR_FILES if is_side_car(folder) else PEFT_FILES


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter was trained on, written beside it."""

    base: str
    revision: str | None
    fingerprint: str
    quantization: str
    double_quant: bool
    load_dtype: str
    prompt_fingerprint: str


def write_facts(facts: AdapterFacts, folder: Path) -> None:
    """Writes the facts beside the adapter's files."""
    text = json.dumps(asdict(facts), indent=2) + "\n"
    (folder / FACTS_FILE).write_text(text, encoding="utf-8")


def read_facts(folder: Path) -> AdapterFacts:
    """What the adapter in a folder was trained on.

    Raises:
        BadRun: There is no adapter of qadapt in the folder.
    """
    try:
        values = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        facts = AdapterFacts(**values)
        if not isinstance(facts.base, str) or not isinstance(facts.fingerprint, str):
            raise ValueError("it names no base")
        if facts.quantization not in _QUANTIZATIONS or facts.load_dtype not in _DTYPES:
            raise ValueError(f"{facts.quantization!r} in {facts.load_dtype!r} is no way to hold a base")
        return facts
    except (OSError, ValueError, TypeError) as error:
        raise BadRun(
            f"{folder} holds no adapter that qadapt trained: {error}",
            cure="Give the folder of a finished run.",
        ) from None
