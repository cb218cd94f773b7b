"""`Setting`: everything about a training step that its memory and time depend on, except the model's shape.

It knows no recipe (`recipe_setting.py` turns one into it) and no card. Legend: D width, R rank.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Literal, Protocol

from qadapt.errors import BadRecipe
from qadapt.methods import (
    METHODS,
    Fused,
    Method,
    Nonlinearity,
    check_base,
    check_block,
    check_dropped,
    check_step,
    dropped_layers,
    virtual_tokens,
)
from qadapt.plan.ranks import check_start
from qadapt.shape import Linear, ModelShape, Part
from qadapt.stacking import BOTTLENECKS

VALUE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of one value of each type."""

MOST_ROWS = 4096
"""In one forward pass: far above what any card holds, and few enough to try them all."""

ALLOCATION_BYTES = {"cuda": 512, "cpu": 1}
"""What a tensor's size is rounded up to: the CUDA caching allocator's kMinBlockSize; nothing on a CPU."""


LOSS_CHUNK = 256
"""Learned tokens at the head at once: enough that a card computes longer than it reads the head's weights
(cards do 70 to 300 operations per byte), and few: 188 MiB of logits with a vocabulary of 128 k tokens."""

Recompute = Literal["all", "none"] | int
"""Which layers recompute their activations in the backward pass: all, none, or so many of the first."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A training step: `rows` rows of `length` tokens through a base with an adapter.

    `recompute` as a number says that so many of the *first* layers recompute, from 1 to one less than there
    are. The last ones keep their activations: they go backward first, so what they keep is gone by the time
    the first recomputed layer is rebuilt. The other way round, all of it would still lie there at that moment
    (`tests/test_estimate.py` measures both).

    `supervised_share` is the share of the tokens that reach the head, `accumulates` says that earlier
    micro-batches have left gradients behind. `new_tokens` is the number of tokens whose rows of embedding and
    head are trained; the shape's vocabulary includes them.

    `loss_chunk` is how many learned tokens are at the head at once, 0 for all of them; `mlp_tiles` in how
    many pieces along the sequence a feed-forward part is computed; `offload` what stays on the host, on CUDA;
    on a CPU only boundaries go elsewhere, to a file.

    `fused` are the trained adapters that are attended over, or the one that the trained one stands on.

    `packed` says that rows lie one after another, each a document that sees itself alone, in one row of at
    most `rows` times `length` tokens; `documents` is the most of them there are, 0 for `rows` of full length;
    `step_tokens` the tokens of all rows of the fullest optimizer step, as no micro-batch holds more, 0 where
    nobody has looked at the rows; `one_by_one` that documents are attended to one after another even where a
    card has a kernel for all at once, because this one, or this torch, cannot use it.
    """

    rows: int = 1
    length: int = 2048
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    double_quant: bool = True
    method: Method = "lora"
    rank: int = 16
    dropout: float = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    nonlinearity: Nonlinearity = "auto"
    fused: tuple[Fused, ...] = ()
    adapter_dtype: Literal["bf16", "fp32"] = "bf16"
    compute_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw-8bit"
    supervised_share: float = 1.0
    recompute: Recompute = "all"
    loss_chunk: int = LOSS_CHUNK
    mlp_tiles: int = 1
    offload: tuple[Part, ...] = ()
    accumulates: bool = True
    packed: bool = False
    documents: int = 0
    step_tokens: int = 0
    one_by_one: bool = False
    new_tokens: int = 0
    device: Literal["cpu", "cuda"] = "cuda"

    @property
    def tokens(self) -> int:
        """Tokens in one forward pass."""
        full = self.rows * self.length
        return min(full, self.step_tokens) if self.packed and self.step_tokens else full

    @property
    def supervised_tokens(self) -> int:
        """Tokens that reach the head."""
        return math.ceil(self.tokens * self.supervised_share)

    @property
    def virtual_tokens(self) -> int:
        """How many virtual tokens each row or packed document begins with; `length` counts them."""
        return virtual_tokens(self.method, self.rank)

    @property
    def dropped_layers(self) -> int:
        """How many of the lowest layers have no bottleneck adapter, so that nothing goes back to them."""
        if self.fused and METHODS[self.method].attends:
            return self.fused[0].first_layer
        return dropped_layers(self.method, self.targets)

    @property
    def below(self) -> Fused | None:
        """The frozen adapter on which the trained one stands, if it stands on one."""
        return self.fused[0] if self.fused and self.method in BOTTLENECKS else None

    @property
    def trains_embeddings(self) -> bool:
        """Whether gradients go back to what the first layer is given."""
        return self.new_tokens > 0 or self.virtual_tokens > 0

    @property
    def compute_bytes(self) -> int:
        """Bytes of one activation value."""
        return VALUE_BYTES[self.compute_dtype]

    @property
    def adapter_value_bytes(self) -> int:
        """Bytes of one adapter value."""
        return VALUE_BYTES[self.adapter_dtype]

    def recomputed_layers(self, layers: int) -> int:
        """How many of a model's layers recompute."""
        if isinstance(self.recompute, int):
            return self.recompute
        return layers if self.recompute == "all" else 0

    def adapts(self, linear: Linear) -> bool:
        """Whether a linear layer carries an adapter."""
        if METHODS[self.method].is_beside:
            return False
        return self.targets == "all-linear" or linear.name in self.targets

    def tensor_bytes(self, count: int, value_bytes: float) -> int:
        """Bytes that a tensor of `count` values takes on this device, the allocator's rounding included."""
        step = ALLOCATION_BYTES[self.device]
        return math.ceil(math.ceil(count * value_bytes) / step) * step


