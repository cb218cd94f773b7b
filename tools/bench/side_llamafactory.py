"""LLaMA-Factory's side of `peers.py`: what `llamafactory-cli train` calls on one device. In its own venv.

Timed by a callback of its trainer. Its rows are given as it stores tokenized ones.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes  # noqa: F401 (what the imports take is no one's memory)
from datasets import Dataset, DatasetDict
from side import Task, Telling, main_task
from side_llamafactory_rows import filled, packed, real_tokens
from transformers import LlamaForCausalLM, TrainerCallback  # noqa: F401


def imported_peer() -> Any:
    """`run_exp`, once all it needs is imported.

    It imports torchaudio, for rows with sound. Builds of it on the package index need CUDA's libraries, so an
    empty module stands in for it.
    """
    sound = ModuleType("torchaudio")
    sound.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = sound
    from llamafactory.train.sft.workflow import run_sft  # noqa: F401
    from llamafactory.train.tuner import run_exp

    return run_exp


class Steps(TrainerCallback):
    """Tells each step's end, and ends the run after the last."""

    def __init__(self, telling: Telling, steps: int) -> None:
        self._telling, self._steps = telling, steps
        self.facts: dict[str, str] = {}
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        self._telling.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> Any:
        self._telling.step()
        control.should_training_stop = state.global_step >= self._steps
        inner = named["model"].get_base_model()
        held = str(inner.get_input_embeddings().weight.dtype)  # without autocast it computes in this
        self.facts = {
            "dtype": "bf16" if args.bf16 or held == "torch.bfloat16" else "fp32",
            "recompute": "all" if inner.is_gradient_checkpointing else "none",
        }
        return control


def arguments_of(task: Task, stored: Path) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if task.is_recomputing is not None:
        given["disable_gradient_checkpointing"] = not task.is_recomputing
    if task.dtype is not None:
        given["bf16"] = task.dtype == "bf16"
    if task.padding == "packed":
        given |= {"packing": True, "neat_packing": True}
    return {
        "model_name_or_path": task.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": task.rank,
        "lora_alpha": task.alpha,
        "lora_target": "all",
        "quantization_bit": 4,
        "quantization_method": "bnb",
        "double_quantization": True,
        "template": "default",
        "dataset": "kept",  # asked for and not looked at: the tokenized rows are
        "tokenized_path": str(stored),
        "cutoff_len": task.length,
        "per_device_train_batch_size": task.micro_batch,
        "gradient_accumulation_steps": task.passes_per_step,
        "num_train_epochs": 1.0,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "disable_shuffling": True,
        "optim": "adamw_torch",
        "output_dir": str(Path(task.place) / "output"),
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        **given,
    }


def main() -> None:
    task, telling = main_task()
    run_exp = imported_peer()
    telling.imported()
    rows = task.token_rows()
    rows = packed(rows, task.length) if task.padding == "packed" else filled(rows)
    stored = Path(task.place) / "rows"
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(stored))
    steps = Steps(telling, task.steps)
    run_exp(arguments_of(task, stored), callbacks=[steps])
    telling.done(tokens=real_tokens(rows, task.rows_per_step), **steps.facts)


if __name__ == "__main__":
    main()
