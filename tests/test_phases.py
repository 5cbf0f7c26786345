"""Programs of one launch: loads come after the stores of others, and nobody waits for ever."""

import copy
from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton._C.libtriton.ir import CACHE_MODIFIER
from triton.runtime import interpreter

import attn_kernels
import reference
from attn_kernels.ops import cbam, channel_attention, channel_gate
from attn_kernels.ops.common import device as gpu
from attn_kernels.ops.common import grid_sync, squeeze, tiling
from attn_kernels.ops.common.gate_plan import channel_plan
from attn_kernels.ops.common.tiling import geometry
from benchmarks.compile import ChannelAttention
from reference.catalogue import LAYOUTS, POOLS

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter"),
    pytest.mark.usefixtures("single_launch"),
]


class Launch:
    """Which of a launch's accesses are ordered: by a program itself, or by flags that it set and others found set.

    A program's signals count its time. What it stored is known to those who have seen a later signal of it, or one of
    somebody who had. The interpreter runs programs one after another, so that every load finds what it should; here it
    also needs to know that it will.
    """

    def __init__(self, name: str):
        self.name, self.races = name, set()
        self.program = 0
        self.seen = defaultdict(lambda: defaultdict(int))  # program -> program -> signals
        self.snapshots = {}  # flag -> what whoever set it had seen
        self.awaited = set()
        self.writers, self.readers = {}, defaultdict(dict)  # address -> program and its time

    def _knows(self, program: int, time: int) -> bool:
        return program == self.program or self.seen[self.program][program] > time

    def _now(self) -> int:
        return self.seen[self.program][self.program]

    def load(self, addresses, past_l1: bool):
        for address in addresses:
            self.readers[address][self.program] = self._now()
            writer, time = self.writers.get(address, (self.program, 0))
            if not self._knows(writer, time) or (writer != self.program and not past_l1):
                self.races.add(f"{self.program} loads what {writer} stores")

    def store(self, addresses):
        for address in addresses:
            known = [*self.readers.pop(address, {}).items()]
            known += [self.writers[address]] if address in self.writers else []
            for program, time in known:
                if not self._knows(program, time):
                    self.races.add(f"{self.program} stores what {program} uses")
            self.writers[address] = self.program, self._now()
            self.snapshots.pop(address, None)

    def signal(self, flags):
        for flag in flags:
            assert flag not in self.snapshots, f"{self.name}: {self.program} sets a flag that is set"
            self.store([flag])
            seen = self.seen[self.program]
            seen[self.program] += 1
            self.snapshots[flag] = dict(seen)

    def find(self, flags):
        seen = self.seen[self.program]
        for flag in flags:
            assert flag in self.snapshots, f"{self.name}: {self.program} waits for one that comes later, here for ever"
            self.readers[flag][self.program] = self._now()
            self.awaited.add(flag)
            for program, signals in self.snapshots[flag].items():
                seen[program] = max(seen[program], signals)


@pytest.fixture
def launches(monkeypatch):
    """The launches of a test."""
    found: list[Launch] = []
    builder = interpreter.InterpreterBuilder

    def before(name, act):
        method = getattr(builder, name)

        def call(self, *args):
            act(*args)
            return method(self, *args)

        monkeypatch.setattr(builder, name, call)

    def active(pointers, mask):
        return pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].ravel().tolist()

    def begin(executor, *args, **kwargs):
        found.append(Launch(executor.fn.__name__))
        return run(executor, *args, **kwargs)

    def atomic(operation, pointers, value, mask, *_):
        launch = found[-1]
        is_signal = "XCHG" in str(operation)
        (launch.signal if is_signal else launch.find)(active(pointers, mask))

    run = interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", begin)
    before("set_grid_idx", lambda x, *_: setattr(found[-1], "program", x))
    before(
        "create_masked_load",
        lambda pointers, mask, other, cache, *_: found[-1].load(active(pointers, mask), cache == CACHE_MODIFIER.CG),
    )
    before("create_masked_store", lambda pointers, value, mask, *_: found[-1].store(active(pointers, mask)))
    before("create_atomic_rmw", atomic)
    return found


