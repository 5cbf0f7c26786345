"""On a machine without a GPU the kernels run under Triton's interpreter; with one, the same tests run on it."""

import os

import pytest
import torch

from benchmarks.interpreter import round_to_nearest, skip_repeated_work

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    round_to_nearest()
    skip_repeated_work()
torch.set_num_threads(1)  # pytest-xdist already uses every core
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # the oracle is exact
torch.backends.cudnn.deterministic = True  # and BAM's convolutions, which are PyTorch's, repeat bit by bit


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Use every core where pytest-xdist is installed; ``-n`` says otherwise. It need not be installed."""
    if config.pluginmanager.hasplugin("xdist") and "PYTEST_XDIST_WORKER" not in os.environ:
        if config.option.numprocesses is None:
            config.option.numprocesses = "auto"
        if config.option.dist == "no":
            config.option.dist = "worksteal"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def single_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of single launches themselves: on, also where all others run with ATTN_KERNELS_SINGLE_LAUNCH=0."""
    from attn_kernels.ops.common import device as gpu  # here, for Triton may be missing where it is not asked for

    monkeypatch.delenv("ATTN_KERNELS_SINGLE_LAUNCH", raising=False)
    monkeypatch.setattr(gpu, "SINGLE_LAUNCH", True)
