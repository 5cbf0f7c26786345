"""Whether a module computes what its plan says: the module's own forward beside the plan's, on small random numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

import reference
from attn_kernels.plans import BAMPlan, Plan
from reference._common import DTYPES

SQUARE, OBLONG = (2, 4, 4), (3, 3, 5)  # N, H, W
TOLERANCE = 1e-9
TWINS = 4  # of the few hidden channels of a small module, ReLU may let none pass


@contextmanager
def _surroundings() -> Iterator[None]:
    """Always the same random numbers, on the CPU; the caller's are as they were afterwards."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs, too
        yield


def verify(module: nn.Module, plan: Plan) -> tuple[Plan | None, str]:
    """The plan that the module keeps to, on square maps alone if need be; else None and what speaks against it."""
    try:
        with _surroundings():
            twins = [_random_twin(module) for _ in range(TWINS)]
            error = max(_error(twin, plan, OBLONG) for twin in twins)
            if error > TOLERANCE and isinstance(plan, BAMPlan):
                plan = replace(plan, square=True)
                error = max(_error(twin, plan, SQUARE) for twin in twins)
    except Exception as failure:  # of the module's forward, of whatever kind
        return None, f"could not be checked: {type(failure).__name__}: {' '.join(str(failure).split())[:120]}"
    if error <= TOLERANCE:
        return plan, ""
    return None, f"computes something else than {plan.kind} (off by {error:.1e})"


def _error(twin: nn.Module, plan: Plan, size: tuple[int, int, int]) -> float:
    n, h, w = size
    x = torch.randn(n, plan.channels(twin), h, w, dtype=torch.float64) + 0.2
    if getattr(plan, "nhwc", False):
        x = x.permute(0, 2, 3, 1).contiguous()
    want = plan.compute(twin, x.clone(), None, None, reference)
    try:
        got = twin(x.clone())
    except (RuntimeError, ValueError):
        if not isinstance(plan, BAMPlan) or h == w:
            raise
        return torch.inf
    return (got - want).abs().max().item() if isinstance(got, Tensor) and got.shape == want.shape else torch.inf


def verify_forward(block: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> str:
    """What speaks against ``forward`` in place of the block's own; nothing where both give the same."""
    widths = (getattr(m, "in_channels", getattr(m, "num_features", None)) for m in block.modules())
    channels = next(filter(None, widths), None)
    if channels is None:
        return "its block could not be checked: no layer says how many channels it takes"
    # A pool of a fixed size stands after a stride of 1 or 2.
    pools = [m.kernel_size for m in block.modules() if isinstance(m, nn.AvgPool2d) and isinstance(m.kernel_size, int)]
    sizes = [8, *(stride * size for size in pools for stride in (1, 2))]
    failure = ""
    for size in sizes:
        try:
            with _surroundings():
                twin = _random_twin(block)
                x = torch.randn(2, channels, size, size, dtype=torch.float64)
                want, got = twin(x.clone()), forward(twin, x.clone())
        except Exception as error:  # of the block's forward, of whatever kind
            failure = f"its block could not be checked: {type(error).__name__}"
            continue
        same = isinstance(want, Tensor) and isinstance(got, Tensor) and want.shape == got.shape
        return "" if same and torch.allclose(got, want, rtol=1e-9, atol=1e-9) else "its block's trace computes another"
    return failure


def _random_twin(module: nn.Module) -> nn.Module:
    """The module in float64 on the CPU, in eval mode and without hooks; its parameters are random, not copied."""
    twin = type(module).__new__(type(module))
    twin.__dict__ = {
        k: OrderedDict() if "hooks" in k and isinstance(v, dict) else v for k, v in module.__dict__.items()
    }
    twin.__dict__["training"] = False
    twin.__dict__["_modules"] = {k: m if m is None else _random_twin(m) for k, m in module._modules.items()}
    twin.__dict__["_parameters"] = {k: _random(p) for k, p in module._parameters.items()}
    twin.__dict__["_buffers"] = {k: _buffer(k, b) for k, b in module._buffers.items()}
    return twin


def _random(p: Tensor | None) -> nn.Parameter | None:
    # Gates that neither saturate nor stand still, whatever the initialisation: zero in some networks.
    return None if p is None else nn.Parameter(torch.randn(p.shape, dtype=torch.float64) / max(p[0].numel(), 4) ** 0.5)


def _buffer(name: str, b: Tensor | None) -> Tensor | None:
    if b is None or b.dtype not in DTYPES:
        return b if b is None or not b.is_meta else torch.zeros(b.shape, dtype=b.dtype)
    if name == "running_var" or b.is_meta:
        return torch.rand(b.shape, dtype=torch.float64) + 0.5
    return b.detach().to("cpu", torch.float64, copy=True)
