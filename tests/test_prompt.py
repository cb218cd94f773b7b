"""The prompt contract: rows become the library's tokens, the mask is exact, fatal cases are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_families import FAMILIES as PUBLISHED
from template_families import write_family
from tiny_model import FAMILIES as TINY

from qadapt.data.conversation import Conversation, Document, Message
from qadapt.data.cutting import cut
from qadapt.data.prompt import CONTRACT_FILE, PromptContract, load_contract, saved_contract
from qadapt.data.rendering.encoding import Encoded, Refused
from qadapt.errors import BadData, BadModel, BadRecipe, BadRun

if TYPE_CHECKING:
    from conftest import TinyModel

ROW = Conversation(
    (Message("user", "two plus two?"), Message("assistant", "it is four\n\nyes 🙂")), "rows.jsonl, line 1"
)
LONG = Conversation(
    tuple(Message(("user", "assistant")[at % 2], f"turn {at} of them") for at in range(6)),
    "rows.jsonl, line 2",
)
CHATML = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of published templates, each on a small tokenizer."""
    return {name: write_family(name, tmp_path_factory.mktemp(name)) for name in PUBLISHED}


def changed_copy(folder: Path, to: Path, **values: Any) -> Path:
    """A copy of a folder's small files with other values in config.json or tokenizer_config.json."""
    to.mkdir()
    for path in [*folder.glob("*.json"), *folder.glob("*.jinja")]:
        shutil.copy(path, to / path.name)
    for name, value in values.items():
        file = to / ("config.json" if name == "vocab_size" else "tokenizer_config.json")
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**content, name: value}), encoding="utf-8")
        if name == "chat_template":
            (to / "chat_template.jinja").unlink()
    return to


def learned(contract: PromptContract, row: Encoded) -> str:
    text = contract.tokenizer.decode(row.ids[row.supervised])
    assert isinstance(text, str)
    return text


def test_rows_have_the_tokens_that_the_library_makes(
    tiny_model: TinyModel, published: dict[str, Path]
) -> None:
    folders = {**{name: tiny_model(name) for name in TINY}, **published}
    compared = 0
    for name, folder in folders.items():
        if name in (
            "solar",
            "command_r_plus",
        ):  # refused: no end token, no generation prompt that is continued
            continue
        contract = load_contract(folder)
        for row in (ROW, LONG):
            reference = contract.tokenizer.apply_chat_template(row.turns, return_dict=True)
            assert list(contract.encode(row).ids) == reference["input_ids"], name
            asked = contract.tokenizer.apply_chat_template(
                row.turns[:1], return_dict=True, add_generation_prompt=True
            )
            assert contract.prompt_ids(row.turns[:1]) == asked["input_ids"], name
            compared += 1
    assert compared >= 2 * 30


