"""Time, bandwidth and memory of every module on an NVIDIA GPU, beside PyTorch, torch.compile and a copy.

Device time is that of CUDA-graph replays over inputs that rotate past L2; host time is that until the call returns.
forward is that of training, which keeps what backward needs; backward is alone; both is one after the other. Bandwidth
counts the bytes that a module has to move at least, and its share is of what the fastest copy of as many bytes has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice, product

import torch
from torch import Tensor, nn

import reference
from benchmarks import runner, timing
from benchmarks.correctness import Wrong, check_roughly
from benchmarks.device import prepare
from benchmarks.plan import Cell
from benchmarks.rows import WRONG, Measurement, Results
from benchmarks.shapes import DTYPES, KERNELS, LAYOUTS, MODES, RESNET_50, bytes_of
from benchmarks.timing import Prepare, Quantiles

SUITE = "speed"
# What is compared: how much less telling than the rest it is, and the seconds that a cell of it takes at first.
PROVIDERS = {
    "copy": (0, 2),
    "fused": (0, 8),
    "compile": (0, 15),
    "reference": (0, 3),
    "compile_max_autotune": (1, 30),
    "fused_compile": (1, 15),
    "timm": (2, 3),
    "torchvision": (2, 3),
    "official": (2, 3),
}
FUSED = ("fused", "fused_compile")
COMPILE_MODES = {"compile": "default", "fused_compile": "default", "compile_max_autotune": "max-autotune-no-cudagraphs"}
PRIORS = {(SUITE, provider): seconds for provider, (_, seconds) in PROVIDERS.items()}

# The rank of a cell is the sum of these and its provider's.
BATCHES = {32: 0, 128: 1, 8: 2, 1: 2, 256: 2}
DTYPE_RANKS = {"bf16": 0, "fp32": 2}
LAYOUT_RANKS = {"channels_last": 0, "contiguous": 1}
OTHER_NETWORKS = 2
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


def run(arguments: argparse.Namespace) -> int:
    a = arguments
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
    stages = sorted(
        (stage, kernel, channels, side)
        for kernel in kernels
        for stage, (channels, side, _) in enumerate(KERNELS[kernel].stages)
    )
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
            if _exists(provider, kernel):
                fused = kernel if provider in FUSED else None
                provider_rank, _ = PROVIDERS[provider]
                found.append(Cell(SUITE, kernel, provider, shape, layout, dtype, MODES, rank + provider_rank, fused))
    return found


def _exists(provider: str, kernel: str) -> bool:
    """Whether there is such a form of the kernel, and its library is installed."""
    if provider == "official":
        return kernel == "simam"
    if provider not in ("timm", "torchvision"):
        return True
    has = KERNELS[kernel].module == "SE" or (provider == "timm" and kernel == "cbam")
    return has and find_spec(provider) is not None


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
    count = timing.input_sets(2 * bytes_of(cell.shape, cell.dtype))
    sets = [inputs(cell, device, seed) for seed in range(count)]
    if cell.fused and sets[0][0].numel() <= CHECKED:
        try:
            _check(cell, module, plain, *sets[0])
        except Wrong as error:
            results.mark(cell.place, f"{WRONG}: {error}")
    parameters = list(plain.parameters())
    for mode, prepare_calls in calls(module, parameters, sets).items():
        times = timing.device_times(prepare_calls, count)
        found = [*_speed(times, floors[mode], light[mode])]
        found.append(Measurement("host_time", "us", timing.host_times(prepare_calls, count).times(1e6)))
        peak = timing.peak_memory(prepare_calls(1)[0])
        found.append(Measurement("peak_memory", "MiB", Quantiles.exactly(peak / 2**20)))
        if mode == "forward":
            saved = saved_bytes(prepare_calls(1)[0], [sets[0][0], *parameters])
            found.append(Measurement("saved_memory", "MiB", Quantiles.exactly(saved / 2**20)))
        yield mode, found


def _speed(times: Quantiles, floor: int, light: Quantiles) -> Iterator[Measurement]:
    yield Measurement("time", "us", times.times(1e6))
    yield Measurement("bandwidth", "GB/s", times.under(floor / 1e9))
    yield Measurement("copy_share", "%", times.under(100 * light.p50))


def _check(cell: Cell, module: nn.Module, plain: nn.Module, x: Tensor, dy: Tensor) -> None:
    eager = KERNELS[cell.kernel].build(reference, *cell.shape[1:3]).to(x.device)
    eager.load_state_dict(plain.state_dict())
    check_roughly(module, eager, x, dy)


def build(cell: Cell, device: torch.device) -> nn.Module:
    """The provider's module in training mode, not yet compiled."""
    torch.manual_seed(0)
    _, channels, side, _ = cell.shape
    kernel = KERNELS[cell.kernel]
    if cell.provider in ("timm", "torchvision"):
        # Their gate is computed in x's dtype, which their parameters need to have.
        return _LIBRARIES[cell.provider](cell.kernel, channels, side).to(device, DTYPES[cell.dtype])
    if cell.provider == "official":
        return OfficialSimAM()
    if cell.provider in FUSED:
        import attn_kernels as kit  # here, for prepare() has to come before
    else:
        kit = reference
    return kernel.build(kit, channels, side).to(device)


