"""Published measurements against a dry run of the stack that was measured, row by row.

A row is described from its own fields alone (`describe`): what its source's scripts did is written down here,
per source, as explicit inputs; what cannot be described is printed with the reason. Nothing is fitted.

* `fitcheck`, T4: `torch.randint` rows without padding, every token supervised; NF4 rows after
  `prepare_model_for_kbit_training` (all else in fp32), fp16 rows with fp32 adapters; the caller holds the
  outputs; attention eager, or pinned to the memory-efficient kernel with keys and values expanded.
* `fms-acceleration`, A100: flash attention, dropout 0.1, fp32 adapters. Quantized rows (always with double
  quantization) ran under autocast; the baseline had its norms in fp32. Rows with fused kernels ("foak") had
  fused norms and a fused cross-entropy. The copies of the logits changed with transformers 4.46: the `liger`
  table's slopes are those before it (`plain_loss.py`), the main table's those after; Granite always made its
  own copy.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from plain_loss import Loss
from plain_stack import Attention, Measured, Stack, Upcast, build, run

from qadapt.errors import QadaptError
from qadapt.hardware.cards import Card, find_card
from qadapt.plan.allocator import RUN_NOISE, ReservedRange, replay, reserved_range
from qadapt.shape import ModelConfig, find_config
from qadapt.units import GIB

Row = dict[str, Any]
TARGETS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
BARS = {"T4 sdpa": (0.007, 0.02), "T4 eager": (0.015, 0.04), "A100 fms": (0.03, 0.08)}
"""Group → highest median, and highest worst (T4) or 95th percentile (A100), of the relative error."""
RESERVED_INSIDE, RESERVED_WIDTH, WRONG_VERDICTS = 0.8, 0.2, 0.1
STAND_INS = {"qlora-gptq4": "nf4"}
"""GPTQ in groups of 128 takes 0.520 bytes a weight, NF4 with double quantization 0.516: it stands for it."""


@dataclass(frozen=True)
class Described:
    """A row's stack, model, card, and the group it is scored in."""

    stack: Stack
    config: ModelConfig
    card: Card
    group: str


@dataclass
class Scored:
    """What a row comes to; None where it publishes nothing of that kind."""

    row: Row
    group: str
    allocated_bytes: int
    reserved: ReservedRange
    fits: bool
    error: float | None = None
    inside: bool | None = None


@dataclass
class Table:
    """All rows of a file: scored, or with the reason why not."""

    scored: list[Scored] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)


def describe(row: Row) -> Described | str:
    """The row's stack as it was measured, or why it cannot be said."""
    source = str(row.get("source"))
    is_t4, is_a100 = source.startswith("fitcheck"), source.startswith("foundation-model-stack")
    if not (is_t4 or is_a100):
        return "another framework's step, or a source whose scripts are not written down here"
    if (reason := _reason_against(row)) is not None:
        return reason
    try:
        config, card = _config_of(str(row.get("model"))), find_card(_card_name(row))
    except QadaptError as error:
        return str(error).splitlines()[0]
    described = _t4(row) if is_t4 else _a100(row, str(config.values["model_type"]))
    if isinstance(described, str):
        return described
    stack, group = described
    if config.values["model_type"] == "mixtral" and stack.quantization == "nf4":
        return "experts were quantized one by one; today's library keeps them in one 16-bit tensor"
    return Described(stack, config, card, group if row.get("tier") == "A" else f"{group}, tier B")


def _reason_against(row: Row) -> str | None:
    for name in ("rank", "micro_batch", "seq_len"):
        if not isinstance(row.get(name), int) or row[name] <= 0:
            return f"{name} is {row.get(name)!r}, no count"
    targets = row.get("target_modules")
    if not isinstance(targets, list) or not targets or not set(targets) <= TARGETS:
        return f"adapter targets {targets!r} are none of a decoder's seven"
    optimizer = str(row.get("optimizer")).lower().partition("(")[0]
    if "adamw" not in optimizer or any(word in optimizer for word in ("paged", "8bit", "8-bit", "bnb")):
        return f"optimizer {row.get('optimizer')!r}"
    return None


def _card_name(row: Row) -> str:
    return str(row.get("gpu")).partition(" (")[0]


def _config_of(model: str) -> ModelConfig:
    """The configuration by name, else by its last part; a GPTQ copy has that of its original."""
    last = model.rpartition("/")[2].removesuffix("-GPTQ").lower()
    for name in (model, last):
        with suppress(QadaptError):
            return find_config(name)
    return find_config(f"{last}-hf")


def _common(row: Row) -> dict[str, Any]:
    checkpointing = str(row.get("gradient_checkpointing")).lower()
    return {
        "rows": row["micro_batch"], "length": row["seq_len"], "rank": row["rank"],
        "targets": tuple(row["target_modules"]), "recomputes": checkpointing.startswith("true"),
    }  # fmt: skip


