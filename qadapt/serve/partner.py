"""What a chat is asked to talk to: a run, an adapter (its folder, or of the store), a model, a GGUF file.

Looks at names and at which files there are; loads nothing and imports no torch, so that a mistyped name is
said at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qadapt.adapters.facts import is_side_car
from qadapt.adapters.store import Store
from qadapt.errors import BadRun
from qadapt.run_folder import find_run

Kind = Literal["run", "adapter", "model", "gguf"]
_WHAT = "a run, an adapter's folder, an exported model's folder, or a .gguf file"


@dataclass(frozen=True)
class Partner:
    """Whom a chat is with.

    Attributes:
        kind: `run`, `adapter` (its folder, beside no run), `model` (merged or 4-bit weights), or `gguf`.
        path: The run's folder, the adapter's, the model's, or the file.
    """

    kind: Kind
    path: Path

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter that can be switched off: in an exported model it is merged."""
        return self.kind in ("run", "adapter")


def find_partner(what: str, folder: str | Path = "runs", *, store: str | Path = "adapters") -> Partner:
    """Finds whom to talk to.

    Args:
        what: A run's name, a path, or a name, tag or version of the store, looked for in this order.
        folder: Where the runs are.
        store: Where the store is.

    Raises:
        BadAdapter: A version of the store is damaged, or more than one is meant.
        BadRun: There is nothing of that name, a run has no adapter yet, or a folder is none of these.
    """
    path = Path(what).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        return Partner("gguf", path)
    is_run = any((place / "events.jsonl").is_file() for place in (Path(folder) / what, path))
    if not is_run and path.is_dir():
        return _of_folder(path)
    if not is_run and path.exists():
        raise BadRun(f"{what} is no model.", cure=f"Give {_WHAT}.")
    kept = Store(Path(store))
    if not is_run and kept.meant(what):
        return Partner("adapter", kept.folder_of(kept.find(what)))
    run = find_run(what, folder)
    if not run.adapter.is_dir():
        raise BadRun(
            f"The run {run.name} has no adapter yet: it has not finished.",
            cure=f"`qadapt resume {what}` goes on with it.",
        )
    return Partner("run", run.path)


def _of_folder(path: Path) -> Partner:
    if (path / "adapter_config.json").is_file() or is_side_car(path):
        return Partner("adapter", path)
    if (path / "config.json").is_file():
        return Partner("model", path)
    files = sorted(each for each in path.glob("*.gguf") if each.is_file())
    if len(files) == 1:
        return Partner("gguf", files[0])
    if files:
        named = ", ".join(each.name for each in files[:3])
        raise BadRun(f"{path} holds {len(files)} GGUF files: {named}.", cure="Give one of the files.")
    raise BadRun(
        f"{path} holds no adapter and no model.",
        cure=f"Give {_WHAT}. A run's folder has events.jsonl, an adapter's adapter_config.json, a model's "
        "config.json.",
    )
