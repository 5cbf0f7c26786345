"""What PyTorch's own modules do to symbolic tensors: ``LAYERS``, by exact class.

A subclass is another module, whose forward is read like any other. Each entry names the functions that the class's
forward calls, too, since another library may have put its own in their place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from attn_kernels.fuse.arithmetic import elementwise, gelu
from attn_kernels.fuse.reductions import adaptive_avg_pool2d, adaptive_max_pool2d, reduced
from attn_kernels.fuse.terms import ONE, Refused, Term, Value, size
from attn_kernels.fuse.views import flatten

if TYPE_CHECKING:
    from attn_kernels.fuse.interpret import Child, Interpreter


class Layer(NamedTuple):
    """How to interpret a class of layers, and the functions that its forward calls."""

    call: Callable[[Interpreter, Child, Value], Value]
    functions: tuple[tuple[object, str], ...]


def _own(run: Interpreter, layer: Child, *names: str) -> list:
    """The values of a layer's options, each of which is noted."""
    return [run.reads.constant(layer, name) for name in names]


def _weights(run: Interpreter, layer: Child, shapes: dict[str, tuple[int, ...]]) -> None:
    """Note which parameters a layer has; refuse those that are of another shape than its options say."""
    if layer.module._modules and type(layer.module) in LAYERS:
        raise Refused(f"has children in {layer.name}: a parametrization?")
    for name, p in layer.module._parameters.items():
        run.reads.parameter(layer, name)
        if p is not None and (name not in shapes or tuple(p.shape) != shapes[name]):
            raise Refused(f"has a parameter of another shape than {layer.name} says, {name}")


def linear(run: Interpreter, layer: Child, v: Value) -> Value:
    """A Linear layer, which takes one vector of channels per sample."""
    takes, gives = _own(run, layer, "in_features", "out_features")
    _weights(run, layer, {"weight": (gives, takes), "bias": (gives,)})
    others = [s for s in v.shape[:-1] if s != ONE]
    is_vector = len(others) <= 1 and all(s.symbols[:1] and s.symbols[0][0] == "N" for s in others)
    if v.expanded or len(v.shape) < 2 or not is_vector or not run.same(v.shape[-1], size(takes)):
        raise Refused(f"applies {layer.name} to something else than a vector of channels per sample")
    return Value(Term("fc", layer.path, v.term), (*v.shape[:-1], size(gives)))


