"""Everything of a merged model's folder but the weights: configuration, tokenizer, template, licence.

The files come from the base's folder; what must change, changes here: the type of the weights is set, and no
trace of quantization or of code from the base's repository stays in config.json; with new tokens, vocabulary
and tokenizer are those that were trained. Knows no weights. The card is written by whoever knows the run.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qadapt.events import Exported
from qadapt.licences import copy_licences
from qadapt.model.folder import read_config

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json",
    "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of the tokenizer: the base's, or those beside the adapter if it has new tokens."""
_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_DROPPED = ("torch_dtype", "quantization_config", "auto_map", "_name_or_path")


@dataclass(frozen=True)
class Vocabulary:
    """What new tokens change beside the weights.

    `rows` are those of the embedding table, `tokenizer` is the folder of the tokenizer that knows them.
    """

    rows: int
    tokenizer: Path


def write_other_files(
    model_folder: Path,
    folder: Path,
    *,
    dtype: str,
    changed_config: Mapping[str, object],
    vocabulary: Vocabulary | None = None,
) -> None:
    """Writes what belongs beside the weights.

    Args:
        model_folder: The base's folder.
        folder: The new folder.
        dtype: Type of the weights, in safetensors' words.
        changed_config: Fields of config.json that are others than the base's.
        vocabulary: What new tokens change; None: there are none.
    """
    config = read_config(model_folder, name=model_folder.name)
    kept = {field: value for field, value in config.items() if field not in _DROPPED}
    _write_json(folder / "config.json", {**kept, "dtype": _TORCH_NAMES[dtype], **changed_config})
    copy_files(model_folder, folder, ("generation_config.json",))
    copy_licences(model_folder, folder)
    copy_tokenizer(model_folder if vocabulary is None else vocabulary.tokenizer, folder)


def copy_files(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    """Copies the files whose names fit a pattern, those there are."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer with its templates."""
    copy_files(source, folder, TOKENIZER)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def exported(target: Path, *, form: str, base: str, started: float) -> Exported:
    """What ends an export.

    Args:
        target: The whole folder.
        form: Its form.
        base: Weights it was merged on; empty for an adapter alone.
        started: When it began, by `time.monotonic`.
    """
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    seconds = time.monotonic() - started
    return Exported(form=form, base=base, folder=str(target), bytes=size, seconds=seconds)


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