def _timm(name: str, channels: int, side: int) -> nn.Module:
    from timm.layers import SEModule
    from timm.layers.cbam import CbamModule

    if name == "cbam":
        return CbamModule(channels)
    activation, gate = _activations(name)
    return SEModule(channels, rd_channels=_hidden(name, channels, side), act_layer=activation, gate_layer=gate)


def _torchvision(name: str, channels: int, side: int) -> nn.Module:
    from torchvision.ops import SqueezeExcitation

    activation, gate = _activations(name)
    return SqueezeExcitation(channels, _hidden(name, channels, side), activation=activation, scale_activation=gate)


_LIBRARIES = {"timm": _timm, "torchvision": _torchvision}


def _hidden(name: str, channels: int, side: int) -> int:
    return KERNELS[name].build(reference, channels, side).fc1.out_features


def _activations(name: str) -> tuple[type[nn.Module], type[nn.Module]]:
    options = KERNELS[name].options
    activation = nn.SiLU if options.get("activation") == "silu" else nn.ReLU
    return activation, nn.Hardsigmoid if options.get("gate") == "hardsigmoid" else nn.Sigmoid


class OfficialSimAM(nn.Module):
    """SimAM as published: every step in x's dtype."""

    def forward(self, x: Tensor, e_lambda: float = 1e-4) -> Tensor:
        d = (x - x.mean(dim=(2, 3), keepdim=True)).pow(2)
        variance = d.sum(dim=(2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
        return x * torch.sigmoid(d / (4 * (variance + e_lambda)) + 0.5)


def inputs(cell: Cell, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """x, as it is after a ReLU, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(seed)
    x, dy = (
        torch.empty(cell.shape, dtype=DTYPES[cell.dtype], device=device, memory_format=LAYOUTS[cell.layout])
        for _ in range(2)
    )
    x.normal_(mean=0.25, generator=generator).relu_()
    return x.requires_grad_(), dy.normal_(generator=generator)


def calls(module: nn.Module, parameters: Sequence[Tensor], sets: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Prepare]:
    """For each mode a function that prepares so many calls, which go through the sets in turn."""

    def backward(x: Tensor, dy: Tensor) -> Callable[[], object]:
        return partial(torch.autograd.grad, module(x), [x, *parameters], dy)

    def both(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        y = module(x)
        return y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)

    return {
        "forward": lambda count: [partial(module, x) for x, _ in islice(cycle(sets), count)],
        "backward": lambda count: [backward(x, dy) for x, dy in islice(cycle(sets), count)],
        "both": lambda count: [partial(both, x, dy) for x, dy in islice(cycle(sets), count)],
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
