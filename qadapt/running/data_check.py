"""A recipe in, what the model will see out: the rows of a run as it would train on them, without its weights.

`check_data` prepares the rows as a run does and counts; `preview_rows` reads only the first rows, so it is
quick however many there are. Nothing is loaded onto a device. Knows no screen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice

from qadapt.data.check import (
    DataReport,
    Finding,
    Forecast,
    ShownRow,
    histogram,
    length_facts,
    occurrences,
    step_layout,
)
from qadapt.data.conversation import Row
from qadapt.data.cutting import Cut, cut
from qadapt.data.held_out import repeated_rows
from qadapt.data.pieces import Alphabet, row_pieces
from qadapt.data.prepared import read_sources
from qadapt.data.prompt import PromptContract
from qadapt.data.reasons import LEFT_OUT, NOTES
from qadapt.data.rendering.encoding import Encoded
from qadapt.data.rows import Rows
from qadapt.data.step_sample import StepSample
from qadapt.data.tokens import Tokens
from qadapt.errors import BadData, BadRecipe, DoesNotFit, NoClosedForm
from qadapt.events import Event, StageStarted, Warned
from qadapt.hardware.cards import Card
from qadapt.model.source import find_model
from qadapt.plan.fit import Plan
from qadapt.plan.setting import Setting
from qadapt.plan.speed import micro_batch_seconds
from qadapt.recipe import Recipe
from qadapt.running.material import (
    Material,
    contract_of,
    order_of,
    prepare,
    reading_of,
    resolved,
    step_count,
    training_sources,
)
from qadapt.running.plan import padded_question, plan_rows, step_sample
from qadapt.shape import ModelShape
from qadapt.stage import passing, with_progress

MOST_TOKENS = 300
"""So many tokens of a row are shown on a screen; the middles of longer turns are left out."""
MOST_PAGE_TOKENS = 20_000
"""So many on a page."""
MOST_READ_AGAIN = 5000
"""Examples are among so many first rows: they are read again to tell how they were cut."""


def check_data(
    recipe: Recipe, *, examples: int = 2, most_tokens: int | None = MOST_TOKENS
) -> Generator[Event, None, DataReport]:
    """Prepares the rows as a run does and counts what a user should know before training.

    Args:
        recipe: The recipe.
        examples: So many rows to look at: 2 are the first and a long one, more are the first ones.
        most_tokens: Leave out the middle of longer ones; None: show all.

    Raises:
        QadaptError: The rows, the base or the template cannot be used.
    """
    findings: list[Finding] = []
    asked, recipe = recipe, resolved(recipe)  # as a run does, which finds these rows prepared
    preparing = prepare(recipe, revision=recipe.model.revision, needs_weights=False)
    material = yield from passing(preparing, partial(_noted, findings))
    yield StageStarted(stage="counting")
    rows, tallies = material.rows, [part.tally for part in material.parts]
    sample = step_sample(recipe, material)
    plan, forecast = _forecast(recipe, material, sample)
    report = DataReport(
        name=recipe.run.name,
        model=asked.model.source,
        length=recipe.data.length,
        rows=len(rows.train),
        held_out_rows=len(rows.held_out),
        tokens=rows.tokens,
        supervised_tokens=rows.supervised_tokens,
        lengths=length_facts(rows.train.lengths),
        histogram=histogram(rows.train.lengths),
        layout=step_layout(sample, micro_batch=plan.setting.rows if plan else 1, longest=rows.longest),
        pass_rows=order_of(recipe, rows).pass_rows,
        pass_tokens=_pass_tokens(recipe, rows),
        rows_per_step=recipe.train.rows_per_step,
        steps=step_count(recipe, rows),
        forecast=forecast,
        is_packed=plan is not None and plan.setting.packed,
        duplicates=sum(repeated_rows(part.prepared.store.hashes()) for part in material.parts),
        formats=_summed(part.formats for part in material.parts),
        skipped_rows=sum(part.malformed_rows + part.tally.refused_rows for part in material.parts),
        cut=_summed({how: found.count for how, found in tally.cut.items()} for tally in tallies),
        left_out=_summed({why: found.count for why, found in tally.left_out.items()} for tally in tallies),
        notes=_summed({note: found.count for note, found in tally.notes.items()} for tally in tallies),
        prompt=_prompt_lines(material.contract),
        new_tokens=_new_tokens(material),
        examples=_examples(recipe, material, count=examples, most_tokens=most_tokens),
    )
    if forecast.cure:
        findings.append(Finding(forecast.problem, forecast.cure))
    return replace(report, findings=tuple(findings))


def _noted(findings: list[Finding], event: Event) -> bool:
    """Notes a warning; all events pass."""
    if isinstance(event, Warned):
        findings.append(Finding(event.message, event.cure))
    return True


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def _pass_tokens(recipe: Recipe, rows: Rows) -> int:
    """Tokens of a pass, each source as often as its weight says."""
    ends = list(accumulate(rows.source_rows))
    parts = zip([0, *ends], ends, recipe.data.sources, strict=False)
    lengths = rows.train.lengths
    return round(sum(source.weight * int(lengths[first:end].sum()) for first, end, source in parts))


def _forecast(recipe: Recipe, material: Material, sample: StepSample) -> tuple[Plan | None, Forecast]:
    """The plan of the run and what it will take, as far as that can be told."""
    try:
        question = padded_question(recipe, material)
        plan = plan_rows(question, sample, packing=recipe.data.packing)
    except DoesNotFit as error:
        return None, Forecast(problem=error.problem, cure=error.cure)
    except NoClosedForm as error:
        return None, Forecast(problem=error.problem)
    seconds = step_seconds(question.closed, plan.setting, sample, card=question.target.card)
    return plan, Forecast(
        device=question.target.name,
        peak_bytes=plan.estimate.peak_allocated_bytes,
        budget_bytes=plan.budget_bytes,
        seconds_per_step=seconds,
        problem="" if seconds is not None else "nobody has measured this device",
    )


def step_seconds(
    shape: ModelShape, setting: Setting, sample: StepSample, *, card: Card | None
) -> float | None:
    """Seconds of an average step, its rows as they are; None where the card's speed is unknown.

    Args:
        shape: The model.
        setting: As planned.
        sample: How the rows of steps lie.
        card: The card; error: `plan/speed.py`.
    """
    passes = sample.packed(setting.tokens) if setting.packed else sample.filled_up(setting.rows)
    each = micro_batch_seconds(shape, setting, card, work=passes.work)
    return None if each is None else passes.count * each


def _new_tokens(material: Material) -> dict[str, int]:
    """How often each of the recipe's new tokens occurs in the training rows."""
    ids = material.contract.new_ids
    found = occurrences(material.rows.train, ids) if ids else {}
    return {str(material.contract.tokenizer.convert_ids_to_tokens(token)): found[token] for token in ids}


