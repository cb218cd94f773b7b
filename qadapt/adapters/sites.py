"""The hooks through which a base asks which adapters are on, and for which rows of its batch: for `swap.py`.

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from qadapt.adapters.effect import Arguments, Effect, Kind, Named
from qadapt.engine.front import HasVirtualTokens
from qadapt.engine.prefix import CHILD, Choice, Prefix
from qadapt.errors import Unsupported


@dataclass(frozen=True)
class Group:
    """A stack of adapters, and the rows that have it.

    Attributes:
        names: From the first to the last.
        rows: Places of its rows in the batch, if not all have it.
        places: The same as a tensor on the device that computes; None: all rows have it.
        count: How many rows there are in all, if not all have it.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...] = (0,)
    places: Tensor | None = None
    count: int = 0

    def part_of(self, whole: Tensor) -> Tensor:
        """Its rows of a batch, (B, ...)."""
        if self.places is None:
            return whole
        if len(whole) != self.count:
            raise Unsupported(
                f"Adapters were chosen for {self.count} rows, and the model computes {len(whole)} at once.",
                cure="Choose one for each row of the batch. Packed rows, and feed-forward parts computed in "
                "pieces, take one adapter for all.",
            )
        return whole.index_select(0, self.places)

    def part_of_each(self, arguments: Arguments) -> Arguments:
        """Its rows of a module's arguments."""
        return tuple(self.part_of(each) if isinstance(each, Tensor) else each for each in arguments)

    def put(self, part: Tensor, whole: Tensor) -> Tensor:
        """The batch with its rows changed; with more logits than before, no other row has those tokens."""
        if self.places is None:
            return part
        width = max(part.shape[-1], whole.shape[-1])
        return _widened(whole, width).index_copy(0, self.places, _widened(part, width))

    def put_each(self, parts: Arguments, arguments: Arguments) -> Arguments:
        """A module's arguments with its rows changed."""
        pairs = zip(parts, arguments, strict=True)
        return tuple(self.put(part, whole) if isinstance(part, Tensor) else part for part, whole in pairs)


def _widened(values: Tensor, width: int) -> Tensor:
    more = width - values.shape[-1]
    return functional.pad(values, (0, more), value=float("-inf")) if more else values


@dataclass(frozen=True)
class _Look:
    """What an effect was shown, which does no more than look."""

    effect: Effect
    module: nn.Module
    arguments: Arguments

    def again(self) -> None:
        """Shows it once more, as it saw other rows meanwhile."""
        assert self.effect.before is not None
        self.effect.before(self.module, self.arguments)


@dataclass
class Chosen:
    """What is on.

    Attributes:
        groups: Stacks, one for all rows or some with rows of their own; none: the base alone.
        shown: What a part was shown of a stack's rows before a module, until it changes something of them.
    """

    groups: tuple[Group, ...] = ()
    shown: dict[tuple[nn.Module, tuple[str, ...]], _Look] = field(default_factory=dict)


class Site:
    """A module that adapters work on, hooked.

    Args:
        module: The module.
        chosen: Asked at each pass.
    """

    def __init__(self, module: nn.Module, chosen: Chosen) -> None:
        self._effects: dict[str, list[Effect]] = {}
        self._module, self._chosen = module, chosen
        self._prefixes = Choice()
        self._entered: Arguments = ()
        self._handles: tuple[RemovableHandle, ...] = (
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        )

    def add(self, name: str, effect: Effect) -> None:
        """Lets an adapter have an effect here."""
        self._effects.setdefault(name, []).append(effect)
        if isinstance(effect.part, Prefix):
            self._module.add_module(CHILD, self._prefixes)

    def remove(self, name: str) -> bool:
        """Takes an adapter's effects away; whether others are left. Without any the module is as it was."""
        del self._effects[name]
        if self._effects:
            return True
        for handle in self._handles:
            handle.remove()
        if CHILD in dict(self._module.named_children()):
            delattr(self._module, CHILD)
        return False

    def kinds(self, names: Sequence[str]) -> tuple[list[str], set[Kind]]:
        """Those of some adapters that do something here, and the kinds of what they do."""
        there = [name for name in names if name in self._effects]
        return there, {effect.kind for name in there for effect in self._effects[name]}

    def _before(
        self, module: nn.Module, arguments: Arguments, named: Named
    ) -> tuple[Arguments, Named] | None:
        """Hook before the module."""
        is_changed, self._prefixes.rows, self._entered = False, self._prefix_of_rows(), arguments
        for group, effect in self._now():
            if effect.enter is not None and group.places is None:
                if (entered := effect.enter(module, arguments, named)) is not None:
                    (arguments, named), is_changed = entered, True
            elif effect.enter is not None:
                _check_front(effect.part, named, group.places)
            if effect.before is not None:
                mine = group.part_of_each(arguments)
                if (found := effect.before(module, mine)) is None:
                    self._chosen.shown[effect.part, group.names] = _Look(effect, module, mine)
                else:
                    arguments, is_changed = group.put_each(found, arguments), True
        return (arguments, named) if is_changed else None

    def _after(self, module: nn.Module, arguments: Arguments, named: Named, output: Any) -> Any:
        """Hook after it; of a tuple the first counts."""
        for group, effect in self._now():
            if effect.leave is not None and group.places is None:
                output = effect.leave(module, arguments, named, output)
            if effect.after is not None:
                first, *others = output if isinstance(output, tuple) else (output,)
                part = self._part(effect, group, module, arguments=arguments, output=first)
                changed = group.put(part, first)
                output = (changed, *others) if isinstance(output, tuple) else changed
        self._entered = ()
        return output

    def _part(
        self, effect: Effect, group: Group, module: nn.Module, *, arguments: Arguments, output: Tensor
    ) -> Tensor:
        """What an effect makes of its rows of an output, having seen what it was shown of them last."""
        look = self._chosen.shown.pop((effect.part, group.names), None)  # which holds it until then
        if look is not None and group.places is not None:
            look.again()
        if effect.before is not None and group.places is not None:
            effect.before(module, group.part_of_each(self._entered))
        assert effect.after is not None
        made: Tensor = effect.after(module, group.part_of_each(arguments), group.part_of(output))
        return made

    def _now(self) -> Iterator[tuple[Group, Effect]]:
        for group in self._chosen.groups:
            for name in group.names:
                for effect in self._effects.get(name, ()):
                    yield group, effect

    def _prefix_of_rows(self) -> tuple[Prefix | None, ...]:
        """The prefix that all rows have, or one for each."""
        rows: list[Prefix | None] = [None]
        for group, effect in self._now():
            if isinstance(effect.part, Prefix):
                rows += [None] * (max(1, group.count) - len(rows))
                for place in group.rows:
                    rows[place] = effect.part
        return tuple(rows)


def _check_front(part: nn.Module, named: Named, places: Tensor | None) -> None:
    """Where rows have different adapters, whoever makes the batch puts virtual tokens in front."""
    ids, cache = named.get("input_ids"), named.get("past_key_values")
    if not isinstance(part, HasVirtualTokens) or places is None or ids is None:
        return
    if (cache is None or not cache.get_seq_length()) and not bool((ids[places] < 0).any(dim=1).all()):
        raise Unsupported(
            f"Rows whose adapter has {part.virtual_tokens} virtual tokens do not have them in front.",
            cure="Let `generate(swap.asked(names), prompts)` make the batch, or put `front_ids` there.",
        )
