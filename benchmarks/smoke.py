"""The first contact of one module with a GPU: it ends, is right, repeats bit by bit, and is right in a CUDA graph.

Each line of smoke.jsonl comes as it is found: "launching" stands before a launch and "ran" after it, so that what hung
is known. Memory that nothing wrote holds NaN. The same call is repeated alone and beside a copy on another stream: an
error that moves is a race.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import reference
from benchmarks import timing
from benchmarks.correctness import judge, results
from benchmarks.device import prepare
from benchmarks.process import append
from benchmarks.rehearsal import SHAPE
from benchmarks.runner import in_plain_launches, what_is_missing
from benchmarks.shapes import KERNELS
from reference.catalogue import FAMILIES, LAYOUTS

# Shape, layout, and whether a residual and a ReLU end it; bf16.
CASES = (
    ((4, 16, 8, 8), "channels_last", True),
    ((2, 64, 14, 14), "contiguous", False),
    ((32, 256, 56, 56), "channels_last", False),
    ((32, 256, 56, 56), "channels_last", True),
    ((32, 512, 28, 28), "contiguous", False),
    ((32, 1024, 14, 14), "channels_last", True),
    ((32, 2048, 7, 7), "channels_last", True),
)
TINY = ((SHAPE, "channels_last", True), (SHAPE, "contiguous", False))  # in the interpreter
COPIED = 2**26  # elements of the tensor that is copied beside
GRAPH_ERROR = 1e-2  # of the norm, where a graph's own convolutions may round otherwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m benchmarks smoke se --out results"
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"{', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="of smoke.jsonl (default: here)")
    parser.add_argument("--repeats", type=int, default=60, help="calls, half of them beside a copy (default: 60)")
    parser.add_argument("--replays", type=int, default=20, help="of a CUDA graph (default: 20)")
    parser.add_argument("--streams", action="store_true", help="and on two streams at once, as often")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: tiny shapes in the interpreter")


def run(arguments: argparse.Namespace) -> int:
    a = arguments
    if not a.rehearse and (missing := what_is_missing()):
        print(f"python -m benchmarks smoke {missing}.", file=sys.stderr)
        return 2
    device = prepare()
    a.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.use_deterministic_algorithms(True, warn_only=True)  # or torch.empty is not filled
    bad = 0
    for family in a.families or FAMILIES:
        say = Say(a.out / "smoke.jsonl", family)
        for case in TINY if a.rehearse else CASES:
            try:
                bad += one(family, *case, device, say, a.repeats, a.replays, a.streams)
            except Stalled:
                bad += 1
                break
            except Exception as error:  # the other shapes are still to be seen
                bad += 1
                say("error", case, ok=False, message=f"{type(error).__name__}: {error}"[:400])
                try:
                    timing.release()
                except RuntimeError as lost:
                    say("end", ok=False, message=f"the GPU no longer answers: {lost}"[:400])
                    return 4  # as if it had died: another process has to go on
        say("end", ok=not bad)
    return 1 if bad else 0


class Stalled(Exception):
    """Results are NaN: the rest of the shapes is not worth the time."""


class Say:
    """Writes a line of JSON to a file, and to the terminal."""

    def __init__(self, path: Path, family: str):
        self._path, self._family, self._start = path, family, time.monotonic()

    def __call__(self, step: str, case: Sequence = (), **facts: object) -> None:
        where = "{} {}{}".format("x".join(map(str, case[0])), case[1], " block" * case[2]) if case else ""
        launches = "plain" if in_plain_launches() else "single"
        line = {"family": self._family, "launches": launches, "step": step, "case": where, **facts}
        text = json.dumps(line | {"seconds": round(time.monotonic() - self._start, 2)})
        append(self._path, text + "\n")
        print(text, flush=True)


def one(
    family: str,
    shape: tuple[int, ...],
    layout: str,
    block: bool,
    device: torch.device,
    say: Say,
    repeats: int,
    replays: int,
    streams: bool,
) -> int:
    """Everything about one kind of input; how many of its checks failed."""
    case = shape, layout, block
    fused, eager, tensors = prepare_case(family, *case, device)
    filled_with_nan(True)
    say("launching", case)
    start = time.monotonic()
    got = results(fused, *tensors)
    synchronize(device)
    nan = [name for name, value in got.items() if value.isnan().any()]
    say("ran", case, took=round(time.monotonic() - start, 3))
    if nan:  # perhaps a wait that was given up after seconds: sixty times is too much
        say("error", case, ok=False, wrong=[f"NaN in {', '.join(nan)}"])
        raise Stalled
    errors = judge(got, eager, *tensors)
    wrong = [str(error) for error in errors if not error.ok]
    say("error", case, ok=not wrong, wrong=wrong, errors={e.name: [f"{e.fused:.1e}", f"{e.eager:.1e}"] for e in errors})

    differ = sum(not same(got, again) for again in repeated(fused, tensors, repeats, device))
    say("repeat", case, ok=not differ, differ=differ, of=repeats)
    bad = bool(wrong) + bool(differ)
    if streams:
        differ = on_two_streams(fused, tensors, repeats, device)
        say("streams", case, ok=not differ, differ=differ, of=repeats)
        bad += bool(differ)
    if device.type == "cuda":
        differ, microseconds = replayed(fused, tensors, replays, got)
        exact = family in ("se", "simam")
        ok = not any(differ.values()) if exact else all(error <= GRAPH_ERROR for error in differ.values())
        shown = {name: f"{error:.1e}" for name, error in differ.items()}
        say("graph", case, ok=ok, differ=shown, of=replays, both_us=round(microseconds, 1))
        bad += not ok
    filled_with_nan(False)
    return bad


def prepare_case(
    family: str, shape: tuple[int, ...], layout: str, block: bool, device: torch.device, seed: int = 0
) -> tuple[nn.Module, nn.Module, list[Tensor | None]]:
    """The fused module, the reference's with the same parameters, and x, dy and perhaps a residual in bf16."""
    import attn_kernels  # here, for prepare() has to come before

    torch.manual_seed(seed)
    eager = KERNELS[family].build(reference, shape[1]).to(device)
    fused = KERNELS[family].build(attn_kernels, shape[1]).to(device)
    fused.load_state_dict(eager.state_dict())

    def normal() -> Tensor:
        return torch.randn(shape, device=device).bfloat16().contiguous(memory_format=LAYOUTS[layout])

    return fused, eager, [(normal() + 0.25).relu(), normal(), normal() if block else None]


