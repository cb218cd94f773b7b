"""A conversation: what the model is sent, what it answers, what the screen shows, how one leaves."""

from __future__ import annotations

import io
import json
import random
import re
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from rich.console import Console
from template_families import write_family
from test_train import adapted
from tiny_model import FAMILIES

from qadapt.adapters.facts import AdapterFacts
from qadapt.adapters.lora import save_adapter, without_adapter
from qadapt.cli.chat_session import Session, fit, notes_of, print_answers
from qadapt.cli.main import run as run_command
from qadapt.data.prompt import CONTRACT_FILE, PromptContract, load_contract
from qadapt.errors import BadData, DoesNotFit
from qadapt.model.folder import checked_folder
from qadapt.model.generate import generate, stream
from qadapt.serve import chat as chat_module
from qadapt.serve.chat import Chat, Manner, Reply
from qadapt.serve.stream import TextStream

if TYPE_CHECKING:
    from conftest import TinyModel
    from peft import PeftModel

QUESTIONS = ("say 3", "Two loaves for Ada, please.", "And a cake?")
SHORT = Manner(longest=8)


def talk(chat: Chat, *questions: str) -> list[str]:
    return ["".join(chat.ask(question)) for question in questions]


def answered(model: PeftModel, contract: PromptContract, turns: Sequence[dict[str, str]]) -> str:
    """The naive reference: the whole conversation as the contract writes it, answered at once."""
    ids = contract.prompt_ids(turns)
    ends, pad_id = contract.end_ids, contract.pad_id
    [answer] = generate(model, [ids], max_new_tokens=SHORT.longest, end_ids=ends, pad_id=pad_id)
    return contract.text(answer)


