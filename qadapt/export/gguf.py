"""A merged model as one GGUF file, without llama.cpp: metadata, tokenizer, and tensors a few rows at a time.

Each tensor is merged, arranged as llama.cpp wants it (`model/gguf_layout.py`) and rounded once to its type;
vectors and norms stay in float32, in which llama.cpp computes them. What a block of a quantized type loses is
checked as it is made, and the file is read back before the work counts as done (`gguf_file.py`). Knows
nothing of adapters and runs.

Legend: O rows, I columns of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import numpy.typing as npt

from qadapt.errors import Unsupported
from qadapt.events import Event, StageStarted, Warned
from qadapt.export.gguf_file import STAGE, FileTensor, write_file
from qadapt.export.gguf_front import Value
from qadapt.export.gguf_metadata import Architecture, general_values, read_architecture
from qadapt.export.gguf_tokenizer import read_vocabulary
from qadapt.export.gguf_types import BLOCK, is_quantized, quantized
from qadapt.model.gguf_layout import Stored, row_order
from qadapt.model.load import COMPUTED_ANEW
from qadapt.model.shards import TensorEntry
from qadapt.model.tensor_files import row_elements, rows_of

EMBEDDING = "token_embd.weight"
_HEAD = "lm_head.weight"
_NUMPY: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_FILE_TYPES = {
    "F16": gguf.LlamaFileType.MOSTLY_F16, "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "Q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "Q5_0": gguf.LlamaFileType.MOSTLY_Q5_0, "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}  # fmt: skip


class MergedTensors(Protocol):
    """Tensors of a merged model, as `merged_model.open_merged` gives them."""

    @property
    def entries(self) -> Sequence[TensorEntry]:
        """Names and shapes, as transformers has them."""

    def values(self, entry: TensorEntry) -> Iterator[memoryview]:
        """The bytes of a tensor in the type of the entry, in pieces of whole rows."""


@dataclass(frozen=True)
class About:
    """What a file says of itself.

    Attributes:
        title: The model's name.
        base: The model it was made from; may be empty.
        licence: Of the base, if it is known.
        adds_bos: Whether a program puts the first token before every text; None: as the tokenizer does.
    """

    title: str
    base: str = ""
    licence: str | None = None
    adds_bos: bool | None = None


def write_gguf(
    merged: MergedTensors, target: Path, *, described: Path, kind: str, about: About
) -> Iterator[Event]:
    """Writes a GGUF file and reads it back, yielding its progress.

    Args:
        merged: The tensors.
        target: The file to be, in a folder that is shown when everything is done (`staging.new_folder`).
        described: A folder with what a merged model has beside its weights: configuration, tokenizer,
            template, generation config.
        kind: What matrices are stored as, a value of `gguf_types.GGUF_FORMS`.
        about: What the file says of itself.

    Raises:
        BadExport: A number does not fit the type, or the file is not what was written.
        BadModel: The folder cannot be read.
        BadOutput: The place is read-only.
        NoRoom: The disk is too full.
        Unsupported: llama.cpp does not know this model, its tokenizer or a tensor, or knows it otherwise.
    """
    yield StageStarted(stage=STAGE)
    architecture = read_architecture(described)
    tensors = _file_tensors(merged, architecture, kind=kind)
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == EMBEDDING)
    vocabulary = read_vocabulary(described, rows=rows, adds_bos=about.adds_bos)
    title = vocabulary.title(about.title)
    values: dict[str, Value] = {
        "general.type": "model",
        **general_values(title=title, base=about.base, licence=about.licence),
        "general.file_type": int(_FILE_TYPES[kind]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **architecture.values,
        **vocabulary.values,
    }
    yield from (*architecture.warnings, *vocabulary.warnings, *_fallbacks(tensors, kind))
    yield from write_file(target, architecture.name, tensors=tensors, values=values)


def _file_tensors(merged: MergedTensors, architecture: Architecture, *, kind: str) -> list[FileTensor]:
    """The tensors of the file: those of the model, and those that only the configuration has."""
    tensors = []
    for entry in merged.entries:
        if COMPUTED_ANEW.search(entry.name) or (architecture.is_tied and entry.name == _HEAD):
            continue
        stored = architecture.layout.stored(entry.name)
        if stored is None:
            raise Unsupported(
                f"llama.cpp's {architecture.name} has no place for the tensor {entry.name}.",
                cure="Export with --form merged-fp16 and serve it with transformers or vLLM.",
            )
        chosen = "F32" if stored.name.endswith("_norm.weight") else stored_kind(entry, kind)
        pieces = partial(_pieces, merged, entry, stored=stored, kind=chosen)
        tensors.append(FileTensor(stored.name, entry.shape, chosen, pieces))
    for name, tensor in architecture.tensors.items():
        whole = (_bytes(tensor),)
        tensors.append(FileTensor(name, tensor.shape, "F32", partial(iter, whole)))
    return tensors


def stored_kind(entry: TensorEntry, kind: str) -> str:
    """The type of one tensor, as llama.cpp's converter chooses it.

    Args:
        entry: The tensor; of norms only vectors.
        kind: The type of matrices.
    """
    if len(entry.shape) < 2:
        return "F32"
    return "F16" if is_quantized(kind) and row_elements(entry) % BLOCK else kind


def _fallbacks(tensors: Iterable[FileTensor], kind: str) -> Iterator[Warned]:
    left = [tensor for tensor in tensors if tensor.kind == "F16" != kind]
    if left:
        yield Warned(
            message=f"{len(left)} tensors stay in F16, {left[0].name} first: {left[0].shape[1]} columns are "
            f"no multiple of {BLOCK}, the block of {kind}.",
            cure="Nothing is lost; the file is larger than others of its type.",
        )


def _pieces(merged: MergedTensors, entry: TensorEntry, *, stored: Stored, kind: str) -> Iterator[memoryview]:
    """The bytes of a tensor as they lie in the file."""
    dtype = "F32" if is_quantized(kind) else kind
    values = merged.values(replace(entry, dtype=dtype))
    head_rows = rows_of(entry) // stored.interleaved_heads if stored.interleaved_heads else 1
    for rows in _grouped(values, dtype=_NUMPY[dtype], columns=row_elements(entry), group=head_rows):
        if stored.interleaved_heads:
            rows = rows[np.argsort(row_order(len(rows), len(rows) // head_rows))]
        if stored.is_plus_one:
            rows = rows + np.float32(1)
        yield _bytes(quantized(rows, kind, name=entry.name) if is_quantized(kind) else rows)


def _grouped(
    pieces: Iterable[memoryview], *, dtype: np.dtype[Any], columns: int, group: int
) -> Iterator[npt.NDArray[Any]]:
    """Pieces of whole rows (n, I) as others whose number of rows is a multiple of `group`."""
    held = np.empty((0, columns), dtype=dtype)
    for piece in pieces:
        rows = np.frombuffer(piece, dtype=dtype).reshape(-1, columns)
        if len(held):
            rows = np.concatenate([held, rows])
        whole = len(rows) // group * group
        if whole:
            yield rows[:whole]
        held = rows[whole:].copy()
    assert not len(held), "a tensor of heads has a whole number of them"


def _bytes(values: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
