"""An interpreter of a module's forward in a closed world: of its source, on symbolic tensors.

Each statement, name, method and function that is not known here is refused, and so is whatever depends on more than
constants of the module: whether it is training, values and dtypes of tensors, globals, random numbers, writes to
attributes or to the input. What is left is understood whole, for every input, and ``reads`` has all that it depends on.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Sequence
from types import FunctionType, ModuleType
from typing import NamedTuple

from torch import nn

from attn_kernels.fuse import layers
from attn_kernels.fuse import operations as ops
from attn_kernels.fuse.guards import CONSTANTS, HOOKS, Child, Reads, is_constant
from attn_kernels.fuse.source import tree
from attn_kernels.fuse.terms import ONE, Number, Refused, Size, Storage, Term, Unknown, Value, X

LIMIT_CALLS, LIMIT_DEPTH, LIMIT_ITEMS = 400, 20, 100
TRAINING = Unknown("whether it is training")
_KNOWN_MODULES = ("torch", "math")


class Bound(NamedTuple):
    """A method of a tensor, module or list."""

    function: object
    owner: object


class Method(NamedTuple):
    """A method of tensors, by its name."""

    name: str


class _Super(NamedTuple):
    """``super()`` in a method: the classes behind its own, and the module."""

    classes: tuple[type, ...]
    owner: Child


class _Thunk(NamedTuple):
    """A lambda without arguments."""

    body: ast.expr
    frame: Frame


def input_value(layout: str = "NCHW") -> Value:
    """The input of a module: N, C, H and W in the order of ``layout``."""
    return Value(X, [Size(1, (letter,)) for letter in layout], Storage(is_input=True))


class Interpreter:
    """One run of a module's forward.

    Attributes:
        reads: all that the result depends on.
        norms: the calls of BatchNorm, each of which writes buffers.
        channels: how many channels the input must have, where a layer says so.
    """

    def __init__(self, module: nn.Module):
        self.root = Child((), module)
        self.reads = Reads()
        self.norms: list[Term] = []
        self._channels: dict[str, int] = {}
        self._calls = 0
        self._depth = 0

    @property
    def channels(self) -> int | None:
        return self._channels.get("C")

    # ---- sizes and memory

    def same(self, a: Size, b: Size) -> bool:
        """Whether two sizes are equal for every input; C is what the first layer that is asked takes."""
        a, b = self._known(a), self._known(b)
        if a == b:
            return True
        for symbolic, fixed in ((a, b), (b, a)):
            is_free = symbolic.factor == 1 and len(symbolic.symbols) == 1 and symbolic.symbols[0][0] == "C"
            if is_free and not fixed.symbols and fixed.factor > 1:
                self._channels[symbolic.symbols[0]] = fixed.factor
                return True
        return False

    def _known(self, s: Size) -> Size:
        for symbol in s.symbols:
            if symbol in self._channels:
                rest = list(s.symbols)
                rest.remove(symbol)
                return self._known(Size(s.factor * self._channels[symbol], tuple(rest)))
        return s

    def alive(self, *values: object) -> None:
        """Refuse tensors whose memory was written since."""
        for value in values:
            if isinstance(value, Value) and value.storage.overwritten:
                raise Refused("uses a tensor that was overwritten in place")
            if isinstance(value, tuple | list):
                self.alive(*value)

    def write(self, v: Value) -> None:
        """A tensor is overwritten: it and its views may not be used any more."""
        if v.storage.is_input:
            raise Refused("writes to its input")
        if v.expanded:
            raise Refused("writes to a tensor that was expanded")
        if v.storage.used:
            raise Refused("overwrites a tensor that was used before")
        v.storage.overwritten = True

    # ---- attributes

    def attribute(self, owner: object, name: object):
        """``owner.name``."""
        if not isinstance(name, str):
            raise Refused("asks for an attribute whose name is not constant")
        if isinstance(owner, Child):
            return self.module_attribute(owner, name)
        if isinstance(owner, Value):
            return self.tensor_attribute(owner, name)
        if isinstance(owner, ModuleType):
            if owner.__name__.split(".")[0] not in _KNOWN_MODULES:
                raise Refused(f"uses the module {owner.__name__}")
            if not hasattr(owner, name):
                raise Refused(f"asks for {name} of {owner.__name__}")
            value = getattr(owner, name)
            if not isinstance(value, ModuleType):
                self.reads.module_name(owner, name, value)
            return value
        if isinstance(owner, _Super):
            for cls in owner.classes:
                if name in vars(cls):
                    self.reads.class_attribute(cls, name, getattr(cls, name))
                    return self._of_class(vars(cls)[name], owner.owner)
        if isinstance(owner, ops.Maximum) and name == "values":
            return owner.values
        if type(owner) is list and name == "append":
            return Bound(list.append, owner)
        raise Refused(f"asks for {name} of a {_kind(owner)}")

    def tensor_attribute(self, v: Value, name: str):
        self.alive(v)
        if name == "shape":
            return tuple(v.shape)
        if name == "ndim":
            return len(v.shape)
        if name in ops.METHODS:
            return Bound(Method(name), v)
        raise Refused(f"asks for {name} of a tensor")

    def module_attribute(self, owner: Child, name: str):
        state, cls = vars(owner.module), type(owner.module)
        if name == "training":
            return TRAINING if owner.path == () else Unknown("whether a layer is training")
        for base in cls.__mro__:
            if base is nn.Module:
                break
            if "__getattr__" in vars(base) or "__getattribute__" in vars(base):
                raise Refused(f"has a __getattr__ of its own, {base.__name__}'s")
            if hasattr(type(vars(base).get(name)), "__set__"):
                raise Refused(f"reads {name}, a property")
        if name in state:
            value = state[name]
            if callable(value):
                if type(value) is not FunctionType and _operation(value) is None:
                    raise Refused(f"reads {name}, a {type(value).__name__}")
                self.reads.function(owner, name)
                return value
            return self.reads.constant(owner, name)
        for base in cls.__mro__:
            if base is not nn.Module and name in vars(base):
                self.reads.class_attribute(cls, name, getattr(cls, name))
                self.reads.missing(owner, name)
                return self._of_class(vars(base)[name], owner)
        if name in state["_modules"]:
            return self.child(owner, name)
        if name in state["_parameters"] and state["_parameters"][name] is None:
            self.reads.parameter(owner, name)
            return None
        if name in state["_parameters"] or name in state["_buffers"]:
            raise Refused(f"reads the parameter or buffer {name} of {owner.name} itself")
        raise Refused(f"reads {name} of {owner.name}, which is not there")

    def lacks(self, owner: object, name: object) -> bool:
        """Whether a module has nothing of that name."""
        if not isinstance(owner, Child) or not isinstance(name, str):
            raise Refused("asks whether something has an attribute")
        module, state = owner.module, vars(owner.module)
        if hasattr(type(module), name) or any(name in state[d] for d in ("_modules", "_parameters", "_buffers")):
            return False
        if name in state:
            return False
        self.reads.absent(owner, name)
        return True

    def child(self, owner: Child, name: str) -> Child | None:
        """A child of a module, by its name."""
        self.reads.child(owner, name)
        module = owner.module._modules[name]
        return None if module is None else Child((*owner.path, name), module)

    @staticmethod
    def _of_class(value: object, owner: Child):
        if type(value) is FunctionType:
            return Bound(value, owner)
        if type(value) is staticmethod and type(value.__func__) is FunctionType:
            return value.__func__
        if is_constant(value):
            return value
        raise Refused(f"reads a {type(value).__name__} of its class")

    def items(self, value: object) -> Sequence:
        """What a loop over ``value`` goes through."""
        if isinstance(value, Child) and type(value.module) in (nn.Sequential, nn.ModuleList):
            self.reads.kind(value)
            self.reads.children(value)
            return [self.child(value, name) for name in value.module._modules]
        if isinstance(value, tuple | list | range) and len(value) <= LIMIT_ITEMS:
            return value
        raise Refused(f"goes through a {_kind(value)}")

    # ---- operators, which a block records

    def binary(self, op: str | None, a: object, b: object):
        """``a op b``."""
        self.alive(a, b)
        result = ops.binary(self, op, a, b)
        self.used((a, b), {})
        return result

    def augmented(self, op: str | None, a: object, b: object):
        """``a op= b``: of a tensor, in place."""
        self.alive(a, b)
        if isinstance(a, list | dict):
            raise Refused("changes a list in place")
        result = ops.binary(self, op, a, b)
        self.used((b,), {})
        return ops.written(self, a, result) if isinstance(a, Value) else result

    def index(self, v: Value, indices: list) -> Value:
        """``v[:, None, ...]``: a view with dimensions of 1."""
        self.alive(v)
        rest, shape = list(v.shape), []
        for at, item in enumerate(indices):
            if item is None:
                shape.append(ONE)
            elif item is Ellipsis:
                behind = sum(isinstance(i, slice) for i in indices[at + 1 :])
                keep = len(rest) - behind
                shape, rest = shape + rest[:keep], rest[keep:]
            elif rest:
                shape.append(rest.pop(0))
            else:
                raise Refused("indexes more dimensions than a tensor has")
        return ops.relayout(self, v, shape + rest)

    # ---- calls

    def call(self, function: object, args: tuple, kwargs: dict):
        """``function(*args, **kwargs)``."""
        self.alive(*args, *kwargs.values())
        self._calls += 1
        if self._calls > LIMIT_CALLS:
            raise Refused("computes more than an attention module does")
        if isinstance(function, Child):
            return self.call_module(function, args, kwargs)
        if isinstance(function, _Thunk):
            if args or kwargs:
                raise Refused("passes arguments to a lambda")
            return function.frame.evaluate(function.body)
        owner: tuple = ()
        if isinstance(function, Bound):
            function, owner = function.function, (function.owner,)
        if function is list.append:
            return list.append(*owner, *args)
        if isinstance(function, Method) or _operation(function) is not None:
            return self.call_operation(function, (*owner, *args), kwargs)
        if type(function) is FunctionType:
            return self.call_function(function, (*owner, *args), kwargs)
        raise Refused(f"calls {getattr(function, '__qualname__', type(function).__name__)}")

    def call_operation(self, function: object, args: tuple, kwargs: dict):
        """A function or method of PyTorch, or a builtin."""
        self.alive(*args)
        operation = ops.METHODS[function.name] if isinstance(function, Method) else _operation(function)
        try:
            result = operation(self, *args, **kwargs)
        except (TypeError, AttributeError, ValueError, OverflowError, ZeroDivisionError):
            raise Refused(f"calls {operation.__name__.lstrip('_')} with arguments that are not understood") from None
        if operation not in ops.VIEWS:
            self.used(args, kwargs)
        return result

    def used(self, args: Sequence, kwargs: dict) -> None:
        """Note that an operation has read these tensors."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Value):
                value.storage.used = True
            elif isinstance(value, tuple | list):
                self.used(value, {})

    def call_function(self, function: FunctionType, args: tuple, kwargs: dict):
        """A function or method whose source is read."""
        if (function.__module__ or "").split(".")[0] == "torch":
            raise Refused(f"calls {function.__module__}.{function.__qualname__}")
        if hasattr(function, "__wrapped__"):
            raise Refused(f"has a decorated function, {function.__qualname__}")
        definition = tree(function.__code__)
        self.reads.code(function)
        variables = _bound(function, definition.args, args, kwargs)
        self._depth += 1
        if self._depth > LIMIT_DEPTH:
            raise Refused("calls functions too deep")
        result = Frame(self, function, variables).run(definition.body)
        self._depth -= 1
        return result

    def call_module(self, child: Child, args: tuple, kwargs: dict):
        """A module, through its class's forward."""
        module, state, cls = child.module, vars(child.module), type(child.module)
        self.reads.kind(child)
        if cls.__call__ is not nn.Module.__call__ or cls._call_impl is not nn.Module._call_impl:
            raise Refused(f"has a __call__ of its own, {cls.__name__}'s")
        if "_call_impl" in state or "__call__" in state:
            raise Refused(f"has a __call__ of its own, of {child.name}")
        if "forward" in state:
            raise Refused(f"has another forward in {child.name} than its class's")
        if child.path and any(state[hook] for hook in HOOKS):
            raise Refused(f"has hooks on {child.name}")
        self.reads.class_attribute(cls, "forward", cls.forward)
        layer = layers.find(cls)
        if layer is not None:
            return self._call_layer(child, layer, args, kwargs)
        if cls.forward is nn.Sequential.forward:
            if len(args) != 1 or kwargs or cls.__iter__ is not nn.Sequential.__iter__:
                raise Refused(f"calls {child.name} with other arguments than a tensor")
            (value,) = args
            self.reads.children(child)
            for name in module._modules:
                value = self.call(self.child(child, name), (value,), {})
            return value
        if cls.__module__.split(".")[0] == "torch":
            raise Refused(f"has a {cls.__name__}, {child.name}")
        return self.call_function(cls.forward, (child, *args), kwargs)

    def _call_layer(self, child: Child, layer: layers.Layer, args: tuple, kwargs: dict) -> Value:
        cls = type(child.module)
        if len(args) != 1 or kwargs or not isinstance(args[0], Value):
            raise Refused(f"calls {child.name} with other arguments than a tensor")
        if cls.forward is not layers.FORWARDS.get(cls, cls.forward):
            raise Refused(f"has another forward in {cls.__name__} than PyTorch's")
        for owner, name in layer.functions:
            function = layers.PRISTINE[owner, name]
            if getattr(owner, name) is not function:
                raise Refused(f"has another {name} than PyTorch's")
            self.reads.module_name(owner, name, function)
        result = layer.call(self, child, args[0])
        if result.storage is not args[0].storage:
            args[0].storage.used = True
        return result


