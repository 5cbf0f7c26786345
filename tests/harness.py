"""Runs a fused module beside the reference in the same dtype and in float64, forward and backward, and judges all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import attn_kernels
import reference
from benchmarks.accuracy import Verdict, average, compare
from reference._common import like_parameters
from reference.catalogue import LAYOUTS, OPERATORS, Operator

DRAWS = 4  # of which the mean decides in float32, where one may exceed the rule by luck of eager's rounding


class ChannelAttention(nn.Module):
    """A module around ``channel_attention``, which has none: two layers on maximum and mean."""

    def __init__(self, kit: object, channels: int):
        super().__init__()
        self.function = getattr(kit, "functional", kit).channel_attention
        self.fc1, self.fc2 = nn.Linear(channels, 5), nn.Linear(5, channels)

    def gate(self, maximum: Tensor, mean: Tensor) -> Tensor:
        t = like_parameters(maximum / 2 + mean, self)
        return torch.sigmoid(self.fc2(torch.tanh(self.fc1(t))))

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        return self.function(x, self.gate, pool_types=("max", "avg"), residual=residual, activation=activation)


def _builder(operator: Operator) -> Callable[[object, int], nn.Module]:
    return lambda kit, channels: operator.build(kit, channels, **operator.small)


# By the name of the functional form, from a kit and its channels.
MODULES = {operator.function: _builder(operator) for operator in OPERATORS.values()}
MODULES["channel_attention"] = ChannelAttention


def pair(build: Callable[[object], nn.Module], device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The fused module and the reference's, with the same random parameters, none of them at a special value."""
    eager = build(reference)
    for p in eager.parameters():
        nn.init.normal_(p, std=0.5 if p.dim() == 1 else 0.15)  # gates that do not saturate
    for name, b in eager.named_buffers():
        if "running_var" in name:
            nn.init.uniform_(b, 0.5, 2)
        elif "running_mean" in name:
            nn.init.normal_(b)
    fused = build(attn_kernels)
    fused.load_state_dict(eager.state_dict(), strict=True)
    assert isinstance(fused, type(eager))
    return fused.to(device), eager.to(device)


