"""A chat on the screen: questions and commands in, answers out while they are written.

On a terminal Ctrl-C ends an answer at its next token, so that no state of the model is torn, and a second one
leaves. Elsewhere there are no commands: each line is a question, each answer is printed as it is. Knows
conversations by what `serve/chat.py` says of them, no model.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from qadapt.errors import QadaptError
from qadapt.view.beside import Beside
from qadapt.view.visible import PLAIN_SIGNS, SIGNS, printable

if TYPE_CHECKING:
    from qadapt.serve.chat import Chat, Reply
    from qadapt.trained.together import Company

TITLES = {True: "with the adapter", False: "base alone"}
COMMANDS = {
    "/base": "switches the adapter off, and on again",
    "/use": "switches to other adapters (/use NAME, /use NAME NAME), or says which are here (/use)",
    "/new": "begins a new conversation; the system prompt stays",
    "/system": "sets the system prompt (/system TEXT), or takes it away (/system)",
    "/help": "says this",
    "/quit": "leaves; so do Ctrl-D, and Ctrl-C twice",
}
INTERRUPTED = 130
_REFRESHES_PER_SECOND = 8
_ROOM_LINES = 3
"""Lines of the screen that a picture leaves free: for the question, and for the cursor below."""


class Session:
    """A conversation on a terminal; two of them if each question is answered side by side.

    Args:
        chats: One, or one with the adapter and one without.
        console: Where to write.
        has_adapter: Whether there is an adapter to switch off.
        company: Where other adapters are brought in; None: this one cannot stand beside others.
        read: Reads a line after a prompt, as `input` does.
        clock: Seconds.
    """

    def __init__(
        self,
        chats: Sequence[Chat],
        console: Console,
        *,
        has_adapter: bool,
        company: Company | None = None,
        read: Callable[[str], str] = input,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._chats, self._console, self._has_adapter = tuple(chats), console, has_adapter
        self._company, self._read, self._clock = company, read, clock

    def run(self) -> int:
        """Talks until whoever asks leaves; returns the exit code: 0, or 130 after a second Ctrl-C.

        Raises:
            KeyboardInterrupt: A second Ctrl-C while an answer was being stopped.
        """
        is_warned = False
        while True:
            try:
                line = self._read(self._prompt()).strip()
            except EOFError:
                self._console.print()
                return 0
            except KeyboardInterrupt:
                self._console.print()
                if is_warned:
                    return INTERRUPTED
                is_warned = True
                self._say("Ctrl-C again leaves; so does /quit.")
                continue
            except UnicodeDecodeError:
                self._say("That was no text in the terminal's encoding.")
                continue
            if line == "/quit":
                return 0
            if line:
                is_warned = self._take(line)

    def _take(self, line: str) -> bool:
        """Answers, or does as a command says; whether Ctrl-C ended the answer."""
        try:
            if line.startswith("/"):
                self._obey(*line.split(maxsplit=1))
                return False
            return self._answer(line)
        except QadaptError as error:
            self._console.print(Text(f"{error.problem} {error.cure}", style="red"), soft_wrap=True)
            return False

    def _prompt(self) -> str:
        return "> " if self._chats[0].uses_adapter else "base> "

    def _say(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), soft_wrap=True)

    def _obey(self, command: str, rest: str | None = None) -> None:
        if command == "/base":
            self._switch()
        elif command == "/use":
            self._use((rest or "").split())
        elif command == "/new":
            for chat in self._chats:
                chat.begin_anew()
            self._say("A new conversation.")
        elif command == "/system":
            for chat in self._chats:
                chat.tell(rest)
            self._say(
                "There is no system prompt now." if rest is None else "From here on the model is told so."
            )
        elif command == "/help":
            for name, what in COMMANDS.items():
                self._say(f"{name:9}{what}")
        else:
            self._say(f"There is no command {printable(command)}; /help says which there are.")

    def _switch(self) -> None:
        if len(self._chats) > 1:
            self._say("Both answer already.")
        elif not self._has_adapter:
            self._say("There is no adapter to switch off: this model has it in its weights, if any.")
        else:
            chat = self._chats[0]
            chat.uses_adapter = not chat.uses_adapter
            self._say(f"The adapter is {'on' if chat.uses_adapter else 'off: the base alone answers'}.")

    def _use(self, names: Sequence[str]) -> None:
        if self._company is None:
            self._say("There is no adapter here that could be switched.")
        elif not names:
            there = ", ".join(self._company.together.model.names)
            self._say(
                f"In memory: {printable(there)}. /use NAME takes a run, a folder or a name of the store."
            )
        else:
            names, contract = self._company.bring(names)
            for chat in self._chats:
                if chat.uses_adapter or len(self._chats) == 1:
                    chat.switch_to(names, contract)
            verb = "answers" if len(names) == 1 else "answer"
            self._say(f"From here on {printable(' and '.join(names))} {verb}.")

    def _answer(self, question: str) -> bool:
        started, before = self._clock(), [chat.left_out for chat in self._chats]
        with _stopping() as stop:
            if len(self._chats) == 1:
                self._show_one(self._chats[0], question, stop)
                answered = list(self._chats)
            else:
                answered = self._show_both(question, stop)
        seconds = self._clock() - started
        tokens = sum(_reply(chat).tokens for chat in answered)
        speed = f", {tokens / seconds:.1f} per second" if seconds > 0 else ""
        notes = [note for chat, at in zip(answered, before, strict=False) for note in notes_of(chat, at)]
        self._say("; ".join(dict.fromkeys([f"{tokens} tokens{speed}", *notes])))
        return stop.is_set()

    def _show_one(self, chat: Chat, question: str, stop: threading.Event) -> None:
        shown = ""
        with closing(chat.ask(question)) as answer:
            for piece in self._waited_for(answer):
                shown = piece or shown
                self._console.out(fit(piece, self._console), end="", highlight=False)
                if stop.is_set():
                    break
        if not shown.endswith("\n"):
            self._console.print()

    def _waited_for(self, answer: Generator[str, None, None]) -> Iterator[str]:
        """The pieces; a sign of life stands on the screen until the first one."""
        with self._console.status("reading"):
            first = next(answer, "")
        yield first
        yield from answer

    def _show_both(self, question: str, stop: threading.Event) -> list[Chat]:
        """Shows both answers while they are written; returns who answered before Ctrl-C."""
        picture = _Picture(self._console, self._clock)
        answered: list[Chat] = []
        try:
            with picture.drawn():
                for chat in self._chats:
                    with closing(chat.ask(question)) as answer:
                        for piece in answer:
                            picture.add(TITLES[chat.uses_adapter], piece)
                            if stop.is_set():
                                break
                    answered.append(chat)
                    if stop.is_set():
                        break
        finally:  # a question that only one of them heard would make two conversations of it
            fewest = min(len(chat.turns) for chat in self._chats)
            for chat in self._chats:
                if len(chat.turns) > fewest:
                    chat.take_back()
        picture.print()
        return answered


class _Picture:
    """Two answers that are being written."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console, self._clock = console, clock
        self._texts = dict.fromkeys(TITLES.values(), "")
        self._live = Live(self._beside(4), console=console, auto_refresh=False, transient=True)
        self._drawn_at = -math.inf

    def drawn(self) -> Live:
        """The picture while it changes; a context manager."""
        return self._live

    def add(self, title: str, piece: str) -> None:
        """Adds to an answer."""
        self._texts[title] += piece
        if self._clock() - self._drawn_at > 1 / _REFRESHES_PER_SECOND:
            self._live.update(self._beside(max(4, self._console.height - _ROOM_LINES)), refresh=True)
            self._drawn_at = self._clock()

    def print(self) -> None:
        """Prints both as they are."""
        self._console.print(self._beside(None))

    def _beside(self, most_lines: int | None) -> Beside:
        answers = ((title, fit(text, self._console)) for title, text in self._texts.items())
        return Beside(tuple(answers), most_lines)


