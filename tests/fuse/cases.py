"""The modules and blocks that the tests of fuse_ share."""

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import nn

import reference
import reference.models
from attn_kernels import fuse_
from reference.catalogue import LAYOUTS
from tests.peers import RegNetSELayer, cadene, jongchan, moskomule, openmmlab, seed, simam_module

if not torch.cuda.is_available():  # beside a CPU build of torch, torchvision's compiled operators do not register
    sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
import timm.layers
import timm.models._efficientnet_blocks
import timm.models.resnet
import timm.models.senet
from timm.layers import EffectiveSEModule, SEModule
from timm.layers.cbam import CbamModule
from timm.layers.squeeze_excite import SqueezeExciteCl
from timm.models._efficientnet_blocks import SqueezeExcite
from torchvision.ops import SqueezeExcitation

C = 16
# The configurations of every module that timm's and torchvision's networks hold (benchmarks/results/coverage.csv), and
# the options and the other libraries' modules that fuse_ knows.
BUILD: dict[str, Callable[[], nn.Module]] = {
    "timm SEModule": partial(SEModule, C, 1 / 4),
    "timm SEModule SiLU": partial(SEModule, C, 1 / 4, act_layer=nn.SiLU),
    "timm SEModule GELU, no bias": partial(SEModule, C, 1 / 4, act_layer=nn.GELU, bias=False),
    "timm SEModule timm's GELU": partial(SEModule, C, 1 / 4, act_layer=timm.layers.GELU, bias=False),
    "timm SEModule LeakyReLU": partial(SEModule, C, 1 / 4, act_layer=partial(nn.LeakyReLU, negative_slope=0.01)),
    "timm SEModule hard sigmoid": partial(SEModule, C, 1 / 4, gate_layer="hard_sigmoid"),
    "timm SEModule BatchNorm": partial(SEModule, C, 1 / 4, norm_layer=nn.BatchNorm2d),
    "timm SEModule add_maxpool": partial(SEModule, C, 1 / 4, add_maxpool=True),
    "timm SEModule all options": partial(
        SEModule, C, 1 / 4, add_maxpool=True, norm_layer=nn.BatchNorm2d, act_layer=nn.Tanh, gate_layer="hard_sigmoid"
    ),
    "timm SqueezeExcite SiLU": partial(SqueezeExcite, C, act_layer=nn.SiLU),
    "timm SqueezeExcite ReLU": partial(SqueezeExcite, C),
    "timm SqueezeExcite hard sigmoid": partial(SqueezeExcite, C, gate_layer="hard_sigmoid"),
    "timm SqueezeExcite Hardswish": partial(SqueezeExcite, C, act_layer=nn.Hardswish, gate_layer="hard_sigmoid"),
    "timm senet SEModule": partial(timm.models.senet.SEModule, C, 4),
    "timm EffectiveSEModule": partial(EffectiveSEModule, C),
    "timm EffectiveSEModule add_maxpool": partial(EffectiveSEModule, C, add_maxpool=True, gate_layer="sigmoid"),
    "timm SqueezeExciteCl": partial(SqueezeExciteCl, C, 1 / 4),
    "timm SqueezeExciteCl Tanh": partial(SqueezeExciteCl, C, 1 / 4, act_layer=nn.Tanh),
    "timm EcaModule": partial(timm.layers.EcaModule, C),
    "timm CbamModule": partial(CbamModule, C, 1 / 4),
    "timm CbamModule bias, 5x5": partial(CbamModule, C, 1 / 4, mlp_bias=True, spatial_kernel_size=5),
    "torchvision SiLU": partial(SqueezeExcitation, C, 4, activation=partial(nn.SiLU, inplace=True)),
    "torchvision ReLU": partial(SqueezeExcitation, C, 4),
    "torchvision hard sigmoid": partial(SqueezeExcitation, C, 4, scale_activation=nn.Hardsigmoid),
    "Jongchan CBAM": partial(jongchan.CBAM, C, 4),
    "Jongchan CBAM all pools": partial(jongchan.CBAM, C, 4, ["lse", "avg", "max", "lp"]),
    "Jongchan CBAM no_spatial": partial(jongchan.CBAM, C, 4, no_spatial=True),
    "Jongchan ChannelGate": partial(jongchan.ChannelGate, C, 4),
    "Jongchan SpatialGate": jongchan.SpatialGate,
    "Jongchan BAM": partial(jongchan.BAM, C, 4),
    "ZjjConan": partial(simam_module, e_lambda=0.1),
    "moskomule": partial(moskomule.SELayer, C, 4),
    "Cadene": partial(cadene.SEModule, C, 4),
    "OpenMMLab": partial(openmmlab.SELayer, C, 4),
    "OpenMMLab HSigmoid": partial(openmmlab.SELayer, C, 4, openmmlab.HSigmoid()),
    "OpenMMLab BatchNorm": partial(openmmlab.SELayer, C, 4, norm=True),
    "HF RegNet": partial(RegNetSELayer, C, 4),
    "reference SE": partial(reference.SE, C, 4, mlp_activation="silu"),
    "reference BAM": partial(reference.BAM, C, 4),
    "reference CBAM": partial(reference.CBAM, C, 4),
    "reference SimAM": reference.SimAM,
}
LEFT = {
    "GlobalContext": (partial(timm.layers.GlobalContext, C), "views a tensor so that dimensions mix"),
    "CecaModule": (partial(timm.layers.CecaModule, C), "calls torch.nn.functional.pad"),
}


