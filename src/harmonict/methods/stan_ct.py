"""STAN-CT (Selim et al., AMIA 2020): a GAN whose generator also matches a latent vector, and a pipeline around it.

    paper                                   here
    Loss function of D, eq 1-3              critic_loss
    Loss function of G, eq 4-6              generator_loss
    Latent loss, eq 5                       latent_loss
    Alternative training                    STANCT.fit, harmonict.alternating
    DICOM reconstruction, steps 1-3         STANCT.harmonize, harmonict.patch_fusion
Symbols: x standard image, x0 non-standard, x_hat = G(x0), all in units of 1000 HU; z latent vector; f critic; phi
features of D; V their volume.
Departures: 1. Eq 1 and 4 are printed as gradients: D goes up eq 1, G down minus f. f is 1-Lipschitz, in the 70-pixel
patches that it is the mean over, by WGAN-GP's gradient penalty; the paper names no method. f has no natural zero, but
the thresholds (0.01, 0.99) and the quality unit need a probability: a penalty on the middle between real and made
centres f, and the softmax at D's end, over real and fake, is the sigmoid of f. 2. The sign of the feature loss in D is
not settled: D "critics" texture with it, so it pulls the features of x and x_hat apart, up to a margin, as perceptual
adversarial networks do (Wang et al. 2018); without a margin features could grow for ever. 3. Eq 5 lacks a norm: the L1
norm, as in eq 6. It acts on the image, not on the encoder, which could make all latent vectors 0. 4. The output is
linear and not squeezed into [-1, 1]; gray turns into HU by the inverse of that (`gray_to_hu="affine"`), since eq 7
shifts HU. 5. `compact`, for two CPU cores: a narrow network of the same layers that learns what to add to the source
(`residual`), layers up that double pixels and convolve (`upsampling="resize"`: no checkerboard), and crops that keep
their pixel size (`resize_crops`): resizing changes the texture that is to be learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from harmonict.alternating import SIDES, Contest, Rules, begin_step, end_step, new_phase
from harmonict.core import ScanProtocol, Series
from harmonict.core.padding import clip_floor
from harmonict.data import About, Batch, SlicePairs
from harmonict.harmonizer import LEARNED_IN_PIXELS, NetworkHarmonizer
from harmonict.nn.losses import Losses
from harmonict.nn.residual import texture_only
from harmonict.nn.unet import SEEN_PX, Discriminator, UNet, Upsampling
from harmonict.patch_fusion import FusionSettings, fuse_slice, slice_seed
from harmonict.tiles import to_multiple
from harmonict.train import Run
from harmonict.window_training import WindowKind, WindowSettings, window_batches

HU_UNIT = 1000.0
LARGE_SCALE_PX = 8  # ours: what is wider is no texture, and stays the source's
CROP_SIDES = (100, 256)  # Data, Step 1
FEATURE_MARGIN = 1.0
GRADIENT_PENALTY = 10.0  # Gulrajani et al. 2017
CENTRE = 1.0  # ours: the middle of f between real and made images is pulled to 0


@dataclass(frozen=True)
class Config:
    """The paper's size. layers (7 down, 7 up), patch, resize_crops, rate, momentum (Adam's beta1), fake_below,
    real_above: Experimental result.

    width, discriminator_width: channels of the first layers; not given: pix2pix's. upsampling, residual: pix2pix's
    transposed convolutions and no residual. generators, discriminators: copies that compete; several, not given how
    many. batch: not given. steps: 100 epochs of 49,000 patches. feature, latent, pixel: lambda 1, 2, 3, in [0, 1], not
    given; 0 leaves feature or latent loss out (the paper's ablations). t_max, retries: steps of a phase and attempts
    after the first, not given. check_every: steps between two looks at the held-out patients (ours).
    window: RadiomicGAN's, see `harmonict.window_training`.

    units: "none" translates whole slices; the others go patch by patch, see `patch_fusion.FusionSettings.mode`.
    gray_to_hu: of patches, see `FusionSettings.gray`; eq 7 as printed is "minmax-slice".
    """

    width: int = 64
    layers: int = 7
    discriminator_width: int = 64
    upsampling: Upsampling = "transposed"
    residual: bool = False
    generators: int = 2
    discriminators: int = 2
    patch: int = 256
    resize_crops: bool = True
    batch: int = 16
    steps: int = 306_250
    rate: float = 1e-4
    momentum: float = 0.5
    feature: float = 1.0
    latent: float = 1.0
    pixel: float = 0.01
    t_max: int = 1000
    fake_below: float = 0.01
    real_above: float = 0.99
    retries: int = 1
    check_every: int = 3062
    window: WindowKind = "none"
    units: Literal["none", "straightforward", "overlap", "real-fake", "all"] = "all"
    gray_to_hu: Literal["affine", "minmax", "minmax-slice"] = "affine"

    def __post_init__(self) -> None:
        if min(self.width, self.discriminator_width, self.layers, self.generators, self.discriminators) < 1:
            raise ValueError("stan-ct needs at least 1 channel, 1 layer and 1 copy of each network")
        if self.patch % 2 ** (self.layers + 1) or self.patch < 32:
            raise ValueError(f"patch must be a multiple of {2 ** (self.layers + 1)} and at least 32, got {self.patch}")
        if self.check_every < 1 or not self.rate > 0:
            raise ValueError("check_every must be at least 1 and rate above 0")
        if not all(0 <= weight <= 1 for weight in (self.feature, self.latent, self.pixel)):
            raise ValueError("feature, latent and pixel are weights from 0 to 1")
        if self.units == "none" and self.gray_to_hu != "affine":
            raise ValueError('gray_to_hu is for patches: with units "none" it must be "affine"')
        self.rules()

    def rules(self) -> Rules:
        return Rules(self.t_max, fake_below=self.fake_below, real_above=self.real_above, retries=self.retries)


def generator(config: Config) -> UNet:
    """A residual starts at nearly nothing: from "nothing changed"."""
    return UNet(config.width, config.layers, config.upsampling, last_scale=0.01 if config.residual else 1.0)


def f(critic: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """The critic's value of each image (b,), and the features phi that it was made of."""
    logits, phi = critic(image)
    return logits.mean(dim=(1, 2, 3)), phi


def critic_loss(config: Config, critic: nn.Module, x: Tensor, x_hat: Tensor, share: Tensor) -> tuple[Losses, Tensor]:
    """Eq 1-3 to go down, and f of both halves of (x, x_hat). share: (b, 1, 1, 1), where between x and x_hat the
    gradient is held."""
    value, phi = f(critic, torch.cat([x, x_hat]))
    real, made = value.chunk(2)
    phi_x, phi_hat = phi.chunk(2)
    between = (share * x + (1 - share) * x_hat).float().requires_grad_(True)
    with torch.autocast(x.device.type, enabled=False):  # its gradient is differentiated once more
        slope = torch.autograd.grad(f(critic, between)[0].sum(), between, create_graph=True)[0]
    # f is a mean over patches: steep as 1 for the patch that each logit sees, whatever the size of the image
    steep = slope.flatten(1).norm(dim=1) * (x.shape[-2] * x.shape[-1]) ** 0.5 / SEEN_PX
    losses = {
        "adversarial D": (1.0, made.mean() - real.mean()),
        "feature": (config.feature, functional.relu(FEATURE_MARGIN - (phi_hat - phi_x).abs().mean())),
        "gradient penalty": (GRADIENT_PENALTY, (steep - 1).square().mean()),
        "centre": (CENTRE, (real.mean() + made.mean()).square() / 4),
    }
    return losses, value.detach()


def generator_loss(config: Config, values: Tensor, errors: Tensor, seen: Tensor, latent: Tensor) -> Losses:
    """Eq 4-6. values: (copies of D, b), f of x_hat. errors: |x - x_hat|. L1 and latent loss are logged as means; eq 6
    sums over pixels, so lambda 3 weighs as many means as there are pixels."""
    pixels = errors[0].numel()
    return {
        "adversarial G": (1.0, -values.mean()),
        "latent": (config.latent, latent),
        "L1": (config.pixel * pixels, errors[seen].mean()),
    }


def latent_loss(network: nn.Module, x: Tensor, x_hat: Tensor) -> Tensor:
    """Eq 5: mean over V of |z_x - z_x_hat|. The encoder is held: the gradient reaches x_hat alone."""
    with torch.no_grad():
        z_x = network.encode(x)[-1].float()  # type: ignore[operator]
    held = {name: value.detach() for name, value in network.named_parameters()}
    z_hat = functional_call(_Encoder(network), {f"network.{n}": v for n, v in held.items()}, x_hat)
    return (z_x - z_hat.float()).abs().mean()


class _Encoder(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.encode(x)[-1]  # type: ignore[operator]


class STANCT(NetworkHarmonizer):
    """A Wasserstein GAN with latent and feature loss, and the paper's DICOM pipeline; trained on pairs."""

    name = "stan-ct"
    paper = "Selim et al. 2020"
    Config = Config
    window_hu = (-1000.0, 900.0)  # soft tissue, Step 1; the rest is discarded, Step 3
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "compact": {
            "width": 16,
            "discriminator_width": 16,
            "upsampling": "resize",
            "residual": True,
            "generators": 1,
            "discriminators": 1,
            "resize_crops": False,
            "batch": 4,
            "steps": 1800,
            "rate": 4e-4,
            "t_max": 20,
            "check_every": 200,
            "units": "none",
        },
    }
    limits = (
        "An adversarial loss draws plausible texture: its single grains are made up.",
        LEARNED_IN_PIXELS,
        "Outside -1000 to 900 HU nothing is changed.",
    )

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        self.network = generator(self.config)
        self.discriminator = Discriminator(self.config.discriminator_width)

    def fit(self, pairs: SlicePairs, run: Run | None = None) -> Self:
        c, run = self.config, run or Run()
        self.target, self.pixel_mm = pairs.target_protocol, torch.tensor(pairs.pixel_mm)
        with run.seeded():
            contest = Contest(
                [generator(c) for _ in range(c.generators)],
                [Discriminator(c.discriminator_width) for _ in range(c.discriminators)],
            )
        adam = {
            side: torch.optim.Adam(contest.side(side).parameters(), lr=c.rate, betas=(c.momentum, 0.999))
            for side in SIDES
        }
        phase = new_phase()

        def output(batch: Batch) -> Tensor:
            return self._convert(contest.generator, batch.source)

        def non_standard(batch: Batch, hu: Tensor) -> tuple[Tensor, Tensor]:
            value, phi = f(contest.discriminator, hu / HU_UNIT)
            return -value, phi

        for batch in window_batches(
            run,
            pairs,
            WindowSettings(c.window),
            output=output,
            score=non_standard,
            size=c.batch,
            patch=c.patch,
            steps=c.steps,
            epoch_steps=c.check_every,
            contest=contest,
            adam_g=adam["G"],
            adam_d=adam["D"],
            phase=phase,
        ):
            side = begin_step(contest, adam, phase)
            x0, x, seen = _crops(batch) if c.resize_crops else (batch.source, batch.target, batch.measured)
            x0, x = x0 / HU_UNIT, x / HU_UNIT
            with run.inside():
                with torch.set_grad_enabled(side == "G"):
                    x_hats = [torch.where(seen, self._draw(g, x0), x) for g in contest.generators]
                with torch.set_grad_enabled(side == "G" and c.latent > 0):
                    latent = [latent_loss(g, x, x_hat) for g, x_hat in zip(contest.generators, x_hats, strict=True)]
                if side == "G":
                    scored = [[f(d, x_hat)[0] for d in contest.discriminators] for x_hat in x_hats]
                    each = [
                        generator_loss(c, torch.stack(values), (x_hat - x).abs(), seen, z)
                        for values, x_hat, z in zip(scored, x_hats, latent, strict=True)
                    ]
                    p_real = None
                    p_fake = torch.stack([torch.stack(values) for values in scored]).sigmoid().mean(dim=2)
                else:
                    share = torch.rand(len(x), 1, 1, 1, generator=batch.generator).to(x.device)
                    found = [[critic_loss(c, d, x, x_hat, share) for d in contest.discriminators] for x_hat in x_hats]
                    each = [losses for row in found for losses, _ in row]
                    values = torch.stack([torch.stack([value for _, value in row]) for row in found]).sigmoid()
                    p_real, p_fake = (half.mean(dim=2) for half in values.chunk(2, dim=2))
                    p_real = p_real.mean(dim=0)
                    run.log("latent", float(torch.stack(latent).mean()))
            losses = {name: (each[0][name][0], torch.stack([e[name][1] for e in each]).mean()) for name in each[0]}
            run.step(losses, adam[side])
            end_step(run, c.rules(), contest, adam, phase, p_real, p_fake)
            run.check(pairs.held_out, output)
        self.network, self.discriminator = contest.generator, contest.discriminator
        self.card = run.card(pairs)
        return self.eval().requires_grad_(True)

    def harmonize(
        self,
        series: Series,
        target: ScanProtocol | None = None,
        *,
        about: About | None = None,
        slices_at_once: int = 8,
        qc: dict[str, Any] | None = None,
    ) -> Series:
        """As every method does it, or, with `Config.units`, by the paper's pipeline of patches. qc: gets what its
        quality units did to each slice, under "stan-ct"."""
        c = self.config
        if c.units == "none":
            return super().harmonize(series, target, about=about, slices_at_once=slices_at_once, qc=qc)
        target = target or self.target
        self.check_fitted(target)
        device = self._to_device()
        settings = FusionSettings(
            mode=c.units, gray=c.gray_to_hu, realness=c.real_above, resize_px=c.patch if c.resize_crops else None
        )
        floor = clip_floor(series.hu, series.padding)
        out, records = np.empty_like(series.hu), []
        with torch.inference_mode():
            for n, source in enumerate(series.hu):
                hu, record = fuse_slice(
                    source,
                    padding=None if series.padding is None else series.padding[n],
                    translate_patch=lambda patch: self._convert(self.network, patch.to(device)),
                    realness=lambda hu: f(self.discriminator, hu.to(device) / HU_UNIT)[0].sigmoid(),
                    settings=settings,
                    seed=slice_seed(source),
                )
                out[n] = np.where(hu == source, source, np.maximum(hu, floor))
                records.append(record)
        if qc is not None:
            qc[self.name] = records
        return series.with_hu(out, protocol=series.protocol.with_(kernel=target.kernel))

    def translate(self, x: Tensor, target: ScanProtocol, about: About) -> Tensor:
        self.check_fitted(target)
        # the same numbers whatever the batch
        return torch.cat([self._convert(self.network, x[n : n + 1]) for n in range(len(x))])

    def _draw(self, network: nn.Module, x0: Tensor) -> Tensor:
        drawn = network(x0)
        return x0 + texture_only(drawn, LARGE_SCALE_PX) if self.config.residual else drawn

    def _convert(self, network: UNet, hu: Tensor) -> Tensor:
        return HU_UNIT * to_multiple(hu / HU_UNIT, network.multiple, lambda x0: self._draw(network, x0))


def _crops(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Source, target (HU) and what was measured, of a random square of each patch, resized to the patch's size."""
    side = batch.source.shape[-1]
    low, high = (min(limit, side) for limit in CROP_SIDES)
    rows = []
    for n in range(len(batch.source)):
        crop = int(torch.randint(low, high + 1, (), generator=batch.generator))
        y, x = torch.randint(0, side - crop + 1, (2,), generator=batch.generator).tolist()
        cut = (slice(n, n + 1), slice(None), slice(y, y + crop), slice(x, x + crop))
        parts = [part[cut].float() for part in (batch.source, batch.target, batch.measured)]
        rows.append([functional.interpolate(p, (side, side), mode="bilinear", antialias=True) for p in parts])
    source, target, seen = (torch.cat(column) for column in zip(*rows, strict=True))
    return source, target, seen > 0.999
