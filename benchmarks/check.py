"""Fused against reference on a photograph's feature maps: accuracy of every output and gradient, and the cost.

Each module runs forward and backward on the maps of a ResNet-50, in both memory layouts; then a whole network. On a GPU
the cost is device time. Without one the kernels run in Triton's interpreter on pieces of the maps, and the cost is the
bytes that they touch and the number of launches. Its baseline, eager, is the code that people run, in
``benchmarks.users``. The exit status is 1 if anything disagrees.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import reference
import reference.models
from benchmarks import users
from benchmarks.accuracy import Verdict, average, compare
from benchmarks.device import prepare
from benchmarks.meter import meter
from benchmarks.photo import MAPS, batch, feature_maps
from benchmarks.report import (
    Case,
    Cost,
    Finding,
    accuracy_table,
    conclusion,
    header,
    network_line,
    time_table,
    traffic_table,
)
from benchmarks.timing import device_time, input_sets
from reference.catalogue import LAYOUTS, WHOLE

MODULES = tuple(WHOLE)
NETWORK = "network"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPILOGUE_MAPS = ("stem", "stage2", "stage4")  # here with the end of a residual block: relu(attention(x) + residual)

IMAGE_SIZE = 224
GPU_BATCH = 32
INTERPRETER_BATCH = 3
# Of maps, parameters and gradients. In float32 few roundings may make the whole error, of which eager's is as often the
# small one; in the other dtypes it is that of what is stored, or eager's own, and one draw is enough.
DRAWS = {"float32": 4}
# Channels and side that the interpreter is given of each map: some ms per program is what it costs.
INTERPRETED = {"stem": (32, 12), "stage1": (48, 10), "stage2": (64, 8), "stage3": (96, 8), "stage4": (96, 7)}

FULL_SIZE = ("output", "grad x", "grad residual")
OUTPUT_GRADIENTS = 4  # from which the scale of a parameter's gradient is taken
NOTHING = 1e-9  # of a layer's weight's gradient: what rounding in float64 leaves of a sum that is 0
KINK = 1 / 16  # of the residual: several units in the last place of a bfloat16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join((*MODULES, NETWORK))
    parser.add_argument("what", nargs="*", type=_known, metavar="what", help=f"any of {names} (default: all)")
    parser.add_argument("--maps", nargs="+", choices=MAPS, default=MAPS, help="feature maps (default: all)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])


def _known(name: str) -> str:
    for known in (*MODULES, NETWORK):
        if name.lower() == known.lower():
            return known
    raise argparse.ArgumentTypeError(f"expected {', '.join(MODULES)} or {NETWORK}, got {name}")


def run(arguments: argparse.Namespace) -> int:
    what = arguments.what or [*MODULES, NETWORK]
    device = prepare()
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(header(device))
    modules = [module for module in MODULES if module in what]
    cases = [
        Case(*place, epilogue=place[1] in EPILOGUE_MAPS)
        for place in itertools.product(modules, arguments.maps, LAYOUTS, arguments.dtypes)
    ]
    findings: list[Finding] = []
    small: dict[tuple[str, str, str], dict[str, list[list[Sample]]]] = {}
    costs: dict[Case, Cost] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("feature maps", total=len(cases) + (NETWORK in what))
        size = GPU_BATCH if device.type == "cuda" else INTERPRETER_BATCH
        images = batch(size * max(draws(dtype) for dtype in arguments.dtypes), IMAGE_SIZE)
        maps = [feature_maps(part.to(device)) for part in images.split(size)]
        for case in cases:
            progress.update(task, description=f"{case.module} {case.map} {case.layout} {case.dtype}")
            samples, cost = measure(case, [draw[case.map] for draw in maps[: draws(case.dtype)]])
            for tensor in samples[0]:
                drawn = [draw[tensor] for draw in samples]
                if tensor in FULL_SIZE:
                    place = f"{case.map}, {case.layout}"
                    verdict = average(compare(*sample[:3]) for sample in drawn)
                    findings.append(Finding(case.module, tensor, case.dtype, place, verdict))
                else:
                    layer, _, kind = tensor.rpartition(".")
                    small.setdefault((case.module, layer, case.dtype), {}).setdefault(kind, []).append(drawn)
            if case.dtype == arguments.dtypes[-1]:
                costs[case] = cost
            progress.advance(task)
        for (module, layer, dtype), kinds in small.items():
            verdict = average(map(compare_small, zip(*itertools.chain(*kinds.values()), strict=True)))
            findings.append(Finding(module, f"{layer}.{' and '.join(kinds)}", dtype, "all maps", verdict))
        if NETWORK in what:
            progress.update(task, description="se_resnet_50")
            findings.append(Finding("se_resnet_50", "logits", "float32", "the photograph", compare_networks(device)))
            progress.advance(task)

    if cases:
        console.print(accuracy_table(findings, modules, arguments.dtypes))
        console.print(time_table(costs) if device.type == "cuda" else traffic_table(costs))
    if NETWORK in what:
        console.print(network_line(findings[-1].verdict), soft_wrap=True)
    console.print(conclusion(findings), soft_wrap=True)
    return 0 if all(finding.verdict.ok for finding in findings) else 1


Sample = tuple[Tensor, Tensor, Tensor, float]  # fused, eager, oracle, scale


def draws(dtype: str) -> int:
    return DRAWS.get(dtype, 1)


def measure(case: Case, feature_maps: Iterable[Tensor]) -> tuple[list[dict[str, Sample]], Cost]:
    """Run one case with the reference in float64, the eager reference and the fused module on each of some maps.

    The parameters and the output's gradient are other ones for each map; the cost is that of the last.
    """
    import attn_kernels  # here, for prepare() has to come before

    samples = []
    for seed, feature_map in enumerate(feature_maps):
        interpreted = feature_map.device.type == "cpu"
        if interpreted:
            feature_map = _piece(feature_map, *INTERPRETED[case.map])
        channels, device = feature_map.shape[1], feature_map.device
        torch.manual_seed(seed)
        eager = getattr(reference, case.module)(channels).to(device)
        fused = getattr(attn_kernels, case.module)(channels).to(device)
        fused.load_state_dict(eager.state_dict(), strict=True)
        oracle = copy.deepcopy(eager).double()
        x, residual, dy = inputs(case, feature_map, oracle, seed)

        exact = [t if t is None else t.double() for t in (x, residual, dy)]
        expected, scales = expect(oracle, *exact)
        count = meter if interpreted else nullcontext
        eager_results, _ = forward_backward(eager, x, residual, dy)
        fused_results, fused_traffic = forward_backward(fused, x, residual, dy, count)
        samples.append({t: (fused_results[t], eager_results[t], expected[t], scales[t]) for t in expected})
    modules = {"fused": fused}
    if users.is_available(case.module):
        baseline = getattr(users, case.module)(channels).to(x)
        modules["eager"] = users.AddReLU(baseline) if case.epilogue else baseline
    if not interpreted:
        return samples, Cost(tuple(x.shape), x.nbytes, {}, _device_times(modules, x, residual, dy))
    traffic = {"fused": fused_traffic}
    if "eager" in modules:
        traffic["eager"] = forward_backward(modules["eager"], x, residual, dy, count)[1]
    return samples, Cost(tuple(x.shape), x.nbytes, traffic, {})


def inputs(case: Case, feature_map: Tensor, oracle: nn.Module, seed: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """x, the residual if the case has one, and the gradient of the output."""
    layout = LAYOUTS[case.layout]
    x = feature_map.to(DTYPES[case.dtype]).contiguous(memory_format=layout)
    dy = torch.empty_like(x).normal_(generator=torch.Generator(x.device).manual_seed(1 + seed))
    if not case.epilogue:
        return x, None, dy
    # The identity of a stage's first block has both signs: another image's map about its mean.
    residual = (x.roll(1, 0) - x.mean()).contiguous(memory_format=layout)
    # At the ReLU's kink rounding decides whether a gradient passes, in eager too: no error bound would say anything.
    with torch.no_grad():
        total = copy.deepcopy(oracle)(x.double()) + residual
    return x, residual.where(total.abs() > KINK * residual.abs(), 0), dy


def forward_backward(
    module: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor, count: Callable = nullcontext
) -> tuple[dict[str, Tensor], tuple]:
    """The output, every gradient and the running statistics by name, and what ``count`` saw forward and backward."""
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    leaves = {"x": x, **({} if residual is None else {"residual": residual}), **dict(module.named_parameters())}
    with count() as forward:
        y = module(x) if residual is None else module(x, residual, "relu")
    with count() as backward:
        gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    results = {"output": y.detach(), **{f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}}
    results |= {name: b for name, b in module.named_buffers() if b.is_floating_point()}
    return results, (forward, backward)


def expect(
    oracle: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The results to expect, and how large each is as a rule.

    The sum that makes a parameter's gradient may cancel for one dy, when it is no scale for what rounding does to its
    terms: the largest of several dy is. Before BatchNorm a bias has no gradient at all: its layer's weight gives one.
    """
    draws = [forward_backward(copy.deepcopy(oracle), x, residual, dy.roll(i, 0))[0] for i in range(OUTPUT_GRADIENTS)]
    largest = {tensor: max(draw[tensor].abs().max().item() for draw in draws) for tensor in draws[0]}
    for tensor in largest:
        if tensor.endswith(".bias") and largest[tensor] < NOTHING * (weight := largest[f"{tensor[:-5]}.weight"]):
            largest[tensor] = weight
    return draws[0], largest


