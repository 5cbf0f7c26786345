"""Time, bandwidth and memory of every module on an NVIDIA GPU, beside the code that people run, and a copy.

eager is that code (``benchmarks.users``) with its parameters in x's dtype, compile and compile_max_autotune are the
same under torch.compile; reference is this project's plain PyTorch, with float32 statistics.
Device time is that of CUDA-graph replays over inputs that rotate past L2; host time is that until the call returns.
forward is that of training, which keeps what backward needs; backward is alone; both is one after the other. Bandwidth
counts the bytes that a module has to move at least, and its share is of what the fastest copy of as many bytes has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice, product

import torch
from torch import Tensor, nn

import reference
from benchmarks import runner, timing, users
from benchmarks.correctness import Wrong, check_roughly
from benchmarks.device import prepare
from benchmarks.plan import Cell
from benchmarks.rows import WRONG, Measurement, Results
from benchmarks.shapes import DTYPES, KERNELS, MODES, RESNET_50, bytes_of
from benchmarks.timing import Prepare, Quantiles
from reference.catalogue import LAYOUTS

SUITE = "speed"
# What is compared: how much less telling than the rest it is, and the seconds that a cell of it takes at first.
PROVIDERS = {
    "copy": (0, 2),
    "fused": (0, 8),
    "eager": (0, 3),
    "compile": (0, 7),
    "fused_compile": (4, 7),
    "reference": (6, 3),
    "compile_max_autotune": (100, 30),
}
FUSED = ("fused", "fused_compile")
USERS = ("eager", "compile", "compile_max_autotune")
COMPILE_MODES = {"compile": "default", "fused_compile": "default", "compile_max_autotune": "max-autotune-no-cudagraphs"}
PRIORS = {(SUITE, provider): seconds for provider, (_, seconds) in PROVIDERS.items()}

# The rank of a cell is the sum of these and its provider's.
BATCHES = {32: 0, 256: 2, 128: 4, 8: 6, 1: 6}
DTYPE_RANKS = {"bf16": 0, "fp32": 4}
LAYOUT_RANKS = {"channels_last": 0, "contiguous": 1}
OTHER_NETWORKS = 4
OTHER_BATCHES = (1, 32, 128)

CHECKED = 2**25  # elements of x: the float64 reference of a larger one does not fit every GPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runner.add_arguments(parser, "speed --minutes 20 --kernels se simam --batches 32")
    for name, choices in (
        ("kernels", KERNELS), ("providers", PROVIDERS), ("batches", BATCHES), ("layouts", LAYOUTS), ("dtypes", DTYPES),
    ):  # fmt: skip
        listed = ", ".join(map(str, choices))
        kind = int if name == "batches" else str
        parser.add_argument(
            f"--{name}", nargs="+", type=kind, choices=choices, default=[*choices], metavar=name.upper(), help=listed
        )
    parser.add_argument(
        "--sweep", action="store_true", help="the fused modules alone, with one option of one kernel's launch changed"
    )


def run(arguments: argparse.Namespace) -> int:
    a = arguments
    if a.sweep:
        from benchmarks import sweep  # here, for it needs this module

        return sweep.run(a)
    plan = partial(cells, a.kernels, a.providers, a.batches, a.layouts, a.dtypes)
    return runner.run(plan, {SUITE: measure}, PRIORS, arguments)


def cells(
    kernels: Iterable[str] = tuple(KERNELS),
    providers: Iterable[str] = tuple(PROVIDERS),
    batches: Iterable[int] = tuple(BATCHES),
    layouts: Iterable[str] = tuple(LAYOUTS),
    dtypes: Iterable[str] = tuple(DTYPES),
) -> list[Cell]:
    """Every cell that can be measured; those that are compared with each other follow one another."""
    stages = [
        (stage, kernel, channels, side)
        for kernel in kernels
        for stage, (channels, side, _) in enumerate(KERNELS[kernel].stages)
    ]
    stages.sort(key=lambda place: place[0])
    found = []
    for dtype, layout, batch, (_, kernel, channels, side) in product(dtypes, layouts, batches, stages):
        is_other = KERNELS[kernel].stages is not RESNET_50
        if is_other and batch not in OTHER_BATCHES:
            continue
        if kernel == "bam" and batch == 1:  # BatchNorm1d refuses a training batch of one
            continue
        rank = DTYPE_RANKS[dtype] + LAYOUT_RANKS[layout] + BATCHES[batch] + (OTHER_NETWORKS if is_other else 0)
        shape = batch, channels, side, side
        for provider in providers:
            if provider not in USERS or users.is_available(KERNELS[kernel].module):
                fused = kernel if provider in FUSED else None
                provider_rank, _ = PROVIDERS[provider]
                found.append(Cell(SUITE, kernel, provider, shape, layout, dtype, MODES, rank + provider_rank, fused))
    return found


def measure(cell: Cell, results: Results) -> Iterator[tuple[str, list[Measurement]]]:
    """Measure each mode in turn; the rows of a fused module that disagrees with the reference are marked."""
    from benchmarks.speed_of_light import copy_times  # here, for prepare() has to come before Triton is imported

    device = prepare()
    floors = KERNELS[cell.kernel].floors(bytes_of(cell.shape, cell.dtype))
    light = {mode: copy_times(floor, device) for mode, floor in floors.items()}
    if cell.provider == "copy":
        for mode in cell.modes:
            yield mode, list(_speed(light[mode], floors[mode], light[mode]))
        return
    plain = build(cell, device)
    module = plain
    if cell.provider in COMPILE_MODES:
        module = torch.compile(plain, mode=COMPILE_MODES[cell.provider], dynamic=False)
    operands, _ = first = inputs(cell, device, seed=0)
    count = timing.input_sets((len(operands) + 1) * bytes_of(cell.shape, cell.dtype))
    sets = [first, *(inputs(cell, device, seed) for seed in range(1, count))]
    if cell.fused and operands[0].numel() <= CHECKED:
        try:
            check(cell, module, plain, *first)
        except Wrong as error:
            results.mark(cell.place, f"{WRONG}: {error}")
    parameters = list(plain.parameters())
    function = partial(module, activation="relu") if KERNELS[cell.kernel].epilogue else module
    for mode, prepare_calls in calls(function, parameters, sets).items():
        times = timing.device_times(prepare_calls, count)
        found = [*_speed(times, floors[mode], light[mode])]
        found.append(Measurement("host_time", "us", timing.host_times(prepare_calls, count).times(1e6)))
        peak = timing.peak_memory(prepare_calls(1)[0])
        found.append(Measurement("peak_memory", "MiB", Quantiles.exactly(peak / 2**20)))
        if mode == "forward":
            saved = saved_bytes(prepare_calls(1)[0], [*operands, *parameters])
            found.append(Measurement("saved_memory", "MiB", Quantiles.exactly(saved / 2**20)))
        yield mode, found


def _speed(times: Quantiles, floor: int, light: Quantiles) -> Iterator[Measurement]:
    yield Measurement("time", "us", times.times(1e6))
    yield Measurement("bandwidth", "GB/s", times.under(floor / 1e9))
    yield Measurement("copy_share", "%", times.under(100 * light.p50))


def check(cell: Cell, module: nn.Module, plain: nn.Module, operands: Sequence[Tensor], dy: Tensor) -> None:
    x, *residual = operands
    expected = KERNELS[cell.kernel].build(reference, *cell.shape[1:3]).to(x.device)
    expected.load_state_dict(plain.state_dict())
    if residual:
        module, expected = (WithResidual(m, *residual) for m in (module, expected))
    check_roughly(module, expected, x, dy)


class WithResidual(nn.Module):
    """``relu(module(x) + residual)`` as a function of x alone."""

    def __init__(self, module: nn.Module, residual: Tensor):
        super().__init__()
        self.module = module
        self.register_buffer("residual", residual.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, self.residual, "relu")


def build(cell: Cell, device: torch.device) -> nn.Module:
    """The provider's module in training mode, not yet compiled."""
    torch.manual_seed(0)
    kernel, place = KERNELS[cell.kernel], {"device": device, "memory_format": LAYOUTS[cell.layout]}
    if cell.provider in USERS:
        module = kernel.build(users, *cell.shape[1:3])
        module = users.AddReLU(module) if kernel.epilogue else module
        return module.to(dtype=DTYPES[cell.dtype], **place)
    if cell.provider in FUSED:
        import attn_kernels as kit  # here, for prepare() has to come before
    else:
        kit = reference
    return kernel.build(kit, *cell.shape[1:3]).to(**place)


