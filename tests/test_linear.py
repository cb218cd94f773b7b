"""The fused linear layer against plain PEFT: the same output, the same gradients, the same files."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from test_estimate import CPU, build, folders
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from qadapt.adapters.fused import FusedLinear, FusedLinear4bit, FusedLinear8bit, use_fused_layers
from qadapt.adapters.lora import linear_layers, load_lora, trainable
from qadapt.engine.linear import dense_weight
from qadapt.engine.recompute import set_recompute
from qadapt.model.load import load_base
from qadapt.plan.setting import Setting

__all__ = ["folders"]  # a fixture
INPUTS, OUTPUTS, RANK = 192, 77, 5
"""4-bit rows on a CPU are whole blocks of 64; all else is odd."""
BASES = ("nf4-dq", "nf4", "int8", "plain")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.02}
"""Largest difference to the reference, of the reference's largest value; bf16 rounds to 0.4 %."""


class Block(nn.Module):
    """One frozen layer, where PEFT finds it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.projection = layer
        self.config: dict[str, Any] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.projection(inputs)


def frozen(base: str, dtype: torch.dtype, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(1)
    plain = nn.Linear(INPUTS, OUTPUTS, bias=bias)
    if base == "plain":
        layer: nn.Linear = plain.to(dtype)
    elif base == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(INPUTS, OUTPUTS, bias=bias, has_fp16_weights=False)
        layer.load_state_dict(plain.state_dict())
        layer = layer.to("cpu")
    else:
        layer = bitsandbytes.nn.Linear4bit(
            INPUTS,
            OUTPUTS,
            bias=bias,
            compute_dtype=dtype,
            compress_statistics=base == "nf4-dq",
            quant_type="nf4",
        )
        layer.load_state_dict(plain.state_dict())
        layer.weight.quant_state = None
        layer = layer.to(dtype).to("cpu")
        layer.support_avx512bf16_for_cpu = False
    return layer.requires_grad_(False)


def adapted(
    base: str, types: tuple[torch.dtype, torch.dtype], *, fused: bool, bias: bool = False, **lora: Any
) -> nn.Module:
    """A block with LoRA, fused or of stock PEFT, its factors random."""
    block = Block(frozen(base, types[0], bias=bias))
    config = LoraConfig(target_modules=["projection"], **{"r": RANK, "lora_alpha": 7, **lora})
    if fused:
        use_fused_layers(config)
    block.is_loaded_in_4bit, block.is_loaded_in_8bit = "nf4" in base, base == "int8"
    model = get_peft_model(block, config, autocast_adapter_dtype=False)
    torch.manual_seed(2)
    for parameter in trainable(model).values():
        parameter.data = torch.randn(parameter.shape).mul_(0.2).to(types[1])
    return model.train()


def inputs_of(dtype: torch.dtype) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(3, 11, INPUTS).to(dtype).requires_grad_()


def outcome(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The output and all gradients, with the same draws of dropout every time."""
    torch.manual_seed(4)
    output = model(inputs)
    wanted = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    output.backward(wanted)
    gradients = {name: parameter.grad for name, parameter in trainable(model).items()}
    return {"output": output.detach(), "inputs": inputs.grad, **gradients}  # type: ignore[dict-item]


def errors(found: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    assert list(found) == list(reference)
    return {
        name: float((found[name].float() - each).abs().max() / each.abs().max())
        for name, each in reference.items()
    }


def kind_of(model: nn.Module) -> type[nn.Module]:
    return next(type(module) for module in model.modules() if isinstance(module, LoraLayer))


@pytest.mark.parametrize(("base", "bias"), list(itertools.product(BASES, (False, True))))
@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}], ids=str)
def test_in_fp32_output_and_gradients_are_those_of_plain_peft(
    base: str, bias: bool, lora: dict[str, Any]
) -> None:
    types = (torch.float32, torch.float32)
    fused, plain = (adapted(base, types, fused=each, bias=bias, **lora) for each in (True, False))
    assert kind_of(fused) in (FusedLinear, FusedLinear4bit, FusedLinear8bit)
    found = outcome(fused, inputs_of(torch.float32))
    off = errors(found, outcome(plain, inputs_of(torch.float32)))
    assert max(off.values()) < TOLERANCE[torch.float32], off


