"""The Modelfile: its template against the library's own prompts, token for token, in every family.

The Go templates are rendered by `go_template.py`, which is compared here with what Go wrote for the same
texts; what Ollama reads of a Modelfile is written down once more, naively.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from template_families import FAMILIES, family_tokenizer, write_family

from qadapt.data.prompt import PromptContract, load_contract
from qadapt.export import ollama
from qadapt.export.go_template import BadTemplate, literal, render
from qadapt.export.ollama import adds_bos, modelfile, prompt
from qadapt.export.ollama_template import Derived

Contract = Callable[..., PromptContract]
Turn = dict[str, str]

TRIMS, NO_SYSTEM, REWRITES = "takes off blanks", "takes no system turn", "rewrites texts that hold '</think>'"
EXPRESSED: dict[str, tuple[str, ...]] = {
    "llama2": (TRIMS,),
    "llama3": (TRIMS,),
    "llama3_1": (TRIMS,),
    "llama3_2": (TRIMS,),
    "mistral_v1": (),
    "mistral_v3": (TRIMS,),
    "qwen2_5": (),
    "qwen3": (REWRITES,),
    "gemma2": (NO_SYSTEM, TRIMS),
    "gemma3": (TRIMS,),
    "phi3": (),
    "phi3_5": (),
    "phi4": (),
    "smollm2": (),
    "zephyr": (),
    "tinyllama": (),
    "chatml": (),
    "vicuna": (TRIMS,),
    "deepseek_v2": (),
    "deepseek_r1": (REWRITES,),
    "deepseek_r1_late": (REWRITES,),
    "yi": (),
    "aya": (TRIMS,),
    "granite3_0": (),
    "granite3_1": (),
    "olmo2": (),
    "falcon3": (),
    "solar": (),
}
"""Families whose prompts Ollama can write, and what it is warned of; every other one is said to be out."""
OUT = {"command_r_plus": "it does not write a plain conversation"}

SYSTEM = "Reply in verse,\nnever in {prose}."
SAID = (
    "Why is the sky blue?",
    "Rayleigh.\n\n- short waves scatter {{ more }}\n- `λ⁻⁴`",
    'And "red" at dusk?',
    "A longer way,\tso the blue is gone.",
    "assistant",
    "user",
    "¿Y el mar? 🌊 #3",
)


def conversations(*, has_system: bool) -> Iterator[list[Turn]]:
    """Ends with a question, as what Ollama renders does: one to four of them."""
    for count in (1, 3, 5, 7):
        turns = [
            {"role": ("user", "assistant")[at % 2], "content": content}
            for at, content in enumerate(SAID[:count])
        ]
        yield turns
        if has_system:
            yield [{"role": "system", "content": SYSTEM}, *turns]


@pytest.fixture(scope="module")
def contract_of(tmp_path_factory: pytest.TempPathFactory) -> Contract:
    made: dict[tuple[str, str | None], PromptContract] = {}

    def make(family: str, template: str | None = None) -> PromptContract:
        if (family, template) not in made:
            folder = write_family(family, tmp_path_factory.mktemp(family))
            given = "auto"
            if template is not None:
                given = str(folder / "given.jinja")
                Path(given).write_text(template, encoding="utf-8")
            made[family, template] = load_contract(folder, template=given)
        return made[family, template]

    return make


def library_ids(family: str, turns: list[Turn]) -> list[int]:
    encoded = family_tokenizer(family).apply_chat_template(
        turns, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    ids: list[int] = encoded["input_ids"]
    return ids


def ollama_ids(contract: PromptContract, template: str, turns: list[Turn]) -> list[int]:
    """What a runtime makes of a rendered prompt: its first token by the file's own word, then the text."""
    tokenizer = contract.tokenizer
    ids: list[int] = tokenizer.encode(prompt(template, turns), add_special_tokens=False)
    return [tokenizer.bos_token_id, *ids] if adds_bos(contract) else ids


# The template


def test_every_family_is_expressed_or_said_to_be_out() -> None:
    assert {*EXPRESSED, *OUT} == set(FAMILIES)


@pytest.mark.parametrize("family", EXPRESSED)
def test_ollamas_prompt_is_the_librarys_token_for_token(contract_of: Contract, family: str) -> None:
    contract = contract_of(family)
    made = modelfile(contract, "model.gguf")
    assert made.template is not None, made.warnings
    for turns in conversations(has_system=NO_SYSTEM not in EXPRESSED[family]):
        assert ollama_ids(contract, made.template, turns) == library_ids(family, turns), made.template


@pytest.mark.parametrize("family", EXPRESSED)
def test_what_ollama_does_otherwise_is_said(contract_of: Contract, family: str) -> None:
    warnings = modelfile(contract_of(family), "model.gguf").warnings
    assert len(warnings) == len(EXPRESSED[family]), warnings
    for warned, said in zip(warnings, EXPRESSED[family], strict=True):
        assert said in warned.message
        assert warned.cure


