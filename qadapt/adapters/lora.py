"""LoRA (arXiv:2106.09685), rsLoRA, DoRA and PiSSA on a frozen base, through PEFT; on disk its plain folder.

Beside PEFT's two files stand the facts of `facts.py`: which base, how it was held, which prompt contract; and
the tokenizer, if it has new tokens. Their rows (`new_rows.py`) are saved as PEFT's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapt.adapters.dora import start_magnitudes
from qadapt.adapters.facts import AdapterFacts, write_facts
from qadapt.adapters.frozen import frozen_of
from qadapt.adapters.fused import use_fused_layers
from qadapt.adapters.new_rows import NewRows, attach_new_rows, new_rows_of, without_new_rows
from qadapt.adapters.peft_config import read_peft_config
from qadapt.adapters.pissa import add_starts, start_of, starts_of
from qadapt.adapters.side_car import SideCar
from qadapt.adapters.side_car_files import save_side_car
from qadapt.adapters.triplets import leave_out_given_up, without_pattern_warning
from qadapt.cache import FULL, require_free
from qadapt.durable import whole_folder
from qadapt.engine.host import device_of
from qadapt.errors import BadAdapter, BadOutput, BadRecipe, NoRoom

Variant = Literal["lora", "rslora", "loraplus", "dora", "pissa", "loftq"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_ROWS = ".token_adapter.trainable_tokens_delta"
"""What PEFT calls the rows of a table in a file: whole rows, no differences."""


@dataclass(frozen=True)
class Lora:
    """The adapters: an update of `rank`, times alpha / rank, on `targets` (`all-linear` or names).

    rsLoRA multiplies by alpha / the root of rank. DoRA then gives each row of the adapted weight a length of
    its own, which is trained, too; it takes no dropout.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    variant: Variant = "lora"


def attach_lora(
    model: PreTrainedModel, lora: Lora, *, dtype: torch.dtype, seed: int, new_ids: Sequence[int] = ()
) -> PeftModel:
    """The base with new adapters, which alone are trainable, and the rows of new tokens.

    The second factor starts at zero, so the first forward pass equals the base's; DoRA's to a rounding, if
    its lengths are asked for in bf16.

    Args:
        model: The frozen base.
        lora: The adapters.
        dtype: Type of what is trained.
        seed: Of the first factors.
        new_ids: Ids of new tokens, in order; the tables of the base grow if they have no spare rows.

    Raises:
        BadRecipe: A target matches no linear layer, or the rank is larger than the narrowest one.
        Unsupported: See `attach_new_rows`.
    """
    chosen = chosen_layers(model, lora.targets)
    check_rank(lora.rank, chosen)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(chosen),
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        task_type="CAUSAL_LM",
    )
    use_fused_layers(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    if new_ids:
        attach_new_rows(model, new_ids, dtype=dtype)
    put_beside(adapted, dtype=dtype)
    start_magnitudes(adapted, dtype=model.dtype)
    if lora.variant == "pissa":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_starts(adapted)
    return adapted


def put_beside(model: PeftModel, *, dtype: torch.dtype) -> None:
    """Puts what is trained on the device that computes, in a type; PEFT puts it where its layer lies."""
    device = device_of(model)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.to(device, dtype)


def chosen_layers(model: PreTrainedModel, targets: str | Sequence[str]) -> dict[str, int]:
    """Name → narrowest side of the layers that targets mean.

    Raises:
        BadRecipe: A target matches no linear layer.
    """
    linears = linear_layers(model)
    chosen = sorted(linears if targets == "all-linear" else set(targets))
    unknown = [name for name in chosen if name not in linears]
    if unknown:
        raise BadRecipe(
            f"adapter.targets: {', '.join(unknown)} matches no linear layer of this model.",
            cure=f"Choose from: {', '.join(linears)}; or all-linear.",
        )
    return {name: linears[name] for name in chosen}


def check_rank(rank: int, chosen: Mapping[str, int]) -> None:
    """Refuses a rank that a layer is too narrow for.

    Args:
        rank: Of the update.
        chosen: As `chosen_layers` gives it.

    Raises:
        BadRecipe: It is larger than the narrowest side.
    """
    narrowest = min(chosen.values())
    if rank > narrowest:
        raise BadRecipe(
            f"adapter.rank is {rank}; the narrowest adapted layer is {narrowest} wide.",
            cure=f"Set adapter.rank to at most {narrowest}; 8 to 64 is usual.",
        )


def linear_layers(model: PreTrainedModel) -> dict[str, int]:
    """Last name → narrowest side of the linear layers in the decoder, without head and gates of one value."""
    widths: dict[str, int] = {}
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and module.out_features > 1:
            name = path.rpartition(".")[2]
            widths[name] = min(module.in_features, module.out_features, widths.get(name, module.in_features))
    return widths


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that are trained by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """While open, the model is its base, new tokens with the rows they started from."""
    with model.disable_adapter(), without_new_rows(model):
        yield


def save_adapter(
    model: PeftModel,
    folder: Path,
    *,
    facts: AdapterFacts,
    tokenizer: PreTrainedTokenizerBase,
    beside: Mapping[str, object] | None = None,
) -> None:
    """Writes the adapter as a plain PEFT folder, or a side-car, with its facts, whole or not at all.

    Args:
        model: The base with the adapter.
        folder: The adapter's folder.
        facts: What it was trained on.
        tokenizer: Written beside it, if there are new tokens.
        beside: JSON files to stand beside it, by name.

    Raises:
        NoRoom: The place is too full, or filled up meanwhile; the adapter that was there is whole.
        BadOutput: The place is read-only.
    """
    needed_bytes = stored_bytes(model)
    require_free(folder.parent, needed_bytes, purpose="The adapter", or_else="move the run to a larger one")
    try:
        with whole_folder(folder) as building:
            if isinstance(model, SideCar):
                save_side_car(model, building)
            else:
                config = model.peft_config["default"]
                config.base_model_name_or_path, config.revision = facts.base, facts.revision
                leave_out_given_up(model)
                model.save_pretrained(str(building), save_embedding_layers=False)
                _join_starts(building, model)
            if rows := new_rows_of(model):
                _add_new_rows(building, rows)
                tokenizer.save_pretrained(str(building))
            write_facts(facts, building)
            for name, values in (beside or {}).items():
                (building / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        kind = NoRoom if _is_full(error) else BadOutput
        raise kind(
            f"The adapter {folder} cannot be written: {error}",
            cure="Make room or make the folder writable, then `qadapt resume`.",
        ) from None


def adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All that makes the adapter: what is trained, and what of it is frozen."""
    return trainable(model) | frozen_of(model)


def stored_bytes(model: torch.nn.Module) -> int:
    """What the numbers of an adapter take on disk."""
    stored = model.stored() if isinstance(model, SideCar) else adapter_tensors(model)
    return sum(tensor.nbytes for tensor in stored.values())


def _join_starts(folder: Path, model: PeftModel) -> None:
    """Makes plain LoRA of twice the rank of a saved PiSSA."""
    path, config_path = folder / _WEIGHTS, folder / _CONFIG
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    starts = {name: start for name, layer in layers.items() if (start := start_of(layer)) is not None}
    if not starts:
        return
    tensors = load_file(path)
    for name in starts_of(model):  # PEFT saves all parts of its layers
        tensors.pop(name, None)
    for name, start in starts.items():
        names = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        joined = start.joined(*(tensors[each].to(start.up.device) for each in names))
        whole = (value.detach().cpu().contiguous() for value in joined)
        tensors |= dict(zip(names, whole, strict=True))
    save_file(tensors, path, {"format": "pt"})
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _is_full(error: OSError | SafetensorError) -> bool:
    """Whether the disk was full; safetensors hands the system's number on in its words only."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(f"(os error {number})" in str(error) for number in FULL)


def load_lora(model: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> PeftModel:
    """The base with the adapter of a PEFT folder, in the type it was saved in, and its new tokens' rows.

    Raises:
        BadAdapter: Its configuration is damaged, or of a method that is not loaded here, or its tensors are
            not those that it has on this base.
    """
    config = read_peft_config(folder)
    config.inference_mode = not is_trainable
    tables = None
    if isinstance(config, LoraConfig):
        tables, config.trainable_token_indices = config.trainable_token_indices, None  # the rows are ours
        use_fused_layers(config)
    device, frozen = device_of(model), {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    adapted = _with_tensors(model, folder, config)
    _check_names(adapted, folder, has_rows=bool(tables))
    saved = load_file(folder / _WEIGHTS)
    if tables:
        ids = tables if isinstance(tables, list) else next(iter(tables.values()))
        attach_new_rows(model, ids, dtype=next(iter(saved.values())).dtype)
        for path, rows in new_rows_of(adapted).items():
            if path + _ROWS not in saved:
                raise _no_fit(folder, f"there is no {path + _ROWS}")
            rows.weight.data.copy_(saved[path + _ROWS])
            rows.requires_grad_(is_trainable)
    made = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    names = {tensor.data_ptr(): name for name, tensor in made.items()}
    for tensor in (*adapted.parameters(), *adapted.buffers()):
        if id(tensor) not in frozen:  # PEFT has rounded what it loaded to the type of a 16-bit base
            name = names.get(tensor.data_ptr(), "") if tensor.numel() else ""  # empty ones all lie nowhere
            tensor.data = saved.get(name, tensor.data).to(device, copy=True)
    return adapted


def _with_tensors(model: PreTrainedModel, folder: Path, config: PeftConfig) -> PeftModel:
    """The base with an adapter of PEFT's and the tensors of its folder."""
    if not (folder / _WEIGHTS).is_file():  # PEFT would take a pickled one
        raise _no_fit(folder, f"there is no {_WEIGHTS}")
    try:
        with without_pattern_warning():
            return PeftModel.from_pretrained(
                model,
                str(folder),
                config=config,
                is_trainable=not config.inference_mode,
                autocast_adapter_dtype=False,
                local_files_only=True,
            )
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, OSError, SafetensorError, LookupError, AttributeError) as error:
        raise _no_fit(folder, str(error)) from None


def _check_names(model: PeftModel, folder: Path, *, has_rows: bool) -> None:
    """Looks whether a file has all tensors of the adapter on this base, and no others.

    PEFT leaves what is missing as it starts, and what is too many away, and warns.
    """
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        found = {name for name in file.keys() if not (has_rows and name.endswith(_ROWS))}  # noqa: SIM118
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if missing := sorted(wanted - found):
        raise _no_fit(folder, f"there is no {missing[0]}")
    known = {name for name, _ in model.named_parameters()}  # tables of the base that were saved with it
    if others := sorted(found - wanted - known):
        raise _no_fit(folder, f"{others[0]} has no place there")


def _no_fit(folder: Path, why: str) -> BadAdapter:
    lines = [line.strip() for line in why.splitlines() if not line.endswith(":")]
    return BadAdapter(
        f"The adapter in {folder} does not fit its base: {(lines or [why])[0]}",
        cure="Take its two files from its run, or from where it is published, once more.",
    )


def _add_new_rows(folder: Path, found: Mapping[str, NewRows]) -> None:
    """Adds the rows of new tokens to a saved adapter as PEFT's `trainable_token_indices` has them."""
    path = folder / _WEIGHTS
    tensors = load_file(path)
    tensors |= {table + _ROWS: rows.weight.detach().cpu().contiguous() for table, rows in found.items()}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    config["trainable_token_indices"] = {
        table.rpartition(".")[2]: list(rows.ids) for table, rows in found.items()
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
