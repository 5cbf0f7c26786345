"""What the check prints."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks.accuracy import Verdict
from benchmarks.meter import Traffic

NOT_MEASURED = "not measured"
EAGER = "eager: timm's SE and CBAM, the published BAM and SimAM, in the dtype of x"


class Case(NamedTuple):
    """One module on one feature map."""

    module: str
    map: str
    layout: str
    dtype: str
    epilogue: bool


class Cost(NamedTuple):
    """What one case costs: traffic (forward, backward) in the interpreter, device seconds on a GPU.

    By provider: "fused", and where timm is installed "eager"; "compile" has seconds alone.
    """

    shape: tuple[int, ...]
    bytes_of_x: int
    traffic: dict[str, tuple[Traffic, Traffic]]
    seconds: dict[str, float]


class Finding(NamedTuple):
    """The verdict on one tensor."""

    module: str
    tensor: str
    dtype: str
    place: str
    verdict: Verdict


def header(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return (
        "No GPU: the kernels run in Triton's interpreter on pieces of the maps, and no time is measured "
        f"(torch {torch.__version__})."
    )


def accuracy_table(findings: Sequence[Finding], modules: Iterable[str], dtypes: Sequence[str]) -> Table:
    """A row per tensor, with the verdict nearest to its limit for each dtype."""
    table = _table(
        "Greatest error against float64 relative to the tensor's size, where it is nearest to what is allowed",
        "share: of what is allowed, twice the reference's error in that dtype and one unit in the last place of the "
        "largest element; means over the draws",
    )
    _columns(table, "module", "tensor")
    for dtype in dtypes:
        _columns(table, f"{dtype} fused", "reference", "share", justify="right")
    _columns(table, "verdict")
    for module in modules:
        table.add_section()
        rows: dict[str, list[Finding]] = {}
        for finding in findings:
            if finding.module == module:
                rows.setdefault(finding.tensor, []).append(finding)
        for tensor, found in rows.items():
            cells = []
            for dtype in dtypes:
                worst = max((f.verdict for f in found if f.dtype == dtype), key=lambda verdict: verdict.used)
                cells += [_error(worst.error), _error(worst.eager_error), _share(worst.used)]
            table.add_row(module, _short(tensor), *cells, _ok(all(f.verdict.ok for f in found)))
    return table


def traffic_table(costs: dict[Case, Cost]) -> Table:
    table = _table(
        f"Bytes touched in units of x ({_dtype(costs)}), forward + backward, and kernel launches",
        f"{EAGER}; small maps: what does not grow with x (parameters, gates) weighs more than on a whole map",
    )
    _columns(table, "module", "map", "layout", "epilogue")
    _columns(table, "eager", "launches", "fused", "launches", "eager / fused", "time on a GPU", justify="right")
    for case, cost in costs.items():
        cells = []
        for passes in map(cost.traffic.get, ("eager", "fused")):
            if passes is None:
                cells += [NOT_MEASURED] * 2
                continue
            cells.append(" + ".join(f"{traffic.touched / cost.bytes_of_x:.1f}" for traffic in passes))
            cells.append(" + ".join(str(traffic.launches) for traffic in passes))
        touched = {name: sum(traffic.touched for traffic in passes) for name, passes in cost.traffic.items()}
        table.add_row(*_place(case, cost), *cells, _ratio(touched, "eager", digits=1), NOT_MEASURED)
    return table


def time_table(costs: dict[Case, Cost]) -> Table:
    ratios = [
        [cost.seconds[name] / cost.seconds["fused"] for name in ("eager", "compile")]
        for cost in costs.values()
        if "eager" in cost.seconds
    ]
    means = ""
    if ratios:
        over_eager, over_compile = map(statistics.geometric_mean, zip(*ratios, strict=True))
        means = f"geometric means: {over_eager:.2f} times as fast as eager, {over_compile:.2f} as torch.compile\n"
    table = _table(f"Device time of forward + backward in microseconds ({_dtype(costs)})", means + EAGER)
    _columns(table, "module", "map", "layout", "epilogue")
    _columns(table, "eager", "torch.compile", "fused", "eager / fused", "compile / fused", justify="right")
    for case, cost in costs.items():
        seconds = cost.seconds
        times = (
            f"{seconds[name] * 1e6:.1f}" if name in seconds else NOT_MEASURED for name in ("eager", "compile", "fused")
        )
        table.add_row(*_place(case, cost), *times, *(_ratio(seconds, name) for name in ("eager", "compile")))
    return table


def network_line(verdict: Verdict) -> Text:
    return Text.assemble(
        "se_resnet_50 on the photograph, the reference's weights loaded with strict=True: logits off by "
        f"{_error(verdict.error)} of the largest (the reference {_error(verdict.eager_error)}, "
        f"allowed {_error(verdict.allowed)}): ",
        _ok(verdict.ok),
    )


def conclusion(findings: Sequence[Finding]) -> Text:
    """What is wrong, a line each, and how much is right."""
    wrong = [finding for finding in findings if not finding.verdict.ok]
    text = Text()
    for module, tensor, dtype, place, verdict in wrong:
        error, share = _error(verdict.error), _share(verdict.used)
        text.append(f"WRONG {module}, {place}, {dtype}: {tensor}: error {error}, {share} of the allowed\n", style="red")
    return text.append(f"{len(findings) - len(wrong)} of {len(findings)} comparisons agree with the reference.")


def _table(title: str, caption: str) -> Table:
    return Table(title=title, caption=caption, box=box.SIMPLE_HEAD)


def _columns(table: Table, *names: str, justify: str = "left") -> None:
    for name in names:
        table.add_column(name, justify=justify)


def _dtype(costs: dict[Case, Cost]) -> str:
    return next(iter(costs)).dtype


def _place(case: Case, cost: Cost) -> tuple[str, str, str, str]:
    shape = "x".join(map(str, cost.shape))
    return case.module, f"{case.map} {shape}", case.layout, "add + relu" if case.epilogue else ""


def _short(tensor: str) -> str:
    """The last three parts of a parameter's name."""
    prefix = "grad " if tensor.startswith("grad ") else ""
    return prefix + ".".join(tensor.removeprefix(prefix).split(".")[-3:])


def _error(value: float) -> str:
    return f"{value:.1e}"


def _ratio(values: dict[str, float], name: str, digits: int = 2) -> str:
    """One provider's value over that of fused."""
    return f"{values[name] / values['fused']:.{digits}f}" if name in values else NOT_MEASURED


def _share(value: float) -> str:
    return f"{value:.2f}"


def _ok(ok: bool) -> Text:
    return Text("ok") if ok else Text("WRONG", style="bold red")
