"""What a verdict depends on, and the function that notices when any of it has changed.

The interpreter notes every read as it makes it. ``Reads.guard()`` compiles the notes to one function of tests by ``is``
and ``!=``, since it runs before each fused call; ``torch.compile`` traces it and makes the tests guards of its graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import NamedTuple

from torch import nn

from attn_kernels.fuse.terms import Refused

Path = tuple[str, ...]
CONSTANTS = (bool, int, float, str, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Child(NamedTuple):
    """A module inside the one that is read, and the path that leads to it."""

    path: Path
    module: nn.Module

    @property
    def name(self) -> str:
        return ".".join(self.path) or "it"


def is_constant(value: object) -> bool:
    """A number, a string, None, or a tuple of these: exact types, whose equality is plain."""
    return type(value) in CONSTANTS or (type(value) is tuple and all(map(is_constant, value)))


class ReadOnlyList(list):
    """A list of a module."""


class Reads:
    """Notes of what was read: of the module and its children by their paths, and of functions, classes and globals.

    Each method makes one kind of note, which its docstring describes.
    """

    def __init__(self) -> None:
        self._modules: dict[tuple[Path, str, str], object] = {}
        self._others: dict[tuple[str, int, str], tuple[object, object]] = {}

    # ---- of modules

    def kind(self, child: Child, cls: type[nn.Module] | None = None) -> None:
        """The class that it has, or will have, and that a call of it runs its class's forward and nothing else."""
        self._modules[child.path, "kind", ""] = cls or type(child.module)

    def type(self, child: Child) -> None:
        """Its class, where something of the class was read."""
        if child.path:
            self._modules[child.path, "type", ""] = type(child.module)

    def constant(self, child: Child, name: str):
        """The value of an instance's attribute, which is returned. Nothing may change a list that is returned."""
        value = vars(child.module)[name]
        if type(value) is list and is_constant(tuple(value)):
            self._modules[child.path, "list", name] = tuple(value)
            return ReadOnlyList(value)
        if not is_constant(value):
            raise Refused(f"reads {name} of {child.name}, a {type(value).__name__}")
        self._modules[child.path, "constant", name] = value
        return value

    def function(self, child: Child, name: str) -> None:
        """A function in an attribute."""
        self._modules[child.path, "object", name] = vars(child.module)[name]

    def missing(self, child: Child, name: str) -> None:
        """That the instance has no attribute of that name, which would hide its class's."""
        self._modules[child.path, "missing", name] = None

    def absent(self, child: Child, name: str) -> None:
        """That there is nothing of that name."""
        self.missing(child, name)
        for names in ("_modules", "_parameters", "_buffers"):
            self._modules[child.path, names, name] = None
        self._others["absent", id(type(child.module)), name] = type(child.module), None

    def child(self, child: Child, name: str) -> None:
        """Whether there is a child of that name."""
        self._modules[child.path, "child", name] = child.module._modules[name] is None

    def children(self, child: Child) -> None:
        """The names of the children, in their order."""
        self._modules[child.path, "children", ""] = tuple(child.module._modules)

    def parameter(self, child: Child, name: str) -> None:
        """Whether a parameter is None, or else its shape."""
        p = child.module._parameters[name]
        self._modules[child.path, "parameter", name] = None if p is None else tuple(p.shape)

    # ---- of everything else

    def class_attribute(self, cls: type, name: str, value: object) -> None:
        self._others["class", id(cls), name] = cls, value

    def own_class_attribute(self, name: str, value: object) -> None:
        """Of the class of the module itself, which is a subclass of it once the module is fused."""
        self._modules[(), "class", name] = value

    def global_name(self, namespace: dict, name: str, value: object) -> None:
        self._others["global", id(namespace), name] = namespace, value

    def no_global(self, namespace: dict, name: str) -> None:
        """That a module has no global of that name, which would hide a builtin."""
        self._others["no global", id(namespace), name] = namespace, None

    def not_in_class(self, cls: type, name: str) -> None:
        """That a class, which ``super()`` passes over, has no attribute of that name."""
        self._others["not in class", id(cls), name] = cls, None

    def module_name(self, module: ModuleType | object, name: str, value: object) -> None:
        self._others["module", id(module), name] = module, value

    def cell(self, cell: object, value: object) -> None:
        self._others["cell", id(cell), ""] = cell, value

    def code(self, function: FunctionType) -> None:
        """What a function does, and its defaults."""
        self._others["code", id(function), "__code__"] = function, function.__code__
        self._others["code", id(function), "__defaults__"] = function, function.__defaults__

    # ----

    def update(self, others: Reads, path: Path = ()) -> None:
        """Add the notes on the module at ``path``."""
        for (where, kind, name), value in others._modules.items():
            self._modules[(*path, *where), kind, name] = value
        self._others.update(others._others)

    def guard(self) -> Guard:
        """The function that notices changes: the same one for the same notes."""
        others = tuple((key, _Same(owner), _Same(value)) for key, (owner, value) in sorted(self._others.items()))
        return _guard(tuple((key, type(v), v) for key, v in self._modules.items()), others)


