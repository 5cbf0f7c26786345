"""Whatever is done to a fused module later, its original would have done the same."""

import copy

import pytest
import torch
from torch import nn

from attn_kernels import fuse_
from tests.fuse.cases import (
    C,
    Quantized,
    SEModule,
    fused,
    randomized,
    tensor,
)
from tests.peers import jongchan


class TestFallback:
    """Whatever is done to a fused module later, its original would have done the same."""

    @pytest.fixture
    def pair(self, device) -> tuple[nn.Module, nn.Module]:
        eager = randomized(SEModule(C, 1 / 4)).to(device).eval()
        return fused(copy.deepcopy(eager)), eager

    def same(self, pair, device, calls=None, expected=0):
        x = tensor(2, C, 5, 5).to(device)
        ours, eager = (module(x) for module in pair)
        assert torch.equal(ours, eager) if expected == 0 else torch.allclose(ours, eager, atol=1e-5)
        assert calls is None or len(calls) == expected

    def test_hooks_of_layers(self, pair, calls, device):
        seen = []
        handle = pair[0].fc2.register_forward_hook(lambda *_: seen.append("fc2"))
        self.same(pair, device, calls)
        assert seen == ["fc2"]
        handle.remove()
        self.same(pair, device, calls, 1)

    def test_hooks_of_every_module(self, pair, calls, device):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
        try:
            self.same(pair, device, calls)
        finally:
            handle.remove()
        assert "Conv2d" in seen

    def test_hooks_of_the_module(self, device):
        module, seen = SEModule(C).to(device), []
        module.register_forward_hook(lambda m, x, y: seen.append("before"))
        ours = fused(module)
        ours.register_forward_hook(lambda m, x, y: seen.append("after"))
        module.register_full_backward_hook(lambda m, dx, dy: seen.append("backward"))
        x = tensor(2, C, 5, 5).to(device).requires_grad_()
        ours(x).sum().backward()
        assert seen == ["before", "after", "backward"]

    @pytest.mark.parametrize("change", ["child", "parametrization", "forward", "norm", "dtype", "gone"])
    def test_layers_in_place_of_others(self, pair, change, calls, device):
        class Adapted(nn.Conv2d):  # as LoRA does
            def forward(self, x):
                return 2 * super().forward(x)

        for module in pair:
            torch.manual_seed(1)
            if change == "child":
                module.fc1 = Adapted(C, module.fc1.out_channels, 1).to(device)
            elif change == "parametrization":
                nn.utils.parametrizations.weight_norm(module.fc1)
                nn.utils.parametrizations.spectral_norm(module.fc2)
            elif change == "forward":
                module.fc1.forward = lambda x, forward=module.fc1.forward: 2 * forward(x)
            elif change == "norm":
                module.bn = nn.BatchNorm2d(module.fc1.out_channels).to(device)
                module.eval()
            elif change == "dtype":
                module.fc1.weight = nn.Parameter(module.fc1.weight.as_subclass(Quantized))
            else:
                module.add_maxpool = False
        self.same(pair, device, calls, int(change == "gone"))

    def test_other_inputs(self, pair, calls, device):
        for x in (tensor(2, C, 5, 5).as_subclass(Quantized), tensor(0, C, 5, 5)):
            assert torch.equal(pair[0](x.to(device)), pair[1](x.to(device)))
        for arguments, error in (((tensor(2, C + 1, 5, 5).to(device),), RuntimeError), ((), TypeError)):
            if not arguments:
                with pytest.raises(error):
                    pair[0](*arguments)
        x = tensor(2, C, 5, 5).to(device)
        assert torch.equal(pair[0](x=x), pair[1](x=x))
        assert not calls

    def test_torch_func(self, pair, device):
        x = tensor(3, 2, C, 5, 5).to(device)
        torch.testing.assert_close(*(torch.func.vmap(module)(x) for module in pair))
        half = {k: v * 0.5 for k, v in pair[1].named_parameters()}
        torch.testing.assert_close(*(torch.func.functional_call(module, half, x[0]) for module in pair))

    def test_sync_batch_norm_has_its_own_forward(self, calls, device):
        holder = nn.Sequential(jongchan.CBAM(C, 4)).to(device)
        fuse_(holder)
        holder = nn.SyncBatchNorm.convert_sync_batchnorm(holder).eval()
        assert not holder[0].is_fused(tensor(2, C, 5, 5).to(device))
