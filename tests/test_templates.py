"""The prompt contract against published templates: ids, prompts, masks, refusals.

What is right is said three times, never by the code under test: by the library's own rendering (ids), by
texts marked by hand (`templates/golden.json`), and by a search for contents in letters that no template has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from template_families import FAMILIES, FOLDER, family_tokenizer, write_family

from qadapt.data.conversation import Conversation, Message
from qadapt.data.prompt import PromptContract, load_contract
from qadapt.data.rendering.encoding import Encoded
from qadapt.errors import BadData, BadModel

Contract = Callable[[str], PromptContract]
Span = tuple[int, int]

PLACE = "rows.jsonl, line 7"
NEEDS_TOOLS = ("command_r_plus",)
ENDLESS = ("solar",)
DROPS_SYSTEM = ("mistral_v3",)
ORDINARY = [name for name in FAMILIES if name not in (*NEEDS_TOOLS, *ENDLESS)]
WITH_SYSTEM = [name for name in ORDINARY if "system" in FAMILIES[name].can and name not in DROPS_SYSTEM]
WITH_CALLS = [name for name in ORDINARY if "calls" in FAMILIES[name].can]
WITH_REASONING = [name for name in ORDINARY if "reasoning" in FAMILIES[name].can]

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    },
)
CODE = "def f(x):\n    return {'x': [x, {{ x }}]}  # {% if %}\n\n\n```"


def conversation(*messages: Message, tools: Sequence[dict[str, Any]] = ()) -> Conversation:
    return Conversation(messages, PLACE, tuple(tools))


def user(content: str) -> Message:
    return Message("user", content)


def answer(content: str, **parts: Any) -> Message:
    return Message("assistant", content, **parts)


def call(city: str, *, words: str = "", reasoning: str | None = None) -> Message:
    function = {"name": "weather", "arguments": {"city": city}}
    calls = ({"type": "function", "id": "abcdefghi", "function": function},)
    return answer(words, tool_calls=calls, reasoning=reasoning)


def result(content: str) -> Message:
    return Message("tool", content, tool_call_id="abcdefghi")


PLAIN = {
    "one turn": conversation(user("two plus two?"), answer("four")),
    "three turns": conversation(
        user("one?"), answer("uno"), user("two?"), answer("dos"), user("three?"), answer("tres, and no more")
    ),
    "blanks at both ends": conversation(
        user("  one?\n"), answer("\n\n uno \t"), user("\ttwo? "), answer("  dos\n\n")
    ),
    "unicode": conversation(user("Wie heißt 🏔️ auf 中文?"), answer("e\u0301 und 山 👩‍👩‍👧 \u200b\u00a0!")),
    "code": conversation(user(CODE), answer(CODE + "\n\n" + CODE), user("<b>&amp;\\n</b>"), answer("'\"\\")),
    "answers alike": conversation(
        user("yes"), answer("yes"), user("yes"), answer("yes"), user("yes"), answer("yes")
    ),
    "names of roles as contents": conversation(
        user("assistant"), answer("user"), user("model"), answer("assistant")
    ),
}
SYSTEM = {
    "system": conversation(Message("system", " Be brief.\n"), user("two?"), answer("dos")),
    "system and turns": conversation(
        Message("system", "Be\n\nbrief {{ or }} not."), user("a?"), answer("b"), user("c?"), answer("d")
    ),
}
CALLS = {
    "a call": conversation(
        user("Weather in Oslo?"), call("Oslo", words="I look."), result("rain"), answer("Rain."), tools=TOOLS
    ),
    "a call, then another question": conversation(
        user("Weather in Rome?"),
        call("Rome", words="I look."),
        result('{"sky": "sun"}'),
        answer("Sun."),
        user("And in {{ Oslo }}?"),
        call("{{ Oslo }}", words="Again."),
        result("rain\n"),
        answer("Rain."),
        tools=TOOLS,
    ),
}
REASONING = {
    "reasoning": conversation(user("2+2?"), answer("4", reasoning="two and two")),
    "reasoning in both turns": conversation(
        user("2+2?"), answer("4", reasoning="two"), user("+1?"), answer("5", reasoning="\none more\n\n")
    ),
    "reasoning in the last turn": conversation(
        user("2?"), answer("4"), user("+1?"), answer("5", reasoning="one more")
    ),
    "reasoning before a call": conversation(
        user("Oslo?"), call("Oslo", reasoning="look"), result("rain"), answer("Rain."), tools=TOOLS
    ),
    "reasoning before and after a call": conversation(
        user("Oslo?"),
        call("Oslo", reasoning="look"),
        result("rain"),
        answer("Rain.", reasoning="so it is"),
        tools=TOOLS,
    ),
}
RENDERED = [
    (family, title, row)
    for families, table in (
        (ORDINARY, PLAIN),
        (WITH_SYSTEM, SYSTEM),
        (WITH_CALLS, CALLS),
        (WITH_REASONING, REASONING),
    )
    for family in families
    for title, row in table.items()
]


@pytest.fixture(scope="session")
def contract_of(tmp_path_factory: pytest.TempPathFactory) -> Contract:
    made: dict[str, PromptContract] = {}

    def make(family: str) -> PromptContract:
        if family not in made:
            made[family] = load_contract(write_family(family, tmp_path_factory.mktemp(family)))
        return made[family]

    return make


def library_ids(family: str, turns: list[dict[str, Any]], *, tools: Sequence[Any], asks: bool) -> list[int]:
    encoded = family_tokenizer(family).apply_chat_template(
        turns, tools=list(tools) or None, tokenize=True, add_generation_prompt=asks, return_dict=True
    )
    ids: list[int] = encoded["input_ids"]
    return ids


@pytest.mark.parametrize(("family", "title", "row"), RENDERED, ids=lambda value: str(value)[:40])
def test_a_row_has_the_ids_of_the_librarys_own_rendering(
    contract_of: Contract, family: str, title: str, row: Conversation
) -> None:
    encoded = contract_of(family).encode(row)
    assert list(encoded.ids) == library_ids(family, row.turns, tools=row.tools, asks=False), title


@pytest.mark.parametrize(("family", "title", "row"), RENDERED, ids=lambda value: str(value)[:40])
def test_a_prompt_has_the_ids_of_the_librarys_own_rendering(
    contract_of: Contract, family: str, title: str, row: Conversation
) -> None:
    for number, turn in enumerate(row.turns):
        if turn["role"] == "assistant":
            asked = row.turns[:number]
            expected = library_ids(family, asked, tools=row.tools, asks=True)
            assert contract_of(family).prompt_ids(asked, tools=row.tools) == expected, title


def golden_cases() -> list[Any]:
    cases = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
    return [pytest.param(case, id=f"{case['family']}-{case['name']}") for case in cases]


@pytest.mark.parametrize("case", golden_cases())
def test_learned_is_what_is_marked_by_hand(contract_of: Contract, case: dict[str, Any]) -> None:
    family = case["family"]
    marked = case["marked"].replace("⟨day⟩", datetime.now().strftime("%d %b %Y"))
    text, spans = unmarked(marked)
    row = Conversation(
        tuple(message_of(turn) for turn in case["messages"]), PLACE, tuple(case.get("tools", ()))
    )
    encoded = contract_of(family).encode(row)
    tokens = family_tokenizer(family)(text, add_special_tokens=False, return_offsets_mapping=True)
    assert tokens["input_ids"] == library_ids(family, row.turns, tools=row.tools, asks=False)
    assert list(encoded.ids) == tokens["input_ids"]
    # by where a token starts: Phi-3's <|assistant|> swallows the blanks of an answer, its <|end|> a line end
    expected = [any(start <= first < end for start, end in spans) for first, _ in tokens["offset_mapping"]]
    got = [bool(flag) for flag in encoded.supervised]
    assert shown(family, encoded.ids, got) == shown(family, encoded.ids, expected)
    assert got == expected


def unmarked(marked: str) -> tuple[str, list[Span]]:
    """The text without ⟦⟧, and the characters that stood between them."""
    text, spans = "", list[Span]()
    for number, part in enumerate(marked.replace("⟧", "⟦").split("⟦")):
        if number % 2:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, spans


def message_of(turn: dict[str, Any]) -> Message:
    return Message(
        turn["role"],
        turn["content"],
        reasoning=turn.get("reasoning_content"),
        tool_calls=tuple(turn.get("tool_calls", ())),
        tool_call_id=turn.get("tool_call_id"),
    )


def shown(family: str, ids: Sequence[int], flags: Sequence[bool]) -> str:
    """Tokens one by one, the learned ones in ⟦⟧: what a person reads when a test fails."""
    tokens = family_tokenizer(family).convert_ids_to_tokens([int(token) for token in ids])
    return " ".join(f"⟦{token}⟧" if flag else str(token) for token, flag in zip(tokens, flags, strict=True))


# Masks against a search for contents. No template has these letters, so they can be found without doubt.

LETTERS = "бгджзлфцчшщъыэюя"


def test_no_template_has_a_letter_of_the_generated_contents() -> None:
    assert not any(letter in family.text for family in FAMILIES.values() for letter in LETTERS)


word = st.text(LETTERS, min_size=1, max_size=4)
blank = st.sampled_from(["", "", " ", "\n", "  \n\n"])
content = st.builds(
    lambda before, words, between, after: before + between.join(words) + after,
    blank,
    st.lists(word, min_size=1, max_size=3),
    st.sampled_from([" ", "\n", "\n\n", ", ", "{{ ", " }} "]),
    blank,
)


@st.composite
def conversations(draw: st.DrawFn, family: str) -> Conversation:
    can = FAMILIES[family].can
    messages = list[Message]()
    if family in WITH_SYSTEM and draw(st.booleans()):
        messages.append(Message("system", draw(content)))
    has_tools = "calls" in can and draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        messages.append(user(draw(content)))
        if has_tools and draw(st.booleans()):
            # Falcon3 writes no mark of the answer before a call without words
            words = draw(content if family == "falcon3" else st.just(""))
            messages += [call(draw(word), words=words), result(draw(content))]
        messages.append(answer(draw(content), is_learned=draw(st.integers(0, 5)) > 0))
    if family == "mistral_v3":  # it looks for its last question by its content
        asked = [message.content for message in messages if message.role == "user"]
        assume(len(set(asked)) == len(asked))
    if not any(message.role == "assistant" and message.is_learned for message in messages):
        messages[-1] = answer(messages[-1].content)
    return conversation(*messages, tools=TOOLS if has_tools else ())


def contents_in(text: str, row: Conversation) -> Iterator[tuple[int, Span]]:
    """Each content, in order, and where it stands: by search, from the end of the one before it."""
    position = 0
    for number, message in enumerate(row.messages):
        parts = [message.content.strip()]
        parts += [called["function"]["arguments"]["city"] for called in message.tool_calls]
        for part in filter(None, parts):
            # a tool's result may be written as JSON
            forms = (part, json.dumps(part, ensure_ascii=False)[1:-1])
            found = [(text.find(form, position), form) for form in forms]
            start, written = min((start, form) for start, form in found if start >= 0)
            position = start + len(written)
            yield number, (start, position)


def must_and_must_not(family: str, row: Conversation) -> tuple[list[int], set[int], set[int]]:
    """Ids of the row, positions that must be learned, and those that must not; a position may be in neither.

    From the end of an answer to the end of the last content before the next one nothing is learned; the head
    of the next turn may be either, unless the prompt that asks for the answer is how the row begins.
    """
    tokenizer = family_tokenizer(family)
    tools = list(row.tools) or None
    text = tokenizer.apply_chat_template(row.turns, tools=tools, tokenize=False)
    assert isinstance(text, str)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    ends = set(tokenizer.convert_tokens_to_ids(list(FAMILIES[family].ends)))
    tokens_of = {number: set[int]() for number in range(len(row.messages))}
    for number, (start, end) in contents_in(text, row):
        tokens_of[number] |= {at for at, (first, last) in enumerate(offsets) if first < end and start < last}
    must, must_not, outside = set[int](), set[int](), 0
    for number, message in enumerate(row.messages):
        here = tokens_of[number]
        if message.role != "assistant":
            must_not |= set(range(outside, max(here) + 1))
            continue
        closing = next(at for at in range(max(here), len(ids)) if ids[at] in ends)
        prompt = library_ids(family, row.turns[:number], tools=row.tools, asks=True)
        begin = len(prompt) if ids[: len(prompt)] == prompt else min(here)
        if ids[: len(prompt)] == prompt:
            must_not |= set(range(outside, begin))
        (must if message.is_learned else must_not).update(range(begin, closing + 1))
        outside = closing + 1
    return ids, must, (must_not | set(range(outside, len(ids)))) - must


@pytest.mark.parametrize("family", ORDINARY)
def test_masks_cover_the_answers_and_their_ends_and_nothing_of_others(
    contract_of: Contract, family: str
) -> None:
    contract = contract_of(family)

    @settings(max_examples=40)
    @given(conversations(family))
    def check(row: Conversation) -> None:
        ids, must, must_not = must_and_must_not(family, row)
        encoded = contract.encode(row)
        assert list(encoded.ids) == ids
        learned = {at for at, flag in enumerate(encoded.supervised) if flag}
        text = shown(family, ids, [bool(flag) for flag in encoded.supervised])
        assert must <= learned, text
        assert not must_not & learned, text

    check()


# What a template refuses, drops or moves is refused by name; what it may leave out is noted.


def test_a_system_turn_that_the_template_refuses_is_refused(contract_of: Contract) -> None:
    with pytest.raises(BadData, match=rf"{PLACE}: .*System role not supported"):
        contract_of("gemma2").encode(SYSTEM["system"])


def test_a_system_turn_that_the_template_drops_is_refused(contract_of: Contract) -> None:
    """Mistral v0.3 writes it into the last message only, which in a row to learn from is an answer."""
    with pytest.raises(BadData, match=rf"{PLACE}: .*does not print the system prompt"):
        contract_of("mistral_v3").encode(SYSTEM["system"])


def test_a_template_that_marks_would_change_is_refused(contract_of: Contract) -> None:
    """Mistral v0.3 finds its last question by its content, so two that are alike get the tools twice."""
    turns = (user("Oslo?"), answer("Rain."))
    with pytest.raises(BadData, match=rf"{PLACE}: .*cannot be told for sure"):
        contract_of("mistral_v3").encode(conversation(*turns, *turns, tools=TOOLS))


@pytest.mark.parametrize("family", [name for name in ORDINARY if FAMILIES[name].alternates])
def test_two_questions_in_a_row_are_refused_where_turns_must_alternate(
    contract_of: Contract, family: str
) -> None:
    with pytest.raises(BadData, match=rf"{PLACE}: .*alternate"):
        contract_of(family).encode(conversation(user("one?"), user("two?"), answer("dos")))


@pytest.mark.parametrize("family", [name for name in ORDINARY if not FAMILIES[name].alternates])
def test_two_questions_in_a_row_are_rendered_where_they_may_be(contract_of: Contract, family: str) -> None:
    row = conversation(user("one?"), user("two?"), answer("dos"))
    encoded = contract_of(family).encode(row)
    assert list(encoded.ids) == library_ids(family, row.turns, tools=(), asks=False)


@pytest.mark.parametrize("family", [name for name in ORDINARY if "calls" not in FAMILIES[name].can])
def test_calls_that_the_template_drops_are_refused(contract_of: Contract, family: str) -> None:
    with pytest.raises(BadData, match=f"{PLACE}: .*(does not print the tool calls|refuses the)"):
        contract_of(family).encode(CALLS["a call"])


@pytest.mark.parametrize("family", ["qwen2_5", "falcon3"])
def test_a_call_is_learned_with_its_words(contract_of: Contract, family: str) -> None:
    encoded = contract_of(family).encode(CALLS["a call"])
    learned = contract_of(family).text(encoded.ids[encoded.supervised])
    assert "I look." in learned
    assert '"city": "Oslo"' in learned
    assert not encoded.notes


@pytest.mark.parametrize("family", ["llama3_1", "llama3_2", "mistral_v3"])
def test_words_beside_a_call_that_the_template_leaves_out_are_noted(
    contract_of: Contract, family: str
) -> None:
    encoded = contract_of(family).encode(CALLS["a call"])
    learned = contract_of(family).text(encoded.ids[encoded.supervised])
    assert "I look." not in learned
    assert '"city": "Oslo"' in learned
    assert encoded.notes == {"content left out"}


def test_a_call_without_the_head_of_its_turn_is_refused(contract_of: Contract) -> None:
    """Falcon3 writes no `<|assistant|>` before a call without words."""
    row = conversation(user("Oslo?"), call("Oslo"), result("rain"), answer("Rain."), tools=TOOLS)
    with pytest.raises(BadData, match=rf"{PLACE}: .*message 2"):
        contract_of("falcon3").encode(row)


@pytest.mark.parametrize("family", [name for name in ORDINARY if "reasoning" not in FAMILIES[name].can])
def test_the_last_answers_reasoning_is_never_left_out(contract_of: Contract, family: str) -> None:
    with pytest.raises(BadData, match=rf"{PLACE}: .*the reasoning of message 2, the last answer"):
        contract_of(family).encode(REASONING["reasoning"])


def test_reasoning_of_earlier_turns_is_noted_where_only_the_last_is_printed(contract_of: Contract) -> None:
    assert "reasoning left out" in contract_of("qwen3").encode(REASONING["reasoning in both turns"]).notes
    assert not contract_of("qwen3").encode(REASONING["reasoning in the last turn"]).notes


@pytest.mark.parametrize("family", ORDINARY)
def test_tools_that_the_template_leaves_out_are_noted(contract_of: Contract, family: str) -> None:
    encoded = contract_of(family).encode(conversation(user("two?"), answer("dos"), tools=TOOLS))
    is_left_out = "tools" not in FAMILIES[family].can
    assert ("tools left out" in encoded.notes) is is_left_out
    assert ("The weather of a city." in contract_of(family).text(encoded.ids)) is not is_left_out


@pytest.mark.parametrize("family", ORDINARY)
def test_an_answer_that_begins_otherwise_than_it_is_asked_for_is_noted(
    contract_of: Contract, family: str
) -> None:
    """DeepSeek-R1's prompt ends with `<think>`, which its answers in a conversation do not have."""
    notes = contract_of(family).encode(PLAIN["one turn"]).notes
    assert notes == ({"asked otherwise"} if family.startswith("deepseek_r1") else frozenset())


