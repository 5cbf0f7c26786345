"""Which terms are attention that the kernels compute, and the plan of each.

``find(term, ...)`` reads ``x * gate``: SE, a channel gate, a spatial gate, CBAM, BAM or SimAM, or any gate of channels
that PyTorch can compute from the pools of the planes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from attn_kernels.fuse.evaluate import compiled, layer_at
from attn_kernels.fuse.guards import Child, Path, Reads
from attn_kernels.fuse.interpret import Interpreter
from attn_kernels.fuse.plans import (
    BAMPlan,
    CBAMPlan,
    ChannelGatePlan,
    GatePlan,
    Plan,
    SEPlan,
    SimAMPlan,
    SpatialGatePlan,
)
from attn_kernels.fuse.terms import Refused, Size, Term, Value, X, number
from reference.catalogue import POOLS
from reference.se import ACTIVATIONS

PLANE, CHANNELS = frozenset("HW"), frozenset("C")
_POOLED = {"mean", "sum", "max", "amax", "lp", "logsumexp"}
LIMIT = 200  # parts of a term: attention has far fewer
_SCALED = Term("x scaled by its channels")
ELEMENTWISE = {
    *("relu", "relu6", "sigmoid", "hardsigmoid", "silu", "hardswish", "gelu", "tanh", "mish", "leaky_relu", "elu"),
    *("clamp_0_1", "clamp_0_6", "square", "exp"),
}


class Pool(NamedTuple):
    """A pool of x's planes: its name, the condition on H and W, and whether it is ``amax``."""

    name: str
    plane: object = None
    ties: bool = False


class _Gate(NamedTuple):
    """The MLP of a channel gate, one for every pool."""

    fc1: Path
    fc2: Path
    activation: str
    pools: tuple[Pool, ...]


def find(term: Term, module: nn.Module, reads: Reads) -> Plan | None:
    """The plan of a module that computes ``term``; None where no kernel computes it.

    ``reads`` takes what the plan depends on beside the term.
    """
    if len(term.parts()) > LIMIT:
        return None
    return _Finder(module, reads).find(term)


def looks_like_attention(term: Term) -> bool:
    """Whether there is a product with a gate that depends on pools of x in a term."""
    gates = [gate for part in term.parts() if part.op == "mul" for gate in part.args]
    return any(g.op in ("sigmoid", "hardsigmoid", "tanh") and _POOLED & {p.op for p in g.parts()} for g in gates)


