"""Lists of turns as messages: those of OpenAI, and those of ShareGPT's exports. Knows turns, not rows.

OpenAI's are described at https://platform.openai.com/docs/api-reference/chat/create, `weight` in its guide to
fine-tuning; ShareGPT's calls and their results are written as LLaMA-Factory reads them
(https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md). What a message cannot hold is refused by
name: to leave it out would train on something else than the row says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qadapt.data.conversation import Message
from qadapt.data.reading.values import CORRECT, calls_of, is_filled, kind_of, parsed, shown, text_of
from qadapt.errors import BadData

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
}
"""OpenAI's roles, newer and older names, and Meta's for the result of a tool, each with ours."""
SPEAKERS = ROLES | {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function-response": "tool",
}
"""The names of ShareGPT's exports."""
CALLERS = ("function_call", "function-call", "tool_call")
"""Names under which such exports write an assistant's calls of tools, as JSON."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
MEDIA = {
    "image": "images",
    "images": "images",
    "video": "videos",
    "videos": "videos",
    "audio": "sounds",
    "audios": "sounds",
}
"""Keys of what is no text, by what stands there; rows and messages have the same."""
_UNSUPPORTED = MEDIA | {"refusal": "refusals apart from the content"}


def read_turns(value: object, column: str, *, place: str) -> tuple[Message, ...]:
    """The messages of a list of turns, or of a JSON text that is one; each turn may be of either kind.

    Args:
        value: The list.
        column: Where it stands in its row, for people.
        place: Names the row for people.

    Raises:
        BadData: It is no list of turns, or a turn holds what a message cannot.
    """
    turns = parsed(value)
    if not isinstance(turns, list) or not turns:
        raise BadData(f"{place}: `{column}` is not a list of turns.", cure=CORRECT)
    is_sharegpt = column == "conversations"
    return tuple(
        _read_turn(turn, is_sharegpt, f"{place}, message {number}") for number, turn in enumerate(turns, 1)
    )


def refuse(values: Mapping[Any, Any], unsupported: Mapping[str, str], *, place: str) -> None:
    """Refuses what a conversation cannot hold.

    Raises:
        BadData: A key of `unsupported` is filled; its value says what stands there.
    """
    for key, what in unsupported.items():
        if is_filled(values.get(key)):
            raise BadData(
                f"{place}: `{key}` is filled; {what} are not supported, and to leave them out would change "
                "what is learned.",
                cure="Remove the row, or take them out of it on purpose.",
            )


def _read_turn(turn: object, is_sharegpt: bool, place: str) -> Message:
    is_sharegpt = _is_sharegpt(turn, is_sharegpt)
    speaker_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    if not isinstance(turn, Mapping) or speaker_key not in turn:
        raise BadData(f"{place}: a message has {_keys(is_sharegpt)}.", cure=CORRECT)
    speaker = turn[speaker_key]
    name = speaker.lower() if isinstance(speaker, str) and is_sharegpt else speaker
    if is_sharegpt and isinstance(name, str) and name in CALLERS:
        return _read_call(turn, place=place)
    known = SPEAKERS if is_sharegpt else ROLES
    if not isinstance(name, str) or name not in known:
        names = ", ".join((*known, *CALLERS) if is_sharegpt else known)
        raise BadData(f"{place}: the role {shown(speaker)} is not one of {names}.", cure=CORRECT)
    return _read_message(turn, known[name], content_key, place=place)


def _is_sharegpt(turn: object, expected: bool) -> bool:
    """Of which kind a turn is: some exports call the list by one name and its turns by another."""
    if not isinstance(turn, Mapping) or ("from" in turn) == ("role" in turn):
        return expected
    return "from" in turn


def _keys(is_sharegpt: bool) -> str:
    return "`from` and `value`" if is_sharegpt else "`role` and `content`"


def _read_call(turn: Mapping[Any, Any], *, place: str) -> Message:
    """An assistant's turn that is nothing but calls."""
    refuse(turn, _UNSUPPORTED | {"tool_calls": "calls beside calls"}, place=place)
    calls = calls_of(turn.get("value"), "value", place=place)
    if not calls:
        raise BadData(f"{place}: `value` holds no call of a tool.", cure=CORRECT)
    reasoning = _reasoning(turn, "assistant", place=place)
    is_learned = _is_learned(turn, place=place)
    return Message("assistant", "", reasoning=reasoning, tool_calls=calls, is_learned=is_learned)


