"""Where the parts of a frozen base lie: on the card, or in the memory of the host beside it.

A base with parts on the host is read there. Each 4-bit layer is quantized on the card as it is read, and goes
back at once if layers are to be streamed, so that the card never holds more of the base than it will in
training; what is not quantized stays a mapping of its file where the types agree.
The quantizer is transformers' own for bitsandbytes with that one difference, registered beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qadapt.engine.head import head_of
from qadapt.engine.host_head import HostHead
from qadapt.engine.recompute import decoder_layers
from qadapt.engine.streaming import stream_layers
from qadapt.engine.table import can_be_on_host, keep_on_host
from qadapt.errors import Unsupported

_NAME = "qadapt-nf4"


class PlacedConfig(BitsAndBytesConfig):
    """How layers are quantized, with the device that does it.

    Args:
        device: Quantizes, and keeps the result unless layers are streamed.
        is_streamed: Whether the result goes back to the host.
        values: Of bitsandbytes' configuration.
    """

    def __init__(self, *, device: torch.device, is_streamed: bool, **values: Any) -> None:
        super().__init__(**values)  # type: ignore[no-untyped-call]
        self.quant_method = _NAME  # type: ignore[assignment]
        self.device, self.is_streamed = str(device), is_streamed


@register_quantizer(_NAME)
class _PlacedQuantizer(Bnb4BitHfQuantizer):
    def get_quantize_ops(self) -> Bnb4bitQuantize:
        return _PlacedQuantize(self)  # type: ignore[no-untyped-call]


class _PlacedQuantize(Bnb4bitQuantize):
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, list[Tensor]],
        full_layer_name: str | None = None,
        model: nn.Module | None = None,
        **rest: Any,
    ) -> dict[str, Tensor]:
        config = self.hf_quantizer.quantization_config
        moved = {name: [each.to(config.device) for each in values] for name, values in input_dict.items()}
        quantized = super().convert(moved, full_layer_name, model, **rest)
        if not config.is_streamed:
            return quantized
        return {name: parameter.to("cpu") for name, parameter in quantized.items()}


def on_host(offload: Sequence[str]) -> tuple[str, ...]:
    """Of the parts of `plan.setting.Setting.offload`, those that are parts of the base."""
    return tuple(part for part in offload if part != "boundaries")


def check_placeable(model: PreTrainedModel, offload: Sequence[str]) -> None:
    """Refuses parts that this model cannot have on the host, where a plan without its shape could not see it.

    Raises:
        Unsupported: The embeddings' table is the head's, too, and not both are to go; one is of an unknown
            kind; or it is not known what the architecture does with the head's logits.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is head.weight and ("embeddings" in offload) != ("head" in offload):
        raise Unsupported(
            "memory.offload: the head of this model is tied to the embeddings: one table.",
            cure="Name both embeddings and head in memory.offload, or neither.",
        )
    if "embeddings" in offload and not can_be_on_host(embedding):
        raise Unsupported(
            f"memory.offload: this model's embeddings are of an unknown kind, {type(embedding).__name__}.",
            cure="Leave embeddings out of memory.offload.",
        )
    if "head" in offload and (type(head) is not nn.Linear or head_of(model) is None):
        raise Unsupported(
            f"memory.offload: the head of this model is of an unknown kind, {type(head).__name__} of "
            f"{model.config.model_type}.",
            cure="Leave head out of memory.offload.",
        )
    are_8_bit = any(isinstance(module, Linear8bitLt) for module in model.modules())
    assert "layers" not in offload or not are_8_bit, "layers in 8 bits cannot be streamed"


def place(model: PreTrainedModel, offload: Sequence[str], *, device: torch.device) -> None:
    """Brings a base that was read on the host to its device, but for what stays on the host.

    Args:
        model: The frozen base, its layers quantized; on `meta` for a dry run.
        offload: Of `embeddings`, `head` and `layers`, what stays; other parts are of no concern here.
        device: Where it computes.

    Raises:
        Unsupported: See `check_placeable`.
    """
    check_placeable(model, offload)
    embedding, layers = model.get_input_embeddings(), decoder_layers(model)
    if "embeddings" in offload:
        assert isinstance(embedding, nn.Embedding)
        keep_on_host(embedding)
    stays = {id(embedding.weight)} if "embeddings" in offload else set()
    if "head" in offload:
        head = HostHead(model.get_output_embeddings(), device)
        model.set_output_embeddings(head)
        stays |= {id(part) for part in head.slices}
    if "layers" in offload:
        stays |= {id(parameter) for layer in layers for parameter in layer.parameters() if parameter.ndim > 1}
    for module in model.modules():
        _move(module, stays, device=device)
    if "layers" in offload:
        stream_layers(layers, device)
    if device.type == "cuda":
        model.get_decoder().register_forward_pre_hook(partial(_bring, device), with_kwargs=True)


def _bring(device: torch.device, _: nn.Module, arguments: Any, named: dict[str, Any]) -> Any:
    """Inputs to where a base computes: the library's generation has them where its first parameter lies."""
    brought = [
        each.to(device) if isinstance(each, Tensor) else each for each in (*arguments, *named.values())
    ]
    return tuple(brought[: len(arguments)]), dict(zip(named, brought[len(arguments) :], strict=True))


def brought_parts(model: PreTrainedModel, offload: Sequence[str]) -> list[nn.Module]:
    """What of a placed base lies in pinned memory and is brought to the card."""
    layers = decoder_layers(model) if "layers" in offload else []
    return [*layers, *([model.get_output_embeddings()] if "head" in offload else [])]


def _move(module: nn.Module, stays: set[int], *, device: torch.device) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) in stays or parameter.device.type == device.type:
            continue
        if isinstance(parameter, Params4bit | Int8Params):
            module.register_parameter(name, parameter.to(device))  # with its constants
        else:
            parameter.data = parameter.data.to(device)
    for buffer in module.buffers(recurse=False):
        buffer.data = buffer.data.to(device)
