"""Keeps the notices of other libraries off the user's screen, through their public switches.

Progress bars and advice of transformers, huggingface_hub, datasets and bitsandbytes are theirs, not ours;
what matters is said by qadapt's own events and errors. Nothing is patched and no environment variable is set.
Errors still come through as exceptions.
"""

from __future__ import annotations

import logging
import sys
import warnings

_NOISY = (
    "accelerate", "bitsandbytes", "datasets", "filelock", "fsspec", "gguf", "httpx", "huggingface_hub",
    "peft", "torch", "transformers", "urllib3",
)  # fmt: skip


def quiet_libraries() -> None:
    """Silences library notices; call it again after an import to reach switches of what is loaded by then."""
    for name in _NOISY:
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    if "datasets" in sys.modules:
        from datasets import disable_progress_bars as disable_bars_of_datasets

        disable_bars_of_datasets()
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()