def naive(
    model: PeftModel, contract: PromptContract, questions: Sequence[str], system: str | None = None
) -> list[str]:
    turns = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for question in questions:
        turns.append({"role": "user", "content": question})
        answers.append(answered(model, contract, turns))
        turns.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens that the model is sent, question by question."""
    ids: list[list[int]] = []

    def watched(model: Any, prompt: Sequence[int], **how: Any) -> Generator[int, None, None]:
        ids.append(list(prompt))
        return stream(model, prompt, **how)

    monkeypatch.setattr(chat_module, "stream", watched)
    return ids


# --- the conversation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_sent_the_contracts_tokens_of_the_whole_conversation(
    tiny_model: TinyModel, sent: list[list[int]], family: str
) -> None:
    folder = tiny_model(family)
    model, contract = adapted(folder), load_contract(folder)
    answers = talk(Chat(model, contract, SHORT), *QUESTIONS)
    turns: list[dict[str, str]] = []
    for question, answer, ids in zip(QUESTIONS, answers, sent, strict=True):
        turns.append({"role": "user", "content": question})
        assert ids == contract.prompt_ids(turns)
        turns.append({"role": "assistant", "content": answer})
    assert answers == naive(model, contract, QUESTIONS)


def test_only_what_is_new_of_a_conversation_is_read(tiny_model: TinyModel, sent: list[list[int]]) -> None:
    folder = tiny_model("llama")
    model, read = adapted(folder), list[int]()
    model.register_forward_pre_hook(
        lambda _module, _args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    chat, before = Chat(model, load_contract(folder), SHORT), 0
    for question in QUESTIONS:
        read.clear()
        talk(chat, question)
        assert read[0] <= len(sent[-1]) - before + 2, "where texts meet, tokens may become others"
        before = len(sent[-1])
    assert sum(read) < len(sent[-1])
    chat.uses_adapter = False
    read.clear()
    talk(chat, "say 4")
    assert read[0] == len(sent[-1]), "another model has read nothing of it"


def test_a_system_prompt_stands_first_until_it_is_taken_away(
    tiny_model: TinyModel, sent: list[list[int]]
) -> None:
    folder = tiny_model("qwen2")
    model, contract = adapted(folder), load_contract(folder)
    chat = Chat(model, contract, SHORT, system="Be brief.")
    assert talk(chat, *QUESTIONS[:2]) == naive(model, contract, QUESTIONS[:2], system="Be brief.")
    chat.tell(None)
    talk(chat, QUESTIONS[2])
    assert sent[2] == contract.prompt_ids([*chat.turns[:4], {"role": "user", "content": QUESTIONS[2]}])
    chat.begin_anew()
    talk(chat, "say 3")
    assert sent[3] == contract.prompt_ids([{"role": "user", "content": "say 3"}])


def test_a_system_prompt_that_the_template_refuses_is_said_and_the_old_one_stays(
    tiny_model: TinyModel,
) -> None:
    folder = tiny_model("gemma2")
    model, contract = adapted(folder), load_contract(folder)
    chat = Chat(model, contract, SHORT)
    with pytest.raises(BadData, match="System role not supported"):
        chat.tell("Be brief.")
    assert talk(chat, "say 3") == naive(model, contract, ["say 3"])


def test_a_system_prompt_that_the_template_would_drop_is_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    file = tmp_path / "drops.jinja"
    file.write_text(
        "{% for turn in messages if turn.role != 'system' %}{{ turn.content }}<|im_end|>{% endfor %}",
        encoding="utf-8",
    )
    folder = tiny_model("qwen2")
    model = adapted(folder)
    with pytest.raises(BadData, match="leaves a system prompt out"):
        Chat(model, load_contract(folder, template=str(file)), SHORT, system="Be brief.")
    Chat(model, load_contract(folder), SHORT, system="DEFAULT")  # what the template would say by itself


def test_the_base_answers_where_the_adapter_is_off_and_the_adapter_is_on_again_after(
    tiny_model: TinyModel,
) -> None:
    folder = tiny_model("llama")
    model, contract = adapted(folder), load_contract(folder)
    chats = [Chat(model, contract, SHORT, uses_adapter=is_on) for is_on in (True, False)]
    both = [[talk(chat, question)[0] for chat in chats] for question in QUESTIONS]
    tuned, base = map(list, zip(*both, strict=True))
    assert tuned == naive(model, contract, QUESTIONS), "side by side is each alone"
    with without_adapter(model):
        assert base == naive(model, contract, QUESTIONS)
    assert base != tuned, "a control: the adapter does something"


def test_an_adapter_is_switched_off_within_a_conversation(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    model, contract = adapted(folder), load_contract(folder)
    chat = Chat(model, contract, SHORT)
    [first] = talk(chat, "say 3")
    chat.uses_adapter = False
    turns = [{"role": "user", "content": "say 3"}, {"role": "assistant", "content": first}]
    with without_adapter(model):
        expected = answered(model, contract, [*turns, {"role": "user", "content": "say 4"}])
    assert talk(chat, "say 4") == [expected]


def test_a_reply_says_how_it_ended(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    model, contract = adapted(folder), load_contract(folder)
    chat = Chat(model, contract, SHORT)
    ids = contract.prompt_ids([{"role": "user", "content": "say 3"}])
    tokens = list(stream(model, ids, max_new_tokens=8, end_ids=contract.end_ids))
    text = contract.text(tokens)
    talk(chat, "say 3")
    assert chat.reply == Reply("say 3", text, len(ids), 8, "longest", 0)
    contract.end_ids = frozenset({tokens[5]})
    written = tokens[: tokens.index(tokens[5])]
    chat = Chat(model, contract, SHORT)
    assert talk(chat, "say 3") == [contract.text(written)]
    assert chat.reply == Reply("say 3", contract.text(written), len(ids), len(written), "end", 0)
    assert notes_of(chat) == []


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_went(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    model, contract = adapted(folder), load_contract(folder)
    chat = Chat(model, contract, SHORT, uses_adapter=False)
    answer = chat.ask("say 3")
    pieces = [next(answer) for _ in range(3)]
    answer.close()
    assert chat.reply is not None
    assert (chat.reply.ending, chat.reply.tokens) == ("stopped", 3)
    assert chat.reply.answer.startswith("".join(pieces))
    assert [turn["content"] for turn in chat.turns] == ["say 3", chat.reply.answer]
    chat.uses_adapter = True
    chat.begin_anew()
    assert talk(chat, "say 3") == naive(model, contract, ["say 3"]), "the adapter is on again"


def test_the_oldest_turns_of_a_long_conversation_are_left_out_and_said_so(
    tiny_model: TinyModel, sent: list[list[int]]
) -> None:
    folder = tiny_model("mistral", context=80)
    model, contract = adapted(folder), load_contract(folder)
    chat, seen = Chat(model, contract, SHORT), []
    for number in range(8):
        talk(chat, f"say {number}")
        assert len(sent[-1]) + SHORT.longest <= 80
        kept = [*chat.turns[chat.left_out : -1]]
        assert sent[-1] == contract.prompt_ids(kept), "the rest as it was, a question first"
        if chat.left_out > (seen[-1] if seen else 0):
            assert f"the oldest {chat.left_out} turns are left out" in notes_of(chat, seen[-1])[-1]
        seen.append(chat.left_out)
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] >= 4
    assert len(chat.turns) == 16


def test_an_answer_ends_where_the_context_is_full_and_a_question_beyond_it_is_refused(
    tiny_model: TinyModel,
) -> None:
    folder = tiny_model("mistral", context=80)
    model, contract = adapted(folder), load_contract(folder)
    chat = Chat(model, contract, Manner(longest=60))

    def length(question: str) -> int:
        return len(contract.prompt_ids([{"role": "user", "content": question}]))

    question = next("x " * count for count in range(80) if length("x " * count) >= 75)
    talk(chat, "say 3", question)
    assert chat.reply is not None
    assert chat.reply.ending == "context"
    assert chat.reply.prompt_tokens + chat.reply.tokens == 80
    assert "context of 80 tokens is full" in notes_of(chat)[0]
    before = chat.turns
    with pytest.raises(BadData, match=r"comes to \d+ tokens; this model reads 80 at most"):
        talk(chat, "x " * 200)
    assert chat.turns == before


def test_no_memory_for_an_answer_leaves_the_conversation_as_it_was(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    model, contract = adapted(folder), load_contract(folder)
    chat = Chat(model, contract, SHORT, uses_adapter=False)
    talk(chat, "say 3")
    before = chat.turns

    def run_out(*_: Any, **__: Any) -> Generator[int, None, None]:
        yield 7
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as context:
        context.setattr(chat_module, "stream", run_out)
        with pytest.raises(DoesNotFit, match="Memory ran out on cpu while answering") as error:
            talk(chat, "say 4")
    assert "/new" in error.value.cure
    assert chat.turns == before
    with without_adapter(model):
        assert talk(chat, "say 4") == naive(model, contract, ["say 3", "say 4"])[1:]


def test_drawn_answers_come_again_with_their_seed(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    model, contract = adapted(folder), load_contract(folder)

    def drawn(seed: int | None) -> list[str]:
        manner = Manner(longest=8, temperature=1.2, top_p=0.95, seed=seed)
        return talk(Chat(model, contract, manner), *QUESTIONS)

    assert drawn(5) == drawn(5)
    assert len({tuple(drawn(seed)) for seed in (5, 6, None, None)}) == 4


def test_a_model_without_a_chat_template_goes_on_with_each_text(
    tiny_model: TinyModel, sent: list[list[int]]
) -> None:
    folder = tiny_model("llama")
    contract = load_contract(folder)
    contract.template = None
    chat = Chat(adapted(folder), contract, SHORT)
    talk(chat, "Two loaves", "for Ada")
    assert sent == [contract.text_ids("Two loaves"), contract.text_ids("for Ada")]
    assert contract.tokenizer.decode(sent[0]) == "<|begin_of_text|>Two loaves"
    with pytest.raises(BadData, match="takes no system prompt"):
        chat.tell("Be brief.")


def test_a_question_that_is_no_text_is_refused(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    with pytest.raises(BadData, match="no UTF-8 text"):
        talk(Chat(adapted(folder), load_contract(folder), SHORT), "say \udce9")


@pytest.fixture(scope="module")
def contract(tiny_model: TinyModel) -> PromptContract:
    return load_contract(tiny_model("llama"))


@pytest.fixture(scope="module", params=["byte-level", "llama2", "gemma2"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PromptContract:
    """Bytes in every token; bytes as tokens of their own, with and without a blank that is taken off."""
    if request.param == "byte-level":
        return request.getfixturevalue("contract")
    return load_contract(write_family(request.param, tmp_path_factory.mktemp("decoder") / request.param))


def pieces_by_the_whole(contract: PromptContract, ids: Sequence[int]) -> list[str]:
    """The naive reference: all of the text decoded again for every token."""
    pieces, given = [], 0
    for count in range(1, len(ids) + 2):
        text = contract.text(ids[:count])
        is_waiting = count <= len(ids) and text.endswith("\ufffd")
        pieces.append("" if is_waiting else text[given:])
        given = given if is_waiting else len(text)
    return pieces


def drawn_tokens(contract: PromptContract, seed: int, count: int) -> list[int]:
    """Words, single bytes and special tokens in turns of several each, more broken than any model's."""
    draw, size = random.Random(seed), len(contract.tokenizer)
    ids: list[int] = []
    while len(ids) < count:
        first = draw.randrange(size)
        near = range(first, min(first + draw.choice((1, 40, 256)), size))
        ids += draw.choices(near, k=draw.randint(1, 24))
    return ids[:count]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=some.integers(0, 2**32), count=some.integers(0, 200))
