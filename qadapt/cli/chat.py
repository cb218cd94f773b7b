"""`qadapt chat`: talk to a run, an adapter, an exported model or a GGUF file, as the run's rows talked."""

from __future__ import annotations

import json as json_text
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from qadapt.cli.screen import console, error_console
from qadapt.errors import BadData, BadRecipe

if TYPE_CHECKING:
    from qadapt.serve.chat import Chat, Reply
    from qadapt.serve.partner import Partner
    from qadapt.trained.loading import Loaded
    from qadapt.trained.together import Company

WhatArgument = Annotated[
    str,
    typer.Argument(
        help="Name of a run, the path of a run, adapter or exported model, a .gguf file, or a name, tag "
        "or version of the store."
    ),
]
PromptOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", help="Ask this and leave; can be given again: one conversation."),
]


def chat(
    what: WhatArgument,
    prompt: PromptOption = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    beside: Annotated[
        bool, typer.Option("--beside", help="Answer twice, side by side: with the adapter and without.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, help="0: the likeliest token each time; above, tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw among the likeliest tokens that come to this share.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Draw the same again.")] = None,
    longest: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    folder: Annotated[str, typer.Option(help="Where the runs are.")] = "runs",
    store: Annotated[str, typer.Option(help="Where the store of adapters is.")] = "adapters",
    json: Annotated[
        bool, typer.Option("--json", help="Print the answers as JSON, and nothing else.")
    ] = False,
) -> None:
    """Talks to a finished run, an adapter, an exported model or a GGUF file, asked as it was trained.

    On a terminal: /base switches the adapter off and on, /use NAME switches to another one of the same base,
    /new begins anew, /help says the rest; Ctrl-C ends an answer. Otherwise each line of standard input is a
    question.

    Examples: `qadapt chat my-run`, `qadapt chat my-run --beside`, `qadapt chat runs/my-run/export/merged-fp16
    --prompt "Two loaves for Ada."`.
    """
    is_typed = sys.stdin is not None and sys.stdin.isatty()
    if json and is_typed and not prompt:
        raise BadRecipe(
            "--json needs questions.", cure="Give them with --prompt, or a line each on standard input."
        )
    if not temperature and (top_p < 1 or seed is not None):
        error_console().print("note: --top-p and --seed change nothing at --temperature 0")
    partner = _found(what, folder, store, is_beside=beside)
    loaded = _loaded(partner)
    from qadapt.serve.chat import Chat, Manner

    manner = Manner(longest, temperature, top_p, seed)
    chats = [
        Chat(loaded.model, loaded.contract, manner, system=system, uses_adapter=uses_adapter)
        for uses_adapter in ((True, False) if beside else (True,))
    ]
    if json:
        _answer_in_json(chats, prompt or _lines(), said=loaded.said)
    elif prompt or not is_typed:
        _answer_all(chats, prompt or _lines())
    else:
        raise typer.Exit(_talk(chats, loaded, partner, _company(loaded, folder, store)))


def _found(what: str, folder: str, store: str, *, is_beside: bool) -> Partner:
    from qadapt.serve.partner import find_partner

    partner = find_partner(what, folder, store=store)
    if is_beside and not partner.has_adapter:
        raise BadRecipe(
            f"--beside needs an adapter to switch off; {partner.path} has none.",
            cure="Give the run, or the adapter's folder.",
        )
    return partner


def chat_values(said: str, replies: Iterable[Sequence[Reply]]) -> dict[str, object]:
    """What `--json` prints: `schema` 1, `model` in words, and `answers`.

    Each of these has `question`, `answer`, `prompt_tokens`, `tokens`, `ending` (`end`, `longest`, `context`),
    `left_out` (turns), and with `--beside` `base`: the same of the base alone.
    """
    return {"schema": 1, "model": said, "answers": [_reply_values(*each) for each in replies]}


def _reply_values(reply: Reply, base: Reply | None = None) -> dict[str, object]:
    import dataclasses

    values: dict[str, object] = dataclasses.asdict(reply)
    if base is not None:
        values["base"] = {name: value for name, value in _reply_values(base).items() if name != "question"}
    return values


def _loaded(partner: Partner) -> Loaded:
    """Loads whom to talk to, with a sign of life on a terminal."""
    with error_console().status("loading") as status:
        from qadapt.quiet import quiet_libraries
        from qadapt.trained.loading import load_partner

        quiet_libraries()

        def report(stage: str, done: int, total: int) -> None:
            status.update(f"{stage}: {done / total:.0%}" if total else f"{stage} ...")

        return load_partner(partner, report)


def _answer_in_json(chats: Sequence[Chat], questions: Iterable[str], *, said: str) -> None:
    from qadapt.cli.chat_session import print_answers

    replies = print_answers(chats, questions, console(is_quiet=True))
    typer.echo(json_text.dumps(chat_values(said, replies), indent=2))


def _answer_all(chats: Sequence[Chat], questions: Iterable[str]) -> None:
    from qadapt.cli.chat_session import notes_of, print_answers

    errors, before = error_console(), [0] * len(chats)
    for replies in print_answers(chats, questions, console()):
        for chat, left_out in zip(chats, before, strict=True):
            for note in notes_of(chat, left_out):
                errors.print(f"note: {note}", markup=False, soft_wrap=True)
        before = [reply.left_out for reply in replies]


def _company(loaded: Loaded, folder: str, store: str) -> Company | None:
    from qadapt.trained.together import Company

    return None if loaded.together is None else Company(loaded.together, folder, store)


def _talk(chats: Sequence[Chat], loaded: Loaded, partner: Partner, company: Company | None) -> int:
    with suppress(ImportError):  # Windows has no readline; its console edits lines itself
        import readline  # noqa: F401  `input` edits lines with it, and remembers them
    from qadapt.cli.chat_session import Session

    screen = console()
    screen.print(f"This is {loaded.said}.", markup=False, soft_wrap=True)
    if not chats[0].is_conversation:
        screen.print("It has no chat template: it goes on with each text that you write.")
    screen.print("/help says what can be done besides asking; /quit leaves.")
    return Session(chats, screen, has_adapter=partner.has_adapter, company=company).run()


def _lines() -> Iterator[str]:
    """The lines of standard input, as they come."""
    try:
        yield from sys.stdin or ()
    except UnicodeDecodeError as error:
        raise BadData(f"Standard input is no text in {error.encoding}.", cure="Give it as UTF-8.") from None