@pytest.mark.parametrize("family", ORDINARY)
def test_an_end_token_inside_a_content_is_noted(contract_of: Contract, family: str) -> None:
    end = FAMILIES[family].ends[0]
    row = conversation(user("what?"), answer(f"a{end}b"))
    encoded = contract_of(family).encode(row)
    assert "control tokens" in encoded.notes
    assert list(encoded.ids) == library_ids(family, row.turns, tools=(), asks=False)


def test_a_template_that_needs_tools_refuses_a_row_without(contract_of: Contract) -> None:
    with pytest.raises(BadData, match=rf"{PLACE}: .*refuses the conversation"):
        contract_of("command_r_plus").encode(PLAIN["one turn"])


def test_a_template_that_writes_after_the_last_answer_is_refused(contract_of: Contract) -> None:
    """Command-R+ with tools closes every prompt with instructions, which stand behind the answer in a row."""
    with pytest.raises(BadData, match=rf"{PLACE}: .*message 2 as a continuation"):
        contract_of("command_r_plus").encode(conversation(user("two?"), answer("dos"), tools=TOOLS))


def test_a_template_without_an_end_token_is_refused(contract_of: Contract) -> None:
    with pytest.raises(BadModel, match="would never stop"):
        contract_of("solar").encode(PLAIN["one turn"])