def _prompt_lines(contract: PromptContract) -> tuple[tuple[str, str], ...]:
    """The facts of the contract for people."""
    facts, names = contract.facts(), contract.tokenizer.convert_ids_to_tokens
    source = {"auto": "the model's own", "chatml": "ChatML"}.get(facts["source"], "a file")
    day = f", its day {facts['date']}" if facts["date"] is not None else ""
    learn = facts["learn"] if isinstance(facts["learn"], str) else ", ".join(facts["learn"])
    bos = facts["special_tokens"].get("bos_token")
    ends = ", ".join(str(name) for name in names(sorted(contract.end_ids)))
    has_template = facts["template"] is not None
    return (
        ("template", f"{source if has_template else 'none'}{day}; contract {contract.fingerprint[:12]}"),
        (
            "learned",
            {"answers": "every answer", "last": "the last answer", "all": "every token"}.get(learn, learn),
        ),
        (
            "begins",
            f"{bos} before raw text" if facts["starts_with_bos"] else "nothing is put before raw text",
        ),
        ("ends", ends or "no end token is known"),
    )


def _examples(
    recipe: Recipe, material: Material, *, count: int, most_tokens: int | None
) -> tuple[ShownRow, ...]:
    """The first training rows; of two, the second is the longest of those near the start."""
    train = material.rows.train.behind(0)
    chosen = list(range(min(count, len(train))))
    if count == 2 and len(train) > 2:
        chosen = sorted({0, int(train.lengths[:MOST_READ_AGAIN].argmax())})
    viewer = Viewer(material.contract, length=reading_of(recipe).length, most_tokens=most_tokens)
    numbers = train.numbers()[chosen].tolist()
    read = _read_again(recipe, numbers)
    return tuple(
        viewer.tokens(
            train[index], number=number + 1, note=viewer.note(read[number]) if number in read else ""
        )
        for index, number in zip(chosen, numbers, strict=True)
    )


