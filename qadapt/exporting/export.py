"""A trained adapter made into something to use: in which form, on which base, proven, with its card.

    adapter ─► base files ─► which base? ─► the form's writer ─► proof ─► card ─► the folder appears

Each form has a writer in `export/`, which shows its folder only after `Finish` has proven it. Pushing to a
hub comes after that and on its own (`export/hub.py`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from qadapt.adapters.facts import is_side_car
from qadapt.data.prompt import saved_contract
from qadapt.errors import BadRecipe, Unsupported
from qadapt.events import Event, Exported, Warned
from qadapt.export.choose_base import AUTO
from qadapt.export.folder import copy_files, exported, write_other_files
from qadapt.export.gguf import About, write_gguf
from qadapt.export.gguf_lora import FORM as GGUF_LORA
from qadapt.export.gguf_lora import write_gguf_lora
from qadapt.export.gguf_types import GGUF_FORMS
from qadapt.export.llama_quantize import K_FORMS, find_llama_quantize, quantize_gguf
from qadapt.export.merge import BASES as MERGED_BASES
from qadapt.export.merge import FORMS as MERGED_FORMS
from qadapt.export.merge import merge
from qadapt.export.merged_model import MergedModel, open_merged
from qadapt.export.ollama import adds_bos, modelfile
from qadapt.export.peft_folder import FORM as ADAPTER
from qadapt.export.peft_folder import copy_adapter
from qadapt.export.prompt_files import write_prompt_files
from qadapt.export.quantized import FORM as QUANTIZED
from qadapt.export.quantized import quantize
from qadapt.export.room import folder_bytes
from qadapt.export.staging import new_folder, refuse_existing
from qadapt.export.writing import OTHER_FILES_BYTES, Writing
from qadapt.exporting.base import base_of
from qadapt.exporting.finish import Finish
from qadapt.exporting.job import Job
from qadapt.licences import copy_licences
from qadapt.model.folder import read_config
from qadapt.quiet import quiet_libraries
from qadapt.recipe import ExportSection
from qadapt.stage import passing, with_progress
from qadapt.trained.adapter import Trained, find_trained
from qadapt.trained.same_base import find_same_base
from qadapt.units import parse_bytes

UNMERGED = (ADAPTER, GGUF_LORA)
"""Forms of the adapter alone."""
BASES = (*MERGED_BASES, AUTO)
_LEAST_CONTEXT = 4096


def export(
    name: str | Mapping[str, float],
    *,
    form: str | None = None,
    base: str | None = None,
    to: Path | None = None,
    folder: str = "runs",
    store: str = "adapters",
    proof: bool = True,
    is_shared: bool = False,
) -> Iterator[Event]:
    """Exports a trained adapter, or what several make together; the last event is `Exported`.

    Nothing is at the target before everything is, and is proven.

    Args:
        name: A run by name or path, an adapter's folder, or a name, tag or version of the store; or several,
            each with the weight of its update, the first of which gives prompts, rows and base. These are
            merged, as `merge.FORMS`.
        form: One of `FORMS`; None: as the recipe says, so too the next.
        base: One of `BASES`. Not for forms of the adapter alone.
        to: The folder to be; None: `export/<form>` in the run's folder.
        folder: Where the runs are.
        store: Where the store is.
        proof: Prove it; without, the card says that it is unproven.
        is_shared: It goes to others: no file names a folder of this machine, not even the adapter's own,
            which else say where its base lies.

    Raises:
        BadExport: The exported numbers would not be the trained ones, or there is no original base.
        BadOutput: The target exists or cannot be written.
        BadAdapter: A version of the store is damaged, or a name stands for more than one adapter.
        BadRecipe: The form or the base is not known, or one does not go with the other, or several adapters
            are to be no merged model, or what is exported has no folder to go to.
        BadRun: There is nothing of that name, a run has not finished or is damaged, or its base or tokenizer
            changed.
        Unsupported: This adapter or base has no such form; the cure names one that serves.
    """
    quiet_libraries()
    parts = tuple(_chosen({name: 1.0} if isinstance(name, str) else name, folder, store))
    trained = parts[0][0]
    wanted = ExportSection() if trained.recipe is None else trained.recipe.export
    chosen = form or wanted.form
    target = _checked_target(parts, chosen, base=base, to=to)
    files = yield from with_progress("finding the base", partial(find_same_base, trained.facts))
    job = Job(parts, files, saved_contract(trained.adapter, files.folder), chosen, target, is_shared)
    finish = Finish(job, is_proven=proof)
    if chosen not in UNMERGED:
        found = base_of(job, base or wanted.base, is_measured=proof)
        finish.base = yield from passing(found, finish.notes)
    writing = Writing(shard_bytes=parse_bytes(wanted.shard), finish=finish)
    for event in WAYS[chosen](job, finish.base, writing):
        yield replace(event, notes=tuple(finish.findings)) if isinstance(event, Exported) else event


def _checked_target(
    parts: Sequence[tuple[Trained, float]], form: str, *, base: str | None, to: Path | None
) -> Path:
    """The folder to be, if what is asked goes together; all that can be refused before the base is found.

    Raises:
        QadaptError: As `export`.
    """
    is_mix = [weight for _, weight in parts] != [1]
    _check_choices(form, base)
    _check_side_cars(parts, form)
    if is_mix:
        _check_mix(form)
    target = to or _own_folder(parts[0][0], form, is_mix=is_mix)
    refuse_existing(target)
    if form in K_FORMS:
        find_llama_quantize()
    return target


def _chosen(weights: Mapping[str, float], folder: str, store: str) -> Iterator[tuple[Trained, float]]:
    """The adapters, each with its weight.

    Raises:
        BadAdapter: See `find_trained`; so too the next.
        BadRecipe: There are none.
        BadRun: There is none of a name.
    """
    if not weights:
        raise BadRecipe("There is no run to export.", cure="Name one, or several with their weights.")
    for name, weight in weights.items():
        yield find_trained(name, folder=folder, store=store), weight


def _own_folder(trained: Trained, form: str, *, is_mix: bool) -> Path:
    """Where an export goes if nothing else is said.

    Raises:
        BadRecipe: It is no run's.
    """
    if trained.run is None or is_mix:
        what = "What adapters make together" if is_mix else f"What is made of {trained.said}"
        raise BadRecipe(
            f"{what} belongs to no run: it has no folder of its own.",
            cure="Give the folder to be with --to.",
        )
    return trained.run.export(form)


def _check_side_cars(parts: Sequence[tuple[Trained, float]], form: str) -> None:
    """Refuses to make weights of adapters that no weights can be made of.

    Raises:
        Unsupported: One stands beside the base's weights, and the form is not the adapter alone.
    """
    for trained, _ in parts:
        if form != ADAPTER and is_side_car(trained.adapter):
            raise Unsupported(
                f"{trained.name} has {trained.said_method}, which work beside the base's weights: no "
                f"others are the same function, so there is no {form} of it.",
                cure="Choose --form adapter, which qadapt reads; `qadapt chat` and `qadapt evaluate` use it "
                "as it is.",
            )


def _check_mix(form: str) -> None:
    if form not in MERGED_FORMS:
        raise BadRecipe(
            f"Adapters are merged with weights into {', '.join(MERGED_FORMS)}, not into {form}.",
            cure="Choose one of these with --form.",
        )


def _check_choices(form: str, base: str | None) -> None:
    _check_known("form", form, FORMS)
    if base is not None:
        _check_known("base", base, BASES)
        if form in UNMERGED:
            raise BadRecipe(
                f"The form {form} is the adapter alone: it is merged on no base ({base!r}).",
                cure="Leave --base out, or choose a merged form.",
            )


def _check_known(what: str, choice: str, choices: Sequence[str]) -> None:
    if choice not in choices:
        raise BadRecipe(
            f"The {what} {choice!r} of an export is not known.", cure=f"Choose from: {', '.join(choices)}."
        )


def _merged(job: Job, base: str, writing: Writing) -> Iterator[Event]:
    yield from merge(
        model_folder=job.files.folder,
        adapter_folder=job.adapters,
        target=job.target,
        form=job.form,
        base=base,
        writing=writing,
    )


def _quantized(job: Job, base: str, writing: Writing) -> Iterator[Event]:
    yield from quantize(
        model_folder=job.files.folder,
        adapter_folder=job.trained.adapter,
        target=job.target,
        base=base,
        load_dtype=job.facts.load_dtype,
        writing=writing,
    )


def _adapter(job: Job, base: str, writing: Writing) -> Iterator[Event]:
    facts = job.facts
    if facts.revision is None:
        named = facts.shown_base if job.is_shared else facts.base
        yield Warned(
            message=f"The base of this adapter, {named}, is on no hub: its name helps nobody else.",
            cure="Give others the base, too; `qadapt adapters add ADAPTER --base PLACE` joins the two.",
        )
    yield from copy_adapter(
        model_folder=job.files.folder,
        adapter_folder=job.trained.adapter,
        target=job.target,
        writing=writing,
        is_shared=job.is_shared,
    )


def _gguf(job: Job, base: str, writing: Writing) -> Iterator[Event]:
    """A GGUF file with its Modelfile; K-quants by an installed llama-quantize, from a file in 16 bits."""
    started = time.monotonic()
    program = find_llama_quantize() if job.form in K_FORMS else None
    with (
        open_merged(job.files.folder, job.trained.adapter, base=base, dtype="F32") as merged,
        _described(job, merged) as described,
        new_folder(job.target, needed_bytes=folder_bytes(merged, job.form)) as building,
    ):
        file = building.path / job.gguf_name
        first = file if program is None else building.path / "f16.gguf"
        kind = GGUF_FORMS.get(job.form, "F16")
        yield from write_gguf(merged, first, described=described, kind=kind, about=_about(job))
        if program is not None:
            yield from quantize_gguf(first, file, kind=K_FORMS[job.form], program=program)
            first.unlink()
        copy_files(described, building.path, ("config.json",))
        yield from _write_modelfile(job, building.path)
        copy_licences(job.files.folder, building.path)
        yield from writing.finish(building.path)
    yield exported(job.target, form=job.form, base=base, started=started)


def _gguf_lora(job: Job, base: str, writing: Writing) -> Iterator[Event]:
    started = time.monotonic()
    with (
        open_merged(job.files.folder, job.trained.adapter, base="original"),  # whether it is of this base
        new_folder(job.target, needed_bytes=OTHER_FILES_BYTES) as building,
    ):
        file = building.path / job.gguf_name
        yield from write_gguf_lora(
            job.trained.adapter, file, model_folder=job.files.folder, about=_about(job)
        )
        copy_licences(job.files.folder, building.path)
        yield from writing.finish(building.path)
    yield exported(job.target, form=job.form, base=base, started=started)


def _about(job: Job) -> About:
    card = job.card
    return About(
        title=job.trained.name, base=card.model, licence=card.licence, adds_bos=adds_bos(job.contract)
    )


@contextmanager
def _described(job: Job, merged: MergedModel) -> Iterator[Path]:
    """A folder with what stands beside the weights of a merged model, for a while."""
    with tempfile.TemporaryDirectory(prefix="qadapt-") as place:
        folder = Path(place)
        write_other_files(
            job.files.folder,
            folder,
            dtype="F16",
            changed_config=merged.changed_config,
            vocabulary=merged.vocabulary,
        )
        write_prompt_files(job.trained.adapter, folder)
        yield folder


def _write_modelfile(job: Job, folder: Path) -> Iterator[Event]:
    config = read_config(folder, name=folder.name)
    trained_length = 0 if job.recipe is None else job.recipe.data.length
    longest = min(max(trained_length, _LEAST_CONTEXT), int(config["max_position_embeddings"]))
    written = modelfile(job.contract, job.gguf_name, context_tokens=longest)
    (folder / "Modelfile").write_text(written.text, encoding="utf-8")
    yield from written.warnings


Way = Callable[[Job, str, Writing], Iterator[Event]]
WAYS: dict[str, Way] = {
    **dict.fromkeys(MERGED_FORMS, _merged),
    **dict.fromkeys((*GGUF_FORMS, *K_FORMS), _gguf),
    GGUF_LORA: _gguf_lora,
    ADAPTER: _adapter,
    QUANTIZED: _quantized,
}
"""How each form is written."""
FORMS = tuple(WAYS)
"""The forms of an export."""
