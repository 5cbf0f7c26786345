"""What the attention modules share: argument checks, the accumulation dtype, the epilogue of a residual block."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral

import torch
from torch import Tensor, fx, nn

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EPILOGUE_ACTIVATIONS = (None, "relu")


class AttentionModule(nn.Module):
    """``act(attention(x) + residual)``: the base of all attention modules."""

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(attention(x) + residual)`` for ``x`` of shape (N, C, H, W)."""
        if isinstance(x, Tensor) or not isinstance(x, fx.Proxy):
            return self.attend(x, residual, activation)
        # To torch.fx the module is a leaf, as PyTorch's own layers are.
        path = x.tracer.path_of_module(self)
        return x.tracer.create_proxy("call_module", path, (x, residual, activation), {})

    def attend(self, x: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
        """The formula, by the parameters of the layers, or by the layers where one of them is not plain."""
        raise NotImplementedError

    def is_plain(self) -> bool:
        """Whether the layers do what their classes do with their parameters, and nothing else."""
        return True

    def __prepare_scriptable__(self):
        name = f"{type(self).__module__.partition('.')[0]}.{type(self).__name__}"
        raise TypeError(f"torch.jit.script cannot read {name}: use torch.compile, torch.export or torch.jit.trace")


def is_plain_layer(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of ``layer`` does what its class ``kind`` does with its parameters, and nothing else.

    A wrapper (LoRA's, say), a subclass, a parametrization, a hook and another forward, of the instance or set on the
    class, all say no.
    """
    return type(layer) is kind and kind.forward is _FORWARDS.get(kind, kind.forward) and is_untouched(layer)


# Before anything could set another one on the class.
_FORWARDS = {
    kind: kind.forward
    for kind in (nn.Sequential, nn.Flatten, nn.Identity, nn.Linear, nn.Conv2d, nn.ReLU, nn.BatchNorm1d, nn.BatchNorm2d)
}


def is_untouched(layer: nn.Module) -> bool:
    """Whether a call of ``layer`` runs its class's forward and no hook."""
    return "forward" not in layer.__dict__ and not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or hooks_on_every_module()
    )


def hooks_on_every_module() -> bool:
    """Whether there are hooks that every call of a module runs (``register_module_forward_hook`` and its like)."""
    # PyTorch's function is private: a version without it cannot be asked.
    known = getattr(nn.modules.module, "_has_any_global_hook", None)
    return known is not None and bool(known())


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and gates: float64 for a float64 ``x``, float32 for every other."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def epilogue(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """``act(y + residual)`` in ``y``'s dtype: the end of a residual block."""
    if residual is not None:
        y = (y + residual).to(y.dtype)
    return torch.relu(y) if activation == "relu" else y


def states(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, then buffers. ``nn.Module`` takes ten times as long to find those of a single layer."""
    if module._modules:
        return itertools.chain(module.parameters(), module.buffers())
    return filter(lambda state: state is not None, (*module._parameters.values(), *module._buffers.values()))


def like_parameters(t: Tensor, module: nn.Module) -> Tensor:
    """``t`` in the dtype that ``module`` computes in (its first parameter's or floating buffer's)."""
    for state in states(module):
        if state.is_floating_point():
            return t.to(state.dtype)
    return t


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Keeps autocast from rounding the statistics and gates of ``x``."""
    device = x.device.type
    # Dynamo of torch 2.11 cannot trace is_autocast_available, so it is not asked about what always has autocast.
    available = device in ("cuda", "cpu") or torch.amp.is_autocast_available(device)
    if available and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def check_choice(name: str, value: object, choices: Collection) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in tuple(choices):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_positive(name: str, value: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")


def check_input(x: Tensor, residual: Tensor | None, activation: str | None) -> None:
    """Check the arguments that every attention module takes.

    Raises:
        TypeError: ``x`` or ``residual`` is no floating-point tensor of a supported dtype.
        ValueError: ``x`` is not (N, C, H, W) with C, H, W >= 1, ``residual`` differs from it in shape or device,
            or ``activation`` is unknown.
    """
    _check_float("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x: expected C, H and W of at least 1, got shape {tuple(x.shape)}")
    if residual is not None:
        _check_float("residual", residual)
        if residual.shape != x.shape:
            raise ValueError(f"residual: expected x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
        check_device("residual", residual, x)
    if activation not in EPILOGUE_ACTIVATIONS:
        check_choice("activation", activation, EPILOGUE_ACTIVATIONS)


def check_parameter(name: str, p: Tensor | None, shape: tuple[int, ...], x: Tensor, *, optional: bool = False) -> None:
    """Raise TypeError or ValueError unless ``p`` is a float tensor of ``shape`` on ``x``'s device."""
    if p is None and optional:
        return
    _check_float(name, p)
    if p.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} for x of shape {tuple(x.shape)}, got {tuple(p.shape)}")
    check_device(name, p, x)


def check_device(name: str, t: Tensor, x: Tensor) -> None:
    """Raise ValueError unless ``t`` lies where ``x`` does."""
    if t.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like x, got {t.device}")


def _check_float(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name}: expected dtype {expected}, got {str(t.dtype).removeprefix('torch.')}")


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Whether a BatchNorm module normalises by the statistics of its input."""
    return norm.training or norm.running_mean is None


def check_batch_statistics(norm: object, x: Tensor, count: int) -> None:
    """Raise ValueError where BatchNorm would find one value per channel, before any module counts the batch."""
    if count == 1 and isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) and uses_batch_statistics(norm):
        raise ValueError(
            f"x: expected more than 1 value per channel for {type(norm).__name__} in training, "
            f"got shape {tuple(x.shape)}"
        )
