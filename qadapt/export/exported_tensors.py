"""The tensors of an export under transformers' names, whatever its form, and what model they make.

16-bit and 32-bit files as they are, those of bitsandbytes' NF4 and of GGUF dequantized. Knows no run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig

from qadapt.errors import BadModel
from qadapt.export.adapter_names import HEAD
from qadapt.export.gguf_written import GgufWritten
from qadapt.export.quantized import FORM as QUANTIZED
from qadapt.export.quantized_written import QuantizedWritten
from qadapt.export.stored_tensors import ExportedFiles, Written
from qadapt.export.streamed_model import Tensors, tensors_of
from qadapt.model.folder import read_config
from qadapt.model.skeleton import config_of
from qadapt.model.tensor_files import open_model

_SAFETENSORS_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@contextmanager
def exported_tensors(
    folder: Path, form: str, *, model_folder: Path
) -> Iterator[tuple[PretrainedConfig, Tensors]]:
    """The model that an export makes, and its tensors, while open.

    Args:
        folder: The export; it holds the model's config.json.
        form: Its form: merged, quantized or GGUF.
        model_folder: The base.

    Raises:
        BadModel: A file is missing or damaged.
    """
    config = config_of(read_config(folder, name=folder.name))
    if form == QUANTIZED or form.startswith("gguf-"):
        with open_written(folder, form, model_folder=model_folder) as written:
            yield config, _tensors_of_written(written)
    else:
        with open_model(folder) as reader:
            yield config, tensors_of(reader)


@contextmanager
def open_written(folder: Path, form: str, *, model_folder: Path) -> Iterator[Written]:
    """The tensors of an export that holds them quantized, for a proof, while open.

    Args:
        folder: The export.
        form: `bnb-4bit`, or one of a whole GGUF file.
        model_folder: The base: a GGUF file has its tensors, under other names.

    Raises:
        BadModel: The configuration or the base cannot be read.
    """
    if form == QUANTIZED:
        with ExportedFiles(folder) as files:
            yield QuantizedWritten(files, dtype=dtype_of(folder, form))
        return
    with open_model(model_folder) as reader:
        names = dict.fromkeys(reader.entries)
    if not config_of(read_config(folder, name=folder.name)).tie_word_embeddings:
        names[HEAD] = None
    yield GgufWritten(gguf_of(folder), described=folder, names=tuple(names))


def gguf_of(folder: Path) -> Path:
    """The GGUF file of an export.

    Raises:
        BadModel: There is none.
    """
    for path in sorted(folder.glob("*.gguf")):
        return path
    raise BadModel(f"{folder} has no GGUF file.", cure="Export again with a GGUF form.")


def dtype_of(folder: Path, form: str) -> str:
    """What the numbers of an export that are not quantized were rounded to, in safetensors' words."""
    if form.startswith("gguf-"):
        return "F32"  # as they are read: what is stored otherwise has a bound of its own
    return _SAFETENSORS_NAMES[read_config(folder, name=folder.name)["dtype"]]


def _tensors_of_written(written: Written) -> Tensors:
    def read(name: str, first: int, last: int) -> Tensor:
        shape = written.entries[name].shape
        return written.rows(name, first, last).reshape(last - first, *shape[1:]).clone()

    return Tensors(frozenset(written.entries), read)
