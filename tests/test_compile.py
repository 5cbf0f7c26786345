"""What Triton compiles for each architecture, without a GPU, and what the gate over it rejects."""

import csv
import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

import attn_kernels
from attn_kernels._recording import launching_without_data
from attn_kernels.functional import is_fused
from attn_kernels.ops.bam.norm import backward, forward
from attn_kernels.ops.common.grid_sync import PARTS, REST
from attn_kernels.ops.common.tile import Place, tile_offsets
from attn_kernels.ops.common.tiling import Tile
from benchmarks.compile import (
    BATCHES,
    DTYPES,
    MODULES,
    NETWORK_SITES,
    OPTION_SITES,
    Case,
    Site,
    Variant,
    cases,
    describe,
    name_of,
    named,
)
from benchmarks.machine_code import (
    ARCHITECTURES,
    Access,
    Kernel,
    MachineCode,
    Sass,
    ops,
    parse_ptx,
    parse_sass,
)
from reference.catalogue import LAYOUTS

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")

# Every module forward and backward in both layouts, and a map of EfficientNet and one of MobileNetV3.
FAST = {
    "sm_80": ["--maps", "72x28x28", "240x14x14", "--dtypes", "fp16"],
    "sm_89": ["--maps", "1024x14x14", "--dtypes", "fp32", "--modules", "SE", "SimAM"],
    "sm_90": ["--maps", "1024x14x14", "--dtypes", "bf16"],
    "sm_100": ["--maps", "256x56x56", "--dtypes", "bf16", "--modules", "SimAM", "BAM"],
    "sm_120": ["--maps", "512x28x28", "--dtypes", "fp64", "--modules", "SimAM"],
}


ROOT = os.path.dirname(os.path.dirname(__file__))


def compiling() -> dict[str, str]:
    """The environment of a process where Triton compiles, which it does not in this one, single launches."""
    own = "TRITON_INTERPRET", "ATTN_KERNELS_SINGLE_LAUNCH"
    return {name: value for name, value in os.environ.items() if name not in own}


def compile_rows(
    tmp_path, architecture: str, options: list[str], **environment: str
) -> tuple[subprocess.CompletedProcess, list[dict[str, str]]]:
    """What the command prints, and the rows that it writes."""
    output = tmp_path / "compile.csv"
    options = [*options, "--architectures", architecture, "--batches", "32", "--jobs", "1"]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks", "compile", *options, "--output", output],
        env=compiling() | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert output.exists(), process.stderr
    with output.open() as file:
        return process, list(csv.DictReader(file))


@pytest.mark.parametrize("architecture", FAST)
def test_machine_code(architecture, tmp_path):
    process, rows = compile_rows(tmp_path, architecture, FAST[architecture])
    for row in rows:
        assert row["dtype"] == "fp64" or row["stack_bytes"] == row["local_bytes"] == "0", row
        assert int(row["shared_bytes"]) <= ARCHITECTURES[architecture].shared_a_program, row
        assert int(row["programs_per_multiprocessor"]) >= 1, row
        assert row["dtype"] == "fp64" or row["fp64_instructions"] == "0", row
        if row["vector_rows"] == "1":
            assert (row["vector_loads"], row["vector_stores"]) == (row["loads"], row["stores"]), row
        assert not row["faults"]
    if architecture == "sm_90":
        assert {row["kernel"] for row in rows} == defined_kernels()
    assert process.returncode == 0, process.stdout


def test_plain_launches_compile(tmp_path):
    kernels = "channel_gate.channel_gate", "channel_gate.gate_bwd", "cbam.pools"
    options = ["--maps", "256x56x56", "--dtypes", "bf16", "--modules", "SE", "CBAM", "--kernels", *kernels]
    process, rows = compile_rows(tmp_path, "sm_90", options, ATTN_KERNELS_SINGLE_LAUNCH="0")
    assert {row["kernel"] for row in rows} == {*kernels}
    assert process.returncode == 0, process.stdout


SIZES_OF_ONE = """
from benchmarks.compile import ALL_POOLS, Case, Site, compile_all, variants
from benchmarks.machine_code import ARCHITECTURES

sites = (
    Site("", "SE", (16, 7, 7)),  # with one hidden unit
    Site("", "ChannelGate", (1, 7, 7), True, ALL_POOLS),
    Site("", "CBAM", (1, 1, 1)),
    Site("", "BAM", (16, 1, 1)),
    Site("", "SimAM", (1, 1, 1)),
)
cases = [Case(site, 2, layout, "fp32") for site in sites for layout in ("contiguous", "channels_last")]
for variant, code in compile_all([*variants(ARCHITECTURES["sm_90"], cases)], 1, False):
    print(f"{variant}: {code}" if isinstance(code, str) else variant.name)
"""


