"""Python's search for cyclic garbage, kept away from what stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def short_collections() -> Iterator[None]:
    """While open, the search looks at what is made from now on, not at all that is there.

    The libraries and a model come to half a million objects, which take it a quarter of a second: every few
    thousand rows that are prepared, every few steps of a run.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
