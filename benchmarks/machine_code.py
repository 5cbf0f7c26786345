"""The machine code of the kernels that modules launch, without a GPU.

Modules run on meta tensors, which have no memory: every launch is caught where Triton would compile it, with the
signature that Triton's own launcher makes of the arguments. What was caught is then compiled for any architecture, and
PTX and SASS are read by the tools that Triton's wheel carries.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

from torch import Tensor

from benchmarks.sass import Sass, Stretch, parse_sass, stretches

# Triton and attn_kernels are imported inside functions: kernels choose between interpreter and compiler at import.

VECTOR_BITS = 128


@dataclass(frozen=True)
class Architecture:
    """A compute capability's limits (CUDA programming guide, "Technical Specifications"), and a device that has it."""

    capability: int
    device: str
    multiprocessors: int
    warps: int  # that a multiprocessor holds
    programs: int  # likewise
    shared: int  # bytes of a multiprocessor
    shared_a_program: int  # bytes that a program may ask for

    @property
    def name(self) -> str:
        return f"sm_{self.capability}"

    def occupancy(self, registers: int, shared: int, warps: int) -> int:
        """Programs that a multiprocessor holds at once."""
        # Registers are dealt out to warps by 256, to each of four schedulers from a quarter of the file; 1 KB of shared
        # memory a program is the system's, and the rest is dealt out by 128 bytes.
        warps_by_registers = 4 * (65536 // 4 // (-(-registers * 32 // 256) * 256))
        shared_taken = -(-shared // 128) * 128 + 1024
        limits = self.programs, self.warps // warps, warps_by_registers // warps, self.shared // shared_taken
        return min(limits)


KB = 1024
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(80, "A100", 108, 64, 32, 164 * KB, 163 * KB),
        Architecture(89, "RTX 4090", 128, 48, 24, 100 * KB, 99 * KB),
        Architecture(90, "H100", 132, 64, 32, 228 * KB, 227 * KB),
        Architecture(100, "B200", 148, 64, 32, 228 * KB, 227 * KB),
        Architecture(120, "RTX 5090", 170, 48, 24, 100 * KB, 99 * KB),
    )
}


# The place of a kernel's argument: its number and, in a tuple, that within the tuple.
ArgumentPath = tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """What Triton compiles a launch to: equal for launches that run the same code."""

    module: str
    name: str
    signature: tuple[tuple[str, object], ...]
    constants: tuple[tuple[ArgumentPath, object], ...]
    attributes: tuple[tuple[ArgumentPath, object], ...]
    options: tuple[tuple[str, object], ...]

    def constant(self, name: str, field: str) -> object:
        """The value of a field of a constexpr argument; None where the kernel has no such argument."""
        names = [argument for argument, _ in self.signature]
        return getattr(dict(self.constants).get((names.index(name),)), field) if name in names else None

    def argument_name(self, path: ArgumentPath) -> str:
        """As in x_ptr, or in gradients.dx."""
        name, kind = self.signature[path[0]]
        return ".".join((name, *(kind._fields[i] for i in path[1:])))

    @property
    def arguments(self) -> dict[ArgumentPath, str]:
        """The types of the arguments that are passed, those in a tuple each, by their places."""
        kinds = leaves(tuple(kind for _, kind in self.signature))
        return {path: kind for path, kind in kinds if kind != "constexpr"}

    @property
    def is_fp64(self) -> bool:
        return "*fp64" in self.arguments.values()


def leaves(values: object, path: ArgumentPath = ()) -> Iterator[tuple[ArgumentPath, object]]:
    """Values of nested tuples, with their places."""
    if isinstance(values, tuple):
        for i, value in enumerate(values):
            yield from leaves(value, (*path, i))
    else:
        yield path, values


@dataclass(frozen=True)
class Launch:
    """A kernel, the places of its arguments that are tensors like x, and whether x's rows are 16-byte vectors."""

    kernel: Kernel
    full_size: frozenset[ArgumentPath]
    vector: bool


@contextmanager
def capture(multiprocessors: int, x: Tensor) -> Iterator[list[Launch]]:
    """Catch, in place of running it, what is launched inside the block on a module's input ``x`` of the meta device.

    Raises:
        RuntimeError: Triton interprets its kernels, so that there is nothing to compile.
    """
    import triton
    from triton.runtime.jit import JITFunction

    from attn_kernels._recording import launching_without_data, specializing
    from attn_kernels.ops.common.layout import is_channels_last
    from attn_kernels.ops.common.tiling import vector_length

    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1: unset it")
    _, c, h, w = x.shape
    row = c if is_channels_last(x) else h * w
    vector = vector_length(row, x.element_size()) * x.element_size() == 16
    launches: list[Launch] = []
    arguments: dict[str, object] = {}
    run = JITFunction.run

    def catch(function: JITFunction, *args, **kwargs) -> None:
        arguments.clear()
        arguments.update(dict(zip(function.arg_names, args, strict=False)) | kwargs)
        run(function, *args, **kwargs)

    def heard(kernel, compile: dict) -> None:
        names = list(compile["signature"])
        passed = leaves(tuple(arguments[name] for name in names))
        full_size = frozenset(path for path, value in passed if is_like(value, x))
        options = {name: arguments[name] for name in arguments if name not in (*names, "grid", "warmup")}
        launches.append(Launch(_kernel(kernel, compile, options), full_size, vector))

    with launching_without_data(multiprocessors), patch.object(JITFunction, "run", catch), specializing(90, heard):
        yield launches  # whose signature is the same for all capabilities


