"""The Modelfile beside a GGUF file: what Ollama needs to ask a model as it was trained.

Its TEMPLATE is derived from the prompt contract (`ollama_template.py`) and proven before it is written:
sample conversations, written by it as Ollama would, must be the contract's prompts token for token. A
template that cannot be expressed is left out, and that is said. Knows no weights, and not whether the GGUF
file's tokenizer is the contract's (`tools/bench/gguf_foreign.py` asks a foreign one).

What Ollama does by itself stays as it is: it joins turns of one role that follow each other, puts a system
turn in the middle at the front, and takes an empty one for none.
https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qadapt.data.prompt import PromptContract
from qadapt.data.rendering.template import Turns
from qadapt.data.rendering.tokenizer import starts_with_bos
from qadapt.errors import BadData
from qadapt.events import Warned
from qadapt.export.go_template import render
from qadapt.export.ollama_template import Derived, Inexpressible, derive

_TEXT_ALONE = "{{ .Prompt }}"
_CONTENTS = (
    ("Be brief.", "What is two plus two?", "Four.", "And three plus three?", "Six.", "Thank you!"),
    (
        'Answer {{ in }} "German".\n\nAlways, and {% only %} then.',
        "Wie heißt 山?\n\n```py\nprint({'a': [1, 2]})  # 3\n```",
        'Berg 🏔️, {"name": "Berg"}',
        'She said """no""" <b>&amp;</b> \\n',
        "user",
        "1,000.50 € — e\u0301",
    ),
)
"""Contents of the sample conversations: a system turn, then questions and answers in turn."""


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile, and what to say about it.

    Attributes:
        text: The file.
        template: Its TEMPLATE; None where the contract's template cannot be expressed.
        warnings: What Ollama will do otherwise than the model was trained.
    """

    text: str
    template: str | None
    warnings: tuple[Warned, ...]


def modelfile(contract: PromptContract, gguf_name: str, *, context_tokens: int | None = None) -> Modelfile:
    """The Modelfile of a GGUF file that lies beside it.

    It holds if the file's `add_bos_token` is `adds_bos(contract)`.

    Args:
        contract: How the model was asked in training.
        gguf_name: Name of the GGUF file.
        context_tokens: Most tokens of a conversation; None leaves Ollama's own number.
    """
    template, warnings = _proven_template(contract)
    lines = [f"# {warned.message}" for warned in warnings]
    lines.append(f"FROM ./{gguf_name}")
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {_value(text)}" for text in _end_texts(contract)]
    if context_tokens is not None:
        lines.append(f"PARAMETER num_ctx {context_tokens}")
    return Modelfile("\n".join(lines) + "\n", template, warnings)


def adds_bos(contract: PromptContract) -> bool:
    """Whether a runtime must put the first token before a text by itself: a GGUF file's `add_bos_token`.

    That is the tokenizer's own rule, but for models whose prompts in training did not begin with that token.
    """
    if not starts_with_bos(contract.tokenizer):
        return False
    ids = _prompt_ids(contract, [{"role": "user", "content": "a"}])
    return ids is None or ids[:1] == [contract.tokenizer.bos_token_id]


def prompt(template: str, turns: Turns) -> str:
    """The text that Ollama makes of turns which end with a question, by a template that knows `.Messages`."""
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    messages = [{"Role": turn["role"], "Content": turn["content"]} for turn in turns]
    return render(template, {"System": "\n\n".join(system), "Messages": messages})


def _proven_template(contract: PromptContract) -> tuple[str | None, tuple[Warned, ...]]:
    if contract.template is None:
        return _TEXT_ALONE, ()
    try:
        derived = derive(contract.template, ends=_end_texts(contract), leading=_leading(contract))
        _prove(contract, derived)
    except Inexpressible as reason:
        warned = Warned(
            message=f"The Modelfile has no TEMPLATE, for Ollama cannot write this model's prompts: {reason}.",
            cure="Ask the GGUF file through a program that renders the chat template inside it, such as "
            "llama.cpp's server.",
        )
        return None, (warned,)
    return derived.text, tuple(_differences(contract, derived))


def _prove(contract: PromptContract, derived: Derived) -> None:
    for turns in _conversations(_CONTENTS, has_system=derived.has_system):
        if not _is_same(contract, derived.text, turns):
            roles = ", ".join(turn["role"] for turn in turns)
            raise Inexpressible(f"a conversation of the turns {roles} became other tokens")


def _differences(contract: PromptContract, derived: Derived) -> Iterator[Warned]:
    """What is not the same for contents of other kinds than those that every model must be asked with."""
    template = contract.template
    assert template is not None, "something was derived from it"
    if not derived.has_system:
        yield Warned(
            message="The model's chat template takes no system turn; Ollama leaves one out without a word.",
            cure="Say it in the first question.",
        )

    def is_same(contents: Iterable[str]) -> bool:
        samples = _conversations([tuple(contents)], has_system=derived.has_system)
        return all(_is_same(contract, derived.text, turns) for turns in samples)

    if not is_same(f" {content}\n" for content in _CONTENTS[0]):
        yield Warned(
            message="The model's chat template takes off blanks around a text; Ollama cannot.",
            cure="Send texts without blanks at their ends.",
        )
    sought = [text for text in template.sought if not is_same(f"a {text} b{at}" for at in range(6))]
    if sought:
        shortest = (text for text in sought if not any(other in text for other in sought if other != text))
        texts = " or ".join(map(repr, shortest))
        yield Warned(
            message=f"The model's chat template rewrites texts that hold {texts}; Ollama cannot.",
            cure="Leave them out of what is sent.",
        )


def _conversations(contents: Iterable[tuple[str, ...]], *, has_system: bool) -> Iterator[Turns]:
    """Of each system turn and its questions and answers: one, three and five turns, with it and without."""
    for system, *said in contents:
        for count in (1, 3, 5):
            turns = [
                {"role": "assistant" if at % 2 else "user", "content": content}
                for at, content in enumerate(said[:count])
            ]
            yield turns
            if has_system:
                yield [{"role": "system", "content": system}, *turns]


def _is_same(contract: PromptContract, template: str, turns: Turns) -> bool:
    """Whether Ollama asks what the contract asks, token for token.

    llama.cpp cuts a text as if a special token stood before it, whether one is added or not.
    """
    tokenizer = contract.tokenizer
    before = tokenizer.bos_token or tokenizer.eos_token or ""
    ids = tokenizer.backend_tokenizer.encode(
        f"{before}{prompt(template, turns)}", add_special_tokens=False
    ).ids
    skipped = 1 if before and not adds_bos(contract) else 0
    return ids[skipped:] == _prompt_ids(contract, turns)


def _prompt_ids(contract: PromptContract, turns: Turns) -> list[int] | None:
    """None if there is no template, or it refuses the turns."""
    try:
        return None if contract.template is None else contract.prompt_ids(turns)
    except BadData:
        return None


def _leading(contract: PromptContract) -> str:
    """What the runtime puts before each prompt by itself."""
    bos = contract.tokenizer.bos_token
    return bos if adds_bos(contract) and isinstance(bos, str) else ""


def _end_texts(contract: PromptContract) -> list[str]:
    return list(contract.tokenizer.convert_ids_to_tokens(sorted(contract.end_ids)))


def _value(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'
