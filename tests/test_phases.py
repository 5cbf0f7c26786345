"""What programs of one launch hand one another: every load comes after the store, and slots end as they may be left."""

from collections import defaultdict

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import attn_kernels
from attn_kernels.ops import _channel, _channel_bwd, _launch, _phases, cbam, channel_gate
from benchmarks.compile import ChannelAttention
from benchmarks.shapes import LAYOUTS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")


class Launch:
    """Which of a launch's accesses are ordered: by a program itself, or by slots that it set and others found set.

    A program's marks count its time. What it stored is known to those who have seen a later mark of it, or one of
    somebody who had. The interpreter runs programs one after another, so that every load finds what it should; here it
    also needs to know that it will.
    """

    def __init__(self, name: str):
        self.name, self.races = name, set()
        self.program = 0
        self.seen = defaultdict(lambda: defaultdict(int))  # program -> program -> marks
        self.snapshots = {}  # slot -> what whoever set it had seen
        self.writers, self.readers = {}, defaultdict(dict)  # address -> program and its time

    def _knows(self, program: int, time: int) -> bool:
        return program == self.program or self.seen[self.program][program] > time

    def _now(self) -> int:
        return self.seen[self.program][self.program]

    def load(self, addresses):
        for address in addresses:
            self.readers[address][self.program] = self._now()
            if address in self.writers and not self._knows(*self.writers[address]):
                self.races.add(f"{self.program} loads what {self.writers[address][0]} stores")

    def store(self, addresses):
        for address in addresses:
            known = [*self.readers.pop(address, {}).items()]
            known += [self.writers[address]] if address in self.writers else []
            for program, time in known:
                if not self._knows(program, time):
                    self.races.add(f"{self.program} stores what {program} uses")
            self.writers[address] = self.program, self._now()
            self.snapshots.pop(address, None)

    def mark(self, slots):
        for slot in slots:
            seen = self.seen[self.program]
            seen[self.program] += 1
            self.snapshots[slot] = dict(seen)

    def find(self, slots):
        seen = self.seen[self.program]
        for slot in slots:
            self.readers[slot][self.program] = self._now()
            for program, marks in self.snapshots.get(slot, {}).items():
                seen[program] = max(seen[program], marks)


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
        is_mark = "XCHG" in str(operation)
        (launch.mark if is_mark else launch.find)(active(pointers, mask))

    run = interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", begin)
    before("set_grid_idx", lambda x, *_: setattr(found[-1], "program", x))
    before("create_masked_load", lambda pointers, mask, *_: found[-1].load(active(pointers, mask)))
    before("create_masked_store", lambda pointers, value, mask, *_: found[-1].store(active(pointers, mask)))
    before("create_atomic_rmw", atomic)
    return found


ALL_POOLS = ("avg", "max", "lp", "lse")
MODULES = {
    "SE": lambda c: attn_kernels.SE(c, 4),
    "ChannelGate": lambda c: attn_kernels.ChannelGate(c, 4, ALL_POOLS),
    "CBAM": lambda c: attn_kernels.CBAM(c, 4),
    "BAM": lambda c: attn_kernels.BAM(c, 4),
    "SimAM": lambda c: attn_kernels.SimAM(),
    "ChannelAttention": ChannelAttention,
}
# Several samples a program, the last group not full; and divided planes, in several groups of which few come first.
SHAPES = {"samples": (19, 16, 2, 3, 1), "divided": (3, 20, 40, 24, 5)}


def step(module, shape, layout, monkeypatch):
    *shape, multiprocessors = shape
    monkeypatch.setattr(_launch, "multiprocessors", lambda x: multiprocessors)
    x = torch.randn(shape).to(memory_format=LAYOUTS[layout]).requires_grad_()
    plan = _launch.channel_plan(x, 4)
    assert (plan.samples > 1, plan.splits > 1) == ((True, False) if shape[0] == 19 else (False, True))
    y = module(x)
    torch.autograd.grad(y, [x, *module.parameters()], torch.randn_like(y))
    with torch.no_grad():
        module(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("module", MODULES)
def test_no_races(module, shape, layout, launches, monkeypatch):
    step(MODULES[module](SHAPES[shape][1]), SHAPES[shape], layout, monkeypatch)
    assert launches
    for launch in launches:
        assert not launch.races, launch.name
        assert not launch.snapshots, f"{launch.name} leaves slots set, which a graph's next replay would find"


@pytest.mark.parametrize("shape", SHAPES)
def test_races_are_found(shape, launches, monkeypatch):
    """Where programs do not wait, which the interpreter survives."""

    @triton.jit
    def wait(slots_ptr, count, stamp):
        tl.debug_barrier()

    for module in (_channel, _channel_bwd, cbam, channel_gate):
        monkeypatch.setattr(module, "wait", wait)
    step(MODULES["CBAM"](SHAPES[shape][1]), SHAPES[shape], "contiguous", monkeypatch)
    racing = {launch.name for launch in launches if launch.races}
    assert racing == {"pools_kernel", "gate_bwd_kernel"}


def test_stamps_differ():
    stamps = [_phases.new_stamp() for _ in range(3)]
    assert len(set(stamps)) == 3
    assert all(2**62 <= stamp < 2**63 - 1 for stamp in stamps)
