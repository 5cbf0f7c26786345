"""SE, BAM, CBAM and SimAM in plain PyTorch: what ``attn_kernels`` computes, one formula per line."""

from reference.bam import BAM, bam
from reference.cbam import CBAM, ChannelGate, SpatialGate, cbam, channel_gate, spatial_gate
from reference.channel_attention import channel_attention
from reference.se import SE, se
from reference.simam import SimAM, simam

__all__ = [
    "BAM",
    "CBAM",
    "SE",
    "ChannelGate",
    "SimAM",
    "SpatialGate",
    "bam",
    "cbam",
    "channel_attention",
    "channel_gate",
    "se",
    "simam",
    "spatial_gate",
]
