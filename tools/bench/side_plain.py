"""The plain side of `peers.py`: transformers, bitsandbytes and PEFT, put together as documented.

The loss is `F.cross_entropy` over all logits; a step's gradient is that of the mean over its learned tokens.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes  # noqa: F401 (what the imports take is no one's memory)
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from side import IGNORED, Task, Telling, main_task
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM  # noqa: F401

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def adapted(task: Task, dtype: torch.dtype) -> Any:
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base: Any = AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype, quantization_config=quantized)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    if task.is_recomputing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if task.adapter is not None:
        model: Any = PeftModel.from_pretrained(base, task.adapter, is_trainable=True)
    else:
        torch.manual_seed(0)
        config = LoraConfig(
            r=task.rank, lora_alpha=task.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, config)
    return model.train()


def batch_of(rows: list[dict[str, list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels, (B, T) each, filled up to the longest."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.tensor(row["input_ids"])
        labels[index, :length] = torch.tensor(row["labels"])
        mask[index, :length] = 1
    return ids, mask, labels


def train(task: Task, telling: Telling, model: Any) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    rows = task.token_rows()
    telling.begin()
    for step in range(task.steps):
        part = rows[step * task.rows_per_step : (step + 1) * task.rows_per_step]
        learned = sum(label != IGNORED for row in part for label in row["labels"][1:])
        total = 0.0
        for first in range(0, len(part), task.micro_batch):
            ids, mask, labels = batch_of(part[first : first + task.micro_batch])
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1),
                labels[:, 1:].flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            (loss / learned).backward()
            total += loss.item() / learned
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        telling.step(tokens=sum(len(row["input_ids"]) for row in part), loss=total)


def main() -> None:
    task, telling = main_task()
    telling.imported()
    dtype = task.dtype or "fp32"
    train(task, telling, adapted(task, DTYPES[dtype]))
    telling.done(dtype=dtype, recompute="all" if task.is_recomputing else "none")


if __name__ == "__main__":
    main()