def _read_message(turn: Mapping[Any, Any], role: str, content_key: str, *, place: str) -> Message:
    if len(turn) == 2 and content_key in turn:  # nothing but a speaker and a text, as nearly all turns are
        return Message(role, text_of(turn[content_key], content_key, place=place))
    refuse(turn, _UNSUPPORTED, place=place)
    calls = _calls(turn, role, place=place)
    if content_key not in turn and not calls:
        raise BadData(f"{place}: a message has {_keys(content_key == 'value')}.", cure=CORRECT)
    content = turn.get(content_key)
    is_empty = bool(calls) and (content is None or content == [])
    return Message(
        role,
        "" if is_empty else text_of(content, content_key, place=place),
        name=text_of(turn["name"], "name", place=place) if turn.get("name") else None,
        reasoning=_reasoning(turn, role, place=place),
        tool_calls=calls,
        tool_call_id=_call_id(turn, role, place=place),
        is_learned=role != "assistant" or _is_learned(turn, place=place),
    )


def _calls(turn: Mapping[Any, Any], role: str, *, place: str) -> tuple[Mapping[str, Any], ...]:
    filled = [key for key in ("tool_calls", "function_call") if is_filled(turn.get(key))]
    if not filled:
        return ()
    if role != "assistant":
        raise BadData(f"{place}: `{filled[0]}` is filled, but only an assistant calls tools.", cure=CORRECT)
    if len(filled) > 1:
        raise BadData(f"{place}: calls of tools stand in `tool_calls` and in `function_call`.", cure=CORRECT)
    return calls_of(turn[filled[0]], filled[0], place=place)


def _call_id(turn: Mapping[Any, Any], role: str, *, place: str) -> str | None:
    if not is_filled(turn.get("tool_call_id")):
        return None
    if role != "tool":
        raise BadData(f"{place}: `tool_call_id` is filled, but only a tool answers a call.", cure=CORRECT)
    return text_of(turn["tool_call_id"], "tool_call_id", place=place)


def _reasoning(turn: Mapping[Any, Any], role: str, *, place: str) -> str | None:
    texts = {key: text_of(turn[key], key, place=place) for key in _REASONING if is_filled(turn.get(key))}
    if not texts:
        return None
    first = next(iter(texts))
    if role != "assistant":
        raise BadData(
            f"{place}: `{first}` is filled, but only an assistant's reasoning is known.", cure=CORRECT
        )
    if len(set(texts.values())) > 1:
        raise BadData(
            f"{place}: {' and '.join(f'`{key}`' for key in texts)} differ.", cure="Keep one of them."
        )
    return texts[first]


def _is_learned(turn: Mapping[Any, Any], *, place: str) -> bool:
    """Whether an answer counts; on what is not learned anyway these keys say nothing."""
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        value = weight if isinstance(weight, int | float) else kind_of(weight)
        raise BadData(
            f"{place}: `weight` is {value}; as OpenAI defines it, a message counts (1) or does not (0).",
            cure="Give 0 or 1, or remove the row.",
        )
    if train is not None and not isinstance(train, bool):
        raise BadData(f"{place}: `train` is {kind_of(train)}, not true or false.", cure=CORRECT)
    if weight is not None and train is not None and bool(weight) != train:
        raise BadData(f"{place}: `weight` and `train` contradict each other.", cure="Keep one of them.")
    return bool(weight) if weight is not None else train is not False
