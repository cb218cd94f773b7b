"""Why a tensor is not what it should be: the merge that its numbers fit instead.

Only asked where a tensor is wrong, on the chunk of rows around the first wrong number. What fits must explain
nearly all numbers to the last step of their type; what fits nothing has been changed after the merge.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qadapt.export.reference import Exact, Reference, View, spans
from qadapt.export.stored_tensors import Written
from qadapt.export.tensor_distance import Difference, difference, rounding, ulps
from qadapt.export.tensor_fault import (
    CHANGED,
    LEFT_OUT,
    NO_NUMBER,
    OTHER_BASE,
    OTHER_STRENGTH,
    OTHER_TENSOR,
    TIED_HEAD,
    TOO_LARGE,
    TRANSPOSED,
    Fault,
)
from qadapt.model.tensor_files import row_elements, rows_of

_MAY_MISS = 0.02
"""Share of the numbers that an explanation may leave, being found from rounded numbers."""
_BETTER = 0.5
"""An explanation leaves less than this part of what is wrong without it."""
_SAME_STRENGTH = 0.01
_CORNER = 256
_PROBED_ROWS = 8
_ALIKE = 0.5
"""Distance of a probe of rows from another tensor's, over its length, below which that tensor is tried."""


def cause_of(seen: Difference, written: Written, reference: Reference) -> Fault:
    """The fault of a tensor with wrong numbers."""
    if seen.lost:
        return _lost(seen, written)
    sample = _Sample(seen, written, reference)
    for found in _explanations(sample):
        return found
    return Fault(seen.name, CHANGED, _in_numbers(seen))


class _Sample:
    """The chunk of rows with the first wrong number of a tensor, as written, and how much of it is wrong."""

    def __init__(self, seen: Difference, written: Written, reference: Reference) -> None:
        self.name, self.reference, self.written = seen.name, reference, written
        entry = reference.entries[seen.name]
        self.span = next(span for span in spans(entry) if span[0] <= seen.first_spot.row < span[1])
        self.values = written.rows(seen.name, *self.span)
        self.wrong = self.share_wrong(self.exact(reference.view))

    def exact(self, view: View, *, name: str = "") -> Exact:
        """The same rows of a tensor by another merge."""
        self.reference.prepare(name or self.name, view)
        return self.reference.rows(name or self.name, *self.span, view=view)

    def share_wrong(self, exact: Exact) -> float:
        """The share of the numbers that are not those of another merge."""
        bound = self.written.bound(self.name, exact.values, self.span[0])
        moved = self.written.moved(self.name, self.values, exact=exact.values, first=self.span[0])
        found = difference(self.name, self.values, exact, bound=bound, moved=moved)
        return max(found.wrong, found.moved) / max(1, found.elements)

    def is_explained(self, exact: Exact) -> bool:
        """Whether the numbers are those of another merge, and clearly not of the one that was asked for."""
        share = self.share_wrong(exact)
        return share <= _MAY_MISS and share < _BETTER * self.wrong


def _explanations(sample: _Sample) -> Iterator[Fault]:
    yield from _other_merge(sample)
    yield from _both_tables(sample)
    yield from _turned(sample)
    yield from _other_tensor(sample)


def _other_merge(sample: _Sample) -> Iterator[Fault]:
    """The adapter left out or of another strength, or the other base."""
    reference, asked = sample.reference, sample.reference.view
    bases = [asked.base] if reference.other_base is None else [asked.base, reference.other_base]
    for base in bases:
        for strength in _strengths(sample, View(base)):
            if base == asked.base and abs(strength - 1) < _SAME_STRENGTH:
                continue
            if sample.is_explained(sample.exact(View(base, strength))):
                yield _named(sample.name, base=base, asked=asked.base, strength=strength)


def _named(name: str, *, base: str, asked: str, strength: float) -> Fault:
    is_full, is_out = abs(strength - 1) < _SAME_STRENGTH, abs(strength) < _SAME_STRENGTH
    on_other = f"on the {base} base instead of the {asked} one" if base != asked else ""
    if is_full:
        return Fault(name, OTHER_BASE, on_other)
    if is_out:
        return Fault(name, LEFT_OUT, on_other)
    return Fault(name, OTHER_STRENGTH, f"{strength:.3g} times what it should, {on_other}".rstrip(", "))


