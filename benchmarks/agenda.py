"""A list of measurements that is worked off within a time limit: in order of value, each result kept, resumable."""

import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from exssnet.io.values import shown
from exssnet.io.writing import write_text

Outcome = dict[str, Any]
"""{"result": ...} of a measurement, or {"error": sentence, "traceback": text}."""


@dataclass(frozen=True)
class Item:
    """One measurement.

    name: of its file. kind and arguments: what is measured. seconds: an estimate. left_out: why this device or run does
    not have it.
    """

    name: str
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 60.0
    left_out: str = ""


Measure = Callable[[Item], Any]
Perform = Callable[[Item, float], Outcome | None]


def opened(folder: Path, machine: dict[str, Any]) -> dict[str, Outcome]:
    """The outcomes that the folder holds already, by name. A new folder is bound to this machine and these versions."""
    held = folder / "machine.json"
    if held.exists():
        before = _read(held)
        if differing := [key for key in machine | before if before.get(key) != machine.get(key)]:
            pairs = ", ".join(f"{key} {shown(before.get(key))}, here {shown(machine.get(key))}" for key in differing)
            raise ValueError(f"{folder} has results of another machine or version ({pairs}): choose another folder")
    else:
        write_text(held, json.dumps(machine, indent=1))
    return {file.stem: _read(file) for file in sorted((folder / "results").glob("*.json"))}


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a file of a report: delete it, or choose another folder")
    return content


def work_off(
    items: Sequence[Item], folder: Path, outcomes: dict[str, Outcome], perform: Perform, seconds: float,
    after: Callable[[Item], None], clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Make the measurements that are missing, and write each outcome when it is there.

    A measurement starts only if its estimate fits into the time that is left. One that takes more than a minute and 5
    times its estimate is stopped, and so is one at the end of the time. It has failed then. One that failed before
    comes after those that were never tried.

    Args:
        items: most valuable first.
        folder: of the report.
        outcomes: those that are there; each new one is added.
        perform: measures an item. None: it was stopped, since it took longer than its second argument, in seconds.
        seconds: time limit of all.
        after: called after each measurement.
        clock: seconds.
    """
    (folder / "results").mkdir(exist_ok=True)
    missing = [i for i in items if not i.left_out and "result" not in outcomes.get(i.name, {})]
    end = clock() + seconds
    for item in sorted(missing, key=lambda i: i.name in outcomes):
        began = clock()
        if began + item.seconds > end:
            continue
        allowed = min(60 + 5 * item.seconds, end - began)
        outcome = perform(item, allowed)
        outcome = outcome or {"error": f"stopped after {allowed:.0f} s, its estimate was {item.seconds:.0f} s"}
        outcomes[item.name] = {"seconds": clock() - began} | outcome
        write_text(folder / "results" / f"{item.name}.json", json.dumps(outcomes[item.name], indent=1))
        after(item)


def attempt(measure: Measure, item: Item) -> Outcome:
    """The result of a measurement, or its error."""
    try:
        return {"result": measure(item)}
    except Exception as error:
        sentence = " ".join(f"{type(error).__name__}: {error}".split())
        return {"error": sentence[:300], "traceback": traceback.format_exc()[-5000:]}


@contextmanager
def other_process(measure: Measure) -> Iterator[Perform]:
    """Perform measurements in another process, which can be stopped. After a failure the next one is a new process.

    An error of a GPU spoils its process. So does a crash.

    Args:
        measure: a function of a module.
    """
    running: list[tuple[Any, Connection]] = []

    def stop(wait: float) -> None:
        while running:
            process, connection = running.pop()
            connection.close()  # ends the loop of `_serve`
            process.join(wait)
            process.kill()
            process.join()

    def perform(item: Item, seconds: float) -> Outcome | None:
        if not running:
            context = multiprocessing.get_context("spawn")
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(measure, there))
            process.start()
            there.close()
            running.append((process, here))
        process, connection = running[0]
        outcome: Outcome | None = None
        try:
            connection.send(item)
            if connection.poll(seconds):
                outcome = connection.recv()
        except (EOFError, BrokenPipeError):
            process.join()
            outcome = {"error": f"its process ended with exit status {process.exitcode}"}
        if outcome is None or "error" in outcome:
            stop(0)
        return outcome

    try:
        yield perform
    finally:
        stop(10)


def _serve(measure: Measure, connection: Connection) -> None:
    """The loop of the other process. It ends when the first process closes the connection."""
    try:
        while True:
            connection.send(attempt(measure, connection.recv()))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass
