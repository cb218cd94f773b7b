"""`qadapt estimate` and `qadapt plan`: what a step takes, and the fastest way to make it fit.

No torch, unless the exact dry run is asked for.
"""

from __future__ import annotations

import json as json_text
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from qadapt.cli.plot import check_plot, write_plot
from qadapt.cli.screen import console, error_console
from qadapt.errors import BadRecipe
from qadapt.estimating.planning import ask, ask_models, ask_recipe
from qadapt.estimating.question import Question
from qadapt.hardware.cards import cards as all_cards
from qadapt.plan.answer import CardAnswer
from qadapt.plan.inverse import What
from qadapt.plan.record import cards_record, estimate_record, models_record, most_record, plan_record
from qadapt.plan.setting import Recompute
from qadapt.shape import find_config, known_models, known_shapes

if TYPE_CHECKING:
    from rich.console import RenderableType

CardOption = Annotated[
    str | None, typer.Option(help="A card, such as `RTX 4060`; `--cards` lists them. Default: this machine.")
]
VramOption = Annotated[str | None, typer.Option(help="What is free on the card, such as 7.3GiB.")]
SupervisedOption = Annotated[
    float | None,
    typer.Option(help="Share of the tokens that the loss counts, such as 0.4. Default: all, the worst case."),
]
RecomputeOption = Annotated[
    str | None, typer.Option(help="Activation checkpointing: all, none, or how many of the first layers.")
]
RECOMPUTE_WORDS: tuple[Literal["all", "none"], ...] = ("all", "none")
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the values as JSON (qadapt/schemas/estimate.schema.json).")
]
MaxOption = Annotated[
    str | None,
    typer.Option("--max", help="The most that fits of: length, rows, rank; or the largest model."),
]
AllCardsOption = Annotated[
    bool, typer.Option("--all-cards", help="Ask every card of the catalogue; also with --max.")
]
ExactOption = Annotated[
    bool, typer.Option("--exact", help="Count the very step, run without its memory; takes seconds.")
]
PlotOption = Annotated[
    Path | None, typer.Option(help="Draw the step's memory over time into this .svg; exact, too.")
]


def estimate(
    model: Annotated[
        str | None, typer.Argument(help="A known model, a folder with a config.json, or a recipe.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, as in a recipe.", show_default=False)
    ] = None,
    *,
    card: CardOption = None,
    vram: VramOption = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows in one forward pass.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    recompute: RecomputeOption = None,
    supervised: SupervisedOption = None,
    max_: MaxOption = None,
    is_on_all: AllCardsOption = False,
    exact: ExactOption = False,
    plot: PlotOption = None,
    models: Annotated[bool, typer.Option("--models", help="List the known models and leave.")] = False,
    cards: Annotated[bool, typer.Option("--cards", help="List the known cards and leave.")] = False,
    json: JsonOption = False,
) -> None:
    """What one training step takes, by category, and whether it fits. Reads no weights, needs no GPU.

    Examples: `qadapt estimate Llama-3.1-8B --card "RTX 4060" --length 2048`,
    `qadapt estimate llama-3.1-8b-qlora-8gb data.length=1024 --vram 7.3GiB`, `qadapt estimate --models`,
    `qadapt estimate Llama-3.1-8B --card "RTX 4060" --max length`,
    `qadapt estimate --card "RTX 4060" --max model`, `qadapt estimate Llama-3.1-8B --all-cards`,
    `qadapt estimate Llama-3.1-8B --card "RTX 4060" --plot memory.svg`.

    With --json the output has at least: schema, peak_allocated_bytes, categories (name to bytes at the peak),
    reserved_bytes (low, high), context_bytes, host_bytes, disk_bytes, fits, exact. With --max or --all-cards
    it is as qadapt/schemas/max.schema.json or qadapt/schemas/cards.schema.json says.
    """
    if models or cards:
        _list(is_cards=cards, is_alone=not (json or max_ or is_on_all))
        return
    wanted = _wanted(max_)
    _check_together(wanted, is_on_all=is_on_all, is_exact=exact or plot is not None)
    if plot is not None:
        check_plot(plot)
    numbers = {"length": length, "rows": rows, "rank": rank, "supervised_share": supervised}
    changes = _changes(numbers, recompute)
    if model is None and wanted == "model":
        answer = _models_answer(ask_models(card=card, vram=vram).changed(changes))
    elif model is None:
        raise BadRecipe(
            "`qadapt estimate` needs a model or a recipe.",
            cure="Give one, such as Llama-3.1-8B; `qadapt estimate --models` lists the known ones.",
        )
    elif is_on_all:
        _check_on_all(card, vram)
        asked = [ask(model, overrides or (), card=each.name, vram=None) for each in all_cards()]
        answer = _cards_answer([question.changed(changes) for question in asked], wanted)
    else:
        question = ask(model, overrides or (), card=card, vram=vram).changed(changes)
        answer = _answer(question, wanted, is_exact=exact, plot=plot)
    _show(*answer, is_json=json)