def test_sizes_of_one_compile():
    """Triton compiles an argument that is 1 in as a constant, which has other methods than a tensor."""
    process = subprocess.run(
        [sys.executable, "-c", SIZES_OF_ONE], env=compiling(), cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert not [line for line in lines if ":" in line]
    assert {"channel_gate.channel_gate", "channel_gate.gate_bwd", "cbam.pools", "bam.dx", "simam.simam_bwd"} < {*lines}


MIXED = """
import torch
import attn_kernels
from benchmarks.machine_code import capture, machine_code

dtypes = {"f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
few, many = (8, 64, 7, 7), (256, 512, 7, 7)  # of the many samples a program takes several
calls = [("f64", "f16", "bf16", name, few) for name in ("SE", "CBAM", "BAM", "SimAM")]
calls += [("f64", "f16", "f16", name, many) for name in ("SE", "CBAM")] + [("bf16", "f64", "f64", "SE", few)]
for x_dtype, dtype, residual_dtype, name, shape in calls:
    with torch.device("meta"):
        module = getattr(attn_kernels, name)(shape[1]).to(dtypes[dtype])
        x = torch.empty(shape, dtype=dtypes[x_dtype]).requires_grad_()
        residual = torch.empty(shape, dtype=dtypes[residual_dtype])
    with capture(132, x) as found:
        y = module(x, residual, "relu")
        torch.autograd.grad(y, [x, *module.parameters()], torch.empty_like(y))
    for kernel in {launch.kernel for launch in found}:
        try:
            machine_code(kernel, 90, False)
            print(kernel.name)
        except Exception as error:
            print(f"{name} {kernel.name}: {x_dtype} with {dtype} and {residual_dtype}: {str(error)[:200]}")
"""


def test_mixed_dtypes_compile():
    """Parameters and residual of other dtypes than x's, float64 among them."""
    process = subprocess.run([sys.executable, "-c", MIXED], env=compiling(), cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert not [line for line in lines if ":" in line]
    assert {"dx_kernel", "apply_fwd_kernel", "gate_bwd_kernel", "simam_fwd_kernel", "scale_kernel"} < {*lines}


def defined_kernels() -> set[str]:
    return {
        name_of(module.__name__, name)
        for module in ops()
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }


def launch(**changes) -> tuple[Variant, MachineCode]:
    """A kernel that reads and writes x in fp16, whose rows are whole vectors, and nothing wrong with its code."""
    signature = (("x_ptr", "*fp16"), ("gate_ptr", "*fp32"), ("C", "i32"), ("TILE", "constexpr"))
    tile = Tile(False, 8, 64, 64, 4)
    kernel = Kernel("attn_kernels.ops.simam", "simam_fwd_kernel", signature, (((3,), tile),), (), ())
    case = Case(Site("resnet50", "SimAM", (256, 56, 56)), 32, "contiguous", "fp16")
    variant = Variant(kernel, ARCHITECTURES["sm_90"], frozenset({(0,)}), True, [case])
    accesses = Access("load", (0,), 128), Access("store", (0,), 128), Access("load", (1,), 32)
    sass = Sass(Counter({("load", 128): 1, ("store", 128): 1, ("load", 32): 1}), local=0, fp64=0)
    code = MachineCode(64, 0, 0, 1024, 8, 0, accesses, sass)
    return variant, replace(code, **changes)


class TestFaults:
    def test_none(self):
        row = describe(*launch())
        assert row["faults"] == ""
        assert (row["kernel"], row["block_c"], row["loads"], row["vector_loads"]) == ("simam.simam_fwd", 64, 1, 1)

    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            ({"stack": 8}, "spills"),
            ({"local": 8}, "spills"),
            ({"sass": Sass(Counter({("load", 128): 2}), local=1, fp64=0)}, "spills"),
            ({"shared": 227 * 1024 + 1}, "shared memory"),
            ({"registers": 255, "warps": 16}, "does not fit"),
            ({"fp64": 1}, "float64"),
            ({"sass": Sass(Counter({("load", 128): 2}), local=0, fp64=1)}, "float64"),
            ({"accesses": (Access("load", (0,), 64),)}, "x_ptr 64"),
            ({"sass": Sass(Counter({("load", 64): 2, ("store", 128): 1}), local=0, fp64=0)}, "split vectors"),
        ],
    )
    def test_one(self, changes, fault):
        assert fault in describe(*launch(**changes))["faults"]

    def test_rows_of_broken_vectors_may_be_read_piecemeal(self):
        variant, code = launch(accesses=(Access("load", 0, 32),))
        assert not describe(replace(variant, vector=False), code)["faults"]


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 32, 0, 8, 8),  # threads
        ("sm_90", 64, 0, 8, 4),  # registers
        ("sm_90", 65, 0, 4, 7),  # dealt out by 256 a warp, 28 warps
        ("sm_80", 16, 0, 1, 32),  # programs
        ("sm_89", 32, 48 * 1024, 4, 2),  # shared memory, and the system's 1 KB
        ("sm_120", 32, 0, 8, 6),
    ],
)
def test_occupancy(architecture, registers, shared, warps, programs):
    assert ARCHITECTURES[architecture].occupancy(registers, shared, warps) == programs


