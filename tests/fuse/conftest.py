"""Fixtures of the tests of fuse_."""

from functools import partial

import pytest

from attn_kernels import functional


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The functional forms that were called and took the fused path."""
    found: list[str] = []

    def counted(x, *args, name, function, **kwargs):
        assert functional.is_fused(x)
        found.append(name)
        return function(x, *args, **kwargs)

    for name in functional.__all__:
        monkeypatch.setattr(functional, name, partial(counted, name=name, function=getattr(functional, name)))
    return found
