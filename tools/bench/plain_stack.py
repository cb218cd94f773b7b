"""The plain transformers + PEFT step of published measurements, on `meta`: nothing of qadapt trains here.

A published peak can only score an estimator that runs the stack which was measured. This one is the step of
the measuring scripts, written down from them: loading, `prepare_model_for_kbit_training`, adapters, AdamW, a
forward pass, backward, update. Everything that decides gigabytes is an explicit input (`Stack`). The ledger
counts each operation; its trace, loading included, is for a replay through the caching allocator, since what
a card reports as allocated also has the rests that the allocator does not split off.

Sources: fitcheck-llm 0.3.1 `scripts/measure.py` (T4); fms-acceleration `scripts/benchmarks`, its plugins
`accelerated-peft` and `fused-ops-and-kernels` (A100). Real values are not known, and nothing depends on them.

Legend: B rows, T tokens, D width, V vocabulary, H query heads, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from plain_loss import Loss, loss_of
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qadapt.engine.ledger import Ledger
from qadapt.engine.recompute import set_recompute
from qadapt.engine.target import Target, kernels_of, on_target
from qadapt.model.skeleton import skeleton_base
from qadapt.plan.trace import TraceEvent
from qadapt.plan.workspace import blas_workspace_bytes

aten = torch.ops.aten
META = torch.device("meta")
ROUND = 512
"""Bytes: the caching allocator's smallest step."""
STEPS = 2
"""The second is measured: optimizer states exist, and what the first left in the cache."""

Order = Literal["names", "names, one behind", "modules"]
ORDERS: tuple[Order, ...] = ("names", "names, one behind", "modules")
"""How weights came to the card: by name (transformers 5); so, each source let go after the next was read; as
the model's modules stand."""

Attention = Literal["eager", "efficient", "flash"]
Upcast = Literal["none", "all", "norms"]


@dataclass(frozen=True)
class Stack:
    """What a published row was measured with.

    Attributes:
        rows: B.
        length: T.
        dtype: Type the weights were loaded in, in which 4-bit products run.
        quantization: "nf4" or "none".
        upcast: What `prepare_model_for_kbit_training` put into fp32 and nobody put back: "all" that is not in
            4 bits, or only the "norms" (TRL puts embeddings and head back into bf16).
        autocast: Products with fp32 inputs run in `dtype`.
        attention: The kernel: "eager" is none.
        loss: How it is made of the logits; see `plain_loss.py`.
    """

    rows: int
    length: int
    capability: float
    dtype: torch.dtype
    quantization: str
    rank: int
    targets: tuple[str, ...]
    attention: Attention
    double_quant: bool = False
    upcast: Upcast = "none"
    autocast: bool = False
    dropout: float = 0.0
    loss: Loss = "held"
    fused_norms: bool = False
    recomputes: bool = True


@dataclass
class Measured:
    """A dry run.

    Attributes:
        trace: Every allocation and release from loading on.
        others: The same with other orders of loading, which nobody has recorded.
        places: Index into the trace where the phases of the last step begin, and the "end".
        live_bytes: Highest live bytes of each phase of the last step, each tensor rounded up to 512.
    """

    trace: Sequence[TraceEvent] = ()
    others: Sequence[Sequence[TraceEvent]] = ()
    places: dict[str, int] = field(default_factory=dict)
    live_bytes: dict[str, int] = field(default_factory=dict)


def run(values: Mapping[str, Any], stack: Stack) -> Measured:
    """Loads a model and trains it for two steps on `meta`.

    Raises:
        QadaptError: The model cannot be built.
    """
    target = Target(stack.capability)
    ledger = Ledger(step=ROUND, inside=kernels_of(target), is_recording=True)
    measured = Measured(trace=ledger.trace)
    model = build(values, stack)
    with ExitStack() as modes:
        for mode in (on_target(target), _autocast(stack), Cuda(stack), ledger):
            modes.enter_context(mode)
        load(ledger, model, stack, order="names")
        loaded = len(ledger.trace)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)
        batch = torch.empty(stack.rows, stack.length, dtype=torch.long, device=META)
        for index in range(STEPS):
            _Step(ledger, measured, stack, is_first=index == 0).run(model, optimizer, batch)
    measured.places["end"] = len(ledger.trace)
    measured.others = [
        [*_loading(model, stack, order), *_without_releases_of(ledger.trace[:loaded], ledger.trace[loaded:])]
        for order in ORDERS[1:]
    ]
    return measured


def _loading(model: nn.Module, stack: Stack, order: Order) -> list[TraceEvent]:
    """What another order of loading takes and gives; its blocks have numbers of their own."""
    with Ledger(step=ROUND, is_recording=True) as ledger:
        load(ledger, model, stack, order=order)
    return [event._replace(key=-event.key) for event in ledger.trace]


def _without_releases_of(loading: Sequence[TraceEvent], rest: Sequence[TraceEvent]) -> list[TraceEvent]:
    """The rest without what it gives back of loading: biases, which bitsandbytes casts at their first use."""
    loaded = {event.key for event in loading}
    return [event for event in rest if event.key not in loaded]