class _Finder:
    def __init__(self, module: nn.Module, reads: Reads):
        self.module = module
        self.reads = reads
        self._widths: dict[Term, int | None] = {}

    def find(self, term: Term) -> Plan | None:
        if term.op != "mul":
            return None
        for x, gate in (term.args, term.args[::-1]):
            if x is X:
                found = self.channel(gate) or self.spatial(gate) or self.simam(gate) or self.bam(gate)
                if found is None:
                    found = self.other(gate)
                if found is not None:
                    return found
            elif x.op == "mul" and X in x.args:
                found = self.cbam(x, gate)
                if found is not None:
                    return found
        return None

    # ---- pools and layers

    @staticmethod
    def pool(t: Term) -> Pool | None:
        if t.op in ("mean", "max", "amax", "lp", "logsumexp") and t.args[:2] == (X, PLANE):
            name = {"mean": "avg", "amax": "max", "logsumexp": "lse"}.get(t.op, t.op)
            return Pool(name, t.args[2] if len(t.args) > 2 else None, t.op == "amax")
        if t.op == "add":  # m + log(sum(exp(x - m))), whatever m's gradient: it cancels
            for m, log in (t.args, t.args[::-1]):
                if m.op in ("max", "amax") and m.args == (X, PLANE):
                    shifted = Term("exp", Term("sub", X, m))
                    if log is Term("log", Term("sum", shifted, PLANE)):
                        return Pool("lse")
        return None

    def layer(self, path: Path) -> nn.Module:
        return layer_at(self.module, path)

    def gives(self, t: Term) -> int | None:
        """How many channels a term of pools has; None for as many as x."""
        if t not in self._widths:
            self._widths[t] = self._gives(t)
        return self._widths[t]

    def _gives(self, t: Term) -> int | None:
        if t.op in ("fc", "conv"):
            layer = self.layer(t.args[0])
            return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        widths = {self.gives(a) for a in t.args if isinstance(a, Term) and a.op != "number"} - {1}
        return widths.pop() if widths else (None if self.pool(t) else 1)

    # ---- gates of channels

    def mlp(self, t: Term) -> tuple[_Gate, Pool] | None:
        """``fc2(act(fc1(pool)))``."""
        if t.op != "fc" or t.args[1].op not in ELEMENTWISE:
            return None
        act = t.args[1]
        name = act.op if act.op != "leaky_relu" or act.args[1:] == (0.01,) else ""
        inner = act.args[0]
        if name not in ACTIVATIONS or inner.op != "fc" or (pool := self.pool(inner.args[1])) is None:
            return None
        return _Gate(inner.args[0], t.args[0], name, (pool,)), pool

    def sum_of_mlps(self, t: Term) -> _Gate | None:
        """One MLP of several pools, added up."""
        found, todo = [], [t]
        while todo:
            if len(found) > len(POOLS):
                return None
            part = todo.pop()
            if part.op == "add" and self.pool(part) is None:
                todo += part.args[::-1]
            elif (mlp := self.mlp(part)) is not None:
                found.append(mlp)
            else:
                return None
        gate = found[0][0]
        if any(g[:3] != gate[:3] for g, _ in found):
            return None
        return gate._replace(pools=tuple(sorted((pool for _, pool in found), key=lambda pool: POOLS.index(pool.name))))

    def _conditions(self, pools: tuple[Pool, ...]) -> dict[str, object] | None:
        planes = {pool.plane for pool in pools} - {None}
        if len(planes) > 1:
            return None
        return {"plane": planes.pop() if planes else None, "ties": any(pool.ties for pool in pools)}

    def channels(self, *paths: Path) -> int | None:
        """C, if the layers map C channels to C."""
        first, last = self.layer(paths[0]), self.layer(paths[-1])
        takes = first.in_features if isinstance(first, nn.Linear) else first.in_channels
        gives = last.out_features if isinstance(last, nn.Linear) else last.out_channels
        return takes if takes == gives else None

    def channel(self, gate: Term) -> Plan | None:
        """SE's gate, or CBAM's of channels."""
        if gate.op not in ("sigmoid", "hardsigmoid") or (mlp := self.sum_of_mlps(gate.args[0])) is None:
            return None
        options, channels = self._conditions(mlp.pools), self.channels(mlp.fc1, mlp.fc2)
        names = tuple(pool.name for pool in mlp.pools)
        if options is None or channels is None or len(set(names)) != len(names):
            return None
        layers = {"channels": channels, "fc1": mlp.fc1, "fc2": mlp.fc2}
        if names == ("avg",):
            return SEPlan(**options, **layers, mlp_activation=mlp.activation, gate=gate.op)
        if gate.op == "sigmoid" and mlp.activation == "relu":
            return ChannelGatePlan(**options, **layers, pool_types=names)
        return None

    def other(self, gate: Term) -> Plan | None:
        """Any gate that PyTorch computes from the mean and maximum of the planes."""
        pools: dict[Term, Pool] = {}
        layers: dict[Path, None] = {}
        seen: dict[Term, bool] = {}

        def is_closed(t: Term) -> bool:
            if t not in seen:
                seen[t] = is_understood(t)
            return seen[t]

        def is_understood(t: Term) -> bool:
            if (pool := self.pool(t)) is not None and pool.name in ("avg", "max"):
                pools[t] = pool
                return True
            if t.op in ("fc", "bn", "conv1d"):
                layers[t.args[0]] = None
            elif t.op not in ELEMENTWISE and t.op not in ("add", "sub", "mul", "div", "number"):
                return False
            return all(is_closed(a) for a in t.args if isinstance(a, Term))

        if not is_closed(gate) or not pools or not layers:
            return None
        options = self._conditions(tuple(pools.values()))
        names = tuple(pool.name for pool in pools.values())
        first = next((t for t in gate.parts() if t.op == "fc"), None)
        channels = None
        if first is not None:
            layer = self.layer(first.args[0])
            channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        if options is None or len(set(names)) != len(names) or self.gives(gate) not in (None, channels):
            return None
        function = compiled(gate, self.module, {t: f"pool{i}" for i, t in enumerate(pools)})
        return GatePlan(**options, channels=channels, gate=function, pool_types=names, layers=tuple(layers))

    # ---- gates of pixels

    def spatial(self, gate: Term) -> SpatialGatePlan | None:
        """CBAM's gate of pixels: a convolution of the maximum and the mean over channels, and BatchNorm."""
        if gate.op != "sigmoid" or gate.args[0].op != "bn" or gate.args[0].args[1].op != "conv":
            return None
        bn = gate.args[0]
        conv = bn.args[1]
        maps = conv.args[1]
        if maps.op != "cat" or len(maps.args) != 2 or any(t.args != (X, CHANNELS) for t in maps.args):
            return None
        names = [t.op for t in maps.args]
        if sorted(names) not in (["max", "mean"], ["amax", "mean"]):
            return None
        layer = self.layer(conv.args[0])
        kernel = layer.kernel_size
        odd = kernel[0] % 2 == 1 and kernel[0] == kernel[1]
        if layer.out_channels != 1 or layer.bias is not None or not odd or layer.dilation != (1, 1):
            return None
        return SpatialGatePlan(ties="amax" in names, conv=conv.args[0], bn=bn.args[0], mean_first=names[0] == "mean")

    def cbam(self, scaled: Term, gate: Term) -> CBAMPlan | None:
        """The gate of pixels of what the gate of channels has scaled."""
        channel = self.channel(scaled.args[scaled.args.index(X) ^ 1])
        if isinstance(channel, SEPlan) and (channel.mlp_activation, channel.gate) == ("relu", "sigmoid"):
            channel = ChannelGatePlan(
                channel.channels, channel.plane, channel.ties, fc1=channel.fc1, fc2=channel.fc2, pool_types=("avg",)
            )
        marked = gate.replace(scaled, _SCALED)
        spatial = None if X in marked.parts() else self.spatial(marked.replace(_SCALED, X))
        if not isinstance(channel, ChannelGatePlan) or spatial is None:
            return None
        return CBAMPlan(
            channel.channels,
            channel.plane,
            channel.ties or spatial.ties,
            fc1=channel.fc1,
            fc2=channel.fc2,
            pool_types=channel.pool_types,
            conv=spatial.conv,
            bn=spatial.bn,
            mean_first=spatial.mean_first,
        )

    # ---- gates of both

    def simam(self, gate: Term) -> SimAMPlan | None:
        """``sigmoid(d / (4 (sum d / n + lambda)) + 1/2)`` with ``d = (x - mean)^2`` and ``n = HW - 1``."""
        d = Term("square", Term("sub", X, Term("mean", X, PLANE)))
        n = Term("sub", Term("size", 1, ("H", "W")), number(1))
        variance = Term("div", Term("sum", d, PLANE), n)
        for energy in _others(gate.args[0], "add", number(0.5)) if gate.op == "sigmoid" else ():
            if energy.op == "div" and energy.args[0] is d:
                for denominator in _others(energy.args[1], "mul", number(4)):
                    for e_lambda in _others(denominator, "add", variance):
                        if e_lambda.op == "number":
                            return SimAMPlan(e_lambda=e_lambda.args[0])
        return None

    def bam(self, gate: Term) -> BAMPlan | None:
        """``1 + sigmoid(channel * spatial)``, the branches each in an ``nn.Sequential``."""
        for inner in _others(gate, "add", number(1)):
            if inner.op == "sigmoid" and inner.args[0].op == "mul":
                product = inner.args[0].args
                for channel, spatial in (product, product[::-1]):
                    pools = [p for t in channel.parts() if (p := self.pool(t)) is not None]
                    if len(pools) == 1 and pools[0].name == "avg":
                        branches = self._branch(channel, pools[0]), self._branch(spatial, None)
                        if None not in branches:
                            gate_c, gate_s = branches
                            return self._bam(gate_c, gate_s, pools[0])
        return None

    def _bam(self, gate_c: Path, gate_s: Path, pool: Pool) -> BAMPlan | None:
        reduce = self.layer(gate_s)[0]
        if not isinstance(reduce, nn.Conv2d) or reduce.kernel_size != (1, 1) or reduce.groups != 1:
            return None
        return BAMPlan(reduce.in_channels, pool.plane, pool.ties, gate_c=gate_c, gate_s=gate_s)

    def _branch(self, t: Term, pool: Pool | None) -> Path | None:
        """The Sequential that computes ``t`` of the planes' means, or of x: seen by interpreting it again."""
        paths = [p.args[0] for p in t.parts() if p.op in ("fc", "conv", "bn")]
        if len(paths) < 2:
            return None
        common = paths[0][:-1]
        layer = self.layer(common)
        if type(layer) is not nn.Sequential or any(path[:-1] != common for path in paths):
            return None
        n, c = Size(1, ("N",)), Size(1, ("C",))
        if pool is None:
            value = Value(X, (n, c, Size(1, ("H",)), Size(1, ("W",))))
        else:
            plane = () if pool.plane is None else (pool.plane,)
            value = Value(Term("mean", X, PLANE, *plane), (n, c))
        run = Interpreter(self.module)
        try:
            result = run.call_module(Child(common, layer), (value,), {})
        except Refused:
            return None
        self.reads.update(run.reads)
        wide = result.shape[1] if pool is not None else c
        return common if result.term is t and (pool is None or run.same(wide, c)) else None


def _others(t: Term, op: str, operand: Term) -> list[Term]:
    """What ``op`` adds to ``operand`` or multiplies it by, if ``t`` is such a term."""
    if t.op != op or operand not in t.args:
        return []
    return [t.args[t.args.index(operand) ^ 1]]
