"""Feed-forward parts that make their product again: the library's gradient, and what is let go."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from test_method_runs import drawn
from test_methods import FP32, FREE, base_of
from torch import Tensor

from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.engine.gated import Gated, set_gated
from qadapt.engine.recompute import decoder_layers, set_recompute
from qadapt.engine.tiles import Tiled, set_tiles
from qadapt.methods import Method
from qadapt.shape import FAMILIES

if TYPE_CHECKING:
    from conftest import TinyModel


def gradients(model: Any) -> dict[str, Tensor]:
    """Of what is trained, for a few rows."""
    ids = torch.randint(0, model.config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    found = {name: each.grad for name, each in trainable(model).items() if each.grad is not None}
    model.zero_grad()
    return found


def assert_same_bits(model: Any) -> None:
    """With and without, after one another."""
    usual = gradients(model)
    set_gated(model.get_base_model())
    found = gradients(model)
    assert found.keys() == usual.keys() and any(each.abs().sum() > 0 for each in usual.values())
    assert all(torch.equal(found[name], usual[name]) for name in usual)


@pytest.mark.parametrize("method", FREE)
def test_every_method_learns_the_same_to_the_bit(method: Method, tiny_model: TinyModel) -> None:
    assert_same_bits(drawn(method, tiny_model("llama")))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_the_same_to_the_bit(
    family: str, quantization: str, tiny_model: TinyModel
) -> None:
    assert_same_bits(drawn("lora", tiny_model(family), quantization=quantization))


def test_dropout_drops_the_same(tiny_model: TinyModel) -> None:
    lora = Lora(rank=4, alpha=8, dropout=0.3)
    assert_same_bits(attach_lora(base_of(tiny_model("llama")), lora, dtype=FP32, seed=0))


def test_what_is_kept_in_another_shape_or_order_is_kept(tiny_model: TinyModel) -> None:
    """A layer of somebody else's that turns what enters it round: it is not made again the wrong way."""

    class Turned(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.scale = inner, torch.nn.Parameter(torch.linspace(0.5, 2, 17))

        def forward(self, values: Tensor) -> Tensor:
            turned: Tensor = self.inner((values.transpose(1, 2) * self.scale).transpose(1, 2))
            return turned

    base = base_of(tiny_model("llama"))
    model = attach_lora(base, Lora(rank=4, alpha=8), dtype=FP32, seed=0)
    for layer in decoder_layers(model.get_base_model()):
        mlp: Any = layer.mlp
        mlp.down_proj = Turned(mlp.down_proj)
    assert_same_bits(model)


class Activation(torch.nn.Module):
    """What it gives, seen for as long as it is there."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.given: list[weakref.ref[Any]] = []

    def forward(self, gate: Tensor) -> Tensor:
        result: Tensor = self.inner(gate)
        self.given.append(weakref.ref(result.untyped_storage()))
        return result

    def kept(self) -> int:
        return sum(each() is not None for each in self.given)


def watched(model: PeftModel) -> list[Activation]:
    """The activations of its layers, each seen from now on."""
    seen = []
    for layer in decoder_layers(model.get_base_model()):
        mlp: Any = layer.mlp
        mlp.act_fn = Activation(mlp.act_fn)
        seen.append(mlp.act_fn)
    return seen


def loss_of(model: PeftModel) -> Tensor:
    ids = torch.arange(20).reshape(2, 10)
    loss: Tensor = model.train()(input_ids=ids, labels=ids).loss
    return loss


@pytest.mark.parametrize(
    ("recompute", "is_gated", "kept"), [("none", False, 2), ("none", True, 0), (1, True, 0), ("all", True, 0)]
)
def test_the_activated_gate_is_let_go_and_made_again_once(
    recompute: Any, is_gated: bool, kept: int, tiny_model: TinyModel
) -> None:
    model = drawn("lora", tiny_model("llama"))
    seen = watched(model)
    set_recompute(model.get_base_model(), recompute)
    if is_gated:
        set_gated(model.get_base_model())
    loss = loss_of(model)
    assert sum(each.kept() for each in seen) == kept
    loss.backward()
    assert [len(each.given) for each in seen] == [2, 2] if is_gated else [1, 1]
    assert sum(each.kept() for each in seen) == 0


@pytest.mark.parametrize("target", ["up_proj", "down_proj"])
def test_what_would_keep_more_than_it_lets_go_stays_the_librarys(target: str, tiny_model: TinyModel) -> None:
    """In the first layer, with one of these alone, gate and up would be kept for nothing."""
    lora = Lora(rank=4, alpha=8, targets=(target,))
    model = attach_lora(base_of(tiny_model("llama")), lora, dtype=FP32, seed=0)
    seen = watched(model)
    set_gated(model.get_base_model())
    loss_of(model).backward()
    assert [len(each.given) for each in seen] == [1, 2]


def test_nothing_is_packed_where_no_gradient_is_wanted(tiny_model: TinyModel) -> None:
    model = drawn("lora", tiny_model("llama"))
    with torch.no_grad():
        usual = loss_of(model)
        set_gated(model.get_base_model())
        assert torch.equal(loss_of(model), usual)


def test_where_parts_are_computed_in_pieces_these_come_first(tiny_model: TinyModel) -> None:
    base = base_of(tiny_model("llama"))
    set_gated(base)
    set_tiles(base, 2)
    set_gated(base)
    forwards = [vars(module).get("forward") for module in base.modules()]
    assert any(isinstance(each, Tiled) for each in forwards)
    assert not any(isinstance(each, Gated) for each in forwards)


@pytest.mark.parametrize(("field", "value"), [("model_type", "olmo2"), ("hidden_act", "relu")])
def test_an_architecture_that_is_not_known_keeps_the_librarys(
    field: str, value: str, tiny_model: TinyModel
) -> None:
    """ReLU keeps what it gives, which would have to be there beside what it is made of."""
    base: Any = base_of(tiny_model("llama"))
    setattr(base.config, field, value)
    set_gated(base)
    assert not any("forward" in vars(module) for module in base.modules())
