"""Bad input raises ValueError or TypeError with the argument, what was expected and what came, and modifies nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference

pytestmark = pytest.mark.fast

PACKAGES = ("reference", "attn_kernels")
N, C, H, W, HIDDEN = 2, 8, 4, 5, 3

MLP = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
ARGUMENTS = {
    "se": ("x", *MLP),
    "channel_gate": ("x", *MLP),
    "spatial_gate": ("x", "conv_weight", "norm"),
    "cbam": ("x", *MLP, "conv_weight", "norm"),
    "bam": ("x", "gate_c", "gate_s"),
    "simam": ("x",),
    "channel_attention": ("x", "gate"),
}


def good_arguments(op: str, device: torch.device) -> dict[str, Any]:
    """Arguments that ``op`` takes, its BatchNorms in training mode."""
    bam = reference.BAM(C, reduction_ratio=4)
    values = {
        "x": torch.randn(N, C, H, W),
        "fc1_weight": torch.randn(HIDDEN, C),
        "fc1_bias": torch.randn(HIDDEN),
        "fc2_weight": torch.randn(C, HIDDEN),
        "fc2_bias": torch.randn(C),
        "conv_weight": torch.randn(1, 2, 7, 7),
        "norm": nn.BatchNorm2d(1),
        "gate_c": bam.channel_att.gate_c,
        "gate_s": bam.spatial_att.gate_s,
        "gate": nn.Sigmoid(),
    }
    return {name: values[name].to(device) for name in ARGUMENTS[op]}


Change = Callable[[Any], Any]
Row = tuple[str, dict[str, Change], type[Exception], str]


def shaped(*shape: int) -> Change:
    return lambda t: t.new_ones(shape)


def typed(dtype: torch.dtype) -> Change:
    return lambda t: t.to(dtype)


def given(value: object) -> Change:
    return lambda _: value


def meta(t: Tensor) -> Tensor:
    return t.to("meta")


def residual(change: Change) -> dict[str, Change]:
    return {"residual": lambda _: change(torch.ones(N, C, H, W))}


def on_meta(name: str) -> Row:
    return f"{name} on another device", {name: meta}, ValueError, rf"{name}: expected device \S+ like x, got meta"


FLOATS = "float16, bfloat16, float32, float64"

EVERY_OP: list[Row] = [
    ("x list", {"x": given([1.0])}, TypeError, r"x: expected a torch\.Tensor, got list"),
    ("x None", {"x": given(None)}, TypeError, r"x: expected a torch\.Tensor, got NoneType"),
    ("x 3-D", {"x": shaped(C, H, W)}, ValueError, r"x: expected 4 dimensions \(N, C, H, W\), got shape \(8, 4, 5\)"),
    ("x 5-D", {"x": shaped(N, C, 1, H, W)}, ValueError, r"x: expected 4 dimensions .*, got shape \(2, 8, 1, 4, 5\)"),
    ("x int", {"x": typed(torch.int64)}, TypeError, f"x: expected dtype {FLOATS}, got int64"),
    ("x bool", {"x": typed(torch.bool)}, TypeError, f"x: expected dtype {FLOATS}, got bool"),
    ("x complex", {"x": typed(torch.complex64)}, TypeError, f"x: expected dtype {FLOATS}, got complex64"),
    ("x float8", {"x": typed(torch.float8_e4m3fn)}, TypeError, f"x: expected dtype {FLOATS}, got float8_e4m3fn"),
    ("C = 0", {"x": shaped(N, 0, H, W)}, ValueError, r"x: expected C, H and W of at least 1, got shape \(2, 0, 4, 5\)"),
    ("H = 0", {"x": shaped(N, C, 0, W)}, ValueError, r"x: expected C, H and W of at least 1, got shape \(2, 8, 0, 5\)"),
    ("W = 0", {"x": shaped(N, C, H, 0)}, ValueError, r"x: expected C, H and W of at least 1, got shape \(2, 8, 4, 0\)"),
    ("residual list", residual(given([1.0])), TypeError, r"residual: expected a torch\.Tensor, got list"),
    (
        "residual that would broadcast",
        residual(shaped(N, C, 1, 1)),
        ValueError,
        r"residual: expected x's shape \(2, 8, 4, 5\), got \(2, 8, 1, 1\)",
    ),
    ("residual int", residual(typed(torch.int32)), TypeError, f"residual: expected dtype {FLOATS}, got int32"),
    ("residual on another device", residual(meta), ValueError, r"residual: expected device \S+ like x, got meta"),
    ("activation", {"activation": given("gelu")}, ValueError, "activation: expected one of None, 'relu', got 'gelu'"),
    ("activation True", {"activation": given(True)}, ValueError, "activation: expected one of .*, got True"),
]

EVERY_MLP: list[Row] = [
    (
        "channels",
        {"x": shaped(N, C + 1, H, W)},
        ValueError,
        r"x: expected 8 channels, as fc1_weight takes, got shape \(2, 9, 4, 5\)",
    ),
    ("fc1_weight None", {"fc1_weight": given(None)}, TypeError, r"fc1_weight: expected a torch\.Tensor, got NoneType"),
    (
        "fc1_weight 3-D",
        {"fc1_weight": shaped(HIDDEN, C, 1)},
        ValueError,
        r"fc1_weight: expected shape \(3, 8\) .*, got \(3, 8, 1\)",
    ),
    (
        "fc1_weight of a 3x3 convolution",
        {"fc1_weight": shaped(HIDDEN, C, 3, 3)},
        ValueError,
        r"fc1_weight: expected shape \(3, 8, 1, 1\) .*, got \(3, 8, 3, 3\)",
    ),
    (
        "fc1_weight alone of other channels",
        {"fc1_weight": shaped(HIDDEN, C + 1)},
        ValueError,
        r"fc1_weight: expected shape \(3, 8\) for x of shape \(2, 8, 4, 5\), got \(3, 9\)",
    ),
    ("fc1_weight int", {"fc1_weight": typed(torch.int8)}, TypeError, f"fc1_weight: expected dtype {FLOATS}, got int8"),
    ("fc1_bias", {"fc1_bias": shaped(1)}, ValueError, r"fc1_bias: expected shape \(3,\) .*, got \(1,\)"),
    ("fc1_bias int", {"fc1_bias": typed(torch.int64)}, TypeError, f"fc1_bias: expected dtype {FLOATS}, got int64"),
    (
        "fc2_weight",
        {"fc2_weight": shaped(HIDDEN, C)},
        ValueError,
        r"fc2_weight: expected shape \(8, 3\) .*got \(3, 8\)",
    ),
    (
        "fc2_weight hidden",
        {"fc2_weight": shaped(C, HIDDEN + 1)},
        ValueError,
        r"fc2_weight: expected shape \(8, 3\) .*, got \(8, 4\)",
    ),
    ("fc2_weight None", {"fc2_weight": given(None)}, TypeError, r"fc2_weight: expected a torch\.Tensor, got NoneType"),
    ("fc2_bias", {"fc2_bias": shaped(C, 1)}, ValueError, r"fc2_bias: expected shape \(8,\) .*, got \(8, 1\)"),
    ("fc2_bias bool", {"fc2_bias": typed(torch.bool)}, TypeError, f"fc2_bias: expected dtype {FLOATS}, got bool"),
    *map(on_meta, MLP),
]

EVERY_POOLING: list[Row] = [
    ("pool string", {"pool_types": given("avg")}, TypeError, "pool_types: expected a sequence of names, .* 'avg'"),
    ("no pool", {"pool_types": given(())}, ValueError, r"pool_types: expected one or more distinct names, got \(\)"),
    (
        "same pool twice",
        {"pool_types": given(["max", "max"])},
        ValueError,
        r"pool_types: expected one or more distinct names, got \['max', 'max'\]",
    ),
    (
        "unknown pool",
        {"pool_types": given(("avg", "median"))},
        ValueError,
        "pool_types: expected one of 'avg', 'max', 'lp', 'lse', got 'median'",
    ),
]

ONE_PIXEL: dict[str, Change] = {"x": lambda x: x[:1, :, :1, :1]}
ONE_VALUE = r"x: expected more than 1 value per channel for BatchNorm2d in training, got shape \(1, 8, 1, 1\)"

EVERY_CONVOLUTION: list[Any] = [
    (
        "conv_weight None",
        {"conv_weight": given(None)},
        TypeError,
        r"conv_weight: expected a torch\.Tensor, got NoneType",
    ),
    (
        "conv_weight of one input",
        {"conv_weight": shaped(1, 1, 7, 7)},
        ValueError,
        r"conv_weight: expected shape \(1, 2, 7, 7\) .*, got \(1, 1, 7, 7\)",
    ),
    (
        "conv_weight of two outputs",
        {"conv_weight": shaped(2, 2, 7, 7)},
        ValueError,
        r"conv_weight: expected shape \(1, 2, 7, 7\) .*, got \(2, 2, 7, 7\)",
    ),
    (
        "conv_weight not square",
        {"conv_weight": shaped(1, 2, 5, 7)},
        ValueError,
        r"conv_weight: expected shape \(1, 2, 7, 7\) .*, got \(1, 2, 5, 7\)",
    ),
    (
        "conv_weight 3-D",
        {"conv_weight": shaped(2, 7, 7)},
        ValueError,
        r"conv_weight: expected shape .*, got \(2, 7, 7\)",
    ),
    ("even kernel", {"conv_weight": shaped(1, 2, 6, 6)}, ValueError, "conv_weight: expected an odd kernel size, got 6"),
    (
        "conv_weight int",
        {"conv_weight": typed(torch.int32)},
        TypeError,
        f"conv_weight: expected dtype {FLOATS}, got int32",
    ),
    on_meta("conv_weight"),
    ("norm None", {"norm": given(None)}, TypeError, "norm: expected a module or a function of a tensor, got NoneType"),
    ("one value per channel", ONE_PIXEL, ValueError, ONE_VALUE),
    (
        "one value per channel without statistics",
        {**ONE_PIXEL, "norm": lambda norm: nn.BatchNorm2d(1, track_running_stats=False).to(norm.weight.device).eval()},
        ValueError,
        ONE_VALUE,
    ),
    ("norm on another device", {"norm": meta}, ValueError, "norm.*: expected device .*got"),
    (
        "norm of two channels",
        {"norm": lambda norm: nn.BatchNorm2d(2).to(norm.weight.device)},
        ValueError,
        "norm.*: expected .*got",
    ),
]


def replaced(key: str, make: Callable[[], nn.Module]) -> Change:
    """Change the layer ``key`` of a gate."""

    def change(gate: nn.Sequential) -> nn.Sequential:
        gate.set_submodule(key, make().to(gate[-1].weight.device))
        return gate

    return change


SPECIFIC: dict[str, list[Any]] = {
    "se": [
        *EVERY_MLP,
        (
            "mlp_activation",
            {"mlp_activation": given("tanh")},
            ValueError,
            "mlp_activation: expected one of 'relu', 'silu', 'gelu', 'leaky_relu', 'hardswish', got 'tanh'",
        ),
        (
            "gate",
            {"gate": given("softmax")},
            ValueError,
            "gate: expected one of 'sigmoid', 'hardsigmoid', got 'softmax'",
        ),
        ("gate None", {"gate": given(None)}, ValueError, "gate: expected one of 'sigmoid', 'hardsigmoid', got None"),
    ],
    "channel_gate": [*EVERY_MLP, *EVERY_POOLING],
    "spatial_gate": EVERY_CONVOLUTION,
    "cbam": [*EVERY_MLP, *EVERY_POOLING, *EVERY_CONVOLUTION],
    "simam": [
        (
            "negative lambda",
            {"e_lambda": given(-1e-4)},
            ValueError,
            "e_lambda: expected a finite number >= 0, got -0.0001",
        ),
        (
            "NaN lambda",
            {"e_lambda": given(float("nan"))},
            ValueError,
            "e_lambda: expected a finite number >= 0, got nan",
        ),
        ("infinite lambda", {"e_lambda": given(float("inf"))}, ValueError, "e_lambda: expected a finite .*, got inf"),
        ("lambda string", {"e_lambda": given("0.1")}, ValueError, "e_lambda: expected a finite number >= 0, got '0.1'"),
    ],
    "channel_attention": [
        *EVERY_POOLING,
        (
            "pool of no kernel",
            {"pool_types": given(("avg", "lse"))},
            ValueError,
            "pool_types: expected one of 'avg', 'max', got 'lse'",
        ),
        ("gate None", {"gate": given(None)}, TypeError, "gate: expected a function of the pooled .*, got NoneType"),
        (
            "gate that returns nothing",
            {"gate": given(lambda mean: None)},
            TypeError,
            r"gate\(\.\.\.\): expected a torch\.Tensor, got NoneType",
        ),
        (
            "gate that would broadcast",
            {"gate": given(lambda mean: mean[:1])},
            ValueError,
            r"gate\(\.\.\.\): expected shape \(2, 8\) for x of shape .*, got \(1, 8\)",
        ),
        (
            "gate of integers",
            {"gate": given(lambda mean: mean.long())},
            TypeError,
            rf"gate\(\.\.\.\): expected dtype {FLOATS}, got int64",
        ),
        (
            "gate on another device",
            {"gate": given(meta)},
            ValueError,
            r"gate\(\.\.\.\): expected device \S+ like x, got meta",
        ),
    ],
    "bam": [
        (
            "channels",
            {"x": shaped(N, C + 1, H, W)},
            ValueError,
            r"x: expected 8 channels, .*, got shape \(2, 9, 4, 5\)",
        ),
        ("gate_c None", {"gate_c": given(None)}, TypeError, r"gate_c: expected an nn\.Sequential, got NoneType"),
        ("gate_s class", {"gate_s": given(nn.ReLU())}, TypeError, r"gate_s: expected an nn\.Sequential, got ReLU"),
        ("gate_c empty", {"gate_c": lambda _: nn.Sequential()}, ValueError, "gate_c: expected Linear layers, got"),
        ("gate_s empty", {"gate_s": lambda _: nn.Sequential()}, ValueError, "gate_s: expected Conv2d layers, got"),
        (
            "gate_c of other channels",
            {"gate_c": replaced("gate_c_fc_0", lambda: nn.Linear(C - 1, 2))},
            ValueError,
            r"x: expected 7 channels, as gate_c takes, got shape \(2, 8, 4, 5\)",
        ),
        (
            "gate_s starts with BatchNorm",
            {"gate_s": lambda gate: nn.Sequential(nn.BatchNorm2d(C), nn.Conv2d(C, 1, 1)).to(gate[0].weight.device)},
            ValueError,
            "gate_s: expected a plain 1x1 convolution first, got BatchNorm2d",
        ),
        (
            "gate_s reduces by 3x3",
            {"gate_s": replaced("gate_s_conv_reduce0", lambda: nn.Conv2d(C, 2, 3))},
            ValueError,
            r"gate_s: expected a plain 1x1 convolution first, got Conv2d\(8, 2, kernel_size=\(3, 3\)",
        ),
        ("gate_c on another device", {"gate_c": meta}, ValueError, r"gate_c.*: expected device \S+ like x, got meta"),
        ("gate_s on another device", {"gate_s": meta}, ValueError, r"gate_s.*: expected device \S+ like x, got meta"),
        (
            "batch of one",
            {"x": lambda x: x[:1]},
            ValueError,
            r"x: expected more than 1 value per channel for BatchNorm1d in training, got shape \(1, 8, 4, 5\)",
        ),
        ("one value per channel", {**ONE_PIXEL, "gate_c": lambda gate: gate.eval()}, ValueError, ONE_VALUE),
        (
            "gate_c that would broadcast",
            {"gate_c": replaced("gate_c_fc_final", lambda: nn.Linear(2, 1))},
            ValueError,
            "gate_c.*: expected .*got",
        ),
        (
            "gate_s of several maps",
            {"gate_s": replaced("gate_s_conv_final", lambda: nn.Conv2d(2, C, 1))},
            ValueError,
            "gate_s.*: expected .*got",
        ),
        (
            "gate_s reduces with a stride",
            {"gate_s": replaced("gate_s_conv_reduce0", lambda: nn.Conv2d(C, 2, 1, stride=2))},
            ValueError,
            "gate_s.*: expected .*got",
        ),
    ],
}


def rows() -> list[Any]:
    """Every row of every operator as ``pytest.param(op, changes, error, message)``."""
    params = []
    for op, specific in SPECIFIC.items():
        for row in (*EVERY_OP, *specific):
            values, marks = (row.values, row.marks) if hasattr(row, "marks") else (row, ())
            label, *rest = values
            params.append(pytest.param(op, *rest, id=f"{op}: {label}", marks=marks))
    return params


def functional(package: str) -> ModuleType:
    return importlib.import_module(package if package == "reference" else f"{package}.functional")


def buffers(arguments: dict[str, Any]) -> list[Tensor]:
    """Every statistic that the arguments hold."""
    return [b for a in arguments.values() if isinstance(a, nn.Module) for b in a.buffers() if b.device.type != "meta"]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("op", ARGUMENTS)
def test_good_arguments(package, op, device):
    """The rows below fail by their change alone."""
    arguments = good_arguments(op, device)
    y = getattr(functional(package), op)(**arguments, residual=torch.ones(N, C, H, W, device=device), activation="relu")
    assert y.shape == (N, C, H, W)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(("op", "changes", "error", "message"), rows())
def test_bad_argument(package, op, changes, error, message, device):
    function, arguments = getattr(functional(package), op), good_arguments(op, device)
    arguments |= {name: change(arguments.get(name)) for name, change in changes.items()}
    before = [b.clone() for b in buffers(arguments)]
    with pytest.raises(error, match=f"^({message})"):
        function(**arguments)
    assert all(map(torch.equal, buffers(arguments), before))


def positive(name: str, **arguments: object) -> tuple[dict[str, object], type[Exception], str]:
    return arguments, ValueError, f"{name}: expected an integer of at least 1, got {arguments[name]}"


POOL_TYPES = [
    ({"gate_channels": 8, "pool_types": "max"}, TypeError, "pool_types: expected a sequence of names, .* 'max'"),
    ({"gate_channels": 8, "pool_types": []}, ValueError, r"pool_types: expected one or more .*, got \[\]"),
    ({"gate_channels": 8, "pool_types": ["lp", "lp"]}, ValueError, r"pool_types: expected .*, got \['lp', 'lp'\]"),
    ({"gate_channels": 8, "pool_types": ["sum"]}, ValueError, "pool_types: expected one of 'avg', .*, got 'sum'"),
]
GATE = [
    positive("gate_channels", gate_channels=0),
    positive("gate_channels", gate_channels=8.0),
    positive("reduction_ratio", gate_channels=8, reduction_ratio=0),
]
CONSTRUCTORS = {
    "SE": [
        positive("channels", channels=0),
        positive("channels", channels=-8),
        positive("channels", channels=8.0),
        positive("reduction", channels=8, reduction=0),
        positive("reduction", channels=8, reduction=0.25),
        positive("hidden_channels", channels=8, hidden_channels=0),
        (
            {"channels": 8, "mlp_activation": "tanh"},
            ValueError,
            "mlp_activation: expected one of 'relu', .*, got 'tanh'",
        ),
        ({"channels": 8, "gate": "tanh"}, ValueError, "gate: expected one of 'sigmoid', 'hardsigmoid', got 'tanh'"),
    ],
    "ChannelGate": [*GATE, *POOL_TYPES],
    "CBAM": [*GATE, *POOL_TYPES],
    "BAM": [
        positive("gate_channel", gate_channel=0),
        positive("reduction_ratio", gate_channel=8, reduction_ratio=0),
        positive("num_layers", gate_channel=8, num_layers=0),
        positive("dilation_conv_num", gate_channel=8, dilation_conv_num=0),
        positive("dilation_val", gate_channel=8, dilation_val=0),
    ],
    "SimAM": [
        ({"e_lambda": -1}, ValueError, "e_lambda: expected a finite number >= 0, got -1"),
        ({"e_lambda": float("nan")}, ValueError, "e_lambda: expected a finite number >= 0, got nan"),
        ({"e_lambda": None}, ValueError, "e_lambda: expected a finite number >= 0, got None"),
        positive("channels", channels=1e-3),  # as one writes who takes e_lambda for the first argument
        positive("channels", channels=0),
    ],
    "models.resnet": [
        ({"depth": 20}, ValueError, "depth: expected one of 18, 34, 50, 101, 152, got 20"),
        ({"depth": 18, "attention": "eca"}, ValueError, "attention: expected one of None, 'se', .*, got 'eca'"),
        positive("num_classes", depth=18, num_classes=0),
    ],
}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [pytest.param(name, *row, id=f"{name}-{row[2]}") for name, group in CONSTRUCTORS.items() for row in group],
)
def test_bad_constructor(package, name, arguments, error, message):
    path, _, name = name.rpartition(".")
    module = importlib.import_module(f"{package}.{path}" if path else package)
    with pytest.raises(error, match=f"^({message})"):
        getattr(module, name)(**arguments)
