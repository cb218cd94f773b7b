"""The model's own tokenizer: read from its folder, and extended by new tokens.

Only fast tokenizers (the `tokenizers` library) are used: they alone say which characters a token stands for.
Knows no templates, no rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qadapt.errors import BadModel, BadRecipe


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model folder, set to cut and fill up nothing.

    Raises:
        BadModel: It cannot be read, or is no fast one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadModel(
            f"The tokenizer in {folder} cannot be read: {reason}", cure="Get the model again."
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BadModel(
            f"The tokenizer in {folder} is no fast one (tokenizer.json), so masks cannot be exact.",
            cure="Use a copy of the model whose folder has a tokenizer.json.",
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerFast, names: Sequence[str]) -> tuple[int, ...]:
    """Adds special tokens to the vocabulary; their ids follow the last one.

    Raises:
        BadRecipe: A name is in the vocabulary already, is given twice, or has white space around it.
    """
    for at, name in enumerate(names):
        known = tokenizer.backend_tokenizer.token_to_id(name)
        if known is not None or name in names[:at]:
            why = "is given twice" if known is None else f"is in the model's vocabulary already, as {known}"
            raise BadRecipe(f"data.new_tokens: {name!r} {why}.", cure="Take it off the list.")
        if name != name.strip():
            raise BadRecipe(
                f"data.new_tokens: {name!r} begins or ends with white space.", cure="Give it without."
            )
    tokenizer.add_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True
    )
    return tuple(map(tokenizer.backend_tokenizer.get_vocab().__getitem__, names)) if names else ()


def identity(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over everything that decides how a text becomes tokens."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def special_texts(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Texts of the special tokens, with their ids."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content: index for index, token in added.items() if token.special and token.content}


def starts_with_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer puts its first token before every text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer.backend_tokenizer.encode("a").ids[:1] == [bos]


def declared_ends(tokenizer: PreTrainedTokenizerFast, folder: Path) -> frozenset[int]:
    """Tokens that end an answer by the model's own files: the tokenizer's, and the generation config's."""
    ends = _values(folder / "generation_config.json").get("eos_token_id")
    named = ends if isinstance(ends, list) else [ends]
    return frozenset(token for token in [tokenizer.eos_token_id, *named] if isinstance(token, int))


def embedding_rows(folder: Path) -> int | None:
    """Rows of the model's embedding table; None if its configuration does not say."""
    config = _values(folder / "config.json")
    inner = config.get("text_config")
    rows = (inner if isinstance(inner, Mapping) else config).get("vocab_size")
    return rows if isinstance(rows, int) else None


def _values(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
