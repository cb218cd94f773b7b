"""Go templates, as far as `ollama.py` writes them, rendered in Python: so a Modelfile can be proven here.

Known are texts, `.Field`, `$.Field`, `$name`, strings and numbers; `if`, `else if`, `else`, `range`, `end`;
the functions `and`, `eq`, `len`, `slice`. Everything else, marks that trim blanks among it, is an error and
never a guess. Knows no model and no prompt contract. https://pkg.go.dev/text/template
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()"]+')
_NAME = re.compile(r"(\$\w*)?((?:\.\w+)*)")


class BadTemplate(ValueError):
    """The text is no Go template that is known here, or asks for a value that is not there."""


@dataclass(frozen=True)
class _Scope:
    """What names stand for: `dot` is Go's `.`, and `$` among the names is the root."""

    dot: object
    names: Mapping[str, object]


_Value = Callable[[_Scope], object]
_Writer = Callable[[_Scope], str]


def render(template: str, values: Mapping[str, object]) -> str:
    """The text of a template.

    Args:
        template: Its source.
        values: What its fields stand for: texts, and lists of such mappings.

    Raises:
        BadTemplate: See there.
    """
    write, ending = _Reader(template).block()
    if ending:
        raise BadTemplate(f"`{' '.join(ending)}` ends nothing")
    return write(_Scope(values, {"$": values}))


def literal(text: str) -> str:
    '''A text as it must stand in a template, and in a Modelfile's `"""`, to come out unchanged.

    An opening brace, a quote that could end the Modelfile's value, and a character that the
    Modelfile's reader drops because it does not print become strings of the template.
    '''
    parts = []
    for at, character in enumerate(text):
        closes = text.startswith('"""', at)
        is_plain = character in "\n\t" or (character.isprintable() and character != "{" and not closes)
        parts.append(character if is_plain else f"{{{{ {_quoted(character)} }}}}")
    return "".join(parts)


def _quoted(character: str) -> str:
    if character == '"':
        return r'"\""'
    if character.isprintable():
        return f'"{character}"'
    code = ord(character)
    return f'"\\u{code:04x}"' if code <= 0xFFFF else f'"\\U{code:08x}"'


class _Reader:
    """Reads a template's parts, in order, into functions that write them."""

    def __init__(self, template: str) -> None:
        parts = _ACTION.split(template)  # text, action, text, action, ..., text
        if any("{{" in text for text in parts[::2]):
            raise BadTemplate("an action has no end")
        self._parts = iter(enumerate(parts))

    def block(self) -> tuple[_Writer, Sequence[str]]:
        """What stands up to an `else` or an `end`, and the words of that; none at the template's end."""
        writers: list[_Writer] = []
        for at, part in self._parts:
            if at % 2 == 0:
                writers.append(_constant(part))
                continue
            words = _words(part)
            if words[0] in ("else", "end"):
                return _joined(writers), words
            if words[0] == "if":
                writers.append(self._branch(words[1:]))
            elif words[0] == "range":
                writers.append(self._loop(words[1:]))
            else:
                writers.append(_printed(_expression(words)))
        return _joined(writers), ()

    def _branch(self, condition: Sequence[str]) -> _Writer:
        is_true = _expression(condition)
        then, ending = self.block()
        otherwise = _constant("")
        if list(ending[:2]) == ["else", "if"]:
            otherwise = self._branch(ending[2:])
        else:
            if list(ending) == ["else"]:
                otherwise, ending = self.block()
            _must_end(ending)
        return lambda scope: then(scope) if is_true(scope) else otherwise(scope)

    def _loop(self, words: Sequence[str]) -> _Writer:
        index, element = "", ""
        if ":=" in words:
            index, element, _, *words = (word.rstrip(",") for word in words)
        items = _expression(words)
        body, ending = self.block()
        _must_end(ending)

        def write(scope: _Scope) -> str:
            listed = items(scope)
            if isinstance(listed, str) or not isinstance(listed, Sequence):
                raise BadTemplate(f"`range {' '.join(words)}` goes over no list")
            return "".join(
                body(replace(scope, dot=item, names={**scope.names, index: at, element: item}))
                for at, item in enumerate(listed)
            )

        return write


def _words(action: str) -> list[str]:
    words = _WORD.findall(action)
    if not words or _WORD.sub("", action).strip():
        raise BadTemplate(f"the action {action!r} is not known")
    return words


def _must_end(ending: Sequence[str]) -> None:
    if list(ending) != ["end"]:
        raise BadTemplate("a block has no end")


def _constant(text: str) -> _Writer:
    return lambda _: text


def _joined(writers: Iterable[_Writer]) -> _Writer:
    kept = tuple(writers)
    return lambda scope: "".join(write(scope) for write in kept)


def _printed(value: _Value) -> _Writer:
    def write(scope: _Scope) -> str:
        text = value(scope)
        if not isinstance(text, str):
            raise BadTemplate(f"{text!r} is no text")
        return text

    return write


def _expression(words: Sequence[str]) -> _Value:
    left = list(words)
    value = _read(left)
    if left:
        raise BadTemplate(f"`{' '.join(words)}` is no expression")
    return value


def _read(words: list[str]) -> _Value:
    """Takes an expression off the front of the words, up to a closing parenthesis or the end."""
    apply = _FUNCTIONS[words.pop(0)] if words and words[0] in _FUNCTIONS else _itself
    operands: list[_Value] = []
    while words and words[0] != ")":
        word = words.pop(0)
        if word != "(":
            operands.append(_operand(word))
            continue
        operands.append(_read(words))
        if not words:
            raise BadTemplate("a parenthesis has no end")
        words.pop(0)

    def value(scope: _Scope) -> object:
        try:
            return apply(*(operand(scope) for operand in operands))
        except TypeError:
            raise BadTemplate("a function is given values that it does not take") from None

    return value


def _operand(word: str) -> _Value:
    if word.startswith('"') or word.isdecimal():
        constant = ast.literal_eval(word)  # Go's strings, as `literal` writes them, are Python's too
        return lambda _: constant
    named = _NAME.fullmatch(word)
    if not named:
        raise BadTemplate(f"{word!r} is not known")
    root, path = named.groups()

    def value(scope: _Scope) -> object:
        try:
            found: Any = scope.names[root] if root else scope.dot
            for field in path.split(".")[1:]:
                found = found[field]
        except (KeyError, TypeError):
            raise BadTemplate(f"there is no {word}") from None
        return found

    return value


def _itself(value: object) -> object:
    return value


def _and(*values: object) -> object:
    return next((value for value in values if not value), values[-1])


def _equal(one: object, other: object) -> bool:
    return one == other


def _slice(values: Sequence[object], first: int) -> Sequence[object]:
    return values[first:]


_FUNCTIONS: Mapping[str, Callable[..., object]] = {"and": _and, "eq": _equal, "len": len, "slice": _slice}
