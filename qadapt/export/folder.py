"""Everything of a merged model's folder but the weights: configuration, tokenizer, template, licence, card.

The files come from the base's folder; what must change, changes here: the type of the weights is set, and no
trace of quantization or of code from the base's repository stays in config.json; with new tokens, vocabulary
and tokenizer are those that were trained. Knows no weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qadapt.export.card import CardFacts, card_text
from qadapt.model.folder import read_config

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json",
    "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of the tokenizer: the base's, or those beside the adapter if it has new tokens."""
COPIED = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files that are taken over from the base where it has them."""
_TORCH_NAMES = {"merged-fp16": "float16", "merged-bf16": "bfloat16", "merged-fp32": "float32"}
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
    form: str,
    base: str,
    card: CardFacts,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Writes what belongs beside the weights.

    Args:
        model_folder: The base's folder.
        folder: The new folder.
        form: Form of the merged weights, such as `merged-fp16`.
        base: Weights they were merged on.
        card: What the card can tell about the run.
        vocabulary: What new tokens change; None: there are none.
    """
    config = read_config(model_folder, name=model_folder.name)
    kept = {field: value for field, value in config.items() if field not in _DROPPED}
    changed: dict[str, object] = {"dtype": _TORCH_NAMES[form]}
    if vocabulary is not None:
        changed["vocab_size"] = vocabulary.rows
    _write_json(folder / "config.json", kept | changed)
    _copy(model_folder, folder, COPIED)
    _copy_tokenizer(model_folder if vocabulary is None else vocabulary.tokenizer, folder)
    text = card_text(card.with_licence_of(model_folder), form=form, base=base)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _copy(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    _copy(source, folder, TOKENIZER)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
