"""Writes the README's table of cards against models, by the closed form.

    python tools/readme.py    rewrites what stands between the two marks in README.md

Run it after a change of the estimate. `tests/test_readme.py` checks that the table is still true.
"""

from __future__ import annotations

from pathlib import Path

from qadapt.hardware.cards import find_card
from qadapt.shape import find_shape
from qadapt.view.catalogue import cards_table

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- cards: begin -->", "<!-- cards: end -->"
CARDS = (
    "RTX 4060 8GB",
    "RTX 3060 12GB",
    "RTX 4070 12GB",
    "RTX 4060 Ti 16GB",
    "RTX 4090 24GB",
    "RTX 5090 32GB",
)
MODELS = (
    "SmolLM2-1.7B",
    "Phi-3-mini-128k-instruct",
    "Mistral-7B-v0.3",
    "Qwen2.5-7B",
    "Llama-3.1-8B",
    "Gemma-2-9B",
)
LENGTH = 131_072
SUPERVISED_SHARE = 0.4
"""Answers are about this share of a conversation's tokens; only they reach the head."""


def table() -> str:
    """The table in Markdown."""
    shapes = [find_shape(name) for name in MODELS]
    cards = [find_card(name) for name in CARDS]
    return cards_table(shapes, cards, LENGTH, supervised_share=SUPERVISED_SHARE).markdown()


def with_table(text: str) -> str:
    """The README with its table written anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
