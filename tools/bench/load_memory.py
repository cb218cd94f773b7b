"""Anonymous memory while the base loads in 4 bits, against its bound.

    python tools/bench/load_memory.py                   the demo model, in every type a CPU computes in
    python tools/bench/load_memory.py --made 1024 8     a random Llama of that width and so many layers

The bound: what stays resident (4-bit codes, their constants, 16-bit parts) plus the two largest source
tensors. Measured is the peak of RssAnon above its level after a tiny model was loaded, so that imports do not
count; in a process of its own. Exits with 1 if the bound is broken. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from host_memory import Peak

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).parent.parent
MIB = 1024**2


@dataclass(frozen=True)
class Load:
    """One load, in bytes."""

    dtype: str
    resident_bytes: int
    largest_two_bytes: int
    peak_bytes: int

    @property
    def bound_bytes(self) -> int:
        return self.resident_bytes + self.largest_two_bytes

    @property
    def line(self) -> str:
        verdict = "kept" if self.peak_bytes <= self.bound_bytes else "BROKEN"
        resident, largest = self.resident_bytes / MIB, self.largest_two_bytes / MIB
        return (
            f"{self.dtype}: peak {self.peak_bytes / MIB:.0f} MiB, bound {self.bound_bytes / MIB:.0f} MiB "
            f"(resident {resident:.0f} + two largest tensors {largest:.0f}): {verdict}"
        )


def measure(folder: Path, dtype: str) -> Load:
    """Loads a model in a process of its own and measures it."""
    program = [sys.executable, __file__, "--one", str(folder), dtype]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    return Load(**json.loads(done.stdout.splitlines()[-1]))


def sampled_load(folder: Path, dtype: str) -> tuple[Load, PreTrainedModel]:
    """Loads a model in this process and measures it; a tiny one first, for what only the first load takes."""
    from qadapt.quiet import quiet_libraries

    quiet_libraries()
    import torch
    from tiny_model import make_tiny_model

    from qadapt.model.load import load_base
    from qadapt.model.precision import DTYPES

    def load(place: Path) -> PreTrainedModel:
        return load_base(
            place,
            quantization="nf4",
            double_quant=True,
            dtype=DTYPES[dtype],
            device=torch.device("cpu"),
        )

    with tempfile.TemporaryDirectory() as tiny:
        load(make_tiny_model(Path(tiny), "llama"))
    with Peak() as peak:
        model = load(folder)
    return Load(dtype, resident_bytes(model), largest_two_bytes(folder), peak.bytes), model


def resident_bytes(model: PreTrainedModel) -> int:
    """Bytes of the loaded model: weights, constants and buffers, tied ones once."""
    from qadapt.engine.ledger import Ledger
    from qadapt.train.memory import base_tensors

    ledger = Ledger()
    for category, tensors in base_tensors(model).items():
        ledger.hold(category, tensors)
    return ledger.live_bytes


def largest_two_bytes(folder: Path) -> int:
    """Bytes of the two largest tensors of the source files."""
    from qadapt.model.tensor_files import open_model

    with open_model(folder) as reader:
        sizes = sorted(entry.size_bytes for entry in reader.entries.values())
    return sum(sizes[-2:])


def make(folder: Path, *, width: int, layers: int) -> Path:
    """A random model of a size that shows."""
    from tiny_model import make_tiny_model

    return make_tiny_model(folder, "llama", width=width, layers=layers, vocabulary=32_000)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--made", nargs=2, type=int, metavar=("WIDTH", "LAYERS"))
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(asdict(sampled_load(Path(arguments.one[0]), arguments.one[1])[0])))
        return 0
    with tempfile.TemporaryDirectory() as made:
        if arguments.made:
            folder = make(Path(made), width=arguments.made[0], layers=arguments.made[1])
        else:
            from qadapt.model.source import find_model

            folder = find_model("smollm2-135m").folder
        loads = [measure(folder, dtype) for dtype in ("bf16", "fp32")]
    for load in loads:
        print(load.line)
    return 0 if all(load.peak_bytes <= load.bound_bytes for load in loads) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
