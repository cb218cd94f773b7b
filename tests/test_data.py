"""Rows: read with the place of every mistake, batched alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qadapt.data.batches import MicroBatch, all_batches, collate, micro_batches, widest_share
from qadapt.data.order import Order
from qadapt.data.reading.sources import RowReader
from qadapt.data.rows import RowSet
from qadapt.data.tokens import Tokens, tokens_of
from qadapt.engine.loss import IGNORED
from qadapt.errors import BadData

ROW = {"messages": [{"role": "user", "content": "two plus two?"}, {"role": "assistant", "content": "four"}]}


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


BAD_LINES = [
    ("{not json", "line 2: not JSON"),
    ('{"text": "no conversation"}', "line 2: the row has no `messages`"),
    ('{"messages": []}', "line 2: `messages` is not a list of turns"),
    ('{"messages": "hello"}', "line 2: `messages` is not a list of turns"),
    ('{"messages": [{"role": "user"}]}', "line 2, message 1: a message has `role` and `content`"),
    ('{"messages": [{"role": "wizard", "content": "x"}]}', "message 1: the role 'wizard'"),
    ('{"messages": [{"role": "user", "content": 7}]}', "message 1: `content` is int"),
    ('["a", "list"]', "line 2: the row has no `messages`"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES)
def test_a_row_that_is_no_conversation_is_named_by_file_and_line(
    tmp_path: Path, line: str, problem: str
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [ROW])
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(BadData) as caught:
        RowReader().read(path)
    assert problem in caught.value.problem
    assert "rows.jsonl" in caught.value.problem


def test_a_missing_an_empty_and_a_foreign_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="There is no data file"):
        RowReader().read(tmp_path / "none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n", encoding="utf-8")
    with pytest.raises(BadData, match="has no rows"):
        RowReader().read(empty)
    foreign = tmp_path / "rows.docx"
    foreign.write_bytes(b"PK")
    with pytest.raises(BadData, match=r"'\.docx', which is not read"):
        RowReader().read(foreign)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"messages": "\xe9"}\n')
    with pytest.raises(BadData, match="not UTF-8"):
        RowReader().read(latin)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"prompt": f"say {number}", "completion": str(number)} for number in range(3)]
    write_lines(tmp_path / "a.jsonl", list(rows))
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.csv").write_text(
        "prompt,completion\n" + "".join(f"say {n},{n}!\n" for n in range(3)), encoding="utf-8"
    )
    read = {suffix: RowReader().read(tmp_path / f"a.{suffix}") for suffix in ("jsonl", "json", "parquet")}
    assert [row.messages for row in read["jsonl"]] == [row.messages for row in read["json"]]
    assert [row.messages for row in read["jsonl"]] == [row.messages for row in read["parquet"]]
    assert [row.messages[1].content for row in RowReader().read(tmp_path / "a.csv")] == ["0!", "1!", "2!"]


def random_row(draw: torch.Generator, length: int) -> Tokens:
    ids = torch.randint(1, 99, (length,), generator=draw).tolist()
    supervised = (torch.rand(length, generator=draw) < 0.5).tolist()
    return tokens_of(ids, supervised, place="row")


@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 5))
def test_micro_batches_hold_every_learned_token_once(lengths: list[int], size: int) -> None:
    draw = torch.Generator().manual_seed(len(lengths))
    rows = [random_row(draw, length) for length in lengths]
    batches = micro_batches(rows, size=size, pad_id=0)
    learned = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    assert learned == sum(row.supervised_count for row in rows)
    assert learned == sum(batch.supervised_tokens for batch in batches)
    assert sum(len(batch.input_ids) for batch in batches) == len(rows)
    assert sum(batch.tokens for batch in batches) == sum(lengths)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 12), st.integers(1, 6))
def test_no_micro_batch_sends_more_to_the_head_than_the_widest_share(
    lengths: list[int], rows_per_step: int, size: int
) -> None:
    draw = torch.Generator().manual_seed(sum(lengths))
    rows = [random_row(draw, length) for length in lengths]
    steps = -(-2 * len(rows) // rows_per_step)
    order = Order(np.asarray(lengths, np.int32), rows_per_step=rows_per_step)
    share = widest_share(RowSet(rows), steps=steps, order=order)
    for step in range(steps):
        chosen = order.rows_of_step(step)
        for batch in micro_batches([rows[index] for index in chosen], size=size, pad_id=0):
            assert len(batch.positions) <= share * max(lengths) + 1e-9


def test_all_batches_are_those_of_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qadapt.data.batches.ROWS_IN_MEMORY", 4)
    draw = torch.Generator().manual_seed(0)
    rows = RowSet([random_row(draw, length) for length in (5, 9, 2, 7, 3, 8, 4, 6, 5, 2)])
    asked: list[int] = []

    def divide(part: Sequence[Tokens]) -> list[MicroBatch]:
        asked.append(len(part))
        return micro_batches(part, size=3, pad_id=0)

    batches = list(all_batches(rows, divide))
    assert asked == [4, 4, 2]
    assert sum(batch.tokens for batch in batches) == rows.tokens
    assert sum(batch.supervised_tokens for batch in batches) == rows.supervised_tokens


def test_a_target_is_the_token_after_its_position() -> None:
    row = tokens_of((5, 6, 7, 8), (False, False, True, True), place="row")
    short = tokens_of((1, 2), (True, True), place="row")
    batch = collate([row, short], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [1, 2, 0, 0]]
    assert batch.positions.tolist() == [0, 1, 2]
    assert batch.targets.tolist() == [[IGNORED, 7, 8], [2, IGNORED, IGNORED]]
    assert batch.supervised_tokens == 3, "the first token of a row has no predecessor to predict it"
