"""``speed --sweep``: one option of a kernel's launches changed at a time, without a GPU to time it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import speed, sweep
from benchmarks.__main__ import main
from benchmarks.rows import Environment, Measurement, Results, read
from benchmarks.sweep import AS_IT_IS, Change
from benchmarks.timing import Quantiles

pytestmark = pytest.mark.usefixtures("single_launch")

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that there is a GPU")


def a_cell(kernel="se", side=56):
    cells = speed.cells([kernel], ["fused"], [32], ["channels_last"], ["bf16"])
    return next(cell for cell in cells if cell.shape[2] == side)


def value_of(option: str, arguments: dict[str, object]) -> int:
    return arguments["TILE"].stages if option == "stages" else arguments[option]


class TestChanges:
    def test_of_a_launch(self):
        forward, backward = sweep.launches(a_cell(), 132).values()
        assert [launch.kernel for launch in forward] == ["channel_gate_kernel"]
        assert [launch.kernel for launch in backward] == ["gate_bwd_kernel"]
        arguments = forward[0].arguments
        found = list(sweep.changes(forward[0]))
        assert len(set(found)) == len(found)
        assert {change.option for change in found} == {"num_warps", "maxnreg", "stages", "lookahead"}
        assert not [change for change in found if value_of(change.option, arguments) == change.value]
        assert all(change.value <= arguments["groups"] for change in found if change.option == "lookahead")
        assert {change.option for change in sweep.changes(backward[0])} == {"num_warps", "maxnreg", "lookahead"}

    def test_ask_for_no_more_registers_than_there_are(self):
        launch = sweep.Launched("a_kernel", {"num_warps": 16, "maxnreg": None})
        found = [(change.option, change.value) for change in sweep.changes(launch)]
        assert found == [("num_warps", 8), ("maxnreg", 64), ("maxnreg", 80), ("maxnreg", 96), ("maxnreg", 128)]

    def test_are_read_as_they_are_written(self):
        change = Change("gate_bwd_kernel", "lookahead", 14)
        assert change.provider == "fused gate_bwd lookahead=14"
        assert Change.of(change.provider) == change
        assert Change.of(AS_IT_IS) is None

    @pytest.mark.parametrize(
        ("option", "value"), [("num_warps", 16), ("maxnreg", 255), ("stages", 2), ("lookahead", 3)]
    )
    def test_change_one_option_of_one_kernel(self, option, value):
        plain = sweep.launches(a_cell("cbam"), 132)
        found = sweep.launches(a_cell("cbam"), 132, Change("channel_gates_kernel", option, value))
        assert plain.keys() == found.keys()
        before, after = ([launch for launches in d.values() for launch in launches] for d in (plain, found))
        assert [launch.kernel for launch in before] == [launch.kernel for launch in after]
        for a, b in zip(before, after, strict=True):
            names = {
                n for n in a.arguments if isinstance(a.arguments[n], int | tuple) and n not in ("epoch", "weights")
            }
            differing = {n for n in names - {"norm", "spatial", "gradients"} if a.arguments[n] != b.arguments[n]}
            if a.kernel == "channel_gates_kernel":
                assert value_of(option, b.arguments) == value
                assert differing == {option, "TILE"} - ({"stages"} if option == "stages" else set()) - (
                    {"TILE"} if option == "lookahead" else set()
                )
            else:
                assert not differing


@without_gpu
def test_rehearsal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "REGISTERS", (128,))
    monkeypatch.setattr(sweep, "STAGES", (1, 2))
    options = ["--kernels", "se", "--batches", "32", "--layouts", "contiguous", "--dtypes", "bf16"]
    assert main(["speed", "--sweep", "--rehearse", *options, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    rows = read(path)
    assert all(row.is_right for row in rows)
    assert {(row.provider, row.mode) for row in rows} >= {
        *((AS_IT_IS, mode) for mode in ("forward", "backward")),
        ("fused channel_gate stages=2", "forward"),
        ("fused gate_bwd num_warps=8", "backward"),
    }
    assert "0 of " in capsys.readouterr().out


def test_report_names_what_is_quicker_than_times_vary(tmp_path, capsys):
    results = Results(tmp_path / "gpu.csv", Environment("Made-up GPU", "0", "0", "0", "abc", "sweep"))
    place = ("32x256x56x56", "contiguous", "bf16")
    for provider, times in {
        AS_IT_IS: (9.9, 10, 10.1),
        "fused gate_bwd lookahead=3": (7.9, 8, 8.1),
        "fused gate_bwd lookahead=9": (9, 9.8, 10),
        "fused gate_bwd num_warps=8": (12, 12, 12),
    }.items():
        results.append(("se", provider, *place), "backward", [Measurement("time", "us", Quantiles(*times))])
    results.fail(("se", "fused gate_bwd maxnreg=64", *place), "backward", "no time")
    sweep.report(results.rows)
    text = capsys.readouterr().out
    assert "gate_bwd lookahead=3" in text
    assert "20%" in text
    assert "lookahead=9" not in text
    assert "num_warps=8" not in text
    assert "1 of 3 changes are quicker" in text


AHEAD = """
from benchmarks import sweep, speed
cell = speed.cells(["simam"], ["fused"], [32], ["contiguous"], ["bf16"])[-1]
cells = [cell._replace(provider=p) for p in (sweep.AS_IT_IS, "fused simam_fwd maxnreg=64")]
sweep.compile_ahead(cells, 90, 132)
sweep.compile_ahead(cells[:1], 90, 132)
"""


def test_changed_launches_are_compiled_ahead(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", AHEAD],
        cwd=Path(__file__).parents[1],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # Forward with either limit, and backward.
    assert done.stdout.splitlines() == ["3 of 3 kernels compiled ahead", "0 of 2 kernels compiled ahead"]
