"""What the proof of an export sees: every planted fault by name, and how small a change it finds.

    python tools/bench/proof_power.py

Plants each fault of `planted_faults.py` in an export of a tiny model and prints what the proof calls it. Then
changes one tensor at a time, 200 times for each type, with seeded changes that grow smaller and smaller: a
number, a row or a tensor by a factor, noise, two numbers exchanged. Prints what share is found at each size,
the smallest change found and the largest one not found. A merge may itself end on either side of a tie: one
step of the type may go unseen (in fp32 what its sums may be off), nothing beyond, else the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from planted_faults import PLANTED, PROMPTS, Case, finished, is_named, make_case, prompt_faults, proof_of

from qadapt.export.merge import FORMS
from qadapt.export.reference import Reference, open_reference
from qadapt.export.stored_tensors import ExportedFiles
from qadapt.export.tensor_distance import ulps
from qadapt.export.tensor_fault import Fault
from qadapt.export.tensor_proof import prove_written
from qadapt.model.shards import TensorEntry
from qadapt.model.tensor_files import rows_of
from qadapt.quiet import quiet_libraries

MUTATIONS = 200
KINDS = ("a number", "a row times", "a tensor times", "noise", "two numbers")
BITS = {"merged-fp16": 11, "merged-bf16": 8, "merged-fp32": 24}
"""Changes are by 2^-1 to 2^-BITS of a number (noise: of the tensor's standard deviation): half a step."""


@dataclass(frozen=True)
class Mutated:
    """An export as it is, but for one tensor. A `Written`."""

    files: ExportedFiles
    name: str
    value: Tensor

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        return {self.name: self.files.entries[self.name]}

    @property
    def faults(self) -> tuple[Fault, ...]:
        return ()

    def rows(self, name: str, first: int, last: int) -> Tensor:
        return self.value[first:last]

    def bound(self, name: str, exact: Tensor, first: int) -> Tensor | None:
        return None

    def moved(self, name: str, values: Tensor, *, exact: Tensor, first: int) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Outcome:
    """A mutation: its kind and size, the largest relative change it made, whether that is beyond what a merge
    may be off, and whether the proof found it."""

    kind: str
    size: float
    relative: float
    is_beyond: bool
    is_found: bool


def mutated(value: Tensor, kind: str, size: float, generator: torch.Generator) -> Tensor:
    """A tensor changed in one way; in its own type, so a small change may round to none."""
    wide, rows = value.double(), len(value)
    row = int(torch.randint(rows, (), generator=generator))
    column = int(torch.randint(value.shape[1], (), generator=generator))
    if kind == "a number":
        wide[row, column] *= 1 + size
    elif kind == "a row times":
        wide[row] *= 1 + size
    elif kind == "a tensor times":
        wide *= 1 + size
    elif kind == "noise":
        wide += torch.randn(wide.shape, generator=generator, dtype=torch.float64) * size * wide.std()
    else:  # the number nearest to it by that factor, so that pairs are as close as the size says
        flat = wide.view(-1)
        one = row * value.shape[1] + column
        other = int((flat - flat[one] * (1 + size)).abs().index_fill(0, torch.tensor(one), math.inf).argmin())
        flat[[one, other]] = flat[[other, one]]
    return wide.to(value.dtype)


def outcomes(case: Case, *, count: int, seed: int) -> Iterator[Outcome]:
    """Mutations of one export."""
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        reference = stack.enter_context(open_reference(case.model, [(case.adapter, 1.0)], base=case.base))
        files = stack.enter_context(ExportedFiles(case.export))
        names = [name for name, entry in reference.entries.items() if len(entry.shape) == 2]
        for number in range(count):
            name = names[int(torch.randint(len(names), (), generator=generator))]
            kind = KINDS[number % len(KINDS)]
            size = 2.0 ** -(1 + number * BITS[case.form] // count)
            whole = files.rows(name, 0, rows_of(reference.entries[name]))
            changed = mutated(whole, kind, size, generator)
            yield judged(
                Mutated(files, name, changed), whole, reference, kind=kind, size=size, form=case.form
            )


def judged(
    written: Mutated, before: Tensor, reference: Reference, *, kind: str, size: float, form: str
) -> Outcome:
    value = written.value
    change = (value.double() - before.double()).abs()
    relative = float((change / before.double().abs().clamp(min=1e-30)).max())
    proof = finished(prove_written(written, reference, dtype=FORMS[form]))
    is_beyond = bool(((ulps(value, before) > 1) & (change > slack_of(before))).any())
    return Outcome(kind, size, relative, is_beyond, any(f.place == written.name for f in proof.faults))


def slack_of(before: Tensor) -> float:
    """What sums of a merge in fp32 may be off by, which only counts where fp32 is written."""
    return 32 * 2.0**-24 * float(before.abs().max()) if before.dtype is torch.float32 else 0.0


def faults_table(root: Path) -> bool:
    """Plants each fault; whether all are named."""
    good = 0
    for number, (name, planted) in enumerate(PLANTED.items()):
        case = planted.right(root / str(number))
        assert proof_of(case).holds, proof_of(case).sentence()
        planted.plant(case)
        proof = proof_of(case)
        good += is_named(proof, planted)
        print(f"{'named' if is_named(proof, planted) else 'NOT NAMED':9}  {name:32} {proof.sentence()[:150]}")
    for name, (plant, said) in PROMPTS.items():
        faults = prompt_faults(root / name, plant)
        is_said = any(said in fault for fault in faults)
        good += is_said
        print(f"{'named' if is_said else 'NOT NAMED':9}  {name:32} {'; '.join(faults)[:150]}")
    print(f"{good} of {len(PLANTED) + len(PROMPTS)} planted faults are found and named")
    return good == len(PLANTED) + len(PROMPTS)


def power_table(root: Path, *, form: str, count: int) -> bool:
    """Mutates an export; whether nothing beyond rounding went unseen."""
    found = list(outcomes(make_case(root / form, form=form), count=count, seed=0))
    print(f"\n{form}: {len(found)} mutations; found of those made, by size of the change")
    for kind in KINDS:
        cells = []
        for size in (2.0**-power for power in range(1, BITS[form] + 1)):
            here = [each for each in found if each.kind == kind and each.size == size and each.relative > 0]
            if here:
                cells.append(f"2^{int(math.log2(size))} {sum(e.is_found for e in here)}/{len(here)}")
        print(f"  {kind:15} {'  '.join(cells)}")
    made = [each for each in found if each.relative > 0]
    unseen = [each for each in made if not each.is_found]
    missed = [each for each in unseen if each.is_beyond]
    smallest = min((each.relative for each in made if each.is_found), default=math.nan)
    largest = max((each.relative for each in unseen), default=0.0)
    print(
        f"  {len(made)} of {len(found)} changed a number at all; found {len(made) - len(unseen)} of these; "
        f"smallest found {smallest:.2e}, largest not found {largest:.2e} of a number; "
        f"beyond the rounding of the merge and not found: {len(missed)}"
    )
    return not missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=MUTATIONS, help="for each type")
    count = parser.parse_args().mutations
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        held = faults_table(Path(folder) / "faults")
        for form in FORMS:
            held = power_table(Path(folder) / "power", form=form, count=count) and held
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
