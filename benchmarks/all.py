"""For a GPU that is at hand only briefly: correctness, then the most telling cells of speed and train, then the rest.

Each row is written as it comes; the same command again measures what is left. Needs nothing but the repository and an
installed PyTorch with Triton.
"""

from __future__ import annotations

import argparse

from benchmarks import runner, speed, train
from benchmarks.plan import Cell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runner.add_arguments(parser, "all --minutes 10 --out results")


def run(arguments: argparse.Namespace) -> int:
    measures = {speed.SUITE: speed.measure, train.SUITE: train.measure}
    return runner.run(plan, measures, speed.PRIORS | train.PRIORS, arguments)


def plan() -> list[Cell]:
    """The cells of both; of the same rank those of train first, which are few."""
    return train.cells() + speed.cells()
