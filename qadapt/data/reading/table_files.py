"""Rows out of CSV and TSV files, plain or compressed; the first line names the columns.

Yields as `json_files.py` does: each row with its place, or the `BadData` of a row that cannot be read. A file
cut off in an unquoted last cell cannot be told from a whole one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from qadapt.data.reading import opened
from qadapt.data.reading.opened import CORRECT, CUT_OFF, lines
from qadapt.errors import BadData

_NO_TEXT = "\udc00"  # stands for a byte that is no text; UTF-8 never gives it


def read_table(path: Path, *, delimiter: str) -> Iterator[tuple[str, object]]:
    """The rows of a CSV file, every cell a text; the first line names the columns.

    After a quote that is broken nobody can tell where the next row begins, so all from there on is one fault.

    Raises:
        BadData: The first line does not name the columns.
    """
    given = _TableLines(path)
    csv.field_size_limit(
        min(opened.LONGEST_LINE_BYTES, 2**31 - 1)
    )  # a text may be longer than the usual 128 KiB
    table = csv.reader(given, delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        first = given.number + 1
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"{error}" if given.is_at_end else f"broken quotes or line ends ({error})"
            yield given.broken(first, problem, is_header=not names)
            return
        if not names:
            names = _column_names(cells, delimiter, path=path) if cells else []
        elif cells:
            place = f"{path}, line {first}"
            yield place, _table_row(names, cells, place=place, is_last=given.is_cut)


class _TableLines:
    """The lines of a table as texts, and how far they were read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self.is_cut = False
        self.is_at_end = False
        self._lines = lines(path)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            self.number, line, is_ended = next(self._lines)
        except StopIteration:
            self.is_at_end = True
            raise
        self.is_cut = not is_ended
        return line.decode(errors="surrogateescape").replace("\0", _NO_TEXT)

    def broken(self, first: int, problem: str, *, is_header: bool) -> tuple[str, BadData]:
        """The fault that takes all lines from the first of a row to the end of the file."""
        for _ in self:
            pass
        if is_header:
            raise BadData(f"{self.path}: the line of column names has {problem}.", cure="Correct it.")
        broken = f"lines {first} to {self.number}" if self.number > first else f"line {first}"
        if self.is_at_end and "unexpected end" in problem:
            problem = "a quote opens and never closes, or the file is cut off in it"
        fault = f"{self.path}, {broken}: {problem}; where the next row begins cannot be told."
        return f"{self.path}, {broken}", BadData(fault, cure="Double the quotes within quoted cells.")


def _column_names(cells: list[str], delimiter: str, *, path: Path) -> list[str]:
    others = [mark for mark in ",;|\t" if mark != delimiter and mark in cells[0]]
    if len(cells) == 1 and others:
        raise BadData(
            f"{path}: the line of column names is separated by {others[0]!r}; {delimiter!r} is read here.",
            cure="Save it as CSV with commas, or as TSV with tabs.",
        )
    twice = sorted({name for name in cells if cells.count(name) > 1})
    if twice or not all(map(_is_text, cells)):
        what = f"names {twice[0]!r} twice" if twice else "is not UTF-8 text, or has NUL bytes"
        raise BadData(f"{path}: the line of column names {what}.", cure="Correct the first line.")
    return cells


def _table_row(names: list[str], cells: list[str], *, place: str, is_last: bool) -> dict[str, str] | BadData:
    if len(cells) != len(names):
        cut = f"; {CUT_OFF}, perhaps" if is_last and len(cells) < len(names) else ""
        return BadData(f"{place}: {len(cells)} cells where {len(names)} columns are{cut}.", cure=CORRECT)
    if not all(map(_is_text, cells)):
        return BadData(f"{place}: not UTF-8 text, or with NUL bytes.", cure="Save the file as UTF-8.")
    return dict(zip(names, cells, strict=True))


def _is_text(cell: str) -> bool:
    return cell.isascii() or not any("\ud800" <= character <= "\udfff" for character in cell)
