"""What a run is made of before anything is on a device: the base's files, the prompt contract, the rows.

Read from the `model` and `data` sections of the recipe; below this file, functions take flat arguments.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from qadapt.data.order import Order
from qadapt.data.prepared import (
    Part,
    Reading,
    Source,
    gone_files,
    identify,
    kept_part,
    prepare_part,
    read_sources,
)
from qadapt.data.prompt import PromptContract, load_contract
from qadapt.data.reading.sources import Skipped
from qadapt.data.row_cache import drop_unused
from qadapt.data.row_notes import no_rows_left, part_notes, source_notes, split_notes, token_notes
from qadapt.data.rows import Rows
from qadapt.data.split import Split, split_rows
from qadapt.errors import BadData
from qadapt.events import DataReady, Event, Warned
from qadapt.fusing import Source as Fused
from qadapt.fusing import check_trained_on, find_sources, found_targets, hash_of
from qadapt.methods import virtual_tokens
from qadapt.model.source import ModelFiles, find_model, is_here
from qadapt.plan.ranks import check_steps
from qadapt.recipe import Recipe
from qadapt.stage import Report, with_progress
from qadapt.train.stored_plan import Ingredients

_REPORT_ROWS = 1000
_SPLIT = "split:"
"""Begins a `data.held_out` that names another split of the dataset that is trained on."""


@dataclass(frozen=True)
class Material:
    """What a run is made of.

    `parts` are the prepared training rows, then held-out ones of their own; `fused` the trained adapters that
    are attended over, or the one that another stands on.
    """

    files: ModelFiles
    contract: PromptContract
    rows: Rows
    parts: tuple[Part, ...]
    fused: tuple[Fused, ...] = ()

    @property
    def ingredients(self) -> Ingredients:
        """What must be the same when the run is resumed."""
        return Ingredients(
            base=self.files.fingerprint,
            template=self.contract.fingerprint,
            rows=self.rows.fingerprint,
            adapters=hash_of(self.fused),
        )

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The rows that were left out because they are malformed."""
        return tuple(row for part in self.parts for row in part.skipped)

    def data_facts(self) -> dict[str, Any]:
        """What the rows were made from and where they lie, for the run's folder."""
        return {
            "version": 1,
            "prompt_contract": self.contract.fingerprint,
            "rows": len(self.rows.train),
            "held_out_rows": len(self.rows.held_out),
            "tokens": self.rows.tokens,
            "supervised_tokens": self.rows.supervised_tokens,
            "parts": [_part_facts(part) for part in self.parts],
        }


def _part_facts(part: Part) -> dict[str, Any]:
    store = part.prepared.store
    return {
        "key": part.prepared.key,
        "cache": f"{store.folder.parent.name}/{store.folder.name}",
        "rows": len(store),
        "tokens": store.facts["tokens"],
        "supervised_tokens": store.facts["supervised_tokens"],
        "formats": part.formats,
        "malformed_rows": part.malformed_rows,
        **part.tally.values(),
        "sources": part.sources,
    }


def resolved(recipe: Recipe) -> Recipe:
    """The recipe as it is run: absolute paths, so that it goes on from any folder, commits, and its day.

    Raises:
        BadData: A dataset of the hub does not exist or is out of reach.
        QadaptError: As `find_sources`.
    """
    values = recipe.model_dump()
    data = values["data"]
    for source in data["sources"]:
        source["path"] = _pinned(Source(source["path"], split=source["split"], subset=source["subset"]))
    if recipe.data.held_out is not None and not recipe.data.held_out.startswith(_SPLIT):
        data["held_out"] = _pinned(Source(recipe.data.held_out))
    if recipe.data.template not in ("auto", "chatml"):
        data["template"] = str(Path(recipe.data.template).absolute())
    if recipe.data.date is None:
        data["date"] = date.today().isoformat()
    if Path(recipe.model.source).exists():
        values["model"]["source"] = str(Path(recipe.model.source).absolute())
    values["adapter"]["targets"] = found_targets(recipe)
    return Recipe.model_validate(values)


def _pinned(source: Source) -> str:
    """The source's path, the same from any folder and on any day."""
    if source.is_of_hub:
        return f"{source.path.partition('@')[0]}@{source.commit()}"
    return str(Path(source.path).absolute())


