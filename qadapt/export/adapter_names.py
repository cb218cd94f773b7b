"""What the tensors of a PEFT folder are called, and which of its settings can be merged.

The names are those of `PeftModel.save_pretrained`. A setting or a tensor that is not known here is refused by
name, so nothing is left out silently. Knows neither files nor numbers, and imports no PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadapt.adapters.facts import BASE_KEEPING_STARTS
from qadapt.errors import BadExport, Unsupported
from qadapt.methods import NEUMANN_TERMS

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The two tables, as all families of `merged_model.MERGED_FAMILIES` name them."""
_PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "shift",
    ".lora_A": "right",
    ".lora_E": "values",
    ".lora_B": "left",
    ".lora_embedding_A": "table A",
    ".lora_embedding_B": "table B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".ia3_l": "scaling",
    ".vera_lambda_d": "inner",
    ".vera_lambda_b": "outer",
    ".oft_R.weight": "angles",
    ".token_adapter.trainable_tokens_delta": "rows",
}
"""How a name ends → which part of a module's adapter it is."""
_PAIRS = (("A", "B"), ("table A", "table B"), ("left", "right"), ("inner", "outer"))
_SHARED = {"base_model.vera_A": "down", "base_model.vera_B": "up"}
"""The projections that all of VeRA's modules share."""
_MUST_BE_EMPTY = (
    "target_parameters", "layer_replication", "fan_in_fan_out", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
_BESIDE_THE_WEIGHTS = {
    "PREFIX_TUNING": "keys and values before the text",
    "PROMPT_TUNING": "vectors before the text",
    "MULTITASK_PROMPT_TUNING": "vectors before the text",
    "P_TUNING": "vectors before the text",
    "CPT": "vectors before the text",
    "CARTRIDGE": "keys and values before the text",
    "ADAPTION_PROMPT": "vectors before the text",
    "BOTTLENECK": "layers of its own",
    "XLORA": "a choice among adapters for each token",
}
"""Methods that change no weight → what they add instead."""
AS_IT_IS = "Export it as it is with --form adapter, and load it beside its base with PEFT."


@dataclass(frozen=True)
class Named:
    """The tensors of an adapter, by what they are for.

    Attributes:
        modules: Module of the base → part of its adapter → name in the file.
        whole: Tensor of the base → name in the file of what is trained in its place.
        starts: Table of the base → name in the file of the table that its adapter was trained on.
        shared: `down` and `up` → name in the file of VeRA's projection; empty for other methods.
    """

    modules: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, str]
    starts: Mapping[str, str]
    shared: Mapping[str, str]

    def having(self, part: str) -> dict[str, str]:
        """Module → name in the file, of the modules whose adapter has this part."""
        return {module: parts[part] for module, parts in self.modules.items() if part in parts}


def named_parts(names: Iterable[str], config: Mapping[str, Any], *, folder: Path) -> Named:
    """Sorts the tensors of an adapter.

    Args:
        names: As they are in its file.
        config: The values of its adapter_config.json.
        folder: The adapter's, for messages.

    Raises:
        BadExport: A part is missing, or the configuration says otherwise.
        Unsupported: A tensor is of no known kind, or two say different things of one weight.
    """
    modules: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    starts: dict[str, str] = {}
    known = list(names)
    shared = {_SHARED[name]: name for name in known if name in _SHARED}
    for name in (each for each in known if each not in _SHARED):
        base_name = name.removeprefix(_PREFIX)
        ending = next((ending for ending in _PARTS if base_name.endswith(ending)), None)
        target = re.sub(r"\.base_layer\.(weight|bias)$", r".\1", base_name)
        if base_name == name or (ending is None and not _is_given_whole(target, config)):
            raise Unsupported(
                f"The adapter in {folder} holds {name}, which is not merged here.", cure=AS_IT_IS
            )
        if ending is not None:
            modules.setdefault(base_name.removesuffix(ending), {})[_PARTS[ending]] = name
        else:
            (starts if base_name.endswith(".base_layer.weight") else whole)[target] = name
    for module, parts in modules.items():
        _check_parts(module, parts, config, folder=folder)
        if ("rows" in parts and len(parts) > 1) or f"{module}.weight" in whole:
            raise Unsupported(
                f"The adapter in {folder} changes {module} in two ways, which are not merged together.",
                cure=AS_IT_IS,
            )
    found = Named(modules, whole, starts, shared)
    _check_promises(found, config, folder=folder)
    return found


def refuse_unmerged(config: Mapping[str, Any], *, folder: Path) -> None:
    """Refuses an adapter that cannot be merged, for what its configuration says alone.

    Raises:
        Unsupported: Its method changes no weight, is not merged here, or has rewritten its base.
    """
    method = config.get("peft_type")
    if method in _BESIDE_THE_WEIGHTS:
        raise Unsupported(
            f"The adapter in {folder} is of the method {method}, which adds {_BESIDE_THE_WEIGHTS[method]} "
            "and changes no weight: it cannot be merged.",
            cure=AS_IT_IS,
        )
    asked = [f"{field} = {config[field]!r}" for field in _MUST_BE_EMPTY if config.get(field)]
    if method == "VERA" and config.get("save_projection") is False:
        asked.append("save_projection = False")
    if method == "OFT":
        asked += [f"{field} = True" for field in ("coft", "block_share") if config.get(field)]
        way = config.get("use_cayley_neumann"), config.get("num_cayley_neumann_terms")
        if way != (True, NEUMANN_TERMS):
            asked.append(f"use_cayley_neumann = {way[0]}, num_cayley_neumann_terms = {way[1]}")
    if method not in ("LORA", "ADALORA", "IA3", "VERA", "OFT"):
        asked.insert(0, f"peft_type = {method!r}")
    if asked:
        raise Unsupported(
            f"The adapter in {folder} has {', '.join(asked)}, which is not merged here.", cure=AS_IT_IS
        )
    start = config.get("init_lora_weights", True)
    if start not in BASE_KEEPING_STARTS:
        raise Unsupported(
            f"The adapter in {folder} has init_lora_weights = {start!r}, which rewrites the base it starts "
            "on: beside the published weights it is another model.",
            cure=_converted(str(start)),
        )


