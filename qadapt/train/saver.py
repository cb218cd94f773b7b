"""Saves checkpoints beside the training: a copy on the host, written by a thread, old ones dropped after it.

The copy is taken before `save` returns, so training may go on at once and changes nothing that is written.
There is one copy at most: a save that comes while another is being written waits for it. What the thread did
or could not do is handed out at the next look. Knows no model: a checkpoint is tensors and plain values.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from torch import Tensor

from qadapt.engine.out_of_memory import RanOut, attempt
from qadapt.errors import BadOutput
from qadapt.events import CheckpointSaved, Event, Warned
from qadapt.train.checkpoint import Checkpoint, check_room, find_checkpoints, save_checkpoint, step_of


class Saver:
    """Writes the checkpoints of a run and drops old ones. A context manager: leaving it waits.

    An interpreter that ends meanwhile waits for the thread, too; one that is killed leaves a hidden folder,
    which the next save clears away.

    Args:
        run_folder: The run's folder, of which this process is the only writer.
        keep: So many of the newest stay; the best one stays besides.
        keep_every: Those whose step is a multiple of this stay, too.
        in_background: Write in a thread; otherwise `save` returns when it is written. The files are the same.
    """

    def __init__(
        self, run_folder: Path, *, keep: int, keep_every: int | None = None, in_background: bool = True
    ) -> None:
        self.run_folder = run_folder
        self.keep = keep
        self.keep_every = keep_every
        self.in_background = in_background
        self._writing: Future[list[Event]] | None = None
        self._unsaid: list[Event] = []

    def save(self, checkpoint: Checkpoint, *, best_step: int | None, is_awaited: bool = False) -> list[Event]:
        """Begins to write a checkpoint; its tensors may change as soon as this returns.

        Args:
            checkpoint: The state, on any device.
            best_step: The step of the best evaluation so far, whose checkpoint stays.
            is_awaited: Return when it is on the disk.

        Returns:
            What became of the save before, and of this one if it is awaited or has no thread.

        Raises:
            NoRoom: There is no room for this one.
            BadOutput: It could not be written.
        """
        with suppress(BadOutput):  # of the one before, whose place this one takes
            self._settle()
        check_room(self.run_folder, checkpoint)
        copied = attempt(lambda: _copied(checkpoint)) if self.in_background else None
        if copied is None or isinstance(copied, RanOut):  # without room for a copy the training waits
            self._unsaid += self._write(checkpoint, best_step)
            return self._said()
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        self._writing = thread.submit(self._write, copied, best_step)
        thread.shutdown(wait=False)  # takes no more work, and ends with this one
        if is_awaited:
            self._settle()
        return self._said()

    def finished(self) -> list[Event]:
        """What became of a save that is done; empty while it goes on. Raises what `wait` raises."""
        return [] if self._writing is not None and not self._writing.done() else self.wait()

    def wait(self) -> list[Event]:
        """Waits for the save that goes on, if any, and says what became of it.

        Raises:
            NoRoom: There was no room for it; the older checkpoints are whole.
            BadOutput: It could not be written; likewise.
        """
        self._settle()
        return self._said()

    def _settle(self) -> None:
        """Waits for the save that goes on; what is raised after it keeps nothing from being said later."""
        if self._writing is not None:
            wait([self._writing])  # an interrupt in here forgets nothing
            done, self._writing = self._writing, None
            self._unsaid += done.result()

    def _said(self) -> list[Event]:
        events, self._unsaid = self._unsaid, []
        return events

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or kind is GeneratorExit:
            self.wait()
        elif self._writing is not None:  # what ends the run is said; why its last save failed is not, too
            wait([self._writing])

    def _write(self, checkpoint: Checkpoint, best_step: int | None) -> list[Event]:
        folder = save_checkpoint(self.run_folder, checkpoint)
        saved = saved_event(folder, is_best=best_step == checkpoint.step)
        return [saved, *self._drop_old(checkpoint.step, best_step)]

    def _drop_old(self, step: int, best_step: int | None) -> list[Event]:
        events: list[Event] = []
        until_now = [folder for folder in find_checkpoints(self.run_folder) if step_of(folder) <= step]
        for folder in until_now[: -self.keep]:
            if step_of(folder) == best_step or self._is_kept_for_good(step_of(folder)):
                continue
            try:
                shutil.rmtree(folder)
            except OSError as error:  # on Windows, while something reads it; the next save tries again
                events.append(
                    Warned(
                        message=f"The old checkpoint {folder} cannot be removed: {error}",
                        cure="It is tried again after the next one; or remove it yourself.",
                        step=step,
                    )
                )
        return events

    def _is_kept_for_good(self, step: int) -> bool:
        return self.keep_every is not None and step % self.keep_every == 0


def saved_event(folder: Path, *, is_best: bool) -> CheckpointSaved:
    """What the journal says of a checkpoint."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    return CheckpointSaved(step=step_of(folder), folder=folder.name, is_best=is_best, bytes=size)


def _copied(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with tensors of its own, on the host."""
    return replace(
        checkpoint,
        adapter=_copied_group(checkpoint.adapter),
        optimizer=_copied_group(checkpoint.optimizer),
        random=_copied_group(checkpoint.random),
        values=copy.deepcopy(checkpoint.values),
    )


def _copied_group(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
