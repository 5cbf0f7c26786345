"""What functions and methods of PyTorch do to symbolic tensors: ``FUNCTIONS`` and ``METHODS``.

An operation takes the interpreter, which knows which sizes are equal, and the arguments of the call. It refuses what it
does not model: other options, parts of tensors, dimensions that mix. None looks at the dtype, so only operations that
keep it are here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from attn_kernels.fuse.terms import (
    ONE,
    Number,
    Refused,
    Size,
    Term,
    Unknown,
    Value,
    number,
    product,
    size,
    unordered,
)

if TYPE_CHECKING:
    from attn_kernels.fuse.interpret import Interpreter

Operation = Callable[..., Any]
FUNCTIONS: dict[Any, Operation] = {}
METHODS: dict[str, Operation] = {}
VIEWS: set[Operation] = set()

MODULES = {"torch": torch, "F": F, "special": torch.special}
SPATIAL = frozenset("HW")


def operation(*names: str, view: bool = False) -> Callable[[Operation], Operation]:
    """Register an operation under names such as "torch.mean", "F.relu" and ".mean", a method."""

    def register(implementation: Operation) -> Operation:
        for name in names:
            module, _, function = name.partition(".")
            if module:
                FUNCTIONS[getattr(MODULES[module], function)] = implementation
            else:
                METHODS[function] = implementation
        if view:
            VIEWS.add(implementation)
        return implementation

    return register


def is_number(value: object) -> bool:
    return isinstance(value, int | float)


# ---- reductions


def _axes(v: Value, dim: object) -> list[int]:
    dims = range(len(v.shape)) if dim is None else (dim,) if type(dim) is int else dim
    if not isinstance(dims, tuple | list | range) or not all(type(d) is int for d in dims):
        raise Refused("reduces dimensions that are not constant")
    if not all(-len(v.shape) <= d < len(v.shape) for d in dims):
        raise Refused("reduces a dimension that is not there")
    found = sorted(d % len(v.shape) for d in dims)
    if len(set(found)) != len(found):
        raise Refused("reduces a dimension twice")
    return found


def reduced(op: str, v: Value, dims: list[int], keepdim: bool, plane: object = None) -> Value:
    """The mean, sum, maximum or so over C, H, W or several of them.

    ``plane`` is the condition on which that is what is computed: "square", or a height and a width.
    """
    if v.expanded:
        raise Refused("reduces a tensor that was expanded")
    if not isinstance(keepdim, bool):
        raise Refused("reduces with other options")
    symbols = [s for d in dims for s in v.shape[d].symbols]
    if any(v.shape[d].factor != 1 for d in dims) or any(s[0] not in "CHW" for s in symbols):
        raise Refused(f"takes the {op} over something else than channels or pixels")
    names = frozenset(s[0] for s in symbols)
    if len(names) != len(symbols):
        raise Refused(f"takes the {op} over dimensions that are not x's")
    shape = [ONE if d in dims else s for d, s in enumerate(v.shape) if keepdim or d not in dims]
    if not names:
        # A view, which the caller may not write to: in eager it is a copy.
        return Value(v.term, shape)
    term = v.term
    if term.op in ("mean", "sum", "amax", "max") and {names, term.args[1]} == {frozenset("H"), frozenset("W")}:
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
        return reduced(op, v, _axes(v, dim if axis is None else axis), keepdim or keepdims)

    return reduce


mean = _reduction("mean", "torch.mean", ".mean")
amax = _reduction("amax", "torch.amax", ".amax")
_reduction("sum", "torch.sum", ".sum")


@operation("torch.logsumexp", ".logsumexp")
def logsumexp(run: Interpreter, v: Value, dim, keepdim=False) -> Value:
    return reduced("logsumexp", v, _axes(v, dim), keepdim)


class Maximum(tuple):
    """What ``max`` with a dimension returns."""

    values = property(operator.itemgetter(0))


@operation("torch.max", ".max")
def maximum(run: Interpreter, v: Value, dim=None, keepdim=False) -> Maximum:
    """Over a dimension the gradient goes to the first maximum, where ``amax`` shares it among equal ones."""
    if type(dim) is not int:
        raise Refused("takes a maximum without a dimension")
    return Maximum((reduced("max", v, _axes(v, dim), keepdim), Unknown("the indices of a maximum")))


# ---- pools


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


# ---- views


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
    first, last = _dim(start_dim, rank), _dim(end_dim, rank)
    if first > last:
        raise Refused("flattens no dimensions")
    return view(run, v, (*v.shape[:first], product(v.shape[first : last + 1]), *v.shape[last + 1 :]))


def _dim(d: object, rank: int) -> int:
    if type(d) is not int or not -rank <= d < rank:
        raise Refused("names a dimension that is not there")
    return d % rank


@operation("torch.unsqueeze", ".unsqueeze", view=True)
def unsqueeze(run: Interpreter, v: Value, dim) -> Value:
    at = _dim(dim, len(v.shape) + 1)
    return relayout(run, v, [*v.shape[:at], ONE, *v.shape[at:]])


@operation("torch.squeeze", ".squeeze", view=True)
def squeeze(run: Interpreter, v: Value, dim=None) -> Value:
    if dim is None:
        raise Refused("squeezes every dimension, a batch of 1 as well")
    dims = _axes(v, dim)
    if any(v.shape[d] != ONE for d in dims):
        raise Refused("squeezes a dimension that need not be 1")
    return relayout(run, v, [s for d, s in enumerate(v.shape) if d not in dims])


@operation("torch.transpose", ".transpose", view=True)
def transpose(run: Interpreter, v: Value, dim0, dim1) -> Value:
    a, b = _dim(dim0, len(v.shape)), _dim(dim1, len(v.shape))
    shape = list(v.shape)
    shape[a], shape[b] = shape[b], shape[a]
    return relayout(run, v, shape)


@operation(".permute", view=True)
def permute(run: Interpreter, v: Value, *dims) -> Value:
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    order = [_dim(d, len(v.shape)) for d in dims]
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
    return tuple(v.shape) if dim is None else v.shape[_dim(dim, len(v.shape))]


@operation(".dim", ".ndimension", view=True)
def rank_of(run: Interpreter, v: Value) -> int:
    return len(v.shape)


# ---- arithmetic

_ARITHMETIC = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}


def binary(run: Interpreter, op: str | None, a: object, b: object):
    """``a op b`` of tensors, numbers, sizes or sequences."""
    if op is None:
        raise Refused("has an operator that is not understood")
    if is_number(a) and is_number(b):
        return _ARITHMETIC[op](a, b)
    if isinstance(a, tuple | list) and type(a) is type(b) and op == "add":
        return a + b
    if isinstance(a, tuple | list) and type(b) is int and op == "mul" and 0 <= b < 100:
        return a * b
    numbers = (int, float, Size, Number)
    if not isinstance(a, Value) and not isinstance(b, Value):
        if op == "mul" and all(type(n) is int or isinstance(n, Size) for n in (a, b)):
            return size(a) * size(b)
        if op not in ("floordiv", "mod") and all(isinstance(n, numbers) for n in (a, b)):
            return Number(Term(op, _term(a), _term(b)))
    if not all(isinstance(n, (Value, *numbers)) for n in (a, b)):
        raise Refused(f"computes with a {_kind(a)} and a {_kind(b)}")
    if op not in ("add", "sub", "mul", "div", "pow"):
        raise Refused(f"has an operation on tensors that is not understood, {op}")
    shape = _broadcast(run, *(v.shape if isinstance(v, Value) else () for v in (a, b)))
    natural = _broadcast(run, *(v.natural if isinstance(v, Value) else () for v in (a, b)))
    make = unordered if op in ("add", "mul") else Term
    return Value(simplified(make(op, _term(a), _term(b))), shape, natural=natural)


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, Value) else type(value).__name__


def _term(value: Value | Number | Size | float) -> Term:
    if isinstance(value, Value | Number):
        return value.term
    if isinstance(value, Size):
        return Term("size", value.factor, value.symbols)
    return number(value)


def _broadcast(run: Interpreter, a: tuple[Size, ...], b: tuple[Size, ...]) -> list[Size]:
    rank = max(len(a), len(b))
    shape = []
    for p, q in zip((ONE,) * (rank - len(a)) + a, (ONE,) * (rank - len(b)) + b, strict=True):
        if p != ONE and q != ONE and not run.same(p, q):
            raise Refused("broadcasts dimensions that need not be equal")
        shape.append(q if p == ONE or (q != ONE and q.symbols) else p)
    return shape


def simplified(t: Term) -> Term:
    """The term by the name of what it is, where that is another: silu, hardsigmoid, a square."""
    if t.op == "add" and number(0) in t.args:
        return t.args[t.args.index(number(0)) ^ 1]
    if t.op == "mul":
        for a, b in (t.args, t.args[::-1]):
            for gate, name in (("sigmoid", "silu"), ("hardsigmoid", "hardswish")):
                if b.op == gate and b.args[0] is a:
                    return Term(name, a)
        if t.args[0] is t.args[1]:
            return Term("square", t.args[0])
    if t.op == "pow" and t.args[1] is number(2):
        return Term("square", t.args[0])
    # relu6(x + 3) / 6, and (x + 3) / 6 between 0 and 1
    inner = None
    if t.op == "div" and t.args[1] is number(6) and t.args[0].op in ("relu6", "clamp_0_6"):
        inner = t.args[0].args[0]
    elif t.op == "clamp_0_1" and t.args[0].op == "div" and t.args[0].args[1] is number(6):
        inner = t.args[0].args[0]
    if inner is not None and inner.op == "add" and number(3) in inner.args:
        return Term("hardsigmoid", inner.args[inner.args.index(number(3)) ^ 1])
    return t


def _binary(op: str, *names: str) -> None:
    @operation(*names)
    def out_of_place(run: Interpreter, a, b):
        return binary(run, op, a, b)

    @operation(f".{op}_")
    def in_place(run: Interpreter, a: Value, b):
        return written(run, a, binary(run, op, a, b))


def written(run: Interpreter, v: Value, result: Value) -> Value:
    """``result``, which lies in v's memory from now on."""
    same = len(result.shape) == len(v.shape) and all(map(run.same, v.shape, result.shape))
    if not same or result.expanded:
        raise Refused("writes a larger tensor in place")
    run.write(v)
    return Value(result.term, result.shape)