def is_like(value: object, x: Tensor) -> bool:
    """Whether a kernel's argument is a tensor of x's size and dtype."""
    return isinstance(value, Tensor) and value.numel() == x.numel() and value.dtype == x.dtype


def _kernel(kernel, compile: dict, options: dict) -> Kernel:
    (attributes,) = compile["configs"]
    freeze = {path: tuple(map(tuple, value)) for path, value in attributes.items()}
    return Kernel(
        kernel.module,
        kernel.kernel,
        *(tuple(d.items()) for d in (compile["signature"], compile["constants"], freeze, options)),
    )


def ops() -> list[ModuleType]:
    """The modules that define kernels."""
    import attn_kernels.ops

    found = walk_packages(attn_kernels.ops.__path__, "attn_kernels.ops.")
    return [import_module(module.name) for module in found]


@dataclass(frozen=True)
class MachineCode:
    """What ptxas made of a kernel; ``shared`` and ``stack`` in bytes, the latter a thread's."""

    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    fp64: int  # instructions of PTX
    accesses: tuple[Access, ...]  # to global memory, by PTX
    sass: Sass | None
    stretches: tuple[Stretch, ...] = ()


class Access(NamedTuple):
    """A load or store of PTX: the place of the kernel's argument that it goes through, and its width."""

    kind: str
    argument: ArgumentPath
    bits: int


def machine_code(kernel: Kernel, capability: int, disassemble: bool) -> MachineCode:
    """Compile a kernel and read what came out; ``disassemble`` doubles the time that this takes."""
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(
        getattr(import_module(kernel.module), kernel.name),
        dict(kernel.signature),
        dict(kernel.constants),
        {path: [list(pair) for pair in value] for path, value in kernel.attributes},
    )
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder  # thousands of kernels are not to stay in the user's cache
        compiled = triton.compile(source, target=_target(capability), options=dict(kernel.options))
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = dict(re.findall(r"(\w+):(\d+)", _tool("cuobjdump", "-res-usage", cubin)))
        text = _tool("nvdisasm", "-c", "-g", cubin) if disassemble else None
    ptx = compiled.asm["ptx"]
    arguments = list(kernel.arguments)
    return MachineCode(
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        local=int(usage["LOCAL"]),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        fp64=len(re.findall(r"^\s*(?:@!?%p\d+ )?(?!mov|ld|st)\S*\.f64", ptx, re.MULTILINE)),
        accesses=tuple(Access(kind, arguments[i], bits) for kind, i, bits in parse_ptx(ptx)),
        sass=parse_sass(text) if text else None,
        stretches=tuple(stretches(text)) if text else (),
    )


def _target(capability: int) -> object:
    """What Triton compiles for."""
    from attn_kernels._recording import target  # here, for Triton is imported after what another command sets

    return target(capability)


@cache
def _tools() -> Path:
    import triton.backends.nvidia

    return Path(triton.backends.nvidia.__file__).parent / "bin"


def _tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([_tools() / name, *arguments], check=True, capture_output=True, text=True).stdout


def parse_ptx(ptx: str) -> Iterator[tuple[str, int, int]]:
    """The accesses to global memory, each traced through address arithmetic to the parameter that it starts from.

    Whether it is a load or a store, the number of the parameter, and bits.

    Raises:
        ValueError: an address of unknown origin.
    """
    lines = [re.sub(r"^@!?%p\d+ ", "", line.strip()) for line in ptx.splitlines()]
    roots = _address_roots(lines)
    for line in lines:
        if re.match(r"(ld|st|atom|red)\.global|cp\.async\.c[ag]", line):
            known = [roots[register] for register in re.findall(r"\[ *(%rd\d+)", line) if register in roots]
            if not known:
                raise ValueError(f"an address of unknown origin: {line}")
            yield "load" if line.startswith(("ld", "cp")) else "store", known[0], _bits(line)


def _address_roots(lines: list[str]) -> dict[str, int]:
    """The parameter that each register's address starts from."""
    roots: dict[str, int] = {}
    arithmetic: list[list[str]] = []  # registers of an instruction, the one that it writes first
    for line in lines:
        if parameter := re.match(r"ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
            roots[parameter[1]] = int(parameter[2])
        elif re.match(r"mad|(add|sub|mov|cvta|selp)\S*64", line):
            arithmetic.append(re.findall(r"%\w+", line))
    grown = -1
    while grown < (grown := len(roots)):  # blocks stand in any order
        for target, *sources in arithmetic:
            known = [roots[source] for source in sources if source in roots]
            if known:
                roots[target] = known[0]
    return roots


def _bits(line: str) -> int:
    """The width of an access of PTX."""
    if line.startswith("cp.async"):
        return 8 * int(re.search(r"\], (\w+)", line)[1], 0)
    vector, scalar = re.match(r"[\w.:]*?(?:\.v(\d))?\.[busf](\d+)\s", line).groups()
    return int(vector or 1) * int(scalar)
