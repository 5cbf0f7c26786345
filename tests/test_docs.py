"""The documents: their code runs, their links lead somewhere."""

import re
from pathlib import Path

import pytest

from attn_kernels.fuse.adapters import ADAPTERS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "attn_kernels/ops/README.md",
]
WITH_CODE = [path for path in DOCUMENTS if path.parent.name == "docs" and "```python" in path.read_text()]


def _name(path):
    return path.name


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_links(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", WITH_CODE, ids=_name)
def test_code(path, monkeypatch):
    monkeypatch.setattr("attn_kernels.fuse.adapters.ADAPTERS", dict(ADAPTERS))
    names = {}
    for code in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        exec(compile(code, path.name, "exec"), names)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
