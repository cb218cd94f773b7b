"""One base with adapters of several runs beside it, each asked by its own prompts; the chat that switches."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_chat import Keyboard, Scripted, at_keyboard, screen, shown
from test_method_runs import drawn
from test_methods import base_of

from qadapt.adapters.facts import FACTS_FILE, PEFT_FILES, AdapterFacts, read_facts
from qadapt.adapters.lora import save_adapter
from qadapt.cli.chat_session import Session
from qadapt.cli.main import run as run_command
from qadapt.data.prompt import CONTRACT_FILE, load_contract
from qadapt.errors import BadAdapter, BadData, BadRun, Unsupported
from qadapt.methods import Method
from qadapt.model.folder import checked_folder
from qadapt.model.generate import generate
from qadapt.model.load import load_base
from qadapt.serve.chat import Chat, Manner
from qadapt.serve.partner import find_partner
from qadapt.trained.bisecting import Asker
from qadapt.trained.loading import load_partner, load_together, load_tuned
from qadapt.trained.together import Company

if TYPE_CHECKING:
    from conftest import TinyModel

CPU = torch.device("cpu")
SHORT = Manner(longest=6)
FRONT = "base_model.model.model."
PLAIN = (
    "{{ bos_token }}{% for turn in messages %}{{ turn.role }}: {{ turn.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REFUSING = (
    "{% for turn in messages %}{% if turn.role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    + ("{{ turn.content }}<|eot_id|>{% endfor %}")
)
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made("ia3")`: an adapter's folder as a run writes it, made once and not to be changed."""
    folders: dict[tuple[str, ...], Path] = {}
    place = tmp_path_factory.mktemp("beside")
    (place / "plain.jinja").write_text(PLAIN, encoding="utf-8")

    def make(
        method: Method, *, family: str = "llama", quantization: str = "nf4", template: str = "auto"
    ) -> Path:
        key = (method, family, quantization, template)
        if key not in folders:
            base, folders[key] = tiny_model(family), place / "-".join(key)
            chosen = str(place / "plain.jinja") if template == "plain" else template
            contract = load_contract(base, template=chosen)
            fingerprint = checked_folder(base, name="tiny")
            facts = AdapterFacts(
                str(base), None, fingerprint, quantization, True, "fp32", contract.fingerprint
            )
            save_adapter(
                drawn(method, base, quantization=quantization),
                folders[key],
                facts=facts,
                tokenizer=contract.tokenizer,
                beside={CONTRACT_FILE: contract.facts()},
            )
        return folders[key]

    return make


def alone(adapter: Path, *questions: str) -> list[str]:
    """What an adapter answers that is loaded by itself."""
    tuned = load_tuned(adapter, device=CPU)
    chat = Chat(tuned.model, tuned.contract, SHORT)
    return ["".join(chat.ask(question)) for question in questions]


# --- in memory --------------------------------------------------------------------------------------------


def test_requests_to_several_tasks_are_answered_as_each_alone(made: Made) -> None:
    names: tuple[Method, ...] = ("lora", "ia3", "pfeiffer")
    ways = ("auto", "plain", "auto")
    folders = {name: made(name, template=way) for name, way in zip(names, ways, strict=True)}
    together = load_together([str(folder) for folder in folders.values()])
    titles = {name: str(folder) for name, folder in folders.items()}
    requests = [(names[place % 3], f"say {place}") for place in range(9)]
    prompts = [
        together.contracts[titles[name]].prompt_ids([{"role": "user", "content": text}])
        for name, text in requests
    ]
    contract = together.contracts[titles["lora"]]
    answers = generate(
        together.model.asked([titles[name] for name, _ in requests]),
        prompts,
        max_new_tokens=SHORT.longest,
        end_ids=contract.end_ids,
        pad_id=contract.pad_id,
    )
    for name in names:
        mine = [place for place, (asked, _) in enumerate(requests) if asked == name]
        tuned = load_tuned(folders[name], device=CPU)
        for place in mine:
            chat = Chat(tuned.model, tuned.contract, SHORT)
            assert "".join(chat.ask(requests[place][1])) == contract.text(answers[place])
    assert len({tuple(answer) for answer in answers}) > 3, "a control: they differ"
    assert together.contract_of([titles["lora"], titles["ia3"]]) is together.contracts[titles["ia3"]]


