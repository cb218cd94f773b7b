"""What the package uses of other libraries that is not promised: all of it, and what we rely on.

A name with a leading underscore, one documented as subject to change, or one documented nowhere. Each has a
contract test.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as StockLinear
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

if TYPE_CHECKING:
    from conftest import TinyModel

PACKAGE = Path(__file__).parent.parent / "qadapt"
USED = {
    "_register_custom_module": {"adapters/fused.py"},
    "_attn_implementation": {"engine/documents.py", "engine/prefix.py"},
    "_gradient_checkpointing_func": {"engine/boundaries.py"},
    "_softmax_backward_data": {"engine/blocks.py", "engine/target.py", "plan/workspace.py"},
    "register_quantizer": {"model/placement.py"},
    "get_quantize_ops": {"model/placement.py"},
    "Bnb4bitQuantize": {"model/placement.py"},
    "grad_fn).saved_tensors": {"engine/tiles.py"},
    "SCB": {"engine/linear.py", "model/skeleton.py", "train/memory.py"},
    "vars(state)": {"engine/streaming.py", "train/memory.py"},
}
"""Name → the files that may use it."""


def test_each_is_used_where_it_is_known_to_be() -> None:
    for name, places in USED.items():
        found = {
            path.relative_to(PACKAGE).as_posix()
            for path in PACKAGE.rglob("*.py")
            if re.search(rf"\b{re.escape(name)}", path.read_text(encoding="utf-8"))
        }
        assert found == places, name


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8)
        self.config: dict[str, object] = {}


class OwnLinear(StockLinear):  # type: ignore[misc]
    """What a registration names."""


def test_peft_puts_a_registered_class_on_layers_and_never_writes_of_it(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["projection"])
    config._register_custom_module({nn.Linear: OwnLinear})
    model = get_peft_model(Block(), config)
    assert type(model.base_model.model.projection) is OwnLinear
    model.save_pretrained(str(tmp_path))
    assert "custom" not in json.dumps(json.loads((tmp_path / "adapter_config.json").read_text()))
    again = PeftModel.from_pretrained(Block(), str(tmp_path))
    assert type(again.base_model.model.projection) is StockLinear


def test_torch_goes_back_through_a_softmax_given_its_result_as_autograd_does() -> None:
    torch.manual_seed(1)
    for dtype in (torch.bfloat16, torch.float32):
        values = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
        gradient = torch.randn(2, 3, 5, dtype=dtype)
        shares = values.softmax(-1)
        found = torch.ops.aten._softmax_backward_data(gradient, shares.detach(), -1, dtype)
        assert torch.equal(found, *torch.autograd.grad(shares, values, gradient))


def test_transformers_keeps_the_name_of_the_attention_that_was_chosen() -> None:
    config = AutoConfig.for_model("llama", hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name


def test_a_registered_quantizer_quantizes_by_its_own_operation(tiny_model: TinyModel) -> None:
    seen = []

    class Config(BitsAndBytesConfig):
        def __init__(self) -> None:
            super().__init__(load_in_4bit=True)  # type: ignore[no-untyped-call]
            self.quant_method = "seen"  # type: ignore[assignment]

    class Operation(Bnb4bitQuantize):
        def convert(
            self, input_dict: Any, full_layer_name: Any = None, model: Any = None, **rest: Any
        ) -> Any:
            seen.append(full_layer_name)
            made = super().convert(input_dict, full_layer_name, model, **rest)
            assert {type(value) for value in made.values()} == {Params4bit}
            return made

    class Quantizer(Bnb4BitHfQuantizer):
        def get_quantize_ops(self) -> Operation:
            return Operation(self)  # type: ignore[no-untyped-call]

    register_quantizer("seen")(Quantizer)
    folder = tiny_model("llama", layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Config())
    layers = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 7
    assert sorted(seen) == sorted(f"{name}.weight" for name in layers)


def test_a_function_s_node_gives_back_the_tensor_it_keeps() -> None:
    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(values)
            return values.sum()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient

    values = torch.ones(3, requires_grad=True)
    made: Any = Keep.apply(values)  # type: ignore[no-untyped-call]
    (kept,) = made.grad_fn.saved_tensors
    assert torch.equal(kept, values) and kept.untyped_storage().data_ptr() == values.data_ptr()


def test_an_8_bit_layer_holds_a_scale_for_each_row() -> None:
    layer = Linear8bitLt(4, 3, bias=False, has_fp16_weights=False)
    dense = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.1, 0.2, 0.3, 0.4], [8.0, 8.0, 8.0, -8.0]])
    layer.weight = Int8Params(dense, requires_grad=False, has_fp16_weights=False).to("cpu")
    assert layer.weight.SCB.tolist() == pytest.approx([2.0, 0.4, 8.0], rel=1e-3)
    layer(torch.ones(1, 4))
    assert layer.weight.SCB is None and layer.state.SCB.tolist() == pytest.approx([2.0, 0.4, 8.0], rel=1e-3)


def test_constants_of_4_bit_weights_are_tensors_that_can_be_put_elsewhere() -> None:
    _, state = quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    for each, names in ((state, {"absmax", "code", "offset"}), (state.state2, {"absmax", "code"})):
        held = vars(each)
        assert {name for name, value in held.items() if isinstance(value, torch.Tensor)} == names
        held["absmax"] = moved = each.absmax.clone()
        assert each.absmax is moved


def test_each_layer_that_recomputes_calls_a_function_it_holds(tiny_model: TinyModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama", layers=2)).train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    called = []
    for layer in model.get_decoder().layers:
        held = vars(layer)
        checkpoint = held["_gradient_checkpointing_func"]
        held["_gradient_checkpointing_func"] = lambda *all_of_it, inner=checkpoint, at=layer: (
            called.append(at) or inner(*all_of_it)
        )
    model(input_ids=torch.ones(1, 3, dtype=torch.int64)).logits.sum().backward()
    assert called == list(model.get_decoder().layers)
