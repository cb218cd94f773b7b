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

from qadapt.adapters.effect import Arguments, Effect, Named
from qadapt.engine.front import HasVirtualTokens, by_name
from qadapt.engine.prefix import CHILD, Choice, Prefix, other_rows
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
            raise other_rows(self.count, len(whole))
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
        shown: What a part was shown of a stack's own rows, until it changes something of them.
        entered: What a module at work was given, where rows differ.
    """

    groups: tuple[Group, ...] = ()
    shown: dict[tuple[nn.Module, tuple[str, ...]], _Look] = field(default_factory=dict)
    entered: dict[nn.Module, Arguments] = field(default_factory=dict)

    def forget(self) -> None:
        """Lets go of what a forward pass that was broken off has left."""
        self.shown.clear()
        self.entered.clear()


class Site:
    """A module that adapters work on, hooked.

    Args:
        module: The module.
        chosen: Asked at each pass.
    """

    def __init__(self, module: nn.Module, chosen: Chosen) -> None:
        self._effects: dict[str, list[Effect]] = {}
        self._module, self._chosen = module, chosen
        self._prefixes: dict[str, Prefix] = {}
        self._choice = Choice()
        self._handles: tuple[RemovableHandle, ...] = (
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        )

    def add(self, name: str, effect: Effect) -> None:
        """Lets an adapter have an effect here."""
        self._effects.setdefault(name, []).append(effect)
        if isinstance(effect.part, Prefix):
            self._prefixes[name] = effect.part
            self._module.add_module(CHILD, self._choice)

    def remove(self, name: str) -> bool:
        """Takes an adapter's effects away; whether others are left. Without any the module is as it was."""
        del self._effects[name]
        if self._prefixes.pop(name, None) is not None and not self._prefixes:
            delattr(self._module, CHILD)
        if self._effects:
            return True
        for handle in self._handles:
            handle.remove()
        return False

    def clash(self, names: Sequence[str]) -> list[str]:
        """Those of a stack that have no meaning together here; none if they have.

        A prefix is within the module, whatever is done to what goes in and comes out.
        """
        prefixes = [name for name in names if name in self._prefixes]
        others = [name for name in names if name in self._effects and name not in self._prefixes]
        kinds = {effect.kind for name in others for effect in self._effects[name]}
        if len(others) > 1 and (len({*others}) < len(others) or len(kinds) > 1 or "alone" in kinds):
            return others
        return prefixes if len(prefixes) > 1 else []

    def _before(
        self, module: nn.Module, arguments: Arguments, named: Named
    ) -> tuple[Arguments, Named] | None:
        """Hook before the module."""
        is_changed, self._choice.rows = False, self._prefix_of_rows()
        if any(group.places is not None for group in self._chosen.groups):
            self._chosen.entered[module] = arguments
        for group, effect in self._now():
            if effect.enter is not None and group.places is None:
                if (entered := effect.enter(module, arguments, named)) is not None:
                    (arguments, named), is_changed = entered, True
            elif effect.enter is not None:
                _check_front(effect.part, by_name(arguments, named), group.places)
            if effect.before is not None:
                mine = group.part_of_each(arguments)
                if (found := effect.before(module, mine)) is not None:
                    arguments, is_changed = group.put_each(found, arguments), True
                elif group.places is not None:
                    self._chosen.shown[effect.part, group.names] = _Look(effect, module, mine)
        return (arguments, named) if is_changed else None

    def _after(self, module: nn.Module, arguments: Arguments, named: Named, output: Any) -> Any:
        """Hook after it; of a tuple the first counts."""
        entered = self._chosen.entered.pop(module, ())
        for group, effect in self._now():
            if effect.leave is not None and group.places is None:
                output = effect.leave(module, arguments, named, output)
            if effect.after is not None:
                first, *others = output if isinstance(output, tuple) else (output,)
                if group.places is None:
                    changed = effect.after(module, arguments, first)
                else:
                    changed = self._changed(effect, group, entered=entered, arguments=arguments, output=first)
                output = (changed, *others) if isinstance(output, tuple) else changed
        return output

    def _changed(
        self, effect: Effect, group: Group, *, entered: Arguments, arguments: Arguments, output: Tensor
    ) -> Tensor:
        """An output with a group's rows changed, of which the effect saw last what it is shown."""
        look = self._chosen.shown.pop((effect.part, group.names), None)  # which holds it until then
        if look is not None:
            look.again()
        if effect.before is not None:
            effect.before(self._module, group.part_of_each(entered))
        assert effect.after is not None
        made: Tensor = effect.after(self._module, group.part_of_each(arguments), group.part_of(output))
        return group.put(made, output)

    def _now(self) -> Iterator[tuple[Group, Effect]]:
        for group in self._chosen.groups:
            for name in group.names:
                for effect in self._effects.get(name, ()):
                    yield group, effect

    def _prefix_of_rows(self) -> tuple[Prefix | None, ...]:
        """The prefix that all rows have, or one for each."""
        rows: list[Prefix | None] = [None]
        for group in self._chosen.groups if self._prefixes else ():
            for prefix in filter(None, map(self._prefixes.get, group.names)):
                rows += [None] * (group.count - len(rows))
                for place in group.rows:
                    rows[place] = prefix
        return tuple(rows)


def _check_front(part: nn.Module, named: Named, places: Tensor | None) -> None:
    """Where rows have different adapters, whoever makes the batch puts virtual tokens in front."""
    ids, cache = named.get("input_ids"), named.get("past_key_values")
    if not isinstance(part, HasVirtualTokens) or places is None or ids is None:
        return
    is_first = cache is None or not cache.get_seq_length()
    if is_first and bool(((ids[places] < 0).sum(dim=1) != part.virtual_tokens).any()):
        raise Unsupported(
            f"Rows whose adapter has {part.virtual_tokens} virtual tokens do not have them in front.",
            cure="Let `generate(swap.asked(names), prompts)` make the batch, or put `front_ids` there.",
        )
