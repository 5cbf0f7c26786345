"""Random calls of every operator, fused against the reference: ``python -m tests.differential --minutes 5``.

A case is a module with its options, a shape, strides and dtypes of everything, which gradients are asked for and how
(once, twice, under autocast, with hooks on saved tensors), states that are columns of matrices, NaN and infinities, and
a launch configuration. In float64 results must agree to nearly all digits; in other dtypes errors against float64 are a
small multiple of eager's; where something is not finite, so is the other's, at the same places. A case is drawn from
its seed alone: ``--seed S --cases 1`` draws one again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from attn_kernels.ops import simam
from attn_kernels.ops.bam.norm.forward import norm_tile
from attn_kernels.ops.cbam import backward as cbam_backward
from attn_kernels.ops.cbam import convolution, forward
from attn_kernels.ops.common import device as gpu
from attn_kernels.ops.common import gate_plan as plan
from attn_kernels.ops.common import tiling
from benchmarks.accuracy import compare
from benchmarks.interpreter import round_to_nearest, skip_repeated_work
from reference.catalogue import DTYPES, LAYOUTS, OPERATORS
from reference.se import GATES
from tests.harness import ChannelAttention, pair

STRIDES = (*LAYOUTS, "sliced", "expanded", "transposed")
ELEMENTS = 2**12
SLACK = 4  # of what the accuracy rule allows: a single draw may exceed it by luck of eager's rounding
CACHED = (
    tiling.plane_tile,
    tiling.pixel_tile,
    simam.whole_plane_tile,
    plan.channel_plan,
    plan.forward_launch,
    plan.backward_launch,
    norm_tile,
    forward.pools_tile,
    forward.scale_tile,
    cbam_backward.dspatial_tile,
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Case:
    """A call and what is asked of it; its fields are what is printed of a case that went wrong."""

    module: str
    options: dict[str, object]
    shape: tuple[int, int, int, int]
    dtype: str
    parameter_dtype: str
    strides: dict[str, str]
    residual_dtype: str | None
    activation: str | None
    training: bool
    wanted: tuple[str, ...]
    hook: str | None
    twice: bool
    autocast: bool
    columns: bool
    planted: tuple[str, float] | None
    launch: dict[str, int] = field(default_factory=dict)

    def build(self, kit: object) -> nn.Module:
        channels, options = self.shape[1], self.options
        if self.module == "channel_attention":
            return ChannelAttention(kit, channels)
        module = OPERATORS[self.module].build(kit, channels, **options)
        norm = module.SpatialGate.spatial if hasattr(module, "SpatialGate") else getattr(module, "spatial", None)
        if norm is not None and self.launch["norm"]:
            choices = ({"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 1e-2})
            norm.bn = nn.BatchNorm2d(1, **choices[self.launch["norm"] - 1])
        return module


def draw(seed: int) -> Case:
    """The case of a seed."""
    r = random.Random(seed)
    module = r.choice((*OPERATORS, "channel_attention"))
    while True:
        n, c, h, w = (max(1, 2 ** r.randint(0, top) + r.choice((-1, 0, 0, 1, 3))) for top in (3, 6, 5, 5))
        if n * c * h * w <= ELEMENTS and (module != "BAM" or n > 2):
            break
    options = {} if module == "channel_attention" else OPERATORS[module].draw(r, c)
    if module == "SimAM" and r.random() < 0.3:
        options["e_lambda"] = 0  # NaN on one pixel, in the reference as well
    dtype = r.choices(list(DTYPES), (1, 2, 3, 6))[0]
    planted = (r.choice(("x", "residual", "dy")), r.choice((float("nan"), float("inf"), -float("inf"))))
    is_planted = dtype == "fp32" and r.random() < 0.5
    own_layers = module in ("BAM", "channel_attention")  # PyTorch's, whose dtype and autocast are the user's
    residual_dtype = r.choice((None, dtype, *DTYPES))
    if is_planted:
        residual_dtype = dtype
    wanted = [name for name in ("x", "residual", "parameters") if r.random() < 0.7]
    return Case(
        module,
        options,
        (n, c, h, w),
        dtype,
        dtype if own_layers or is_planted or r.random() < 0.7 else r.choice(list(DTYPES)),
        {name: r.choice(STRIDES) for name in ("x", "residual", "dy")},
        residual_dtype,
        r.choice((None, "relu")),
        r.random() < 0.6 and (module not in ("CBAM", "SpatialGate") or n * h * w > 1),
        tuple(wanted) or ("x",),
        r.choice((None, None, "contiguous", "strided")),
        dtype == "fp64" and r.random() < 0.3,
        not own_layers and r.random() < 0.2,
        r.random() < 0.3,
        planted if is_planted else None,
        {
            "TILE": r.choice((tiling.TILE, tiling.TILE, 512)),
            "multiprocessors": r.choice((1, 5, 132)),
            "single": r.random() < 0.7,
            "norm": r.choice((0, 0, 1, 2, 3, 4)),
        },
    )


def tensor(shape: tuple[int, ...], dtype: torch.dtype, strides: str) -> Tensor:
    n, c, h, w = shape
    if strides == "sliced":
        return torch.randn(n, c, h, w + 3, dtype=torch.float64).to(DEVICE, dtype)[..., 1:-2]
    if strides == "expanded":
        return torch.randn(1, c, h, w, dtype=torch.float64).to(DEVICE, dtype).expand(n, -1, -1, -1)
    if strides == "transposed":
        return torch.randn(n, c, w, h, dtype=torch.float64).to(DEVICE, dtype).transpose(2, 3)
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[strides])


def to_columns(module: nn.Module) -> None:
    """Make vectors of parameters and buffers columns of matrices, whose other column must stay as it is."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d):  # whose backward on the CPU is wrong for a strided weight (PyTorch 2.13)
            continue
        for states in (m._parameters, m._buffers):
            for name, t in states.items():
                if t is not None and t.dim() == 1:
                    column = torch.stack([t.detach(), torch.full_like(t, 9)], -1)[:, 0]
                    states[name] = nn.Parameter(column) if states is m._parameters else column


