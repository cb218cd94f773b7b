"""The ledger: what it counts is what the allocator counts; it looks and changes nothing."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from ledger_matrix import Case, allocated_bytes, make_folder, measure
from torch import nn

from qadapt.engine.host import to_device, to_host
from qadapt.engine.ledger import Ledger
from qadapt.engine.target import Target, kernels_of
from qadapt.plan.trace import peak_of

CASES = [
    Case("llama", "all", "full", "nf4-dq", "padded"),
    Case("llama", "none", "chunked", "bf16", "packed"),
    Case("llama", "offload", "full", "nf4", "padded"),
    Case("gemma2", "every second", "full", "nf4-dq", "padded"),
    Case("qwen3", "all", "chunked", "nf4", "packed"),
    Case("phi3", "every second", "full", "bf16", "padded"),
]
"""A few cells of `tools/bench/ledger_matrix.py`, which runs all of them."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = {case.family for case in CASES}
    return {family: make_folder(family, tmp_path_factory.mktemp(family)) for family in families}


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(vars(case).values()))
def test_a_real_step_is_counted_as_the_allocator_counts_it_and_as_the_dry_run_says(
    case: Case, folders: dict[str, Path]
) -> None:
    measured = measure(case, folders[case.family])
    assert measured.ledger == pytest.approx(measured.allocator, rel=0.005)
    assert measured.peak == measured.dry_peak


def test_what_earlier_steps_left_as_garbage_does_not_lower_the_allocators_count() -> None:
    def leave() -> None:
        cycle: list[object] = [torch.zeros(200_000)]
        cycle.append(cycle)

    def step() -> None:
        torch.zeros(100)
        gc.collect()
        torch.zeros(3001)

    gc.disable()
    try:
        allocated_bytes(leave)
        assert allocated_bytes(step) == 4 * 3001
    finally:
        gc.enable()


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_product_in_4_bits_takes_its_weight_and_its_constants_in_full(double_quant: bool) -> None:
    layer = Linear4bit(704, 320, bias=False, compress_statistics=double_quant, quant_type="nf4").to("cpu")
    inputs = torch.randn(3, 704)
    ledger = Ledger(inside=kernels_of(Target()))
    ledger.hold("base_weights", [layer.weight])
    with torch.no_grad():
        with ledger:
            layer(inputs)
        allocated = allocated_bytes(lambda: layer(inputs))
    constants = 704 * 320 // 64 if double_quant else 0
    assert ledger.peak.categories["temporary"] == allocated == 4 * (704 * 320 + constants + 3 * 320)


def test_live_bytes_follow_the_storages_and_not_their_views() -> None:
    with Ledger() as ledger:
        first = torch.zeros(100)
        view = first[10:].view(9, 10)
        assert ledger.live_bytes == 400
        del first
        assert ledger.live_bytes == 400
        del view
        assert ledger.live_bytes == 0
    assert ledger.peak.bytes == 400


def test_what_was_there_before_is_counted_once_under_its_category() -> None:
    weight = torch.zeros(50)
    ledger = Ledger()
    ledger.hold("adapters", [weight, weight.view(5, 10)])
    assert ledger.live["adapters"] == ledger.peak.bytes == 200


def test_sizes_are_rounded_as_the_device_rounds_them_but_not_in_the_trace() -> None:
    with Ledger(step=512, is_recording=True) as ledger:
        tensor = torch.zeros(3)
    assert ledger.live_bytes == 512
    assert [event.size_bytes for event in ledger.trace] == [12]
    del tensor
    assert ledger.live_bytes == 0
    assert peak_of(ledger.trace).bytes == 12


def test_a_budget_is_enforced_as_a_card_would() -> None:
    kept = []
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"800 bytes are live, 400 more"),
        Ledger(budget_bytes=1000),
    ):
        for _ in range(5):
            kept.append(torch.zeros(100))  # noqa: PERF401 (each one must be made under the ledger)
    assert len(kept) == 2


