"""``python -m attn_kernels``: what runs on this machine and why not, and a check of each module against the reference.

Exits with status 1 if a module disagrees.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

import attn_kernels
import reference
from attn_kernels import functional
from reference._common import DTYPES

CHANNELS = 16
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NAMES = ("SE", "ChannelGate", "SpatialGate", "CBAM", "BAM", "SimAM")
# Of the greatest value: float32 with sums of a thousand numbers leaves 1e-6 of it, a wrong formula 1e-2 and more.
TOLERANCE = 1e-4


def environment() -> dict[str, str]:
    """What decides whether kernels run here."""
    facts = {
        "attn_kernels": attn_kernels.__version__,
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "Triton": _version("triton"),
        "driver": _driver(),
    }
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors"
        facts[f"GPU {i}"] = f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {memory}"
    if not torch.cuda.device_count():
        facts["GPU"] = "none"
    facts["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", "not set")
    facts["ATTN_KERNELS_DISABLE"] = os.environ.get("ATTN_KERNELS_DISABLE", "not set")
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    if torch.version.cuda is None:
        return "not asked: this PyTorch is built without CUDA"
    try:
        driver = torch._C._cuda_getDriverVersion()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    if driver == 0:
        return f"none found (PyTorch is built for CUDA {torch.version.cuda})"
    return f"CUDA {driver // 1000}.{driver % 1000 // 10} (PyTorch is built for CUDA {torch.version.cuda})"


def device() -> torch.device:
    """Where the check runs: on the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ChannelAttention(nn.Module):
    """``channel_attention``, of which there is no module, with one layer for a gate."""

    def __init__(self, kit: object):
        super().__init__()
        self.function = getattr(kit, "functional", kit).channel_attention
        self.fc = nn.Linear(CHANNELS, CHANNELS)

    def gate(self, mean: Tensor, maximum: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(mean + maximum))

    def forward(self, x: Tensor, residual: Tensor, activation: str) -> Tensor:
        return self.function(x, self.gate, pool_types=("avg", "max"), residual=residual, activation=activation)


def build(kit: object, name: str) -> nn.Module:
    """The named module of ``attn_kernels`` or ``reference``, for CHANNELS channels."""
    if name == "channel_attention":
        return ChannelAttention(kit)
    return getattr(kit, name)(*(() if name == "SpatialGate" else (CHANNELS,)))


def paths() -> list[tuple[str, ...]]:
    """A row a module and layout: which dtypes take the fused path."""
    rows = [("module", "layout", *(str(dtype).removeprefix("torch.") for dtype in DTYPES))]
    for name in NAMES:
        module = build(attn_kernels, name).to(device())
        for layout, memory_format in LAYOUTS.items():
            x = torch.zeros(2, CHANNELS, 4, 4, device=device()).contiguous(memory_format=memory_format)
            explained = [attn_kernels.explain(module, x.to(dtype)) for dtype in DTYPES]
            rows.append((name, layout, *("fused" if e.fused else "reference" for e in explained)))
    return rows


def error(name: str) -> float:
    """The greatest error of output and gradients in float32 against the reference in float64, of the greatest value."""
    torch.manual_seed(0)
    exact = build(reference, name).to(device()).double()
    for p in exact.parameters():
        nn.init.normal_(p, std=0.3)
    fused = build(attn_kernels, name).to(device())
    fused.load_state_dict(exact.state_dict())
    x, residual, dy = torch.randn(3, 2, CHANNELS, 9, 7, device=device()).unbind()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got = _results(fused, x, residual, dy)
        want = _results(exact, x.double(), residual.double(), dy.double())
    # A gradient that cancels to nothing, as that of a bias before BatchNorm, has no scale of its own: theirs together.
    together = [[r[0].flatten(), torch.cat([g.flatten() for g in r[1:]])] for r in (got, want)]
    errors = [(g - w).abs().max() / w.abs().max() for g, w in zip(*together, strict=True)]
    return max(e.item() if e.isfinite() else float("inf") for e in errors)


def _results(module: nn.Module, x: Tensor, residual: Tensor, dy: Tensor) -> list[Tensor]:
    inputs = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    y = module(*inputs, "relu")
    return [y.detach(), *torch.autograd.grad(y, [*inputs, *module.parameters()], dy)]


def self_check() -> bool:
    """Print a line a module, forward and backward; return whether all agree with the reference."""
    print(f"Self-check on {device()}: float32, forward and backward, against the reference in float64")
    agree = True
    for name in (*NAMES, "channel_attention"):
        try:
            found = error(name)
            verdict = f"{'ok' if found <= TOLERANCE else 'WRONG'}, error {found:.1e} of {TOLERANCE:.0e}"
        except Exception as raised:  # of whatever kind: the other modules are still to be checked
            found, verdict = float("inf"), f"FAILED, {type(raised).__name__}: {str(raised).splitlines()[0]}"
        print(f"  {name:<17} {verdict}", flush=True)
        agree &= found <= TOLERANCE
    return agree


def main() -> int:
    for name, fact in environment().items():
        print(f"{name:<20} {fact}")
    print()
    if reasons := functional.why_not(torch.zeros(1, 1, 1, 1, device=device())):
        print(f"Every module runs the reference formula here: {'; '.join(reasons)}.")
        return 0
    print(f"What a call runs on {device()}")
    for module, layout, *cells in paths():
        print(f"  {module:<12} {layout:<14}" + "".join(cell.ljust(10) for cell in cells).rstrip())
    print()
    return 0 if self_check() else 1


if __name__ == "__main__":
    sys.exit(main())
