"""`qadapt.json`, which stands beside an adapter's own files: what it was trained on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from qadapt.errors import BadRun

FACTS_FILE = "qadapt.json"
_QUANTIZATIONS, _DTYPES = ("nf4", "int8", "none"), ("bf16", "fp16", "fp32")


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
