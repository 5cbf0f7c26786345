"""Reductions and pools of symbolic tensors: the mean, sum, maximum and others over channels and planes."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from attn_kernels.fuse.registry import Operation, is_number, operation
from attn_kernels.fuse.terms import (
    ONE,
    Refused,
    Size,
    Term,
    Unknown,
    Value,
)
from attn_kernels.fuse.views import axes_of

if TYPE_CHECKING:
    from attn_kernels.fuse.interpret import Interpreter

SPATIAL = frozenset("HW")


def reduced(op: str, v: Value, dims: list[int], keepdim: bool, plane: object = None) -> Value:
    """The mean, sum, maximum or so over C, H, W or several of them.

    ``plane`` is the condition on which that is what is computed: "square", or a height and a width.
    """
    if v.expanded:
        raise Refused("reduces a tensor that was expanded")
    if not isinstance(keepdim, bool):
        raise Refused("reduces with other options")
    if not dims:
        raise Refused("reduces no dimensions, which is all of them")
    symbols = [s for d in dims for s in v.shape[d].symbols]
    if any(v.shape[d].factor != 1 for d in dims) or any(s[0] not in "CHW" for s in symbols):
        raise Refused(f"takes the {op} over something else than channels or pixels")
    names = frozenset(s[0] for s in symbols)
    if len(names) != len(symbols):
        raise Refused(f"takes the {op} over dimensions that are not x's")
    shape = [ONE if d in dims else s for d, s in enumerate(v.shape) if keepdim or d not in dims]
    if not names:
        if op == "lp":  # of one element, where it is the absolute value
            raise Refused("takes a norm of one element")
        return Value(v.term, shape)
    term = v.term
    if (
        plane is None
        and len(term.args) == 2
        and term.op in ("mean", "sum", "amax", "max")
        and {names, term.args[1]} == {frozenset("H"), frozenset("W")}
    ):
        # The first maximum of rows, then of their maxima, is the first in row-major order; by columns it is not.
        inner = term.op
        if op in ("amax", "max") and inner in ("amax", "max"):
            joint = "max" if op == inner == "max" and names == {"H"} else "amax"
            return Value(Term(joint, term.args[0], SPATIAL), shape)
        if op == inner:
            return Value(Term(op, term.args[0], SPATIAL), shape)
    return Value(Term(op, term, names, *(() if plane is None else (plane,))), shape)


def _reduction(op: str, *names: str) -> Operation:
    @operation(*names)
    def reduce(run: Interpreter, v: Value, dim=None, keepdim=False, *, axis=None, keepdims=False) -> Value:
        return reduced(op, v, axes_of(v, dim if axis is None else axis), keepdim or keepdims)

    return reduce


mean = _reduction("mean", "torch.mean", ".mean")
amax = _reduction("amax", "torch.amax", ".amax")
_reduction("sum", "torch.sum", ".sum")


@operation("torch.logsumexp", ".logsumexp")
def logsumexp(run: Interpreter, v: Value, dim, keepdim=False) -> Value:
    return reduced("logsumexp", v, axes_of(v, dim), keepdim)


class Maximum(tuple):
    """What ``max`` with a dimension returns."""

    values = property(operator.itemgetter(0))


@operation("torch.max", ".max")
def maximum(run: Interpreter, v: Value, dim=None, keepdim=False) -> Maximum:
    """Over a dimension the gradient goes to the first maximum, where ``amax`` shares it among equal ones."""
    if type(dim) is not int:
        raise Refused("takes a maximum without a dimension")
    return Maximum((reduced("max", v, axes_of(v, dim), keepdim), Unknown("the indices of a maximum")))


def _pair(value: object) -> tuple:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


@operation("F.adaptive_avg_pool2d")
def adaptive_avg_pool2d(run: Interpreter, v: Value, output_size) -> Value:
    return _pool("mean", v, output_size)


@operation("F.adaptive_max_pool2d")
def adaptive_max_pool2d(run: Interpreter, v: Value, output_size, return_indices=False) -> Value:
    if return_indices is not False:
        raise Refused("asks for the indices of a maximum")
    return _pool("max", v, output_size)


def _pool(op: str, v: Value, output_size: object) -> Value:
    if any(type(s) is not int or s != 1 for s in _pair(output_size)) or len(v.shape) != 4:
        raise Refused("pools to another size than 1x1")
    return reduced(op, v, [2, 3], True)


def _windows(op: str, v: Value, kernel: object, stride: object, padding: object = 0) -> Value:
    """A pool whose window is the whole plane, or a square of x's height: the whole plane where x is square."""
    kernel = _pair(kernel)
    if len(v.shape) != 4 or len(kernel) != 2 or not all(isinstance(s, Size) for s in kernel):
        raise Refused("pools windows of another size than the map")
    if _pair(padding) != (0, 0) or (stride is not None and _pair(stride) != kernel):
        raise Refused("pools with padding or another stride than its window")
    plane = None
    if kernel != v.shape[2:]:
        symbols = [s for side in v.shape[2:] for s in side.symbols]
        is_plane = [s[0] for s in symbols] == ["H", "W"] and all(side.factor == 1 for side in v.shape[2:])
        if not is_plane or not set(kernel) <= set(v.shape[2:]):
            raise Refused("pools windows of another size than the map")
        plane = "square"
    return reduced(op, v, [2, 3], True, plane)


@operation("F.avg_pool2d")
def avg_pool2d(run: Interpreter, v: Value, kernel_size, stride=None, padding=0) -> Value:
    return _windows("mean", v, kernel_size, stride, padding)


@operation("F.max_pool2d")
def max_pool2d(run: Interpreter, v: Value, kernel_size, stride=None, padding=0) -> Value:
    return _windows("max", v, kernel_size, stride, padding)


@operation("F.lp_pool2d")
def lp_pool2d(run: Interpreter, v: Value, norm_type, kernel_size, stride=None) -> Value:
    if not is_number(norm_type) or norm_type != 2:
        raise Refused("pools by another norm than 2")
    return _windows("lp", v, kernel_size, stride)
