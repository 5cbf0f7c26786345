"""What a GPU alone can tell: launches side by side on two streams, and tensors of more elements than 32 bits count."""

import copy
import itertools

import pytest
import torch

from reference.catalogue import LAYOUTS
from tests.harness import MODULES, assert_close, pair, real_input, run

pytestmark = pytest.mark.device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODULES)
def test_two_streams_at_once(name, layout, device):
    """Programs of two launches share the multiprocessors; each waits for those of its own."""
    fused, _ = pair(lambda kit: MODULES[name](kit, 32), device)
    inputs = [real_input((24, 32, 28, 28), torch.bfloat16, layout, device) for _ in range(2)]
    dy = torch.randn_like(inputs[0])
    alone = [run(copy.deepcopy(fused), x, x, "relu", dy) for x in inputs]
    modules, streams = [copy.deepcopy(fused) for _ in inputs], [torch.cuda.Stream() for _ in inputs]
    state = copy.deepcopy(fused.state_dict())
    torch.cuda.synchronize()
    for _ in range(20):
        together = []
        for module, stream, x in zip(modules, streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                module.load_state_dict(state)
                together.append(run(module, x, x, "relu", dy))
        torch.cuda.synchronize()
        for got, want in zip(together, alone, strict=True):
            assert torch.equal(got.y, want.y)
            assert all(torch.equal(got.gradients[key], want.gradients[key]) for key in want.gradients)
            assert all(torch.equal(got.buffers[key], want.buffers[key]) for key in want.buffers)


def test_addresses_of_more_than_32_bits(device):
    """The last samples of a batch of 2**31 elements and more; on the CPU, of a small one.

    In one test, so that one process has the memory: five tensors of 4.4 GB.
    """
    shape = (2100, 256, 64, 64) if device.type == "cuda" else (5, 8, 6, 4)
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free memory")
    for name, layout in itertools.product(("se", "cbam", "bam", "simam", "channel_attention"), LAYOUTS):
        fused, eager = (m.eval() for m in pair(lambda kit, name=name: MODULES[name](kit, shape[1]), device))
        last, dy = (real_input((2, *shape[1:]), torch.bfloat16, layout, device) for _ in range(2))
        x, dy_of_all = (torch.zeros(shape, dtype=last.dtype, device=device) for _ in range(2))
        x, dy_of_all = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, dy_of_all))
        x[-2:], dy_of_all[-2:] = last, dy
        got = run(fused, x, None, None, dy_of_all)
        want = run(eager, last, None, None, dy)
        exact = run(copy.deepcopy(eager).double(), last.double(), None, None, dy.double())
        assert_close(f"y of {name}", got.y[-2:], want.y, exact.y)
        assert_close(f"dx of {name}", got.gradients["x"][-2:], want.gradients["x"], exact.gradients["x"])
        del x, dy_of_all, got
