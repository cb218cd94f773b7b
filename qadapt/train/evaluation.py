"""How good an adapter is on chosen rows: the loss with and without it, and answers beside theirs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from peft import PeftModel

from qadapt.adapters.facts import BELOW
from qadapt.adapters.lora import without_adapter
from qadapt.adapters.side_car import SideCar
from qadapt.data.batches import Division, all_batches, length_step
from qadapt.data.conversation import Conversation
from qadapt.data.prompt import PromptContract
from qadapt.data.rows import RowSet
from qadapt.data.tokens import Tokens
from qadapt.engine.front import front_of
from qadapt.engine.host import device_of
from qadapt.engine.out_of_memory import RanOut, attempt, free_memory
from qadapt.engine.target import TYPES
from qadapt.errors import BadData, DoesNotFit
from qadapt.model.generate import generate
from qadapt.plan.setting import LOSS_CHUNK
from qadapt.train.attended import Attended
from qadapt.train.step import evaluate_loss
from qadapt.train.turns import Evaluating


@dataclass(frozen=True)
class Answer:
    """What was asked, what the row answers, and what the model answers."""

    question: str
    expected: str
    given: str

    @property
    def is_exact(self) -> bool:
        """Whether both answers are the same text, white space at the ends aside."""
        return self.expected.strip() == self.given.strip()


@dataclass(frozen=True)
class Below:
    """The trained adapter on which another stands: its name, and its own loss alone (nats)."""

    name: str
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per learned token (nats) of the adapter and of the base alone, and greedy answers.

    `notes` are problems of the rows with their cures: which were cut, which were left out; `attended` which
    adapters a fusion attends to; `below` what the adapter stands on, if on another.
    """

    rows: int
    supervised_tokens: int
    loss: float
    base_loss: float
    answers: tuple[Answer, ...]
    notes: tuple[tuple[str, str], ...] = ()
    attended: tuple[Attended, ...] = ()
    below: Below | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss) of the adapter."""
        return math.exp(min(self.loss, 700.0))

    @property
    def exact_share(self) -> float | None:
        """Share of the answers that are exact; None if none were asked for."""
        if not self.answers:
            return None
        return sum(answer.is_exact for answer in self.answers) / len(self.answers)


def evaluate_rows(
    model: PeftModel, rows: Sequence[Tokens], *, size: int, pad_id: int, loss_chunk: int = LOSS_CHUNK
) -> tuple[float, float]:
    """The mean loss per learned token with the adapter, and without it.

    Args:
        model: The adapted model.
        rows: Any number; the virtual tokens that the model has are put in front, and none for the base.
        size: The most of them at a time.
        pad_id: The token that fills up.
        loss_chunk: Learned tokens at the head at once.

    Raises:
        DoesNotFit: Memory ran out with one row at a time.
    """
    division = Division(pad_id, size, loss_chunk=loss_chunk)
    tuned = _loss(model, _behind(rows, front_of(model)), division)
    with without_adapter(model):
        return tuned, _loss(model, _behind(rows, 0), division)


def evaluate_below(
    model: PeftModel, rows: Sequence[Tokens], *, size: int, pad_id: int, loss_chunk: int = LOSS_CHUNK
) -> Below | None:
    """The loss of the adapter alone on which the model's own stands; None if it stands on none.

    Args:
        model: The adapted model; so too the others as `evaluate_rows`.
        rows: Any number.
        size: The most of them at a time.
        pad_id: The token that fills up.
        loss_chunk: Learned tokens at the head at once.

    Raises:
        DoesNotFit: Memory ran out with one row at a time.
    """
    if not isinstance(model, SideCar) or BELOW not in model.settings:
        return None
    with model.only_below():
        loss = _loss(model, _behind(rows, front_of(model)), Division(pad_id, size, loss_chunk=loss_chunk))
    return Below(model.settings[BELOW]["name"], loss)


def _behind(rows: Sequence[Tokens], count: int) -> Sequence[Tokens]:
    return rows.behind(count) if isinstance(rows, RowSet) else rows


def _loss(model: PeftModel, rows: Sequence[Tokens], division: Division) -> float:
    """The loss, with fewer rows, then learned tokens at a time where memory runs out."""
    longest = int(rows.lengths.max()) if isinstance(rows, RowSet) else max(map(len, rows))
    dtype = TYPES[model.get_base_model().dtype]
    division = replace(division, length_step=length_step(device_of(model).type, dtype), most=longest)
    evaluating = Evaluating(model, division)
    while isinstance(
        loss := attempt(lambda: evaluate_loss(model, all_batches(rows, evaluating.splitting.division))),
        RanOut,
    ):
        free_memory(device_of(model))
        turned = evaluating.next(rows)
        if turned is None:
            raise DoesNotFit(
                "Memory ran out in the evaluation, with one row at a time.",
                cure="Close what else uses the memory, or evaluate shorter rows.",
            )
        knob, value, _ = turned
        evaluating.take(knob, value)
    return loss


def answer_rows(
    model: PeftModel, contract: PromptContract, rows: Sequence[Conversation], *, max_new_tokens: int
) -> tuple[Answer, ...]:
    """The greedy answers to the last question of each conversation, beside the row's own.

    A row that asks nothing is passed over: one without an answer, or whose only answer stands first, or
    behind turns that the template does not take alone.

    Raises:
        DoesNotFit: Memory ran out with one question at a time.
    """
    asked = [(row, turn, ids) for row in rows for turn, ids in _last_question(row, contract)]
    given = attempt(
        lambda: generate(
            model,
            [ids for _, _, ids in asked],
            max_new_tokens=max_new_tokens,
            end_ids=contract.end_ids,
            pad_id=contract.pad_id,
        )
    )
    if isinstance(given, RanOut):
        raise DoesNotFit(
            "Memory ran out while answering a single question.",
            cure="Ask for shorter answers (--max-new-tokens) or none, or close what else uses the memory.",
        )
    return tuple(
        Answer(
            question=row.turns[turn - 1]["content"],
            expected=row.turns[turn]["content"],
            given=contract.text(ids),
        )
        for (row, turn, _), ids in zip(asked, given, strict=True)
    )


def _last_question(row: Conversation, contract: PromptContract) -> Iterator[tuple[int, list[int]]]:
    """Number of the last answer, and the tokens that ask for it, if there are any."""
    turn = max((at for at, message in enumerate(row.messages) if message.role == "assistant"), default=0)
    if not turn:
        return
    try:
        yield turn, contract.prompt_ids(row.turns[:turn], row.tools, place=row.place)
    except BadData:
        return
