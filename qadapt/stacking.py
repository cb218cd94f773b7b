"""What stands on what: a new bottleneck adapter on a trained one, which `adapter.targets` names as `on:NAME`.

A task above a language (MAD-X, arXiv:2005.00052). Knows names and no files; `adapters/stack.py` has the code.
"""

from __future__ import annotations

from collections.abc import Sequence

from qadapt.errors import BadRecipe
from qadapt.methods import METHODS, ON, Method

BOTTLENECKS: tuple[Method, ...] = tuple(
    name for name, facts in METHODS.items() if facts.usual_activation is not None
)
"""The methods whose adapters stand on each other."""


def stands_on(targets: str | Sequence[str]) -> str:
    """The name of the trained adapter on which one with these targets stands; empty for the base alone."""
    return next((target.removeprefix(ON) for target in targets if target.startswith(ON)), "")


def built_on(method: Method, targets: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the trained adapters on which another one stands, or to which it attends."""
    if METHODS[method].attends:
        return tuple(targets)
    return (name,) if (name := stands_on(targets)) else ()


def check_on(method: Method, targets: str | Sequence[str]) -> None:
    """Refuses to let an adapter stand where it cannot.

    Raises:
        BadRecipe: Its method stands on the base alone, or it is to stand on two others, or on one without a
            name.
    """
    on = [target for target in targets if target.startswith(ON)]
    if on and method not in BOTTLENECKS:
        name = on[0].removeprefix(ON) or "NAME"
        raise BadRecipe(
            f"adapter.targets = {on[0]}: {METHODS[method].title} stands on no other adapter.",
            cure=f"Set adapter.method to one of {', '.join(BOTTLENECKS)}. Or, if {name} merges, "
            f"`qadapt export {name} --form merged-fp16`, and train on that model.",
        )
    if len(on) > 1 or ON in on:
        problem = "there is no name" if ON in on else "an adapter stands on one other"
        raise BadRecipe(
            f"adapter.targets = {', '.join(on)}: {problem}.",
            cure=f"Name one trained adapter: a run, a name of the store or a folder, such as {ON}language.",
        )
