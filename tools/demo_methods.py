"""The demo's task learned by one adapter method after the other, in as many steps on the same rows: a table.

    python tools/demo --method dora --method ia3     these
    python tools/demo --method all                   every one; minutes each on two CPU cores

Each is trained by its recipe (`recipes/adapters/`; LoRA: the demo's own), unless its run is there already;
so are first the adapters that another attends over or stands on.
Nothing is left out of the table: what does worse stands there, too.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import demo_task
import environment

if TYPE_CHECKING:
    from rich.console import Console

ALL = "all"
_LORA = "quickstart-smollm2-135m", "quickstart"
MAX_NEW_TOKENS = 48  # the longest right answer has about 40


@dataclass(frozen=True)
class Learned:
    """What a method came to.

    Attributes:
        title: The method.
        trainable: Trained numbers.
        share: Of all numbers of the model.
        file_bytes: Of the adapter's tensors on disk.
        tokens_per_second: The median step's.
        peak_bytes: The highest of the training, above the level after imports.
        loss: Of the held-out rows, the best.
        exact: Share of exact answers to them.
    """

    title: str
    trainable: int
    share: float
    file_bytes: int
    tokens_per_second: float
    peak_bytes: int
    loss: float
    exact: float


def known_methods() -> tuple[str, ...]:
    """Methods that have a recipe."""
    return "lora", *sorted(path.stem for path in (environment.ROOT / "recipes" / "adapters").glob("*.yaml"))


def recipe_and_run(method: str) -> tuple[str, str]:
    """Name of the recipe of a method, and of the run it makes."""
    return _LORA if method == "lora" else (f"adapters/{method}", method)


def with_first_stages(methods: tuple[str, ...]) -> tuple[str, ...]:
    """The methods to train, each after those whose adapters it builds on."""
    from qadapt.recipe_file import read_recipe
    from qadapt.stacking import built_on

    found: list[str] = []
    for method in methods:
        section = read_recipe(recipe_and_run(method)[0]).adapter
        found += [*built_on(section.method, section.targets), method]
    return tuple(dict.fromkeys(found))


def is_trained(method: str) -> bool:
    """Whether its run is there and finished."""
    from qadapt.adapters.facts import own_files

    adapter = environment.ROOT / "runs" / recipe_and_run(method)[1] / "adapter"
    return (adapter / own_files(adapter)[0]).is_file()


def answered(tuned: Any, prompts: list[list[demo_task.Message]]) -> list[str]:
    """Greedy answers of a loaded run, each cut at the same length."""
    from qadapt.model.generate import generate

    answers = generate(
        tuned.model,
        [tuned.contract.prompt_ids(prompt) for prompt in prompts],
        max_new_tokens=MAX_NEW_TOKENS,
        end_ids=tuned.contract.end_ids,
        pad_id=tuned.contract.pad_id,
    )
    return [str(tuned.contract.tokenizer.decode(answer)) for answer in answers]


def learned(method: str) -> Learned:
    """What the run of a method measured, and what its model answers now."""
    import qadapt
    from qadapt.adapters.facts import own_files
    from qadapt.events import AdapterAttached, Evaluated, MemoryMeasured, StepDone
    from qadapt.methods import METHODS
    from qadapt.recipe_file import read_recipe
    from qadapt.stacking import stands_on
    from qadapt.view.journal import effective, read_events

    runs, name = environment.ROOT / "runs", recipe_and_run(method)[1]
    events = effective(read_events(runs / name))
    (attached,) = [event for event in events if isinstance(event, AdapterAttached)][-1:]
    tuned = qadapt.load(name, folder=str(runs))
    rows = demo_task.make_rows(demo_task.HELD_OUT_ROWS, 0, held_out=True)
    answers = answered(tuned, [demo_task.prompt(row) for row in rows])
    adapter, section = runs / name / "adapter", read_recipe(recipe_and_run(method)[0]).adapter
    on = stands_on(section.targets)
    return Learned(
        title=METHODS[section.method].title + (f", on {on}" if on else ""),
        trainable=attached.trainable,
        share=attached.trainable / (attached.trainable + attached.base_parameters),
        file_bytes=(adapter / own_files(adapter)[0]).stat().st_size,
        tokens_per_second=statistics.median(e.tokens / e.seconds for e in events if isinstance(e, StepDone)),
        peak_bytes=max(event.peak_bytes for event in events if isinstance(event, MemoryMeasured)),
        loss=min(event.loss for event in events if isinstance(event, Evaluated)),
        exact=demo_task.score(answers, rows),
    )


def show(found: list[Learned], console: Console | None = None) -> None:
    """Prints the table, which fits in 80 columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from qadapt.units import format_bytes

    title = f"\none task, one budget, {len(found)} methods"
    narrow: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": 0}
    table = Table(title=title, title_justify="left", **narrow)
    table.add_column("method")
    for column in ("trained", "share", "adapter", "tokens\nper s", "peak", "held-out\nloss", "exact"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in found:
        table.add_row(
            each.title,
            f"{each.trainable:,}",
            f"{each.share:.2%}",
            format_bytes(each.file_bytes),
            f"{each.tokens_per_second:.0f}",
            format_bytes(each.peak_bytes),
            f"{each.loss:.4f}",
            f"{each.exact:.1%}",
        )
    (console or Console()).print(table)
