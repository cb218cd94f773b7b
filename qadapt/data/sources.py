"""Conversations out of files and folders of them, by the recipe's rules: which rows, in what shape.

Knows files and rows, not tokens. A file is read row by row; paths are relative to the folder the command runs
in. What is not read is never lost: it stops the reading, or it is on one of the lists of the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from qadapt.data.column_files import read_arrow, read_parquet
from qadapt.data.conversation import Row
from qadapt.data.formats import Format, map_columns, read_conversation, recognise
from qadapt.data.text_files import read_json, read_json_lines, read_table
from qadapt.errors import BadData

ReadRows = Callable[[Path], Iterator[tuple[str, object]]]

_READERS: dict[str, ReadRows] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": lambda path: read_table(path, delimiter=","),
    ".tsv": lambda path: read_table(path, delimiter="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
_COMPRESSIBLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*_READERS, *(f"{suffix}.gz" for suffix in _COMPRESSIBLE))

MOST_LISTED = 100_000
"""So many rows left out are listed one by one; of more, only the count grows."""
MOST_CHARACTERS = 1000
"""So much of each one's problem is kept."""

_FACTS_OF_DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json")
"""What `datasets` writes beside the rows."""


@dataclass(frozen=True)
class Skipped:
    """A row that was left out because the recipe asks for it."""

    place: str
    problem: str


@dataclass
class RowReader:
    """Reads files by one set of rules, and lists what it left out; holds no row.

    Args:
        form: A format's name, or `auto`: that of each file's first row.
        columns: Name that a format knows → name in the files.
        skips_malformed: Leave out a row that cannot be used instead of raising its error.
    """

    form: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    skips_malformed: bool = False
    skipped: list[Skipped] = field(default_factory=list, init=False)
    """The rows left out, at most the first `MOST_LISTED`; `skipped_rows` counts them all."""
    skipped_rows: int = field(default=0, init=False)
    formats: dict[Format, int] = field(default_factory=dict, init=False)
    """Rows used of each format."""
    other_files: list[Path] = field(default_factory=list, init=False)
    """Files of folders that hold no rows by their names, hidden ones not counted."""

    def rows(self, path: Path, *, limit: int | None = None) -> Iterator[Row]:
        """The rows of a file or a folder one by one, in their order; those of a folder sorted by name.

        Args:
            path: A file of one of `SUFFIXES`, or a folder with such files at any depth.
            limit: Use only so many rows.

        Raises:
            BadData: It is missing, empty or unreadable, or a row is no conversation; names file and line.
                Rows before the fault were given.
        """
        counted, listed, used = self.skipped_rows, len(self.skipped), 0
        for file in self._files(path):
            for row in self._used(_rows(file)):
                yield row
                used += 1
                if used == limit:
                    return
        if not used:
            raise self._nothing(path, counted=counted, listed=listed)

    def read(self, path: Path, *, limit: int | None = None) -> list[Row]:
        """All rows of a file or a folder at once; see `rows`.

        Raises:
            BadData: It is missing, empty or unreadable, or a row is no conversation; names file and line.
        """
        return list(self.rows(path, limit=limit))

    def _nothing(self, path: Path, *, counted: int, listed: int) -> BadData:
        left_out = self.skipped_rows - counted
        if not left_out:
            return BadData(f"{path} has no rows.", cure="Give a file with at least one conversation.")
        first = f"; the first: {self.skipped[listed].problem}" if listed < len(self.skipped) else "."
        return BadData(f"{path}: all {left_out} rows are malformed{first}", cure="Correct the rows.")

    def _files(self, path: Path) -> list[Path]:
        if not path.exists():
            raise BadData(
                f"There is no data file {str(path)!r} (looked at {path.absolute()}).",
                cure="Correct the path; it is relative to the folder you run the command in.",
            )
        if not path.is_dir():
            return [path]
        inside = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
        inside = [file for file in inside if file.name not in _FACTS_OF_DATASETS]
        files = [file for file in inside if _kind_of(file) is not None]
        if not files:
            raise BadData(f"The folder {path} has no files of rows.", cure=f"Give {', '.join(SUFFIXES)}.")
        self.other_files += [file for file in inside if _kind_of(file) is None]
        return files

    def _used(self, rows: Iterator[tuple[str, object]]) -> Iterator[Row]:
        known: Format | None = None if self.form == "auto" else cast("Format", self.form)
        for place, row in rows:
            try:
                if isinstance(row, BadData):
                    raise row
                mapped = map_columns(row, self.columns, place=place)
                form = known or recognise(mapped, place=place)
                conversation = read_conversation(mapped, form, place=place)
            except BadData as error:
                if not self.skips_malformed:
                    raise
                self._skip(place, error.problem)
                continue
            known = form
            self.formats[form] = self.formats.get(form, 0) + 1
            yield conversation

    def _skip(self, place: str, problem: str) -> None:
        self.skipped_rows += 1
        if len(self.skipped) < MOST_LISTED:
            text = problem if len(problem) <= MOST_CHARACTERS else f"{problem[:MOST_CHARACTERS]}..."
            self.skipped.append(Skipped(place, text))


def read_conversations(path: Path, *, form: str = "auto", limit: int | None = None) -> list[Row]:
    """All rows of a file or a folder; see `RowReader.rows`.

    Raises:
        BadData: It is missing, empty or unreadable, or a row is no conversation; names file and line.
    """
    return RowReader(form=form).read(path, limit=limit)


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _kind_of(path: Path) -> str | None:
    """The suffix that says how to read a file, or None."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    kind = _kind_of(path)
    if kind is None:
        what = "plain text, and raw text is not trained on" if path.suffix.lower() == ".txt" else "not read"
        raise BadData(
            f"{path} ends in {path.suffix.lower()!r}, which is {what}.",
            cure=f"Give one of: {', '.join(SUFFIXES)}.",
        )
    return _READERS[kind.removesuffix(".gz")](path)
