"""One call on a GPU: steps that hang, die or fill the disk, what is done next, and what is told of it."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import all as everything
from benchmarks import ncu, process, summary
from benchmarks.__main__ import main
from benchmarks.process import DIED, FAILED, HUNG, OK, SKIPPED, STOPPED, UNFINISHED, Ended, Log, Step, run_all
from benchmarks.rows import Environment, Measurement, Results
from benchmarks.timing import Quantiles
from reference.catalogue import FAMILIES

pytestmark = pytest.mark.usefixtures("single_launch")

ROOT = Path(__file__).parents[1]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that there is no GPU, or one")


def step(name: str, code: str, limit: float = 60, **options) -> Step:
    return Step(name, (sys.executable, "-c", code), limit, **options)


def fault(name: str, limit: float = 2) -> Step:
    return Step(name, (sys.executable, "-m", "benchmarks.rehearsal", name), limit)


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "GRACE", 0.5)
    monkeypatch.setattr(process, "LAST_WORDS", 0.5)
    return Log(tmp_path / "log.txt", time.monotonic())


class TestSteps:
    def test_say_how_they_ended(self, log, tmp_path):
        steps = [step(str(code), f"raise SystemExit({code})") for code in range(5)]
        steps += [
            Step("missing", ("no-such-program-anywhere",), 5),
            step("other", "raise SystemExit(5)", meaning={5: OK}),
        ]
        found = {end.step.name: end.status for end in run_all(steps, log)}
        expected = {"0": OK, "1": FAILED, "2": SKIPPED, "3": UNFINISHED, "4": DIED, "missing": SKIPPED, "other": OK}
        assert found == expected

    def test_that_hang_die_or_print_without_end(self, log, tmp_path, monkeypatch):
        marks = []
        monkeypatch.setattr(
            process.uuid, "uuid4", lambda: marks.append(len(marks)) or SimpleNamespace(hex=f"m{marks[-1]}x")
        )
        heard = []
        start = time.monotonic()
        ends = run_all([fault("hang"), fault("die"), fault("fill")], log, lambda end: heard.append(end.step.name))
        assert time.monotonic() - start < 30
        found = {end.step.name: end for end in ends}
        assert {name: end.status for name, end in found.items()} == {"hang": HUNG, "die": DIED, "fill": STOPPED}
        assert sorted(heard) == ["die", "fill", "hang"]
        assert found["hang"].last == "launching what never ends"
        assert found["die"].last == "exit status -9: launching what kills its process"
        # Neither the process nor the one that it left in a session of its own is there any more.
        assert not any(process.marked(f"m{mark}x") for mark in marks)
        text = (tmp_path / "log.txt").read_text()
        assert len(text) < 3 * process.LOGGED
        assert "fill: prints more than 512 KB" in text
        assert "hang: Fatal Python error: Aborted" in text  # and where

    def test_go_on_where_the_log_cannot_be_written(self):
        ends = run_all([step("a", "print('hi')")], Log(Path("/dev/full"), time.monotonic()))
        assert [end.status for end in ends] == [OK]

    def test_end_with_their_sequence(self, tmp_path):
        code = (
            "import signal, sys, time; from pathlib import Path; from benchmarks import process as p;"
            "signal.signal(signal.SIGINT, signal.default_int_handler);"  # which a job in the background ignores
            f"p.run_all([p.Step('x', (sys.executable, '-m', 'benchmarks.rehearsal', 'hang'), 99)],"
            f"p.Log(Path({str(tmp_path / 'log.txt')!r}), time.monotonic()))"
        )
        sequence = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        lines = iter(sequence.stdout.readline, "")
        assert any("launching" in line for line in lines)
        children = Path(f"/proc/{sequence.pid}/task/{sequence.pid}/children").read_text().split()
        sequence.send_signal(signal.SIGINT)
        assert sequence.wait(30) != 0
        assert children
        assert not any(is_running(int(pid)) for pid in children)

    def test_are_interrupted_before_they_are_killed_with_it(self, log, monkeypatch, tmp_path):
        done = tmp_path / "done"
        code = f"import time\ntry:\n print('on', flush=True); time.sleep(99)\nfinally: open({str(done)!r}, 'w')"

        def stop(seconds):
            if "on" in (tmp_path / "log.txt").read_text().split():
                monkeypatch.setattr(process.time, "sleep", sleep)
                raise KeyboardInterrupt
            sleep(seconds)

        sleep = time.sleep
        monkeypatch.setattr(process.time, "sleep", stop)
        with pytest.raises(KeyboardInterrupt):
            run_all([step("a", code)], log)
        assert done.exists()

    def test_heed_an_interrupt_that_their_sequence_ignores(self, log):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            (end,) = run_all([Step("a", ("sleep", "99"), 1)], log)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)
        assert end.status == STOPPED


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Machine:
    """Runs no step, and says of each how it ended: as ``statuses`` say, else well, in a second each."""

    def __init__(self, monkeypatch, **statuses):
        self.now, self.statuses, self.ran, self.environments = 0.0, statuses, [], {}
        monkeypatch.setattr(everything, "run_all", self.run_all)
        monkeypatch.setattr(everything, "tool", lambda name: None)
        monkeypatch.setattr(everything.time, "monotonic", lambda: self.now)

    def run_all(self, steps, log, ended):
        for each in steps:
            self.ran.append(each.name)
            self.environments[each.name] = dict(each.environment)
            status = self.statuses.get(each.name.replace(" ", "_"), OK)
            self.now += each.limit if status in (HUNG, UNFINISHED) else 1
            self.look(each)
            ended(Ended(each, status, 1.0, f"the last line of {each.name}"))

    def look(self, step):
        """Leave what the first step finds of the machine."""
        if step.name == "environment":
            out = Path(step.command[step.command.index("--out") + 1])
            process.append(out / "steps.jsonl", MACHINE)

    def call(self, out, *options):
        self.ran = []
        return main(["all", "--minutes", "9", "--out", str(out), "--commit", "abc", *options])


MACHINE = '{"environment": {"name": "Made-up GPU", "commit": "abc", "torch": "0.0", "GPUs": "1"}}\n'
FIRST = ["environment", "precompile", "smoke se", "smoke cbam", "smoke bam", "smoke simam"]
SPEED = [f"speed {kernel}" for kernel in everything.KERNELS]
TRAIN = [f"train {network}" for network in everything.NETWORKS]
COMPILED = [f"{name} compiled" for name in TRAIN]
BYTES = "bytes se"  # of one family, which finds that ncu is missing


class TestSequence:
    def test_is_in_order_and_done_once(self, tmp_path, monkeypatch):
        machine = Machine(monkeypatch)
        assert machine.call(tmp_path) == 0
        assert machine.ran == [*FIRST, "tests", *SPEED, *TRAIN, BYTES, *COMPILED]
        assert not any(machine.environments.values())
        # The machine may be another one: it is looked at, and its cache filled.
        assert machine.call(tmp_path) == 0
        assert machine.ran == FIRST[:2]
        assert machine.call(tmp_path, "--deep") == 0
        families = ["se", "cbam", "bam", "simam"]
        deep = [f"{name} {family}" for name in ("repeats", "memcheck", "racecheck") for family in families]
        assert machine.ran == [*FIRST[:2], *deep, *(f"fuzz {10**6 * i}" for i in range(4))]
        assert {path.name for path in tmp_path.iterdir()} == {"summary.md", "steps.jsonl"}

    def test_ends_in_time_and_goes_on_from_there(self, tmp_path, monkeypatch, capsys):
        machine = Machine(monkeypatch, **{name.replace(" ", "_"): UNFINISHED for name in (*SPEED, *TRAIN)})
        assert machine.call(tmp_path) == 3
        assert machine.now <= 9 * 60
        assert machine.ran[: len(FIRST) + 1 + len(SPEED)] == [*FIRST, "tests", *SPEED]
        text = (tmp_path / "summary.md").read_text()
        assert "Not finished: speed se" in text
        assert "goes on from here" in text
        assert text == capsys.readouterr().out.removesuffix("\n")
        machine.statuses.clear()
        machine.now = 0.0
        assert machine.call(tmp_path) == 0
        assert machine.ran[: 2 + len(SPEED)] == [*FIRST[:2], *SPEED]
        assert machine.ran[-len(COMPILED) :] == COMPILED

    def test_has_no_time_for_steps_that_it_cannot_start(self, tmp_path, monkeypatch):
        machine = Machine(monkeypatch)
        assert main(["all", "--minutes", "0.2", "--out", str(tmp_path)]) == 3
        assert machine.ran == []
        assert "No time for: environment, precompile" in (tmp_path / "summary.md").read_text()

    @pytest.mark.parametrize(
        ("first", "again", "plain"), [(HUNG, OK, True), (DIED, DIED, True), (FAILED, OK, True), (FAILED, FAILED, False)]
    )
    def test_measures_a_family_in_plain_launches(self, first, again, plain, tmp_path, monkeypatch):
        machine = Machine(monkeypatch, smoke_se=first, smoke_se_in_plain_launches=again)
        assert machine.call(tmp_path) == 1
        assert machine.ran[len(FIRST)] == "smoke se in plain launches"
        end = " in plain launches" if plain else ""
        own = ["speed se", "speed se_add_relu", "train se_resnet50", "train timm/efficientnet_b0"]
        assert {name + end for name in own} <= {*machine.ran}
        assert {"speed cbam", "speed bam", "train simam_resnet50"} <= {*machine.ran}
        in_plain = {name for name, environment in machine.environments.items() if environment}
        assert in_plain == {name for name in machine.ran if name.endswith("in plain launches")}
        assert ("tests in plain launches" in machine.ran) == plain
        assert machine.environments["smoke se in plain launches"] == {"ATTN_KERNELS_SINGLE_LAUNCH": "0"}

    def test_changes_to_plain_launches_where_a_fused_cell_kills_its_process(self, tmp_path, monkeypatch):
        machine = Machine(monkeypatch, speed_cbam=HUNG, speed_simam=DIED)
        words = {"speed cbam": "fused cbam 32x256x56x56", "speed simam": "compile simam 32x256x56x56"}
        monkeypatch.setattr(summary, "running", lambda out: words.get(machine.ran[-1], ""))
        machine.statuses["speed_simam"] = DIED
        assert machine.call(tmp_path) == 1
        assert {"speed cbam in plain launches", "train cbam_resnet50 in plain launches"} <= {*machine.ran}
        assert machine.ran.count("speed simam") == 2  # with the next cell, as it was
        assert "train simam_resnet50" in machine.ran
        assert "speed cbam: hung in fused cbam 32x256x56x56" in (tmp_path / "summary.md").read_text()

    def test_goes_on_where_the_disk_is_full(self, tmp_path, monkeypatch, capsys):
        machine = Machine(monkeypatch)

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        monkeypatch.setattr(Path, "open", full)
        machine.look = lambda step: None
        assert machine.call(tmp_path) == 0
        assert machine.ran == [*FIRST, "tests", *SPEED, *TRAIN, BYTES, *COMPILED]
        assert "summary.md cannot be written" in capsys.readouterr().err

    @without_gpu
    def test_says_that_there_is_no_gpu(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(everything, "stages", lambda call: [[call.step("environment", "environment", limit=99)]])
        assert main(["all", "--out", str(tmp_path)]) == 2
        assert "all needs an NVIDIA GPU" in capsys.readouterr().err
        assert "needs an NVIDIA GPU" in (tmp_path / "summary.md").read_text()


def test_families_are_the_catalogues():
    assert tuple(FAMILIES) == everything.FAMILIES


def test_needs_nothing_beside_torch_and_triton():
    """The commands of a call load where what other commands need is not installed."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(['rich', 'timm', 'matplotlib', 'torchvision', 'pytest', 'xdist']);"
        "from benchmarks import all; assert 'torch' not in sys.modules;"
        "from benchmarks import environment, fuzz, ncu, once, precompile, runner, smoke, speed, train"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


