"""The adapter methods by name, and what is known of each without any tensor.

Recipe, plan and adapters read this one table; `adapters/method.py` has the code behind each name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from qadapt.errors import BadRecipe

Method = Literal[
    "lora", "rslora", "loraplus", "dora", "pissa", "loftq", "adalora", "vera", "oft", "ia3", "houlsby",
    "pfeiffer", "parallel", "compacter", "compacterplus", "fusion", "prompt", "ptuning",
    "prefix", "prefix-flat",
]  # fmt: skip
Activation = Literal["relu", "gelu", "silu", "tanh"]
Nonlinearity = Literal[
    "auto", "relu", "gelu", "silu", "tanh",
    "layernorm-relu", "layernorm-gelu", "layernorm-silu", "layernorm-tanh",
]  # fmt: skip
"""Of a bottleneck adapter, with a layer norm on what enters or without; auto: its method's, without."""
Sees = Literal["output", "sum", "stream"]
"""What enters a bottleneck adapter: what its part adds, that and the stream it is added to, or the stream."""
NEUMANN_TERMS = 5
"""Of the series that makes OFT's rotations."""
SCALED_INPUTS = ("down_proj",)
"""Where IA3 scales a layer's inputs, as its paper does in the feed-forward part; elsewhere its outputs."""
ENCODER_WIDTH = 512
"""Of the network that makes a prefix or the vectors of P-tuning while they are trained. P-tuning's authors
take the width of the model, on a 7B 34 million values for a few vectors; prefix tuning's take this."""
_NORMED = "layernorm-"
_FROM_LAYER = re.compile(r"layers\.(\d{1,4})-")
ON = "on:"
"""Begins a target that names the trained adapter on which a bottleneck adapter stands."""
SUMMANDS = 4
"""Kronecker products in a projection of Compacter, as many as in its paper; they divide its widths."""


@dataclass(frozen=True)
class MethodFacts:
    """What a method is.

    Attributes:
        title: Its name in writing.
        source: Where it was published.
        idle: Fields of the recipe's adapter section that mean nothing to it, besides a bottleneck's own.
        size: What `adapter.rank` is, in a word; empty if it means nothing to it.
        is_beside: Whether it adapts no linear layers: it stands beside a layer's parts, or before the text.
        has_new_tokens: Whether rows of new tokens are trained with it.
        has_virtual_tokens: Whether `adapter.rank` virtual tokens stand in front of every row.
        is_near_one: Whether it trains factors of about one, of which bf16 knows every 128th: they are fp32
            unless the recipe says otherwise.
        mends_base: Whether it starts from what quantizing took from the base, which must be quantized.
        starts_wider: Whether it starts with half as many ranks again, and gives the least important ones up.
        attends: Whether it attends over trained adapters, which `adapter.targets` names.
        usual_activation: The nonlinearity of a bottleneck adapter; None for all others.
        sees: What enters a bottleneck adapter.
        after_attention: Whether a layer has a bottleneck adapter after its attention, too.
        is_hypercomplex: Whether its projections are sums of `SUMMANDS` Kronecker products.
    """

    title: str
    source: str
    idle: tuple[str, ...] = ()
    size: Literal["rank", "width", "tokens", "length", "block", ""] = "rank"
    is_beside: bool = False
    has_new_tokens: bool = False
    has_virtual_tokens: bool = False
    is_near_one: bool = False
    mends_base: bool = False
    starts_wider: bool = False
    attends: bool = False
    usual_activation: Activation | None = None
    sees: Sees = "output"
    after_attention: bool = False
    is_hypercomplex: bool = False

    @property
    def unused(self) -> tuple[str, ...]:
        """All fields of the recipe's adapter section that mean nothing to it."""
        return self.idle if self.usual_activation is not None else (*self.idle, "nonlinearity")

    @property
    def has_rank(self) -> bool:
        """Whether `adapter.rank` means anything to it."""
        return bool(self.size)

    @property
    def size_step(self) -> int:
        """What `adapter.rank` is a multiple of."""
        return SUMMANDS if self.is_hypercomplex else 1


def _lora(
    title: str,
    source: str,
    idle: tuple[str, ...] = (),
    *,
    is_near_one: bool = False,
    mends_base: bool = False,
) -> MethodFacts:
    return MethodFacts(
        title, source, idle, has_new_tokens=True, is_near_one=is_near_one, mends_base=mends_base
    )


def _bottleneck(
    title: str,
    source: str,
    activation: Activation,
    sees: Sees,
    *,
    after_attention: bool = False,
    is_hypercomplex: bool = False,
) -> MethodFacts:
    return MethodFacts(
        title,
        source,
        size="width",
        is_beside=True,
        usual_activation=activation,
        sees=sees,
        after_attention=after_attention,
        is_hypercomplex=is_hypercomplex,
    )


def _compacter(title: str, sees: Sees, *, after_attention: bool = False) -> MethodFacts:
    both = {"after_attention": after_attention, "is_hypercomplex": True}
    return _bottleneck(title, "arXiv:2106.04647", "gelu", sees, **both)


