"""``python -m attn_kernels`` says what runs on this machine and why not, and checks each module against the reference.

It exits with status 1 if a module disagrees, or if it cannot find out what runs. A probe that fails spoils its own line
only.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

import attn_kernels
import reference
from attn_kernels import functional
from reference._common import DTYPES
from reference.catalogue import LAYOUTS, OPERATORS

CHANNELS = 16
# The allowed error, relative to the greatest value. Sums of a thousand numbers in float32 are off by 1e-6, and a wrong
# formula by 1e-2 or more.
TOLERANCE = 1e-4
OK, FAILED = "ok", "FAILED"


def answer(probe: Callable[..., str], *args: object) -> str:
    """What the probe says, or what it raises. Every line that this command prints comes from here."""
    try:
        return probe(*args)
    except Exception as error:  # of any kind: the other lines are still to come
        return f"{FAILED}, {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def environment() -> dict[str, str]:
    """What decides whether kernels run here."""
    probes = {
        "attn_kernels": lambda: attn_kernels.__version__,
        "Python": platform.python_version,
        "PyTorch": lambda: torch.__version__,
        "Triton": partial(_version, "triton"),
        "numpy": partial(_version, "numpy"),
        "driver": _driver,
        "GPUs": lambda: str(torch.cuda.device_count()),
    }
    facts = {name: answer(probe) for name, probe in probes.items()}
    for i in range(int(facts["GPUs"]) if facts["GPUs"].isdecimal() else 0):
        facts[f"GPU {i}"] = answer(_gpu, i)
    for variable in ("TRITON_INTERPRET", "ATTN_KERNELS_DISABLE", "ATTN_KERNELS_SINGLE_LAUNCH"):
        facts[variable] = os.environ.get(variable, "not set")
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    memory = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors"
    return f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {memory}"


def _driver() -> str:
    """The newest CUDA that the driver knows, asked of the driver itself: PyTorch has no public function for it."""
    built_for = f"PyTorch is built {f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return f"none found ({built_for})"
    number = ctypes.c_int()
    if status := driver.cuDriverGetVersion(ctypes.byref(number)):
        return f"error {status} ({built_for})"
    return f"CUDA {number.value // 1000}.{number.value % 1000 // 10} ({built_for})"


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


def why_not() -> str:
    """Why no module takes the fused path here, whatever its input; empty where they do."""
    return "; ".join(functional.why_not(torch.zeros(1, 1, 1, 1, device=device())))


def path(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> str:
    """Whether the named module takes the fused path in this dtype and layout."""
    module = build(attn_kernels, name).to(device())
    x = torch.zeros(2, CHANNELS, 4, 4, device=device(), dtype=dtype).contiguous(memory_format=memory_format)
    return "fused" if attn_kernels.explain(module, x).fused else "reference"


def paths() -> list[tuple[str, ...]]:
    """A row per module and layout: which dtypes take the fused path."""
    rows = [("module", "layout", *(str(dtype).removeprefix("torch.") for dtype in DTYPES))]
    for name in OPERATORS:
        for layout, memory_format in LAYOUTS.items():
            rows.append((name, layout, *(answer(path, name, dtype, memory_format) for dtype in DTYPES)))
    return rows


def error(name: str) -> float:
    """The greatest error of output and gradients in float32, relative to the float64 reference's greatest value."""
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
    # A gradient that cancels to zero, as that of a bias before BatchNorm, has no scale of its own: all gradients share
    # one.
    together = [[r[0].flatten(), torch.cat([g.flatten() for g in r[1:]])] for r in (got, want)]
    errors = [(g - w).abs().max() / w.abs().max() for g, w in zip(*together, strict=True)]
    return max(e.item() if e.isfinite() else float("inf") for e in errors)


def _results(module: nn.Module, x: Tensor, residual: Tensor, dy: Tensor) -> list[Tensor]:
    inputs = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    y = module(*inputs, "relu")
    return [y.detach(), *torch.autograd.grad(y, [*inputs, *module.parameters()], dy)]


def verdict(name: str) -> str:
    """Whether the named module agrees with the reference."""
    found = error(name)
    return f"{OK if found <= TOLERANCE else 'WRONG'}, error {found:.1e} of {TOLERANCE:.0e}"


def self_check() -> bool:
    """Print a line per module, forward and backward; return whether all agree with the reference."""
    print(f"Self-check on {device()}: float32, forward and backward, against the reference in float64")
    agree = True
    for name in (*OPERATORS, "channel_attention"):
        found = answer(verdict, name)
        print(f"  {name:<17} {found}", flush=True)
        agree &= found.startswith(OK)
    return agree


def main() -> int:
    for name, fact in environment().items():
        print(f"{name:<26} {fact}")
    print()
    reasons = answer(why_not)
    if reasons.startswith(FAILED):
        print(f"What runs here cannot be told: {reasons}")
        return 1
    if reasons:
        print(f"Every module runs the reference formula here: {reasons}.")
        return 0
    print(f"What a call runs on {device()}")
    for module, layout, *cells in paths():
        print(f"  {module:<12} {layout:<14}" + " ".join(cell.ljust(9) for cell in cells).rstrip())
    print()
    return 0 if self_check() else 1


if __name__ == "__main__":
    sys.exit(main())
