"""Whole training steps and inference of networks with attention on an NVIDIA GPU: images/s, memory and the tax.

eager is ResNet-50 with the code that people run (``benchmarks.users``), or a network of timm or torchvision as it
comes; fused has this project's modules, those of timm and torchvision by ``fuse_``. The attention tax is the time that
attention adds to a step of the plain network computed in the same way, eagerly or by torch.compile. In the plain form
of a network of timm or torchvision each attention module is an identity. Images are synthetic. bf16 is channels_last
under autocast, fp32 contiguous with TF32 convolutions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import runner, timing, users
from benchmarks.device import prepare
from benchmarks.plan import Cell
from benchmarks.rows import Measurement, Results
from benchmarks.shapes import KERNELS
from benchmarks.timing import Quantiles
from benchmarks.users import library as import_library
from reference.catalogue import LAYOUTS

SUITE = "train"
DEPTH = 50
CLASSES = 1000
RESNET = f"resnet{DEPTH}"
ATTENTIONS = ("se", "cbam", "simam", "bam")
# Networks of other libraries, all with SE, and how much less telling than the rest each is.
PEERS = {
    "timm/efficientnet_b0": 0,
    "timm/seresnet50": 5,
    "timm/mobilenetv3_large_100": 5,
    "timm/regnety_032": 5,
    "torchvision/efficientnet_b0": 5,
}
PEERS_ATTENTION = {"SEModule", "SqueezeExcite", "SqueezeExcitation"}  # the names of its classes
NETWORKS = (*(f"{attention}_{RESNET}" for attention in ATTENTIONS), *PEERS)
PLAIN = "_plain"
# How a network is computed, how much less telling than the rest that is, and the seconds that it takes at first.
PROVIDERS = {"eager": (0, 6), "fused": (0, 8), "compile": (1, 100), "fused_compile": (1, 100)}
FUSED = ("fused", "fused_compile")
COMPILED = ("compile", "fused_compile")
PLAIN_PROVIDER = {"eager": "eager", "fused": "eager", "compile": "compile", "fused_compile": "compile"}
PRIORS = {(SUITE, provider): seconds for provider, (_, seconds) in PROVIDERS.items()}
BATCHES = (128,)
IMAGE_SIZE = 224
MODES = {"train": 0, "inference": 2}
SETTINGS = {"bf16": ("channels_last", 0), "fp32": ("contiguous", 10)}


def plain_of(network: str) -> str:
    """The same network without attention."""
    if network == RESNET or network.endswith(PLAIN):
        return network
    return f"{network}{PLAIN}" if network in PEERS else RESNET


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runner.add_arguments(parser, f"train --minutes 20 --networks se_{RESNET} timm/efficientnet_b0 --modes train")
    for name, choices in (
        ("networks", (RESNET, *NETWORKS)), ("providers", PROVIDERS), ("dtypes", SETTINGS), ("modes", MODES),
    ):  # fmt: skip
        parser.add_argument(
            f"--{name}", nargs="+", choices=choices, default=[*choices], metavar=name.upper(), help=", ".join(choices)
        )
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="images per step (default: 128)")
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE, help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    a = arguments
    plan = partial(cells, a.networks, a.providers, a.batches, a.dtypes, a.modes, a.image_size)
    return runner.run(plan, {SUITE: measure}, PRIORS, arguments)


def cells(
    networks: Iterable[str] = NETWORKS,
    providers: Iterable[str] = tuple(PROVIDERS),
    batches: Iterable[int] = BATCHES,
    dtypes: Iterable[str] = tuple(SETTINGS),
    modes: Iterable[str] = tuple(MODES),
    image_size: int = IMAGE_SIZE,
) -> list[Cell]:
    """Every cell that can be measured, and the plain networks first: the tax of the others is above them."""
    networks = dict.fromkeys(name for network in networks for name in (plain_of(network), network))
    plain_providers = dict.fromkeys(PLAIN_PROVIDER[provider] for provider in providers)
    found = []
    for dtype, mode, batch, network in product(dtypes, modes, batches, networks):
        layout, dtype_rank = SETTINGS[dtype]
        is_plain = plain_of(network) == network
        for provider in plain_providers if is_plain else providers:
            if not _exists(network, provider):
                continue
            provider_rank, _ = PROVIDERS[provider]
            rank = dtype_rank + MODES[mode] + provider_rank + PEERS.get(network.removesuffix(PLAIN), 0)
            fused = _attention(network) if provider in FUSED else None
            shape = batch, 3, image_size, image_size
            found.append(Cell(SUITE, network, provider, shape, layout, dtype, (mode,), rank, fused))
    return found


def _attention(network: str) -> str | None:
    """The kernel that a network's attention is; of the networks of other libraries SE."""
    if plain_of(network) == network:
        return None
    return "se" if network in PEERS else network.removesuffix(f"_{RESNET}")