def _prompt(title: str, source: str) -> MethodFacts:
    idle = ("alpha", "dropout", "targets")
    return MethodFacts(title, source, idle, size="tokens", is_beside=True, has_virtual_tokens=True)


def _prefix(title: str) -> MethodFacts:
    idle = ("alpha", "dropout", "targets")
    return MethodFacts(title, "arXiv:2101.00190", idle, size="length", is_beside=True)


METHODS: Mapping[Method, MethodFacts] = {
    "lora": _lora("LoRA", "arXiv:2106.09685"),
    "rslora": _lora("rsLoRA", "arXiv:2312.03732"),
    "loraplus": _lora("LoRA+", "arXiv:2402.12354"),
    "dora": _lora("DoRA", "arXiv:2402.09353", ("dropout",), is_near_one=True),
    "pissa": _lora("PiSSA", "arXiv:2404.02948"),
    "loftq": _lora("LoftQ", "arXiv:2310.08659", mends_base=True),
    "adalora": MethodFacts("AdaLoRA", "arXiv:2303.10512", starts_wider=True),
    "vera": MethodFacts("VeRA", "arXiv:2310.11454", ("alpha", "dropout")),
    "oft": MethodFacts("OFT", "arXiv:2306.07280", ("alpha", "dropout"), size="block"),
    "ia3": MethodFacts("IA3", "arXiv:2205.05638", ("rank", "alpha", "dropout"), size="", is_near_one=True),
    "houlsby": _bottleneck("Houlsby adapters", "arXiv:1902.00751", "silu", "output", after_attention=True),
    "pfeiffer": _bottleneck("Pfeiffer adapters", "arXiv:2005.00247", "relu", "sum"),
    "parallel": _bottleneck("parallel adapters", "arXiv:2110.04366", "relu", "stream"),
    "compacter": _compacter("Compacter", "output", after_attention=True),
    "compacterplus": _compacter("Compacter++", "sum"),
    "fusion": MethodFacts(
        "AdapterFusion",
        "arXiv:2005.00247",
        ("rank", "alpha", "dropout"),
        size="",
        is_beside=True,
        attends=True,
    ),
    "prompt": _prompt("prompt tuning", "arXiv:2104.08691"),
    "ptuning": _prompt("P-tuning", "arXiv:2103.10385"),
    "prefix": _prefix("prefix tuning"),
    "prefix-flat": _prefix("flat prefix tuning"),
}


@dataclass(frozen=True)
class Fused:
    """A trained adapter that others are attended over with, or that one stands on: what memory depends on.

    Attributes:
        name: Of the run or of the store that it comes from.
        method: Its own.
        width: Of its bottleneck.
        activation: Its nonlinearity.
        norm: Whether a layer norm comes first.
        first_layer: The lowest layer that has it.
    """

    name: str
    method: Method
    width: int
    activation: Activation
    norm: bool = False
    first_layer: int = 0


def check_targets(method: Method, targets: str | Sequence[str]) -> None:
    """Refuses targets that are no two adapters, of a method that attends over adapters.

    Raises:
        BadRecipe: They name fewer, or one twice.
    """
    if not METHODS[method].attends:
        return
    names = (targets,) if isinstance(targets, str) else targets
    twice = [name for name in names if [*names].count(name) > 1]
    if len(names) < 2 or twice:
        problem = f"{twice[0]} is named twice" if twice else "attention needs two adapters or more"
        raise BadRecipe(
            f"adapter.targets = {', '.join(names)}: {problem}.",
            cure="Give the names of two or more runs, adapters of the store or folders, such as "
            "[pfeiffer, compacterplus].",
        )


def check_fused(adapters: Sequence[Fused]) -> None:
    """Refuses adapters that no one attention can be over: of one name, or at different places.

    Raises:
        BadRecipe: Says which, and where they are.
    """
    names = [each.name for each in adapters]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise BadRecipe(
            f"adapter.targets: two adapters are called {twice[0]}, and their weights are told by name.",
            cure="Keep one of them in the store under another name: `qadapt adapters add FOLDER --as NAME`.",
        )
    first = adapters[0]
    for other in adapters[1:]:
        if _place(first) != _place(other):
            raise BadRecipe(
                f"adapter.targets: {first.name} ({METHODS[first.method].title}) is {_said_place(first)}, "
                f"{other.name} ({METHODS[other.method].title}) {_said_place(other)}; attention is over "
                "adapters at the same places.",
                cure="Give adapters of one method, or pfeiffer with compacterplus, houlsby with compacter; "
                "and of the same layers.",
            )


def _place(fused: Fused) -> tuple[object, ...]:
    facts = METHODS[fused.method]
    return facts.sees, facts.after_attention, fused.first_layer


def _said_place(fused: Fused) -> str:
    facts = METHODS[fused.method]
    where = {
        "output": "after the feed-forward part",
        "sum": "after the feed-forward part, of the sum",
        "stream": "beside the feed-forward part",
    }[facts.sees]
    both = " and after attention" if facts.after_attention else ""
    return f"{where}{both}, from layer {fused.first_layer} on"