_binary("add", "torch.add", ".add")
_binary("sub", "torch.sub", ".sub")
_binary("mul", "torch.mul", "torch.multiply", ".mul")
_binary("div", "torch.div", ".div")
_binary("pow", "torch.pow", ".pow")


@operation("torch.square", ".square")
def square(run: Interpreter, v: Value) -> Value:
    return binary(run, "pow", v, 2)


# ---- elementwise functions


def elementwise(run: Interpreter, name: str, v: Value, inplace: object = False, *options: float) -> Value:
    """A function of each element; an option other than its default is part of the term."""
    if not isinstance(v, Value):
        raise Refused(f"takes the {name} of something else than a tensor")
    if not isinstance(inplace, bool) or not all(map(is_number, options)):
        raise Refused(f"calls {name} with other arguments")
    result = Value(simplified(Term(name, v.term, *map(float, options))), v.shape, natural=v.natural)
    return written(run, v, result) if inplace else result


def _elementwise(name: str, *names: str, inplace: str = "") -> None:
    """Functions that take x alone, those with an ``inplace``, and those named with an underscore."""
    for full in names:
        module = full.partition(".")[0]
        if module == "F" and name not in ("sigmoid", "tanh", "softplus"):

            @operation(full)
            def with_option(run: Interpreter, v: Value, inplace=False) -> Value:
                return elementwise(run, name, v, inplace)

        else:

            @operation(full)
            def alone(run: Interpreter, v: Value) -> Value:
                return elementwise(run, name, v)

    for full in inplace.split():

        @operation(full)
        def in_place(run: Interpreter, v: Value) -> Value:
            return elementwise(run, name, v, True)