@pytest.mark.parametrize("family", OUT)
def test_a_template_that_cannot_be_expressed_is_left_out_and_said(contract_of: Contract, family: str) -> None:
    made = modelfile(contract_of(family), "model.gguf")
    assert made.template is None
    assert not any(name == "TEMPLATE" for name, _ in read_modelfile(made.text))
    (warned,) = made.warnings
    assert OUT[family] in warned.message
    assert f"# {warned.message}" in made.text.splitlines()
    assert "llama.cpp" in warned.cure


CHATML_TEMPLATE = """\
{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}<|im_end|>
{{ end }}{{ end }}<|im_start|>assistant
"""


def test_a_plain_template_looks_as_one_would_write_it(contract_of: Contract) -> None:
    assert modelfile(contract_of("chatml"), "model.gguf").template == CHATML_TEMPLATE


def test_a_default_system_turn_is_kept_where_none_is_given(contract_of: Contract) -> None:
    template = modelfile(contract_of("smollm2"), "model.gguf").template
    assert template is not None
    asked = [{"role": "user", "content": "Hello?"}]
    assert "named SmolLM" in prompt(template, asked)
    assert "named SmolLM" not in prompt(template, [{"role": "system", "content": "Be."}, *asked])


def test_a_system_turn_goes_where_the_model_has_it(contract_of: Contract) -> None:
    template = modelfile(contract_of("mistral_v3"), "model.gguf").template
    assert template is not None
    turns = [{"role": "system", "content": "Be."}]
    turns += [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
    assert prompt(template, turns) == "[INST] u[/INST] a</s>[INST] Be.\n\nu[/INST]"


ROUNDS = (
    "{% for message in messages %}{% if message.role == 'user' %}[Round {{ loop.index }}] "
    "{{ message.content }}<|im_start|>{% else %}{{ message.content }}<|im_end|>{% endif %}{% endfor %}"
)
BACKWARDS = "{% for message in messages | reverse %}{{ message.content }}<|im_end|>{% endfor %}"
TWICE = "{% for message in messages %}{{ message.content + message.content }}<|im_end|>{% endfor %}"
LONG_ONES = (
    "{% for message in messages %}{{ message.content }}{% if message.content | length > 10 %}!{% endif %}"
    "<|im_end|>{% endfor %}"
)
LATE_SYSTEM = (
    "{% for message in messages if message.role != 'system' %}{{ message.content }}<|im_end|>{% endfor %}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (ROUNDS, "became other tokens"),
        (BACKWARDS, "each content once, in order"),
        (TWICE, "each content once, in order"),
        (LONG_ONES, "became other tokens"),
        (LATE_SYSTEM, "neither before the first question nor in the last"),
        ("{{ raise_exception('never') }}<|im_end|>", "each content once, in order"),
    ],
    ids=["counts turns", "backwards", "twice", "by length", "system at the end", "refuses"],
)
def test_what_depends_on_more_than_role_and_place_is_refused(
    contract_of: Contract, template: str, why: str
) -> None:
    made = modelfile(contract_of("smollm2", template), "model.gguf")
    assert made.template is None
    assert why in made.warnings[0].message


def test_a_wrong_template_does_not_pass_the_proof(
    contract_of: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = CHATML_TEMPLATE.replace("<|im_end|>\n{{ end }}{{ end }}", "<|im_end|>{{ end }}{{ end }}")
    assert wrong != CHATML_TEMPLATE
    monkeypatch.setattr(ollama, "derive", lambda *_, **__: Derived(wrong, has_system=True))
    made = modelfile(contract_of("chatml"), "model.gguf")
    assert made.template is None
    assert "user, assistant, user" in made.warnings[0].message


# The file


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Commands and their values, as Ollama's reader takes them: it drops characters that do not print."""
    commands, rest = [], "".join(each for each in text if each.isprintable() or each in "\n\t")
    while rest := rest.lstrip():
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        name, _, rest = rest.partition(" ")
        if rest.startswith('"""'):
            value, _, rest = rest.removeprefix('"""').partition('"""\n')
        else:
            value, _, rest = rest.partition("\n")
            if name != "PARAMETER":
                value = value.strip('"')
        commands.append((name, value))
    return commands


def test_a_modelfile_names_the_file_the_ends_and_the_context(contract_of: Contract) -> None:
    made = modelfile(contract_of("llama3"), "tuned-Q8_0.gguf", context_tokens=4096)
    commands = read_modelfile(made.text)
    assert commands[0] == ("FROM", "./tuned-Q8_0.gguf")
    assert ("TEMPLATE", made.template) in commands
    assert [value for name, value in commands if name == "PARAMETER"] == [
        'stop "<|eot_id|>"',
        'stop "<|end_of_text|>"',
        "num_ctx 4096",
    ]
    assert "num_ctx" not in modelfile(contract_of("llama3"), "tuned.gguf").text


def test_texts_that_would_break_a_modelfile_or_a_template_are_kept(contract_of: Contract) -> None:
    awkward = '{{ "a" }}"""\u00a0\u200b{\U000f1234{{'
    template = (
        f"{{% set awkward = {json.dumps(awkward, ensure_ascii=False)} %}}"
        "{% for message in messages %}{{ awkward + message.content }}<|im_end|>{% endfor %}{{ awkward }}"
    )
    contract = contract_of("smollm2", template)
    made = modelfile(contract, "model.gguf")
    assert made.template is not None, made.warnings
    (read,) = (value for name, value in read_modelfile(made.text) if name == "TEMPLATE")
    assert read == made.template
    for turns in conversations(has_system=True):
        assert ollama_ids(contract, read, turns) == contract.prompt_ids(turns)


def test_a_model_of_texts_is_asked_with_the_text_alone(contract_of: Contract, tmp_path: Path) -> None:
    folder = write_family("llama2", tmp_path)
    (folder / "chat_template.jinja").unlink()
    contract = load_contract(folder)
    assert contract.template is None
    made = modelfile(contract, "model.gguf")
    assert (made.template, made.warnings) == ("{{ .Prompt }}", ())
    assert adds_bos(contract)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama3", True),
        ("llama2", True),
        ("zephyr", False),
        ("chatml", False),
        ("smollm2", False),
        ("phi3", False),
    ],
)
def test_the_first_token_is_added_where_prompts_began_with_it(
    contract_of: Contract, family: str, expected: bool
) -> None:
    assert adds_bos(contract_of(family)) is expected
    begins = contract_of(family).prompt_ids([{"role": "user", "content": "a"}])[0]
    made = modelfile(contract_of(family), "model.gguf").template
    assert made is not None
    if expected:
        assert begins == contract_of(family).tokenizer.bos_token_id
        assert not made.startswith(str(contract_of(family).tokenizer.bos_token))


