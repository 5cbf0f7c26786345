"""Where a figure comes from: what every table and CSV of the benchmarks carries."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# The figures do not depend on them, and they name folders of one machine.
_PLACES = re.compile(r" --(?:out|output|commit)[ =](?:'[^']*'|\S+)")


def versions() -> dict[str, str]:
    """The installed versions of what decides a figure."""
    found = {}
    for package in ("torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


@functools.cache
def commit() -> str:
    """The checkout's commit, with a plus sign where files differ from it; "unknown" outside a checkout."""
    describe = ["git", "describe", "--always", "--abbrev=9", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(
            describe, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command() -> str:
    """What was typed, without the places that results go to."""
    return _PLACES.sub("", shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]))
