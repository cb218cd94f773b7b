"""What a user should know about prepared rows: problem and cure, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qadapt.data.held_out import is_near
from qadapt.data.new_tokens import absent_ids
from qadapt.data.preparation import Found, Tally
from qadapt.data.prepared import Part
from qadapt.data.prompt import PromptContract
from qadapt.data.reading.sources import MOST_LISTED, SUFFIXES
from qadapt.data.reasons import CURES, LEFT_OUT, LOOK, NOTES
from qadapt.data.rows import Rows
from qadapt.data.split import Split
from qadapt.data.tokens import Tokens
from qadapt.errors import BadData

Note = tuple[str, str]


def part_notes(part: Part, kind: str, *, length: int) -> Iterator[Note]:
    """What became of the rows of a part.

    Args:
        part: The part.
        kind: What its rows are called: `rows` or `held-out rows`.
        length: Longest row in tokens.
    """
    if part.prepared.damage is not None:
        yield f"Prepared {kind} in the cache were damaged: {part.prepared.damage}", "They were made anew."
    yield from _skipped(part)
    yield from _other_files(part)
    if preferred := part.formats.get("preference"):
        yield (
            f"{preferred:,} {kind} are preference pairs: only the chosen answers are learned.",
            "Nothing, if that is meant: the rejected answers are not used.",
        )
    yield from _cut(part, kind, length=length)
    for note, found in part.tally.notes.items():
        problem = f"{_counted(found, kind)}: {NOTES.get(note, note)}: {_places(found)}."
        yield problem, CURES.get(note, LOOK)


def source_notes(part: Part, rows: Rows) -> Iterator[Note]:
    """Which sources give nothing to train on, whatever their weight says.

    Args:
        part: The training rows as they were prepared.
        rows: What of them is trained on.
    """
    for source, made, trained in zip(part.sources, part.source_rows, rows.source_rows, strict=True):
        if not trained:
            why = "all of its rows are held out" if made else "all of its rows are left out"
            yield (
                f"Nothing of the source {source['path']} is trained on: {why}.",
                "Correct the source, or take it out of data.sources.",
            )


def split_notes(split: Split) -> Iterator[Note]:
    """What was found when rows were held out."""
    if split.repeated_rows:
        yield (
            f"{split.repeated_rows:,} training rows are equal to another one, token for token; they count "
            "twice or more.",
            "Remove them if that is not meant.",
        )
    if split.dropped_rows:
        yield (
            f"{split.dropped_rows:,} rows drawn to be held out are left out: equal ones are trained on.",
            "Nothing: no row stands on both sides.",
        )
    if split.shared.count:
        yield (
            f"{split.shared.count:,} held-out rows are left out: they are also trained on: "
            f"{_places(split.shared)}.",
            "Nothing: no row stands on both sides. Remove them from one of the two if that is not meant.",
        )
    if split.known.count:
        yield (
            f"{split.known.count:,} held-out rows begin as a training row does, up to the end of their first "
            f"answer, so that answer is no test: {_places(split.known)}.",
            "Keep such rows on one side: with data.held_out, name files that share no conversation.",
        )
    held_out = len(split.rows.held_out)
    if split.asked_rows and not is_near(held_out + split.dropped_rows, split.asked_rows):
        yield (
            f"{held_out:,} rows are held out, not about {split.asked_rows:,} as asked: equal rows stay "
            "together, and so do the pieces of a document.",
            "Give held-out rows of their own with data.held_out, if that matters.",
        )


def token_notes(rows: Iterable[Tokens], contract: PromptContract) -> Iterator[Note]:
    """Which of the recipe's new tokens would be exported untrained."""
    absent = absent_ids(rows, contract.new_ids)
    if absent:
        names = ", ".join(contract.tokenizer.convert_ids_to_tokens(list(absent)))
        yield (
            f"No training row has these of data.new_tokens: {names}. They stay untrained.",
            "Write them into the rows or the template, or leave them out of data.new_tokens.",
        )


def no_rows_left(purpose: str, tally: Tally) -> BadData:
    """The error for rows that were given and are all left out.

    Args:
        purpose: What they were for, behind `to`.
        tally: What became of them.
    """
    causes = [(found.count, f"have {LEFT_OUT.get(why, why)}", why) for why, found in tally.left_out.items()]
    if tally.refused_rows:
        causes.append((tally.refused_rows, "are malformed", "malformed"))
    causes.sort(reverse=True)
    said = ", ".join(f"{count:,} {words}" for count, words, _ in causes)
    return BadData(
        f"No row is left to {purpose}: of {tally.read:,} that were read, {said}.",
        cure=" ".join(dict.fromkeys(CURES.get(why, LOOK) for _, _, why in causes)),
    )


def _skipped(part: Part) -> Iterator[Note]:
    if part.skipped:
        count = part.malformed_rows + part.tally.refused_rows
        places = ", ".join(each.place for each in part.skipped[:3])
        listed = "" if count <= MOST_LISTED else f" (the first {MOST_LISTED:,})"
        yield (
            f"{count:,} malformed {'row is' if count == 1 else 'rows are'} left out, as asked: {places}"
            f"{', ...' if count > 3 else ''}; the first because of: {part.skipped[0].problem}",
            f"The run's skipped.jsonl lists them{listed or ' all'}; data.malformed=error stops at the first.",
        )


def _other_files(part: Part) -> Iterator[Note]:
    if part.other_files:
        names = ", ".join(part.other_files[:3])
        yield (
            f"{len(part.other_files):,} files in the folders of rows are not read: {names}"
            f"{', ...' if len(part.other_files) > 3 else ''}.",
            f"Rows are in files that end in {', '.join(SUFFIXES)}.",
        )


def _cut(part: Part, kind: str, *, length: int) -> Iterator[Note]:
    cut = part.tally.cut
    if turns := cut.get("turns"):
        yield (
            f"{_counted(turns, kind)} are longer than {length} tokens and lost whole turns at the end: "
            f"{_places(turns)}.",
            "Raise data.length if the ends matter.",
        )
    if inside := cut.get("inside"):
        yield (
            f"{_counted(inside, kind)} are longer than {length} tokens and were cut inside an answer, so its "
            f"end is not learned: {_places(inside)}.",
            "Raise data.length if the ends matter.",
        )
    for why, left_out in part.tally.left_out.items():
        counted = f"{_counted(left_out, kind)} have {LEFT_OUT.get(why, why)}"
        yield f"{counted} and are left out: {_places(left_out)}.", CURES.get(why, LOOK)


def _counted(found: Found, kind: str) -> str:
    return f"{found.count:,} {kind}"


def _places(found: Found) -> str:
    return ", ".join(found.places) + (", ..." if found.count > len(found.places) else "")
