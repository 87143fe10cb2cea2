"""When a run's checkpoint is written: every so many steps or minutes, at a signal, and at the end."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from . import checkpoint, distributed
from .learner import Learner, Observer
from .progress import EpochRecord
from .typed import shown


class Stopped(KeyboardInterrupt):
    """A signal ended the run after its checkpoint was written; `status` is the process's exit status."""

    def __init__(self, number: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = 128 + number


class Saver:
    """Passes on what an observer is told, and writes the checkpoint of a run when it is due.

    every, minutes: write after so many steps, and after so many minutes; None or 0: not for that.
    """

    def __init__(
        self, watching: Observer, path: Path, notes: dict[str, Any], every: int | None, minutes: float | None
    ) -> None:
        self.watching, self.path, self.notes = watching, path, notes
        self.every, self.seconds = every or 0, 60 * (minutes or 0)
        self.learner: Learner | None = None
        self.coded: dict[str, Tensor] = {}
        self.signal = 0
        self.replaces = False  # the file of an earlier run, which stays until this one has made a step
        self.steps, self.written = 0, time.monotonic()

    def on_step(self, task: int, phase: str, step: int, steps: int, loss: Tensor) -> None:
        self.watching.on_step(task, phase, step, steps, loss)
        self.steps += 1
        due = self.replaces or (self.every and self.steps % self.every == 0)
        if self.signal:
            self.stop(f"task {task}, {phase} phase, step {step} of {steps}")
        elif due or (self.seconds and time.monotonic() - self.written >= self.seconds):
            self.write()

    def on_epoch(self, record: EpochRecord) -> None:
        self.watching.on_epoch(record)
        if self.signal:
            self.stop(f"task {record.task}, {record.phase} phase, after epoch {record.epoch} of {record.epochs}")

    def write(self) -> bool:
        """Write the checkpoint; where that cannot be done the one before stays, and training goes on.

        Of several processes, which all hold the same, the first one writes.
        """
        assert self.learner is not None
        if distributed.rank() > 0:
            return True
        try:
            checkpoint.save_run(self.learner, self.path, self.notes, self.coded)
        except (OSError, ValueError) as error:
            told = f"a checkpoint could not be saved, the file is whole: {shown(error, 500)}"
            print(f"exssnet: {told}", file=sys.stderr)
            return False
        finally:
            self.written, self.replaces = time.monotonic(), False
        return True

    def stop(self, where: str) -> None:
        name = signal.Signals(self.signal).name
        if not self.write():
            raise Stopped(self.signal, f"Stopped by {name} in {where}; what came after the last checkpoint is lost.")
        raise Stopped(
            self.signal, f"Stopped by {name} in {where}; go on with: exssnet train --resume {self.path.parent}"
        )

    @contextmanager
    def at_signals(self) -> Iterator[None]:
        """Within the block, the first SIGINT or SIGTERM is heard after the step at hand; a second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in numbers}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def heard(number: int, frame: object) -> None:
            self.signal = number
            restore()

        for number in numbers:
            signal.signal(number, heard)
        try:
            yield
        finally:
            restore()