def _read_again(recipe: Recipe, numbers: Sequence[int]) -> dict[int, Row]:
    """The rows of those numbers as they stand in the sources; the store does not keep how each was cut."""
    wanted = {number for number in numbers if number < 2 * MOST_READ_AGAIN}
    rows = read_sources(training_sources(recipe), reading_of(recipe).reader())
    until = islice(rows, max(wanted, default=-1) + 1)
    return {number: row for number, row in enumerate(until) if number in wanted}


def preview_rows(
    recipe: Recipe, *, first: int, count: int, most_tokens: int | None = MOST_TOKENS
) -> Generator[Event, None, tuple[ShownRow, ...]]:
    """Some rows of the recipe's sources in their order, and why any of them would be left out.

    Args:
        recipe: The recipe.
        first: The first row, from 1.
        count: So many rows, or as many as there are.
        most_tokens: Leave out the middle of longer ones; None: show all.

    Raises:
        BadRecipe: There are fewer rows than `first`.
        QadaptError: The rows before, the base or the template cannot be used.
    """
    yield StageStarted(stage="reading the rows")
    rows = read_sources(training_sources(recipe), reading_of(recipe).reader())
    chosen = list(islice(rows, first - 1, first - 1 + count))
    if not chosen:
        raise BadRecipe(f"There is no row {first}.", cure="Give a smaller number; rows count from 1.")
    source, revision = recipe.model.source, recipe.model.revision
    files = yield from with_progress(
        "finding the base",
        lambda report: find_model(source, revision=revision, report=report, needs_weights=False),
    )
    contract = contract_of(recipe, files.folder)
    viewer = Viewer(contract, length=reading_of(recipe).length, most_tokens=most_tokens)
    return tuple(viewer.row(row, number=number) for number, row in enumerate(chosen, start=first))


class Viewer:
    """Makes rows to be looked at.

    Args:
        contract: How rows become tokens.
        length: Longest row in tokens.
        most_tokens: Leave out the middle of longer ones; None: show all.
    """

    def __init__(self, contract: PromptContract, *, length: int, most_tokens: int | None) -> None:
        self._contract, self._length, self._most_tokens = contract, length, most_tokens
        self._alphabet = alphabet_of(contract)

    def row(self, row: Row, *, number: int) -> ShownRow:
        """A row as it would be trained on, or whole if it would be left out, and why; of pieces the first."""
        try:
            encoded = self._contract.encode(row)
        except BadData as error:
            return ShownRow(number, row.place, 0, 0, (), f"refused: {error.problem}")
        made = cut(encoded, self._length)
        tokens = made.rows[0] if made.rows else Tokens(encoded.ids, encoded.supervised, encoded.place)
        return self.tokens(tokens, number=number, note=_note(encoded, made))

    def note(self, row: Row) -> str:
        """How a row is cut, and what its contents hold."""
        encoded = self._contract.encode(row)
        return _note(encoded, cut(encoded, self._length))

    def tokens(self, row: Tokens, *, number: int, note: str = "") -> ShownRow:
        """A row that has been cut."""
        pieces = row_pieces(row, self._alphabet, most=self._most_tokens)
        return ShownRow(number, row.place, len(row), row.supervised_count, pieces, note)


def _note(encoded: Encoded, made: Cut) -> str:
    """What became of a row, in words; empty if nothing did."""
    left = sum(len(row) for row in made.rows)
    lost = f"{len(encoded) - left:,} of {len(encoded):,} tokens left out"
    how = {
        "whole": "",
        "turns": f"whole turns left out at the end: {lost}",
        "inside": f"cut inside an answer, whose end is not learned: {lost}",
        "pieces": f"split into {len(made.rows)} pieces, all of them kept",
        "nothing": f"LEFT OUT: {LEFT_OUT.get(made.why, made.why)}",
    }
    notes = (how[made.how], *(NOTES.get(note, note) for note in sorted(encoded.notes)))
    return "; ".join(note for note in notes if note)


def alphabet_of(contract: PromptContract) -> Alphabet:
    """How the contract's tokens are written."""
    tokenizer = contract.tokenizer
    backend = tokenizer.backend_tokenizer

    def decode(ids: Sequence[int]) -> str:
        return str(backend.decode(list(ids), skip_special_tokens=False))

    def spelled(token: int) -> str:
        return backend.id_to_token(token) or f"token {token}"

    return Alphabet(decode, frozenset(tokenizer.added_tokens_decoder), spelled)
