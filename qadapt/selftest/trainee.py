"""A small model with random weights, made here, loaded and adapted as a setting says; its gradients.

What a run does before its first step, without a recipe: the same functions in the same order as in
`running/model.py`. Knows no check. Legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.data.batches import Division, MicroBatch
from qadapt.data.tokens import Tokens, tokens_of
from qadapt.engine.arrangement import arrange
from qadapt.model.load import load_base
from qadapt.model.precision import DTYPES
from qadapt.plan.setting import Setting
from qadapt.train.optimizer import AdapterOptimizer, make_optimizer
from qadapt.train.step import StepResult, drop_gradients, find_gradient

ADAPTER_SPREAD = 0.05
"""Standard deviation of the adapters' first values: with the usual zeros half of the gradient would be 0."""


@dataclass(frozen=True)
class Size:
    """A llama's sizes; a head is 64 wide, four query heads share a key head."""

    width: int
    mlp_width: int
    layers: int
    vocabulary: int


TINY = Size(width=256, mlp_width=640, layers=2, vocabulary=512)
"""For equality: its steps take a moment on a CPU."""
MIDDLING = Size(width=2048, mlp_width=5632, layers=4, vocabulary=16384)
"""For memory and time on a card: its steps take 1 to 4 GiB, beside which small things count little."""


def make_model(folder: Path, size: Size, *, device: torch.device) -> Path:
    """Writes a model of random weights, drawn on `device`; the folder."""
    heads = size.width // 64
    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.mlp_width,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=size.vocabulary,
        max_position_embeddings=4096,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


class Trainee:
    """A model as a setting wants it, with an optimizer.

    Args:
        folder: The base.
        setting: Its types, what is recomputed, tiled and offloaded; the optimizer.
        device: Where it trains.
    """

    def __init__(self, folder: Path, setting: Setting, *, device: torch.device) -> None:
        base = load_base(
            folder,
            quantization=setting.quantization,
            double_quant=setting.double_quant,
            dtype=DTYPES[setting.compute_dtype],
            device=device,
            offload=setting.offload,
        )
        arrange(base, recompute=setting.recompute, tiles=setting.mlp_tiles, offload=setting.offload)
        lora = Lora(rank=setting.rank, alpha=setting.rank, dropout=setting.dropout, targets=setting.targets)
        self.model = attach_lora(base, lora, dtype=DTYPES[setting.adapter_dtype], seed=0).train()
        draw = torch.Generator().manual_seed(1)
        for parameter in trainable(self.model).values():
            parameter.data.copy_(ADAPTER_SPREAD * torch.randn(parameter.shape, generator=draw))
        self.optimizer: AdapterOptimizer = make_optimizer(
            trainable(self.model), kind=setting.optimizer, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.device, self.setting = device, setting

    def gradient(self, rows: Sequence[Tokens]) -> Tensor:
        """The gradient of a step of these rows, all parameters' in one row of fp32 on the CPU."""
        self.find(self.division(rows))
        return self.taken_gradient()

    def find(self, batches: Sequence[MicroBatch]) -> StepResult | None:
        """Leaves the gradient of these micro-batches in the parameters."""
        return find_gradient(self.model, self.optimizer, batches, clip_norm=None, scaler=self.new_scaler())

    def new_scaler(self) -> torch.amp.GradScaler | None:
        """Scales the loss where products are fp16."""
        if self.setting.compute_dtype != "fp16":
            return None
        return torch.amp.GradScaler(self.device.type, init_scale=1024.0)

    def taken_gradient(self) -> Tensor:
        """What lies in the parameters as their gradient; dropped there."""
        found = [
            parameter.grad.detach().float().cpu().flatten()
            for parameter in self.optimizer.parameters.values()
            if parameter.grad is not None
        ]
        drop_gradients(self.optimizer)
        return torch.cat(found)

    @property
    def division(self) -> Division:
        """How rows become micro-batches: all of them one."""
        tokens = self.setting.tokens if self.setting.packed else 0
        return Division(
            0,
            self.setting.rows,
            self.setting.packed,
            tokens=tokens,
            learned=tokens,
            loss_chunk=self.setting.loss_chunk,
        )


def random_rows(lengths: Sequence[int], *, vocabulary: int) -> list[Tokens]:
    """Rows of random tokens, the same at every call; each token after the second is learned."""
    draw = torch.Generator().manual_seed(5)
    return [
        tokens_of(
            torch.randint(3, vocabulary, (length,), generator=draw).tolist(),
            [place > 1 for place in range(length)],
            place=f"row {number}",
        )
        for number, length in enumerate(lengths, start=1)
    ]


def full_batch(setting: Setting, *, vocabulary: int) -> MicroBatch:
    """Rows of full length, every token learned, as `batch_of` of the dry run has them."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, vocabulary, (setting.rows, setting.length), generator=draw)
    positions = torch.arange(setting.length)
    return MicroBatch(ids, positions, ids, ids.numel(), ids.numel(), loss_chunk=setting.loss_chunk)
