"""Does a step's rows again, only looking: where a number stopped being finite, which tokens carry a loss.

It is for steps that went wrong, so it may take as long as the step did. Nothing of it stays: gradients are
dropped, and the random state is put back, so the run goes on as if nobody had looked. The first replay draws
the step's own dropout masks, row by row they are others: what only one mask brings out is then told of the
step, not of a row. Hooks are torch's public ones (as anomaly detection would do, at many times the cost, for
every operation); they see modules, not what stands between two of them, so that is told by its parent.

Legend: K positions that predict a learned token, of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from qadapt.data.batches import MicroBatch
from qadapt.data.tokens import Tokens
from qadapt.engine.documents import isolating
from qadapt.engine.host import device_of
from qadapt.engine.loss import loss_sum
from qadapt.engine.out_of_memory import RanOut, attempt, free_memory
from qadapt.train.checkpoint import random_state, restore_random_state

Result = TypeVar("Result")

HEAVY_TOKENS = 5
"""A step's loss has hundreds of learned tokens or more; that so few carry most of it needs no threshold."""
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Finding:
    """Where a step's numbers stopped being finite.

    Attributes:
        kind: `adapter` (its weights are no numbers), `forward`, `loss`, `backward`, `gradient` (of a weight
            alone), `sum` (each part is finite), `gone` (it did not come again), `memory` (there was none to
            look).
        where: The module or weight, if there is one.
        places: The rows that do it alone, such as `train.jsonl, line 12`.
        is_every_row: Whether those are all rows of the step.
    """

    kind: str
    where: str = ""
    places: tuple[str, ...] = ()
    is_every_row: bool = False


@dataclass(frozen=True)
class Heaviest:
    """Tokens that carry most of a step's loss: `share` in `tokens` of `learned`, which lie in `places`."""

    share: float
    tokens: int
    learned: int
    places: tuple[str, ...]


@dataclass(frozen=True)
class Replay:
    """A step that can be done again.

    Attributes:
        model: The adapted model, in training mode, gradients empty.
        parameters: Its trained parameters by name.
        rows: The step's.
        divide: Makes the step's micro-batches of them.
        random: torch's random state before the step.
        loss_scale: What the loss was multiplied by (fp16), else 1.
    """

    model: PeftModel
    parameters: Mapping[str, Tensor]
    rows: Sequence[Tokens]
    divide: Callable[[Sequence[Tokens]], list[MicroBatch]]
    random: Mapping[str, Tensor]
    loss_scale: float = 1.0

    def find_cause(self) -> Finding:
        """Which module gave the first number that is not finite, and which rows do so alone."""
        for name, parameter in self.parameters.items():
            if not _is_finite(parameter):
                return Finding("adapter", _short(name))
        found = self._attempt(self._cause)
        return Finding("memory") if isinstance(found, RanOut) else found

    def _cause(self) -> Finding:
        batches = self.divide(self.rows)
        learned = sum(batch.supervised_tokens for batch in batches)
        found = next((found for batch in batches if (found := self._look(batch, learned))), None)
        if found is None:
            is_whole = all(_is_finite(p.grad) for p in self.parameters.values() if p.grad is not None)
            return Finding("gone" if is_whole and self._norm_is_finite() else "sum")
        alone = [row.place for row in self.rows if self._fails_alone(row, learned)]
        return replace(found, places=tuple(alone), is_every_row=len(alone) == len(self.rows))

    def _norm_is_finite(self) -> bool:
        norms = [p.grad.norm(dtype=torch.float32) for p in self.parameters.values() if p.grad is not None]
        return _is_finite(torch.stack(norms).norm())

    def _fails_alone(self, row: Tokens, learned: int) -> bool:
        if not row.supervised_count:
            return False
        self._drop_gradients()
        return any(self._look(batch, learned) for batch in self.divide([row]))

    def _look(self, batch: MicroBatch, learned: int) -> Finding | None:
        """One micro-batch forward and back; gradients add up, as in the step."""
        device = device_of(self.model)
        watch = _Watch()
        batch = batch.to(device)
        with watch.over(self.model), nullcontext() if batch.documents is None else isolating(self.model):
            loss = loss_sum(
                self.model,
                input_ids=batch.input_ids,
                positions=batch.positions,
                targets=batch.targets,
                documents=batch.documents,
                chunk=batch.loss_chunk,
            )
            loss = loss / learned
            if not _is_finite(loss):
                return Finding("forward", watch.forward) if watch.forward else Finding("loss")
            watch.is_going_back = True
            (loss * self.loss_scale).backward()
        if watch.backward:
            return Finding("backward", watch.backward)
        bad = [n for n, p in self.parameters.items() if p.grad is not None and not _is_finite(p.grad)]
        return Finding("gradient", _short(bad[0])) if bad else None

    @torch.no_grad()
    def find_heaviest(self) -> Heaviest | None:
        """The tokens that carry most of the loss, measured row by row with the weights of now."""
        losses = self._attempt(
            lambda: [(value, row.place) for row in self.rows for value in self._token_losses(row)]
        )
        if isinstance(losses, RanOut):
            return None
        total = sum(value for value, _ in losses)
        if not total > 0:
            return None
        most = sorted(losses, reverse=True)[:HEAVY_TOKENS]
        places = tuple(dict.fromkeys(place for _, place in most))
        return Heaviest(sum(value for value, _ in most) / total, len(most), len(losses), places)

    def _token_losses(self, row: Tokens) -> list[float]:
        if not row.supervised_count:
            return []
        device = device_of(self.model)
        ids = torch.from_numpy(row.ids).long().to(device)
        positions = torch.from_numpy(row.supervised[1:].nonzero()[0]).to(device)  # (K,)
        logits = self.model(input_ids=ids[None], logits_to_keep=positions, use_cache=False).logits
        found: list[float] = functional.cross_entropy(
            logits[0].float(), ids[positions + 1], reduction="none"
        ).tolist()
        return found

    def _attempt(self, look: Callable[[], Result]) -> Result | RanOut:
        """A look, or that memory ran out in it; nothing of it stays."""
        device = device_of(self.model)
        now = random_state(device)
        restore_random_state(self.random, device)
        try:
            found = attempt(look)
        finally:
            self._drop_gradients()
            restore_random_state(now, device)
        if isinstance(found, RanOut):
            free_memory(device)
        return found

    def _drop_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None


