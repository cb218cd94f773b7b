"""The proof of a run's export, made while it is exported, and repeated on any later day (`qadapt verify`).

    files as written ─► every tensor ─► tokenizer, template, ends ─► behaviour beside the live model ─► hashes

Where something is wrong already, what comes after it is not measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from qadapt.adapters.facts import AdapterFacts, own_files, read_facts
from qadapt.data.prompt import PromptContract, saved_contract
from qadapt.data.rows import RowSet
from qadapt.data.tokens import Tokens
from qadapt.engine.out_of_memory import free_memory
from qadapt.errors import BadData, BadModel, BadRun, DoesNotFit, Unsupported
from qadapt.events import Event, Warned
from qadapt.export.adapter_proof import prove_copied
from qadapt.export.behaviour import Behaviour, Sample, prove_behaviour
from qadapt.export.config_proof import config_faults
from qadapt.export.exported_tensors import dtype_of, exported_tensors, gguf_of, open_written
from qadapt.export.gguf_lora import FORM as GGUF_LORA
from qadapt.export.gguf_lora_written import GgufLoraWritten
from qadapt.export.gguf_prompt_proof import prove_gguf_prompt
from qadapt.export.merge import FORMS as MERGED_FORMS
from qadapt.export.peft_folder import FORM as ADAPTER
from qadapt.export.prompt_proof import PromptProof, prove_prompt
from qadapt.export.proof import MadeOf, Proof, changed_files, file_facts, read_proof, write_proof
from qadapt.export.quantized import FORM as QUANTIZED
from qadapt.export.reference import open_reference
from qadapt.export.stored_tensors import Written
from qadapt.export.streamed_model import StreamedModel
from qadapt.export.tensor_proof import TensorProof, prove_tensors, prove_written
from qadapt.material import rows_to_prove
from qadapt.model.precision import choose_device
from qadapt.model.source import ModelFiles
from qadapt.quiet import quiet_libraries
from qadapt.recipe import Recipe
from qadapt.recipe_file import read_recipe
from qadapt.run import load
from qadapt.run_folder import RunFolder, find_run
from qadapt.run_parts import find_same_base
from qadapt.stage import Report, with_progress
from qadapt.train.stored_plan import read_plan
from qadapt.units import MIB

MOST_ROWS, MOST_TOKENS, FEWEST_TOKENS = 64, 8192, 512
CPU_WORK = 3 * 10**11
"""Weights times tokens that a CPU is asked for: some ten seconds for each of the two models."""
_LEFT_OUT = {
    ADAPTER: "answers: the adapter alone has no weights of a model",
    GGUF_LORA: "answers: the file is the adapter alone, for a GGUF file of its base",
}
_TOKENS_OF_GGUF = (
    "the tokens of prompts: llama.cpp's own code cuts texts, by what the file says of the run's tokenizer"
)


@dataclass(frozen=True)
class _Subject:
    """An export, and what it was made of."""

    folder: Path
    run: RunFolder
    files: ModelFiles
    made_of: MadeOf
    contract: PromptContract

    @property
    def form(self) -> str:
        """Its form."""
        return self.made_of.form

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder that transformers loads and that says itself how it is asked."""
        return self.form.startswith("merged-") or self.form == QUANTIZED


def prove_export(
    folder: Path,
    run: RunFolder,
    *,
    form: str,
    base: str,
    files: ModelFiles,
) -> Generator[Event, None, Proof]:
    """Proves an export that is whole and not yet shown, and writes `proof.json` into it.

    Args:
        folder: The export.
        run: The run it was made of.
        form: Its form, such as `merged-fp16`.
        base: Weights it is merged on, `dequantized` or `original`; empty for the adapter alone.
        files: The run's base.

    Raises:
        BadExport: The export is not the model that was trained; `proof.json` is not written.
        BadRun: The run is damaged.
    """
    facts = read_facts(run.adapter)
    made_of = _made_of(run, facts, form=form, base=base)
    subject = _Subject(folder, run, files, made_of, saved_contract(run.adapter, files.folder))
    proof = yield from _proven(subject)
    proof.check()
    hashed = yield from _hashed(folder)
    proof = replace(proof, files=hashed)
    write_proof(folder, proof)
    return proof


@dataclass(frozen=True)
class Verified:
    """What became of an export since it was proven.

    Attributes:
        made_of: What was exported.
        files: How many files were hashed.
        faults: What is not as it was, or does not hold, in sentences.
        proof: The proof made anew with the run's base and adapter; None if it was not.
        reason: Why not.
    """

    made_of: MadeOf
    files: int
    faults: tuple[str, ...]
    proof: Proof | None = None
    reason: str = ""


