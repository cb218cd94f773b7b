"""What the model answers to a few prompts in the middle of a run, with the adapter and without it.

Beside each answer stands how far the adapter has gone from the base: KL(base || adapted) per token, over the
base's own answer. That text is what the base would say unasked, so on prompts that have nothing to do with
the rows it gauges forgetting; the prompt itself is mostly the template's. Nothing of it stays: mode and
random state are as they were, and the next gradient is bit-identical. Knows no loop and no recipe.

Legend: T tokens of prompt and answer, K positions that predict the answer and its end, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from qadapt.adapters.lora import without_adapter
from qadapt.data.prompt import PromptContract
from qadapt.engine.host import device_of
from qadapt.engine.out_of_memory import RanOut, attempt, free_memory
from qadapt.events import Event, Sampled, Warned
from qadapt.model.generate import generate
from qadapt.train.checkpoint import random_state, restore_random_state

ANSWER_TOKENS = 64
"""An answer is cut off here: enough to see its form, short enough to come often."""


OneByOne = Callable[[Iterable[list[int]]], Iterator[list[int]]]


class Samples:
    """A few prompts that are asked again and again.

    Args:
        model: The adapted model.
        contract: How it is asked. Without a chat template it continues the prompt's text.
        prompts: What it is asked.

    Raises:
        BadData: The template refuses a prompt.
    """

    def __init__(self, model: PeftModel, contract: PromptContract, prompts: Sequence[str]) -> None:
        self._model = model
        self._contract = contract
        self._prompts = tuple(prompts)
        self._ids = [_prompt_ids(contract, prompt) for prompt in prompts]
        self._base_answers: list[list[int]] = []

    def ask(self, step: int, one_by_one: OneByOne = iter) -> Iterator[Event]:
        """Answers to all prompts after step `step`, or that there is no memory for them.

        The base is asked the first time only.

        Args:
            step: The last step that is done.
            one_by_one: Hands out the prompts' tokens; what it raises ends the asking, without a trace.
        """
        device = device_of(self._model)
        random, was_training = random_state(device), self._model.training
        try:
            found = attempt(lambda: self._sampled(step, one_by_one))
        finally:
            self._model.train(was_training)
            restore_random_state(random, device)
        if not isinstance(found, RanOut):
            yield from found
            return
        free_memory(device)
        yield Warned(
            message=f"There was no memory for the answers to train.sample_prompts: {found.said}",
            cure="Training goes on without them; shorter prompts take less.",
            step=step,
        )

    def _sampled(self, step: int, one_by_one: OneByOne) -> list[Sampled]:
        self._model.eval()
        if not self._base_answers:
            with without_adapter(self._model):
                self._base_answers = self._answers(one_by_one)
        parts = zip(self._prompts, self._ids, self._answers(one_by_one), self._base_answers, strict=True)
        return [
            Sampled(
                step=step,
                prompt=prompt,
                answer=self._contract.text(answer),
                base_answer=self._contract.text(base_answer),
                divergence=self._divergence(ids, base_answer),
            )
            for prompt, ids, answer, base_answer in parts
        ]

    def _answers(self, one_by_one: OneByOne) -> list[list[int]]:
        """One at a time: as little memory as can be, and no filling up."""
        return [self._answer(ids) for ids in one_by_one(self._ids)]

    def _answer(self, ids: Sequence[int]) -> list[int]:
        [answer] = generate(
            self._model,
            [ids],
            max_new_tokens=ANSWER_TOKENS,
            end_ids=self._contract.end_ids,
            pad_id=self._contract.pad_id,
        )
        return answer

    @torch.inference_mode()
    def _divergence(self, prompt: Sequence[int], answer: Sequence[int]) -> float:
        """KL(base || adapted) in nats per token of an answer of the base, its end counted."""
        adapted = self._log_shares(prompt, answer)
        with without_adapter(self._model):
            base = self._log_shares(prompt, answer)
        return functional.kl_div(adapted, base, log_target=True, reduction="batchmean").item()

    def _log_shares(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *answer]], device=device_of(self._model))  # (1, T)
        positions = torch.arange(len(prompt) - 1, ids.shape[1], device=ids.device)  # (K,)
        logits = self._model(input_ids=ids, logits_to_keep=positions, use_cache=False).logits[0]
        return functional.log_softmax(logits.float(), dim=-1)  # (K, V)


def _prompt_ids(contract: PromptContract, prompt: str) -> list[int]:
    if contract.template is not None:
        turns = [{"role": "user", "content": prompt}]
        return contract.prompt_ids(turns, place=f"the sample prompt {prompt!r}")
    return contract.text_ids(prompt)
