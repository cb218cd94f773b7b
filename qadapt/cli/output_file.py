"""Files that a command draws: refused before anything is computed, then whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from qadapt.errors import BadOutput, BadRecipe


def check_place(path: Path, option: str, *, what: str, suffixes: tuple[str, ...], example: str) -> None:
    """Refuses a place where a file cannot be.

    Args:
        path: What the user gave.
        option: The option it was given by.
        what: What will be written, such as `the picture is an SVG`.
        suffixes: How its name may end.
        example: A name that will do.

    Raises:
        BadRecipe: The name ends otherwise.
        BadOutput: It is a folder, or lies in none.
    """
    cure = f"Give a file such as {example}."
    if path.suffix.lower() not in suffixes:
        raise BadRecipe(f"{option} is {str(path)!r}: {what}.", cure=cure)
    if path.is_dir():
        raise BadOutput(f"{option} is {str(path)!r}, which is a folder.", cure=cure)
    if not path.absolute().parent.is_dir():
        raise BadOutput(
            f"{option} is {str(path)!r}, and there is no folder {str(path.parent)!r}.",
            cure="Make the folder first, or give another one.",
        )


def write_whole(path: Path, text: str) -> None:
    """Puts a file in its place, whole; one that is there already is replaced.

    Raises:
        BadOutput: The place is read-only or full.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        raise BadOutput(
            f"{path} cannot be written: {error.strerror}.",
            cure="Give a place that is writable for this user and has room.",
        ) from None
    finally:
        if temporary.exists():
            temporary.unlink()
