"""`BatchShape`: all that is data-dependent in a micro-batch, given to the dry run instead of guessed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch as its tensors see it.

    Args:
        rows: Rows, filled up to the longest; 1 if they are packed.
        length: Tokens of the longest; of all, if they are packed.
        positions: Positions of a row that reach the head, as any row learns their next token.
        supervised_tokens: Tokens learned in all, at most `rows` times `positions`.
        expert_tokens: Tokens of each routed expert that gets any, in a mixture of experts that runs them one
            after another; empty where grouped products take them all at once, whatever the routing.
        documents: Tokens of each row that is packed, in their order; empty where rows are filled up.
    """

    rows: int
    length: int
    positions: int
    supervised_tokens: int
    expert_tokens: tuple[int, ...] = ()
    documents: tuple[int, ...] = ()


def packed_shape(documents: tuple[int, ...], *, supervised_tokens: int) -> BatchShape:
    """A packed micro-batch: only what is learned reaches the head."""
    tokens = sum(documents)
    return BatchShape(1, tokens, supervised_tokens, supervised_tokens, documents=documents)


def worst_routing(*, tokens: int, per_token: int) -> tuple[int, ...]:
    """All tokens go to the same experts, which take the most at once."""
    return (tokens,) * per_token
