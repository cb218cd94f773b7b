"""Which triplets of AdaLoRA are given up (arXiv:2303.10512, Algorithm 1); what keeps P and Q orthogonal.

The importance of a number is |w · ∂L/∂w|, averaged over steps, times the average of how far it strays from
that (β = 0.85 each); of a triplet it is that of its λ, and the mean of its row of Q and of its column of P.
The budget, how many triplets all layers have together, falls with the cube of what is left of the way
(`plan/ranks.py`); the least important ones beyond it get λ = 0. Until the end of the way they may
come back, then those that are left stay.

As in the paper weight and gradient are of one moment, before the update; PEFT takes the weight after it. The
gradient is that of the whole step, all its micro-batches together, penalty included, after clipping: a step
that is clipped counts as much less as its update does. A step whose update is left out counts in none of
the averages; its place in the schedule passes.

Of PEFT's `RankAllocator` the budget of a step is taken. Its averages are not: they are made in the first
step, three for each number where two are needed, all anew in every step, so that memory could run out in the
middle and nobody would know which were done; of triplets that are equally important at the threshold it gives
up all, and it waits for the card. Here all is there before the first step, in the type of the adapter, and
`begin_update` can be called again where memory ran out; once nothing is given up any more, the averages are
let go of. `tests/test_adalora.py` compares both.

Legend: I inputs, O outputs, R triplets of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from peft.tuners.adalora import RankAllocator
from torch import Tensor

from qadapt.adapters.triplets import triplets_of

_LEAST_NORM = 1e-30
"""What is divided by where P or Q is orthogonal to the last bit."""


class RankBudget:
    """AdaLoRA's part in each step of a run: a `Companion` of the optimizer (`train/optimizer.py`).

    Args:
        model: The base with triplets on it, their schedule in PEFT's configuration.
    """

    def __init__(self, model: PeftModel) -> None:
        self._config = model.peft_config["default"]
        self._allocator = RankAllocator(model.get_base_model(), self._config, "default")
        self._layers = {
            path: {part: f"{path}.{part}.default" for part in parts} for path, parts in triplets_of(model)
        }
        self._parameters: dict[str, Tensor] = {
            self._layers[path][part]: tensor
            for path, parts in triplets_of(model)
            for part, tensor in parts.items()
        }
        self._importance = {name: torch.zeros_like(each) for name, each in self._parameters.items()}
        self._uncertainty = {name: torch.zeros_like(each) for name, each in self._parameters.items()}
        count, like = self._allocator.init_bgt, next(iter(self._parameters.values()))
        self._given_up = torch.zeros(count, dtype=torch.bool, device=like.device)
        self._steps = self._followed = 0
        self._is_final = self._is_begun = self._is_due = False

    @property
    def _averages(self) -> dict[str, dict[str, Tensor]]:
        return {"importance": self._importance, "uncertainty": self._uncertainty}

    @property
    def progress(self) -> int:
        """How far an update that memory ran out in has come; only for comparison."""
        return len(self._parameters) if self._is_begun else self._followed

    @property
    def left(self) -> int:
        """How many triplets are not given up."""
        return int((~self._given_up).sum())

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Adds the gradient of the penalty: the mean of ‖QQᵀ - 1‖ and ‖PᵀP - 1‖ over all layers, weighted."""
        share = self._config.orth_reg_weight / (2 * len(self._layers))
        for names in self._layers.values():
            right, left = (self._parameters[names[part]] for part in ("lora_A", "lora_B"))
            q, p = right.float(), left.float()
            _add(right, _off(q @ q.t(), share) @ q)
            _add(left, p @ _off(p.t() @ p, share))

    @torch.no_grad()
    def begin_update(self) -> None:
        """Counts the gradients, before they are applied, and decides what is given up after it."""
        if self._is_begun:
            return
        step, config = self._steps + 1, self._config
        if not self._is_final:
            self._follow()
            budget, self._is_due = self._allocator.budget_schedule(step)
            is_last = step >= config.total_step - config.tfinal
            if self._is_due or is_last:
                self._give_up(budget)
            if is_last:
                self._let_go()
        self._steps, self._followed, self._is_begun = step, 0, True

    def end_update(self) -> Iterator[tuple[str, Tensor]]:
        """Names of parameters that lose numbers after the update, and which; takes no memory."""
        if self._is_due or self._is_final:
            names = [parts["lora_E"] for parts in self._layers.values()]
            sizes = [len(self._parameters[name]) for name in names]
            for name, part in zip(names, self._given_up.split(sizes), strict=True):
                yield name, part.unsqueeze(1)
        self._is_begun = self._is_due = False

    def skip_update(self) -> None:
        """A step of the schedule has passed without an update."""
        self._steps += 1

    def held(self) -> list[Tensor]:
        """Every tensor that stays from step to step."""
        return [*self._importance.values(), *self._uncertainty.values(), self._given_up]

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save, by name."""
        averages = {
            f"{kind}/{name}": value
            for kind, values in self._averages.items()
            for name, value in values.items()
        }
        steps = torch.tensor([self._steps, self._is_final])
        return averages | {"budget/given_up": self._given_up, "budget/steps": steps}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `tensors` gave, of a later or an earlier step."""
        steps, is_final = tensors["budget/steps"].tolist()
        self._steps, self._is_final = int(steps), bool(is_final)
        self._followed, self._is_begun, self._is_due = 0, False, False
        self._given_up.copy_(tensors["budget/given_up"])
        if self._is_final:
            self._let_go()
            return
        for kind, averages in self._averages.items():
            for name, parameter in self._parameters.items():
                if name not in averages:
                    averages[name] = torch.empty_like(parameter)
                averages[name].copy_(tensors[f"{kind}/{name}"])

    def _let_go(self) -> None:
        """Gives up no more: what decided it is freed."""
        self._is_final = True
        for averages in self._averages.values():
            averages.clear()

    def _follow(self) -> None:
        """Brings the averages up to this step, tensor by tensor; what allocates comes before what changes."""
        first, second = self._config.beta1, self._config.beta2
        for name in list(self._parameters)[self._followed :]:
            parameter = self._parameters[name]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            now = (parameter.float() * gradient.float()).abs_()
            importance = first * self._importance[name].float() + (1 - first) * now
            strayed = (now - importance).abs_()
            uncertainty = second * self._uncertainty[name].float() + (1 - second) * strayed
            self._importance[name].copy_(importance)  # from here on nothing is allocated
            self._uncertainty[name].copy_(uncertainty)
            self._followed += 1

    def _give_up(self, budget: int) -> None:
        """Keeps the most important triplets of all layers; of equal ones the first."""
        scores = torch.cat([self._scores(names) for names in self._layers.values()])
        kept = scores.argsort(descending=True, stable=True)[:budget]
        self._given_up.copy_(torch.ones_like(self._given_up).index_fill_(0, kept, False))

    def _scores(self, names: Mapping[str, str]) -> Tensor:
        """(R,) the importance of a layer's triplets."""
        q, values, p = (
            self._importance[name].float() * self._uncertainty[name].float()
            for name in (names["lora_A"], names["lora_E"], names["lora_B"])
        )
        return values.flatten() + (q.mean(1) + p.mean(0))


def budget_of(model: torch.nn.Module) -> RankBudget | None:
    """The budget of a model with AdaLoRA; None for all others."""
    has_triplets = next(triplets_of(model), None) is not None
    return RankBudget(model) if isinstance(model, PeftModel) and has_triplets else None


def _off(gram: Tensor, share: float) -> Tensor:
    """(R, R): what the gradient of share · ‖gram - 1‖ is multiplied with, of a product with itself."""
    gram.diagonal().sub_(1)
    return gram.mul_(2 * share / torch.linalg.matrix_norm(gram).clamp_min(_LEAST_NORM))


def _add(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(gradient)
