"""A term as a function: the source of what computes it with PyTorch's own operators and the module's layers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_kernels.fuse.guards import Path
from attn_kernels.fuse.terms import Term


def layer_at(module: nn.Module, path: Path) -> nn.Module:
    """The submodule at ``path``, past ``nn.Module.__getattr__``, which takes a microsecond."""
    for name in path:
        module = module._modules[name]
    return module


def compiled(term: Term, module: nn.Module, inputs: dict[Term, str]) -> Callable[..., Tensor]:
    """A function of a module of ``module``'s kind and of the tensors that ``inputs`` names, each (N, C, 1, 1) or a map.

    Every layer is called once per term, as a module: BatchNorm writes its buffers.
    """
    names: dict[Term, str] = dict(inputs)
    lines: list[str] = []

    def define(part: Term) -> None:
        if part not in names:
            for operand in part.args:
                if isinstance(operand, Term):
                    define(operand)
            names[part] = f"({part.args[0]!r})" if part.op == "number" else f"t{len(names)}"
            if part.op != "number":
                lines.append(f"{names[part]} = {_expression(part, names, module)}")

    define(term)
    head = f"def compute(m, {', '.join(inputs.values())}):"
    return _function("\n    ".join([head, *lines, f"return {names[term]}"]))


@functools.cache
def _function(source: str) -> Callable[..., Tensor]:
    """The same function for the same source, so that equal terms are equal in plans."""
    namespace = {"torch": torch, "F": F, "layer": layer_at}
    exec(compile(source, "<a term>", "exec"), namespace)
    return namespace["compute"]


def _expression(t: Term, names: dict[Term, str], module: nn.Module) -> str:
    operands = [names[a] for a in t.args if isinstance(a, Term)]
    match t.op:
        case "fc" | "bn" | "conv1d":
            path = t.args[0]
            call = f"layer(m, {path!r})"
            kind = type(layer_at(module, path))
            if issubclass(kind, nn.Linear | nn.BatchNorm1d):
                return f"{call}({operands[0]}.flatten(1))[:, :, None, None]"
            if issubclass(kind, nn.Conv1d):
                return f"{call}({operands[0]}.flatten(1)[:, None])[:, 0, :, None, None]"
            return f"{call}({operands[0]})"
        case "add" | "sub" | "mul" | "div":
            sign = {"add": "+", "sub": "-", "mul": "*", "div": "/"}[t.op]
            return f"{operands[0]} {sign} {operands[1]}"
        case "square":
            return f"{operands[0]} ** 2"
        case "clamp_0_1" | "clamp_0_6":
            return f"{operands[0]}.clamp(0, {t.op[-1]})"
        case "exp" | "sigmoid" | "tanh" | "relu":
            return f"torch.{t.op}({operands[0]})"
        case _:
            return f"F.{t.op}({', '.join([operands[0], *map(repr, t.args[1:])])})"
