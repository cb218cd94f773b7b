"""The version of an adapter where an answer broke: asked of few of its ancestors instead of all.

Between an ancestor that answers right and a version that does not lies one step from right to broken; half of
what lies between them is left out with every version asked (binary search, as `git bisect`). Answers are
greedy, so that the same version gives the same answer.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from qadapt.adapters.store import SHOWN, Store
from qadapt.errors import BadAdapter
from qadapt.loading import load_partner
from qadapt.quiet import quiet_libraries
from qadapt.serve.chat import Chat, Manner
from qadapt.serve.partner import Partner


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
    line = ancestors(store, store.find(what))

    def tried(place: int) -> Tried:
        answer = _answer(store.folder_of(line[place]), prompt, longest=longest)
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


def _answer(folder: Path, prompt: str, *, longest: int) -> str:
    loaded = load_partner(Partner("adapter", folder))
    chat = Chat(loaded.model, loaded.contract, Manner(longest))
    for _ in chat.ask(prompt):
        pass
    assert chat.reply is not None
    return chat.reply.answer
