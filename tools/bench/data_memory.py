"""Process memory that rows take: 10 million made rows prepared, divided, ordered and read.

    python tools/bench/data_memory.py                 # 10 million tiny rows through store, split and order
    python tools/bench/data_memory.py --read 1000000  # and so many out of a file, by reader and contract

Each measurement runs in a process of its own. Counted is anonymous memory (RssAnon of Linux): what is mapped
from a file is the system's to take back. Per row are the bytes above those of the same work on 50,000 rows:
the peak while preparing, and at rest, with the order of a pass in memory. The limit is 32 bytes per row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from host_memory import Peak, anonymous_bytes

if TYPE_CHECKING:
    from qadapt.data.tokens import Tokens

LIMIT_BYTES = 32
FEW = 50_000
"""Enough to fill every buffer, whose size does not depend on how many rows there are."""
ROWS_PER_STEP = 16


def made_rows(count: int) -> Iterator[tuple[int, Tokens]]:
    """Tiny rows of 3 to 5 tokens, hardly two alike."""
    import numpy as np

    from qadapt.data.tokens import Tokens

    supervised = np.array([False, True, True, True, True])
    for number in range(count):
        ids = np.array([number, number >> 8, 7, 8, 9][: 3 + number % 3], np.int32)
        yield number, Tokens(ids, supervised[: len(ids)], f"rows.jsonl, line {number + 1}")


def measure_made(count: int, folder: Path) -> dict[str, float]:
    """Store, split with a drawn tenth, order of two passes, by length; then rows are read."""
    from filelock import FileLock

    from qadapt.data.order import Order
    from qadapt.data.preparation import Tally
    from qadapt.data.prepared import Part
    from qadapt.data.row_cache import Prepared
    from qadapt.data.split import split_rows
    from qadapt.data.store import Store, StoreWriter

    start = time.perf_counter()
    with Peak() as peak:
        with StoreWriter(folder) as writer:
            for number, row in made_rows(count):
                writer.add(row, number=number)
            writer.finish({})
        written = time.perf_counter()
        prepared = Prepared(Store(folder), "key", True, None, FileLock(folder / ".lock"))
        part = Part(prepared, [], (count,), Tally(), {}, 0, (), ())
        split = split_rows(part, None, share=0.1, seed=0, pad_id=0)
        divided = time.perf_counter()
        train = split.rows.train
        order = Order(
            train.lengths,
            rows_per_step=ROWS_PER_STEP,
            kind="by-length",
            sources=[(len(train), 1.0)],
        )
        steps = order.step_count(1)
        taken = 0
        for step in [*range(200), *range(steps - 3, steps + 3)]:  # and over the end of the first pass
            taken += sum(len(train[index]) for index in order.rows_of_step(step))
        ordered = time.perf_counter()
        fingerprint = split.rows.fingerprint
    assert taken and len(fingerprint) == 64
    return {
        "peak": peak.top_bytes,
        "rest": anonymous_bytes(),
        "write_seconds": written - start,
        "split_seconds": divided - written,
        "order_seconds": ordered - divided,
    }


def measure_read(count: int, folder: Path) -> dict[str, float]:
    """Reader, contract and store, from a file of JSON lines."""
    from tiny_model import make_tiny_model

    from qadapt.data import row_cache
    from qadapt.data.prepared import Reading, Source, identify, prepare_part
    from qadapt.data.prompt import load_contract

    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = [
                {"role": "user", "content": f"say {number}"},
                {"role": "assistant", "content": str(number)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    row_cache.data_folder = lambda: folder / "data"
    contract = load_contract(make_tiny_model(folder / "model", "qwen2"))
    reading = Reading("auto", (), skips_malformed=False, length=128)
    start = time.perf_counter()
    with Peak() as peak:
        part = prepare_part(identify((Source(str(path)),)), reading, contract)
    assert len(part.prepared.store) == count
    return {"peak": peak.top_bytes, "rest": anonymous_bytes(), "read_seconds": time.perf_counter() - start}


def in_own_process(work: str, count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="data-memory-") as folder:
        command = [sys.executable, __file__, "--work", work, "--rows", str(count), "--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def report(work: str, count: int) -> bool:
    """Prints a line per measurement; whether all stay within the limit."""
    few, many = in_own_process(work, FEW), in_own_process(work, count)
    fits = True
    for name in ("peak", "rest"):
        per_row = (many[name] - few[name]) / (count - FEW)
        fits = fits and per_row <= LIMIT_BYTES
        print(
            f"{work:>5}, {count:>10,} rows, {name}: {many[name] / 2**20:8.1f} MiB, "
            f"{few[name] / 2**20:6.1f} MiB with {FEW:,} rows: {per_row:5.1f} bytes per row"
        )
    seconds = {name: round(value, 1) for name, value in many.items() if name.endswith("seconds")}
    print(f"       {seconds}", flush=True)
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=10_000_000, help="made rows through store, split and order"
    )
    parser.add_argument("--read", type=int, default=0, help="rows out of a file, by reader and contract, too")
    parser.add_argument("--work", choices=("made", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        measure = {"made": measure_made, "read": measure_read}[given.work]
        print(json.dumps(measure(given.rows, given.folder)))
        return
    fits = report("made", given.rows)
    if given.read:
        fits = report("read", given.read) and fits
    if not fits:
        raise SystemExit(f"more than {LIMIT_BYTES} bytes per row")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
