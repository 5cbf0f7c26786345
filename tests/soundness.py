"""Random modules, fused against eager: ``python -m tests.soundness --minutes 5``.

Two kinds of module are written to files and imported: attention modules and blocks with one to three random changes to
their source, and random programs of the functions that ``fuse_`` knows. Each goes through ``fuse_``. Where it is fused,
outputs, gradients and buffers must be those of the original, in training and in evaluation, for maps of many sizes. The
functional forms are ``reference``'s here, in float64: what is tested is the way from the source to them. A module that
only the check on random numbers kept from being fused counts as a fault, too.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn

import reference
from attn_kernels import functional, fuse_

C = 16
SIZES = ((16, 16, 16), (3, 5, 7), (2, 1, 3), (1, 4, 4), (2, 16, 5), (3, 5, 5), (1, 2, 2), (2, 1, 1))  # N, H, W
HEAD = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n\n"
# What a module has, as far as its forward uses it.
LAYERS = {
    "fc1": "nn.Linear(16, 4)",
    "fc2": "nn.Linear(4, 16)",
    "wide": "nn.Linear(16, 16)",
    "one": "nn.Linear(16, 1)",
    "conv1": "nn.Conv2d(16, 4, 1)",
    "conv2": "nn.Conv2d(4, 16, 1, bias=False)",
    "map": "nn.Conv2d(16, 16, 3, padding=1)",
    "maps": "nn.Conv2d(2, 1, 7, padding=3, bias=False)",
    "eca": "nn.Conv1d(1, 1, 3, padding=1, bias=False)",
    "bn": "nn.BatchNorm2d(16)",
    "bn1": "nn.BatchNorm1d(4)",
    "norm": "nn.BatchNorm2d(1, momentum=0.01)",
    "relu": "nn.ReLU()",
    "relu_": "nn.ReLU(inplace=True)",
    "pool": "nn.AdaptiveAvgPool2d(1)",
    "max": "nn.AdaptiveMaxPool2d(1)",
    "sigmoid": "nn.Sigmoid()",
    "drop": "nn.Dropout(0.0)",
    "mlp": "nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16))",
    "gate_c": "nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 16))",
    "gate_s": "nn.Sequential(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), "
    "nn.Conv2d(4, 4, 3, padding=4, dilation=4), nn.ReLU(), nn.Conv2d(4, 1, 1))",
    "options": '["avg", "max"]',
    "scale": "1.0",
    "se": "Gate()",
}
GATE = """class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


"""
# The forwards that are changed at random: attention in the spellings that people use, and blocks that hold it.
FORWARDS = """
y = self.pool(x).view(x.size(0), -1)
y = self.fc2(self.relu(self.fc1(y)))
return x * torch.sigmoid(y).view(x.size(0), x.size(1), 1, 1).expand_as(x)
---
b, c, _, _ = x.size()
y = self.fc2(F.relu(self.fc1(x.mean((2, 3)))))
return torch.mul(x, torch.sigmoid(y)[:, :, None, None])
---
s = F.adaptive_avg_pool2d(x, 1)
s = self.conv2(self.relu_(self.conv1(s)))
s = F.relu6(s + 3) / 6
return s * x
---
s = x.mean(-1, keepdim=True).mean(-2, keepdim=True)
s = self.conv1(s)
s = s * torch.sigmoid(s)
return x * self.sigmoid(self.drop(self.conv2(s)))
---
a = self.mlp(F.avg_pool2d(x, x.size(2)))
m = self.mlp(F.max_pool2d(x, (x.size(2), x.size(3))))
g = torch.sigmoid(a + m).unsqueeze(2).unsqueeze(3)
return x * g
---
total = None
for name in self.options:
    p = self.pool(x) if name == "avg" else self.max(x)
    raw = self.mlp(p)
    total = raw if total is None else total + raw
