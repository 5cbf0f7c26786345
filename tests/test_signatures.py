"""Kernels that a person can read: few arguments, and launches that name them."""

import ast
import statistics
from pathlib import Path

import attn_kernels

OPS = Path(attn_kernels.__file__).parent / "ops"
TREES = {path: ast.parse(path.read_text()) for path in OPS.rglob("*.py")}


def jit_functions() -> dict[str, int]:
    """The arguments of each function that Triton compiles."""
    found = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                found[f"{path.relative_to(OPS)}:{node.name}"] = len(node.args.args)
    return found


def test_arguments_of_jit_functions_are_few():
    counts = sorted(jit_functions().values())
    assert len(counts) > 60
    median, ninetieth = statistics.median(counts), counts[int(0.9 * len(counts))]
    print(f"{len(counts)} functions: median {median}, 90th percentile {ninetieth}, longest {counts[-1]}")
    assert median <= 8
    assert ninetieth <= 14
    assert counts[-1] <= 20


def test_launches_name_their_arguments():
    launches = [
        node
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and "_kernel" in ast.unparse(node.func)
    ]
    assert len(launches) >= 20
    assert [ast.unparse(launch.func) for launch in launches if launch.args] == []


def test_argument_lists_are_formatted():
    assert [path.name for path in TREES if "fmt: skip" in path.read_text()] == []


def test_no_operator_imports_private_names_of_another():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("attn_kernels.ops"):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], path
