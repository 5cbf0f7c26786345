"""Real inputs: a photograph, and the feature maps that a ResNet-50 makes of it."""

from __future__ import annotations

import matplotlib.cbook
import matplotlib.image
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.models import resnet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for which the networks are trained
MAPS = ("stem", "stage1", "stage2", "stage3", "stage4")


def photograph() -> Tensor:
    """The portrait of Grace Hopper that Matplotlib ships: (3, 606, 512), uint8."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        return torch.from_numpy(matplotlib.image.imread(file, format="jpg").copy()).permute(2, 0, 1)


def batch(size: int, image_size: int) -> Tensor:
    """(size, 3, image_size, image_size): crops of the photograph, every second one mirrored, normalised."""
    photo = photograph().float() / 255
    generator = torch.Generator().manual_seed(0)
    images = []
    for i in range(size):
        zoom, top, left = torch.rand(3, generator=generator).tolist()
        side = round(min(photo.shape[1:]) * (0.4 + 0.6 * zoom))
        top, left = round(top * (photo.shape[1] - side)), round(left * (photo.shape[2] - side))
        crop = photo[None, :, top : top + side, left : left + side]
        crop = F.interpolate(crop, (image_size, image_size), mode="bilinear", antialias=True)
        images.append(crop.flip(3) if i % 2 else crop)
    mean, std = (torch.tensor(t)[:, None, None] for t in (MEAN, STD))
    return (torch.cat(images) - mean) / std


@torch.no_grad()
def feature_maps(images: Tensor) -> dict[str, Tensor]:
    """What a ResNet-50 with seeded weights and batch statistics makes of the images: all maps follow a ReLU."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = resnet(50).to(images.device)
    return dict(zip(MAPS, [network.stem(images), *network.features(images)], strict=True))
