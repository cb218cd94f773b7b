"""The proof that every tensor of an export, as written, is what it should be, and what it is where it is not.

Compares the files with `reference.py`, number by number: each must be the exact one rounded once. Shares no
code with the merge it proves but the reading of facts. Memory is a few chunks of rows. Raises nothing for
what the export holds: that is a fault, named by `tensor_causes.py`. Knows no rows and no losses.

Legend: I elements of a row.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qadapt.errors import BadModel
from qadapt.events import Event, StageAdvanced
from qadapt.export.merge import FORMS
from qadapt.export.reference import Reference, View, open_reference, spans
from qadapt.export.stored_tensors import ExportedFiles, Written
from qadapt.export.tensor_causes import cause_of
from qadapt.export.tensor_distance import Difference, difference
from qadapt.export.tensor_fault import (
    MISSING,
    SHAPE,
    TIED_HEAD,
    TRANSPOSED,
    TYPE,
    UNEXPECTED,
    Fault,
    in_words,
)
from qadapt.export.threads import in_order
from qadapt.model.folder import read_config
from qadapt.model.load import COMPUTED_ANEW
from qadapt.model.shards import TensorEntry
from qadapt.model.skeleton import config_of

STAGE = "proving the tensors"
FLOATS = ("F32", "F16", "BF16")
"""Types that a merge rounds to that of its form; any other is copied as it is."""
_NUDGES = (1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8, -8)
"""Steps by which the mean of a tensor's scales may differ where it was summed otherwise: on one thread and on
two, the mean of 917,504 scales differs by 3."""


@dataclass(frozen=True)
class TensorProof:
    """What comparing every number of an export has shown.

    `near_ties` numbers are the other neighbour of a tie than the exact number's, `worst_ulps` steps of their
    type from it at most (in `worst_at`): as far as a sum in fp32 explains. `moved` numbers of quantized
    tensors are on another step than the exact ones come to.
    """

    tensors: int
    elements: int
    near_ties: int
    moved: int
    worst_ulps: int
    worst_at: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    faults: tuple[Fault, ...]

    @property
    def holds(self) -> bool:
        """Whether every tensor is what it should be."""
        return not self.faults

    def sentence(self) -> str:
        """What is wrong, faults of one cause together; empty if nothing is."""
        return in_words(self.faults)

    def values(self) -> dict[str, Any]:
        """The proof as plain values, for JSON."""
        return {**asdict(self), "holds": self.holds}


def prove_tensors(
    export_folder: Path,
    *,
    model_folder: Path,
    adapter_folder: Path | Sequence[tuple[Path, float]],
    base: str,
    form: str,
) -> Generator[Event, None, TensorProof]:
    """Proves the weights of an exported model folder, yielding progress.

    Args:
        export_folder: What was written.
        model_folder: The base it was merged on.
        adapter_folder: A PEFT folder, or several, each with the weight of its update.
        base: `dequantized` or `original`.
        form: A key of `merge.FORMS`.

    Returns:
        The proof, whatever the folder holds.

    Raises:
        BadModel: The base cannot be read.
        BadRun: Base `dequantized`, and no facts say how it was held.
        BadExport: An adapter contradicts itself or the base.
        Unsupported: An adapter cannot be proven.
    """
    adapters = [(adapter_folder, 1.0)] if isinstance(adapter_folder, Path) else adapter_folder
    with (
        open_reference(model_folder, adapters, base=base) as reference,
        ExportedFiles(export_folder) as files,
    ):
        proof = yield from prove_written(files, reference, dtype=FORMS[form])
    faults = _tie_faults(export_folder, reference, proof, has_head=reference.layout.head in files.entries)
    return replace(proof, faults=(*proof.faults, *faults))


def prove_written(
    written: Written, reference: Reference, *, dtype: str
) -> Generator[Event, None, TensorProof]:
    """The same of any tensors that stand under the names and shapes of the base."""
    expected = reference.entries
    common = [name for name in expected if name in written.entries]
    total, done = sum(expected[name].size_bytes for name in common), 0
    faults, found = list(written.faults), Difference()
    for name in common:
        wrong = _form_fault(expected[name], written.entries[name], dtype=dtype)
        if wrong is None:
            seen = _compared(name, written, reference)
            found = found.with_more(seen)
            if seen.is_wrong:
                faults.append(cause_of(seen, written, reference))
        else:
            faults.append(wrong)
        done += expected[name].size_bytes
        yield StageAdvanced(stage=STAGE, done=done, total=total)
    missing = tuple(
        name for name in expected if name not in written.entries and not COMPUTED_ANEW.search(name)
    )
    unexpected = tuple(name for name in written.entries if name not in expected)
    faults += [_missing(name, reference) for name in missing]
    faults += [_unexpected(name, reference) for name in unexpected]
    return TensorProof(
        tensors=len(common),
        elements=found.elements,
        near_ties=found.near_ties,
        moved=found.moved,
        worst_ulps=found.worst_ulps,
        worst_at=found.worst_at,
        missing=missing,
        unexpected=unexpected,
        faults=tuple(faults),
    )


def _form_fault(expected: TensorEntry, entry: TensorEntry, *, dtype: str) -> Fault | None:
    """What is wrong with shape and type."""
    if entry.shape != expected.shape:
        is_turned = entry.shape == expected.shape[::-1]
        detail = f"{list(entry.shape)} instead of {list(expected.shape)}"
        return Fault(entry.name, TRANSPOSED if is_turned else SHAPE, detail)
    rounded = dtype if expected.dtype in FLOATS else expected.dtype
    if entry.dtype != rounded:
        return Fault(entry.name, TYPE, f"{entry.dtype} instead of {rounded}")
    return None


def _missing(name: str, reference: Reference) -> Fault:
    if name == reference.layout.head and reference.layout.is_tied:
        return Fault(name, TIED_HEAD, "the adapter made two tables of them, one is written")
    return Fault(name, MISSING)


def _unexpected(name: str, reference: Reference) -> Fault:
    if name == reference.layout.head:
        return Fault(name, TIED_HEAD, "a second table beside the one that both share")
    return Fault(name, UNEXPECTED)


def _compared(name: str, written: Written, reference: Reference) -> Difference:
    """How a tensor differs; a difference that only the order of a sum on other threads makes is none."""
    seen = _difference(name, written, reference, reference.view)
    if seen.wrong and reference.is_nudged(name):
        for nudge in _NUDGES:
            view = replace(reference.view, nudge=nudge)
            if all(not part.wrong for part in _parts(name, written, reference, view)):
                return _difference(name, written, reference, view)
    return seen


def _difference(name: str, written: Written, reference: Reference, view: View) -> Difference:
    found = Difference(name)
    for part in _parts(name, written, reference, view):
        found = found.with_more(part)
    return found


def _parts(name: str, written: Written, reference: Reference, view: View) -> Iterator[Difference]:
    """How the chunks of a tensor differ."""
    reference.prepare(name, view)

    def chunk(first: int, last: int) -> Difference:
        exact = reference.rows(name, first, last, view=view)
        values = written.rows(name, first, last)
        bound = written.bound(name, exact.values, first)
        moved = written.moved(name, values, exact=exact.values, first=first)
        return difference(name, values, exact, first=first, bound=bound, moved=moved)

    yield from in_order(partial(chunk, *span) for span in spans(reference.entries[name]))


def _tie_faults(
    folder: Path, reference: Reference, proof: TensorProof, *, has_head: bool
) -> tuple[Fault, ...]:
    """Whether config.json says of embedding and head what the files have."""
    try:
        config = config_of(read_config(folder, name=folder.name))
    except BadModel as error:
        return (Fault("config.json", UNEXPECTED, error.problem),)
    is_tied = bool(config.get_text_config().tie_word_embeddings)
    if is_tied == reference.is_tied or reference.layout.head in proof.missing:
        return ()
    detail = "config.json ties them" if is_tied else "config.json does not tie them"
    return (
        Fault("config.json", TIED_HEAD, f"{detail}, and the head {'is' if has_head else 'is not'} written"),
    )
