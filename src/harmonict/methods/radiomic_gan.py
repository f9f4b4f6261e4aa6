"""RadiomicGAN (Selim et al., 2021): a network trained on photographs reads the image, a U-Net draws the standard one.

    paper                                                      here
    G: frozen VGG-19 groups, trainable filters, decoder        Generator
    D: six layers, batch norm, soft-max (adopted from pix2pix) discriminator
    adversarial loss of Goodfellow et al.                      RadiomicGAN.fit
    window training, Algorithm 1                               harmonict.window_training (`window`)
Symbols: x non-standard image, y its standard image, y' = G(x); gray values are HU over [-1024, 1000] as [-1, 1].
What is read out of the paper: the three channels in hold the same slice; the mean of the three channels out is y'. The
encoder ends with VGG's fourth group ("we adopt the first four groups"): 12 frozen layers, 4 filters, 10 layers of the
decoder (one at the bottom, three at each size above) make the 26 hidden layers. D sees y or y' alone.
Departures: 1. `l1`: no L1 is stated; without one nothing ties y' to the anatomy of x but the skips. `compact` has one.
2. `residual`: `compact` learns y' - x, as the paper's G must learn to draw all of y', and nothing of it that is
wider than a Gaussian of 8 pixels: no kernel moves the mean HU of a region. 3. A 4x4 convolution that keeps
the size moves the image by half a pixel; here half of the channels of each are moved one way and half the other.
4. Pixels are doubled before a 4x4 convolution; a transposed one draws a checkerboard. 5. G's last layer is 3x3, linear,
float32. 6. MONAI's D doubles its channels in each layer, pix2pix's stops at 512. 7. `compact` trains on patches.
Measured effects: docs/methods/radiomic-gan.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.data import Batch, SlicePairs
from harmonict.harmonizer import LEARNED_IN_PIXELS, About, NetworkHarmonizer
from harmonict.nn.residual import texture_only
from harmonict.nn.vgg import VGG19, prepare, vgg19
from harmonict.tiles import to_multiple
from harmonict.train import Run
from harmonict.window_training import WindowKind, WindowSettings, window_batches

LARGE_SCALE_PX = 8  # ours: what is wider is no texture, and stays the source's
WINDOW_HU = (-1024.0, 1000.0)  # Sec. III-A
HU_ZERO, HU_UNIT = -12.0, 1012.0  # [-1024, 1000] HU is [-1, 1]
GROUPS = 4  # of VGG-19 (Sec. II-B)
SLOPE = 0.2  # of LeakyReLU below 0: pix2pix; not given
NON_STANDARD, STANDARD = 0, 1  # D's classes
LEAST_PATCH = 48  # where D still has two patches a side before its last layer


@dataclass(frozen=True)
class Config:
    """The paper's size. rate, momentum (Adam's beta1): Sec. III-A. steps: its 30 epochs of 14,372 slices.

    feature_weights: the pre-trained VGG-19 (see `harmonict.nn.vgg.vgg19`); feature_width: its channels in the first
    group. width: of filter and decoder at full size, doubled at each smaller one; not given: VGG's. critic_width: of
    D's first layer, pix2pix's. patch: side in pixels, none = whole slices (512 x 512, Sec. III-A). batch: not given.
    l1: weight of the mean absolute error, none is stated. residual: G draws y' - x. window: the paper's own is "both".
    check_every: steps between two looks at the held-out patients (ours).
    """

    feature_weights: str = "imagenet"
    feature_width: int = 64
    width: int = 64
    critic_width: int = 64
    patch: int | None = None
    batch: int = 4
    steps: int = 107_790
    rate: float = 1e-4
    momentum: float = 0.5
    l1: float = 0.0
    residual: bool = False
    window: WindowKind = "both"
    check_every: int = 3593

    def __post_init__(self) -> None:
        if min(self.feature_width, self.width, self.critic_width) < 1 or self.width % 2:
            raise ValueError("radiomic-gan needs at least 1 channel in each network, and an even width")
        if self.patch is not None and (self.patch < LEAST_PATCH or self.patch % 2 ** (GROUPS - 1)):
            raise ValueError(f"patch must be a multiple of 8 and at least {LEAST_PATCH}, got {self.patch}")
        if self.check_every < 1 or not self.rate > 0 or self.l1 < 0:
            raise ValueError("check_every must be at least 1, rate above 0 and l1 not negative")


class Conv4(nn.Conv2d):
    """4x4, same size out. Half of the channels look half a pixel up and left, the others down and right."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__(inside, out, 4, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        first, second = x.chunk(2, dim=1)
        return torch.cat([first[..., :-1, :-1], second[..., 1:, 1:]], dim=1)


class Rise(nn.Module):
    """The decoder's three layers at one size: doubled pixels, the filter's features beside them, and on."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.up, self.join, self.refine = _leaky(inside, out), _leaky(2 * out, out), _leaky(out, out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.refine(self.join(torch.cat([x, skip], dim=1)))


class Generator(nn.Module):
    """Slices (b, 1, h, w) in HU, h and w multiples of 8 -> (b, 1, h, w), float32, in gray values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        sizes = [2**n for n in range(GROUPS)]
        vgg = [config.feature_width * n for n in sizes]
        inner = [config.width * n for n in sizes]
        self.encoder = nn.ModuleList(VGG19(config.feature_width).groups()[:GROUPS]).requires_grad_(False)
        self.filters = nn.ModuleList(
            nn.Sequential(Conv4(a, b), nn.BatchNorm2d(b), nn.ReLU()) for a, b in zip(vgg, inner, strict=True)
        )
        self.bottom = _leaky(inner[-1], inner[-1])
        self.decoder = nn.ModuleList(Rise(2 * c, c) for c in reversed(inner[:-1]))
        self.last = nn.Conv2d(config.width, 3, 3, padding=1)
        if config.residual:  # from "nothing changed"
            nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, hu: Tensor) -> Tensor:
        x = prepare(hu)
        skips = []
        for group, texture in zip(self.encoder, self.filters, strict=True):
            with torch.no_grad():  # frozen
                x = group(x)
            skips.append(texture(x))
        x = self.bottom(skips.pop())
        for rise in self.decoder:
            x = rise(x, skips.pop())
        with torch.autocast(hu.device.type, enabled=False):
            return self.last(x.float()).mean(1, keepdim=True)


