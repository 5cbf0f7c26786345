"""An interpreter of a module's forward in a closed world: of its source, on symbolic tensors.

Each statement, name, method and function that is not known here is refused, and so is whatever depends on more than
constants of the module: whether it is training, values and dtypes of tensors, globals, random numbers, writes to
attributes or to the input. What is left is understood whole, for every input, and ``reads`` has all that it depends on.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from types import FunctionType, ModuleType

from torch import Tensor, nn

from attn_kernels.fuse import layers
from attn_kernels.fuse.arithmetic import binary, written
from attn_kernels.fuse.frame import Bound, Frame, Method, Super, Thunk, kind_of, operation_of
from attn_kernels.fuse.guards import HOOKS, Child, Reads, is_constant
from attn_kernels.fuse.reductions import Maximum
from attn_kernels.fuse.registry import METHODS, PRISTINE_METHODS, VIEWS
from attn_kernels.fuse.source import tree
from attn_kernels.fuse.terms import ONE, Refused, Size, Storage, Term, Unknown, Value, X
from attn_kernels.fuse.views import relayout

LIMIT_STEPS, LIMIT_DEPTH, LIMIT_ITEMS = 1500, 20, 100
TRAINING = Unknown("whether it is training")
_KNOWN_MODULES = ("torch", "math")


def input_value(layout: str = "NCHW") -> Value:
    """The input of a module, with N, C, H and W in the order of ``layout``."""
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
        self.norms: dict[Term, nn.Module] = {}
        self._channels: dict[str, int] = {}
        self._steps = 0
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

    def count(self) -> None:
        """Refuse what takes more steps than attention or a block does."""
        self._steps += 1
        if self._steps > LIMIT_STEPS:
            raise Refused("computes more than an attention module does")

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
        if name.startswith("__"):
            raise Refused(f"asks for {name}, which its class may rename")
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
        if isinstance(owner, Super):
            for cls in owner.classes:
                if name not in vars(cls):
                    self.reads.not_in_class(cls, name)
                else:
                    self.reads.class_attribute(cls, name, getattr(cls, name))
                    return self._of_class(vars(cls)[name], owner.owner)
        if isinstance(owner, Maximum) and name == "values":
            return owner.values
        if type(owner) is list and name == "append":
            return Bound(list.append, owner)
        raise Refused(f"asks for {name} of a {kind_of(owner)}")

    def tensor_attribute(self, v: Value, name: str):
        self.alive(v)
        if name == "shape":
            return tuple(v.shape)
        if name == "ndim":
            return len(v.shape)
        if name in METHODS:
            if getattr(Tensor, name) is not PRISTINE_METHODS[name]:
                raise Refused(f"has another Tensor.{name} than PyTorch's")
            self.reads.module_name(Tensor, name, PRISTINE_METHODS[name])
            return Bound(Method(name), v)
        raise Refused(f"asks for {name} of a tensor")

    def module_attribute(self, owner: Child, name: str):
        state, cls = vars(owner.module), type(owner.module)
        if name == "training":
            return TRAINING if owner.path == () else Unknown("whether a layer is training")
        self.reads.type(owner)
        _check_class(cls, name)
        if name in state:
            value = state[name]
            if callable(value):
                if type(value) is not FunctionType and operation_of(value) is None:
                    raise Refused(f"reads {name}, a {type(value).__name__}")
                self.reads.function(owner, name)
                return value
            return self.reads.constant(owner, name)
        for base in cls.__mro__:
            if base is not nn.Module and name in vars(base):
                if owner.path:
                    self.reads.class_attribute(cls, name, getattr(cls, name))
                else:
                    self.reads.own_class_attribute(name, getattr(cls, name))
                self.reads.missing(owner, name)
                return self._of_class(vars(base)[name], owner)
        if name in state["_modules"]:
            return self.child(owner, name)
        if name == "children":
            return Bound(nn.Module.children, owner)
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
        _check_class(type(module), name)
        self.reads.type(owner)
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

    def children(self, owner: Child) -> list[Child]:
        """All children of a module, each once."""
        self.reads.children(owner)
        found = {id(m): self.child(owner, name) for name, m in owner.module._modules.items()}
        return [child for child in found.values() if child is not None]

    def items(self, value: object) -> Sequence:
        """What a loop over ``value`` goes through."""
        if isinstance(value, Child) and type(value.module) in (nn.Sequential, nn.ModuleList):
            self.reads.kind(value)
            self.reads.children(value)
            return [self.child(value, name) for name in value.module._modules]
        if isinstance(value, tuple | list | range) and len(value) <= LIMIT_ITEMS:
            return value
        raise Refused(f"goes through a {kind_of(value)}")

    # ---- operators, which a block records

    def binary(self, op: str | None, a: object, b: object):
        """``a op b``."""
        self.count()
        self.alive(a, b)
        result = binary(self, op, a, b)
        self.used((a, b), {})
        return result

    def augmented(self, op: str | None, a: object, b: object):
        """``a op= b``: of a tensor, in place."""
        self.alive(a, b)
        if isinstance(a, list | dict):
            raise Refused("changes a list in place")
        result = binary(self, op, a, b)
        self.used((b,), {})
        return written(self, a, result) if isinstance(a, Value) else result

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
        return relayout(self, v, shape + rest)

    # ---- calls

    def call(self, function: object, args: tuple, kwargs: dict):
        """``function(*args, **kwargs)``."""
        self.alive(*args, *kwargs.values())
        self.count()
        if isinstance(function, Child):
            return self.call_module(function, args, kwargs)
        if isinstance(function, Thunk):
            if args or kwargs:
                raise Refused("passes arguments to a lambda")
            return function.frame.evaluate(function.body)
        owner: tuple = ()
        if isinstance(function, Bound):
            function, owner = function.function, (function.owner,)
        if function is nn.Module.children and not args and not kwargs:
            return self.children(*owner)
        if function is list.append:
            return list.append(*owner, *args)
        if isinstance(function, Method) or operation_of(function) is not None:
            return self.call_operation(function, (*owner, *args), kwargs)
        if type(function) is FunctionType:
            return self.call_function(function, (*owner, *args), kwargs)
        raise Refused(f"calls {getattr(function, '__qualname__', type(function).__name__)}")

    def call_operation(self, function: object, args: tuple, kwargs: dict):
        """A function or method of PyTorch, or a builtin."""
        self.alive(*args)
        operation = METHODS.get(function.name) if isinstance(function, Method) else operation_of(function)
        if operation is None:
            raise Refused(f"calls {getattr(function, '__qualname__', getattr(function, 'name', function))}")
        try:
            result = operation(self, *args, **kwargs)
        except (TypeError, AttributeError, ValueError, OverflowError, ZeroDivisionError):
            raise Refused(f"calls {operation.__name__.lstrip('_')} with arguments that are not understood") from None
        if operation not in VIEWS:
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
        if child.path:
            self.reads.class_attribute(cls, "__call__", cls.__call__)
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


def _check_class(cls: type, name: str) -> None:
    """Refuse a class that decides by code of its own what an attribute is."""
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        if "__getattr__" in vars(base) or "__getattribute__" in vars(base):
            raise Refused(f"has a __getattr__ of its own, {base.__name__}'s")
        if hasattr(type(vars(base).get(name)), "__set__"):
            raise Refused(f"reads {name}, a property")


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
