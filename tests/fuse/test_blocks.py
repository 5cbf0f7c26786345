"""The end of residual blocks, and gates whose layers stand on a block."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import reference
import reference.models
from attn_kernels import functional, fuse_
from attn_kernels.fuse.modules import FusedBlock
from tests.fuse.cases import (
    BLOCKS,
    Block,
    C,
    randomized,
    resnet_block,
    tensor,
    timm,
)
from tests.harness import judge
from tests.peers import moskomule, seed


class TestEpilogue:
    """The end of residual blocks."""

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", BLOCKS)
    def test_equals_the_original(self, name, training, device):
        eager = randomized(BLOCKS[name]()).to(device).train(training)
        model = nn.Sequential(copy.deepcopy(eager))
        report = fuse_(model)
        assert [row.epilogue for row in report.rows] == ["add + ReLU"], report
        x = tensor(4, C, 5, 5, layout="channels_last" if training else "contiguous").to(device)
        judge(model[0], eager, copy.deepcopy(eager).double(), x, None, None, torch.randn_like(x))
        assert isinstance(model[0], type(eager))
        report.restore()
        assert type(model[0]) is type(eager)

    @pytest.mark.parametrize("name", BLOCKS)
    def test_pickle_and_deepcopy(self, name, device):
        model = nn.Sequential(randomized(BLOCKS[name]()).to(device).eval())
        fuse_(model)
        x = tensor(2, C, 5, 5).to(device)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert isinstance(other[0], FusedBlock) == isinstance(model[0], FusedBlock)
            assert not {*map(id, other.parameters())} & {*map(id, model.parameters())}
            assert torch.equal(other(x), model(x))

    def run(self, model, device, calls) -> tuple[list, torch.Tensor]:
        calls.clear()
        y = model(tensor(2, C, 5, 5).to(device))
        return list(calls), y

    def test_layers_on_the_block(self, calls, device):
        eager = randomized(seed.BasicBlock(C, 5)).to(device).eval()
        model, x = nn.Sequential(copy.deepcopy(eager)), tensor(2, C, 5, 5).to(device)
        assert fuse_(model, lambda *_: False).rows == [("0", "BasicBlock", "SE", False, "", "filter_fn")]
        fuse_(model)
        assert fuse_(model).rows[0].reason == "already fused"
        calls.clear()  # of the check
        torch.testing.assert_close(model(x), eager(x))
        assert calls == ["se"]
        handle = model[0].fc1.register_forward_hook(lambda *_: calls.append("hook"))
        assert torch.equal(model(x), eager(x))
        assert calls == ["se", "hook"]
        handle.remove()
        torch.testing.assert_close(torch.func.vmap(model)(x[None]), torch.func.vmap(eager)(x[None]))
        assert len(calls) == 2

    def test_one_call(self, monkeypatch, device):
        seen = []
        model = nn.Sequential(Block(moskomule.SELayer(C, 4))).to(device).eval()
        fuse_(model)
        monkeypatch.setattr(functional, "se", lambda x, *_, **options: seen.append(options) or x)
        model(tensor(2, C, 5, 5).to(device))
        assert [(o["activation"], o["residual"] is not None) for o in seen] == [("relu", True)]

    @pytest.mark.parametrize("where", ["act", "gate", "drop_path", "gate.fc.0"])
    def test_later_hooks(self, where, device):
        eager = Block(moskomule.SELayer(C, 4)).to(device).eval()
        model, seen = nn.Sequential(copy.deepcopy(eager)), []
        fuse_(model)
        handle = model[0].get_submodule(where).register_forward_hook(lambda m, x, y: seen.append(y.clone()))
        expected = []
        eager.get_submodule(where).register_forward_hook(lambda m, x, y: expected.append(y.clone()))
        x = tensor(2, C, 5, 5).to(device)
        torch.testing.assert_close(model(x), eager(x))
        torch.testing.assert_close(seen, expected)
        handle.remove()
        model(x)
        assert len(seen) == 1

    def test_blocks_that_change(self, device):
        for change in (
            lambda b: setattr(b, "act", nn.GELU()),
            lambda b: setattr(b, "gate", nn.Identity()),
            lambda b: setattr(b, "conv", nn.Conv2d(C, C, 1).to(device)),
            lambda b: setattr(b, "forward", torch.neg),
        ):
            eager = Block(moskomule.SELayer(C, 4)).to(device).eval()
            model = nn.Sequential(copy.deepcopy(eager))
            report = fuse_(model)
            for block in (eager, model[0]):
                torch.manual_seed(1)
                change(block)
            x = tensor(2, C, 5, 5).to(device)
            torch.testing.assert_close(model(x), eager(x))
            report.restore()
            torch.testing.assert_close(model(x), eager(x))

    def test_drop_path(self, device):
        model = nn.Sequential(Block(moskomule.SELayer(C, 4), drop=0.3)).to(device)
        (row,) = fuse_(model).rows
        assert (row.fused, row.epilogue) == (True, "")
        assert row.reason == "epilogue not fused: its block drops by drop_path with probability 0.3"
        model = nn.Sequential(resnet_block(timm.models.resnet.BasicBlock, "se", False)).to(device)
        model[0].drop_path = timm.layers.DropPath(0.0)
        (row,) = fuse_(model).rows
        assert row.epilogue
        model[0].drop_path.drop_prob = 0.5  # as timm's schedules do
        assert not model[0].is_fused(tensor(2, C, 5, 5).to(device))

    def test_blocks_that_are_not_understood(self):
        class Choosy(Block):
            def forward(self, x):
                return super().forward(x) if x.sum() > 0 else x

        class Training(Block):
            def forward(self, x):
                return super().forward(x) if self.training else self.gate(x)

        class Remembering(Block):
            def forward(self, x):
                self.last = x
                return super().forward(x)

        class Modes(Block):
            def forward(self, x):
                return super().forward(x if self.norm.training else 2 * x)

        reasons = {
            Choosy: "has a branch on values of tensors",
            Training: "has a branch on whether it is training",
            Remembering: "sets the attribute last",
            Modes: "has a branch on whether a layer is training",
        }
        for kind, reason in reasons.items():
            model = nn.Sequential(kind(moskomule.SELayer(C, 4)))
            model[0].last = None
            before = dict(vars(model[0]))
            (row,) = fuse_(model).rows
            assert row.fused
            assert reason in row.reason
            assert type(model[0]) is kind
            assert vars(model[0]) == before
            assert all(m.training for m in model.modules())

    def test_no_epilogue(self):
        class Used(Block):
            def forward(self, x):
                gated = self.gate(x)
                return self.act(gated + x) * gated

        class Into(Block):
            def forward(self, x):
                shortcut = self.conv(x)
                shortcut += self.gate(x)
                return self.act(shortcut)

        class Gelu(Block):
            def __init__(self, gate):
                super().__init__(gate)
                self.act = nn.GELU()

        for kind in (Used, Into, Gelu):
            model = nn.Sequential(kind(moskomule.SELayer(C, 4)))
            (row,) = fuse_(model).rows
            assert row.fused
            assert not row.epilogue
            assert type(model[0]) is kind

    @pytest.mark.parametrize("gate", [moskomule.SELayer(C, 4), reference.SE(C, 4)], ids=["peer's", "reference's"])
    def test_shortcut_that_broadcasts(self, gate, device):
        class Pooled(Block):
            def forward(self, x):
                return self.act(self.gate(self.norm(x)) + x.mean((2, 3), keepdim=True))

        eager = Pooled(gate).to(device).eval()
        model, x = nn.Sequential(copy.deepcopy(eager)), tensor(2, C, 5, 5).to(device)
        assert fuse_(model).rows[0].epilogue
        torch.testing.assert_close(model(x), eager(x))

    def test_shortcut_of_another_dtype(self, device):
        """Out of place the sum is promoted, in place it is not."""

        class Mixed(Block):
            def forward(self, x):
                return self.act(self.gate(self.norm(x)) + x.float())

        class InPlace(Block):
            def forward(self, x):
                y = self.gate(self.norm(x))
                y += x.float()
                return self.act(y)

        cases = itertools.product(
            ((Mixed, torch.float32), (InPlace, torch.bfloat16)), (moskomule.SELayer(C, 4), reference.SE(C, 4))
        )
        for (kind, dtype), gate in cases:
            eager = kind(gate).to(device, torch.bfloat16).eval()
            model = nn.Sequential(copy.deepcopy(eager))
            assert fuse_(model).rows[0].epilogue
            x = tensor(2, C, 5, 5, dtype=torch.bfloat16).to(device)
            assert model(x).dtype == eager(x).dtype == dtype
            torch.testing.assert_close(model(x), eager(x), rtol=0.02, atol=0.02)

    @pytest.mark.parametrize(
        "name", ["timm Bottleneck se", "timm BasicBlock se", "a user's, reference.SE", "reference se", "the seed's"]
    )
    def test_compiles_without_a_graph_break(self, name, device):
        eager = randomized(BLOCKS[name]()).to(device).eval()
        model = nn.Sequential(copy.deepcopy(eager))
        fuse_(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = tensor(2, C, 5, 5).to(device)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4)
