"""`qadapt.json`, which stands beside an adapter's own files: what it was trained on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from qadapt.errors import BadRun
from qadapt.methods import nonlinearity_name

FACTS_FILE = "qadapt.json"
COMBINATION_FILE = "combination.json"
"""What an adapter was made of, if of others."""
PEFT_FILES = "adapter_model.safetensors", "adapter_config.json"
SIDE_CAR_FILES = "side_car.safetensors", "side_car.json"
"""Tensors and settings of an adapter that stands beside the base's weights."""
BELOW = "below"
"""In a side-car's settings: the trained adapter on which it stands, which lies in the same folder."""
BASE_KEEPING_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica", "true")
"""Values of `init_lora_weights` that leave the base as it was; PiSSA, OLoRA and the like rewrite it."""
_QUANTIZATIONS, _DTYPES = ("nf4", "int8", "none"), ("bf16", "fp16", "fp32")


def is_side_car(folder: Path) -> bool:
    """Whether a folder holds a side-car, and not an adapter of PEFT's."""
    return (folder / SIDE_CAR_FILES[1]).is_file()


def below_of(folder: Path) -> dict[str, object]:
    """What the adapter of a folder stands on, with its `name` and `sha256`; nothing if on its base alone."""
    found = _values(folder / SIDE_CAR_FILES[1]).get(BELOW)
    return found if isinstance(found, dict) else {}


def nonlinearity_of(folder: Path) -> str:
    """The nonlinearity of a folder's bottleneck adapter, as recipes name it; empty if it is none."""
    values = _values(folder / SIDE_CAR_FILES[1])
    return nonlinearity_name(values.get("activation"), norm=values.get("norm") is True)


def parts_of(folder: Path) -> tuple[tuple[str, float], ...]:
    """What a folder's adapter was made of, if of others: the name of each, and its weight."""
    parts = _values(folder / COMBINATION_FILE).get("parts")
    said = [each for each in parts if isinstance(each, dict)] if isinstance(parts, list) else []
    return tuple(
        (name, weight)
        for name, weight in ((each.get("name"), each.get("weight")) for each in said)
        if isinstance(name, str) and name.isprintable() and isinstance(weight, int | float)
    )


def _values(path: Path) -> dict[str, object]:
    """What a file of settings says; nothing if it cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def own_files(folder: Path) -> tuple[str, str]:
    """Names of the two files that an adapter's folder has: its tensors and its settings."""
    return SIDE_CAR_FILES if is_side_car(folder) else PEFT_FILES


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter was trained on, written beside it.

    `mends_base` says that it began as what this quantization took from the base, and is of use on no other.
    """

    base: str
    revision: str | None
    fingerprint: str
    quantization: str
    double_quant: bool
    load_dtype: str
    prompt_fingerprint: str
    mends_base: bool = False

    @property
    def shown_base(self) -> str:
        """The base as others may read it: its name on a hub, else that of its file or folder alone."""
        return self.base if self.revision else Path(self.base).name or self.base

    @property
    def mended(self) -> str:
        """How the base was held that the adapter mends, in words; empty if it mends none."""
        in_4_bits = f"in 4 bits (NF4{', double quant' if self.double_quant else ''})"
        held = "in 8 bits" if self.quantization == "int8" else in_4_bits
        return held if self.mends_base else ""


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
        if not all(
            isinstance(each, str) for each in (facts.base, facts.fingerprint, facts.prompt_fingerprint)
        ):
            raise ValueError("it names no base")
        if not isinstance(facts.revision, str | None) or not isinstance(facts.double_quant, bool):
            raise ValueError("it names no base, or does not say how that was held")
        if facts.quantization not in _QUANTIZATIONS or facts.load_dtype not in _DTYPES:
            raise ValueError(f"{facts.quantization!r} in {facts.load_dtype!r} is no way to hold a base")
        return facts
    except FileNotFoundError:
        raise BadRun(
            f"{folder} holds no adapter that qadapt trained: it has no {FACTS_FILE}.",
            cure="Give the folder of a finished run.",
        ) from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadRun(
            f"{folder} holds no adapter that qadapt trained: {error}",
            cure="Give the folder of a finished run.",
        ) from None


def mends_base(folder: Path) -> bool:
    """Whether the adapter in a folder is known to mend what quantizing took from its base.

    Raises:
        BadRun: What is said beside it is damaged.
    """
    return (folder / FACTS_FILE).is_file() and read_facts(folder).mends_base
