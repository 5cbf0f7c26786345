"""The registry of adapters: from a module that people already have to the plan of the fused one.

Modules are known by the name of their class, since the published files are copied everywhere; whether a module of that
name is the one meant is for its adapter to see, from children and options, and for ``fuse_`` to check by running it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from attn_kernels.plans import (
    BAMPlan,
    CBAMPlan,
    ChannelGatePlan,
    GatePlan,
    Layer,
    Path,
    Plan,
    SEPlan,
    SimAMPlan,
    SpatialGatePlan,
    layer,
)
from reference.cbam import check_pool_types
from reference.se import ACTIVATIONS, GATES

Adapter = Callable[[nn.Module], "Plan | None"]


class Unsupported(Exception):
    """Raised by an adapter for a module that it knows and that no kernel covers; the message says why."""


ADAPTERS: dict[str, Adapter] = {}


def register_adapter(name: str, adapter: Adapter | None = None) -> Adapter | Callable[[Adapter], Adapter]:
    """Teach :func:`fuse_` a class of modules, in place of what it knew of that name.

    Args:
        name: the class's name, without its module.
        adapter: takes the module and returns its plan (see ``attn_kernels.plans``), or None for a module that is
            something else; raises ``attn_kernels.fuse.Unsupported`` with the reason for one that cannot be fused.
            Without it, ``register_adapter`` is a decorator.

    Returns:
        The adapter.

    Raises:
        TypeError: ``name`` is no string or ``adapter`` is not callable.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected the name of a class, got {name!r}")
    if adapter is None:
        return lambda adapter: register_adapter(name, adapter)
    if not callable(adapter):
        raise TypeError(f"adapter: expected a function of a module, got {type(adapter).__name__}")
    ADAPTERS[name] = adapter
    return adapter


def find_plan(module: nn.Module) -> Plan | None:
    """The plan of ``module``, or None where it is nothing that any adapter knows.

    Raises:
        Unsupported: known, and no kernel covers it.
    """
    adapter = ADAPTERS.get(type(module).__name__)
    plan = None if adapter is None else adapter(module)
    if plan is None:
        return None
    paths = [_path(name) for name, _ in module.named_modules() if name]
    return replace(plan, bypassed=tuple(Layer.of(module, path) for path in paths if plan.bypasses(path)))


def _path(name: str) -> Path:
    return tuple(name.split("."))


def name_of(function: nn.Module, known: dict[str, Callable[[Tensor], Tensor]]) -> str | None:
    """Which of the known elementwise functions a module is, by its values: whoever wrote it, whatever its name."""
    if next(function.parameters(), None) is not None or next(function.buffers(), None) is not None:
        return None
    x = torch.linspace(-9, 9, 145, dtype=torch.float64, device="cpu").view(1, -1, 1, 1)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        values = []
        for training in (False, True):
            twin = copy.copy(function)
            twin.__dict__["training"] = training
            values.append(type(function).forward(twin, x.clone()))  # past its hooks
        for name, formula in known.items():
            if all(v.shape == x.shape and torch.allclose(v, formula(x), rtol=0, atol=1e-9) for v in values):
                return name
    return None


def check_layers(module: nn.Module, *paths: Path) -> None:
    """Raise unless the layers, Linear or 1x1 convolutions, map C channels to C."""
    width = first = None
    for path in paths:
        fc = layer(module, path)
        name = ".".join(path)
        if type(fc) is nn.Conv2d:
            if (fc.kernel_size, fc.stride, fc.padding, fc.groups) != ((1, 1), (1, 1), (0, 0), 1):
                raise Unsupported(f"{name} is no plain 1x1 convolution")
        elif type(fc) is not nn.Linear:
            raise Unsupported(f"{name} is a {type(fc).__name__}, neither Linear nor Conv2d")
        takes, gives = fc.weight.shape[1], fc.weight.shape[0]
        if width not in (None, takes):
            raise Unsupported(f"{name} takes {takes} channels, not {width}")
        first, width = first or takes, gives
    if width != first:
        raise Unsupported(f"{name} gives {width} channels, not {first}")