def verify_export(
    export: Path, *, run: str | None = None, folder: str = "runs"
) -> Generator[Event, None, Verified]:
    """Repeats the proof of an export: the hashes of its files always, the rest if its run is found.

    Args:
        export: The folder of an export.
        run: Name or path of its run; None: where the export lies in a run, that one, else by its name.
        folder: Where the runs are.

    Raises:
        BadRun: The folder has no proof, there is no such run, or the one that is given made another export.
    """
    quiet_libraries()
    recorded = read_proof(export)
    made_of = MadeOf(**recorded["made_of"])
    hashed = yield from _hashed(export)
    changed = tuple(changed_files(recorded["files"], hashed))
    if changed:
        return Verified(made_of, len(hashed), changed, reason="its files are not those that were proven")
    subject = yield from _found_again(export, made_of, run=run, folder=folder)
    if isinstance(subject, str):
        if run is not None:
            raise BadRun(
                f"The proof cannot be repeated: {subject.rstrip('.')}.",
                cure="Give the run that was exported.",
            )
        return Verified(made_of, len(hashed), (), reason=subject)
    proof = replace((yield from _proven(subject)), files=hashed)
    return Verified(made_of, len(hashed), proof.faults, proof)


def _found_again(
    export: Path, made_of: MadeOf, *, run: str | None, folder: str
) -> Generator[Event, None, _Subject | str]:
    """What the export was made of, as it is today; or why the proof cannot be repeated."""
    found = find_run(run, folder) if run is not None else _run_of(export, made_of, folder)
    if found is None:
        return f"the run {made_of.run} is not here; give it with --run"
    try:
        facts = read_facts(found.adapter)
        now = _made_of(found, facts, form=made_of.form, base=made_of.base)
        if replace(now, run=made_of.run) != made_of:
            return f"the run {found.name} has another adapter or base than this export was made of"
        files = yield from with_progress("finding the base", partial(find_same_base, facts))
        return _Subject(export, found, files, made_of, saved_contract(found.adapter, files.folder))
    except (BadRun, BadModel) as error:
        return error.problem


def _run_of(export: Path, made_of: MadeOf, folder: str) -> RunFolder | None:
    """The run that an export lies in, or the one of its name."""
    around = RunFolder(export.absolute().parent.parent)
    if around.journal.is_file():
        return around
    try:
        return find_run(made_of.run, folder)
    except BadRun:
        return None


def _made_of(run: RunFolder, facts: AdapterFacts, *, form: str, base: str) -> MadeOf:
    digest = hashlib.sha256()
    try:
        for name in own_files(run.adapter):
            with (run.adapter / name).open("rb") as file:
                while piece := file.read(MIB):
                    digest.update(piece)
    except OSError as error:
        raise BadRun(
            f"{error.filename} cannot be read: {error.strerror}.", cure="Give the folder of a finished run."
        ) from None
    model = facts.base if facts.revision else Path(facts.base).name  # no folder of this machine
    return MadeOf(run.name, form, base, model, facts.revision, facts.fingerprint, digest.hexdigest())


def _hashed(folder: Path) -> Generator[Event, None, dict[str, dict[str, Any]]]:
    stage = "hashing the export"
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def work(report: Report) -> dict[str, dict[str, Any]]:
        return file_facts(folder, lambda done: report(stage, done, total))

    return (yield from with_progress(stage, work))


def _proven(subject: _Subject) -> Generator[Event, None, Proof]:
    """All that can be measured, up to the first part that does not hold."""
    proof = Proof(subject.made_of)
    proof = yield from _with_tensors(subject, proof)
    if not proof.faults:
        proof = replace(proof, prompt=_prompt(subject))
    if proof.faults:
        return proof
    if not subject.made_of.base:
        return replace(proof, left_out=(*proof.left_out, _LEFT_OUT[subject.form]))
    if subject.form.startswith("gguf-"):
        proof = replace(proof, left_out=(*proof.left_out, _TOKENS_OF_GGUF))
    return (yield from _with_behaviour(subject, proof))


def _prompt(subject: _Subject) -> PromptProof | None:
    """How it is asked; None where nothing beside the base says so."""
    if subject.is_folder:
        return prove_prompt(subject.folder, subject.contract)
    if subject.form.startswith("gguf-") and subject.made_of.base:
        return prove_gguf_prompt(gguf_of(subject.folder), subject.contract)
    return None


def _with_tensors(subject: _Subject, proof: Proof) -> Generator[Event, None, Proof]:
    try:
        found = yield from _tensors(subject)
    except Unsupported as error:
        return replace(proof, left_out=(*proof.left_out, f"tensors: {error.problem}"))
    if subject.made_of.base and found.holds:
        found = replace(found, faults=config_faults(subject.folder, subject.files.folder))
    return replace(proof, tensors=found)


