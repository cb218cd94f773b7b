"""Whether an export computes as its base does: config.json against the base's, field by field.

Tensors that are right make another model with other rotary positions or another activation, and only on the
dequantized base does the live model's behaviour show it. Knows no numbers.
"""

from __future__ import annotations

from pathlib import Path

from qadapt.export.tensor_fault import OTHER_CONFIG, Fault
from qadapt.model.folder import read_config
from qadapt.model.skeleton import config_of

_MAY_DIFFER = frozenset(
    {"_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "tie_word_embeddings",
     "torch_dtype", "transformers_version", "vocab_size"}
)  # fmt: skip
"""What a merge may change, each held against the tensors elsewhere, and what decides no number."""


def config_faults(folder: Path, model_folder: Path) -> tuple[Fault, ...]:
    """What an export's config.json says otherwise than the base's, as the library reads them.

    Args:
        folder: The export.
        model_folder: The base.

    Raises:
        BadModel: One of them cannot be read.
    """
    found, wanted = (
        config_of(read_config(each, name=each.name)).to_dict() for each in (folder, model_folder)
    )
    fields = sorted(({*found, *wanted}) - _MAY_DIFFER)
    return tuple(
        Fault("config.json", OTHER_CONFIG, f"{field} is {found.get(field)!r}, not {wanted.get(field)!r}")
        for field in fields
        if found.get(field) != wanted.get(field)
    )
