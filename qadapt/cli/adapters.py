"""`qadapt adapters`: adapters kept like versions of code: added, named, compared, rolled back."""

from __future__ import annotations

import json as json_text
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qadapt.cli.combine import combine
from qadapt.cli.screen import console, error_console

if TYPE_CHECKING:
    from qadapt.adapters.store import Store
    from qadapt.trained.adoption import Held

What = Annotated[str, typer.Argument(help="A name, a tag, or the beginning of a version's id.")]
NameArgument = Annotated[str, typer.Argument(help="A name in the store.")]
StoreOption = Annotated[str, typer.Option("--store", help="Where the store is.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]

adapters = typer.Typer(
    name="adapters",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Keep adapters as versions that never change, under names that move: `qadapt adapters add my-run`.",
)


@adapters.command()
def add(
    what: Annotated[str, typer.Argument(help="A run, an adapter's folder, or hub:owner/name.")],
    *,
    name: Annotated[
        str, typer.Option("--as", help="The name that means it from now on; default: the run's own.")
    ] = "",
    parent: Annotated[
        str | None,
        typer.Option(help="The version it followed; default: the one that the name means now."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub.")] = None,
    held: Annotated[
        str | None,
        typer.Option(
            help="How the base of an adapter that qadapt did not train was held: nf4, int8 or none. Its "
            "prompts are taken to be the base's own."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Its base, if not the one that it names, or where that lies here.")
    ] = None,
    folder: Annotated[str, typer.Option(help="Where the runs are.")] = "runs",
    store: StoreOption = "adapters",
    json: JsonOption = False,
) -> None:
    """Checks an adapter against its base and keeps it as a version; its name means it from now on.

    Refused: tensors that do not fit the base, NaN, absurd numbers, pickles, links out of the folder.

    Examples: `qadapt adapters add my-run`, `qadapt adapters add my-run --as summaries`, `qadapt adapters add
    hub:owner/adapter --revision v1`.
    """
    from qadapt.trained.adoption import Said
    from qadapt.trained.keeping import add as keep

    said = Said(revision, _held(held), base)
    added = keep(what, _store(store), name=name, parent=parent, said=said, folder=folder)
    values = {"schema": 1, "name": added.name, "id": added.version.id, "new": added.is_new}
    verb = "keeps" if added.is_new else "has already"
    _say(json, values, f"The store {verb} {_short(added.version.id)}; {added.name} means it.")


@adapters.command("list")
def list_(store: StoreOption = "adapters", json: JsonOption = False) -> None:
    """Lists names and tags with the versions they mean, and the versions that nothing means.

    Example: `qadapt adapters list`.
    """
    from qadapt.view.adapter_table import store_table, store_values

    kept = _store(store)
    if json:
        typer.echo(json_text.dumps(store_values(kept), indent=2))
    elif kept.ids() or kept.names():
        console().print(store_table(kept))
    else:
        console().print(f"The store {store} holds nothing.", markup=False)


@adapters.command()
def show(what: What, store: StoreOption = "adapters", json: JsonOption = False) -> None:
    """Shows what is known of a version, its folder, and whether every byte is as it was added.

    Examples: `qadapt adapters show summaries`, `qadapt adapters show 3f2a`.
    """
    from qadapt.view.adapter_table import version_lines

    kept = _store(store)
    version = kept.version(kept.find(what))
    folder = kept.folder_of(version.id)
    if json:
        values = {"schema": 1, "id": version.id, "folder": str(folder), **asdict(version)}
        typer.echo(json_text.dumps(values, indent=2))
        return
    for line in version_lines(version, folder):
        console().print(line, markup=False, soft_wrap=True)


@adapters.command()
def use(name: NameArgument, what: What, store: StoreOption = "adapters", json: JsonOption = False) -> None:
    """Lets a name mean another version of the store; a new name can be made so, too.

    Example: `qadapt adapters use summaries 3f2a`.
    """
    version = _store(store).use(name, what)
    _say(json, {"schema": 1, "name": name, "id": version}, f"{name} means {_short(version)}.")


@adapters.command()
def rollback(name: NameArgument, store: StoreOption = "adapters", json: JsonOption = False) -> None:
    """Lets a name mean again what it meant before; what it is rolled back from stays in the store.

    Example: `qadapt adapters rollback summaries`.
    """
    moved = _store(store).rollback(name)
    values = {"schema": 1, "name": name, "id": moved.current, "left": moved.left[-1]}
    _say(json, values, f"{name} means {_short(moved.current)} again, no more {_short(moved.left[-1])}.")


@adapters.command()
def tag(
    what: What,
    tag: Annotated[str, typer.Argument(help="The tag; one that is there moves.")],
    store: StoreOption = "adapters",
    json: JsonOption = False,
) -> None:
    """Lets a tag stand for a version.

    Example: `qadapt adapters tag summaries best`.
    """
    version = _store(store).tag(what, tag)
    _say(json, {"schema": 1, "tag": tag, "id": version}, f"{tag} stands for {_short(version)}.")


@adapters.command()
def diff(
    first: What,
    second: What,
    store: StoreOption = "adapters",
    json: JsonOption = False,
) -> None:
    """Says what differs between two versions: base, prompts, rows, recipe, losses and numbers.

    Example: `qadapt adapters diff summaries 3f2a`.
    """
    from qadapt.adapters.difference import difference_of
    from qadapt.view.adapter_table import difference_lines

    kept = _store(store)
    found = difference_of(kept, kept.find(first), kept.find(second))
    if json:
        typer.echo(json_text.dumps({"schema": 1, **asdict(found)}, indent=2))
        return
    for line in difference_lines(found):
        console().print(line, markup=False, soft_wrap=True)


@adapters.command()
def remove(what: What, store: StoreOption = "adapters", json: JsonOption = False) -> None:
    """Takes a name or a tag away, or a version that neither means.

    The versions of a name stay until `qadapt adapters gc`.

    Example: `qadapt adapters remove summaries`.
    """
    removed = _store(store).remove(what)
    _say(json, {"schema": 1, "removed": removed}, f"Removed {removed}.")


@adapters.command()
def push(
    what: Annotated[
        str, typer.Argument(help="A name, a tag, the beginning of a version's id, a run, or a folder.")
    ],
    *,
    to: Annotated[str, typer.Option(help="The repository, hub:owner/name; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    folder: Annotated[str, typer.Option(help="Where the runs are.")] = "runs",
    store: StoreOption = "adapters",
    json: JsonOption = False,
) -> None:
    """Pushes an adapter to a hub as it is, with its card and its proof, as `hf auth login` allows.

    What an earlier adapter left in the repository is replaced; `qadapt adapters add hub:owner/name` is the
    way back.

    Example: `qadapt adapters push summaries --to hub:me/summaries --private`.
    """
    from qadapt.cli.stages import drawn
    from qadapt.export.hub import HubTarget
    from qadapt.exporting.sharing import push as push_adapter
    from qadapt.trained.keeping import HUB

    target = HubTarget(to.removeprefix(HUB), is_private=private)
    pushed = drawn(push_adapter(what, target, folder=folder, store=store), error_console())
    _say(json, {"schema": 1, **asdict(pushed)}, f"pushed {pushed.name}: {pushed.address}")


@adapters.command()
def bisect(
    what: What,
    *,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")],
    expect: Annotated[str, typer.Option(help="What a right answer holds.")],
    longest: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    store: StoreOption = "adapters",
    json: JsonOption = False,
) -> None:
    """Finds the version where an answer broke, among a broken version and those it followed.

    Example: `qadapt adapters bisect summaries --prompt "Two loaves for Ada." --expect Ada`.
    """
    from qadapt.stage import go_through
    from qadapt.trained.bisecting import Tried
    from qadapt.trained.bisecting import bisect as find_break

    asked: list[dict[str, Any]] = []

    def say(tried: Tried) -> None:
        asked.append(asdict(tried))
        said = "right" if tried.is_right else "broken"
        console(is_quiet=json).print(f"{_short(tried.version)} {said}: {tried.answer.strip()}", markup=False)

    found = go_through(find_break(_store(store), what, prompt=prompt, expected=expect, longest=longest), say)
    values = {"schema": 1, **asdict(found), "asked": asked}
    _say(json, values, f"It broke with {_short(found.broken)}; {_short(found.right)} before it is right.")


@adapters.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    store: StoreOption = "adapters",
    json: JsonOption = False,
) -> None:
    """Removes the versions that no name means or meant and no tag stands for.

    Examples: `qadapt adapters gc --dry-run`, `qadapt adapters gc`.
    """
    from qadapt.units import format_bytes

    freed = _store(store).gc(is_trial=dry_run)
    verb = "Would remove" if dry_run else "Removed"
    _say(
        json,
        {"schema": 1, **asdict(freed)},
        f"{verb} {len(freed.versions)} version{'s' * (len(freed.versions) != 1)}, "
        f"{format_bytes(freed.bytes)}.",
    )


def _held(text: str | None) -> Held | None:
    from typing import cast, get_args

    from qadapt.errors import BadRecipe
    from qadapt.trained.adoption import Held

    if text is not None and text not in get_args(Held):
        raise BadRecipe(f"--held is {text!r}.", cure=f"Give one of {', '.join(get_args(Held))}.")
    return cast("Held | None", text)


def _store(path: str) -> Store:
    from qadapt.adapters.store import Store

    return Store(Path(path))


def _say(is_json: bool, values: dict[str, Any], text: str) -> None:
    if is_json:
        typer.echo(json_text.dumps(values, indent=2))
    else:
        console().print(text, markup=False, soft_wrap=True)


def _short(version_id: str) -> str:
    from qadapt.adapters.store import SHOWN

    return version_id[:SHOWN]


adapters.command()(combine)
