"""Asks a model for text: greedy, in batches, the same for the base, a live adapter and a merged model.

Knows tokens, not conversations (`data/prompt.py` renders those).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch
from transformers import GenerationConfig, PreTrainedModel

from qadapt.engine.host import device_of
from qadapt.engine.out_of_memory import RanOut, attempt, free_memory


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: frozenset[int],
    pad_id: int,
    batch: int = 16,
) -> list[list[int]]:
    """The greedy answers to some prompts, without their end token, in the order of the prompts.

    Args:
        model: A causal language model, with adapters or without; its training mode is left as it was.
        prompts: Token ids, each prompt of its own length; shorter ones are filled up on the left.
        max_new_tokens: Where an answer is cut off.
        end_ids: Tokens that end an answer.
        pad_id: The token that fills up.
        batch: Prompts answered at once; fewer, where memory runs out.

    Raises:
        OutOfMemoryError: A single prompt does not fit.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_ids),
        pad_token_id=pad_id,
        use_cache=True,
    )
    was_training = model.training
    model.eval()
    answers: dict[int, list[int]] = {}
    try:
        while waiting := order[len(answers) :]:
            chosen = waiting[:batch]
            asked = [prompts[index] for index in chosen]
            rows = attempt(partial(_answer_rows, model, asked, settings=settings, pad_id=pad_id))
            if not isinstance(rows, RanOut):
                answers.update(zip(chosen, (_until_end(row, end_ids) for row in rows), strict=True))
                continue
            if len(chosen) == 1:
                raise torch.OutOfMemoryError(rows.said)
            free_memory(device_of(model))
            batch = len(chosen) // 2
    finally:
        model.train(was_training)
    return [answers[index] for index in range(len(prompts))]


def _answer_rows(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, settings: GenerationConfig, pad_id: int
) -> list[list[int]]:
    longest, device = max(map(len, prompts)), model.device  # the library's idea of it (`model/placement.py`)
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
        )
    rows: list[list[int]] = output[:, longest:].tolist()
    return rows


def _until_end(row: Sequence[int], end_ids: frozenset[int]) -> list[int]:
    ends = (index for index, token in enumerate(row) if token in end_ids)
    return list(row[: next(chain(ends, [len(row)]))])
