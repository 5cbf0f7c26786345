"""torch.export and ONNX: plain operators in the graph, a free batch, the eager numbers."""

import pytest
import torch

from reference.catalogue import LAYOUTS
from tests.harness import MODULES, networks, pair, real_input

BATCH = torch.export.Dim("batch")


@pytest.fixture(params=MODULES)
def modules(request, device):
    fused, eager = pair(lambda kit: MODULES[request.param](kit, 12), device)
    return fused.eval(), eager.eval()


def _arguments(n, epilogue, device, layout="contiguous"):
    x = real_input((n, 12, 5, 7), torch.float32, layout, device)
    return (x, torch.randn_like(x), "relu") if epilogue else (x,)


def _export(module, epilogue, device, strict=False):
    dynamic = ({0: BATCH}, {0: BATCH}, None) if epilogue else ({0: BATCH},)
    program = torch.export.export(module, _arguments(2, epilogue, device), dynamic_shapes=dynamic, strict=strict)
    assert_plain(program)
    return program


def assert_plain(program):
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators
    assert not [name for name in operators if "attn_kernels" in name]


def run_onnx(program, *inputs):
    """The exported program's output by onnxruntime, which has no operator of ours."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    assert {node.domain for node in model.graph.node} == {""}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {i.name: t.cpu().numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


@pytest.mark.parametrize("epilogue", [False, True])
def test_export_and_onnx(modules, epilogue, device):
    fused, eager = modules
    program = _export(fused, epilogue, device)
    for n in (1, 5):
        arguments = _arguments(n, epilogue, device)
        want = eager(*arguments)
        torch.testing.assert_close(program.module()(*arguments), want)
    got = run_onnx(program, *(t for t in arguments if isinstance(t, torch.Tensor)))
    torch.testing.assert_close(got, want.cpu(), rtol=1e-4, atol=1e-5)


def test_strict_export(modules, device):
    fused, eager = modules
    arguments = _arguments(3, True, device, "channels_last")
    torch.testing.assert_close(_export(fused, True, device, strict=True).module()(*arguments), eager(*arguments))


@pytest.mark.parametrize("name", ["cbam", "bam"])
def test_export_of_a_module_in_training(name, device):
    fused, eager = pair(lambda kit: MODULES[name](kit, 12), device)
    program = torch.export.export(fused, _arguments(2, False, device))
    assert_plain(program)
    arguments = _arguments(2, False, device)
    torch.testing.assert_close(program.module()(*arguments), eager(*arguments))


@pytest.mark.parametrize("name", ["se", "cbam", "bam", "simam"])
def test_onnx_of_a_network(name, device):
    fused, eager = (m.eval() for m in networks(name, device))
    x = torch.randn(2, 3, 8, 6, device=device)
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: BATCH},))
    assert_plain(program)
    x = torch.randn(3, 3, 8, 6, device=device).contiguous(memory_format=LAYOUTS["channels_last"])
    torch.testing.assert_close(run_onnx(program, x), eager(x).cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_trace(modules, device):
    fused, eager = modules
    traced = torch.jit.trace(fused, _arguments(2, False, device))
    assert "attn_kernels::" not in str(traced.inlined_graph)
    (x,) = _arguments(5, False, device)
    torch.testing.assert_close(traced(x), eager(x))
