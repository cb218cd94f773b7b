"""Rows out of JSON: lines, one list, or an object with one list; plain or compressed.

A reader yields each row with its place, such as `train.jsonl, line 12`, and in place of a row that cannot be
read the `BadData` that says why: whoever reads decides whether to stop. A fault of the whole file is raised.
Knows syntax, not what a row means. Nothing is held but the row that is being read.

What JSON calls an error at the very end of a file is a file cut off in the middle, and named so.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qadapt.data.reading import opened
from qadapt.data.reading.opened import CORRECT, CUT_OFF, FETCH, lines
from qadapt.errors import BadData

CHUNK_BYTES = 2**20
_DECODER = json.JSONDecoder()
_COLUMNS_OF_TURNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
_WHITE = re.compile(r"[ \t\n\r]*")


def read_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """One row per line; empty lines are none."""
    for number, line, is_ended in lines(path):
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

    An object is read twice: what it holds shows at its end.

    Raises:
        BadData: The file holds something else, or is no JSON; rows of a list before the fault were given.
    """
    with opened.opened(path) as file:
        window = _Window(file, path)
        mark = window.peek()
        if mark == "[":
            is_whole = yield from _list_rows(window)
            if is_whole and window.peek():
                raise BadData(f"{path}: something stands after the end of the list.", cure="Remove it.")
            return
        if not mark:
            return
        with _named(window, path):
            lists, is_lines = _outline(window)
    if is_lines:
        yield from read_json_lines(path)
    elif lists and not any(key in _COLUMNS_OF_TURNS for key in lists):
        yield from _rows_under(lists, path=path)
    else:
        with opened.opened(path) as file:
            yield f"{path}, row 1", _Window(file, path).take_value()


def _outline(window: _Window) -> tuple[list[str], bool]:
    """The keys of an object that hold lists of objects, and whether lines of other objects follow it."""
    if window.peek() != "{":
        window.take_value()
        raise BadData(
            f"{window.path} holds no list of rows.", cure="Wrap the rows in [ ], or use JSON lines (.jsonl)."
        )
    first = window.line()
    lists = [key for key in window.each_key() if _skip_value(window)]
    last = window.line()
    if not window.peek():
        return lists, False
    if first != last or window.line() == last:
        raise json.JSONDecodeError("Extra data", window.text, window.position)
    return lists, True


def _skip_value(window: _Window) -> bool:
    """Goes behind a value without holding it: whether it is a list of objects."""
    if window.peek() != "[":
        window.take_value()
        return False
    is_of_objects = False
    for number, _ in enumerate(window.each_item()):
        is_of_objects = is_of_objects or (number == 0 and window.peek() == "{")
        window.take_value()
    return is_of_objects


def _rows_under(keys: list[str], *, path: Path) -> Iterator[tuple[str, object]]:
    """The rows of the one list in an object that is sound."""
    if len(keys) > 1:
        raise BadData(
            f"{path} holds several lists of rows: {', '.join(map(repr, keys[:6]))}.",
            cure="Give one list in a file.",
        )
    with opened.opened(path) as file:
        window = _Window(file, path)
        for key in window.each_key():
            if key == keys[0]:
                yield from _list_rows(window, under=f" of {key!r}")
                return
            _skip_value(window)


def _list_rows(window: _Window, *, under: str = "") -> Generator[tuple[str, object], None, bool]:
    """Rows of a list one by one; a fault takes the place of the rest. Returns whether there was none."""
    number = 0
    window.peek()
    window.position += 1
    is_open = window.peek() != "]"
    while is_open:
        number += 1
        window.peek()
        place = f"{window.path}, row {number}{under} (line {window.line()})"
        try:
            row = window.take_value()
            mark = window.next_mark("]")
        except (ValueError, RecursionError) as error:
            yield place, _no_json(error, place=place, is_last=True, line=window.first_line)
            return False
        yield place, row
        is_open = mark == ","
        window.position += is_open
    window.position += 1
    return True


class _Window:
    """The part of a JSON file that is being read: it grows to the longest value, not to the file."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.text = ""
        self.position = 0
        self.first_line = 1
        self.path = path
        self._file = file
        self._counted, self._line = 0, 1  # of the line ends before the first, the second is the sum
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def line(self) -> int:
        """The line of the position."""
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def each_key(self) -> Iterator[str]:
        """The keys of the object at the position; whoever asks goes behind the value of each."""
        self.peek()
        self.position += 1
        mark = "," if self.peek() != "}" else "}"
        while mark == ",":
            if self.peek() != '"':
                raise self._expected("property name enclosed in double quotes")
            key = str(self.take_value())
            if self.peek() != ":":
                raise self._expected("':' delimiter")
            self.position += 1
            yield key
            mark = self.next_mark("}")
            self.position += mark == ","
        self.position += 1

    def each_item(self) -> Iterator[None]:
        """Once for each value of the list at the position; whoever asks goes behind it."""
        self.peek()
        self.position += 1
        mark = "," if self.peek() != "]" else "]"
        while mark == ",":
            self.peek()
            yield
            mark = self.next_mark("]")
            self.position += mark == ","
        self.position += 1

    def next_mark(self, end: str) -> str:
        """The comma after a value, or the end of what holds it."""
        mark = self.peek()
        if mark not in (",", end):
            raise self._expected("',' delimiter")
        return mark

    def _expected(self, what: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(f"Expecting {what}", self.text, self.position)

    def peek(self) -> str:
        """The next character that is not white, or nothing at the end."""
        while True:
            self.position = _skip_space(self.text, self.position)
            if self.position < len(self.text) or not self._grow():
                return self.text[self.position : self.position + 1]

    def take_value(self) -> object:
        """The value at the position, and goes behind it; more is read while more could change it."""
        self.peek()
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
        if len(kept) > opened.LONGEST_LINE_BYTES:
            place = f"{self.path}, line {self.line()}"
            raise BadData(
                f"{place}: longer than {opened.LONGEST_LINE_BYTES:,} bytes, so this is no row.", cure=FETCH
            )
        read = self._file.read(max(CHUNK_BYTES, len(kept)))
        try:
            more = self._decoder.decode(read, final=not read)
        except UnicodeDecodeError as error:
            before = self.text.count("\n") + error.object.count(b"\n", 0, error.start)
            reason = f"not UTF-8 text: {error.reason}" if read else CUT_OFF
            place = f"{self.path}, line {self.first_line + before}"
            raise BadData(f"{place}: {reason}.", cure="Save it as UTF-8." if read else FETCH) from None
        if read:
            self.first_line = self.line()
            self.text, self.position, self._counted = kept + more, 0, 0
        return bool(read)


@contextmanager
def _named(window: _Window, path: Path) -> Iterator[None]:
    """Turns what is no JSON into the fault of the whole file."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise _no_json(error, place=str(path), is_last=True, line=window.first_line) from None


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
        for word in ("true", "false", "null", "NaN", "Infinity", "-Infinity", ".", "e-", "E-", "e+", "E+")
    )


def _skip_space(text: str, start: int) -> int:
    found = _WHITE.match(text, start)
    assert found is not None  # it matches nothing, too
    return found.end()