def test_parse_ptx_traces_addresses_to_parameters():
    ptx = """
    ld.param.b64 \t%rd1, [kernel_param_0];
    ld.param.b64 \t%rd2, [kernel_param_2];
    bra \t$L__BB0_2;
$L__BB0_1:
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd5 + 0 ];
    @!%p2 st.global.L1::evict_first.v2.b32 [ %rd4 + 16 ], { %r1, %r2 };
    cp.async.cg.shared.global [ %r9 + 0 ], [ %rd4 + 0 ], 0x10, %r3;
$L__BB0_2:
    mul.wide.s32 \t%rd3, %r7, 2;
    add.s64 \t%rd5, %rd1, %rd3;
    mad.wide.s32 \t%rd4, %r8, 4, %rd2;
    ld.global.u16 \t%rs1, [%rd5+2];
    """
    assert list(parse_ptx(ptx)) == [
        ("load", 0, 128),
        ("store", 2, 64),
        ("load", 2, 128),
        ("load", 0, 16),
    ]
    with pytest.raises(ValueError, match="unknown origin"):
        list(parse_ptx("ld.global.b32 { %r1 }, [ %rd1 + 0 ];"))


def test_parse_sass():
    sass = """
        /*0030*/                   LDG.E.128 R4, desc[UR10][R4.64] ;
        /*0040*/              @!P3 LDG.E.U16 R24, desc[UR10][R16.64+0x30] ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0060*/               @P6 STG.E.64 desc[UR10][R30.64], R24 ;
        /*0070*/                   STL.64 [R1], R2 ;
        /*0080*/                   DFMA R2, R4, R6, R8 ;
        /*0090*/                   F2F.F64.F32 R2, R4 ;
        /*00a0*/                   IMAD.WIDE R2, R4, 0x4, R6 ;
    """
    bits = {("load", 128): 2, ("load", 16): 1, ("store", 64): 1}
    assert parse_sass(sass) == Sass(Counter(bits), local=1, fp64=2)


def test_cases_are_those_that_were_asked_for():
    everything = list(cases(MODULES, list(DTYPES), BATCHES, None))
    assert len(set(everything)) == len(everything)
    assert {case.site for case in everything} == {*NETWORK_SITES, *OPTION_SITES}
    assert {(case.batch, case.layout, case.dtype) for case in everything if case.site in NETWORK_SITES} == {
        (batch, layout, dtype) for batch in BATCHES for layout in LAYOUTS for dtype in ("fp16", "bf16", "fp32")
    }
    assert {case.site.module for case in everything if case.dtype == "fp64"} == {*MODULES}
    few = list(cases(["SE"], ["bf16"], [32], ["72x28x28"]))
    assert [(case.site.map, case.layout) for case in few] == [((72, 28, 28), layout) for layout in LAYOUTS]


def test_kernels_are_selected_by_name():
    variant, _ = launch()
    assert named([variant], None) == named([variant], ["simam.simam_fwd"]) == [variant]
    with pytest.raises(ValueError, match=r"--kernels: expected some of simam.simam_fwd, got simam.fwd"):
        named([variant], ["simam.fwd", "simam.simam_fwd"])


