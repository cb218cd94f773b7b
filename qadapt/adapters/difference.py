"""What differs between two versions of the store: what is known of them, and their numbers.

Numbers are compared tensor by tensor as they stand in the files. Two adapters with other factors may still
be the same update (B·A): that is not looked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qadapt.adapters.store import Store


@dataclass(frozen=True)
class Change:
    """Something that is known of two versions, and is not the same; None: not known of that one."""

    what: str
    first: Any
    second: Any


@dataclass(frozen=True)
class Difference:
    """How two versions differ.

    Attributes:
        changes: What is known of them.
        files: Names of the files that are not the same.
        tensors: Number of tensors in both.
        changed_tensors: Those with other numbers.
        only_first: Names of tensors that the second lacks, or has in another shape.
        only_second: The other way round.
        distance: Length of the difference of all tensors in both, over the length of the first's.
        furthest: Name of the tensor with the largest share of that; empty if none differs.
    """

    changes: tuple[Change, ...]
    files: tuple[str, ...]
    tensors: int
    changed_tensors: int
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    distance: float
    furthest: str


def difference_of(store: Store, first: str, second: str) -> Difference:
    """How two versions of a store differ.

    Args:
        store: The store.
        first: An id.
        second: Another.

    Raises:
        BadAdapter: One is not there, or damaged.
    """
    folders = [store.folder_of(each) for each in (first, second)]
    before, after = store.version(first), store.version(second)
    known = [_flat({**asdict(each.record), "parent": each.parent}) for each in (before, after)]
    changes = tuple(
        Change(what, known[0].get(what), known[1].get(what))
        for what in sorted({*known[0], *known[1]})
        if known[0].get(what) != known[1].get(what)
    )
    names = sorted({*before.files, *after.files})
    files = tuple(name for name in names if before.files.get(name) != after.files.get(name))
    return Difference(changes, files, *_tensors(*folders))


def _tensors(first: Path, second: Path) -> tuple[int, int, tuple[str, ...], tuple[str, ...], float, str]:
    squares, total, furthest = {}, 0.0, ""
    with ExitStack() as stack:
        before, after = (_opened(folder, stack) for folder in (first, second))
        shapes = [{name: _shape(file, name) for name, file in each.items()} for each in (before, after)]
        shared = [name for name in before if shapes[0][name] == shapes[1].get(name)]
        for name in shared:
            one, other = (each[name].get_tensor(name).double() for each in (before, after))
            total += one.square().sum().item()
            if not one.equal(other):
                squares[name] = (one - other).square().sum().item()
                furthest = max(squares, key=squares.__getitem__)
    lone = [tuple(name for name in each if name not in shared) for each in (before, after)]
    changed = sum(squares.values())
    distance = (changed / total) ** 0.5 if total else float(bool(changed))
    return len(shared), len(squares), lone[0], lone[1], distance, furthest


def _opened(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Name of a tensor → the open file that holds it."""
    files = [
        stack.enter_context(safe_open(path, framework="pt")) for path in sorted(folder.glob("*.safetensors"))
    ]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def _shape(file: Any, name: str) -> tuple[int, ...]:
    return tuple(file.get_slice(name).get_shape())


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Dotted name → value of nested tables."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found
