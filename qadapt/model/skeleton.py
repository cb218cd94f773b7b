"""A base without weights: the very modules that `load_base` gives, their tensors on `meta`.

Needs only the values of a `config.json`. The 4-bit layers come from transformers' own quantizer and
bitsandbytes' own `quantize_4bit`, which run on `meta`, too: nothing about their layout is imitated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import quantize_4bit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AutoHfQuantizer

from qadapt.engine.linear import use_dense_products
from qadapt.errors import BadModel, Unsupported


def skeleton_base(
    values: Mapping[str, Any],
    *,
    quantization: str,
    double_quant: bool,
    dtype: torch.dtype,
    experts: str | None = None,
) -> PreTrainedModel:
    """The frozen base on `meta`, in training mode.

    Args:
        values: Of a `config.json`.
        quantization: `nf4`, `int8` or `none`.
        double_quant: Quantize the quantization constants too.
        dtype: Type of products and of everything that is not quantized.
        experts: How routed experts run, a name of transformers' registry; None leaves its default.

    Raises:
        Unsupported: transformers knows no causal language model of this architecture.
        BadModel: It cannot be built from these values.
    """
    config = config_of(values)
    chosen = {} if experts is None else {"experts_implementation": experts}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError) as error:
        raise BadModel(
            f"No model can be built from this config.json: {str(error).splitlines()[0]}",
            cure="Get the config.json again from where the model is published.",
        ) from None
    if quantization == "nf4":
        _quantize(model, double_quant=double_quant, dtype=dtype)
    elif quantization == "int8":
        _quantize_rows(model, dtype=dtype)
    model.requires_grad_(False)
    model.train()
    return model


def config_of(values: Mapping[str, Any]) -> PretrainedConfig:
    """The library's configuration of the values of a `config.json`.

    Raises:
        Unsupported: The architecture is not known to transformers.
    """
    family = str(values.get("model_type", "missing"))
    rest = {
        name: value for name, value in values.items() if name not in ("model_type", "quantization_config")
    }
    try:
        return AutoConfig.for_model(family, **rest)
    except ValueError:
        raise Unsupported(
            f"The architecture {family!r} is not known to transformers.",
            cure="Choose a model of a known architecture; `qadapt estimate --models` lists some.",
        ) from None


def _quantize(model: PreTrainedModel, *, double_quant: bool, dtype: torch.dtype) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    quantizer = AutoHfQuantizer.from_config(config)
    quantizer.preprocess_model(model, device_map=None)
    # bitsandbytes keeps one code book of nested constants for the whole process, on the device where it is
    # first needed; on `meta` it would spoil every base that is loaded later
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quantize_4bit(torch.zeros(64, 64, device=device), compress_statistics=True, quant_type="nf4")
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            packed, state = quantize_4bit(
                module.weight.data.to(dtype), blocksize=64, compress_statistics=double_quant, quant_type="nf4"
            )
            module.weight = bitsandbytes.nn.Params4bit(
                packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=module
            )
            module.quant_state = state
            _set_bias(module, dtype)
    quantizer.postprocess_model(model)  # PEFT looks for the mark it leaves


def _set_bias(module: torch.nn.Linear, dtype: torch.dtype) -> None:
    """Gives a layer's bias the type of products, in which the loaded one has it."""
    if module.bias is not None:
        module.bias.data = module.bias.data.to(dtype)


def _quantize_rows(model: PreTrainedModel, *, dtype: torch.dtype) -> None:
    """Puts 8-bit layers in place, as bitsandbytes leaves them: a byte per weight, an fp32 scale per row."""
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0))
    quantizer.preprocess_model(model, device_map=None)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            values = torch.empty(module.weight.shape, dtype=torch.int8, device="meta")
            scales = torch.empty(module.out_features, dtype=torch.float32, device="meta")
            module.weight = bitsandbytes.nn.Int8Params(values, requires_grad=False, CB=values, SCB=scales)
            _set_bias(module, dtype)
    quantizer.postprocess_model(model)
    use_dense_products(model)
