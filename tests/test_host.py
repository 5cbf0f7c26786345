"""The command that times everything but the launches."""

import pytest
import torch

import attn_kernels
from benchmarks.__main__ import main
from benchmarks.host import no_launches

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="leaves out the interpreter's launches")


@interpreted
def test_a_table_of_microseconds(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks", "host"])
    assert main(("host", "--modules", "SE", "SimAM", "--calls", "20")) == 0
    out = capsys.readouterr().out
    for name in ("SE", "SimAM"):
        (row,) = (line.split() for line in out.splitlines() if line.split()[:1] == [name])
        assert all(int(cell) > 0 for cell in row[1:])
        assert len(row) == 5
    assert f"torch {torch.__version__}" in out


@interpreted
def test_nothing_is_launched_inside_and_everything_after():
    x = torch.full((1, 2, 3, 3), 7.0)
    expected = attn_kernels.SimAM()(x)
    poison = torch.full_like(x, float("nan"))
    with no_launches(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda t: poison)
        assert attn_kernels.SimAM()(x).isnan().all()
    assert torch.equal(attn_kernels.SimAM()(x), expected)
