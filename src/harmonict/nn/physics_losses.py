"""What the MTF-conditioned harmonizer of Zarei et al. and its ablation share: losses (eq 4-8), schedule, augmentation.

Symbols: I_nh the source, I_r the target, I_h what the generator makes of I_nh; all scaled: (HU + 1024) / 2048.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import CyclicLR

from harmonict.core import HarmonictError
from harmonict.nn.losses import Losses, gradient_penalty, huber, texture_loss
from harmonict.nn.vgg import VGG19, prepare, vgg19

HU_ZERO, HU_UNIT = -1024.0, 2048.0  # section II-C, with the sign that makes it [0, 1]
RESIDUAL_HU = 500.0  # unit of a network's last layer: steps of the rate's size must move the image by little
TEXTURE_LAYERS = ("relu1_2", "relu2_2", "relu3_4", "relu4_4", "relu5_4")  # "each down sampling layer": before it
LUNG_HU = (-985.0, -500.0)  # of the target, smoothed by 3 x 3: aerated lung and not the air outside
LUNG_CLOSING = 5  # pixels: vessels inside the lung belong to it


@dataclass(frozen=True)
class Training:
    """Losses, schedule and augmentation, of the paper's size.

    distance, adversarial, texture: weights lambda_d, lambda_a, lambda_t (eq 8). delta: of the Huber loss (eq 4).
    penalty: lambda_GP (eq 5). critic_width: channels of the critic's first layer (pix2pix: 64). rate: the cyclic
    schedule's base (section II-C); rate_peak, cycle: its top and length in steps, halved in height after each cycle
    (not given: ours). batch, steps: not given (ours: 40 epochs of 4,000 slices). patch: side in pixels, none = whole
    slices. affine: share of pairs that are turned, shifted, scaled and sheared (not given: ours). noise_hu: largest SD
    of the Gaussian noise on the source; jitter: largest relative change of its contrast and, in units of 2048 HU, of
    its brightness (not given: ours). feature_weights: of the texture loss and of the encoder at the start ("imagenet":
    section II-C); feature_width: channels of that network's first group. check_every: steps between two looks at the
    held-out patients (ours).
    """

    distance: float = 1000.0
    adversarial: float = 1.0
    texture: float = 50.0
    delta: float = 0.5
    penalty: float = 10.0
    critic_width: int = 64
    rate: float = 1e-4
    rate_peak: float = 1e-3
    cycle: int = 4000
    batch: int = 8
    steps: int = 20_000
    patch: int | None = None
    affine: float = 0.5
    noise_hu: float = 20.0
    jitter: float = 0.01
    feature_weights: str = "imagenet"
    feature_width: int = 64
    check_every: int = 500

    def __post_init__(self) -> None:
        if not 0 < self.rate <= self.rate_peak:
            raise ValueError(f"rate must be above 0 and at most rate_peak, got {self.rate:g} and {self.rate_peak:g}")
        if self.cycle < 2 or self.check_every < 1:
            raise ValueError(f"cycle must be at least 2 and check_every 1, got {self.cycle} and {self.check_every}")
        if not 0 <= self.affine <= 1:
            raise ValueError(f"affine is a share from 0 to 1, got {self.affine:g}")


COMPACT: Mapping[str, Any] = {  # of both methods, for two CPU cores
    "feature_weights": "trial",
    "feature_width": 16,
    "depth": 4,
    "critic_width": 16,
    "adversarial": 0.0,
    "texture": 0.0,
    "patch": 96,
    "batch": 4,
    "steps": 6000,
    "rate_peak": 5e-3,
    "cycle": 2000,
    "affine": 0.25,
    "noise_hu": 5.0,
    "jitter": 0.002,
    "check_every": 250,
}


def scaled(hu: Tensor) -> Tensor:
    """HU -> the paper's unit, 0 at -1024 HU and 1 at 1024 HU."""
    return (hu - HU_ZERO) / HU_UNIT


def features_of(c: Training) -> VGG19:
    """The frozen network of the texture loss, whose weights the encoder starts from."""
    features = vgg19(c.feature_weights)
    if features.width != c.feature_width:
        raise HarmonictError(
            f"feature_weights={c.feature_weights} are {features.width} channels wide, feature_width is "
            f"{c.feature_width}: they must agree, because the encoder starts from them"
        )
    return features


# -- losses ------------------------------------------------------------------------------------------------------------


class Critic(nn.Sequential):
    """pix2pix's patch discriminator of five 4x4 convolutions: [I_nh, I] (b, 2, h, w) -> (b, 1, h / 8 - 2, w / 8 - 2).

    Low for targets and high for what the generator makes: the sign of eq 5 and 6. Without normalisation, which would
    couple the images of a batch in the gradient penalty.
    """

    def __init__(self, width: int) -> None:
        plan = [(2, width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 1)]
        layers: list[nn.Module] = []
        for c_in, c_out, stride in plan:
            layers += [nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))


def critic_losses(
    c: Training, critic: nn.Module, i_nh: Tensor, i_h: Tensor, i_r: Tensor, *, generator: torch.Generator
) -> Losses:
    """Eq 5: D(I_r) - E[D(I_h)] + lambda_GP times the gradient penalty."""
    with torch.autocast(i_nh.device.type, enabled=False):
        i_h = i_h.detach().float()
        apart = critic(torch.cat([i_nh, i_r], 1)).mean() - critic(torch.cat([i_nh, i_h], 1)).mean()
        slope = gradient_penalty(lambda i: critic(torch.cat([i_nh, i], 1)), i_r, i_h, generator=generator)
    return {"WGAN": (1.0, apart), "gradient penalty": (c.penalty, slope)}


