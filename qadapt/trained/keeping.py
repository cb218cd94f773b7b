"""What goes into the store: the adapter of a run, of a folder or of a hub, checked against its base first.

Gathers what is known of an adapter (recipe, rows, losses) and hands it to `adapters/store.py`. What does not
fit its base is refused before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qadapt.adapters.check import check_adapter
from qadapt.adapters.facts import AdapterFacts, read_facts
from qadapt.adapters.pointers import check_name
from qadapt.adapters.store import Added, Store
from qadapt.adapters.versions import Record, belongs, check_weights
from qadapt.cache import cache_folder, output_errors, working_folder
from qadapt.errors import BadAdapter, BadModel, BadRun
from qadapt.model.folder import read_config
from qadapt.model.skeleton import skeleton_base
from qadapt.model.source import find_model, is_here
from qadapt.quiet import quiet_libraries
from qadapt.run_folder import RunFolder, find_run
from qadapt.train.stored_plan import read_plan
from qadapt.trained.adapter import method_of, of_run
from qadapt.trained.adoption import Said, adopt, is_foreign, move_base
from qadapt.trained.same_base import find_same_base

NOTHING = Said()
HUB = "hub:"
"""May stand before the `owner/name` of a repository, as it does before those of rows."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Found:
    """An adapter that is to be kept: its folder, what is known of it, what to call it."""

    folder: Path
    record: Record
    name: str


def add(
    what: str,
    store: Store,
    *,
    name: str = "",
    parent: str | None = None,
    said: Said = NOTHING,
    folder: str = "runs",
) -> Added:
    """Keeps an adapter in the store and lets a name mean it.

    Args:
        what: A run by name or path, an adapter's folder, or `owner/name` of a hub, also as `hub:owner/name`.
        store: Where to keep it.
        name: The name; by default the run's, the folder's or the repository's.
        parent: The version it followed; by default the one that the name means now.
        said: What is said of an adapter from elsewhere. Of a hub the commit is kept.
        folder: Where the runs are.

    Raises:
        BadAdapter: It is none, does not fit its base, has absurd numbers, or the name cannot be one.
        BadModel: Its base is not here.
        BadRun: There is no such run, it has no adapter yet, or its base changed.
        HubRefused: The hub said no.
        BadOutput: The store is read-only or full.
    """
    quiet_libraries()
    if name:
        check_name(name, what="name")
    with _found(what, said, folder) as found:
        chosen = name or _name_from(found.name)
        _check(found.folder, found.record.facts)
        return store.add(found.folder, found.record, name=chosen, parent=parent)


def _name_from(text: str) -> str:
    """What the store can call a run, a folder or a repository of this name."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    try:
        check_name(name, what="name")
    except BadAdapter as error:
        raise BadAdapter(
            f"{text!r} makes no name for the store. {error.problem}",
            cure="Give the name with --as, such as --as summaries-2.",
        ) from None
    return name


@contextmanager
def _found(what: str, said: Said, folder: str) -> Iterator[Found]:
    path, repository = Path(what).expanduser(), what.removeprefix(HUB)
    if said.revision is not None and (_is_run(what, folder) or path.exists()):
        raise BadAdapter(
            f"{what} has no revisions ({said.revision!r}): only a hub's adapters do.",
            cure="Leave the revision out.",
        )
    if _is_run(what, folder):
        run = _finished(what, folder)
        _refuse_said(said, what)
        yield Found(run.adapter, _record_of_run(run), run.name)
    elif path.is_dir():
        with _described(path, said, name=what) as place:
            source = f"folder {path.resolve().name}"
            yield Found(place, _record_of_folder(place, source), path.resolve().name)
    elif _HUB_ID.fullmatch(repository) and (repository != what or not path.parent.is_dir()):
        from qadapt.model.hub_files import fetch_files

        with _temporary() as fetched:
            commit = fetch_files(repository, fetched, choose=_chooser(repository), revision=said.revision)
            with _described(fetched, said, name=repository) as place:
                record = _record_of_folder(place, f"hub {repository}@{commit}")
                yield Found(place, record, repository.partition("/")[2])
    elif what.startswith(HUB):
        raise BadAdapter(f"{what} names no repository of a hub.", cure="Write it as hub:owner/name.")
    else:
        find_run(what, folder)  # says which runs there are


@contextmanager
def _described(folder: Path, said: Said, *, name: str) -> Iterator[Path]:
    """A folder whose adapter says what it was trained on: the same one, or a copy to which that was added."""
    if not is_foreign(folder):
        _refuse_said(replace(said, base=None), name)
        if said.base is None:
            yield folder
            return
    with _temporary() as place:
        if is_foreign(folder):
            adopt(folder, place, said, name=name)
        else:
            move_base(folder, place, said.base or "")
        yield place


@contextmanager
def _temporary() -> Iterator[Path]:
    with output_errors(cache_folder()):
        cache_folder().mkdir(parents=True, exist_ok=True)
        with working_folder(cache_folder(), stem="adapter") as place:
            yield place


def _refuse_said(said: Said, name: str) -> None:
    if said.held is not None or said.base is not None:
        raise BadAdapter(
            f"{name} says itself which base it was trained on and how that was held.",
            cure="Leave --held and --base out.",
        )


def _chooser(name: str) -> Callable[[Sequence[str]], list[str]]:
    """What of a hub's repository belongs to an adapter; its files must lie in the repository's own folder."""

    def choose(names: Sequence[str]) -> list[str]:
        chosen = [each for each in names if belongs(each)]
        check_weights(chosen, names, where=name)
        return chosen

    return choose


def _record_of_run(run: RunFolder) -> Record:
    trained, recipe = of_run(run), read_plan(run.plan).recipe
    return Record(
        facts=trained.facts,
        method=recipe.get("adapter", {}).get("method") or trained.method,
        source=f"run {run.name}",
        data=trained.rows,
        recipe=recipe,
        metrics=trained.metrics,
    )


def _record_of_folder(folder: Path, source: str) -> Record:
    return Record(facts=read_facts(folder), method=method_of(folder), source=source)


def _check(folder: Path, facts: AdapterFacts) -> None:
    """Checks an adapter against its base: the very files if they are here, else what the hub says of them."""
    if is_here(facts.base, revision=facts.revision):
        model_folder = find_same_base(facts).folder
    else:
        model_folder = _elsewhere(facts)
    values = read_config(model_folder, name=facts.base)
    base = skeleton_base(values, quantization="none", double_quant=False, dtype=torch.float32)
    check_adapter(folder, base)


def _elsewhere(facts: AdapterFacts) -> Path:
    """A base that is not here yet, without its weights."""
    try:
        return find_model(facts.base, revision=facts.revision, needs_weights=False).folder
    except BadModel as error:
        if facts.revision is not None:
            raise
        raise BadModel(
            f"The adapter's base is not here. {error.problem}", cure="Say where it is: --base PLACE."
        ) from None


def _is_run(what: str, folder: str) -> bool:
    return any((place / "events.jsonl").is_file() for place in (Path(folder) / what, Path(what)))


def _finished(what: str, folder: str) -> RunFolder:
    run = find_run(what, folder)
    if not run.adapter.is_dir():
        raise BadRun(
            f"The run {run.name} has no adapter yet: it has not finished.",
            cure=f"`qadapt resume {what}` goes on with it.",
        )
    return run
