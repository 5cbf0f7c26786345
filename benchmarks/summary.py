"""What a call of ``all`` has found so far, in 80 lines, from the files that its steps left; failures first.

Needs nothing but Python, and takes files that are missing or cut short as they are.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

LINES = 80
FAILURES = 14
WIDTH = 220  # characters of a line that tells of a failure
STOPPED = "stopped at its limit"
BAD = ("failed", "hung", "died")
TRAFFIC = Path(__file__).parent / "results" / "traffic.csv"
MADE_UP = "**A rehearsal without a GPU: nothing was measured, and every figure below is made up.**"

Row = dict[str, str]


def text(out: Path, rehearse: bool, seconds: float, running: Sequence[str] = ()) -> str:
    """The summary of a folder, ``seconds`` into the call."""
    lines = json_lines(out / "steps.jsonl")
    steps = {line["step"]: line for line in lines if "step" in line}
    machine = next((line["environment"] for line in reversed(lines) if "environment" in line), {})
    smoke, rows, log = json_lines(out / "smoke.jsonl"), csv_rows(out), read(out / "log.txt")
    lines = [MADE_UP, ""] if rehearse or any("rehearsal" in row["gpu"] for row in rows) else []
    for part in (
        head(steps, machine, seconds, running),
        failures(steps, smoke, rows, log),
        first_contact(smoke),
        tests(steps, log),
        speed(rows),
        training(rows),
        moved(table(out / "ncu.csv")),
        left_out(steps, log),
    ):
        try:
            lines += part
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # a file of another kind
            lines += [f"(The rest of this part cannot be read: {type(error).__name__}: {error})", ""]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], "(cut here: the rest is in the other files)"]
    return "\n".join(lines) + "\n"


def head(steps: dict[str, dict], machine: dict, seconds: float, running: Sequence[str]) -> Iterator[str]:
    well = sum(step["status"] == "ok" for step in steps.values())
    gpu = "no GPU" if machine.get("GPUs") == "0" else machine.get("name", "a GPU that is not known yet")
    yield f"# attn_kernels on {gpu}: {well} of {len(steps)} steps went well"
    yield ""
    versions = ("torch", "triton", "Python", "numpy", "timm")
    yield f"commit {machine.get('commit', 'unknown')}, " + ", ".join(f"{n} {machine.get(n, '?')}" for n in versions)
    facts = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "mig.mode.current", "multiprocessors", "L2")
    yield ", ".join(f"{name} {machine.get(name, 'unknown')}" for name in facts)
    yield f"{seconds:.0f} s into the call" + (f"; running: {', '.join(running)}" if running else "")
    yield ""


def failures(steps: dict[str, dict], smoke: list[dict], rows: list[Row], log: str) -> Iterator[str]:
    """How steps went wrong, and what of results is wrong."""
    found = []
    for name, step in steps.items():
        if step["status"] in BAD or (step["status"] == STOPPED and name.startswith("smoke")):
            where = f" in {step['killed_in']}" if step.get("killed_in") else ""
            found.append(f"{name}: {step['status']}{where} after {step['seconds']:.0f} s: {step['last']}")
    for line in smoke:
        if line.get("ok") is False and line["step"] != "end":
            message = line.get("message") or "; ".join(line.get("wrong", ())) or f"{line.get('differ')} differ"
            found.append(
                f"{line['family']}, {line.get('launches', '')} launches, {line['step']}, {line['case']}: {message}"
            )
    seen = {}
    for row in rows:
        if row["note"].startswith("WRONG") or row["metric"] == "failed":
            place = " ".join(row[name] for name in ("kernel", "provider", "shape", "layout"))
            seen.setdefault(row["note"][:80], []).append(place + f": {row['note']}")
    for same in seen.values():
        found.append(same[0] + (f" (and {len(same) - 1} rows likewise)" if len(same) > 1 else ""))
    # As each test fails, and again with its message at the end, if the step has come so far.
    failed: dict[str, str] = {}
    for line in re.findall(r" s  tests[^:]*: (?:\[gw\d+\] \[ *\d+%\] )?((?:FAILED|ERROR) .*)", log):
        test = line.partition(" - ")[0].strip()
        failed[test] = max(failed.get(test, ""), line, key=len)
    found += [f"tests: {line}" for line in failed.values()]
    yield f"## Failures: {len(found) or 'none so far'}"
    yield from (f"- {' '.join(line.split())[:WIDTH]}" for line in found[:FAILURES])
    if len(found) > FAILURES:
        yield f"- and {len(found) - FAILURES} more: log.txt, smoke.jsonl, the CSV"
    yield ""


def first_contact(smoke: list[dict]) -> Iterator[str]:
    families: dict[tuple[str, str], list[dict]] = {}
    for line in smoke:
        if "launches" in line:
            families.setdefault((line["family"], line["launches"]), []).append(line)
    if not families:
        return
    yield "## First contact"
    yield "| family, launches | shapes run | worst error of y, of dx (of the reference) | repeats that differ | graph |"
    yield "| --- | --- | --- | --- | --- |"
    for (family, launches), lines in families.items():
        launched, ran = ([line for line in lines if line["step"] == step] for step in ("launching", "ran"))
        errors = [line["errors"] for line in lines if "errors" in line]
        worst = ", ".join(
            "{} ({})".format(*max((e[name] for e in errors), key=lambda pair: _number(pair[0]))) if errors else "-"
            for name in ("y", "dx")
        )
        repeats = [line for line in lines if line["step"] == "repeat"]
        differ = f"{sum(line['differ'] for line in repeats)} of {sum(line['of'] for line in repeats)}"
        graphs = [line for line in lines if line["step"] == "graph"]
        right = f"{sum(line['ok'] for line in graphs)} of {len(graphs)} right" if graphs else "-"
        silent = "" if len(launched) == len(ran) else f", then silent: {launched[-1]['case']}"
        yield f"| {family}, {launches} | {len(ran)}{silent} | {worst} | {differ} | {right} |"
    yield ""


def tests(steps: dict[str, dict], log: str) -> Iterator[str]:
    done = [step for name, step in steps.items() if name.startswith("tests")]
    if not done:
        return
    totals = re.findall(
        r" s  tests[^:]*: (?:=+ )?(\d+ (?:passed|failed|error|skipped).*? in [\d.]+ ?s.*?)(?: =+)?$", log, re.M
    )
    yield f"## Tests: {totals[-1] if totals else done[-1]['status']}"
    yield ""


def speed(rows: list[Row]) -> Iterator[str]:
    """Batch 32 in bf16, forward and backward, in both layouts; and the means of all."""
    times = {_place(row): row for row in rows if (row["mode"], row["metric"]) == ("both", "time")}
    shares = {_place(row): row for row in rows if (row["mode"], row["metric"]) == ("both", "copy_share")}
    fused = {place: row for place, row in times.items() if place[1].startswith("fused")}
    if not fused:
        return
    yield "## Speed: forward + backward, bf16, batch 32, channels_last / contiguous"
    yield "| kernel, shape | us | share of a copy's bandwidth | times as fast as eager | as torch.compile |"
    yield "| --- | --- | --- | --- | --- |"
    lines: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {}
    for place, row in fused.items():
        kernel, provider, shape, layout, dtype = place
        if dtype != "bf16" or not shape.startswith(("32x", "2x")):  # 2 in a rehearsal
            continue
        ratios = [_ratio(times.get((kernel, other, *place[2:])), row) for other in ("eager", "compile")]
        share = shares.get(place)
        mark = "".join(f" {word}" for word in ("WRONG",) if row["note"].startswith(word))
        cells = f"{float(row['p50']):.0f}{mark}", f"{float(share['p50']):.0f}%" if share else "-", *ratios
        lines.setdefault((kernel, provider, shape), {})[layout] = cells
    for (kernel, provider, shape), by_layout in list(lines.items())[:20]:
        cells = [by_layout.get(layout, ("-",) * 4) for layout in ("channels_last", "contiguous")]
        name = f"{kernel} {shape}" + provider.removeprefix("fused").replace("_", " ")
        yield f"| {name} | " + " | ".join(" / ".join(pair) for pair in zip(*cells, strict=True)) + " |"
    for other in ("eager", "compile"):
        pairs = [(times.get((p[0], other, *p[2:])), row) for p, row in fused.items()]
        ratios = [float(a["p50"]) / float(b["p50"]) for a, b in pairs if a]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            yield f"Geometric mean over {other}, {len(ratios)} cells of all batches: {mean:.2f} times as fast."
    yield ""


def training(rows: list[Row]) -> Iterator[str]:
    times = {_place(row): row for row in rows if (row["mode"], row["metric"]) == ("train", "time")}
    taxes = {_place(row): row for row in rows if (row["mode"], row["metric"]) == ("train", "attention_tax")}
    if not times:
        return
    yield "## Training step, bf16 channels_last: ms (of which attention)"
    providers = list(dict.fromkeys(place[1] for place in times))
    yield "| network | " + " | ".join(name.replace("_", " ") for name in providers) + " |"
    yield "| --- |" + " --- |" * len(providers)
    for network in list(dict.fromkeys(place[0] for place in times))[:9]:
        cells = []
        for provider in providers:
            found = [place for place in times if place[:2] == (network, provider)]
            tax = f" ({float(taxes[found[-1]]['p50']):.1f})" if found and found[-1] in taxes else ""
            cells.append(f"{float(times[found[-1]]['p50']):.1f}{tax}" if found else "-")
        yield f"| {network} | " + " | ".join(cells) + " |"
    yield ""


def moved(rows: list[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "## Bytes of one forward and backward, in units of x's"
    yield "| family, shape | DRAM measured | DRAM modelled | L2 measured | kernels |"
    yield "| --- | --- | --- | --- | --- |"
    modelled = {
        row["op"].lower(): float(row["dram_forward"]) + float(row["dram_backward"])
        for row in table(TRAFFIC)
        if (row["stage"], row["mode"], row["provider"]) == ("stage1", "train", "fused")
        and row["layout"] == rows[0]["layout"]
    }
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        x = float(own[0]["bytes_of_x"])
        dram = sum(float(row["dram_read"]) + float(row["dram_written"]) for row in own) / x
        l2 = sum(float(row["l2"]) for row in own) / x
        model = f"{modelled[family]:.2f}" if family in modelled else "-"
        yield f"| {family}, {own[0]['shape']} {own[0]['layout']} | {dram:.2f} | {model} | {l2:.2f} | {len(own)} |"
    yield ""


def left_out(steps: dict[str, dict], log: str) -> Iterator[str]:
    """Steps that were not done or not finished; and kernels that precompile has missed."""
    missed = [int(n) for n in re.findall(r"kernels that were not in Triton's cache: (\d+)", log)]
    if sum(missed):
        yield f"Kernels that {len(missed)} processes had to compile themselves: {sum(missed)} (see log.txt)."
    found = [name for name, step in steps.items() if step["status"] == "no time"]
    unfinished = [name for name, step in steps.items() if step["status"] in ("unfinished", STOPPED)]
    skipped = [f"{name} ({step['last'][:80]})" for name, step in steps.items() if step["status"] == "skipped"]
    for title, names in (("No time for", found), ("Not finished", unfinished), ("Skipped", skipped)):
        if names:
            yield f"{title}: {', '.join(names)}."[:1000]
    if found or unfinished:
        yield "The same command again goes on from here."


def _place(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("kernel", "provider", "shape", "layout", "dtype"))


def _ratio(slow: Row | None, quick: Row) -> str:
    return f"{float(slow['p50']) / float(quick['p50']):.2f}" if slow else "-"


def _number(text: str) -> float:
    """NaN is worse than everything."""
    number = float(text)
    return math.inf if math.isnan(number) else number


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def json_lines(path: Path) -> list[dict]:
    """The lines of a file that are whole."""
    found = []
    for line in read(path).splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut short
            continue
    return [line for line in found if isinstance(line, dict)]


def table(path: Path) -> list[Row]:
    """The rows of a CSV file that are whole."""
    return [row for row in csv.DictReader(read(path).splitlines()) if None not in row and None not in row.values()]


def csv_rows(out: Path) -> list[Row]:
    """Of speed and train, whatever the GPU is called."""
    found: Iterable[Path] = sorted(path for path in out.glob("*.csv") if path.name != "ncu.csv")
    return [row for path in found for row in table(path) if "metric" in row]


def running(out: Path) -> str:
    """The provider and the rest of the cell that was being measured when its process was killed; empty if none was."""
    for path in out.glob("*.running"):
        try:
            (kernel, provider, *rest), _ = json.loads(read(path))
        except ValueError:
            continue
        return " ".join([provider, kernel, *rest])
    return ""
