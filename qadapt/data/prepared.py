"""One part of a run's data, training rows or held-out ones: from its sources to a store in the cache.

Reads, renders, cuts and writes row by row; what is already in the cache for the same files and the same rules
is not done again. Knows no recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qadapt.cache import ignore
from qadapt.collection import short_collections
from qadapt.data.conversation import Row
from qadapt.data.preparation import Tally, tally_of, token_rows
from qadapt.data.prompt import PromptContract
from qadapt.data.reading.sources import HUB, RowReader, Skipped
from qadapt.data.row_cache import Prepared, find, find_or_make, key_of
from qadapt.data.store import StoreWriter
from qadapt.errors import BadData
from qadapt.stage import Report

SKIPPED_FILE = "skipped.jsonl"
_PACKAGES = ("qadapt", "datasets", "jinja2", "pyarrow", "tokenizers", "transformers")
"""What reads, renders and tokenizes: of another version, rows may be others."""
_READ_BYTES = 1024**2
_REPORT_ROWS = 500


@dataclass(frozen=True)
class Source:
    """Where rows come from; see `recipe.SourceSection`."""

    path: str
    limit: int | None = None
    split: str = "train"
    subset: str | None = None

    @property
    def is_of_hub(self) -> bool:
        """Whether it is a dataset of the hub and no file."""
        return self.path.startswith(HUB)

    def commit(self) -> str:
        """The commit of a dataset of the hub.

        Raises:
            BadData: There is no such dataset, or it is out of reach.
        """
        from qadapt.data.reading.hub_rows import dataset_commit

        return dataset_commit(self.path.removeprefix(HUB), subset=self.subset)

    def rows(self, reader: RowReader) -> Iterator[Row]:
        """The rows, one by one.

        Raises:
            BadData: It is missing, or a row cannot be used.
        """
        return reader.rows(self.path, limit=self.limit, split=self.split, subset=self.subset)


@dataclass(frozen=True)
class Reading:
    """How rows are read and cut; see `recipe.DataSection`."""

    form: str
    columns: tuple[tuple[str, str], ...]
    skips_malformed: bool
    length: int

    def reader(self) -> RowReader:
        """A reader by these rules, its lists empty."""
        return RowReader(form=self.form, columns=dict(self.columns), skips_malformed=self.skips_malformed)


@dataclass(frozen=True)
class Part:
    """Prepared rows, and what became of those that were read.

    Attributes:
        prepared: The store, held in the cache.
        sources: The files with their hashes, as the key has them.
        source_rows: Rows in the store of each source.
        tally: What became of the rows that could be read.
        formats: Rows of each format.
        malformed_rows: Rows that could not be read and were left out, as asked.
        skipped: Those, and those the contract refused; not more than the lists hold.
        other_files: Files of folders that are not read.
    """

    prepared: Prepared
    sources: list[dict[str, Any]]
    source_rows: tuple[int, ...]
    tally: Tally
    formats: dict[str, int]
    malformed_rows: int
    skipped: tuple[Skipped, ...]
    other_files: tuple[str, ...]


@dataclass(frozen=True)
class Identified:
    """Sources, what tells them from all others (plain values for JSON), and when their files changed last."""

    sources: tuple[Source, ...]
    identities: list[dict[str, Any]]
    stamps: list[tuple[str, int, int]]


def identify(sources: tuple[Source, ...], report: Report = ignore) -> Identified:
    """Hashes the files of some sources.

    Args:
        sources: Where rows come from; what is missing is found out when it is read.
        report: Told of the bytes that are hashed.

    Raises:
        BadData: A file cannot be read.
    """
    stamps = _stamps(sources)
    return Identified(sources, [_identity(source, report) for source in sources], stamps)


def prepare_part(
    identified: Identified, reading: Reading, contract: PromptContract, *, report: Report = ignore
) -> Part:
    """The rows of some sources as tokens, out of the cache if they are there.

    Args:
        identified: Where the rows come from.
        reading: How they are read and cut.
        contract: How they become tokens.
        report: Told of the rows that are prepared; how many there are is not known before, and given as 0.

    Raises:
        BadData: A file or a row cannot be used, or no row has anything to learn.
        BadOutput: The cache cannot be written.
    """
    rules = {
        "reading": asdict(reading),
        "contract": contract.fingerprint,
        "embedding_rows": contract.embedding_rows,
        "packages": {name: version(name) for name in _PACKAGES},
    }
    key = key_of({"sources": identified.identities, **rules})
    with short_collections():
        made = find_or_make(
            key, lambda folder: _write(folder, identified, reading, contract=contract, report=report)
        )
    return _part(made, identified.identities)


def kept_part(key: str, identities: list[dict[str, Any]]) -> Part | None:
    """Rows that were prepared before, whether or not their files are still there; None if they are gone.

    Args:
        key: Of the store in the cache.
        identities: Of the sources, as `Identified` had them then.

    Raises:
        BadOutput: The cache cannot be written.
    """
    found = find(key)
    return None if found is None else _part(found, identities)


def gone_files(stored: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """The files that sources had, have no longer, and are all that changed of them."""
    gone: list[str] = []
    for before, after in zip(stored, now, strict=False):
        files, rest = _hashes(before), _hashes(after)
        gone += [path for path in files if path not in rest]
        files = {path: digest for path, digest in files.items() if path in rest}
        if files != rest or {**before, "files": 0} != {**after, "files": 0}:
            return []
    return gone if len(stored) == len(now) else []


def changed_files(stored: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """In words, the files that are not what they were: `rows.jsonl changed`, `rows.jsonl is gone`."""
    before = {path: digest for source in stored for path, digest in _hashes(source).items()}
    after = {path: digest for source in now for path, digest in _hashes(source).items()}
    gone = [f"{path} is gone" for path in before if path not in after]
    new = [f"{path} is new" for path in after if path not in before]
    return (
        [f"{path} changed" for path in before if after.get(path, before[path]) != before[path]] + gone + new
    )


def _hashes(source: dict[str, Any]) -> dict[str, str]:
    return {file["path"]: file["sha256"] for file in source.get("files", ())}


def _part(made: Prepared, identities: list[dict[str, Any]]) -> Part:
    facts = made.store.facts
    return Part(
        prepared=made,
        sources=identities,
        source_rows=tuple(facts["source_rows"]),
        tally=tally_of(facts["tally"]),
        formats=facts["formats"],
        malformed_rows=facts["malformed_rows"],
        skipped=tuple(_read_skipped(made.store.folder / SKIPPED_FILE)),
        other_files=tuple(facts["other_files"]),
    )


def read_sources(sources: tuple[Source, ...], reader: RowReader) -> Iterator[Row]:
    """The rows of all sources, one after another.

    Raises:
        BadData: A file or a row cannot be used.
    """
    for source in sources:
        yield from source.rows(reader)


def _write(
    folder: Path,
    identified: Identified,
    reading: Reading,
    *,
    contract: PromptContract,
    report: Report,
) -> None:
    reader, tally, source_rows = reading.reader(), Tally(), []
    with StoreWriter(folder) as writer:
        for source in identified.sources:
            before = writer.rows
            rows = token_rows(
                source.rows(reader),
                contract,
                length=reading.length,
                skips_refused=reading.skips_malformed,
                tally=tally,
            )
            for number, row in rows:
                writer.add(row, number=number)
                if writer.rows % _REPORT_ROWS == 0:
                    report("preparing the rows", writer.rows, 0)
            source_rows.append(writer.rows - before)
        if _stamps(identified.sources) != identified.stamps:
            raise BadData(
                "The files of rows changed while they were read.", cure="Start again when they are whole."
            )
        skipped = [*reader.skipped, *tally.refused]
        if skipped:
            (folder / SKIPPED_FILE).write_text(skipped_lines(skipped), encoding="utf-8")
        writer.finish(
            {
                "contract": contract.fingerprint,
                "source_rows": source_rows,
                "tally": tally.values(),
                "formats": reader.formats,
                "malformed_rows": reader.skipped_rows,
                "other_files": [str(path) for path in reader.other_files],
            }
        )


def skipped_lines(skipped: list[Skipped] | tuple[Skipped, ...]) -> str:
    """Rows that were left out as JSON lines."""
    return "".join(json.dumps(asdict(row)) + "\n" for row in skipped)


def _read_skipped(path: Path) -> Iterator[Skipped]:
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield Skipped(**json.loads(line))


def _identity(source: Source, report: Report) -> dict[str, Any]:
    """What tells a source from another and from itself before a change, plain values for JSON."""
    if source.is_of_hub:
        return {**asdict(source), "commit": source.commit()}
    inside = _files(source)
    total, done, files = sum(path.stat().st_size for path in inside), 0, []
    for path in inside:
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while piece := file.read(_READ_BYTES):
                    digest.update(piece)
                    done += len(piece)
                    report("hashing the files of rows", done, total)
        except OSError as error:
            raise BadData(f"{path} cannot be read: {error}", cure="Give a readable file.") from None
        files.append({"path": str(path), "sha256": digest.hexdigest()})
    return {**asdict(source), "files": files}


def _files(source: Source) -> list[Path]:
    """All files of a source, those that hold no rows included: which do is the reader's matter."""
    root = Path(source.path)
    return [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())


def _stamps(sources: tuple[Source, ...]) -> list[tuple[str, int, int]]:
    files = [path for source in sources if not source.is_of_hub for path in _files(source)]
    stats = [(path, path.stat()) for path in files]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
