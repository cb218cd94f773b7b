"""The loss over learned tokens only: no other position reaches the head, so most logits never exist.

Legend: B rows, K positions, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from qadapt.engine.documents import Documents


def loss_sum(
    model: nn.Module,
    *,
    input_ids: Tensor,
    positions: Tensor,
    targets: Tensor,
    ignored: int,
    documents: Documents | None = None,
) -> Tensor:
    """The summed cross-entropy of the learned tokens of a micro-batch, in fp32.

    The model's own `logits_to_keep` picks the positions before the head, so soft-capping and logit scales of
    the architecture apply as published.

    Args:
        model: A causal language model, adapted or not.
        input_ids: (B, T), filled up at the end; attention is causal, so no mask is needed.
        positions: (K,) whose prediction is learned in at least one row.
        targets: (B, K) the next token, or `ignored`.
        ignored: The target that does not count.
        documents: Where the documents of a packed row lie; the model must be `isolating` them.
    """
    packed = {} if documents is None else {"position_ids": documents.position_ids, "documents": documents}
    logits = model(input_ids=input_ids, logits_to_keep=positions, use_cache=False, **packed).logits
    return functional.cross_entropy(  # of (B, K, V)
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=ignored, reduction="sum"
    )
