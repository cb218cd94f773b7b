"""AdamW (arXiv:1711.05101) for adapters, and updates that bf16 weights do not lose.

A bf16 weight has 8 bits of fraction: at usual learning rates most updates are smaller than half its last bit
and round to nothing. `CompensatedAdamW` keeps what rounding lost in a second bf16 value (Kahan summation; for
optimizers: arXiv:2010.06192) and adds it to the next update. The library's optimizer computes each update on
a parameter that is zero, where bf16 is exact to 0.4 % of the update itself; then weight + lost part + update
are summed in fp32.

Parameters may have rates of their own, multiples of the step's (LoRA+, arXiv:2402.12354); weight decay goes
with the rate, and spares those for which zero is no place to be drawn to.

An update can be gone on with: if memory runs out in the middle of `step`, calling it again ends it as if
nothing had happened (what allocates comes before what changes, tensor by tensor). Not so within bitsandbytes'
kernels on a CPU, which allocate between their own changes; on CUDA its kernels, as torch's, allocate nothing.

A trained parameter takes, in bytes: weight 2, gradient 2, lost part 2, states 2 (8-bit) or 8 (fp32); the
update's 2 are there only within `step`, when no activations are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import bitsandbytes
import torch
from torch import Tensor
from torch.optim import Optimizer

from qadapt.train.companion import Alone, Companion

CODE_TABLES = ("qmap1", "qmap2")  # constants of bitsandbytes' 8-bit states, one for all parameters


class CompensatedAdamW:
    """AdamW over bf16 parameters whose updates add up as if the weights were fp32.

    Args:
        parameters: bf16 parameters, named for saving.
        kind: `adamw` (fp32 states) or `adamw-8bit` (paged on CUDA).
        betas: Decay of the mean of gradients and of their squares.
        decays: Decoupled weight decay of each parameter.
        ratios: Each parameter's learning rate as a multiple of the step's; those of equal ratio and decay lie
            side by side.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        *,
        kind: str,
        betas: tuple[float, float],
        decays: Mapping[str, float],
        ratios: Mapping[str, float],
    ) -> None:
        self.parameters = parameters
        self.decays = decays
        self.ratios = ratios
        self.companion: Companion = Alone()
        self.lost = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        self.is_piecewise = False
        self._updates = [torch.nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters.values()]
        updates = dict(zip(parameters, self._updates, strict=True))
        none = dict.fromkeys(parameters, 0.0)
        self.inner = _library_optimizer(updates, kind=kind, betas=betas, decays=none, ratios=ratios)
        self._library = _LibraryStep(self.inner)
        self._nothing = self._updates[0].new_empty(0)
        self._found = self._added = 0  # of how many parameters the update under way is known, and added
        self._let_go(range(len(self._updates)))

    @property
    def progress(self) -> int:
        """How far an update that memory ran out in has come; only for comparison."""
        return self.companion.progress + self._found + self._added

    def ease(self) -> bool:
        """From now on updates one parameter at a time, which takes less memory; False if it did before."""
        was_piecewise, self.is_piecewise = self.is_piecewise, True
        self._let_go(range(self._added))
        return not was_piecewise

    @torch.no_grad()
    def clear(self, name: str, where: Tensor) -> None:
        """Makes some numbers of a parameter zero, without a lost part; takes no memory."""
        self.parameters[name].masked_fill_(where, 0)
        self.lost[name].masked_fill_(where, 0)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Applies the gradients of the parameters, or goes on with it where memory ran out."""
        while self._added < len(self._updates):
            if self._found == self._added:
                end = self._added + 1 if self.is_piecewise else len(self._updates)
                self._find_updates(range(self._added, end), learning_rate)
            self._add_updates(learning_rate)
        self._found = self._added = 0

    def _find_updates(self, places: range, learning_rate: float) -> None:
        try:
            for place, parameter in zip(places, self._parameters(places), strict=True):
                self._updates[place].data = torch.zeros_like(parameter)
                self._updates[place].grad = parameter.grad
            self._library.step(learning_rate)
            self._found = places.stop
        except BaseException:  # those whose gradient is gone are done
            waiting = (place for place in places if self._updates[place].grad is not None)
            self._found = next(waiting, places.start)
            self._let_go(range(self._found, places.stop))
            raise

    def _add_updates(self, learning_rate: float) -> None:
        places = range(self._added, self._found)
        names = list(self.parameters)
        for place, parameter in zip(places, self._parameters(places), strict=True):
            lost = self.lost[names[place]]
            decay = 1 - learning_rate * self.ratios[names[place]] * self.decays[names[place]]
            exact = (parameter.float() + lost.float()).mul_(decay).add_(self._updates[place].float())
            rounded = exact.to(parameter.dtype)
            exact.sub_(rounded.float())
            parameter.copy_(rounded)  # from here on nothing is allocated
            lost.copy_(exact)
            self._added += 1
        self._let_go(places)

    def _parameters(self, places: range) -> list[Tensor]:
        return list(self.parameters.values())[places.start : places.stop]

    def _let_go(self, places: range) -> None:
        for place in places:
            self._updates[place].data, self._updates[place].grad = self._nothing, None

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save, by name."""
        lost = {f"lost/{name}": value for name, value in self.lost.items()}
        return lost | _state_tensors(self.inner, self.parameters) | self.companion.tensors()

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `tensors` gave."""
        for name, value in self.lost.items():
            value.copy_(tensors[f"lost/{name}"])
        _load_state(self.inner, self.parameters, tensors)
        self.companion.load(tensors)
        self._library = _LibraryStep(self.inner)

    @property
    def paged_bytes(self) -> int:
        """Bytes of states in managed memory, which torch's allocator does not count."""
        return _paged_bytes(self.inner)


