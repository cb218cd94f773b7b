"""What a row looks like, and the conversation in it.

A conversation is a list of messages with a role and a text. Knows the shapes of rows, no files and no tokens.
What a row holds and a conversation cannot (tool calls, images, a rejected answer) is refused by name: to
leave it out would train on something else than the row says.

The shapes are those of OpenAI's fine-tuning files, of ShareGPT's exports, of Stanford Alpaca, and of TRL; an
Alpaca `input` follows its `instruction` after an empty line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from qadapt.data.conversation import Conversation, Message
from qadapt.errors import BadData

Format = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "question-answer"]
ROLES = ("system", "user", "assistant")
CORRECT = "Correct the row, or remove it."

_KEYS: dict[Format, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction", "output"),),
    "prompt-completion": (("prompt", "completion"),),
    "question-answer": (("question", "answer"), ("query", "response")),
}
"""The columns of each format; of several ways, a row has one."""

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "observation", "ipython")

_UNSUPPORTED_IN_ROW = {
    "tools": "tools",
    "functions": "tools",
    "image": "images",
    "images": "images",
    "video": "videos",
    "videos": "videos",
    "audio": "sounds",
    "audios": "sounds",
    "history": "earlier turns in `history`",
}
_UNSUPPORTED_IN_MESSAGE = {
    "tool_calls": "tool calls",
    "function_call": "tool calls",
    "tool_call_id": "tool calls",
    "images": "images",
    "audio": "sounds",
    "reasoning_content": "reasoning apart from the content",
    "thinking": "reasoning apart from the content",
}
_UNSUPPORTED_ROWS: dict[tuple[str, ...], str] = {
    ("chosen", "rejected"): "a preference pair (`chosen`, `rejected`)",
    ("prompt", "completion", "label"): "a judged answer (`completion`, `label`)",
    ("text",): "raw text (`text`)",
}


def map_columns(row: object, columns: Mapping[str, str], *, place: str) -> object:
    """The row with some columns under the names that the formats know.

    Args:
        row: What a file holds in one place.
        columns: Name in the format → name in the file; the other columns stay as they are.
        place: Names the row for people.

    Raises:
        BadData: The row has no column of a name in the file.
    """
    if not columns or not isinstance(row, Mapping):
        return row
    for name in columns.values():
        if name not in row:
            raise BadData(
                f"{place}: the row has no column {name!r}, which data.columns names; it has {_listed(row)}.",
                cure="Correct data.columns, or the row.",
            )
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return kept | {known: row[name] for known, name in columns.items()}


def recognise(row: object, *, place: str) -> Format:
    """The format of a row, by its keys.

    Raises:
        BadData: The row has the keys of no format, of several, or of a kind that is not trained on.
    """
    if not isinstance(row, Mapping):
        raise BadData(f"{place}: a row is an object; this one is {_kind(row)}.", cure=CORRECT)
    fitting = [name for name in _KEYS if _fits(row, name)]
    for keys, what in _UNSUPPORTED_ROWS.items():
        if all(key in row for key in keys) and (len(keys) > 1 or not fitting):
            raise BadData(
                f"{place}: this row is {what}, which qadapt does not train on.",
                cure="Give conversations. If the row holds one under other names, state data.format or "
                "data.columns.",
            )
    if len(fitting) > 1:
        raise BadData(
            f"{place}: the row's keys fit several formats: {', '.join(fitting)}.",
            cure=f"State which one is meant, such as data.format={fitting[0]}.",
        )
    if not fitting:
        raise BadData(
            f"{place}: a row is an object with `messages`, or `prompt` and `completion`, or the keys of "
            f"another format ({', '.join(_KEYS)}); this one has {_listed(row)}.",
            cure="Name its columns in data.columns, such as data.columns={prompt: question_text}; or correct "
            "the row.",
        )
    return fitting[0]


def read_conversation(row: object, form: Format, *, place: str) -> Conversation:
    """The conversation of a row.

    Raises:
        BadData: The row is no conversation with at least one assistant turn, or holds what one cannot hold.
    """
    if not isinstance(row, Mapping) or not _fits(row, form):
        keys = ", or ".join(" and ".join(f"`{key}`" for key in way) for way in _KEYS[form])
        raise BadData(f"{place}: the row has no {keys}.", cure=CORRECT)
    _refuse(row, _UNSUPPORTED_IN_ROW, place=place)
    if form in ("messages", "sharegpt"):
        messages = _read_turns(row, form, place=place)
    else:
        messages = _read_texts(row, form, place=place)
    messages = _with_system(row, messages, place=place)
    if not any(message.role == "assistant" and message.content for message in messages):
        raise BadData(f"{place}: no assistant turn, so there is nothing to learn.", cure="Remove the row.")
    return Conversation(messages, place)


def _fits(row: Mapping[Any, Any], form: Format) -> bool:
    return any(all(key in row for key in way) for way in _KEYS[form])


def _read_turns(row: Mapping[Any, Any], form: Format, *, place: str) -> tuple[Message, ...]:
    column = _KEYS[form][0][0]
    turns = _parsed(row[column])
    if not isinstance(turns, list) or not turns:
        raise BadData(f"{place}: `{column}` is not a list of turns.", cure=CORRECT)
    read = _read_message if form == "messages" else _read_sharegpt
    return tuple(read(turn, place=f"{place}, message {number}") for number, turn in enumerate(turns, 1))


def _parsed(turns: object) -> object:
    """The turns of a table's cell, which holds them as JSON."""
    if not isinstance(turns, str) or not turns.lstrip().startswith("["):
        return turns
    try:
        return json.loads(turns)
    except (ValueError, RecursionError):
        return turns


