"""Fused attention in models that people already have: ``fuse_``.

The data flow one way, from file to file: ``source`` and ``interpret`` read a module's forward into ``terms``, by way of
``operations`` and ``layers``; ``formulas`` finds what kernels compute that, a plan of ``plans``; ``guards`` notices later
changes; ``recognise`` joins these for a module, ``blocks`` for a residual block; ``check`` runs a plan beside its module;
``modules`` has the classes that are put in place; ``fuse`` walks through the model and writes the ``report``.
"""

from attn_kernels.fuse.adapters import Unsupported, register_adapter
from attn_kernels.fuse.fuse import fuse_, unfuse_
from attn_kernels.fuse.report import FuseReport, Row

__all__ = ["FuseReport", "Row", "Unsupported", "fuse_", "register_adapter", "unfuse_"]