class TestRehearsal:
    """Real processes, few of them."""

    @without_gpu
    def test_measures_nothing_and_says_so(self, tmp_path, monkeypatch):
        def stages(call):
            yield [
                call.step("smoke simam", "smoke", "simam", "--repeats", "2", limit=300),
                everything.smoke(call, "bam"),
            ]
            yield [everything.speed(call, "simam", 300)]

        monkeypatch.setattr(everything, "stages", stages)
        options = ["--minutes", "20", "--commit", "abc", "--rehearse", "smoke bam=die"]
        assert main(["all", "--out", str(tmp_path), *options]) == 1
        text = (tmp_path / "summary.md").read_text()
        assert text.startswith("**A rehearsal without a GPU: nothing was measured")
        assert "smoke bam: died" in text
        assert "| simam, single | 2 |" in text
        assert "| simam 2x16x8x8 | 1000 / 1000 | 100% / 100% | 1.00 / 1.00 | 1.00 / 1.00 |" in text
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"summary.md", "log.txt", "steps.jsonl", "smoke.jsonl", "rehearsal_nothing_measured.csv"}
        log = (tmp_path / "log.txt").read_text()
        assert "launching" in log
        assert "Traceback" not in log


def write_lines(path: Path, *lines: dict) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


class TestSummary:
    def test_of_nothing(self, tmp_path):
        text = summary.text(tmp_path, False, 0.0)
        assert "Failures: none so far" in text
        assert summary.text(tmp_path / "none", True, 0.0).startswith("**A rehearsal")

    def test_of_files_of_another_kind(self, tmp_path):
        write_lines(tmp_path / "smoke.jsonl", {"family": "se", "launches": "single", "step": "repeat"})
        write_lines(tmp_path / "steps.jsonl", {"step": "tests", "status": "failed", "seconds": 1, "last": "x"})
        text = summary.text(tmp_path, False, 0.0)
        assert "cannot be read: KeyError" in text
        assert "## Tests: failed" in text

    def test_puts_failures_first_and_ends_in_time(self, tmp_path):
        for i in range(200):
            line = {"family": "se", "launches": "single", "step": "error", "case": f"case {i}", "ok": False}
            write_lines(tmp_path / "smoke.jsonl", {**line, "wrong": ["y: error nan"]})
            write_lines(
                tmp_path / "steps.jsonl", {"step": f"s {i}", "status": "failed", "seconds": 1, "last": "x" * 999}
            )
        with (tmp_path / "steps.jsonl").open("a") as file:
            file.write('{"step": "cut sho')
        lines = summary.text(tmp_path, False, 1.0).splitlines()
        assert len(lines) <= 80
        assert max(map(len, lines)) < 400
        titles = [line for line in lines if line.startswith("##")]
        assert titles[0] == "## Failures: 400"
        assert "- and 386 more: log.txt, smoke.jsonl, the CSV" in lines

    def test_of_rows(self, tmp_path):
        here = Environment("Made-up GPU", "0.0", "0.0", "0.0", "abc", "python -m benchmarks speed")
        results = Results(tmp_path / "made_up_gpu.csv", here)
        shape = "32x256x56x56"
        for provider, microseconds in (("fused", 100), ("eager", 300), ("compile", 150)):
            place = ("se", provider, shape, "channels_last", "bf16")
            if provider == "fused":
                results.mark(place, "WRONG: y: error 1.0")
            value = Quantiles.exactly(microseconds)
            found = [Measurement("time", "us", value), Measurement("copy_share", "%", Quantiles.exactly(80))]
            results.append(place, "both", found)
        place = ("se_resnet50", "fused", "128x3x224x224", "channels_last", "bf16")
        found = [
            Measurement("time", "ms", Quantiles.exactly(70)),
            Measurement("attention_tax", "ms", Quantiles(1, 2, 3)),
        ]
        results.append(place, "train", found)
        results.fail(("se_resnet50", "compile", *place[2:]), "train", "OutOfMemoryError: much")
        text = summary.text(tmp_path, False, 1.0)
        assert f"| se {shape} | 100 WRONG / - | 80% / - | 3.00 / - | 1.50 / - |" in text
        assert "| se_resnet50 | 70.0 (2.0) |" in text
        assert "- se fused 32x256x56x56 channels_last: WRONG: y: error 1.0" in text
        assert "- se_resnet50 compile 128x3x224x224 channels_last: OutOfMemoryError: much" in text
        assert "Geometric mean over eager, 1 cells of all batches: 3.00 times as fast." in text

    def test_of_tests_and_bytes(self, tmp_path):
        log = Log(tmp_path / "log.txt", time.monotonic())
        for line in (
            "[gw3] [ 12%] FAILED tests/test_ops.py::test_x ",
            "FAILED tests/test_ops.py::test_x - assert 1 == 2",
            "== 1 failed, 9 passed in 31.2s ==",
        ):
            log.say("tests in plain launches", line)
        write_lines(
            tmp_path / "steps.jsonl", {"step": "tests in plain launches", "status": "failed", "seconds": 31, "last": ""}
        )
        x = 32 * 256 * 56 * 56 * 2
        columns = ",".join(ncu.COLUMNS)
        row = f"se,32x256x56x56,channels_last,bf16,{x},channel_gate_kernel,{x},{2 * x},{4 * x},100"
        (tmp_path / "ncu.csv").write_text(f"{columns}\n{row}\n{row[:40]}")
        text = summary.text(tmp_path, False, 1.0)
        assert text.count("- tests: FAILED tests/test_ops.py::test_x") == 1
        assert "## Tests: 1 failed, 9 passed in 31.2s" in text
        (line,) = (line for line in text.splitlines() if line.startswith("| se, 32x256x56x56"))
        _, _, measured, modelled, l2, kernels, _ = line.split("|")
        assert (float(measured), float(l2), int(kernels)) == (3, 4, 1)
        assert 4 < float(modelled) < 8


