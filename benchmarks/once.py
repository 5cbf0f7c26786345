"""One call of a module, forward and backward, for a tool that watches a process: ncu or compute-sanitizer.

A first call compiles and fills the allocator's pool; a profiler that waits for cudaProfilerStart sees the second alone.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.correctness import results
from benchmarks.device import prepare
from benchmarks.runner import what_is_missing
from benchmarks.smoke import prepare_case, synchronize
from reference.catalogue import FAMILIES, LAYOUTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: compute-sanitizer --tool memcheck python -m benchmarks once cbam"
    parser.add_argument("family", choices=FAMILIES, help=", ".join(FAMILIES))
    parser.add_argument("--shape", nargs=4, type=int, default=[4, 64, 14, 14], metavar=("N", "C", "H", "W"))
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last")
    parser.add_argument("--block", action="store_true", help="with a residual and a ReLU")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, in the interpreter")


def run(arguments: argparse.Namespace) -> int:
    a = arguments
    if not a.rehearse and (missing := what_is_missing()):
        print(f"python -m benchmarks once {missing}.", file=sys.stderr)
        return 2
    device = prepare()
    fused, _, tensors = prepare_case(a.family, tuple(a.shape), a.layout, a.block, device)
    results(fused, *tensors)
    synchronize(device)
    if device.type == "cuda":
        import torch

        torch.cuda.profiler.start()
    results(fused, *tensors)
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.profiler.stop()
    print(f"{a.family}: called once", flush=True)
    return 0
