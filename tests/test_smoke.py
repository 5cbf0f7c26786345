"""First contact and fuzzing: what is wrong, moves or is NaN is found, and what is right is not."""

import json

import pytest
import torch
from torch import nn

import attn_kernels
import reference
from benchmarks import fuzz, smoke
from benchmarks.__main__ import main

pytestmark = pytest.mark.usefixtures("single_launch")

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that there is no GPU")


@pytest.fixture(autouse=True)
def _deterministic():
    yield
    torch.use_deterministic_algorithms(False)
    smoke.filled_with_nan(False)


class Moving(reference.SimAM):
    """Right, and then a little different from call to call."""

    calls = 0

    def forward(self, x, *epilogue):
        Moving.calls += 1
        return super().forward(x, *epilogue) * (1 if Moving.calls < 2 else 1 + 2**-7)


class Unwritten(reference.SimAM):
    """An element of the output is what torch.empty found in memory."""

    def forward(self, x, *epilogue):
        y = super().forward(x, *epilogue)
        return torch.where(torch.arange(y.shape[3]) == 0, torch.empty_like(y), y)


class Raising(reference.SimAM):
    def forward(self, x, *epilogue):
        raise RuntimeError("no kernel image")


def first_contact(tmp_path) -> tuple[int, list[dict]]:
    status = main(["smoke", "simam", "--rehearse", "--repeats", "3", "--out", str(tmp_path)])
    return status, [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]


@without_gpu
class TestSmoke:
    def test_of_what_is_right(self, tmp_path):
        status, lines = first_contact(tmp_path)
        assert status == 0
        steps = ["launching", "ran", "error", "repeat"]
        assert [line["step"] for line in lines] == [*steps, *steps, "end"]
        assert all(line.get("ok", True) for line in lines)
        assert {line["launches"] for line in lines} == {"single"}
        assert lines[0]["case"] == "2x16x8x8 channels_last block"

    @pytest.mark.parametrize(
        ("kind", "found"),
        [
            (lambda channels: reference.SimAM(e_lambda=1.0), ("error", "y: error")),
            (lambda channels: Moving(), ("repeat", None)),
            (lambda channels: Unwritten(), ("error", "NaN in y")),
            (lambda channels: Raising(), ("error", None)),
        ],
        ids=["wrong", "moving", "unwritten", "raising"],
    )
    def test_finds_what_is(self, kind, found, tmp_path, monkeypatch):
        Moving.calls = 0
        monkeypatch.setattr(attn_kernels, "SimAM", kind)
        status, lines = first_contact(tmp_path)
        assert status == 1
        bad = next(line for line in lines if line.get("ok") is False)
        step, message = found
        assert bad["step"] == step
        assert message is None or bad["wrong"][0].startswith(message)
        assert (lines[-1]["step"], lines[-1]["ok"]) == ("end", False)
        if message == "NaN in y":  # a wait that is given up takes seconds: the rest is not tried
            assert len(lines) == 4

    def test_names_plain_launches(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ATTN_KERNELS_SINGLE_LAUNCH", "0")
        monkeypatch.setattr(smoke, "TINY", smoke.TINY[:1])
        assert {line["launches"] for line in first_contact(tmp_path)[1]} == {"plain"}


@without_gpu
class TestFuzz:
    def test_draws_a_case_again(self):
        cases = [fuzz.draw(seed, fuzz.ELEMENTS) for seed in range(300)]
        assert cases == [fuzz.draw(seed, fuzz.ELEMENTS) for seed in range(300)]
        assert {case.module for case in cases} == {"SE", "ChannelGate", "SpatialGate", "CBAM", "BAM", "SimAM"}
        assert {case.dtype for case in cases} == {"bf16", "fp16", "fp32"}
        assert {case.layout for case in cases} == {"contiguous", "channels_last", "sliced", "expanded"}

    def test_finds_what_is_wrong(self, tmp_path, monkeypatch):
        seed = next(seed for seed in range(300) if fuzz.draw(seed, fuzz.REHEARSED).module == "SimAM")
        command = ["fuzz", "--rehearse", "--seed", str(seed), "--cases", "1", "--out", str(tmp_path)]
        assert main(command) == 0
        monkeypatch.setattr(attn_kernels, "SimAM", lambda e_lambda: nn.Identity())
        assert main(command) == 1
        lines = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == ["end", "error", "end"]
        assert lines[1]["case"].startswith(f"seed {seed}: Case(module='SimAM'")
