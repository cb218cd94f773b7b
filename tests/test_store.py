"""Prepared rows on disk: what was put in comes out, damage is seen, and no stale store is ever used."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qadapt.data import row_cache
from qadapt.data import store as store_module
from qadapt.data.row_cache import drop_unused, find_or_make, key_of
from qadapt.data.store import Damaged, Store, StoreWriter, row_hash
from qadapt.data.tokens import Tokens, tokens_of
from qadapt.errors import BadOutput

PLACES = st.text(st.characters(codec="utf-8"), max_size=12)


@st.composite
def token_rows(draw: st.DrawFn) -> Tokens:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
    supervised = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    return tokens_of(ids, supervised, place=draw(PLACES))


def opening_length(row: Tokens) -> int:
    """Up to the end of the first run of learned tokens; all of a row that learns nothing."""
    flags = [*row.supervised.tolist(), False]
    start = flags.index(True) if any(flags) else len(row)
    return flags.index(False, start) if start < len(row) else len(row)


def write_store(folder: Path, rows: Sequence[Tokens]) -> None:
    with StoreWriter(folder) as writer:
        for number, row in enumerate(rows):
            writer.add(row, number=number)
        writer.finish({})


def writing(*rows: Tokens) -> Callable[[Path], None]:
    return lambda folder: write_store(folder, rows)


def simple_rows(count: int = 3) -> list[Tokens]:
    return [tokens_of([number, 7, 8], [False, True, True], place=f"row {number}") for number in range(count)]


@settings(max_examples=300)
@given(st.lists(token_rows(), max_size=12), st.sampled_from([1, 3, 4096]))
def test_a_store_gives_back_what_was_put_in(rows: list[Tokens], batch_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(store_module, "BATCH_ROWS", batch_rows)
        write_store(Path(folder), rows)
        store = Store(Path(folder))
        store.check()
        assert len(store) == len(rows)
        for index, row in enumerate(rows):
            read = store.row(index)
            assert read.ids.tolist() == row.ids.tolist()
            assert read.supervised.tolist() == row.supervised.tolist()
            assert read.place == row.place
        assert store.lengths().tolist() == [len(row) for row in rows]
        assert store.supervised_counts().tolist() == [row.supervised_count for row in rows]
        assert store.hashes().tolist() == [row_hash(row.ids) for row in rows]
        assert store.openings().tolist() == [row_hash(row.ids[: opening_length(row)]) for row in rows]
        some = np.flatnonzero(np.arange(len(rows)) % 3 == 1).astype(np.uint32)
        assert store.hashes(some).tolist() == store.hashes()[some].tolist()
        assert store.numbers().tolist() == list(range(len(rows)))
        assert store.facts["tokens"] == sum(map(len, rows))
        assert store.facts["supervised_tokens"] == sum(row.supervised_count for row in rows)


def test_a_long_row_closes_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BATCH_TOKENS", 4)
    write_store(tmp_path, simple_rows(5))
    assert [Store(tmp_path).row(index).ids[0] for index in range(5)] == [0, 1, 2, 3, 4]


def test_the_digest_tells_other_tokens_and_other_masks_apart(tmp_path: Path) -> None:
    def digest(name: str, *rows: Tokens) -> str:
        (tmp_path / name).mkdir()
        write_store(tmp_path / name, rows)
        return Store(tmp_path / name).digest

    first = digest("a", tokens_of([1, 2], [False, True], place="x"))
    assert digest("b", tokens_of([1, 2], [False, True], place="elsewhere")) == first
    assert digest("c", tokens_of([1, 3], [False, True], place="x")) != first
    assert digest("d", tokens_of([1, 2], [True, True], place="x")) != first
    assert digest("e", *simple_rows(2)) != digest("f", *reversed(simple_rows(2)))


def test_rows_of_the_store_can_be_handed_to_another_process(tmp_path: Path) -> None:
    write_store(tmp_path, simple_rows())
    copy: Store = pickle.loads(pickle.dumps(Store(tmp_path)))
    assert copy.row(2).ids.tolist() == [2, 7, 8]


@pytest.mark.parametrize("name", ["rows.arrow", "facts.json"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_that_was_cut_off_is_seen(tmp_path: Path, name: str, share: float) -> None:
    write_store(tmp_path, simple_rows(40))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(Damaged):
        Store(tmp_path).check()


@settings(max_examples=40)
@given(st.floats(0, 0.999), st.integers(1, 255))
def test_any_changed_byte_is_seen(where: float, flip: int) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder, simple_rows(40))
        content = bytearray((folder / "rows.arrow").read_bytes())
        content[int(len(content) * where)] ^= flip
        (folder / "rows.arrow").write_bytes(content)
        with pytest.raises(Damaged):
            Store(folder).check()


def test_a_huge_file_is_checked_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_CHECKED_WHOLE_BYTES", 4096)
    monkeypatch.setattr(store_module, "_CHECKED_PIECE_BYTES", 512)
    write_store(tmp_path, simple_rows(2000))
    path = tmp_path / "rows.arrow"
    assert path.stat().st_size > 5 * 4096
    Store(tmp_path).check()
    content = bytearray(path.read_bytes())
    content[len(content) // 14] ^= 1  # between the first two of eight pieces
    path.write_bytes(content)
    Store(tmp_path).check()
    content[-300] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged):
        Store(tmp_path).check()


@settings(max_examples=100)
@given(
    st.dictionaries(st.sampled_from("abcde"), st.integers() | PLACES, min_size=1),
    st.sampled_from("abcde"),
    st.integers() | PLACES,
)
def test_a_changed_setting_is_another_key(facts: dict[str, object], name: str, value: object) -> None:
    changed = {**facts, name: value}
    assert (key_of(facts) == key_of(changed)) == (
        json.dumps(facts, sort_keys=True) == json.dumps(changed, sort_keys=True)
    )
    assert key_of(dict(reversed(facts.items()))) == key_of(facts)


def test_what_was_prepared_once_is_found_again() -> None:
    first = find_or_make("key", writing(*simple_rows()))
    assert first.is_new
    second = find_or_make("key", writing())
    assert not second.is_new
    assert len(second.store) == 3
    assert find_or_make("other", writing()).is_new


def test_a_damaged_store_is_made_anew_and_says_so() -> None:
    path = find_or_make("key", writing(*simple_rows())).store.folder / "rows.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    again = find_or_make("key", writing(*simple_rows(5)))
    assert again.is_new
    assert again.damage is not None
    assert "bytes instead of" in again.damage
    assert len(again.store) == 5


def test_a_file_in_the_place_of_a_store_makes_room_for_it() -> None:
    folder = find_or_make("key", writing(*simple_rows())).store.folder
    shutil.rmtree(folder)
    folder.write_text("no store", encoding="utf-8")
    again = find_or_make("key", writing(*simple_rows()))
    assert again.damage == "a file stands in its place"
    assert len(again.store) == 3


def test_damage_that_only_the_content_shows_is_found_and_leaves_no_remains() -> None:
    path = find_or_make("key", writing(*simple_rows(90))).store.folder / "rows.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = find_or_make("key", writing(*simple_rows(5)))
    assert again.damage is not None
    assert "was changed after it was written" in again.damage
    assert len(again.store) == 5
    assert [path.name for path in row_cache.data_folder().iterdir() if path.is_dir()] == ["key"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows.arrow", (b"ARROW1", b"arrow1")),
        ("rows.arrow", (b"ow 1row 2", b"ow 1row 7")),
        ("facts.json", (b'"rows": 3', b'"rows": 4')),
    ],
)
def test_a_damaged_store_is_mapped_no_more_when_it_is_moved(
    name: str, change: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows moves and deletes no file that is mapped."""
    folder = find_or_make("key", writing(*simple_rows())).store.folder
    (folder / name).write_bytes((folder / name).read_bytes().replace(*change))
    opened: list[weakref.ref[Store]] = []

    class Watched(Store):
        def __init__(self, folder: Path) -> None:
            opened.append(weakref.ref(self))
            super().__init__(folder)

    moved = []

    def rename(self: Path, target: Path) -> Path:
        moved.append(sum(store() is not None for store in opened))
        return self.replace(target)

    monkeypatch.setattr(row_cache, "Store", Watched)
    monkeypatch.setattr(Path, "rename", rename)
    assert find_or_make("key", writing(*simple_rows(5))).damage is not None
    assert moved == [0]