class PlainAdamW:
    """AdamW over fp32 parameters: the library's, under the same few calls as `CompensatedAdamW`."""

    def __init__(
        self,
        parameters: dict[str, Tensor],
        *,
        kind: str,
        betas: tuple[float, float],
        decays: Mapping[str, float],
        ratios: Mapping[str, float],
    ) -> None:
        self.parameters = parameters
        self.companion: Companion = Alone()
        self.inner = _library_optimizer(parameters, kind=kind, betas=betas, decays=decays, ratios=ratios)
        self._library = _LibraryStep(self.inner)

    @property
    def progress(self) -> int:
        """How far an update that memory ran out in has come; only for comparison."""
        return self.companion.progress + self._library.done

    def ease(self) -> bool:
        """False: it takes no memory of its own that it could do without."""
        return False

    @torch.no_grad()
    def clear(self, name: str, where: Tensor) -> None:
        """Makes some numbers of a parameter zero; takes no memory."""
        self.parameters[name].masked_fill_(where, 0)

    def step(self, learning_rate: float) -> None:
        """Applies the gradients of the parameters, or goes on with it where memory ran out."""
        self._library.step(learning_rate)

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save, by name."""
        return _state_tensors(self.inner, self.parameters) | self.companion.tensors()

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `tensors` gave."""
        _load_state(self.inner, self.parameters, tensors)
        self.companion.load(tensors)
        self._library = _LibraryStep(self.inner)

    @property
    def paged_bytes(self) -> int:
        """Bytes of states in managed memory, which torch's allocator does not count."""
        return _paged_bytes(self.inner)


AdapterOptimizer = CompensatedAdamW | PlainAdamW


class _LibraryStep:
    """The step of a library's optimizer; where memory runs out in it, the next call does what is left.

    bitsandbytes goes from parameter to parameter, each counted just before it is updated: the last one
    counted is the one that failed. torch updates a group at once, after all of it are counted. So the groups,
    one for each rate, are shown to the library one after another. What is done loses its gradient, which the
    library takes for nothing to do.
    """

    def __init__(self, inner: Optimizer) -> None:
        self._inner = inner
        self._counts = {each: self._count_of(each) for each in _parameters(inner)}
        self.done = 0

    def step(self, learning_rate: float) -> None:
        _set_rate(self._inner, learning_rate)
        groups, ended = list(self._inner.param_groups), list[Tensor]()
        try:
            for group in groups:
                self._inner.param_groups[:] = [group]
                self._step_group(group["params"])
                ended += group["params"]
        except BaseException:
            for each in ended:
                each.grad = None
            raise
        finally:
            self._inner.param_groups[:] = groups

    def _step_group(self, chosen: list[Tensor]) -> None:
        taken = [each for each in chosen if each.grad is not None]
        if not taken:
            return
        try:
            self._inner.step()
        except BaseException:
            self._go_back(taken)
            raise
        self._count(taken)

    def _go_back(self, taken: list[Tensor]) -> None:
        begun = [each for each in taken if self._count_of(each) > self._counts[each]]
        is_at_once = isinstance(self._inner.state[taken[0]]["step"], Tensor)
        done = [] if is_at_once else begun[:-1]
        for each in begun[len(done) :]:
            self._inner.state[each]["step"] -= 1  # in place where it is a tensor
        for each in done:
            each.grad = None
        self._count(done)

    def _count(self, done: list[Tensor]) -> None:
        for each in done:
            self._counts[each] += 1
        self.done += len(done)

    def _count_of(self, parameter: Tensor) -> int:
        return 0 if parameter.is_meta else int(self._inner.state[parameter]["step"])


