"""A merged model before it is written: its tensors, what changes in config.json, and the numbers in chunks.

Everything that can be wrong with base and adapter is found here, before the first byte is written. Source
tensors keep their names and order; `tables.py` decides on embedding and head, `merged_rows.py` computes.
Knows neither runs nor files that are written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadapt.adapters.facts import FACTS_FILE, AdapterFacts, read_facts
from qadapt.architecture import check_decoder, check_fields
from qadapt.errors import BadExport, BadRecipe, Unsupported
from qadapt.export.adapter import Adapter, refuse_in_a_mix
from qadapt.export.adapter_names import AS_IT_IS, EMBEDDING, HEAD
from qadapt.export.folder import Vocabulary
from qadapt.export.merged_rows import FLOATS, BaseForm, MergedRows
from qadapt.export.one_base import check_one_base
from qadapt.export.tables import Tables, merged_tables, vocabulary_of
from qadapt.model.folder import already_quantized, check_config, read_config
from qadapt.model.shards import TensorEntry
from qadapt.model.tensor_files import TensorReader, open_model
from qadapt.shape import FAMILIES, shape_from_config, table_rows
from qadapt.units import MIB

Adapters = Path | Sequence[tuple[Path, float]]
"""The folder of an adapter, or folders with weights: Σ weight · ΔW is merged."""
_MERGED_ONLY = ("gemma3_text", "smollm3")
MERGED_FAMILIES = (*FAMILIES, *_MERGED_ONLY)
"""Architectures whose merge is tested, by `model_type`; some are not trained here."""
_TIED_UNLESS_SAID = ("gemma2", "gemma3_text", "smollm3")
_USUAL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ANOTHER_BASE = "Give the base that this adapter was trained on; its name stands in adapter_config.json."


@dataclass(frozen=True)
class MergedModel:
    """A merged model that is still to be written.

    Attributes:
        entries: Its tensors in the order they are written; a head that is no longer tied comes last.
        changed_config: Fields of config.json that are others than the base's.
        vocabulary: What new tokens change beside the weights; None: there are none.
        rows: Its numbers.
    """

    entries: tuple[TensorEntry, ...]
    changed_config: dict[str, object]
    vocabulary: Vocabulary | None
    rows: MergedRows

    def values(self, entry: TensorEntry) -> Iterator[memoryview]:
        """The bytes of one of `entries`, in chunks of whole rows; see `MergedRows.values`."""
        return self.rows.values(entry)


@contextmanager
def open_merged(
    model_folder: Path, adapters: Adapters, *, base: str, dtype: str = "F16", chunk_bytes: int = 4 * MIB
) -> Iterator[MergedModel]:
    """Opens a base and its adapters as one merged model; its numbers can be read while the block is open.

    Args:
        model_folder: The base, unquantized: config.json, safetensors, tokenizer.
        adapters: PEFT folders; base `dequantized` also reads their `qadapt.json`.
        base: Weights to merge on, `dequantized` or `original`.
        dtype: What numbers are rounded to, `F32`, `F16` or `BF16`.
        chunk_bytes: Bytes of one chunk in fp32: memory is a few of them.

    Raises:
        BadExport: An adapter is not of this base, or has NaN; while reading: a number is too large.
        BadModel: The base cannot be read.
        BadRecipe: No adapter, or a weight that is no number.
        BadRun: There is no adapter in the folder, or not the facts that `dequantized` needs.
        Unsupported: An adapter or the base is of a kind that is not merged here.
    """
    config = _checked_config(model_folder)
    chosen = weighted(adapters)
    is_tied = bool(config.get("tie_word_embeddings", config["model_type"] in _TIED_UNLESS_SAID))
    with ExitStack() as stack:
        reader = stack.enter_context(open_model(model_folder))
        opened = [stack.enter_context(Adapter(folder, weight)) for folder, weight in chosen]
        if len(opened) > 1 or opened[0].weight != 1:
            for adapter in opened:
                refuse_in_a_mix(adapter)
        tables = merged_tables(opened, reader, is_tied=is_tied)
        for adapter in opened:
            _check_belongs(adapter, reader, tables, folder=model_folder)
        entries = tuple(_written_entries(reader, tables, dtype=dtype))
        vocabulary = vocabulary_of(tables, opened[0].folder, before=reader.entries, after=entries)
        changed: dict[str, object] = {"tie_word_embeddings": False} if tables.is_untied else {}
        if vocabulary is not None:
            changed["vocab_size"] = vocabulary.rows
        rows = MergedRows(
            reader,
            opened,
            base=_held_base([folder for folder, _ in chosen], config, is_held=base == "dequantized"),
            tokens=tables.tokens,
            given={name: given.rows for name, given in tables.given.items()},
            sources=tables.sources,
            chunk_bytes=chunk_bytes,
        )
        yield MergedModel(entries, changed, vocabulary, rows)


def weighted(adapters: Adapters) -> list[tuple[Path, float]]:
    """Folders and weights of what is merged.

    Raises:
        BadRecipe: No adapter, or a weight that is no number.
    """
    if isinstance(adapters, Path):
        return [(adapters, 1.0)]
    if not adapters:
        raise BadRecipe("There is no adapter to merge.", cure="Give the folder of a finished adapter.")
    for folder, weight in adapters:
        if not math.isfinite(weight):
            raise BadRecipe(
                f"The weight of the adapter in {folder} is {weight}; a number is needed.",
                cure="Give a finite number; 1 merges an adapter as it was trained.",
            )
    return list(adapters)


def _checked_config(model_folder: Path) -> dict[str, Any]:
    name = model_folder.name
    config = read_config(model_folder, name=name)
    if config.get("model_type") not in _MERGED_ONLY:
        check_config(config, name=name)
        return config
    if config.get("quantization_config"):
        raise already_quantized(name, method=str(config["quantization_config"].get("quant_method")))
    check_decoder(config, name=name)
    check_fields(config, name=name)
    return config


def _held_base(folders: Sequence[Path], config: Mapping[str, Any], *, is_held: bool) -> BaseForm | None:
    """How the base was held while the adapters were trained; None: its published weights count.

    Raises:
        BadExport: They were trained on different ones, or only on the one that was held.
    """
    of_qadapt = [folder for folder in folders if is_held or (folder / FACTS_FILE).is_file()]
    known = [read_facts(folder) for folder in of_qadapt]
    check_one_base(of_qadapt, known, is_held=is_held)
    if not is_held:
        _refuse_mended(known)
        return None
    facts = known[0]
    return BaseForm(
        dtype=facts.load_dtype,
        quantization=facts.quantization,
        quantized=_linears(config) if facts.quantization != "none" else (),
        double_quant=facts.double_quant,
    )


def _refuse_mended(known: Sequence[AdapterFacts]) -> None:
    """Refuses the published weights for an adapter that mends the quantized ones."""
    for facts in known:
        if facts.mends_base:
            raise BadExport(
                f"The adapter began as what {facts.quantization} took from its base (LoftQ): on the "
                "published weights it mends an error that is not there.",
                cure="Merge it on the dequantized base, or export it with --form adapter.",
            )


def _linears(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the linear layers of a decoder layer, which a run holds quantized."""
    if config["model_type"] in _MERGED_ONLY:
        return _USUAL_LINEARS
    return tuple(linear.name for linear in shape_from_config(config, name="").linears)


