"""The trained adapters that a recipe's one attends over or stands on: found, and held against the base.

Looks at small files only and imports no torch: estimates ask, too. What is made of them is in
`adapters/fusion.py` and `adapters/stack.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from qadapt.adapters.facts import BELOW, PEFT_FILES, SIDE_CAR_FILES, is_side_car, read_facts
from qadapt.adapters.store import SHOWN, Store
from qadapt.adapters.versions import sha256_of
from qadapt.errors import BadRecipe
from qadapt.methods import METHODS, ON, Activation, Fused, check_fused
from qadapt.run_folder import RunFolder
from qadapt.serve.partner import find_partner
from qadapt.stacking import BOTTLENECKS, stands_on

if TYPE_CHECKING:
    from qadapt.recipe import Recipe
    from qadapt.shape import ModelShape


@dataclass(frozen=True)
class Source:
    """A trained adapter that is attended over, or stood on.

    Attributes:
        folder: The adapter's.
        fused: What a step's memory depends on, and its name.
        base_sizes: Layers and width of its base.
    """

    folder: Path
    fused: Fused
    base_sizes: tuple[object, object]


def find_sources(recipe: Recipe) -> tuple[Source, ...]:
    """The adapters that `adapter.targets` names: those attended over, the one stood on, or none.

    Raises:
        BadAdapter: A version of the store is damaged, or a name stands for more than one adapter.
        BadRecipe: One is no bottleneck adapter, two have one name, or they are at different places.
        BadRun: There is nothing of a name, or a run has no adapter yet.
    """
    adapter, runs = recipe.adapter, recipe.run.folder
    if name := stands_on(adapter.targets):
        return (_source(name, runs, use="an adapter stands on a bottleneck adapter"),)
    if not METHODS[adapter.method].attends:
        return ()
    use = "attention is over bottleneck adapters"
    sources = tuple(_source(name, runs, use=use) for name in adapter.targets)
    check_fused([source.fused for source in sources])
    return sources


def fused_on(recipe: Recipe, shape: ModelShape | None) -> tuple[Fused, ...]:
    """The same as the plan has them.

    Raises:
        QadaptError: As `find_sources`; or one is for a base of other sizes.
    """
    sources = find_sources(recipe)
    for source in sources if shape is not None else ():
        assert shape is not None
        if source.base_sizes != (shape.layers, shape.width):
            layers, width = source.base_sizes
            raise BadRecipe(
                f"adapter.targets: {source.fused.name} is for a base of {layers} layers of width {width}; "
                f"{shape.name} has {shape.layers} of width {shape.width}.",
                cure="Give adapters that were trained on the recipe's base.",
            )
    return tuple(source.fused for source in sources)


def check_trained_on(sources: Sequence[Source], *, base: str, fingerprint: str) -> None:
    """Refuses adapters of another base.

    Args:
        sources: The adapters.
        base: The base's name.
        fingerprint: Of its files.

    Raises:
        BadRecipe: One was trained on other files.
        BadRun: One does not say on which.
    """
    for source in sources:
        facts = read_facts(source.folder)
        if facts.fingerprint != fingerprint:
            raise BadRecipe(
                f"adapter.targets: {source.fused.name} was trained on {facts.base}, whose files are others "
                f"than those of {base}, which the recipe names.",
                cure="Give adapters that were trained on the recipe's base.",
            )


def hash_of(sources: Sequence[Source]) -> str:
    """What recognizes the adapters, in their order; empty without any."""
    files = [source.folder / name for source in sources for name in SIDE_CAR_FILES]
    whole = "".join(sha256_of(file) for file in files)
    return hashlib.sha256(whole.encode()).hexdigest() if files else ""


def found_targets(recipe: Recipe) -> str | tuple[str, ...]:
    """`adapter.targets` with the folders of the adapters that it names: the same from anywhere.

    Raises:
        QadaptError: As `find_sources`.
    """
    targets, sources = recipe.adapter.targets, find_sources(recipe)
    if not sources:
        return targets
    folders = [str(source.folder) for source in sources]
    if not stands_on(targets):
        return tuple(folders)
    return tuple(f"{ON}{folders[0]}" if target.startswith(ON) else target for target in targets)


def name_below(recipe: Recipe) -> str:
    """What the adapter is called on which a recipe's stands; empty if on none."""
    return _name(Path(place)) if (place := stands_on(recipe.adapter.targets)) else ""


def shown_target(target: str) -> str:
    """A target without the folders that an adapter it names lies in."""
    start = ON if target.startswith(ON) else ""
    return f"{start}{_name(Path(target.removeprefix(start)))}"


def _source(target: str, runs: str, *, use: str) -> Source:
    partner = find_partner(target, runs)
    folder = RunFolder(partner.path).adapter if partner.kind == "run" else partner.path
    settings = _settings(folder, target)
    method: Any = str(settings.get("kind", ""))
    if method not in BOTTLENECKS:
        title = METHODS[method].title if method in METHODS else method or "a model"
        raise BadRecipe(
            f"adapter.targets: {target} is {title}, and {use}.",
            cure=f"Give adapters of {', '.join(BOTTLENECKS)}.",
        )
    if isinstance(below := settings.get(BELOW), dict):
        raise BadRecipe(
            f"adapter.targets: {target} stands on {below.get('name')} itself, and {use} of the base alone.",
            cure="Give adapters that were trained without `on:`.",
        )
    width, first, activation = (settings.get(name, 0) for name in ("width", "first_layer", "activation"))
    if type(width) is not int or type(first) is not int or activation not in get_args(Activation):
        raise _unreadable(
            target, folder, f"a width of {width}, {activation}, from layer {first} on, are none"
        )
    is_normed = settings.get("norm") is True
    fused = Fused(_name(folder), method, width, activation, norm=is_normed, first_layer=first)
    return Source(folder.absolute(), fused, (settings.get("layers"), settings.get("model_width")))


def _settings(folder: Path, target: str) -> dict[str, Any]:
    """What a side-car's settings say; of an adapter of PEFT's its method alone."""
    names = {True: SIDE_CAR_FILES[1], False: PEFT_FILES[1]}
    path = folder / names[is_side_car(folder)]
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(values, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise _unreadable(target, path, str(error)) from None
    return values if is_side_car(folder) else {"kind": str(values.get("peft_type", "")).lower()}


def _unreadable(target: str, place: Path, why: str) -> BadRecipe:
    return BadRecipe(
        f"adapter.targets: {target}: {place} cannot be read: {why}.",
        cure="Take the adapter's files from where they were made.",
    )


def _name(folder: Path) -> str:
    """What an adapter is called: as its run, as in the store, or as its folder."""
    place = folder.resolve()
    if place.name != "adapter":
        return place.name
    run = place.parent
    if run.parent.name != "versions":
        return run.name
    names = Store(run.parent.parent).names()
    return next((name for name, its in names.items() if its.current == run.name), run.name[:SHOWN])
