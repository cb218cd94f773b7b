"""Preference pairs as the conversation that was chosen: training is supervised, rejected answers unused.

What was judged is learned: the turns of the chosen side that the rejected one does not begin with. The shapes
are TRL's (https://huggingface.co/docs/trl/dataset_formats), with a prompt or without, as texts or as lists of
turns; UltraFeedback's, whose lists repeat the prompt; and the dialogues of Anthropic's HH-RLHF, one text with
the speakers' names in it (arXiv:2204.05862).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qadapt.data.conversation import Message
from qadapt.data.reading.message_formats import read_turns
from qadapt.data.reading.values import is_filled, parsed, text_of
from qadapt.errors import BadData

PROMPTS = ("prompt", "question", "instruction")
"""The columns that may hold what was asked."""
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def read_chosen(row: Mapping[Any, Any], *, place: str) -> tuple[Message, ...]:
    """The chosen conversation of a pair; of its answers only what was judged is learned.

    Raises:
        BadData: The sides are not of one kind, or what was asked cannot be told.
    """
    asked = _asked(row, place=place)
    sides = {key: _turns_or_text(row[key], key, place=place) for key in ("chosen", "rejected")}
    chosen, rejected = sides["chosen"], sides["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadData(
            f"{place}: of `chosen` and `rejected`, one is a text and the other a list of turns.",
            cure="Write both alike, or remove the row.",
        )
    if isinstance(chosen, str):
        assert isinstance(rejected, str)
        return _of_texts(asked, chosen, rejected, place=place)
    assert not isinstance(rejected, str)
    return _of_turns(asked, chosen, rejected, place=place)


def context(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, no answer of them learned."""
    return tuple(
        message._replace(is_learned=False) if message.role == "assistant" else message for message in messages
    )


def _asked(row: Mapping[Any, Any], *, place: str) -> str | tuple[Message, ...] | None:
    filled = {key: row[key] for key in PROMPTS if is_filled(row.get(key))}
    values = [*filled.values()]
    if not filled:
        return None
    if any(value != values[0] for value in values):
        raise BadData(
            f"{place}: what was asked stands in {' and in '.join(f'`{key}`' for key in filled)}.",
            cure="Keep one of them.",
        )
    return _turns_or_text(values[0], next(iter(filled)), place=place)


def _turns_or_text(value: object, key: str, *, place: str) -> str | tuple[Message, ...]:
    turns = parsed(value)
    if isinstance(value, list) or (isinstance(turns, list) and turns and all(map(_is_turn, turns))):
        return read_turns(turns, key, place=f"{place}, `{key}`")
    return text_of(value, key, place=place)


def _is_turn(value: object) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _of_turns(
    asked: str | tuple[Message, ...] | None,
    chosen: tuple[Message, ...],
    rejected: tuple[Message, ...],
    *,
    place: str,
) -> tuple[Message, ...]:
    before = (Message("user", asked),) if isinstance(asked, str) else asked or ()
    if not any(message.role == "user" for message in chosen):
        if not before:
            raise _unasked(place)
        return (*context(before), *chosen)
    if isinstance(asked, tuple) and chosen[: len(asked)] != asked:
        return (*context(before), *chosen)
    if isinstance(asked, str) and not any(message.content.strip() == asked.strip() for message in chosen):
        raise BadData(
            f"{place}: `chosen` asks for itself, and not what the prompt says.",
            cure="Keep one of the prompts.",
        )
    return _judged(chosen, rejected)


def _of_texts(
    asked: str | tuple[Message, ...] | None, chosen: str, rejected: str, *, place: str
) -> tuple[Message, ...]:
    if asked is None:
        sides = [_dialogue(side) for side in (chosen, rejected)]
        if not all(sides):
            raise _unasked(place)
        return _judged(*sides)
    if isinstance(asked, str):
        dialogue = _dialogue(asked)
        if dialogue and chosen.startswith(asked.rstrip()) and _dialogue(chosen):
            return _judged(_dialogue(chosen), _dialogue(rejected))
        open_answer = bool(dialogue) and dialogue[-1] == Message("assistant", "")
        asked = dialogue[: len(dialogue) - open_answer] or (Message("user", asked),)
        chosen = chosen.strip() if dialogue else chosen
    return (*context(asked), Message("assistant", chosen))


def _judged(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    """The chosen side, of which what both begin with is only context; the last turn always counts."""
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    same = min(same, len(chosen) - 1)
    return (*context(chosen[:same]), *chosen[same:])


def _dialogue(text: str) -> tuple[Message, ...]:
    """The turns of a text that begins with a speaker's name; none of another text."""
    parts = _SPEAKER.split(text.strip())
    if parts[0].strip() or len(parts) < 2:
        return ()
    return tuple(
        Message(_SPEAKERS[speaker], said.strip())
        for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    )


def _unasked(place: str) -> BadData:
    return BadData(
        f"{place}: nothing says what `chosen` answers: there is no prompt, and no dialogue in it.",
        cure="Name the column of the prompt in data.columns, or remove the row.",
    )
