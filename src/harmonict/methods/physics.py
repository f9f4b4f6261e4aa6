"""The MTF-conditioned harmonizer of Zarei et al. ("A Physics-informed Deep Neural Network for Harmonization of CT
Images"): a network that is told how sharp each image is, learned on virtual patients whose truth is known.

    paper                                                                     here
    I_h = O(F^-1[Lambda(F[Gamma(I)], Omega(MTF2D))])                 (eq 3)   Generator.forward
    Gamma, attention U-Net with concurrent SE, pre-trained encoder            nn.squeeze_excitation.VGGUNet
    Omega, two transposed convolutions from 64 samples of the MTF             Omega
    Lambda, a 3-D convolution over real and imaginary parts                   Generator.mix
    O, two convolutions and a long attention skip from the input              Generator.forward
    Huber, WGAN-GP and texture loss                                (eq 4-8)   nn.physics_losses
    MTF at the skin-air border of the very image                              Physics.describe
Symbols: I source, I_h harmonized, f in cycles per mm.
Departures: 1. MTF2D lies on a fixed grid (64 x 64 samples of 0.02 per mm, one quadrant), so do the four times finer
filters that Omega makes of it; they are read off at the frequencies of the image at hand, so patches and whole slices
of any pixel size are filtered alike. 2. Omega sees |f| beside MTF2D. 3. Lambda mixes F[Gamma(I)] and its product with
Omega, frequency by frequency and with the same real weights for real and imaginary part: a sum would add a picture of
the MTF to the image, a kernel across frequencies is a window fixed to the image's corner, one across real and imaginary
part mirrors the image. 4. I itself is a channel of Gamma(I), so that the plain filter of eq 2 is within reach, and the
result is I plus what O gives, which starts at 0. 5. Squeeze means are taken over windows of the training patch's size.
6. Gamma's encoder is that of VGG-19 (the paper names none), the ablation's too. 7. The lung of a patch is told by its
HU. 8. The critic has no normalisation layers. 9. Lambda sees whitened spectra (`whitening`): else the gradient is
mostly about the mean. 10. `compact` learns by the pixel loss alone: see docs/methods/physics.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from harmonict.core import HarmonictError, ScanProtocol, Series
from harmonict.data import Batch, SlicePairs
from harmonict.harmonizer import About, NetworkHarmonizer
from harmonict.nn.physics_losses import (
    COMPACT,
    RESIDUAL_HU,
    Critic,
    Training,
    adam_cyclic,
    augmented,
    critic_losses,
    features_of,
    generator_losses,
    scaled,
)
from harmonict.nn.squeeze_excitation import AttentionGate, VGGUNet, xavier
from harmonict.nn.vgg import prepare
from harmonict.physics.kernel import Kernel
from harmonict.physics.mtf import FREQUENCIES_PER_MM, body_mask, spread_slices
from harmonict.physics.mtf import source_mtf as known_mtf
from harmonict.train import Run
from harmonict.window_training import WindowKind, WindowSettings, window_batches

SAMPLES, STEP_PER_MM = len(FREQUENCIES_PER_MM), float(FREQUENCIES_PER_MM[1])
RIM = 2  # samples more on each side of MTF2D, so that its border does not reach into what is used of Omega's result
WHITE_FROM_PER_MM, WHITE_AT_PER_MM = 0.05, 0.2  # spectra are raised from the first on; at the second about by 1
HEAD_MM = 210.0  # a body of a smaller diameter may be a head,
SKULL_HU, SKULL_SHARE = 300.0, 0.25  # and is one if so much of its rim is bone


@dataclass(frozen=True)
class Config(Training):
    """The paper's size. depth, decoder: groups of VGG-19's encoder and channels of the steps up (not given: chosen for
    the paper's 26.5 M parameters). omega: channels between Omega's two layers; filters: channels of Lambda's result
    (not given). margin: pixels by which an image is mirrored at its border before the Fourier transform (ours).
    mtf_noise: SD of the noise on the MTF's samples in training (not given). window: RadiomicGAN's window training.
    """

    depth: int = 5
    decoder: tuple[int, ...] = (352, 176, 96, 64)
    omega: int = 64
    filters: int = 64
    margin: int = 16
    mtf_noise: float = 0.02
    window: WindowKind = "none"


class Omega(nn.Module):
    """MTFs (b, 64) at FREQUENCIES_PER_MM -> filters (b, channels, 4 n, 4 n) over (|f_y|, |f_x|), four to a sample."""

    radius: Tensor  # (66, 66) in samples; beyond the last one an MTF keeps its last value

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        n = torch.arange(SAMPLES + RIM, dtype=torch.float32)
        radius = torch.hypot(n[:, None], n[None, :]).clamp(max=SAMPLES - 1.001)
        self.register_buffer("radius", radius, persistent=False)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(2, hidden, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(hidden, channels, 4, stride=2, padding=1),
        )

    def forward(self, mtf: Tensor, pixel_mm: Tensor) -> Tensor:
        """pixel_mm: (b, 2); only what lies below the highest frequency of such pixels is computed."""
        reach = min(math.ceil(0.5 / float(pixel_mm.min()) / STEP_PER_MM) + 1, SAMPLES) + RIM
        radius = self.radius[:reach, :reach]
        low = radius.long()
        share = radius - low
        mtf_2d = mtf[:, low] * (1 - share) + mtf[:, low + 1] * share
        planes = torch.stack([mtf_2d, (radius / SAMPLES).expand_as(mtf_2d)], 1)
        return self.up(F.pad(planes, (RIM, 0, RIM, 0), mode="reflect"))  # an MTF is even

    def at(self, filters: Tensor, shape: tuple[int, int], pixel_mm: Tensor) -> Tensor:
        """What `forward` gave, at the frequencies of `rfft2` of an image (h, w) with pixels pixel_mm (b, 2):
        (b, channels, h, w // 2 + 1)."""
        device = filters.device
        f = torch.fft.fftfreq(shape[0], device=device).abs(), torch.fft.rfftfreq(shape[1], device=device)
        n = filters.shape[-1] / 4
        y, x = ((f[k] / pixel_mm[:, k, None] / STEP_PER_MM + RIM + 0.5) / n * 2 - 1 for k in range(2))
        grid = torch.stack([x[:, None].expand(-1, len(f[0]), -1), y[:, :, None].expand(-1, -1, len(f[1]))], -1)
        return F.grid_sample(filters, grid, padding_mode="border", align_corners=False)


def whitening(shape: tuple[int, int], pixel_mm: Tensor) -> Tensor:
    """By what each frequency of `rfft2` of an image (h, w) with pixels pixel_mm (b, 2) is raised: (b, h, w // 2 + 1).

    Spectra of images fall as 1 / f. Without this, every gradient step is about the mean of the image, and edges, which
    are all that differs between source and target, are learned late.
    """
    device = pixel_mm.device
    f_y, f_x = torch.fft.fftfreq(shape[0], device=device), torch.fft.rfftfreq(shape[1], device=device)
    y, x = f_y[:, None] / pixel_mm[:, :1, None], f_x[None, :] / pixel_mm[:, 1:, None]
    return (y.square() + x.square() + WHITE_FROM_PER_MM**2).sqrt() / WHITE_AT_PER_MM


class Generator(nn.Module):
    """G(I, MTF2D) of eq 3, HU in and HU out; from the Fourier transform on in float32."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.margin = c.margin
        channels = c.decoder[-1] + 1
        self.gamma = VGGUNet(c.feature_width, c.decoder, depth=c.depth, attention=True, window=c.patch)
        self.omega = Omega(c.omega, channels)
        # The 3-D convolution reaches over one frequency and one part, so its weights are a matrix.
        self.mix = nn.Linear(2 * channels, c.filters, bias=False)
        self.after = nn.Conv2d(c.filters, c.filters, 3, padding=1)
        self.attention = AttentionGate(1, c.filters)
        self.last = nn.Conv2d(c.filters, 1, 3, padding=1)
        xavier(self.omega, self.after, self.attention)
        nn.init.xavier_uniform_(self.mix.weight)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def filters(self, mtf: Tensor, pixel_mm: Tensor) -> Tensor:
        """Omega(MTF2D): the same for all slices of a series."""
        with torch.autocast(mtf.device.type, enabled=False):
            return self.omega(mtf.clamp(0, 2), pixel_mm)

    def forward(self, hu: Tensor, filters: Tensor, pixel_mm: Tensor) -> Tensor:
        """hu (b, 1, h, w); filters, as `filters` makes them, and pixel_mm (b, 2): one for all or one for each."""
        encoded = self.gamma(prepare(hu))
        with torch.autocast(hu.device.type, enabled=False):
            x = scaled(hu)
            image = torch.cat([encoded.float(), x], 1)
            h, w = hu.shape[-2:]
            m = min(self.margin, h - 1, w - 1)
            image = F.pad(image, (m, m, m, m), mode="reflect")
            shape = (h + 2 * m, w + 2 * m)
            spectrum = torch.fft.rfft2(image) * whitening(shape, pixel_mm)[:, None]
            parts = torch.view_as_real(spectrum).movedim(-1, 2)  # (b, c, 2, f_y, f_x)
            both = torch.cat([parts, parts * self.omega.at(filters, shape, pixel_mm)[:, :, None]], 1)
            mixed = (self.mix.weight @ both.flatten(2)).unflatten(2, both.shape[2:])
            image = torch.fft.irfft2(torch.complex(mixed[:, :, 0], mixed[:, :, 1]), s=shape)[..., m : m + h, m : m + w]
            residual = self.last(self.attention(x, torch.relu(self.after(image))))
        return hu + RESIDUAL_HU * residual


class Physics(NetworkHarmonizer):
    """A network that filters what it sees by what it is told of the image's sharpness."""

    name = "physics"
    paper = "Zarei et al."
    uses_source_mtf = True
    Config = Config
    changes = ("kernel", "iterative_strength", "ctdivol_mgy", "exposure_mas")
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "compact": {**COMPACT, "decoder": "64,32,16", "omega": 8, "filters": 16},
    }
    limits = (
        "Learned on virtual patients: what they do not show (contrast agent, metal, other organs) is unknown to it.",
        "Texture that the source does not determine is made up or left out; it is no proof of a lesion.",
        "The MTF is told in cycles per mm, the rest is learned in pixels: judge it at another pixel size.",
    )

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        self.network = Generator(self.config)

    def fit(self, pairs: SlicePairs, run: Run | None = None) -> Self:
        c, run = self.config, run or Run()
        self.target, self.pixel_mm = pairs.target_protocol, torch.tensor(pairs.pixel_mm)
        features = features_of(c).to(run.device)
        with run.seeded():
            self.network, critic = Generator(c), Critic(c.critic_width)
        self.network.gamma.copy_encoder(features)
        adam, rate = adam_cyclic(c, self.network)
        adam_d, rate_d = adam_cyclic(c, critic)
        state: dict[str, Any] = {"network": self.network, "adam": adam, "rate": rate}
        if c.adversarial:
            state |= {"critic": critic, "adam_d": adam_d, "rate_d": rate_d}
        for batch in window_batches(
            run,
            pairs,
            WindowSettings(c.window),
            output=self._convert,
            size=c.batch,
            patch=c.patch,
            steps=c.steps,
            epoch_steps=c.check_every,
            describe=self.describe,
            **state,
        ):
            shown = augmented(c, batch.source, batch.target, batch.measured, generator=batch.generator)
            mtf, pixel_mm = _told(batch.about, run.device)
            mtf = mtf + c.mtf_noise * torch.randn(mtf.shape, generator=batch.generator).to(run.device)
            pixel_mm = pixel_mm / shown.zoom[:, None]  # shown larger, as if made of smaller pixels
            with run.inside():
                i_h = scaled(self.network(shown.source, self.network.filters(mtf, pixel_mm), pixel_mm))
            i_nh, i_r = scaled(shown.source), scaled(shown.target)
            if c.adversarial:
                run.step(critic_losses(c, critic, i_nh, i_h, i_r, generator=batch.generator), adam_d)
                rate_d.step()
            with run.inside():
                losses = generator_losses(c, i_nh, i_h, i_r, shown.seen, critic=critic, features=features)
            run.step(losses, adam)
            rate.step()
            run.check(pairs.held_out, self._convert)
        self.card = run.card(pairs)
        return self.eval()

    def describe(self, series: Series, *, source_mtf: Kernel | None = None) -> About:
        """The source's MTF, given or measured at the skin-air border of this very series.

        Raises HarmonictError for a series that shows no clean skin beside air, that is not cut across the body, or
        that shows a head.
        """
        refuse_what_is_no_trunk(series)
        mtf = known_mtf(series, source_mtf)
        return replace(super().describe(series), measured={"source_mtf": mtf})

    def translate(self, x: Tensor, target: ScanProtocol, about: About) -> Tensor:
        self.check_fitted(target)
        mtf, pixel_mm = _told((about,), x.device)
        filters = self.network.filters(mtf, pixel_mm)
        # slice by slice: the same numbers whatever the batch
        return torch.cat([self.network(x[n : n + 1], filters, pixel_mm) for n in range(len(x))])

    def _convert(self, batch: Batch) -> Tensor:
        mtf, pixel_mm = _told(batch.about, batch.source.device)
        return self.network(batch.source, self.network.filters(mtf, pixel_mm), pixel_mm)


def _told(about: tuple[About, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """MTFs (b, 64) and pixel sizes in mm (b, 2)."""
    mtf = np.stack([a.measured["source_mtf"] for a in about]).astype(np.float32)
    return torch.from_numpy(mtf).to(device), torch.tensor([a.pixel_mm for a in about], device=device)


def refuse_what_is_no_trunk(series: Series) -> None:
    """Raise HarmonictError for slices along the body and for a head: neither was ever learned from."""
    name = series.name or "series"
    if abs(series.geometry.direction[0][2]) < 0.7:
        raise HarmonictError(f"{name}: its slices do not lie across the body; give the axial series of this patient")
    some = spread_slices(len(series.hu), 3)
    z = some[len(some) // 2]
    hu = series.hu[z] if series.padding is None else np.where(series.padding[z], np.float32(-1000), series.hu[z])
    mask = body_mask(hu, series.pixel_mm)
    if mask is None:
        return
    diameter_mm = 2 * np.sqrt(mask.sum() * np.prod(series.pixel_mm) / np.pi)
    depth = ndimage.distance_transform_edt(mask, sampling=series.pixel_mm)
    rim = (depth > 3) & (depth < 12)
    if diameter_mm < HEAD_MM and rim.any() and np.mean(hu[rim] > SKULL_HU) > SKULL_SHARE:
        raise HarmonictError(
            f"{name}: it shows a head ({diameter_mm:.0f} mm across, bone all around); physics is for trunks"
        )
