"""A chat template: Jinja text that writes turns as one text, rendered as transformers renders it.

The template runs in Jinja's sandbox with the same settings, filters and functions as
`apply_chat_template` of transformers gives it, so the texts are equal character for character; but the day
that a template may print is given, not today's, for a run must be the same on another day. Knows no tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime, time
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

Turns = Sequence[Mapping[str, Any]]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""OpenAI's chat markup: every turn between two tokens, its role in its first line."""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

_RENDERING_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_SEEKING = {
    "split",
    "rsplit",
    "partition",
    "rpartition",
    "startswith",
    "endswith",
    "replace",
    "find",
    "index",
}
_SHORTEST_SOUGHT = 3
_ALWAYS_SOUGHT = ("<think>", "</think>")


class ChatTemplate:
    """A compiled template with what it is given besides the turns.

    Attributes:
        texts: The template by name: `default`, and `tool_use` where conversations with tools have their own.
        sought: Texts that the template may look for in contents, the longest first.
        prints_date: Whether a text asks for the day.
        knows_tools: Whether descriptions of tools are printed.

    Args:
        texts: As the attribute.
        variables: Special tokens by the names the template knows them by, such as `bos_token`.
        day: The day for templates that print one.

    Raises:
        jinja2.TemplateError: A text is no template.
    """

    def __init__(self, texts: Mapping[str, str], *, variables: Mapping[str, str], day: date) -> None:
        self.texts = dict(texts)
        self.variables = dict(variables)
        self.day = day
        environment = _environment(day)
        self._compiled = {name: _compiled(environment, text) for name, text in self.texts.items()}
        trees = [environment.parse(text) for text in self.texts.values()]
        self.sought = tuple(sorted({text for tree in trees for text in _sought(tree)}, key=len, reverse=True))
        used = {node.name for tree in trees for node in tree.find_all(nodes.Name)}
        self.prints_date = "strftime_now" in used
        self.knows_tools = "tools" in used

    def writes(self, text: str) -> bool:
        """Whether a text stands in the template."""
        return any(text in each for each in self.texts.values())

    def render(self, turns: Turns, *, tools: Sequence[Mapping[str, Any]] = (), asks: bool = False) -> str:
        """The text of some turns.

        Args:
            turns: As `Message.turn` gives them.
            tools: Descriptions of functions.
            asks: End with what comes before the assistant's next answer.

        Raises:
            jinja2.TemplateError: The template refuses the turns, or cannot write them.
        """
        name = "tool_use" if tools and "tool_use" in self._compiled else "default"
        try:
            return self._compiled[name].render(
                messages=[_aliased(turn) for turn in turns],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=asks,
                **self.variables,
            )
        except _RENDERING_ERRORS as error:
            raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from None


def _aliased(turn: Mapping[str, Any]) -> dict[str, Any]:
    """The turn without empty keys, its reasoning under the older name too."""
    kept = {key: value for key, value in turn.items() if value is not None}
    for key in _REASONING_KEYS:
        if key in kept:
            return {"thinking": kept[key], **kept, "reasoning_content": kept[key]}
    return kept


class _Generation(Extension):
    """`{% generation %}` marks answers for trainers that need markers; here it only writes its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """A namespace whose names stay clear of Python's own: templates are foreign code."""

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a namespace takes no name such as {name!r}")
        super().__setitem__(name, value)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The library's sandbox, with a short way for what templates ask most: `loop.first` and the like."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if type(obj) is LoopContext and not attr.startswith("_"):
            return True
        return super().is_safe_attribute(obj, attr, value)


def _environment(day: date) -> ImmutableSandboxedEnvironment:
    moment = datetime.combine(day, time())
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = moment.strftime
    environment.globals["namespace"] = _Namespace
    return environment


def _compiled(environment: ImmutableSandboxedEnvironment, text: str) -> jinja2.Template:
    """As `from_string`, but with what templates may call in a plain dictionary, copied for each rendering."""
    code = environment.compile(text)
    return environment.template_class.from_code(environment, code, dict(environment.globals))


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would write `<` and quotes as escapes for web pages."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _sought(tree: nodes.Template) -> Iterator[str]:
    """Constants that look like a mark, or that are looked for in a text by a method of strings."""
    yield from _ALWAYS_SOUGHT
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str) and len(constant.value.strip()) >= _SHORTEST_SOUGHT:
            text = constant.value.strip()
            if not text.replace("_", "").replace(" ", "").isalnum():
                yield text
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _SEEKING:
            for argument in call.args:
                if isinstance(argument, nodes.Const) and isinstance(argument.value, str):
                    yield from filter(None, [argument.value.strip()])