@pytest.mark.parametrize(("base", "bias"), list(itertools.product(BASES, (False, True))))
@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
def test_in_bf16_it_is_as_near_to_fp32_as_plain_peft(
    base: str, bias: bool, lora: dict[str, Any], factors: torch.dtype
) -> None:
    fused = adapted(base, (torch.bfloat16, factors), fused=True, bias=bias, **lora)
    plain = adapted(base, (torch.bfloat16, torch.bfloat16), fused=False, bias=bias, **lora)
    reference = adapted("plain", (torch.float32, torch.float32), fused=False, bias=bias, **lora)
    source, target = (
        next(m for m in model.modules() if isinstance(m, LoraLayer)) for model in (fused, reference)
    )
    target.get_base_layer().weight.data = dense_weight(source.get_base_layer(), torch.float32)
    if bias:
        target.get_base_layer().bias.data = source.get_base_layer().bias.float()
    for name, parameter in trainable(reference).items():
        parameter.data = trainable(fused)[name].detach().float()
    exact = outcome(reference, inputs_of(torch.bfloat16).detach().float().requires_grad_())
    mine, theirs = (errors(outcome(model, inputs_of(torch.bfloat16)), exact) for model in (fused, plain))
    assert max(mine.values()) < TOLERANCE[torch.bfloat16], mine
    assert max(mine.values()) < 1.5 * max(theirs.values()), (mine, theirs)
    assert {each.dtype for name, each in trainable(fused).items()} == {factors}


def test_a_wrong_scale_or_mask_would_be_seen() -> None:
    types = (torch.float32, torch.float32)
    dropped, plain = (adapted("nf4", types, fused=each, lora_dropout=0.3) for each in (True, False))
    layer = next(module for module in dropped.modules() if isinstance(module, LoraLayer))
    layer.scaling["default"] *= 1.001
    off = errors(outcome(dropped, inputs_of(torch.float32)), outcome(plain, inputs_of(torch.float32)))
    assert min(off.values()) > 10 * TOLERANCE[torch.float32]
    layer.scaling["default"] /= 1.001
    layer.lora_dropout["default"].p = 0.31
    off = errors(outcome(dropped, inputs_of(torch.float32)), outcome(plain, inputs_of(torch.float32)))
    assert min(off.values()) > 10 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_is_kept_but_the_input_and_what_lies_between_the_factors(
    base: str, factors: torch.dtype
) -> None:
    model, inputs = adapted(base, (torch.bfloat16, factors), fused=True), inputs_of(torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs)
    own = {parameter.untyped_storage().data_ptr() for parameter in [inputs, *model.parameters()]}
    more = [each for each in kept if each.untyped_storage().data_ptr() not in own]
    assert [tuple(each.shape) for each in more] == [(33, RANK)]


