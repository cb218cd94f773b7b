"""Tokens that a recipe adds to a tokenizer (`data.new_tokens`): added, or refused by name; those never seen.

Knows no model: the rows of their embeddings are `adapters/new_rows.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import AddedToken, PreTrainedTokenizerBase

from qadapt.data.tokens import Tokens
from qadapt.errors import BadRecipe


def add_new_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> tuple[int, ...]:
    """Adds special tokens, which texts are never cut into, and gives their ids in order.

    Raises:
        BadRecipe: A token is named twice, is white space, or is in the vocabulary already.
    """
    known = tokenizer.get_vocab()
    for number, token in enumerate(tokens):
        if token in tokens[:number]:
            raise BadRecipe(f"data.new_tokens names {token!r} twice.", cure="Name it once.")
        if not token.strip():
            raise BadRecipe(
                f"data.new_tokens has {token!r}, which is white space.", cure="Give a mark such as <tool>."
            )
        if token in known:
            raise BadRecipe(
                f"data.new_tokens has {token!r}, which is token {known[token]} of this model already.",
                cure="Leave it out: the adapter trains what the model makes of it.",
            )
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True
    )
    return tuple(tokenizer.get_vocab()[token] for token in tokens)


def absent_ids(rows: Iterable[Tokens], ids: Sequence[int]) -> tuple[int, ...]:
    """Those of the ids, one after the other, that no row has; reads rows only until all are found."""
    missing = set(ids)
    for row in rows if missing else ():
        new = row.ids[row.ids >= min(ids)]
        if len(new):
            missing.difference_update(new.tolist())
            if not missing:
                break
    return tuple(sorted(missing))