@pytest.mark.parametrize(
    ("family", "printed"), [("llama3_2", "05 Mar 2025"), ("granite3_1", "March 05, 2025")]
)
def test_a_template_that_prints_the_day_prints_the_one_it_is_given(
    tmp_path: Path, family: str, printed: str
) -> None:
    contract = load_contract(write_family(family, tmp_path), date="2025-03-05")
    assert printed in contract.text(contract.encode(PLAIN["one turn"]).ids)
    assert printed in contract.text(contract.prompt_ids(PLAIN["one turn"].turns[:1]))


@pytest.mark.parametrize("family", ORDINARY)
def test_rows_encoded_together_are_those_encoded_alone(
    contract_of: Contract, tmp_path: Path, family: str
) -> None:
    rows = [row for name, _, row in RENDERED if name == family]
    together = list(load_contract(write_family(family, tmp_path)).encode_all(rows[::-1] + rows))
    for row, first, second in zip(rows, together[: len(rows)][::-1], together[len(rows) :], strict=True):
        alone = contract_of(family).encode(row)
        for encoded in (first, second):
            assert isinstance(encoded, Encoded)
            assert list(encoded.ids) == list(alone.ids)
            assert list(encoded.supervised) == list(alone.supervised)
            assert encoded.turn_ends == alone.turn_ends