class Counted(TorchDispatchMode):
    """How often each operation ran while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


DEQUANTIZE = "bitsandbytes::dequantize_4bit"


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    model = adapted("nf4-dq", (torch.float32, torch.float32), fused=True)
    inputs = inputs_of(torch.float32).detach()
    output = model(inputs)
    with Counted() as counted:
        output.sum().backward()
    assert counted.counts[DEQUANTIZE] == 0
    assert all(parameter.grad is not None for parameter in trainable(model).values())


def test_a_layer_computed_again_stops_before_its_last_product(folders: dict[str, Path]) -> None:
    setting = dataclasses.replace(CPU, rank=RANK)
    counts = []
    for recompute in ("none", "all"):
        model = build(folders["llama"], dataclasses.replace(setting, recompute=recompute))
        with Counted() as counted:
            loss_of(model).backward()
        counts.append(counted.counts[DEQUANTIZE])
    layers = 3
    assert counts[0] == layers * 7 * 2 - 3  # nothing goes back through the first three projections
    assert counts[1] == counts[0] + layers * 6


def test_a_single_token_in_generation_takes_the_library_s_kernel() -> None:
    model = adapted("nf4-dq", (torch.float32, torch.float32), fused=True).eval()
    counts = []
    with torch.no_grad():
        for length in (1, 2):
            with Counted() as counted:
                model(inputs_of(torch.float32)[:, :length])
            counts.append(counted.counts["bitsandbytes::gemm_4bit"])
    assert counts == [1, 0]


def loss_of(model: nn.Module) -> Tensor:
    torch.manual_seed(5)
    ids = torch.randint(3, 1003, (2, 37))
    logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def stock(folder: Path, setting: Setting) -> PeftModel:
    """The same base with stock PEFT's layers and the same factors as `build`'s."""
    base = load_base(
        folder,
        quantization=setting.quantization,
        double_quant=True,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    set_recompute(base, setting.recompute)
    config = LoraConfig(
        r=setting.rank,
        lora_alpha=16,
        lora_dropout=setting.dropout,
        target_modules=sorted(linear_layers(base)),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config, autocast_adapter_dtype=False).train()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"recompute": "all", "dropout": 0.1}),
        ("qwen2", {"recompute": "none"}),
        ("gemma2", {"recompute": 2}),
        ("phi3", {"recompute": "all", "quantization": "none"}),
        ("llama", {"recompute": 1, "quantization": "int8"}),
    ],
)
def test_a_whole_model_has_plain_peft_s_loss_and_gradients(
    family: str, changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    setting = dataclasses.replace(CPU, rank=RANK, **changes)
    fused, plain = build(folders[family], setting), stock(folders[family], setting)
    assert issubclass(kind_of(fused), (FusedLinear, FusedLinear4bit, FusedLinear8bit))
    assert kind_of(plain).__module__.startswith("peft.")
    torch.manual_seed(6)
    losses = []
    for name, parameter in trainable(fused).items():
        parameter.data = torch.randn(parameter.shape) * 0.05
        trainable(plain)[name].data = parameter.data.clone()
    for model in (fused, plain):
        torch.manual_seed(7)
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    gradients = [{name: each.grad for name, each in trainable(model).items()} for model in (fused, plain)]
    off = errors(*gradients)  # type: ignore[arg-type]
    assert max(off.values()) < 2e-4, max(off, key=lambda name: off[name])  # fp32 through three layers


def test_what_is_saved_is_plain_peft_and_loads_either_way(folders: dict[str, Path], tmp_path: Path) -> None:
    setting = dataclasses.replace(CPU, rank=RANK)
    model = build(folders["llama"], setting)
    for parameter in trainable(model).values():
        parameter.data = torch.randn(parameter.shape) * 0.05
    model.save_pretrained(str(tmp_path))
    assert "Fused" not in (tmp_path / "adapter_config.json").read_text()
    bases = [stock(folders["llama"], setting).unload() for _ in range(2)]
    plain, again = PeftModel.from_pretrained(bases[0], str(tmp_path)), load_lora(bases[1], tmp_path)
    assert kind_of(plain).__module__.startswith("peft.")
    assert kind_of(again) is FusedLinear4bit
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = [each.eval()(input_ids=ids).logits for each in (model, plain, again)]
    assert torch.allclose(logits[0], logits[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("case", ["dora with dropout", "off", "merged", "two", "named", "autocast"])
def test_what_is_not_the_plain_case_is_plain_peft_s(case: str) -> None:
    lora = {"use_dora": True, "lora_dropout": 0.3} if case == "dora with dropout" else {}
    outputs = []
    for fused in (True, False):
        base = "plain" if case == "merged" else "nf4"
        model = adapted(base, (torch.float32, torch.float32), fused=fused, **lora)
        inputs = inputs_of(torch.float32).detach()
        named = {"adapter_names": ["default", "__base__", "default"]} if case == "named" else {}
        if case == "two":
            torch.manual_seed(8)
            model.add_adapter(
                "other", LoraConfig(r=3, target_modules=["projection"], init_lora_weights=False)
            )
            model.base_model.set_adapter(["default", "other"])
        if case == "merged":
            model.merge_adapter()
        with ExitStack() as stack:
            if case == "off":
                stack.enter_context(model.disable_adapter())
            if case == "autocast":
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            outputs.append(model.eval()(inputs, **named))
    assert torch.equal(outputs[0], outputs[1])
