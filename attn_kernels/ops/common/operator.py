"""The operator library ``torch.ops.attn_kernels`` and what every autograd Function above it needs.

Host time per call decides small maps (microseconds added on a CPU build, without / with grad): an operator of
``Library.define/impl`` called through its bound ``.default`` 1.4 / 2.2, PyTorch's ``custom_op`` 10 / 20,
``triton_op`` 12 / 20. Hence this file.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, library, nn

from attn_kernels.ops.common.layout import is_channels_last, is_dense
from reference._common import without_autocast

try:
    from torch._subclasses.fake_tensor import FakeTensor
except ImportError:  # it is private: where it has moved, torch.compile compiles the reference formula
    FakeTensor = Tensor

# A kernel reads the memory of these. Any other subclass (a shard, a quantised weight) has operators of its own. Under
# torch.compile and in its fake tensors an operator is recorded, not run.
PLAIN_TENSORS = frozenset((Tensor, nn.Parameter, FakeTensor))
PLAIN = PLAIN_TENSORS | {type(None)}

_library = library.Library("attn_kernels", "DEF")


def register(schema: str, allocate: Callable, launch: Callable) -> Callable:
    """Define the operator ``attn_kernels::schema``; return it bound.

    Its first argument must be a tensor on the device where it runs.
    ``allocate`` is given the arguments and returns the outputs, empty: a tensor or a NamedTuple. It is the operator's
    fake, too. ``launch`` is given the outputs and the arguments, and fills the outputs.
    """
    name = schema.partition("(")[0]
    _library.define(schema)

    def run(*args):
        outputs = allocate(*args)
        launch(outputs, *args)
        return outputs

    def on_device(x: Tensor, *args):
        if x.device.index == torch.cuda.current_device():
            return run(x, *args)
        with torch.cuda.device(x.device):  # Triton launches on the current device
            return run(x, *args)

    _library.impl(name, on_device, "CUDA")
    _library.impl(name, run, "CPU")  # under the interpreter
    library.register_fake(f"attn_kernels::{name}", allocate, lib=_library)
    return getattr(torch.ops.attn_kernels, name).default


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record an operator on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def save_tensors(ctx, x: Tensor, *others: Tensor | None) -> None:
    """Save tensors for backward, and the form in which the kernels will read them.

    Hooks on saved tensors (``torch.autograd.graph.save_on_cpu``) may give them back in another layout.
    """
    ctx.save_for_backward(x, *others)
    ctx.channels_last = is_channels_last(x)
    # Of a compiled graph's saved tensors PyTorch takes care.
    ctx.forms = None if torch.compiler.is_compiling() else _forms((x, *others))


# Of each tensor, twice: in C it takes half as long.
_form = operator.attrgetter("shape", "dtype")


def _forms(tensors: Sequence[Tensor | None]) -> list[tuple[torch.Size, torch.dtype] | None]:
    return [t if t is None else _form(t) for t in tensors]


def saved_tensors(ctx) -> Sequence[Tensor | None]:
    """What :func:`save_tensors` has saved, x in its layout and all in their forms, whatever hooks made of them.

    Raises:
        ValueError: a hook gave back a tensor of another shape.
    """
    tensors = ctx.saved_tensors
    if ctx.forms is not None:
        if _forms(tensors) != ctx.forms:
            tensors = [t if t is None else _restored(t, *form) for t, form in zip(tensors, ctx.forms, strict=True)]
        tensors = [t if t is None or t.is_contiguous() or is_dense(t) else t.contiguous() for t in tensors]
    x, *others = tensors
    return x.contiguous(memory_format=torch.channels_last if ctx.channels_last else torch.contiguous_format), *others


def _restored(t: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if t.shape != shape:
        raise ValueError(
            f"saved tensor: expected shape {tuple(shape)}, as it was saved, got {tuple(t.shape)} from a hook"
        )
    return t.to(dtype)


def reference_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Differentiate ``function``, the reference formula, where the gradient itself will be differentiated.

    Each input enters through a view of its own, so that an input that depends on another does not count twice.
    """
    # Without autocast, which would round what backward multiplies.
    with torch.enable_grad(), without_autocast(inputs[0]):
        inputs = [t if t is None else t.view_as(t) for t in inputs]
        outputs = function(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        if not wanted:
            return [None] * len(inputs)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
        return [None if t is None or not t.requires_grad else next(found) for t in inputs]
