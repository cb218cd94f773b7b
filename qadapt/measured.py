"""What was measured on this machine, kept in the cache so that it is measured once. No torch.

A file that cannot be read counts for nothing and is replaced; one that cannot be written means that it is
measured again next time, without a word. Knows not what is measured.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from qadapt.cache import cache_folder
from qadapt.durable import make_folder, write_whole


def measured_once(what: str, measure: Callable[[], str], *, answers: Collection[str]) -> str:
    """The answer that was kept, or a new one, kept from now on.

    Args:
        what: Names the measurement and all that its answer hangs on: the processor, versions, threads.
        measure: Takes it.
        answers: What it can find; anything else in the file is measured again.
    """
    file = measured_file()
    known = _kept(file)
    if known.get(what) in answers:
        return known[what]
    answer = measure()
    with suppress(OSError):
        make_folder(file.parent)
        write_whole(file, json.dumps({**known, what: answer}, indent=1))
    return answer


def measured_file() -> Path:
    """Where it is kept."""
    return cache_folder() / "measured.json"


def processor_name() -> str:
    """The model of the CPU, as the system calls it; its architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _kept(file: Path) -> dict[str, str]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {str(what): answer for what, answer in values.items() if isinstance(answer, str)}