def _operation(function: object) -> ops.Operation | None:
    try:
        return ops.FUNCTIONS.get(function) or (function if function in ops.IMPLEMENTATIONS else None)
    except TypeError:  # not hashable
        return None


def _bound(function: FunctionType, names: ast.arguments, args: tuple, kwargs: dict) -> dict:
    """The variables of a call."""
    if names.vararg or names.kwarg or names.kwonlyargs or names.posonlyargs:
        raise Refused(f"has a function with *args or keywords only, {function.__qualname__}")
    parameters = [p.arg for p in names.args]
    variables = dict(zip(parameters, args, strict=False))
    if len(args) > len(parameters) or set(kwargs) - set(parameters) or set(kwargs) & set(variables):
        raise Refused(f"calls {function.__qualname__} with other arguments than it takes")
    variables |= kwargs
    for name, default in zip(reversed(parameters), reversed(function.__defaults__ or ()), strict=False):
        if name not in variables:
            if not is_constant(default):
                raise Refused(f"has a default that is a {type(default).__name__}, of {name}")
            variables[name] = default
    if len(variables) < len(parameters):
        raise Refused("takes more than x")
    return variables


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
        raise Refused(f"has a branch on {_kind(value)}")

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
            known = isinstance(value, FunctionType | ModuleType | type) or _operation(value) is not None
            if not known:
                raise Refused(f"reads the global {name}")
            reads.global_name(function.__globals__, name, value)
            return value
        if name in ops.BUILTINS:
            return ops.BUILTINS[name]
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
        if isinstance(node.op, ast.USub) and ops.is_number(value):
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
                raise Refused(f"has a branch on {_kind(left)}")
            return (left is right) is isinstance(comparison, ast.Is)
        for value in (left, right):
            if not is_constant(value) and not (type(value) is list and all(map(is_constant, value))):
                raise Refused(f"has a branch on {_kind(value)}")
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
        raise Refused(f"takes an item of a {_kind(value)}")

    def indices(self, node: ast.expr) -> list:
        """What a tensor is indexed by: full slices, None and Ellipsis."""
        found: list = []
        for item in node.elts if isinstance(node, ast.Tuple) else [node]:
            is_full = isinstance(item, ast.Slice) and item.lower is item.upper is item.step is None
            if not is_full and not (isinstance(item, ast.Constant) and item.value in (None, Ellipsis)):
                raise Refused("takes a part of a tensor")
            found.append(slice(None) if is_full else item.value)
        return found

    def _GeneratorExp(self, node: ast.GeneratorExp | ast.ListComp) -> list:
        if len(node.generators) != 1 or node.generators[0].ifs or node.generators[0].is_async:
            raise self.refused("has a comprehension with conditions", node)
        (generator,) = node.generators
        inner = Frame(self.interpreter, self.function, dict(self.variables))
        found = []
        for item in self.interpreter.items(self.evaluate(generator.iter)):
            inner.assign(generator.target, item)
            found.append(inner.evaluate(node.elt))
        return found

    _ListComp = _GeneratorExp

    def _Lambda(self, node: ast.Lambda) -> _Thunk:
        a = node.args
        if a.args or a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs:
            raise self.refused("has a lambda with arguments", node)
        return _Thunk(node.body, self)

    def _Call(self, node: ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            return self.super(node)
        function = self.evaluate(node.func)
        args, kwargs = self.sequence(node.args), {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.refused("passes **keywords", node)
            kwargs[keyword.arg] = self.evaluate(keyword.value)
        return self.interpreter.call(function, args, kwargs)

    def super(self, node: ast.Call) -> _Super:
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
        return _Super(classes[classes.index(cls) + 1 :], owner)


def _kind(value: object) -> str:
    if isinstance(value, Unknown):
        return value.what
    if isinstance(value, Size | Number):
        return "sizes of x"
    return "values of tensors" if isinstance(value, Value) else type(value).__name__
