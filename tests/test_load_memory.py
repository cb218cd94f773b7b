"""The base is streamed: loading it in 4 bits takes little more than what stays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from load_memory import make, measure


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_loading_stays_under_the_resident_model_and_two_tensors(tmp_path: Path, dtype: str) -> None:
    load = measure(make(tmp_path, width=768, layers=4), dtype)
    assert load.resident_bytes < load.peak_bytes + load.largest_two_bytes, "a control: something was loaded"
    assert load.peak_bytes <= load.bound_bytes, load.line
