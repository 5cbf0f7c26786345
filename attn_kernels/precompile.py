"""Compile a model's kernels before its first step, in parallel processes, into Triton's cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from attn_kernels import functional

if TYPE_CHECKING:  # what follows needs Triton, and this package can be imported without it
    from attn_kernels._recording import Specialization


@dataclass(frozen=True)
class Precompiled:
    """What ``precompile`` did; ``str()`` says it in words.

    Attributes:
        kernels: how many the model launches, each counted once.
        compiled: how many of them were not in Triton's cache yet.
        seconds: the time that all of it took.
        cpu_seconds: the compiler's CPU time, which the first step would have spent one kernel after another.
    """

    kernels: int
    compiled: int
    seconds: float
    cpu_seconds: float

    def __str__(self) -> str:
        if not self.kernels:
            return "The model launches no kernel of attn_kernels: attn_kernels.explain says of a module why."
        compiled = f"{self.compiled} of them compiled now, in {self.cpu_seconds:.0f} CPU seconds"
        return f"{self.kernels} kernels, {compiled}; {self.seconds:.1f} s in all"


def precompile(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backward: bool = True,
    capability: tuple[int, int] | None = None,
    multiprocessors: int | None = None,
    jobs: int | None = None,
    progress: bool = True,
) -> Precompiled:
    """Compile what a training step and an inference of ``model`` launch, in parallel, into Triton's cache.

    Triton compiles a kernel when it is launched first, one after another: in a CBAM-ResNet-50 32 of them, of about a
    CPU second each. After this call the first step finds them in the cache, and so does every later process with the
    same ``TRITON_CACHE_DIR``, which this call sets to Triton's own where it is not set: torch.compile would choose
    another. Call it in the mode (``model.train()``) and under the autocast of the step. The model runs on fake tensors,
    which have no data: no memory is used, nothing is launched, and neither parameters nor buffers change. Kernels of
    others, torch.compile's for instance, are not compiled.

    Args:
        model: called as ``model(x)``, on the GPU or wherever it is, a compiled one too.
        input_shape: of ``x``, (N, C, H, W) as a rule, with the batch of the step: another batch or map may launch other
            kernels.
        dtype: of ``x``; that of the model's first parameter by default, and float32 without one.
        memory_format: of ``x``; by default channels_last if a parameter of the model is.
        backward: False compiles for inference alone.
        capability: compute capability to compile for, (9, 0) for an H100; by default that of the GPU. To be given where
            there is none, when an image is built for instance; autocast is ``torch.autocast("cpu", ...)`` there.
        multiprocessors: of that GPU, 132 for an H100 SXM: tiles depend on it. By default that of the GPU.
        jobs: processes; by default one per CPU that this process may use.
        progress: a bar on stderr, where ``rich`` is installed.

    Returns:
        How many kernels there are, how many were not in the cache, and the time that this took.

    Raises:
        TypeError, ValueError: an argument is not as described, or there is no GPU and no ``capability``.
        RuntimeError: nothing can be compiled here (no Triton, ``ATTN_KERNELS_DISABLE``, ``TRITON_INTERPRET``), or a
            kernel failed to compile: all others are in the cache then.
    """
    start = time.monotonic()
    _check(model, input_shape, capability, jobs)
    if reason := _why_not():
        raise RuntimeError(f"precompile cannot compile here: {reason}")
    import triton

    from attn_kernels._compiler import compile_all

    os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.dir)
    capability, multiprocessors = _gpu(model, capability, multiprocessors)
    kernels = specializations(model, input_shape, dtype, memory_format, backward, capability, multiprocessors)
    outcomes = []
    with _bar(len(kernels), progress and bool(kernels)) as advance:
        for kernel, outcome in compile_all(kernels, capability, jobs):
            outcomes.append((kernel.kernel, outcome))
            advance()
    errors = [f"{name}: {outcome.error}" for name, outcome in outcomes if outcome.error]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(kernels)} kernels failed to compile: {'; '.join(errors)}")
    compiled = [outcome.cpu_seconds for _, outcome in outcomes if outcome.compiled]
    return Precompiled(len(kernels), len(compiled), time.monotonic() - start, sum(compiled))


def _check(model: object, input_shape: object, capability: object, jobs: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(input_shape, Sequence) or not all(isinstance(n, int) for n in input_shape):
        raise TypeError(f"input_shape: expected a sequence of integers, got {input_shape!r}")
    if not input_shape or min(input_shape) < 1:
        raise ValueError(f"input_shape: expected positive integers, got {tuple(input_shape)}")
    pair = isinstance(capability, tuple) and [type(n) for n in capability] == [int, int]
    if capability is not None and not pair:
        raise TypeError(f"capability: expected a pair of integers, (9, 0) for an H100, or None, got {capability!r}")
    if jobs is not None and (not isinstance(jobs, int) or jobs < 1):
        raise ValueError(f"jobs: expected a positive integer or None, got {jobs!r}")


def _why_not() -> str:
    """Why nothing can be compiled, whatever the model."""
    if not functional.devices():
        return functional._NO_DEVICE
    if "cpu" in functional.devices():
        return "TRITON_INTERPRET is set, and an interpreter compiles nothing"
    return ""


def _gpu(model: nn.Module, capability: tuple[int, int] | None, multiprocessors: int | None) -> tuple[int, int]:
    """The capability to compile for, 90 for 9.0, and the multiprocessors; those not given are of the model's GPU."""
    if capability is None or multiprocessors is None:
        if not torch.cuda.is_available():
            name, example = ("capability", "(9, 0)") if capability is None else ("multiprocessors", "132")
            raise ValueError(f"{name}: expected it to be given, since there is no GPU here; {example} for an H100")
        devices = [p.device for p in model.parameters() if p.is_cuda]
        gpu = torch.cuda.get_device_properties(devices[0] if devices else None)
        capability = capability or (gpu.major, gpu.minor)
        multiprocessors = multiprocessors or gpu.multi_processor_count
    major, minor = capability
    return 10 * major + minor, multiprocessors