class Outline(Protocol):
    """What must be known of a model to check the numbers of a setting."""

    @property
    def name(self) -> str:
        """The model's name."""
        ...

    @property
    def layers(self) -> int:
        """Its decoder layers."""
        ...

    @property
    def context(self) -> int:
        """Its longest row."""
        ...


def check_setting(shape: ModelShape, setting: Setting) -> None:
    """Refuses a setting that describes no step of this model.

    Raises:
        BadRecipe: A length, a number of rows, a rank or a target is out of range; says which and why.
    """
    check_numbers(shape, setting)
    _check_targets(shape, setting)
    if shape.tied and ("embeddings" in setting.offload) != ("head" in setting.offload):
        raise BadRecipe(
            f"memory.offload: the head of {shape.name} is tied to the embeddings: one table.",
            cure="Name both embeddings and head in memory.offload, or neither.",
        )


def check_numbers(shape: Outline, setting: Setting) -> None:
    """Refuses numbers that describe no step of a model, its linear layers not looked at.

    Raises:
        BadRecipe: A length, a number of rows, a rank or a share is out of range; says which and why.
    """
    if setting.rows < 1:
        raise BadRecipe(f"rows = {setting.rows}: a step needs at least one row.", cure="Give 1 or more.")
    if setting.rows > MOST_ROWS:
        raise BadRecipe(
            f"rows = {setting.rows:,}: one forward pass takes at most {MOST_ROWS:,} here.",
            cure="Give fewer rows at a time; a step may have more, in micro-batches.",
        )
    if setting.length < 1:
        raise BadRecipe(
            f"length = {setting.length}: a row needs at least one token.", cure="Give a length such as 2048."
        )
    if setting.length > shape.context:
        raise BadRecipe(
            f"length = {setting.length:,} is above the context of {shape.name}, {shape.context:,} tokens.",
            cure=f"Give a length of at most {shape.context}.",
        )
    if setting.rank < 1:
        raise BadRecipe(
            f"rank = {setting.rank}: an adapter needs at least rank 1.", cure="Give a rank such as 16."
        )
    if setting.virtual_tokens >= setting.length:
        raise BadRecipe(
            f"rank = {setting.rank}: so many virtual tokens leave nothing of a row of {setting.length:,}, "
            "which counts them.",
            cure=f"Give a rank of less than {setting.length}, such as 20, or a larger length.",
        )
    if not 0 <= setting.supervised_share <= 1:
        raise BadRecipe(
            f"supervised share = {setting.supervised_share}: a share lies between 0 and 1.",
            cure="Give the share of tokens that the loss counts, such as 0.4.",
        )
    check_base(setting.method, setting.quantization)
    check_recompute(shape, setting.recompute)
    _check_offload(setting)