def _exists(network: str, provider: str) -> bool:
    """Whether the libraries that a network comes from are installed."""
    library, _, name = network.partition("/")
    if name:
        return find_spec(library) is not None
    attention = _attention(network)
    return attention is None or provider in FUSED or users.is_available(KERNELS[attention].module)


def measure(cell: Cell, results: Results) -> Iterator[tuple[str, list[Measurement]]]:
    """Measure the one mode of a cell."""
    device = prepare()
    (mode,) = cell.modes
    others = torch.cuda.memory_allocated()
    with _tuned_convolutions():
        step = steps(cell, device)
        times = timing.step_times(step)
        peak = timing.peak_memory(step, others)  # with the network and the optimizer
    found = [
        Measurement("time", "ms", times.times(1e3)),
        Measurement("throughput", "images/s", times.under(cell.shape[0])),
        Measurement("peak_memory", "MiB", Quantiles.exactly(peak / 2**20)),
    ]
    name = plain_of(cell.kernel)
    plain = results.find((name, PLAIN_PROVIDER[cell.provider], *cell.place[2:]), mode, "time")
    if plain is not None and cell.kernel != name:
        found.append(Measurement("attention_tax", "ms", times.times(1e3).above(plain)))
    yield mode, found


@contextmanager
def _tuned_convolutions() -> Iterator[None]:
    """cuDNN as networks are trained: it measures its algorithms, and float32 convolutions may use TF32."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    cudnn.benchmark = cudnn.allow_tf32 = True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before


def steps(cell: Cell, device: torch.device) -> Callable[[], object]:
    """The function that makes one step."""
    network = build(cell).to(device, memory_format=LAYOUTS[cell.layout])
    batch, *image = cell.shape
    images = torch.randn(batch, *image, device=device).contiguous(memory_format=LAYOUTS[cell.layout])
    labels = torch.randint(CLASSES, (batch,), device=device)
    forward = torch.compile(network, dynamic=False) if cell.provider in COMPILED else network
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=cell.dtype == "bf16")
    if cell.modes == ("inference",):
        network.eval()

        @torch.no_grad()
        def infer() -> None:
            with autocast():
                forward(images)

        return infer
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def train() -> None:
        with autocast():
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def build(cell: Cell) -> nn.Module:
    """The network in training mode, not yet compiled."""
    torch.manual_seed(0)
    if "/" in cell.kernel:
        network = _peer(cell.kernel)
        if cell.fused:
            from attn_kernels import fuse_  # here, for prepare() has to come before

            fuse_(network)
        return network
    if cell.fused:
        import attn_kernels.models as kit  # here, for prepare() has to come before
    else:
        kit = users
    return kit.resnet(DEPTH, _attention(cell.kernel), CLASSES)


def _peer(network: str) -> nn.Module:
    """A network of timm or torchvision, or its plain form."""
    package, name = network.removesuffix(PLAIN).split("/")
    if package == "timm":
        found = import_library("timm").create_model(name)
    else:
        found = import_library("torchvision.models").get_model(name, weights=None)
    if network.endswith(PLAIN):
        attention = [path for path, module in found.named_modules() if type(module).__name__ in PEERS_ATTENTION]
        for path in attention:
            found.set_submodule(path, nn.Identity())
    return found
