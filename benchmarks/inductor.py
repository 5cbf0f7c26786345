"""What ``torch.compile`` touches, by Inductor's own accounting, without running what it generates.

Inductor's CPU backend fuses here, on any machine; on a GPU its kernels may be divided otherwise. Memory layouts stay as
they are: on the CPU Inductor always moves maps near a convolution to channels_last, on a GPU it depends on the
convolutions' sizes, and of a contiguous SE it costs a copy of x.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch._inductor import compile_fx, config, metrics
from torch._inductor.graph import GraphLowering


class Graph(NamedTuple):
    """A compiled graph: kernels after fusion, and the bytes that their operands have."""

    launches: int
    touched: int


def graphs(module: nn.Module, call: Callable[[nn.Module], object]) -> list[Graph]:
    """Compile ``module`` and let ``call`` use it: the graphs in order, that of forward first, then of backward.

    Raises:
        RuntimeError: Inductor counted nothing.
    """
    found: list[Graph] = []

    def inner_compile(*args, **kwargs):
        metrics.reset()
        compiled = compile_fx.compile_fx_inner(*args, **kwargs)
        # The kernels that move nothing are views.
        found.append(Graph(sum(size > 0 for _, size in metrics.nodes_num_elem), metrics.num_bytes_accessed))
        return compiled

    def backend(graph, inputs):
        return compile_fx.compile_fx(graph, inputs, inner_compile=inner_compile)

    torch.compiler.reset()
    with _accounting():
        call(torch.compile(module, backend=backend, dynamic=False, fullgraph=True))
    if not all(graph.touched for graph in found):
        raise RuntimeError("Inductor counted no bytes: this PyTorch keeps its accounting elsewhere")
    return found


@contextlib.contextmanager
def _accounting() -> Iterator[None]:
    """Inductor counts where its metrics are logged; the code that it generates is left aside, and the graph runs."""

    def compile_to_module(lowering: GraphLowering) -> SimpleNamespace:
        lowering.codegen()
        return SimpleNamespace(call=torch.fx.Interpreter(lowering.module).boxed_run, __file__="", key="")

    log = compile_fx.inductor_metrics_log
    level, handlers, propagate = log.level, log.handlers, log.propagate
    with (
        patch.object(GraphLowering, "compile_to_module", compile_to_module),
        config.patch(force_disable_caches=True, layout_optimization=False),
    ):
        try:
            log.setLevel(logging.INFO)
            log.handlers, log.propagate = [logging.NullHandler()], False
            yield
        finally:
            log.setLevel(level)
            log.handlers, log.propagate = handlers, propagate