def check_recompute(shape: Outline, recompute: Recompute) -> None:
    """Refuses a number of layers that this model cannot recompute.

    Raises:
        BadRecipe: It has fewer layers, or the number is below 1.
    """
    if recompute in ("all", "none"):
        return
    if not isinstance(recompute, int) or not 1 <= recompute < shape.layers:
        numbers = f", or how many of the first layers: 1 to {shape.layers - 1}" if shape.layers > 1 else ""
        raise BadRecipe(
            f"recompute = {recompute}: {shape.name} has {shape.layers} layers.",
            cure=f"Give all, none{numbers}.",
        )


def _check_offload(setting: Setting) -> None:
    beside = [part for part in setting.offload if part != "boundaries"]
    if beside and setting.device == "cpu":
        raise BadRecipe(
            f"memory.offload = {beside}: a CPU's step lies on the host as it is.",
            cure="Leave them out of memory.offload; only boundaries can go elsewhere, to a file.",
        )
    if "head" in setting.offload and setting.new_tokens:
        raise BadRecipe(
            "memory.offload: head, with new tokens, whose rows of the head are trained on the card.",
            cure="Leave head out of memory.offload.",
        )
    if "boundaries" in setting.offload and setting.recompute == "none":
        raise BadRecipe(
            "memory.offload: boundaries, with recompute = none: they are inputs of recomputed layers.",
            cure="Set memory.recompute=all, or leave boundaries out of memory.offload.",
        )
    if "layers" not in setting.offload:
        return
    if setting.recompute != "all":
        raise BadRecipe(
            f"memory.offload: layers, with recompute = {setting.recompute}: streamed layers come back in the "
            "backward pass only to be recomputed.",
            cure="Set memory.recompute=all, or leave layers out of memory.offload.",
        )
    if setting.quantization == "int8":
        raise BadRecipe(
            "memory.offload: layers in 8 bits cannot be streamed.",
            cure="Set model.quantization=nf4, or leave layers out of memory.offload.",
        )


def _check_targets(shape: ModelShape, setting: Setting) -> None:
    names = [linear.name for linear in shape.linears]
    facts = METHODS[setting.method]
    check_dropped(setting.dropped_layers, shape.layers)
    for target in () if setting.targets == "all-linear" or facts.is_beside else setting.targets:
        if target not in names:
            close = difflib.get_close_matches(target, names, n=1, cutoff=0.5)
            hint = f"Did you mean `{close[0]}`? " if close else ""
            raise BadRecipe(
                f"adapter target {target!r} is no linear layer of {shape.name}.",
                cure=f"{hint}It has: {', '.join(names)}.",
            )
    if facts.usual_activation is not None and setting.rank >= shape.width:
        raise BadRecipe(
            f"rank = {setting.rank}: a bottleneck is narrower than {shape.name}, {shape.width} wide.",
            cure=f"Give a rank below {shape.width}; {max(1, shape.width // 16)}, a reduction factor of 16, "
            "is usual.",
        )
    if setting.method == "oft":
        check_block(setting.rank, {each.name: each.inputs for each in shape.linears if setting.adapts(each)})
    check_step(setting.method, setting.rank, width=shape.width)
    if facts.is_beside or facts.size != "rank" or setting.method == "vera":  # whose projections may be wider
        return
    narrowest = min(min(linear.inputs, linear.outputs) for linear in shape.linears if setting.adapts(linear))
    if setting.rank > narrowest:
        raise BadRecipe(
            f"rank = {setting.rank} is above {narrowest}, the narrowest adapted layer of {shape.name}.",
            cure=f"Give a rank of at most {narrowest}; 8 to 64 is usual.",
        )
    check_start(setting.method, setting.rank, narrowest=narrowest)


def auto_dtypes(
    device: Literal["cpu", "cuda"], *, has_bf16: bool
) -> tuple[Literal["bf16", "fp16", "fp32"], Literal["bf16", "fp32"]]:
    """Compute type and adapter type where the recipe leaves both to the plan.

    CUDA: bf16 when the card has it, else fp16 with fp32 adapters (gradients are scaled). CPU: fp32, which is
    about twice as fast as bf16 without AMX (measured; a run measures it anew).
    """
    if device == "cpu":
        return "fp32", "fp32"
    return ("bf16", "bf16") if has_bf16 else ("fp16", "fp32")
