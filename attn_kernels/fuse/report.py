"""What ``fuse_`` did to a model, as a table, and the way back."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

Swap = tuple[nn.Module, str, nn.Module, nn.Module]
"""Parent, name, original, fused."""


class Row(NamedTuple):
    """What became of one attention module."""

    name: str
    """Its qualified name in the model."""
    cls: str
    """The name of its class."""
    kind: str
    """What it computes; its class's name where that is not known."""
    fused: bool
    epilogue: str = ""
    """"add + ReLU" where the end of the residual block is fused with it."""
    reason: str = ""
    """Why it, or its epilogue, was left as it was."""


class FuseReport:
    """What :func:`fuse_` did, and the way back; as a context manager it goes back at the end.

    Attributes:
        rows: a :class:`Row` for each attention module, in the model's order.
        notes: what holds for all of them.
    """

    def __init__(self, rows: list[Row], swaps: list[Swap], notes: list[str]):
        self.rows = rows
        self.notes = notes
        self._swaps = swaps

    @property
    def fused(self) -> int:
        """How many modules are computed by fused operators now."""
        return sum(row.fused for row in self.rows)

    @property
    def left(self) -> int:
        """How many attention modules were left as they were."""
        return len(self.rows) - self.fused

    def restore(self) -> None:
        """Put the original objects back where the fused ones still are; a second time does nothing."""
        while self._swaps:
            parent, name, original, fused = self._swaps.pop()
            if parent._modules.get(name) is fused:
                parent._modules[name] = original
                original.__dict__.pop("_compiled_call_impl", None)  # of the fused one

    def __enter__(self) -> FuseReport:
        return self

    def __exit__(self, *_) -> None:
        self.restore()

    def __str__(self) -> str:
        heads = "module", "class", "kind", "fused", "reason"
        lines = [
            (
                r.name,
                r.cls,
                f"{r.kind} + {r.epilogue}" if r.epilogue else r.kind,
                "yes" if r.fused else "left",
                r.reason,
            )
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (heads, *lines)] if lines else []
        return "\n".join([*table, f"{self.fused} fused, {self.left} left", *self.notes])

    __repr__ = __str__
