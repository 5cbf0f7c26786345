"""Real process groups: DistributedDataParallel, FSDP2, and norms whose statistics are those of all processes' batches.

Two processes of the gloo backend on the CPU, with interpreted kernels; on a GPU also PyTorch's SyncBatchNorm.
"""

import copy
import datetime
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import attn_kernels
from attn_kernels.functional import is_fused
from benchmarks.interpreter import skip_repeated_work
from tests.harness import assert_same_gradients, networks

WORLD = 2
SECONDS = 120
ATTENTIONS = ("se", "cbam", "bam")


def _spawn(work, tmp_path, *arguments):
    """Run ``work(rank, *arguments)`` in WORLD processes of one group; what one raises is raised here."""
    context = mp.spawn(_enter, (str(tmp_path / "rendezvous"), work, arguments), WORLD, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{work.__name__} runs for more than {SECONDS} s"
    finally:
        for process in context.processes:
            process.kill()


def _enter(rank, rendezvous, work, arguments):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        skip_repeated_work()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    work(rank, *arguments)
    dist.destroy_process_group()


@pytest.fixture
def interpreted(monkeypatch):
    """The spawned processes see no GPU and interpret the kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def _loss(network, x):
    return network(x).square().mean()


def _gradients(network, x):
    return torch.autograd.grad(_loss(network, x), list(network.parameters()))


def _same_buffers(got, want):
    for (name, b), expected in zip(got.named_buffers(), want.buffers(), strict=True):
        torch.testing.assert_close(b, expected, rtol=1e-4, atol=1e-6, msg=name)


def _shards(rank):
    images = torch.randn(2 * WORLD, 3, 5, 4)
    return images, images.chunk(WORLD), images.chunk(WORLD)[rank]


def _ddp(rank):
    cpu = torch.device("cpu")
    for name in ATTENTIONS:
        fused, eager = networks(name, cpu)
        images, shards, mine = _shards(rank)
        assert is_fused(torch.empty(1, 1, 1, 1))
        # In training each process normalises by its own batch: the mean of the shards' gradients.
        parallel = DistributedDataParallel(fused)
        _loss(parallel, mine).backward()
        each = [_gradients(copy.deepcopy(eager), shard) for shard in shards]
        assert_same_gradients((p.grad for p in fused.parameters()), (sum(g) / WORLD for g in zip(*each, strict=True)))
        # With the statistics frozen: the gradient of the whole batch.
        fused, eager = (m.eval() for m in networks(name, cpu))
        parallel = DistributedDataParallel(fused)
        _loss(parallel, mine).backward()
        assert_same_gradients((p.grad for p in fused.parameters()), _gradients(eager, images))


def test_distributed_data_parallel(interpreted, tmp_path):
    _spawn(_ddp, tmp_path)


def _fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (WORLD,))
    for name in ATTENTIONS:
        fused, eager = networks(name, torch.device("cpu"))
        _, shards, mine = _shards(rank)
        for module in (fused.attention1, fused.attention2, fused):
            if list(module.parameters()):
                fully_shard(module, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in fused.parameters())
        for _ in range(2):  # the second time after a step on the shards
            for module in (fused, eager):
                module.zero_grad()
            _loss(fused, mine).backward()
            each = [_gradients(copy.deepcopy(eager), shard) for shard in shards]
            mean = [sum(g) / WORLD for g in zip(*each, strict=True)]
            assert_same_gradients((p.grad.full_tensor() for p in fused.parameters()), mean)
            for p, g in zip(eager.parameters(), mean, strict=True):
                p.grad = g
            eager(shards[rank])  # counts the batch, as the fused network did
            for module in (fused, eager):
                torch.optim.SGD(module.parameters(), lr=0.01).step()
        _same_buffers(fused, eager)
        # Outside of a network that gathers them the parameters are shards, which no kernel reads.
        if parameters := list(fused.attention1.parameters()):
            x = torch.empty(1, 8, 1, 1)
            fused.attention1.reshard()
            assert not is_fused(x, parameters)


def test_fully_sharded_data_parallel(interpreted, tmp_path):
    _spawn(_fsdp, tmp_path)


class _Sum(torch.autograd.Function):
    """The sum over all processes of a tensor, and of its gradient."""

    @staticmethod
    def forward(ctx, t):
        t = t.clone()
        dist.all_reduce(t)
        return t

    @staticmethod
    def backward(ctx, dt):
        return _Sum.forward(ctx, dt)


class _NormOfAll(nn.Module):
    """BatchNorm by the statistics of every process's batch, as SyncBatchNorm on a GPU: in plain differentiable ops."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps, self.momentum = norm.weight, norm.bias, norm.eps, norm.momentum
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x):
        dims, shape = [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)
        count = WORLD * x.numel() // x.shape[1]
        mean = _Sum.apply(x.sum(dims)) / count
        d = x - mean.view(shape)
        variance = _Sum.apply(d.square().sum(dims)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return d * (variance + self.eps).rsqrt().view(shape) * self.weight.view(shape) + self.bias.view(shape)


def _with_norms_of_all(module):
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, _NormOfAll(child))
        else:
            _with_norms_of_all(child)
    return module


def _one_big_batch(rank):
    for name in ("bam", "cbam"):
        fused, eager = networks(name, torch.device("cpu"))
        images, _, mine = _shards(rank)
        parallel = DistributedDataParallel(_with_norms_of_all(fused))
        y, want = parallel(mine), eager(images)
        torch.testing.assert_close(y, want.chunk(WORLD)[rank], rtol=1e-4, atol=1e-5)
        y.square().mean().backward()
        expected = torch.autograd.grad(want.square().mean(), list(eager.parameters()))
        assert_same_gradients((p.grad for p in fused.parameters()), expected)
        _same_buffers(fused, eager)


def test_norms_of_all_processes_give_the_statistics_of_one_big_batch(interpreted, tmp_path):
    """What SyncBatchNorm does on a GPU, on the CPU, where it does not train, by a norm of the same formula."""
    _spawn(_one_big_batch, tmp_path)


def test_sync_batch_norm_does_not_train_on_the_cpu(tmp_path):
    """Why the test above has a norm of its own, and the one below needs a GPU."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="on GPU"):
            nn.SyncBatchNorm(1)(torch.zeros(2, 1, 3, 3))
    finally:
        dist.destroy_process_group()


def test_conversion_to_sync_batch_norm_takes_the_reference_path():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(attn_kernels.CBAM(8))
    explanation = attn_kernels.explain(converted, torch.randn(2, 8, 3, 3))
    assert any("SyncBatchNorm" in reason for reason in explanation.reasons)
    norms = [
        m for m in nn.SyncBatchNorm.convert_sync_batchnorm(attn_kernels.BAM(8)).modules() if "Norm" in str(type(m))
    ]
    assert len(norms) == 4
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)


def _sync_batch_norm(rank):
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in ("bam", "cbam"):
        images, _, mine = _shards(rank)
        fused, eager = networks(name, device)
        assert is_fused(images.to(device))
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
        parallel = DistributedDataParallel(fused)
        _loss(parallel, mine.to(device)).backward()
        assert_same_gradients((p.grad for p in fused.parameters()), _gradients(eager, images.to(device)), 1e-3)
        _same_buffers(fused, eager)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's SyncBatchNorm trains on GPUs only")
def test_sync_batch_norm_gives_the_statistics_of_one_big_batch(tmp_path):
    _spawn(_sync_batch_norm, tmp_path)
