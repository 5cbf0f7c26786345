"""Whether the fused modules are right on this machine, by the accuracy rule: what is wrong is timed, but marked so."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.shapes import KERNELS
from reference.catalogue import DTYPES

# Few enough pixels for no two channels to be so near each other that rounding decides which is the greatest.
SHAPE = (4, 64, 14, 14)
CASES = (("bf16", "channels_last"), ("fp32", "contiguous"))
# Of the norm: below what a wrong index does, above what a flipped maximum does to a gradient.
ROUGHLY = 1e-4
# Likewise of all parameters' gradients together: one alone may cancel to nothing, as that of a bias before BatchNorm.
ROUGHLY_PARAMETERS = 1e-3


class Wrong(Exception):
    """A fused module disagrees with the reference."""


def failure(kernel: str, device: torch.device, shape: tuple[int, ...] = SHAPE) -> str | None:
    """What is wrong with a kernel on ``device``; None where it is right."""
    from tests import harness  # here, for prepare() has to come before the kernels are imported

    for dtype, layout in CASES:
        torch.manual_seed(0)
        try:
            harness.check(
                lambda kit: KERNELS[kernel].build(kit, shape[1]),
                shape,
                DTYPES[dtype],
                layout,
                device,
                activation="relu",
                with_residual=True,
            )
        except Exception as error:  # a kernel that does not compile is no better than one that is wrong
            return f"{dtype} {layout}: {type(error).__name__}: {error}"
    return None


class Error(NamedTuple):
    """Of one result, by its norm: the fused module's, the eager reference's, and what is allowed."""

    name: str
    fused: float
    eager: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.fused <= self.allowed  # NaN is not

    def __str__(self) -> str:
        return f"{self.name}: error {self.fused:.1e} of the norm, allowed {self.allowed:.1e}"


def errors(
    fused: dict[str, Tensor],
    eager: dict[str, Tensor],
    exact: dict[str, Tensor],
    floor: float = ROUGHLY,
    least: float = 0.0,
) -> list[Error]:
    """Of each result against that in float64, where single elements may differ by a flipped maximum.

    Args:
        floor: of the norm, allowed beside twice the eager reference's error.
        least: what counts for the norm of a result that has less.
    """
    found = []
    for name, value in exact.items():
        norm = max(value.norm().item(), least) or 1.0
        error, eager_error = ((t[name].double() - value).norm().item() / norm for t in (fused, eager))
        allowed = 2 * eager_error + max(floor, ROUGHLY_PARAMETERS if name == "dparameters" else 0)
        found.append(Error(name, error, eager_error, allowed))
    return found


def results(module: nn.Module, x: Tensor, dy: Tensor, residual: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients of one pass, those of all parameters in one vector; with a residual a ReLU ends it."""
    leaves = {"dx": x.detach().requires_grad_()}
    if residual is not None:
        leaves["dresidual"] = residual.detach().requires_grad_()
    y = module(leaves["dx"]) if residual is None else module(*leaves.values(), "relu")
    gradients = torch.autograd.grad(y, [*leaves.values(), *module.parameters()], dy)
    found = {"y": y.detach(), **dict(zip(leaves, gradients, strict=False))}
    if parameters := gradients[len(leaves) :]:
        found["dparameters"] = torch.cat([g.flatten() for g in parameters])
    return found


def against_float64(module: nn.Module, eager: nn.Module, *tensors: Tensor | None) -> list[Error]:
    """The errors of one pass of ``module`` on x, dy and perhaps a residual; ``eager`` is the reference likewise."""
    return judge(results(module, *tensors), eager, *tensors)


def judge(got: dict[str, Tensor], eager: nn.Module, *tensors: Tensor | None) -> list[Error]:
    """The errors of results that are there already."""
    oracle = copy.deepcopy(eager).double()
    exact = results(oracle, *(None if t is None else t.double() for t in tensors))
    return errors(got, results(copy.deepcopy(eager), *tensors), exact)


def check_roughly(module: nn.Module, eager: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Compare output and gradients at the size that is timed.

    Raises:
        Wrong: the norm of an error is above twice that of the eager reference's and a little of the result's.
    """
    for error in against_float64(module, eager, x, dy):
        if not error.ok:
            raise Wrong(str(error))
