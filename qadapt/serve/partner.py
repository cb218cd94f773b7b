"""What a name may stand for: a run, an adapter (its folder, or of the store), a model, a GGUF file.

Looks at names and at which files there are; loads nothing and imports no torch, so that a mistyped name is
said at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qadapt.adapters.facts import is_side_car, own_files
from qadapt.adapters.store import SHOWN, Store
from qadapt.adapters.versions import sha256_of
from qadapt.errors import BadAdapter, BadRun
from qadapt.run_folder import RunFolder, find_run

Kind = Literal["run", "adapter", "model", "gguf"]
_WHAT = "a run, an adapter's folder, an exported model's folder, or a .gguf file"


@dataclass(frozen=True)
class Partner:
    """What was found, such as whom a chat is with.

    Attributes:
        kind: `run`, `adapter` (its folder, beside no run), `model` (merged or 4-bit weights), or `gguf`.
        path: The run's folder, the adapter's, the model's, or the file.
        version: Its id, if it is an adapter of the store; else empty.
    """

    kind: Kind
    path: Path
    version: str = ""

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter that can be switched off: in an exported model it is merged."""
        return self.kind in ("run", "adapter")


def find_partner(what: str, folder: str | Path = "runs", *, store: str | Path = "adapters") -> Partner:
    """Finds what a name stands for.

    Args:
        what: A run's name, a path, or a name, tag or version of the store, looked for in this order.
        folder: Where the runs are.
        store: Where the store is.

    Raises:
        BadAdapter: A version of the store is damaged, or more than one is meant; or a run or a folder and
            the store have adapters of that name that are not the same.
        BadRun: There is nothing of that name, a run has no adapter yet, or a folder is none of these.
    """
    path, kept = Path(what).expanduser(), Store(Path(store))
    if path.is_file() and path.suffix.lower() == ".gguf":
        return Partner("gguf", path)
    try:
        run = find_run(what, folder)
    except BadRun as error:
        no_run = error
    else:
        _check_one_meaning(what, run.path, run.adapter, kept)
        return _of_run(run, what)
    if (in_folder := _of_folder(path)) is not None:
        if in_folder.kind == "adapter":
            _check_one_meaning(what, path.absolute(), path, kept)
        return in_folder
    if kept.meant(what):
        version = kept.find(what)
        return Partner("adapter", kept.folder_of(version), version)
    if path.exists():
        raise _nothing_in(path)
    raise _unknown(what, no_run, kept)


def _of_run(run: RunFolder, what: str) -> Partner:
    if not run.adapter.is_dir():
        raise BadRun(
            f"The run {run.name} has no adapter yet: it has not finished.",
            cure=f"`qadapt resume {what}` goes on with it.",
        )
    return Partner("run", run.path)


def _of_folder(path: Path) -> Partner | None:
    """What a folder holds; None if there is no such folder, or nothing in it."""
    if (path / "adapter_config.json").is_file() or is_side_car(path):
        return Partner("adapter", path)
    if (path / "config.json").is_file():
        return Partner("model", path)
    files = sorted(each for each in path.glob("*.gguf") if each.is_file())
    if len(files) > 1:
        named = ", ".join(each.name for each in files[:3])
        raise BadRun(f"{path} holds {len(files)} GGUF files: {named}.", cure="Give one of the files.")
    return Partner("gguf", files[0]) if files else None


def _check_one_meaning(what: str, path: Path, adapter: Path, kept: Store) -> None:
    """Refuses a name that the store has, too, for another adapter.

    Args:
        what: The name.
        path: What it means beside the store.
        adapter: The adapter's folder there.
        kept: The store.
    """
    try:
        if what not in kept.names() and what not in kept.tags():
            return
        version = kept.version(kept.find(what))
    except BadAdapter:  # what is damaged in the store is none of its concern
        return
    mine = {name: adapter / name for name in own_files(adapter)}
    kept_files = {name: version.files[name].sha256 for name in mine if name in version.files}
    if {name: sha256_of(path) for name, path in mine.items() if path.is_file()} != kept_files:
        raise BadAdapter(
            f"{what} is {path}, and in the store {kept.path} another adapter.",
            cure=f"Give {path} for the one, {version.id[:SHOWN]} for the other.",
        )


def _nothing_in(path: Path) -> BadRun:
    if not path.is_dir():
        return BadRun(f"{path} is no model.", cure=f"Give {_WHAT}.")
    return BadRun(
        f"{path} holds no adapter and no model.",
        cure=f"Give {_WHAT}. A run's folder has events.jsonl, an adapter's adapter_config.json, a model's "
        "config.json.",
    )


def _unknown(what: str, no_run: BadRun, kept: Store) -> BadRun:
    named = ", ".join(sorted({**kept.names(), **kept.tags()})[:8])
    there = f" The store {kept.path} has {named}." if named else ""
    return BadRun(
        f"There is no run {what!r}, no such folder, and no such name, tag or version in the store "
        f"{kept.path}.",
        cure=f"{no_run.cure}{there}",
    )