def check_base(method: Method, quantization: str) -> None:
    """Refuses a base that a method cannot start on.

    Raises:
        BadRecipe: It starts from what quantizing took from the base, and nothing did.
    """
    if METHODS[method].mends_base and quantization == "none":
        raise BadRecipe(
            f"adapter.method = {method}: {METHODS[method].title} starts from what quantizing took from the "
            "base; with model.quantization = none there is nothing.",
            cure="Set model.quantization=nf4, or adapter.method=lora or pissa.",
        )


def check_block(block: int, inputs: Mapping[str, int]) -> None:
    """Refuses blocks that the inputs of layers are no whole number of.

    Args:
        block: The width of OFT's blocks.
        inputs: Name of a layer → the width of its inputs.

    Raises:
        BadRecipe: They are not, or a block has no angle.
    """
    uneven = [name for name, width in inputs.items() if width % block]
    if not uneven and block > 1:
        return
    whole = math.gcd(*inputs.values())
    fitting = [str(size) for size in range(2, min(whole, 128) + 1) if whole % size == 0]
    problem = "a block of one has nothing to turn"
    if uneven:
        problem = f"the inputs of {uneven[0]}, {inputs[uneven[0]]:,}, are no whole number of such blocks"
    raise BadRecipe(
        f"adapter.rank is {block}, the width of OFT's blocks: {problem}.",
        cure=f"Set adapter.rank to one of {', '.join(fitting)}.",
    )


def check_step(method: Method, size: int, *, width: int) -> None:
    """Refuses a width of an adapter, or of its model, that a method cannot have.

    Raises:
        BadRecipe: It is no multiple of what the method divides it by.
    """
    facts = METHODS[method]
    if size % facts.size_step:
        raise BadRecipe(
            f"adapter.rank is {size}; of {facts.title} it is a multiple of {facts.size_step}.",
            cure=f"Set adapter.rank={max(1, size // facts.size_step) * facts.size_step}.",
        )
    if width % facts.size_step:
        raise BadRecipe(
            f"{facts.title} cannot divide the width of this model, {width}, by {facts.size_step}.",
            cure="Set adapter.method=houlsby or pfeiffer.",
        )


def dropped_layers(method: Method, targets: str | Sequence[str]) -> int:
    """How many of the lowest layers have no bottleneck adapter: of `layers.12-` twelve, else none.

    AdapterDrop, arXiv:2010.11918: they cost less than they win, above all where nothing goes back to them.

    Raises:
        BadRecipe: The targets of a bottleneck method say something else.
    """
    if METHODS[method].usual_activation is None or targets == "all-linear":
        return 0
    layers = [target for target in targets if not target.startswith(ON)]
    if not layers:
        return 0
    if len(layers) == 1 and (found := _FROM_LAYER.fullmatch(layers[0])):
        return int(found[1])
    raise BadRecipe(
        f"adapter.targets = {', '.join(layers)}: {METHODS[method].title} stand beside whole layers.",
        cure="Leave adapter.targets out, or give [layers.12-] for layers from 12 on, counted from 0, or "
        f"[{ON}language] to stand on the trained adapter `language`.",
    )


def check_dropped(dropped: int, layers: int) -> None:
    """Refuses to leave out every layer of a model.

    Raises:
        BadRecipe: It has no more layers.
    """
    if dropped >= layers:
        raise BadRecipe(
            f"adapter.targets = layers.{dropped}-: the model has {layers} layers, 0 to {layers - 1}.",
            cure=f"Give at most layers.{layers - 1}-.",
        )


def activation_of(method: Method, nonlinearity: Nonlinearity = "auto") -> Activation:
    """The function of a method with a nonlinearity, which only bottleneck adapters have."""
    usual = METHODS[method].usual_activation or "relu"
    return usual if nonlinearity == "auto" else cast(Activation, nonlinearity.removeprefix(_NORMED))


def has_norm(nonlinearity: Nonlinearity) -> bool:
    """Whether a layer norm is on what enters a bottleneck adapter with this nonlinearity."""
    return nonlinearity.startswith(_NORMED)


def nonlinearity_name(activation: object, *, norm: bool) -> str:
    """What a recipe calls a function with a layer norm on what enters, or without; empty if it knows none."""
    if activation not in get_args(Activation):
        return ""
    return f"{_NORMED}{activation}" if norm else f"{activation}"


def virtual_tokens(method: Method, rank: int) -> int:
    """How many virtual tokens stand in front of every row."""
    return rank if METHODS[method].has_virtual_tokens else 0


def front_ids(count: int) -> list[int]:
    """The ids of so many virtual tokens, which no tokenizer has: -1, -2, ..."""
    return [-1 - place for place in range(count)]


def said(method: Method, rank: int, *, on: str = "") -> str:
    """A method in words, with its size if it has one, and with what its adapter stands on."""
    facts = METHODS[method]
    if facts.has_virtual_tokens:
        return f"{facts.title}, {rank} virtual tokens"
    sized = f"{facts.title}, {facts.size} {rank}" if facts.size else facts.title
    return f"{sized}, on {on}" if on else sized