def convolution(run: Interpreter, layer: Child, v: Value) -> Value:
    """A convolution: 1x1 of a vector of channels, of a whole map, or over the channels, in one dimension."""
    name = layer.name
    if "_conv_forward" in vars(layer.module):
        raise Refused(f"has another forward in {name} than its class's")
    run.reads.missing(layer, "_conv_forward")
    takes, gives, kernel, stride, padding, dilation, groups, mode = _own(
        run, layer, "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode",
    )  # fmt: skip
    _weights(run, layer, {"weight": (gives, takes // groups, *kernel), "bias": (gives,)})
    if v.expanded or len(v.shape) != 2 + len(kernel) or not run.same(v.shape[1], size(takes)):
        raise Refused(f"applies {name} to something else than maps of its channels")
    sizes = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    keeps = padding == "same" or (not isinstance(padding, str) and [2 * p for p in padding] == sizes)
    if set(stride) != {1} or mode != "zeros" or not keeps:
        raise Refused(f"changes the size of the map by {name}, or pads it by other numbers than zeros")
    if len(kernel) == 1:
        if (takes, gives) != (1, 1):
            raise Refused(f"applies {name}, a Conv1d of several channels")
        return Value(Term("conv1d", layer.path, v.term), v.shape)
    is_vector = all(s == ONE for s in v.shape[2:])
    if is_vector and (set(kernel) != {1} or groups != 1):
        raise Refused(f"applies {name}, which is no plain 1x1 convolution, to a vector")
    return Value(Term("fc" if is_vector else "conv", layer.path, v.term), (v.shape[0], size(gives), *v.shape[2:]))


def batch_norm(run: Interpreter, layer: Child, v: Value) -> Value:
    """A BatchNorm. It writes its buffers, so that it must run as often as its module runs it."""
    (channels,) = _own(run, layer, "num_features")
    _weights(run, layer, {"weight": (channels,), "bias": (channels,)})
    if v.expanded or len(v.shape) < 2 or not run.same(v.shape[1], size(channels)):
        raise Refused(f"applies {layer.name} to something else than maps of its channels")
    if len(v.shape) != (4 if isinstance(layer.module, nn.BatchNorm2d) else 2):
        raise Refused(f"applies {layer.name} to a tensor of {len(v.shape)} dimensions")
    term = Term("bn", layer.path, v.term)
    if any(layer.module is other for other in run.norms.values()):
        raise Refused(f"calls {layer.name} twice")
    run.norms[term] = layer.module
    return Value(term, v.shape)


def _batch_norm_act(run: Interpreter, layer: Child, v: Value) -> Value:
    """timm's BatchNorm2d with dropout and an activation behind it, as it is where these are Identity."""
    if layer.module._modules.keys() != {"drop", "act"}:
        raise Refused(f"has other children in {layer.name} than it should have")
    for name in ("drop", "act"):
        child = run.child(layer, name)
        if type(child.module) is not nn.Identity:
            raise Refused(f"has an activation or dropout in {layer.name}")
        run.call_module(child, (v,), {})
    return batch_norm(run, layer, v)


def _elementwise(name: str, *options: str) -> Callable[[Interpreter, Child, Value], Value]:
    def call(run: Interpreter, layer: Child, v: Value) -> Value:
        inplace = _own(run, layer, "inplace")[0] if "inplace" in vars(layer.module) else False
        return elementwise(run, name, v, inplace, *_own(run, layer, *options))

    return call


def _relu6(run: Interpreter, layer: Child, v: Value) -> Value:
    if _own(run, layer, "min_val", "max_val") != [0, 6]:
        raise Refused(f"has other bounds in {layer.name} than 0 and 6")
    return elementwise(run, "relu6", v, *_own(run, layer, "inplace"))


def _gelu(run: Interpreter, layer: Child, v: Value) -> Value:
    return gelu(run, v, *_own(run, layer, "approximate"))


def _adaptive_avg_pool(run: Interpreter, layer: Child, v: Value) -> Value:
    return adaptive_avg_pool2d(run, v, *_own(run, layer, "output_size"))


def _adaptive_max_pool(run: Interpreter, layer: Child, v: Value) -> Value:
    return adaptive_max_pool2d(run, v, *_own(run, layer, "output_size", "return_indices"))


def _avg_pool(run: Interpreter, layer: Child, v: Value) -> Value:
    """An average over windows of a fixed size, which is that of the whole plane on maps of that size."""
    kernel, padding, divisor = _own(run, layer, "kernel_size", "padding", "divisor_override")
    _own(run, layer, "stride", "ceil_mode")
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    if padding not in (0, (0, 0)) or divisor is not None or len(v.shape) != 4:
        raise Refused(f"pools with padding or another divisor by {layer.name}")
    return reduced("mean", v, [2, 3], True, kernel)


def _flatten(run: Interpreter, layer: Child, v: Value) -> Value:
    return flatten(run, v, *_own(run, layer, "start_dim", "end_dim"))


def _dropout(run: Interpreter, layer: Child, v: Value) -> Value:
    (p,) = _own(run, layer, "p")
    if p != 0:
        raise Refused(f"drops by {layer.name} with probability {p:.2g}")
    return v


def _identity(run: Interpreter, layer: Child, v: Value) -> Value:
    return v


_NORM = (F, "batch_norm")
LAYERS: dict[type, Layer] = {
    nn.Linear: Layer(linear, ((F, "linear"),)),
    nn.Conv2d: Layer(convolution, ((F, "conv2d"), (nn.Conv2d, "_conv_forward"))),
    nn.Conv1d: Layer(convolution, ((F, "conv1d"), (nn.Conv1d, "_conv_forward"))),
    nn.BatchNorm1d: Layer(batch_norm, (_NORM, (nn.BatchNorm1d, "_check_input_dim"))),
    nn.BatchNorm2d: Layer(batch_norm, (_NORM, (nn.BatchNorm2d, "_check_input_dim"))),
    nn.Dropout: Layer(_dropout, ((F, "dropout"),)),
    nn.Identity: Layer(_identity, ()),
    nn.Flatten: Layer(_flatten, ()),
    nn.AdaptiveAvgPool2d: Layer(_adaptive_avg_pool, ((F, "adaptive_avg_pool2d"),)),
    nn.AdaptiveMaxPool2d: Layer(_adaptive_max_pool, ((F, "adaptive_max_pool2d"),)),
    nn.AvgPool2d: Layer(_avg_pool, ((F, "avg_pool2d"),)),
    nn.ReLU: Layer(_elementwise("relu"), ((F, "relu"),)),
    nn.ReLU6: Layer(_relu6, ((F, "hardtanh"),)),
    nn.Sigmoid: Layer(_elementwise("sigmoid"), ((torch, "sigmoid"),)),
    nn.Tanh: Layer(_elementwise("tanh"), ((torch, "tanh"),)),
    nn.SiLU: Layer(_elementwise("silu"), ((F, "silu"),)),
    nn.Mish: Layer(_elementwise("mish"), ((F, "mish"),)),
    nn.GELU: Layer(_gelu, ((F, "gelu"),)),
    nn.Hardsigmoid: Layer(_elementwise("hardsigmoid"), ((F, "hardsigmoid"),)),
    nn.Hardswish: Layer(_elementwise("hardswish"), ((F, "hardswish"),)),
    nn.LeakyReLU: Layer(_elementwise("leaky_relu", "negative_slope"), ((F, "leaky_relu"),)),
    nn.ELU: Layer(_elementwise("elu", "alpha"), ((F, "elu"),)),
}
# What they were when this module was imported: what another library puts in their place is not modelled here.
FORWARDS = {cls: cls.forward for cls in LAYERS}
PRISTINE = {(owner, name): getattr(owner, name) for layer in LAYERS.values() for owner, name in layer.functions}


def find(cls: type) -> Layer | None:
    """How to interpret modules of exactly this class; None where their forward is to be read."""
    timm = sys.modules.get("timm.layers.norm_act")
    if timm is not None and cls is getattr(timm, "BatchNormAct2d", None):
        return Layer(_batch_norm_act, (_NORM,))
    return LAYERS.get(cls)