@interpreted
class TestAddresses:
    """The first and last programs of each kernel, on tensors of more than 2**31 elements that have no memory."""

    SHAPE = (8448, 64, 64, 64)  # samples that BAM's programs share evenly, so that the last one has the last

    @pytest.fixture
    def touched(self, monkeypatch) -> list[tuple[str, int, int]]:
        """Launches on a full-size tensor: the kernel, and the least and the greatest address that it touches."""
        found: list[tuple[str, int, int]] = []
        spans: list[tuple[int, int]] = []
        epoch = [0]
        builder = interpreter.InterpreterBuilder
        set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx

        def touch(pointers, mask):
            active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
            addresses = pointers.data[active].view(np.int64)
            if addresses.size:
                size = pointers.get_element_ty().primitive_bitwidth // 8
                spans.append((int(addresses.min()), int(addresses.max()) + size))

        def load(self, pointers, mask, *_):
            touch(pointers, mask)
            kind = pointers.get_element_ty()
            return interpreter.TensorHandle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind)), kind)

        def atomic(self, operation, pointers, value, mask, sem, scope):
            return interpreter.TensorHandle(np.full(pointers.data.shape, epoch[0]), value.dtype)  # every flag is set

        def launch(kernel, *args, grid, warmup, **kwargs):
            arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            tensors = [a for a in tree_leaves(arguments) if isinstance(a, torch.Tensor)]
            if not any(t.numel() == math.prod(self.SHAPE) for t in tensors):
                return
            full_grid = (*grid, 1, 1)[:3]
            # The first and the last program along each axis: a walk may begin at either end.
            programs = [*itertools.product(*({0, n - 1} for n in full_grid))]
            epoch[0] = arguments.get("epoch")
            plain = "WORK" in arguments and not arguments["WORK"].single
            if plain and epoch[0] not in (PARTS.value, REST.value):
                return  # the others do not walk along x
            if "lookahead" in arguments and not plain:
                # The last tasks of the second phase, and of the first; the weights behind all groups touch none of x.
                first = -(-arguments["extent"].C // arguments["TILE"].block_c) * arguments["S"]
                second = grid[0] // arguments["groups"] - first
                tasks = arguments["groups"] * (first + second)
                end = tasks - arguments["lookahead"] * second
                programs = [(i, 0, 0) for i in (*range(end - second, end), *range(tasks - second, tasks))]
            monkeypatch.setattr(builder, "set_grid_dim", lambda b, *_: set_grid_dim(b, *full_grid))
            spans.clear()
            for program in programs:
                monkeypatch.setattr(builder, "set_grid_idx", lambda b, *_, p=program: set_grid_idx(b, *p))
                interpreter.GridExecutor(kernel.rewrite(), kernel.arg_names, (1,))(*args, **kwargs)
            found.append((kernel.__name__, min(low for low, _ in spans), max(high for _, high in spans)))

        monkeypatch.setattr(builder, "create_masked_load", load)
        monkeypatch.setattr(builder, "create_atomic_rmw", atomic)
        monkeypatch.setattr(builder, "create_masked_store", lambda self, p, value, mask, *_: touch(p, mask))
        monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda self, *_: None)
        monkeypatch.setattr(interpreter.InterpretedFunction, "run", launch)
        return found

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("name", ["SE", "CBAM", "BAM", "wide BAM", "SimAM", "ChannelAttention"])
    def test_reach_the_last_element_and_no_further(self, name, layout, touched, monkeypatch):
        options = ()
        if name == "wide BAM":  # whose maps are as large as x
            name, options = "BAM", (("reduction_ratio", 1),)

            # Few tiles per program, the last one's last.
            choose = forward.norm_tile
            for module in (forward, backward):
                monkeypatch.setattr(module, "norm_tile", lambda g, whole: (choose(g, whole)[0], g.n))
        with torch.device("meta"):
            module = Site("", name, self.SHAPE[1:], options=options).build(attn_kernels)
            x = torch.empty(self.SHAPE, dtype=torch.float16).to(memory_format=LAYOUTS[layout]).requires_grad_()
        with launching_without_data(2816 if name == "BAM" else 132):  # more, so that a program of BAM's has few samples
            y = module(x, x, "relu")
            torch.autograd.grad(y, x, torch.empty_like(y))
        assert touched
        assert not options or {"statistics_kernel", "normalize_kernel", "dparameters_kernel", "dc_kernel"} <= {
            kernel for kernel, _, _ in touched
        }
        for kernel, low, high in touched:
            assert low >= 0, kernel
            assert high == x.nbytes, kernel


@triton.jit
def _offsets_kernel(offsets_ptr, c, p, C, P, TILE: tl.constexpr):
    offsets = tile_offsets(Place(tl.program_id(0).to(tl.int64), c, p, C, P), TILE)
    tl.store(offsets_ptr + tl.arange(0, 2)[:, None] * 2 + tl.arange(0, 2)[None, :], offsets)


@pytest.mark.device
@pytest.mark.parametrize("channels_last", [False, True])
def test_offsets_within_the_largest_sample(channels_last, device):
    """Offsets within a sample may be 32 bits wide only because larger samples are left to the reference."""
    largest = (2**15, 2**15 - 1)
    with launching_without_data(132):
        fused = [is_fused(torch.empty(1, *size, 1, device="meta")) for size in (largest, (2**15, 2**15))]
    assert fused == [True, False]
    for c, p in (
        (largest[0] - 1, largest[1] - 1),
        (2**16 - 1, largest[1] - 1),
    ):  # the last element, and a tile's padding
        offsets = torch.zeros(2, 2, dtype=torch.int64, device=device)
        _offsets_kernel[(1,)](offsets, c - 1, p - 1, *largest, Tile(channels_last, 1, 2, 2, 1))
        strides = (1, largest[0]) if channels_last else (largest[1], 1)
        expected = [[i * strides[0] + j * strides[1] for j in (p - 1, p)] for i in (c - 1, c)]
        assert offsets.tolist() == expected
