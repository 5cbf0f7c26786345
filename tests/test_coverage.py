"""The coverage of timm's and torchvision's architectures: what is recorded, and the command that records it."""

import csv
import re
from pathlib import Path

import pytest

from attn_kernels.fuse import Unsupported
from benchmarks.__main__ import main
from benchmarks.coverage import configuration
from benchmarks.rows import RESULTS
from tests.fuse.cases import BUILD


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, str]]:
    return read(RESULTS / "coverage.csv")


def test_every_module_of_every_architecture_is_known(recorded):
    counts = {library: sum(row["library"] == library for row in recorded) for library in ("timm", "torchvision")}
    assert counts["timm"] >= 350
    assert counts["torchvision"] >= 23
    for row in recorded:
        assert row["missed"] == "0", row
        assert int(row["fused"]) >= int(row["found"]), row
    assert sum(int(row["fused"]) for row in recorded) >= 7580
    assert sum(int(row["epilogues"]) for row in recorded) >= 1441


def test_every_configuration_is_tested(recorded):
    """Each has its row in test_fuse, beside its original in training and in evaluation."""
    found = {c for row in recorded for c in row["configurations"].split("; ") if c}
    assert found <= {configuration(build()) for build in BUILD.values()}


def test_epilogues_of_resnets_are_fused(recorded):
    rows = {row["architecture"]: row for row in recorded}
    for name in ("seresnet50", "seresnext101_32x8d", "legacy_seresnet18", "legacy_senet154", "seresnet18"):
        if name in rows:
            assert rows[name]["epilogues"] == rows[name]["fused"], name
    assert rows["efficientnet_b0"]["epilogues"] == "0"


def refuse(*arguments):
    raise Unsupported("is not read")


def test_a_run_without_output_writes_nothing(capsys):
    record = RESULTS / "coverage.csv"
    before = record.stat().st_mtime_ns
    assert main(["coverage", "--architectures", "resnet18", "regnet_y_400mf"]) == 0
    assert record.stat().st_mtime_ns == before
    assert "No rows were written" in capsys.readouterr().out


@pytest.mark.parametrize("known", [True, False])
def test_command(known, tmp_path, monkeypatch, capsys):
    if not known:
        for name in ("plan_for", "find"):
            monkeypatch.setattr(f"attn_kernels.fuse.fuse.{name}", refuse)
        monkeypatch.setattr("attn_kernels.fuse.fuse._NAMES", re.compile("SEModule"))
    path = tmp_path / "coverage.csv"
    names = ["mobilenet_v3_small", "resnet18", "regnet_y_400mf"]
    assert main(["coverage", "--architectures", *names, "--output", str(path)]) == (not known)
    rows = {row["architecture"]: row for row in read(path)}
    assert rows.keys() == {"mobilenet_v3_small", "regnet_y_400mf"}
    assert rows["mobilenet_v3_small"]["found"] == "9"
    assert rows["mobilenet_v3_small"]["missed"] == ("0" if known else "9")
    assert ("WRONG mobilenet_v3_small: 9 modules passed over" in capsys.readouterr().out) == (not known)
