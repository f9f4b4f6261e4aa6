"""The U-Net and the fully convolutional discriminator that GANai and STAN-CT share.

Both follow pix2pix (Isola et al., CVPR 2017), whose layer counts are those of the papers: seven layers down, a
bottleneck and seven layers up are STAN-CT's fifteen hidden layers, and five layers make the discriminator. No layer
normalises: statistics of a patch would not be those of the slice that the network is used on.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Upsampling = Literal["transposed", "resize"]
SLOPE = 0.2  # of LeakyReLU below 0: pix2pix; the papers do not give it
DISCRIMINATOR_LAYERS = 5
SEEN_PX = 70  # side of the patch that one logit of the discriminator sees


def widths(first: int, layers: int) -> list[int]:
    """Channels of `layers` layers that double up to eight times the first (pix2pix): 64, 128, 256, 512, 512, ..."""
    return [first * min(2**n, 8) for n in range(layers)]


class UNet(nn.Module):
    """(b, 1, h, w) -> (b, 1, h, w), float32; h and w are multiples of `multiple`.

    layers: convolutions down, and as many up, each 4x4 with stride 2, each joined to its counterpart by a skip; between
    them lies one more, the bottleneck, and after them the output layer, which starts at `last_scale` of its usual
    weights. upsampling: "transposed" 4x4 convolutions, or "resize" (each pixel doubled, then a 3x3 convolution), which
    cannot draw a checkerboard. All of these are centred: nothing moves the image.
    """

    def __init__(self, width: int, layers: int, upsampling: Upsampling, *, last_scale: float = 1.0) -> None:
        super().__init__()
        channels = widths(width, layers + 1)
        self.multiple = 2 ** (layers + 1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in pairwise([1, *channels]))
        ups = []
        for n in reversed(range(layers + 1)):  # to the size of down layer n - 1; the last one to the image's
            skip = 0 if n == layers else channels[n]
            ups.append(_up(channels[n] + skip, channels[n - 1] if n else 1, upsampling))
        self.up = nn.ModuleList(ups)
        _start(self)
        last = self.up[-1][-1]  # type: ignore[index]
        with torch.no_grad():
            last.weight.mul_(last_scale)

    def encode(self, x: Tensor) -> list[Tensor]:
        """What each layer down gives; the last is the latent of the bottleneck, (b, c, h / multiple, w / multiple)."""
        levels = []
        for layer in self.down:
            x = functional.leaky_relu(layer(x), SLOPE)
            levels.append(x)
        return levels

    def forward(self, x: Tensor) -> Tensor:
        *skips, x = self.encode(x)
        for layer in self.up[:-1]:  # type: ignore[index]
            x = torch.cat([functional.leaky_relu(layer(x), SLOPE), skips.pop()], dim=1)
        with torch.autocast(x.device.type, enabled=False):
            return self.up[-1](x.float())


class Discriminator(nn.Module):
    """(b, channels, h, w) -> logits (b, 1, h', w') that each patch of 70 pixels is of the target protocol.

    Five 4x4 convolutions with strides 2, 2, 2, 1, 1 (pix2pix's 70-pixel PatchGAN). The softmax over the two classes
    real and fake that STAN-CT puts at the end is the sigmoid of this logit, their difference.
    """

    def __init__(self, width: int, channels: int = 1) -> None:
        super().__init__()
        inner = widths(width, DISCRIMINATOR_LAYERS - 1)
        strides = [2, 2, 2, 1]
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride, 1) for (a, b), stride in zip(pairwise([channels, *inner]), strides, strict=True)
        )
        self.last = nn.Conv2d(inner[-1], 1, 4, 1, 1)
        _start(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the features that they are made of (the output of the fourth layer, (b, c, h'', w''))."""
        for layer in self.layers:
            x = functional.leaky_relu(layer(x), SLOPE)
        x = x.float()
        with torch.autocast(x.device.type, enabled=False):
            return self.last(x), x


def _up(inside: int, out: int, upsampling: Upsampling) -> nn.Sequential:
    if upsampling == "transposed":
        return nn.Sequential(nn.ConvTranspose2d(inside, out, 4, 2, 1))
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(inside, out, 3, padding=1))


def _start(module: nn.Module) -> None:
    """He's scale by the fan-in of each output pixel, biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            # each output pixel of a transposed 4x4 convolution of stride 2 sees 2x2 of its taps
            taps = 4 * layer.in_channels if isinstance(layer, nn.ConvTranspose2d) else layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=(2 / (1 + SLOPE**2) / taps) ** 0.5)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
