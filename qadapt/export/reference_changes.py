"""What an adapter changes in each tensor, read a second time and another way than a merge does.

PEFT itself says which layers are adapted and how strongly: it puts the adapter's configuration on the model
without weights. The numbers come from the file by name. Everything in the file must be understood; what is
not is refused, for it could not be proven.

Legend: O output rows, I input columns of a weight, R rank, N tokens, V rows of a table, D its width.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, OFTConfig, PeftConfig, VeraConfig, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn

from qadapt.errors import BadExport, Unsupported
from qadapt.export.stored_tensors import StoredTensors
from qadapt.model.folder import read_config
from qadapt.model.skeleton import skeleton_base
from qadapt.plan.ranks import RANK_EPSILON

_PREFIX = "base_model.model."
_ADAPTER = "default"
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_A|lora_B|lora_E|lora_magnitude_vector|ia3_l|vera_lambda_b|vera_lambda_d|oft_R"
    r"|token_adapter\.trainable_tokens_delta)(\.weight)?"
)
_PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")
_TOKENS = "token_adapter.trainable_tokens_delta"
_OF_TWO_RUNS = "Adapter file and configuration are of different runs; take both from one."


@dataclass(frozen=True)
class Pair:
    """One adapter's update: scale · left · right; with a magnitude (DoRA) the sum then gets its lengths.

    The lengths are those of a weight's rows, and of a table's columns (`of_columns`).
    """

    left: Tensor  # (O, R), float64
    right: Tensor  # (R, I), float64
    scale: float
    magnitude: Tensor | None = None
    of_columns: bool = False


@dataclass(frozen=True)
class Turn:
    """Rotations of blocks of a weight's columns (OFT)."""

    beyond: Tensor  # (K, S, S), float64, less the identity, as it multiplies rows
    magnitudes: Tensor  # (1, I): length of the column of all magnitudes that were summed up for it


@dataclass(frozen=True)
class Tokens:
    """Rows that stand in place of a table's own."""

    ids: tuple[int, ...]
    values: Tensor  # (N, D)


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor, or of `whole` in its place: plus pairs, times a factor, with rows of tokens.

    `is_start` says that `whole` is what the adapter was put on, not what it makes of it: tied tables share
    it.
    """

    pairs: tuple[Pair, ...] = ()
    factor: Tensor | None = None  # (O, 1) or (1, I)
    whole: Tensor | None = None
    is_start: bool = False
    tokens: Tokens | None = None
    turn: Turn | None = None

    @property
    def is_sum(self) -> bool:
        """Whether it only adds to the tensor."""
        has_lengths = any(pair.magnitude is not None for pair in self.pairs)
        is_alone = self.factor is None and self.whole is None and self.tokens is None and self.turn is None
        return is_alone and not has_lengths

    @property
    def is_nothing(self) -> bool:
        """Whether the tensor stays the base's."""
        return self.is_sum and not self.pairs


@dataclass(frozen=True)
class Layout:
    """The model without weights: its embedding and head, whether they are one table, what is quantized.

    `linears` are the weights that a quantized base holds in 4 or 8 bits: all linear ones but the head's.
    """

    embedding: str
    head: str
    is_tied: bool
    linears: frozenset[str]


def layout_of(model_folder: Path) -> Layout:
    """The layout of the library's own model of a folder's config.json."""
    model = _skeleton(model_folder)
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    return Layout(
        embedding=f"{names[id(model.get_input_embeddings())]}.weight",
        head=f"{names[id(head)]}.weight",
        is_tied=bool(model.config.get_text_config().tie_word_embeddings),
        linears=frozenset(
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        ),
    )


def changes_of(model_folder: Path, adapters: Sequence[tuple[Path, float]]) -> dict[str, Change]:
    """What adapters change, by the name of the tensor in the base.

    Args:
        model_folder: The base.
        adapters: PEFT folders, each with the weight of its update.

    Raises:
        BadExport: An adapter has numbers for a layer that its configuration leaves alone, or none for one
        that it
            adapts.
        Unsupported: It holds something that is not understood here, or that cannot be mixed with others.
    """
    found = [_changes_of_one(model_folder, folder, weight) for folder, weight in adapters]
    if len(found) == 1 and adapters[0][1] == 1:
        return found[0]
    mixed: dict[str, Change] = {}
    for changes in found:
        for name, change in changes.items():
            if not change.is_sum:
                raise Unsupported(
                    f"An adapter does other than add to {name}, which is not merged with a weight.",
                    cure="Merge that adapter alone, and whole.",
                )
            mixed[name] = Change(pairs=(mixed[name].pairs if name in mixed else ()) + change.pairs)
    return mixed


def _changes_of_one(model_folder: Path, folder: Path, weight: float) -> dict[str, Change]:
    config = PeftConfig.from_pretrained(str(folder))
    tokens = _token_ids(config)
    layers = _adapted_layers(model_folder, config)
    parts: dict[str, dict[str, Tensor]] = {}
    changes: dict[str, Change] = {}
    with StoredTensors([folder / "adapter_model.safetensors"]) as stored:
        projections = [stored.whole(key).double() for key in _PROJECTIONS if key in stored.entries]
        for key in (each for each in stored.entries if each not in _PROJECTIONS):
            name = key.removeprefix(_PREFIX)
            if match := _PART.fullmatch(name):
                parts.setdefault(match["module"], {})[match["part"]] = stored.whole(key).double()
            else:
                plain = name.replace(".base_layer.", ".")
                changes[plain] = Change(whole=stored.whole(key), is_start=plain != name)
    lacking = [each for each in layers if each not in parts and f"{each}.weight" not in changes]
    if lacking:
        raise BadExport(
            f"The adapter in {folder} has no numbers for {lacking[0]}, which its configuration adapts"
            + (f", and for {len(lacking) - 1} more." if len(lacking) > 1 else "."),
            cure=_OF_TWO_RUNS,
        )
    for module, found in parts.items():
        if (rows := found.pop(_TOKENS, None)) is not None:
            changes[f"{module}.weight"] = Change(tokens=Tokens(_ids_of(module, tokens), rows))
        if isinstance(layers.get(module), VeraLayer):
            changes[f"{module}.weight"] = _projected(layers[module], found, projections, weight=weight)
        elif found:
            for name, change in _layer_changes(module, layers, found, weight=weight).items():
                start = changes.get(name, Change())  # a table that was saved as well
                changes[name] = replace(change, whole=start.whole, is_start=start.is_start)
    return changes