def test_a_damaged_store_that_cannot_be_replaced_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rename(self: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, "used by another process", self, None, target)

    path = find_or_make("key", writing(*simple_rows())).store.folder / "rows.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(BadOutput, match="damaged and cannot be replaced"):
        find_or_make("key", writing(*simple_rows()))


def test_a_store_that_is_damaged_as_soon_as_it_is_written_is_an_error() -> None:
    def write_on_a_broken_disk(folder: Path) -> None:
        write_store(folder, simple_rows())
        (folder / "rows.arrow").write_bytes((folder / "rows.arrow").read_bytes()[:-1])

    with pytest.raises(BadOutput, match="damaged as soon as they are written"):
        find_or_make("key", write_on_a_broken_disk)


def test_a_preparation_that_fails_leaves_nothing() -> None:
    def fail(folder: Path) -> None:
        (folder / "rows.arrow").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_or_make("key", fail)
    assert [path.name for path in row_cache.data_folder().iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("qadapt.data.row_cache.data_folder", lambda: tmp_path / "file" / "data")
    with pytest.raises(BadOutput, match="cannot be written"):
        find_or_make("key", writing())


def made_long_ago(key: str, *, days: float) -> Path:
    folder = find_or_make(key, writing(*simple_rows())).store.folder
    long_ago = time.time() - days * 24 * 3600
    os.utime(folder, (long_ago, long_ago))
    return folder


def test_stores_that_nobody_used_for_long_go() -> None:
    old, new = made_long_ago("old", days=91), made_long_ago("new", days=89)
    assert drop_unused() == ["old"]
    assert not old.exists()
    assert new.exists()


def test_the_longest_unused_stores_go_until_the_rest_fits() -> None:
    folders = [made_long_ago(f"store{days}", days=days) for days in (3, 1, 2)]
    size = sum(file.stat().st_size for file in folders[0].iterdir())
    assert drop_unused(most_bytes=2 * size) == ["store3"]
    assert drop_unused(most_bytes=0) == ["store2", "store1"]


def test_a_store_that_is_used_again_counts_as_new() -> None:
    made_long_ago("key", days=91)
    find_or_make("key", writing())
    assert drop_unused() == []


def test_a_user_who_finishes_while_stores_are_counted_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find_or_make("key", writing(*simple_rows())).store.folder
    held = folder / ".use-another"
    held.touch()
    files = Path.iterdir

    def iterdir(self: Path) -> Iterator[Path]:
        for path in files(self):
            if path == held:
                held.unlink(missing_ok=True)
            yield path

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert drop_unused(most_bytes=0) == ["key"]


def test_a_store_in_use_stays_whoever_uses_it() -> None:
    held = find_or_make("held", writing(*simple_rows()))
    assert drop_unused(most_bytes=0, longest_seconds=0) == []
    program = (
        "import sys; from pathlib import Path; import qadapt.data.row_cache as cache\n"
        f"cache.data_folder = lambda: Path({str(row_cache.data_folder())!r})\n"
        "sys.stdout.write(str(cache.drop_unused(most_bytes=0, longest_seconds=0)))"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]"
    assert np.array_equal(held.store.row(0).ids, [0, 7, 8])
    held.lock.release()
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "['held']"
