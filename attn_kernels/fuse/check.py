"""A plan beside its module, on small random numbers: outputs, gradients and buffers, in training and in evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import reference
from attn_kernels.fuse.guards import Guard
from attn_kernels.fuse.plans import Plan
from reference._common import DTYPES

TOLERANCE = 1e-6  # not less: PyTorch differentiates hardsigmoid by 1/6 in float32, even of a float64 tensor


@contextmanager
def surroundings() -> Iterator[None]:
    """Inside the block tensors are real, on the CPU, with gradients; random numbers get their state back at its end."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_no_fake_tensors())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs, too
        yield


def _no_fake_tensors() -> contextlib.AbstractContextManager:
    try:
        from torch._subclasses.fake_tensor import unset_fake_temporarily
    except ImportError:  # it is private, and may go
        return contextlib.nullcontext()
    return unset_fake_temporarily()


Forward = Callable[[nn.Module, Tensor], Tensor]
_verdicts: dict[tuple[Plan, Guard, object], str] = {}


def verdict(module: nn.Module, plan: Plan, guard: Guard, forward: Forward | None = None) -> str:
    """:func:`disagreement`, computed once for all modules that were read alike: they have the same guard."""
    key = plan, guard, forward
    if key not in _verdicts:
        _verdicts[key] = disagreement(module, plan) if forward is None else disagreement(module, plan, forward)
    return _verdicts[key]


def disagreement(module: nn.Module, plan: Plan, forward: Forward = nn.Module.__call__) -> str:
    """What a module, or a ``forward`` of its layers, and its plan disagree about; empty where they agree."""
    try:
        with surroundings():
            for training in (True, False):
                for h, w, scale in ((3, 5, 1.0), (5, 3, -8.0)):
                    found = _compare(module, plan, forward, training, (h, w), scale)
                    if found:
                        return f"{found} than {plan.kind}'s {'in training' if training else 'in evaluation'}"
    except Exception as failure:  # of any kind that the module's forward raises
        return f"could not be checked: {type(failure).__name__}: {' '.join(str(failure).split())[:120]}"
    return ""


def _compare(
    module: nn.Module, plan: Plan, forward: Forward, training: bool, size: tuple[int, int], scale: float
) -> str:
    theirs = random_twin(module, training)
    ours = random_twin(theirs, training, values=True)
    h, w = (size[0], size[0]) if plan.plane == "square" else plan.plane or size
    shape = (4, plan.channels or 6, h, w)
    # On some of the maps every element is negative, and preactivations leave the range in which gates are linear.
    x = torch.randn(shape, dtype=torch.float64) + 0.2
    x = x if scale > 0 else scale * x.abs()
    if plan.nhwc:
        x = x.permute(0, 2, 3, 1).contiguous()
    dy = torch.randn_like(x)
    results = []
    for twin in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = forward(twin, leaf) if twin is theirs else plan.compute(twin, leaf, None, None, reference)
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            return "gives another shape or dtype"
        parameters = list(twin.parameters())
        gradients = torch.autograd.grad(y, [leaf, *parameters], dy, allow_unused=True)
        results.append((leaf.detach(), y.detach(), gradients, list(twin.buffers())))
    (x1, y1, gradients1, buffers1), (_, y2, gradients2, buffers2) = results
    if not torch.equal(x1, x):
        return "writes to its input, otherwise"
    if not _close(y1, y2):
        return f"computes other numbers (off by {(y1 - y2).abs().max().item():.1e})"
    if not all(map(_close, gradients1, gradients2)):
        return "has other gradients"
    if not all(map(_close, buffers1, buffers2)):
        return "leaves other buffers"
    return ""


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.allclose(a.double(), b.double(), rtol=TOLERANCE, atol=TOLERANCE)


def random_twin(module: nn.Module, training: bool, values: bool = False) -> nn.Module:
    """The module in float64 on the CPU, without hooks; its parameters random, or copied with ``values``.

    It shares no tensor and no dict with the module.
    """
    twin = object.__new__(type(module))
    twin.__dict__ = {k: type(v)() if "hooks" in k and isinstance(v, dict) else v for k, v in module.__dict__.items()}
    copied = _copied if values else _random
    twin.__dict__["training"] = training
    children = module._modules.items()
    twin.__dict__["_modules"] = {k: m if m is None else random_twin(m, training, values) for k, m in children}
    twin.__dict__["_parameters"] = {k: copied(k, p) for k, p in module._parameters.items()}
    twin.__dict__["_buffers"] = {k: (_copied if values else _buffer)(k, b) for k, b in module._buffers.items()}
    return twin


def _copied(name: str, t: Tensor | None) -> Tensor | None:
    if t is None:
        return None
    copy = t.detach().clone()
    return nn.Parameter(copy) if isinstance(t, nn.Parameter) else copy


def _random(name: str, p: Tensor | None) -> nn.Parameter | None:
    # Not the initialisation, which is zero in some networks: of these the gates neither saturate nor stand still.
    if p is None:
        return None
    fan_in = p.numel() // max(p.shape[0], 1) if p.dim() else 1
    return nn.Parameter(torch.randn(p.shape, dtype=torch.float64) / max(fan_in, 4) ** 0.5)


def _buffer(name: str, b: Tensor | None) -> Tensor | None:
    if b is None:
        return None
    if b.dtype not in DTYPES:
        return torch.zeros(b.shape, dtype=b.dtype)
    return torch.rand(b.shape, dtype=torch.float64) + 0.5