def _check_belongs(adapter: Adapter, reader: TensorReader, tables: Tables, *, folder: Path) -> None:
    """Checks that the base has all that an adapter changes, in its shape, and the adapter what it names."""
    for name, base in reader.entries.items():
        if len(base.shape) == 2 and name.endswith(".weight") and adapter.promises(name):
            raise BadExport(
                f"The adapter in {adapter.folder} has nothing for {name}, which its configuration names.",
                cure="The adapter file is damaged; take it from a checkpoint of the run.",
            )
    for name in sorted(adapter.touched):
        entry = reader.entries.get(tables.sources.get(name, name))
        if entry is None and name in adapter.shifts:
            raise Unsupported(
                f"The adapter has a bias for {name}, and the base none that it could be added to.",
                cure=AS_IT_IS,
            )
        if entry is None:
            raise BadExport(
                f"The adapter updates {name}, which the base in {folder} lacks.", cure=_ANOTHER_BASE
            )
        if entry.dtype not in FLOATS:
            raise Unsupported(
                f"The adapter updates {name}, which is of the type {entry.dtype} in {folder}.", cure=AS_IT_IS
            )
        held = tables.given[name].shape if name in tables.given else entry.shape
        for shape, fitting in _shapes(adapter, name, held):
            if shape != fitting:
                raise BadExport(
                    f"{name} is {shape} in the adapter and {fitting} in {folder}.", cure=_ANOTHER_BASE
                )
        if held != entry.shape and (name not in (EMBEDDING, HEAD) or held[1:] != entry.shape[1:]):
            raise BadExport(
                f"{name} is {held} in the adapter and {entry.shape} in {folder}.", cure=_ANOTHER_BASE
            )


def _shapes(
    adapter: Adapter, name: str, held: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each shape that an adapter has for a tensor, and that which it must have."""
    if name in adapter.weights:
        yield adapter.shape_of(name), held
    if name in adapter.projected:
        rows, most_columns = adapter.projected_shape(name)
        yield (rows, min(most_columns, held[1])), held
    if name in adapter.turned:
        yield (held[0], adapter.turned_columns(name)), held
    if name in adapter.rows:
        yield (held[0], adapter.rows[name].values.shape[1]), held
    if name in adapter.shifts:
        yield tuple(adapter.shift(name).view(-1).shape), held
    if name in adapter.scaled:
        scaling = adapter.scaling(name).shape
        yield tuple(scaling), (held[0], 1) if scaling[-1:] == (1,) else (1, *held[1:])


def _written_entries(reader: TensorReader, tables: Tables, *, dtype: str) -> Iterator[TensorEntry]:
    for entry in reader.entries.values():
        yield _written_entry(entry, entry.name, tables, dtype=dtype)
    if tables.is_untied and HEAD in tables.sources:
        yield _written_entry(reader.entries[EMBEDDING], HEAD, tables, dtype=dtype)


def _written_entry(source: TensorEntry, name: str, tables: Tables, *, dtype: str) -> TensorEntry:
    shape = tables.given[name].shape if name in tables.given else source.shape
    tokens = tables.tokens.get(name)
    if tokens is not None:
        shape = (table_rows(shape[0], max(tokens.ids) + 1), *shape[1:])
    return TensorEntry(name, dtype if source.dtype in FLOATS else source.dtype, shape)
