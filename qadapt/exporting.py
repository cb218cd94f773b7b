"""A finished run made into something to use: in which form, on which base, proven, with its card.

    run ─► base files ─► which base? ─► the form's writer ─► proof ─► card ─► the folder appears

Each form has a writer in `export/`, which shows its folder only after `Finish` has proven it. Pushing to a
hub comes after that and on its own (`export/hub.py`).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from qadapt.adapters.facts import read_facts
from qadapt.data.prompt import CONTRACT_FILE
from qadapt.data.tokens import Tokens
from qadapt.errors import BadData, BadExport, BadRecipe, BadRun
from qadapt.events import BasesCompared, Event, Exported, Warned
from qadapt.export.card import Made, card_text, comparison
from qadapt.export.choose_base import AUTO, choose_base
from qadapt.export.folder import copy_files, copy_licence, exported, write_other_files
from qadapt.export.gguf import About, write_gguf
from qadapt.export.gguf_lora import write_gguf_lora
from qadapt.export.gguf_types import GGUF_FORMS
from qadapt.export.llama_quantize import K_FORMS, find_llama_quantize, quantize_gguf
from qadapt.export.merge import BASES as MERGED_BASES
from qadapt.export.merge import FORMS as MERGED_FORMS
from qadapt.export.merge import OTHER_FILES_BYTES, Writing, merge
from qadapt.export.merged_model import MergedModel, open_merged
from qadapt.export.ollama import adds_bos, modelfile
from qadapt.export.peft_folder import FORM as ADAPTER
from qadapt.export.peft_folder import copy_adapter
from qadapt.export.prompt_files import write_prompt_files
from qadapt.export.quantized import DTYPES as QUANTIZED_DTYPES
from qadapt.export.quantized import FORM as QUANTIZED
from qadapt.export.quantized import quantize
from qadapt.export.staging import new_folder, refuse_existing
from qadapt.export_job import Job
from qadapt.material import rows_to_evaluate
from qadapt.model.precision import choose_device
from qadapt.model.source import quantized_type_of
from qadapt.proving import prove_export
from qadapt.quiet import quiet_libraries
from qadapt.recipe_file import read_recipe
from qadapt.resumption import Earlier, check_finished
from qadapt.run_folder import find_run
from qadapt.run_parts import find_same_base
from qadapt.stage import passing, with_progress
from qadapt.units import parse_bytes
from qadapt.view.journal import effective, read_events

GGUF_LORA = "gguf-lora"
UNMERGED = (ADAPTER, GGUF_LORA)
"""Forms of the adapter alone."""
BASES = (*MERGED_BASES, AUTO)
_LEAST_CONTEXT = 4096


def export(
    name: str,
    *,
    form: str | None = None,
    base: str | None = None,
    to: Path | None = None,
    folder: str = "runs",
    proof: bool = True,
) -> Iterator[Event]:
    """Exports a finished run; the last event is `Exported`.

    Nothing is at the target before everything is, and is proven.

    Args:
        name: Name or path of the run.
        form: One of `FORMS`; None: as the recipe says.
        base: One of `BASES`; None: as the recipe says. Not for forms of the adapter alone.
        to: The folder to be; None: `export/<form>` in the run's folder.
        folder: Where the runs are.
        proof: Prove it; without, the card says that it is unproven.

    Raises:
        BadExport: The exported numbers would not be the trained ones, or there is no original base.
        BadOutput: The target exists or cannot be written.
        BadRecipe: The form or the base is not known, or one does not go with the other.
        BadRun: There is no such run, it has no adapter yet, or its base changed.
        Unsupported: This adapter or base has no such form; the cure names one that serves.
    """
    quiet_libraries()
    run = find_run(name, folder)
    facts = read_facts(run.adapter)
    check_finished(run, Earlier(effective(read_events(run.path))))
    recipe = read_recipe(str(run.recipe))
    chosen = form or recipe.export.form
    _check_choices(chosen, base)
    target = to or run.export(chosen)
    refuse_existing(target)
    if chosen in K_FORMS:
        find_llama_quantize()  # before anything is measured
    files = yield from with_progress("finding the base", lambda report: find_same_base(facts, report))
    job = Job(run, recipe, facts, files, chosen, target)
    finish = Finish(job, is_proven=proof)
    if chosen not in UNMERGED:
        base_of = _base_of(job, base or recipe.export.base, is_measured=proof)
        finish.base = yield from passing(base_of, finish.notes)
    writing = Writing(shard_bytes=parse_bytes(recipe.export.shard), finish=finish)
    for event in WAYS[chosen](job, finish.base, writing):
        yield replace(event, notes=tuple(finish.findings)) if isinstance(event, Exported) else event


class Finish:
    """What is done to a whole export before it appears: proof and card.

    Attributes:
        base: Weights it is merged on; empty for the adapter alone.
        findings: What was found out, one sentence each.

    Args:
        job: What is exported.
        is_proven: Whether to prove it.
    """

    def __init__(self, job: Job, *, is_proven: bool) -> None:
        self._job, self._is_proven = job, is_proven
        self.base = ""
        self.findings: list[str] = []

    def notes(self, event: Event) -> bool:
        """Keeps what an event has found out; every event is to be passed on."""
        if isinstance(event, BasesCompared):
            self.findings.append(comparison(event))
        return True

    def __call__(self, folder: Path) -> Iterator[Event]:
        """Proves and describes the export in a folder.

        Raises:
            BadExport: It is not what was trained.
        """
        job = self._job
        contract = job.run.adapter / CONTRACT_FILE
        if contract.is_file():
            shutil.copyfile(contract, folder / CONTRACT_FILE)
        if self._is_proven:
            proof = yield from prove_export(folder, job.run, form=job.form, base=self.base, files=job.files)
            self.findings += proof.sentences()
            if (lost := proof.deviation) is not None:
                yield Warned(
                    message=lost,
                    cure="Choose a form with more bits (gguf-q8_0, merged-fp16), or the adapter beside its "
                    "base (--form adapter).",
                )
        file = next((path.name for path in folder.glob("*.gguf")), "")
        made = Made(job.form, self.base, file, self.findings, is_proven=self._is_proven)
        (folder / "README.md").write_text(card_text(job.card, made), encoding="utf-8")


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


def _base_of(job: Job, asked: str, *, is_measured: bool) -> Generator[Event, None, str]:
    """The weights to merge on; if that is to be measured, or must be, both are compared.

    Raises:
        BadExport: The original ones are asked for, and there are none.
    """
    if (stored := quantized_type_of(job.facts.base)) is not None:
        known = f"The base {job.facts.base} is itself quantized ({stored})"
        cure = "train on the 16-bit model to have the choice."
        if asked == "original":
            raise BadExport(
                f"{known}: there are no original weights to merge on.", cure=f"Leave --base out, or {cure}"
            )
        if asked == AUTO:
            yield Warned(message=f"{known}: it is merged as it was trained on.", cure=cure.capitalize())
        return "dequantized"
    if asked != AUTO and not is_measured:
        return asked
    return (
        yield from choose_base(
            job.files.folder,
            job.run.adapter,
            asked=asked,
            dtype=_dtype_of(job),
            rows=(yield from _held_out(job)),
            device=choose_device("auto"),
        )
    )


def _held_out(job: Job) -> Generator[Event, None, Sequence[Tokens]]:
    """The rows that the run held out; a warning if they cannot be had again."""
    data = job.recipe.data
    if data.held_out is None and not data.held_out_fraction:
        return ()
    try:
        chosen = rows_to_evaluate(
            job.recipe, job.contract, data=None, fingerprint=job.plan.ingredients.rows, conversations=0
        )
    except (BadRun, BadData) as error:
        yield Warned(message=f"The two bases cannot be compared: {error.problem}", cure=error.cure)
        return ()
    return chosen.rows


def _dtype_of(job: Job) -> str:
    """What merged weights are rounded to in a form, before it quantizes them itself."""
    if job.form == QUANTIZED:
        return QUANTIZED_DTYPES[job.facts.load_dtype]
    return MERGED_FORMS.get(job.form, "F32")


def _merged(job: Job, base: str, writing: Writing) -> Iterator[Event]:
    yield from merge(
        model_folder=job.files.folder,
        adapter_folder=job.run.adapter,
        target=job.target,
        form=job.form,
        base=base,
        writing=writing,
    )


def _quantized(job: Job, base: str, writing: Writing) -> Iterator[Event]:
    yield from quantize(
        model_folder=job.files.folder,
        adapter_folder=job.run.adapter,
        target=job.target,
        base=base,
        load_dtype=job.facts.load_dtype,
        writing=writing,
    )


def _adapter(job: Job, base: str, writing: Writing) -> Iterator[Event]:
    if job.facts.revision is None:
        yield Warned(
            message=f"The base of this adapter, {job.facts.base}, is on no hub: its name helps nobody else.",
            cure="Give others the base, too; they load it themselves and the adapter onto it.",
        )
    yield from copy_adapter(
        model_folder=job.files.folder, adapter_folder=job.run.adapter, target=job.target, writing=writing
    )


def _gguf(job: Job, base: str, writing: Writing) -> Iterator[Event]:
    """A GGUF file with its Modelfile; K-quants by an installed llama-quantize, from a file in 16 bits."""
    started = time.monotonic()
    program = find_llama_quantize() if job.form in K_FORMS else None
    with (
        open_merged(job.files.folder, job.run.adapter, base=base, dtype="F32") as merged,
        _described(job, merged) as described,
        new_folder(job.target, needed_bytes=OTHER_FILES_BYTES) as building,
    ):
        file = building.path / job.gguf_name
        first = file if program is None else building.path / "f16.gguf"
        kind = GGUF_FORMS.get(job.form, "F16")
        yield from write_gguf(merged, first, described=described, kind=kind, about=_about(job))
        if program is not None:
            yield from quantize_gguf(first, file, kind=K_FORMS[job.form], program=program)
            first.unlink()
        yield from _write_modelfile(job, building.path)
        copy_files(described, building.path, ("config.json",))
        copy_licence(job.files.folder, building.path)
        yield from writing.finish(building.path)
    yield exported(job.target, form=job.form, base=base, started=started)


def _gguf_lora(job: Job, base: str, writing: Writing) -> Iterator[Event]:
    started = time.monotonic()
    with (
        open_merged(job.files.folder, job.run.adapter, base="original"),  # whether it is of this base
        new_folder(job.target, needed_bytes=OTHER_FILES_BYTES) as building,
    ):
        file = building.path / job.gguf_name
        yield from write_gguf_lora(job.run.adapter, file, model_folder=job.files.folder, about=_about(job))
        copy_licence(job.files.folder, building.path)
        yield from writing.finish(building.path)
    yield exported(job.target, form=job.form, base=base, started=started)


def _about(job: Job) -> About:
    card = job.card
    return About(title=job.run.name, base=card.model, licence=card.licence, adds_bos=adds_bos(job.contract))


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
        write_prompt_files(job.run.adapter, folder)
        yield folder


def _write_modelfile(job: Job, folder: Path) -> Iterator[Event]:
    longest = max(job.recipe.data.length, _LEAST_CONTEXT)
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
