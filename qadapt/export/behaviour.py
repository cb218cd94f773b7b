"""What an exported model does, beside the live one that was trained: losses, probabilities, answers, ranges.

The live model (4-bit base and adapter) answers some prompts; then rows and answers go through it and, layer
by layer, through the files as written. Of both only the states before the head are kept, and the heads are
applied a chunk of tokens at a time: logits of all tokens never exist. KL is that of the exported model's
next-token distribution from the live one's, in nats. Knows no run; judges nothing (`proof.py` does).

Legend: N learned tokens, n those of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qadapt.data.tokens import Tokens, tokens_of
from qadapt.engine.head import head_of
from qadapt.engine.host import device_of
from qadapt.engine.out_of_memory import free_memory
from qadapt.errors import BadExport, Unsupported
from qadapt.events import Event, StageStarted
from qadapt.export.activations import FP16_LIMIT, Ranges
from qadapt.export.learned_tokens import Batch, batches_of
from qadapt.export.plain_load import PlainLoad, load_plainly
from qadapt.export.streamed_model import STAGE, StreamedModel, chunks_of, finished
from qadapt.model.generate import generate

_ANSWERS, _ANSWER_TOKENS, _PROMPT_TOKENS = 8, 32, 1024
_OPENING_TOKENS = 16
"""Of a text that asks nothing, what is to be gone on with."""
_PLAIN_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """Rows to compare on.

    Attributes:
        rows: Those rows.
        are_held_out: Whether they were kept from training.
        end_ids: Tokens that end an answer.
        pad_id: The token that fills up.
    """

    rows: tuple[Tokens, ...]
    are_held_out: bool
    end_ids: frozenset[int]
    pad_id: int


@dataclass(frozen=True)
class Behaviour:
    """Live model and exported files compared; losses and divergences in nats per learned token.

    Attributes:
        rows: How many rows.
        are_held_out: Whether they were kept from training.
        tokens: Learned tokens of these rows.
        live_loss: Mean loss of the live model.
        exported_loss: Mean loss of the exported files.
        mean_divergence: KL(live ‖ exported), mean over the tokens.
        largest_divergence: KL(live ‖ exported), at the token where it is largest.
        same_choice: Share of the tokens for which both find the same token most likely.
        same_choice_or_tie: The same, counting a choice that the live model finds as likely but for rounding.
        answers: Greedy answers of the live model.
        same_answers: How many of them the exported model would have given, token for token.
        answer_tokens: Tokens of all answers, their ends included.
        same_answer_tokens: How many of these the exported model would have chosen, after those before.
        first_difference: Tokens of the answer before the first that differs, in the answer that differs
            earliest; None if all are the same.
        largest_activation: The largest magnitude in the exported model.
        largest_module: Where it is.
        beyond_fp16: Modules whose numbers fp16 cannot hold, with their magnitudes.
        plain: What plain transformers made of the files; None where they are none that it loads.
    """

    rows: int
    are_held_out: bool
    tokens: int
    live_loss: float
    exported_loss: float
    mean_divergence: float
    largest_divergence: float
    same_choice: float
    same_choice_or_tie: float
    answers: int
    same_answers: int
    answer_tokens: int
    same_answer_tokens: int
    first_difference: int | None
    largest_activation: float
    largest_module: str
    beyond_fp16: dict[str, float]
    plain: PlainLoad | None


TIE_NATS = 0.05
"""Two log-probabilities nearer than this are a tie: activations in bf16 move them by as much."""


def prove_behaviour(
    model: StreamedModel, load_live: Callable[[], PeftModel], sample: Sample, *, folder: Path | None
) -> Generator[Event, None, Behaviour]:
    """Compares the exported tensors with the live model.

    Args:
        model: The exported tensors, as written.
        load_live: Loads base and adapter as they were trained; let go before the files are loaded plainly.
        sample: Rows with learned tokens.
        folder: A folder that plain transformers loads; None: there is none.

    Raises:
        BadExport: The files are no model that can be run, or have another vocabulary than the live one.
        Unsupported: It is not known what the live model does with its logits.
    """
    yield StageStarted(stage="asking the live model")
    live = _Live(load_live())
    answers = _answers(live.model, sample)
    rows = [*sample.rows, *answers]
    batches = batches_of(rows, pad_id=sample.pad_id)
    before = live.before_head(batches)
    known = live.logits(before[0][:1]).shape[1]
    if known != model.vocabulary:
        raise BadExport(
            f"The exported model knows {model.vocabulary} tokens, the live one {known}.",
            cure="Export again; if it is so every time, it is a bug of qadapt.",
        )
    yield StageStarted(stage=STAGE)
    ranges = Ranges()
    inputs = [batch.content.input_ids for batch in batches]
    hidden = yield from model.hidden_states(inputs, ranges=ranges)
    after = [batch.before_head(each) for batch, each in zip(batches, hidden, strict=True)]
    del hidden
    targets = torch.cat([batch.targets for batch in batches])
    found = _compared(live, model, torch.cat(before), torch.cat(after), targets, ranges)
    device = live.device
    del live
    free_memory(device)
    plain = None
    if folder is not None:
        yield StageStarted(stage="loading the export with transformers")
        shortest = batches[-1].rows[-1]
        states = after[-1][(batches[-1].row_of_each == shortest).to(after[-1].device)][:_PLAIN_TOKENS]
        batch = _opening(rows[shortest], learned_tokens=len(states), pad_id=sample.pad_id)
        plain = load_plainly(folder, batch, model.logits(states))
        free_memory(device)  # on Windows a file that is still mapped cannot be moved
    numbers = torch.cat([batch.row_of_each for batch in batches])
    return _summed(found, targets, numbers, sample=sample, ranges=ranges, plain=plain)


class _Live:
    """The live model, asked for what is before its head, and for logits of it."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model.eval()
        base = cast(PreTrainedModel, model.get_base_model())
        head = head_of(base)
        if head is None:
            raise Unsupported(
                f"What {base.config.model_type} does with its logits is not known, so it is not proven.",
                cure="Export with --no-proof, and compare some answers yourself.",
            )
        self._decoder, self._head, self.device = base.get_decoder(), head, device_of(base)

    @torch.no_grad()
    def before_head(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The states that predict the learned tokens, (n, D) of each micro-batch, on the host."""
        return [
            batch.before_head(
                self._decoder(
                    input_ids=batch.content.input_ids.to(self.device), use_cache=False
                ).last_hidden_state
            ).cpu()
            for batch in batches
        ]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (n, V) of states (n, D), in fp32."""
        made = self._head.module(hidden.to(self.device))
        return finished(made, scale=self._head.scale, softcap=self._head.softcap)


@dataclass(frozen=True)
class _Compared:
    """Of each learned token, (N,): losses, KL, the exported model's choice, and what the live one says to it.

    `preference` is by how much, in nats, the live model prefers its own choice.
    """

    live_loss: Tensor
    exported_loss: Tensor
    divergence: Tensor
    exported_choice: Tensor
    is_same: Tensor
    preference: Tensor


def _compared(
    live: _Live, model: StreamedModel, before: Tensor, after: Tensor, targets: Tensor, ranges: Ranges
) -> _Compared:
    chunks = []
    for place in chunks_of(len(targets), model.vocabulary):
        ours, theirs = live.logits(before[place]), model.logits(after[place], ranges=ranges)
        ours, theirs = ours.log_softmax(-1), theirs.to(ours.device).log_softmax(-1)
        chosen, wanted = theirs.argmax(-1, keepdim=True), targets[place, None].to(ours.device)
        best, own = ours.max(-1, keepdim=True)
        values = (
            -ours.gather(-1, wanted),
            -theirs.gather(-1, wanted),
            (ours.exp() * (ours - theirs)).sum(-1, keepdim=True),
            chosen,
            chosen == own,
            best - ours.gather(-1, chosen),
        )
        chunks.append([each[:, 0].cpu() for each in values])
    return _Compared(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _summed(
    found: _Compared,
    targets: Tensor,
    numbers: Tensor,
    *,
    sample: Sample,
    ranges: Ranges,
    plain: PlainLoad | None,
) -> Behaviour:
    of_rows = numbers < len(sample.rows)
    is_tie = found.is_same | (found.preference <= TIE_NATS)
    module = max(ranges.largest, key=ranges.largest.__getitem__)
    divergence = found.divergence[of_rows].double()
    return Behaviour(
        rows=len(sample.rows),
        are_held_out=sample.are_held_out,
        tokens=int(of_rows.sum()),
        live_loss=float(found.live_loss[of_rows].double().mean()),
        exported_loss=float(found.exported_loss[of_rows].double().mean()),
        mean_divergence=float(divergence.mean().clamp(min=0)),  # which a NaN stays in, unlike max()
        largest_divergence=float(divergence.max().clamp(min=0)),
        same_choice=float(found.is_same[of_rows].double().mean()),
        same_choice_or_tie=float(is_tie[of_rows].double().mean()),
        **_answered(found, targets, numbers, sample=sample),
        largest_activation=ranges.largest[module],
        largest_module=module,
        beyond_fp16=ranges.beyond(FP16_LIMIT),
        plain=plain,
    )


def _answered(found: _Compared, targets: Tensor, numbers: Tensor, *, sample: Sample) -> dict[str, Any]:
    """What is said of the answers, which are the rows after those of the sample."""
    ends = torch.tensor(sorted(sample.end_ids), dtype=targets.dtype)
    is_end = torch.isin(targets, ends) & torch.isin(found.exported_choice, ends)  # whichever ends it
    is_same = (found.exported_choice == targets) | is_end
    answers = [is_same[numbers == each] for each in numbers.unique().tolist() if each >= len(sample.rows)]
    differing = [int(each.int().argmin()) for each in answers if not bool(each.all())]
    return {
        "answers": len(answers),
        "same_answers": len(answers) - len(differing),
        "answer_tokens": sum(map(len, answers)),
        "same_answer_tokens": sum(int(each.sum()) for each in answers),
        "first_difference": min(differing, default=None),
    }


def _answers(model: PeftModel, sample: Sample) -> list[Tokens]:
    """The live model's greedy answers to what some rows ask, as rows of which the answer is learned."""
    prompts = [prompt for row in sample.rows if len(prompt := _prompt(row)) <= _PROMPT_TOKENS][:_ANSWERS]
    given = generate(
        cast(PreTrainedModel, model),
        prompts,
        max_new_tokens=_ANSWER_TOKENS,
        end_ids=sample.end_ids,
        pad_id=sample.pad_id,
    )
    rows = []
    for prompt, answer in zip(prompts, given, strict=True):
        has_ended = len(answer) < _ANSWER_TOKENS
        ids = [*answer, min(sample.end_ids)] if has_ended else answer
        learned = [False] * len(prompt) + [True] * len(ids)
        rows.append(tokens_of([*prompt, *ids], learned, place="an answer"))
    return rows


def _prompt(row: Tokens) -> list[int]:
    """What a row asks: all before its first learned token; of a text the opening."""
    first = int(row.supervised.argmax())
    count = first if first > 1 else max(1, min(_OPENING_TOKENS, len(row) // 2))
    ids: list[int] = row.ids[:count].tolist()
    return ids


def _opening(row: Tokens, *, learned_tokens: int, pad_id: int) -> Batch:
    """A row up to one of its learned tokens, alone."""
    learned = row.supervised[1:].nonzero()[0] + 1
    last = int(learned[learned_tokens - 1]) + 1
    return batches_of([Tokens(row.ids[:last], row.supervised[:last], row.place)], pad_id=pad_id)[0]
