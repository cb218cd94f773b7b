"""Whether an adapter's numbers can be put on a base: names and shapes, NaN, absurd sizes. Before it is kept.

What the file must hold is not imitated: the adapter that its configuration describes is attached to the base
on `meta`, which takes no memory and reads no weight, and its names and shapes are compared. Nothing of a file
is run: only safetensors and JSON are read. Knows neither runs nor the store.

Legend: O output and I input width of a layer, R rank, N tokens, D width of a table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from qadapt.adapters.facts import BELOW, PEFT_FILES, is_side_car
from qadapt.adapters.fusion import FUSION
from qadapt.adapters.peft_config import read_peft_config
from qadapt.adapters.side_car_files import TYPES, read_settings, read_tensors
from qadapt.adapters.side_cars import load_side_car, side_car_shapes
from qadapt.adapters.triplets import left_shapes, take_rank_pattern
from qadapt.errors import BadAdapter

WEIGHTS = PEFT_FILES[0]
MOST_RMS = 1.0
"""Root mean square of an update's numbers: weights of language models have 0.01 to 0.1, updates far less."""
MOST = 1e4
"""Of any other trained number: magnitudes, scalings, biases and rows of tables stay below some hundreds."""
Shape = tuple[int, ...]
_ROWS = ".token_adapter.trainable_tokens_delta"
_PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A", ".lora_B"),
    (".lora_embedding_A", ".lora_embedding_B"),
)
_NO_FIT = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError)
"""What PEFT raises where a configuration and a base do not go together."""
_ANEW = "Take the adapter from its run, or from where it is published, once more."


def check_adapter(folder: Path, base: PreTrainedModel) -> None:
    """Checks an adapter against a base.

    Args:
        folder: A PEFT folder, or a side-car's.
        base: On `meta`, not quantized; it is changed.

    Raises:
        BadAdapter: It cannot be read, its tensors are not those that its configuration has on this base, or a
            number is NaN, infinite or absurdly large.
    """
    if is_side_car(folder):
        _check_side_car(folder, base)
        return
    config, new_tokens = _config(folder)
    config.base_model_name_or_path = None  # the skeleton has no name, and PEFT warns where they differ
    left = take_rank_pattern(config)
    rows = _row_shapes(new_tokens, base, folder)
    try:
        with torch.device("meta"):
            model = get_peft_model(base, config, autocast_adapter_dtype=False)
            wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    except (*_NO_FIT, re.error) as error:
        raise BadAdapter(
            f"The adapter in {folder} does not fit its base: {_first_line(error)}",
            cure="Check that it was trained on this base, and that this release of PEFT knows its method.",
        ) from None
    shapes = left_shapes({name: tuple(tensor.shape) for name, tensor in wanted.items()}, left) | rows
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_shapes(found, shapes, folder)
            tensors = {name: file.get_tensor(name) for name in found}
            _check_sizes(tensors, folder)
            _check_updates(tensors, model, folder)
    except (SafetensorError, OSError) as error:
        raise BadAdapter(f"{folder / WEIGHTS} cannot be read: {_first_line(error)}", cure=_ANEW) from None


def _check_side_car(folder: Path, base: PreTrainedModel) -> None:
    load_side_car(base, folder)  # it refuses what is of another base
    settings = read_settings(folder)
    _check_sizes(read_tensors(folder, side_car_shapes(settings, folder)), folder)
    members = settings["adapters"] if settings["kind"] == FUSION else ()
    for part in (settings, settings.get(BELOW, {}), *members):
        scale = float(part.get("scale", 1))
        if not abs(scale) <= MOST:
            raise _absurd(folder, f"its scale is {scale:.3g}, more than {MOST:g}")


def _config(folder: Path) -> tuple[PeftConfig, Any]:
    """What the adapter says of itself, for a start that needs no weights; and the rows of tokens it names."""
    config = read_peft_config(folder)
    if not isinstance(config, LoraConfig):
        return config, None
    config.init_lora_weights = True  # others read or change the base's weights before the first step
    tokens, config.trainable_token_indices = config.trainable_token_indices, None
    return config, tokens


def _row_shapes(asked: Any, base: PreTrainedModel, folder: Path) -> dict[str, Shape]:
    """Names and shapes of the rows of new tokens, (N, D): numbered one after the other, in every table.

    A tied head shares the embeddings' rows.
    """
    if not asked:
        return {}
    tables = asked if isinstance(asked, dict) else {"embed_tokens": asked}
    ids = next(iter(tables.values()))
    is_row = isinstance(ids, list) and all(type(each) is int and each >= 0 for each in ids) and len(ids) > 0
    if not is_row or any(each != list(range(ids[0], ids[0] + len(ids))) for each in tables.values()):
        raise BadAdapter(
            f"The adapter in {folder} has rows of the tokens {asked}: only those of new tokens, numbered one "
            "after the other and the same in every table, are loaded here.",
            cure="Load it with PEFT.",
        )
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    held = {id(each) for end in ends for each in end.parameters(recurse=False) if each.ndim > 1}
    found = {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in base.named_parameters()
        if id(tensor) in held
    }
    return {f"base_model.model.{name}{_ROWS}": (len(ids), shape[1]) for name, shape in found.items()}


def _check_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape], folder: Path) -> None:
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} has no place there" for name in found if name not in wanted]
    problems += [
        f"{name} has the shape {found[name]}, its place {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" ({len(problems) - 1} more such)" if len(problems) > 1 else ""
        raise BadAdapter(
            f"The adapter in {folder} does not fit its base: {problems[0]}{more}.",
            cure="Give the adapter of this base; what was edited by hand in its configuration does not fit.",
        )


def _check_sizes(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in TYPES:
            raise BadAdapter(
                f"The adapter in {folder} has {name} in {str(tensor.dtype).removeprefix('torch.')}, which "
                "is no type that adapters are trained in.",
                cure="Take the adapter in 16 or 32 bits.",
            )
        if not tensor.isfinite().all():
            raise BadAdapter(
                f"The adapter in {folder} has a NaN or infinite number in {name}.",
                cure="The training diverged: take an earlier checkpoint, or lower train.learning_rate.",
            )
        if tensor.numel() and (largest := tensor.abs().max().item()) > MOST:
            raise _absurd(folder, f"{name} has {largest:.3g}, more than {MOST:g}")


def _check_updates(tensors: Mapping[str, torch.Tensor], model: torch.nn.Module, folder: Path) -> None:
    for path, module in model.named_modules():
        pair = next((pair for pair in _PAIRS if f"{path}{pair[0]}" in tensors), None)
        if isinstance(module, LoraLayer) and pair is not None:
            a, b = (tensors[f"{path}{name}"].double() for name in pair)  # (R, I), (O, R)
            scale = abs(module.scaling["default"])
            if (values := tensors.get(f"{path}.lora_E")) is not None:
                a, scale = a * values.double(), scale / module.r["default"]
            squares = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)  # of the numbers of B·A, which is never made
            rms = scale * (squares / (b.shape[0] * a.shape[1])).sqrt().item()
            if not rms <= MOST_RMS:
                raise _absurd(
                    folder,
                    f"its update of {path} has a root mean square of {rms:.3g}, more than {MOST_RMS:g}",
                )


def _absurd(folder: Path, what: str) -> BadAdapter:
    return BadAdapter(
        f"The adapter in {folder} would drown its base: {what}.",
        cure="Check adapter.alpha and train.learning_rate of its run; an adapter of others may be damaged.",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
