"""Adapters of one base made into one: Σ weight · ΔW, thinned out or compressed if asked, as an adapter again.

What is summed is what each adapter adds to its weights (task arithmetic, Ilharco et al., arXiv:2212.04089),
not its factors; bottleneck adapters have a mean. `adapters/` computes, `adapter.py` reads. What is no sum
is refused by name; one adapter with the weight 1 is a copy, of whatever method. The order of the adapters
changes no number. Knows no runs and no base: its weights are not read.

Legend: O output rows, I input columns of a weight, R rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qadapt.adapters.average import average, upper
from qadapt.adapters.check import MOST_RMS
from qadapt.adapters.compose import Pair, compressed, distance, joined, length
from qadapt.adapters.facts import (
    COMBINATION_FILE,
    AdapterFacts,
    is_side_car,
    own_files,
    read_facts,
    write_facts,
)
from qadapt.adapters.side_car_files import VERSION
from qadapt.adapters.thinning import Matrix, change, dropped, elected, lengths, low_rank, summed, trimmed
from qadapt.adapters.versions import copy_adapter_files, sha256_of
from qadapt.data.prompt import CONTRACT_FILE
from qadapt.errors import BadExport, BadRecipe, Unsupported
from qadapt.events import Event, StageAdvanced, StageStarted, Warned
from qadapt.export.adapter import Adapter, refuse_in_a_mix
from qadapt.export.combined_config import WEIGHTS, Scaled, combined_config, narrowest, smallest, tensors_of
from qadapt.export.folder import copy_files
from qadapt.export.merged_model import weighted
from qadapt.export.one_base import check_one_base
from qadapt.export.peft_folder import check_numbers
from qadapt.export.staging import new_folder, refuse_existing
from qadapt.export.writing import OTHER_FILES_BYTES
from qadapt.licences import copy_licences

UPPER = "upper"
WAYS = ("sum", "magnitude", "ties", "dare", "dare-ties", UPPER)
"""How changes are put together: as they are, or with a share of their numbers only, or of their layers."""
STAGE = "combining adapters"
_OF_ITS_OWN = "adapter"
"""What the folder of an adapter is called in those of its run and of its version."""


@dataclass(frozen=True)
class Way:
    """How adapters are put together.

    Attributes:
        name: One of `WAYS`.
        rank: The largest rank of the result; None: the sum of theirs.
        density: The share of the numbers of each change that is kept, of each weight alone; of bottleneck
            adapters the share of the layers, the upper ones; not for `sum`.
        seed: Of what `dare` keeps.
    """

    name: str = "sum"
    rank: int | None = None
    density: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Combined:
    """An adapter that was made of others.

    Attributes:
        folder: Where it is.
        weights: How many weights it changes; 0: it is a copy.
        rank: Its largest rank.
        dtype: Of its numbers: the smallest type that holds each of them.
        bytes: Size of its tensors' file.
        error: ‖what was asked − what is written‖ / ‖what was asked‖, over all weights, in the Frobenius norm.
        worst: The weight whose own error is largest.
        worst_error: That error.
    """

    folder: Path
    weights: int
    rank: int
    dtype: str
    bytes: int
    error: float
    worst: str
    worst_error: float


def combine(
    adapters: Sequence[tuple[Path, float]], target: Path, *, way: Way | None = None
) -> Generator[Event, None, Combined]:
    """Makes one adapter of several and writes it, whole or not at all, yielding its progress.

    Args:
        adapters: Folders with weights: PEFT ones of LoRA and the like, with any weights, or bottleneck
            adapters of one architecture, with weights of a mean. The result speaks as the
            first was trained. One folder with the weight 1 may be of any method.
        target: The folder to be; it must not exist.
        way: How they are put together; None: summed, exactly.

    Raises:
        BadExport: Adapters are of different bases, or one has NaN or contradicts itself.
        BadOutput: The target exists, or its place is read-only or full.
        BadRecipe: No adapter, a weight that is no number or absurdly large, or a way that is not known.
        BadRun: There is no adapter in a folder, or not what it was trained on.
        Unsupported: An adapter's change is no sum.
    """
    chosen, way = weighted(adapters), way or Way()
    _check_way(way)
    refuse_existing(target)
    folders = [folder for folder, _ in chosen]
    facts = [read_facts(folder) for folder in folders]
    check_one_base(folders, facts, is_held=True)
    yield StageStarted(stage=STAGE)
    yield from _prompt_warning(folders, facts)
    if chosen == [(folders[0], 1)] and replace(way, seed=0) == Way():
        check_numbers(folders[0])
        made = None
    elif any(is_side_car(folder) for folder in folders):
        made = _averaged(chosen, way)
    else:
        made = yield from _composed(chosen, way)
    return _written(made, chosen, target, way)


@dataclass(frozen=True)
class _Made:
    """What is written of an adapter that is no copy.

    Attributes:
        tensors: By their names in its file.
        settings: What stands in its other file.
        dtype: Of its numbers.
        rank: Its largest rank, or its width.
        lengths: Weight → the length of what was asked for it, and of what is written amiss.
    """

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    dtype: str
    rank: int
    lengths: Mapping[str, tuple[float, float]]

    @property
    def error(self) -> float:
        """Over all weights."""
        asked, lost = (math.hypot(*each) for each in zip(*self.lengths.values(), strict=True))
        return _share(lost, asked)

    @property
    def worst(self) -> tuple[str, float]:
        """The weight with the largest error, and that error."""
        errors = {name: _share(lost, asked) for name, (asked, lost) in self.lengths.items()}
        name = max(errors, key=errors.__getitem__)
        return name, errors[name]


def _averaged(chosen: Sequence[tuple[Path, float]], way: Way) -> _Made:
    """The mean of bottleneck adapters."""
    others = [folder for folder, _ in chosen if not is_side_car(folder)]
    if others:
        raise Unsupported(
            f"The adapter in {others[0]} changes weights, others stand beside them: they have "
            "no sum and no mean.",
            cure="Combine adapters of one method.",
        )
    settings, exact = average(chosen)
    if way.rank is not None or way.name not in (Way().name, UPPER):
        asked = f"rank {way.rank}" if way.name == "sum" else way.name
        raise Unsupported(
            f"Bottleneck adapters are averaged, number by number; {asked} means nothing for them.",
            cure="Leave that out, and give weights that sum to 1.",
        )
    if way.density is not None:
        settings, exact = upper(settings, exact, way.density)
    tensors, dtype = smallest({name: tensor.float() for name, tensor in exact.items()})
    found = {name: (float(each.norm()), float((tensors[name] - each).norm())) for name, each in exact.items()}
    return _Made(tensors, {"version": VERSION, **settings}, dtype, settings["width"], found)


def _composed(chosen: Sequence[tuple[Path, float]], way: Way) -> Generator[Event, None, _Made]:
    """What the adapters add, weight by weight."""
    if way.name == UPPER:
        raise Unsupported(
            f"The adapter in {chosen[0][0]} changes weights; {UPPER} leaves out bottlenecks beside layers.",
            cure=f"Choose from: {', '.join(WAYS[:-1])}.",
        )
    pairs: dict[str, Scaled] = {}
    found: dict[str, tuple[float, float]] = {}
    with ExitStack() as stack:
        opened = [stack.enter_context(Adapter(folder, weight)) for folder, weight in chosen]
        for adapter in opened:
            _refuse(adapter)
        keyed = [(sha256_of(adapter.folder / WEIGHTS), adapter) for adapter in opened]
        keyed.sort(key=lambda each: (each[0], each[1].weight))
        names = sorted({name for adapter in opened for name in adapter.weights})
        for done, name in enumerate(names, start=1):
            having = [(key, adapter) for key, adapter in keyed if name in adapter.weights]
            _check_shapes(name, [adapter for _, adapter in having])
            parts = [_Part(adapter, name, key=key) for key, adapter in having]
            _refuse_absurd(parts)
            pairs[name], found[name] = _summed(parts, way) if way.name == "sum" else _thinned(parts, way)
            yield StageAdvanced(stage=STAGE, done=done, total=len(names), unit="weights")
    tensors, dtype = tensors_of(pairs)
    config = combined_config(pairs, [folder for folder, _ in chosen])
    return _Made(tensors, config, dtype, max(scaled.pair.rank for scaled in pairs.values()), found)


class _Part:
    """What one adapter adds to one weight: scale · pair."""

    def __init__(self, adapter: Adapter, name: str, *, key: str) -> None:
        update = adapter.update(name)
        self.pair, self.scale = Pair(update.a.double(), update.b.double()), update.scale
        self.name, self.key = name, key


def _refuse_absurd(parts: Sequence[_Part]) -> None:
    """Refuses what would drown its base, and could not even be measured any more."""
    for part in parts:
        numbers = part.pair.a.shape[1] * part.pair.b.shape[0]
        rms = length(part.pair) * abs(part.scale) / math.sqrt(numbers)
        if not rms <= MOST_RMS:
            raise BadRecipe(
                f"With that weight a part changes {part.name} by {rms:.3g} (root mean square), more than "
                f"{MOST_RMS:g}: it would drown its base.",
                cure="Give weights nearer to 1, with which an adapter is what was trained.",
            )


def _summed(parts: Sequence[_Part], way: Way) -> tuple[Scaled, tuple[float, float]]:
    """The sum; in the scale of its first part, so that its numbers stay what they were where they can."""
    unit = next((abs(part.scale) for part in parts if part.scale), 1.0)
    exact = joined([(part.scale / unit, part.pair) for part in parts])
    pair = exact if way.rank is None or way.rank >= exact.rank else compressed(exact, way.rank)
    written = narrowest(pair)
    return Scaled(written, unit), (length(exact) * unit, distance(exact, written) * unit)


def _thinned(parts: Sequence[_Part], way: Way) -> tuple[Scaled, tuple[float, float]]:
    """What is left of the changes, as the nearest change of the rank."""
    matrix = _matrix([change(part.pair, part.scale) for part in parts], parts, way)
    rank = sum(part.pair.rank for part in parts) if way.rank is None else way.rank
    written = narrowest(low_rank(matrix, rank))
    return Scaled(written, 1.0), lengths(matrix, written)


def _matrix(changes: Sequence[Matrix], parts: Sequence[_Part], way: Way) -> Matrix:
    assert way.density is not None, "_check_way sees to it"
    if way.name in ("ties", "magnitude"):
        kept = [trimmed(each, way.density) for each in changes]
    else:
        kept = [
            dropped(each, way.density, key=f"{way.seed} {part.key} {part.name}")
            for each, part in zip(changes, parts, strict=True)
        ]
    return elected(kept) if way.name.endswith("ties") else summed(kept)


def _written(made: _Made | None, chosen: Sequence[tuple[Path, float]], target: Path, way: Way) -> Combined:
    """Writes the adapter with the terms of use of its parts, or the copy of the only one."""
    first = chosen[0][0]
    file, settings_file = own_files(first)
    size = sum(each.nbytes for each in made.tensors.values()) if made else (first / file).stat().st_size
    error, worst = (made.error, made.worst) if made else (0.0, ("", 0.0))
    with new_folder(target, needed_bytes=size + OTHER_FILES_BYTES) as building:
        folder = building.path
        if made is None:
            copy_adapter_files(first, folder)
        else:
            save_file(dict(made.tensors), folder / file, {"format": "pt"})
            _write_json(folder / settings_file, made.settings)
            copy_files(first, folder, (CONTRACT_FILE,))
            write_facts(read_facts(first), folder)
            for part, _ in chosen:
                copy_licences(part, folder)
        parts = [_said(*each) for each in chosen]
        _write_json(folder / COMBINATION_FILE, {"parts": parts, "way": asdict(way), "error": error})
        size = (folder / file).stat().st_size
    if made is None:
        return Combined(target, 0, 0, "", size, error, *worst)
    return Combined(target, len(made.lengths), made.rank, made.dtype, size, error, *worst)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _said(folder: Path, weight: float) -> dict[str, object]:
    """A part, named by its run, its version or its folder, for whoever asks what an adapter was made of."""
    place, sha256 = folder.resolve(), sha256_of(folder / own_files(folder)[0])
    name = place.parent.name if place.name == _OF_ITS_OWN else place.name
    return {"name": name, "weight": weight, "sha256": sha256}


def _share(lost: float, asked: float) -> float:
    return lost / asked if lost else 0.0


def _check_way(way: Way) -> None:
    if way.name not in WAYS:
        raise BadRecipe(
            f"Adapters are not put together by {way.name!r}.", cure=f"Choose from: {', '.join(WAYS)}."
        )
    if way.rank is not None and way.rank < 1:
        raise BadRecipe(
            f"The rank {way.rank} holds no change.", cure="Give a rank of 1 or more; 8 to 64 is usual."
        )
    if way.name == "sum" and way.density is not None:
        raise BadRecipe(
            f"A sum keeps every number; a density of {way.density} means nothing for it.",
            cure=f"Leave the density out, or choose from: {', '.join(WAYS[1:])}.",
        )
    if way.name != "sum" and (way.density is None or not 0 < way.density <= 1):
        raise BadRecipe(
            f"{way.name} keeps a share of what there is; its density is {way.density}.",
            cure="Give a density above 0 and up to 1, such as 0.2.",
        )


def _prompt_warning(folders: Sequence[Path], known: Sequence[AdapterFacts]) -> Iterator[Event]:
    if len({facts.prompt_fingerprint for facts in known}) > 1:
        yield Warned(
            message=f"The adapters were trained with different prompts; the result has that of {folders[0]}.",
            cure="Put the adapter first whose template and end tokens it is to have.",
        )


def _refuse(adapter: Adapter) -> None:
    """Refuses what is no sum of changes of low rank."""
    refuse_in_a_mix(adapter)
    if adapter.projected:
        raise Unsupported(
            f"The adapter in {adapter.folder} is of VeRA, whose sums are no VeRA: they are not combined.",
            cure="Merge it with others into a model: qadapt export --with.",
        )
    if adapter.shifts:
        raise Unsupported(
            f"The adapter in {adapter.folder} has biases of its own (lora_bias), {adapter.shifts[0]} first, "
            "which are not combined.",
            cure="Merge it with others into a model: qadapt export --with.",
        )


def _check_shapes(name: str, having: Sequence[Adapter]) -> None:
    shapes = {adapter.shape_of(name) for adapter in having}
    if len(shapes) > 1:
        raise BadExport(
            f"The adapters change {name} in different shapes: {', '.join(map(str, sorted(shapes)))}.",
            cure="Combine adapters of one base.",
        )
