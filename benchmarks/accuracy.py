"""The accuracy rule, in one place for the tests and the benchmarks.

A result is right if it is no further from the float64 reference than twice the error of the eager reference in the
same dtype, plus one unit in the last place of the tensor's largest value. This holds for the greatest error, and for
the root mean square: where rounding flips a maximum in eager, one element's error is all that a gradient can be wrong.
Where few roundings make the whole error, eager's as well, one draw says little: see :func:`average`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """What :func:`compare` found, by the measure nearer to its limit, in units of the tensor's scale.

    ``used`` is the share of the allowed error that was used; above 1 is wrong.
    """

    error: float
    eager_error: float
    allowed: float
    used: float

    @property
    def ok(self) -> bool:
        return self.used <= 1


def compare(fused: Tensor, eager: Tensor, oracle: Tensor, *, scale: float | None = None) -> Verdict:
    """Judge ``fused`` by the accuracy rule.

    Where ``oracle``, rounded to the dtype, is NaN or infinite, ``fused`` has to be the same; everywhere else it has to
    be finite, and where ``eager`` is not, eager's error allows nothing.

    Args:
        fused: the result to judge.
        eager: the reference's result in the same dtype, which ``fused`` must have too.
        oracle: the reference's result in float64.
        scale: the magnitude that errors are relative to, the largest of ``oracle`` by default. A gradient that cancels
            to nothing, as that of a bias before BatchNorm, has no scale of its own: give its layer's.

    Returns:
        The verdict: an infinite error for another shape or dtype, a misplaced NaN or infinity.
    """
    info = torch.finfo(eager.dtype)
    fused, eager, oracle = fused.detach(), eager.detach(), oracle.detach().double()
    rounded = oracle.to(eager.dtype)
    finite = rounded.isfinite()
    if scale is None:
        scale = _greatest(oracle[finite])
    scale = max(scale, info.tiny)
    comparable = fused.dtype == eager.dtype and fused.shape == oracle.shape
    comparable = comparable and torch.equal(_specials(fused[~finite]), _specials(rounded[~finite]))
    difference = (fused.double() - oracle)[finite] if comparable else None
    eager_difference = (eager.double() - oracle)[finite]
    eager_difference = eager_difference[eager_difference.isfinite()]

    verdicts = []
    for measure in (_greatest, _root_mean_square):
        eager_error = measure(eager_difference) / scale
        allowed = 2 * eager_error + info.eps
        error = math.inf if difference is None or not difference.isfinite().all() else measure(difference) / scale
        verdicts.append(Verdict(error, eager_error, allowed, error / allowed))
    return max(verdicts, key=lambda verdict: verdict.used)


def average(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on several draws of one quantity: right if they use no more than what is allowed in the mean.

    The mean is that of the shares, each of what its own draw allows: an ill-conditioned draw makes all errors large,
    eager's as well, so that of all draws' errors in one pool it alone would decide, by luck again.
    """
    return Verdict(*map(statistics.fmean, zip(*verdicts, strict=True)))


def _greatest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def _root_mean_square(t: Tensor) -> float:
    return t.square().mean().sqrt().item() if t.numel() else 0.0


def _specials(t: Tensor) -> Tensor:
    """NaN, infinity and minus infinity as 0, 1 and -1 (and 2 for a number), so that NaN equals NaN."""
    return torch.where(t.isnan(), 0, torch.where(t.isinf(), t.sign(), 2))
