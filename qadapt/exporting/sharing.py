"""An adapter of the store, or any other, pushed to a hub: as it is, proven and described, in one commit.

What is pushed is `qadapt export --form adapter`, made in the cache for the while. What an earlier push left
there of another adapter (a tokenizer, the tensors of another method) is taken out with the same commit, so
that no revision of the repository mixes two. `qadapt adapters add` is the way back.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from qadapt.adapters.store import SHOWN
from qadapt.adapters.versions import PATTERNS
from qadapt.cache import cache_folder, output_errors, working_folder
from qadapt.events import Event, StageStarted
from qadapt.export.hub import HubTarget, check_target, push_folder
from qadapt.export.peft_folder import FORM as ADAPTER
from qadapt.exporting.export import export
from qadapt.trained.adapter import find_trained

STAGE = "pushing the adapter"


@dataclass(frozen=True)
class Pushed:
    """An adapter on a hub.

    Attributes:
        name: What it is, as `find_trained` names it.
        version: Its id, if it is of the store; else empty.
        address: Of the commit.
    """

    name: str
    version: str
    address: str


def push(
    what: str, target: HubTarget, *, folder: str = "runs", store: str = "adapters"
) -> Generator[Event, None, Pushed]:
    """Pushes an adapter to a repository, yielding the events of its export.

    Args:
        what: A run by name or path, an adapter's folder, or a name, tag or version of the store.
        target: The repository; made if there is none.
        folder: Where the runs are.
        store: Where the store is.

    Raises:
        BadAdapter: A version of the store is damaged, or the name stands for more than one adapter.
        BadExport: It has a NaN or infinite number.
        BadRecipe: The name of the repository can be none.
        BadRun: There is nothing of that name, or its base is not what it was.
        HubRefused: Nobody is logged in, or the hub said no.
    """
    check_target(target)
    trained = find_trained(what, folder=folder, store=store)
    shown = f"version {trained.version[:SHOWN]}" if trained.version else trained.name
    with output_errors(cache_folder()):
        cache_folder().mkdir(parents=True, exist_ok=True)
        with working_folder(cache_folder(), stem="push") as place:
            written, asked = place / "adapter", trained.version or what  # a name may move meanwhile
            yield from export(asked, form=ADAPTER, to=written, folder=folder, store=store, is_shared=True)
            yield StageStarted(stage=STAGE)
            address = push_folder(
                written,
                target,
                message=f"Add {shown}",
                replaces=PATTERNS,
                again="Nothing is lost: push it once more.",
            )
    return Pushed(trained.name, trained.version, address)
