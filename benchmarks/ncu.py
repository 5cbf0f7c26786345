"""Bytes that one call of each module moves from and to DRAM and L2, read by Nsight Compute from the GPU's counters.

A row per kernel, beside x's bytes: what the traffic meter models is in benchmarks/results/traffic.csv. Clocks are left
as they are, and caches too, for a kernel finds there what the one before it left.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from benchmarks.process import append, tool
from benchmarks.shapes import bytes_of
from reference.catalogue import FAMILIES

SHAPE = (32, 256, 56, 56)
LAYOUT = "channels_last"
METRICS = {
    "dram__bytes_read.sum": "dram_read",
    "dram__bytes_write.sum": "dram_written",
    "lts__t_bytes.sum": "l2",
    "gpu__time_duration.sum": "nanoseconds",
}
COLUMNS = ("family", "shape", "layout", "dtype", "bytes_of_x", "kernel", *METRICS.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m benchmarks ncu se cbam --out results"
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"{', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="of ncu.csv (default: here)")


def run(arguments: argparse.Namespace) -> int:
    program = tool("ncu")
    if program is None:
        print("ncu is not here: bytes of DRAM and L2 were not measured.", file=sys.stderr)
        return 2
    path = arguments.out / "ncu.csv"
    failed = False
    for family in arguments.families or FAMILIES:
        print(f"{family}: profiling", flush=True)
        lines = _lines(command(program, family))
        found = kernels(lines)
        if not found:
            failed = True
            print(f"{family}: ncu says {' '.join(lines[-5:])[:1000]}", flush=True)
        text = "" if path.exists() else ",".join(COLUMNS) + "\n"
        place = family, "x".join(map(str, SHAPE)), LAYOUT, "bf16", bytes_of(SHAPE, "bf16")
        for name, metrics in found:
            values = [f"{metrics.get(column, float('nan')):.0f}" for column in METRICS.values()]
            text += ",".join(map(str, (*place, name, *values))) + "\n"
            print(family, name, *map("=".join, zip(METRICS.values(), values, strict=True)), flush=True)
        append(path, text)
    return 1 if failed else 0


def _lines(arguments: list[str]) -> list[str]:
    """What a program prints, its errors too."""
    ended = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return ended.stdout.splitlines()


def command(program: str, family: str) -> list[str]:
    """What profiles the second of two calls of a family."""
    options = ["--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none"]
    shape = [*map(str, SHAPE)]
    once = [sys.executable, "-m", "benchmarks", "once", family, "--layout", LAYOUT, "--shape", *shape]
    return [program, *options, "--csv", "--print-units", "base", "--metrics", ",".join(METRICS), *once]


def kernels(lines: Iterable[str]) -> list[tuple[str, dict[str, float]]]:
    """The kernels in the order of their launches, each with its metrics, from what ``ncu --csv`` prints."""
    table = [line for line in lines if line.startswith('"')]  # around it is what ncu and the program say
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(table):
        if column := METRICS.get(row.get("Metric Name", "")):
            name = row["Kernel Name"].partition("(")[0].replace(",", ";")
            _, metrics = found.setdefault(row["ID"], (name, {}))
            with suppress(ValueError):  # a metric that this GPU does not have
                metrics[column] = float(row["Metric Value"].replace(",", ""))
    return list(found.values())