def neighbours(module: nn.Module) -> bool:
    """Whether the other columns are what they were."""
    states = [t for t in (*module.parameters(), *module.buffers()) if t.dim() == 1 and t.stride(0) == 2]
    return all((t.as_strided(t.shape, t.stride(), 1) == 9).all() for t in states)


HOOKS = {
    "contiguous": lambda t: torch.empty(t.size(), dtype=t.dtype, device=t.device).copy_(t),
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
}


def results(
    module: nn.Module, case: Case, tensors: dict[str, Tensor | None], hook: str | None, autocast: bool
) -> dict[str, Tensor | None]:
    """Output, gradients (second ones too, where they are asked for) and buffers, by name."""
    leaves = {k: None if t is None else t.detach().requires_grad_(k in case.wanted) for k, t in tensors.items()}
    module.requires_grad_("parameters" in case.wanted)
    x, residual, dy = leaves["x"], leaves["residual"], tensors["dy"]
    context = saved_tensors_hooks(lambda t: t, HOOKS[hook]) if hook else contextlib.nullcontext()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast), context:
        y = module(x, residual, case.activation)
    inputs = {k: t for k, t in leaves.items() if t is not None and k != "dy" and t.requires_grad}
    inputs |= {k: p for k, p in module.named_parameters() if p.requires_grad}
    found = {"y": y.detach()}
    if inputs and y.requires_grad:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast and case.twice):
            gradients = torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype), create_graph=case.twice)
        found |= {f"d{k}": g.detach() for k, g in zip(inputs, gradients, strict=True)}
        if case.twice and any(g.requires_grad for g in gradients):
            total = sum(g.square().sum() for g in gradients)
            second = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
            found |= {f"dd{k}": g for k, g in zip(inputs, second, strict=True)}
    return found | {k: b.double() for k, b in module.named_buffers()}


def kinds(t: Tensor) -> Tensor:
    return torch.where(t.isnan(), 3, torch.where(t.isinf(), 2, 0))


def wrong(case: Case, seed: int) -> str | None:
    """What is wrong with a case; None where nothing is."""
    torch.manual_seed(seed)
    random.seed(seed)
    dtype, parameter_dtype = DTYPES[case.dtype], DTYPES[case.parameter_dtype]
    fused, eager = (m.to(parameter_dtype).train(case.training) for m in pair(case.build, DEVICE))
    oracle = copy.deepcopy(eager).double()
    if parameter_dtype == torch.float64:
        eager.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if case.columns:
        to_columns(fused)
    tensors = {"x": tensor(case.shape, dtype, case.strides["x"]), "dy": tensor(case.shape, dtype, case.strides["dy"])}
    residual = None
    if case.residual_dtype:
        residual = tensor(case.shape, DTYPES[case.residual_dtype], case.strides["residual"])
    tensors["residual"] = residual
    if case.planted:
        name, value = case.planted
        if tensors[name] is not None:
            tensors[name] = tensors[name].contiguous().clone()
            for _ in range(2):
                tensors[name][tuple(random.randrange(size) for size in case.shape)] = value
    got = results(fused, case, tensors, case.hook, case.autocast)
    if case.columns and not neighbours(fused):
        return "a neighbour in memory was written to"
    doubles = {k: None if t is None else t.double() for k, t in tensors.items()}
    if case.planted:
        want = results(eager, case, tensors, None, False)
        return "; ".join(k for k in want if "conv.weight" not in k and not same_kinds(got[k], want[k])) or None
    exact = results(oracle, case, doubles, None, False)
    want = exact if dtype == torch.float64 else results(eager, case, tensors, None, False)
    return "; ".join(differences(case, got, want, exact)) or None