_elementwise("relu", "torch.relu", "F.relu", ".relu", inplace="torch.relu_ F.relu_ .relu_")
_elementwise("sigmoid", "torch.sigmoid", "F.sigmoid", "special.expit", ".sigmoid", inplace="torch.sigmoid_ .sigmoid_")
_elementwise("tanh", "torch.tanh", "F.tanh", ".tanh", inplace="torch.tanh_ .tanh_")
_elementwise("exp", "torch.exp", ".exp")
_elementwise("log", "torch.log", ".log")
for _name in ("silu", "relu6", "hardsigmoid", "hardswish", "mish"):
    _elementwise(_name, f"F.{_name}")


@operation("F.gelu")
def gelu(run: Interpreter, v: Value, approximate="none") -> Value:
    if approximate != "none":
        raise Refused("computes GELU approximately")
    return elementwise(run, "gelu", v)


@operation("F.leaky_relu")
def leaky_relu(run: Interpreter, v: Value, negative_slope=0.01, inplace=False) -> Value:
    return elementwise(run, "leaky_relu", v, inplace, negative_slope)


@operation("F.elu")
def elu(run: Interpreter, v: Value, alpha=1.0, inplace=False) -> Value:
    return elementwise(run, "elu", v, inplace, alpha)


def _clamped(run: Interpreter, v: Value, low: object, high: object, inplace: bool) -> Value:
    if not (is_number(low) and is_number(high) and low == 0 and high in (1, 6)):
        raise Refused("clamps to other bounds than 0 and 1")
    return elementwise(run, f"clamp_0_{int(high)}", v, inplace)


