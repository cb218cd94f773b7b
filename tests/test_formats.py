"""Rows as people have them: every usual shape read alike, what cannot be held refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from row_files import ASKED, PAIR, TURNS, problem_of, read_conversation, read_row, write_rows

from qadapt.data.conversation import Conversation, Document, Message
from qadapt.data.reading.sources import RowReader
from qadapt.errors import BadData

SHAPES: list[tuple[str, dict[str, object]]] = [
    ("messages", {"messages": TURNS}),
    ("messages", {"messages": json.dumps(TURNS), "id": 7, "tools": None}),
    ("messages", {"messages": TURNS, "prompt": "two plus two?", "prompt_id": "x"}),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "two plus two?"}, {"from": "gpt", "value": "four"}]},
    ),
    ("sharegpt", {"conversations": TURNS}),
    ("alpaca", {"instruction": "two plus two?", "output": "four"}),
    ("alpaca", {"instruction": "two plus two?", "input": "", "output": "four", "history": []}),
    ("alpaca", {"instruction": "two plus two?", "input": None, "output": "four", "text": "both at once"}),
    ("prompt-completion", PAIR),
    ("question-answer", {"question": "two plus two?", "answer": "four"}),
    ("question-answer", {"query": "two plus two?", "response": "four"}),
    (
        "messages",
        {"messages": [{"from": "human", "value": "two plus two?"}, {"from": "gpt", "value": "four"}]},
    ),
    (
        "messages",
        {
            "messages": [
                {
                    **TURNS[0],
                    "content": [{"type": "text", "text": "two "}, {"type": "text", "text": "plus two?"}],
                },
                TURNS[1],
            ]
        },
    ),
    ("prompt-completion", {"prompt": TURNS[:1], "completion": TURNS[1:]}),
    ("preference", {"prompt": "two plus two?", "chosen": "four", "rejected": "five"}),
    ("preference", {"question": "two plus two?", "chosen": "four", "rejected": "five", "system": ""}),
    (
        "preference",
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "five"}]},
    ),
    ("preference", {"prompt": TURNS[:1], "chosen": "four", "rejected": "five"}),
    ("preference", {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "five"}]}),
    (
        "preference",
        {
            "prompt": "two plus two?",
            "prompt_id": "1",
            "chosen": TURNS,
            "rejected": TURNS,
            "messages": TURNS,
            "score_chosen": 9.0,
        },
    ),
    ("preference", {"chosen": json.dumps(TURNS), "rejected": json.dumps(TURNS)}),
    (
        "preference",
        {
            "chosen": "\n\nHuman: two plus two?\n\nAssistant: four",
            "rejected": "\n\nHuman: two plus two?\n\nAssistant: five",
        },
    ),
    (
        "preference",
        {"prompt": "\n\nHuman: two plus two?\n\nAssistant:", "chosen": " four", "rejected": " five"},
    ),
]


@pytest.mark.parametrize(("form", "row"), SHAPES)
def test_each_format_is_recognised_and_the_same_when_stated(tmp_path: Path, form: str, row: object) -> None:
    reader = RowReader()
    [conversation] = reader.read(write_rows(tmp_path / "row.jsonl", row))
    assert isinstance(conversation, Conversation)
    assert conversation.messages == ASKED
    assert reader.formats == {form: 1}
    assert read_row(tmp_path, row, form=form) == ASKED


def test_an_alpaca_input_follows_its_instruction(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "Haus", "output": "house", "system": "Be short."}
    expected = (
        Message("system", "Be short."),
        Message("user", "Translate.\n\nHaus"),
        Message("assistant", "house"),
    )
    assert read_row(tmp_path, row) == expected


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("system", "system"), ("human", "user"), ("user", "user"), ("Human", "user"), ("gpt", "assistant"),
        ("assistant", "assistant"), ("chatgpt", "assistant"), ("bing", "assistant"), ("bard", "assistant"),
        ("model", "assistant"), ("bot", "assistant"), ("developer", "system"), ("tool", "tool"),
        ("observation", "tool"), ("function", "tool"), ("function-response", "tool"),
        ("tool_response", "tool"),
    ],
)  # fmt: skip
def test_the_usual_role_names_of_sharegpt_are_known(tmp_path: Path, speaker: str, role: str) -> None:
    row = {"conversations": [{"from": speaker, "value": "x"}, {"from": "gpt", "value": "y"}]}
    assert read_row(tmp_path, row)[0] == Message(role, "x")


def test_a_weight_that_changes_nothing_is_no_fault(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "two plus two?", "weight": 0},
        {"from": "gpt", "value": "four", "weight": 1},
    ]
    assert read_row(tmp_path, {"conversations": turns}) == ASKED


def test_names_of_speakers_reach_the_template(tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "user", "name": "Ada", "content": "hi"},
            {"role": "assistant", "content": "yes"},
        ]
    }
    conversation = read_conversation(tmp_path, row)
    assert conversation.turns[0] == {"role": "user", "content": "hi", "name": "Ada"}
    assert conversation.turns[1] == {"role": "assistant", "content": "yes"}


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    row = {"question_text": "two plus two?", "best": "four", "prompt": "an id", "answer": "unused"}
    columns = {"prompt": "question_text", "completion": "best"}
    assert read_row(tmp_path, row, columns=columns) == ASKED
    dolly = {"instruction": "two plus two?", "context": "", "response": "four", "category": "open"}
    assert read_row(tmp_path, dolly, columns={"input": "context", "output": "response"}) == ASKED
    swapped = {"prompt": "four", "completion": "two plus two?"}
    assert read_row(tmp_path, swapped, columns={"prompt": "completion", "completion": "prompt"}) == ASKED
    path = write_rows(tmp_path / "rows.jsonl", row, {"question_text": "x"})
    assert "line 2: the row has no column 'best', which data.columns names" in problem_of(
        path, columns=columns
    )


def called(**call: object) -> dict[str, object]:
    return {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}


def weighed(value: object) -> dict[str, object]:
    return {"messages": [*TURNS, TURNS[0], {**TURNS[1], "weight": value}]}


REFUSED: list[tuple[dict[str, object], str]] = [
    (called(id="1"), "message 2, call 1: a call is of a function with a `name`"),
    (called(function={"name": "f"}), "call 1: `arguments` is no JSON object but empty"),
    (
        called(function={"name": "f", "arguments": "city=Paris"}),
        "`arguments` is no JSON object: 'city=Paris'",
    ),
    (called(function={"name": "f", "arguments": "[1]"}), "`arguments` is no JSON object but list"),
    (called(function={"name": "f", "arguments": {"x": "\ud800"}}), "half of a surrogate pair"),
    (called(function={"name": "f", "arguments": '{"a":' * 90 + "1" + "}" * 90}), "nested too deeply"),
    (called(type="custom", custom={"name": "f"}), "the call is of the type 'custom'"),
    ({"messages": [{**TURNS[0], "tool_calls": [{"x": 1}]}, TURNS[1]]}, "only an assistant calls tools"),
    (
        {"messages": [{**TURNS[1], "tool_calls": [{"x": 1}], "function_call": {"name": "f"}}]},
        "in `tool_calls` and in `function_call`",
    ),
    ({"messages": [{**TURNS[0], "tool_call_id": "a"}, TURNS[1]]}, "only a tool answers a call"),
    ({"messages": TURNS, "tools": [{"type": "function"}]}, "tool 1: a tool is a function with a `name`"),
    ({"messages": TURNS, "tools": [{"type": "web_search"}]}, "tool 1: the tool is of the type 'web_search'"),
    ({"messages": TURNS, "tools": "get_weather"}, "`tools` is no list of tools"),
    ({"messages": TURNS, "tools": ["{"]}, "a tool is an object; this one is str"),
    (
        {"messages": TURNS, "tools": [{"name": "f"}], "functions": [{"name": "f"}]},
        "in `tools` and in `functions`",
    ),
    ({"messages": TURNS, "images": ["a.png"]}, "images are not supported"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}, {"type": "text"}]}]},
        "`content` has a part of the type 'image_url'",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a part of text without `text`"),
    (
        {"messages": [TURNS[0], {"role": "assistant", "content": None}]},
        "message 2: `content` is empty, not a text",
    ),
    ({"messages": [TURNS[0], {"role": "assistant"}]}, "message 2: a message has `role` and `content`"),
    ({"messages": [TURNS[0], {"role": "assistant", "content": None, "refusal": "no"}]}, "refusals apart"),
    (weighed(0.5), "message 4: `weight` is 0.5; as OpenAI defines it, a message counts (1) or does not (0)"),
    (weighed("1"), "message 4: `weight` is str"),
    ({"messages": [TURNS[0], {**TURNS[1], "train": "no"}]}, "`train` is str, not true or false"),
    ({"messages": [TURNS[0], {**TURNS[1], "train": False, "weight": 1}]}, "`weight` and `train` contradict"),
    ({"messages": [{**TURNS[0], "reasoning": "hm"}, TURNS[1]]}, "only an assistant's reasoning is known"),
    (
        {"messages": [TURNS[0], {**TURNS[1], "reasoning": "hm", "thinking": "no"}]},
        "`reasoning` and `thinking` differ",
    ),
    ({"messages": [{"role": "system", "content": "a"}, *TURNS], "system": "b"}, "two system prompts"),
    (
        {"messages": [{"role": "critic", "content": "a"}, *TURNS]},
        "the role 'critic' is not one of system, developer",
    ),
    (
        {"conversations": [{"from": "function_call", "value": "f()"}]},
        "`value` is no call of a tool in JSON: 'f()'",
    ),
    ({"conversations": [{"from": "function_call", "value": "[]"}]}, "`value` holds no call of a tool"),
    ({"conversations": [{"from": "wizard", "value": "x"}]}, "the role 'wizard'"),
    ({"conversations": [{"from": "human"}]}, "message 1: a message has `from` and `value`"),
    ({"conversations": ["hi"]}, "message 1: a message has `from` and `value`"),
    ({"prompt": "x", "chosen": "a", "rejected": TURNS}, "one is a text and the other a list of turns"),
    ({"chosen": "a", "rejected": "b"}, "nothing says what `chosen` answers"),
    ({"chosen": TURNS[1:], "rejected": TURNS[1:]}, "nothing says what `chosen` answers"),
    ({"prompt": "else", "chosen": TURNS, "rejected": TURNS}, "asks for itself, and not what the prompt says"),
    (
        {"prompt": "x", "question": "y", "chosen": "a", "rejected": "b"},
        "stands in `prompt` and in `question`",
    ),
    ({"prompt": "x", "chosen": None, "rejected": "b"}, "`chosen` is empty, not a text"),
    ({"messages": TURNS, "chosen": "a", "rejected": "b"}, "fit several formats: messages, preference"),
    ({"question": "x", "answer": "y", "chosen": "a", "rejected": "b"}, "question-answer, preference"),
    ({**PAIR, "label": False}, "a judged answer"),
    ({"text": "Once", "label": 1}, "a classified text (`text`, `label`)"),
    ({"text": " \n"}, "`text` is empty"),
    ({"text": None}, "`text` is empty, not a text"),
    ({"text": "Once", "tools": [{"name": "f"}]}, "tools beside raw text"),
    ({"text": "Once", "images": ["a.png"]}, "images are not supported"),
    ({"messages": TURNS, "history": [["a", "b"]]}, "earlier turns in `history`"),
    ({"instruction": "x", "output": "y", "history": [["a"]]}, "no list of pairs [question, answer]"),
    ({"instruction": "x", "output": "y", "history": [["a", None]]}, "`history` is empty, not a text"),
    ({**PAIR, "question": "x", "answer": "y"}, "fit several formats: prompt-completion, question-answer"),
    (
        {"question": "x", "answer": "y", "query": "x", "response": "z"},
        "two pairs: `question`, `answer` and `query`",
    ),
    ({"prompt": "x", "completion": None}, "`completion` is empty, not a text"),
    ({"prompt": "x", "completion": 4}, "`completion` is int, not a text"),
    ({"prompt": TURNS, "completion": "x"}, "one is a list of turns and the other is not"),
    ({"prompt": TURNS, "completion": []}, "`completion` is not a list of turns"),
    ({"prompt": "\ud800", "completion": "x"}, "half of a surrogate pair"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "the role list"),
    ({"title": "x"}, "this one has the keys 'title'"),
    ({}, "this one has no keys"),
]


@pytest.mark.parametrize(("row", "said"), REFUSED)
def test_what_a_conversation_cannot_hold_is_refused_by_name(tmp_path: Path, row: object, said: str) -> None:
    problem = problem_of(write_rows(tmp_path / "row.jsonl", row))
    assert said in problem
    assert "row.jsonl, line 1" in problem


def test_what_stands_beside_a_question_is_put_in_or_left_out_as_asked(tmp_path: Path) -> None:
    row = {"question": "two plus two?", "context": "By hand.", "answer": "four"}
    assert read_row(tmp_path, row, form="question-answer") == ASKED
    columns = {"instruction": "question", "input": "context", "output": "answer"}
    expected = (Message("user", "two plus two?\n\nBy hand."), ASKED[1])
    assert read_row(tmp_path, row, columns=columns) == expected


def test_a_system_prompt_may_stand_beside_the_turns(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be short."}
    expected = (Message("system", "Be short."), *ASKED)
    for key in ("system", "system_prompt"):
        assert read_row(tmp_path, {"messages": TURNS, key: "Be short."}) == expected
        assert read_row(tmp_path, {"messages": [system, *TURNS], key: "Be short."}) == expected


def test_a_stated_format_decides_between_several(tmp_path: Path) -> None:
    row = {"messages": TURNS, "chosen": "a", "rejected": "b", "question": "x", "answer": "y"}
    assert read_row(tmp_path, row, form="messages") == ASKED


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_stands_apart_from_the_content(tmp_path: Path, key: str) -> None:
    messages = read_row(tmp_path, {"messages": [TURNS[0], {**TURNS[1], key: "2+2=4"}]})
    assert messages[1] == Message("assistant", "four", reasoning="2+2=4")


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": False}]
)
def test_an_answer_of_weight_zero_is_context_only(tmp_path: Path, flag: dict[str, object]) -> None:
    messages = read_row(tmp_path, {"messages": [TURNS[0], {**TURNS[1], **flag}, *TURNS]})
    assert [message.is_learned for message in messages] == [True, False, True, True]


def test_alpaca_history_comes_before_the_question(tmp_path: Path) -> None:
    history: Any
    for history in ([["hi", "yes?"]], json.dumps([["hi", "yes?"]])):
        row = {"instruction": "two plus two?", "output": "four", "history": history, "system": "Be short."}
        expected = (
            Message("system", "Be short."),
            Message("user", "hi"),
            Message("assistant", "yes?"),
            *ASKED,
        )
        assert read_row(tmp_path, row) == expected


def test_of_prompt_and_completion_in_turns_only_the_completion_is_learned(tmp_path: Path) -> None:
    messages = read_row(tmp_path, {"prompt": [*TURNS, TURNS[0]], "completion": TURNS[1:]})
    assert messages == (ASKED[0], Message("assistant", "four", is_learned=False), *ASKED)


def test_of_a_preference_pair_what_was_judged_is_learned(tmp_path: Path) -> None:
    worse = [*TURNS, TURNS[0], {"role": "assistant", "content": "five"}]
    expected = (ASKED[0], Message("assistant", "four", is_learned=False), *ASKED)
    assert read_row(tmp_path, {"chosen": TURNS * 2, "rejected": worse}) == expected
    assert (
        read_row(tmp_path, {"prompt": [*TURNS, TURNS[0]], "chosen": TURNS * 2, "rejected": worse}) == expected
    )
    dialogue = "\n\nHuman: two plus two?\n\nAssistant: four\n\nHuman: two plus two?\n\nAssistant:"
    assert read_row(tmp_path, {"chosen": f"{dialogue} four", "rejected": f"{dialogue} five"}) == expected
    assert read_row(tmp_path, {"prompt": dialogue, "chosen": " four", "rejected": " five"}) == expected
    whole = {"prompt": dialogue, "chosen": f"{dialogue} four", "rejected": f"{dialogue} five"}
    assert read_row(tmp_path, whole) == expected


def test_raw_text_is_a_document(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"text": " Once\nupon", "url": "x"}, {"text": "a time"})
    reader = RowReader()
    assert reader.read(path) == [
        Document(" Once\nupon", f"{path}, line 1"),
        Document("a time", f"{path}, line 2"),
    ]
    assert reader.formats == {"text": 2}
    labelled = write_rows(tmp_path / "labelled.jsonl", {"text": "Once", "label": 1})
    assert len(RowReader(form="text").read(labelled)) == 1


NAMES = [
    "messages", "conversations", "system", "prompt", "completion", "instruction", "input", "output",
    "history", "question", "answer", "query", "response", "text", "chosen", "rejected",
    "tools", "functions", "label",
]  # fmt: skip
TURN_KEYS = [
    "role", "from", "content", "value", "name", "weight", "train", "tool_calls", "function_call",
    "tool_call_id", "reasoning", "thinking", "type", "text", "function", "arguments", "id", "image",
]  # fmt: skip
WORDS = st.text(max_size=4) | st.sampled_from(
    [
        "user", "assistant", "tool", "gpt", "human", "function_call", "text", "function", "{}", "[]",
        "\ud800", '{"a": 1}', "\n\nHuman: a\n\nAssistant: b", '[{"name": "f", "arguments": {}}]',
        '[{"role": "user", "content": "x"}]',
    ]
)  # fmt: skip
LEAVES = st.none() | st.booleans() | st.floats() | st.integers(-2, 2) | WORDS
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TURN_KEYS) | WORDS, inner, max_size=4)
    ),
    max_leaves=5,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": WORDS | VALUES},
    optional=dict.fromkeys(TURN_KEYS[4:12], VALUES),
)
ROW = st.dictionaries(st.sampled_from(NAMES), VALUES | st.lists(TURN, max_size=3), max_size=5)
FORMATS = [
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt-completion",
    "question-answer",
    "preference",
    "text",
]


@settings(max_examples=250)
@given(st.lists(ROW | VALUES, min_size=1, max_size=5), st.sampled_from(FORMATS))
@example(
    [{"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]}],
    "auto",
)
def test_every_row_of_any_values_is_used_or_reported(
    tmp_path_factory: pytest.TempPathFactory, rows: list[object], form: str
) -> None:
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", PAIR, *rows)
    reader = RowReader(form=form, skips_malformed=True)
    try:
        used = reader.read(path)
    except BadData as error:
        assert error.problem.startswith(f"{path}: all {len(rows) + 1} rows are malformed")
        used = []
    assert len(used) + reader.skipped_rows == len(rows) + 1
    assert sum(reader.formats.values()) == len(used)
    for row in used:
        parts = [row.text] if isinstance(row, Document) else [row.turns, row.tools]
        json.dumps(parts, ensure_ascii=False).encode()
    assert all(str(path) in skipped.problem for skipped in reader.skipped)


@given(st.lists(TURN, min_size=1, max_size=5), st.sampled_from(["messages", "chosen", "completion"]))
def test_no_turn_of_a_conversation_is_lost(
    tmp_path_factory: pytest.TempPathFactory, turns: list[dict[str, Any]], column: str
) -> None:
    others = {"messages": {}, "chosen": {"rejected": turns}, "completion": {"prompt": TURNS[:1]}}
    path = write_rows(tmp_path_factory.mktemp("turns") / "rows.jsonl", {column: turns, **others[column]})
    try:
        [row] = RowReader().read(path)
    except BadData as error:
        assert str(path) in error.problem
        return
    assert isinstance(row, Conversation)
    read = row.messages[1:] if column == "completion" else row.messages
    assert [message.role for message in read] == [turn["role"] for turn in turns]
    for message, turn in zip(read, turns, strict=True):
        calls = turn.get("tool_calls") or turn.get("function_call")
        assert bool(message.tool_calls) == (calls not in (None, "", [], {}, "[]", "{}"))
        if isinstance(turn["content"], str):
            assert message.content == turn["content"]
