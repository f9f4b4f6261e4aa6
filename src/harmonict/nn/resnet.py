"""ResNet-18 (He et al., CVPR 2016) without its classifier: an encoder in five blocks.

Parameter names are torchvision's, so that its published file loads; `width` is the number of channels of the first
stage (64 is the paper's), the others have 2, 4 and 8 times as many.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from harmonict.nn.pretrained import feature_network

IMAGENET_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
IMAGENET_WIDTH = 64


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the way around them, (b, c_in, h, w) -> (b, c_out, h / stride, w / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = (
            None
            if stride == 1 and c_in == c_out
            else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        around = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(x + around)


class ResNet18(nn.Module):
    """(b, 3, h, w), as `harmonict.nn.vgg.prepare` makes it -> (b, 8 width, h / 32, w / 32). He's initial weights."""

    def __init__(self, width: int = IMAGENET_WIDTH) -> None:
        super().__init__()
        self.width = width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def blocks(self) -> list[nn.Sequential]:
        """Five blocks that share these weights, torchvision's children 0-2, 3-4, 5, 6 and 7; their maps are smaller
        by 2, 4, 8, 16 and 32."""
        return [
            nn.Sequential(self.conv1, self.bn1, self.relu),
            nn.Sequential(self.maxpool, self.layer1),
            self.layer2,
            self.layer3,
            self.layer4,
        ]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks():
            x = block(x)
        return x


def resnet18(weights: str | Path) -> ResNet18:
    """A frozen feature network in eval mode.

    weights: "imagenet" (width 64; torchvision's file, from the cache folder or fetched into it), "trial" (narrow; ours,
    trained on virtual patients, shipped), "random" (width 16, or "random:64"; always the same draw), or the path of a
    `.pth` or `.safetensors` file with these parameter names, of any width. The classifier's keys are ignored.
    Raises HarmonictError where the weights cannot be had or do not fit.
    """
    return feature_network(
        ResNet18,
        weights,
        of="ResNet-18",
        url=IMAGENET_URL,
        trial="resnet18-trial",
        first="conv1.weight",
        belongs=lambda key: not key.startswith("fc."),
    )


def _stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(c_in, c_out, stride), BasicBlock(c_out, c_out, 1))