class _Step:
    def __init__(self, ledger: Ledger, measured: Measured, stack: Stack, *, is_first: bool) -> None:
        self._ledger = ledger
        self._measured = measured
        self._stack = stack
        self._is_first = is_first

    def run(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with self._phase("forward"):
            loss, kept = loss_of(model, batch, self._stack.loss)
        with self._phase("backward"):
            loss.backward()
        with self._phase("update"):
            optimizer.step()
        del kept

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._measured.places[name] = len(self._ledger.trace)
        self._ledger.reset_peak()
        with self._ledger.during(name):
            if self._is_first and name != "update":  # each pass has its thread, each thread its cuBLAS
                self._ledger.keep("temporary", blas_workspace_bytes(self._stack.capability))
            yield
        self._measured.live_bytes[name] = self._ledger.peak.bytes


def build(values: Mapping[str, Any], stack: Stack) -> nn.Module:
    """The adapted model on `meta`, as the measuring script had it."""
    model = skeleton_base(
        values, quantization=stack.quantization, double_quant=stack.double_quant, dtype=stack.dtype
    )
    model.set_attn_implementation("eager" if stack.attention == "eager" else "sdpa")
    model.config.use_cache = False
    if stack.quantization == "nf4":
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    if stack.upcast != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if stack.upcast == "norms":
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.to(stack.dtype)
    if stack.fused_norms:
        _fuse_norms(model)
    if stack.recomputes:  # no mode lasts in a backward pass
        set_recompute(model, "all", within=lambda: Cuda(stack))
        model.enable_input_require_grads()
    lora = LoraConfig(
        r=stack.rank, lora_alpha=2 * stack.rank, lora_dropout=stack.dropout, bias="none",
        task_type="CAUSAL_LM", target_modules=list(stack.targets),
    )  # fmt: skip
    adapted = get_peft_model(model, lora, low_cpu_mem_usage=True)
    return adapted.train()


def load(ledger: Ledger, model: nn.Module, stack: Stack, *, order: Order) -> None:
    """Writes loading into the ledger as it went on the card: each tensor read, quantized, cast.

    4-bit models are loaded straight to the card, one tensor after the other in the order of their names,
    after a block as large as all of them was taken and given back to warm the cache (transformers'
    `caching_allocator_warmup`); others are moved there from the host.
    """
    adapters = {name: each for name, each in model.named_parameters() if "lora_" in name}
    frozen = {name: each for name, each in model.named_parameters() if name not in adapters}
    is_streamed = stack.quantization == "nf4"
    sources: dict[str, Tensor] = {}
    with ledger.during("load"):
        if is_streamed:
            torch.empty(sum(_stored_bytes(each) for each in frozen.values()), dtype=torch.uint8, device=META)
        behind = None
        for name in sorted(frozen, key=_natural) if is_streamed and order != "modules" else frozen:
            each = frozen[name]
            if isinstance(each, bitsandbytes.nn.Params4bit):
                source = torch.empty(each.quant_state.shape, dtype=stack.dtype, device=META)
                ledger.hold("base_weights", [each])
                ledger.hold("quantization_constants", _constants(each))
                behind = source if order == "names, one behind" else None
                del source
            elif each.dtype == stack.dtype:
                ledger.hold("unquantized", [each])
            else:
                sources[name] = torch.empty(each.shape, dtype=stack.dtype, device=META)
        del behind
        ledger.hold("unquantized", model.buffers())
        for name in [name for name in frozen if name in sources]:
            ledger.hold("unquantized", [frozen[name]])
            del sources[name]
        if not is_streamed and stack.dtype != torch.float32:  # made in the base's type, all cast afterwards
            for name, each in adapters.items():
                sources[name] = torch.empty(each.shape, dtype=stack.dtype, device=META)
        for name, each in adapters.items():
            ledger.hold("adapters", [each])
            sources.pop(name, None)


def _stored_bytes(parameter: Tensor) -> int:
    return parameter.numel() * (1 if parameter.dtype == torch.uint8 else 2)


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """The order in which `transformers` loads: by parts of the name, numbers as numbers."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


def _constants(parameter: bitsandbytes.nn.Params4bit) -> Iterator[Tensor]:
    state = parameter.quant_state
    yield from (state.absmax, state.code)
    if state.nested:
        yield from (state.offset, state.state2.absmax, state.state2.code)


def _fuse_norms(model: nn.Module) -> None:
    """Puts norms that keep their input, and go backward in place, where the stack had Triton's."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda hidden, weight=module.weight: FusedNorm.apply(hidden, weight)


class FusedNorm(torch.autograd.Function):
    """What a fused root-mean-square norm takes: its result, one number a token; nothing going backward."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(hidden, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@contextmanager
def _autocast(stack: Stack) -> Iterator[None]:
    """The flag that PEFT asks for. Tensors on `meta` have no autocast; `Cuda` casts for it."""
    if not stack.autocast:
        yield
        return
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


class Cuda(TorchFunctionMode):
    """What CUDA, autocast or the measuring script runs where `meta` would decompose."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self._stack = stack
        self._cast: dict[int, Tensor] = {}  # autocast keeps the casts of weights until its end

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **named)
        if func is functional.dropout:
            return _drop(*args, **named)
        if func is functional.linear and self._stack.autocast:
            return self._multiply(*args, **named)
        is_half = func is functional.softmax and args[0].dtype == torch.float16
        if is_half and named.get("dtype") == torch.float32:
            return torch._softmax(args[0], named["dim"], True)  # one kernel: no fp32 copy of the scores
        if func is Tensor.backward:
            self._cast.clear()
        return func(*args, **named)

    def _multiply(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.dtype != self._stack.dtype:
            if id(weight) not in self._cast:
                self._cast[id(weight)] = weight.to(self._stack.dtype)
            weight = self._cast[id(weight)]
        bias = None if bias is None else bias.to(self._stack.dtype)
        return functional.linear(inputs.to(self._stack.dtype), weight, bias)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
        causal, scale = bool(named.get("is_causal", False)), named.get("scale")
        if self._stack.attention == "flash":  # takes 16 bits only: transformers casts what is fp32
            query, key, value = (each.to(self._stack.dtype) for each in (query, key, value))
            return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[0]
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # the script expands them: this kernel refuses grouped queries
            key, value = (each.repeat_interleave(groups, dim=-3) for each in (key, value))
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )[0]


def _drop(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(values, p, training)[0] if p and training else values
