"""Whole training steps and inference of ResNet-50 with each attention on an NVIDIA GPU: images/s, memory and the tax.

The attention tax is the time that attention adds to a step of plain ResNet-50, computed in the same way: eagerly or by
torch.compile. Networks of timm and torchvision are measured as they come (reference) and after ``fuse_`` (fused).
Images are synthetic. bf16 is channels_last under autocast, fp32 contiguous with TF32 convolutions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import nn

import reference.models
from benchmarks import runner, timing
from benchmarks.device import prepare
from benchmarks.plan import Cell
from benchmarks.rows import Measurement, Results
from benchmarks.shapes import LAYOUTS
from benchmarks.timing import Quantiles

SUITE = "train"
DEPTH = 50
CLASSES = 1000
ATTENTIONS = ("se", "cbam", "bam", "simam")
PLAIN = f"resnet{DEPTH}"
PEERS = (
    "timm/seresnet50",
    "timm/efficientnet_b0",
    "timm/mobilenetv3_large_100",
    "timm/regnety_032",
    "torchvision/efficientnet_b0",
)
# How a network is computed, how much less telling than the rest that is, and the seconds that it takes at first.
PROVIDERS = {"reference": (0, 8), "fused": (0, 12), "compile": (2, 100), "fused_compile": (2, 100)}
FUSED = ("fused", "fused_compile")
COMPILED = ("compile", "fused_compile")
PLAIN_PROVIDER = {"reference": "reference", "fused": "reference", "compile": "compile", "fused_compile": "compile"}
PRIORS = {(SUITE, provider): seconds for provider, (_, seconds) in PROVIDERS.items()}
MODES = {"train": 0, "inference": 1}
SETTINGS = {"bf16": ("channels_last", 0), "fp32": ("contiguous", 3)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runner.add_arguments(parser, "train --minutes 20 --attentions se cbam")
    parser.add_argument(
        "--attentions", nargs="+", choices=ATTENTIONS, default=ATTENTIONS, metavar="NAME", help=", ".join(ATTENTIONS)
    )
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=PEERS, metavar="NAME", help=f"and these: {', '.join(PEERS)}"
    )
    parser.add_argument("--batch", type=int, default=128, help="images a step (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    plan = partial(cells, arguments.attentions, arguments.batch, arguments.image_size, arguments.peers)
    return runner.run(plan, {SUITE: measure}, PRIORS, arguments)


def cells(
    attentions: Iterable[str] = ATTENTIONS, batch: int = 128, image_size: int = 224, peers: Iterable[str] = PEERS
) -> list[Cell]:
    """Every cell, the plain network first: the tax of the others is above it."""
    networks = [(PLAIN, None), *((f"{attention}_{PLAIN}", attention) for attention in attentions)]
    networks += [(peer, "se") for peer in peers]
    shape, found = (batch, 3, image_size, image_size), []
    for dtype, (layout, dtype_rank) in SETTINGS.items():
        for mode, mode_rank in MODES.items():
            for network, attention in networks:
                for provider, (provider_rank, _) in PROVIDERS.items():
                    if attention is None and provider in FUSED:
                        continue
                    rank = dtype_rank + mode_rank + provider_rank + (network in PEERS)
                    fused = attention if provider in FUSED else None
                    found.append(Cell(SUITE, network, provider, shape, layout, dtype, (mode,), rank, fused))
    return found


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
    plain = results.find((PLAIN, PLAIN_PROVIDER[cell.provider], *cell.place[2:]), mode, "time")
    if plain is not None and cell.kernel not in (PLAIN, *PEERS):
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
    if cell.kernel in PEERS:
        library, name = cell.kernel.split("/")
        if library == "timm":
            network = import_module("timm").create_model(name)
        else:
            network = import_module("torchvision.models").get_model(name, weights=None)
        if cell.fused:
            from attn_kernels import fuse_  # here, for prepare() has to come before

            fuse_(network)
        return network
    attention = None if cell.kernel == PLAIN else cell.kernel.removesuffix(f"_{PLAIN}")
    if cell.fused:
        import attn_kernels.models as kit  # here, for prepare() has to come before
    else:
        kit = reference.models
    return kit.resnet(DEPTH, attention, CLASSES)
