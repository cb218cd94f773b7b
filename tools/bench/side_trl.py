"""TRL's side of `peers.py`: `SFTTrainer` as its command `trl sft` makes it, 4-bit and LoRA. In its own venv.

Timed by a callback of the trainer. It takes the rows in order, so their lengths say each step's real tokens.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes  # noqa: F401 (what the imports take is no one's memory)
from datasets import Dataset
from peft import PeftModel  # noqa: F401
from side import Task, Telling, main_task
from transformers import LlamaForCausalLM, TrainerCallback  # noqa: F401
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config


class Steps(TrainerCallback):
    """Tells each step's end, and ends the run after the last."""

    def __init__(self, telling: Telling, steps: int) -> None:
        self._telling, self._steps = telling, steps

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._telling.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self._telling.step()
        control.should_training_stop = state.global_step >= self._steps
        return control


def trainer_of(task: Task, telling: Telling) -> SFTTrainer:
    """A trainer of the task; it takes the rows in the order they have, packed or not."""
    given: dict[str, Any] = {}
    if task.is_recomputing is not None:
        given["gradient_checkpointing"] = task.is_recomputing
    if task.dtype is not None:
        given["bf16"] = task.dtype == "bf16"
    model = ModelConfig(
        model_name_or_path=task.model,
        load_in_4bit=True,
        use_bnb_nested_quant=True,
        use_peft=True,
        lora_r=task.rank,
        lora_alpha=task.alpha,
        lora_dropout=0.0,
        lora_target_modules=["all-linear"],
        **({"dtype": {"bf16": "bfloat16", "fp32": "float32"}[task.dtype]} if task.dtype else {}),
    )
    arguments = SFTConfig(
        output_dir=task.place,
        per_device_train_batch_size=task.micro_batch,
        gradient_accumulation_steps=task.passes_per_step,
        num_train_epochs=1,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        max_length=None if task.padding == "free" else task.length,  # rows are cut already
        packing=task.padding == "packed",
        padding_free=task.padding == "free",
        model_init_kwargs={"dtype": model.dtype},
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        **given,
    )
    return SFTTrainer(
        model=task.model,
        args=arguments,
        train_dataset=Dataset.from_list(task.token_rows()),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        callbacks=[Steps(telling, task.steps)],
    )


def main() -> None:
    task, telling = main_task()
    telling.imported()
    trainer = trainer_of(task, telling)
    trainer.train()
    size = task.passes_per_step * task.micro_batch
    counts = [len(row["input_ids"]) for row in trainer.train_dataset]
    tokens = [sum(counts[first : first + size]) for first in range(0, len(counts), size)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    telling.done(
        dtype="bf16" if trainer.args.bf16 else "fp32",
        recompute="all" if trainer.args.gradient_checkpointing else "none",
        tokens=tokens[: trainer.state.global_step],
        losses=losses,
    )


if __name__ == "__main__":
    main()