def beyond_pairs(named: Named, config: Mapping[str, Any]) -> tuple[str, ...]:
    """What an adapter has besides low-rank pairs that are added to weights, in words."""
    whole_biases = [name for name in named.whole if name.endswith(".bias")]
    found = {
        "DoRA (use_dora)": named.having("magnitude"),
        "IA3": named.having("scaling"),
        "VeRA": named.having("inner"),
        "OFT": named.having("angles"),
        "rows of new tokens (trainable_token_indices)": named.having("rows"),
        "biases of its own (lora_bias)": named.having("shift"),
        "a table that it was trained on (save_embedding_layers)": named.starts,
        f"trained biases (bias = {config.get('bias')!r})": whole_biases,
        f"whole tensors (modules_to_save = {config.get('modules_to_save')!r})": (
            len(named.whole) > len(whole_biases)
        ),
    }
    return tuple(words for words, is_there in found.items() if is_there)


def by_pattern(patterns: Mapping[str, float] | None, module: str, *, default: float) -> float:
    """The value of the first pattern that matches the end of a module's name, as PEFT reads them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def is_promised(module: str, config: Mapping[str, Any]) -> bool:
    """Whether the configuration says that a module of the base is adapted, as PEFT reads it."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    left_out = (config.get("exclude_modules"), config.get("modules_to_save"))
    if not _is_one_of(module, targets) or any(_is_one_of(module, names) for names in left_out):
        return False
    if layers in (None, []) or isinstance(targets, str) or module in (targets or ()):
        return True
    patterns = config.get("layers_pattern") or r"[^.]*"
    named = [patterns] if isinstance(patterns, str) else patterns
    found = next(filter(None, (re.match(rf"(?:.*?\.)?{name}\.(\d+)\.", module) for name in named)), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _is_one_of(module: str, asked: str | Sequence[str] | None) -> bool:
    """Whether a module is one of those named by the end of their paths, or by an expression for all of it."""
    if isinstance(asked, str):
        return re.fullmatch(asked, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in asked or ())


def _converted(start: str) -> str:
    if start.lower() == "loftq":
        return f"Merge it with PEFT into the base that LoftQ wrote. {AS_IT_IS}"
    return (
        "Save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), "
        "which makes it plain LoRA of twice the rank."
    )


def _is_given_whole(target: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor stands in place of the base's in one of the ways in which PEFT saves them."""
    if target in (EMBEDDING, HEAD):  # saved when tables were resized or are adapted
        return True
    if target.endswith(".bias") and config.get("bias", "none") != "none":
        return True
    return any(_lies_in(target, saved) for saved in config.get("modules_to_save") or ())


def _lies_in(tensor: str, saved: str) -> bool:
    """Whether a tensor is of a module that `modules_to_save` names by the end of its path."""
    steps = tensor.split(".")
    return any(".".join(steps[:count]).endswith(saved) for count in range(1, len(steps)))


def _check_parts(module: str, parts: Mapping[str, str], config: Mapping[str, Any], *, folder: Path) -> None:
    for pair in _PAIRS:
        if len(set(pair) & set(parts)) == 1:
            raise BadExport(
                f"The adapter in {folder} has only one of the two matrices of {module}.",
                cure="The adapter file is damaged; take it from a checkpoint of the run.",
            )
    another_run = "Adapter file and configuration are of different runs; take both from one."
    method = config["peft_type"]
    kinds = (
        ("scaling", "IA3"), ("inner", "VERA"), ("angles", "OFT"), ("values", "ADALORA"), ("left", "ADALORA"),
    )  # fmt: skip
    if any((part in parts) != (method == kind) for part, kind in kinds) and "rows" not in parts:
        raise BadExport(
            f"The adapter in {folder} has {next(iter(parts.values()))}; adapter_config.json says "
            f"peft_type = {method!r}.",
            cure=another_run,
        )
    promised = {
        "magnitude": ("use_dora", "A" in parts or "table A" in parts),
        "shift": ("lora_bias", "A" in parts),
    }
    for part, (setting, may_be) in promised.items():
        value = bool(config.get(setting))
        if (value and may_be) != (part in parts):
            raise BadExport(
                f"The adapter in {folder} {'has a' if part in parts else 'has no'} {part} of {module}; "
                f"adapter_config.json says {setting} = {value}.",
                cure=another_run,
            )


def _check_promises(named: Named, config: Mapping[str, Any], *, folder: Path) -> None:
    if not named.modules and not named.whole:
        raise BadExport(f"The adapter in {folder} is empty.", cure="Give the folder of a finished run.")
    damaged = "The adapter file is damaged; take it from a checkpoint of the run."
    if named.having("inner") and len(named.shared) < len(_SHARED):
        raise BadExport(f"The adapter in {folder} lacks a projection of VeRA's.", cure=damaged)
    for saved in config.get("modules_to_save") or ():
        if not any(_lies_in(tensor, saved) for tensor in named.whole):
            raise BadExport(
                f"The adapter in {folder} lacks {saved}, which its modules_to_save names.", cure=damaged
            )
    if config.get("trainable_token_indices") and not named.having("rows"):
        raise BadExport(
            f"The adapter in {folder} lacks the rows of its trainable_token_indices.", cure=damaged
        )
