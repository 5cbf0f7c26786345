"""What fuse_ makes of every architecture of timm and torchvision that has an attention module it knows by name.

Networks are built on the meta device, without memory. Modules are counted by the names of their classes, whatever fuse_
knows of them: the exit status is 1 if it passes one over.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from torch.overrides import TorchFunctionMode

from benchmarks.provenance import command, commit, versions

NAMES = {
    *("SEModule", "SELayer", "SqueezeExcite", "SqueezeExciteCl", "SqueezeExcitation", "EffectiveSEModule"),
    *("CbamModule", "LightCbamModule", "CBAM", "BAM", "simam_module"),
}
Row = dict[str, object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m benchmarks coverage --architectures seresnet50 efficientnet_b0"
    parser.add_argument("--architectures", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--output", type=Path, metavar="CSV", help="of the rows; the record is benchmarks/results/")


def run(arguments: argparse.Namespace) -> int:
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    wanted = [
        (library, name, build)
        for library, builders in libraries().items()
        for name, build in builders.items()
        if arguments.architectures is None or name in arguments.architectures
    ]
    provenance = {**versions(), "timm": version("timm"), "torchvision": version("torchvision")}
    provenance |= {"commit": commit(), "command": command()}
    rows = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("architectures", total=len(wanted))
        for library, name, build in wanted:
            progress.update(task, advance=1, description=name)
            row = describe(on_meta(build))
            if row["found"] or row["fused"] or row["left"]:
                rows.append({"architecture": name, "library": library, **row, **provenance})
    if rows:
        if arguments.output:
            write(rows, arguments.output)
        console.print(table(rows))
    missed = [row for row in rows if row["missed"]]
    for row in missed:
        console.print(f"WRONG {row['architecture']}: {row['missed']} modules passed over")
    console.print(f"{len(rows)} of {len(wanted)} architectures have attention modules. {_written(arguments.output)}")
    return 1 if missed else 0


def _written(path: Path | None) -> str:
    return f"Rows: {path}" if path else "No rows were written (--output)."


def libraries() -> dict[str, dict[str, Callable[[], nn.Module]]]:
    """How to build every architecture, by library and name."""
    if not torch.cuda.is_available():  # beside a CPU build of torch, torchvision's compiled operators do not register
        sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
    import timm
    import torchvision.models

    return {
        "timm": {name: lambda name=name: timm.create_model(name) for name in timm.list_models()},
        "torchvision": {
            name: lambda name=name: torchvision.models.get_model(name, **_without_weights(name))
            for name in torchvision.models.list_models()
        },
    }


class _EmptyOnMeta(TorchFunctionMode):
    """Puts on the meta device what layers make their parameters of, not what a network computes its sizes with."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.empty, torch.ones, torch.zeros):
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A network without memory."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:  # it reads numbers from a tensor, as torchvision's RegNets do
        with _EmptyOnMeta():
            return build()


def _without_weights(name: str) -> dict[str, object]:
    """Detection and segmentation networks load the weights of their backbones unless they are told not to."""
    import torchvision.models

    parameters = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    return {"weights_backbone": None} if "weights_backbone" in parameters else {}


def describe(network: nn.Module) -> Row:
    """What fuse_ makes of a network, which is as it was afterwards."""
    from attn_kernels import fuse_  # here, for Triton is imported after what another command sets

    found = list(known(network))
    with fuse_(network) as report:
        rows = report.rows
    listed = {row.name for row in rows}
    return {
        "found": len(found),
        "fused": report.fused,
        "kinds": _counts(row.kind for row in rows if row.fused),
        "epilogues": sum(bool(row.epilogue) for row in rows),
        "epilogues_left": _counts(
            row.reason.removeprefix("epilogue not fused: ") for row in rows if row.fused and row.reason
        ),
        "left": report.left,
        "left_because": _counts(f"{row.cls}: {row.reason}" for row in rows if not row.fused),
        "missed": sum(name not in listed for name, _ in found),
        "configurations": "; ".join(sorted({configuration(module) for _, module in found})),
    }


def known(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attention modules of a network, by the names of their classes."""
    for name, module in network.named_modules(remove_duplicate=False):
        if type(module).__name__ in NAMES:
            yield name, module


def configuration(module: nn.Module) -> str:
    """A module's class and options, without its sizes."""
    options = [name for name in ("add_maxpool",) if getattr(module, name, False)]
    parts = [_part(child) for child in module.modules() if not len(child._modules)]
    cls = type(module)
    return f"{cls.__module__}.{cls.__name__}({', '.join([*filter(None, parts), *options])})"


def _part(child: nn.Module) -> str:
    if type(child) is nn.Identity:
        return ""
    return type(child).__name__ + (" without bias" if getattr(child, "bias", True) is None else "")


def _counts(reasons: Iterator[str]) -> str:
    return "; ".join(f"{n} x {reason}" for reason, n in sorted(Counter(reasons).items()))


def write(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[Row]) -> Table:
    """Sums over the architectures of each library."""
    columns = "architectures", "found", "fused", "epilogues", "left", "missed"
    shown = Table("", *(f"[bold]{name}" for name in columns), box=None)
    groups = {
        library: [r for r in rows if r["library"] == library] for library in dict.fromkeys(r["library"] for r in rows)
    }
    for name, members in groups.items():
        shown.add_row(name, str(len(members)), *(str(sum(int(r[c]) for r in members)) for c in columns[1:]))
    return shown