def _strengths(sample: _Sample, view: View) -> list[float]:
    """How strong the adapter may be in what was written: the best fit, and round numbers near it."""
    without = sample.exact(replace(view, strength=0.0)).values.double()
    change = sample.exact(view).values.double() - without
    size = float(change.square().sum())
    if size == 0:
        return [1.0]
    fitted = float(((sample.values.double() - without) * change).sum()) / size
    # 0 and 2 first: few bits leave a fit beside them, and a magnitude is not linear in it
    return list(dict.fromkeys([0.0, 2.0, round(fitted * 4) / 4, fitted]))


def _both_tables(sample: _Sample) -> Iterator[Fault]:
    """Embedding and head were one table: the change of the other one, or of both, in this one."""
    layout, view = sample.reference.layout, sample.reference.view
    pair = (layout.embedding, layout.head)
    if not layout.is_tied or sample.name not in pair or not set(pair) <= set(sample.reference.entries):
        return
    other = pair[sample.name == layout.embedding]
    of_other = sample.exact(view, name=other)
    of_this, base = sample.exact(view), sample.exact(replace(view, strength=0.0)).values.double()
    sums = of_this.values.double() + of_other.values.double() - base
    both = Exact(sums, of_this.errors + of_other.errors, of_this.relative + of_other.relative)
    for exact in (of_other, both):
        if sample.is_explained(exact):
            yield Fault(sample.name, TIED_HEAD, f"it has the change of {other}", other=other)


def _turned(sample: _Sample) -> Iterator[Fault]:
    """A square weight, rows for columns: the corner both ways."""
    entry = sample.reference.entries[sample.name]
    if row_elements(entry) != rows_of(entry) or rows_of(entry) < 2:
        return
    side = min(_CORNER, rows_of(entry), sample.span[1] - sample.span[0])
    written = sample.written.rows(sample.name, 0, side)[:, :side]
    exact = sample.reference.rows(sample.name, 0, side, view=sample.reference.view).values[:, :side]
    straight, turned = (_share_off(written, each) for each in (exact, exact.T))
    if turned <= _MAY_MISS and turned < _BETTER * straight:
        yield Fault(sample.name, TRANSPOSED)


def _other_tensor(sample: _Sample) -> Iterator[Fault]:
    """The tensor of the same shape that is nearest, if the numbers are its own."""
    reference, view = sample.reference, sample.reference.view
    entry = reference.entries[sample.name]
    others = [
        name
        for name, other in reference.entries.items()
        if other.shape == entry.shape and name != sample.name
    ]
    nearest = min(others, key=lambda name: _distance(sample, name), default="")
    if (
        nearest
        and _distance(sample, nearest) < _ALIKE
        and sample.is_explained(sample.exact(view, name=nearest))
    ):
        yield Fault(sample.name, OTHER_TENSOR, f"of {nearest}", other=nearest)


def _distance(sample: _Sample, name: str) -> float:
    """How far the first sampled rows are from another tensor's on the original base, over their length."""
    first = sample.span[0]
    last = sample.span[1] if sample.values.shape[1] == 1 else min(sample.span[1], first + _PROBED_ROWS)
    written = sample.values[: last - first].double()
    exact = sample.reference.rows(name, first, last, view=View("original")).values.double()
    return float((written - exact).norm() / written.norm().clamp(min=1e-30))


def _share_off(written: Tensor, exact: Tensor) -> float:
    return float((ulps(written, rounding(exact, written.dtype)) > 1).double().mean())


def _lost(seen: Difference, written: Written) -> Fault:
    assert seen.spot is not None
    limit = torch.finfo(written.rows(seen.name, 0, 1).dtype).max
    if abs(seen.spot.exact) > limit:
        return Fault(seen.name, TOO_LARGE, f"{seen.spot.exact:.6g}, the type ends at {limit:.6g}")
    return Fault(seen.name, NO_NUMBER, f"{seen.lost} of them, first {_place(seen)}")


def _in_numbers(seen: Difference) -> str:
    spot, rows = seen.first_spot, f" in {seen.wrong_rows} rows" if seen.wrong_rows > 1 else ""
    share = f"{seen.wrong or seen.moved} of {seen.elements}{rows}"
    return f"{share}, first {_place(seen)}: {spot.written:.9g} instead of {spot.exact:.9g}"


def _place(seen: Difference) -> str:
    return f"[{seen.first_spot.row}, {seen.first_spot.column}]"
