"""Losses under the names that their papers give them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Losses = Mapping[str, tuple[float, Tensor]]  # name -> (weight, raw scalar)


def total_loss(losses: Losses) -> Tensor:
    """The weighted sum, float32. The raw values are what a log shows; this is the only place where weights act."""
    return torch.stack([weight * raw.float() for weight, raw in losses.values()]).sum()
