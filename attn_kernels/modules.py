"""The modules of ``reference``, computed by the fused operators: same constructors, parameters and state_dict keys."""

from __future__ import annotations

import reference
from attn_kernels import functional


class SE(reference.SE):
    __doc__ = reference.SE.__doc__
    _function = staticmethod(functional.se)


class ChannelGate(reference.ChannelGate):
    __doc__ = reference.ChannelGate.__doc__
    _function = staticmethod(functional.channel_gate)


class SpatialGate(reference.SpatialGate):
    __doc__ = reference.SpatialGate.__doc__
    _function = staticmethod(functional.spatial_gate)


class CBAM(reference.CBAM):
    __doc__ = reference.CBAM.__doc__
    _function = staticmethod(functional.cbam)
    _channel_gate = ChannelGate
    _spatial_gate = SpatialGate


class BAM(reference.BAM):
    __doc__ = reference.BAM.__doc__
    _function = staticmethod(functional.bam)


class SimAM(reference.SimAM):
    __doc__ = reference.SimAM.__doc__
    _function = staticmethod(functional.simam)