@settings(max_examples=15)
@given(
    st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=6),
    st.sampled_from(["answers", "all", "last"]),
)
def test_a_token_is_learned_where_its_characters_are(
    published: dict[str, Path], contents: list[str], learn: str
) -> None:
    """The slow and obvious way: every token's own characters, against the spans."""
    row = Conversation(
        tuple(Message(("user", "assistant")[at % 2], text) for at, text in enumerate(contents)), "row"
    )
    for name in ("llama2", "llama3", "phi3", "gemma2", "qwen3", "mistral_v3"):
        contract = contracts(published, name)
        [encoded] = contract.encode_all([row])
        if isinstance(encoded, Refused):
            continue
        layout = contract._layouts.exact(row)
        offsets = contract.tokenizer(layout.text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [(span.start, span.end) for span in layout.spans]
        expected = [
            any(
                start <= first and (last <= end or (token in contract.end_ids and first < end))
                for start, end in spans
            )
            for (first, last), token in zip(offsets["offset_mapping"], offsets["input_ids"], strict=True)
            if first < last
        ]
        visible = [first < last for first, last in offsets["offset_mapping"]]
        assert encoded.supervised[visible].tolist() == expected, name


_CONTRACTS: dict[str, PromptContract] = {}


def contracts(published: dict[str, Path], name: str) -> PromptContract:
    if name not in _CONTRACTS:
        _CONTRACTS[name] = load_contract(published[name])
    return _CONTRACTS[name]


@pytest.mark.parametrize("family", list(TINY))
def test_the_answer_and_its_end_are_learned_and_nothing_else(tiny_model: TinyModel, family: str) -> None:
    contract = load_contract(tiny_model(family))
    row = contract.encode(ROW)
    assert "it is four\n\nyes 🙂" in learned(contract, row)
    assert "plus" not in learned(contract, row)
    assert int(row.ids[row.supervised][-1]) in contract.end_ids
    first = int(row.supervised.argmax())
    asked = contract.prompt_ids(ROW.turns[:1])
    assert list(row.ids[:first]) == asked, "what is asked in chat is what stood before the answer"
    assert row.turn_ends == (int(np.flatnonzero(row.supervised)[-1]) + 1,)


def test_every_answer_is_learned_or_the_last_or_all_or_those_of_a_role(tiny_model: TinyModel) -> None:
    folder = tiny_model("qwen2")
    answers = load_contract(folder)
    assert learned(answers, answers.encode(LONG)) == (
        "turn 1 of them<|im_end|>turn 3 of them<|im_end|>turn 5 of them<|im_end|>"
    )
    last = load_contract(folder, learn="last")
    assert learned(last, last.encode(LONG)) == "turn 5 of them<|im_end|>"
    asked = load_contract(folder, learn=("user",))
    assert learned(asked, asked.encode(LONG)) == (
        "turn 0 of them<|im_end|>turn 2 of them<|im_end|>turn 4 of them<|im_end|>"
    )
    everything = load_contract(tiny_model("llama"), learn="all")
    row = everything.encode(LONG)
    assert row.supervised.tolist() == [False] + [True] * (len(row) - 1), "all but the first token"


def test_an_answer_of_no_weight_is_context_even_where_all_is_learned(tiny_model: TinyModel) -> None:
    row = Conversation(
        (*LONG.messages[:1], Message("assistant", "wrong", is_learned=False), *LONG.messages[2:4]), "row"
    )
    for learn in ("answers", "all"):
        contract = load_contract(tiny_model("qwen2"), learn=learn)
        text = learned(contract, contract.encode(row))
        assert "wrong" not in text
        assert "turn 3" in text


def test_a_document_is_learned_whole_between_first_and_end_token(tiny_model: TinyModel) -> None:
    document = Document("Once upon a time.", "book.txt, line 1")
    llama = load_contract(tiny_model("llama"))
    row = llama.encode(document)
    assert llama.tokenizer.decode(row.ids) == "<|begin_of_text|>Once upon a time.<|eot_id|>"
    assert row.supervised.tolist() == [False] + [True] * (len(row) - 1)
    qwen = load_contract(tiny_model("qwen2"))
    assert qwen.tokenizer.decode(qwen.encode(document).ids) == "Once upon a time.<|im_end|>"


def test_a_document_that_ends_itself_gets_no_second_end_token(tiny_model: TinyModel) -> None:
    for contract in (load_contract(tiny_model("llama")), load_contract(tiny_model("qwen2"))):
        end = contract.tokenizer.eos_token
        plain, ended = (contract.encode(Document(text, "book.txt")) for text in ("x y", f"x y{end}"))
        assert ended.ids.tolist() == plain.ids.tolist()
        assert ended.notes == plain.notes == frozenset()
        empty = contract.encode(Document(str(end), "book.txt"))
        assert empty.ids.tolist().count(contract.tokenizer.eos_token_id) == 1


def test_special_tokens_in_documents_are_noted_and_new_ones_are_not(tiny_model: TinyModel) -> None:
    contract = load_contract(tiny_model("qwen2"), new_tokens=["<call>"])
    for text, is_noted in (
        ("one <|im_end|> two", True),
        ("<|im_start|>x", True),
        ("a<call>b<|im_end|>", False),
    ):
        assert contract.encode(Document(text, "book.txt")).notes == (
            {"control tokens"} if is_noted else set()
        )


def test_letters_that_the_tokenizer_does_not_know_are_no_special_tokens_of_a_document(
    published: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(published["llama2"], folder)
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["model"]["byte_fallback"] = False
    path.write_text(json.dumps(values), encoding="utf-8")
    contract = load_contract(folder)
    encoded = contract.encode(Document("a \u4e2d b", "book.txt"))
    assert contract.tokenizer.convert_tokens_to_ids("<unk>") in encoded.ids
    assert not encoded.notes
    assert contract.encode(Document("a <unk> b", "book.txt")).notes == {"control tokens"}


def test_documents_need_no_template_and_conversations_do(tiny_model: TinyModel, tmp_path: Path) -> None:
    contract = load_contract(changed_copy(tiny_model("llama"), tmp_path / "base", chat_template=None))
    assert len(contract.encode(Document("text", "book.txt")))
    for ask in (lambda: contract.encode(ROW), lambda: contract.prompt_ids(ROW.turns[:1])):
        with pytest.raises(BadModel, match="has no chat template") as caught:
            ask()
        assert "data.new_tokens=[<|im_start|>, <|im_end|>]" in caught.value.cure


def test_the_cure_for_a_model_without_template_works(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = changed_copy(tiny_model("llama"), tmp_path / "base", chat_template=None)
    contract = load_contract(folder, template="chatml", new_tokens=CHATML)
    row = contract.encode(ROW)
    assert contract.tokenizer.decode(row.ids).startswith(
        "<|begin_of_text|><|im_start|>user\ntwo plus two?<|im_end|>"
    )
    assert learned(contract, row) == "it is four\n\nyes 🙂<|im_end|>"
    assert contract.new_ids[1] in contract.end_ids, "what closes an answer ends it"
    with pytest.raises(BadModel, match="the model would never stop"):
        load_contract(folder, template="chatml").encode(ROW)


def test_a_template_that_ends_no_answer_is_refused(published: dict[str, Path]) -> None:
    contract = load_contract(published["solar"])
    with pytest.raises(BadModel, match="the model would never stop"):
        contract.encode(ROW)


def test_rows_begin_with_one_first_token_whatever_the_tokenizer_adds(tiny_model: TinyModel) -> None:
    for family in ("llama", "mistral", "gemma2"):
        contract = load_contract(tiny_model(family))
        bos = contract.tokenizer.bos_token_id
        assert contract.tokenizer(contract.tokenizer.bos_token)["input_ids"] == [bos, bos], (
            "the usual way to two"
        )
        for row in (ROW, Document("text", "book.txt")):
            assert contract.encode(row).ids.tolist().count(bos) == 1


def test_a_second_first_token_is_refused_wherever_it_comes_from(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    contract = load_contract(tiny_model("mistral"))
    rendered = Conversation((Message("user", " <s>[INST] two?"), Message("assistant", "four")), "row 1")
    for row in (rendered, Document("<s>text", "row 1")):
        with pytest.raises(BadData, match=r"row 1: a text begins with '<s>'.*double BOS"):
            contract.encode(row)
    twice = changed_copy(
        tiny_model("mistral"), tmp_path / "twice", chat_template="{{ bos_token }}" + TINY["mistral"].template
    )
    with pytest.raises(BadData, match="begins with '<s>' twice"):
        load_contract(twice).encode(ROW)


def test_a_token_beyond_the_embedding_table_is_refused_and_spare_rows_are_fine(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model("qwen3")
    contract = load_contract(folder)
    index = contract.tokenizer.convert_tokens_to_ids("<think>")
    assert index < 448, "rows of the table"
    small = load_contract(changed_copy(folder, tmp_path / "small", vocab_size=index))
    thought = Conversation((Message("user", "<think> two?"), Message("assistant", "four")), "row 1")
    assert len(contract.encode(thought))
    with pytest.raises(
        BadData, match=f"row 1: the token '<think>' is number {index}, beyond the model's embedding"
    ):
        small.encode(thought)
    added = load_contract(changed_copy(folder, tmp_path / "new", vocab_size=index + 2), new_tokens=["<new>"])
    assert added.new_ids[0] in added.encode(Document("a <new> one", "book.txt")).ids


def test_padding_with_the_end_token_leaves_the_end_learned(tiny_model: TinyModel) -> None:
    from qadapt.data.batches import collate
    from qadapt.data.tokens import Tokens

    contract = load_contract(tiny_model("smollm2"))
    assert contract.pad_id in contract.end_ids
    rows = [contract.encode(row) for row in (ROW, LONG)]
    batch = collate([Tokens(row.ids, row.supervised, row.place) for row in rows], pad_id=contract.pad_id)
    ends = batch.targets == contract.pad_id
    assert ends.sum(dim=1).tolist() == [1, 3], "each answer's end is learned, and no padding"


def test_new_tokens_are_new(tiny_model: TinyModel) -> None:
    folder = tiny_model("qwen2")
    before = len(load_contract(folder).tokenizer)
    assert load_contract(folder, new_tokens=("<a>", "<b>")).new_ids == (before, before + 1)
    for names, problem in (
        (("<a>", "<|im_end|>"), r"'<\|im_end\|>' is in the model's vocabulary already, as"),
        (("<a>", "<a>"), "'<a>' is given twice"),
        ((" <a>",), "' <a>' begins or ends with white space"),
    ):
        with pytest.raises(BadRecipe, match=f"data.new_tokens: {problem}"):
            load_contract(folder, new_tokens=names)


def test_a_template_may_come_from_a_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for turn in messages %}{{ turn.content }}<|im_end|>{% endfor %}", encoding="utf-8")
    contract = load_contract(tiny_model("qwen2"), template=str(file))
    assert learned(contract, contract.encode(ROW)) == "it is four\n\nyes 🙂<|im_end|>"
    with pytest.raises(BadRecipe, match=r"none.jinja cannot be read"):
        load_contract(tiny_model("qwen2"), template=str(tmp_path / "none.jinja"))
    file.write_text("{% for %}", encoding="utf-8")
    with pytest.raises(BadModel, match="is no Jinja template"):
        load_contract(tiny_model("qwen2"), template=str(file))


def test_of_several_templates_the_library_s_choice_is_taken(tiny_model: TinyModel, tmp_path: Path) -> None:
    tool: dict[str, Any] = {
        "type": "function",
        "function": {"name": "add", "description": "", "parameters": {}},
    }
    plain = TINY["qwen2"].template
    named = [
        {"name": "default", "template": plain},
        {"name": "tool_use", "template": "{{ tools | tojson }}" + plain},
    ]
    contract = load_contract(changed_copy(tiny_model("qwen2"), tmp_path / "named", chat_template=named))
    for row in (ROW, Conversation(ROW.messages, "row", (tool,))):
        tools = list(row.tools) or None
        reference = contract.tokenizer.apply_chat_template(row.turns, tools=tools, return_dict=True)
        assert list(contract.encode(row).ids) == reference["input_ids"]
    only = [{"name": "rag", "template": plain}, {"name": "tool_use", "template": plain}]
    with pytest.raises(BadModel, match=r"several chat templates \(rag, tool_use\) and none for plain rows"):
        load_contract(changed_copy(tiny_model("qwen2"), tmp_path / "only", chat_template=only))


def test_the_day_is_the_recipe_s_and_counts_only_where_it_is_printed(published: dict[str, Path]) -> None:
    dated, other = (load_contract(published["llama3_2"], date=f"2026-01-{day}") for day in (30, 31))
    assert "Today Date: 30 Jan 2026" in dated.tokenizer.decode(dated.encode(ROW).ids)
    assert dated.fingerprint != other.fingerprint
    plain, later = (load_contract(published["qwen2_5"], date=f"2026-01-{day}") for day in (30, 31))
    assert plain.fingerprint == later.fingerprint


def test_the_fingerprint_is_over_everything_that_decides_the_tokens(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model("qwen2")
    ways: list[dict[str, Any]] = [
        {}, {"learn": "last"}, {"learn": ("user", "assistant")}, {"template": "chatml"},
        {"new_tokens": ("<a>",)},
    ]  # fmt: skip
    prints = [load_contract(folder, **way).fingerprint for way in ways]
    other = changed_copy(folder, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    prints.append(load_contract(other).fingerprint)
    assert len(set(prints)) == len(prints)
    assert load_contract(folder).fingerprint == prints[0]


def test_a_saved_contract_is_the_same_and_notices_another_base(tiny_model: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(TINY["llama"].template, encoding="utf-8")
    folder = tiny_model("llama")
    contract = load_contract(folder, learn=("user",), template=str(file), new_tokens=["<a>"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / CONTRACT_FILE).write_text(json.dumps(contract.facts()), encoding="utf-8")
    file.unlink()
    saved = saved_contract(adapter, folder)
    assert saved.fingerprint == contract.fingerprint
    assert saved.encode(ROW).ids.tolist() == contract.encode(ROW).ids.tolist()
    with pytest.raises(
        BadRun, match=r"is not what the adapter was trained on: special_tokens.*tokenizer changed"
    ):
        saved_contract(adapter, tiny_model("qwen2"))
    known = {**contract.facts(), "new_tokens": ["<|eot_id|>"]}
    (adapter / CONTRACT_FILE).write_text(json.dumps(known), encoding="utf-8")
    with pytest.raises(BadRun, match=r"is not what the adapter was trained on: .*vocabulary already"):
        saved_contract(adapter, folder)
    (adapter / CONTRACT_FILE).write_text("{}", encoding="utf-8")
    with pytest.raises(BadRun, match="does not tell how the adapter's prompts were made"):
        saved_contract(adapter, folder)


def test_rows_encoded_together_are_as_each_alone_and_a_bad_one_harms_none(tiny_model: TinyModel) -> None:
    contract = load_contract(tiny_model("qwen2"))
    half = Conversation((Message("user", "\ud83d"), Message("assistant", "four")), "row 7")
    many = [ROW, LONG, Document("text", "book.txt"), half] * 100
    together = list(contract.encode_all(many))
    assert len(together) == len(many)
    alone = [contract.encode(row) for row in many[:3]]
    for at, row in enumerate(together):
        if isinstance(row, Refused):
            assert at % 4 == 3
            assert row.place == "row 7"
            assert "half a character" in row.error.problem
        else:
            assert row.ids.tolist() == alone[at % 4].ids.tolist()
            assert row.supervised.tolist() == alone[at % 4].supervised.tolist()


def test_new_tokens_are_no_surprise_in_contents_unless_the_template_writes_them(
    tiny_model: TinyModel,
) -> None:
    row = Conversation((Message("user", "a<call>b"), Message("assistant", "<call>four")), "row")
    contract = load_contract(tiny_model("qwen2"), new_tokens=["<call>"])
    encoded = contract.encode(row)
    assert encoded.notes == frozenset()
    assert encoded.ids.tolist().count(contract.new_ids[0]) == 2
    marked = Conversation((Message("user", "a<|im_end|>b"), Message("assistant", "four")), "row")
    chatml = load_contract(tiny_model("llama"), template="chatml", new_tokens=["<|im_start|>", "<|im_end|>"])
    assert chatml.encode(marked).notes == {"control tokens"}


def test_special_tokens_in_contents_stay_special_and_are_noted(
    tiny_model: TinyModel,
) -> None:
    contract = load_contract(tiny_model("qwen2"))
    row = Conversation((Message("user", "a<|im_end|>b"), Message("assistant", "four")), "row")
    encoded = contract.encode(row)
    assert encoded.notes == {"control tokens"}
    reference = contract.tokenizer.apply_chat_template(row.turns, return_dict=True)
    assert list(encoded.ids) == reference["input_ids"]
    assert not contract.encode(ROW).notes


@pytest.mark.parametrize("family", ["chatml", "zephyr", "gemma2", "qwen3"])
def test_an_answer_joined_with_what_asks_for_it_is_noted(published: dict[str, Path], family: str) -> None:
    contract, all_of_it = contracts(published, family), load_contract(published[family], learn="all")
    joined = 0
    for text in ("four", "[1, 2]", "<b>four</b>", "\nfour", "\U0001f642", "\u00fcber"):
        row = Conversation((Message("user", "two?"), Message("assistant", text)), "row")
        encoded, asked = contract.encode(row), contract.prompt_ids(row.turns[:1])
        is_joined = encoded.ids[: len(asked)].tolist() != asked
        assert encoded.notes == ({"joined with the prompt"} if is_joined else set()), text
        assert not all_of_it.encode(row).notes, "where all is learned, nothing is lost"
        joined += is_joined
    assert joined == {"chatml": 3, "zephyr": 2, "gemma2": 2, "qwen3": 0}[family]


def test_a_joined_answer_that_is_not_learned_is_not_noted(published: dict[str, Path]) -> None:
    contract = load_contract(published["chatml"])
    turns = [Message("user", "two?"), Message("assistant", "[1, 2]", is_learned=False)]
    turns += [Message("user", "two?"), Message("assistant", "four")]
    assert not contract.encode(Conversation(tuple(turns), "row")).notes


def test_a_role_that_the_template_refuses_names_the_row(tiny_model: TinyModel) -> None:
    contract = load_contract(tiny_model("gemma2"))
    with pytest.raises(BadData, match="line 1: the model's chat template refuses"):
        contract.encode(Conversation((Message("system", "be short"), *ROW.messages), ROW.place))
    with pytest.raises(BadData, match="the prompt: the model's chat template refuses"):
        contract.prompt_ids([{"role": "system", "content": "be short"}])


def test_a_long_row_loses_whole_turns_then_a_part_of_the_first_then_all(tiny_model: TinyModel) -> None:
    contract = load_contract(tiny_model("qwen2"))
    row = contract.encode(LONG)
    assert cut(row, len(row)).how == "whole"
    short = cut(row, row.turn_ends[1] + 3)
    assert short.how == "turns"
    assert len(short.rows[0]) == row.turn_ends[1], "after the end token of the second answer"
    inside = cut(row, row.turn_ends[0] - 1)
    assert inside.how == "inside"
    assert inside.rows[0].supervised_count
    nothing = cut(row, int(row.supervised.argmax()))
    assert (nothing.rows, nothing.how, nothing.why) == ((), "nothing", "truncated")


def test_a_row_with_nothing_to_learn_says_why(tiny_model: TinyModel) -> None:
    contract = load_contract(tiny_model("qwen2"))
    user = Message("user", "two?")
    empty = Conversation((user, Message("assistant", " ")), "row")
    unweighed = Conversation((user, Message("assistant", "four", is_learned=False)), "row")
    assert cut(contract.encode(empty), 100).why == "empty answers"
    assert cut(contract.encode(unweighed), 100).why == "no learned turn"
    assert cut(contract.encode(Conversation((user,), "row")), 100).why == "no learned turn"


@given(st.integers(1, 60), st.integers(2, 20))
def test_a_document_is_cut_into_pieces_and_nothing_is_lost(count: int, length: int) -> None:
    ids = np.arange(count, dtype=np.int32)
    whole = Encoded(ids, np.ones(count, np.bool_), "book.txt", is_document=True)
    parts = cut(whole, length)
    if count < 2:
        assert parts.how == "nothing"
        return
    assert np.concatenate([part.ids for part in parts.rows]).tolist() == ids.tolist()
    assert all(2 <= len(part) <= length for part in parts.rows[:-1])
    assert 1 + (length > 2) <= len(parts.rows[-1]) <= length, "of pieces of two none can give a token"
    assert parts.how == ("whole" if count <= length else "pieces")


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6), st.integers(2, 40))
def test_a_cut_row_is_a_start_of_the_whole_one_that_learns(turns: list[tuple[int, int]], length: int) -> None:
    supervised = [flag for context, answer in turns for flag in [False] * context + [True] * answer]
    ends = tuple(np.cumsum([context + answer for context, answer in turns]).tolist())
    whole = Encoded(np.arange(len(supervised), dtype=np.int32), np.array(supervised), "row", turn_ends=ends)
    result = cut(whole, length)
    for row in result.rows:
        assert len(row) <= length
        assert row.supervised_count
        assert row.ids.tolist() == whole.ids[: len(row)].tolist()
        assert result.how != "turns" or len(row) in ends
        later = [end for end in ends if len(row) < end <= length]
        assert not later or result.how == "whole", "no turn that fits is left out"
    assert result.rows or not any(supervised[1:length])