def inputs(cell: Cell, device: torch.device, seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """x as it is after a ReLU, with a residual where the kernel has one, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(mean: float = 0.0) -> Tensor:
        empty = torch.empty(cell.shape, dtype=DTYPES[cell.dtype], device=device, memory_format=LAYOUTS[cell.layout])
        return empty.normal_(mean, generator=generator)

    x = normal(0.25).relu_()
    operands = (x,)
    if KERNELS[cell.kernel].epilogue:
        residual = normal()
        # Far from the ReLU's kink, where rounding would decide whether a gradient passes.
        operands = x, residual.sub_(x * (residual < 0))
    for operand in operands:
        operand.requires_grad_()
    return operands, normal()


def calls(
    function: Callable[..., Tensor],
    parameters: Sequence[Tensor],
    sets: Sequence[tuple[tuple[Tensor, ...], Tensor]],
) -> dict[str, Prepare]:
    """For each mode a function that prepares so many calls, which go through the sets in turn."""

    def backward(operands: tuple[Tensor, ...], dy: Tensor) -> Callable[[], object]:
        return partial(torch.autograd.grad, function(*operands), [*operands, *parameters], dy)

    def both(operands: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
        y = function(*operands)
        return y.detach(), *torch.autograd.grad(y, [*operands, *parameters], dy)

    return {
        "forward": lambda count: [partial(function, *operands) for operands, _ in islice(cycle(sets), count)],
        "backward": lambda count: [backward(*inputs) for inputs in islice(cycle(sets), count)],
        "both": lambda count: [partial(both, *inputs) for inputs in islice(cycle(sets), count)],
    }


def saved_bytes(forward: Callable[[], Tensor], leaves: Iterable[Tensor]) -> int:
    """The bytes of memory that a forward call keeps for backward, beside its leaves'."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    for leaf in leaves:
        kept.pop(leaf.untyped_storage()._cdata, None)
    del y  # not before: it holds what was saved, so that no storage came twice
    return sum(kept.values())
