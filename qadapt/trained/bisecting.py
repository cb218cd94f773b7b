"""The version of an adapter where an answer broke: asked of few of its ancestors instead of all.

Between an ancestor that answers right and a version that does not lies one step from right to broken; half of
what lies between them is left out with every version asked (binary search, as `git bisect`). Answers are
greedy, so that the same version gives the same answer. Versions of one base are asked on one in memory.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

from qadapt.adapters.store import SHOWN, Store
from qadapt.errors import BadAdapter, BadRun, Unsupported
from qadapt.quiet import quiet_libraries
from qadapt.serve.chat import Chat, Manner
from qadapt.serve.partner import Partner
from qadapt.trained.loading import Loaded, load_partner


@dataclass(frozen=True)
class Tried:
    """A version that was asked, what it answered, and whether that is right."""

    version: str
    answer: str
    is_right: bool


@dataclass(frozen=True)
class Break:
    """Two versions, one made after the other: the first answers right, the second does not."""

    right: str
    broken: str


def bisect(
    store: Store, what: str, *, prompt: str, expected: str, longest: int = 256
) -> Generator[Tried, None, Break]:
    """Finds where an answer broke, and says which versions were asked on the way.

    Args:
        store: The store.
        what: The broken version, as `Store.find` reads it.
        prompt: The question.
        expected: What a right answer holds.
        longest: Longest answer in tokens.

    Raises:
        BadAdapter: The version answers right, none of its ancestors in the store does, or one is damaged.
        BadRun: The base of a version is not what it was.
        DoesNotFit: Memory ran out.
    """
    quiet_libraries()
    line, asker = ancestors(store, store.find(what)), Asker(prompt, longest)

    def tried(place: int) -> Tried:
        answer = asker.answer(store.folder_of(line[place]))
        return Tried(line[place], answer, expected in answer)

    broken = len(line) - 1
    yield (newest := tried(broken))
    if newest.is_right:
        raise BadAdapter(
            f"{line[broken][:SHOWN]} answers right: nothing is broken there.",
            cure="Give the version, name or tag that answers wrong, or a text that its answer lacks.",
        )
    right = 0
    if broken:
        yield (oldest := tried(right))
    if not broken or not oldest.is_right:
        raise BadAdapter(
            f"The oldest version of that line, {line[0][:SHOWN]}, does not answer right, either.",
            cure="Check --prompt and --expect; an older version may have been removed.",
        )
    while broken - right > 1:
        middle = (right + broken) // 2
        yield (asked := tried(middle))
        right, broken = (middle, broken) if asked.is_right else (right, middle)
    return Break(line[right], line[broken])


def ancestors(store: Store, version: str) -> list[str]:
    """The line of a version, each id followed by the one that followed it, as far back as the store has it.

    Raises:
        BadAdapter: There is no such version, or its description is damaged.
    """
    line, there, parent = [version], set(store.ids()), store.version(version).parent
    while parent in there and parent not in line:
        line.append(parent)
        parent = store.version(parent).parent
    return line[::-1]


class Asker:
    """Asks one version after another the same question, the base in memory as long as it is theirs.

    Args:
        prompt: The question.
        longest: Longest answer in tokens.
    """

    def __init__(self, prompt: str, longest: int) -> None:
        self._prompt, self._manner = prompt, Manner(longest)
        self._loaded: Loaded | None = None

    def answer(self, folder: Path) -> str:
        """What the version in a folder answers.

        Raises:
            BadAdapter: It is damaged.
            BadRun: Its base is not what it was.
            DoesNotFit: Memory ran out.
        """
        self._loaded = _turned_to(folder, self._loaded)  # another base goes before the next one comes
        self._loaded = self._loaded or load_partner(Partner("adapter", folder))
        chat = Chat(self._loaded.model, self._loaded.contract, self._manner)
        for _ in chat.ask(self._prompt):
            pass
        assert chat.reply is not None
        return chat.reply.answer


def _turned_to(folder: Path, loaded: Loaded | None) -> Loaded | None:
    """What is loaded with a version in place of the one before; None, if that must be loaded by itself."""
    if loaded is None or (together := loaded.together) is None:
        return None
    for name in together.model.names:
        together.remove(name)
    try:
        together.add(folder.name, folder)
    except (BadAdapter, BadRun, Unsupported):  # what is damaged is refused again
        return None
    together.model.use(folder.name)
    return replace(loaded, contract=together.contracts[folder.name])