# Whose kernels wait for one another.
ROOMS = channel_gate.forward, channel_gate.backward, cbam.forward

MODULES = {
    "SE": lambda c: attn_kernels.SE(c, 4),
    "ChannelGate": lambda c: attn_kernels.ChannelGate(c, 4, POOLS),
    "MaxGate": lambda c: attn_kernels.ChannelGate(c, 4, ("max",)),
    "CBAM": lambda c: attn_kernels.CBAM(c, 4),
    "BAM": lambda c: attn_kernels.BAM(c, 4),
    "SimAM": lambda c: attn_kernels.SimAM(),
    "ChannelAttention": ChannelAttention,
}


class Shape(NamedTuple):
    """Of x, the GPU and the MLP; and of what there is more than one then."""

    shape: tuple[int, int, int, int]
    multiprocessors: int
    several: set[str]
    reduction: int = 4


SHAPES = {
    "samples": Shape((51, 16, 2, 3), 1, {"samples", "groups", "lookahead"}),  # the last group is not full
    "split": Shape((3, 20, 40, 24), 5, {"splits", "groups"}),
    "lookahead": Shape((9, 32, 3, 3), 8, {"samples", "groups", "blocks", "lookahead"}),
}
# In channels_last; they take half a minute.
LARGE = {
    "hidden": Shape((2, 280, 10, 10), 30, {"groups", "blocks", "hidden", "lookahead"}, reduction=1),
    "blocks": Shape((4, 80, 40, 24), 40, {"groups", "blocks", "splits", "lookahead"}),
}


