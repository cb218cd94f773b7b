"""The streamed merge: base + adapter to a model folder that plain transformers loads, a few rows at a time.

What is written is decided in `merged_model.py` and computed in `merged_rows.py`. Nothing appears at the
target before everything is there. Knows nothing of runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qadapt.data.prompt import CONTRACT_FILE
from qadapt.errors import BadRecipe
from qadapt.events import Event, StageAdvanced, StageStarted, Warned
from qadapt.export.folder import exported, write_other_files
from qadapt.export.identity import identity_of
from qadapt.export.merged_model import Adapters, MergedModel, open_merged, weighted
from qadapt.export.prompt_files import write_prompt_files
from qadapt.export.staging import new_folder
from qadapt.model.shards import write_shards
from qadapt.units import GIB, MIB

FORMS = {"merged-fp16": "F16", "merged-bf16": "BF16", "merged-fp32": "F32"}
"""Forms by name, with the type of their weights in safetensors' words."""
BASES = ("dequantized", "original")
STAGE = "merging"
OTHER_FILES_BYTES = 32 * MIB
"""Room for what stands beside the weights."""


def nothing(_: Path) -> Iterator[Event]:
    """Does nothing with a folder."""
    return iter(())


@dataclass(frozen=True)
class Writing:
    """How a merged model is written.

    `shard_bytes` is the largest size of one file; `chunk_bytes` that of a chunk of rows in fp32: memory is a
    few of them, and the default fits the caches of processors, which is fastest. `finish` is called with the
    hidden folder when everything of the model is in it, before it appears; an error in it leaves no trace.
    """

    shard_bytes: int = 2 * GIB
    chunk_bytes: int = 4 * MIB
    finish: Callable[[Path], Iterator[Event]] = nothing


def merge(
    *,
    model_folder: Path,
    adapter_folder: Adapters,
    target: Path,
    form: str = "merged-fp16",
    base: str = "dequantized",
    writing: Writing | None = None,
) -> Iterator[Event]:
    """Merges adapters into their base and writes a whole model folder, yielding its progress.

    Nothing is at `target` until everything is: an error, or closing this generator, leaves no trace; if the
    process is killed, the next call goes on with the files that were whole (`staging.py`).

    Args:
        model_folder: The base, unquantized: config.json, safetensors, tokenizer.
        adapter_folder: A PEFT folder of LoRA (with its kin) or IA3; or several of LoRA with weights, negative
            ones, too: Σ weight · ΔW is merged, and the model speaks as the first was trained. Base
            `dequantized` also reads their `qadapt.json`.
        target: The folder to be; it must not exist.
        form: One of `FORMS`.
        base: One of `BASES`.
        writing: Sizes, and what follows before the folder appears.

    Raises:
        BadExport: An adapter is not of this base, has NaN, or a merged number is too large for the form.
        BadModel: The base cannot be read.
        BadOutput: The target exists, or its place is read-only or full.
        BadRecipe: Form or base is not known, or a weight is no number.
        BadRun: There is no adapter in a folder, or not the facts that `dequantized` needs.
        Unsupported: An adapter or the base is of a kind that is not merged here.
    """
    started, writing = time.monotonic(), writing or Writing()
    _check_choice("form", form, tuple(FORMS))
    _check_choice("base", base, BASES)
    yield StageStarted(stage=STAGE)
    dtype, chunk_bytes, shard_bytes = FORMS[form], writing.chunk_bytes, writing.shard_bytes
    with open_merged(model_folder, adapter_folder, base=base, dtype=dtype, chunk_bytes=chunk_bytes) as merged:
        chosen = weighted(adapter_folder)
        folders = [folder for folder, _ in chosen]
        yield from _warnings(folders, merged)
        weights = ",".join(str(weight) for _, weight in chosen)
        choices: dict[str, str | int] = {
            "form": form,
            "base": base,
            "shard": shard_bytes,
            "chunk": chunk_bytes,
            "weights": weights,
        }
        total, done = sum(entry.size_bytes for entry in merged.entries), 0
        identity = identity_of(model_folder, folders, choices=choices)
        with new_folder(target, needed_bytes=total + OTHER_FILES_BYTES, identity=identity) as building:
            folder = building.path
            for entry in write_shards(
                folder, merged.entries, values=merged.values, shard_bytes=shard_bytes, finished=building
            ):
                done += entry.size_bytes
                yield StageAdvanced(stage=STAGE, done=done, total=total)
            write_other_files(
                model_folder,
                folder,
                dtype=dtype,
                changed_config=merged.changed_config,
                vocabulary=merged.vocabulary,
            )
            write_prompt_files(folders[0], folder)
            yield from writing.finish(folder)
    yield exported(target, form=form, base=base, started=started)


def _check_choice(what: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise BadRecipe(
            f"The {what} {choice!r} of an export is not known.", cure=f"Choose from: {', '.join(choices)}."
        )


def _warnings(folders: Sequence[Path], merged: MergedModel) -> Iterator[Event]:
    """What is to be known of the model before it is written."""
    if merged.changed_config.get("tie_word_embeddings") is False:
        yield Warned(
            message="Embedding and head are one table in the base, and the adapter makes two of it: "
            "the model is written with both.",
            cure="Nothing is wrong; what loads it must follow tie_word_embeddings in its config.json.",
        )
    contracts = [folder / CONTRACT_FILE for folder in folders]
    texts = {path.read_text(encoding="utf-8") if path.is_file() else "" for path in contracts}
    if len(texts) > 1:
        yield Warned(
            message=f"The adapters were trained with different prompts; the model has that of {folders[0]}.",
            cure="Put the adapter first whose template and end tokens the model is to have.",
        )