def filled_with_nan(on: bool) -> None:
    """Whether memory that torch.empty gives out holds NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = on


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def same(got: dict[str, Tensor], again: dict[str, Tensor]) -> bool:
    """Bit by bit."""
    return all(torch.equal(got[name], again[name]) for name in got)


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Buffers are at the end of the block as they were: BatchNorm's count what they see."""
    state = copy.deepcopy(module.state_dict())
    yield
    module.load_state_dict(state)


def repeated(
    module: nn.Module, tensors: Sequence[Tensor | None], repeats: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The same call again and again: in NaN and in what the last one left in memory, in turns; the latter half beside
    a copy on another stream, which takes part of the GPU from it.
    """
    cuda = device.type == "cuda"
    other = torch.cuda.Stream() if cuda else None
    source = torch.zeros(COPIED if cuda else 1, device=device)
    with restored(module):
        for i in range(repeats):
            filled_with_nan(i % 2 == 0)
            if cuda and i >= repeats // 2:
                with torch.cuda.stream(other):
                    source.copy_(source.roll(1)) if i % 5 == 0 else source.add_(1)
            yield results(module, *tensors)
        synchronize(device)
    filled_with_nan(False)


def on_two_streams(module: nn.Module, tensors: Sequence[Tensor | None], repeats: int, device: torch.device) -> int:
    """How many of as many pairs of calls, side by side on two streams, do not give what they give alone."""
    if device.type != "cuda":
        return 0
    twin = copy.deepcopy(module)
    others = [None if t is None else t.flip(0) for t in tensors]
    alone = results(module, *tensors), results(twin, *others)
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    differ = 0
    for _ in range(repeats):
        found = []
        for stream, m, inputs in zip(streams, (module, twin), (tensors, others), strict=True):
            with torch.cuda.stream(stream):
                found.append(results(m, *inputs))
        torch.cuda.synchronize()
        differ += not all(map(same, alone, found))
    return differ


def replayed(
    module: nn.Module, tensors: Sequence[Tensor | None], replays: int, got: dict[str, Tensor]
) -> tuple[dict[str, float], float]:
    """How far the results of a graph's last replay are from ``got``, of the norm, and the microseconds of a replay."""
    with timing.own_stream(), restored(module):
        results(module, *tensors)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            out = results(module, *tensors)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        differ = {}
        for name, value in got.items():
            norm = value.double().norm().item() or 1.0
            error = (out[name].double() - value.double()).norm().item() / norm
            differ[name] = 0.0 if torch.equal(out[name], value) else max(error, 1e-12)
        microseconds = 1e3 * begin.elapsed_time(end) / max(replays, 1)
        graph.reset()
    return differ, microseconds
