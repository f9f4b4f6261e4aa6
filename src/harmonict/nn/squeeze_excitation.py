"""U-Nets on a VGG-19 encoder: plain, or with attention gates (Oktay et al. 2018) and concurrent spatial and channel
squeeze and excitation (Roy et al., IEEE TMI 38, 540, 2018).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmonict.nn.vgg import GROUPS, VGG19


class ConcurrentSE(nn.Module):
    """Concurrent squeeze and excitation, (b, c, h, w) -> the same: x scaled by channel plus x scaled by place (scSE).

    window: the channels' means are taken over windows of so many pixels of x and joined smoothly, so that a patch of
    that size and a whole slice mean the same; None takes them over the whole image, as Roy et al. do.
    """

    def __init__(self, channels: int, *, window: int | None = None, reduction: int = 2) -> None:
        super().__init__()
        self.window = window
        hidden = max(channels // reduction, 1)
        self.channel = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1)
        )
        self.space = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if self.window is None or max(h, w) <= self.window:
            scale = torch.sigmoid(self.channel(x.mean((2, 3), keepdim=True)))
        else:
            side = (min(self.window, h), min(self.window, w))
            means = F.avg_pool2d(x, side, ceil_mode=True, count_include_pad=False)
            scale = torch.sigmoid(self.channel(means))
            wide = (means.shape[2] * side[0], means.shape[3] * side[1])  # a last window that is cut counts as whole
            scale = F.interpolate(scale, size=wide, mode="bilinear", align_corners=False)[:, :, :h, :w]
        return x * scale + x * torch.sigmoid(self.space(x))


class AttentionGate(nn.Module):
    """Additive attention: `skip` (b, s, h, w) weighed pixel by pixel by what `gate` (b, g, h, w) asks for."""

    def __init__(self, gate: int, skip: int) -> None:
        super().__init__()
        hidden = max(skip // 2, 1)
        self.of_gate, self.of_skip = nn.Conv2d(gate, hidden, 1), nn.Conv2d(skip, hidden, 1, bias=False)
        self.weight = nn.Conv2d(hidden, 1, 1)

    def forward(self, gate: Tensor, skip: Tensor) -> Tensor:
        return skip * torch.sigmoid(self.weight(torch.relu(self.of_gate(gate) + self.of_skip(skip))))


class VGGUNet(nn.Module):
    """(b, 3, h, w), as `nn.vgg.prepare` makes it -> feature maps (b, decoder[-1], h, w), after a ReLU.

    width: channels of the encoder's first group (64 is VGG-19's). depth: how many of its five groups are used.
    decoder: channels of each step up, depth - 1 of them, or depth with a `centre` of two convolutions below the last
    group. attention: gates on the skips and scSE after each step up; `window` is that of ConcurrentSE at full
    resolution. Weights start at Xavier's scale but for the encoder's. Sides that 2^depth does not divide are padded
    with their border's values.
    """

    def __init__(
        self,
        width: int,
        decoder: Sequence[int],
        *,
        depth: int = 5,
        centre: bool = False,
        attention: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(VGG19(width).groups()[:depth])
        skips = [width * widths for widths, _ in GROUPS[:depth]]
        channels = skips[-1]
        self.centre = nn.Sequential(nn.MaxPool2d(2), *_convolutions(channels, channels)) if centre else None
        if not centre:
            skips = skips[:-1]
        if len(decoder) != len(skips):
            raise ValueError(f"this U-Net goes up {len(skips)} steps and needs as many widths, got {len(decoder)}")
        self.gates, self.steps, self.excitations = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, (skip, out) in reversed(list(enumerate(zip(skips, reversed(decoder), strict=True)))):
            self.steps.append(nn.Sequential(*_convolutions(channels + skip, out)))
            if attention:
                here = None if window is None else max(window >> level, 1)
                self.gates.append(AttentionGate(channels, skip))
                self.excitations.append(ConcurrentSE(out, window=here))
            channels = out
        self.multiple = 2 ** len(self.steps)
        xavier(self.centre, self.gates, self.steps, self.excitations)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        x = F.pad(x, (0, -w % self.multiple, 0, -h % self.multiple), mode="replicate")
        skips = []
        for group in self.encoder:
            x = group(x)
            skips.append(x)
        if self.centre is None:
            skips.pop()
        else:
            x = self.centre(x)
        for n, step in enumerate(self.steps):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            skip = skips.pop()
            if self.gates:
                skip = self.gates[n](x, skip)
            x = step(torch.cat([x, skip], 1))
            if self.gates:
                x = self.excitations[n](x)
        return x[..., :h, :w]

    def copy_encoder(self, pretrained: VGG19) -> None:
        """Take the encoder's first weights from a trained VGG-19 of the same width."""
        with torch.no_grad():
            for mine, theirs in zip(self.encoder, pretrained.groups(), strict=False):
                mine.load_state_dict(theirs.state_dict())


def xavier(*parts: nn.Module | None) -> None:
    """Xavier's uniform weights (Glorot and Bengio 2010) for every convolution in `parts`, biases 0."""
    kinds = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    for module in (m for part in parts if part is not None for m in part.modules() if isinstance(m, kinds)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _convolutions(c_in: int, c_out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(c_in, c_out, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(c_out, c_out, 3, padding=1),
        nn.ReLU(inplace=True),
    ]