def _check_all_layers(module: nn.Module, *paths: Path) -> None:
    """Raise unless the layers are as :func:`check_layers` wants them and hold all of the module's parameters."""
    check_layers(module, *paths)
    for name, child in module.named_modules():
        if name and _path(name) not in paths and next(child.parameters(recurse=False), None) is not None:
            raise Unsupported(f"another layer between, {name} ({type(child).__name__})")


# fc1, activation, fc2 and gate: timm, Cadene and timm's senet, EfficientNet of timm, torchvision, moskomule, mmpretrain
# and mmdetection, HF RegNet.
SE_LAYERS = [
    tuple(_path(name) for name in names.split())
    for names in (
        "fc1 act fc2 gate",
        "fc1 relu fc2 sigmoid",
        "conv_reduce act1 conv_expand gate",
        "fc1 activation fc2 scale_activation",
        "fc.0 fc.1 fc.2 fc.3",
        "conv1.conv conv1.activate conv2.conv conv2.activate",
        "attention.0 attention.1 attention.2 attention.3",
    )
]


def squeeze_excite(module: nn.Module) -> Plan | None:
    """Squeeze-and-excitation of any of the known layouts; the kernels' own MLP where they have it."""
    found = (names for names in SE_LAYERS if all(layer(module, path) is not None for path in names))
    paths = next(found, None)
    if paths is None:
        raise Unsupported("its layers are not those of any known module of this name")
    fc1, act, fc2, gate = paths
    norm, add_maxpool = getattr(module, "bn", None), bool(getattr(module, "add_maxpool", False))
    has_norm = norm is not None and type(norm) is not nn.Identity
    mlp_activation, gate_name = name_of(layer(module, act), ACTIVATIONS), name_of(layer(module, gate), GATES)
    if has_norm or add_maxpool or mlp_activation is None or gate_name is None:
        flat = isinstance(layer(module, fc1), nn.Linear)
        middle = (("bn",),) if has_norm else ()
        return GatePlan(chain=(fc1, *middle, act, fc2, gate), add_maxpool=add_maxpool, flat=flat)
    _check_all_layers(module, fc1, fc2)
    return SEPlan(fc1=fc1, fc2=fc2, mlp_activation=mlp_activation, gate=gate_name)


def squeeze_excite_nhwc(module: nn.Module) -> Plan | None:
    """timm's SqueezeExciteCl."""
    plan = squeeze_excite(module)
    if isinstance(plan, GatePlan):
        raise Unsupported("an activation or gate that the kernels do not have, on NHWC maps")
    return plan and replace(plan, nhwc=True)


def effective_se(module: nn.Module) -> Plan | None:
    """timm's EffectiveSEModule: one layer and a gate."""
    if layer(module, ("fc",)) is None or layer(module, ("gate",)) is None:
        raise Unsupported("its layers are not those of timm's")
    return GatePlan(chain=(("fc",), ("gate",)), add_maxpool=bool(getattr(module, "add_maxpool", False)))


def channel_gate(module: nn.Module) -> Plan | None:
    """Jongchan's ChannelGate of CBAM (that of BAM has no ``mlp``)."""
    if layer(module, ("mlp",)) is None:
        return None
    plan = ChannelGatePlan()
    return replace(plan, pool_types=_channel_pools(module, plan))


def spatial_gate(module: nn.Module) -> Plan | None:
    """Jongchan's SpatialGate of CBAM (that of BAM has no ``spatial``)."""
    if layer(module, ("spatial",)) is None:
        return None
    plan = SpatialGatePlan()
    _check_spatial(module, plan)
    return plan


def cbam(module: nn.Module) -> Plan | None:
    """Jongchan's CBAM."""
    gate = layer(module, ("ChannelGate",))
    if gate is None or layer(gate, ("mlp",)) is None:
        raise Unsupported("not the layers of Jongchan's CBAM")
    paths = {"fc1": _path("ChannelGate.mlp.1"), "fc2": _path("ChannelGate.mlp.3")}
    pools = _channel_pools(gate, ChannelGatePlan())
    if layer(module, ("SpatialGate",)) is None:
        return ChannelGatePlan(**paths, pool_types=pools)
    plan = CBAMPlan(
        **paths, pool_types=pools, conv=_path("SpatialGate.spatial.conv"), bn=_path("SpatialGate.spatial.bn")
    )
    _check_spatial(module, plan)
    return plan