class _Watch:
    """The first modules whose output, or the gradient that comes out of them, is not finite.

    A module that is handed bad numbers is not to blame, nor the one before it: what stands between them is,
    and that belongs to the module around both.
    """

    def __init__(self) -> None:
        self.forward = ""
        self.backward = ""
        self.is_going_back = False  # recomputation runs forward passes within the backward pass
        self._passed_last = ""
        self._entered_last = ""

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in model.named_modules():
                entering = module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
                leaving = module.register_forward_hook(self._leave(name))
                stack.callback(entering.remove)
                stack.callback(leaving.remove)
            yield

    def _enter(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def enter(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._entered_last = name
            self._blame(name.rpartition(".")[0], (*arguments, *named.values()))

        return enter

    def _leave(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def leave(_: nn.Module, __: Any, output: Any) -> None:
            self._blame(name, output)
            has_called_none = self._entered_last == name  # a fused layer calls none of its parts
            for tensor in _tensors(output) if has_called_none else ():
                if tensor.requires_grad:
                    tensor.register_hook(self._look_back(name))

        return leave

    def _blame(self, name: str, values: Any) -> None:
        if not (self.forward or self.is_going_back or all(map(_is_finite, _tensors(values)))):
            self.forward = _short(name)

    def _look_back(self, name: str) -> Callable[[Tensor], None]:
        """At the gradient that arrives at a module's output: it comes out of the module after it."""

        def look(gradient: Tensor) -> None:
            if self.backward:
                return
            if _is_finite(gradient):
                self._passed_last = name
            else:
                self.backward = _short(self._passed_last) or "the loss"

        return look


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors of numbers with a fraction in a module's arguments or output, one level deep."""
    for value in values if isinstance(values, tuple | list) else (values,):
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value


@torch.no_grad()
def _is_finite(values: Tensor) -> bool:
    """Whether every number is finite: lowest and highest are. A sum may overflow, as a mask's does."""
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(values.detach().aminmax())).all())


def _short(name: str) -> str:
    return name.removeprefix(_PEFT_PREFIX) or "the model"
