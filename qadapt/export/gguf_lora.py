"""A LoRA adapter as a GGUF file of its own: what llama.cpp's `--lora` puts on a GGUF of the base.

Tensors are named after the weight they update, with `.lora_a` (R, I) and `.lora_b` (O, R); the rows of B are
arranged as those of the weight (`model/gguf_layout.py`), and A as it is. llama.cpp scales by alpha / R with
one alpha for the file; where an adapter scales otherwise (rsLoRA, patterns), the rest goes into B.
https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py, src/llama-adapter.cpp there.

Legend: O rows, I columns of a weight, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gguf
import numpy as np

from qadapt.errors import Unsupported
from qadapt.events import Event, StageStarted
from qadapt.export.adapter import Adapter
from qadapt.export.adapter_config import read_adapter_config
from qadapt.export.gguf import About
from qadapt.export.gguf_file import STAGE, FileTensor, write_file
from qadapt.export.gguf_front import Value
from qadapt.export.gguf_metadata import Architecture, general_values, read_architecture
from qadapt.model.gguf_layout import Stored, row_order

FORM = "gguf-lora"
_CURE = "Export the merged model with --form gguf-q8_0, or the adapter with --form adapter."
_TABLE = "token_embd.weight"


def write_gguf_lora(
    adapter_folder: Path, target: Path, *, model_folder: Path, about: About
) -> Iterator[Event]:
    """Writes an adapter as a GGUF file and reads it back, yielding its progress.

    Args:
        adapter_folder: A PEFT folder.
        target: The file to be, in a folder that is shown when everything is done.
        model_folder: The base, of which the configuration is read.
        about: What the file says of itself.

    Raises:
        BadExport: The adapter is damaged, or the file is not what was written.
        BadModel: The base's configuration cannot be read.
        BadRun: There is no adapter in the folder.
        NoRoom: The disk is too full.
        Unsupported: It is no plain LoRA, or adapts what llama.cpp cannot.
    """
    yield StageStarted(stage=STAGE)
    architecture = read_architecture(model_folder)
    with Adapter(adapter_folder) as adapter:
        if adapter.beyond_pairs:
            what = ", ".join(adapter.beyond_pairs)
            raise Unsupported(
                f"The adapter has {what}, which a LoRA file of llama.cpp cannot hold.", cure=_CURE
            )
        alpha = _alpha(adapter_folder)
        tensors = []
        for weight in adapter.weights:
            tensors += _pair(adapter, weight, stored=_place(architecture, weight), alpha=alpha)
        values: dict[str, Value] = {
            "general.type": "adapter",
            **general_values(title=about.title, base=about.base, licence=about.licence),
            "general.file_type": int(gguf.LlamaFileType.ALL_F32),
            "general.quantization_version": gguf.GGML_QUANT_VERSION,
            "adapter.type": "lora",
            "adapter.lora.alpha": alpha,
        }
        yield from write_file(target, architecture.name, tensors=tensors, values=values)


def _alpha(folder: Path) -> float:
    """The file's alpha; llama.cpp takes 0 for "no scale", so an adapter that has it is given 1."""
    return float(read_adapter_config(folder)["lora_alpha"]) or 1.0


def _place(architecture: Architecture, weight: str) -> Stored:
    """Where the weight lies in a GGUF of the base.

    Raises:
        Unsupported: Nowhere, or where llama.cpp reads an adapter otherwise.
    """
    stored = architecture.layout.stored(weight)
    is_head = architecture.is_tied and weight == "lm_head.weight"
    if stored is None or is_head or stored.name == _TABLE:
        why = (
            "which is the embedding in a GGUF of this model" if is_head else "which llama.cpp does not adapt"
        )
        raise Unsupported(f"The adapter updates {weight}, {why}.", cure=_CURE)
    return stored


def _pair(adapter: Adapter, weight: str, *, stored: Stored, alpha: float) -> list[FileTensor]:
    rows, columns = adapter.shape_of(weight)
    rank = adapter.update(weight).a.shape[0]
    return [
        FileTensor(f"{stored.name}.lora_a", (rank, columns), "F32", partial(_a, adapter, weight)),
        FileTensor(
            f"{stored.name}.lora_b",
            (rows, rank),
            "F32",
            partial(_b, adapter, weight, stored=stored, alpha=alpha),
        ),
    ]


def _a(adapter: Adapter, weight: str) -> Iterator[memoryview]:
    yield _bytes(adapter.update(weight).a.numpy())


def _b(adapter: Adapter, weight: str, *, stored: Stored, alpha: float) -> Iterator[memoryview]:
    update = adapter.update(weight)
    rest = update.scale * update.a.shape[0] / alpha
    b = update.b.numpy()
    if not math.isclose(rest, 1.0, rel_tol=1e-9):
        b = b * np.float32(rest)
    if stored.interleaved_heads:
        b = b[np.argsort(row_order(len(b), stored.interleaved_heads))]
    yield _bytes(b)


def _bytes(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
