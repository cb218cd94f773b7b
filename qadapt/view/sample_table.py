"""Sample answers side by side: what the base says on the left, what it says with the adapter on the right.

A rich renderable, cut to the width it is given: three lines for each prompt. Knows no run and no clock.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from qadapt.events import Sampled
from qadapt.view.lines import cut_text

ANSWER_LINES = 2


@dataclass(frozen=True)
class SampleTable:
    """The latest answers to some prompts.

    Args:
        samples: One for each prompt.
    """

    samples: tuple[Sampled, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        column = (width - 3) // 2
        for sample in self.samples:
            yield _question(sample, width=width)
            answers = Table.grid(padding=(0, 1))
            answers.add_column(width=column, style="dim")
            answers.add_column(width=1, style="dim")
            answers.add_column(width=column)
            answers.add_row(_cut(sample.base_answer, column), "│\n│", _cut(sample.answer, column))
            yield answers


def _question(sample: Sampled, *, width: int) -> Text:
    right = f"{sample.divergence:.3g} nats from the base"
    left = cut_text(sample.prompt, max(0, width - len(right) - 2))
    return Text(f"{left:<{max(0, width - len(right))}}{right}"[:width], style="bold", no_wrap=True)


def _cut(answer: str, width: int) -> Text:
    lines = textwrap.wrap(" ".join(answer.split()), width, max_lines=ANSWER_LINES, placeholder=" …")
    return Text("\n".join(lines))
