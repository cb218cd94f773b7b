"""Tools and their calls, in every way they are written: the same conversation, with arguments as values."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from row_files import ASKED, TURNS, read_conversation, write_rows

from qadapt.data.conversation import Conversation, Message
from qadapt.data.reading.sources import RowReader

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells.", "parameters": WEATHER}}
CALL = {
    "type": "function",
    "id": "c1",
    "function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, None]}},
}
BARE_CALL = {"name": "weather", "arguments": {"city": "Köln", "days": [1, None]}}


def test_tools_and_their_calls_of_openai_are_read_with_arguments_as_values(tmp_path: Path) -> None:
    written = {
        **CALL,
        "index": 0,
        "function": {"name": "weather", "arguments": '{"city": "Köln", "days": [1, null]}'},
    }
    turns = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [written], "refusal": None},
        {
            "role": "tool",
            "tool_call_id": "c1",
            "name": "weather",
            "content": [{"type": "text", "text": "dry"}],
        },
        {"role": "assistant", "content": "No."},
    ]
    conversation = read_conversation(
        tmp_path, {"messages": turns, "tools": [TOOL], "parallel_tool_calls": False}
    )
    assert conversation.tools == (TOOL,)
    assert conversation.messages == (
        Message("system", "Be short."),
        Message("user", "Rain?"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "dry", name="weather", tool_call_id="c1"),
        Message("assistant", "No."),
    )
    assert conversation.turns[2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_the_older_names_of_openai_mean_the_same(tmp_path: Path) -> None:
    call = {"name": "weather", "arguments": json.dumps(BARE_CALL["arguments"])}
    turns = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "weather", "content": "dry"},
        {"role": "assistant", "content": "No.", "function_call": None},
    ]
    conversation = read_conversation(tmp_path, {"messages": turns, "functions": [TOOL["function"]]})
    assert conversation.tools == (TOOL,)
    assert conversation.messages[1] == Message(
        "assistant", "", tool_calls=({"type": "function", "function": BARE_CALL},)
    )
    assert conversation.messages[2:] == (Message("tool", "dry", name="weather"), Message("assistant", "No."))


@pytest.mark.parametrize("value", [BARE_CALL, [BARE_CALL], {"function": BARE_CALL}])
def test_calls_of_sharegpt_are_json_in_a_turn_of_their_own(tmp_path: Path, value: object) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": json.dumps(value)},
            {"from": "observation", "value": "dry"},
            {"from": "gpt", "value": "No."},
        ],
        "system": "Be short.",
        "tools": json.dumps([TOOL["function"]]),
    }
    conversation = read_conversation(tmp_path, row)
    assert conversation.tools == (TOOL,)
    assert conversation.messages == (
        Message("system", "Be short."),
        Message("user", "Rain?"),
        Message("assistant", "", tool_calls=({"type": "function", "function": BARE_CALL},)),
        Message("tool", "dry"),
        Message("assistant", "No."),
    )


def test_tools_come_out_of_a_table_as_they_went_in(tmp_path: Path) -> None:
    """A table gives each record the keys of all, filled with null; what was not there is taken out again."""
    other = {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"b": {"type": "number"}}},
        },
    }
    rows = [
        {
            "messages": [
                TURNS[0],
                {
                    "role": "assistant",
                    "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {"city": "Rom"}}}],
                },
            ],
            "tools": [TOOL, other],
        },
        {
            "messages": [
                TURNS[0],
                {
                    "role": "assistant",
                    "tool_calls": [{**CALL, "function": {"name": "add", "arguments": {"b": 1.0}}}],
                },
            ],
            "tools": [other],
        },
        {"messages": TURNS, "tools": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    from_table = RowReader().read(tmp_path / "rows.parquet")
    from_lines = RowReader().read(write_rows(tmp_path / "rows.jsonl", *rows))
    for left, right in zip(from_table, from_lines, strict=True):
        assert isinstance(left, Conversation)
        assert isinstance(right, Conversation)
        assert (left.messages, left.tools) == (right.messages, right.tools)


def test_json_columns_of_a_table_are_read_as_what_they_say(tmp_path: Path) -> None:
    texts = pyarrow.array([json.dumps(TURNS), None], pyarrow.json_())
    tools = pyarrow.array([json.dumps(TOOL)], pyarrow.json_())
    lists = pyarrow.ListArray.from_arrays([0, 1, 1], tools)
    table = pyarrow.table({"messages": texts, "tools": lists})
    with (
        pyarrow.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table)
    reader = RowReader(skips_malformed=True)
    [row] = reader.read(tmp_path / "rows.arrow")
    assert isinstance(row, Conversation)
    assert (row.messages, row.tools) == (ASKED, (TOOL,))
    assert reader.skipped_rows == 1
