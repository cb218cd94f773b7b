"""Files and rows as people have them: every shape read alike, every fault named, no row lost in silence."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from row_files import ASKED, PAIR, TURNS, contents, documents, problem_of, texts, write_rows

from qadapt.data.conversation import Message
from qadapt.data.reading import column_files, json_files, opened, sources, text_files
from qadapt.data.reading.sources import RowReader
from qadapt.errors import BadData, BadRecipe
from qadapt.events import DataReady, Warned
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe, dump_yaml, load_yaml
from qadapt.run_folder import RunFolder
from qadapt.view.lines import describe

if TYPE_CHECKING:
    from conftest import TinyModel


def as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


def as_arrow(rows: list[dict[str, str]], *, is_stream: bool = True) -> bytes:
    table, buffer = pyarrow.Table.from_pylist(rows), io.BytesIO()
    write = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    with write(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def as_parquet(rows: list[dict[str, str]]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def as_lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


WRITERS: list[tuple[str, Callable[[list[dict[str, str]]], bytes]]] = [
    ("a.jsonl", as_lines),
    ("a.ndjson", as_lines),
    ("bom.jsonl", lambda rows: b"\xef\xbb\xbf" + as_lines(rows)),
    ("crlf.jsonl", lambda rows: as_lines(rows).replace(b"\n", b"\r\n")),
    ("gaps.jsonl", lambda rows: b"\n \n" + as_lines(rows).replace(b"\n", b"\n\n")),
    ("a.json", lambda rows: json.dumps(rows).encode()),
    ("pretty.json", lambda rows: b"\xef\xbb\xbf" + json.dumps(rows, indent=2).encode() + b"\r\n"),
    ("lines.json", as_lines),
    ("under.json", lambda rows: json.dumps({"version": 1, "data": rows}).encode()),
    ("a.csv", as_csv),
    ("bom.csv", lambda rows: b"\xef\xbb\xbf" + as_csv(rows)),
    ("lf.csv", lambda rows: as_csv(rows).replace(b"\r\n", b"\n")),
    ("a.tsv", lambda rows: as_csv(rows, "\t")),
    ("a.parquet", as_parquet),
    ("stream.arrow", as_arrow),
    ("file.arrow", lambda rows: as_arrow(rows, is_stream=False)),
    ("A.JSONL.GZ", lambda rows: gzip.compress(as_lines(rows))),
    ("a.json.gz", lambda rows: gzip.compress(json.dumps(rows).encode())),
    ("a.csv.gz", lambda rows: gzip.compress(b"\xef\xbb\xbf" + as_csv(rows))),
    ("a.jsonl.bz2", lambda rows: bz2.compress(as_lines(rows))),
    ("a.csv.xz", lambda rows: lzma.compress(b"\xef\xbb\xbf" + as_csv(rows))),
    ("after.json", lambda rows: b" \n" + json.dumps({"rows": rows, "sources": ["a"]}, indent=1).encode()),
]
ROWS = [{"prompt": f"say {number},\t«é»", "completion": f'"{number}",\nno more'} for number in range(2003)]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[list[dict[str, str]]], bytes]
) -> None:
    rows = (
        [{**row, "completion": row["completion"].replace("\n", " ")} for row in ROWS]
        if "lf" in name
        else ROWS
    )
    path = tmp_path / name
    path.write_bytes(write(rows))
    read = RowReader().read(path)
    expected = [(Message("user", row["prompt"]), Message("assistant", row["completion"])) for row in rows]
    assert texts(read) == expected
    assert texts(RowReader().read(path, limit=3)) == expected[:3]
    assert len({conversation.place for conversation in read}) == len(rows)


def test_a_place_is_the_line_where_the_row_begins(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text('prompt,completion\n"a\nb",c\n\nd,e\n', encoding="utf-8")
    assert [row.place for row in RowReader().read(table)] == [f"{table}, line 2", f"{table}, line 5"]
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps([PAIR, PAIR], indent=1), encoding="utf-8")
    assert [row.place for row in RowReader().read(listed)] == [
        f"{listed}, row 1 (line 2)",
        f"{listed}, row 2 (line 6)",
    ]


def test_a_folder_is_read_by_name_at_any_depth_and_other_files_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "deep").mkdir(parents=True)
    write_rows(folder / "b.jsonl", {"prompt": "b", "completion": "b"})
    (folder / "deep" / "a.csv").write_bytes(as_csv([{"question": "c", "answer": "c"}]))
    write_rows(folder / "a.jsonl", {"prompt": "a", "completion": "a"})
    (folder / "README.md").write_text("about", encoding="utf-8")
    (folder / ".cache").mkdir()
    write_rows(folder / ".cache" / "x.jsonl", PAIR)
    write_rows(folder / "dataset_info.json", {"builder_name": "x"})
    reader = RowReader()
    assert [row.messages[0].content for row in reader.read(folder)] == ["a", "b", "c"]
    assert reader.other_files == [folder / "README.md"]
    assert reader.formats == {"prompt-completion": 2, "question-answer": 1}
    assert len(RowReader().read(folder, limit=2)) == 2
    (tmp_path / "empty").mkdir()
    assert "has no files of rows" in problem_of(tmp_path / "empty")


def test_plain_text_is_one_document_per_file(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfOnce\r\nupon a time.\r\n")
    (folder / "b.md.xz").write_bytes(lzma.compress("# é\n".encode()))
    reader = RowReader(columns={"text": "story"})
    assert documents(reader.read(folder)) == ["Once\nupon a time.\n", "# é\n"]
    assert reader.formats == {"text": 2}
    assert not reader.other_files
    assert "the row has no `messages`" in problem_of(folder / "a.txt", form="messages")


def test_an_enormous_text_is_read_in_pieces_cut_after_lines_or_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "PIECE_BYTES", 10)
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\nthree four five\n" + "é" * 11, encoding="utf-8")
    rows = RowReader().read(path)
    assert documents(rows) == ["one\ntwo\n", "three ", "four five\n", "é" * 4, "é" * 4, "é" * 3]
    lines = [1, 3, 3, 4, 4, 4]
    assert [row.place for row in rows] == [f"{path}, line {line}" for line in lines]
    path.write_bytes(b"one\ntwo\n\xff\xff\nfour\nfive\nsix\n")
    reader = RowReader(skips_malformed=True)
    assert documents(reader.read(path)) == ["one\ntwo\n", "five\nsix\n"]
    assert [skipped.problem for skipped in reader.skipped] == [
        f"{path}, line 3: not UTF-8 text: invalid start byte."
    ]


def test_what_python_cannot_unpack_yet_says_how_to(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    if sys.version_info >= (3, 14):
        assert "cannot be read" in problem_of(path) or "cut off" in problem_of(path)
    else:
        with pytest.raises(BadData, match=r"Zstandard, which Python reads from 3\.14 on") as caught:
            RowReader().read(path)
        assert caught.value.cure == "Unpack it: unzstd rows.jsonl.zst"


def test_splits_saved_together_are_not_mixed(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    splits = {"train": Dataset.from_list([PAIR] * 3), "test": Dataset.from_list([PAIR] * 2)}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert len(RowReader().read(tmp_path / "saved")) == 3
    assert len(list(RowReader().rows(tmp_path / "saved", split="test"))) == 2
    with pytest.raises(BadData, match="has no split 'dev'; it has test, train"):
        list(RowReader().rows(tmp_path / "saved", split="dev"))
    (tmp_path / "saved" / "dataset_dict.json").write_text("{", encoding="utf-8")
    assert "dataset_dict.json is damaged" in problem_of(tmp_path / "saved")


def test_caches_beside_a_saved_dataset_are_no_rows(tmp_path: Path) -> None:
    from datasets import Dataset, disable_progress_bars, load_from_disk

    disable_progress_bars()
    Dataset.from_list([PAIR] * 4).save_to_disk(tmp_path / "saved", num_shards=2)
    load_from_disk(tmp_path / "saved").map(lambda row: row, load_from_cache_file=False)
    [cache] = (tmp_path / "saved").glob("cache-*.arrow")
    reader = RowReader()
    assert len(reader.read(tmp_path / "saved")) == 4
    assert reader.other_files == [cache]
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow is missing, which state.json" in problem_of(tmp_path / "saved")


def test_what_datasets_saves_is_read_as_a_folder(tmp_path: Path) -> None:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    Dataset.from_list([{"messages": TURNS}] * 5).save_to_disk(tmp_path / "saved")
    assert texts(RowReader().read(tmp_path / "saved")) == [ASKED] * 5


FAULTS: list[tuple[str, bytes, str]] = [
    ("a.jsonl", as_lines([PAIR]) + b'{"prompt": "x", "comp', "line 2: the file is cut off in the middle"),
    ("a.jsonl", as_lines([PAIR]) + b'{"prompt": "x",', "line 2: the file is cut off in the middle"),
    ("a.jsonl", as_lines([PAIR]) + b'{"prompt": "\xc3', "line 2: the file is cut off in the middle"),
    ("a.jsonl", as_lines([PAIR]) + b'{"prompt": "x",\n', "line 2: not JSON"),
    ("a.jsonl", as_lines([PAIR]) + b'{"prompt": x}', "line 2: not JSON"),
    ("a.jsonl", as_lines([PAIR]) + b"[" * 100_000 + b"\n", "line 2: nested too deeply"),
    (
        "a.jsonl",
        as_lines([PAIR]) + b'{"prompt": ' + b"7" * 5000 + b"}\n",
        "line 2: not JSON: Exceeds the limit",
    ),
    ("a.jsonl", "caf\xe9\n".encode("latin-1"), "line 1: not UTF-8 text"),
    ("a.jsonl", as_lines([PAIR]).decode().encode("utf-16"), "is UTF-16 or UTF-32"),
    ("a.jsonl", as_lines([PAIR]) + b"\0" * 50, "line 2: not JSON"),
    ("a.json", json.dumps([PAIR, PAIR]).encode()[:-1], "row 2 (line 1): the file is cut off in the middle"),
    ("a.json", json.dumps([PAIR, PAIR]).encode()[:-9], "row 2 (line 1): the file is cut off in the middle"),
    ("a.json", b"[" + as_lines([PAIR])[:-1] + b",\n", "row 2 (line 2): the file is cut off in the middle"),
    ("a.json", json.dumps([PAIR]).encode() + b"]", "something stands after the end of the list"),
    ("a.json", b'{"data": [{"prompt": "x"', "a.json: the file is cut off in the middle"),
    ("a.json", b'{"a": [{"x": 1}], "b": [{"x": 1}]}', "several lists of rows: 'a', 'b'"),
    ("a.json", b'"text"', "holds no list of rows"),
    ("a.json", b"[" * 100_000, "nested too deeply"),
    ("a.json", b'{"a":' * 100_000, "nested too deeply"),
    ("a.json", b'[\n"caf\xe9"]', "line 2: not UTF-8 text"),
    ("a.csv", b'prompt,completion\na,b\n"c,d\ne,f\n', "lines 3 to 4: a quote opens and never closes"),
    ("a.csv", b'prompt,completion\na,b\n"c"x,d\ne,f\n', "lines 3 to 4: broken quotes or line ends"),
    ("a.csv", b"prompt,completion\na,b\nc,d,e\n", "line 3: 3 cells where 2 columns are."),
    ("a.csv", b"prompt,completion\na,b\nc", "line 3: 1 cells where 2 columns are; the file is cut off"),
    ("a.csv", b"prompt,completion\na,caf\xe9\n", "line 2: not UTF-8 text"),
    ("a.csv", b"prompt,completion\na,b\0\n", "line 2: not UTF-8 text, or with NUL bytes"),
    ("a.csv", b"prompt,prompt\na,b\n", "names 'prompt' twice"),
    ("a.csv", b"prompt;completion\na;b\n", "is separated by ';'; ',' is read here"),
    ("a.csv", b'"prompt\na,b\n', "the line of column names has"),
    ("a.csv", b"prompt,completion\n", "has no rows"),
    ("a.parquet", as_parquet([PAIR])[:-20], "cut off in the middle"),
    ("a.parquet", b"PAR1" + b"\xff" * 40 + b"PAR1", "cannot be read"),
    ("a.arrow", as_arrow([PAIR])[:-8], "cut off in the middle"),
    ("a.arrow", as_arrow([PAIR], is_stream=False)[:-3], "cut off in the middle"),
    ("a.jsonl.gz", gzip.compress(as_lines(ROWS[:50]))[:-20], "the compressed file is cut off in the middle"),
    ("a.jsonl.gz", as_lines([PAIR]), "cannot be read: Not a gzipped file"),
    ("a.txt", "caf\xe9\n".encode("latin-1"), "line 1: not UTF-8 text"),
    ("a.txt", "one\ntwo é".encode()[:-1], "line 2: the file is cut off in the middle of a character"),
    ("a.md", b"one\ntwo\0\n", "line 2: NUL bytes, so this is no text"),
    ("a.txt", b" \n\n", "line 1: `text` is empty"),
    ("a.txt", b"", "has no rows"),
    ("a.jsonl.bz2", bz2.compress(as_lines(ROWS[:50]))[:-20], "the compressed file is cut off in the middle"),
    ("a.jsonl.xz", lzma.compress(as_lines(ROWS[:50]))[:-20], "the compressed file is cut off in the middle"),
    ("a.csv.bz2", as_lines([PAIR]), "cannot be read: Invalid data stream"),
    ("a.csv.xz", as_lines([PAIR]), "cannot be read: Input format not supported"),
    ("a.exe", b"MZ", "'.exe', which is not read"),
    ("a.json", b'{"data": [{"prompt": "x"}], 7: 8}', "a.json: not JSON: Expecting property name"),
    ("a.json", b'{"data" [{"prompt": "x"}]}', "a.json: not JSON: Expecting ':' delimiter"),
    ("a.json", b'{"data": [{"prompt": "x"} {}]}', "a.json: not JSON: Expecting ',' delimiter in line 1"),
    ("a.json", b'{\n"prompt": "x"}\n{"prompt": "x"}', "a.json: not JSON: Extra data in line 3"),
    ("a.json", b'{"prompt": "x"} {"prompt": "x"}', "a.json: not JSON: Extra data in line 1"),
    ("a.parquet.gz", b"", "'.gz', which is not read"),
]


@pytest.mark.parametrize(("name", "content", "said"), FAULTS)
def test_a_fault_of_a_file_is_named_with_its_place(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    problem = problem_of(path)
    assert said in problem
    assert str(path) in problem


def good_line(number: int) -> bytes:
    return json.dumps({"prompt": f"ask {number}", "completion": "x"}).encode()


def test_malformed_rows_are_left_out_only_if_asked_and_all_listed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [b"{broken", good_line(1), b'{"prompt": "x"}', b"\xff\xfe\xfd", good_line(2), b'{"prompt": "cut']
    path.write_bytes(b"\n".join(lines))
    assert "line 1: not JSON" in problem_of(path)
    reader = RowReader(skips_malformed=True)
    assert [row.messages[0].content for row in reader.read(path)] == ["ask 1", "ask 2"]
    assert [skipped.place for skipped in reader.skipped] == [f"{path}, line {line}" for line in (1, 3, 4, 6)]
    assert "line 6: the file is cut off" in reader.skipped[-1].problem
    path.write_bytes(b"{broken\n" * 3)
    assert "all 3 rows are malformed; the first: " in problem_of(path, skips_malformed=True)


def test_rows_are_given_one_by_one_before_the_fault_after_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good_line(1), b"{broken", good_line(2)]))
    rows = RowReader().rows(path)
    assert next(rows).place == f"{path}, line 1"
    with pytest.raises(BadData, match="line 2: not JSON"):
        next(rows)


def test_of_very_many_malformed_rows_the_first_are_listed_and_all_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MOST_LISTED", 3)
    monkeypatch.setattr(sources, "MOST_CHARACTERS", 20)
    path = tmp_path / "rows.jsonl"
    long = json.dumps({f"{number}-{'k' * 500}": 1 for number in range(9)}).encode()
    path.write_bytes(b"\n".join([good_line(1), *[long] * 9]))
    reader = RowReader(skips_malformed=True)
    assert len(reader.read(path)) == 1
    assert (len(reader.skipped), reader.skipped_rows) == (3, 9)
    assert all(len(skipped.problem) == 23 for skipped in reader.skipped)
    other = write_rows(tmp_path / "others.jsonl", {}, {})
    with pytest.raises(BadData, match=r"all 2 rows are malformed\."):
        reader.read(other)


def test_a_file_that_cannot_be_read_at_all_is_an_error_even_then(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(as_parquet([PAIR])[:-9])
    assert "cut off" in problem_of(path, skips_malformed=True)


def test_a_parquet_row_that_is_no_text_is_named_and_the_others_kept(tmp_path: Path) -> None:
    column = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"prompt": column, "completion": ["x", "y", "z"]}), path)
    assert "row 2: not UTF-8 text" in problem_of(path)
    reader = RowReader(skips_malformed=True)
    assert [row.messages[0].content for row in reader.read(path)] == ["a", "c"]
    assert len(reader.skipped) == 1


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "LONGEST_LINE_BYTES", 5000)
    path = write_rows(tmp_path / "rows.jsonl", PAIR, {"prompt": "x" * 6000, "completion": "y"})
    assert "line 2: longer than 5,000 bytes" in problem_of(path)


def test_a_long_text_in_a_table_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(as_csv([{"prompt": "x" * 300_000, "completion": "y"}]))
    assert len(RowReader().read(path)[0].messages[0].content) == 300_000


KEYS = ["messages", "conversations", "role", "from", "content", "value", "prompt", "completion", "tools"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
LINES = st.one_of(
    st.binary(min_size=1, max_size=60),
    st.sampled_from(
        [b"\0", b"\xff\xfe", b'{"prompt": "x", "completion": "y"', b'"', b"[" * 3000, b"{}", b"null"]
    ),
    st.sampled_from(["café", "中文"]).map(lambda text: text.encode("utf-16-le")),
    VALUES.map(lambda value: json.dumps(value).encode()),
).map(lambda line: line.replace(b"\n", b""))


@given(st.lists(LINES | st.just(good_line(7)), max_size=12), st.booleans())
def test_every_line_is_used_or_reported(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ends_in_line_end: bool
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    written = [good_line(7), *lines]
    path.write_bytes(b"\n".join(written) + (b"\n" if ends_in_line_end else b""))
    reader = RowReader(skips_malformed=True)
    used = reader.read(path)
    assert len(used) + len(reader.skipped) == sum(bool(line.strip()) for line in written)
    assert len(used) >= written.count(good_line(7))


SAMPLES = {
    "a.jsonl": as_lines(ROWS[:5]),
    "a.json": json.dumps(ROWS[:5], indent=1).encode(),
    "b.json": json.dumps({"data": ROWS[:5]}).encode(),
    "a.csv": as_csv(ROWS[:5]),
    "a.tsv": as_csv(ROWS[:5], "\t"),
    "a.jsonl.gz": gzip.compress(as_lines(ROWS[:5])),
    "a.csv.gz": gzip.compress(as_csv(ROWS[:5])),
    "b.csv.bz2": bz2.compress(as_csv(ROWS[:5])),
    "b.jsonl.xz": lzma.compress(as_lines(ROWS[:5])),
    "a.txt": "".join(f"line {number} «é»\r\n" for number in range(9)).encode(),
    "a.parquet": as_parquet(ROWS[:5]),
    "a.arrow": as_arrow(ROWS[:5]),
    "b.arrow": as_arrow(ROWS[:5], is_stream=False),
}
INSERTED = st.binary(max_size=6) | st.sampled_from([b'"', b"\0", b"\r", b"\\", b"\n", b",", b"\xff\xfe"])
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), INSERTED), min_size=1, max_size=4)


def damaged(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for share, removed, inserted in edits:
        place = round(share * len(content))
        content = content[:place] + inserted + content[place + removed :]
    return content


MARKS = st.sampled_from(["", "", "", '"', '""', '","', "\r", "\0", '" ', "é", ";"])


@settings(max_examples=100)
@given(st.lists(st.tuples(MARKS, MARKS, MARKS), min_size=1, max_size=8))
def test_every_line_of_a_table_with_broken_quotes_is_used_or_in_what_is_reported(
    tmp_path_factory: pytest.TempPathFactory, marks: list[tuple[str, str, str]]
) -> None:
    path = tmp_path_factory.mktemp("table") / "rows.csv"
    lines = [f"{a}<{number}>{b},x{c}" for number, (a, b, c) in enumerate(marks, 3)]
    path.write_bytes("\n".join(["prompt,completion", "whole,row", *lines, ""]).encode())
    reader = RowReader(skips_malformed=True)
    used = reader.read(path)
    begins = {int(row.place.rpartition(" ")[2]): True for row in used}
    for skipped in reader.skipped:
        begins[int(skipped.place.partition(", line")[2].lstrip("s ").split()[0])] = False
    assert min(begins) == 2
    assert len(begins) == len(used) + reader.skipped_rows
    text = "".join(contents(used))
    for number in range(3, len(lines) + 3):
        is_in_used_row = begins[max(begin for begin in begins if begin <= number)]
        assert (f"<{number}>" in text) == is_in_used_row, lines


@settings(max_examples=200)
@given(st.sampled_from(sorted(SAMPLES)), EDITS | st.binary(max_size=200), st.booleans())
def test_a_damaged_file_gives_rows_or_an_error_that_names_it(
    tmp_path_factory: pytest.TempPathFactory, name: str, damage: Any, skips: bool
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(damage if isinstance(damage, bytes) else damaged(SAMPLES[name], damage))
    try:
        read = RowReader(skips_malformed=skips).read(path)
    except BadData as error:
        assert str(path) in error.problem
        assert len(error.problem) < 2000
    else:
        assert all(content.encode() is not None for content in [*documents(read), *contents(read)])


@settings(max_examples=200)
@given(st.sampled_from(sorted(SAMPLES.keys() - {"a.txt"})), st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_loses_no_row_in_silence(
    tmp_path_factory: pytest.TempPathFactory, name: str, share: float
) -> None:
    """All rows, or an error; lines that end with a whole one are whole for all that can be known."""
    path = tmp_path_factory.mktemp("cut") / name
    content = SAMPLES[name]
    kept = content[: int(share * len(content))]
    path.write_bytes(kept)
    try:
        read = RowReader().read(path)
    except BadData as error:
        is_small = len(kept) < 60  # before the first row, or the mark of the format
        assert "cut off" in error.problem or is_small or name in ("a.csv", "a.tsv"), error.problem
    else:
        is_whole_lines = kept.rstrip().endswith(b"}") if "json" in name else name in ("a.csv", "a.tsv")
        assert len(read) == 5 or is_whole_lines


NUMBERS = st.floats(allow_nan=False) | st.integers(-(10**30), 10**30)


@given(
    st.lists(VALUES | NUMBERS, max_size=6), st.integers(0, 40), st.integers(1, 9), st.sampled_from([None, 1])
)
@example([float("inf"), float("nan")], 0, 1, None)
def test_a_list_of_json_is_read_the_same_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, values: list[object], cut: int, chunk: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "rows.json"
    whole = json.dumps([*values, "é𝄞"], indent=indent, ensure_ascii=chunk % 2 == 0).encode(errors="replace")
    cut = min(cut, len(whole))
    path.write_bytes(whole[: len(whole) - cut])

    def read() -> tuple[list[object], str]:
        try:
            found = list(json_files.read_json(path))
        except BadData as error:
            return [], error.problem
        is_fault = bool(found) and isinstance(found[-1][1], BadData)
        return found[:-1] if is_fault else found, str(found[-1][1]) if is_fault else ""

    rows, problem = read()
    assert ("cut off" in problem) == (0 < cut < len(whole))
    assert problem or cut or repr([row for _, row in rows]) == repr([*values, "é𝄞"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "CHUNK_BYTES", chunk)
        again, problem_again = read()
    assert (repr(again), problem_again) == (repr(rows), problem)


LEAVES = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=3), LEAVES, max_size=3), max_size=4)


@settings(max_examples=100)
@given(
    st.dictionaries(st.sampled_from(["data", "version", "more", "messages"]), LEAVES | OBJECTS, max_size=4),
    st.integers(0, 30),
    st.integers(1, 9),
    st.sampled_from([None, 1]),
)
def test_an_object_of_json_is_read_the_same_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any], cut: int, chunk: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "rows.json"
    whole = json.dumps(value, indent=indent).encode()
    cut = min(cut, len(whole) - 1)
    path.write_bytes(whole[: len(whole) - cut])
    lists = [key for key, inner in value.items() if isinstance(inner, list) and inner]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "CHUNK_BYTES", chunk)
        try:
            rows = [row for _, row in json_files.read_json(path)]
        except BadData as error:
            assert ("cut off" in error.problem) == bool(cut)
            assert cut or ("several lists of rows" in error.problem and len(lists) > 1)
        else:
            assert not cut
            assert rows == ([value] if not lists or "messages" in lists else value[lists[0]])


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.binary(max_size=2), st.integers(5, 12)
)
def test_any_text_is_read_whole_in_pieces_or_reported(
    tmp_path_factory: pytest.TempPathFactory, text: str, damage: bytes, piece: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    content = text.encode() + damage
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "PIECE_BYTES", piece)
        try:
            read = [row for _, row in text_files.read_text(path)]
        except BadData as error:
            assert "is UTF-16 or UTF-32" in error.problem
            return
    faults = [row for row in read if isinstance(row, BadData)]
    if not faults:
        joined = "".join(row["text"] for row in read if isinstance(row, dict))
        plain = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        assert joined.replace("\n", "") == plain.replace("\n", "")
        assert "\r" not in joined
        assert "\0" not in joined
    else:
        assert "\0" in text or damage


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "under.json", "lines.json", "a.csv", "a.parquet", "a.txt"]
)
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A file of 8 MB is read in less than 3, in blocks of 64 KB; Arrow's memory is counted by Arrow."""
    monkeypatch.setattr(json_files, "CHUNK_BYTES", 2**16)
    monkeypatch.setattr(text_files, "PIECE_BYTES", 2**16)
    monkeypatch.setattr(column_files, "BUFFER_BYTES", 2**16)
    monkeypatch.setattr(column_files, "BATCH_ROWS", 100)
    rows = [
        {"prompt": f"ask {number} " + "x" * 900, "completion": f"{number * 7919} " * 100}
        for number in range(5000)
    ]
    path = tmp_path / name
    if name == "a.parquet":
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, path, compression="none", use_dictionary=False, data_page_size=2**16)
        del table
    elif name == "a.txt":
        path.write_bytes("".join(f"{row['prompt']} {row['completion']}\n" for row in rows).encode())
    else:
        path.write_bytes(dict(WRITERS)[name](rows))
    assert path.stat().st_size > 6e6
    del rows
    list(RowReader().rows(path, limit=1))  # imports take memory once
    tracemalloc.start()
    try:
        most_arrow = max(pyarrow.total_allocated_bytes() for _ in RowReader().rows(path))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 3e6
    assert most_arrow < 3e6


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), st.sampled_from([",", "\t"]))
def test_any_table_that_was_written_whole_is_read_whole(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], delimiter: str
) -> None:
    path = tmp_path_factory.mktemp("table") / ("a.csv" if delimiter == "," else "a.tsv")
    path.write_bytes(as_csv([{"prompt": left, "completion": right} for left, right in cells], delimiter))
    assert [tuple(message.content for message in row.messages) for row in RowReader().read(path)] == cells


