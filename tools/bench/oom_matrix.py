"""Memory that runs out at every allocation of a step, once each: is the step the same as if it had not?

    python tools/bench/oom_matrix.py

For each case of `CASES` the step is done once undisturbed, then once for every allocation at which a card
could refuse: weights, optimizer states and random state must come out the same, to the bit where no sum has
another order. Some cases have one rung alone, so that each of them is taken. `tests/test_oom.py` takes every
allocation of two cases and some of the others.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GradientCheckpointingLayer

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_model import make_tiny_model

from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.data.batches import Division
from qadapt.data.tokens import Tokens, tokens_of
from qadapt.engine.boundaries import offload_boundaries
from qadapt.engine.gated import set_gated
from qadapt.engine.recompute import set_recompute
from qadapt.engine.tiles import set_tiles
from qadapt.events import Eased, Event
from qadapt.model.load import load_base
from qadapt.train import oom, turns
from qadapt.train.oom import FILE_NAME, Beginning, Ladder, Trial
from qadapt.train.optimizer import CompensatedAdamW, make_optimizer
from qadapt.train.step import StepResult, apply_gradient, find_gradient

if TYPE_CHECKING:
    from peft import PeftModel

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Of a step's gradient: fp32 sums in another order; bf16 gradients are rounded after every micro-batch."""


class RunsOut(TorchDispatchMode):
    """A card whose memory runs out at the n-th allocation while it is on (0: never), or from then on."""

    def __init__(self, at: int, *, again: bool = False) -> None:
        super().__init__()
        self.at = at
        self.again = again
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _is_real(leaf)}
        result = func(*args, **(kwargs or {}))
        made = (leaf for leaf in tree_leaves(result) if _is_real(leaf))
        if any(leaf.untyped_storage().nbytes() and id(leaf.untyped_storage()) not in known for leaf in made):
            self.count += 1
            if self.count == self.at or (self.again and self.count > self.at):
                raise torch.OutOfMemoryError("CUDA out of memory, as far as this test goes")
        return result