def test_an_adapter_of_another_base_or_of_one_held_otherwise_is_refused(made: Made, tmp_path: Path) -> None:
    mine = str(made("lora"))
    together = load_together([mine])
    with pytest.raises(BadAdapter, match=r"was trained on .*qwen2.*; in memory is .*llama"):
        together.add("other", made("lora", family="qwen2"))
    with pytest.raises(BadAdapter, match=r"in 16 or 32 bits \(fp32\); in memory it is in 4 bits, double"):
        together.add("other", made("lora", quantization="none"))
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in made("ia3").iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    facts = json.loads((changed / FACTS_FILE).read_text("utf-8"))
    (changed / FACTS_FILE).write_text(json.dumps({**facts, "load_dtype": "bf16"}), "utf-8")
    with pytest.raises(BadAdapter, match=r"double quantized \(bf16\); in memory it is in 4 bits"):
        together.add("other", changed)
    assert together.model.names == (mine,)
    assert list(together.contracts) == [mine]


# --- a conversation ---------------------------------------------------------------------------------------


def test_a_conversation_goes_on_with_another_adapter_and_its_prompts(made: Made) -> None:
    first, second = made("lora"), made("pfeiffer", template="plain")
    loaded = load_partner(find_partner(str(first)))
    assert loaded.together is not None
    company = Company(loaded.together)
    chat = Chat(loaded.model, loaded.contract, SHORT, system="Be brief.")
    answers = ["".join(chat.ask("say 3"))]
    names, contract = company.bring([str(second)])
    chat.switch_to(names, contract)
    answers.append("".join(chat.ask("say 4")))
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "say 3"},
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": "say 4"},
    ]
    tuned = load_tuned(second, device=CPU)
    ids = tuned.contract.prompt_ids(turns)
    assert ids != loaded.contract.prompt_ids(turns), "a control: they are asked differently"
    [expected] = generate(
        tuned.model,
        [ids],
        max_new_tokens=SHORT.longest,
        end_ids=tuned.contract.end_ids,
        pad_id=tuned.contract.pad_id,
    )
    assert answers[1] == tuned.contract.text(expected)
    assert chat.reply is not None
    assert chat.reply.prompt_tokens == len(ids)
    chat.switch_to(*company.bring([first.name]))
    chat.begin_anew()
    assert "".join(chat.ask("say 3")) == answers[0], "the first one is as it was"


def test_a_conversation_is_read_anew_by_whoever_is_switched_on(made: Made) -> None:
    loaded = load_partner(find_partner(str(made("lora"))))
    assert loaded.together is not None
    loaded.together.add("other", made("ia3"))
    chat = Chat(loaded.model, loaded.contract, SHORT)
    first = "".join(chat.ask("say 3"))
    loaded.together.model.use("other")
    second = "".join(chat.ask("say 4"))
    ids = loaded.contract.prompt_ids(
        [
            {"role": "user", "content": "say 3"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "say 4"},
        ]
    )
    ends = {"end_ids": loaded.contract.end_ids, "pad_id": loaded.contract.pad_id}
    [expected] = generate(loaded.model, [ids], max_new_tokens=SHORT.longest, **ends)  # type: ignore[arg-type]
    assert second == loaded.contract.text(expected)


def test_answers_of_two_adapters_can_be_written_in_turn(made: Made) -> None:
    adapters = [made("lora"), made("ia3")]
    together = load_together([str(adapter) for adapter in adapters])
    answers = []
    for adapter in adapters:
        chat = Chat(together.model, together.contracts[str(adapter)], SHORT)
        chat.switch_to([str(adapter)], chat.contract)
        answers.append(chat.ask("say 3"))
    found = zip(*zip_longest(*answers, fillvalue=""), strict=True)
    assert ["".join(each) for each in found] == [alone(adapter, "say 3")[0] for adapter in adapters]
    assert together.model.chosen == ()


def test_what_is_taken_out_can_be_brought_in_again(made: Made) -> None:
    adapters = [str(made("lora")), str(made("ia3"))]
    together = load_together(adapters)
    together.remove(adapters[1])
    assert together.model.names == tuple(together.contracts) == tuple(together.folders) == (adapters[0],)
    assert Company(together).bring(adapters[1:])[0] == (adapters[1],)
    with pytest.raises(BadAdapter, match="There is no adapter nobody"):
        together.remove("nobody")


