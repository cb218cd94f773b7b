"""Whether rows of a step are laid one after another: for which models, and what that saves. No torch."""

from __future__ import annotations

PACKABLE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
"""Architectures whose packed rows are shown to give the numbers of one document at a time, by `model_type`
(`tests/test_packing.py`). Not among them, and refused: those whose attention does not come from
transformers' interface (Falcon), and those that carry a state from token to token past it."""