def test_after_a_budget_is_passed_the_step_can_go_on_smaller() -> None:
    layer = nn.Linear(10, 10)
    ledger = Ledger(budget_bytes=3000)
    with ledger:
        with pytest.raises(torch.OutOfMemoryError):
            layer(torch.zeros(50, 10)).exp().sum().backward()
        layer(torch.zeros(5, 10)).exp().sum().backward()
    assert layer.weight.grad is not None


def test_what_kernels_take_inside_counts_while_they_run() -> None:
    def inside(func: object, args: object, kwargs: object) -> int:
        return 1000 if func is torch.ops.aten.exp.default else 0

    tensor = torch.zeros(100)
    with Ledger(inside=inside, is_recording=True) as ledger:
        result = tensor.exp()
        assert ledger.live_bytes == 400
    assert ledger.peak.bytes == 1400
    assert ledger.peak.categories["temporary"] == 1400
    assert [event.size_bytes for event in ledger.trace] == [1000, 400, 0]
    del result


def test_what_is_told_apart_later_stands_in_the_trace_as_what_it_is() -> None:
    with Ledger(is_recording=True) as ledger, ledger.during("forward"):
        kept, boundary = torch.zeros(10), torch.zeros(20)
        ledger.tell_apart("recompute_boundaries", boundary)
    assert [event.category for event in ledger.trace] == ["activations", "recompute_boundaries"]
    assert (ledger.live["activations"], ledger.live["recompute_boundaries"]) == (40, 80)
    del kept, boundary


def test_a_peak_can_be_asked_for_anew() -> None:
    with Ledger() as ledger:
        large = torch.zeros(1000)
        del large
        ledger.reset_peak()
        small = torch.zeros(10)
    assert ledger.peak.bytes == small.nbytes


def test_numbers_are_the_same_under_the_ledger() -> None:
    layer = nn.Linear(7, 5)
    inputs = torch.randn(3, 7)
    plain = torch.autograd.grad(layer(inputs).exp().sum(), layer.weight)[0]
    with Ledger():
        counted = torch.autograd.grad(layer(inputs).exp().sum(), layer.weight)[0]
    assert torch.equal(plain, counted)


def test_what_a_kernel_took_is_given_back_where_memory_runs_out() -> None:
    def inside(func: object, args: object, kwargs: object) -> int:
        return 1000 if func is torch.ops.aten.exp.default else 0

    tensor = torch.zeros(100)
    ledger = Ledger(inside=inside, budget_bytes=1300)
    with ledger, pytest.raises(torch.OutOfMemoryError):
        tensor.exp()
    assert ledger.live_bytes == 0


def test_what_was_brought_to_the_host_on_meta_counts_as_the_hosts_and_so_does_what_is_made_of_it() -> None:
    there, numbers = torch.empty(100, 8, device="meta"), torch.empty(10, dtype=torch.int64, device="meta")
    with Ledger() as ledger:
        table = to_host(there)
        looked_up = table[to_host(numbers)]
        assert (ledger.live_bytes, ledger.host_bytes) == (0, 3200 + 320)  # the numbers are let go
        rows = to_device(looked_up, there.device)
        assert ledger.live_bytes == 320
        del table, looked_up
        assert (ledger.live_bytes, ledger.host_bytes) == (320, 0)
        rows = rows + 1
    assert (ledger.peak.bytes, ledger.host_peak_bytes) == (640, 3200 + 80 + 320)


def test_beside_a_card_the_processors_tensors_are_the_hosts() -> None:
    with Ledger(has_host_apart=True) as ledger:
        here, there = torch.zeros(10), torch.zeros(20, device="meta")
        assert (ledger.live_bytes, ledger.host_bytes) == (80, 40)
        assert to_host(here) is here and to_device(there, torch.device("meta")) is there
    with Ledger() as ledger:
        here = torch.zeros(10)
        assert (ledger.live_bytes, ledger.host_bytes) == (40, 0)
