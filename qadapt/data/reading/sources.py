"""Rows out of files, folders of them and datasets of the hub, by the recipe's rules: which, in what shape.

Knows files and rows, not tokens. A file is read row by row; paths are relative to the folder the command runs
in. What is not read is never lost: it stops the reading, or it is on one of the lists of the reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from qadapt.data.conversation import Row
from qadapt.data.reading.column_files import read_arrow, read_parquet
from qadapt.data.reading.formats import Format, map_columns, read_row, recognise
from qadapt.data.reading.json_files import read_json, read_json_lines
from qadapt.data.reading.opened import FETCH, PACKED
from qadapt.data.reading.table_files import read_table
from qadapt.data.reading.text_files import read_text
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
_TEXTS: dict[str, ReadRows] = {".txt": read_text, ".md": read_text}
"""Documents; in a folder only where it has no files of rows, beside which they are notes about them."""
_COMPRESSIBLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md")
SUFFIXES = (*_READERS, *_TEXTS)
"""Ends of the names of files that are read; those of text also with one of `PACKED` behind."""

HUB = "hub:"
"""Begins the path of a dataset of the hub."""
MOST_LISTED = 100_000
"""So many rows left out are listed one by one; of more, only the count grows."""
MOST_CHARACTERS = 1000
"""So much of each one's problem is kept."""

_FACTS_OF_DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json")
"""What `datasets` writes beside the rows."""
_STATE, _SPLITS = "state.json", "dataset_dict.json"


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

    def rows(
        self, path: Path | str, *, limit: int | None = None, split: str = "train", subset: str | None = None
    ) -> Iterator[Row]:
        """The rows of a source one by one, in their order; those of a folder sorted by the files' names.

        Args:
            path: A file of one of `SUFFIXES`; a folder with such files at any depth, or that `datasets`
            saved;
                or `hub:owner/name` for a dataset of the hub, `hub:owner/name@revision` for one state of it.
            limit: Use only so many rows.
            split: The split of a dataset that has several.
            subset: The subset (configuration) of a dataset of the hub that has several.

        Raises:
            BadData: It is missing, empty or unreadable, or a row is no conversation; names file and line.
                Rows before the fault were given.
        """
        counted, listed, used = self.skipped_rows, len(self.skipped), 0
        for part in self._parts(str(path), split=split, subset=subset):
            for row in self._used(*part):
                yield row
                used += 1
                if used == limit:
                    return
        if not used:
            raise self._nothing(path, counted=counted, listed=listed)

    def read(self, path: Path | str, *, limit: int | None = None) -> list[Row]:
        """All rows of a file or a folder at once; see `rows`.

        Raises:
            BadData: It is missing, empty or unreadable, or a row is no conversation; names file and line.
        """
        return list(self.rows(path, limit=limit))

    def _parts(
        self, path: str, *, split: str, subset: str | None
    ) -> Iterator[tuple[Iterator[tuple[str, object]], Mapping[str, str]]]:
        """What is of one format, the rows of each file or of a dataset of the hub, and their columns."""
        if path.startswith(HUB):
            from qadapt.data.reading.hub_rows import read_hub

            yield read_hub(path.removeprefix(HUB), split=split, subset=subset), self.columns
            return
        folder = Path(path)
        has_splits = (folder / _SPLITS).is_file()
        if subset is not None or (split != "train" and not has_splits):
            what = f"subset {subset!r}" if subset is not None else f"split {split!r}"
            raise BadData(
                f"{path} is a local {'folder' if folder.is_dir() else 'file'} and has no {what}: that is for "
                "datasets of the hub.",
                cure=f"Leave it out, or give {HUB}owner/name.",
            )
        for file in self._files(_split_folder(folder, split) if has_splits else folder):
            yield _rows(file), {} if _kind_of(file) in _TEXTS else self.columns

    def _nothing(self, path: Path | str, *, counted: int, listed: int) -> BadData:
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
        kinds = {file: kind for file in inside if (kind := _kind_of(file)) is not None}
        if any(kind in _READERS for kind in kinds.values()):
            kinds = {file: kind for file, kind in kinds.items() if kind in _READERS}
        if not kinds:
            raise BadData(f"The folder {path} has no files of rows.", cure=f"Give {', '.join(SUFFIXES)}.")
        saved = {folder: _saved(folder) for folder in {file.parent for file in kinds}}
        files = [file for file, kind in kinds.items() if kind != ".arrow" or _is_of(file, saved[file.parent])]
        self.other_files += [file for file in inside if file not in files]
        return files

    def _used(self, rows: Iterator[tuple[str, object]], columns: Mapping[str, str]) -> Iterator[Row]:
        known: Format | None = None if self.form == "auto" else cast("Format", self.form)
        for place, row in rows:
            try:
                if isinstance(row, BadData):
                    raise row
                mapped = map_columns(row, columns, place=place)
                form = known or recognise(mapped, place=place)
                used = read_row(mapped, form, place=place)
            except BadData as error:
                if not self.skips_malformed:
                    raise
                self._skip(place, error.problem)
                continue
            known = form
            self.formats[form] = self.formats.get(form, 0) + 1
            yield used

    def _skip(self, place: str, problem: str) -> None:
        self.skipped_rows += 1
        if len(self.skipped) < MOST_LISTED:
            text = problem if len(problem) <= MOST_CHARACTERS else f"{problem[:MOST_CHARACTERS]}..."
            self.skipped.append(Skipped(place, text))


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _saved(folder: Path) -> list[Path] | None:
    """The files that `datasets` lists as those of a dataset it saved in a folder; None if it saved none."""
    try:
        files = json.loads((folder / _STATE).read_bytes())["_data_files"]
        return [folder / str(each["filename"]) for each in files]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_of(file: Path, saved: list[Path] | None) -> bool:
    """Whether a file has rows: beside those of a saved dataset lie caches.

    Raises:
        BadData: A file of the saved dataset is missing.
    """
    if saved is None:
        return True
    for each in saved:
        if not each.is_file():
            raise BadData(f"{each} is missing, which {_STATE} beside it lists.", cure=FETCH)
    return file in saved


def _split_folder(folder: Path, split: str) -> Path:
    """The folder of one split of those that `datasets` saved together.

    Raises:
        BadData: There is none of that name.
    """
    try:
        listed = json.loads((folder / _SPLITS).read_bytes())["splits"]
        splits = sorted(str(name) for name in listed)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise BadData(f"{folder / _SPLITS} is damaged: it lists no splits.", cure=FETCH) from None
    if split not in splits:
        raise BadData(
            f"{folder} has no split {split!r}; it has {', '.join(splits)}.",
            cure=f"Set the source's split, such as split: {splits[0] if splits else 'train'}.",
        )
    return folder / split


def _kind_of(path: Path) -> str | None:
    """The suffix that says how to read a file, or None."""
    name = path.name.lower()
    packed = next((suffix for suffix in PACKED if name.endswith(suffix)), "")
    name = name.removesuffix(packed)
    kind = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    return None if packed and kind not in _COMPRESSIBLE else kind


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    kind = _kind_of(path)
    if kind is None:
        raise BadData(
            f"{path} ends in {path.suffix.lower()!r}, which is not read.",
            cure=f"Give one of: {', '.join(SUFFIXES)}; those of text also compressed: {', '.join(PACKED)}.",
        )
    return (_READERS | _TEXTS)[kind](path)
