"""Operators and elementwise functions of symbolic tensors, and those that put several together."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from attn_kernels.fuse.registry import is_number, operation
from attn_kernels.fuse.terms import (
    ONE,
    Number,
    Refused,
    Size,
    Storage,
    Term,
    Value,
    number,
    size,
    unordered,
)
from attn_kernels.fuse.views import dim_of, unsqueeze

if TYPE_CHECKING:
    from attn_kernels.fuse.interpret import Interpreter

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
    if op in ("div", "floordiv", "mod") and is_number(b) and b == 0:
        raise Refused("divides by zero")
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
    """The term under a shorter name, where it has one: silu, hardsigmoid, a square."""
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
    # The clamp of (x + 3) / 6 is another function: its gradient at the bounds is not 0.
    if t.op == "div" and t.args[1] is number(6) and t.args[0].op == "relu6":
        shifted = t.args[0].args[0]
        if shifted.op == "add" and number(3) in shifted.args:
            return Term("hardsigmoid", shifted.args[shifted.args.index(number(3)) ^ 1])
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
    return Value(result.term, result.shape, Storage(fresh=v.storage.fresh))


_binary("add", "torch.add", ".add")
_binary("sub", "torch.sub", ".sub")
_binary("mul", "torch.mul", "torch.multiply", ".mul")
_binary("div", "torch.div", ".div")
_binary("pow", "torch.pow", ".pow")


@operation("torch.square", ".square")
def square(run: Interpreter, v: Value) -> Value:
    return binary(run, "pow", v, 2)


def elementwise(run: Interpreter, name: str, v: Value, inplace: object = False, *options: float) -> Value:
    """A function of each element; an option other than its default is part of the term."""
    if not isinstance(v, Value):
        raise Refused(f"takes the {name} of something else than a tensor")
    if not isinstance(inplace, bool) or not all(map(is_number, options)):
        raise Refused(f"calls {name} with other arguments")
    result = Value(simplified(Term(name, v.term, *map(float, options))), v.shape, natural=v.natural)
    return written(run, v, result) if inplace else result


def _elementwise(name: str, *names: str, inplace: str = "") -> None:
    """Register a function of x alone, under its names with an ``inplace`` option and with an underscore too."""
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


@operation("torch.cat", "torch.concat")
def cat(run: Interpreter, tensors, dim=0) -> Value:
    """Concatenate (N, 1, H, W) maps along their channels."""
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
    return cat(run, [unsqueeze(run, v, dim) for v in tensors], dim_of(dim, 4))
