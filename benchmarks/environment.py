"""The machine that figures come from: versions, driver, clocks, MIG mode; its settings are read and never changed."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.process import append
from benchmarks.rows import output, source_commit
from benchmarks.runner import what_is_missing

PACKAGES = ("torch", "triton", "numpy", "timm", "torchvision", "pytest", "pytest-xdist", "rich")
QUERIED = (
    "name", "driver_version", "mig.mode.current", "compute_mode", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem",
    "power.limit", "temperature.gpu", "memory.total", "memory.used",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m benchmarks environment"
    parser.add_argument("--out", type=Path, metavar="DIR", help="of steps.jsonl, which gets a line of it")
    parser.add_argument("--commit", help="(default: what git says)")
    parser.add_argument("--rehearse", action="store_true", help="a GPU is not needed")


def run(arguments: argparse.Namespace) -> int:
    found = facts(arguments.commit)
    for name, fact in found.items():
        print(f"{name}: {fact}", flush=True)
    if arguments.out:
        append(arguments.out / "steps.jsonl", json.dumps({"environment": found}) + "\n")
    if not arguments.rehearse and (missing := what_is_missing()):
        print(f"python -m benchmarks {arguments.command} {missing}.", file=sys.stderr)
        return 2
    return 0


def facts(commit: str | None = None) -> dict[str, str]:
    """By name; "not installed" or "unknown" for what is not there."""
    found = {"commit": commit or source_commit(), "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["CPUs"] = str(os.cpu_count())
    lines = output("nvidia-smi", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader").splitlines()
    values = lines[0].split(", ") if lines else ["unknown"] * len(QUERIED)
    found |= dict(zip(QUERIED, values, strict=False))
    found["GPUs"] = str(len(lines))
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["capability"] = f"{gpu.major}.{gpu.minor}"
        found["multiprocessors"] = str(gpu.multi_processor_count)
        found["L2"] = f"{getattr(gpu, 'L2_cache_size', 0) >> 20} MiB"
    return found
