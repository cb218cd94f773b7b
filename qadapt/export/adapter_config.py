"""The settings of an adapter on disk, `adapter_config.json`, each of the kind that PEFT writes.

Looks at those that decide what is merged; `adapter_names.py` says which of them can be. Imports no PEFT.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from sys import float_info
from typing import Any

from qadapt.errors import BadRun

_NEEDED = {"LORA": ("r", "lora_alpha"), "ADALORA": ("init_r", "lora_alpha")}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The settings of the adapter in a folder.

    Raises:
        BadRun: There are none, or one is missing or of another kind.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRun(
            f"{folder} holds no adapter: {error}", cure="Give the folder of a finished run."
        ) from None
    if not isinstance(config, dict):
        raise _damaged(path, "it is no JSON object")
    needed, is_adaptive = _NEEDED.get(str(config.get("peft_type")), ()), config.get("peft_type") == "ADALORA"
    idle = ("r",) if config.get("peft_type") == "OFT" else ()  # 0 where blocks have a width
    for field, fits in _FITS.items():
        value = None if field in idle else config.get(field)
        if field == "rank_pattern" and is_adaptive:
            fits = _says_what_is_left
        if not fits(value) if value is not None else field in needed:
            raise _damaged(path, f"{field} is {value!r}")
    return config


def _damaged(path: Path, reason: str) -> BadRun:
    return BadRun(
        f"{path} is no configuration of an adapter: {reason}.", cure="Take the file from the run again."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float_info.max


def _is_pattern(value: Any) -> bool:
    """Whether it is a dictionary from expressions for names to numbers."""
    try:
        return all(re.compile(name) and _is_number(number) for name, number in value.items())
    except (AttributeError, TypeError, re.error):
        return False


def _says_what_is_left(value: Any) -> bool:
    """Whether it says of each of AdaLoRA's triplets of a layer whether it is left."""
    return isinstance(value, dict) and all(
        isinstance(flags, list) and all(isinstance(each, bool) for each in flags) for flags in value.values()
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _are_tokens(value: Any) -> bool:
    """Whether it is a list of different token ids, or one for each of some tables."""
    if isinstance(value, dict):
        return all(isinstance(each, list) and _are_tokens(each) for each in value.values())
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        return False
    return len(set(value)) == len(value)


_FITS: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: isinstance(value, str),
    "r": lambda value: type(value) is int and value > 0,
    "init_r": lambda value: type(value) is int and value > 0,
    "lora_alpha": _is_number,
    "rank_pattern": _is_pattern,
    "alpha_pattern": _is_pattern,
    "modules_to_save": _are_names,
    "bias": lambda value: isinstance(value, str),
    "trainable_token_indices": _are_tokens,
}
"""Settings by name, and whether a value is of their kind."""
