"""A LoRA adapter on disk (a plain PEFT folder), read pair by pair for merging.

The update of a weight is scale · B · A (arXiv:2106.09685), scale alpha / rank or alpha / √rank (rsLoRA,
arXiv:2312.03732). Rows of new tokens (PEFT's `trainable_token_indices`) replace a table's own. What is in an
adapter and cannot be merged here is refused by name: nothing is left out silently. Imports no PEFT: the
folder is two files of published form.

Legend: O output rows, I input columns of the adapted weight, R rank, N new tokens, D width of a table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from qadapt.errors import BadExport, BadRun, Unsupported
from qadapt.model.tensor_files import TensorReader
from qadapt.model.tensor_values import tensor_of

_PREFIX = "base_model.model."
_PAIR = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_ROWS = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_MUST_BE_EMPTY = (
    "use_dora", "modules_to_save", "lora_bias", "target_parameters", "layer_replication", "fan_in_fan_out",
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "velora_config",
)  # fmt: skip
_BASE_KEEPING_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "true")
"""Initializations that leave the base as it was; the others (PiSSA, OLoRA, LoftQ, ...) rewrite it."""


@dataclass(frozen=True)
class Update:
    """The update of one weight: `scale` · B · A, in fp32."""

    a: torch.Tensor  # (R, I)
    b: torch.Tensor  # (O, R)
    scale: float


@dataclass(frozen=True)
class TokenRows:
    """Rows that stand in place of a table's own: those of new tokens."""

    ids: tuple[int, ...]
    values: torch.Tensor  # (N, D), fp32


class Adapter:
    """An open adapter folder. A context manager.

    Attributes:
        weights: Names of the weights it updates, as they are named in the base.
        rows: Names of the tables of which it has rows, as they are named in the base, and these rows.

    Args:
        folder: A PEFT folder.

    Raises:
        BadRun: The folder holds no adapter, or a damaged one.
        BadExport: A number of the adapter is NaN or infinite, or the tensors contradict the configuration.
        Unsupported: It holds something that is not merged here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config = _read_config(folder)
        _refuse_unsupported(self._config, folder)
        path = folder / "adapter_model.safetensors"
        if not path.is_file():
            raise BadRun(
                f"{folder} has no adapter_model.safetensors.", cure="Give the folder of a finished adapter."
            )
        self._reader = TensorReader([path])
        try:
            self._modules = self._paired_modules()
            self._check_numbers()
            self.rows = dict(self._token_rows())
            self._check_rows()
        except BaseException:
            self._reader.close()
            raise
        self.weights = tuple(f"{module}.weight" for module in self._modules)

    def shape_of(self, weight: str) -> tuple[int, int]:
        """(O, I) that the update of a weight has."""
        a, b = (self._reader.entries[name] for name in _names(weight.removesuffix(".weight")))
        return b.shape[0], a.shape[1]

    def update(self, weight: str) -> Update:
        """The update of a weight named in `weights`, read now."""
        module = weight.removesuffix(".weight")
        a, b = (self._tensor(name).float() for name in _names(module))
        return Update(a, b, _scale(self._config, module, rank=a.shape[0]))

    def close(self) -> None:
        """Closes the file."""
        self._reader.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tensor(self, name: str) -> torch.Tensor:
        entry = self._reader.entries[name]
        return tensor_of(self._reader.read(name), entry.dtype, entry.shape)

    def _paired_modules(self) -> tuple[str, ...]:
        modules: dict[str, set[str]] = {}
        for name in self._reader.entries:
            match = _PAIR.fullmatch(name)
            if _ROWS.fullmatch(name):
                continue
            if match is None:
                raise Unsupported(
                    f"The adapter in {self.folder} holds {name}, which cannot be merged yet.",
                    cure="Merged are LoRA pairs on linear layers; serve this one beside its base with PEFT.",
                )
            modules.setdefault(match["module"], set()).add(match["side"])
        halves = [module for module, sides in modules.items() if len(sides) == 1]
        if halves:
            raise BadExport(
                f"The adapter in {self.folder} has only one of the two matrices of {halves[0]}.",
                cure="The adapter file is damaged; take it from a checkpoint of the run.",
            )
        if not modules:
            raise BadExport(
                f"The adapter in {self.folder} is empty.", cure="Give the folder of a finished run."
            )
        for module in modules:
            self._check_rank(module)
        return tuple(modules)

    def _token_rows(self) -> Iterator[tuple[str, TokenRows]]:
        asked = self._config.get("trainable_token_indices") or {}
        tables = asked if isinstance(asked, dict) else {"embed_tokens": asked}
        for name, entry in self._reader.entries.items():
            if (match := _ROWS.fullmatch(name)) is None:
                continue
            module = match["module"]
            ids: list[int] = next((tables[each] for each in tables if f".{module}".endswith(f".{each}")), [])
            if len(entry.shape) != 2 or entry.shape[0] != len(ids):
                raise BadExport(
                    f"The adapter has {entry.shape} values for the rows {ids} of {module}.",
                    cure="Adapter file and configuration are of different runs; take both from one.",
                )
            yield f"{module}.weight", TokenRows(tuple(ids), self._tensor(name).float())

    def _check_rows(self) -> None:
        asked = self._config.get("trainable_token_indices")
        if asked and not self.rows:
            raise BadExport(
                f"The adapter in {self.folder} lacks the rows of its trainable_token_indices.",
                cure="The adapter file is damaged; take it from a checkpoint of the run.",
            )

    def _check_rank(self, module: str) -> None:
        a, b = (self._reader.entries[name].shape for name in _names(module))
        rank = _by_pattern(self._config.get("rank_pattern"), module, default=self._config["r"])
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
            raise BadExport(
                f"The adapter of {module} is {b} times {a}; adapter_config.json says rank {rank}.",
                cure="Adapter file and configuration are of different runs; take both from one.",
            )

    def _check_numbers(self) -> None:
        for name in self._reader.entries:
            if not self._tensor(name).isfinite().all():
                raise BadExport(
                    f"The adapter in {self.folder} has a NaN or infinite number in {name}.",
                    cure="The training diverged: export an earlier checkpoint, or lower train.learning_rate.",
                )


def _names(module: str) -> tuple[str, str]:
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRun(
            f"{folder} holds no adapter: {error}", cure="Give the folder of a finished run."
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("r", 0), int):
        raise BadRun(f"{path} is no configuration of an adapter.", cure="Take the file from the run again.")
    return config


def _refuse_unsupported(config: Mapping[str, Any], folder: Path) -> None:
    asked = [f"{field} = {config[field]!r}" for field in _MUST_BE_EMPTY if config.get(field)]
    if config.get("peft_type") != "LORA":
        asked.insert(0, f"peft_type = {config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        asked.append(f"bias = {config['bias']!r}")
    if config.get("init_lora_weights", True) not in _BASE_KEEPING_STARTS:
        asked.append(f"init_lora_weights = {config['init_lora_weights']!r}")
    if asked:
        raise Unsupported(
            f"The adapter in {folder} has {', '.join(asked)}, which cannot be merged yet.",
            cure="Merged are plain LoRA and rsLoRA; serve this adapter beside its base with PEFT.",
        )


def _scale(config: Mapping[str, Any], module: str, *, rank: int) -> float:
    alpha = _by_pattern(config.get("alpha_pattern"), module, default=config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(patterns: Mapping[str, float] | None, module: str, *, default: float) -> float:
    """The value of the first pattern that matches the end of a module's name, as PEFT reads them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
