"""The bytes of a file of text: unpacked, without byte order mark, by the line; no line fills the memory.

Knows bytes and compressions, no syntax. A file that was cut off in the middle of its compression is named so.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from qadapt.errors import BadData

LONGEST_LINE_BYTES = 256 * 2**20
"""No row is this long; a file without line ends must not fill the memory."""
CORRECT = "Correct the line, or remove it."
CUT_OFF = "the file is cut off in the middle of this row"
FETCH = "Get the whole file again."
PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Ends of the names of compressed files."""
_BOM = b"\xef\xbb\xbf"
_UTF_16_32 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file after its byte order mark, unpacked.

    Raises:
        BadData: It cannot be read, is cut off in its compression, or is no UTF-8 by its first bytes.
    """
    try:
        with _unpacked(path) as file:
            start = file.read(4)
            if start.startswith(_UTF_16_32):
                raise BadData(f"{path} is UTF-16 or UTF-32, not UTF-8 text.", cure="Save the file as UTF-8.")
            file.seek(len(_BOM) if start.startswith(_BOM) else 0)
            yield file
    except EOFError:
        raise BadData(f"{path}: the compressed file is cut off in the middle.", cure=FETCH) from None
    except (OSError, zlib.error, lzma.LZMAError) as error:
        raise BadData(f"{path} cannot be read: {error}", cure="Give a readable file.") from None


def lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Number, bytes and whether a line end follows, for each line.

    Raises:
        BadData: As `opened`; or a line is longer than `LONGEST_LINE_BYTES`.
    """
    with opened(path) as file:
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


def _unpacked(path: Path) -> IO[bytes]:
    kind = path.suffix.lower()
    if kind == ".gz":
        return cast("IO[bytes]", gzip.open(path))
    if kind == ".bz2":
        return cast("IO[bytes]", bz2.open(path))
    if kind == ".xz":
        return cast("IO[bytes]", lzma.open(path))
    return _unpacked_zstandard(path) if kind == ".zst" else path.open("rb")


def _unpacked_zstandard(path: Path) -> IO[bytes]:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return cast("IO[bytes]", zstd.open(path))
    raise BadData(
        f"{path} is compressed with Zstandard, which Python reads from 3.14 on; this is "
        f"{sys.version_info.major}.{sys.version_info.minor}.",
        cure=f"Unpack it: unzstd {path.name}",
    )
