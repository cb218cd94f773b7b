"""Everything of a merged model's folder but the weights: configuration, tokenizer, template, licence, card.

The files come from the base's folder; what must change, changes here: the type of the weights is set, and no
trace of quantization or of code from the base's repository stays in config.json. Knows no weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qadapt.export.card import CardFacts, card_text
from qadapt.model.folder import read_config

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json",
    "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Files that are taken over unchanged where the base has them."""
_TORCH_NAMES = {"merged-fp16": "float16", "merged-bf16": "bfloat16", "merged-fp32": "float32"}
_DROPPED = ("torch_dtype", "quantization_config", "auto_map", "_name_or_path")


def write_other_files(model_folder: Path, folder: Path, *, form: str, base: str, card: CardFacts) -> None:
    """Writes what belongs beside the weights.

    Args:
        model_folder: The base's folder.
        folder: The new folder.
        form: Form of the merged weights, such as `merged-fp16`.
        base: Weights they were merged on.
        card: What the card can tell about the run.
    """
    config = read_config(model_folder, name=model_folder.name)
    kept = {field: value for field, value in config.items() if field not in _DROPPED}
    text = json.dumps(kept | {"dtype": _TORCH_NAMES[form]}, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    for pattern in COPIED:
        for path in sorted(model_folder.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    templates = model_folder / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)
    text = card_text(card.with_licence_of(model_folder), form=form, base=base)
    (folder / "README.md").write_text(text, encoding="utf-8")
