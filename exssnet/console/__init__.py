"""The command ``exssnet`` up to the choice of what to do, which needs neither torch nor the package.

Importing the package imports torch, which takes seconds. So this folder is installed a second time, as the package
`exssnet_console` of its own, where the command starts.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

VERSION = "0.1.0"
COMMANDS = {
    "train": "learn a stream of tasks and report",
    "inspect": "describe a checkpoint or a saved model without loading it",
    "bench": "measure speed and memory against plain PyTorch and other peers",
    "reproduce": "run an experiment of the literature from a recipe, and report",
    "info": "versions, hardware, and which kernel serves each operator",
}
NOBODY_READS = 128 + 13
"""The status of a process that SIGPIPE ended, as in ``exssnet info | head -1``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command ``exssnet``; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser("exssnet", description="Sparse supermasks and continual learning for PyTorch.")
    parser.add_argument("--version", action="version", version=f"exssnet {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)  # its own options come with its module
    try:
        command = parser.parse_args(arguments[:1]).command
        status: int = import_module("exssnet.cli").run(command, arguments[1:])
    except SystemExit:  # after help, version and errors
        if nobody_reads():
            return NOBODY_READS
        raise
    return NOBODY_READS if nobody_reads() else status


def nobody_reads(more: str = "") -> bool:
    """Whether what reads our output has ended; then the rest goes nowhere, without complaints when Python ends.

    more: is written first, for an unbuffered output, which has nothing left to fail at.
    """
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return True
    return False
