"""LoRA (arXiv:2106.09685) on a frozen base, through PEFT; on disk a plain PEFT folder.

Beside PEFT's two files stand the facts of `facts.py`: which base, how it was held, which prompt contract.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import PreTrainedModel

from qadapt.adapters.facts import AdapterFacts, write_facts
from qadapt.errors import BadOutput, BadRecipe


@dataclass(frozen=True)
class Lora:
    """The adapters: an update of `rank`, times alpha / rank, on `targets` (`all-linear` or names)."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"


def attach_lora(model: PreTrainedModel, lora: Lora, *, dtype: torch.dtype, seed: int) -> PeftModel:
    """The base with new adapters, which alone are trainable.

    The second factor starts at zero, so the first forward pass equals the base's.

    Raises:
        BadRecipe: A target matches no linear layer, or the rank is larger than the narrowest one.
    """
    linears = linear_layers(model)
    chosen = set(linears) if lora.targets == "all-linear" else set(lora.targets)
    unknown = sorted(chosen - set(linears))
    if unknown:
        raise BadRecipe(
            f"adapter.targets: {', '.join(unknown)} matches no linear layer of this model.",
            cure=f"Choose from: {', '.join(linears)}; or all-linear.",
        )
    narrowest = min(linears[name] for name in chosen)
    if lora.rank > narrowest:
        raise BadRecipe(
            f"adapter.rank is {lora.rank}; the narrowest adapted layer is {narrowest} wide.",
            cure=f"Set adapter.rank to at most {narrowest}; 8 to 64 is usual.",
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(chosen),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in trainable(adapted).values():
        parameter.data = parameter.data.to(dtype)
    return adapted


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


def save_adapter(
    model: PeftModel, folder: Path, *, facts: AdapterFacts, beside: Mapping[str, object] | None = None
) -> None:
    """Writes the adapter as a plain PEFT folder with its facts, whole or not at all.

    Args:
        model: The base with the adapter.
        folder: The adapter's folder.
        facts: What it was trained on.
        beside: JSON files to stand beside it, by name.

    Raises:
        BadOutput: The place is read-only or full.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = facts.base, facts.revision
    building = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(building, ignore_errors=True)
        model.save_pretrained(str(building), save_embedding_layers=False)
        write_facts(facts, building)
        for name, values in (beside or {}).items():
            (building / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        building.replace(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise BadOutput(
            f"The adapter {folder} cannot be written: {error}",
            cure="Make room or make the folder writable, then `qadapt resume`.",
        ) from None


def load_lora(model: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> PeftModel:
    """The base with the adapter of a folder, in the type it was saved in."""
    return PeftModel.from_pretrained(
        model, str(folder), is_trainable=is_trainable, autocast_adapter_dtype=False, local_files_only=True
    )