def _tensors(subject: _Subject) -> Generator[Event, None, TensorProof]:
    """Every tensor that base and adapter make; of the adapter's own files that they are the run's."""
    model, adapter, base = subject.files.folder, subject.run.adapter, subject.made_of.base
    if subject.form in MERGED_FORMS:
        return (
            yield from prove_tensors(
                subject.folder, model_folder=model, adapter_folder=adapter, base=base, form=subject.form
            )
        )
    if subject.form == ADAPTER:
        return prove_copied(subject.folder, adapter)
    is_alone = subject.form == GGUF_LORA
    with (
        open_reference(model, [(adapter, 1.0)], base="original" if is_alone else base) as reference,
        ExitStack() as stack,
    ):
        written: Written
        if is_alone:
            written = GgufLoraWritten(gguf_of(subject.folder), described=model, base=reference)
        else:
            written = stack.enter_context(open_written(subject.folder, subject.form, model_folder=model))
        return (yield from prove_written(written, reference, dtype=dtype_of(subject.folder, subject.form)))


def _with_behaviour(subject: _Subject, proof: Proof) -> Generator[Event, None, Proof]:
    recipe = read_recipe(str(subject.run.recipe))
    fingerprint = read_plan(subject.run.plan).ingredients.rows
    try:
        chosen, are_held_out = rows_to_prove(recipe, subject.contract, fingerprint=fingerprint)
    except (BadRun, BadData) as error:
        yield Warned(
            message=f"The export is not run beside the live model: {error.problem}",
            cure="Put the files of rows back as they were, and `qadapt verify` the export.",
        )
        return replace(proof, left_out=(*proof.left_out, f"behaviour: {error.problem}"))
    behaviour = None
    for device in _devices(recipe):
        try:
            behaviour = yield from _behaviour(subject, chosen.rows, are_held_out=are_held_out, device=device)
            break
        except (torch.OutOfMemoryError, DoesNotFit):
            if device.type == "cpu":
                raise
        free_memory(device)
        yield Warned(
            message="The card's memory ran out in the proof of the export, which goes on without the card.",
            cure="Close what else uses the card; the numbers are the same.",
        )
    return replace(proof, behaviour=behaviour)


def _devices(recipe: Recipe) -> list[torch.device]:
    """The device of the recipe, then the CPU."""
    host = torch.device("cpu")
    if recipe.memory.device == "cpu" or not torch.cuda.is_available():
        return [host]
    return [choose_device("auto"), host]


def _behaviour(
    subject: _Subject, rows: RowSet, *, are_held_out: bool, device: torch.device
) -> Generator[Event, None, Behaviour]:
    def live() -> PeftModel:
        return load(str(subject.run.path.absolute()), device=device.type).model

    opened = exported_tensors(subject.folder, subject.form, model_folder=subject.files.folder)
    with opened as (config, tensors):
        model = StreamedModel(config, tensors, device=device)
        sample = Sample(
            sampled(rows, tokens=sample_tokens(model.parameters, device)),
            are_held_out,
            end_ids=subject.contract.end_ids,
            pad_id=subject.contract.pad_id,
        )
        folder = subject.folder if subject.is_folder else None
        return (yield from prove_behaviour(model, live, sample, folder=folder))


def sample_tokens(parameters: int, device: torch.device) -> int:
    """How many tokens are compared: on a CPU fewer, the larger the model."""
    if device.type != "cpu":
        return MOST_TOKENS
    return min(MOST_TOKENS, max(FEWEST_TOKENS, CPU_WORK // parameters))


def sampled(rows: RowSet, *, tokens: int) -> tuple[Tokens, ...]:
    """Rows from all over a set, at most `MOST_ROWS` with so many tokens; one at least."""
    learning = np.flatnonzero(rows.supervised_counts)
    count = min(MOST_ROWS, len(learning))
    places = learning[np.linspace(0, len(learning) - 1, count).round().astype(int)]
    chosen: list[Tokens] = []
    total = 0
    for place in _spread(places.tolist()):
        row = rows[place]
        if not chosen or total + len(row) <= tokens:
            chosen.append(row)
            total += len(row)
    return tuple(chosen)


def _spread(places: Sequence[int]) -> list[int]:
    """The same in an order in which the first few are far apart."""
    width = max(1, len(places).bit_length())
    return [places[at] for at in sorted(range(len(places)), key=lambda at: int(f"{at:0{width}b}"[::-1], 2))]
