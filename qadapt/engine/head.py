"""What makes logits of hidden states: a head, and what its architecture does with the logits after it.

The head's own module is called, so it may be of any type: 16 or 32 bits, int8, NF4, with hooks that train
rows of new tokens. Knows no loss.

Legend: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapt.engine.host_head import HostHead

PLAIN = frozenset({
    "bloom", "exaone4", "falcon", "gemma", "glm", "glm4", "gpt2", "gpt_neox", "gpt_oss", "llama",
    "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip
"""Architectures whose logits are what the head gives."""
SCALED = {
    **dict.fromkeys(("gemma2", "gemma3_text"), "final_logit_softcapping"),
    **dict.fromkeys(("granite", "granitemoe", "granitemoeshared"), "logits_scaling"),
    **dict.fromkeys(("cohere", "cohere2"), "logit_scale"),
}
"""Architecture → the field of its configuration that says what happens to them."""


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: module, then scale, then cap: `softcap * tanh(logits / softcap)`.

    `trained` are the parameters that the module computes with and that need gradients.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    trained: tuple[nn.Parameter, ...] = ()

    def after(self, logits: Tensor, *, keeps_tanh: bool) -> tuple[Tensor, Tensor | None]:
        """Scale and cap, in fp32 and in place, as each copy would be as large; fp32 logits are overwritten.

        With a cap its tanh comes, too, if it is to be kept for the way back.
        """
        values, tanh = logits.float(), None
        if self.scale != 1:
            values.mul_(self.scale)
        if self.softcap is not None:
            values.div_(self.softcap).tanh_()
            tanh = values.clone() if keeps_tanh else None
            values.mul_(self.softcap)
        return values, tanh

    def go_back(self, gradient: Tensor, tanh: Tensor | None) -> None:
        """Overwrites the gradient of what `after` made with that of the logits; `tanh` too."""
        if tanh is not None:
            gradient.mul_(tanh.square_().neg_().add_(1))
        if self.scale != 1:
            gradient.mul_(self.scale)


def head_of(model: PreTrainedModel) -> Head | None:
    """A model's head; None if it is not known what its architecture does with the logits."""
    kind = str(model.config.model_type)
    if kind not in (*PLAIN, *SCALED):
        return None
    module = model.get_output_embeddings()
    trained = _trained(module, model.get_input_embeddings())
    if kind in PLAIN:
        return Head(module, trained=trained)
    value = model.config.to_dict()[SCALED[kind]]
    if SCALED[kind] == "final_logit_softcapping":
        return Head(module, softcap=value, trained=trained)
    return Head(module, scale=1 / value if SCALED[kind] == "logits_scaling" else value, trained=trained)


def _trained(head: nn.Module, embedding: nn.Module) -> tuple[nn.Parameter, ...]:
    if isinstance(head, HostHead):
        return ()
    # of a tied head the new rows are the embedding's, too
    tables = (head, embedding) if head.weight is embedding.weight else (head,)
    return tuple(each for table in tables for each in table.parameters() if each.requires_grad)
