"""Rows out of text files: JSON lines, one JSON list, CSV and TSV, plain or compressed with gzip.

A reader yields each row with its place, such as `train.jsonl, line 12`, and in place of a row that cannot be
read the `BadData` that says why: whoever reads decides whether to stop. A fault of the whole file is raised.
Knows bytes and syntax, not what a row means.

What JSON calls an error at the very end of a file is a file cut off in the middle, and named so. A CSV file
cut off in an unquoted last cell cannot be told from a whole one.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from qadapt.errors import BadData

LONGEST_LINE_BYTES = 256 * 2**20
"""No row is this long; a file without line ends must not fill the memory."""
CORRECT = "Correct the line, or remove it."
CUT_OFF = "the file is cut off in the middle of this row"
FETCH = "Get the whole file again."
CHUNK_BYTES = 2**20
_DECODER = json.JSONDecoder()
_LISTS_OF_TURNS = ("messages", "conversations")
_WHITE = re.compile(r"[ \t\n\r]*")
_NO_TEXT = "\udc00"  # stands for a byte that is no text; UTF-8 never gives it
_BOM = b"\xef\xbb\xbf"
_UTF_16_32 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


def read_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """One row per line; empty lines are none."""
    for number, line, is_ended in _lines(path):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield place, _parse(line.decode(), place=place, is_last=not is_ended)
            except UnicodeDecodeError as error:
                is_cut = not is_ended and error.end == len(line)
                reason = CUT_OFF if is_cut else f"not UTF-8 text: {error.reason}"
                yield place, BadData(f"{place}: {reason}.", cure=FETCH if is_cut else "Save it as UTF-8.")
            except BadData as error:
                yield place, error


def read_json(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of one list, of the one list in an object, of an object that is a row, or JSON lines.

    Raises:
        BadData: The file holds something else, or is no JSON; rows before the fault were given.
    """
    with _open(path) as file:
        window = _Window(file, path)
        if window.peek() == "[":
            yield from _list_rows(window, path=path)
            return
    text = _whole_text(path).lstrip(" \t\r\n")
    if not text:
        return
    first_line, _, others = text.partition("\n")
    if others.strip() and _is_object(first_line):
        yield from read_json_lines(path)
    else:
        yield from _object_rows(_parse(text, place=str(path), is_last=True), path=path)


def read_table(path: Path, *, delimiter: str) -> Iterator[tuple[str, object]]:
    """The rows of a CSV file, every cell a text; the first line names the columns.

    After a quote that is broken nobody can tell where the next row begins, so all from there on is one fault.

    Raises:
        BadData: The first line does not name the columns.
    """
    lines = _TableLines(path)
    csv.field_size_limit(min(LONGEST_LINE_BYTES, 2**31 - 1))  # a text may be longer than the usual 128 KiB
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        first = lines.number + 1
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"{error}" if lines.is_at_end else f"broken quotes or line ends ({error})"
            yield lines.broken(first, problem, is_header=not names)
            return
        if not names:
            names = _column_names(cells, delimiter, path=path) if cells else []
        elif cells:
            place = f"{path}, line {first}"
            yield place, _table_row(names, cells, place=place, is_last=lines.is_cut)


class _TableLines:
    """The lines of a table as texts, and how far they were read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self.is_cut = False
        self.is_at_end = False
        self._lines = _lines(path)

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
        lines = f"lines {first} to {self.number}" if self.number > first else f"line {first}"
        if self.is_at_end and "unexpected end" in problem:
            problem = "a quote opens and never closes, or the file is cut off in it"
        fault = f"{self.path}, {lines}: {problem}; where the next row begins cannot be told."
        return f"{self.path}, {lines}", BadData(fault, cure="Double the quotes within quoted cells.")


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


def _list_rows(window: _Window, *, path: Path) -> Iterator[tuple[str, object]]:
    """Rows of a list one by one, so that those before a fault are there and the fault has its line."""
    number = 0
    window.position += 1
    is_open = window.peek() != "]"
    while is_open:
        number += 1
        window.peek()
        place = f"{path}, row {number} (line {window.line()})"
        try:
            row = window.take_value()
            mark = window.peek()
            if mark not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", window.text, window.position)
        except (ValueError, RecursionError) as error:
            yield place, _no_json(error, place=place, is_last=True, line=window.first_line)
            return
        yield place, row
        is_open = mark == ","
        window.position += is_open
    window.position += 1
    if window.peek():
        raise BadData(f"{path}: something stands after the end of the list.", cure="Remove it.")


class _Window:
    """The part of a JSON file that is being read: it grows to the longest value, not to the file."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.text = ""
        self.position = 0
        self.first_line = 1
        self._file = file
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def line(self) -> int:
        """The line of the position."""
        return self.first_line + self.text.count("\n", 0, self.position)

    def peek(self) -> str:
        """The next character that is not white, or nothing at the end."""
        while True:
            self.position = _skip_space(self.text, self.position)
            if self.position < len(self.text) or not self._grow():
                return self.text[self.position : self.position + 1]

    def take_value(self) -> object:
        """The value at the position, and goes behind it; more is read while more could change it."""
        while True:
            found = self._value_so_far()
            # the number 1e+5 may stand in the window as 1e+ so far, of which 1 is a value
            if found is not None and (found[1] + 2 < len(self.text) or not self._grow()):
                value, self.position = found
                return value

    def _value_so_far(self) -> tuple[object, int] | None:
        """The value at the position and where it ends, or None if more had to be read first."""
        try:
            return _DECODER.raw_decode(self.text, self.position)
        except json.JSONDecodeError as error:
            if not _is_cut(error) or not self._grow():
                raise
            return None

    def _grow(self) -> bool:
        """Reads on, at least as much as is kept, and forgets what is behind: whether there was any more."""
        kept = self.text[self.position :]
        if len(kept) > LONGEST_LINE_BYTES:
            place = f"{self._path}, line {self.line()}"
            raise BadData(
                f"{place}: longer than {LONGEST_LINE_BYTES:,} bytes, so this is no row.", cure=FETCH
            )
        read = self._file.read(max(CHUNK_BYTES, len(kept)))
        try:
            more = self._decoder.decode(read, final=not read)
        except UnicodeDecodeError as error:
            before = self.text.count("\n") + error.object.count(b"\n", 0, error.start)
            reason = f"not UTF-8 text: {error.reason}" if read else CUT_OFF
            place = f"{self._path}, line {self.first_line + before}"
            raise BadData(f"{place}: {reason}.", cure="Save it as UTF-8." if read else FETCH) from None
        if read:
            self.first_line = self.line()
            self.text, self.position = kept + more, 0
        return bool(read)