class TestNcu:
    PRINTED = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","gate_kernel(int, float)","dram__bytes_read.sum","byte","51,380,224"
"0","gate_kernel(int, float)","lts__t_bytes.sum","byte","1000"
"1","dx_kernel","dram__bytes_write.sum","byte","7"
se: called once
"""

    def test_reads_what_is_printed(self):
        first, second = ncu.kernels(self.PRINTED.splitlines())
        assert first == ("gate_kernel", {"dram_read": 51380224, "l2": 1000})
        assert second == ("dx_kernel", {"dram_written": 7})
        assert ncu.kernels(["==ERROR== no counters"]) == []

    def test_writes_rows(self, tmp_path, monkeypatch):
        fake = tmp_path / "ncu"
        fake.write_text(f"#!/bin/sh\ncat <<'END'\n{self.PRINTED}END\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        assert main(["ncu", "se", "simam", "--out", str(tmp_path)]) == 0
        rows = summary.table(tmp_path / "ncu.csv")
        assert [(row["family"], row["kernel"]) for row in rows] == [
            ("se", "gate_kernel"), ("se", "dx_kernel"), ("simam", "gate_kernel"), ("simam", "dx_kernel"),
        ]  # fmt: skip
        assert rows[0]["dram_read"] == "51380224"

    def test_is_skipped_where_it_is_missing(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(ncu, "tool", lambda name: None)
        assert main(["ncu", "--out", str(tmp_path)]) == 2
        assert "ncu is not here" in capsys.readouterr().err


def test_the_files_with_tests_for_a_device_are_known():
    folder = Path(__file__).parent
    marked = {path.stem for path in folder.glob("test_*.py") if "mark.device" in path.read_text(encoding="utf-8")}
    assert marked - {"test_all"} == {f"test_{name}" for name in everything.DEVICE_TESTS}
