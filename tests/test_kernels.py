"""The table of what CUDA kernels take: which attention a card takes, and what it costs inside one
operation."""

from __future__ import annotations

import pytest

from qadapt.plan.attention import attention_kernel
from qadapt.plan.workspace import blas_workspace_bytes, kernel_bytes
from qadapt.units import MIB

FLASH, EFFICIENT = (f"_scaled_dot_product_{kernel}_attention_backward" for kernel in ("flash", "efficient"))


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "grouped", "has_mask", "kernel"),
    [
        (7.5, "fp16", 64, False, False, "efficient"),
        (7.5, "fp32", 65, False, False, "efficient"),
        (7.5, "fp16", 65, False, False, "math"),
        (7.5, "fp16", 64, True, False, "math"),
        (7.5, "bf16", 64, False, False, "math"),
        (8.6, "bf16", 128, True, False, "flash"),
        (8.6, "bf16", 224, False, False, "efficient"),
        (8.0, "bf16", 224, False, False, "flash"),
        (12.0, "bf16", 256, True, False, "flash"),
        (8.9, "bf16", 128, False, True, "efficient"),
        (8.9, "bf16", 512, True, False, "math"),
        (8.0, "fp32", 64, True, False, "math"),
    ],
)
def test_attention_takes_the_kernel_that_pytorch_would(
    capability: float, dtype: str, width: int, grouped: bool, has_mask: bool, kernel: str
) -> None:
    found = attention_kernel(capability, dtype, head_width=width, grouped=grouped, has_mask=has_mask)
    assert found == kernel


def test_flash_goes_backward_with_an_fp32_accumulator_and_expanded_gradients() -> None:
    query, key = (3, 8, 130, 96), (3, 2, 130, 96)
    alone = kernel_bytes(FLASH, [query, query, query], value_bytes=2, capability=8.6)
    grouped = kernel_bytes(FLASH, [query, query, key], value_bytes=2, capability=8.6)
    assert alone == 3 * 8 * 256 * (96 + 1) * 4
    assert grouped - alone == 2 * 3 * 8 * 130 * 96 * 2


def test_32_kib_a_token_is_what_flash_takes_for_an_8b() -> None:
    query, key = (1, 32, 4096, 128), (1, 8, 4096, 128)
    assert kernel_bytes(FLASH, [query, query, key], value_bytes=2, capability=8.9) / 4096 == 32 * 1024 + 128


def test_the_efficient_kernel_keeps_blocks_of_the_query_gradient() -> None:
    query = (2, 32, 1024, 64)
    half, full = (kernel_bytes(EFFICIENT, [query] * 4, value_bytes=size, capability=7.5) for size in (2, 4))
    sums, blocks = 2 * 32 * 1024 * 4, 2 * 32 * 16 * (16 + 64 * 64 * 4)
    assert half == sums + blocks
    assert full == sums + 2 * 32 * 1024 * 64 * 4 + sums


def test_wide_heads_accumulate_keys_and_values_as_well() -> None:
    query = (1, 4, 512, 256)
    narrow, wide = (
        kernel_bytes(EFFICIENT, [(1, 4, 512, width)] * 4, value_bytes=2, capability=8.6)
        for width in (128, 256)
    )
    assert wide > 2 * narrow
    assert kernel_bytes("_scaled_dot_product_efficient_attention", [query], value_bytes=2, capability=8.6)


def test_softmax_goes_backward_with_a_product_as_large_as_its_gradient() -> None:
    scores = (2, 4, 9, 9)
    assert kernel_bytes("_softmax_backward_data", [scores] * 2, value_bytes=4, capability=7.5) == 648 * 4


def test_other_operations_take_nothing_inside() -> None:
    assert kernel_bytes("mm", [(5, 7), (7, 3)], value_bytes=2, capability=8.6) == 0


def test_workspaces_of_cublas_are_wider_on_new_cards() -> None:
    assert [blas_workspace_bytes(each) for each in (None, 7.5, 8.9)] == [8_519_680] * 3
    assert [blas_workspace_bytes(each) for each in (9.0, 12.0)] == [32 * MIB] * 2