def held_tensors(optimizer: AdapterOptimizer) -> list[Tensor]:
    """Every tensor that stays from step to step: states, their constants, lost parts, a companion's."""
    states = [value for state in optimizer.inner.state.values() for value in state.values()]
    lost = optimizer.lost.values() if isinstance(optimizer, CompensatedAdamW) else ()
    held = [value for value in states if isinstance(value, Tensor)]
    return [*lost, *held, *optimizer.companion.held()]


def make_optimizer(
    parameters: dict[str, Tensor],
    *,
    kind: str,
    betas: tuple[float, float],
    weight_decay: float,
    ratios: Mapping[str, float] | None = None,
    undecayed: Collection[str] = (),
) -> AdapterOptimizer:
    """The optimizer for adapters of their dtype.

    Args:
        parameters: The trained parameters by name, all of one dtype: bf16 or fp32.
        kind: `adamw` or `adamw-8bit`.
        betas: Decay of the mean of gradients and of their squares.
        weight_decay: Decoupled weight decay.
        ratios: Name of a parameter → its learning rate as a multiple of the step's, where it is not 1.
        undecayed: Names of parameters that weight decay spares.
    """
    is_half = next(iter(parameters.values())).dtype == torch.bfloat16
    make = CompensatedAdamW if is_half else PlainAdamW
    known = {name: (ratios or {}).get(name, 1.0) for name in parameters}
    decays = {name: 0.0 if name in undecayed else weight_decay for name in parameters}
    ordered = {name: parameters[name] for name in sorted(parameters, key=lambda n: (known[n], decays[n]))}
    return make(ordered, kind=kind, betas=betas, decays=decays, ratios=known)


def _library_optimizer(
    parameters: Mapping[str, Tensor],
    *,
    kind: str,
    betas: tuple[float, float],
    decays: Mapping[str, float],
    ratios: Mapping[str, float],
) -> Optimizer:
    """The library's optimizer with its states already there: an out-of-memory shows before the first step."""
    chosen = list(parameters.values())
    grouped: dict[tuple[float, float], list[Tensor]] = {}
    for name, each in parameters.items():
        grouped.setdefault((ratios[name], decays[name]), []).append(each)
    groups: list[dict[str, Any]] = [
        {"params": params, "ratio": ratio, "weight_decay": decay}
        for (ratio, decay), params in grouped.items()
    ]
    settings: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": 1e-8}
    optimizer: Optimizer
    if kind == "adamw" and chosen[0].dtype == torch.float32:
        optimizer = torch.optim.AdamW(groups, fused=not chosen[0].is_meta, **settings)  # meta has no kernels
        for parameter in chosen:
            count = torch.zeros((), dtype=torch.float32, device=parameter.device)
            means = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": count, **means}
        return optimizer
    # torch would hold the states of bf16 parameters in bf16; bitsandbytes holds them in fp32 or 8 bits
    if kind == "adamw":
        make = bitsandbytes.optim.AdamW
    else:
        make = bitsandbytes.optim.PagedAdamW8bit if chosen[0].is_cuda else bitsandbytes.optim.AdamW8bit
    paged = make(groups, **settings)
    for number, group in enumerate(paged.param_groups):
        for index, parameter in enumerate(group["params"]):
            paged.init_state(group, parameter, number, index)
    optimizer = paged
    return optimizer


def _set_rate(optimizer: Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["ratio"]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]


def _states(optimizer: Optimizer, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from zip(names, (optimizer.state[each] for each in _parameters(optimizer)), strict=True)


def _state_tensors(optimizer: Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    return {
        f"state/{name}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, state in _states(optimizer, names)
        for key, value in state.items()
        if key not in CODE_TABLES
    }


def _load_state(optimizer: Optimizer, names: Iterable[str], tensors: dict[str, Tensor]) -> None:
    for name, state in _states(optimizer, names):
        for key, value in state.items():
            saved = tensors.get(f"state/{name}/{key}")
            if saved is None:
                assert key in CODE_TABLES, f"{name}/{key} was not saved"
            elif isinstance(value, Tensor):
                value.copy_(saved)  # in place: paged states stay paged
            else:
                state[key] = int(saved)


def _paged_bytes(optimizer: Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    paged = [value for value in values if getattr(value, "is_paged", False)]  # bitsandbytes' mark
    return sum(value.nbytes for value in paged)
