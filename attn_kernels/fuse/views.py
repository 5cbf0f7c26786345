"""Views of symbolic tensors: other shapes of the same numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from attn_kernels.fuse.registry import operation
from attn_kernels.fuse.terms import (
    ONE,
    Refused,
    Size,
    Value,
    product,
    size,
)

if TYPE_CHECKING:
    from attn_kernels.fuse.interpret import Interpreter


def axes_of(v: Value, dim: object) -> list[int]:
    """The dimensions that an argument names, all of them for None, in order."""
    dims = range(len(v.shape)) if dim is None else (dim,) if type(dim) is int else dim
    if not isinstance(dims, tuple | list | range) or not all(type(d) is int for d in dims):
        raise Refused("names dimensions that are not constant")
    if not all(-len(v.shape) <= d < len(v.shape) for d in dims):
        raise Refused("names a dimension that is not there")
    found = sorted(d % len(v.shape) for d in dims)
    if len(set(found)) != len(found):
        raise Refused("names a dimension twice")
    return found


def _sizes(shape: tuple) -> list[Size]:
    shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    if not all(type(s) is int or isinstance(s, Size) for s in shape):
        raise Refused("views a tensor in a shape that is not understood")
    return [size(s) for s in shape]


def _dims(shape: Iterable[Size]) -> list[Size]:
    return [s for s in shape if s != ONE]


def relayout(run: Interpreter, v: Value, shape: list[Size]) -> Value:
    """The same numbers with dimensions of 1 elsewhere."""
    old, new = _dims(v.shape), _dims(shape)
    if v.expanded or len(old) != len(new) or not all(map(run.same, old, new)):
        raise Refused("views a tensor so that dimensions mix")
    return Value(v.term, shape, v.storage)


@operation(".view", ".reshape", view=True)
def view(run: Interpreter, v: Value, *shape) -> Value:
    wanted = _sizes(shape)
    if wanted.count(size(-1)) > 1:
        raise Refused("views a tensor in a shape that is not understood")
    if size(-1) in wanted:
        rest = _dims(v.shape)
        for s in wanted:
            if s not in (size(-1), ONE):
                match = next((r for r in rest if run.same(r, s)), None)
                if match is None:
                    raise Refused("views a tensor so that dimensions mix")
                rest.remove(match)
        fill = product(rest)
        wanted = [fill if s == size(-1) else s for s in wanted]
    if len(_dims(wanted)) < len(_dims(v.shape)):
        return _merged(run, v, wanted)
    return relayout(run, v, wanted)


@operation("torch.reshape", view=True)
def reshape(run: Interpreter, v: Value, shape) -> Value:
    return view(run, v, shape)


def _merged(run: Interpreter, v: Value, shape: list[Size]) -> Value:
    """(N, C, H, W) as (N, C, HW)."""
    letters = [[s[0] for s in dim.symbols] for dim in v.shape]
    if letters != [["N"], ["C"], ["H"], ["W"]] or v.expanded or len(shape) != 3:
        raise Refused("views a tensor so that dimensions mix")
    n, c, h, w = v.shape
    if not (run.same(shape[0], n) and run.same(shape[1], c) and shape[2] == h * w):
        raise Refused("views a tensor so that dimensions mix")
    return Value(v.term, (n, c, h * w), v.storage)


@operation("torch.flatten", ".flatten", view=True)
def flatten(run: Interpreter, v: Value, start_dim=0, end_dim=-1) -> Value:
    rank = len(v.shape)
    if type(start_dim) is not int or type(end_dim) is not int or not rank:
        raise Refused("flattens dimensions that are not constant")
    first, last = dim_of(start_dim, rank), dim_of(end_dim, rank)
    if first > last:
        raise Refused("flattens no dimensions")
    return view(run, v, (*v.shape[:first], product(v.shape[first : last + 1]), *v.shape[last + 1 :]))


def dim_of(d: object, rank: int) -> int:
    if type(d) is not int or not -rank <= d < rank:
        raise Refused("names a dimension that is not there")
    return d % rank


@operation("torch.unsqueeze", ".unsqueeze", view=True)
def unsqueeze(run: Interpreter, v: Value, dim) -> Value:
    at = dim_of(dim, len(v.shape) + 1)
    return relayout(run, v, [*v.shape[:at], ONE, *v.shape[at:]])


@operation("torch.squeeze", ".squeeze", view=True)
def squeeze(run: Interpreter, v: Value, dim=None) -> Value:
    if dim is None:
        raise Refused("squeezes every dimension, a batch of 1 as well")
    dims = axes_of(v, dim)
    if any(v.shape[d] != ONE for d in dims):
        raise Refused("squeezes a dimension that need not be 1")
    return relayout(run, v, [s for d, s in enumerate(v.shape) if d not in dims])


@operation("torch.transpose", ".transpose", view=True)
def transpose(run: Interpreter, v: Value, dim0, dim1) -> Value:
    a, b = dim_of(dim0, len(v.shape)), dim_of(dim1, len(v.shape))
    shape = list(v.shape)
    shape[a], shape[b] = shape[b], shape[a]
    return relayout(run, v, shape)


@operation(".permute", view=True)
def permute(run: Interpreter, v: Value, *dims) -> Value:
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    order = [dim_of(d, len(v.shape)) for d in dims]
    if sorted(order) != list(range(len(v.shape))):
        raise Refused("permutes dimensions that are not there")
    return relayout(run, v, [v.shape[d] for d in order])


@operation("torch.permute", view=True)
def torch_permute(run: Interpreter, v: Value, dims) -> Value:
    return permute(run, v, dims)


@operation(".expand", view=True)
def expand(run: Interpreter, v: Value, *shape) -> Value:
    wanted = _sizes(shape)
    if len(wanted) != len(v.shape):
        raise Refused("expands to more dimensions")
    wanted = [old if new == size(-1) else new for old, new in zip(v.shape, wanted, strict=True)]
    if not all(old == ONE or run.same(old, new) for old, new in zip(v.shape, wanted, strict=True)):
        raise Refused("expands dimensions that are not 1")
    natural = [n if n == ONE else new for n, new in zip(v.natural, wanted, strict=True)]
    return Value(v.term, wanted, v.storage, natural)


@operation(".expand_as", view=True)
def expand_as(run: Interpreter, v: Value, other: Value) -> Value:
    return expand(run, v, *_tensor(other).shape)


@operation(".view_as", view=True)
def view_as(run: Interpreter, v: Value, other: Value) -> Value:
    return view(run, v, *_tensor(other).shape)


def _tensor(v: object) -> Value:
    if not isinstance(v, Value):
        raise Refused("uses something else than a tensor as one")
    return v


@operation(".contiguous", view=True)
def contiguous(run: Interpreter, v: Value) -> Value:
    if v.expanded:
        raise Refused("copies a tensor that was expanded")
    return v


@operation(".size", view=True)
def size_of(run: Interpreter, v: Value, dim=None):
    return tuple(v.shape) if dim is None else v.shape[dim_of(dim, len(v.shape))]


@operation(".dim", ".ndimension", view=True)
def rank_of(run: Interpreter, v: Value) -> int:
    return len(v.shape)