def specializations(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
    backward: bool,
    capability: int,
    multiprocessors: int,
) -> list[Specialization]:
    """The kernels that ``model`` launches, each once; the last first, for backward's take longest to compile."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from attn_kernels._recording import launching_without_data, specializing

    found: dict[Specialization, None] = {}
    model = getattr(model, "_orig_mod", model)  # torch.compile would trace a model of fake tensors
    first = next(model.parameters(), None)
    dtype = dtype or (torch.float32 if first is None else first.dtype)
    memory_format = memory_format or _memory_format(model)
    device = torch.device("cpu") if first is None or first.is_meta else first.device
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        launching_without_data(multiprocessors),
        specializing(capability, lambda kernel, _: found.setdefault(kernel)),
        torch.autograd.set_multithreading_enabled(False),  # launches are recorded in this thread
        _autocast(device),
    ):
        # Parameters and buffers too: else what a module does to a buffer of its own would really be done to it.
        state = {name: _fake(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
        x = torch.empty(input_shape, dtype=dtype, device=device)
        x = x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
        if backward:
            wanted = not any(p.requires_grad for p in model.parameters()) and x.is_floating_point()
            prefixed = {f"model.{name}": t for name, t in state.items()}
            torch.func.functional_call(_Step(model), prefixed, (x.requires_grad_(wanted),))
        with _in_evaluation(model), torch.no_grad():
            torch.func.functional_call(model, state, (x,))
    return list(found)[::-1]


def _autocast(device: torch.device) -> AbstractContextManager:
    """The GPU's autocast for a model on the CPU that will run on the GPU."""
    if device.type == "cpu" and torch.is_autocast_enabled("cuda"):
        return torch.autocast("cpu", torch.get_autocast_dtype("cuda"))
    return nullcontext()


class _Step(nn.Module):
    """The forward and backward pass of a training step, whatever the model returns."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> None:
        with torch.enable_grad():
            outputs = [y for y in tree_leaves(self.model(x)) if isinstance(y, Tensor) and y.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def _memory_format(model: nn.Module) -> torch.memory_format:
    """channels_last where ``model.to(memory_format=torch.channels_last)`` made it so."""
    maps = (p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous())
    found = any(p.is_contiguous(memory_format=torch.channels_last) for p in maps)
    return torch.channels_last if found else torch.contiguous_format


def _fake(t: Tensor) -> Tensor:
    device = "cpu" if t.is_meta else t.device
    fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    return fake.requires_grad_(t.requires_grad)


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """As ``model.eval()``, but without what a module's own ``train()`` might do to its parameters."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], object]]:
    """A progress bar, as a function that counts one kernel more."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        shown = False
    if not shown:
        yield lambda: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("attn_kernels compiles", total=total)
        yield lambda: progress.advance(task)