def recipe_of(**data: object) -> Recipe:
    values = {"model": "x", "data": {"sources": [{"path": "rows.jsonl"}], **data}, "run": {"name": "first"}}
    return check_recipe(values, origin="test")


def test_columns_of_a_recipe_are_checked_and_written_back() -> None:
    recipe = recipe_of(columns={"prompt": "question_text", "completion": "best"}, malformed="skip")
    assert check_recipe(load_yaml(dump_yaml(recipe)), origin="dumped") == recipe
    for columns in ({"promt": "x"}, {"prompt": ""}, {"prompt": 7}):
        with pytest.raises(BadRecipe, match=rf"data\.columns\.{next(iter(columns))}"):
            recipe_of(columns=columns)
    with pytest.raises(BadRecipe, match=r"data\.columns gives 'x' two meanings"):
        recipe_of(columns={"prompt": "x", "completion": "x"})


def test_a_run_says_what_it_left_out_and_lists_it_in_its_folder(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    from qadapt.run import train

    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*map(good_line, range(8)), b"{broken", b'{"question": "x"}']))
    values = {
        "model": {"source": str(tiny_model("llama"))},
        "data": {"sources": [{"path": str(path)}], "malformed": "skip", "length": 256},
        "train": {"steps": 1, "rows_per_step": 2, "warmup_steps": 0},
        "memory": {"device": "cpu", "budget": "2GiB"},
        "run": {"name": "first", "folder": str(tmp_path / "runs")},
    }
    events = list(train(check_recipe(values, origin="test")))
    [ready] = [event for event in events if isinstance(event, DataReady)]
    assert (ready.rows, ready.formats) == (8, ("prompt-completion",))
    assert "8 rows (prompt-completion)" in str(describe(ready))
    [warned] = [event for event in events if isinstance(event, Warned) and "malformed" in event.message]
    assert "2 malformed rows are left out, as asked" in warned.message
    assert f"{path}, line 9, {path}, line 10" in warned.message
    listed = RunFolder(tmp_path / "runs" / "first").skipped.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["place"] for line in listed] == [f"{path}, line 9", f"{path}, line 10"]
