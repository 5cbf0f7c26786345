"""Fused attention in models that people already have: ``fuse_``.

The data flow one way:

- ``source``, ``frame`` and ``interpret`` read a module's forward into ``terms``; the functions that they know are in
  ``registry``, ``views``, ``reductions``, ``arithmetic``, ``builtin`` and ``layers``; ``guards`` notices later changes.
- ``formulas`` finds which terms the kernels compute, and the plan, of ``plans``, by which they do; ``evaluate``
  computes any other gate. ``recognise`` joins these for a module, ``blocks`` and ``rewrite`` for a residual block.
- ``check`` runs a plan beside its module, ``adapters`` has the plans that users register, ``modules`` the classes that
  are put in place; ``fuse`` walks through the model and writes the ``report``.
"""

from attn_kernels.fuse.adapters import Unsupported, register_adapter
from attn_kernels.fuse.fuse import fuse_, unfuse_
from attn_kernels.fuse.report import FuseReport, Row

__all__ = ["FuseReport", "Row", "Unsupported", "fuse_", "register_adapter", "unfuse_"]
