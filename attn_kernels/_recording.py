"""What operators would launch, found out without a GPU and without data.

Inside ``launching_without_data`` meta tensors and PyTorch's fake tensors take the fused path, and every operator's
launcher runs on meta tensors. Inside ``specializing`` Triton's launcher stops where it would compile a kernel, and
reports that kernel. Neither disturbs another thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import RLock, get_ident
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map_only
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attn_kernels.ops.common import device as _device
from attn_kernels.ops.common.layout import is_channels_last
from attn_kernels.ops.common.operator import FakeTensor

_LAUNCHER = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_lock = RLock()  # held by the one thread that records or compiles


class Specialization(NamedTuple):
    """A kernel as Triton compiles it, for a set of arguments of the same types, divisibility and constants.

    The last four fields are the items of the dictionaries that Triton's ASTSource and compile() take.
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, object], ...]
    constants: tuple[tuple[tuple[int, ...], object], ...]
    attributes: tuple[tuple[tuple[int, ...], object], ...]
    options: tuple[tuple[str, object], ...]

    @classmethod
    def of(cls, module: str, kernel: str, compile: dict) -> Specialization:
        """The specialization in what Triton passes to its ``jit_cache_hook``."""
        (attributes,) = compile["configs"]
        options = json.loads(compile["specialization_data"])["options"]
        dicts = compile["signature"], compile["constants"], _as_tuples(attributes), _as_tuples(options)
        return cls(module, kernel, *(tuple(d.items()) for d in dicts))

    def source(self) -> ASTSource:
        """What Triton's compile() takes."""
        function = getattr(import_module(self.module), self.kernel)
        return ASTSource(function, dict(self.signature), dict(self.constants), as_attributes(self.attributes))


def as_attributes(items: Iterable[tuple[tuple[int, ...], object]]) -> dict[tuple[int, ...], list]:
    """Attributes as Triton takes them: lists of pairs, by the path of the argument."""
    return {path: [list(pair) for pair in pairs] for path, pairs in items}


def _as_tuples(value: object) -> object:
    """Lists of lists as tuples of tuples, which can be hashed; so are the values of a dictionary."""
    if isinstance(value, dict):
        return {key: _as_tuples(v) for key, v in value.items()}
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


@contextmanager
def launching_without_data(multiprocessors: int) -> Iterator[None]:
    """Inside the block modules launch on meta and fake tensors, as on a GPU of that size."""
    with _lock, _Launchers(), _device.assuming(multiprocessors):
        before, _device.recorded_thread = _device.recorded_thread, get_ident()
        try:
            yield
        finally:
            _device.recorded_thread = before


class _Launchers(TorchDispatchMode):
    """Runs operators' launchers. On meta tensors a launcher takes the place of the fake, on fake tensors both run."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "attn_kernels":
            y = func(*args, **kwargs)
            return _laid_out(y, *args[:2]) if func is torch.ops.aten.convolution.default else y
        if not tree_any(lambda t: isinstance(t, FakeTensor), args):
            return func.redispatch(_LAUNCHER, *args, **kwargs)
        with torch._C._DisableTorchDispatch():
            func.redispatch(_LAUNCHER, *tree_map_only(Tensor, _on_meta, args), **kwargs)
        return func(*args, **kwargs)


def _on_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _laid_out(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """A convolution's output as cuDNN lays it out, whatever computes it here (ATen/native/ConvUtils.h)."""
    channels_last = x.dtype != torch.float64 and any(t.dim() == 4 and is_channels_last(t) for t in (x, weight))
    return y.contiguous(memory_format=torch.channels_last) if channels_last else y


@contextmanager
def specializing(capability: int, heard: Callable[[Specialization, dict], None]) -> Iterator[None]:
    """Inside the block this thread's launches do nothing but report what they would compile for that capability.

    ``heard`` is called at every launch of this package's kernels, with what Triton says of the compilation too.
    """
    hook, thread = triton.knobs.runtime.jit_cache_hook, get_ident()

    def listen(*, fn, compile, **others) -> bool | None:
        if get_ident() != thread:
            return hook(fn=fn, compile=compile, **others) if hook else None
        if fn.module.startswith("attn_kernels."):
            heard(Specialization.of(fn.module, fn.name, compile), compile)
        return True  # do not compile

    with compiling_for(capability, "recording"):  # whose cache of kernels stays empty, so that every launch is heard
        triton.knobs.runtime.jit_cache_hook = listen
        try:
            yield
        finally:
            triton.knobs.runtime.jit_cache_hook = hook


@contextmanager
def compiling_for(capability: int, device: str = "compiling") -> Iterator[None]:
    """Inside the block this thread's launcher finds a GPU of that capability, for which it can compile but not run.

    Triton keeps what it has compiled by ``device``.
    """
    _device.settle_cache_keys()
    with _lock:
        # None where no driver was asked for yet: the machine's own is then found when it is.
        before = getattr(triton.runtime.driver, "_active", None)
        triton.runtime.driver.set_active(_Driver(capability, f"{device} for sm_{capability}"))
        try:
            yield
        finally:
            triton.runtime.driver.set_active(before)


class _Driver:
    """Answers what Triton's launcher asks of a driver before it compiles; other threads get the machine's own."""

    def __init__(self, capability: int, device: str):
        self._capability, self._device, self._thread = capability, device, get_ident()

    def get_current_device(self) -> object:
        return self._device if self._is_ours() else self._own().get_current_device()

    def get_current_stream(self, device: object) -> int:
        return 0 if self._is_ours() else self._own().get_current_stream(device)

    def get_current_target(self) -> GPUTarget:
        return target(self._capability) if self._is_ours() else self._own().get_current_target()

    def __getattr__(self, name: str) -> object:
        return getattr(self._own(), name)

    def _is_ours(self) -> bool:
        return get_ident() == self._thread

    def _own(self):
        return triton.runtime.driver.default


def target(capability: int) -> GPUTarget:
    """What Triton compiles for: 90 is compute capability 9.0."""
    return GPUTarget("cuda", capability, 32)
