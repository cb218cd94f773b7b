"""A merged model into a folder, however its weights are stored: sizes, files in their order, what follows.

`merge.py` and `quantized.py` say which tensors; here they are written, and shown when all is there
(`staging.py`). Knows nothing of runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qadapt.events import Event, StageAdvanced
from qadapt.export.folder import write_other_files
from qadapt.export.identity import identity_of
from qadapt.export.merged_model import MergedModel
from qadapt.export.prompt_files import write_prompt_files
from qadapt.export.staging import new_folder
from qadapt.model.shards import TensorEntry, write_shards
from qadapt.units import GIB, MIB

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


@dataclass(frozen=True)
class Merging:
    """What is merged, and into what.

    Attributes:
        model_folder: The base, unquantized.
        adapters: PEFT folders, each with the weight of its update; prompts are as for the first.
        base: Weights to merge on, `dequantized` or `original`.
        form: Name of what comes out.
        dtype: Type of its weights in safetensors' words; of quantized ones, of those that are not.
        stage: What writing it is called while it happens.
        config: Fields that the form adds to config.json.
    """

    model_folder: Path
    adapters: Sequence[tuple[Path, float]]
    base: str
    form: str
    dtype: str
    stage: str
    config: Mapping[str, object] = field(default_factory=dict)

    @property
    def folders(self) -> list[Path]:
        """Those of the adapters."""
        return [folder for folder, _ in self.adapters]

    def identity(self, writing: Writing) -> str:
        """What decides the bytes of its files, as one hash."""
        choices = {
            "form": self.form,
            "base": self.base,
            "dtype": self.dtype,
            "shard": writing.shard_bytes,
            "chunk": writing.chunk_bytes,
            "weights": ",".join(str(weight) for _, weight in self.adapters),
        }
        return identity_of(self.model_folder, self.folders, choices=choices)


class Tensors(Protocol):
    """What is stored: every tensor in its order, and the bytes of each."""

    @property
    def entries(self) -> Sequence[TensorEntry]:
        """Names, types and shapes."""
        ...

    def values(self, entry: TensorEntry) -> Iterable[memoryview]:
        """The bytes of one of them, in pieces."""
        ...


def write_model(
    target: Path, merging: Merging, *, merged: MergedModel, tensors: Tensors, writing: Writing
) -> Iterator[Event]:
    """Writes a whole model folder, yielding its progress.

    Nothing is at `target` until everything is: an error, or closing this generator, leaves no trace; if the
    process is killed, the next call goes on with the files that were whole (`staging.py`).

    Args:
        target: The folder to be; it must not exist.
        merging: What is merged.
        merged: The same, opened.
        tensors: How its weights are stored; `merged` itself, or what is made of it.
        writing: Sizes, and what follows before the folder appears.

    Raises:
        BadOutput: The target exists, or its place is read-only.
        NoRoom: The disk is too full.
        QadaptError: What reading the numbers raises.
    """
    total = sum(entry.size_bytes for entry in tensors.entries)
    needed_bytes = total + OTHER_FILES_BYTES
    done = 0
    with new_folder(target, needed_bytes=needed_bytes, identity=merging.identity(writing)) as building:
        for entry in write_shards(
            building.path,
            tensors.entries,
            values=tensors.values,
            shard_bytes=writing.shard_bytes,
            finished=building,
        ):
            done += entry.size_bytes
            yield StageAdvanced(stage=merging.stage, done=done, total=total)
        write_other_files(
            merging.model_folder,
            building.path,
            dtype=merging.dtype,
            changed_config={**merged.changed_config, **merging.config},
            vocabulary=merged.vocabulary,
        )
        write_prompt_files(merging.folders[0], building.path)
        yield from writing.finish(building.path)
