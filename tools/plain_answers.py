"""Answers prompts with an exported model and plain `transformers`, as anybody would; qadapt is not imported.

    python tools/plain_answers.py FOLDER < conversations.json > answers.json

Input: `{"conversations": [[message, ...], ...], "max_new_tokens": 48}`; output: a list of texts. Greedy.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

Message = dict[str, str]


def answers(folder: str, conversations: list[list[Message]], *, max_new_tokens: int) -> list[str]:
    """The model's greedy answers; 16-bit on a GPU, 32-bit arithmetic on the 16-bit weights on a CPU."""
    has_gpu = torch.cuda.is_available()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if has_gpu else torch.float32)
    model = model.to("cuda" if has_gpu else "cpu").eval()
    inputs = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    texts: list[str] = tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return texts


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    task = json.loads(sys.stdin.buffer.read())
    told = answers(sys.argv[1], task["conversations"], max_new_tokens=task["max_new_tokens"])
    sys.stdout.write(json.dumps(told))
