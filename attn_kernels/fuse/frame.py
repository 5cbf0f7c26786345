"""How the interpreter runs one call of a function: its variables, and what statements and expressions do to them."""

from __future__ import annotations

import ast
import operator
from collections import ChainMap
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, NamedTuple

from attn_kernels.fuse.builtin import BUILTINS, CONSUMERS, IMPLEMENTATIONS
from attn_kernels.fuse.guards import CONSTANTS, Child, is_constant
from attn_kernels.fuse.registry import FUNCTIONS, Operation, is_number
from attn_kernels.fuse.terms import Number, Refused, Size, Unknown, Value

if TYPE_CHECKING:
    from attn_kernels.fuse.interpret import Interpreter


class Bound(NamedTuple):
    """A method of a tensor, module or list."""

    function: object
    owner: object


class Method(NamedTuple):
    """A method of tensors, by its name."""

    name: str


class Super(NamedTuple):
    """``super()`` in a method: the classes behind its own, and the module."""

    classes: tuple[type, ...]
    owner: Child


class Thunk(NamedTuple):
    """A lambda without arguments."""

    body: ast.expr
    frame: Frame


def kind_of(value: object) -> str:
    if isinstance(value, Unknown):
        return value.what
    if isinstance(value, Size | Number):
        return "sizes of x"
    return "values of tensors" if isinstance(value, Value) else type(value).__name__


def is_in(value: object, known) -> bool:
    """Whether ``value``, hashable or not, is one of ``known``."""
    try:
        return value in known
    except TypeError:
        return False


def operation_of(function: object) -> Operation | None:
    try:
        return FUNCTIONS.get(function) or (function if function in IMPLEMENTATIONS else None)
    except TypeError:  # not hashable
        return None


_OPERATORS = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.Pow: "pow",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
}
_COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.Gt: operator.gt,
    ast.LtE: operator.le,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


class _Return(NamedTuple):
    value: object