def test_pieces_of_any_tokens_are_those_of_decoding_everything_again(
    decoder: PromptContract, seed: int, count: int
) -> None:
    ids = drawn_tokens(decoder, seed, count)
    text = TextStream(decoder)
    assert [*map(text.add, ids), text.finish()] == pieces_by_the_whole(decoder, ids)
    assert text.text == decoder.text(ids)


def test_text_of_any_bytes_comes_whole(decoder: PromptContract) -> None:
    written = "naïve ☃ 🙂 , it 's\n\n  two 17 {x} 日本語 " * 12
    ids = decoder.tokenizer.encode(written, add_special_tokens=False)
    text = TextStream(decoder)
    assert "".join([*map(text.add, ids), text.finish()]) == decoder.text(ids)


def test_an_answer_twice_as_long_is_twice_the_work(decoder: PromptContract) -> None:
    lines = decoder.tokenizer.encode("Two loaves for Ada, please, and 3 cakes.\n" * 80)
    decoded: list[int] = []

    class Counting:
        tokenizer = decoder.tokenizer

        def text(self, ids: Sequence[int]) -> str:
            decoded.append(len(ids))
            return decoder.text(ids)

    text = TextStream(cast(PromptContract, Counting()))
    for token in lines[:1200]:
        text.add(token)
    assert len(lines) >= 1200
    assert sum(decoded) < 120 * 1200, "a control: all of it each time is 600 for each"