def _is_real(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_meta


@dataclass(frozen=True)
class Case:
    """A run of a few steps on a tiny model."""

    name: str
    dtype: torch.dtype = torch.float32
    kind: str = "adamw"
    quantization: str = "none"
    packed: bool = False
    micro_batch: int = 4
    dropout: float = 0.0
    layers: int = 1
    stride: int = 11
    """The test takes every so many allocations."""
    rung: str = ""
    """The only one there is, if any is named; chunks and pieces may be of few tokens then."""
    recompute: bool = False
    offload: bool = False


def rows() -> list[Tokens]:
    draw = torch.Generator().manual_seed(5)
    lengths = (11, 7, 9, 5)
    return [
        tokens_of(
            torch.randint(3, 90, (length,), generator=draw).tolist(),
            [place > 2 for place in range(length)],
            place=f"train.jsonl, line {line}",
        )
        for line, length in enumerate(lengths, start=1)
    ]


class Stage:
    """One step of a case, to be done again and again from the same state."""

    def __init__(self, case: Case, model_folder: Path, folder: Path) -> None:
        base = load_base(
            model_folder, quantization=case.quantization, double_quant=True, dtype=torch.float32, device=CPU
        )
        set_gated(base)
        if case.offload:
            offload_boundaries(base)
        lora = Lora(rank=2, alpha=4, dropout=case.dropout, targets=("q_proj", "down_proj"))
        self.model: PeftModel = attach_lora(base, lora, dtype=case.dtype, seed=0).train()
        draw = torch.Generator().manual_seed(1)
        for parameter in trainable(self.model).values():
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
        self.optimizer = make_optimizer(
            trainable(self.model), kind=case.kind, betas=(0.9, 0.99), weight_decay=0.1
        )
        tokens = 32 if case.packed else 0
        self.division = Division(0, case.micro_batch, case.packed, tokens=tokens, learned=tokens)
        self.case = case
        self.model_folder = model_folder
        self.folder = folder
        self.begins_with_recompute = case.recompute
        self.start = {name: value.detach().clone() for name, value in self.state().items()}

    def unless_put_away(self, found: Outcome) -> Stage:
        """This stage; one made anew if boundaries are put away, which is not taken back."""
        is_put_away = any(event.knob == "offload" for event in found.eased)
        return Stage(self.case, self.model_folder, self.folder) if is_put_away else self

    def state(self) -> dict[str, Tensor]:
        """Everything that an update changes."""
        weights = {f"weight/{name}": value for name, value in self.optimizer.parameters.items()}
        return weights | self.optimizer.tensors()

    @torch.no_grad()
    def go_back(self) -> None:
        for name, parameter in self.optimizer.parameters.items():
            parameter.copy_(self.start[f"weight/{name}"])
        self.optimizer.load(self.start)
        if isinstance(self.optimizer, CompensatedAdamW):
            self.optimizer.is_piecewise = False
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = False
        base = self.model.get_base_model()
        set_recompute(base, "all" if self.begins_with_recompute else "none")
        set_tiles(base, 1)
        (self.folder / FILE_NAME).unlink(missing_ok=True)
        torch.manual_seed(7)

    def once(self, mode: TorchDispatchMode, look: Callable[[], None] = lambda: None) -> Outcome:
        """One step under a mode; `look` is called after each rung, before anything is done again."""
        self.go_back()
        ladder = Ladder(self.model, self.optimizer, division=self.division, run_folder=self.folder)
        chosen = rows()
        steps = ladder.climb_step(
            Trial(
                find=lambda: find_gradient(
                    self.model, self.optimizer, ladder.training(chosen), clip_norm=1.0, scaler=None
                ),
                apply=lambda found: apply_gradient(self.optimizer, found, learning_rate=1e-2, scaler=None),
                around=nullcontext,
            ),
            step=1,
            rows=chosen,
            beginning=Beginning(CPU, None),
        )
        eased: list[Event] = []
        with mode, only_rung(self.case.rung):
            while True:
                try:
                    eased.append(next(steps))
                except StopIteration as end:
                    result = end.value
                    break
                look()
        state = {name: value.detach().clone() for name, value in self.state().items()}
        return Outcome(
            state, result, [each for each in eased if isinstance(each, Eased)], torch.get_rng_state()
        )


@contextmanager
def only_rung(name: str) -> Iterator[None]:
    """While open, the ladder has this rung alone, and for few tokens, too; all rungs if none is named."""
    with ExitStack() as stack:
        if name:
            stack.enter_context(mock.patch.object(oom, "LIVE", (name,)))
            for least in ("LEAST_CHUNK", "LEAST_PIECE"):
                stack.enter_context(mock.patch.object(turns, least, 1))
        yield


@dataclass(frozen=True)
class Outcome:
    """What a step left."""

    state: dict[str, Tensor]
    result: StepResult
    eased: list[Eased]
    random: Tensor


CASES = [
    Case("fp32", stride=1),
    Case("fp32, accumulated, NF4", micro_batch=2, quantization="nf4"),
    Case("bf16, 8-bit states", dtype=torch.bfloat16, kind="adamw-8bit", stride=1),
    Case("bf16, accumulated, packed", dtype=torch.bfloat16, packed=True),
    Case("fp32, dropout", dropout=0.2),
    Case("fp32, smaller chunks", rung="loss_chunk"),
    Case("bf16, packed, smaller chunks", dtype=torch.bfloat16, packed=True, rung="loss_chunk"),
    Case("fp32, pieces", rung="mlp_tiles"),
    Case(
        "bf16, packed, recomputed, pieces",
        dtype=torch.bfloat16,
        packed=True,
        rung="mlp_tiles",
        recompute=True,
    ),
    Case("NF4, recomputation", quantization="nf4", rung="recompute"),
    Case("fp32, dropout, boundaries put away", dropout=0.2, rung="offload", recompute=True),
    Case("bf16, with boundaries put away", dtype=torch.bfloat16, recompute=True, offload=True),
]
SUMMING = ("micro_batch", "loss_chunk", "mlp_tiles")
"""Rungs with which sums have another order."""


def assert_equals_the_reference(case: Case, found: Outcome, expected: Outcome) -> None:
    """To the bit where no sum has another order; else the mean of gradients is compared: after one step it
    is the gradient times a constant."""
    assert replace(found.result, loss=0.0, gradient_norm=0.0) == replace(
        expected.result, loss=0.0, gradient_norm=0.0
    )
    assert torch.equal(found.random, expected.random)
    is_split = any(event.knob in SUMMING for event in found.eased)
    assert found.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        if not is_split:
            assert torch.equal(found.state[name], value), name
        elif name.endswith(("/exp_avg", "/state1")):
            error = (found.state[name] - value).norm() / value.norm()
            assert error < TOLERANCES[case.dtype], name
        elif name.endswith("/step"):
            assert torch.equal(found.state[name], value), name


def main() -> None:
    """Runs every allocation of every case and prints what came out."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            model = make_tiny_model(Path(folder) / "model", "llama", layers=case.layers)
            stage = Stage(case, model, Path(folder))
            gc.freeze()  # so that looking for garbage after each failure takes no time
            counting = RunsOut(0)
            expected = stage.once(counting)
            for at in range(1, counting.count + 1):
                found = stage.once(RunsOut(at))
                assert_equals_the_reference(case, found, expected)
                stage = stage.unless_put_away(found)
            print(f"{case.name}: the same at each of {counting.count} allocations")


if __name__ == "__main__":
    main()
