"""Whether a folder asks as the run did: tokenizer, template and end tokens as plain tools read them.

Sample conversations become tokens twice: by the run's prompt contract, and by `AutoTokenizer` and
`apply_chat_template` from the folder alone. Knows no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qadapt.data.prompt import PromptContract
from qadapt.data.rendering.template import ChatTemplate
from qadapt.data.rendering.tokenizer import identity, starts_with_bos

Turns = Sequence[Mapping[str, Any]]

TEXTS = (
    "Two apples and three pears: how many?",
    "  def total(items):\n\treturn sum(items)  # 1,234.50 €\n\n",
    "Größe, naïve, Ελλάδα, Привет, 你好, مرحبا, नमस्ते, 한국어 🙂👩‍👩‍👧",
)
"""Plain texts whose tokens are compared: numbers, white space, code, other scripts."""


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


CONVERSATIONS: Mapping[str, Turns] = {
    "a question": (_turn("user", TEXTS[0]),),
    "a system turn and a question": (_turn("system", "Be brief."), _turn("user", TEXTS[2])),
    "a question and its answer": (_turn("user", TEXTS[1]), _turn("assistant", "Five.")),
    "a second question": (
        _turn("user", TEXTS[0]),
        _turn("assistant", "Five."),
        _turn("user", " And one more? "),
    ),
}
"""What is rendered by both, by name."""


@dataclass(frozen=True)
class PromptProof:
    """How many sample conversations and texts gave the same tokens, and what differs, in sentences."""

    conversations: int
    texts: int
    end_ids: tuple[int, ...]
    faults: tuple[str, ...]


def prove_prompt(folder: Path, contract: PromptContract) -> PromptProof:
    """Compares a folder's tokenizer, template and end tokens with a run's contract.

    Args:
        folder: It holds a tokenizer and, for a model that is run from it, `generation_config.json`.
        contract: The run's.
    """
    ends = tuple(sorted(contract.end_ids))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        return PromptProof(0, 0, ends, (f"the tokenizer cannot be read: {reason}",))
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return PromptProof(0, 0, ends, ("the tokenizer is no fast one (tokenizer.json is missing)",))
    faults = [*_text_faults(tokenizer, contract), *_end_faults(folder, contract)]
    compared = {} if contract.template is None else CONVERSATIONS
    faults += _template_faults(tokenizer, contract, compared)
    return PromptProof(len(compared), len(TEXTS), ends, tuple(faults))


def _text_faults(tokenizer: PreTrainedTokenizerFast, contract: PromptContract) -> Iterator[str]:
    """What differs in tokens and their meaning."""
    ours = contract.tokenizer
    if tokenizer.get_vocab() != ours.get_vocab():
        yield "the tokenizer has another vocabulary"
    special, wanted = dict(tokenizer.special_tokens_map), dict(ours.special_tokens_map)
    for name in sorted({*special, *wanted}):
        if special.get(name) != wanted.get(name):
            yield f"the tokenizer's {name} is {special.get(name)!r}, in the run it was {wanted.get(name)!r}"
    if starts_with_bos(tokenizer) != starts_with_bos(ours):
        yield "the tokenizer begins texts otherwise (BOS)"
    for text in TEXTS:
        if tokenizer(text, add_special_tokens=False).input_ids != _ids(contract, text):
            yield f"the tokenizer makes other tokens of {text[:20]!r}"
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if identity(tokenizer) != contract.facts()["tokenizer"]:
        yield "tokenizer.json is not the run's: its rules may make other tokens of some text"


def _template_faults(
    tokenizer: PreTrainedTokenizerFast, contract: PromptContract, compared: Mapping[str, Turns]
) -> Iterator[str]:
    template = contract.template
    if template is None:
        return
    written = tokenizer.chat_template
    texts = dict(written) if isinstance(written, dict) else {"default": written}
    if not written:
        yield "the chat template is missing"
        return
    if any(texts.get(name) != text for name, text in template.texts.items()):
        yield "the chat template is not the run's"
    today = _of_today(template)
    for name, turns in compared.items():
        asks = turns[-1]["role"] != "assistant"
        theirs, ours = _rendered(tokenizer, turns, asks=asks), _meant(contract, today, turns, asks=asks)
        if theirs != ours:
            yield f"the chat template writes {name} with {_difference(contract, theirs, ours)}"


def _meant(contract: PromptContract, template: ChatTemplate, turns: Turns, *, asks: bool) -> list[int] | None:
    """The run's tokens of some turns; None where its template refuses them."""
    try:
        return _ids(contract, template.render(turns, asks=asks))
    except TemplateError:
        return None


def _rendered(tokenizer: PreTrainedTokenizerFast, turns: Turns, *, asks: bool) -> list[int] | None:
    """The tokens of plain transformers; None where the template refuses the turns."""
    messages = [dict(turn) for turn in turns]
    try:
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=asks, return_dict=False)
    except (TemplateError, ValueError, TypeError):
        return None
    found: list[int] = ids
    return found


def _of_today(template: ChatTemplate) -> ChatTemplate:
    """The run's template as it writes today: plain transformers knows no other day."""
    if not template.prints_date:
        return template
    return ChatTemplate(template.texts, variables=template.variables, day=date.today())


def _ids(contract: PromptContract, text: str) -> list[int]:
    ids: list[int] = contract.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _difference(contract: PromptContract, theirs: list[int] | None, ours: list[int] | None) -> str:
    if theirs is None or ours is None:
        return (
            "an error, where the run's wrote it" if theirs is None else "no error, where the run's refused it"
        )
    same = next((at for at, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), None)
    place = min(len(theirs), len(ours)) if same is None else same
    found, meant = (
        repr(contract.tokenizer.decode(ids[place : place + 1])) if place < len(ids) else "its end"
        for ids in (theirs, ours)
    )
    return f"{found} as token {place + 1}, the run with {meant}"


def _end_faults(folder: Path, contract: PromptContract) -> Iterator[str]:
    """Tokens that end an answer for the run and not by the folder's own settings, or the reverse."""
    path = folder / "generation_config.json"
    named: Any = None
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    except (ValueError, AttributeError) as error:
        yield f"generation_config.json cannot be read: {error}"
    ends = set(named) if isinstance(named, list) else set() if named is None else {named}
    for token in sorted(contract.end_ids - ends):
        yield f"the end token {_name(contract, token)} is missing in generation_config.json"
    for token in sorted(ends - contract.end_ids):
        yield f"generation_config.json ends answers at {_name(contract, token)}, which the run did not"


def _name(contract: PromptContract, token: int) -> str:
    return f"{contract.tokenizer.convert_ids_to_tokens(token)!r} ({token})"