def _channel_pools(gate: nn.Module, plan: ChannelGatePlan) -> tuple[str, ...]:
    """The names of the pools of a channel gate whose layers are as they should be."""
    _check_all_layers(gate, plan.fc1, plan.fc2)
    try:
        pools = tuple(gate.pool_types)
        check_pool_types(pools)
    except (AttributeError, TypeError, ValueError) as error:
        raise Unsupported(str(error)) from None
    return pools


def _check_spatial(module: nn.Module, plan: SpatialGatePlan) -> None:
    conv, norm = layer(module, plan.conv), plan.norm(module)
    if type(conv) is not nn.Conv2d or conv.bias is not None or conv.weight.shape[:2] != (1, 2):
        raise Unsupported("the spatial gate has no convolution from 2 maps to 1 without bias")
    kernel = conv.kernel_size[0]
    if conv.kernel_size != (kernel, kernel) or kernel % 2 == 0 or conv.padding != (kernel // 2, kernel // 2):
        raise Unsupported(f"the spatial gate's convolution has kernel {conv.kernel_size} and padding {conv.padding}")
    if not isinstance(norm, nn.BatchNorm2d):
        raise Unsupported(f"the spatial gate's norm is {type(norm).__name__}, not BatchNorm2d")


def cbam_of_timm(module: nn.Module) -> Plan | None:
    """timm's CbamModule, whose convolution takes the mean first."""
    paths = [_path(name) for name in ("channel.act", "channel.gate", "spatial.gate")]
    if any(layer(module, path) is None for path in paths):
        raise Unsupported("its layers are not those of timm's")
    for path, known, name in zip(paths, (ACTIVATIONS, GATES, GATES), ("relu", "sigmoid", "sigmoid"), strict=True):
        if name_of(layer(module, path), known) != name:
            raise Unsupported(f"{'.'.join(path)} is {layer(module, path)}, and the kernels of CBAM have {name}")
    plan = CBAMPlan(
        fc1=_path("channel.fc1"),
        fc2=_path("channel.fc2"),
        conv=_path("spatial.conv.conv"),
        bn=_path("spatial.conv.bn"),
        mean_first=True,
    )
    _check_all_layers(layer(module, ("channel",)), ("fc1",), ("fc2",))
    _check_spatial(module, plan)
    return plan


def light_cbam(module: nn.Module) -> Plan | None:
    """timm's LightCbamModule."""
    raise Unsupported("no kernel for its mixture of mean and maximum over the channels")


def bam(module: nn.Module) -> Plan | None:
    """Jongchan's BAM."""
    plan = BAMPlan()
    branches = layer(module, plan.gate_c), layer(module, plan.gate_s)
    if not all(isinstance(branch, nn.Sequential) for branch in branches):
        raise Unsupported("not the layers of Jongchan's BAM")
    return plan


def simam(module: nn.Module) -> Plan | None:
    """ZjjConan's simam_module."""
    return SimAMPlan() if isinstance(getattr(module, "e_lambda", None), int | float) else None


for _name in ("SEModule", "SELayer", "SqueezeExcite", "SqueezeExcitation", "RegNetSELayer"):
    register_adapter(_name, squeeze_excite)
register_adapter("SqueezeExciteCl", squeeze_excite_nhwc)
register_adapter("EffectiveSEModule", effective_se)
register_adapter("ChannelGate", channel_gate)
register_adapter("SpatialGate", spatial_gate)
register_adapter("CBAM", cbam)
register_adapter("CbamModule", cbam_of_timm)
register_adapter("LightCbamModule", light_cbam)
register_adapter("BAM", bam)
register_adapter("simam_module", simam)
