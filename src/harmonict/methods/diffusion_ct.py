"""DiffusionCT (Selim et al. 2023): an image's latent vector is translated by diffusion, and drawn again from there.

    paper                                                    here
    encoder-decoder, L2 on all images (3.1)                  nn.latent.EncoderDecoder, learn_to_rebuild
    conditional latent DDPM: a U-Net predicts eta (3.2)      nn.diffusion.DenoisingUNet, second loop; the rest is frozen
    standard diffusion loss (Ho et al.) and L1 (3.2)         losses "diffusion" and "L1"
    Z_A -> Z_A' -> decoder (3.3, fig. 3)                     DiffusionCT.draw
Symbols: A source, B target, Z_A, Z_B their latents, Z_B_t the latter with noise eta of step t of T, Z_A' the
translated.
Departures: 1. Those of `encoder-decoder`. 2. The product of (Z_B_t + eta) that the
paper prints is not the forward process of Ho et al., which is used. T is not given: Ho's 1,000, with Ho's schedule.
3. The L1 loss is "between the reconstructed and the non-standard embeddings" in words and between the noise and what
is predicted of it in the formula: the formula. 4. The latent of a patch of `patch` pixels is one vector, written
place by place, row by row; the 1-D U-Net goes along the places. A slice is cut into such patches, without overlap,
and its latents are drawn together, so no seam is decoded. 5. Latents are brought to mean 0 and SD 1 a channel, and
what is sampled stays within the range of those of the training: the decoder has seen no others. 6. `compact` samples
in few steps and draws what is to be added to Z_A (`residual`): beside it the mean HU of a patch is a large number that
would have to be drawn anew to a percent. 7. The U-Net gives the velocity, from which the noise follows exactly; both
losses are of the noise. Its channels are at least twice those of Z: a narrower one cannot tell the noise of all of
them.
What passes through the latent limits the result: the figures of the first loop in the model
card are of target images rebuilt from their own latents, which no translation can surpass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from harmonict.core import HarmonictError, ScanProtocol, Series
from harmonict.core.padding import fill_padding
from harmonict.data import About, Batch, SlicePairs
from harmonict.harmonizer import LEARNED_IN_PIXELS
from harmonict.latent_training import learn_to_rebuild
from harmonict.nn.diffusion import DenoisingUNet, Noise, Sampler, check_steps, noise_of_velocity, noised, sample
from harmonict.nn.latent import CELL_PX, EncoderDecoder, as_maps, as_vectors
from harmonict.physics.kernel import Kernel
from harmonict.sampling import SampledHarmonizer
from harmonict.tiles import to_multiple
from harmonict.train import Run
from harmonict.window_training import WindowKind, WindowSettings, window_batches

STATISTICS_BATCHES = 64  # that mean, SD and range of the latents are taken of
LOOKED_AT_SLICES = 8  # of a series, evenly spaced: their latents are compared with those of the training
OUTSIDE_SD = 0.5  # a latent value counts as outside where it lies so far beyond the range of the training
OUTSIDE_SHARE = 0.01  # of a series' latent values outside the range of the training: more is said
CHECK_STEPS = 8  # of the sampler when a training is judged
SHARE, FURTHEST = "latent values outside", "furthest outside, SD"


@dataclass(frozen=True)
class Config:
    """The paper's size. rate: Adam's, both phases (Sec. 4). steps: 20 epochs of 19,786 images (Sec. 4), 16 a step.
    steps_diffusion: 20 epochs of their 9,893 pairs, 16 a step.

    feature_weights, feature_width, width, linear, patch, batch, rate_end, check_every: see `encoder-decoder`. widths:
    channels of the 1-D U-Net at each of its sizes; blocks: residual blocks at each; batch_diffusion: not given.
    steps_noise (T): Ho et al. steps_sampled, sampler: "ddpm" through all steps is Ho's; "dpm" and "ddim" take few.
    samples: how many a spread is taken of (ours). residual: draw Z_B - Z_A (ours). l1: weight of the L1 loss, not
    given. rate_diffusion: Adam's in the second phase. window: RadiomicGAN's window training, of the second phase.
    """

    feature_weights: str = "imagenet"
    feature_width: int = 64
    width: int = 32
    linear: bool = False
    patch: int = 256
    batch: int = 8
    steps: int = 24_732
    rate: float = 1e-4
    rate_end: float = 1.0
    check_every: int = 1236
    widths: tuple[int, ...] = (1024, 1024, 1024)
    blocks: int = 2
    batch_diffusion: int = 16
    steps_diffusion: int = 12_366
    rate_diffusion: float = 1e-4
    l1: float = 1.0
    residual: bool = False
    steps_noise: int = 1000
    steps_sampled: int = 1000
    sampler: Sampler = "ddpm"
    samples: int = 8
    window: WindowKind = "none"

    def __post_init__(self) -> None:
        if self.patch < CELL_PX or self.patch % CELL_PX:
            raise ValueError(f"patch must be a multiple of {CELL_PX} pixels, got {self.patch}")
        if min(self.feature_width, self.width, self.blocks, self.check_every, *self.widths) < 1 or not self.widths:
            raise ValueError("widths, blocks and check_every must be at least 1")
        if not (self.rate > 0 and self.rate_diffusion > 0 and 0 < self.rate_end <= 1):
            raise ValueError("rates must be above 0 and rate_end in (0, 1]")
        check_steps(self.steps_sampled, self.steps_noise, self.sampler)


class DiffusionCT(SampledHarmonizer):
    """A conditional diffusion model in the latent space of an encoder-decoder, trained on pairs."""

    name = "diffusion-ct"
    paper = "Selim et al. 2023"
    Config = Config
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "compact": {
            "feature_weights": "trial",
            "feature_width": 16,
            "width": 12,
            "linear": True,
            "patch": 128,
            "batch": 4,
            "steps": 1500,
            "rate": 2e-3,
            "rate_end": 0.05,
            "check_every": 250,
            "widths": (256, 256),
            "blocks": 1,
            "batch_diffusion": 16,
            "steps_diffusion": 4000,
            "rate_diffusion": 1e-3,
            "residual": True,
            "steps_sampled": 20,
            "sampler": "dpm",
        },
    }
    limits = (
        "Nothing sharper than what passes through the latent can be drawn: see the first loop of the training.",
        "A sample: its single grains are made up. --uncertainty says where samples differ.",
        LEARNED_IN_PIXELS,
    )
    latent: Tensor  # (4, c) mean, SD, lowest and highest of each channel of Z in the training
    change: Tensor  # (3, c) mean, SD and largest size, in SD, of each channel of what is drawn: Z_B, or Z_B - Z_A
    latent_of: Tensor  # (32,) uint8: SHA-256 of the encoder-decoder whose latents the diffusion model knows

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        self._build()
        self.register_buffer("latent", torch.zeros(4, self.encoder_decoder.channels))
        self.register_buffer("change", torch.zeros(3, self.encoder_decoder.channels))
        self.register_buffer("latent_of", torch.zeros(32, dtype=torch.uint8))

    def _build(self) -> None:
        c = self.config
        self.encoder_decoder = EncoderDecoder(c.feature_width, c.width, c.linear)
        z = self.encoder_decoder.channels
        self.p_theta = DenoisingUNet(1, 2 * z, z, tuple(c.widths), blocks=c.blocks)

    def fit(self, pairs: SlicePairs, run: Run | None = None) -> Self:
        c, run = self.config, run or Run()
        self.target, self.pixel_mm = pairs.target_protocol, torch.tensor(pairs.pixel_mm)
        with run.seeded():
            self._build()
        learn_to_rebuild(self.encoder_decoder, c, pairs, run)
        self.encoder_decoder.eval().requires_grad_(False)
        self._know_latents(pairs, run)
        adam = torch.optim.Adam(self.p_theta.parameters(), lr=c.rate_diffusion)
        rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda n: c.rate_end ** (n / c.steps_diffusion))
        output = self._judged
        for batch in window_batches(
            run,
            pairs,
            WindowSettings(c.window),
            output=output,
            size=c.batch_diffusion,
            patch=c.patch,
            steps=c.steps_diffusion,
            epoch_steps=c.check_every,
            network=self.p_theta,
            adam=adam,
            rate=rate,
        ):
            with torch.no_grad():
                z_a, z_b = (self._encode(x) for x in (batch.source, batch.target))
                z_a, z_b = self._vectors(z_a), self._vectors(self._to_draw(z_a, z_b))
            z_b_t, t, eta = noised(z_b, c.steps_noise, "noise", batch.generator)
            with run.inside():
                velocity = self.p_theta(torch.cat([z_b_t, z_a], dim=1), t)
            error = eta - noise_of_velocity(z_b_t, velocity, t, c.steps_noise)
            run.step({"diffusion": (1.0, error.square().mean()), "L1": (c.l1, error.abs().mean())}, adam)
            rate.step()
            run.check(pairs.held_out, output)
        self.encoder_decoder.requires_grad_(True)
        self.card = run.card(pairs)
        return self.eval()

    def draw(self, x: Tensor, target: ScanProtocol, about: About, noise: Noise) -> Tensor:
        self.check_fitted(target)
        c = self.config
        return to_multiple(x, c.patch, lambda hu: self._synthesize(hu, noise, c.sampler, c.steps_sampled))

    def _synthesize(self, a: Tensor, noise: Noise, sampler: Sampler, steps: int) -> Tensor:
        maps = self._encode(a)
        z_a = self._vectors(maps)
        z = sample(
            lambda z_t, t: self.p_theta(torch.cat([z_t, z_a], dim=1), t),
            lambda n: self._vectors(noise.field(n, maps.shape[1:], pixels=CELL_PX).to(a.device)),
            sampler=sampler,
            steps=steps,
            steps_noise=self.config.steps_noise,
            predicts="velocity",
            clip=float(self.change[2].max()),
        )
        z = as_maps(z, maps.shape, self._side)
        mean, sd, _ = self.change.view(3, 1, -1, 1, 1)
        _, _, low, high = self._shaped_latent()
        z = (z * sd + mean + (maps if self.config.residual else 0.0)).clamp(low, high)
        mean, sd, *_ = self.latent.view(4, 1, -1, 1, 1)
        return self.encoder_decoder.decode(z * sd + mean)

    def _judged(self, batch: Batch) -> Tensor:
        c = self.config
        steps = min(CHECK_STEPS, c.steps_sampled)
        images = [self._synthesize(x[None], Noise(), "dpm", steps) for x in batch.source]
        return torch.cat(images)

    # -- latents -------------------------------------------------------------------------------------------------------

    @property
    def _side(self) -> int:
        """Places of the latent along a side of a patch."""
        return self.config.patch // CELL_PX

    def _vectors(self, maps: Tensor) -> Tensor:
        return as_vectors(maps, self._side)

    def _encode(self, hu: Tensor) -> Tensor:
        """Latents (b, c, h / 32, w / 32) with mean 0 and SD 1 a channel; the encoder computes in float32."""
        mean, sd, *_ = self.latent.view(4, 1, -1, 1, 1)
        return (self.encoder_decoder.encode(hu) - mean) / sd

    def _shaped_latent(self) -> Tensor:
        """(4, 1, c, 1, 1): mean, SD, and the range in units of both."""
        mean, sd, low, high = self.latent.view(4, 1, -1, 1, 1)
        return torch.stack([mean, sd, (low - mean) / sd, (high - mean) / sd])

    def _to_draw(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """What the diffusion model draws for a pair of latents, with mean 0 and SD 1 a channel."""
        mean, sd, _ = self.change.view(3, 1, -1, 1, 1)
        return ((z_b - z_a if self.config.residual else z_b) - mean) / sd

    @torch.no_grad()
    def _know_latents(self, pairs: SlicePairs, run: Run) -> None:
        """Mean, SD and range of each channel over images of the training, and whose latents they are."""
        c = self.config
        found, changes = [], []
        for n in range(STATISTICS_BATCHES):
            batch = pairs.batch((run.seed, 2**31 + 1, n), size=1, patch=c.patch, augment=False).to(run.device)
            z_a, z_b = (self.encoder_decoder.encode(x).cpu() for x in (batch.source, batch.target))
            found.append(torch.cat([z_a, z_b]))
            changes.append(z_b - z_a)
        mean, sd, low, high = _statistics(found)
        self.latent = torch.stack([mean, sd, low, high]).float().to(run.device)
        size = torch.maximum(mean - low, high - mean) / sd
        drawn = torch.stack([torch.zeros_like(mean), torch.ones_like(mean), size])
        if c.residual:
            shift, spread, low, high = _statistics(changes)
            drawn = torch.stack([shift / sd, spread / sd, torch.maximum(shift - low, high - shift) / spread])
        self.change = drawn.float().to(run.device)
        self.latent_of = torch.from_numpy(np.frombuffer(self.encoder_decoder.digest, np.uint8).copy())

    def _check_parts(self) -> None:
        """Raise HarmonictError where decoder and diffusion model are of different trainings."""
        self.check_fitted()
        mine, known = self.encoder_decoder.digest, bytes(self.latent_of.cpu().tolist())
        if mine != known:
            raise HarmonictError(
                f"the diffusion model was trained on latents of the encoder-decoder {known.hex()[:12]}, this one is "
                f"{mine.hex()[:12]}: take both from one training"
            )

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """See Harmonizer; an encoder-decoder and a diffusion model of different trainings are refused."""
        model = super().load(folder)
        try:
            model._check_parts()
        except HarmonictError as error:
            raise HarmonictError(f"{folder}: {error}") from None
        return model

    @torch.inference_mode()
    def describe(self, series: Series, *, source_mtf: Kernel | None = None) -> About:
        """How far the latents lie outside those of the training: About.measured, and a sentence if it is much."""
        self._check_parts()
        about = super().describe(series, source_mtf=source_mtf)
        device = self._to_device()
        places = np.unique(np.linspace(0, len(series.hu) - 1, LOOKED_AT_SLICES).round().astype(int))
        _, _, low, high = self._shaped_latent()
        outside, values, furthest = 0, 0, 0.0

        def look(hu: Tensor) -> Tensor:
            nonlocal outside, values, furthest
            z = self._encode(hu)
            beyond = torch.maximum(z - high, low - z)
            outside += int((beyond > OUTSIDE_SD).sum())
            values += z.numel()
            furthest = max(furthest, float(beyond.max()))
            return hu

        for n in places:
            hu = series.hu[n : n + 1]
            if series.padding is not None:
                hu = fill_padding(hu, series.padding[n : n + 1])
            to_multiple(torch.from_numpy(np.array(hu[:, None])).to(device), CELL_PX, look)
        share = outside / values
        known = {SHARE: np.array(share), FURTHEST: np.array(furthest)}
        said = about.outside
        if share > OUTSIDE_SHARE:
            words = f"{100 * share:.1f} % of its latent values lie outside the range of the training"
            said = (*said, f"{words}, by up to {furthest:.1f} SD")
        return replace(about, measured={**about.measured, **known}, outside=said)

    def harmonize(
        self,
        series: Series,
        target: ScanProtocol | None = None,
        *,
        about: About | None = None,
        slices_at_once: int = 8,
        qc: dict[str, Any] | None = None,
    ) -> Series:
        """See SampledHarmonizer; how far the latents lie outside those of the training is told too."""
        about = about or self.describe(series)
        if qc is not None and SHARE in about.measured:
            told = {name: float(about.measured[name]) for name in (SHARE, FURTHEST)}
            qc.setdefault(self.name, {}).update(told)
        return super().harmonize(series, target, about=about, slices_at_once=slices_at_once, qc=qc)


def _statistics(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, SD, lowest and highest of each channel of maps (b, c, h, w), in float64; no SD is 0."""
    z = torch.cat(list(maps)).double().movedim(1, 0).flatten(start_dim=1)
    sd = z.std(dim=1, correction=0)
    sd = sd.clamp_min(1e-3 * float(sd.max()) or 1.0)  # a channel that never moves
    return z.mean(dim=1), sd, z.amin(dim=1), z.amax(dim=1)