@operation("torch.clamp", ".clamp")
def clamp(run: Interpreter, v: Value, min=None, max=None) -> Value:
    return _clamped(run, v, min, max, False)


@operation("torch.clamp_", ".clamp_")
def clamp_(run: Interpreter, v: Value, min=None, max=None) -> Value:
    return _clamped(run, v, min, max, True)


# ---- several tensors


@operation("torch.cat", "torch.concat")
def cat(run: Interpreter, tensors, dim=0) -> Value:
    """Of (N, 1, H, W) maps along their channels."""
    if not isinstance(tensors, tuple | list) or not tensors:
        raise Refused("concatenates something else than a sequence of tensors")
    if not all(isinstance(v, Value) and not v.expanded and len(v.shape) == 4 for v in tensors):
        raise Refused("concatenates something else than maps")
    first = tensors[0].shape
    alike = all(v.shape == first and v.shape[1] == ONE for v in tensors)
    if type(dim) is not int or dim not in (1, -3) or not alike:
        raise Refused("concatenates something else than maps along their channels")
    shape = first[0], size(len(tensors)), *first[2:]
    return Value(Term("cat", *(v.term for v in tensors)), shape)


@operation("torch.stack")
def stack(run: Interpreter, tensors, dim=0) -> Value:
    if not isinstance(tensors, tuple | list) or not all(isinstance(v, Value) and len(v.shape) == 3 for v in tensors):
        raise Refused("stacks something else than maps")
    return cat(run, [unsqueeze(run, v, dim) for v in tensors], _dim(dim, 4))


def _is_scripting(run: Interpreter) -> bool:
    return False


FUNCTIONS[torch.jit.is_scripting] = _is_scripting
VIEWS.add(_is_scripting)


# ---- Python's own functions


def _isinstance(run: Interpreter, value: object, classes: object) -> bool:
    asked = classes if isinstance(classes, tuple) else (classes,)
    if isinstance(value, Value) and value.term.op != "output" and all(c in (torch.Tensor, list, tuple, dict, str, int, float) for c in asked):
        return torch.Tensor in asked
    raise Refused("asks for the class of something")


def _len(run: Interpreter, value: object) -> int:
    if isinstance(value, tuple | list):
        return len(value)
    raise Refused("takes the length of something else than a sequence")


def _sum(run: Interpreter, values: object, start: object = 0):
    return functools.reduce(lambda a, b: binary(run, "add", a, b), run.items(values), start)


def _float(run: Interpreter, value: object) -> float:
    if is_number(value):
        return float(value)
    raise Refused("takes a Python number of a tensor or a size")


def _range(run: Interpreter, *bounds: object) -> range:
    if not all(type(b) is int for b in bounds) or len(range(*bounds)) > 100:
        raise Refused("counts over something else than a few constants")
    return range(*bounds)


def _getattr(run: Interpreter, owner: object, name: object, *default: object):
    if default and run.lacks(owner, name):
        return default[0]
    return run.attribute(owner, name)


def _list(run: Interpreter, values: object = ()) -> list:
    return list(run.items(values))


def _tuple(run: Interpreter, values: object = ()) -> tuple:
    return tuple(run.items(values))


BUILTINS: dict[str, Operation] = {
    "isinstance": _isinstance,
    "len": _len,
    "sum": _sum,
    "float": _float,
    "range": _range,
    "getattr": _getattr,
    "list": _list,
    "tuple": _tuple,
}
VIEWS.update(BUILTINS.values())
IMPLEMENTATIONS = {*FUNCTIONS.values(), *METHODS.values(), *BUILTINS.values()}
