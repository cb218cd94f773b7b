"""Raw text out of plain files: a file is one document, an enormous one several.

Yields as `json_files.py` does: each document with its place, or the `BadData` of one that cannot be read.
Line ends of Windows become plain ones, as Python reads text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qadapt.data.reading.opened import FETCH, opened
from qadapt.errors import BadData

PIECE_BYTES = 16 * 2**20
"""A longer file is read in pieces of at most so many bytes, cut after a line, so that memory is bounded."""


def read_text(path: Path) -> Iterator[tuple[str, object]]:
    """The text of a file as `{"text": ...}`; of an enormous one several, each cut after a line."""
    number = 1
    with opened(path) as file:
        rest = b""
        while piece := rest + file.read(PIECE_BYTES - len(rest)):
            cut = _cut(piece) if len(piece) == PIECE_BYTES else len(piece)
            place = f"{path}, line {number}"
            yield place, _document(piece[:cut], number=number, path=path)
            number += piece.count(b"\n", 0, cut)
            rest = piece[cut:]


def _cut(piece: bytes) -> int:
    """Where to cut: after the last line, or the last word, or the last whole character."""
    cut = max(piece.rfind(b"\n"), 0) or max(piece.rfind(b" "), 0)
    if cut:
        return cut + 1
    last = next((at for at in range(1, 5) if piece[-at] & 0xC0 != 0x80), 1)
    return len(piece) - last


def _document(content: bytes, *, number: int, path: Path) -> object:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        place = f"{path}, line {number + content.count(bytes([10]), 0, error.start)}"
        if error.end == len(content) and error.reason == "unexpected end of data":
            return BadData(f"{place}: the file is cut off in the middle of a character.", cure=FETCH)
        return BadData(f"{place}: not UTF-8 text: {error.reason}.", cure="Save it as UTF-8.")
    if "\0" in text:
        line = number + text.count("\n", 0, text.index("\0"))
        return BadData(f"{path}, line {line}: NUL bytes, so this is no text.", cure="Give a file of text.")
    return {"text": text.replace("\r\n", "\n").replace("\r", "\n")}
