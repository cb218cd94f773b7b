"""Several adapters of any methods side by side on one base in memory: switched, stacked, one for each row.

Nothing is attached to the base. Each adapter is a list of effects (`effect.py`); one hook at each module that
any of them works on asks which adapters are chosen now, so a switch is an assignment, memory grows by the
adapters' own tensors, and with none chosen no hook does anything: the base's numbers are those to the bit.
What an adapter gives is what `method.load_adapter` of its folder gives.

Rows of one batch may have different adapters (S-LoRA, arXiv:2311.03285, batches LoRA so): the base's products
are made for all rows at once, and each adapter works on its own rows. For use, not for training; one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qadapt.adapters.adapted_base import AdaptedBase
from qadapt.adapters.beside import Beside
from qadapt.adapters.effect import Effect
from qadapt.adapters.facts import is_side_car
from qadapt.adapters.peft_effects import peft_effects
from qadapt.adapters.side_car import Part
from qadapt.adapters.side_cars import side_car_effects
from qadapt.adapters.sites import Chosen, Group, Site
from qadapt.engine.front import HasVirtualTokens
from qadapt.engine.host import device_of
from qadapt.errors import BadAdapter, Unsupported

Names = str | Sequence[str] | None
"""Whom a row has: an adapter, several stacked from the first to the last, or none."""


def effects_of(model: PreTrainedModel, folder: Path) -> list[Effect]:
    """What the adapter of a folder, of whatever method, does at the modules of a base.

    Raises:
        BadAdapter: The files are damaged, or of an adapter for another base.
        Unsupported: The method is none that can stand beside others.
    """
    return side_car_effects(model, folder) if is_side_car(folder) else peft_effects(model, folder)


class Swap(AdaptedBase):
    """A frozen base and adapters beside it, none of which is on at first.

    Args:
        base: Nothing is attached to it.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__(base.requires_grad_(False))
        self._held: dict[str, list[Effect]] = {}
        self._below: dict[str, str] = {}  # an adapter → what is held of the one it was trained on
        self._parts = nn.ModuleList()  # whose tensors move with this model, and are counted in it
        self._sites: dict[nn.Module, Site] = {}
        self._chosen = Chosen()
        self.train(base.training)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters, in the order in which they came."""
        return self._shown(self._held)

    @property
    def chosen(self) -> tuple[tuple[str, ...], ...]:
        """The stacks that are on now: one for all rows, or each that some rows have; empty without any."""
        return tuple(self._shown(group.names) for group in self._chosen.groups)

    @property
    def virtual_tokens(self) -> int:
        """How many stand in front of every row with what is on for all rows."""
        groups = [group for group in self._chosen.groups if group.places is None]
        parts = [effect.part for group in groups for name in group.names for effect in self._held[name]]
        return sum(part.virtual_tokens for part in dict.fromkeys(parts) if isinstance(part, HasVirtualTokens))

    def add(self, name: str, folder: Path) -> None:
        """Brings the adapter of a folder into memory; it is not on.

        Args:
            name: What it is called from now on.
            folder: Of PEFT, or a side-car's.

        Raises:
            BadAdapter: There is one of that name, or as `effects_of`.
            Unsupported: As `effects_of`.
        """
        if name in self._held:
            raise BadAdapter(
                f"There is an adapter {name} in memory already.",
                cure="Give the other one another name, or remove this one first.",
            )
        effects = effects_of(self.base, folder)
        lower = [effect for effect in effects if isinstance(effect.part, Part) and effect.part.is_below]
        if lower:
            held = f"below {name}"
            while held in self._held:
                held = f"below {held}"
            self._below[name] = held
            self._hold(held, lower)
        self._hold(name, [effect for effect in effects if effect not in lower])
        self._count_parts()

    def _hold(self, name: str, effects: list[Effect]) -> None:
        self._held[name] = effects
        for effect in effects:
            self._site(effect.module).add(name, effect)

    def remove(self, name: str) -> None:
        """Takes an adapter out of memory; if it is on, none is afterwards.

        Raises:
            BadAdapter: There is none of that name.
        """
        self._check_names((name,))
        if any(name in names for names in self.chosen):
            self.none()
        for each in (name, *filter(None, [self._below.pop(name, None)])):
            for module in dict.fromkeys(effect.module for effect in self._held.pop(each)):
                if not self._sites[module].remove(each):
                    del self._sites[module]
        self._count_parts()

    def use(self, name: str) -> None:
        """Switches to one adapter, for all rows.

        Raises:
            BadAdapter: There is none of that name.
        """
        self.stack((name,))

    def stack(self, names: Sequence[str]) -> None:
        """Switches to several at once, for all rows; where order matters, from the first to the last.

        Updates of LoRA add up and factors of IA3 multiply. A bottleneck works on what the one before it gave,
        as on a base that has that one, and as the library `adapters` 1.3 stacks a language and a task
        (`tools/bench/parity_adapters.py`); as MAD-X is written (arXiv:2005.00052) it would see the first's
        output alone, and only what comes out last would be added. One that was trained on another brings that
        one with it, unless a bottleneck comes before it: that one takes its place, such as another language.

        Raises:
            BadAdapter: There is none of a name.
            Unsupported: Two of them change one layer in ways that have no meaning together.
        """
        self._chosen.groups = self._grouped((tuple(names),))

    def none(self) -> None:
        """Switches all adapters off."""
        self._chosen.groups = ()

    @contextmanager
    def using(self, *names: str) -> Iterator[None]:
        """While open, these are on for all rows, as in `stack`; then whatever was before.

        Raises:
            BadAdapter: As `stack`.
            Unsupported: As `stack`.
        """
        with self._for_a_while(self._grouped((names,))):
            yield

    @contextmanager
    def rows(self, whose: Sequence[Names]) -> Iterator[None]:
        """While open, each row of the batch has its own; then whatever was before.

        Args:
            whose: For each row of the batch: an adapter, several in the order of their stack, or None.

        Raises:
            BadAdapter: As `stack`.
            Unsupported: As `stack`; and by the model, if rows differ and its batch has more of them or fewer.
        """
        stacks = [(each,) if isinstance(each, str) else tuple(each or ()) for each in whose]
        with self._for_a_while(self._grouped(stacks)):
            yield

    def asked(self, whose: Sequence[Names]) -> Asked:
        """This model, asked so many prompts (`model/generate.py`), each of its own adapters, as in `rows`."""
        return Asked(self, whose)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """While open, the model is its base, to the bit."""
        return self._for_a_while(())

    @contextmanager
    def _for_a_while(self, groups: tuple[Group, ...]) -> Iterator[None]:
        before, self._chosen.groups = self._chosen.groups, groups
        try:
            yield
        finally:
            is_whole = all(name in self._held for group in before for name in group.names)
            self._chosen.groups = before if is_whole else ()  # as `remove` leaves it
            self._chosen.forget()

    def _grouped(self, stacks: Sequence[tuple[str, ...]]) -> tuple[Group, ...]:
        """The rows by their stacks; with a single stack: all of them."""
        each = dict.fromkeys(stacks)
        for names in each:
            self._check_names(names)
            self._check_stack(self._whole(names))
        if len(each) == 1:
            (names,) = each
            return (Group(self._whole(names)),) if names else ()
        device = device_of(self.base)
        groups = []
        for names in filter(None, each):
            rows = tuple(place for place, stack in enumerate(stacks) if stack == names)
            places = torch.tensor(rows, device=device)
            groups.append(Group(self._whole(names), rows, places, count=len(stacks)))
        return tuple(groups)

    def _whole(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """A stack with what its first bottleneck adapter was trained on, if that was trained on another."""
        for place, name in enumerate(names):
            if any(isinstance(effect.part, Beside) for effect in self._held[name]):
                lower = filter(None, [self._below.get(name)])
                return (*names[:place], *lower, *names[place:])
        return names

    def _shown(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those that were added by name."""
        return tuple(name for name in names if name not in self._below.values())

    def _check_names(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.names:
                raise BadAdapter(
                    f"There is no adapter {name} in memory.",
                    cure=f"In memory are {', '.join(self.names) or 'none'}; add it first.",
                )

    def _check_stack(self, names: tuple[str, ...]) -> None:
        for path, module in self.base.named_modules() if len(names) > 1 else ():
            if module in self._sites and (clash := self._sites[module].clash(names)):
                place = path or "the whole model"
                raise Unsupported(
                    f"{' and '.join(clash)} cannot be stacked: at {place} they have no meaning together.",
                    cure="Use one at a time. LoRA stacks with LoRA, IA3 with IA3, bottlenecks with "
                    "bottlenecks, and any two that work at different places.",
                )

    def _site(self, module: nn.Module) -> Site:
        if module not in self._sites:
            self._sites[module] = Site(module, self._chosen)
        return self._sites[module]

    def _count_parts(self) -> None:
        parts = {id(effect.part): effect.part for effects in self._held.values() for effect in effects}
        self._parts = nn.ModuleList(parts.values())
        self.train(self.base.training)


class Asked(nn.Module):
    """A base with adapters that is asked some prompts, each of its own.

    Args:
        swap: The base with its adapters.
        whose: For each prompt, as in `Swap.rows`.
    """

    def __init__(self, swap: Swap, whose: Sequence[Names]) -> None:
        super().__init__()
        self.swap, self._whose = swap, tuple(whose)
        self.train(swap.training)

    def batch_of(self, prompts: Sequence[int]) -> AbstractContextManager[None]:
        """While open, the rows of the batch are these prompts, by their places among all."""
        return self.swap.rows([self._whose[place] for place in prompts])

    @property
    def virtual_tokens(self) -> int:
        """How many stand in front of the one prompt that the batch has."""
        return self.swap.virtual_tokens

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """What the base computes, each row with its adapters."""
        return self.swap(*arguments, **named)