def generator_losses(
    c: Training,
    i_nh: Tensor,
    i_h: Tensor,
    i_r: Tensor,
    seen: Tensor,
    *,
    critic: nn.Module,
    features: VGG19,
) -> Losses:
    """Eq 8: Huber where both images were measured (`seen`), eq 6 and eq 7; what has no weight is not computed."""
    losses: dict[str, tuple[float, Tensor]] = {"L_d": (c.distance, huber(i_h[seen], i_r[seen], delta=c.delta))}
    if c.adversarial:
        losses["L_a"] = (c.adversarial, critic(torch.cat([i_nh, i_h], 1)).float().mean())
    if c.texture:
        lung = lung_like(i_r * HU_UNIT + HU_ZERO)
        maps = [features(prepare(i * lung * HU_UNIT + HU_ZERO), TEXTURE_LAYERS) for i in (i_h, i_r)]
        losses["L_t"] = (c.texture, texture_loss(*maps, normalised=True))
    return losses


def lung_like(hu: Tensor) -> Tensor:
    """Lung on a patch (b, 1, h, w) of a clean image in HU: float (b, 1, h, w), 1 where it is.

    Aerated pixels by HU, vessels inside closed. A patch does not show what is joined to the outside, so this is not
    the lung mask of whole series.
    """
    smooth = F.avg_pool2d(F.pad(hu, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mask = ((smooth > LUNG_HU[0]) & (smooth < LUNG_HU[1])).float()
    reach = LUNG_CLOSING // 2
    grown = F.max_pool2d(mask, LUNG_CLOSING, stride=1, padding=reach)
    return -F.max_pool2d(-grown, LUNG_CLOSING, stride=1, padding=reach)


# -- schedule ----------------------------------------------------------------------------------------------------------


def adam_cyclic(c: Training, network: nn.Module) -> tuple[Adam, CyclicLR]:
    """Adam with normalised gradients, and the cyclic rate: from `rate` up to `rate_peak` and back in `cycle` steps."""
    adam = Adam(network.parameters(), lr=c.rate)
    adam.register_step_pre_hook(_normalise)
    half = max(c.cycle // 2, 1)
    return adam, CyclicLR(adam, c.rate, c.rate_peak, step_size_up=half, mode="triangular2", cycle_momentum=False)


def _normalise(optimizer: Any, *_: object) -> None:
    """The gradient of all parameters together gets length 1."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    length = torch.nn.utils.get_total_norm(grads)
    for g in grads:
        g.div_(length.clamp_min(1e-12))


# -- augmentation ------------------------------------------------------------------------------------------------------


class Augmented(NamedTuple):
    """source, target (b, 1, h, w) HU, seen bool; zoom (b,): how much larger things are shown than they were."""

    source: Tensor
    target: Tensor
    seen: Tensor
    zoom: Tensor


def augmented(c: Training, source: Tensor, target: Tensor, seen: Tensor, *, generator: torch.Generator) -> Augmented:
    """Both images turned (10 degrees), shifted (5 %), scaled and sheared (5 %) alike; then noise and jitter on the
    source alone. Flips and quarter turns are the batch's own."""
    b = len(source)
    draw = _uniform(generator, source.device)
    zoom = torch.ones(b, device=source.device)
    if c.affine:
        use = (draw(b, low=0.0) < c.affine).float()
        angle, shear, zoom = (use * draw(b) * size for size in (torch.pi / 18, 0.05, 0.05))
        zoom = 1 + zoom
        shift = use[:, None] * draw(b, 2) * 0.1
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        matrix = torch.stack([cos, shear - sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(b, 2, 3)
        grid = F.affine_grid(matrix, list(source.shape), align_corners=False)
        keep = (use == 0).view(b, 1, 1, 1)  # interpolation would soften what is not moved, too
        inside = F.grid_sample(seen.float(), grid, padding_mode="zeros", align_corners=False) > 0.999
        moved = [F.grid_sample(i, grid, padding_mode="border", align_corners=False) for i in (source, target)]
        source, target, seen = (
            torch.where(keep, a, m) for a, m in zip((source, target, seen), (*moved, inside), strict=True)
        )
    if c.noise_hu:
        noise = torch.randn(source.shape, generator=generator).to(source.device)
        source = source + noise * draw(b, 1, 1, 1, low=0.0) * c.noise_hu
    if c.jitter:
        contrast, brightness = (draw(b, 1, 1, 1) * c.jitter for _ in range(2))
        source = HU_ZERO + (source - HU_ZERO) * (1 + contrast) + HU_UNIT * brightness
    return Augmented(source, target, seen, zoom)


def _uniform(generator: torch.Generator, device: torch.device) -> Callable[..., Tensor]:
    """draw(*shape, low=-1): uniform in [low, 1), drawn on the CPU so that it is the same everywhere."""

    def draw(*shape: int, low: float = -1.0) -> Tensor:
        return (torch.rand(*shape, generator=generator) * (1 - low) + low).to(device)

    return draw