def compare_small(samples: Iterable[Sample]) -> Verdict:
    """Judge a layer's few elements in all cases at once: in one of them eager may be nearly exact by luck."""
    columns = [], [], []
    for *tensors, scale in samples:
        unit = 2.0 ** math.frexp(scale)[1]  # a power of 2, by which division is exact
        for column, tensor in zip(columns, tensors, strict=True):
            column.append(tensor.flatten() / unit)
    return compare(*map(torch.cat, columns), scale=1.0)


@torch.no_grad()
def compare_networks(device: torch.device) -> Verdict:
    """The logits of a whole SE-ResNet-50, the reference's weights in the fused network."""
    import attn_kernels.models  # here, for prepare() has to come before

    images = batch(1, 64).to(device) if device.type == "cpu" else batch(8, IMAGE_SIZE).to(device)
    torch.manual_seed(0)
    eager = reference.models.se_resnet_50().to(device).eval()
    fused = attn_kernels.models.se_resnet_50().to(device).eval()
    fused.load_state_dict(eager.state_dict(), strict=True)
    return compare(fused(images), eager(images), copy.deepcopy(eager).double()(images.double()))


def _piece(feature_map: Tensor, channels: int, side: int) -> Tensor:
    """The centre of the first channels."""
    top, left = (feature_map.shape[2] - side) // 2, (feature_map.shape[3] - side) // 2
    return feature_map[:, :channels, top : top + side, left : left + side]


def _device_times(modules: dict[str, nn.Module], x: Tensor, residual: Tensor | None, dy: Tensor) -> dict[str, float]:
    """Device seconds of one forward and backward pass."""
    tensors = (x, dy) if residual is None else (x, residual, dy)
    sets = [
        (x.clone(), None if residual is None else residual.clone(), dy.clone())
        for _ in range(input_sets(sum(t.nbytes for t in tensors)))
    ]
    torch.compiler.reset()
    if "eager" in modules:
        modules = {**modules, "compile": torch.compile(copy.deepcopy(modules["eager"]), dynamic=False)}
    return {
        name: device_time([partial(forward_backward, module, *s) for s in sets]) for name, module in modules.items()
    }