def same_kinds(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and torch.equal(kinds(got), kinds(want))


def differences(case: Case, got: dict, want: dict, exact: dict):
    """What differs by more than it may."""
    # What cancels has no size of its own.
    largest = {
        order: max(
            (
                t.abs().nan_to_num(posinf=0).max().item()
                for k, t in exact.items()
                if t is not None and k.startswith(order)
            ),
            default=0,
        )
        for order in ("dd", "d")
    }
    for name, e in exact.items():
        g, t = got.get(name), want[name]
        if e is None or g is None:
            other = g if e is None else e
            if other is not None and other.abs().max() > 0:
                yield f"{name}: None in one"
            continue
        finite = e.isfinite()
        if case.dtype == "fp64" and not same_kinds(g, e):
            yield f"{name}: not finite at other places"
            continue
        e, g, t = e[finite], g[finite], t[finite]
        if not e.numel():
            continue
        scale = max(e.abs().max().item(), 1e-2 * largest.get("dd" if name.startswith("dd") else "d", 0), 1e-6)
        if e.numel() <= 256 and case.dtype != "fp64":
            scale *= 8  # few numbers may all round luckily in eager
        if case.dtype == "fp64":
            error = ((g.double() - e).abs().max() / scale).item()
            limit = 1e-6 if name.startswith("dd") or case.module == "BAM" else 1e-8
            if case.parameter_dtype != "fp64" and "d" in name:
                limit = 1e-2  # second gradients go through rounded ones
            is_buffer = name != "y" and not name.startswith("d")
            limit = max(limit, 2 * torch.finfo(DTYPES[case.parameter_dtype] if is_buffer else g.dtype).eps)
            if not error <= limit:
                yield f"{name}: {error:.1e} of {scale:.1e}"
        elif name.startswith("d") or name == "y":
            verdict = compare(g.to(t.dtype), t, e, scale=scale)
            # BatchNorm over few samples multiplies the errors of BAM's branches, eager's as well: a matter of luck.
            if not verdict.used <= SLACK * (25 if case.module == "BAM" else 1):
                yield f"{name}: {verdict.used:.1f} of what is allowed, error {verdict.error:.1e}"


def relu6_of_scalars(x: Tensor) -> Tensor:
    """Hard sigmoid whose gradient at NaN does not depend on how many numbers the CPU takes at once."""
    return torch.where(x + 3 >= 6, 6.0, torch.relu(x + 3)) / 6


def under(case: Case, call: Callable[[], str | None]) -> str | None:
    """The call with the case's launch configuration."""
    launch = case.launch
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(tiling, "TILE", launch["TILE"]))
        stack.enter_context(patch.object(convolution, "PROGRAMS", 3 if launch["TILE"] == 512 else convolution.PROGRAMS))
        stack.enter_context(patch.object(gpu, "multiprocessors", lambda x: launch["multiprocessors"]))
        stack.enter_context(patch.object(gpu, "SINGLE_LAUNCH", launch["single"]))
        stack.enter_context(patch.dict(GATES, hardsigmoid=relu6_of_scalars))
        for function in CACHED:
            function.cache_clear()
            stack.callback(function.cache_clear)
        return call()


def run(minutes: float, seed: int, cases: int | None = None) -> tuple[Counter, list[str]]:
    """How many cases of each module were drawn, and what was wrong."""
    end, counts, faults = time.monotonic() + 60 * minutes, Counter(), []
    for s in itertools.count(seed) if cases is None else range(seed, seed + cases):
        if time.monotonic() > end:
            break
        case = draw(s)
        counts[case.module] += 1
        try:
            message = under(case, lambda case=case, s=s: wrong(case, s))
        except Exception as error:  # of whatever kind: the other cases are still to come
            message = f"{type(error).__name__}: {error}"[:300]
            if "more than 1 value per channel" in message:
                message = None  # the reference refuses it as well
        if message:
            faults.append(f"seed {s}: {message}\n  {case}")
            print(f"WRONG: {faults[-1]}", flush=True)
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    minutes = arguments.minutes if arguments.cases is None else float("inf")
    if DEVICE.type == "cpu":
        round_to_nearest()
        skip_repeated_work()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts, faults = run(minutes, arguments.seed, arguments.cases)
    print(", ".join(f"{count} {name}" for name, count in counts.most_common()))
    print(f"{len(faults)} wrong of {counts.total()}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
