"""Whether a GGUF file asks as the run did: its vocabulary, template and end tokens against the contract.

Read from the file's front as llama.cpp reads it. That llama.cpp then cuts texts as the tokenizer does is its
own code's affair: `gguf_tokenizer.py` refuses what it is known to do otherwise. Knows no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from qadapt.data.prompt import PromptContract
from qadapt.export.gguf_front import Value, read_front
from qadapt.export.gguf_tokenizer import KNOWN_ENDS
from qadapt.export.prompt_proof import PromptProof

_SPACE = "\u2581"
_ENDS = ("eos", "eot", "eom")
"""What a file can name of tokens that end an answer."""
_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"


def prove_gguf_prompt(path: Path, contract: PromptContract) -> PromptProof:
    """Compares what a GGUF file says of prompts with a run's contract.

    Args:
        path: The file.
        contract: The run's.

    Raises:
        BadModel: It is no whole GGUF file.
    """
    values = read_front(path).values
    faults = (
        *_vocabulary_faults(values, contract),
        *_template_faults(values, contract),
        *_end_faults(values, contract),
    )
    return PromptProof(0, 0, tuple(sorted(contract.end_ids)), faults)


def _vocabulary_faults(values: Mapping[str, Value], contract: PromptContract) -> Iterator[str]:
    stored = values.get(f"{_PREFIX}tokens")
    tokens = list(stored) if isinstance(stored, list) else []
    texts: dict[int, set[str]] = {}
    for text, number in contract.tokenizer.get_vocab().items():
        texts.setdefault(number, set()).update((text, text.replace(_SPACE, " ")))
    odd = [each for each in sorted(texts) if each >= len(tokens) or tokens[each] not in texts[each]]
    if odd:
        found = repr(tokens[odd[0]]) if odd[0] < len(tokens) else "nothing"
        yield (
            f"the vocabulary in the file has {found} as token {odd[0]}, the run {_name(contract, odd[0])}, "
            f"and {len(odd) - 1} more differ"
        )
    merges = json.loads(contract.tokenizer.backend_tokenizer.to_str())["model"].get("merges")
    if f"{_PREFIX}merges" in values and values[f"{_PREFIX}merges"] != [" ".join(pair) for pair in merges]:
        yield "the merges in the file are not those of the run's tokenizer"
    bos = values.get(f"{_PREFIX}bos_token_id")
    if bos != contract.tokenizer.bos_token_id:
        yield f"the file begins texts with token {bos}, the run with {contract.tokenizer.bos_token_id}"


def _template_faults(values: Mapping[str, Value], contract: PromptContract) -> Iterator[str]:
    wanted = {} if contract.template is None else contract.template.texts
    for name, text in wanted.items():
        found = values.get(_TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}")
        if found is None:
            yield "the chat template is missing"
        elif found != text:
            yield "the chat template is not the run's"


def _end_faults(values: Mapping[str, Value], contract: PromptContract) -> Iterator[str]:
    """Tokens that end an answer for the run and not by the file, or the reverse.

    A file names three at most; llama.cpp knows some more by their texts.
    """
    stored = [values.get(f"{_PREFIX}{name}_token_id") for name in _ENDS]
    named = {number for number in stored if isinstance(number, int)}
    for token in sorted(contract.end_ids - named):
        is_known = contract.tokenizer.convert_ids_to_tokens(token) in KNOWN_ENDS
        if not is_known and len(named) < len(_ENDS):
            yield f"the end token {_name(contract, token)} is missing in the file"
    for token in sorted(named - contract.end_ids):
        yield f"the file ends answers at {_name(contract, token)}, which the run did not"


def _name(contract: PromptContract, token: int) -> str:
    return f"{contract.tokenizer.convert_ids_to_tokens(token)!r} ({token})"