def _read_texts(row: Mapping[Any, Any], form: Format, *, place: str) -> tuple[Message, ...]:
    asked, answered = next(way for way in _KEYS[form] if all(key in row for key in way))
    question, answer = (_text(row[key], key, place=place) for key in (asked, answered))
    if form == "alpaca" and row.get("input"):
        question = f"{question}\n\n{_text(row['input'], 'input', place=place)}"
    return Message("user", question), Message("assistant", answer)


def _with_system(row: Mapping[Any, Any], messages: tuple[Message, ...], *, place: str) -> tuple[Message, ...]:
    """The messages after the row's own system prompt, if it has one beside them."""
    if not row.get("system"):
        return messages
    prompt = _text(row["system"], "system", place=place)
    if any(message.role == "system" for message in messages):
        raise BadData(
            f"{place}: there are two system prompts, in `system` and in a message.", cure="Keep one of them."
        )
    return Message("system", prompt), *messages


def _read_message(turn: object, *, place: str) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn:
        raise BadData(f"{place}: a message has `role` and `content`.", cure=CORRECT)
    role = turn["role"]
    _refuse_tools(role, place=place)
    _refuse(turn, _UNSUPPORTED_IN_MESSAGE, place=place)
    if "content" not in turn:
        raise BadData(f"{place}: a message has `role` and `content`.", cure=CORRECT)
    if role not in ROLES:
        raise BadData(f"{place}: the role {_shown(role)} is not one of {', '.join(ROLES)}.", cure=CORRECT)
    _refuse_weight(turn, role, place=place)
    name = _text(turn["name"], "name", place=place) if turn.get("name") else None
    return Message(role, _text(turn["content"], "content", place=place), name)


def _read_sharegpt(turn: object, *, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise BadData(f"{place}: a message has `from` and `value`.", cure=CORRECT)
    if (
        "from" not in turn and "role" in turn
    ):  # some exports call the list by one name and its turns by another
        return _read_message(turn, place=place)
    if "from" not in turn or "value" not in turn:
        raise BadData(f"{place}: a message has `from` and `value`.", cure=CORRECT)
    speaker = turn["from"].lower() if isinstance(turn["from"], str) else turn["from"]
    _refuse_tools(speaker, place=place)
    _refuse(turn, _UNSUPPORTED_IN_MESSAGE, place=place)
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        raise BadData(
            f"{place}: the role {_shown(turn['from'])} is not one of {', '.join(_SHAREGPT_ROLES)}.",
            cure=CORRECT,
        )
    _refuse_weight(turn, _SHAREGPT_ROLES[speaker], place=place)
    return Message(_SHAREGPT_ROLES[speaker], _text(turn["value"], "value", place=place))


def _refuse(values: Mapping[Any, Any], unsupported: Mapping[str, str], *, place: str) -> None:
    """Refuses what a conversation cannot hold; tables fill columns that a row lacks with null or nothing."""
    for key, what in unsupported.items():
        value = values.get(key)
        if value not in (None, "", "[]", [], {}):
            raise BadData(
                f"{place}: `{key}` is filled; {what} are not supported, and to leave them out would change "
                "what is learned.",
                cure="Remove the row, or take them out of it on purpose.",
            )


def _refuse_tools(role: object, *, place: str) -> None:
    if role in _TOOL_ROLES:
        raise BadData(
            f"{place}: the role {role!r} belongs to tool calls, which are not supported.",
            cure="Remove the row.",
        )


def _refuse_weight(turn: Mapping[Any, Any], role: str, *, place: str) -> None:
    """Refuses an answer that is to count less or not at all; what is not learned has no weight anyway."""
    if role == "assistant" and turn.get("weight") not in (None, 1):
        raise BadData(
            f"{place}: `weight` is not 1; weights of single messages are not supported, every answer counts.",
            cure="Remove the row, or the weight.",
        )


def _text(value: object, key: str, *, place: str) -> str:
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        kinds = ", ".join(sorted({_shown(part.get("type")) for part in value}))
        raise BadData(
            f"{place}: `{key}` is a list of parts ({kinds}); images and other parts are not supported, only "
            "a text is.",
            cure="Write the content as one text, or remove the row.",
        )
    if not isinstance(value, str):
        raise BadData(f"{place}: `{key}` is {_kind(value)}, not a text.", cure=CORRECT)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadData(
                f"{place}: `{key}` holds half of a surrogate pair, which is no character.", cure=CORRECT
            ) from None
    return value


def _kind(value: object) -> str:
    return "empty" if value is None else type(value).__name__


def _listed(row: Mapping[Any, Any]) -> str:
    """The keys of a row for a message, which a damaged row must not fill."""
    return f"the keys {_few(map(_shown, row))}" if row else "no keys"


def _few(texts: Iterable[str], most: int = 12) -> str:
    listed = list(texts)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _shown(value: object, most: int = 60) -> str:
    if not isinstance(value, str):
        return _kind(value)
    return repr(value) if len(value) <= most else f"{value[:most]!r}..."