def step(module, shape: Shape, layout, inference=True):
    with gpu.assuming(shape.multiprocessors):
        torch.manual_seed(0)
        x = torch.randn(shape.shape).to(memory_format=LAYOUTS[layout]).requires_grad_()
        hidden = shape.shape[1] // shape.reduction
        half = isinstance(module, attn_kernels.CBAM)
        plan = channel_plan(geometry(x), hidden, tile_elements=tiling.TILE // (2 if half else 1))
        counts = {name: getattr(plan, name) for name in ("samples", "groups", "blocks", "splits", "lookahead")}
        counts["hidden"] = plan.hidden_tasks(hidden)
        assert {name for name, count in counts.items() if count > 1} == shape.several
        y = module(x)
        gradients = torch.autograd.grad(y, [x, *module.parameters()], torch.randn_like(y))
        if not inference:
            return y, *gradients
        with torch.no_grad():
            return y, *gradients, module(x)


def check(launches):
    assert launches
    for launch in launches:
        assert not launch.races, launch.name


WAITING = "SE", "ChannelGate", "CBAM"
CASES = [(module, shape, layout) for module in WAITING for shape in SHAPES for layout in LAYOUTS]
CASES += [(module, shape, "contiguous") for module in ("BAM", "SimAM", "ChannelAttention") for shape in SHAPES]


@pytest.mark.parametrize(("module", "shape", "layout"), CASES)
def test_no_races(module, shape, layout, launches):
    step(MODULES[module](SHAPES[shape].shape[1]), SHAPES[shape], layout)
    check(launches)


@pytest.mark.parametrize(("module", "shape"), [("SE", "hidden"), ("SE", "blocks"), ("ChannelGate", "blocks")])
def test_no_races_of_many(module, shape, launches):
    """SE adds up no parts of planes, the other pools are joined first."""
    shape, pools = LARGE[shape], ("avg",) if module == "SE" else ("avg", "max")
    step(attn_kernels.ChannelGate(shape.shape[1], shape.reduction, pools), shape, "channels_last")
    check(launches)


def test_part_of_a_plane_that_is_minus_infinity():
    """Its exponentials add nothing, however small the plane's maximum: exp(100) times 0 would be NaN."""
    x = torch.full(SHAPES["split"].shape, float("-inf"))
    x[..., :3, :] = -100
    fused = attn_kernels.ChannelGate(x.shape[1], 4, ("lse",))
    plain = reference.ChannelGate(x.shape[1], 4, ("lse",))
    plain.load_state_dict(fused.state_dict())
    with gpu.assuming(5):
        assert channel_plan(geometry(x), 5).is_split
        y = fused(x)
    assert not y.isnan().any()
    assert torch.allclose(y, plain(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_races_are_found(shape, launches, monkeypatch):
    """Where programs do not wait, which the interpreter survives."""

    @triton.jit
    def wait(flags_ptr, count, sync, SINGLE: tl.constexpr):
        tl.debug_barrier()
        return count < 0

    for module in (squeeze, *ROOMS):
        monkeypatch.setattr(module, "wait", wait)
    for module in ("SE", "CBAM"):
        step(MODULES[module](SHAPES[shape].shape[1]), SHAPES[shape], "contiguous")
    racing = {launch.name for launch in launches if launch.races}
    assert racing == {"channel_gate_kernel", "channel_gates_kernel", "gate_bwd_kernel"}


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        ("SE", "samples"),
        ("SE", "split"),
        ("ChannelGate", "split"),
        ("CBAM", "split"),
        ("CBAM", "lookahead"),
        ("ChannelAttention", "split"),
    ],
)
def test_plain_launches(module, shape, launches, monkeypatch):
    """A launch for each phase: no program waits or is waited for, and the bits are those of a single launch."""
    layout = "channels_last" if shape == "lookahead" else "contiguous"
    shape = SHAPES[shape]
    module = MODULES[module](shape.shape[1])
    state = copy.deepcopy(module.state_dict())
    single = step(module, shape, layout)
    del launches[:]
    monkeypatch.setattr(gpu, "SINGLE_LAUNCH", False)
    module.load_state_dict(state)
    plain = step(module, shape, layout)
    check(launches)
    assert all(not launch.snapshots and not launch.awaited for launch in launches)
    assert all(map(torch.equal, plain, single))


@pytest.fixture
def lost(monkeypatch):
    """Set ``lost.kernel`` and ``lost.program``: from then on that program of those launches never signals.

    In backward it stores nothing either: forward, a late program stores its indices all the same. Or, with
    ``lost.after``, it signals so often and stores everything. Programs have little patience.
    """
    lost = SimpleNamespace(kernel=None, program=None, after=0, signals=0, waits=[])
    builder, current = interpreter.InterpreterBuilder, SimpleNamespace(kernel="", program=0)
    run, set_index = interpreter.GridExecutor.__call__, builder.set_grid_idx
    atomic, store = builder.create_atomic_rmw, builder.create_masked_store

    def begin(executor, *args, **kwargs):
        current.kernel = executor.fn.__name__
        return run(executor, *args, **kwargs)

    def begin_program(self, x, *others):
        current.program = x
        return set_index(self, x, *others)

    def act(self, operation, pointers, value, mask, *others):
        if "XCHG" not in str(operation):
            lost.waits.append(current.program)
        elif (current.kernel, current.program) == (lost.kernel, lost.program):
            lost.signals += 1
            if lost.signals > lost.after:
                return pointers
        return atomic(self, operation, pointers, value, mask, *others)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", begin)
    monkeypatch.setattr(builder, "set_grid_idx", begin_program)

    def act_in_turn(self, *args):
        is_lost = (current.kernel, current.program) == (lost.kernel, lost.program) and not lost.after
        if lost.kernel != "gate_bwd_kernel" or not is_lost:
            store(self, *args)

    monkeypatch.setattr(builder, "create_atomic_rmw", act)
    monkeypatch.setattr(builder, "create_masked_store", act_in_turn)
    monkeypatch.setattr(grid_sync, "PATIENCE", tl.constexpr(8))
    return lost


def replay(monkeypatch):
    """Launches of one size share memory and an epoch from here on, and flags are zeroed, as where a graph replays."""
    memory = {}

    def empty_scratch(x, elements, flags):
        key = elements, flags
        if key not in memory:
            tensor, begin = scratch(x, elements, flags)
            memory[key] = tensor.fill_(1), begin  # numbers that look right
        tensor, begin = memory[key]
        tensor[begin:].zero_()
        return tensor, begin

    scratch = grid_sync.empty_scratch
    for module in (channel_attention, *ROOMS):
        monkeypatch.setattr(module, "empty_scratch", empty_scratch)
    monkeypatch.setattr(grid_sync, "new_epoch", lambda: 2**62 + 1)


@pytest.mark.parametrize(
    ("module", "kernel", "shape"),
    [
        ("SE", "channel_gate_kernel", "samples"),
        ("SE", "channel_gate_kernel", "split"),
        ("SE", "gate_bwd_kernel", "split"),
        ("CBAM", "channel_gates_kernel", "split"),
        ("CBAM", "channel_gates_kernel", "lookahead"),
        ("CBAM", "gate_bwd_kernel", "samples"),
        ("MaxGate", "gate_bwd_kernel", "samples"),
        ("ChannelAttention", "squeeze_kernel", "split"),
    ],
)
def test_who_never_signals_is_not_waited_for_for_ever(module, kernel, shape, lost, monkeypatch):
    """What depends on a missing signal is NaN, indices are in range, buffers as before; the next replay is right."""
    shape = SHAPES[shape]
    module = MODULES[module](shape.shape[1])
    state = copy.deepcopy(module.state_dict())
    train = partial(step, module, shape, "contiguous", inference=False)
    want = train()
    waits, trained = len(lost.waits), copy.deepcopy(module.state_dict())

    replay(monkeypatch)
    module.load_state_dict(state)
    lost.waits.clear()
    lost.kernel, lost.program = kernel, 0
    got = train()
    assert lost.signals  # there was something to miss
    assert len(lost.waits) <= waits + 4 * grid_sync.PATIENCE.value  # who waited first polls in vain, the others do not
    backward = kernel == "gate_bwd_kernel"
    (y, dx, *_), (want_y, *_) = got, want
    assert torch.equal(y, want_y) if backward else y[0].isnan().all()  # program 0 works for the first sample
    assert dx[0].isnan().all()
    if backward:
        names = [name for name, _ in module.named_parameters() if "SpatialGate" not in name]
        assert all(gradient.isnan().all() for _, gradient in zip(names, got[2:], strict=False))
    after = module.state_dict()
    assert all(torch.equal(after[name], (trained if backward else state)[name]) for name in after)

    lost.kernel = None
    module.load_state_dict(state)
    assert all(map(torch.equal, train(), want))


def test_who_adds_up_parts_and_never_signals_costs_the_weights_alone(lost, monkeypatch):
    """In backward, behind its first signal, nobody waits for the last part of a plane but the weights' gradients."""
    shape = SHAPES["split"]
    module = MODULES["SE"](shape.shape[1])
    train = partial(step, module, shape, "contiguous", inference=False)
    want = train()
    replay(monkeypatch)
    with gpu.assuming(shape.multiprocessors):
        plan = channel_plan(geometry(torch.empty(shape.shape)), shape.shape[1] // shape.reduction, averages=True)
    lost.kernel, lost.program, lost.after = "gate_bwd_kernel", plan.splits - 1, 1
    y, dx, *gradients = train()
    assert lost.signals == 2
    assert torch.equal(y, want[0])
    assert torch.equal(dx, want[1])
    assert all(gradient.isnan().all() for gradient in gradients)


def test_flags_are_zeroed_where_a_graph_will_replay_them(monkeypatch):
    monkeypatch.setattr(grid_sync, "will_be_replayed", lambda x: True)
    scratch, begin = grid_sync.empty_scratch(torch.empty(1), 5, 3)
    assert (begin, scratch.numel()) == (6, 12)
    assert not scratch[begin:].any()


def test_epochs_differ():
    epochs = [grid_sync.new_epoch() for _ in range(3)]
    assert len(set(epochs)) == 3
    assert all(2**62 <= epoch < 2**63 - 1 for epoch in epochs)
