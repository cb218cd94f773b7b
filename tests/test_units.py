from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadapt.units import GIB, KIB, MIB, format_bytes, format_count, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("1B", 1),
        ("7.3GiB", round(7.3 * GIB)),
        (" 800 MiB ", 800 * MIB),
        ("16GB", 16_000_000_000),
        ("16gb", 16_000_000_000),
        ("2 TiB", 2048 * GIB),
        ("0.5KiB", 512),
    ],
)
def test_an_amount_of_memory_is_read_with_its_unit(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize(
    "text", ["", "8", "GiB", "-1GiB", "0GiB", "8 GiBi", "1e3MiB", "eight GiB", "8 G", "8,5GiB"]
)
def test_what_is_no_amount_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"not an amount of memory; write it like 7\.3GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (KIB, "1.0 KiB"),
        (800 * MIB, "800.0 MiB"),
        (7.31 * GIB, "7.31 GiB"),
        (-1.5 * GIB, "-1.50 GiB"),
    ],
)
def test_bytes_are_written_in_binary_units(amount: float, text: str) -> None:
    assert format_bytes(amount) == text


@given(st.integers(min_value=1, max_value=2**50))
def test_written_bytes_are_read_back_within_what_is_shown(amount: int) -> None:
    assert parse_bytes(format_bytes(amount)) == pytest.approx(amount, rel=0.05, abs=0.5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (12.4, "12 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_times_read_as_people_say_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(950, "950"), (44_000, "44.0 k"), (7_241_732_096, "7.24 B"), (135_000_000, "135 M"), (2e12, "2.00 T")],
)
def test_counts_have_three_digits(count: float, text: str) -> None:
    assert format_count(count) == text
