"""One base in memory with adapters beside it, each with how it is asked: what answers several tasks at once.

The base is held as its first adapter was trained on it; whatever was trained on another, or on one that was
held otherwise, is refused. Which adapters answer is `adapters/swap.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qadapt.adapters.facts import AdapterFacts, read_facts
from qadapt.adapters.swap import Swap
from qadapt.data.prompt import PromptContract, saved_contract
from qadapt.errors import BadAdapter, BadRun
from qadapt.run_folder import RunFolder
from qadapt.serve.partner import find_partner

_HELD = {"nf4": "4 bits", "int8": "8 bits", "none": "16 or 32 bits"}


@dataclass(frozen=True)
class Together:
    """A base and its adapters.

    Attributes:
        model: What answers: `model.use("orders")`, or for each prompt of a batch `generate(..., whose=...)`.
        facts: How the base is held.
        files: The folder of the base's files.
        contracts: Name of an adapter → how it is asked.
        folders: Name → where it came from.
    """

    model: Swap
    facts: AdapterFacts
    files: Path
    contracts: dict[str, PromptContract] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)

    def add(self, name: str, adapter: Path) -> None:
        """Brings the adapter of a folder into memory, under a name; it does not answer yet.

        Raises:
            BadAdapter: It was trained on another base, or on one that was held otherwise; there is one of
                that name; or its files are damaged.
            BadRun: There is no adapter of qadapt in the folder, or its tokenizer is not what it was.
            Unsupported: Its method is none that can stand beside others.
        """
        self._check(read_facts(adapter), adapter)
        contract = saved_contract(adapter, self.files)
        self.model.add(name, adapter)
        self.contracts[name], self.folders[name] = contract, adapter.resolve()

    def remove(self, name: str) -> None:
        """Takes an adapter out of memory.

        Raises:
            BadAdapter: There is none of that name.
        """
        self.model.remove(name)
        del self.contracts[name], self.folders[name]

    def contract_of(self, names: Sequence[str]) -> PromptContract:
        """How a stack is asked: as its last adapter, which works on what the others give."""
        return self.contracts[names[-1]]

    def _check(self, facts: AdapterFacts, adapter: Path) -> None:
        if facts.fingerprint != self.facts.fingerprint:
            raise BadAdapter(
                f"The adapter in {adapter} was trained on {facts.base}; in memory is {self.facts.base}, "
                "whose files are others.",
                cure="Talk to it by itself.",
            )
        mine, theirs = (
            (each.quantization, each.quantization == "nf4" and each.double_quant, each.load_dtype)
            for each in (self.facts, facts)
        )
        if mine != theirs:
            raise BadAdapter(
                f"The adapter in {adapter} was trained on {facts.base} in {_said(facts)}; in memory it is in "
                f"{_said(self.facts)}.",
                cure="Talk to it by itself; what stands beside it was trained with the same model section.",
            )


@dataclass(frozen=True)
class Company:
    """Adapters that are brought in by the names that they have elsewhere.

    Attributes:
        together: Where to.
        runs: The folder of runs.
        store: The folder of the store.
    """

    together: Together
    runs: str | Path = "runs"
    store: str | Path = "adapters"

    def bring(self, names: Sequence[str]) -> tuple[tuple[str, ...], PromptContract]:
        """Brings in those that are not there yet: runs, adapters' folders, or names of the store.

        Returns:
            Their names in memory, and how they are asked together.

        Raises:
            BadAdapter: As `Together.add`; or a version of the store is damaged.
            BadRun: There is nothing of a name, or it has no adapter of its own.
            Unsupported: As `Together.add`.
        """
        there = tuple(self._brought(name) for name in names)
        return there, self.together.contract_of(there)

    def _brought(self, name: str) -> str:
        here = self.together.folders
        try:
            folder = self._found(name)
        except BadRun:
            if name in here:
                return name
            raise
        for other, place in here.items():
            if place == folder.resolve():
                return other
        if name in here:
            raise BadAdapter(
                f"{name} is {here[name]} in memory, and {folder.resolve()} elsewhere.",
                cure="Give the path of the one that you mean.",
            )
        self.together.add(name, folder)
        return name

    def _found(self, name: str) -> Path:
        partner = find_partner(name, self.runs, store=self.store)
        if not partner.has_adapter:
            raise BadRun(f"{name} is no adapter: it is a whole model.", cure="Talk to it by itself.")
        return RunFolder(partner.path).adapter if partner.kind == "run" else partner.path


def _said(facts: AdapterFacts) -> str:
    double = ", double quantized" if facts.quantization == "nf4" and facts.double_quant else ""
    return f"{_HELD[facts.quantization]}{double} ({facts.load_dtype})"
