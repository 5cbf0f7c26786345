"""The end of a residual block, ``relu(attention(x) + shortcut)``, as one call: found in the block's own forward by fx.

The block's forward is traced with every submodule as a leaf. Where a fused module's output, after an Identity or a
DropPath that drops nothing, is added to something and goes through a ReLU, and nothing else uses what is in between,
the three become one call. The rest of the generated forward is the block's.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attn_kernels import functional, modules
from attn_kernels._adapters import Unsupported
from attn_kernels._fused import FusedModule, global_hooks, seen_as, state_of, subclass, why_not
from attn_kernels._graph import Gate, alike, inline_gate, only_user, separate_add_relu
from attn_kernels.plans import Layer, Path, SEPlan, changes, layer

OURS = tuple(getattr(modules, name) for name in ("SE", "ChannelGate", "SpatialGate", "CBAM", "BAM", "SimAM"))
_RELUS = {F.relu, torch.relu, F.relu_, torch.relu_}


class Tail(NamedTuple):
    """A block's forward with the tail fused, and what it calls otherwise or not at all."""

    forward: Callable
    gates: tuple[str, ...]
    """The names of the attention modules; that of one whose layers stand on the block is empty."""
    layers: tuple[Layer, ...]
    droppers: tuple[Path, ...]
    """Those of ``layers`` that may come to drop something."""
    plans: tuple[SEPlan, ...]
    """Of gates whose layers stand on the block."""


class FusedBlock:
    """A residual block with its tail fused; by its own forward once anything that the trace relied on has changed."""

    _tail: Tail
    _original: type[nn.Module]
    _stale = False

    def forward(self, *args, **kwargs):
        if len(args) == 1 and not kwargs and self.is_fused(args[0]):
            return self._tail.forward(self, args[0])
        return super().forward(*args, **kwargs)

    def is_fused(self, x: object) -> bool:
        """Whether a call on ``x`` runs the traced forward."""
        return not self.why_not(x)

    def why_not(self, x: object) -> list[str]:
        """Why a call on ``x`` does not run the traced forward; empty where it does."""
        reasons = global_hooks()
        if self._stale:
            reasons.append("an attribute of the block was set")
        reasons += changes(self, self._tail.layers)
        for path in self._tail.droppers:
            dropper = layer(self, path)
            if dropper is not None and (p := _drop_probability(dropper)):
                reasons.append(f"{'.'.join(path)} drops with probability {p:.2g}")
        for plan in self._tail.plans:
            reasons += why_not(self, plan, x)
        return reasons

    def __setattr__(self, name, value):
        if name != "training" and not name.startswith("_"):
            self.__dict__["_stale"] = True  # the trace may have depended on it
        super().__setattr__(name, value)

    def __delattr__(self, name):
        self.__dict__["_stale"] = True
        super().__delattr__(name)

    def __reduce_ex__(self, protocol):
        return _rebuild, (self._original,), state_of(self)


class _UnpickledBlock:
    """A block between its making and its state, of which its tail is traced anew."""

    _original: type[nn.Module]

    def __setstate__(self, state):
        super().__setstate__(state)
        original = self.__class__ = self._original
        try:
            tail = None if self.__dict__.get("_stale") else find_tail(self)
        except Unsupported:
            return
        if tail is not None:
            self.__class__ = block_class(original, tail)


def _rebuild(original: type[nn.Module]) -> nn.Module:
    cls = subclass(original, _UnpickledBlock)
    return cls.__new__(cls)


def block_class(original: type[nn.Module], tail: Tail) -> type[nn.Module]:
    """The subclass of ``original`` with this tail."""
    return subclass(original, FusedBlock, _tail=tail)


def add_relu(gate: nn.Module, x: Tensor, residual: Tensor, inplace: bool) -> Tensor:
    """``relu(gate(x) + residual)`` by a fused module."""
    if alike(x, residual):
        if isinstance(gate, OURS):
            return gate.forward(x, residual, "relu")
        if gate.is_fused(x):
            return gate._plan.compute(gate, x, residual, "relu", functional)
    return separate_add_relu(gate.forward(x), residual, inplace)


class _Proxy(fx.Proxy):
    def __iadd__(self, other):  # which fx takes for an addition
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m, module_qualified_name):
        return True

    def proxy(self, node):
        return _Proxy(node, self)


def find_tail(block: nn.Module) -> Tail | None:
    """The tail of ``block``; None where no fused module is followed by an addition and a ReLU.

    Raises:
        Unsupported: the block cannot be traced, or what lies between forbids it.
    """
    graph = _trace(block)
    gates, layers, plans = [], [], []
    for node in list(graph.nodes):
        gate = _module_gate(block, node) or inline_gate(block, node)
        names = None if gate is None else _fuse(graph, block, gate)
        if names is None:
            continue
        layers += [Layer.of(block, tuple(name.split("."))) for name in names]
        if gate.plan is None:
            gates.append(node.target)
        else:
            gates.append("")
            plans.append(gate.plan)
    if not gates:
        return None
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<{type(block).__name__} with its tail fused>", "exec"), namespace)
    droppers = tuple(part.path for part in layers if _drop_probability(layer(block, part.path)) is not None)
    return Tail(namespace["forward"], tuple(gates), tuple(layers), droppers, tuple(plans))