def test_a_name_of_two_adapters_is_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "a/bot", tmp_path / "b/bot"
    shutil.copytree(made("lora"), first)
    shutil.copytree(made("ia3"), second)
    loaded = load_partner(find_partner(str(first)))
    assert loaded.together is not None
    company = Company(loaded.together)
    assert company.bring(["bot"])[0] == ("bot",)
    monkeypatch.chdir(second.parent)
    with pytest.raises(BadAdapter, match=r"bot is .*a/bot in memory, and .*b/bot elsewhere") as refused:
        company.bring(["bot"])
    assert "the path" in refused.value.cure
    assert company.bring([str(second)])[0] == (str(second),)
    assert company.bring(["bot"])[0] == (str(second),), "it is where one stands"


def test_an_adapter_is_brought_in_once_under_whatever_name(made: Made) -> None:
    first, second = made("lora"), made("ia3")
    loaded = load_partner(find_partner(str(first)))
    assert loaded.together is not None
    company = Company(loaded.together)
    assert company.bring([str(first)])[0] == (first.name,)
    names, contract = company.bring([str(second), first.name])
    assert names == (str(second), first.name)
    assert contract is loaded.together.contracts[first.name]
    assert company.bring([f"{second.parent}/../{second.parent.name}/{second.name}"])[0] == (str(second),)
    assert loaded.together.model.names == (first.name, str(second))
    with pytest.raises(BadRun, match="There is no run"):
        company.bring(["nobody"])


def test_a_whole_model_does_not_stand_beside_an_adapter(made: Made, tiny_model: TinyModel) -> None:
    with pytest.raises(BadRun, match="is no adapter: it is a whole model"):
        load_together([str(tiny_model("llama")), str(made("lora"))])
    loaded = load_partner(find_partner(str(made("lora"))))
    assert loaded.together is not None
    with pytest.raises(BadRun, match="is no adapter: it is a whole model"):
        Company(loaded.together).bring([str(tiny_model("llama"))])


def test_an_adapter_with_parts_that_cannot_stand_beside_others_is_talked_to_alone(
    made: Made, tmp_path: Path
) -> None:
    adapter = with_table(made("lora"), tmp_path / "with-table")
    loaded = load_partner(find_partner(str(adapter)))
    assert loaded.together is None
    assert list_of(Chat(loaded.model, loaded.contract, SHORT)) == alone(made("lora"), "say 3")
    with pytest.raises(Unsupported, match=f"cannot stand beside others: it has {FRONT}embed_tokens"):
        load_together([str(made("ia3")), str(adapter)])


def with_table(adapter: Path, to: Path) -> Path:
    """An adapter that was saved with a table of its base."""
    shutil.copytree(adapter, to)
    table, file = base_of(Path(read_facts(adapter).base)).get_input_embeddings().weight, to / PEFT_FILES[0]
    save_file({**load_file(file), f"{FRONT}embed_tokens.weight": table.detach()}, file)
    return to