return x * torch.sigmoid(total)[:, :, None, None]
---
p = torch.cat((x.max(1)[0].unsqueeze(1), x.mean(1, keepdim=True)), dim=1)
return x * torch.sigmoid(self.norm(self.maps(p)))
---
x = x * torch.sigmoid(self.mlp(self.pool(x)) + self.mlp(self.max(x)))[:, :, None, None]
p = torch.stack((torch.max(x, 1)[0], torch.mean(x, 1)), 1)
return x * torch.sigmoid(self.norm(self.maps(p)))
---
c = self.gate_c(x.mean((2, 3)))[:, :, None, None].expand_as(x)
s = self.gate_s(x).expand_as(x)
return (1 + torch.sigmoid(c * s)) * x
---
n = x.shape[2] * x.shape[3] - 1
d = (x - x.mean((2, 3), keepdim=True)).pow(2)
v = d.sum((2, 3), keepdim=True) / n
return x * self.sigmoid(d / (4 * (v + 0.0001)) + 0.5)
---
y = self.eca(self.pool(x).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
return x * torch.sigmoid(y).expand_as(x)
---
y = self.wide(x.mean((2, 3)))
y = 0.5 * y + 0.5 * self.wide(self.max(x).flatten(1))
return x * F.hardsigmoid(y)[..., None, None]
---
shortcut = x
x = self.se(self.bn(self.map(x)))
x = self.drop(x)
x += shortcut
return self.relu(x)
---
y = self.relu_(self.bn(self.map(x)))
y = self.se(y) + self.bn(x) * self.scale
return F.relu(y)
---
out = self.bn(self.map(x))
g = self.fc2(self.relu(self.fc1(out.mean((2, 3)))))
out = out * torch.sigmoid(g).view(g.size(0), g.size(1), 1, 1)
out = out + x
return torch.relu(out)
---
out = self.se(self.bn(x))
residual = self.bn(self.map(x))
return self.relu_(out + residual)
"""
STATEMENTS = """
x = x * 2|x = x + 0|x = F.relu(x)|F.relu_(x)|x = x.detach()|x = x.clone()|if self.training: x = x * 2|self.k = 1
if x.size(0) > 2: x = x * 2|x.mul_(2)|x = x.flip(1)|y = torch.relu_(x.view(-1))|x = x.transpose(2, 3)
x = x[:, :, :1]|x = x.mean((2, 3), keepdim=True).expand_as(x)|x = x.permute(0, 1, 3, 2)
x = x + x.mean(1, keepdim=True)|x = self.bn(x)|x = self.drop(x)|x = F.dropout(x, 0.5, self.training)|self.bn(x)
y = self.se(x)|x = self.relu_(x)|x = self.se(x)|x += 1|y = x; y += 1|x = x.float().double()|x = x.view_as(x)
if self.scale == 1.0: x = x * self.scale|z = x.mean(); x = x + z|x, y = x, x|for _ in range(2): x = self.se(x)
assert x.dim() == 4|return x|pass
"""
METHODS = """
mean amax sum max view reshape flatten unsqueeze squeeze transpose sigmoid relu relu_ sigmoid_ mul mul_ add add_
pow clamp detach expand_as contiguous tanh float size min std exp log logsumexp view_as dim sub div square
"""
FUNCTIONS = """
sigmoid relu relu_ relu6 adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d max_pool2d mean max amax cat stack
mul add silu hardsigmoid tanh softmax dropout leaky_relu hardswish gelu lp_pool2d flatten sub sum
"""
EXPRESSIONS = """
{a}.mean((2, 3))|{a}.mean((2, 3), keepdim=True)|{a}.amax((2, 3), keepdim=True)|{a}.mean(1, keepdim=True)
F.adaptive_avg_pool2d({a}, 1)|self.max({a})|{a}.view({a}.size(0), -1)|{a}.flatten(1)|{a}.flatten(2)
{a}[:, :, None, None]|{a}.unsqueeze(-1)|{a}.unsqueeze(2)|{a}.squeeze(-1)|{a}.squeeze(1)|{a}.squeeze()
{a}.transpose(1, 2)|self.fc1({a})|self.fc2({a})|self.wide({a})|self.one({a})|self.conv1({a})|self.conv2({a})
self.bn({a})|self.bn1({a})|self.maps({a})|self.eca({a})|self.mlp({a})|torch.sigmoid({a})|torch.sigmoid({a})
F.relu({a}, inplace=True)|F.relu({a})|self.relu_({a})|{a} * {b}|{a} + {b}|{a} - {b}|x * {a}|{a} * x|x * {a}
{a} * 2|{a} + 3|{a} / 6|F.relu6({a})|{a}.expand_as({b})|{a}.expand_as(x)|{a}.view(b, c, 1, 1)|{a}.view(b, c)
{a}.view(-1, c)|{a}.reshape(b, -1)|{a}.permute(0, 2, 3, 1)|{a}.sum((2, 3))|torch.cat([{a}, {b}], 1)
{a}.mul_({b})|{a}.relu_()|torch.stack((x.max(1)[0], x.mean(1)), 1)|F.avg_pool2d({a}, {a}.size(2))
F.avg_pool2d({a}, (h, w))|F.max_pool2d({a}, (h, w))|{a}.pow(2)|{a}.clamp(0, 1)|{a}.max(1, keepdim=True)[0]
{a}.mean(-1)|{a}.mean(-1, keepdim=True)|{a}.mean(2, keepdim=True)|{a}.mean(0)|{a}[..., None]|{a}[:, None]
{a}.contiguous()|F.silu({a})|{a} * torch.sigmoid({a})|F.leaky_relu({a}, 0.2)|{a} / (h * w)|{a} / (h * w - 1)
{a}.transpose(-1, -2)|F.hardsigmoid({a})|{a}.view(b, 1, c)|{a}.flatten(2).mean(2)|{a}.flatten(2).max(2)[0]
F.lp_pool2d({a}, 2.0, (h, w))|{a}.flatten(2).logsumexp(2)|{a}.max(3)[0].max(2)[0]|{a}.exp()|self.se({a})
self.drop({a})|self.norm({a})
"""


def words(text: str) -> list[str]:
    return text.split()


def items(text: str) -> list[str]:
    return [item.strip() for line in text.strip().splitlines() for item in line.split("|")]


class Writer:
    """Writes the sources of random modules."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.forwards = [part.strip() for part in FORWARDS.split("---")]

    def module(self, name: str, body: str) -> str:
        lines = "\n".join(f"        {line}" for line in body.splitlines())
        used = [f"self.{name} = {layer}" for name, layer in LAYERS.items() if re.search(rf"self\.{name}\b", body)]
        init = "\n        ".join(["    def __init__(self):", "super().__init__()", *used]) + "\n"
        return f"class {name}(nn.Module):\n{init}\n    def forward(self, x):\n{lines}\n\n\n"

    def mutant(self) -> str:
        tree = ast.parse(f"def forward(self, x):\n{_indented(self.rng.choice(self.forwards))}").body[0]
        for _ in range(self.rng.choice((1, 1, 1, 2, 2, 3))):
            self.change(tree)
        return "\n".join(map(ast.unparse, ast.fix_missing_locations(tree).body))

    def change(self, tree: ast.FunctionDef) -> None:
        rng, nodes = self.rng, list(ast.walk(tree))
        kind = rng.random()
        if kind < 0.25:
            at = rng.randrange(len(tree.body))
            tree.body[at:at] = ast.parse(rng.choice(items(STATEMENTS))).body if not _returns(rng) else []
        elif kind < 0.32 and len(tree.body) > 1:
            tree.body.pop(rng.randrange(len(tree.body) - 1))
        elif kind < 0.5:
            found = [n for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, int | float)]
            if found:
                rng.choice(found).value = rng.choice((0, 1, 2, 3, -1, -2, 4, 6, 0.5, True, False, 16))
        elif kind < 0.65:
            found = [n for n in nodes if isinstance(n, ast.BinOp)]
            if found:
                node = rng.choice(found)
                if rng.random() < 0.7:
                    node.op = rng.choice((ast.Add(), ast.Sub(), ast.Mult(), ast.Div()))
                if rng.random() < 0.5:
                    node.left, node.right = node.right, node.left
        elif kind < 0.85:
            found = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
            if found:
                self.rename(rng.choice(found).func)
        else:
            found = [n for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
            found = [n for n in found if n.id not in ("self", "F", "torch", "range")]
            if len(found) > 1:
                rng.choice(found).id = rng.choice(found).id

    def rename(self, function: ast.Attribute) -> None:
        owner = function.value
        if isinstance(owner, ast.Name) and owner.id in ("F", "torch"):
            function.attr = self.rng.choice(words(FUNCTIONS))
        elif isinstance(owner, ast.Name) and owner.id == "self":
            function.attr = self.rng.choice(
                words("fc1 fc2 wide one conv1 conv2 map bn norm relu relu_ pool max se drop mlp")
            )
        else:
            function.attr = self.rng.choice(words(METHODS))

    def program(self, module: nn.Module) -> str | None:
        """Random lines, each of which runs in eager mode."""
        rng = self.rng
        values = {"self": module, "torch": torch, "F": torch.nn.functional, "b": 3, "c": C, "h": 5, "w": 7}
        values["x"] = torch.randn(3, C, 5, 7, dtype=torch.float64)
        names, lines = ["x"], ["b, c, h, w = x.shape"]
        for i in range(rng.randint(3, 10)):
            for _ in range(8):
                a = rng.choice(names[-3:]) if rng.random() < 0.8 else rng.choice(names)
                text = rng.choice(items(EXPRESSIONS)).format(a=a, b=rng.choice(names))
                try:
                    with torch.no_grad():
                        result = eval(text, dict(values))
                except Exception:  # of whatever kind: it is no program
                    continue
                if isinstance(result, Tensor):
                    values[f"v{i}"] = result
                    names.append(f"v{i}")
                    lines.append(f"v{i} = {text}")
                    break
        gates = [name for name in names[1:] if values[name].dim() == 4]
        if not gates:
            return None
        last = gates[-1] if values[gates[-1]].shape == (3, C, 5, 7) and rng.random() < 0.5 else f"x * {gates[-1]}"
        return "\n".join([*lines, f"return {last}"])


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _returns(rng: random.Random) -> bool:
    return rng.random() < 0.05


@contextmanager
def references() -> Iterator[None]:
    """The functional forms are the reference's and apply to every tensor."""
    with ExitStack() as stack:
        for name in functional.__all__:
            stack.enter_context(patch.object(functional, name, getattr(reference, name)))
        for name in ("why_not", "why_not_here"):
            stack.enter_context(patch.object(functional, name, lambda *args: []))
        yield


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(eager: nn.Module, fused: nn.Module, size: tuple[int, int, int], counts: Counter) -> str:
    """How two modules differ on a map; empty where they do not, or where the original raises."""
    n, h, w = size
    x, dy = torch.randn(2, n, C, h, w, dtype=torch.float64)
    results: list = []
    for module in (eager, fused):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        try:
            y = module(leaf)
            parameters = [p for p in module.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(y, [leaf, *parameters], dy, allow_unused=True)
        except Exception as error:  # of whatever kind
            if module is eager:
                counts["eager raises"] += 1
                return ""
            return f"raises {type(error).__name__}: {error}"
        results.append((y, leaf, gradients, list(module.buffers())))
    (y, x1, gradients, buffers), (y2, x2, gradients2, buffers2) = results
    pairs = [("output", y, y2), ("input", x1, x2)]
    pairs += [("gradient", a, b) for a, b in zip(gradients, gradients2, strict=True)]
    pairs += [("buffer", a, b) for a, b in zip(buffers, buffers2, strict=True)]
    for name, a, b in pairs:
        if (a is None) != (b is None):
            return f"has another {name}"
        if a is not None and a.shape != b.shape:
            return f"has a {name} of another shape"
        if a is not None and not _close(a, b):
            return f"has another {name}, off by {(a.double() - b.double()).abs().max().item():.1e}"
    return ""


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-6, equal_nan=True)


def judge(build: Callable[[], nn.Module], rng: random.Random, counts: Counter) -> str:
    """What is wrong with a module once it is fused; empty where nothing is, or where it is left."""
    torch.manual_seed(0)
    eager = build().double()
    model = nn.Sequential(copy.deepcopy(eager))
    state, before = copy.deepcopy(eager.state_dict()), copy.deepcopy(model.state_dict())
    report = fuse_(model, exact_ties=True)
    if not all(map(torch.equal, before.values(), model.state_dict().values())):
        return "changes the state while it is looked at"
    checked = [row.reason for row in report.rows if "computes other" in row.reason or "has other" in row.reason]
    if checked:
        return f"only the check has seen it: {checked[0]}"
    own = [row for row in report.rows if row.fused and (row.name == "0" or row.epilogue)]
    counts["fused" if own else "left"] += 1
    for row in own:
        counts[row.kind + (" + add + ReLU" if row.epilogue else "")] += 1
    if not own:
        return ""
    for training in (True, False):
        for size in rng.sample(SIZES, 3):
            eager.load_state_dict(state)
            model.load_state_dict(before)
            if found := compare(eager.train(training), model.train(training), size, counts):
                return f"{found} {'in training' if training else 'in evaluation'} at {size}"
    return ""


def run(minutes: float, seed: int, folder: Path, accepted: int | None = None) -> tuple[Counter, list[str]]:
    """Counts, and the faults with the source of each; until the time is over or so many were fused."""
    counts: Counter = Counter()
    faults: list[str] = []
    end, batch = time.monotonic() + 60 * minutes, 0
    rng = random.Random(seed)
    writer = Writer(rng)
    torch.set_num_threads(1)
    base = folder / f"soundness_{seed}_base.py"
    base.write_text(HEAD + GATE + writer.module("Base", "\n".join(f"self.{name}" for name in LAYERS)))
    eager = load(base).Base().double()
    with references():
        while time.monotonic() < end and (accepted is None or counts["fused"] < accepted):
            bodies = [writer.mutant() if rng.random() < 0.7 else writer.program(eager) for _ in range(40)]
            text = HEAD + GATE
            names = []
            for i, body in enumerate(bodies):
                if body is not None:
                    names.append(f"M{i}")
                    text += writer.module(f"M{i}", body)
            path = folder / f"soundness_{seed}_{batch}.py"
            path.write_text(text)
            batch += 1
            try:
                module = load(path)
            except SyntaxError:
                counts["no program"] += 1
                continue
            for name in names:
                counts["modules"] += 1
                fault = judge(getattr(module, name), rng, counts)
                if fault:
                    source = ast.unparse(
                        next(n for n in ast.parse(text).body if getattr(n, "name", "") == name).body[-1]
                    )
                    faults.append(f"{fault}\n{source}")
            path.unlink()
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, faults = run(arguments.minutes, arguments.seed, Path(folder))
    for name, count in counts.most_common():
        print(f"{count:8} {name}")
    for fault in faults:
        print(f"WRONG: {fault}\n")
    print(f"{len(faults)} wrong of {counts['fused']} that were fused")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
