"""What a network adds to an image, bound to what a change of protocol can do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def texture_only(change: Tensor, sd_px: int) -> Tensor:
    """A change (b, 1, h, w) without its large-scale part, what a Gaussian of SD `sd_px` pixels leaves of it.

    No kernel moves the mean HU of a region (its MTF is 1 at frequency 0); a network that may do so, and that a
    discriminator drives, does it first.
    """
    at = torch.arange(-3 * sd_px, 3 * sd_px + 1, device=change.device, dtype=change.dtype)
    weights = torch.exp(-0.5 * (at / sd_px) ** 2)
    weights = weights / weights.sum()
    smooth = functional.pad(change, [3 * sd_px] * 4, mode="replicate")
    smooth = functional.conv2d(functional.conv2d(smooth, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return change - smooth