def _t4(row: Row) -> tuple[Stack, str] | str:
    attention = str(row.get("attention"))
    kernel: Attention = "eager" if attention.startswith("eager") else "efficient"
    if not attention.startswith(("eager", "sdpa")):
        return f"attention {attention!r}"
    if row.get("method") not in ("qlora-nf4", "lora-fp16"):
        return f"method {row.get('method')!r}"
    is_nf4 = row.get("method") == "qlora-nf4"
    stack = Stack(
        **_common(row), capability=7.5, dtype=torch.float16, quantization="nf4" if is_nf4 else "none",
        attention=kernel, double_quant=bool(row.get("double_quant")), upcast="all" if is_nf4 else "none",
    )  # fmt: skip
    return stack, "T4 eager" if kernel == "eager" else "T4 sdpa"


def _a100(row: Row, family: str) -> tuple[Stack, str] | str:
    method = str(row.get("method"))
    if method not in ("qlora-nf4", "lora-bf16", *STAND_INS):
        return f"method {method!r}"
    is_quantized = method != "lora-bf16"
    upcast: Upcast = "norms" if str(row.get("compute_dtype")).startswith("fp32 upcast") else "none"
    loss = _a100_loss(row, family)
    if loss is None:
        return f"loss {row.get('loss_kernel')!r}"
    stack = Stack(
        **_common(row), capability=8.0, dtype=torch.float16 if method in STAND_INS else torch.bfloat16,
        quantization="nf4" if is_quantized else "none", attention="flash", double_quant=True,
        upcast=upcast, autocast=is_quantized, dropout=0.1, loss=loss,
        fused_norms="foak" in str(row.get("framework")),
    )  # fmt: skip
    return stack, "A100 GPTQ (no bar)" if method in STAND_INS else "A100 fms"


def _a100_loss(row: Row, family: str) -> Loss | None:
    kernel = str(row.get("loss_kernel"))
    is_older = "liger" in str(row["source"]) or family == "granite"
    if "linear CE" in kernel:
        return "none"
    if "triton" in kernel:
        return "fused as float, shifted" if is_older else "fused float, shifted"
    if "full logits" in kernel:
        return "as float, shifted" if is_older else "float, shifted"
    return None


def score(row: Row, described: Described) -> Scored:
    """Runs a row's stack and compares what the row publishes."""
    card = described.card
    capacity = card.free_bytes("headless") - _context_bytes(row, card)
    if _weight_bytes(described) > capacity:
        return Scored(row, described.group, 0, ReservedRange(0, 0), fits=False)
    measured = run(described.config.values, described.stack)
    start = measured.places["forward"]
    peak = replay(measured.trace, is_rising=False, count_from=start)
    is_tight = peak.peak_reserved_bytes > 0.8 * capacity
    fits = not is_tight or replay(measured.trace, is_rising=False, capacity_bytes=capacity).fits
    scored = Scored(
        row, described.group, peak.peak_allocated_bytes, _reserved(row, measured, capacity), fits=fits
    )
    if row.get("peak_allocated_gib") and not row.get("is_oom"):
        scored.error = peak.peak_allocated_bytes / (row["peak_allocated_gib"] * GIB) - 1
    if row.get("peak_reserved_gib"):
        scored.inside = scored.reserved.holds(round(row["peak_reserved_gib"] * GIB))
    return scored


def _context_bytes(row: Row, card: Card) -> int:
    mib = row.get("cuda_context_mib")
    return int(mib * 2**20) if isinstance(mib, (int, float)) else card.context_bytes


def _weight_bytes(described: Described) -> int:
    model = build(described.config.values, described.stack)
    return sum(each.numel() * each.element_size() for each in model.parameters())


def _reserved(row: Row, measured: Measured, capacity: int) -> ReservedRange:
    if row.get("is_oom") or not row.get("peak_reserved_gib"):
        return ReservedRange(0, 0)
    start = measured.places["forward"]
    found = reserved_range(measured.trace, others=measured.others, capacity_bytes=capacity, count_from=start)
    return found.widened(RUN_NOISE)


def report(path: Path, *, pattern: str = "") -> Iterable[str]:
    """The whole comparison, line by line.

    Args:
        path: Measurements, one JSON object a line.
        pattern: Only rows whose id holds it.
    """
    table = Table()
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and pattern in str((row := json.loads(line)).get("id")):
            yield _score_row(row, table)
    yield ""
    yield from _summary(table)