class Frame:
    """A function's call: its variables, and what its statements and expressions do to them."""

    def __init__(self, run: Interpreter, function: FunctionType, variables: dict):
        self.interpreter = run
        self.function = function
        self.variables = variables

    def run(self, body: list[ast.stmt]):
        result = self.block(body)
        return None if result is None else result.value

    def block(self, body: list[ast.stmt]) -> _Return | None:
        for statement in body:
            result = self.execute(statement)
            if result is not None:
                return result
        return None

    def refused(self, what: str, node: ast.AST) -> Refused:
        name = type(node).__name__.lower()
        return Refused(f"{what}, {name} (line {node.lineno} of {self.function.__qualname__})")

    # ---- statements

    def execute(self, statement: ast.stmt) -> _Return | None:
        self.interpreter.count()
        match statement:
            case ast.Return(value=value):
                return _Return(None if value is None else self.evaluate(value))
            case ast.Expr(value=value):
                if not isinstance(value, ast.Constant):
                    self.evaluate(value)
            case ast.Assign(targets=targets, value=value):
                result = self.evaluate(value)
                for target in targets:
                    self.assign(target, result)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                self.assign(target, self.evaluate(value))
            case ast.AugAssign(target=target, op=op, value=value):
                if not isinstance(target, ast.Name):
                    raise self.refused("assigns to an attribute or item", statement)
                old = self.evaluate(ast.Name(target.id, ast.Load()))
                self.assign(target, self.interpreter.augmented(_OPERATORS.get(type(op)), old, self.evaluate(value)))
            case ast.If(test=test, body=body, orelse=orelse):
                return self.block(body if self.truth(test) else orelse)
            case ast.For(target=target, iter=iterable, body=body, orelse=[]):
                for item in self.interpreter.items(self.evaluate(iterable)):
                    self.assign(target, item)
                    result = self.block(body)
                    if result is not None:
                        return result
            case ast.Assert(test=test):
                if not self.truth(test):
                    raise Refused("has an assertion that fails")
            case ast.Pass():
                pass
            case _:
                raise self.refused("has a statement that is not understood", statement)
        return None

    def assign(self, target: ast.expr, value: object) -> None:
        match target:
            case ast.Name(id=name):
                self.variables[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                items = list(self.interpreter.items(value))
                if len(items) != len(targets) or any(isinstance(t, ast.Starred) for t in targets):
                    raise self.refused("unpacks something else", target)
                for t, item in zip(targets, items, strict=True):
                    self.assign(t, item)
            case ast.Attribute(attr=name):
                raise Refused(f"sets the attribute {name}")
            case _:
                raise Refused("sets an item")

    # ---- expressions

    def truth(self, node: ast.expr) -> bool:
        return self.true(self.evaluate(node))

    @staticmethod
    def true(value: object) -> bool:
        if isinstance(value, Child):
            if hasattr(type(value.module), "__len__") or hasattr(type(value.module), "__bool__"):
                raise Refused("asks whether a container is empty")
            return True
        if isinstance(value, (*CONSTANTS, tuple, list)):
            return bool(value)
        raise Refused(f"has a branch on {kind_of(value)}")

    def evaluate(self, node: ast.expr):
        method = getattr(self, f"_{type(node).__name__}", None)
        if method is None:
            raise self.refused("has an expression that is not understood", node)
        return method(node)

    def _Constant(self, node: ast.Constant):
        if not is_constant(node.value) and node.value is not Ellipsis:
            raise self.refused("has a constant that is not understood", node)
        return node.value

    def _Name(self, node: ast.Name):
        name, function, reads = node.id, self.function, self.interpreter.reads
        if name in self.variables:
            return self.variables[name]
        code = function.__code__
        if name in code.co_varnames or name in code.co_cellvars:
            raise Refused(f"uses {name} before it is set")
        if name in code.co_freevars:
            cell = function.__closure__[code.co_freevars.index(name)]
            value = cell.cell_contents
            if not isinstance(value, FunctionType | ModuleType):
                raise Refused(f"reads {name}, a variable around its function")
            reads.cell(cell, value)
            return value
        if name in function.__globals__:
            value = function.__globals__[name]
            known = isinstance(value, FunctionType | ModuleType | type) or operation_of(value) is not None
            if not known:
                raise Refused(f"reads the global {name}")
            reads.global_name(function.__globals__, name, value)
            return value
        if name in BUILTINS:
            reads.no_global(function.__globals__, name)
            return BUILTINS[name]
        raise Refused(f"uses {name}")

    def _Attribute(self, node: ast.Attribute):
        return self.interpreter.attribute(self.evaluate(node.value), node.attr)

    def _Tuple(self, node: ast.Tuple) -> tuple:
        return self.sequence(node.elts)

    def sequence(self, nodes: list[ast.expr]) -> tuple:
        found: list = []
        for item in nodes:
            if isinstance(item, ast.Starred):
                found += self.interpreter.items(self.evaluate(item.value))
            else:
                found.append(self.evaluate(item))
        return tuple(found)

    def _List(self, node: ast.List) -> list:
        return list(self.sequence(node.elts))

    def _Dict(self, node: ast.Dict) -> dict:
        if any(key is None for key in node.keys):
            raise self.refused("merges dicts", node)
        keys = [self.evaluate(key) for key in node.keys]
        if not all(map(is_constant, keys)):
            raise self.refused("has keys that are not constant", node)
        return dict(zip(keys, map(self.evaluate, node.values), strict=True))

    def _UnaryOp(self, node: ast.UnaryOp):
        if isinstance(node.op, ast.Not):
            return not self.truth(node.operand)
        value = self.evaluate(node.operand)
        if isinstance(node.op, ast.USub) and is_number(value):
            return -value
        raise self.refused("has an operator that is not understood", node)

    def _BinOp(self, node: ast.BinOp):
        left, right = self.evaluate(node.left), self.evaluate(node.right)
        return self.interpreter.binary(_OPERATORS.get(type(node.op)), left, right)

    def _BoolOp(self, node: ast.BoolOp):
        value: object = None
        for operand in node.values:
            value = self.evaluate(operand)
            if self.true(value) is isinstance(node.op, ast.Or):
                break
        return value

    def _IfExp(self, node: ast.IfExp):
        return self.evaluate(node.body if self.truth(node.test) else node.orelse)

    def _Compare(self, node: ast.Compare) -> bool:
        if len(node.ops) > 1:
            raise self.refused("has a chain of comparisons", node)
        (comparison,) = node.ops
        left, right = self.evaluate(node.left), self.evaluate(node.comparators[0])
        if isinstance(comparison, ast.Is | ast.IsNot):
            if left is not None and right is not None:
                raise self.refused("compares by identity", node)
            if isinstance(left, Unknown) or isinstance(right, Unknown):
                raise Refused(f"has a branch on {kind_of(left)}")
            return (left is right) is isinstance(comparison, ast.Is)
        for value in (left, right):
            if not is_constant(value) and not (isinstance(value, list) and all(map(is_constant, value))):
                raise Refused(f"has a branch on {kind_of(value)}")
        try:
            return _COMPARISONS[type(comparison)](left, right)
        except TypeError:
            raise self.refused("compares what cannot be compared", node) from None

    def _Subscript(self, node: ast.Subscript):
        value = self.evaluate(node.value)
        if isinstance(value, Value):
            return self.interpreter.index(value, self.indices(node.slice))
        if isinstance(node.slice, ast.Slice):
            bounds = [None if b is None else self.evaluate(b) for b in (node.slice.lower, node.slice.upper)]
            constant = all(b is None or type(b) is int for b in bounds) and node.slice.step is None
            if not isinstance(value, tuple | list) or not constant:
                raise self.refused("takes a part of something", node)
            return value[slice(*bounds)]
        key = self.evaluate(node.slice)
        if isinstance(value, Child) and type(key) is int:
            value = self.interpreter.items(value)
        if isinstance(value, tuple | list) and type(key) is int and -len(value) <= key < len(value):
            return value[key]
        if type(value) is dict and is_constant(key) and key in value:
            return value[key]
        raise Refused(f"takes an item of a {kind_of(value)}")

    def indices(self, node: ast.expr) -> list:
        """What a tensor is indexed by: full slices, None and Ellipsis."""
        found: list = []
        for item in node.elts if isinstance(node, ast.Tuple) else [node]:
            is_full = isinstance(item, ast.Slice) and item.lower is item.upper is item.step is None
            if not is_full and not (isinstance(item, ast.Constant) and item.value in (None, Ellipsis)):
                raise Refused("takes a part of a tensor")
            found.append(slice(None) if is_full else item.value)
        return found

    def _ListComp(self, node: ast.GeneratorExp | ast.ListComp) -> list:
        if len(node.generators) != 1 or node.generators[0].ifs or node.generators[0].is_async:
            raise self.refused("has a comprehension with conditions", node)
        (generator,) = node.generators
        inner = Frame(self.interpreter, self.function, ChainMap({}, self.variables))
        found = []
        for item in self.interpreter.items(self.evaluate(generator.iter)):
            inner.assign(generator.target, item)
            found.append(inner.evaluate(node.elt))
        return found

    def _Lambda(self, node: ast.Lambda) -> Thunk:
        a = node.args
        if a.args or a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs:
            raise self.refused("has a lambda with arguments", node)
        return Thunk(node.body, self)

    def _Call(self, node: ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            return self.super(node)
        function = self.evaluate(node.func)
        consumed = is_in(function, CONSUMERS) and len(node.args) == 1 and isinstance(node.args[0], ast.GeneratorExp)
        args, kwargs = (self._ListComp(node.args[0]),) if consumed else self.sequence(node.args), {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.refused("passes **keywords", node)
            kwargs[keyword.arg] = self.evaluate(keyword.value)
        return self.interpreter.call(function, args, kwargs)

    def super(self, node: ast.Call) -> Super:
        function = self.function
        if "super" in function.__globals__ or "super" in self.variables:
            raise self.refused("has a super of its own", node)
        owner = next(iter(self.variables.values()), None)
        names = function.__code__.co_freevars
        if node.args:  # super(Class, self)
            cls, instance = (*self.sequence(node.args), None)[:2]
            owner = instance
        else:
            cls = function.__closure__[names.index("__class__")].cell_contents if "__class__" in names else None
        if not isinstance(owner, Child) or not isinstance(cls, type) or cls not in type(owner.module).__mro__:
            raise self.refused("has a super that is not understood", node)
        classes = type(owner.module).__mro__
        return Super(classes[classes.index(cls) + 1 :], owner)