def _trace(block: nn.Module) -> fx.Graph:
    """The graph of the block's forward, the same in training and in evaluation."""
    parameters = list(inspect.signature(type(block).forward).parameters.values())
    if len(parameters) != 2 or parameters[1].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise Unsupported("its block's forward takes more than x")
    graphs, modes = [], [(m.__dict__, m.training) for m in block.modules()]
    for training in (True, False):
        # What the forward does to the block, it does to a twin.
        twin = seen_as(block, type(block))
        twin.__dict__ = {k: dict(v) if isinstance(v, dict) else v for k, v in block.__dict__.items()}
        twin.__dict__["training"] = training
        before = _objects(twin)
        try:
            for state, _ in modes:
                state["training"] = training
            graphs.append(_Tracer().trace(twin))
        except Exception as error:  # of the block's forward, of whatever kind
            raise Unsupported(f"its block cannot be traced ({type(error).__name__})") from None
        finally:
            for state, mode in modes:
                state["training"] = mode
        if _objects(twin) != before:
            raise Unsupported("its block's forward sets attributes")
    if str(graphs[0]) != str(graphs[1]):
        raise Unsupported("its block's forward is another in training")
    return graphs[0]


def _objects(module: nn.Module) -> dict[str, object]:
    """The identities of all that a module holds; equality is not to be asked of proxies."""
    return {
        k: {name: id(t) for name, t in v.items()} if isinstance(v, dict) else id(v) for k, v in vars(module).items()
    }


def _module_gate(block: nn.Module, node: fx.Node) -> Gate | None:
    """A call of a fused module."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    if not isinstance(block.get_submodule(node.target), (FusedModule, *OURS)):
        return None
    return Gate([node], node.args[0], add_relu, (node.target,))


def _fuse(graph: fx.Graph, block: nn.Module, gate: Gate) -> list[str] | None:
    """Replace ``gate``, the addition and the ReLU in the graph; the names of the modules of which these were calls."""
    chain = [gate.nodes[-1]]
    while (node := only_user(chain[-1])) is not None and node.op == "call_module" and len(node.args) == 1:
        p = _drop_probability(block.get_submodule(node.target))
        if p is None and type(block.get_submodule(node.target)) is not nn.Identity:
            return None
        chain.append(node)
    add = node
    residual, inplace = (None, False) if add is None else _added_to(chain[-1], add)
    relu = None if residual is None else only_user(add)
    if relu is None or not _is_relu(block, relu):
        return None
    for node in chain[1:]:
        if p := _drop_probability(block.get_submodule(node.target)):
            raise Unsupported(f"{node.target} drops with probability {p:.2g}")
    order = {node: i for i, node in enumerate(graph.nodes)}
    replaced = {*gate.nodes, add}
    if any(order[user] > order[gate.nodes[0]] and user not in replaced for user in gate.x.users):
        raise Unsupported("its block uses its input again")
    names = [node.target for node in (*gate.nodes, *chain[1:], relu) if node.op == "call_module"]
    for name in names:
        for reason in changes(block, (Layer.of(block, tuple(name.split("."))),)):
            raise Unsupported(reason)
    with graph.inserting_before(add):
        modules = [graph.get_attr(name) for name in gate.modules]
        options = () if gate.plan is None else (gate.plan.mlp_activation, gate.plan.gate)
        y = graph.call_function(gate.add_relu, (*modules, gate.x, residual, inplace, *options))
    relu.replace_all_uses_with(y)
    for node in (relu, add, *reversed(chain[1:]), *reversed(gate.nodes)):
        graph.erase_node(node)
    return names


def _added_to(node: fx.Node, add: fx.Node) -> tuple[fx.Node | None, bool]:
    """What ``add`` adds to ``node``, and whether in its place; None where it is no such addition."""
    is_inplace = (add.op == "call_function" and add.target is operator.iadd) or (
        add.op == "call_method" and add.target == "add_"
    )
    is_sum = (add.op == "call_function" and add.target in (operator.add, torch.add)) or (
        add.op == "call_method" and add.target == "add"
    )
    if not (is_sum or is_inplace) or len(add.args) != 2 or add.kwargs:
        return None, False
    first, second = add.args
    other = second if first is node else first
    # In place of the other one, a tensor changes that may be seen elsewhere.
    if not isinstance(other, fx.Node) or other is node or (is_inplace and first is not node):
        return None, False
    return other, is_inplace


def _is_relu(block: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(block.get_submodule(node.target)) is nn.ReLU
    return (node.op == "call_function" and node.target in _RELUS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )


def _drop_probability(module: nn.Module) -> float | None:
    """Of a module that drops something at random, DropPath or Dropout by whatever name; else None."""
    if hasattr(module, "drop_prob"):
        return module.drop_prob or 0.0
    return module.p if "Drop" in type(module).__name__ or "StochasticDepth" in type(module).__name__ else None