def _leaky(inside: int, out: int) -> nn.Sequential:
    convolution = Conv4(inside, out)
    nn.init.kaiming_normal_(convolution.weight, a=SLOPE)
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return nn.Sequential(convolution, nn.LeakyReLU(SLOPE))


def discriminator(width: int) -> nn.Module:
    """Gray values (b, 1, h, w) -> the maps of its six 4x4 layers; the last holds two logits a patch, before the
    soft-max: non-standard and standard."""
    from monai.networks.nets.patchgan_discriminator import PatchDiscriminator

    return PatchDiscriminator(spatial_dims=2, channels=width, in_channels=1, out_channels=2, num_layers_d=4)


class RadiomicGAN(NetworkHarmonizer):
    """A GAN on features of a pre-trained network, trained on pairs by windows."""

    name = "radiomic-gan"
    paper = "Selim et al. 2021"
    Config = Config
    window_hu = WINDOW_HU
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "compact": {
            "feature_weights": "trial",
            "feature_width": 16,
            "width": 12,
            "critic_width": 16,
            "patch": 96,
            "batch": 4,
            "steps": 3000,
            "rate": 5e-4,
            "l1": 100.0,
            "residual": True,
            "check_every": 150,
        },
    }
    limits = (
        "An adversarial loss draws plausible texture: its single grains are made up.",
        "Outside of [-1024, 1000] HU the source stays as it is.",
        LEARNED_IN_PIXELS,
    )

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        self.network = Generator(self.config)

    def fit(self, pairs: SlicePairs, run: Run | None = None) -> Self:
        c, run = self.config, run or Run()
        features = vgg19(c.feature_weights)
        if features.width != c.feature_width:
            raise HarmonictError(
                f"feature_weights={c.feature_weights} has {features.width} channels in its first group, "
                f"feature_width={c.feature_width}: set feature_width={features.width}"
            )
        self.target, self.pixel_mm = pairs.target_protocol, torch.tensor(pairs.pixel_mm)
        with run.seeded():
            self.network, critic = Generator(c), discriminator(c.critic_width)
        self.network.encoder.load_state_dict(nn.ModuleList(features.groups()[:GROUPS]).state_dict())
        learning = [p for p in self.network.parameters() if p.requires_grad]
        adam = torch.optim.Adam(learning, lr=c.rate, betas=(c.momentum, 0.999))
        critic_adam = torch.optim.Adam(critic.parameters(), lr=c.rate, betas=(c.momentum, 0.999))

        def output(batch: Batch) -> Tensor:
            return self._convert(batch.source)

        def score(batch: Batch, hu: Tensor) -> tuple[Tensor, Tensor]:
            maps = critic(_gray(hu))
            return maps[-1][:, NON_STANDARD].mean((1, 2)), maps[-2]

        for batch in window_batches(
            run,
            pairs,
            WindowSettings(c.window),
            output=output,
            score=score,
            size=c.batch,
            patch=c.patch,
            steps=c.steps,
            epoch_steps=c.check_every,
            network=self.network,
            critic=critic,
            adam=adam,
            critic_adam=critic_adam,
        ):
            y, seen = _gray(batch.target), batch.measured
            with run.inside():
                drawn = self._draw(batch.source)
                made = torch.where(seen, drawn, y)
                real, fake = critic(y)[-1], critic(made.detach())[-1]
            run.step({"adversarial D": (0.5, _judged(real, STANDARD) + _judged(fake, NON_STANDARD))}, critic_adam)
            with run.inside():
                fooled = _judged(critic.requires_grad_(False)(made)[-1], STANDARD)
            losses = {"adversarial G": (1.0, fooled)}
            if c.l1:
                losses["L1"] = (c.l1, (drawn - y).abs()[seen].mean())
            run.step(losses, adam)
            critic.requires_grad_(True)
            run.check(pairs.held_out, output)
        self.card = run.card(pairs)
        return self.eval()

    def translate(self, x: Tensor, target: ScanProtocol, about: About) -> Tensor:
        self.check_fitted(target)
        return torch.cat([self._convert(x[n : n + 1]) for n in range(len(x))])  # the same numbers whatever the batch

    def _draw(self, hu: Tensor) -> Tensor:
        """y' in gray values, of slices that are multiples of 8 pixels."""
        hu = hu.clamp(*WINDOW_HU)
        drawn = self.network(hu)
        return _gray(hu) + texture_only(drawn, LARGE_SCALE_PX) if self.config.residual else drawn

    def _convert(self, hu: Tensor) -> Tensor:
        return HU_ZERO + HU_UNIT * to_multiple(hu, 2 ** (GROUPS - 1), self._draw)


def _gray(hu: Tensor) -> Tensor:
    return (hu - HU_ZERO) / HU_UNIT


def _judged(logits: Tensor, truth: int) -> Tensor:
    """Minus the logarithm of the soft-max that D gives to a class."""
    return -functional.log_softmax(logits.float(), dim=1)[:, truth].mean()
