"""A conversation with a model under its prompt contract, answered token by token.

What the model is sent at each turn are the contract's own tokens for the whole conversation; where that is
longer than the model's context, the oldest turns are left out. The model reads only what is new of it: the
keys and values of the rest are kept from question to question. Knows no screen, no keyboard and no files.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qadapt.adapters.lora import without_adapter
from qadapt.adapters.swap import Swap
from qadapt.data.prompt import PromptContract
from qadapt.engine.adapted import Adapted
from qadapt.engine.front import front_of
from qadapt.engine.host import device_of
from qadapt.engine.out_of_memory import RanOut, attempt, free_memory
from qadapt.errors import BadData, DoesNotFit
from qadapt.model.generate import Kept, Sampling, stream
from qadapt.serve.stream import TextStream

Ending = Literal["end", "longest", "context", "stopped"]
_GREEDY_BELOW = 1e-3
"""At lower temperatures the likeliest token is drawn, but for exact ties."""


@dataclass(frozen=True)
class Manner:
    """How questions are answered.

    Attributes:
        longest: Longest answer in tokens.
        temperature: 0 is greedy: the same answer to the same conversation.
        top_p: The likeliest tokens that come to this share together are drawn from.
        seed: Of the draws; None: another one each time.
    """

    longest: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Reply:
    """An answer with what became of it.

    Attributes:
        question: What was asked.
        answer: The text.
        prompt_tokens: What the model was sent.
        tokens: What it wrote, without its end token.
        ending: `end`: it ended by itself; `longest`: it was cut off where it was to be; `context`: where the
            model's context is full; `stopped`: by whoever asked.
        left_out: Turns at the start of the conversation that the model was not sent.
    """

    question: str
    answer: str
    prompt_tokens: int
    tokens: int
    ending: Ending
    left_out: int


@dataclass(frozen=True)
class _Sent:
    """The turn that asks, the tokens of the whole conversation, and the turns that are not in it."""

    asked: dict[str, Any]
    tokens: int
    left_out: int


class Chat:
    """One conversation.

    Attributes:
        model: Who answers.
        contract: How it is asked. Without a chat template it goes on with each text, on its own.
        adapters: Which of the model's adapters answer, if it has several; empty: those that are on in it.
        uses_adapter: Whether the adapter is on; a model without one has it in its weights.
        reply: The newest answer.

    Args:
        model: As the attribute.
        contract: As the attribute.
        manner: How it answers.
        system: The system prompt.
        uses_adapter: As the attribute.

    Raises:
        BadData: As `tell`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | Swap,
        contract: PromptContract,
        manner: Manner,
        *,
        system: str | None = None,
        uses_adapter: bool = True,
    ) -> None:
        self.model, self.contract, self.uses_adapter = model, contract, uses_adapter
        self.adapters: tuple[str, ...] = ()
        self.reply: Reply | None = None
        self._manner = manner
        self._sampling = _sampling_of(manner)
        self._system: list[dict[str, Any]] = []
        self._turns: list[dict[str, Any]] = []
        self._left_out = 0
        self._kept, self._kept_of = Kept(), self._whose
        if system is not None:
            self.tell(system)

    @property
    def context(self) -> int:
        """The most tokens the model was made for, prompt and answer together, but for virtual tokens."""
        tokens: int = self.model.config.max_position_embeddings
        with self._voice():
            return tokens - front_of(self.model)

    @property
    def is_conversation(self) -> bool:
        """Whether there are turns at all: a model without a chat template goes on with a text."""
        return self.contract.template is not None

    @property
    def turns(self) -> tuple[Mapping[str, Any], ...]:
        """The conversation so far, without the system prompt."""
        return tuple(self._turns)

    @property
    def left_out(self) -> int:
        """Turns at its start that the model was not sent any more at the newest question."""
        return self._left_out

    def switch_to(self, adapters: Sequence[str], contract: PromptContract) -> None:
        """Lets other adapters of the model answer from here on; the conversation stays.

        Args:
            adapters: One, or several in the order of their stack.
            contract: How they are asked.

        Raises:
            BadAdapter: The model has none of a name.
            BadData: Their template refuses or drops the system prompt; who answered before answers on.
            Unsupported: They cannot be stacked.
        """
        assert isinstance(self.model, Swap), "it has several adapters"
        with self.model.using(*adapters):
            before, self.contract = self.contract, contract
        try:
            for told in self._system:
                self.tell(told["content"])
        except BadData:
            self.contract = before
            raise
        self.adapters, self.uses_adapter = tuple(adapters), True

    def take_back(self) -> None:
        """Forgets the newest question and its answer."""
        del self._turns[-2:]

    def begin_anew(self) -> None:
        """Forgets all turns; the system prompt stays."""
        self._turns, self._left_out, self.reply = [], 0, None

    def tell(self, system: str | None) -> None:
        """Sets the system prompt from here on, or takes it away.

        Raises:
            BadData: The model's template takes none or drops it, or it holds what is no text.
        """
        told = [] if system is None else [{"role": "system", "content": _checked(system)}]
        if told and not self.is_conversation:
            raise BadData(
                "A model without a chat template takes no system prompt.", cure="Write it into the text."
            )
        if told and self._is_dropped(told[0]):
            raise BadData(
                "The model's chat template leaves a system prompt out without a word.",
                cure="Say it in the first question.",
            )
        self._system = told

    def _is_dropped(self, system: dict[str, Any]) -> bool:
        """Whether another system prompt would make the same tokens."""
        asked, place = {"role": "user", "content": "?"}, "the system prompt"
        other = {**system, "content": f"{system['content']}?"}
        ids, others = (self.contract.prompt_ids([each, asked], place=place) for each in (system, other))
        return ids == others

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer, a piece of text for each token, which may be empty; `reply` is there after the last.

        Whoever stops early closes it: what was written by then is the answer. A question that could not be
        answered leaves the conversation as it was.

        Raises:
            BadData: The question is longer than the model's context, or the template refuses it.
            DoesNotFit: Memory ran out.
        """
        asked = {"role": "user", "content": _checked(question)}
        ids, left_out = self._fitting([*self._turns, asked])
        sent = _Sent(asked, len(ids), left_out)
        room = min(self._manner.longest, self.context - len(ids))
        text = TextStream(self.contract)
        ending: Ending = "stopped"
        try:
            with closing(self._tokens(ids, room)) as tokens:
                for token in tokens:
                    yield text.add(token)
            cut: Ending = "longest" if room == self._manner.longest else "context"
            ending = "end" if text.tokens < room else cut
            yield text.finish()
        except GeneratorExit:
            self._keep(sent, text, ending)
            raise
        self._keep(sent, text, ending)

    def _keep(self, sent: _Sent, text: TextStream, ending: Ending) -> None:
        self._left_out = sent.left_out
        question = sent.asked["content"]
        self.reply = Reply(question, text.text, sent.tokens, text.tokens, ending, sent.left_out)
        if self.is_conversation and (text.tokens or ending == "end"):
            self._turns += [sent.asked, {"role": "assistant", "content": text.text}]

    def _tokens(self, ids: Sequence[int], room: int) -> Generator[int, None, None]:
        if self._kept_of != self._whose:
            self._kept, self._kept_of = Kept(), self._whose
        written = stream(
            self.model,
            ids,
            max_new_tokens=room,
            end_ids=self.contract.end_ids,
            sampling=self._sampling,
            kept=self._kept,
        )
        try:
            while (token := self._next(written)) is not None:
                if isinstance(token, RanOut):
                    raise self._does_not_fit(len(ids))
                yield token
        finally:
            written.close()

    def _next(self, written: Iterator[int]) -> int | RanOut | None:
        """The next token; between two of them the model is others'."""
        with self._voice():
            return attempt(lambda: next(written, None))

    def _voice(self) -> AbstractContextManager[None]:
        if self.uses_adapter:
            if not self.adapters:
                return nullcontext()
            assert isinstance(self.model, Swap)
            return self.model.using(*self.adapters)
        assert isinstance(self.model, Adapted), "only an adapter can be switched off"
        return without_adapter(self.model)

    @property
    def _whose(self) -> tuple[object, ...] | bool:
        """Who answers, as whom the model has read what it keeps."""
        if self.uses_adapter and not self.adapters and isinstance(self.model, Swap):
            return self.model.chosen
        return self.adapters or True if self.uses_adapter else False

    def _does_not_fit(self, tokens: int) -> DoesNotFit:
        self._kept = Kept()
        device = device_of(self.model)
        free_memory(device)
        return DoesNotFit(
            f"Memory ran out on {device} while answering {tokens:,} tokens of conversation.",
            cure="Begin anew (/new), ask for shorter answers (--longest), or close what else takes memory.",
        )

    def _fitting(self, turns: Sequence[dict[str, Any]]) -> tuple[list[int], int]:
        """The tokens of the conversation, and how many of its oldest turns had to be left out."""
        if not self.is_conversation:
            return self._short_enough(self.contract.text_ids(turns[-1]["content"])), 0
        room = min(self._manner.longest, self.context // 2)
        for first in range(self._left_out, len(turns), 2):  # a question and its answer at a time
            ids = self.contract.prompt_ids([*self._system, *turns[first:]], place="the conversation")
            if len(ids) + room <= self.context:
                return ids, first
        return self._short_enough(ids), first

    def _short_enough(self, ids: list[int]) -> list[int]:
        if len(ids) < self.context:
            return ids
        raise BadData(
            f"The question comes to {len(ids):,} tokens; this model reads {self.context:,} at most, "
            "its answer included.",
            cure="Ask a shorter one.",
        )


def _sampling_of(manner: Manner) -> Sampling | None:
    if manner.temperature < _GREEDY_BELOW:
        return None
    generator = torch.Generator()
    if manner.seed is None:
        generator.seed()
    else:
        generator.manual_seed(manner.seed)
    return Sampling(manner.temperature, manner.top_p, generator)


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadData("What was asked is no UTF-8 text.", cure="Set the terminal to UTF-8.") from None
    return text
