"""VGG-19 (Simonyan and Zisserman, ICLR 2015), convolutions only: the network whose features judge texture.

Parameter names and indices are torchvision's, so that its published file loads; `width` is the number of channels
of the first group (64 is the paper's), the others have 2, 4, 8 and 8 times as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from harmonict.core import HarmonictError
from harmonict.nn.pretrained import feature_network

IMAGENET_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
IMAGENET_WIDTH = 64
GROUPS = ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4))  # (channels in widths, convolutions)
AIR_HU, BONE_HU = -1024.0, 1000.0  # shown to the network as black and white
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VGG19(nn.Module):
    """(b, 3, h, w), as `prepare` makes it -> feature maps. He's initial weights; biases 0."""

    def __init__(self, width: int = IMAGENET_WIDTH) -> None:
        super().__init__()
        self.width = width
        self._end: dict[str, int] = {}  # name of a ReLU -> its index in `features`
        layers: list[nn.Module] = []
        channels = 3
        for group, (widths, convolutions) in enumerate(GROUPS, start=1):
            for n in range(1, convolutions + 1):
                layers += [nn.Conv2d(channels, width * widths, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width * widths
                self._end[f"relu{group}_{n}"] = len(layers) - 1
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def groups(self) -> list[nn.Sequential]:
        """The five groups of convolutions, sharing these weights: each but the first begins with its max-pool and each
        ends with its last ReLU, so that their outputs are relu1_2, relu2_2, relu3_4, relu4_4 and relu5_4."""
        layers = list(self.features)
        ends = [self._end[f"relu{n}_{convolutions}"] + 1 for n, (_, convolutions) in enumerate(GROUPS, start=1)]
        return [nn.Sequential(*layers[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def forward(self, x: Tensor, layers: Sequence[str]) -> list[Tensor]:
        """The maps (b, c, h / 2^(n-1), w / 2^(n-1)) of the named layers, "relu1_1" to "relu5_4", in that order.

        Nothing deeper than the deepest is computed. Raises HarmonictError on an unknown name.
        """
        if unknown := [name for name in layers if name not in self._end]:
            raise HarmonictError(f"VGG-19 has no layer {unknown[0]}; known: {', '.join(self._end)}")
        wanted = {self._end[name] for name in layers}
        maps: dict[int, Tensor] = {}
        for index, layer in enumerate(self.features):
            if len(maps) == len(wanted):
                break
            x = layer(x)
            if index in wanted:
                maps[index] = x
        return [maps[self._end[name]] for name in layers]


def vgg19(weights: str | Path) -> VGG19:
    """A frozen feature network in eval mode.

    weights: "imagenet" (width 64; torchvision's file, from the cache folder or fetched into it), "trial" (width 16;
    ours, trained on virtual patients, shipped), "random" (width 16, or "random:64"; always the same draw), or the path
    of a `.pth` or `.safetensors` file with these parameter names, of any width. Keys outside `features` are ignored.
    Raises HarmonictError where the weights cannot be had or do not fit.
    """
    return feature_network(
        VGG19,
        weights,
        of="VGG-19",
        url=IMAGENET_URL,
        trial="vgg19-trial",
        first="features.0.weight",
        belongs=lambda key: key.startswith("features."),
    )


def prepare(hu: Tensor) -> Tensor:
    """CT (b, 1, h, w) in HU -> what a feature network expects (b, 3, h, w), the same for all weights.

    -1024 HU becomes 0 and 1000 HU 1, linearly; the same gray in the three channels; then ImageNet's mean and deviation
    of each. Values outside are not cut: a loss could not pull them back.
    """
    if hu.ndim != 4 or hu.shape[1] != 1:
        raise HarmonictError(f"expected slices (b, 1, h, w) in HU, got shape {tuple(hu.shape)}")
    gray = (hu - AIR_HU) / (BONE_HU - AIR_HU)
    mean = torch.tensor(IMAGENET_MEAN, device=hu.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=hu.device).view(1, 3, 1, 1)
    return (gray - mean) / std