def test_a_character_of_several_tokens_comes_whole(contract: PromptContract) -> None:
    ids = contract.tokenizer.backend_tokenizer.encode("a€b", add_special_tokens=False).ids
    text = TextStream(contract)
    pieces = [text.add(token) for token in ids]
    assert len(ids) == 5, "a control: three bytes are three tokens"
    assert pieces == ["a", "", "", "€", "b"]


# --- on the screen ----------------------------------------------------------------------------------------


class Scripted:
    """A chat whose answers are given: pieces, and functions that are called between them."""

    def __init__(self, *answers: Sequence[str | Callable[[], object]], uses_adapter: bool = True) -> None:
        self.uses_adapter, self.left_out, self.context = uses_adapter, 0, 80
        self.answers, self.turns = list(answers), []
        self.reply: Reply | None = None
        self.told: list[str | None] = []

    def ask(self, question: str) -> Generator[str, None, None]:
        written, ending = [], "stopped"
        try:
            for piece in self.answers.pop(0):
                if callable(piece):
                    piece()
                else:
                    written.append(piece)
                    yield piece
            ending = "end"
        finally:
            self.turns = [*self.turns, question, "".join(written)]
            self.reply = Reply(question, "".join(written), 1, len(written), ending, self.left_out)  # type: ignore[arg-type]

    def take_back(self) -> None:
        del self.turns[-2:]

    def begin_anew(self) -> None:
        self.turns = []

    def tell(self, system: str | None) -> None:
        if system == "refused":
            raise BadData("The template refuses it.", cure="Leave it out.")
        self.told.append(system)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def screen(width: int = 100, *, is_terminal: bool = True) -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    return Console(
        file=file, width=width, height=30, force_terminal=is_terminal, highlight=False, no_color=True
    )


def shown(console: Console) -> str:
    file: Any = console.file
    file.flush()
    text: str = file.buffer.getvalue().decode()
    return text


def at_keyboard(*lines: str | type[BaseException]) -> Callable[[str], str]:
    waiting = list(lines)

    def read(_: str) -> str:
        line = waiting.pop(0) if waiting else EOFError
        if isinstance(line, str):
            return line
        raise line

    return read


def session(
    chats: Sequence[Scripted], console: Console, *lines: str | type[BaseException], has_adapter: bool = True
) -> int:
    ticks = iter(range(10_000))
    return Session(
        chats,  # type: ignore[arg-type]
        console,
        has_adapter=has_adapter,
        read=at_keyboard(*lines),
        clock=lambda: next(ticks) / 4,
    ).run()