def _changes(numbers: dict[str, float | None], recompute: str | None) -> dict[str, object]:
    """The fields of the setting that were given."""
    changes: dict[str, object] = {name: value for name, value in numbers.items() if value is not None}
    if recompute is not None:
        changes["recompute"] = _recompute(recompute)
    return changes


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe: a file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value.", show_default=False)
    ] = None,
    *,
    card: CardOption = None,
    vram: VramOption = None,
    supervised: SupervisedOption = None,
    json: JsonOption = False,
) -> None:
    """The fastest way to run a recipe within a card's memory, each choice with its price.

    Examples: `qadapt plan my.yaml`, `qadapt plan llama-3.1-8b-qlora-8gb --card "RTX 4060"
    memory.recompute=all`.
    """
    question = ask_recipe(recipe, overrides or (), card=card, vram=vram)
    if supervised is not None:
        question = question.changed({"supervised_share": supervised})
    found = question.plan()
    answer = question.answer(found.estimate)

    def draw() -> RenderableType:
        from qadapt.view.tables import EstimateTable, PlanTable

        return PlanTable(EstimateTable(answer), found.reasons)

    _show(plan_record(answer, found), draw, is_json=json)


Asked = What | Literal["model"]
Drawing = Callable[[], "RenderableType"]
"""Makes what the screen shows; the libraries for it are imported only then."""


def _show(record: dict[str, Any], draw: Drawing, *, is_json: bool) -> None:
    if is_json:
        typer.echo(json_text.dumps(record, indent=2))
    else:
        console().print(draw())


def _wanted(text: str | None) -> Asked | None:
    choices: tuple[Asked, ...] = (*get_args(What), "model")
    for choice in choices:
        if text == choice:
            return choice
    if text is None:
        return None
    raise BadRecipe(f"--max is {text!r}.", cure=f"Give one of: {', '.join(choices)}.")


def _recompute(text: str) -> Recompute:
    for word in RECOMPUTE_WORDS:
        if text == word:
            return word
    try:
        return int(text)
    except ValueError:
        raise BadRecipe(
            f"--recompute is {text!r}.", cure="Give all, none, or how many of the first layers."
        ) from None


def _check_together(wanted: Asked | None, *, is_on_all: bool, is_exact: bool) -> None:
    if is_exact and (wanted is not None or is_on_all):
        raise BadRecipe(
            "--exact and --plot are about one step, --max and --all-cards about many.", cure="Leave one out."
        )
    if is_on_all and wanted == "model":
        raise BadRecipe(
            "--all-cards asks about one model, --max model about all of them.",
            cure="Give --max length, rows or rank with --all-cards; or --max model with one --card.",
        )


def _check_on_all(card: str | None, vram: str | None) -> None:
    given = "--card" if card is not None else "--vram" if vram is not None else None
    if given is not None:
        raise BadRecipe(f"--all-cards and {given} contradict each other.", cure="Give one of them.")


def _answer(
    question: Question, wanted: Asked | None, *, is_exact: bool, plot: Path | None
) -> tuple[dict[str, Any], Drawing]:
    """One question: a step, the largest value of a field and the step at it, or the largest model."""
    if wanted == "model":
        return _models_answer(question)
    if wanted is not None:
        return _most_answer(question, wanted)
    if is_exact or plot is not None or question.shape is None:
        return _exact_answer(question, plot)
    answer = question.answer()

    def draw() -> RenderableType:
        from qadapt.view.tables import EstimateTable

        return EstimateTable(answer)

    return estimate_record(answer), draw


def _most_answer(question: Question, what: What) -> tuple[dict[str, Any], Drawing]:
    found = question.most(what)
    answer = question.answer(found.estimate)

    def draw() -> RenderableType:
        from qadapt.view.answers import MostTable

        return MostTable(answer, found)

    return most_record(answer, found), draw


def _exact_answer(question: Question, plot: Path | None) -> tuple[dict[str, Any], Drawing]:
    """One step by the dry run, and its picture if one is wanted."""
    with error_console().status("running the step without its memory ..."):
        found = question.dry_run()
    if plot is not None:
        write_plot(plot, found.answer, found.trace)

    def draw() -> RenderableType:
        from qadapt.view.tables import EstimateTable

        return EstimateTable(found.answer)

    return estimate_record(found.answer), draw


def _models_answer(question: Question) -> tuple[dict[str, Any], Drawing]:
    answers, room = question.models(), question.room()

    def draw() -> RenderableType:
        from qadapt.view.answers import ModelsTable

        return ModelsTable(answers, question.setting, question.target, room)

    return models_record(answers, question.target, room), draw


def _cards_answer(questions: Sequence[Question], wanted: Asked | None) -> tuple[dict[str, Any], Drawing]:
    asked = None if wanted == "model" else wanted
    found = [question.most(asked) if asked else None for question in questions]
    rows = tuple(
        CardAnswer(question.answer(most.estimate if most else None), most)
        for question, most in zip(questions, found, strict=True)
    )

    def draw() -> RenderableType:
        from qadapt.view.answers import CardsMatrix

        return CardsMatrix(rows, asked)

    return cards_record(rows, asked=asked), draw


def _list(*, is_cards: bool, is_alone: bool) -> None:
    """Prints the catalogue of cards, or the known models."""
    if not is_alone:
        raise BadRecipe("--models and --cards print a list, nothing else.", cure="Give them alone.")
    console().print(_catalogue(is_cards=is_cards))


def _catalogue(*, is_cards: bool) -> RenderableType:
    from qadapt.view.catalogue import catalogue_table, models_table

    if is_cards:
        return catalogue_table(all_cards())
    shapes = known_shapes()
    proven = {shape.name for shape in shapes}
    return models_table(shapes, [find_config(name) for name in known_models() if name not in proven])
