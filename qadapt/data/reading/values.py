"""Values in a row: a text, a tool, a call of one; or the error that says what stands there instead.

Knows single values, not which keys a row has. Tools and tool calls are those of OpenAI's chat completions:
https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from qadapt.errors import BadData

CORRECT = "Correct the row, or remove it."
MOST_DEPTH = 60
"""Values of tools and calls are nested at most so deeply; a template writes them out recursively."""


def text_of(value: object, key: str, *, place: str) -> str:
    """A text, or the texts of a list of text parts one after the other, as OpenAI writes contents.

    Raises:
        BadData: It is something else, or no characters.
    """
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        return "".join(_part_text(part, key, place=place) for part in value)
    if not isinstance(value, str):
        raise BadData(f"{place}: `{key}` is {kind_of(value)}, not a text.", cure=CORRECT)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadData(
                f"{place}: `{key}` holds half of a surrogate pair, which is no character.", cure=CORRECT
            ) from None
    return value


def _part_text(part: Mapping[Any, Any], key: str, *, place: str) -> str:
    if part.get("type") != "text":
        raise BadData(
            f"{place}: `{key}` has a part of the type {shown(part.get('type'))}; images and other parts are "
            "not supported, only texts are.",
            cure="Take the part out, or remove the row.",
        )
    if not isinstance(part.get("text"), str):
        raise BadData(f"{place}: `{key}` has a part of text without `text`.", cure=CORRECT)
    return text_of(part["text"], key, place=place)


def is_filled(value: object) -> bool:
    """Whether there is anything; tables fill columns that a row lacks with null or nothing."""
    is_nothing = value is None or (isinstance(value, str | list | tuple | Mapping) and len(value) == 0)
    return not is_nothing and not (isinstance(value, str) and value.strip() in ("[]", "{}"))


def parsed(value: object, start: str = "[") -> object:
    """The value of a text that is JSON and begins so, as cells of tables hold lists; others as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith(start):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def tools_of(value: object, key: str, *, place: str) -> tuple[Mapping[str, Any], ...]:
    """The functions an assistant may call, each `{"type": "function", "function": {"name": ..., ...}}`.

    Also of a JSON text, and of functions without that frame (OpenAI's older `functions`).

    Raises:
        BadData: They are something else.
    """
    given = parsed(value)
    if not isinstance(given, list):
        raise BadData(f"{place}: `{key}` is no list of tools.", cure=CORRECT)
    return tuple(_tool(each, f"{place}, tool {number}") for number, each in enumerate(given, 1))


def _tool(value: object, place: str) -> Mapping[str, Any]:
    tool = parsed(value, "{")
    if not isinstance(tool, Mapping):
        raise BadData(f"{place}: a tool is an object; this one is {kind_of(tool)}.", cure=CORRECT)
    if tool.get("type", "function") != "function" and "function" not in tool and "parameters" not in tool:
        raise BadData(
            f"{place}: the tool is of the type {shown(tool['type'])}; only functions are supported.",
            cure="Take it out, or remove the row.",
        )
    frame: Mapping[Any, Any] = tool if "function" in tool else {"type": "function", "function": tool}
    function = frame["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadData(f"{place}: a tool is a function with a `name`.", cure=CORRECT)
    described = plain(function, "function", place=place)
    kept = {name: plain(inner, name, place=place) for name, inner in frame.items() if name != "function"}
    return {"type": "function"} | kept | {"function": described}


def calls_of(value: object, key: str, *, place: str) -> tuple[Mapping[str, Any], ...]:
    """Calls of tools, each `{"type": "function", "id": ..., "function": {"name": ..., "arguments": {...}}}`.

    Also of a JSON text, of one call that is no list, and of calls without that frame.

    Raises:
        BadData: They are something else, or arguments are no JSON object.
    """
    given = parsed(parsed(value), "{")
    calls = given if isinstance(given, list) else [given]
    return tuple(_call(each, key, f"{place}, call {number}") for number, each in enumerate(calls, 1))


def _call(value: object, key: str, place: str) -> Mapping[str, Any]:
    call = parsed(value, "{")
    if not isinstance(call, Mapping):
        raise BadData(f"{place}: `{key}` is no call of a tool in JSON: {shown(call)}.", cure=CORRECT)
    if call.get("type") not in (None, "function"):
        raise BadData(
            f"{place}: the call is of the type {shown(call['type'])}; only functions are supported.",
            cure="Remove the row.",
        )
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadData(f"{place}: a call is of a function with a `name`.", cure=CORRECT)
    name = text_of(function["name"], "name", place=place)
    arguments = _arguments(function.get("arguments"), place=place)
    head = {"type": "function"}
    if call.get("id") is not None:
        head["id"] = text_of(call["id"], "id", place=place)
    return head | {"function": {"name": name, "arguments": arguments}}


def _arguments(value: object, *, place: str) -> dict[str, Any]:
    """Arguments as values, as chat templates take them; OpenAI writes them as a JSON text."""
    given = value
    if isinstance(value, str):
        try:
            given = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadData(
                f"{place}: `arguments` is no JSON object: {shown(value)} ({error}).", cure=CORRECT
            ) from None
    if not isinstance(given, Mapping):
        raise BadData(f"{place}: `arguments` is no JSON object but {kind_of(given)}.", cure=CORRECT)
    arguments: dict[str, Any] = plain(given, "arguments", place=place)
    return arguments


def plain(value: object, key: str, *, place: str, depth: int = 0) -> Any:
    """A value that JSON can write, copied.

    Raises:
        BadData: It holds what JSON does not know, half a surrogate pair, or is nested too deeply.
    """
    if depth > MOST_DEPTH:
        raise BadData(f"{place}: `{key}` is nested too deeply.", cure=CORRECT)
    if isinstance(value, Mapping):
        return {
            text_of(name, key, place=place): plain(inner, key, place=place, depth=depth + 1)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(inner, key, place=place, depth=depth + 1) for inner in value]
    if isinstance(value, str):
        return text_of(value, key, place=place)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise BadData(f"{place}: `{key}` holds {kind_of(value)}, which JSON does not know.", cure=CORRECT)


def kind_of(value: object) -> str:
    """A value's type in a word."""
    return "empty" if value is None else type(value).__name__


def shown(value: object, most: int = 60) -> str:
    """A value for a message, which a damaged row must not fill."""
    if not isinstance(value, str):
        return kind_of(value)
    return repr(value) if len(value) <= most else f"{value[:most]!r}..."


def listed(row: Mapping[Any, Any]) -> str:
    """The keys of a row for a message."""
    return f"the keys {few(map(shown, row))}" if row else "no keys"


def few(texts: Iterable[str], most: int = 12) -> str:
    """The first of some texts, and how many more there are."""
    given = list(texts)
    return ", ".join(given[:most]) + (f" and {len(given) - most} more" if len(given) > most else "")
