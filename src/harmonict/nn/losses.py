"""Losses under the names that their papers give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Losses = Mapping[str, tuple[float, Tensor]]  # name -> (weight, raw scalar)


def total_loss(losses: Losses) -> Tensor:
    """The weighted sum, float32. The raw values are what a log shows; this is the only place where weights act."""
    return torch.stack([weight * raw.float() for weight, raw in losses.values()]).sum()


def gram(features: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """How channels go together, wherever they do (Gatys et al. 2016): (b, c, h, w) -> (b, c, c), float32.

    G_ij = sum over pixels of f_i f_j, divided by channels x pixels, so that neither image size nor width rules it.
    mask: (b, 1, H, W) weights of 0 to 1 on any grid, averaged onto that of the features; pixels are then counted by
    their weight, and an empty mask gives 0. Always float32: in bf16 a sum over pixels keeps two digits.
    """
    b, c, h, w = features.shape
    with torch.autocast(features.device.type, enabled=False):
        f = features.float().reshape(b, c, h * w)
        if mask is None:
            return f @ f.mT / (c * h * w)
        weight = nn.functional.adaptive_avg_pool2d(mask.float(), (h, w)).reshape(b, 1, h * w)
        pixels = weight.sum(dim=2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return (f * weight) @ f.mT / (c * pixels)


def texture_loss(
    a: Sequence[Tensor], b: Sequence[Tensor], *, mask: Tensor | None = None, normalised: bool = False
) -> Tensor:
    """Mean squared difference of the Gram matrices, summed over layers; images of a and b need not show the same place.

    a, b: maps (n, c, h, w) of the same layers. As it is: the domain loss of CVH-CT (eq 1-2; eq 3 sums both directions).
    normalised: each Gram matrix divided by its Frobenius norm, so that texture counts and its strength does not (Zarei
    et al., eq 7, who also mask: the image before the network, or the features by `mask`, see `gram`).
    """
    total = a[0].new_zeros((), dtype=torch.float32)
    for of_a, of_b in zip(a, b, strict=True):
        grams = [gram(of_a, mask=mask), gram(of_b, mask=mask)]
        if normalised:
            grams = [g / g.square().sum(dim=(1, 2), keepdim=True).clamp_min(1e-24).sqrt() for g in grams]
        total = total + (grams[0] - grams[1]).square().mean()
    return total


def huber(a: Tensor, b: Tensor, *, delta: float) -> Tensor:
    """Squared where |a - b| <= delta, straight beyond it, mean over all (Zarei et al., eq 4, delta 0.5 there)."""
    return nn.functional.huber_loss(a.float(), b.float(), delta=delta)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, *, generator: torch.Generator | None
) -> Tensor:
    """Mean of (|gradient of the critic| - 1)^2 between real and fake images (WGAN-GP, Gulrajani et al. 2017, eq 3).

    real, fake: (b, c, h, w); the critic's value of an image is the mean of what it gives for it. The gradient is by the
    image alone: what a conditional critic sees besides stands in its closure, `lambda x: D(torch.cat([x, source], 1))`.
    generator: draws where between the two; on the CPU. The weight (10) is the caller's.
    """
    share = torch.rand(len(real), 1, 1, 1, generator=generator).to(real.device)
    between = (share * real.detach() + (1 - share) * fake.detach()).requires_grad_()
    value = critic(between).float().reshape(len(real), -1).mean(dim=1)
    (gradient,) = torch.autograd.grad(value.sum(), between, create_graph=True)
    return (gradient.float().flatten(start_dim=1).norm(dim=1) - 1).square().mean()