def prepare(
    recipe: Recipe,
    *,
    revision: str | None,
    needs_weights: bool = True,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> Generator[Event, None, Material]:
    """Finds the recipe's base (fetching or converting it the first time) and makes tokens of its rows.

    Where the base must be fetched, the rows are read once before: a mistake in them costs no download.

    Args:
        recipe: The recipe.
        revision: Of the base.
        needs_weights: Fetch a hub model's weights, too; without them its files have no fingerprint.
        earlier: The `parts` of the `data_facts` of a run that is resumed: where the files of rows are gone
            since, the rows that were prepared of them are used.

    Raises:
        QadaptError: The base or the rows cannot be used.
    """
    source = recipe.model.source
    if needs_weights and not is_here(source, revision=revision):
        yield from with_progress("reading the rows", lambda report: _read_all(recipe, report), unit="rows")
    files = yield from with_progress(
        "finding the base",
        lambda report: find_model(source, revision=revision, report=report, needs_weights=needs_weights),
    )
    fused = find_sources(recipe)
    if needs_weights:
        check_trained_on(fused, base=files.name, fingerprint=files.fingerprint)
    contract = contract_of(recipe, files.folder)
    parts: list[Part] = []
    for sources, kind in ((training_sources(recipe), "rows"), (held_out_sources(recipe), "held-out rows")):
        if sources:
            known = earlier[len(parts)] if len(parts) < len(earlier) else None
            part = yield from _prepared(recipe, sources, contract, kind=kind, earlier=known)
            yield from _warned(part_notes(part, kind, length=recipe.data.length))
            parts.append(part)
    split = divided(recipe, parts, contract)
    yield from _warned(source_notes(parts[0], split.rows))
    yield from _warned(split_notes(split))
    yield from _warned(token_notes(split.rows.train, contract))
    drop_unused()
    yield _ready(split.rows, parts)
    return Material(files, contract, split.rows, tuple(parts), fused)


def contract_of(recipe: Recipe, folder: Path) -> PromptContract:
    """How the recipe's rows become tokens of a model."""
    data = recipe.data
    return load_contract(
        folder, learn=data.learn, template=data.template, date=data.date, new_tokens=data.new_tokens
    )


def training_sources(recipe: Recipe) -> tuple[Source, ...]:
    """Where the rows to train on come from."""
    return tuple(
        Source(source.path, source.limit, source.split, source.subset) for source in recipe.data.sources
    )


def held_out_sources(recipe: Recipe) -> tuple[Source, ...]:
    """Where held-out rows come from, if they have their own source."""
    place = recipe.data.held_out
    if place is None:
        return ()
    if not place.startswith(_SPLIT):
        return (Source(place),)
    first = recipe.data.sources[0]
    return (Source(first.path, split=place.removeprefix(_SPLIT), subset=first.subset),)


def reading_of(recipe: Recipe) -> Reading:
    """How the recipe's rows are read and cut: virtual tokens are a part of their length."""
    data = recipe.data
    columns = tuple(sorted((str(known), name) for known, name in data.columns.items()))
    return Reading(data.format, columns, data.malformed == "skip", data.length - virtual_tokens_of(recipe))


def virtual_tokens_of(recipe: Recipe) -> int:
    """How many virtual tokens stand in front of every row."""
    return virtual_tokens(recipe.adapter.method, recipe.adapter.rank)


def _read_all(recipe: Recipe, report: Report) -> None:
    """Reads every row and keeps none."""
    reader, sources = reading_of(recipe).reader(), training_sources(recipe) + held_out_sources(recipe)
    for number, _ in enumerate(read_sources(sources, reader), 1):
        if number % _REPORT_ROWS == 0:
            report("reading the rows", number, 0)


def _prepared(
    recipe: Recipe,
    sources: tuple[Source, ...],
    contract: PromptContract,
    *,
    kind: str,
    earlier: Mapping[str, Any] | None,
) -> Generator[Event, None, Part]:
    identified = yield from with_progress(
        "hashing the files of rows", lambda report: identify(sources, report)
    )
    gone = gone_files(earlier["sources"], identified.identities) if earlier is not None else []
    if earlier is not None and gone:
        return (yield from _kept(earlier, gone))
    part = yield from with_progress(
        f"preparing the {kind}",
        lambda report: prepare_part(identified, reading_of(recipe), contract, report=report),
        unit="rows",
    )
    if not len(part.prepared.store):
        raise no_rows_left("train on" if kind == "rows" else "evaluate on", part.tally)
    return part


def _kept(earlier: Mapping[str, Any], gone: Sequence[str]) -> Generator[Event, None, Part]:
    part, listed = kept_part(earlier["key"], earlier["sources"]), ", ".join(gone)
    if part is None:
        raise BadData(
            f"Files of rows are gone: {listed}; and so are the rows that were prepared of them.",
            cure="Put the files back as they were.",
        )
    yield Warned(
        message=f"Files of rows are gone: {listed}. The run goes on with what was prepared of them.",
        cure="Put the files back before the cache is cleared: rows that nobody uses go after 90 days.",
    )
    return part


def divided(recipe: Recipe, parts: list[Part], contract: PromptContract) -> Split:
    """The recipe's training rows and held-out rows."""
    split = split_rows(
        parts[0],
        parts[1] if len(parts) > 1 else None,
        share=recipe.data.held_out_fraction,
        seed=recipe.train.seed,
        pad_id=contract.pad_id,
    )
    return replace(split, rows=split.rows.behind(virtual_tokens_of(recipe)))


def _warned(notes: Iterable[tuple[str, str]]) -> Generator[Event, None, None]:
    for message, cure in notes:
        yield Warned(message=message, cure=cure)


def _ready(rows: Rows, parts: list[Part]) -> DataReady:
    formats = dict.fromkeys(form for part in parts for form in part.formats)
    cut = (part.tally.cut.get(how) for part in parts for how in ("turns", "inside"))
    return DataReady(
        rows=len(rows.train),
        held_out_rows=len(rows.held_out),
        tokens=rows.tokens,
        supervised_tokens=rows.supervised_tokens,
        truncated_rows=sum(found.count for found in cut if found is not None),
        longest_row_tokens=rows.longest,
        formats=tuple(formats),
    )


def order_of(recipe: Recipe, rows: Rows) -> Order:
    """Which rows each step takes."""
    weights = [source.weight for source in recipe.data.sources]
    return Order(
        rows.train.lengths,
        rows_per_step=recipe.train.rows_per_step,
        seed=recipe.train.seed,
        kind=recipe.data.order,
        sources=list(zip(rows.source_rows, weights, strict=True)),
    )


def step_count(recipe: Recipe, rows: Rows) -> int:
    """Optimizer steps of the run: the recipe's, or what its passes over the rows come to.

    Raises:
        BadRecipe: They are too few for the method.
    """
    steps = recipe.train.steps or order_of(recipe, rows).step_count(recipe.train.epochs)
    check_steps(recipe.adapter.method, steps)
    return steps
