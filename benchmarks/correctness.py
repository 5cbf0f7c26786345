"""Whether the fused modules are right on this machine, by the accuracy rule: no speed of a wrong result is reported."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from benchmarks.shapes import KERNELS

# Few enough pixels for no two channels to be so near each other that rounding decides which is the greatest.
SHAPE = (4, 64, 14, 14)
CASES = (("bf16", "channels_last"), ("fp32", "contiguous"))
# Of the norm: below what a wrong index does, above what a flipped maximum does to a gradient.
ROUGHLY = 1e-4


class Wrong(Exception):
    """A fused module disagrees with the reference."""


def failures(kernels: Iterable[str], device: torch.device) -> dict[str, str]:
    """The kernels that are not right on ``device``, each with what is wrong."""
    from tests import harness  # here, for prepare() has to come before the kernels are imported

    wrong = {}
    for kernel in kernels:
        for dtype, layout in CASES:
            torch.manual_seed(0)
            try:
                harness.check(
                    lambda kit, kernel=kernel: KERNELS[kernel].build(kit, SHAPE[1]),
                    SHAPE,
                    harness.DTYPES[dtype],
                    layout,
                    device,
                    activation="relu",
                    with_residual=True,
                )
            except Exception as error:  # a kernel that does not compile is no better than one that is wrong
                wrong[kernel] = f"{dtype} {layout}: {type(error).__name__}: {error}"
                break
    return wrong


def check_roughly(module: nn.Module, eager: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Compare output and gradient at the size that is timed, where single elements may differ by a flipped maximum.

    Raises:
        Wrong: the norm of an error is above twice that of the eager reference's and ``ROUGHLY`` of the result's.
    """
    oracle = copy.deepcopy(eager).double()
    results = [
        _forward_backward(m, *tensors)
        for m, tensors in ((module, (x, dy)), (eager, (x, dy)), (oracle, (x.double(), dy.double())))
    ]
    for name, fused, plain, exact in zip(("y", "dx"), *results, strict=True):
        size = exact.norm()
        error, eager_error = ((t.double() - exact).norm() / size for t in (fused, plain))
        allowed = 2 * eager_error + ROUGHLY
        if not error <= allowed:  # nor NaN
            raise Wrong(f"{name}: error {error:.1e} of the norm, allowed {allowed:.1e}")


def _forward_backward(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    return y.detach(), *torch.autograd.grad(y, [x], dy)