def test_versions_are_asked_on_one_base_as_long_as_it_is_theirs(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []

    def counted(*arguments: Any, **named: Any) -> Any:
        loads.append(named["quantization"])
        return load_base(*arguments, **named)

    versions = {
        "one": (made("lora"), ["nf4"]),
        "other": (made("ia3"), ["nf4"]),
        "one again": (made("lora"), ["nf4"]),
        "held otherwise": (made("lora", quantization="none"), ["nf4", "none"]),
        "by itself": (with_table(made("lora"), tmp_path / "table"), ["nf4", "none", "nf4"]),
        "after it": (made("pfeiffer", template="plain"), ["nf4", "none", "nf4", "nf4"]),
    }
    expected = {name: alone(folder, "say 3") for name, (folder, _) in versions.items()}
    asker = Asker("say 3", SHORT.longest)
    monkeypatch.setattr("qadapt.trained.loading.load_base", counted)
    for name, (folder, loaded) in versions.items():
        assert [asker.answer(folder)] == expected[name], name
        assert loads == loaded, name


def test_who_answered_answers_on_where_another_cannot(
    made: Made, tiny_model: TinyModel, tmp_path: Path
) -> None:
    loaded = load_partner(find_partner(str(made("lora"))))
    together = loaded.together
    assert together is not None
    for name, method in (("ia3", "ia3"), ("other", "lora")):
        together.add(name, made(method))
    chat = Chat(loaded.model, loaded.contract, SHORT, system="Be brief.")
    [expected] = list_of(chat)
    (tmp_path / "refusing.jinja").write_text(REFUSING, encoding="utf-8")
    refusing = load_contract(tiny_model("llama"), template=str(tmp_path / "refusing.jinja"))
    with pytest.raises(Unsupported, match="cannot be stacked"):
        chat.switch_to(["other", "ia3"], refusing)
    with pytest.raises(BadAdapter, match="There is no adapter nobody"):
        chat.switch_to(["nobody"], refusing)
    with pytest.raises(BadData, match="No system"):
        chat.switch_to(["ia3"], refusing)
    chat.begin_anew()
    assert list_of(chat) == [expected]


def list_of(chat: Chat) -> list[str]:
    return ["".join(chat.ask("say 3"))]


def test_the_base_and_the_chosen_adapter_answer_side_by_side(made: Made) -> None:
    first, second = made("lora"), made("ia3")
    loaded = load_partner(find_partner(str(first)))
    assert loaded.together is not None
    tuned, base = (Chat(loaded.model, loaded.contract, SHORT, uses_adapter=each) for each in (True, False))
    tuned.switch_to(*Company(loaded.together).bring([str(second)]))
    both = [("".join(tuned.ask(text)), "".join(base.ask(text))) for text in ("say 3", "say 4")]
    assert [each for each, _ in both] == alone(second, "say 3", "say 4")
    plain = Chat(base_of(Path(loaded.together.facts.base)), loaded.contract, SHORT)
    assert [each for _, each in both] == ["".join(plain.ask(text)) for text in ("say 3", "say 4")]


# --- on the screen ----------------------------------------------------------------------------------------


class Stub:
    """Adapters whose names are known: what `Company` does on the screen."""

    def __init__(self, *known: str) -> None:
        self.known = known
        self.together = dataclasses.make_dataclass("T", ["model"])(
            dataclasses.make_dataclass("M", ["names"])(known)
        )

    def bring(self, names: list[str]) -> tuple[tuple[str, ...], str]:
        for name in names:
            if name not in self.known:
                raise BadRun(f"There is no {name}.", cure="Give another.")
        return tuple(names), f"the prompts of {names[-1]}"


class Switched(Scripted):
    """A chat that says whom it was switched to."""

    def __init__(self, *answers: Any, uses_adapter: bool = True) -> None:
        super().__init__(*answers, uses_adapter=uses_adapter)
        self.to: list[tuple[tuple[str, ...], str]] = []

    def switch_to(self, names: tuple[str, ...], contract: str) -> None:
        self.to.append((names, contract))


def talk(chats: list[Switched], company: Stub | None, *lines: str) -> str:
    console = screen()
    read = at_keyboard(*lines)
    assert Session(chats, console, has_adapter=True, company=company, read=read).run() == 0  # type: ignore[arg-type]
    return shown(console)


def test_use_switches_to_one_or_several_and_says_so() -> None:
    chat = Switched(["Yes."])
    said = talk(
        [chat], Stub("orders", "tone"), "/use", "/use orders", "/use orders tone", "/use nobody", "say 3"
    )
    assert chat.to == [
        (("orders",), "the prompts of orders"),
        (("orders", "tone"), "the prompts of tone"),
    ]
    assert "In memory: orders, tone." in said
    assert "From here on orders answers." in said
    assert "From here on orders and tone answer." in said
    assert "There is no nobody. Give another." in said
    assert chat.turns == ["say 3", "Yes."]


def test_use_of_two_side_by_side_switches_the_one_with_an_adapter() -> None:
    chats = [Switched(), Switched(uses_adapter=False)]
    talk(chats, Stub("orders"), "/use orders")
    assert [len(chat.to) for chat in chats] == [1, 0]


def test_use_without_company_says_that_there_is_none() -> None:
    assert "no adapter here that could be switched" in talk([Switched()], None, "/use orders")


def test_the_command_switches_at_the_keyboard(
    made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = made("lora"), made("pfeiffer")
    monkeypatch.setattr("sys.stdin", Keyboard(f"say 3\n/new\n/use {second}\nsay 3\n/quit\n"))
    assert run_command(["chat", str(first), "--longest", "6"]) == 0
    out = capsys.readouterr().out
    before, _, after = out.partition(f"From here on {second} answers.")
    assert seen(alone(first, "say 3")[0]) in before
    assert seen(alone(second, "say 3")[0]) in after


def seen(text: str) -> str:
    """What rich leaves of a text for a pipe."""
    return text.translate(dict.fromkeys((7, 8, 11, 12, 13)))