def _object_rows(value: object, *, path: Path) -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict):
        raise BadData(
            f"{path} holds no list of rows.", cure="Wrap the rows in [ ], or use JSON lines (.jsonl)."
        )
    lists = [key for key, inner in value.items() if _is_list_of_objects(inner)]
    if not lists or any(key in _LISTS_OF_TURNS for key in lists):
        yield f"{path}, row 1", value
        return
    if len(lists) > 1:
        raise BadData(
            f"{path} holds several lists of rows: {', '.join(map(repr, lists[:6]))}.",
            cure="Give one list in a file.",
        )
    for number, row in enumerate(value[lists[0]], 1):
        yield f"{path}, row {number} of {lists[0]!r}", row


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse(text: str, *, place: str, is_last: bool) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_json(error, place=place, is_last=is_last) from None


def _no_json(
    error: ValueError | RecursionError, *, place: str, is_last: bool, line: int | None = None
) -> BadData:
    """What is wrong with a text; `line` numbers its first line, where the place does not."""
    if isinstance(error, RecursionError):
        return BadData(f"{place}: nested too deeply.", cure=CORRECT)
    if not isinstance(error, json.JSONDecodeError):
        return BadData(f"{place}: not JSON: {error}.", cure=CORRECT)
    reason = f"{error}" if line is None else f"{error.msg} in line {line + error.lineno - 1}"
    if is_last and _is_cut(error):
        return BadData(f"{place}: {CUT_OFF}: {reason}.", cure=FETCH)
    return BadData(f"{place}: not JSON: {reason}.", cure=CORRECT)


def _is_cut(error: json.JSONDecodeError) -> bool:
    """Whether more text could have cured the error: it stands at the very end, or in what never ends."""
    rest = error.doc[error.pos : error.pos + 20].rstrip()
    if not rest or error.msg.startswith("Unterminated string"):
        return True
    if error.msg.startswith("Invalid \\"):
        return len(rest) < 6
    return any(
        word.startswith(rest)
        for word in ("true", "false", "null", "NaN", "-Infinity", ".", "e-", "E-", "e+", "E+")
    )


def _skip_space(text: str, start: int) -> int:
    found = _WHITE.match(text, start)
    assert found is not None  # it matches nothing, too
    return found.end()


def _whole_text(path: Path) -> str:
    with _open(path) as file:
        content = file.read()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadData(
            f"{path}, line {line}: not UTF-8 text: {error.reason}.", cure="Save the file as UTF-8."
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Number, bytes and whether a line end follows, for each line."""
    with _open(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE_BYTES):
            number += 1
            is_ended = line.endswith(b"\n")
            if len(line) == LONGEST_LINE_BYTES and not is_ended:
                raise BadData(
                    f"{path}, line {number}: longer than {LONGEST_LINE_BYTES:,} bytes, so this is no row.",
                    cure="Give a file with one row per line.",
                )
            yield number, line, is_ended


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file after its byte order mark, unpacked."""
    try:
        is_packed = path.suffix.lower() == ".gz"
        opened = cast("IO[bytes]", gzip.open(path)) if is_packed else path.open("rb")  # noqa: SIM115
        with opened as file:
            start = file.read(4)
            if start.startswith(_UTF_16_32):
                raise BadData(f"{path} is UTF-16 or UTF-32, not UTF-8 text.", cure="Save the file as UTF-8.")
            file.seek(len(_BOM) if start.startswith(_BOM) else 0)
            yield file
    except EOFError:
        raise BadData(f"{path}: the compressed file is cut off in the middle.", cure=FETCH) from None
    except (OSError, zlib.error) as error:
        raise BadData(f"{path} cannot be read: {error}", cure="Give a readable file.") from None
