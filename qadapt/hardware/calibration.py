"""What earlier runs on this machine measured against their estimate: a small file of the user. No torch.

One JSON line per run that was rehearsed or came to its end. Comparable are runs of the same model on the same
device of the same machine, with the same method, quantization and version of torch; the last five of them are
looked at; before the first of them, the self-test on that device stands in (`qadapt doctor --selftest`).
Nothing is corrected by them: the estimate stays what the arithmetic says, its `±` is widened to what was
seen.

A file that cannot be read, or lines of it, count for nothing and stay where they are until they age out; a
folder that cannot be written means that nothing is remembered, without a word: the run is not concerned.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs

LAST_RUNS = 5
"""How many runs are looked at."""
SELF_TEST = "self-test"
"""The name of the model that the self-test makes."""
_MOST_LINES = 400
_MOST_BYTES = 256 * 1024
"""What the file is cut to, oldest lines first; a line has about 200 bytes."""


@dataclass(frozen=True)
class Kind:
    """Which runs are comparable; `machine` is a number made of the machine's name."""

    machine: str
    model: str
    device: str
    method: str
    quantization: str
    torch: str


@dataclass(frozen=True)
class Calibration:
    """How far above the estimate the last comparable runs were measured, as shares: 0.018 is 1.8 % above.

    Attributes:
        runs: How many runs.
        low: The least of them.
        middle: Their median.
        high: The most of them.
        is_self_test: No comparable run is known yet; this is the self-test's own step.
    """

    runs: int
    low: float
    middle: float
    high: float
    is_self_test: bool = False

    @property
    def above(self) -> float:
        """The largest share by which a run was above its estimate; 0 if none was. Below is no danger."""
        return max(0.0, self.high)

    @property
    def sentence(self) -> str:
        """`on this machine: measured 1.8 % above the estimate in the last 5 runs (-0.4 to +2.1 %)`."""
        place = "above" if self.middle >= 0 else "below"
        middle = f"measured {abs(self.middle):.1%} {place} the estimate"
        if self.runs == 1 or self.is_self_test:
            where = "self-test" if self.is_self_test else "last run"
            return f"on this machine: {middle} in the {where}".replace("%", " %")
        spread = f"({100 * self.low:+.1f} to {100 * self.high:+.1f} %)"
        return f"on this machine: {middle.replace('%', ' %')} in the last {self.runs} runs {spread}"


def calibration_file() -> Path:
    """Where the runs are remembered: the user's data folder of this system."""
    return Path(platformdirs.user_data_dir("qadapt", appauthor=False)) / "calibration.jsonl"


def kind_of(*, model: str, device: str, method: str, quantization: str) -> Kind:
    """The kind of a run on this machine, with the torch that is installed.

    Args:
        model: Its name or folder, of which the last part counts.
        device: The card's name as its driver gives it, or `cpu`.
        method: The adapter method, such as `lora`.
        quantization: Of the base, such as `nf4`.
    """
    from importlib.metadata import PackageNotFoundError, version  # a tenth of a start that needs none of it

    try:
        torch = version("torch").partition("+")[0]
    except PackageNotFoundError:
        torch = "none"
    machine = f"{zlib.crc32(platform.node().encode()):08x}"
    return Kind(machine, Path(model).name.lower(), device, method, quantization, torch)


def remember(
    kind: Kind, *, predicted_bytes: int, measured_bytes: int, run: str = "", path: Path | None = None
) -> bool:
    """Keeps what a run measured, in one whole step.

    Args:
        kind: Which runs it compares with; see `kind_of`.
        predicted_bytes: The peak that its plan predicted, allocated bytes.
        measured_bytes: The peak that it measured, of the same quantity.
        run: What tells the run from all others, kept as a number made of it; what was kept of it before, by
            its rehearsal, is replaced. Empty: a run that is told once.
        path: The file; default: the user's.

    Returns:
        Whether it is kept; it is not where the folder cannot be written, or where a number is not positive.
    """
    if predicted_bytes <= 0 or measured_bytes <= 0:
        return False
    path = path or calibration_file()
    values = {**asdict(kind), "predicted_bytes": predicted_bytes, "measured_bytes": measured_bytes}
    mark = f"{zlib.crc32(run.encode()):08x}" if run else ""
    others = [line for line in _lines(path) if not mark or f'"run": "{mark}"'.encode() not in line]
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = _newest([*others, json.dumps({**values, "run": mark}).encode()])
        temporary.write_bytes(b"".join(line + b"\n" for line in lines))
        temporary.replace(path)
    except OSError:
        return False
    finally:
        _delete(temporary)
    return True


def recall(kind: Kind, *, path: Path | None = None) -> Calibration | None:
    """What the last comparable runs measured, or else the self-test; None if there is neither.

    Args:
        kind: Which runs are wanted.
        path: The file; default: the user's.
    """
    runs = list(_runs(path or calibration_file()))
    shares = [share for found, share in runs if found == kind][-LAST_RUNS:]
    is_self_test = not shares
    if is_self_test:
        shares = [share for found, share in runs if found == replace(kind, model=SELF_TEST)][-1:]
    if not shares:
        return None
    return Calibration(len(shares), min(shares), statistics.median(shares), max(shares), is_self_test)


def _runs(path: Path) -> Iterator[tuple[Kind, float]]:
    for line in _lines(path):
        try:
            values: dict[str, Any] = json.loads(line)
            kind = Kind(*(str(values[name]) for name in Kind.__dataclass_fields__))
            share = int(values["measured_bytes"]) / int(values["predicted_bytes"]) - 1
        except (ValueError, TypeError, KeyError, ZeroDivisionError, OverflowError):
            continue
        if share > -1:
            yield kind, share


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError:
        return []


def _newest(lines: list[bytes]) -> list[bytes]:
    """As many of the last lines as the file may have."""
    sizes = itertools.accumulate(len(line) + 1 for line in reversed(lines))
    count = sum(size <= _MOST_BYTES for size in sizes)
    return lines[-min(count, _MOST_LINES) :]


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # a folder that may not be written has nothing to clear
        return
