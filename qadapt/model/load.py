"""Loads the frozen base: 4-bit NormalFloat with double quantization (arXiv:2305.14314), or 16-bit.

`transformers` streams the files: each tensor is quantized as it is read and its source let go. Measured
(`tools/bench/load_memory.py`): anonymous memory stays under the resident model plus its two largest source
tensors. Knows nothing of adapters.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qadapt.errors import BadModel, Unsupported

NF4_BLOCK = 64


def load_base(
    folder: Path, *, quantization: str, double_quant: bool, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The frozen base on a device, in training mode for its caller to adapt.

    Args:
        folder: A whole model folder (see `model/source.py`).
        quantization: `nf4` or `none`.
        double_quant: Quantize the quantization constants too.
        dtype: Type of products and of everything that is not quantized.
        device: Where it lives.

    Raises:
        BadModel: The files do not make a causal language model.
        Unsupported: A layer has a width that 4 bits on this device compute wrong.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=config if quantization == "nf4" else None,
            device_map={"": device},
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise BadModel(
            f"The model in {folder} cannot be loaded: {reason}", cure="Get the model again."
        ) from None
    model.requires_grad_(False)
    _keep_quantized_weights(model)
    _check_widths(model)
    return model


def _keep_quantized_weights(model: PreTrainedModel) -> None:
    """Switches off the repacking of 4-bit weights on CPUs with AVX512-BF16.

    bitsandbytes 0.50 repacks a layer in place at its first forward pass in eval mode; every gradient after an
    evaluation would silently be wrong (`tests/test_train.py` holds the control).
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _check_widths(model: PreTrainedModel) -> None:
    """Refuses what bitsandbytes 0.50 dequantizes wrong on CPUs, silently: rows that end within a block."""
    if model.device.type != "cpu":
        return
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.in_features % NF4_BLOCK:
            raise Unsupported(
                f"{name} is {module.in_features} wide, no multiple of {NF4_BLOCK}: 4 bits on a CPU go wrong.",
                cure="Train it with model.quantization=none, or on CUDA.",
            )
