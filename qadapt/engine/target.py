"""Runs a step on `meta` as the device it is meant for would: its choice of kernels, and what they take.

On `meta` the framework decomposes fused attention into the T x T one and dropout into its CPU form, and it
cannot say what a value is. Here a function mode puts the target's own fused operation in their place, and a
dispatch mode answers what only values could tell (a mask is not packed, a norm is finite). Which kernel a
device would choose, and what it takes, is arithmetic from one sourced table, `plan/workspace.py`.

Legend: B rows, H query heads, K key-value heads, T tokens, D head width.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import bitsandbytes  # noqa: F401 (its operations are asked about)
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qadapt.engine.ledger import Inside
from qadapt.plan.attention import attention_kernel
from qadapt.plan.workspace import kernel_bytes

try:
    from torch.nn.attention.varlen import varlen_attn

    _NAMED = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:
    _NAMED = frozenset()
HAS_VARLEN = {"scale", "window_size"} <= _NAMED
"""Whether this torch has the kernel for many documents at once, with all that is asked; from 2.11 on."""
SAYS_GROUPS = "enable_gqa" in _NAMED
"""Whether it wants to be told of grouped queries; torch 2.11 hands them to the kernel without a question."""

aten = torch.ops.aten
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FP32 = 4
_ASKED = {
    torch.ops.bitsandbytes.gemm_4bit.default: "gemm_4bit",
    aten._scaled_dot_product_flash_attention.default: "_scaled_dot_product_flash_attention",
    aten._scaled_dot_product_flash_attention_backward.default: "_scaled_dot_product_flash_attention_backward",
    aten._scaled_dot_product_efficient_attention.default: "_scaled_dot_product_efficient_attention",
    aten._scaled_dot_product_efficient_attention_backward.default: (
        "_scaled_dot_product_efficient_attention_backward"
    ),
    aten._softmax_backward_data.default: "_softmax_backward_data",
}
"""Operations whose kernels are known to take more than their results, by the table's names."""
if HAS_VARLEN:
    _ASKED[torch.ops.torch_attn._varlen_attn_backward.default] = "_varlen_attn_backward"


@dataclass(frozen=True)
class Target:
    """The device that a dry run stands for: CUDA of a compute capability such as 8.6, or, if None, a CPU.

    `one_by_one` says that it cannot use the kernel for many documents at once.
    """

    capability: float | None = None
    one_by_one: bool = False


_MEANT: ContextVar[Target] = ContextVar("target")
"""What `meta` tensors stand for; a CPU, if nobody says."""


def capability_for(tensor: Tensor) -> float | None:
    """Compute capability of the device that a tensor is on, or, on `meta`, stands for; None for a CPU."""
    if tensor.is_meta:
        return _MEANT.get(Target()).capability
    if not tensor.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return major + minor / 10


def goes_one_by_one(tensor: Tensor) -> bool:
    """Whether what a tensor on `meta` stands for cannot use the kernel for many documents at once."""
    return tensor.is_meta and _MEANT.get(Target()).one_by_one


@contextmanager
def on_target(
    target: Target, *, is_packed: bool = False, expert_tokens: Sequence[int] = ()
) -> Iterator[None]:
    """While open, operations on `meta` tensors are the target's.

    Args:
        target: The device.
        is_packed: Whether rows hold several documents.
        expert_tokens: Tokens of each routed expert that gets any, where experts run one after another.
    """
    token = _MEANT.set(target)
    try:
        with _Values(is_packed=is_packed, expert_tokens=expert_tokens), target_functions(target):
            yield
    finally:
        _MEANT.reset(token)


def target_functions(target: Target) -> TorchFunctionMode:
    """The part of `on_target` that is off within `backward`, so that recomputation needs it anew."""
    return _Functions(target)