class _Same:
    """Wraps a value so that it equals the same object alone."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclass(frozen=True, eq=False)
class Guard:
    """Notices changes of what was read.

    Attributes:
        changed: a function of the module, whether anything is not what it was.
        source: the text of that function.
    """

    changed: Callable[[nn.Module], bool]
    source: str
    _tests: tuple[tuple[str, str, str], ...]
    _names: dict[str, object]

    def changes(self, module: nn.Module) -> list[str]:
        """What has changed, in words, once per module and thing; empty where nothing has."""
        found: dict[str, str] = {}
        for where, test, reason in self._tests:
            if where not in found:
                try:
                    if eval(test, self._names, {"m": module}):
                        found[where] = reason
                except (KeyError, AttributeError):
                    found[where] = f"{reason}, or it is gone"
        return list(found.values())


@functools.cache
def _guard(notes: tuple, others: tuple) -> Guard:
    names: dict[str, object] = {}
    tests: dict[Path, list[tuple[str, str]]] = {}

    def constant(value: object) -> str:
        name = f"k{len(names)}"
        names[name] = value
        return name

    for (path, kind, name), _, value in notes:
        tests.setdefault(path, []).extend(_module_tests(path, kind, name, value, constant))
    lines, variables = [], {(): "m"}
    prefixes = {path[:i] for path in tests for i in range(len(path) + 1)}
    for path in sorted(prefixes, key=len):
        if path:
            variables[path] = f"m{len(variables)}"
            lines.append(f"{variables[path]} = {variables[path[:-1]]}_c[{path[-1]!r}]")
        m = variables[path]
        here = [test for test, _ in tests.get(path, ())]
        is_parent = any(p[:-1] == path for p in prefixes if p)
        for suffix, text in (("_c", "_modules"), ("_p", "_parameters")):
            if any(f"$.{text}" in test for test in here) or (suffix == "_c" and is_parent):
                lines.append(f"{m}{suffix} = {m}.__dict__[{text!r}]")
                here = [test.replace(f"$.{text}", f"{m}{suffix}") for test in here]
        if sum("$.__dict__" in test for test in here) > 0:
            lines.append(f"{m}_d = {m}.__dict__")
            here = [test.replace("$.__dict__", f"{m}_d") for test in here]
        if here:
            lines.append(f"if {' or '.join(here).replace('$', m)}: return True")
    rest = [_other_test(kind, name, owner.value, value.value, constant) for (kind, _, name), owner, value in others]
    if rest:
        lines.append(f"if {' or '.join(test for test, _ in rest)}: return True")
    body = "\n        ".join([*lines, "return False"])
    source = f"def changed(m):\n    try:\n        {body}\n    except (KeyError, AttributeError):\n        return True\n"
    exec(compile(source, "<what a fused module depends on>", "exec"), names)
    full = [(".".join(path), _by_path(test, path), reason) for path, found in tests.items() for test, reason in found]
    full += [(reason, test, reason) for test, reason in rest]
    return Guard(names["changed"], source, tuple(full), names)


def _module_tests(path: Path, kind: str, name: str, value: object, constant) -> list[tuple[str, str]]:
    """Expressions in ``$``, the module, that are true where it has changed, and what to say then."""
    where = ".".join(path) or "it"
    if kind == "kind":
        if not path:  # its hooks run, and a forward of the instance would be called in place of the fused one
            return []
        kind_test = f"type($) is not {constant(value)}", f"{where} is no longer a {value.__name__}"
        hooks = [(f"$.__dict__[{hook!r}]", f"hooks on {where}") for hook in HOOKS]
        patched = f"the forward of {where} was replaced on the instance"
        instance = [(f"{name!r} in $.__dict__", patched) for name in ("forward", "_call_impl")]
        return [kind_test, *hooks, *instance]
    reason = f"{where}.{name} was set" if path else f"{name} was set"
    item = f"$.__dict__[{name!r}]"
    if kind == "constant":
        is_single = value is None or type(value) is bool
        return [(f"{item} is not {value!r}" if is_single else f"{item} != {constant(value)}", reason)]
    if kind == "list":
        return [(f"{item} != {constant(list(value))}", reason)]
    if kind == "object":
        return [(f"{item} is not {constant(value)}", reason)]
    if kind == "class":
        return [(f"type($).{name} is not {constant(value)}", f"{name} of its class was set")]
    if kind == "missing":
        return [(f"{name!r} in $.__dict__", reason)]
    if kind in ("_modules", "_parameters"):
        return [(f"{name!r} in $.{kind}", reason)]
    if kind == "_buffers":
        return [(f"{name!r} in $.__dict__['_buffers']", reason)]
    if kind == "type":
        return [(f"type($) is not {constant(value)}", f"{where} is no longer a {value.__name__}")]
    if kind == "children":
        return [(f"tuple($._modules) != {constant(value)}", f"{where} has other children than it had")]
    if kind == "child":
        return [(f"$._modules[{name!r}] is {'not ' if value else ''}None", reason)]
    item = f"$._parameters[{name!r}]"
    return [
        (f"{item} is not None" if value is None else f"{item} is None or {item}.shape != {constant(value)}", reason)
    ]


def _by_path(test: str, path: Path) -> str:
    module = "m" + "".join(f".__dict__['_modules'][{name!r}]" for name in path)
    for name in ("_modules", "_parameters"):
        test = test.replace(f"$.{name}", f"{module}.__dict__[{name!r}]")
    return test.replace("$", module)


def _other_test(kind: str, name: str, owner: object, value: object, constant) -> tuple[str, str]:
    if kind == "global":
        return f"{constant(owner)}[{name!r}] is not {constant(value)}", f"the global {name} was set"
    if kind == "no global":
        return f"{name!r} in {constant(owner)}", f"the global {name} was set"
    if kind == "not in class":
        return f"{name!r} in {constant(owner)}.__dict__", f"{owner.__qualname__}.{name} was set"
    if kind == "absent":
        return f"hasattr({constant(owner)}, {name!r})", f"{owner.__qualname__}.{name} was set"
    if kind == "cell":
        return f"{constant(owner)}.cell_contents is not {constant(value)}", "a variable around a function was set"
    label = getattr(owner, "__qualname__", getattr(owner, "__name__", str(owner)))
    return f"{constant(owner)}.{name} is not {constant(value)}", f"{label}.{name} was set"
