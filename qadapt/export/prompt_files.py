"""What a run's prompt contract changes in a merged model's folder: its template, and what ends an answer.

A model must be asked as it was trained. With its own template and end tokens nothing changes. Knows no
weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qadapt.data.prompt import CONTRACT_FILE

_TEMPLATE, _GENERATION, _TOKENIZER = "chat_template.jinja", "generation_config.json", "tokenizer_config.json"


def write_prompt_files(adapter_folder: Path, folder: Path) -> None:
    """Lets a folder that has the base's files speak as the adapter was trained.

    Args:
        adapter_folder: The adapter; one without `prompt.json`, which qadapt did not train, changes nothing.
        folder: The new model's folder.
    """
    path = adapter_folder / CONTRACT_FILE
    if not path.is_file():
        return
    facts = _read(path)
    if facts["source"] != "auto" and facts["template"] is not None:
        _write_template(folder, facts["template"]["default"])
    _add_ends(folder / _GENERATION, facts["end_ids"])


def _write_template(folder: Path, text: str) -> None:
    """One template, wherever tools look for it."""
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / _TEMPLATE).write_text(text, encoding="utf-8")
    config = folder / _TOKENIZER
    if config.is_file() and "chat_template" in (values := _read(config)):
        _write(config, {**values, "chat_template": text})


def _add_ends(path: Path, end_ids: list[int]) -> None:
    values = _read(path) if path.is_file() else {}
    named = values.get("eos_token_id")
    ends = named if isinstance(named, list) else [] if named is None else [named]
    missing = [token for token in end_ids if token not in ends]
    if missing:
        _write(path, {**values, "eos_token_id": [*ends, *missing]})


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _write(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
