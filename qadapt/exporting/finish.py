"""What is done to a whole export before it appears: terms of use, proof and card.

What several adapters make together was never trained as one model: there is no live model to hold the answers
of such a mix against, so its numbers alone are proven, and that is said.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from qadapt.adapters.facts import SIDE_CAR_FILES, is_side_car
from qadapt.data.prompt import CONTRACT_FILE
from qadapt.errors import BadExport
from qadapt.events import BasesCompared, Event, Warned
from qadapt.export.card import Made, card_text, comparison, served_rank
from qadapt.export.tensor_proof import prove_tensors
from qadapt.exporting.job import Job
from qadapt.exporting.proving import prove_export
from qadapt.licences import copy_licences, is_licence


class Finish:
    """What is done to a whole export before it appears: terms of use, proof and card.

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
            BadExport: It is not what was trained, or not what was merged.
        """
        job = self._job
        shutil.copyfile(job.trained.adapter / CONTRACT_FILE, folder / CONTRACT_FILE)
        for trained, _ in job.parts:
            copy_licences(trained.adapter, folder)
        if self._is_proven:
            yield from self._mix_proven(folder) if job.is_mix else self._proven(folder)
        if job.is_mix:
            self.findings.insert(0, job.mixed)
        file = next((path.name for path in folder.glob("*.gguf")), "")
        if is_side_car(folder):
            file = SIDE_CAR_FILES[0]
        method = job.trained.said_method
        made = Made(
            job.form,
            self.base,
            file,
            self.findings,
            is_proven=self._is_proven,
            method=method,
            rank=served_rank(folder),
            mended=job.facts.mended,
            terms=sorted(path.name for path in folder.iterdir() if is_licence(path.name)),
        )
        (folder / "README.md").write_text(card_text(job.card, made), encoding="utf-8")

    def _proven(self, folder: Path) -> Iterator[Event]:
        job = self._job
        proof = yield from prove_export(folder, job.trained, form=job.form, base=self.base, files=job.files)
        self.findings += proof.sentences()
        if (lost := proof.deviation) is not None:
            yield Warned(
                message=lost,
                cure="Choose a form with more bits (gguf-q8_0, merged-fp16), or the adapter beside its "
                "base (--form adapter).",
            )

    def _mix_proven(self, folder: Path) -> Iterator[Event]:
        job = self._job
        proof = yield from prove_tensors(
            folder, model_folder=job.files.folder, adapter_folder=job.adapters, base=self.base, form=job.form
        )
        if not proof.holds:
            raise BadExport(
                f"The export is not what its adapters make together: {proof.sentence()}.",
                cure="Export again; if it is so every time, it is a bug of qadapt.",
            )
        self.findings += (
            f"All {proof.tensors:,} tensors as written are what base and adapters make, to one rounding, "
            "computed a second time in another way.",
            "Not proven: its answers, as no such model was trained.",
        )