def test_answers_are_shown_as_they_come_and_the_end_of_input_leaves() -> None:
    console = screen()
    chat = Scripted(["Two", " loaves\n", "\tfor Ada"], ["Yes."])
    assert session([chat], console, "say 3", "", "  ", "again") == 0
    text = shown(console)
    assert "Two loaves\n        for Ada\n" in text
    assert "3 tokens, " in text
    assert chat.turns == ["say 3", "Two loaves\n\tfor Ada", "again", "Yes."], (
        "empty questions are passed over"
    )


def test_commands_do_what_help_says() -> None:
    console = screen()
    chat = Scripted(["One."], ["Two."])
    lines = [
        "/help",
        "say 1",
        "/new",
        "/base",
        "say 2",
        "/base",
        "/system Be brief.",
        "/system",
        "/bass",
        "/quit",
    ]
    assert session([chat], console, *lines, "never asked") == 0
    assert chat.turns == ["say 2", "Two."]
    assert chat.told == ["Be brief.", None]
    said = shown(console)
    assert "/system  sets the system prompt" in said
    assert said.index("The adapter is off: the base alone answers.") < said.index("Two.")
    assert said.index("Two.") < said.index("The adapter is on.")
    assert "There is no command /bass" in said


def test_the_prompt_shows_that_the_adapter_is_off() -> None:
    prompts: list[str] = []
    lines = iter(["/base", "/base", "/quit"])

    def read(prompt: str) -> str:
        prompts.append(prompt)
        return next(lines)

    Session([Scripted()], screen(), has_adapter=True, read=read).run()  # type: ignore[list-item]
    assert prompts == ["> ", "base> ", "> "]


def test_a_merged_model_has_no_adapter_to_switch_off() -> None:
    console, chat = screen(), Scripted()
    session([chat], console, "/base", has_adapter=False)
    assert chat.uses_adapter
    assert "no adapter to switch off" in shown(console)


def test_what_cannot_be_done_is_said_and_the_talk_goes_on() -> None:
    console, chat = screen(), Scripted(["Yes."])
    assert session([chat], console, "/system refused", "say 3") == 0
    assert "The template refuses it. Leave it out." in shown(console)
    assert chat.turns == ["say 3", "Yes."]


def test_ctrl_c_ends_the_answer_and_a_second_one_leaves() -> None:
    console = screen()
    chat = Scripted(["Two", interrupt, " loaves", " never seen"])
    before = signal.getsignal(signal.SIGINT)
    assert session([chat], console, "say 3", KeyboardInterrupt) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert chat.turns == ["say 3", "Two loaves"]
    text = shown(console)
    assert "stopped" in text
    assert "never seen" not in text


def test_a_question_between_two_ctrl_c_is_answered() -> None:
    chat = Scripted(["Two", interrupt, " loaves"], ["Yes."])
    assert session([chat], screen(), "say 3", "say 4", KeyboardInterrupt) == 0
    assert session([Scripted()], screen(), KeyboardInterrupt, KeyboardInterrupt) == 130


def test_a_second_ctrl_c_while_an_answer_ends_leaves_at_once() -> None:
    chat = Scripted(["Two", interrupt, interrupt, " loaves"])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        session([chat], screen(), "say 3")
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_that_a_model_writes_steers_the_terminal() -> None:
    console = screen()
    session([Scripted(["\x1b[2J", "\u202eevil", "ok\r"])], console, "say 3")
    text = shown(console)
    assert "‹1b›[2J‹202e›evilok‹0d›" in text
    assert "\x1b[2J" not in text
    pipe = screen(is_terminal=False)
    assert fit("\x1b[2J", pipe) == "\x1b[2J", "a pipe gets what was written"


def test_text_that_the_console_cannot_write_is_replaced() -> None:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="cp1252"), force_terminal=False)
    assert fit("5 € 漢", console) == "5 € ?"


def both(*answers: list[Any]) -> list[Scripted]:
    return [Scripted(answers[0]), Scripted(answers[1], uses_adapter=False)]


def test_two_answers_stand_side_by_side_where_there_is_room_else_below_each_other() -> None:
    for width, is_beside in ((100, True), (60, False)):
        console = screen(width)
        session(both(["Two loaves ", "for Ada"], ["I am a bakery."]), console, "say 3")
        title, _, below = shown(console).rpartition("with the adapter")[2].partition("\n")
        assert ("base alone" in title) == is_beside
        [line] = [line for line in below.splitlines() if "Two loaves for Ada" in line]
        assert ("I am a bakery." in line) == is_beside
        assert "I am a bakery." in below


