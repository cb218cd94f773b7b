"""A chat template of Jinja as a Go template of Ollama: read off by rendering it, not by reading its source.

Marks stand for contents; what the template writes around them, in a conversation with and without a system
turn, are the constant texts that a Go template puts around `.System` and each message's `.Content`. Whether
that holds for other conversations is not shown here (`ollama.py` proves it). Knows no tokens.

Ollama gives a template `.System`, all system turns as one text, and `.Messages`, which end with a question.
https://github.com/ollama/ollama/blob/main/docs/template.md
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from qadapt.data.rendering.template import ChatTemplate
from qadapt.export.go_template import literal

_FIRST_MARK = 0xF0000
"""Of the characters that Unicode leaves to private use: one of them is a content that no template writes."""
_MARK = re.compile("([\U000f0000-\U000f000f])")
_IS_LAST = "(eq (len (slice $.Messages $at)) 1)"


class Inexpressible(Exception):
    """No Go template of Ollama writes what the chat template does; the argument says why."""


@dataclass(frozen=True)
class _System:
    """Texts around a system turn's content, which stands before the first question, or inside the last."""

    before: str
    after: str
    is_in_last: bool


@dataclass(frozen=True)
class _Texts:
    """Texts around the contents of a prompt.

    `start` stands before the first question if there is no system turn, `to_answer` from a question to its
    answer, `to_question` from an answer to the next question, `end` from the last question to where the model
    goes on.
    """

    start: str
    to_answer: str
    to_question: str
    end: str
    system: _System | None


@dataclass(frozen=True)
class Derived:
    """A Go template, and whether it has a place for a system turn."""

    text: str
    has_system: bool


def derive(template: ChatTemplate, *, ends: Sequence[str], leading: str) -> Derived:
    """The Go template that writes prompts as a chat template does.

    Args:
        template: The chat template.
        ends: Texts of the tokens that end a turn: where turns are parted, which changes no prompt.
        leading: What the runtime puts before each prompt by itself: it must not stand in the template, too.

    Raises:
        Inexpressible: The contents do not stand in a prompt once each, in an order that can be written.
    """
    texts = _read_off(template, leading=leading)
    return Derived(_written(texts, ends=ends), has_system=texts.system is not None)


def _read_off(template: ChatTemplate, *, leading: str) -> _Texts:
    plain = _around(template, "user", "assistant", "user")
    if plain is None or plain[0] != (0, 1, 2):
        raise Inexpressible("it does not write a plain conversation with each content once, in order")
    start, to_answer, to_question, end = plain[1]
    told, system = _around(template, "system", "user", "assistant", "user"), None
    if told is not None and told[0] == (0, 1, 2, 3):
        system = _System(told[1][0].removeprefix(leading), told[1][1], is_in_last=False)
    elif told is not None:
        order, texts = told
        if order != (1, 2, 0, 3) or not texts[2].startswith(to_question):
            raise Inexpressible("a system turn stands neither before the first question nor in the last")
        system = _System(texts[2].removeprefix(to_question), texts[3], is_in_last=True)
    return _Texts(start.removeprefix(leading), to_answer, to_question, end, system)


def _around(template: ChatTemplate, *roles: str) -> tuple[tuple[int, ...], list[str]] | None:
    """Turns in the order in which a prompt writes their contents, and the texts around these.

    None if the template refuses such turns, or does not write each content once.
    """
    marks = [chr(_FIRST_MARK + at) for at in range(len(roles))]
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        parts = _MARK.split(template.render(turns, asks=True))
    except TemplateError:
        return None
    if sorted(parts[1::2]) != marks:
        return None
    return tuple(map(marks.index, parts[1::2])), parts[::2]


def _written(texts: _Texts, *, ends: Sequence[str]) -> str:
    answer_end, question_start = _parted(texts, ends=ends)
    cut = _turn_end(texts.to_answer, ends)
    if not cut or not texts.end.startswith(texts.to_answer[:cut]):
        cut = _shared(texts.to_answer, texts.end)
    question_end, answer_start = texts.to_answer[:cut], texts.to_answer[cut:]
    start, system = texts.start.removesuffix(question_start), texts.system
    opening, told, loop = literal(start), "", "range .Messages"
    if system is not None and system.is_in_last:
        said = literal(system.before) + _do("$.System") + literal(system.after)
        told = _do(f"if and $.System {_IS_LAST}") + said + _do("end")
        loop = "range $at, $_ := .Messages"
    elif system is not None:
        opening = _opening(start, system.before, system.after.removesuffix(question_start))
    parts = (
        (opening, _do(loop)),
        (_do('if eq .Role "user"'), literal(question_start), told, _do(".Content"), literal(question_end)),
        (_do('else if eq .Role "assistant"'), literal(answer_start), _do(".Content"), literal(answer_end)),
        (_do("end"), _do("end"), literal(texts.end[cut:])),
    )
    return "".join(itertools.chain.from_iterable(parts))


def _opening(start: str, before: str, after: str) -> str:
    """What stands before the first question: with a system turn, and without one `start`."""
    said = literal(before) + _do(".System") + literal(after)
    if start == before + after:
        return said
    otherwise = _do("else") + literal(start) if start else ""
    return _do("if .System") + said + otherwise + _do("end")


def _parted(texts: _Texts, *, ends: Sequence[str]) -> tuple[str, str]:
    """What stands from an answer to a question: the answer's end, and what every question begins with."""
    cut = _turn_end(texts.to_question, ends)
    shared = [texts.to_question[cut:], texts.start]
    if texts.system is not None and not texts.system.is_in_last:
        shared.append(texts.system.after)
    start = len(texts.to_question) - _shared(*(text[::-1] for text in shared))
    return texts.to_question[:start], texts.to_question[start:]


def _turn_end(text: str, ends: Sequence[str]) -> int:
    """Where the first token that ends a turn is over, and the lines that it ends; 0 if there is none."""
    found = re.search(rf"(?:{'|'.join(map(re.escape, ends))})\n*", text) if ends else None
    return found.end() if found else 0


def _shared(*texts: str) -> int:
    """How many characters some texts have in common, from the first on."""
    columns = zip(*texts, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _do(words: str) -> str:
    return f"{{{{ {words} }}}}"
