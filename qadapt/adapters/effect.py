"""What a trained adapter does at one module of a base, not attached to it: hooks, and the tensors they use.

A method whose whole work is hooks on modules of its base can stand beside others on one base (`swap.py`), and
each row of a batch can have another one: hooks get the rows that are theirs. Knows no method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Arguments = tuple[Any, ...]
Named = dict[str, Any]
Before = Callable[[nn.Module, Arguments], Arguments | None]
"""As torch's forward pre-hook: module and arguments → others, or None where it only looks at them. It may be
asked twice for the same rows, the second time just before the hook after."""
After = Callable[[nn.Module, Arguments, Any], Any]
"""As torch's forward hook: module, arguments and output → another output."""
Enter = Callable[[nn.Module, Arguments, Named], tuple[Arguments, Named] | None]
"""As a forward pre-hook that is given named arguments, too."""
Leave = Callable[[nn.Module, Arguments, Named, Any], Any]
"""As a forward hook that is given named arguments, too."""
Kind = Literal["sum", "factor", "sequence", "alone"]
"""How effects on one module come together: `sum` and `factor`: in any order; `sequence`: one on the other's
result, in the order of their stack; `alone`: with no other. Those of different kinds never do."""


@dataclass(frozen=True)
class Effect:
    """What an adapter does at one module.

    Attributes:
        module: Of the base.
        kind: What it can be stacked with.
        part: Owns the tensors, which are frozen; several effects may share it.
        before: Hook before the module.
        after: Hook after it.
        enter: Hook before it where all rows have the adapter, and only there.
        leave: Hook after it there.
    """

    module: nn.Module
    kind: Kind
    part: nn.Module
    before: Before | None = None
    after: After | None = None
    enter: Enter | None = None
    leave: Leave | None = None


def connect(effect: Effect) -> None:
    """Lets a module have an effect from now on: what attaches an adapter."""
    if effect.before is not None:
        effect.module.register_forward_pre_hook(effect.before)
    if effect.after is not None:
        effect.module.register_forward_hook(effect.after)
    if effect.enter is not None:
        effect.module.register_forward_pre_hook(effect.enter, with_kwargs=True)
    if effect.leave is not None:
        effect.module.register_forward_hook(effect.leave, with_kwargs=True)
