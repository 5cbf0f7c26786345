"""examples/digits.py, shortened: training by the kernels follows training by the reference."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn")
SCRIPT = Path(__file__).parents[1] / "examples" / "digits.py"


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_curves_coincide(digits, device, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "BATCH", 3)
    found = digits.curves(3, device)
    for attention, (reference, fused) in found.items():
        assert fused == pytest.approx(reference, abs=1e-5), attention
        assert len(set(reference)) == 3  # it trains: the curves are no constants
    digits.draw(found, "a test", tmp_path / "digits.png")
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_another_formula_is_seen(digits, device):
    import reference

    class Wrong:
        SE = staticmethod(lambda channels: reference.SE(channels, gate="hardsigmoid"))

    right, wrong = (digits.train(kit, "SE", 4, device) for kit in (reference, Wrong))
    assert digits.difference(right, wrong) > 1e-3
