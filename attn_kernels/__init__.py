"""Fused Triton kernels for the attention modules of convolutional networks: SE, BAM, CBAM and SimAM."""

from attn_kernels import functional, models
from attn_kernels.explain import explain
from attn_kernels.fuse import FuseReport, fuse_, register_adapter, unfuse_
from attn_kernels.modules import BAM, CBAM, SE, ChannelGate, SimAM, SpatialGate
from attn_kernels.precompile import Precompiled, precompile

__all__ = [
    "BAM",
    "CBAM",
    "SE",
    "ChannelGate",
    "FuseReport",
    "Precompiled",
    "SimAM",
    "SpatialGate",
    "explain",
    "functional",
    "fuse_",
    "models",
    "precompile",
    "register_adapter",
    "unfuse_",
]

__version__ = "0.1.0"
