"""Trains small networks on scikit-learn's digits twice, with reference and with fused attention: the curves coincide.

    pip install -e ".[dev]" && python examples/digits.py

Without a GPU the kernels run in Triton's interpreter, for a few steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.device import prepare

ATTENTIONS = ("SE", "CBAM", "BAM", "SimAM")
CHANNELS = 8
BATCH = 8
INTERPRETED_STEPS, STEPS = 20, 1000
OUT = Path(__file__).parents[1] / "docs" / "digits.png"


class Network(nn.Module):
    """Digits (N, 1, 8, 8) to 10 logits: a residual block with attention at its end, between two layers."""

    def __init__(self, kit: object, attention: str):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.conv = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS))
        self.attention = getattr(kit, attention)(CHANNELS)
        self.fc = nn.Linear(CHANNELS * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = self.attention(self.conv(x), x, "relu")
        return self.fc(F.max_pool2d(x, 2).flatten(1))


def digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 1,797 images, (N, 1, 8, 8) from 0 to 1, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target)
    return images.to(device), labels.to(device)


def train(kit: object, attention: str, steps: int, device: torch.device) -> list[float]:
    """The loss at each step; the same weights and batches for every ``kit``."""
    torch.manual_seed(0)
    network = Network(kit, attention).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    images, labels = digits(device)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,)).to(device)
        loss = F.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def curves(steps: int, device: torch.device) -> dict[str, tuple[list[float], list[float]]]:
    """The losses of each attention, by the reference and by the kernels."""
    import attn_kernels
    import reference

    found = {}
    for attention in ATTENTIONS:
        module, x = getattr(attn_kernels, attention)(CHANNELS).to(device), torch.zeros(BATCH, CHANNELS, 8, 8).to(device)
        print(attn_kernels.explain(module, x))
        found[attention] = tuple(train(kit, attention, steps, device) for kit in (reference, attn_kernels))
        print(f"  largest difference of the losses in {steps} steps: {difference(*found[attention]):.1e}", flush=True)
    return found


def difference(reference: list[float], fused: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(reference, fused, strict=True))


def draw(found: dict[str, tuple[list[float], list[float]]], where: str, out: Path) -> None:
    """Four panels, both curves in each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(12, 3), sharey=True, layout="constrained")
    for ax, (attention, (reference, fused)) in zip(axes, found.items(), strict=True):
        ax.plot(reference, color="#9aa5b1", linewidth=4, label="reference")
        ax.plot(fused, color="#2f6fb5", linewidth=1, label="fused")
        ax.set_title(f"{attention}\nlargest difference {difference(reference, fused):.0e}", fontsize=10)
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("cross entropy")
    axes[0].legend(frameon=False)
    figure.suptitle(f"Training on digits, float32, {where}", fontsize=11)
    figure.savefig(out, dpi=110)
    print(f"drawn: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help=f"{INTERPRETED_STEPS} in the interpreter, {STEPS} on a GPU")
    parser.add_argument("--out", type=Path, default=OUT, help="the picture (default: docs/digits.png)")
    arguments = parser.parse_args()

    device = prepare()
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = "kernels in Triton's interpreter"
        print("No GPU: the kernels run in Triton's interpreter, for a few steps.")
    steps = arguments.steps or (STEPS if device.type == "cuda" else INTERPRETED_STEPS)
    draw(curves(steps, device), where, arguments.out)


if __name__ == "__main__":
    main()
