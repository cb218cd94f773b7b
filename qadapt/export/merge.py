"""The streamed merge: base + adapter to a model folder that plain transformers loads, a few rows at a time.

What is written is decided in `merged_model.py`, computed in `merged_rows.py` and stored by `writing.py`.
Nothing appears at the target before everything is there. Knows nothing of runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from qadapt.data.prompt import CONTRACT_FILE
from qadapt.errors import BadRecipe
from qadapt.events import Event, StageStarted, Warned
from qadapt.export.folder import exported
from qadapt.export.merged_model import Adapters, MergedModel, open_merged, weighted
from qadapt.export.writing import Merging, Writing, write_model

FORMS = {"merged-fp16": "F16", "merged-bf16": "BF16", "merged-fp32": "F32"}
"""Forms by name, with the type of their weights in safetensors' words."""
BASES = ("dequantized", "original")
STAGE = "merging"


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
    started = time.monotonic()
    writing = writing or Writing()
    _check_choice("form", form, tuple(FORMS))
    _check_choice("base", base, BASES)
    yield StageStarted(stage=STAGE)
    merging = Merging(
        model_folder, weighted(adapter_folder), base=base, form=form, dtype=FORMS[form], stage=STAGE
    )
    with open_merged(
        model_folder, merging.adapters, base=base, dtype=merging.dtype, chunk_bytes=writing.chunk_bytes
    ) as merged:
        yield from _warnings(merging, merged)
        yield from write_model(target, merging, merged=merged, tensors=merged, writing=writing)
    yield exported(target, form=form, base=base, started=started)


def _check_choice(what: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise BadRecipe(
            f"The {what} {choice!r} of an export is not known.", cure=f"Choose from: {', '.join(choices)}."
        )


def _warnings(merging: Merging, merged: MergedModel) -> Iterator[Event]:
    """What is to be known of the model before it is written."""
    if merged.changed_config.get("tie_word_embeddings") is False:
        yield Warned(
            message="Embedding and head are one table in the base, and the adapter makes two of it: "
            "the model is written with both.",
            cure="Nothing is wrong; what loads it must follow tie_word_embeddings in its config.json.",
        )
    contracts = [folder / CONTRACT_FILE for folder in merging.folders]
    texts = {path.read_text(encoding="utf-8") if path.is_file() else "" for path in contracts}
    if len(texts) > 1:
        yield Warned(
            message="The adapters were trained with different prompts; the model has that of "
            f"{merging.folders[0]}.",
            cure="Put the adapter first whose template and end tokens the model is to have.",
        )
