"""Asks a model for text: in batches or token by token, the same for the base, an adapter and a merged model.

One loop for both: the prompts go through the model once, then each token alone, with its cache of keys and
values. What comes is the most likely token, or one drawn as asked; what a model's generation_config.json says
of penalties and the like, which the library's own `generate` mixes in, plays no part. Knows tokens, not
conversations (`data/prompt.py` renders those).

Legend: B prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, takewhile

import torch
from torch import Tensor, nn
from transformers import Cache, TemperatureLogitsWarper, TopPLogitsWarper

from qadapt.engine.adapted import AskedByRow
from qadapt.engine.front import in_front
from qadapt.engine.host import device_of
from qadapt.engine.out_of_memory import RanOut, attempt, free_memory
from qadapt.errors import BadModel

Choose = Callable[[Tensor], Tensor]
"""The next tokens (B,) out of their scores (B, V)."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: from their probabilities at a temperature, out of the likeliest.

    Attributes:
        temperature: Above 0.
        top_p: The likeliest tokens that come to this share together are drawn from (arXiv:1904.09751).
        generator: Where the draws come from, on the CPU: the same on every device.
    """

    temperature: float
    top_p: float = 1.0
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __call__(self, scores: Tensor) -> Tensor:
        """Tokens (B,) drawn by their scores (B, V)."""
        nothing = torch.empty(
            len(scores), 0, dtype=torch.long
        )  # the tokens so far, which decide nothing here
        scores = scores - scores.amax(-1, keepdim=True)  # a low temperature would make them infinite
        scores = TemperatureLogitsWarper(self.temperature)(nothing, scores)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(nothing, scores)
        return torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self.generator)[:, 0].to(
            scores.device
        )


def generate(
    model: nn.Module,
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
        prompts: Token ids, each prompt of its own length; shorter ones are filled up on the left,
            and all get the virtual tokens that the model has.
        max_new_tokens: Where an answer is cut off.
        end_ids: Tokens that end an answer.
        pad_id: The token that fills up.
        batch: Prompts answered at once; fewer, where memory runs out.

    Raises:
        OutOfMemoryError: A single prompt does not fit.
    """
    prompts = _with_front(model, prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    was_training = model.training
    model.eval()
    answers: dict[int, list[int]] = {}
    try:
        while waiting := order[len(answers) :]:
            chosen = waiting[:batch]
            asked = [prompts[index] for index in chosen]
            answer = partial(
                _answers, model, asked, max_new_tokens=max_new_tokens, end_ids=end_ids, pad_id=pad_id
            )
            with _asking(model, chosen):
                rows = attempt(answer)
            if not isinstance(rows, RanOut):
                answers.update(zip(chosen, rows, strict=True))
                continue
            if len(chosen) == 1:
                raise torch.OutOfMemoryError(rows.said)
            free_memory(device_of(model))
            batch = len(chosen) // 2
    finally:
        model.train(was_training)
    return [answers[index] for index in range(len(prompts))]


def _with_front(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts behind the virtual tokens that the model has, for each prompt its own."""
    fronted = []
    for place, prompt in enumerate(prompts):
        with _asking(model, [place]):
            fronted.append(in_front(model, prompt))
    return fronted


def _asking(model: nn.Module, prompts: Sequence[int]) -> AbstractContextManager[None]:
    """While open, each of these prompts, by its place, is a row of the batch."""
    return model.batch_of(prompts) if isinstance(model, AskedByRow) else nullcontext()


@dataclass
class Kept:
    """What a model has read of a conversation, for the next prompt that begins alike.

    Attributes:
        ids: Its tokens, the first `read` of which were read.
        read: How many that are.
        cache: Their keys and values.
    """

    ids: list[int] = field(default_factory=list)
    read: int = 0
    cache: Cache | None = None

    def taken(self, prompt: Sequence[int]) -> tuple[Cache | None, int]:
        """The cache, cut to the beginning that a prompt shares, and the tokens of that; nothing stays here.

        The last token of a prompt is always left to be read: its scores are not kept. Windows, whose caches
        lack what is behind them, are read anew; so is what a forward pass left halfway through its layers,
        and what has other entries than those of its tokens.
        """
        pairs = zip(self.ids[: self.read], prompt[:-1], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        cache, read = self.cache, self.read
        self.ids, self.read, self.cache = [], 0, None
        if cache is None or not same or any(cache.is_sliding):
            return None, 0
        if any(cache.get_seq_length(layer) != read for layer in range(len(cache.layers))):
            return None, 0
        cache.crop(same - read)
        return cache, same


def stream(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    end_ids: frozenset[int],
    sampling: Sampling | None = None,
    kept: Kept | None = None,
) -> Generator[int, None, None]:
    """The answer to one prompt, token by token as they come, without its end token.

    Whoever stops early closes it; until its end, the model is in evaluation mode.

    Args:
        model: As in `generate`.
        prompt: Token ids.
        max_new_tokens: Where the answer is cut off.
        end_ids: Tokens that end it.
        sampling: How tokens are drawn; None: greedy, as `generate` answers.
        kept: What was read for an earlier prompt, of which the beginning that both share is not read again;
            in the end what was read for this one.

    Raises:
        BadModel: The scores are no numbers.
        OutOfMemoryError: It does not fit.
    """
    was_training = model.training
    model.eval()
    try:
        prompt = in_front(model, prompt)
        ids, choose = list(prompt), partial(_chosen, sampling or _likeliest)
        cache, read = (None, 0) if kept is None else kept.taken(prompt)
        written = _written(model, [prompt], pad_id=0, choose=choose, cache=cache, read=read)
        for tokens, cache in islice(written, max_new_tokens):
            if kept is not None:
                kept.ids, kept.read, kept.cache = ids, len(ids), cache
            token = int(tokens)
            if token in end_ids:
                return
            ids.append(token)
            yield token
    finally:
        model.train(was_training)


def _likeliest(scores: Tensor) -> Tensor:
    return scores.argmax(-1)


def _chosen(choose: Choose, scores: Tensor) -> Tensor:
    """The next tokens, if there is anything to choose by."""
    if not scores.amax(-1).isfinite().all():
        raise BadModel(
            "The model computes scores that are no numbers (NaN or infinite).",
            cure="If it is an fp16 model, export it as merged-bf16: fp16 overflows above 65,504.",
        )
    return choose(scores)


def _written(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    choose: Choose = _likeliest,
    cache: Cache | None = None,
    read: int = 0,
) -> Iterator[tuple[Tensor, Cache]]:
    """The tokens (B,) that follow the prompts, one after another, without end, and the cache they came from.

    The first `read` tokens of the prompts are in `cache` already.
    """
    longest, device = max(map(len, prompts)), device_of(model)
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])  # (B, T)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    ids, mask, places = ids[:, read:].to(device), mask.to(device), places[:, read:].to(device)
    while True:
        with torch.inference_mode():
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            tokens = choose(output.logits[:, -1].float())  # (B,)
        cache = output.past_key_values
        yield tokens, cache
        ids, places = tokens[:, None], places[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def _answers(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: frozenset[int],
    pad_id: int,
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    for tokens, _ in islice(_written(model, prompts, pad_id=pad_id), max_new_tokens):
        chosen = tokens.tolist()
        unfinished = {row for row in unfinished if chosen[row] not in end_ids}
        for row in unfinished:
            answers[row].append(chosen[row])
        if not unfinished:
            break
    return answers
