"""The adapter methods by name, and what is known of each without any tensor.

Recipe, plan and adapters read this one table; `adapters/method.py` has the code behind each name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Method = Literal["lora", "rslora", "dora", "pissa", "ia3", "houlsby", "pfeiffer", "parallel"]
Activation = Literal["relu", "gelu", "silu", "tanh"]
SCALED_INPUTS = ("down_proj",)
"""Where IA3 scales a layer's inputs, as its paper does in the feed-forward part; elsewhere its outputs."""


@dataclass(frozen=True)
class MethodFacts:
    """What a method is.

    Attributes:
        title: Its name in writing.
        source: Where it was published.
        unused: Fields of the recipe's adapter section that mean nothing to it.
        has_rank: Whether `adapter.rank` is the rank of an update.
        is_near_one: Whether it trains factors of about one, of which bf16 knows every 128th: they are fp32
            unless the recipe says otherwise.
        usual_activation: Of a bottleneck adapter, which stands beside a layer's parts and whose width
            `adapter.rank` is; None for methods that adapt linear layers.
    """

    title: str
    source: str
    unused: tuple[str, ...] = ()
    has_rank: bool = True
    is_near_one: bool = False
    usual_activation: Activation | None = None


_BESIDE = ("targets",)
METHODS: Mapping[Method, MethodFacts] = {
    "lora": MethodFacts("LoRA", "arXiv:2106.09685"),
    "rslora": MethodFacts("rsLoRA", "arXiv:2312.03732"),
    "dora": MethodFacts("DoRA", "arXiv:2402.09353", unused=("dropout",), is_near_one=True),
    "pissa": MethodFacts("PiSSA", "arXiv:2404.02948"),
    "ia3": MethodFacts(
        "IA3", "arXiv:2205.05638", ("rank", "alpha", "dropout"), has_rank=False, is_near_one=True
    ),
    "houlsby": MethodFacts("Houlsby adapters", "arXiv:1902.00751", _BESIDE, usual_activation="silu"),
    "pfeiffer": MethodFacts("Pfeiffer adapters", "arXiv:2005.00247", _BESIDE, usual_activation="relu"),
    "parallel": MethodFacts("parallel adapters", "arXiv:2110.04366", _BESIDE, usual_activation="relu"),
}


def activation_of(method: Method) -> Activation:
    """The nonlinearity of a method, which only bottleneck adapters have."""
    return METHODS[method].usual_activation or "relu"


def said(method: Method, rank: int) -> str:
    """A method in words, with its rank if it has one."""
    facts = METHODS[method]
    size = "rank" if facts.usual_activation is None else "width"
    return f"{facts.title}, {size} {rank}" if facts.has_rank else facts.title
