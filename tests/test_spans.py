"""Which characters are whose: shown by marks, equal on the short and the exact way, refused where unsure."""

from __future__ import annotations

import re
from datetime import date
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from template_families import FAMILIES as PUBLISHED
from tiny_model import FAMILIES as TINY

from qadapt.data.conversation import Conversation, Message
from qadapt.data.rendering.layouts import Layouts, Learn, wanted_turns
from qadapt.data.rendering.spans import Layout, find_layout
from qadapt.data.rendering.template import CHATML, ChatTemplate
from qadapt.errors import BadData

DAY = date(2026, 1, 31)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ENDS = ("</s>", "<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>",
        "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>")  # fmt: skip
PLAIN = """{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}</s>{% endfor %}\
{% if add_generation_prompt %}[assistant]{% endif %}"""
TRIMMING = PLAIN.replace("turn.content", "turn.content | trim")
# as Qwen3 does: thoughts are written only into the last answer, and always there
THINKING = """{% for turn in messages %}[{{ turn.role }}]
{% if turn.role == 'assistant' %}
{% set content = turn.content.split('</think>')[-1].lstrip('\n') %}
{% set thought = turn.reasoning_content or '' %}
{% if '</think>' in turn.content %}
{% set thought = turn.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{% endif %}
{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{ content }}{% else %}{{ turn.content }}{% endif %}</s>
{% endfor %}
{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"""
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": "</s>"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
CALLING = """{% if tools %}[tools]{{ tools | tojson }}</s>{% endif %}\
{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}\
{% for call in turn.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}</s>\
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""


def template_of(text: str) -> ChatTemplate:
    return ChatTemplate({"default": text}, variables=TOKENS, day=DAY)


def row_of(*messages: Message | tuple[str, str], tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    return Conversation(
        tuple(each if isinstance(each, Message) else Message(*each) for each in messages), "row 1", tools
    )


def exact(row: Conversation, template: ChatTemplate, learn: Learn = "answers") -> Layout:
    return find_layout(row, template, wanted=wanted_turns(row.messages, learn), ends=ENDS)[0]


def shown(layout: Layout) -> str:
    """The text with its spans in brackets."""
    text = layout.text
    for span in sorted(layout.spans, key=lambda span: span.start, reverse=True):
        text = f"{text[: span.start]}⟦{text[span.start : span.end]}⟧{text[span.end :]}"
    return text


def learned(text: str, row: Conversation, learn: Learn = "answers") -> str:
    """As shown on the exact way, which the short one must equal."""
    template = template_of(text)
    layout = exact(row, template, learn)
    short = Layouts(template, learn=learn, ends=ENDS, control=("</s>", "<s>")).of(row)
    assert (short.text, short.spans) == (layout.text, layout.spans)
    return shown(layout)


def test_a_template_that_keeps_contents_as_they_are() -> None:
    row = row_of(("user", " two?\n"), ("assistant", "\n four "), ("user", "three?"), ("assistant", "nine"))
    assert (
        learned(PLAIN, row)
        == "[user] two?\n</s>[assistant]⟦\n four </s>⟧[user]three?</s>[assistant]⟦nine</s>⟧"
    )


def test_a_template_that_trims() -> None:
    row = row_of(("user", " two?\n"), ("assistant", "\n four "), ("user", "three?"), ("assistant", "nine"))
    assert (
        learned(TRIMMING, row) == "[user]two?</s>[assistant]⟦four</s>⟧[user]three?</s>[assistant]⟦nine</s>⟧"
    )


def test_a_thought_written_into_the_content_is_learned_where_it_is_printed() -> None:
    row = row_of(
        ("user", "two?"),
        ("assistant", "<think>\nhm, two\n</think>\n\nfour"),
        ("user", "three?"),
        ("assistant", "<think>\nhm, three\n</think>\n\nnine"),
    )
    assert learned(THINKING, row) == (
        "[user]\ntwo?</s>\n[assistant]\n⟦four</s>⟧\n[user]\nthree?</s>\n[assistant]\n"
        "⟦<think>\nhm, three\n</think>\n\nnine</s>⟧\n"
    )
    assert exact(row, template_of(THINKING)).notes == {"reasoning left out"}


def test_a_thought_that_stands_apart_is_learned_and_so_is_a_heading_the_template_writes_itself() -> None:
    apart = row_of(("user", "two?"), Message("assistant", "four", reasoning="hm"))
    assert learned(THINKING, apart) == "[user]\ntwo?</s>\n[assistant]\n⟦<think>\nhm\n</think>\n\nfour</s>⟧\n"
    without = row_of(("user", "two?"), ("assistant", "four"))
    assert learned(THINKING, without) == "[user]\ntwo?</s>\n[assistant]\n⟦<think>\n\n</think>\n\nfour</s>⟧\n"


def test_the_end_of_the_whole_row_is_not_part_of_its_last_answer() -> None:
    text = PLAIN + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    assert learned(text, row_of(("user", "two?"), ("assistant", "four"))) == (
        "[user]two?</s>[assistant]⟦four</s>⟧<|endoftext|>"
    )


def test_a_template_without_generation_prompt_learns_the_heading_it_has_to_write() -> None:
    text = "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}</s>{% endfor %}"
    assert (
        learned(text, row_of(("user", "two?"), ("assistant", "four")))
        == "[user]two?</s>⟦[assistant]four</s>⟧"
    )


def test_calls_are_learned_and_what_tools_say_is_context() -> None:
    row = row_of(
        ("user", "two?"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "four", tool_call_id="abcdefghi"),
        ("assistant", "four"),
        tools=(TOOL,),
    )
    assert learned(CALLING, row) == (
        '[tools][{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]'
        "</s>"
        '[user]two?</s>[assistant]⟦<call>{"name": "add", "arguments": {"a": "</s>"}}</call></s>⟧'
        "[tool]four</s>[assistant]⟦four</s>⟧"
    )


def test_the_rules_choose_turns() -> None:
    row = row_of(
        ("system", "be brief"),
        ("user", "two?"),
        ("assistant", "four"),
        ("user", "three?"),
        ("assistant", "nine"),
    )
    last = "[system]be brief</s>[user]two?</s>[assistant]four</s>[user]three?</s>[assistant]⟦nine</s>⟧"
    assert learned(PLAIN, row, "last") == last
    assert learned(PLAIN, row, ("system", "user")) == (
        "[system]⟦be brief</s>⟧[user]⟦two?</s>⟧[assistant]four</s>[user]⟦three?</s>⟧[assistant]nine</s>"
    )
    weighed = row_of(
        ("user", "a"), Message("assistant", "b", is_learned=False), ("user", "c"), ("assistant", "d")
    )
    assert learned(PLAIN, weighed) == "[user]a</s>[assistant]b</s>[user]c</s>[assistant]⟦d</s>⟧"
    silent = row_of(("user", "a"), ("assistant", " \n"), ("user", "c"), ("assistant", "d"))
    assert learned(PLAIN, silent) == "[user]a</s>[assistant] \n</s>[user]c</s>[assistant]⟦d</s>⟧"


def test_an_answer_that_nothing_was_asked_for_is_learned_from_its_own_text_on() -> None:
    row = row_of(("assistant", " hello"), ("user", "two?"), ("assistant", "four"))
    assert learned(PLAIN, row) == "[assistant] ⟦hello</s>⟧[user]two?</s>[assistant]⟦four</s>⟧"


def test_a_generation_prompt_that_opens_a_thought_is_told() -> None:
    text = PLAIN.replace("[assistant]{% endif %}", "[assistant]<think>{% endif %}")
    row = row_of(("user", "two?"), ("assistant", "four"))
    assert learned(text, row) == "[user]two?</s>[assistant]⟦four</s>⟧"
    assert exact(row, template_of(text)).notes == {"asked otherwise"}


def test_contents_with_private_characters_and_special_tokens_stay_as_they_are() -> None:
    row = row_of(("user", "\U000f0000\U00100000"), ("assistant", "</s>yes</s>"))
    layout = Layouts(template_of(TRIMMING), learn="answers", ends=ENDS, control=("</s>",)).of(row)
    assert layout.notes == {"control tokens"}
    with pytest.raises(BadData, match="uses up all private characters"):
        exact(
            row_of(("user", "\U000f0000\U00100000"), ("assistant", "\ue000"), ("user", "\uf8ff")),
            template_of(PLAIN),
        )


ROW = row_of(
    ("system", "be brief"), ("user", "two?"), ("assistant", "four"), ("user", "b?"), ("assistant", "c")
)
BAD_TEMPLATES = [
    ("{% for turn in messages | reverse %}[{{ turn.role }}]{{ turn.content }}</s>{% endfor %}",
     "changes the order of the messages"),
    ("{% for turn in messages if turn.role != 'system' %}[{{ turn.role }}]{{ turn.content }}</s>{% endfor %}",
     "does not print the system prompt"),
    ("{% for turn in messages %}{% if loop.index != 2 %}[{{ turn.role }}]{{ turn.content }}</s>{% endif %}"
     "{% endfor %}", r"content of message 2 \(user\)"),
    (PLAIN + "{{ messages[1].content }}", "prints a message twice"),
    ("{% for turn in messages if turn.role != 'system' %}"
     "{% if loop.index0 == (messages | length - 2) // 2 * 2 %}{{ messages[0].content }}{% endif %}"
     "[{{ turn.role }}]{{ turn.content }}</s>{% endfor %}{{ '[assistant]' if add_generation_prompt }}",
     "moves message 1 across the turn in message 3"),
    ("{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}\n{% endfor %}", "no end token closes"),
    ("{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}"
     "{% if turn.role != 'assistant' or loop.last %}</s>{% endif %}{% endfor %}",
     "no end token closes the answer in message 3"),
    ("{% for turn in messages %}[{{ turn.content | length }}]{{ turn.content }}</s>{% endfor %}",
     "writes the row differently when its contents are marked"),
    ("{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}</s>{% endfor %}"
     "{% if add_generation_prompt %}\n[other]{% endif %}", "as a continuation"),
    ("{{ raise_exception('never') }}", "refuses the conversation: never"),
    ("{{ messages[0].content + 1 }}", "refuses the conversation: TypeError"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "problem"), BAD_TEMPLATES)
def test_what_cannot_be_shown_is_refused_by_its_cause(text: str, problem: str) -> None:
    with pytest.raises(BadData, match=f"^row 1: .*{problem}"):
        exact(ROW, template_of(text))
    with pytest.raises(BadData, match=f"^row 1: .*{problem}"):
        Layouts(template_of(text), learn="answers", ends=ENDS, control=()).of(ROW)


def test_what_a_template_does_with_some_contents_only_is_seen_on_the_short_way() -> None:
    text = PLAIN + "{% if messages[0].content | length > 20 %}{{ messages[0].content }}{% endif %}"
    ways = Layouts(template_of(text), learn="answers", ends=ENDS, control=())
    assert (
        shown(ways.of(row_of(("user", "two?"), ("assistant", "four"))))
        == "[user]two?</s>[assistant]⟦four</s>⟧"
    )
    with pytest.raises(BadData, match="prints a message twice"):
        ways.of(row_of(("user", "two? " * 20), ("assistant", "four")))


def test_reasoning_is_found_under_its_older_name_too() -> None:
    text = PLAIN.replace("{{ turn.content }}", "{{ (turn.thinking or '') + turn.content }}")
    row = row_of(("user", "two?"), Message("assistant", "four", reasoning="hm "))
    assert learned(text, row) == "[user]two?</s>[assistant]⟦hm four</s>⟧"


def test_what_only_earlier_answers_suffer_from_does_not_refuse_the_last_one() -> None:
    for text, _ in (BAD_TEMPLATES[4], BAD_TEMPLATES[6]):
        assert shown(exact(ROW, template_of(text), "last")).endswith("c</s>⟧")


def test_calls_that_a_template_does_not_print_are_refused() -> None:
    row = row_of(("user", "two?"), Message("assistant", "", tool_calls=(CALL,)))
    with pytest.raises(BadData, match="does not print the tool calls of message 2"):
        exact(row, template_of(PLAIN))
    both = row_of(("user", "two?"), Message("assistant", "well", tool_calls=(CALL,)), tools=(TOOL,))
    text = CALLING.replace("{{ turn.content }}", "{{ '' if turn.tool_calls else turn.content }}")
    assert exact(both, template_of(text)).notes == {"content left out"}
    unread = template_of(text.replace("{{ tools | tojson }}", "").replace("if tools", "if false"))
    assert exact(both, unread).notes == {"content left out", "tools left out"}


TEXTS = {
    **{f"tiny {name}": family.template for name, family in TINY.items()},
    **{name: family.text for name, family in PUBLISHED.items()},
    "chatml, built in": CHATML,
    "thinking": THINKING,
    "calling": CALLING,
}
PLAIN_WORDS = st.sampled_from(
    ["yes", "two plus two?", " four", "nine\n", "\n\n ok \n", "user", "é🙂", "x" * 40]
)
WILD_WORDS = st.sampled_from([
    "", "\t", "None", "<think>\nhm\n</think>\n\nso", "</think>", "<think>", "[INST]", "</s>", "<|im_end|>",
    "\U000f0000", "a {{ b }}", "<tool_response>x", "### User:",
])  # fmt: skip
TAME = st.lists(PLAIN_WORDS, min_size=1, max_size=3).map("".join)
CONTENTS = st.integers(0, 9).flatmap(
    lambda draw: (
        st.lists(PLAIN_WORDS | WILD_WORDS, min_size=1, max_size=3).map("".join) if draw == 9 else TAME
    )
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    roles = draw(st.sampled_from([("user", "assistant")] * 9 + [("user", "user", "assistant")]))
    messages = [Message("system", draw(CONTENTS))] if draw(st.integers(0, 3)) == 3 else []
    for number in range(draw(st.integers(1, 5))):
        role = roles[number % len(roles)]
        thought = draw(TAME) if role == "assistant" and draw(st.integers(0, 3)) == 3 else None
        is_learned = role != "assistant" or draw(st.integers(0, 5)) < 5
        messages.append(Message(role, draw(CONTENTS), reasoning=thought, is_learned=is_learned))
    return Conversation(tuple(messages), "row 1")


COMPILED = {name: template_of(text) for name, text in TEXTS.items()}
LEARN = st.sampled_from(["answers", "last", "all", ("user",), ("assistant", "system")])


def found(ways: Layouts, row: Conversation, *, is_exact: bool) -> tuple[object, ...]:
    try:
        layout = ways.exact(row) if is_exact else ways.of(row)
    except BadData as error:
        return (error.problem,)
    return layout.text, layout.spans, layout.notes


@pytest.mark.parametrize("name", TEXTS)
def test_the_short_way_finds_what_the_exact_one_finds(name: str) -> None:
    ways: dict[Learn, Layouts] = {}
    template = COMPILED[name]

    @settings(max_examples=70)
    @given(conversations(), LEARN)
    def check(row: Conversation, learn: Learn) -> None:
        way = ways.setdefault(
            learn, Layouts(template, learn=learn, ends=ENDS, control=("</s>", "<|im_end|>"))
        )
        assert found(way, row, is_exact=False) == found(way, row, is_exact=True)

    check()


@given(
    st.lists(st.from_regex(r"[a-z]{3,8}( [a-z]{3,8})?", fullmatch=True), min_size=2, max_size=8, unique=True)
)
def test_a_span_holds_its_own_answer_and_nothing_of_other_turns(words: list[str]) -> None:
    assume(not any(one in other for one in words for other in words if one is not other))
    messages = [Message(("user", "assistant")[at % 2], f"«{word}»") for at, word in enumerate(words)]
    row = Conversation(tuple(messages), "row 1")
    for template in COMPILED.values():
        try:
            layout = exact(row, template)
        except BadData:
            continue
        answers = [message.content for message in messages if message.role == "assistant"]
        pieces = [layout.text[span.start : span.end] for span in layout.spans]
        assert [re.findall("«.*?»", piece) for piece in pieces] == [[answer] for answer in answers]
        assert all(piece.endswith(ENDS) for piece in pieces)
