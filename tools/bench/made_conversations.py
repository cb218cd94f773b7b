"""Conversations of real lengths out of real English, the same for a seed: the reference texts that come with
Python (`pydoc_data`), cut at sentences. Knows nothing of qadapt.

Lengths follow what public instruction data looks like: one to five exchanges, questions of some 40 words and
answers of some 120, both log-normal, so that a few rows are very long.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

QUESTION_WORDS, ANSWER_WORDS = 40, 120
EXCHANGES = (1, 1, 1, 2, 2, 3, 5)


def made_conversations(count: int, *, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """So many lists of messages."""
    words = " ".join(topics.values()).split(" ")
    draw = random.Random(seed)

    def text(usual_words: int) -> str:
        length = max(1, round(draw.lognormvariate(0.0, 0.9) * usual_words))
        first = draw.randrange(len(words) - length) if length < len(words) else 0
        return " ".join(words[first : first + length]).strip() or "Yes."

    for _ in range(count):
        messages = []
        if draw.random() < 0.3:
            messages.append({"role": "system", "content": text(15)})
        for _ in range(draw.choice(EXCHANGES)):
            messages.append({"role": "user", "content": text(QUESTION_WORDS)})
            messages.append({"role": "assistant", "content": text(ANSWER_WORDS)})
        yield messages


def write_conversations(path: Path, count: int, *, seed: int = 0) -> None:
    """The same as a file of JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for messages in made_conversations(count, seed=seed):
            file.write(json.dumps({"messages": messages}) + "\n")
