"""The streamed merge: base + adapter to a model folder that plain transformers loads, a few rows at a time.

What is written is decided here and computed in `merged_rows.py`. Source tensors keep their names and order; a
tied head stays tied. Nothing appears at the target before everything is there. Knows nothing of runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qadapt.adapters.facts import read_facts
from qadapt.errors import BadExport, BadRecipe, BadRun
from qadapt.events import Event, Exported, StageAdvanced, StageStarted
from qadapt.export.adapter import Adapter, TokenRows
from qadapt.export.card import CardFacts
from qadapt.export.folder import TOKENIZER, Vocabulary, write_other_files
from qadapt.export.merged_rows import FLOATS, BaseForm, MergedRows
from qadapt.export.prompt_files import write_prompt_files
from qadapt.export.staging import new_folder
from qadapt.model.folder import check_config, read_config
from qadapt.model.shards import TensorEntry, write_shards
from qadapt.model.tensor_files import TensorReader, open_model
from qadapt.shape import ModelShape, shape_from_config, table_rows
from qadapt.units import GIB, MIB

FORMS = {"merged-fp16": "F16", "merged-bf16": "BF16", "merged-fp32": "F32"}
"""Forms by name, with the type of their weights in safetensors' words."""
BASES = ("dequantized", "original")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The two tables, as all families of `shape.FAMILIES` name them."""
STAGE = "merging"
_OTHER_FILES_BYTES = 32 * MIB


@dataclass(frozen=True)
class Writing:
    """How a merged model is written.

    `shard_bytes` is the largest size of one file; `chunk_bytes` that of a chunk of rows in fp32: memory is a
    few of them, and the default fits the caches of processors, which is fastest.
    """

    shard_bytes: int = 2 * GIB
    chunk_bytes: int = 4 * MIB
    card: CardFacts = field(default_factory=CardFacts)


def merge(
    *,
    model_folder: Path,
    adapter_folder: Path,
    target: Path,
    form: str = "merged-fp16",
    base: str = "dequantized",
    writing: Writing | None = None,
) -> Iterator[Event]:
    """Merges an adapter into its base and writes a whole model folder, yielding its progress.

    Nothing is at `target` until everything is: an error, or closing this generator, leaves no trace.

    Args:
        model_folder: The base, unquantized: config.json, safetensors, tokenizer.
        adapter_folder: A PEFT folder of LoRA; base `dequantized` also reads its `qadapt.json`.
        target: The folder to be; it must not exist.
        form: One of `FORMS`.
        base: One of `BASES`.
        writing: Sizes and the card's facts.

    Raises:
        BadExport: The adapter is not of this base, has NaN, or a merged number is too large for the form.
        BadModel: The base cannot be read.
        BadOutput: The target exists, or its place is read-only or full.
        BadRecipe: Form or base is not known.
        BadRun: There is no adapter in the folder, or not the facts that `dequantized` needs.
        Unsupported: The adapter or the base is of a kind that is not merged here.
    """
    started, writing = time.monotonic(), writing or Writing()
    _check_choice("form", form, tuple(FORMS))
    _check_choice("base", base, BASES)
    yield StageStarted(stage=STAGE)
    shape = _checked_shape(model_folder)
    with open_model(model_folder) as reader, Adapter(adapter_folder) as adapter:
        _check_belongs(adapter, reader, model_folder)
        tokens = _token_rows(adapter, reader, is_tied=shape.tied)
        entries = [
            _written_entry(entry, FORMS[form], tokens.get(entry.name)) for entry in reader.entries.values()
        ]
        vocabulary = _vocabulary(adapter_folder, entries) if tokens else None
        total = sum(entry.size_bytes for entry in entries)
        base_form = _held_base(adapter_folder, shape) if base == "dequantized" else None
        merged = MergedRows(reader, adapter, base=base_form, tokens=tokens, chunk_bytes=writing.chunk_bytes)
        with new_folder(target, needed_bytes=total + _OTHER_FILES_BYTES) as folder:
            done = 0
            for entry in write_shards(folder, entries, values=merged.values, shard_bytes=writing.shard_bytes):
                done += entry.size_bytes
                yield StageAdvanced(stage=STAGE, done=done, total=total)
            write_other_files(
                model_folder, folder, form=form, base=base, card=writing.card, vocabulary=vocabulary
            )
            write_prompt_files(adapter_folder, folder)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    yield Exported(form=form, base=base, folder=str(target), bytes=size, seconds=time.monotonic() - started)


def _check_choice(what: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise BadRecipe(
            f"The {what} {choice!r} of an export is not known.", cure=f"Choose from: {', '.join(choices)}."
        )


def _checked_shape(model_folder: Path) -> ModelShape:
    config = read_config(model_folder, name=model_folder.name)
    check_config(config, name=model_folder.name)
    return shape_from_config(config, name=model_folder.name)


def _held_base(adapter_folder: Path, shape: ModelShape) -> BaseForm:
    """How the base was held while the adapter was trained."""
    facts = read_facts(adapter_folder)
    return BaseForm(
        dtype=facts.load_dtype,
        quantization=facts.quantization,
        quantized=tuple(linear.name for linear in shape.linears) if facts.quantization != "none" else (),
        double_quant=facts.double_quant,
    )


def _check_belongs(adapter: Adapter, reader: TensorReader, folder: Path) -> None:
    cure = "Give the base that this adapter was trained on; its name stands in adapter_config.json."
    for weight in (*adapter.weights, *adapter.rows):
        entry = reader.entries.get(weight)
        if entry is None:
            raise BadExport(f"The adapter updates {weight}, which the base in {folder} lacks.", cure=cure)
        tokens = adapter.rows.get(weight)
        shape = adapter.shape_of(weight) if tokens is None else (entry.shape[0], tokens.values.shape[1])
        if entry.shape != shape:
            raise BadExport(f"{weight} is {shape} in the adapter and {entry.shape} in {folder}.", cure=cure)


def _token_rows(adapter: Adapter, reader: TensorReader, *, is_tied: bool) -> dict[str, TokenRows]:
    """Tables by name, with the rows of tokens they get; files may hold a tied head, too."""
    if is_tied and HEAD in reader.entries and EMBEDDING in adapter.rows:
        return {**adapter.rows, HEAD: adapter.rows[EMBEDDING]}
    return adapter.rows


def _vocabulary(adapter_folder: Path, entries: Sequence[TensorEntry]) -> Vocabulary:
    """What the new tokens change beside the weights.

    Raises:
        BadExport: Embedding and head would not have the same number of rows.
        BadRun: The tokenizer is missing.
    """
    rows = {entry.shape[0] for entry in entries if entry.name in (EMBEDDING, HEAD)}
    if len(rows) > 1:
        raise BadExport(
            f"The adapter has rows of new tokens for one of {EMBEDDING} and {HEAD} only.",
            cure="Serve it beside its base with PEFT.",
        )
    if not any((adapter_folder / name).is_file() for name in TOKENIZER):
        raise BadRun(
            f"The adapter has new tokens, and {adapter_folder} no tokenizer that knows them.",
            cure="Save the tokenizer that it was trained with beside it.",
        )
    return Vocabulary(rows.pop(), tokenizer=adapter_folder)


def _written_entry(entry: TensorEntry, dtype: str, tokens: TokenRows | None) -> TensorEntry:
    shape = entry.shape
    if tokens is not None:
        shape = (table_rows(shape[0], max(tokens.ids) + 1), *shape[1:])
    return TensorEntry(entry.name, dtype if entry.dtype in FLOATS else entry.dtype, shape)
