"""Where a benchmark runs: on the GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import os
import sys

import torch

from benchmarks.interpreter import round_to_nearest, skip_repeated_work


def prepare() -> torch.device:
    """The device to run on.

    To be called before Triton or ``attn_kernels`` is imported: kernels, Triton's own too, choose the interpreter then.

    Raises:
        RuntimeError: there is no GPU, and Triton was imported without the interpreter.
    """
    if torch.cuda.is_available():
        # The eager reference is a baseline of accuracy: float32 means float32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return torch.device("cuda")
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise RuntimeError("no GPU, and Triton was imported without TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"
    round_to_nearest()
    skip_repeated_work()
    return torch.device("cpu")
