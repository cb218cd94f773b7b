"""Tells a ledger where a step stands: phase and module, by hooks on the model and its optimizer alone.

    forward      the forward pass up to the end of the decoder
    loss         from there on: logits, cross-entropy, and back to the gradient of the decoder's output
    backward     the rest of the backward pass, clipping
    recompute    within it: a layer's forward pass run again
    update       the optimizer's step, until the next forward pass
    evaluation, evaluation loss    a forward pass in evaluation mode, and from its decoder's end on

It changes no number and no code of the step: hooks only look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from qadapt.engine.ledger import Ledger

LOSS_PHASES = {"forward": "loss", "evaluation": "evaluation loss"}
"""Phase up to the decoder's end → phase from there on."""


@contextmanager
def watched(ledger: Ledger, model: PreTrainedModel, *, optimizer: Optimizer) -> Iterator[None]:
    """While open, the ledger knows phase and module of every operation of the model's steps.

    Args:
        ledger: What is told.
        model: The causal language model, adapters attached.
        optimizer: Over its trained parameters.
    """
    hooks = _Hooks(ledger)
    with ExitStack() as stack:
        for handle in hooks.attach(model, optimizer):
            stack.callback(handle.remove)
        yield


class _Hooks:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def attach(self, model: PreTrainedModel, optimizer: Optimizer) -> Iterator[Any]:
        decoder = model.get_decoder()
        yield decoder.register_forward_pre_hook(self._begin_pass)
        yield decoder.register_forward_hook(self._begin_loss)
        layer_name = ""
        for name, module in model.named_modules():
            if isinstance(module, GradientCheckpointingLayer):
                layer_name = name
                yield module.register_forward_pre_hook(self._begin_layer(name), with_kwargs=True)
                yield module.register_forward_hook(self._end_layer(name))
            elif not list(module.children()):
                layer = layer_name if name.startswith(f"{layer_name}.") else ""
                yield module.register_forward_pre_hook(self._begin_module(name))
                yield module.register_forward_hook(self._end_module(layer), always_call=True)
        for parameter in model.parameters():
            if parameter.requires_grad:
                yield parameter.register_post_accumulate_grad_hook(self._gradient_came)
        yield optimizer.register_step_pre_hook(self._begin_update)

    def _begin_pass(self, module: nn.Module, _: Any) -> None:
        self._ledger.phase = "forward" if module.training else "evaluation"

    def _begin_loss(self, _: nn.Module, __: Any, output: BaseModelOutput) -> None:
        self._ledger.phase = LOSS_PHASES[self._ledger.phase]
        hidden = output.last_hidden_state
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(self._begin_backward)

    def _begin_backward(self, _: Tensor) -> None:
        self._ledger.phase = "backward"

    def _begin_update(self, *_: Any) -> None:
        self._ledger.phase = "update"
        self._ledger.module = ""

    def _begin_layer(self, name: str) -> Callable[..., None]:
        def begin(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._ledger.module = name
            if self._ledger.phase == "forward" and layer.gradient_checkpointing:
                hidden = arguments[0] if arguments else named["hidden_states"]
                self._ledger.tell_apart("recompute_boundaries", hidden)

        return begin

    def _end_layer(self, name: str) -> Callable[..., None]:
        def going_back(_: Tensor) -> None:
            self._ledger.module = name

        def end(layer: nn.Module, _: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(going_back)

        return end

    def _begin_module(self, name: str) -> Callable[..., None]:
        def begin(*_: Any) -> None:
            self._ledger.module = name
            if self._ledger.phase == "backward":
                self._ledger.phase = "recompute"

        return begin

    def _end_module(self, layer_name: str) -> Callable[..., None]:
        """At the end of a module, or where its recomputation stops early: all that is needed is there."""

        def end(*_: Any) -> None:
            self._ledger.module = layer_name
            if self._ledger.phase == "recompute":
                self._ledger.phase = "backward"

        return end

    def _gradient_came(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._ledger.tell_apart("gradients", parameter.grad)