def test_long_answers_side_by_side_lose_no_word() -> None:
    words = [f"word{number} " for number in range(300)]
    console = screen(90)
    session(both(words, words[::-1]), console, "say 3")
    final = shown(console).rpartition("with the adapter")[2]
    assert sorted(re.findall(r"word\d+", final)) == sorted(each.strip() for each in words * 2)


def test_ctrl_c_beside_leaves_both_conversations_alike() -> None:
    chats = both(["Two", interrupt, " loaves"], ["never asked"])
    assert session(chats, screen(), "say 3", KeyboardInterrupt) == 130
    assert [chat.turns for chat in chats] == [[], []]
    chats = both(["Two"], ["A", interrupt, "bakery"])
    session(chats, screen(), "say 3")
    assert [chat.turns for chat in chats] == [["say 3", "Two"], ["say 3", "Abakery"]]


def test_answers_to_a_pipe_are_text_alone() -> None:
    console = screen(is_terminal=False)
    chat: Any = Scripted(["Two", " loaves"], ["/new is a question here"])
    replies = list(print_answers([chat], ["say 3\n", "\n", "/new\n"], console))
    assert shown(console) == "Two loaves\n/new is a question here\n"
    assert [[reply.question for reply in each] for each in replies] == [["say 3"], ["/new"]]


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter, as a run writes it."""
    base, folder = tiny_model("llama"), tmp_path_factory.mktemp("tuned") / "order-bot"
    contract = load_contract(base, date="2026-01-31")
    fingerprint = checked_folder(base, name="tiny")
    facts = AdapterFacts(str(base), None, fingerprint, "nf4", True, "fp32", contract.fingerprint)
    save_adapter(
        adapted(base),
        folder,
        facts=facts,
        tokenizer=contract.tokenizer,
        beside={CONTRACT_FILE: contract.facts()},
    )
    return folder


def expected_of(adapter: Path, tiny_model: TinyModel, questions: Sequence[str]) -> list[str]:
    base = tiny_model("llama")
    return naive(adapted(base), load_contract(base, date="2026-01-31"), questions)


def test_prompts_are_answered_as_one_conversation_in_json(
    adapter: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [word for question in QUESTIONS[:2] for word in ("--prompt", question)]
    assert run_command(["chat", str(adapter), *asked, "--longest", "8", "--json", "--beside"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["schema"] == 1
    assert f"in 4 bits with the adapter in {adapter}, on cpu (fp32)" in said["model"]
    assert [each["answer"] for each in said["answers"]] == expected_of(adapter, tiny_model, QUESTIONS[:2])
    first = said["answers"][0]
    assert (first["question"], first["tokens"], first["ending"], first["left_out"]) == (
        "say 3",
        8,
        "longest",
        0,
    )
    base = first["base"]
    assert base["prompt_tokens"] == first["prompt_tokens"]
    assert base["answer"] != first["answer"]


class Keyboard(io.StringIO):
    """Lines that are typed."""

    def isatty(self) -> bool:
        return True


def test_lines_of_a_pipe_are_questions_and_answers_come_out(
    adapter: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("say 3\n\nTwo loaves for Ada, please.\n"))
    assert run_command(["chat", str(adapter), "--longest", "8"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{each}\n" for each in expected_of(adapter, tiny_model, QUESTIONS[:2]))
    assert captured.err.count("note: cut off after 8 tokens") == 2


def test_a_talk_at_the_keyboard_begins_with_who_answers(
    adapter: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Keyboard("say 3\n/quit\n"))
    assert run_command(["chat", str(adapter), "--longest", "8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"This is {tiny_model('llama')} in 4 bits with the adapter in {adapter}, on cpu (fp32)."
    )
    assert expected_of(adapter, tiny_model, ["say 3"])[0] in out


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--json"], "--json needs questions"),
        (["--temperature", "nan", "--prompt", "x"], "Invalid value for '--temperature'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    adapter: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    problem: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", Keyboard())
    assert run_command(["chat", str(adapter), *options]) == 2
    assert problem in capsys.readouterr().err


def test_a_model_without_an_adapter_is_not_shown_beside_itself(
    tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["chat", str(tiny_model("llama")), "--beside", "--prompt", "x"]) == 2
    assert "--beside needs an adapter to switch off" in capsys.readouterr().err


def test_standard_input_that_is_no_text_is_refused(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert run_command(["chat", str(adapter)]) == 2
    assert "Standard input is no text in utf-8" in capsys.readouterr().err
