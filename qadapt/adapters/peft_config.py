"""What a PEFT folder says of itself, read as the word of a stranger.

PEFT has dozens of methods and settings. Some fetch other adapters, tokenizers or code when they are attached
(X-LoRA, prompts that start from a text, Megatron's layers); some compute what only PEFT's own forward pass
does (activated LoRA, Arrow), so that here the base alone would answer and nobody would be told. Only methods
whose every part is loaded here pass. Knows no base and reads no tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig

from qadapt.adapters.facts import PEFT_FILES
from qadapt.errors import BadAdapter

PEFT_TYPES = ("LORA", "ADALORA", "IA3", "VERA", "OFT")
"""The methods of PEFT's that are loaded here, by their `peft_type`."""
CONFIG = PEFT_FILES[1]
_NOT_LOADED = ("megatron_config", "alora_invocation_tokens", "arrow_config", "layer_replication")
_ANEW = "Take the adapter from its run, or from where it is published, once more."


def read_peft_config(folder: Path) -> PeftConfig:
    """The configuration of a PEFT folder.

    Raises:
        BadAdapter: There is none, it is damaged, of a method that is not loaded here, or has a setting that
            is not.
    """
    values = peft_values(folder)
    method, asked = values.get("peft_type"), [name for name in _NOT_LOADED if values.get(name)]
    if values.get("save_projection") is False:  # VeRA's, which would be drawn anew
        asked.append("save_projection")
    if method not in PEFT_TYPES or asked:
        what = f"has {asked[0]} = {values[asked[0]]!r}" if asked else f"is of the method {method}"
        raise BadAdapter(
            f"The adapter in {folder} {what}, which is not loaded here.",
            cure=f"Load it with PEFT; of PEFT's methods, {', '.join(PEFT_TYPES)} are loaded here.",
        )
    if method == "ADALORA" and not _says_what_is_left(values):
        raise _damaged(folder, ValueError("its rank_pattern is no list of init_r true and false for a layer"))
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _damaged(folder, error) from None


def peft_values(folder: Path) -> dict[str, Any]:
    """The same as plain values, whatever the method.

    Raises:
        BadAdapter: There are none, or the file is damaged.
    """
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        return values
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, error) from None


def _says_what_is_left(values: Mapping[str, Any]) -> bool:
    """Whether AdaLoRA's rank_pattern says of each of a layer's first triplets whether it is left."""
    start, pattern = values.get("init_r"), values.get("rank_pattern") or {}
    if type(start) is not int or start < 1 or not isinstance(pattern, dict):
        return False
    return all(
        isinstance(flags, list) and len(flags) == start and all(isinstance(each, bool) for each in flags)
        for flags in pattern.values()
    )


def _damaged(folder: Path, error: Exception) -> BadAdapter:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return BadAdapter(f"The {CONFIG} in {folder} describes no adapter: {reason}", cure=_ANEW)
