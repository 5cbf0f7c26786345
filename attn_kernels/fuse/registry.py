"""Which functions and methods of PyTorch are modelled, and by what: ``FUNCTIONS`` and ``METHODS``.

An operation takes the interpreter, which knows which sizes are equal, and the arguments of the call. It refuses what it
does not model: other options, parts of tensors, dimensions that mix. None looks at the dtype, so only operations that
keep it are here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Operation = Callable[..., Any]
FUNCTIONS: dict[Any, Operation] = {}
METHODS: dict[str, Operation] = {}
PRISTINE_METHODS: dict[str, object] = {}
"""The methods as they were at import: what another library puts in their place is not modelled."""
VIEWS: set[Operation] = set()

MODULES = {"torch": torch, "F": F, "special": torch.special}


def operation(*names: str, view: bool = False) -> Callable[[Operation], Operation]:
    """Register an operation under names such as "torch.mean", "F.relu" and ".mean", a method."""

    def register(implementation: Operation) -> Operation:
        for name in names:
            module, _, function = name.partition(".")
            if module:
                FUNCTIONS[getattr(MODULES[module], function)] = implementation
            else:
                METHODS[function] = implementation
                PRISTINE_METHODS[function] = getattr(torch.Tensor, function)
        if view:
            VIEWS.add(implementation)
        return implementation

    return register


def is_number(value: object) -> bool:
    return isinstance(value, int | float)
