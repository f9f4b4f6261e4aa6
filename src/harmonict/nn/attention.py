"""CBAM, the convolutional block attention module (Woo et al., ECCV 2018): which channels matter, then which places.

    Woo et al.                                                        here
    M_c = sigmoid(MLP(AvgPool(F)) + MLP(MaxPool(F))), eq 2            ChannelAttention
    M_s = sigmoid(f_7x7([AvgPool(F'); MaxPool(F')])), eq 3            SpatialAttention
    F' = M_c F, F'' = M_s F', eq 1                                    CBAM
Symbols: F a feature map, M its gates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ChannelAttention(nn.Module):
    """A gate of 0 to 1 for each channel, from its mean and its greatest value."""

    def __init__(self, channels: int, reduction: int) -> None:
        """reduction: how many times narrower the hidden layer of the MLP is (Woo et al.: 16)."""
        super().__init__()
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))

    def forward(self, x: Tensor, *, tile: int | None = None, weight: Tensor | None = None) -> Tensor:
        """(b, c, h, w) -> gates (b, c, 1, 1).

        tile: None pools over the whole image, as published. Else each tile of `tile` pixels has its own gates and the
        image takes their mean, by `weight` (b, 1, ny, nx; equal where None): a large image then has the gates of the
        patches that the network was trained on, because the greatest value of a channel grows with the area and the
        mean of an image that is mostly air is that of air. `tile_shares` gives the grid.
        """
        if tile is None or max(x.shape[-2:]) <= tile:
            mean, most = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
            return torch.sigmoid(self.mlp(mean) + self.mlp(most))
        mean = functional.avg_pool2d(x, tile, ceil_mode=True, count_include_pad=False)
        gates = torch.sigmoid(self.mlp(mean) + self.mlp(functional.max_pool2d(x, tile, ceil_mode=True)))
        if weight is None:
            return gates.mean((2, 3), keepdim=True)
        return (gates * weight).sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True)


def tile_shares(where: Tensor, tile: int) -> Tensor:
    """The share of each tile of `tile` pixels that is True: (b, 1, h, w) bool -> (b, 1, ny, nx), the grid of
    `ChannelAttention`; tiles at the right and lower edge may be smaller."""
    return functional.avg_pool2d(where.float(), tile, ceil_mode=True, count_include_pad=False)


class SpatialAttention(nn.Module):
    """A gate of 0 to 1 for each pixel, from the mean and the greatest value of its channels around it."""

    def __init__(self, kernel: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> gates (b, 1, h, w)."""
        return torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)))


class CBAM(nn.Module):
    """Features (b, c, h, w) through the gates of their channels, then of their places."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels, reduction)
        self.spatial = SpatialAttention()

    def forward(self, x: Tensor, *, tile: int | None = None, weight: Tensor | None = None) -> Tensor:
        x = x * self.channel(x, tile=tile, weight=weight)
        return x * self.spatial(x)
