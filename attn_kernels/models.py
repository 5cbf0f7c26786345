"""The networks of ``reference.models`` with fused attention: same keys, shapes and initialisation."""

from __future__ import annotations

from functools import partial

from attn_kernels import functional, modules
from reference import models as _reference
from reference.models import ATTENTIONS, LAYERS, BasicBlock, Bottleneck, Kit, ResNet

__all__ = ["ATTENTIONS", "FUSED", "LAYERS", "BasicBlock", "Bottleneck", "ResNet", "resnet"]

FUSED = Kit(functional.se, modules.SE, modules.BAM, modules.CBAM, modules.SimAM)

resnet = partial(_reference.resnet, kit=FUSED)

for _attention in ATTENTIONS[1:]:
    for _depth in LAYERS:
        _name = f"{_attention}_resnet_{_depth}"
        globals()[_name] = partial(resnet, _depth, _attention)
        __all__ += [_name]
