"""What a row looks like, and the conversation or the raw text in it.

Knows the shapes of rows, no files, no tokens, and not what is learned. What a row holds and a conversation
cannot (images, a judged answer) is refused by name: to leave it out would train on something else than the
row says.

The shapes are those of OpenAI's fine-tuning files, of ShareGPT's exports, of Stanford Alpaca, of TRL (prompt
and completion, preference pairs), and of raw text. An Alpaca `input` follows its `instruction` after an empty
line; its `history` is LLaMA-Factory's, whose answers are learned like the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from qadapt.data.conversation import Conversation, Document, Message, Row
from qadapt.data.reading.message_formats import MEDIA, read_turns, refuse
from qadapt.data.reading.preference import context, read_chosen
from qadapt.data.reading.values import CORRECT, is_filled, kind_of, listed, parsed, text_of, tools_of
from qadapt.errors import BadData

Format = Literal[
    "messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "preference", "text"
]

_KEYS: dict[Format, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction", "output"),),
    "prompt-completion": (("prompt", "completion"),),
    "question-answer": (("question", "answer"), ("query", "response")),
    "preference": (("chosen", "rejected"),),
    "text": (("text",),),
}
"""The columns of each format; of several ways, a row has one."""

_BESIDE: dict[Format, tuple[str, ...]] = {
    "alpaca": ("context",),
    "prompt-completion": ("context", "input"),
    "question-answer": ("context", "input"),
}
"""Columns beside a question that often belong to it."""
_SYSTEM = ("system", "system_prompt")
_OF_TEXTS = ("alpaca", "prompt-completion", "question-answer")
_TOOLS = ("tools", "functions")
_UNSUPPORTED_ROWS: dict[tuple[str, ...], str] = {
    ("prompt", "completion", "label"): "a judged answer (`completion`, `label`)",
    ("text", "label"): "a classified text (`text`, `label`)",
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
                f"{place}: the row has no column {name!r}, which data.columns names; it has {listed(row)}.",
                cure="Correct data.columns, or the row.",
            )
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return kept | {known: row[name] for known, name in columns.items()}


def recognise(row: object, *, place: str) -> Format:
    """The format of a row, by its keys.

    Raw text is what nothing else fits: an Alpaca row with its whole text beside it is an Alpaca row. A pair
    with its chosen side repeated as `messages` (UltraFeedback) is a pair.

    Raises:
        BadData: The row has the keys of no format, of several, or of a kind that is not trained on.
    """
    if not isinstance(row, Mapping):
        raise BadData(f"{place}: a row is an object; this one is {kind_of(row)}.", cure=CORRECT)
    fitting = [name for name in _KEYS if _fits(row, name)]
    if len(fitting) > 1 and "text" in fitting:
        fitting.remove("text")
    if fitting == ["messages", "preference"] and row["messages"] == row["chosen"]:
        fitting.remove("messages")
    for keys, what in _UNSUPPORTED_ROWS.items():
        if all(key in row for key in keys) and (keys[0] != "text" or fitting == ["text"]):
            raise BadData(
                f"{place}: this row is {what}, which qadapt does not train on.",
                cure="Give conversations; or, if it is meant as a plainer kind, state that, such as "
                "data.format=prompt-completion.",
            )
    if len(fitting) > 1:
        raise BadData(
            f"{place}: the row's keys fit several formats: {', '.join(fitting)}.",
            cure=f"State which one is meant, such as data.format={fitting[0]}.",
        )
    if not fitting:
        raise BadData(
            f"{place}: a row is an object with `messages`, or `prompt` and `completion`, or the keys of "
            f"another format ({', '.join(_KEYS)}); this one has {listed(row)}.",
            cure="Name its columns in data.columns, such as data.columns={prompt: question_text}; or correct "
            "the row.",
        )
    _check_context(row, fitting[0], place=place)
    return fitting[0]


def _check_context(row: Mapping[Any, Any], form: Format, *, place: str) -> None:
    """Refuses to guess whether what stands beside a question belongs to it; a stated format says no."""
    beside = next((key for key in _BESIDE.get(form, ()) if key in row), None)
    if beside is not None:
        asked, answered = next(way for way in _KEYS[form] if all(key in row for key in way))
        raise BadData(
            f"{place}: the row has `{beside}` beside `{asked}`; whether it is part of the question cannot be "
            "told.",
            cure=f"To put it there, set data.columns={{instruction: {asked}, input: {beside}, output: "
            f"{answered}}}; to leave it out, state data.format={form}.",
        )


def read_row(row: object, form: Format, *, place: str) -> Row:
    """The conversation of a row, or its raw text.

    Raises:
        BadData: The row has not the columns of its format, or holds what a conversation cannot hold.
    """
    if not isinstance(row, Mapping) or not _fits(row, form):
        keys = ", or ".join(" and ".join(f"`{key}`" for key in way) for way in _KEYS[form])
        found = f"has {listed(row)}" if isinstance(row, Mapping) else f"is {kind_of(row)}"
        raise BadData(
            f"{place}: the row has no {keys}, which the format {form} takes; it {found}.",
            cure="Correct the row; or data.format, if the rows are of another one.",
        )
    unsupported = MEDIA if form in _OF_TEXTS else MEDIA | {"history": "earlier turns in `history`"}
    refuse(row, unsupported, place=place)
    if form == "text":
        return _document(row, place=place)
    if form in ("messages", "sharegpt"):
        column = _KEYS[form][0][0]
        messages = read_turns(row[column], column, place=place)
    elif form == "preference":
        messages = read_chosen(row, place=place)
    else:
        messages = _read_pair(row, form, place=place)
    messages = _with_system(row, messages, place=place)
    return Conversation(messages, place, _tools(row, place=place))


def _fits(row: Mapping[Any, Any], form: Format) -> bool:
    return any(all(key in row for key in way) for way in _KEYS[form])


def _document(row: Mapping[Any, Any], *, place: str) -> Document:
    refuse(row, dict.fromkeys(_TOOLS, "tools beside raw text"), place=place)
    text = text_of(row["text"], "text", place=place)
    if not text.strip():
        raise BadData(f"{place}: `text` is empty, so there is nothing to learn.", cure="Remove the row.")
    return Document(text, place)


def _read_pair(row: Mapping[Any, Any], form: Format, *, place: str) -> tuple[Message, ...]:
    ways = [way for way in _KEYS[form] if all(key in row for key in way)]
    if len(ways) > 1:
        names = " and ".join(f"`{way[0]}`, `{way[1]}`" for way in ways)
        raise BadData(
            f"{place}: the row has two pairs: {names}.",
            cure="Name one pair in data.columns, or remove the other.",
        )
    asked, answered = ways[0]
    if form == "prompt-completion" and (isinstance(row[asked], list) or isinstance(row[answered], list)):
        return _read_turns_and_answer(row, place=place)
    question, answer = (text_of(row[key], key, place=place) for key in (asked, answered))
    if form == "alpaca" and row.get("input"):
        question = f"{question}\n\n{text_of(row['input'], 'input', place=place)}"
    return *_history(row, place=place), Message("user", question), Message("assistant", answer)


def _read_turns_and_answer(row: Mapping[Any, Any], *, place: str) -> tuple[Message, ...]:
    """TRL's conversational form: both are lists of turns, and only the completion's answers are learned."""
    if not (isinstance(row["prompt"], list) and isinstance(row["completion"], list)):
        raise BadData(
            f"{place}: of `prompt` and `completion`, one is a list of turns and the other is not.",
            cure="Write both as texts, or both as lists of turns.",
        )
    prompt = read_turns(row["prompt"], "prompt", place=f"{place}, `prompt`")
    return *context(prompt), *read_turns(row["completion"], "completion", place=f"{place}, `completion`")


def _history(row: Mapping[Any, Any], *, place: str) -> tuple[Message, ...]:
    """Earlier questions with their answers."""
    if not is_filled(row.get("history")):
        return ()
    history = parsed(row["history"])
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise BadData(f"{place}: `history` is no list of pairs [question, answer].", cure=CORRECT)
    return tuple(
        Message(role, text_of(text, "history", place=place))
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    )


def _with_system(row: Mapping[Any, Any], messages: tuple[Message, ...], *, place: str) -> tuple[Message, ...]:
    """The messages after the row's own system prompt, if it has one beside them."""
    given = {key: text_of(row[key], key, place=place) for key in _SYSTEM if row.get(key)}
    stated = {message.content for message in messages if message.role == "system"}
    if not given or stated == set(given.values()):
        return messages
    if stated or len(set(given.values())) > 1:
        places = [f"`{key}`" for key in given] + ["a message"] * bool(stated)
        raise BadData(
            f"{place}: there are two system prompts, in {' and in '.join(places)}.", cure="Keep one of them."
        )
    return Message("system", next(iter(given.values()))), *messages


def _tools(row: Mapping[Any, Any], *, place: str) -> tuple[Mapping[str, Any], ...]:
    filled = [key for key in _TOOLS if is_filled(row.get(key))]
    if len(filled) > 1:
        raise BadData(f"{place}: tools stand in `tools` and in `functions`.", cure="Keep one of them.")
    return tools_of(row[filled[0]], filled[0], place=place) if filled else ()
