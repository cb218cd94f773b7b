"""Rows of tokens as LLaMA-Factory stores them; packed ones as its `neat_packing` makes them. Pure.

Those are filled to the full length, and the attention mask counts the documents of a row from 1.
"""

from __future__ import annotations

from side import IGNORED

Row = dict[str, list[int]]


def filled(rows: list[Row]) -> list[Row]:
    return [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]


def packed(rows: list[Row], length: int) -> list[Row]:
    """Rows of `length` + 1 tokens, each filled with the longest rows that still fit."""
    waiting = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    made: list[Row] = []
    while waiting:
        ids: list[int] = []
        labels: list[int] = []
        mask: list[int] = []
        places: list[int] = []
        document = 0
        for row in list(waiting):
            if len(ids) + len(row["input_ids"]) <= length:
                waiting.remove(row)
                document += 1
                ids += row["input_ids"]
                labels += row["labels"]
                mask += [document] * len(row["input_ids"])
                places += range(len(row["input_ids"]))
        empty = length + 1 - len(ids)
        made.append(
            {
                "input_ids": ids + [0] * empty,
                "labels": labels + [IGNORED] * empty,
                "attention_mask": mask + [0] * empty,
                "position_ids": places + [0] * empty,
            }
        )
    return made


def real_tokens(rows: list[Row], per_step: int) -> list[int]:
    counts = [sum(place > 0 for place in row["attention_mask"]) for row in rows]
    return [sum(counts[first : first + per_step]) for first in range(0, len(counts), per_step)]
