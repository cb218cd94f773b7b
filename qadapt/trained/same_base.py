"""The base that an adapter was trained on, found again by what stands beside the adapter."""

from __future__ import annotations

from qadapt.adapters.facts import AdapterFacts
from qadapt.cache import ignore
from qadapt.errors import BadRun
from qadapt.model.source import ModelFiles, find_model
from qadapt.stage import Report


def find_same_base(facts: AdapterFacts, report: Report = ignore) -> ModelFiles:
    """The files of the base that an adapter was trained on.

    Raises:
        BadRun: The files changed since.
    """
    files = find_model(facts.base, revision=facts.revision, report=report)
    if files.fingerprint != facts.fingerprint:
        raise BadRun(
            f"{facts.base} is not the model this adapter was trained on: its files changed.",
            cure="Put the files back as they were.",
        )
    return files