def _layer_changes(
    module: str, layers: Mapping[str, Any], parts: Mapping[str, Tensor], *, weight: float
) -> dict[str, Change]:
    if module not in layers:
        raise BadExport(
            f"The adapter has numbers for {module}, which its configuration leaves alone.", cure=_OF_TWO_RUNS
        )
    layer = layers[module]
    if isinstance(layer, IA3Layer):
        return _scaled(module, layer, parts["ia3_l"])
    if isinstance(layer, OFTLayer):
        return {f"{module}.weight": Change(turn=_turn(parts["oft_R"], layer.oft_block_size[_ADAPTER]))}
    scale = float(layer.scaling[_ADAPTER])
    magnitude = parts.get("lora_magnitude_vector")
    is_table = "lora_embedding_A" in parts
    if is_table:
        left, right = parts["lora_embedding_A"].T, parts["lora_embedding_B"].T
    elif isinstance(layer, AdaLoraLayer):
        left, right = parts["lora_B"], torch.diag(parts["lora_E"].flatten()) @ parts["lora_A"]
        scale /= layer.r[_ADAPTER] + RANK_EPSILON
    else:
        left, right = parts["lora_B.weight"], parts["lora_A.weight"]
    pair = Pair(left, right, scale * weight, magnitude=magnitude, of_columns=is_table)
    changes = {f"{module}.weight": Change(pairs=(pair,))}
    if (shift := parts.get("lora_B.bias")) is not None:
        one = torch.ones(1, 1, dtype=torch.float64)
        changes[f"{module}.bias"] = Change(pairs=(Pair(shift.reshape(-1, 1), one, scale * weight),))
    return changes


def _projected(
    layer: VeraLayer, parts: Mapping[str, Tensor], projections: Sequence[Tensor], *, weight: float
) -> Change:
    """VeRA's update: the part of the projections that the layer takes, between its two vectors."""
    down, up = projections
    left = torch.diag(parts["vera_lambda_b"]) @ up.narrow(0, 0, layer.out_features)
    right = torch.diag(parts["vera_lambda_d"]) @ down.narrow(1, 0, layer.in_features)
    return Change(pairs=(Pair(left, right, weight),))


def _turn(angles: Tensor, width: int) -> Turn:
    """Q(2 + Q(2 + Q(2 + Q))) of each block's skew-symmetric Q, and the same of the magnitudes, transposed."""
    upper = torch.zeros(len(angles), width, width, dtype=torch.float64)
    rows, columns = torch.triu_indices(width, width, 1)
    upper[:, rows, columns] = angles
    skew = upper - upper.mT
    twice = 2 * torch.eye(width, dtype=torch.float64)
    both = skew, skew.abs()
    beyond, magnitudes = (q @ (twice + q @ (twice + q @ (twice + q))) for q in both)
    return Turn(beyond.mT, magnitudes.norm(dim=2).reshape(1, -1))


def _scaled(module: str, layer: Any, factor: Tensor) -> dict[str, Change]:
    """What IA3 multiplies: a weight's rows and its bias, or the columns of what feeds forward."""
    changes = {f"{module}.weight": Change(factor=factor)}  # (O, 1) or (1, I)
    if not layer.is_feedforward and layer.get_base_layer().bias is not None:
        changes[f"{module}.bias"] = Change(factor=factor.reshape(-1, 1))
    return changes


def _adapted_layers(model_folder: Path, config: PeftConfig) -> dict[str, Any]:
    """PEFT's own layers by the name of the module they adapt."""
    config.inference_mode = True
    config.modules_to_save = None  # whole tensors, read from the file by name
    if isinstance(config, LoraConfig):
        config.init_lora_weights = False
        config.trainable_token_indices = None
    elif not isinstance(config, IA3Config | VeraConfig | OFTConfig):
        raise Unsupported(
            f"An adapter of the method {config.peft_type} cannot be merged.",
            cure="Export it with --form adapter.",
        )
    if not config.target_modules:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice is for training; there are no weights here
        model = get_peft_model(_skeleton(model_folder), config, low_cpu_mem_usage=True)
    return {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, (LoraLayer, IA3Layer, VeraLayer, OFTLayer))
    }


def _skeleton(model_folder: Path) -> Any:
    values = read_config(model_folder, name=model_folder.name)
    return skeleton_base(values, quantization="none", double_quant=False, dtype=torch.float32)


def _token_ids(config: PeftConfig) -> dict[str, Sequence[int]]:
    asked = config.trainable_token_indices if isinstance(config, LoraConfig) else None
    if not asked:
        return {}
    return dict(asked) if isinstance(asked, dict) else {"embed_tokens": asked}


def _ids_of(module: str, tokens: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    for name, ids in tokens.items():
        if f".{module}".endswith(f".{name}"):
            return tuple(ids)
    raise BadExport(
        f"The adapter has rows of tokens for {module}; its configuration names no tokens there.",
        cure=_OF_TWO_RUNS,
    )
