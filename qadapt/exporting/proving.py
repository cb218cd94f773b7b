"""The proof of an adapter's export, made while it is exported, and repeated on any day (`qadapt verify`).

    files as written ─► every tensor ─► tokenizer, template, ends ─► behaviour beside the live model ─► hashes

Where something is wrong already, what comes after it is not measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from qadapt.adapters.facts import own_files
from qadapt.adapters.store import SHOWN, Store
from qadapt.data.prompt import PromptContract, saved_contract
from qadapt.data.rows import RowSet
from qadapt.data.tokens import Tokens
from qadapt.engine.out_of_memory import free_memory
from qadapt.errors import BadAdapter, BadData, BadModel, BadRun, DoesNotFit, Unsupported
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
from qadapt.model.precision import choose_device
from qadapt.model.source import ModelFiles
from qadapt.quiet import quiet_libraries
from qadapt.recipe import Recipe
from qadapt.run_folder import RunFolder, find_run
from qadapt.serve.partner import Partner, find_partner
from qadapt.stage import Report, with_progress
from qadapt.trained.adapter import Trained, trained_of
from qadapt.trained.measuring import rows_to_prove
from qadapt.trained.same_base import find_same_base
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
    trained: Trained
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
    trained: Trained,
    *,
    form: str,
    base: str,
    files: ModelFiles,
) -> Generator[Event, None, Proof]:
    """Proves an export that is whole and not yet shown, and writes `proof.json` into it.

    Args:
        folder: The export.
        trained: What it was made of.
        form: Its form, such as `merged-fp16`.
        base: Weights it is merged on, `dequantized` or `original`; empty for the adapter alone.
        files: Its base.

    Raises:
        BadExport: The export is not the model that was trained; `proof.json` is not written.
        BadRun: What it was made of is damaged.
    """
    made_of = _made_of(trained, form=form, base=base)
    subject = _Subject(folder, trained, files, made_of, saved_contract(trained.adapter, files.folder))
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
    export: Path, *, run: str | None = None, folder: str = "runs", store: str = "adapters"
) -> Generator[Event, None, Verified]:
    """Repeats the proof of an export: the hashes of its files always, the rest if what it is made of is here.

    Args:
        export: The folder of an export.
        run: What it was made of, as `find_trained` takes it; None: where the export lies in a run, that one,
            else the run or the version of the store of its name.
        folder: Where the runs are.
        store: Where the store is.

    Raises:
        BadAdapter: The name that is given stands for more than one adapter, or a damaged one.
        BadRun: The folder has no proof, there is nothing of the name that is given, or that made another
            export.
    """
    quiet_libraries()
    recorded = read_proof(export)
    made_of = MadeOf(**recorded["made_of"])
    hashed = yield from _hashed(export)
    changed = tuple(changed_files(recorded["files"], hashed))
    if changed:
        return Verified(made_of, len(hashed), changed, reason="its files are not those that were proven")
    partner = (
        _partner_of(export, made_of, folder, Store(Path(store)))
        if run is None
        else find_partner(run, folder, store=store)
    )
    subject = yield from _found_again(export, made_of, partner, store=store)
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
    export: Path, made_of: MadeOf, partner: Partner | None, *, store: str
) -> Generator[Event, None, _Subject | str]:
    """What the export was made of, as it is today; or why the proof cannot be repeated."""
    if partner is None:
        return f"the run {made_of.run} is not here; give it with --run"
    try:
        found = trained_of(partner, store=store)
        now = _made_of(found, form=made_of.form, base=made_of.base)
        if replace(now, run=made_of.run) != made_of:
            return f"{found.said} has another adapter or base than this export was made of"
        files = yield from with_progress("finding the base", partial(find_same_base, found.facts))
        return _Subject(export, found, files, made_of, saved_contract(found.adapter, files.folder))
    except (BadAdapter, BadRun, BadModel) as error:
        return error.problem


def _partner_of(export: Path, made_of: MadeOf, folder: str, kept: Store) -> Partner | None:
    """The run that an export lies in, or the one of its name, or the version of the store."""
    around = RunFolder(export.absolute().parent.parent)
    if around.journal.is_file():
        return Partner("run", around.path)
    with suppress(BadRun):
        return Partner("run", find_run(made_of.run, folder).path)
    with suppress(BadAdapter):
        version = kept.find(made_of.run)
        return Partner("adapter", kept.folder_of(version), version)
    return None


def _made_of(trained: Trained, *, form: str, base: str) -> MadeOf:
    facts, digest = trained.facts, hashlib.sha256()
    try:
        for name in own_files(trained.adapter):
            with (trained.adapter / name).open("rb") as file:
                while piece := file.read(MIB):
                    digest.update(piece)
    except OSError as error:
        raise BadRun(
            f"{error.filename} cannot be read: {error.strerror}.", cure="Give the folder of a finished run."
        ) from None
    name = trained.version[:SHOWN] or trained.name
    return MadeOf(name, form, base, facts.shown_base, facts.revision, facts.fingerprint, digest.hexdigest())


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
    """Every tensor that base and adapter make; of the adapter's own files that they are the same."""
    model, adapter, base = subject.files.folder, subject.trained.adapter, subject.made_of.base
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
    trained, recipe = subject.trained, subject.trained.recipe
    try:
        chosen, are_held_out = rows_to_prove(recipe, subject.contract, fingerprint=trained.rows)
    except (BadRun, BadData) as error:
        back = "Put the files of rows back as they were, and `qadapt verify` the export."
        yield Warned(
            message=f"The export is not run beside the live model: {error.problem}",
            cure=error.cure if recipe is None else back,
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


def _devices(recipe: Recipe | None) -> list[torch.device]:
    """The device of the recipe, then the CPU."""
    host = torch.device("cpu")
    is_on_cpu = recipe is not None and recipe.memory.device == "cpu"
    if is_on_cpu or not torch.cuda.is_available():
        return [host]
    return [choose_device("auto"), host]


def _behaviour(
    subject: _Subject, rows: RowSet, *, are_held_out: bool, device: torch.device
) -> Generator[Event, None, Behaviour]:
    def live() -> PeftModel:
        return subject.trained.load(device).model

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