def kernels_of(target: Target) -> Inside:
    """What the target's kernels take inside operations, for a ledger; see `plan/workspace.py`."""

    def inside(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        name = _ASKED.get(func)
        if name is None:
            return 0
        if name == "gemm_4bit":
            return _dequantizing_bytes(args, copies=1 if target.capability is None else 2)
        if target.capability is None:
            return 0
        tensors = [each for each in args if isinstance(each, Tensor)]
        return kernel_bytes(
            name,
            [tensor.shape for tensor in tensors],
            value_bytes=tensors[0].itemsize,
            capability=target.capability,
        )

    return inside


def _dequantizing_bytes(args: tuple[Any, ...], *, copies: int) -> int:
    """The 4-bit product: the weight in the type of the inputs, and, of nested constants, fp32 copies.

    Source: `_gemm_4bit_default_impl` of bitsandbytes 0.50, and `_dequant_linear_fallback` for CUDA, which
    holds the constants before and after their offset is added. On CUDA small products may go without (a fused
    kernel, by shape and card); they are no step's peak.
    """
    inputs, _, (rows, columns) = args[:3]
    nested = args[7] if len(args) > 7 else None  # absmax_8bit: dispatch hands all arguments over by place
    constants = 0 if nested is None else copies * FP32 * nested.numel()
    return int(rows * columns * inputs.itemsize + constants)


class _Values(TorchDispatchMode):
    """Answers what only values could tell.

    "All ..." holds unless rows are packed, any other condition does not; a number is one; what is not zero
    among experts and their tokens is as many as given.
    """

    def __init__(self, *, is_packed: bool, expert_tokens: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_packed = is_packed
        self._expert_tokens = expert_tokens
        self._waiting: list[int] = []
        self._all: weakref.ref[Tensor] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            if args[0].dtype != torch.bool:
                return 1
            is_all = self._all is not None and args[0] is self._all()
            return is_all and not self._is_packed
        if func is aten.nonzero.default and args[0].is_meta:
            return self._not_zero(args[0])
        result = func(*args, **(kwargs or {}))
        if func is aten.native_layer_norm.default and args[0].is_meta and capability_for(args[0]) is None:
            values, *statistics = result  # `layer_norm_kernel.cpp`: in the type of what enters
            return (values, *(each.to(values.dtype) for each in statistics))
        if func is aten.all.default:
            self._all = weakref.ref(result)
        return result

    def _not_zero(self, values: Tensor) -> Tensor:
        """The experts that get tokens (one dimension), then the tokens of each in turn (two)."""
        if values.ndim == 1:
            self._waiting = list(self._expert_tokens)
        count = len(self._waiting) if values.ndim == 1 else self._waiting.pop(0)
        return values.new_empty(count, values.ndim, dtype=torch.int64)


class _Functions(TorchFunctionMode):
    """Puts the target's fused operations where `meta` would decompose."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self._replacements: dict[Any, Callable[..., Any]] = {
            functional.scaled_dot_product_attention: self._attend
        }
        if target.capability is not None:
            self._replacements[functional.dropout] = _drop
            self._replacements[functional.softmax] = _normalize
        self._target = target

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement = self._replacements.get(func)
        if replacement is not None and args[0].is_meta:
            return replacement(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,  # (B, H, T, D)
        key: Tensor,  # (B, K, T, D)
        value: Tensor,  # (B, K, T, D)
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        target = self._target
        if target.capability is None:
            bias = _as_bias(attn_mask, query)
            results = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale
            )
            return cast(Tensor, results[0])
        kernel = attention_kernel(
            target.capability,
            TYPES[query.dtype],
            head_width=query.shape[-1],
            grouped=enable_gqa and query.shape[1] != key.shape[1],
            has_mask=attn_mask is not None,
        )
        if kernel == "flash":
            results = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )
            return cast(Tensor, results[0])
        if kernel == "efficient":
            bias = _as_bias(attn_mask, query)
            if bias is not None:
                bias = bias.expand(*query.shape[:3], key.shape[2])
            results = aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, True, dropout_p, is_causal, scale=scale
            )
            return cast(Tensor, results[0])
        return functional.scaled_dot_product_attention(  # `meta` decomposes it as CUDA's math path does
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _as_bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask as kernels take it: numbers to be added (`convert_boolean_attn_mask` in `attention.cpp`)."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.scalar_tensor(-torch.inf, dtype=query.dtype, device=query.device)
    return torch.where(mask, torch.scalar_tensor(0.0, dtype=query.dtype, device=query.device), lowest)


def _normalize(
    values: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """CUDA's softmax of fp16 values in fp32 is one kernel, without an fp32 copy of them."""
    if values.dtype == torch.float16 and dtype == torch.float32 and dim is not None:
        return torch._softmax(values, dim, True)
    return functional.softmax(values, dim, _stacklevel, dtype)


def _drop(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if p == 0 or not training:  # `Dropout.cpp`: no mask, no copy
        return values
    return torch.native_dropout(values, p, training)[0]
