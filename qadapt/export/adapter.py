"""An adapter on disk (a plain PEFT folder), read part by part for merging.

LoRA updates a weight by scale · B · A (arXiv:2106.09685), scale alpha / rank or alpha / √rank (rsLoRA,
arXiv:2312.03732), AdaLoRA by scale · P · diag(λ) Q (arXiv:2303.10512); DoRA then sets the lengths of its rows
(arXiv:2402.09353); IA3 scales rows or columns (arXiv:2205.05638); VeRA's A and B are parts of shared ones,
their rows scaled (arXiv:2310.11454); OFT turns blocks of columns (arXiv:2306.07280). Whole tensors
(`modules_to_save`, trained biases) and rows of new tokens (`trainable_token_indices`) stand in place of the
base's. `adapter_names.py` says what is what, `changes.py` computes. Imports no PEFT: the folder is two files
of published form.

Legend: O output rows, I input columns of the adapted weight, R rank, N new tokens, D width of a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch

from qadapt.adapters.facts import mends_base
from qadapt.engine.rotation import beyond_identity, block_of
from qadapt.errors import BadExport, BadRun, Unsupported
from qadapt.export.adapter_config import read_adapter_config
from qadapt.export.adapter_names import (
    AS_IT_IS,
    beyond_pairs,
    by_pattern,
    is_promised,
    named_parts,
    refuse_unmerged,
)
from qadapt.export.changes import TokenRows, Update, stored_rows
from qadapt.export.nf4 import Rows
from qadapt.model.tensor_files import TensorReader, row_elements, rows_of
from qadapt.model.tensor_values import tensor_of
from qadapt.plan.ranks import RANK_EPSILON

_LOOK_ELEMENTS = 1 << 20
"""Numbers that are looked at together."""
_PAIRS = (("B", "A"), ("table B", "table A"), ("left", "right"))
_OF_TWO_RUNS = "Adapter file and configuration are of different runs; take both from one."


class Adapter:
    """An open adapter folder. A context manager.

    Attributes:
        weight: How much of it is merged; 1: as it was trained.
        weights: Names of the weights it has a low-rank pair for, as they are named in the base.
        rows: Names of the tables of which it has rows, and these rows.
        whole: Names of the base's tensors that it has trained others for.
        starts: Names of the base's tables in place of which it was trained on its own, such as resized ones.
        given: Names of both, and their type and shape in the adapter.
        scaled: Names of the weights whose rows or columns it scales (IA3).
        directed: Names of those of `weights` whose rows or columns it gives a length (DoRA).
        projected: Names of the weights that it updates through shared projections (VeRA).
        turned: Names of the weights of which it turns blocks of columns (OFT).
        shifts: Names of the biases it adds to (`lora_bias`).
        beyond_pairs: What it has besides low-rank pairs, in words; empty for LoRA and rsLoRA.

    Args:
        folder: A PEFT folder.
        weight: How much of it is to be merged.

    Raises:
        BadRun: The folder holds no adapter, or a damaged one.
        BadExport: A number of the adapter is NaN or infinite, or the tensors contradict the configuration.
        Unsupported: It holds something that is not merged here, or not with a weight.
    """

    def __init__(self, folder: Path, weight: float = 1.0) -> None:
        self.folder, self.weight = folder, weight
        self._config = read_adapter_config(folder)
        refuse_unmerged(self._config, folder=folder)
        path = folder / "adapter_model.safetensors"
        if not path.is_file():
            raise BadRun(
                f"{folder} has no adapter_model.safetensors.", cure="Give the folder of a finished adapter."
            )
        self._reader = TensorReader([path])
        try:
            self._named = named_parts(self._reader.entries, self._config, folder=folder)
            self._check_ranks()
            self._check_projections()
            self._check_angles()
            self._check_numbers()
            self.rows = dict(self._token_rows())
        except BaseException:
            self._reader.close()
            raise
        pairs = {**self._named.having("A"), **self._named.having("table A")}
        right = self._named.having("right")
        pairs |= {module: name for module, name in right.items() if self._reader.entries[name].shape[0]}
        self._unchanged = tuple(f"{module}.weight" for module in right if module not in pairs)
        self.weights = tuple(f"{module}.weight" for module in pairs)
        self._given = {**self._named.whole, **self._named.starts}
        self.whole, self.starts = tuple(self._named.whole), tuple(self._named.starts)
        self.given = {name: self._reader.entries[stored] for name, stored in self._given.items()}
        self.scaled = tuple(f"{module}.weight" for module in self._named.having("scaling"))
        self.directed = tuple(f"{module}.weight" for module in self._named.having("magnitude"))
        self.projected = tuple(f"{module}.weight" for module in self._named.having("inner"))
        self.turned = tuple(f"{module}.weight" for module in self._named.having("angles"))
        self.shifts = tuple(f"{module}.bias" for module in self._named.having("shift"))
        self.beyond_pairs = beyond_pairs(self._named, self._config)

    @property
    def touched(self) -> frozenset[str]:
        """Names of all tensors that are not the base's afterwards, biases of IA3 left out."""
        updated = (*self.weights, *self._unchanged, *self.projected, *self.turned, *self.scaled)
        return frozenset((*updated, *self.rows, *self.given, *self.shifts))

    def promises(self, weight: str) -> bool:
        """Whether its configuration says that it adapts a weight of the base, of which it has nothing."""
        return weight not in self.touched and is_promised(weight.removesuffix(".weight"), self._config)

    def shape_of(self, weight: str) -> tuple[int, int]:
        """(O, I) that the update of a weight has."""
        b, a = (self._reader.entries[name].shape for name in self._pair(weight))
        return (a[1], b[0]) if self._is_table(weight) else (b[0], a[1])

    def update(self, weight: str) -> Update:
        """The update of a weight named in `weights`, read now."""
        b, a = (self._tensor(name).float() for name in self._pair(weight))
        module, is_table = weight.removesuffix(".weight"), self._is_table(weight)
        magnitude = self._named.modules[module].get("magnitude")
        scale = self._scale(module, rank=a.shape[0])
        if (values := self._named.modules[module].get("values")) is not None:
            a = a * self._tensor(values).float()
        if is_table:
            a, b = b.T.contiguous(), a.T.contiguous()
        if magnitude is None:
            return Update(a, b, scale)
        lengths = self._tensor(magnitude).float().view((1, -1) if is_table else (-1, 1))
        return Update(a, b, scale, magnitude=lengths)

    def projected_update(self, weight: str, columns: int) -> Update:
        """The update of a weight named in `projected`, which has I columns; read now."""
        parts, (down, up) = self._named.modules[weight.removesuffix(".weight")], self._projections
        inner, outer = (self._tensor(parts[part]).float().view(-1, 1) for part in ("inner", "outer"))
        return Update(inner * down[:, :columns], outer * up[: len(outer)], self.weight)

    def projected_shape(self, weight: str) -> tuple[int, int]:
        """(O, I) of the largest weight that the update of one named in `projected` fits."""
        outer = self._named.modules[weight.removesuffix(".weight")]["outer"]
        return math.prod(self._reader.entries[outer].shape), self._projections[0].shape[1]

    @cached_property
    def _projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """VeRA's, (R, the widest I) and (the largest O, R), in fp32."""
        down, up = (self._tensor(self._named.shared[part]).float() for part in ("down", "up"))
        return down, up

    def rotation(self, weight: str) -> torch.Tensor:
        """(K, S, S): what the rotations of a weight named in `turned` add to the identity."""
        angles = self._tensor(self._named.modules[weight.removesuffix(".weight")]["angles"])
        return beyond_identity(angles, block=block_of(angles.shape[1]))

    def turned_columns(self, weight: str) -> int:
        """I of a weight named in `turned`."""
        shape = self._reader.entries[self._named.modules[weight.removesuffix(".weight")]["angles"]].shape
        return shape[0] * block_of(shape[1])

    def scaling(self, weight: str) -> torch.Tensor:
        """(O, 1) or (1, I): what the rows or the columns of a weight named in `scaled` are multiplied by."""
        return self._tensor(self._named.modules[weight.removesuffix(".weight")]["scaling"]).float()

    def shift(self, bias: str) -> torch.Tensor:
        """(O, 1): what is added to a bias named in `shifts`."""
        module = bias.removesuffix(".bias")
        parts = self._named.modules[module]
        rank = self._reader.entries[parts["A"]].shape[0]
        return self._tensor(parts["shift"]).float().view(-1, 1).mul_(self._scale(module, rank=rank))

    def given_rows(self, name: str) -> Rows:
        """The rows of what stands in place of a tensor named in `given`."""
        return stored_rows(self._reader, self._given[name])

    def close(self) -> None:
        """Closes the file."""
        self._reader.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_table(self, weight: str) -> bool:
        return "table A" in self._named.modules[weight.removesuffix(".weight")]

    def _pair(self, weight: str) -> tuple[str, str]:
        """Names of B and A in the file."""
        parts = self._named.modules[weight.removesuffix(".weight")]
        b, a = next(pair for pair in _PAIRS if pair[0] in parts)
        return parts[b], parts[a]

    def _tensor(self, name: str) -> torch.Tensor:
        entry = self._reader.entries[name]
        return tensor_of(self._reader.read(name), entry.dtype, entry.shape)

    def _scale(self, module: str, *, rank: int) -> float:
        alpha = by_pattern(self._config.get("alpha_pattern"), module, default=self._config["lora_alpha"])
        if self._config["peft_type"] == "ADALORA":
            return float(self.weight * alpha / (self._config["init_r"] + RANK_EPSILON))
        return float(self.weight * alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank))

    def _token_rows(self) -> Iterator[tuple[str, TokenRows]]:
        asked = self._config.get("trainable_token_indices") or {}
        tables = asked if isinstance(asked, dict) else {"embed_tokens": asked}
        for module, name in self._named.having("rows").items():
            shape = self._reader.entries[name].shape
            ids: list[int] = next((tables[each] for each in tables if f".{module}".endswith(f".{each}")), [])
            if len(shape) != 2 or shape[0] != len(ids):
                raise BadExport(
                    f"The adapter has {shape} values for the rows {ids} of {module}.", cure=_OF_TWO_RUNS
                )
            yield f"{module}.weight", TokenRows(tuple(ids), self._tensor(name).float())

    def _rank(self, module: str) -> int:
        """What the configuration says of a module's rank."""
        pattern = self._config.get("rank_pattern")
        if self._config["peft_type"] == "ADALORA":
            flags: list[bool] | None = (pattern or {}).get(f"{module}.lora_E")
            return int(self._config["init_r"]) if flags is None else sum(flags)
        return int(by_pattern(pattern, module, default=self._config["r"]))

    def _check_ranks(self) -> None:
        for module, parts in self._named.modules.items():
            if (pair := next((pair for pair in _PAIRS if pair[0] in parts), None)) is None:
                continue
            b, a = (self._reader.entries[parts[part]].shape for part in pair)
            rank = self._rank(module)
            if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
                raise BadExport(
                    f"The adapter of {module} is {b} times {a}; adapter_config.json says rank {rank}.",
                    cure=_OF_TWO_RUNS,
                )
            for part in {"magnitude", "shift", "values"} & set(parts):
                shape, wanted = self._reader.entries[parts[part]].shape, rank if part == "values" else b[0]
                if math.prod(shape) != wanted:
                    raise BadExport(
                        f"The {part} of {module} is {shape}; it has {wanted} rows or columns.",
                        cure=_OF_TWO_RUNS,
                    )

    def _check_projections(self) -> None:
        """Checks that VeRA's vectors are as long as its projections, which have the configuration's rank."""
        for module, parts in self._named.modules.items():
            if "inner" not in parts:
                continue
            names = self._named.shared["down"], self._named.shared["up"], parts["inner"], parts["outer"]
            down, up, inner, outer = (self._reader.entries[name].shape for name in names)
            rank = self._config.get("r")
            if not len(down) == len(up) == 2 or not down[0] == up[1] == math.prod(inner) == rank:
                raise BadExport(
                    f"VeRA's parts of {module} are {down}, {up} and {inner}; adapter_config.json says rank "
                    f"{rank}.",
                    cure=_OF_TWO_RUNS,
                )
            if math.prod(outer) > up[0]:
                raise BadExport(
                    f"VeRA's projection has {up[0]} rows, and {module} {outer}.", cure=_OF_TWO_RUNS
                )

    def _check_angles(self) -> None:
        """Checks that OFT's angles are those of whole blocks of the configuration's width, if it has one."""
        for module, name in self._named.having("angles").items():
            shape, block = self._reader.entries[name].shape, self._config.get("oft_block_size")
            if block == 0 and len(shape) == 2:  # it says how many blocks instead
                block = block_of(shape[1])
            if len(shape) != 2 or not isinstance(block, int) or shape[1] != block * (block - 1) // 2:
                raise BadExport(
                    f"OFT's angles of {module} are {shape}; adapter_config.json says oft_block_size {block}.",
                    cure=_OF_TWO_RUNS,
                )

    def _check_numbers(self) -> None:
        for name, entry in self._reader.entries.items():
            rows, count = stored_rows(self._reader, name), rows_of(entry)
            step = max(1, _LOOK_ELEMENTS // max(1, row_elements(entry)))
            for first in range(0, count, step):
                if not rows(first, min(first + step, count)).isfinite().all():
                    raise BadExport(
                        f"The adapter in {self.folder} has a NaN or infinite number in {name}.",
                        cure="The training diverged: export an earlier checkpoint, "
                        "or lower train.learning_rate.",
                    )


def refuse_in_a_mix(adapter: Adapter) -> None:
    """Refuses an adapter that cannot be added to others, or with a weight.

    Raises:
        Unsupported: It has something that is not added to weights, or that belongs to its base (LoftQ).
    """
    if mends_base(adapter.folder):
        raise Unsupported(
            f"The adapter in {adapter.folder} began as the error of its quantized base (LoftQ), which is "
            "mended once and whole, so it cannot be merged together with others or with a weight.",
            cure=f"Merge it alone. {AS_IT_IS}",
        )
    kept = {
        "scales weights (IA3)": adapter.scaled,
        "turns weights (OFT)": adapter.turned,
        "gives weights a length (DoRA)": adapter.directed,
        "has rows of new tokens": adapter.rows,
        "has tensors in place of the base's": adapter.given,
    }
    for words, names in kept.items():
        if names:
            raise Unsupported(
                f"The adapter in {adapter.folder} {words}, {next(iter(names))} first: that is no sum, so it "
                "cannot be merged together with others or with a weight.",
                cure=f"Merge it alone. {AS_IT_IS}",
            )