def randomized(module: nn.Module) -> nn.Module:
    """With parameters and statistics none of which is at a special value."""
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        if "running_var" in name:
            nn.init.uniform_(t, 0.5, 2)
        elif t.is_floating_point():
            nn.init.normal_(t, std=0.5 if t.dim() < 2 else 0.15)  # gates that do not saturate
    return module


def fused(module: nn.Module) -> nn.Module:
    """The fused twin of one module, also in training where it pools by amax."""
    holder = nn.Sequential(module)
    report = fuse_(holder, exact_ties=False)
    assert [row.fused for row in report.rows] == [True], report
    assert holder[0] is not module
    assert isinstance(holder[0], type(module))
    return holder[0]


def tensor(*shape: int, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape) + 0.2).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def without_ties(x: torch.Tensor) -> torch.Tensor:
    """The planes of x in the same order, with values 1/8 apart: amax shares a gradient among equal maxima."""
    ranks = x.flatten(2).argsort(2).argsort(2).view_as(x)
    return torch.empty_like(x).copy_((ranks + torch.randint(-16, 16, (*x.shape[:2], 1, 1), device=x.device)) / 8)


class Quantized(torch.Tensor):
    """A tensor subclass, of which kernels know nothing."""


class Block(nn.Module):
    """A user's residual block."""

    def __init__(self, gate: nn.Module, drop: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.norm = nn.BatchNorm2d(C)
        self.gate = gate
        self.drop_path = timm.layers.DropPath(drop) if drop else nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        shortcut = x
        x = self.drop_path(self.gate(self.norm(self.conv(x))))
        x += shortcut
        return self.act(x)


def resnet_block(kind: type, attention: str, downsample: bool) -> nn.Module:
    planes = C // kind.expansion
    layers = nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C)
    attention = partial(SEModule, rd_ratio=1 / 4) if attention == "se" else attention
    return kind(C, planes, attn_layer=attention, downsample=nn.Sequential(*layers) if downsample else None)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "a user's": lambda: Block(moskomule.SELayer(C, 4)),
    "a user's, SimAM": lambda: Block(simam_module()),
    "a user's, reference.SE": lambda: Block(reference.SE(C, 4)),
    "a user's, PyTorch's gate": lambda: Block(EffectiveSEModule(C)),
    "timm BasicBlock se": lambda: resnet_block(timm.models.resnet.BasicBlock, "se", False),
    "timm Bottleneck se": lambda: resnet_block(timm.models.resnet.Bottleneck, "se", True),
    "timm Bottleneck cbam": lambda: resnet_block(timm.models.resnet.Bottleneck, "cbam", True),
    "timm senet": lambda: timm.models.senet.SEResNetBottleneck(C, C // 4, 1, 4),
    "the seed's": lambda: seed.BasicBlock(C, 5),
    "reference se": lambda: reference.models.BasicBlock(C, C, 1, None, "se", reference.models.REFERENCE),
    "reference cbam": lambda: reference.models.BasicBlock(C, C, 1, None, "cbam", reference.models.REFERENCE),
}
