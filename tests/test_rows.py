"""The rows of a run: prepared once, held out without a row on both sides, and everything left out counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qadapt.data.check import DataReport
from qadapt.data.cutting import Why
from qadapt.data.held_out import draw_held_out, repeated_rows, shared_rows
from qadapt.data.preparation import Found, Tally, tally_of, token_rows
from qadapt.data.prepared import Part, Reading, Source, identify, prepare_part
from qadapt.data.prompt import PromptContract, load_contract
from qadapt.data.reasons import CURES, LEFT_OUT, NOTES
from qadapt.data.rendering.spans import Note
from qadapt.data.row_cache import Prepared
from qadapt.data.row_notes import part_notes, split_notes
from qadapt.data.rows import RowSet
from qadapt.data.split import Split, split_rows
from qadapt.data.store import Hashes, Store, StoreWriter
from qadapt.data.tokens import Tokens, tokens_of
from qadapt.errors import BadData, BadRun
from qadapt.events import DataReady, Event, StageAdvanced, Warned
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe
from qadapt.running.data_check import check_data
from qadapt.running.material import Material, prepare, resolved, step_count
from qadapt.trained.measuring import Chosen, rows_to_evaluate

if TYPE_CHECKING:
    from conftest import TinyModel


def row_of(question: str, answer: str = "four") -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CALLED = {"role": "tool", "content": "x " * 300}
READING = Reading("auto", (), skips_malformed=False, length=128)


def prepared(
    *paths: Path, contract: PromptContract, reading: Reading = READING, limit: int | None = None
) -> Part:
    return prepare_part(identify(tuple(Source(str(path), limit) for path in paths)), reading, contract)


def notes_of(part: Part, kind: str = "rows", length: int = 100) -> list[str]:
    return [problem for problem, _ in part_notes(part, kind, length=length)]


@pytest.fixture
def contract(tiny_model: TinyModel) -> PromptContract:
    return load_contract(tiny_model("qwen2"))


# --- from files to a store


def test_prepared_rows_are_those_of_the_contract(tmp_path: Path, contract: PromptContract) -> None:
    paths = [
        write_lines(tmp_path / f"{name}.jsonl", [row_of(f"{name} {n}") for n in range(3)]) for name in "ab"
    ]
    part = prepared(*paths, contract=contract)
    rows = RowSet(part.prepared.store)
    assert part.source_rows == (3, 3)
    assert part.formats == {"messages": 6}
    reader = READING.reader()
    for row, read in zip(rows, [*reader.rows(paths[0]), *reader.rows(paths[1])], strict=True):
        encoded = contract.encode(read)
        assert row.ids.tolist() == encoded.ids.tolist()
        assert row.supervised.tolist() == encoded.supervised.tolist()
        assert row.place == encoded.place
    assert rows.lengths.tolist() == [len(row) for row in rows]
    assert rows.supervised_counts.tolist() == [row.supervised_count for row in rows]


def test_rows_are_prepared_once_and_anew_after_any_change(
    tmp_path: Path, contract: PromptContract, tiny_model: TinyModel
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row_of("one?"), row_of("two?")])
    first = prepared(path, contract=contract)
    assert first.prepared.is_new
    again = prepared(path, contract=load_contract(tiny_model("qwen2")))
    assert not again.prepared.is_new
    assert again.tally == first.tally
    assert again.formats == first.formats
    others = [
        prepared(path, contract=contract, limit=1),
        prepared(path, contract=contract, reading=Reading("auto", (), skips_malformed=False, length=64)),
        prepared(path, contract=contract, reading=Reading("auto", (), skips_malformed=True, length=128)),
        prepared(path, contract=contract, reading=Reading("messages", (), skips_malformed=False, length=128)),
        prepared(path, contract=load_contract(tiny_model("qwen3"))),
        prepared(path, contract=load_contract(tiny_model("qwen2"), learn="last")),
        prepared(path, path, contract=contract),
    ]
    write_lines(path, [row_of("one?"), row_of("six?")])
    others.append(prepared(path, contract=contract))
    assert all(part.prepared.is_new for part in others)
    assert len({part.prepared.key for part in (first, *others)}) == 9


def changed_size(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {**values, "vocab_size": values["vocab_size"] + 64})


def changed_ends(folder: Path) -> None:
    values = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    write_json(folder / "generation_config.json", {**values, "eos_token_id": [0, 1]})


def changed_tokenizer(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    values["model"]["merges"].pop()
    write_json(folder / "tokenizer.json", values)


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize("change", [changed_size, changed_ends, changed_tokenizer])
def test_rows_are_prepared_anew_for_another_model(
    tmp_path: Path, tiny_model: TinyModel, change: Callable[[Path], None]
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row_of("one?")])
    model = shutil.copytree(tiny_model("qwen2"), tmp_path / "model")
    first = prepared(path, contract=load_contract(model))
    assert prepared(path, contract=load_contract(model)).prepared.key == first.prepared.key
    change(model)
    assert prepared(path, contract=load_contract(model)).prepared.key != first.prepared.key


def test_rows_beyond_a_smaller_table_are_refused_though_a_larger_one_took_them(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row_of("one?")])
    model = shutil.copytree(tiny_model("qwen2"), tmp_path / "model")
    prepared(path, contract=load_contract(model))
    values = json.loads((model / "config.json").read_text(encoding="utf-8"))
    write_json(model / "config.json", {**values, "vocab_size": 100})
    with pytest.raises(BadData, match="embedding table"):
        prepared(path, contract=load_contract(model))


def test_rows_are_prepared_anew_for_another_content_of_the_template_file(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row_of("one?")])
    template = tmp_path / "mine.jinja"
    keys = []
    for opening in ("A", "B", "A"):
        template.write_text(
            f"{{% for m in messages %}}{opening}{{{{ m.content }}}}<|im_end|>{{% endfor %}}", encoding="utf-8"
        )
        contract = load_contract(tiny_model("qwen2"), template=str(template))
        keys.append(prepared(path, contract=contract).prepared.key)
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize("package", ["qadapt", "datasets", "jinja2", "pyarrow", "tokenizers", "transformers"])
def test_rows_are_prepared_anew_by_another_version_of_a_package(
    tmp_path: Path, contract: PromptContract, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row_of("one?")])
    first = prepared(path, contract=contract)
    monkeypatch.setattr(
        "qadapt.data.prepared.version", lambda name: "99.0" if name == package else version(name)
    )
    assert prepared(path, contract=contract).prepared.key != first.prepared.key


def test_rows_are_prepared_anew_for_other_columns(tmp_path: Path, contract: PromptContract) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"q": "one?", "a": "two", "b": "three"}])
    keys = {
        prepared(
            path,
            contract=contract,
            reading=Reading("auto", (("prompt", "q"), ("completion", name)), skips_malformed=False, length=9),
        ).prepared.key
        for name in "ab"
    }
    assert len(keys) == 2


def test_a_folder_is_prepared_anew_when_a_file_comes(tmp_path: Path, contract: PromptContract) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [row_of("one?")])
    assert len(prepared(folder, contract=contract).prepared.store) == 1
    write_lines(folder / "b.jsonl", [row_of("two?")])
    assert len(prepared(folder, contract=contract).prepared.store) == 2


def test_files_that_change_while_they_are_read_are_an_error(tmp_path: Path, contract: PromptContract) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row_of("one?")])
    identified = identify((Source(str(path)),))
    write_lines(path, [row_of("one?"), row_of("two?")])
    with pytest.raises(BadData, match="changed while they were read"):
        prepare_part(identified, READING, contract)


def test_long_rows_are_cut_and_counted_and_rows_without_an_answer_left_out(
    tmp_path: Path, contract: PromptContract
) -> None:
    turns = [*row_of("a", "b")["messages"], *row_of("c", "d " * 90)["messages"]]
    rows = [row_of("one?"), row_of("x " * 200, "y"), row_of("a", "y " * 90), {"messages": turns}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    part = prepared(path, contract=contract, reading=Reading("auto", (), skips_malformed=False, length=100))
    lengths = RowSet(part.prepared.store).lengths
    assert len(lengths) == 3
    assert lengths.max() == 100
    assert {how: found.count for how, found in part.tally.cut.items()} == {"inside": 1, "turns": 1}
    assert part.tally.left_out["truncated"].places == [f"{path}, line 2"]
    problems = " / ".join(notes_of(part))
    assert "1 rows have nothing to learn within data.length and are left out" in problems
    assert "1 rows are longer than 100 tokens and lost whole turns at the end" in problems
    assert "1 rows are longer than 100 tokens and were cut inside an answer" in problems


def test_rows_with_nothing_to_learn_are_left_out_for_their_true_reason(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    contract = load_contract(tiny_model("qwen2"), learn=("system",))
    learned = {"messages": [{"role": "system", "content": "be short"}, *row_of("two?")["messages"]]}
    part = prepared(write_lines(tmp_path / "rows.jsonl", [learned, row_of("one?")]), contract=contract)
    assert {why: found.count for why, found in part.tally.left_out.items()} == {"no learned turn": 1}
    assert any("have no turn that is learned" in problem for problem in notes_of(part))


def test_an_answer_that_is_empty_is_told_from_one_that_is_missing(
    tmp_path: Path, contract: PromptContract
) -> None:
    missing = {"messages": row_of("two?")["messages"][:1]}
    context = {"messages": [row_of("a")["messages"][0], {**row_of("a")["messages"][1], "weight": 0}]}
    rows = [row_of("one?"), row_of("a", ""), row_of("b", " "), missing, context]
    part = prepared(write_lines(tmp_path / "rows.jsonl", rows), contract=contract)
    assert {why: found.count for why, found in part.tally.left_out.items()} == {
        "empty answers": 2,
        "no learned turn": 2,
    }
    assert len(part.prepared.store) == 1


@pytest.mark.parametrize("learn", ["all", ("user",)])
def test_a_row_without_an_answer_is_learned_where_it_is_asked_for(
    tmp_path: Path, tiny_model: TinyModel, learn: Any
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": row_of("two?")["messages"][:1]}])
    part = prepared(path, contract=load_contract(tiny_model("qwen2"), learn=learn))
    assert RowSet(part.prepared.store).supervised_tokens


def test_everything_that_is_found_in_rows_has_words() -> None:
    assert set(NOTES) >= set(get_args(Note))
    assert set(LEFT_OUT) == set(get_args(Why)) - {""}
    assert set(CURES) <= {*NOTES, *LEFT_OUT}


def test_malformed_and_refused_rows_are_errors_or_left_out_and_listed(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    contract = load_contract(tiny_model("gemma2"))  # whose template has no system prompt
    refused = {"messages": [{"role": "system", "content": "be short"}, *row_of("one?")["messages"]]}
    path = write_lines(tmp_path / "rows.jsonl", [row_of("two?"), {"messages": 7}, refused])
    with pytest.raises(BadData, match="line 2"):
        prepared(path, contract=contract)
    skipping = Reading("auto", (), skips_malformed=True, length=128)
    for _ in range(2):  # as prepared, and out of the cache
        part = prepared(path, contract=contract, reading=skipping)
        assert len(part.prepared.store) == 1
        assert part.malformed_rows == 1
        assert part.tally.refused_rows == 1
        assert [each.place for each in part.skipped] == [f"{path}, line 2", f"{path}, line 3"]
        assert any("2 malformed rows are left out, as asked" in problem for problem in notes_of(part))
    write_lines(path, [row_of("two?"), refused])
    with pytest.raises(BadData, match="line 2"):
        prepared(path, contract=contract)


def test_a_tally_survives_its_values() -> None:
    tally = Tally(read=7, refused_rows=1)
    tally.cut["turns"] = tally.notes["control tokens"] = found_in("row", times=5)
    assert tally_of(json.loads(json.dumps(tally.values()))) == tally


def found_in(place: str, *, times: int) -> Found:
    found = Found()
    for number in range(times):
        found.add(f"{place} {number}")
    assert found.count == times
    assert len(found.places) == min(times, 3)
    return found


def test_rows_are_numbered_by_the_row_they_were_made_of(tmp_path: Path, contract: PromptContract) -> None:
    rows = [row_of("one?"), row_of("x " * 200, "y"), row_of("two?")]
    part = prepared(write_lines(tmp_path / "rows.jsonl", rows), contract=contract)
    assert part.prepared.store.numbers().tolist() == [0, 2]


# --- a sequence of rows


def made_rows(count: int) -> list[Tokens]:
    return [tokens_of(range(n, 2 * n + 2), [n % 2 == 0] * (n + 2), place=f"row {n}") for n in range(count)]


def store_of(folder: Path, rows: Sequence[Tokens]) -> Store:
    folder.mkdir(exist_ok=True)
    with StoreWriter(folder) as writer:
        for number, row in enumerate(rows):
            writer.add(row, number=number)
        writer.finish({})
    return Store(folder)


def test_rows_of_a_store_and_of_a_list_behave_alike(tmp_path: Path) -> None:
    rows, chosen = made_rows(6), np.array([4, 1, 2], np.uint32)
    store = store_of(tmp_path / "store", rows)
    for source in (store, rows):
        part = RowSet(source, chosen)
        assert [row.place for row in part] == ["row 4", "row 1", "row 2"]
        assert part[-1].place == "row 2"
        assert [row.place for row in part[1:]] == ["row 1", "row 2"]
        assert part[1:].lengths.tolist() == [3, 4]
        assert [row.place for row in RowSet(source)[1:4:2]] == ["row 1", "row 3"]
        assert part.lengths.tolist() == [6, 3, 4]
        assert part.supervised_counts.tolist() == [5, 0, 3]
        assert (part.tokens, part.supervised_tokens) == (13, 8)
        assert len(RowSet(source)) == 6
        with pytest.raises(IndexError):
            part[3]
    assert RowSet(store, chosen).numbers().tolist() == [4, 1, 2]


def test_the_fingerprint_tells_other_rows_and_another_choice_apart(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", made_rows(5))
    prints = [
        RowSet(store).fingerprint,
        RowSet(store, np.array([0, 1], np.uint32)).fingerprint,
        RowSet(store, np.array([1, 0], np.uint32)).fingerprint,
        RowSet(store_of(tmp_path / "b", made_rows(4))).fingerprint,
        RowSet(made_rows(5)).fingerprint,
        RowSet(made_rows(4)).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert RowSet(store_of(tmp_path / "c", made_rows(5))).fingerprint == prints[0]


# --- held out


def part_of(store: Store, *source_rows: int, pieces: int = 0) -> Part:
    tally = Tally()
    if pieces:
        tally.cut["pieces"] = found_in("row", times=1)
    lock = FileLock(store.folder / ".lock")
    return Part(
        prepared=Prepared(store, "key", True, None, lock),
        sources=[],
        source_rows=source_rows,
        tally=tally,
        formats={},
        malformed_rows=0,
        skipped=(),
        other_files=(),
    )


FEW_ROWS = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=3), min_size=2, max_size=30)


@settings(max_examples=200)
@given(FEW_ROWS, st.floats(0.05, 0.9), st.integers(0, 5), st.integers(1, 3))
def test_no_held_out_row_stands_among_the_training_rows(
    contents: list[list[int]], share: float, seed: int, pieces: int
) -> None:
    rows = [tokens_of(ids, [True] * len(ids), place=f"{n}") for n, ids in enumerate(contents)]
    with TemporaryDirectory() as name:
        with StoreWriter(Path(name)) as writer:
            for number, row in enumerate(rows):
                writer.add(row, number=number // pieces)
            writer.finish({})
        middle = len(rows) // 2
        part = part_of(Store(Path(name)), middle, len(rows) - middle, pieces=pieces - 1)
        try:
            split = split_rows(part, None, share=share, seed=seed, pad_id=0)
        except BadData as error:
            assert "both parts need rows" in error.problem or "is trained on, too" in error.problem
            return
        train, apart = split.rows.train, split.rows.held_out
        assert not {tuple(row.ids) for row in train} & {tuple(row.ids) for row in apart}
        assert len(train) + len(apart) + split.dropped_rows == len(rows)
        assert split.repeated_rows == len(train) - len({tuple(row.ids) for row in train})
        assert sum(split.rows.source_rows) == len(train)
        assert split.rows.source_rows[0] == sum(int(row.place) < middle for row in train)
        numbers = [set(each.numbers().tolist()) for each in (train, apart)]
        assert not numbers[0] & numbers[1], "the pieces of a document stay together"


def test_the_draw_is_the_same_on_every_system_and_in_every_version() -> None:
    hashes = (np.arange(12, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    numbers = np.arange(12, dtype=np.uint32)

    def drawn(seed: int, share: float = 0.25) -> list[int]:
        return np.flatnonzero(draw_held_out(hashes.copy(), numbers, share=share, seed=seed)).tolist()

    assert drawn(0) == [4, 6, 7]
    assert drawn(1) == [6, 8, 11]
    assert set(drawn(0)) < set(drawn(0, 0.5)), "a larger share holds out the same rows and more"


def test_a_draw_takes_about_its_share_and_rows_that_come_later_change_few_sides() -> None:
    hashes = np.random.RandomState(0).randint(0, 2**63, 5000).astype(np.uint64)
    numbers = np.arange(5000, dtype=np.uint32)
    small = draw_held_out(hashes[:4000].copy(), numbers[:4000], share=0.1, seed=3)
    large = draw_held_out(hashes.copy(), numbers, share=0.1, seed=3)
    assert (small.sum(), large.sum()) == (400, 500)
    assert np.count_nonzero(small != large[:4000]) < 40


@pytest.mark.parametrize(("rows", "share"), [(3, 0.1), (3, 0.9), (1, 0.5)])
def test_a_share_that_leaves_a_part_empty_is_an_error(rows: int, share: float) -> None:
    hashes = np.arange(rows, dtype=np.uint64)
    with pytest.raises(BadData, match="both parts need rows"):
        draw_held_out(hashes, np.arange(rows, dtype=np.uint32), share=share, seed=0)


def test_rows_that_are_all_equal_cannot_be_held_out() -> None:
    with pytest.raises(BadData, match="equal rows go to the same one"):
        draw_held_out(np.full(8, 5, np.uint64), np.arange(8, dtype=np.uint32), share=0.5, seed=0)


def test_one_document_cannot_be_held_out_in_part_and_is_named_as_the_reason() -> None:
    hashes = np.arange(8, dtype=np.uint64)
    with pytest.raises(BadData, match="All 8 rows are pieces of one document") as caught:
        draw_held_out(hashes, np.zeros(8, np.uint32), share=0.5, seed=0)
    assert "data.held_out" in caught.value.cure


def random_hashes(count: int, seed: int = 0) -> Hashes:
    return np.random.RandomState(seed).randint(0, 2**63, count).astype(np.uint64)


@pytest.mark.parametrize("seed", range(40))
def test_a_row_that_is_repeated_often_is_not_held_out_where_that_is_far_too_many(seed: int) -> None:
    hashes, numbers = random_hashes(1000), np.arange(1000, dtype=np.uint32)
    hashes[:300] = hashes[0]
    drawn = draw_held_out(hashes, numbers, share=0.05, seed=seed)
    assert drawn.sum() == 50


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=30),
    st.floats(0.02, 0.98),
    st.integers(0, 3),
    st.booleans(),
)
def test_groups_stay_whole_and_the_draw_is_as_near_as_leaving_all_out(
    groups: list[int], share: float, seed: int, are_documents: bool
) -> None:
    rows = sum(groups)
    group = np.repeat(np.arange(len(groups), dtype=np.uint32), groups)
    asked = round(rows * share)
    if not 0 < asked < rows:
        return
    if are_documents:
        drawn = draw_held_out(random_hashes(rows), group, share=share, seed=seed)
    else:
        numbers = np.arange(rows, dtype=np.uint32)
        drawn = draw_held_out(random_hashes(len(groups))[group], numbers, share=share, seed=seed)
    sides = {int(each): set(drawn[group == each].tolist()) for each in group}
    assert all(len(side) == 1 for side in sides.values())
    assert 0 < drawn.sum() < rows
    assert drawn.sum() - asked <= max(asked, min(groups), 1)


def test_a_draw_far_from_its_share_is_said(tmp_path: Path) -> None:
    rows = [tokens_of([n, n % 7], [False, True], place=f"{n}") for n in range(40)]
    with StoreWriter(tmp_path) as writer:
        for number, row in enumerate(rows):
            writer.add(row, number=number // 20)
        writer.finish({})
    split = split_rows(part_of(Store(tmp_path), 40, pieces=1), None, share=0.1, seed=0, pad_id=0)
    assert len(split.rows.held_out) == 20
    [(problem, cure)] = split_notes(split)
    assert "20 rows are held out, not about 4 as asked" in problem
    assert "data.held_out" in cure


def unrolled(name: str) -> list[dict[str, Any]]:
    """A conversation of three answers as three rows."""
    turns = [turn for n in range(3) for turn in row_of(f"{name}, {n}?", f"{name} {n}")["messages"]]
    return [{"messages": turns[: 2 * count]} for count in (1, 2, 3)]


def test_a_conversation_unrolled_turn_by_turn_is_held_out_as_one(
    tmp_path: Path, contract: PromptContract
) -> None:
    rows = [row for n in range(30) for row in unrolled(f"talk {n}")]
    part = prepared(write_lines(tmp_path / "rows.jsonl", rows), contract=contract)
    split = split_rows(part, None, share=0.2, seed=0, pad_id=0)
    assert len(split.rows.held_out) == 18
    assert split.known.count == 0
    sides = [{row.place for row in each} for each in (split.rows.train, split.rows.held_out)]
    for first in range(1, 91, 3):
        talk = {f"{tmp_path / 'rows.jsonl'}, line {first + more}" for more in range(3)}
        assert talk <= sides[0] or talk <= sides[1]


def test_rows_that_all_begin_alike_are_held_out_one_by_one_and_counted(
    tmp_path: Path, contract: PromptContract
) -> None:
    start = row_of("hello", "hello, how can I help?")["messages"]
    rows = [{"messages": [*start, *row_of(f"{n}?")["messages"]]} for n in range(20)]
    part = prepared(write_lines(tmp_path / "rows.jsonl", rows), contract=contract)
    split = split_rows(part, None, share=0.2, seed=0, pad_id=0)
    assert len(split.rows.held_out) == 4
    assert split.known.count == 4
    assert split.known.places == [row.place for row in split.rows.held_out][:3]
    assert "4 held-out rows begin as a training row does" in next(iter(split_notes(split)))[0]


def test_a_held_out_file_with_the_beginnings_of_training_rows_is_warned_of(
    tmp_path: Path, contract: PromptContract
) -> None:
    first, second = unrolled("a"), unrolled("b")
    train = prepared(write_lines(tmp_path / "t.jsonl", [first[2], second[0]]), contract=contract)
    apart = prepared(
        write_lines(tmp_path / "h.jsonl", [first[0], row_of("c"), second[1], first[1]]), contract=contract
    )
    split = split_rows(train, apart, share=0.0, seed=0, pad_id=0)
    assert len(split.rows.held_out) == 4
    assert split.known.places == [f"{tmp_path / 'h.jsonl'}, line {n}" for n in (1, 3, 4)]


def test_equal_rows_of_other_learned_turns_never_stand_on_both_sides(tmp_path: Path) -> None:
    masks = [[False, True, True], [False, True, False]]
    rows = [tokens_of([n // 2, 1, 2], masks[n % 2], place=f"{n}") for n in range(40)]
    part = part_of(store_of(tmp_path / "store", rows), 40)
    split = split_rows(part, None, share=0.5, seed=0, pad_id=0)
    train, apart = ({tuple(row.ids) for row in each} for each in (split.rows.train, split.rows.held_out))
    assert apart
    assert not train & apart
    assert split.dropped_rows == 40 - len(split.rows.train) - len(split.rows.held_out)


def test_equal_rows_and_shared_rows_are_found() -> None:
    hashes = np.array([5, 6, 7, 5, 8, 5], np.uint64)
    assert shared_rows([np.array([1, 8], np.uint64), np.array([5, 5], np.uint64)], hashes).tolist() == [
        0,
        3,
        4,
        5,
    ]
    assert shared_rows([np.array([1], np.uint64)], hashes).tolist() == []
    assert shared_rows([hashes], np.array([], np.uint64)).tolist() == []
    assert repeated_rows(hashes) == 2


def test_a_held_out_file_with_rows_of_the_training_files_is_refused(
    tmp_path: Path, contract: PromptContract
) -> None:
    train = prepared(
        write_lines(tmp_path / "t.jsonl", [row_of(f"{n}?") for n in range(9)]), contract=contract
    )
    rows = [row_of(f"{n}?") for n in (20, 3, 4, 5, 6)]
    apart = prepared(write_lines(tmp_path / "h.jsonl", rows), contract=contract)
    with pytest.raises(BadData) as caught:
        split_rows(train, apart, share=0.0, seed=0, pad_id=0)
    problem = caught.value.problem
    assert "4 held-out rows are also trained on" in problem
    assert f"{tmp_path / 'h.jsonl'}, line 2 (as {tmp_path / 't.jsonl'}, line 4)" in problem
    assert "line 5" not in problem.partition("h.jsonl, line 4")[2].partition("(as")[0]
    assert problem.endswith(", ....")
    apart = prepared(write_lines(tmp_path / "h.jsonl", rows[:1]), contract=contract)
    assert len(split_rows(train, apart, share=0.0, seed=0, pad_id=0).rows.held_out) == 1


def test_a_few_held_out_rows_that_are_trained_on_are_left_out_and_named(
    tmp_path: Path, contract: PromptContract
) -> None:
    train = prepared(
        write_lines(tmp_path / "t.jsonl", [row_of(f"{n}?") for n in range(9)]), contract=contract
    )
    path = write_lines(tmp_path / "h.jsonl", [row_of(f"{n}?") for n in (20, 3, 21)])
    split = split_rows(train, prepared(path, contract=contract), share=0.0, seed=0, pad_id=0)
    assert [row.place for row in split.rows.held_out] == [f"{path}, line 1", f"{path}, line 3"]
    [(problem, _)] = split_notes(split)
    assert "1 held-out rows are left out: they are also trained on" in problem
    assert f"{path}, line 2 (as {tmp_path / 't.jsonl'}, line 4)" in problem


# --- a run's preparation


def make_recipe(folder: Path, model: Path, rows: Sequence[object], **data: Any) -> Recipe:
    path = write_lines(folder / "rows.jsonl", rows)
    values = {
        "model": str(model),
        "data": {"sources": [{"path": str(path)}], "length": 128, **data},
        "train": {"rows_per_step": 4},
        "run": {"name": "first", "folder": str(folder / "runs")},
    }
    return check_recipe(values, origin="the test")


def prepare_all(recipe: Recipe) -> tuple[list[Event], Material]:
    made: list[Material] = []

    def whole() -> Iterator[Event]:
        made.append((yield from prepare(recipe, revision=None)))

    return list(whole()), made[0]


def warnings_of(events: list[Event]) -> str:
    return " / ".join(event.message for event in events if isinstance(event, Warned))


def test_a_preparation_says_what_came_of_the_rows(tmp_path: Path, tiny_model: TinyModel) -> None:
    rows = [row_of(f"{n % 18}?") for n in range(20)]
    recipe = make_recipe(tmp_path, tiny_model("llama"), rows, held_out_fraction=0.25)
    events, material = prepare_all(recipe)
    ready = events[-1]
    assert isinstance(ready, DataReady)
    assert ready.rows + ready.held_out_rows == 20
    assert 5 <= ready.held_out_rows <= 6
    assert ready.formats == ("messages",)
    assert ready.tokens == material.rows.tokens == sum(len(row) for row in material.rows.train)
    assert "training rows are equal" in warnings_of(events) or ready.held_out_rows == 6
    assert {event.unit for event in events if isinstance(event, StageAdvanced)} <= {"bytes", "rows"}
    facts = json.loads(json.dumps(material.data_facts()))
    assert facts["parts"][0]["cache"] == f"data/{material.parts[0].prepared.key}"
    assert facts["parts"][0]["sources"][0]["files"][0]["path"] == str(tmp_path / "rows.jsonl")


def test_rows_prepared_anew_are_the_same_rows(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = make_recipe(
        tmp_path, tiny_model("llama"), [row_of(f"{n}?") for n in range(12)], held_out_fraction=0.25
    )
    _, first = prepare_all(recipe)
    path = first.parts[0].prepared.store.folder / "rows.arrow"
    path.write_bytes(b"damaged")
    events, second = prepare_all(recipe)
    assert "Prepared rows in the cache were damaged" in warnings_of(events)
    assert second.ingredients == first.ingredients


def test_weights_and_passes_decide_the_steps(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama"), [row_of(f"{n}?") for n in range(12)])
    more = write_lines(tmp_path / "more.jsonl", [row_of(f"more {n}?") for n in range(6)])
    source = {"path": str(tmp_path / "rows.jsonl"), "weight": 2.5}
    values = recipe.model_dump()
    values["data"]["sources"] = [source, {"path": str(more), "weight": 0.5, "limit": 4}]
    weighted = Recipe.model_validate(values)
    _, material = prepare_all(weighted)
    assert material.rows.source_rows == (12, 4)
    assert step_count(weighted, material.rows) == 8  # 30 + 2 rows, 4 in a step


def test_a_source_that_gives_nothing_is_named(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama"), [row_of(f"{n}?") for n in range(12)])
    paths = [
        write_lines(tmp_path / "unanswered.jsonl", [row_of("a", "")]),
        write_lines(tmp_path / "more.jsonl", [row_of("b")]),
    ]
    values = recipe.model_dump()
    more = [{"path": str(path), "weight": 3} for path in paths]
    values["data"]["sources"] = [*values["data"]["sources"], *more]
    events, material = prepare_all(Recipe.model_validate(values))
    assert material.rows.source_rows == (12, 0, 1)
    said = warnings_of(events)
    assert f"Nothing of the source {paths[0]} is trained on: all of its rows are left out" in said
    assert said.count("Nothing of the source") == 1


def test_a_new_token_that_no_row_has_is_said_once(tmp_path: Path, tiny_model: TinyModel) -> None:
    rows = [row_of(f"{n}?") for n in range(9)]
    recipe = make_recipe(tmp_path, tiny_model("llama"), rows, new_tokens=["<|never|>"])
    made: list[DataReport] = []

    def whole() -> Iterator[Event]:
        made.append((yield from check_data(recipe)))

    assert list(whole())
    assert sum("<|never|>" in finding.message for finding in made[0].findings) == 1


def test_a_mistake_in_the_rows_costs_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel
) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError("the base was asked for")

    rows = [*(row_of(f"{n}?") for n in range(5)), {"messages": []}]
    recipe = make_recipe(tmp_path, tiny_model("llama"), rows)
    monkeypatch.setattr("qadapt.running.material.is_here", lambda *_, **__: False)
    monkeypatch.setattr("qadapt.running.material.find_model", download)
    with pytest.raises(BadData, match="line 6"):
        prepare_all(recipe)


@pytest.mark.parametrize("kind", ["train on", "evaluate on"])
def test_no_row_left_is_an_error_that_says_what_for(tmp_path: Path, tiny_model: TinyModel, kind: str) -> None:
    long, good = [row_of("x " * 300, "y")], [row_of("one?")]
    rows, apart = (long, good) if kind == "train on" else (good, long)
    held_out = write_lines(tmp_path / "held_out.jsonl", apart)
    recipe = make_recipe(tmp_path, tiny_model("llama"), rows, held_out=str(held_out), length=100)
    with pytest.raises(BadData, match=f"No row is left to {kind}") as caught:
        prepare_all(recipe)
    assert "1 have nothing to learn within data.length" in caught.value.problem
    assert "Raise data.length" in caught.value.cure


def test_no_row_left_is_an_error_that_says_why(tmp_path: Path, tiny_model: TinyModel) -> None:
    rows = [row_of("one?"), row_of("two?"), {"messages": [*row_of("x " * 300)["messages"], CALLED]}]
    recipe = make_recipe(tmp_path, tiny_model("llama"), rows, learn=["tool"])
    with pytest.raises(BadData) as caught:
        prepare_all(recipe)
    assert caught.value.problem.endswith(
        "of 3 that were read, 2 have no turn that is learned, 1 have nothing to learn within data.length."
    )
    assert "change data.learn" in caught.value.cure.partition("Raise data.length")[0]
    own = write_lines(tmp_path / "own.jsonl", [row_of("one?", " ")])
    with pytest.raises(BadData, match="1 have only empty answers"):
        rows_to_evaluate(
            make_recipe(tmp_path, tiny_model("llama"), rows),
            load_contract(tiny_model("llama")),
            data=own,
            fingerprint="of no matter for a file",
            conversations=0,
        )


def to_evaluate(
    recipe: Recipe, material: Material, *, data: Path | None = None, conversations: int = 0
) -> Chosen:
    return rows_to_evaluate(
        recipe,
        material.contract,
        data=data,
        fingerprint=material.ingredients.rows,
        conversations=conversations,
    )


def test_the_rows_a_run_held_out_are_found_again(tmp_path: Path, tiny_model: TinyModel) -> None:
    long = row_of("x " * 300, "y")
    recipe = make_recipe(
        tmp_path, tiny_model("llama"), [long, *(row_of(f"{n}?") for n in range(12))], held_out_fraction=0.3
    )
    _, material = prepare_all(recipe)
    chosen = to_evaluate(recipe, material, conversations=3)
    held = material.rows.held_out
    assert [row.place for row in chosen.rows] == [row.place for row in held]
    assert [each.place for each in chosen.conversations] == [row.place for row in held][:3]
    assert chosen.notes == ()
    assert to_evaluate(recipe, material, conversations=0).conversations == []


@pytest.mark.parametrize("count", [20, 100])
def test_rows_that_were_trained_on_are_not_evaluated_after_the_file_changed(
    tmp_path: Path, tiny_model: TinyModel, count: int
) -> None:
    rows = [row_of(f"{n}?") for n in range(60)]
    recipe = make_recipe(tmp_path, tiny_model("llama"), rows, held_out_fraction=0.1)
    _, material = prepare_all(recipe)
    write_lines(tmp_path / "rows.jsonl", [row_of(f"{n}?") for n in range(count)])
    with pytest.raises(BadRun, match="not those that the run first was made of"):
        to_evaluate(recipe, material)
    write_lines(tmp_path / "rows.jsonl", rows)
    assert len(to_evaluate(recipe, material).rows) == len(material.rows.held_out)


def test_rows_of_a_file_to_evaluate_are_stored_and_what_becomes_of_them_is_said(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama"), [row_of("one?")])
    _, material = prepare_all(recipe)
    rows = [row_of("x " * 300, "y"), row_of("two?"), row_of("empty?", " "), row_of("long?", "y " * 300)]
    own = write_lines(tmp_path / "own.jsonl", [*rows, row_of("three?")])
    chosen = to_evaluate(recipe, material, data=own, conversations=9)
    used = [f"{own}, line {line}" for line in (2, 4, 5)]
    assert [row.place for row in chosen.rows] == used
    assert [each.place for each in chosen.conversations] == used, "only rows that the loss counts are asked"
    said = " / ".join(problem for problem, _ in chosen.notes)
    for place in (1, 3, 4):
        assert f"{own}, line {place}" in said
    assert [part.prepared.is_new for part in chosen.parts] == [True]
    assert not to_evaluate(recipe, material, data=own).parts[0].prepared.is_new
    write_lines(own, rows[:1])
    with pytest.raises(BadData, match="No row is left to evaluate on"):
        to_evaluate(recipe, material, data=own)


def test_a_resolved_recipe_names_its_day_and_whole_paths(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe(tmp_path, tiny_model("llama"), [row_of("one?")], template="mine.jinja")
    made = resolved(recipe)
    assert made.data.date is not None
    assert len(made.data.date) == 10
    assert made.data.template == str(tmp_path / "mine.jinja")
    assert resolved(made) == made
    dated = resolved(make_recipe(tmp_path, tiny_model("llama"), [row_of("one?")], date="2024-01-31"))
    assert dated.data.date == "2024-01-31"
    assert dated.data.template == "auto"


def test_a_dataset_of_the_hub_is_pinned_to_its_commit(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def commit_of(name: str, revision: str | None = None) -> str:
        asked.append((name, revision))
        return "c0ffee" if revision in (None, "c0ffee") else "beef"

    monkeypatch.setattr("qadapt.data.reading.hub_rows.hub_commit", commit_of)
    recipe = make_recipe(tmp_path, tiny_model("llama"), [row_of("one?")], held_out="hub:ann/test@v2")
    values = recipe.model_dump()
    values["data"]["sources"] = [{"path": "hub:ann/orders"}]
    made = resolved(Recipe.model_validate(values))
    assert made.data.sources[0].path == "hub:ann/orders@c0ffee"
    assert made.data.held_out == "hub:ann/test@beef"
    assert asked == [("ann/orders", None), ("ann/test", "v2")]
    assert resolved(made).data.sources == made.data.sources
    [identity] = identify((Source("hub:ann/orders", split="test"),)).identities
    assert identity["commit"] == "c0ffee"
    assert identity["split"] == "test"


def test_split_notes_speak_of_equal_rows(tmp_path: Path) -> None:
    rows = made_rows(3)
    part = part_of(store_of(tmp_path / "s", [*rows, rows[0]]), 4)
    split: Split = split_rows(part, None, share=0.0, seed=0, pad_id=0)
    assert split.repeated_rows == 1
    assert "1 training rows are equal to another one" in next(iter(split_notes(split)))[0]


def test_rows_made_in_memory_are_the_same(tmp_path: Path, contract: PromptContract) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row_of("one?"), row_of("two?")])
    made = token_rows(READING.reader().rows(path), contract, length=128, skips_refused=False, tally=Tally())
    rows = RowSet(prepared(path, contract=contract).prepared.store)
    for (number, row), stored in zip(made, rows, strict=True):
        assert row.ids.tolist() == stored.ids.tolist()
        assert row.place == stored.place
        assert number in (0, 1)


def test_another_split_of_the_same_dataset_is_held_out(tmp_path: Path, tiny_model: TinyModel) -> None:
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    splits = {
        name: Dataset.from_list([row_of(f"{name} {number}") for number in range(count)])
        for name, count in (("train", 4), ("test_sft", 2))
    }
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    recipe = make_recipe(tmp_path, tiny_model("qwen2"), [], held_out="split:test_sft")
    values = recipe.model_dump()
    values["data"]["sources"] = [{"path": str(tmp_path / "saved")}]
    _, material = prepare_all(resolved(Recipe.model_validate(values)))
    assert (len(material.rows.train), len(material.rows.held_out)) == (4, 2)
    values["data"]["sources"] *= 2
    with pytest.raises(ValidationError, match="there are several sources"):
        Recipe.model_validate(values)
