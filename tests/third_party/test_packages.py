"""fuse_ on the attention modules of other packages, by their authors' own code, in float64.

An optional lane: ``pip install -r tests/third_party/requirements.txt``. What is not installed is skipped. The table in
docs/migrating.md is this one.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from attn_kernels import fuse_
from tests import soundness
from tests.fuse.cases import randomized

C = soundness.C
DOCUMENT = Path(__file__).parents[2] / "docs" / "migrating.md"


class Peer(NamedTuple):
    module: str
    cls: str
    build: Callable[[type[nn.Module]], nn.Module] = lambda cls: cls(C, 4)
    fused: tuple[str, ...] = ()
    """The kinds of what is fused."""
    reason: str = ""
    """Of what is left."""

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


PEERS = [
    Peer("timm.layers", "SEModule", lambda cls: cls(C, 1 / 4), ("SE",)),
    Peer("timm.layers", "EffectiveSEModule", lambda cls: cls(C), ("SE, gate by PyTorch",)),
    Peer("timm.layers", "EcaModule", lambda cls: cls(C), ("SE, gate by PyTorch",)),
    Peer("timm.layers", "CecaModule", lambda cls: cls(C), (), "calls torch.nn.functional.pad"),
    Peer("timm.layers", "GlobalContext", lambda cls: cls(C), (), "views a tensor so that dimensions mix"),
    Peer("timm.layers.cbam", "CbamModule", lambda cls: cls(C, 1 / 4), ("CBAM",)),
    Peer(
        "timm.layers.cbam",
        "LightCbamModule",
        lambda cls: cls(C, 1 / 4),
        ("SE, gate by PyTorch",),
        "computes no formula that the kernels have",
    ),
    Peer("torchvision.ops", "SqueezeExcitation", lambda cls: cls(C, 4), ("SE",)),
    Peer("pytorchcv.models.common.att", "SEBlock", lambda cls: cls(channels=C, reduction=4), ("SE",)),
    Peer("pytorchcv.models.cbamresnet", "CbamBlock", lambda cls: cls(C), ("CBAM",)),
    Peer("pytorchcv.models.bamresnet", "BamBlock", lambda cls: cls(C), (), "computes no formula that the kernels have"),
    Peer(
        "monai.networks.blocks.squeeze_and_excitation",
        "ChannelSELayer",
        lambda cls: cls(2, C, acti_type_1="relu"),
        ("SE",),
    ),
    Peer("segmentation_models_pytorch.base.modules", "SCSEModule", fused=("SE",)),
    Peer("efficientnet_pytorch", "EfficientNet", lambda cls: cls.from_name("efficientnet-b0"), (), "reads _block_args"),
    Peer("geffnet.efficientnet_builder", "SqueezeExcite", fused=("SE",)),
    Peer("ultralytics.nn.modules.conv", "ChannelAttention", lambda cls: cls(C), ("SE, gate by PyTorch",)),
    Peer(
        "ultralytics.nn.modules.conv",
        "SpatialAttention",
        lambda cls: cls(),
        (),
        "computes no formula that the kernels have",
    ),
    Peer(
        "ultralytics.nn.modules.conv",
        "CBAM",
        lambda cls: cls(C),
        ("SE, gate by PyTorch",),
        "computes no formula that the kernels have",
    ),
    Peer("fightingcv_attention.attention.SEAttention", "SEAttention", fused=("SE",)),
    Peer("fightingcv_attention.attention.CBAM", "CBAMBlock", fused=("CBAM, channel gate",)),
    Peer("fightingcv_attention.attention.BAM", "BAMBlock", reason="changes the size of the map"),
    Peer("fightingcv_attention.attention.ECAAttention", "ECAAttention", lambda cls: cls(3), ("SE, gate by PyTorch",)),
    Peer("fightingcv_attention.attention.SimAM", "SimAM", lambda cls: cls(), ("SimAM",)),
    Peer("mmpretrain.models.utils.se_layer", "SELayer", fused=("SE",)),
    Peer("transformers.models.regnet.modeling_regnet", "RegNetSELayer", fused=("SE",)),
]


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: f"{p.package} {p.cls}")
def test_package(peer, device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's
        try:
            module = importlib.import_module(peer.module)
        except ImportError as error:
            pytest.skip(f"{peer.package} is not installed: {error}")
        eager = randomized(peer.build(getattr(module, peer.cls))).to(device, torch.float64)
    model = nn.Sequential(copy.deepcopy(eager))
    report = fuse_(model, exact_ties=False)
    assert tuple(row.kind for row in report.rows if row.fused) == peer.fused, report
    left = {row.reason for row in report.rows if not row.fused}
    assert all(peer.reason in reason for reason in left) if peer.reason else not left, report
    if peer.fused:
        counts: Counter = Counter()
        for training in (True, False):
            for size in ((3, 5, 7), (2, 8, 8)):
                state = copy.deepcopy(eager.state_dict())
                assert soundness.compare(eager.train(training), model.train(training), size, counts) == ""
                eager.load_state_dict(state)
                model[0].load_state_dict(state)
        assert not counts


@pytest.mark.fast
@pytest.mark.parametrize("peer", PEERS, ids=lambda p: f"{p.package} {p.cls}")
def test_document(peer):
    """docs/migrating.md says what becomes of it."""
    rows = [line.split("|") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    said = {(row[1].strip(), row[2].strip().strip("`")): row[3] for row in rows if len(row) == 5}
    text = said[peer.package, peer.cls]
    assert all(kind in text for kind in peer.fused)
    assert ("left" in text) == (not peer.fused or bool(peer.reason))
