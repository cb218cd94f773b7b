"""AdaLoRA (arXiv:2303.10512) through PEFT: LoRA that starts wider and gives up its least important triplets.

`adapter.rank` is what a layer has on average in the end; each starts with half as many again, as in the
paper. What is given up when is in `rank_budget.py`, what a layer computes in `triplets.py`. λ starts at zero,
so the first forward pass is the base's to the bit.
"""

from __future__ import annotations

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from qadapt.adapters.lora import Lora, check_rank, chosen_layers, put_beside
from qadapt.adapters.triplets import use_triplet_layers
from qadapt.plan.ranks import check_start, rank_schedule, trained_rank


def attach_adalora(
    model: PreTrainedModel, lora: Lora, *, steps: int, dtype: torch.dtype, seed: int
) -> PeftModel:
    """The base with triplets on the chosen layers, which alone are trainable.

    Args:
        model: The frozen base.
        lora: Its rank is that of the end; the scale is alpha / rank.
        steps: Of the run, over which triplets are given up.
        dtype: Type of what is trained.
        seed: Of P and Q.

    Raises:
        BadRecipe: A target matches no linear layer, a layer is too narrow, or the steps are too few.
    """
    chosen = chosen_layers(model, lora.targets)
    check_rank(lora.rank, chosen)
    check_start("adalora", lora.rank, narrowest=min(chosen.values()))
    schedule, start = rank_schedule(steps), trained_rank("adalora", lora.rank)
    config = AdaLoraConfig(
        init_r=start,
        target_r=lora.rank,
        lora_alpha=lora.alpha * start / lora.rank,
        lora_dropout=lora.dropout,
        target_modules=list(chosen),
        total_step=steps,
        tinit=schedule.before,
        tfinal=schedule.after,
        deltaT=schedule.every,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    put_beside(adapted, dtype=dtype)
    use_triplet_layers(adapted)
    return adapted
