"""Exports that are killed (`kill -9`) at drawn moments and called again until they end.

    python tools/bench/killed_export.py --trials 40 --seed 7

After every kill the target must be absent, or whole where the kill came late; in the end every file must be,
byte for byte, that of an export nobody disturbed. Prints how often it was killed and how many shards were
taken over from a killed call. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from export_7b import Widths, make_adapter, make_model

from qadapt.events import Event
from qadapt.quiet import quiet_libraries
from qadapt.units import KIB

CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()
PROCESSES: Any = multiprocessing.get_context("forkserver" if CAN_FORK else "spawn")
"""Processes that begin with their imports done, if the system can fork: these take longer than the export."""
PROCESSES.set_forkserver_preload(["qadapt.export.merge"])
SMALL = Widths(layers=8, width=512, mlp=1408, kv=256, vocabulary=4000)
MOST_KILLS = 6


@dataclass(frozen=True)
class Place:
    """Where an export reads and what it makes."""

    model: Path
    adapter: Path
    target: Path
    shard_bytes: int = 4_000_000

    @property
    def noted(self) -> dict[str, dict[str, object]]:
        """The whole files that a killed export has noted."""
        manifest = self.target.with_name(f".{self.target.name}.partial") / "manifest.json"
        if not manifest.is_file():
            return {}
        files: dict[str, dict[str, object]] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return files

    @property
    def files(self) -> dict[str, bytes]:
        """What the target holds."""
        return {path.name: path.read_bytes() for path in sorted(self.target.iterdir())}


def export(place: Place, *, form: str = "merged-fp16", base: str = "dequantized") -> Iterator[Event]:
    """The export itself."""
    from qadapt.export.merge import merge
    from qadapt.export.writing import Writing

    writing = Writing(shard_bytes=place.shard_bytes, chunk_bytes=256 * KIB)
    yield from merge(
        model_folder=place.model,
        adapter_folder=place.adapter,
        target=place.target,
        form=form,
        base=base,
        writing=writing,
    )


def exhaust(events: Iterable[Event]) -> None:
    deque(events, maxlen=0)


def killed_export(place: Place, after_seconds: float) -> bool:
    """Starts an export in a process of its own, to be killed so long after its beginning; whether it was."""
    heard, says = PROCESSES.Pipe(duplex=False)
    child = PROCESSES.Process(target=_export_alone, args=(place, torch.get_num_threads(), says))
    child.start()
    says.close()
    assert heard.recv() == "ready", "the child could not begin"
    killer = threading.Timer(after_seconds, child.kill)
    killer.start()
    child.join()
    is_early = killer.is_alive()
    killer.cancel()
    is_finished = child.exitcode == 0
    assert is_finished or not is_early, "the export failed by itself"
    return not is_finished


def _export_alone(place: Place, threads: int, says: Connection) -> None:
    import qadapt.export.merge  # noqa: F401 (what takes seconds, before anything is timed)

    torch.set_num_threads(threads)
    quiet_libraries()
    says.send("ready")
    exhaust(export(place))


def trial(
    place: Place, *, expected: dict[str, bytes], seconds: float, draw: random.Random
) -> tuple[int, int]:
    """One export, killed until it ends; how often, and how many shards were not written a second time."""
    kills, kept = 0, 0
    for _ in range(MOST_KILLS):
        before = set(place.noted)
        if not killed_export(place, draw.uniform(0, seconds)):
            break
        kills += 1
        kept += len(before & set(place.noted))
        if place.target.exists():
            break  # the kill came after the rename
    else:
        kept += len(place.noted)
        exhaust(export(place))
    assert place.files == expected, f"not the bytes of an undisturbed export after {kills} kills"
    return kills, kept


def make(root: Path) -> Place:
    """A small base of several shards, with an adapter."""
    make_model(root / "model", SMALL, layers=SMALL.layers)
    make_adapter(root / "adapter", SMALL, layers=SMALL.layers)
    return Place(root / "model", root / "adapter", root / "whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet_libraries()
    draw, kills, kept = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        place = make(Path(name))
        exhaust(export(place))
        started = time.perf_counter()
        exhaust(export(replace(place, target=Path(name) / "again")))
        seconds, expected = time.perf_counter() - started, place.files
        for number in range(options.trials):
            killed = replace(place, target=Path(name) / f"trial-{number}")
            found = trial(killed, expected=expected, seconds=seconds, draw=draw)
            kills, kept = kills + found[0], kept + found[1]
    print(
        f"{options.trials} exports of {len(expected)} files, killed {kills} times: all end with the same "
        f"bytes, {kept} shards taken over"
    )


if __name__ == "__main__":
    main()
