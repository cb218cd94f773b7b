"""Anonymous memory of a process, and its highest level while something runs.

Pages of mapped weight files do not count, as they can be dropped at any time.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import psutil


def anonymous_bytes(process: int | None = None) -> int:
    """RssAnon of a process, this one if none is named (outside Linux resident memory, which is more)."""
    if sys.platform == "linux":
        status = Path(f"/proc/{process or 'self'}/status")
        for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process(process).memory_info().rss)


class Peak:
    """The highest anonymous memory while the block runs, sampled every 2 ms, above the level at its start."""

    def __enter__(self) -> Peak:
        self.start_bytes = self.top_bytes = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.top_bytes = max(self.top_bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self.top_bytes - self.start_bytes
