"""The adapter alone for others: a PEFT folder, for plain PEFT, vLLM, a hub; a side-car, for qadapt.

The numbers are those of the run, byte for byte, in the type they were trained in; the base is named as it was
trained on, with its revision. Tokenizer and template come along only if they are not the base's. Whoever
loads the folder brings the base.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from qadapt.adapters.facts import COMBINATION_FILE, FACTS_FILE, own_files
from qadapt.data.prompt import CONTRACT_FILE
from qadapt.errors import BadExport, BadRun
from qadapt.events import Event, StageStarted
from qadapt.export.folder import TOKENIZER, copy_files, copy_licence, copy_tokenizer, exported
from qadapt.export.merge import OTHER_FILES_BYTES, Writing
from qadapt.export.prompt_files import write_prompt_files
from qadapt.export.staging import new_folder
from qadapt.model.tensor_files import TensorReader
from qadapt.model.tensor_values import tensor_of

FORM = "adapter"
STAGE = "writing the adapter"


def copy_adapter(
    *, model_folder: Path, adapter_folder: Path, target: Path, writing: Writing | None = None
) -> Iterator[Event]:
    """Writes an adapter for others, whole or not at all.

    Args:
        model_folder: The base, for its tokenizer and licence.
        adapter_folder: The adapter of a run.
        target: The folder to be; it must not exist.
        writing: Its `finish` is called.

    Raises:
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
    needed_bytes = (adapter_folder / files[0]).stat().st_size + OTHER_FILES_BYTES
    with new_folder(target, needed_bytes=needed_bytes) as building:
        folder = building.path
        copy_files(adapter_folder, folder, files)
        copy_files(adapter_folder, folder, (COMBINATION_FILE,))
        copy_licence(model_folder, folder)
        copy_licence(adapter_folder, folder)
        if (source := _changed_tokenizer(model_folder, adapter_folder)) is not None:
            copy_tokenizer(source, folder)
            write_prompt_files(adapter_folder, folder)
        yield from writing.finish(folder)
    yield exported(target, form=FORM, base="", started=started)


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