def _score_row(row: Row, table: Table) -> str:
    described = describe(row)
    name = f"{str(row.get('id'))[-30:]:30} {str(row.get('model')).rpartition('/')[2][-24:]:24}"
    if isinstance(described, str):
        kind = described.split(" is neither")[0] if " is neither" in described else described
        table.reasons[kind] = table.reasons.get(kind, 0) + 1
        return f"{name} not modelled: {described}"
    try:
        scored = score(row, described)
    except (QadaptError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"the dry run failed: {type(error).__name__}: {str(error).splitlines()[0]}"
        table.reasons[reason] = table.reasons.get(reason, 0) + 1
        return f"{name} not modelled: {reason}"
    table.scored.append(scored)
    return f"{name} {row['micro_batch']:2} x {row['seq_len']:4} {_result(scored)}"


def _result(scored: Scored) -> str:
    row, words = scored.row, [f"{scored.group:10}", f"allocated {scored.allocated_bytes / GIB:7.3f} GiB"]
    if scored.error is not None:
        words.append(f"published {row['peak_allocated_gib']:7.3f} {scored.error:+6.2%}")
    if scored.inside is not None:
        bounds = f"{scored.reserved.low_bytes / GIB:.2f} to {scored.reserved.high_bytes / GIB:.2f}"
        where = "inside" if scored.inside else "OUTSIDE"
        words.append(f"reserved {bounds}, published {row['peak_reserved_gib']:.2f} {where}")
    words.append("fits" if scored.fits else "does not fit")
    if row.get("is_oom"):
        words.append("(published: out of memory)")
    return "  ".join(words)


def _summary(table: Table) -> Iterable[str]:
    groups: dict[str, list[float]] = {}
    for scored in table.scored:
        if scored.error is not None:
            groups.setdefault(scored.group, []).append(abs(scored.error))
    for group, errors in sorted(groups.items()):
        yield _group_line(group, errors)
    yield from _reserved_lines(
        [each for each in table.scored if each.inside is not None and each.row.get("tier") == "A"]
    )
    yield from _verdict_lines(table.scored)
    yield ""
    yield "Not modelled:"
    for reason, count in sorted(table.reasons.items(), key=lambda item: -item[1]):
        yield f"  {count:3} rows: {reason}"


def _group_line(group: str, errors: list[float]) -> str:
    middle, worst = statistics.median(errors), max(errors)
    high = percentile(errors, 0.95)
    line = f"{group}: {len(errors)} rows, median {middle:.2%}, 95th percentile {high:.2%}, worst {worst:.2%}"
    if group not in BARS:
        return f"{line}; no bar"
    bar, limit = BARS[group]
    judged = high if group.startswith("A100") else worst
    name = "95th percentile" if group.startswith("A100") else "worst"
    met = "met" if middle <= bar and judged <= limit else "MISSED"
    return f"{line}; bar: median {bar:.1%}, {name} {limit:.0%}: {met}"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least a share of the values do not pass."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000 * len(ordered)) // 1000) - 1))]


def _reserved_lines(scored: Sequence[Scored]) -> Iterable[str]:
    if not scored:
        return
    inside = statistics.mean(bool(each.inside) for each in scored)
    width = statistics.median(
        (each.reserved.high_bytes - each.reserved.low_bytes) / (each.row["peak_reserved_gib"] * GIB)
        for each in scored
    )
    met = "met" if inside >= RESERVED_INSIDE and width <= RESERVED_WIDTH else "MISSED"
    yield (
        f"reserved, tier A: {len(scored)} rows, {inside:.0%} inside their range, median width {width:.1%}; "
        f"bar: {RESERVED_INSIDE:.0%}, {RESERVED_WIDTH:.0%}: {met}"
    )


def _verdict_lines(scored: Sequence[Scored]) -> Iterable[str]:
    """All out-of-memory rows, and as many completed ones nearest to their card's limit."""
    failed = [each for each in scored if each.row.get("is_oom")]
    completed = sorted((each for each in scored if not each.row.get("is_oom")), key=_nearness, reverse=True)
    completed = completed[: len(failed)]
    if not failed:
        return
    missed = [each for each in failed if each.fits]
    refused = [each for each in completed if not each.fits]
    rates = len(missed) / len(failed), len(refused) / max(1, len(completed))
    met = "met" if max(rates) <= WRONG_VERDICTS else "MISSED"
    yield (
        f"verdicts: {len(failed)} out-of-memory rows, {len(missed)} called fitting ({rates[0]:.0%}); "
        f"{len(completed)} completed rows nearest their limit, "
        f"{len(refused)} called not fitting ({rates[1]:.0%}); "
        f"bar: {WRONG_VERDICTS:.0%} each: {met}"
    )
    for each in (*missed, *refused):
        yield f"  wrong: {each.row.get('id')}"


def _nearness(scored: Scored) -> float:
    row = scored.row
    taken = row.get("process_gib") or row.get("peak_reserved_gib") or row.get("peak_allocated_gib") or 0.0
    return float(taken) * GIB / find_card(_card_name(row)).memory_bytes