def print_answers(chats: Sequence[Chat], questions: Iterable[str], console: Console) -> Iterator[list[Reply]]:
    """Answers questions one after another in one conversation, without commands; yields the replies of each.

    A single answer is printed as it comes. Empty questions are passed over.

    Args:
        chats: As in `Session`.
        questions: What to ask.
        console: Where to write; a quiet one for replies alone.

    Raises:
        QadaptError: As `Chat.ask`.
    """
    for question in filter(None, map(str.strip, questions)):
        if len(chats) == 1:
            for piece in chats[0].ask(question):
                console.out(fit(piece, console), end="", highlight=False)
            console.print()
        else:
            answers = ((TITLES[chat.uses_adapter], complete(chat, question).answer) for chat in chats)
            console.print(Beside(tuple((title, fit(text, console)) for title, text in answers)))
        yield [_reply(chat) for chat in chats]


def complete(chat: Chat, question: str) -> Reply:
    """The whole reply to a question."""
    for _ in chat.ask(question):
        pass
    return _reply(chat)


def notes_of(chat: Chat, left_out_before: int = 0) -> list[str]:
    """What is to be said of the newest reply: why it ended, and turns that are newly left out."""
    reply = _reply(chat)
    endings = {
        "end": "",
        "longest": f"cut off after {reply.tokens:,} tokens (--longest)",
        "context": f"cut off: the model's context of {chat.context:,} tokens is full; /new begins anew",
        "stopped": "stopped",
    }
    notes = [endings[reply.ending]] if reply.ending != "end" else []
    if reply.left_out > left_out_before:
        notes.append(
            f"the oldest {reply.left_out} turns are left out: the context holds {chat.context:,} tokens"
        )
    return notes


def fit(text: str, console: Console) -> str:
    """The text as this console can show it: nothing in it steers a terminal; a pipe gets it as it is."""
    if console.is_terminal:
        text = printable(text, signs=PLAIN_SIGNS if console.options.ascii_only else SIGNS)
    return text.encode(console.encoding, "replace").decode(console.encoding)


def _reply(chat: Chat) -> Reply:
    assert chat.reply is not None, "it has answered"
    return chat.reply


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """While open, a first Ctrl-C sets the event; a second one interrupts."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
