"""A model folder as anybody would load it: by transformers alone, its logits beside those of the proof.

In fp32 in the host's memory if it has room, otherwise by the library's own offload to disk, where weights
stay in the files until their module runs. Weights in 4 bits are not taken from disk by the library: they are
always in memory, where they take a quarter of the room. Knows nothing of adapters.

Legend: n learned tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qadapt.errors import BadExport
from qadapt.export.learned_tokens import Batch
from qadapt.model.folder import read_config
from qadapt.units import GIB

IN_MEMORY, FROM_DISK = "in memory", "from disk"
_ON_DISK = {
    **dict.fromkeys(("lm_head", "model.embed_tokens", "model.layers"), "disk"),
    **dict.fromkeys(("model.norm", "model.rotary_emb"), "cpu"),
}
"""Where the parts of all families of `shape.FAMILIES` are, if memory is short."""
_IN_MEMORY = {"": "cpu"}
"""Said, as without a map the library puts weights in 4 bits onto a card, and the rows are here."""
_SPARE_BYTES = 2 * GIB
_CURE = "Export again; if it is so every time, it is a bug of qadapt."


@dataclass(frozen=True)
class PlainLoad:
    """How plain transformers loaded the files, and how far its logits are from the proof's.

    Attributes:
        how: `in memory` or `from disk`.
        tokens: Of so many tokens the logits were compared.
        difference: The largest one, as a share of the largest logit.
    """

    how: str
    tokens: int
    difference: float


def load_plainly(folder: Path, batch: Batch, expected: Tensor, *, from_disk: bool | None = None) -> PlainLoad:
    """Loads a folder with transformers and compares logits.

    Args:
        folder: A whole model folder.
        batch: The rows to compare on.
        expected: (n, V) logits that predict their learned tokens.
        from_disk: Whether weights stay on disk; None: if the host's memory is too small for them in fp32.

    Raises:
        BadExport: transformers cannot load the files, or would make up what they lack.
    """
    if from_disk is None:
        weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        is_short = 2 * weight_bytes + _SPARE_BYTES > psutil.virtual_memory().available
        from_disk = is_short and "quantization_config" not in read_config(folder, name=folder.name)
    model = _loaded(folder, from_disk=from_disk)
    with torch.no_grad():
        kept = {"logits_to_keep": batch.content.positions}
        logits = model(input_ids=batch.content.input_ids, use_cache=False, **kept).logits  # (B, K, V)
    found, wanted = batch.learned_of(logits).float(), expected.float().cpu()
    difference = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
    return PlainLoad(FROM_DISK if from_disk else IN_MEMORY, len(found), float(difference))


def _loaded(folder: Path, *, from_disk: bool) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            device_map=_ON_DISK if from_disk else _IN_MEMORY,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise BadExport(f"transformers cannot load the export: {reason}", cure=_CURE) from None
    model, found = loaded
    for what in ("missing", "unexpected"):
        if names := sorted(found[f"{what}_keys"]):
            raise BadExport(f"transformers finds {what} tensors in the export: {names[0]}.", cure=_CURE)
    whole: PreTrainedModel = model.eval()
    return whole
