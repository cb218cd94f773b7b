"""The adapter alone for others: a PEFT folder, for plain PEFT, vLLM, a hub; a side-car, for qadapt.

The numbers are those of the run, byte for byte, in the type they were trained in; the base is named as it was
trained on, with its revision. What is shared says of a base that is on no hub its folder's name only, and by
which hash of its files it is known. Tokenizer and template come along only if they are not the base's.
Whoever loads the folder brings the base.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from qadapt.adapters.check import check_adapter
from qadapt.adapters.facts import (
    COMBINATION_FILE,
    FACTS_FILE,
    PEFT_FILES,
    AdapterFacts,
    own_files,
    read_facts,
    write_facts,
)
from qadapt.data.prompt import CONTRACT_FILE
from qadapt.errors import BadExport, BadRun
from qadapt.events import Event, StageStarted
from qadapt.export.folder import TOKENIZER, copy_files, copy_tokenizer, exported
from qadapt.export.prompt_files import write_prompt_files
from qadapt.export.staging import new_folder
from qadapt.export.writing import OTHER_FILES_BYTES, Writing
from qadapt.licences import copy_licences
from qadapt.model.folder import read_config
from qadapt.model.skeleton import skeleton_base
from qadapt.model.tensor_files import TensorReader
from qadapt.model.tensor_values import tensor_of

FORM = "adapter"
STAGE = "writing the adapter"
BASE_FIELD = "base_model_name_or_path"
"""What PEFT calls the base in an adapter's settings."""


def copy_adapter(
    *,
    model_folder: Path,
    adapter_folder: Path,
    target: Path,
    writing: Writing | None = None,
    is_shared: bool = False,
) -> Iterator[Event]:
    """Writes an adapter for others, whole or not at all.

    Args:
        model_folder: The base, for its tokenizer and licence.
        adapter_folder: The adapter of a run.
        target: The folder to be; it must not exist.
        writing: Its `finish` is called.
        is_shared: Whether it goes to others, so that no file may name a folder of this machine.

    Raises:
        BadAdapter: It does not fit the base, or has absurd numbers.
        BadExport: A number of the adapter is NaN or infinite.
        BadModel: Its file is damaged.
        BadOutput: The target exists, or its place is read-only or full.
        BadRun: There is no adapter in the folder.
    """
    started, writing = time.monotonic(), writing or Writing()
    yield StageStarted(stage=STAGE)
    files = *own_files(adapter_folder), FACTS_FILE
    for name in files:
        if not (adapter_folder / name).is_file():
            raise BadRun(f"{adapter_folder} has no {name}.", cure="Give the folder of a finished adapter.")
    check_numbers(adapter_folder)
    values = read_config(model_folder, name=model_folder.name)
    check_adapter(
        adapter_folder,
        skeleton_base(values, quantization="none", double_quant=False, dtype=torch.float32),
    )
    needed_bytes = (adapter_folder / files[0]).stat().st_size + OTHER_FILES_BYTES
    with new_folder(target, needed_bytes=needed_bytes) as building:
        folder = building.path
        copy_files(adapter_folder, folder, files)
        if is_shared:
            _name_base_for_others(folder)
        copy_files(adapter_folder, folder, (COMBINATION_FILE,))
        copy_licences(model_folder, folder)
        copy_licences(adapter_folder, folder)
        if (source := _changed_tokenizer(model_folder, adapter_folder)) is not None:
            copy_tokenizer(source, folder)
            write_prompt_files(adapter_folder, folder)
        yield from writing.finish(folder)
    yield exported(target, form=FORM, base="", started=started)


def _name_base_for_others(folder: Path) -> None:
    """Lets an adapter's files say of a base that is on no hub its name, and not where it lies here."""
    facts, path = read_facts(folder), folder / PEFT_FILES[1]
    if facts.shown_base != facts.base:
        write_facts(replace(facts, base=facts.shown_base), folder)
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    base = config.get(BASE_FIELD)
    if isinstance(base, str) and not config.get("revision") and _is_place(base, facts):
        text = json.dumps({**config, BASE_FIELD: Path(base).name}, indent=2, sort_keys=True)
        path.write_text(text, encoding="utf-8")


def _is_place(base: str, facts: AdapterFacts) -> bool:
    """Whether a base is named by a path; an adapter from elsewhere may name another than its facts."""
    is_here = base == facts.base and facts.shown_base != base
    return is_here or base.startswith("~") or Path(base).is_absolute()


def check_numbers(adapter_folder: Path) -> None:
    """Checks that every number of an adapter is finite, of whatever method.

    Raises:
        BadExport: One is not.
        BadModel: The file is damaged.
    """
    with TensorReader([adapter_folder / own_files(adapter_folder)[0]]) as reader:
        for name, entry in reader.entries.items():
            if not tensor_of(reader.read(name), entry.dtype, entry.shape).isfinite().all():
                raise BadExport(
                    f"The adapter in {adapter_folder} has a NaN or infinite number in {name}.",
                    cure="The training diverged: export an earlier checkpoint, or lower train.learning_rate.",
                )


def _changed_tokenizer(model_folder: Path, adapter_folder: Path) -> Path | None:
    """The folder of the tokenizer to go with the adapter; None if the base's own serves."""
    if any((adapter_folder / name).is_file() for name in TOKENIZER):
        return adapter_folder
    contract = adapter_folder / CONTRACT_FILE
    if not contract.is_file():
        return None
    facts = json.loads(contract.read_text(encoding="utf-8"))
    return model_folder if facts["source"] != "auto" and facts["template"] is not None else None