# Go's templates

VALUES = {
    "System": "s",
    "Empty": "",
    "Messages": [{"Role": "user", "Content": "a"}, {"Role": "assistant", "Content": "b"}],
}
GO_WROTE = {
    "plain { } }} text": "plain { } }} text",
    "{{ .System }}{{.Empty}}{{ $.System }}": "ss",
    '{{ "a \\"b\\" \\u00e4 \\U0001f30a {{" }}': 'a "b" ä 🌊 {{',
    "{{ if .Empty }}a{{ else }}b{{ end }}": "b",
    "{{ if .Empty }}a{{ else if .System }}b{{ else }}c{{ end }}": "b",
    "{{ if .Empty }}a{{ else if .Empty }}b{{ end }}c": "c",
    "{{ range .Messages }}[{{ .Role }}:{{ .Content }}{{ $.System }}]{{ end }}": "[user:as][assistant:bs]",
    "{{ range $i, $m := .Messages }}{{ if eq $i 1 }}{{ $m.Content }}{{ end }}{{ .Role }}{{ end }}": "user"
    "bassistant",
    "{{ range $i, $_ := .Messages }}{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}"
    "{{ .Content }}{{ end }}{{ end }}": "b",
    "{{ if and .System .Empty }}a{{ end }}{{ and .System .Empty }}{{ and .System .System }}": "s",
}
"""Go 1.19's text/template wrote these."""


@pytest.mark.parametrize(("template", "expected"), GO_WROTE.items())
def test_templates_are_rendered_as_go_does(template: str, expected: str) -> None:
    assert render(template, VALUES) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ if .System }}a",
        "a{{ end }}",
        "{{ else }}",
        "{{ .System",
        "{{- .System }}",
        "{{ .Missing }}",
        "{{ .System.Missing }}",
        "{{ $unknown }}",
        "{{ .Messages }}",
        "{{ range .System }}a{{ end }}",
        "{{ printf .System }}",
        "{{ eq .System }}",
        "{{ len (.System }}",
        "{{ .System) }}",
        '{{ "a }}',
        "{{ }}",
        "{{ .System .Empty }}",
    ],
)
def test_what_is_not_known_of_go_is_an_error(template: str) -> None:
    with pytest.raises(BadTemplate):
        render(template, VALUES)


@given(st.text(alphabet=st.one_of(st.sampled_from('{}"\\ \n\t.a'), st.characters(exclude_categories=["Cs"]))))
def test_a_literal_comes_out_as_it_went_in(text: str) -> None:
    assert render(literal(text), VALUES) == text
    assert render(literal(text) + "{{ .System }}" + literal(text), VALUES) == f"{text}s{text}"
    (read,) = (value for _, value in read_modelfile(f'TEMPLATE """{literal(text)}"""\n'))
    assert render(read, VALUES) == text


def test_a_blank_that_only_a_texts_beginning_gets_is_not_taken_for_the_runtimes(
    contract_of: Contract, tmp_path: Path
) -> None:
    """Ours puts one before a text that no special token opens; llama.cpp, told to put none, does not."""
    folder = write_family("zephyr", tmp_path)
    facts = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    facts["normalizer"] = None
    facts["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(facts), encoding="utf-8")
    made = modelfile(load_contract(folder), "model.gguf")
    assert made.template is None
    assert "became other tokens" in made.warnings[0].message
