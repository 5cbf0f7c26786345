"""Attention as a block's traced forward has it; and SE whose layers stand on the block itself, as in many SE-ResNets.

There the block pools, calls ``fc1``, an activation, ``fc2`` and a sigmoid of its own, and multiplies.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from attn_kernels import functional
from attn_kernels._adapters import Unsupported, check_layers, name_of
from attn_kernels.ops._library import PLAIN_TENSORS
from attn_kernels.plans import Layer, SEPlan, weight_and_bias
from reference.se import ACTIVATIONS, GATES

_VIEWS = {"view", "reshape", "flatten", "unsqueeze", "squeeze"}


class Gate(NamedTuple):
    """Attention as a graph has it: its nodes, input and output, and the call that replaces it and the tail."""

    nodes: list[fx.Node]
    x: fx.Node
    add_relu: Callable[..., Tensor]
    modules: tuple[str, ...]
    """The names of the modules that ``add_relu`` takes before x, the residual and whether the sum is in place."""
    plan: SEPlan | None = None


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def se_add_relu(
    fc1: nn.Module, fc2: nn.Module, x: Tensor, residual: Tensor, inplace: bool, mlp_activation: str, gate: str
) -> Tensor:
    """``relu(se(x) + residual)`` by the layers of a block."""
    se = partial(functional.se, x, *weight_and_bias(fc1), *weight_and_bias(fc2))
    options = {"mlp_activation": mlp_activation, "gate": gate}
    if alike(x, residual):
        return se(**options, residual=residual, activation="relu")
    return separate_add_relu(se(**options), residual, inplace)


def alike(x: Tensor, residual: Tensor) -> bool:
    """Whether the residual may enter a kernel beside x: no other shape that would broadcast, no dtype that promotes."""
    plain = PLAIN_TENSORS.issuperset((type(x), type(residual)))
    return plain and residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device


def separate_add_relu(y: Tensor, residual: Tensor, inplace: bool) -> Tensor:
    """``relu(y + residual)``; ``inplace``: in y's dtype, whatever the residual's."""
    if inplace:
        y += residual
    else:
        y = y + residual
    return torch.relu(y)


def inline_gate(block: nn.Module, node: fx.Node) -> Gate | None:
    """The SE of which ``node`` is the product, ``x * gate(fc2(act(fc1(pool(x)))))``, with layers of the block."""
    is_product = (node.op == "call_function" and node.target in (operator.mul, torch.mul)) or (
        node.op == "call_method" and node.target == "mul"
    )
    if not is_product or len(node.args) != 2 or node.kwargs:
        return None
    for scale, x in (node.args, node.args[::-1]):
        nodes = _chain(scale, x)
        calls = [n for n in nodes if n.op == "call_module"]
        if len(calls) == 5 and _is_closed([*nodes, node]):
            names = [n.target for n in calls]
            plan = _plan(block, *names)
            if plan is not None:
                return Gate([*nodes, node], x, se_add_relu, (names[1], names[3]), plan)
    return None


def _chain(scale: object, x: object) -> list[fx.Node]:
    """The nodes that lead from ``x`` to ``scale``, calls of modules and views, and the sizes that the views ask for."""
    found: list[fx.Node] = []
    node = scale
    while isinstance(node, fx.Node) and node is not x and node.args:
        if node.op == "call_method" and node.target in _VIEWS:
            if node.target in ("view", "reshape") and not _keeps_samples(node):
                return []
            sizes = [a for a in node.args[1:] if isinstance(a, fx.Node)]
            found += [node, *reversed(sizes)]
        elif node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            found.append(node)
        else:
            return []
        node = node.args[0]
    return list(dict.fromkeys(reversed(found))) if node is x else []


def _keeps_samples(view: fx.Node) -> bool:
    """Whether a view is ``t.view(t.size(0), ...)``."""
    first = view.args[1] if len(view.args) > 1 else None
    sizes = [a for a in view.args[1:] if isinstance(a, fx.Node)]
    is_size = all(a.op == "call_method" and a.target == "size" and len(a.args) == 2 for a in sizes)
    return is_size and first in sizes and first.args[1] == 0


def _is_closed(nodes: list[fx.Node]) -> bool:
    """Whether nothing but the last of the nodes is used elsewhere."""
    inside = set(nodes)
    return all(user in inside for node in nodes[:-1] for user in node.users)


def _plan(block: nn.Module, pool: str, fc1: str, act: str, fc2: str, gate: str) -> SEPlan | None:
    paths = [tuple(name.split(".")) for name in (pool, fc1, act, fc2, gate)]
    modules = [block.get_submodule(name) for name in (pool, fc1, act, fc2, gate)]
    # An AvgPool2d that leaves more than one pixel fails at the layers after it.
    is_pool = type(modules[0]) is nn.AvgPool2d or (
        type(modules[0]) is nn.AdaptiveAvgPool2d and modules[0].output_size in (1, (1, 1))
    )
    mlp_activation, gate_name = name_of(modules[2], ACTIVATIONS), name_of(modules[4], GATES)
    if not is_pool or mlp_activation is None or gate_name is None:
        return None
    try:
        check_layers(block, paths[1], paths[3])
    except Unsupported:
        return None
    bypassed = tuple(Layer.of(block, path) for path in paths)
    return SEPlan(bypassed, paths[1], paths[3], mlp_activation, gate_name)
