"""A model folder, checked before it is loaded (configuration, tokenizer, weights), and its fingerprint.

Reads headers and a few sampled blocks, never whole weights, and imports neither torch nor transformers. The
layout is that of `save_pretrained`: config.json, model.safetensors or an index with its shards, tokenizer
files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qadapt.errors import BadModel, NoClosedForm, Unsupported
from qadapt.experts import routed_experts
from qadapt.model.shards import INDEX_NAME, SINGLE_NAME, read_header
from qadapt.shape import FAMILIES, shape_from_config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_OTHER_JSON = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "_from_model_config")
_SAMPLES = 32
_SAMPLE_BYTES = 4096
_QUANTIZED_NAME = re.compile(
    r"(-unsloth)?-(bnb-[48]bit|gptq|awq|fp8|int[48]|exl[23]|4bit|8bit|gguf|mlx)([-_.].*)?$", re.IGNORECASE
)


def checked_folder(folder: Path, *, name: str) -> str:
    """Checks that a folder holds a whole 16-bit model that can be trained, and gives its fingerprint.

    The fingerprint is a sha256 over the values of config.json (without who wrote it) and, of each weight
    file, header, size and blocks sampled evenly: the same for the same weights wherever they lie, and cheap
    for 100 GB. It recognizes a model, it does not prove that no bit has flipped.

    Raises:
        BadModel: A file is missing, half-written, no JSON, pickled or quantized, or the model
            needs code from its repository.
        Unsupported: The architecture is not proven here.
    """
    config = read_config(folder, name=name)
    check_config(config, name=name)
    files = weight_files(folder, name=name)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise BadModel(
            f"{name}: {folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}).",
            cure="Copy the tokenizer files of the model into the folder.",
        )
    _check_json_files(folder)
    values = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for file in files:
        digest.update(_sampled(file))
    return digest.hexdigest()


def read_config(folder: Path, *, name: str) -> dict[str, Any]:
    """The values of the folder's config.json.

    Raises:
        BadModel: It is missing or no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise BadModel(f"{name}: {folder} is no model folder: it has no config.json.", cure=_cure_of(folder))
    return _read_json(path)


def _check_json_files(folder: Path) -> None:
    """Finds a configuration or tokenizer file that was cut off, which its readers would only stumble over."""
    for file in (*TOKENIZER_FILES, *_OTHER_JSON):
        path = folder / file
        if path.suffix == ".json" and path.is_file():
            values = _read_json(path)
            if file == "tokenizer.json" and "model" not in values:
                raise BadModel(f"{path} is incomplete: it has no model.", cure="Get the file again.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadModel(f"{path} is no JSON: {error}.", cure="Get the file again.") from None
    if not isinstance(values, dict):
        raise BadModel(f"{path} is no JSON object.", cure="Get the file again.")
    return values


def _cure_of(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "It is an adapter: give the model it was trained on."
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f"It holds a GGUF file: give that file itself, {ggufs[0]}."
    return "Give the folder that holds config.json, the tokenizer and *.safetensors."


def check_config(config: Mapping[str, Any], *, name: str) -> None:
    """Checks that a model with this config.json can be trained, before its weights are fetched or read.

    Code from a repository is never run. A proven architecture that also carries an `auto_map` (Phi-3 does) is
    read by the library's own class; any other is refused.

    Raises:
        BadModel: Already quantized, or a model that needs code from its repository.
        Unsupported: The architecture is not proven here.
    """
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise already_quantized(name, method=str(method))
    try:
        shape_from_config(config, name=name)
    except Unsupported as error:
        if "auto_map" in config:
            raise BadModel(
                f"{name} needs Python code from its repository (auto_map in config.json), "
                "which is never run.",
                cure="Choose a model whose architecture transformers knows itself.",
            ) from None
        if isinstance(error, NoClosedForm):
            raise _untrained(config, name) from None
        raise


def _untrained(config: Mapping[str, Any], name: str) -> Unsupported:
    experts = routed_experts(config)
    if experts is not None:
        return Unsupported(
            f"{name} is a mixture of experts, which is not trained here. {experts.not_covered}",
            cure=f"Choose a dense model; proven are: {', '.join(FAMILIES)}.",
        )
    return Unsupported(
        f"{name} has the architecture {config['model_type']!r}, which is not proven here.",
        cure=f"Proven are: {', '.join(FAMILIES)}.",
    )


def already_quantized(name: str, *, method: str) -> BadModel:
    """The error for a repository whose weights are quantized; names the likely 16-bit one."""
    base = _QUANTIZED_NAME.sub("", name)
    suggestion = f"such as {base}" if base != name else "from which this one was made"
    return BadModel(
        f"{name} is already quantized ({method}); qadapt quantizes the 16-bit weights itself.",
        cure=f"Give the 16-bit model, {suggestion}.",
    )


def weight_files(folder: Path, *, name: str) -> list[Path]:
    """The safetensors files of a folder, each whole.

    Raises:
        BadModel: None is there, one is missing or half-written, or the index contradicts them.
    """
    index_path, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if single.is_file():
        read_header(single)
        return [single]
    if not index_path.is_file():
        raise _no_weights(folder, name)
    try:
        weight_map: dict[str, str] = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadModel(f"{index_path} is no index of weights.", cure="Get the file again.") from None
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise BadModel(
            f"{name}: {len(missing)} of {len(shards)} weight files are missing in {folder}: "
            f"{missing[0]} first.",
            cure="Get the missing files from where the model is published.",
        )
    held = {shard: read_header(folder / shard) for shard in shards}
    for tensor, shard in weight_map.items():
        if tensor not in held[shard]:
            raise BadModel(
                f"{name}: {folder / shard} lacks the tensor {tensor}, which the index puts there.",
                cure="Get the index and the weight files again; they are not of one version.",
            )
    return [folder / shard for shard in shards]


def _no_weights(folder: Path, name: str) -> BadModel:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return BadModel(
            f"{name}: {folder} has only pickled weights ({pickles[0]}), "
            "which can run code when they are read.",
            cure="Use a repository or revision with *.safetensors (safetensors only).",
        )
    return BadModel(
        f"{name}: {folder} has no weights ({SINGLE_NAME} or {INDEX_NAME}).", cure=_cure_of(folder)
    )


def _sampled(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        digest.update(file.read(length))
        room = max(size - 8 - length - _SAMPLE_BYTES, 0)
        for sample in range(_SAMPLES):
            file.seek(8 + length + room * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