@dataclass
class Run:
    """Output, gradients by name, and buffers after the pass."""

    y: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def run(module: nn.Module, x: Tensor, residual: Tensor | None, activation: str | None, dy: Tensor) -> Run:
    """One forward and backward pass on leaves of their own."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    if residual is not None:
        residual = residual.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x) if residual is activation is None else module(x, residual, activation)
    inputs = {"x": x, **({} if residual is None else {"residual": residual}), **dict(module.named_parameters())}
    gradients = torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype))
    return Run(y, dict(zip(inputs, gradients, strict=True)), {k: b.double() for k, b in module.named_buffers()})


def real_input(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    """What a network feeds its attention: some planes dead after a ReLU, none centred on zero."""
    x = (torch.randn(shape, dtype=torch.float64) + 0.25).relu()
    if shape[1] > 2:
        x[:, 1] = 0
    return x.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])


def check(
    build: Callable[[object], nn.Module],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
    *,
    activation: str | None = None,
    with_residual: bool = False,
    training: bool = True,
    parameter_dtype: torch.dtype | None = None,
) -> None:
    """Assert that the fused module agrees with the reference by the accuracy rule: output, gradients and buffers.

    In float32, where a draw of parameters, input and gradient exceeds the rule, the mean of ``DRAWS`` has to keep it.
    """

    def draw() -> dict[str, Verdict]:
        fused, eager = pair(build, device)
        for module in (fused, eager):
            module.train(training).to(parameter_dtype or (torch.float64 if dtype == torch.float64 else torch.float32))
        oracle = copy.deepcopy(eager).double()
        if parameter_dtype == torch.float64 and dtype != torch.float64:
            eager.float()  # the fused gate computes in fp32 whatever the parameters are
        x = real_input(shape, dtype, layout, device)
        residual = torch.randn(shape, device=device).to(x) if with_residual else None
        residual = None if residual is None else residual.contiguous(memory_format=LAYOUTS[layout])
        dy = torch.randn(shape, device=device, dtype=torch.float64).to(dtype)
        return verdicts(fused, eager, oracle, x, residual, activation, dy)

    draws = [draw()]
    if dtype == torch.float32 and not all(verdict.ok for verdict in draws[0].values()):
        draws += [draw() for _ in range(DRAWS - 1)]
    for name in draws[0]:
        assert_ok(name, average(verdicts[name] for verdicts in draws))


def judge(
    fused: nn.Module,
    eager: nn.Module,
    oracle: nn.Module,
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
    dy: Tensor,
) -> None:
    """Assert that one pass of ``fused`` is as near to ``oracle``, in float64, as the accuracy rule wants it."""
    for name, verdict in verdicts(fused, eager, oracle, x, residual, activation, dy).items():
        assert_ok(name, verdict)


def verdicts(
    fused: nn.Module,
    eager: nn.Module,
    oracle: nn.Module,
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
    dy: Tensor,
) -> dict[str, Verdict]:
    """The verdict on each result of one pass of ``fused``; asserts shapes, dtypes and buffers."""
    dtype = x.dtype
    got = run(fused, x, residual, activation, dy)
    # In float64 eager's error shows only against itself with its sums in another order: that of the other layout.
    other = "contiguous" if x.is_contiguous() == (dtype != torch.float64) else "channels_last"
    want = run(eager, x.contiguous(memory_format=LAYOUTS[other]), residual, activation, dy)
    exact = run(oracle, x.double(), None if residual is None else residual.double(), activation, dy.double())

    assert got.y.dtype == dtype
    assert got.y.stride() == x.stride()
    assert got.gradients["x"].dtype == dtype
    found = {"y": judge_tensor(got.y, want.y, exact.y)}
    for name in ("x", "residual"):
        if name in got.gradients:
            found[f"d{name}"] = judge_tensor(*(r.gradients[name] for r in (got, want, exact)))
    # The gradients of a layer are judged together: one number may round luckily in eager, a layer's do not.
    assert all(got.gradients[name].dtype == p.dtype for name, p in fused.named_parameters())
    for group in {name.split(".")[0] for name, _ in fused.named_parameters()}:
        names = [name for name, _ in fused.named_parameters() if name.split(".")[0] == group]
        together = [torch.cat([r.gradients[n].flatten() for n in names]) for r in (got, want, exact)]
        found[f"d{group}"] = judge_tensor(together[0].to(together[1].dtype), *together[1:])
    for name, buffer in got.buffers.items():
        torch.testing.assert_close(buffer, exact.buffers[name], rtol=buffer_tolerance(dtype), atol=1e-6, msg=name)
    return found


def buffer_tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps


def judge_tensor(fused: Tensor, eager: Tensor, oracle: Tensor) -> Verdict:
    # Few numbers may all round luckily in eager, and in float64 eager is all but the oracle: some units are allowed.
    ulps = 64 if fused.dtype == torch.float64 else 1 if oracle.numel() > 256 else 8
    scale = oracle.abs().max().item() * ulps
    return compare(fused, eager, oracle, scale=scale)


def assert_ok(name: str, verdict: Verdict) -> None:
    assert verdict.ok, f"{name}: error {verdict.error:.2e}, eager {verdict.eager_error:.2e}, of {verdict.allowed:.2e}"


def assert_close(name: str, fused: Tensor, eager: Tensor, oracle: Tensor) -> None:
    assert_ok(name, judge_tensor(fused, eager, oracle))


class Network(nn.Module):
    """Images to 4 logits: convolution, BatchNorm, a residual attention, all twice, and a linear layer."""

    def __init__(self, kit: object, name: str, channels: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.attention1 = MODULES[name](kit, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.attention2 = MODULES[name](kit, channels)
        self.fc = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.attention1(x, x, "relu")
        x = self.attention2(self.bn2(self.conv2(x)), x, "relu")
        return self.fc(x.mean((2, 3)))


def networks(name: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """A small network of fused modules and the same of the reference's, in training mode."""
    return pair(lambda kit: Network(kit, name), device)


def registered_operators() -> set[str]:
    """The names of every operator of the library."""
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("attn_kernels::")}


def assert_same_gradients(got: Iterable[Tensor], want: Iterable[Tensor], rtol: float = 1e-4) -> None:
    """Assert that two lists agree within ``rtol`` of the norm of all.

    Together, for one may cancel to nothing, as that of a bias before BatchNorm.
    """
    got, want = list(got), list(want)
    assert [(g.shape, g.dtype) for g in got] == [(w.shape, w.dtype) for w in want]
    error, scale = (
        sum(t.double().square().sum().item() for t in tensors) ** 0.5
        for tensors in ([g.double() - w.double() for g, w in zip(got, want, strict=True)], want)
    )
    assert error <= rtol * scale, f"error {error:.2e} of {scale:.2e}"
