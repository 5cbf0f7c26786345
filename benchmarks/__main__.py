"""Benchmarks of attn_kernels; without a command, the check of every module on real feature maps.

A command is a file of this package with a docstring, ``add_arguments(parser)`` and ``run(arguments) -> exit status``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib import import_module

COMMANDS = (
    "check",
    "traffic",
    "compile",
    "time",
    "host",
    "speed",
    "train",
    "plot",
    "coverage",
    "all",
    "precompile",
    "environment",
    "smoke",
    "once",
    "fuzz",
    "ncu",
)
DEFAULT = "check"


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", metavar="command")
    # Only the command asked for is imported: it may run where what another needs is not installed.
    asked = tuple(argv[:1]) if argv and argv[0] in COMMANDS else COMMANDS
    for name in asked:
        module = import_module(f"benchmarks.{name}")
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run, start=start)  # before torch was imported, which takes seconds
    asks_for_command = argv and argv[0] in (*COMMANDS, "-h", "--help")
    arguments = parser.parse_args(argv if asks_for_command else [DEFAULT, *argv])
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
