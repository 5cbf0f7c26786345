"""Python's own functions on symbolic values: ``BUILTINS``; and all operations that there are."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from attn_kernels.fuse import arithmetic, reductions  # noqa: F401, whose functions register themselves
from attn_kernels.fuse.registry import FUNCTIONS, METHODS, VIEWS, Operation, is_number
from attn_kernels.fuse.terms import Refused, Value

if TYPE_CHECKING:
    from attn_kernels.fuse.interpret import Interpreter


def _is_scripting(run: Interpreter) -> bool:
    return False


FUNCTIONS[torch.jit.is_scripting] = _is_scripting
VIEWS.add(_is_scripting)


def _isinstance(run: Interpreter, value: object, classes: object) -> bool:
    asked = classes if isinstance(classes, tuple) else (classes,)
    if (
        isinstance(value, Value)
        and value.term.op != "output"
        and all(c in (torch.Tensor, list, tuple, dict, str, int, float) for c in asked)
    ):
        return torch.Tensor in asked
    raise Refused("asks for the class of something")


def _len(run: Interpreter, value: object) -> int:
    if isinstance(value, tuple | list):
        return len(value)
    raise Refused("takes the length of something else than a sequence")


def _sum(run: Interpreter, values: object, start: object = 0):
    return functools.reduce(lambda a, b: run.binary("add", a, b), run.items(values), start)


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


def _enumerate(run: Interpreter, values: object) -> list:
    return list(enumerate(run.items(values)))


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
    "enumerate": _enumerate,
    "list": _list,
    "tuple": _tuple,
}
VIEWS.update(BUILTINS.values())
# They go through a generator at once.
CONSUMERS = {_sum, _list, _tuple}
IMPLEMENTATIONS = {*FUNCTIONS.values(), *METHODS.values(), *BUILTINS.values()}
