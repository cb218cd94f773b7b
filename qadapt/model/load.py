"""Loads the frozen base: 4-bit NormalFloat with double quantization (arXiv:2305.14314), 8 bits, or 16-bit.

`transformers` streams the files: each tensor is quantized as it is read and its source let go. Measured
(`tools/bench/load_memory.py`): anonymous memory stays under the resident model plus its two largest source
tensors. It would fill a missing tensor with random numbers and go on, so names and shapes are compared first.
What stays on the host is said by `placement.py`. Knows nothing of adapters.
"""

from __future__ import annotations

import ctypes
import json
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qadapt.engine.attention import choose_attention
from qadapt.engine.linear import use_dense_products
from qadapt.errors import BadModel, Unsupported
from qadapt.model.placement import PlacedConfig, on_host, place
from qadapt.model.precision import capability_of
from qadapt.model.tensor_files import open_model

NF4_BLOCK = 64
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_CONSTANTS = ("absmax", "quant_map", "quant_state.")
"""What bitsandbytes stores of a 4-bit weight beside its values, by the beginnings of their names."""
_STATE = ".weight.quant_state."
_STATE_FIELDS = frozenset(("quant_type", "blocksize", "dtype", "shape"))
"""Of the JSON among these constants."""
COMPUTED_ANEW = re.compile(r"rotary_emb\.inv_freq$")
"""What old files hold besides the weights; the library computes it from the configuration."""
_NAMED = 3


def load_base(
    folder: Path,
    *,
    quantization: str,
    double_quant: bool,
    dtype: torch.dtype,
    device: torch.device,
    offload: Sequence[str] = (),
) -> PreTrainedModel:
    """The frozen base on a device, in training mode for its caller to adapt.

    Args:
        folder: A whole model folder (see `model/source.py`).
        quantization: `nf4`, `int8` or `none`.
        double_quant: Quantize the quantization constants too.
        dtype: Type of products and of everything that is not quantized.
        device: Where it computes, and lives but for what stays on the host.
        offload: What stays on the host, of the parts of `plan.setting.Setting.offload`.

    Raises:
        BadModel: The files do not make the causal language model of their configuration: a tensor is missing,
            has another shape, or is not of that model.
        Unsupported: A layer has a width that 4 bits on this device compute wrong, or see `check_placeable`.
    """
    kept = on_host(offload)
    config = _quantization_of(quantization, dtype=dtype, double_quant=double_quant, device=device, kept=kept)
    try:
        _check_tensors(folder)
        with _freed_blocks_returned():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                quantization_config=config,
                device_map={"": torch.device("cpu") if kept else device},
                local_files_only=True,
                use_safetensors=True,
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _unloadable(folder, error) from None
    model.requires_grad_(False)
    if kept:
        place(model, kept, device=device)
    _keep_quantized_weights(model)
    use_dense_products(model)
    _check_widths(model, device)
    choose_attention(model, dtype=dtype, capability=capability_of(device))
    return model


def load_stored(folder: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model whose files hold 4-bit weights of bitsandbytes, as they are; to be asked, not trained.

    Args:
        folder: As `save_pretrained` or `qadapt export` writes it.
        dtype: Type of products and of everything that is not quantized.
        device: Where it lives.

    Raises:
        BadModel: The files do not make the model of their configuration.
    """
    try:
        _check_tensors(folder, are_quantized=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _unloadable(folder, error) from None
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = dtype
    _keep_quantized_weights(model)
    choose_attention(model, dtype=dtype, capability=capability_of(device))
    return model


def _unloadable(folder: Path, error: Exception) -> BadModel:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return BadModel(f"The model in {folder} cannot be loaded: {reason}", cure="Get the model again.")


def _quantization_of(
    quantization: str, *, dtype: torch.dtype, double_quant: bool, device: torch.device, kept: Sequence[str]
) -> BitsAndBytesConfig | None:
    """How the library is to quantize; None for 16 bits. `kept` are the parts that stay on the host."""
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    values = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
    }
    if kept:
        return PlacedConfig(device=device, is_streamed="layers" in kept, **values)
    return BitsAndBytesConfig(**values)


def _check_tensors(folder: Path, *, are_quantized: bool = False) -> None:
    """Compares the tensors in the files with those of the configured model; reads headers only.

    A tied head may be in the files or not. All proven families are stored under their names in memory.
    """
    with open_model(folder) as reader:
        stored = {name: entry.shape for name, entry in reader.entries.items()}
        packed = [name for name in stored if name.endswith(".weight") and reader.entries[name].dtype == "U8"]
        for name in stored:
            if _STATE in name and not _is_state(bytes(reader.read(name))):
                raise _wrong_tensors(folder, "hold damaged constants of 4-bit weights", [name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    known = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := [name for name, _ in model.named_parameters() if name not in stored]:
        raise _wrong_tensors(folder, "lack tensors of the model in config.json", missing)
    if are_quantized:  # shapes are those of packed values
        constants = [f"{name}.{part}" for name in packed for part in _CONSTANTS]
        if missing := [part for part in constants if not any(name.startswith(part) for name in stored)]:
            raise _wrong_tensors(folder, "lack constants of 4-bit weights", missing)
        return
    odd = [name for name in stored if name not in known and not COMPUTED_ANEW.search(name)]
    if odd:
        raise _wrong_tensors(folder, "hold tensors that the model in config.json does not have", odd)
    misshapen = [
        f"{name} is {shape} instead of {known[name]}"
        for name, shape in stored.items()
        if known.get(name, shape) != shape
    ]
    if misshapen:
        raise _wrong_tensors(folder, "contradict the shapes in config.json", misshapen)


def _is_state(text: bytes) -> bool:
    """Whether it is what bitsandbytes says in JSON of a 4-bit weight."""
    try:
        values = json.loads(text)
    except ValueError:
        return False
    return isinstance(values, dict) and values.keys() >= _STATE_FIELDS


def _wrong_tensors(folder: Path, what: str, names: Sequence[str]) -> BadModel:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return BadModel(
        f"The weight files in {folder} {what}: {', '.join(names[:_NAMED])}{more}.",
        cure="Get config.json and all weight files again, from one revision of the model.",
    )


@contextmanager
def _freed_blocks_returned() -> Iterator[None]:
    """While open, glibc returns every freed block of 1 MiB and more to the system (mallopt(3)).

    Otherwise the small tensors that stay come to lie between the large ones that go, and the gaps stay
    resident: 70 MiB for the demo model in fp32. Afterwards the limits are those that glibc, left alone, comes
    to by itself, so that the blocks of a step are kept for the next.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def _keep_quantized_weights(model: PreTrainedModel) -> None:
    """Switches off the repacking of 4-bit weights on CPUs with AVX512-BF16.

    bitsandbytes 0.50 repacks a layer in place at its first forward pass in eval mode; every gradient after an
    evaluation would silently be wrong (`tests/test_train.py` holds the control).
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _check_widths(model: PreTrainedModel, device: torch.device) -> None:
    """Refuses what bitsandbytes 0.50 dequantizes wrong on CPUs, silently: rows that end within a block."""
    if device.type != "cpu":
        return
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.in_features % NF4_BLOCK:
            raise Unsupported(
                f"{name} is {module.in_features} wide, no multiple of {NF4_BLOCK}: 4 bits on a CPU go wrong.",
                cure="Train it with model.quantization=none, or on CUDA.",
            )
