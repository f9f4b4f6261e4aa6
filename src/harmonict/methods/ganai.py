"""GANai (Liang et al., ICHI 2019): a conditional GAN draws the image that the target protocol would have shown.

    paper (as STAN-CT, Selim et al. 2020, describes it)         here
    conditional GAN: D sees the source beside the image         losses of G and D in GANai.fit
    G a U-Net, D a convolutional network                        nn.unet.UNet, nn.unet.Discriminator
    alternative training, competing copies, rollback            harmonict.alternating
Symbols: x standard image, x0 non-standard, x_hat = G(x0), all in units of 1000 HU.
Departures: 1. Networks, thresholds, rate and momentum are STAN-CT's, whose experiments they were compared in; t_max,
the number of copies and the weight of L1 are not given there (the weight is pix2pix's, the others ours). 2. The
output is linear, not squeezed into [-1, 1]: every HU can be had, and gray values turn back into HU exactly. 3.
`compact` is a narrow network of the same layers that learns what to add to the source (`residual`), on two CPU cores;
what it adds has no part that is wider than a Gaussian of 8 pixels, since no kernel moves the mean HU of a region:
without that bound, a training may drift by a hundred HU on whole slices. 4. Its layers up double pixels and convolve
(`upsampling="resize"`): a transposed convolution draws a checkerboard, which is texture that no scanner made. 5.
Crops keep the pixel size of the slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from harmonict.alternating import SIDES, Contest, Rules, begin_step, end_step, new_phase
from harmonict.core import ScanProtocol
from harmonict.data import About, Batch, SlicePairs
from harmonict.harmonizer import LEARNED_IN_PIXELS, NetworkHarmonizer
from harmonict.nn.residual import texture_only
from harmonict.nn.unet import Discriminator, UNet, Upsampling
from harmonict.tiles import to_multiple
from harmonict.train import Run
from harmonict.window_training import WindowKind, WindowSettings, window_batches

HU_UNIT = 1000.0
LARGE_SCALE_PX = 8  # ours: what is wider is no texture, and stays the source's


@dataclass(frozen=True)
class Config:
    """The paper's size. layers (7 down, 7 up), patch, rate, momentum (Adam's beta1), fake_below, real_above: STAN-CT.

    width, discriminator_width: channels of the first layers; not given: pix2pix's. upsampling, residual: pix2pix's
    transposed convolutions and no residual. generators, discriminators: copies that compete; several, not given how
    many. batch: not given. steps: 100 epochs of STAN-CT's 49,000 patches. pixel: weight of L1 beside the adversarial
    loss, pix2pix's. t_max, retries: steps of a phase and attempts after the first, not given. check_every: steps
    between two looks at the held-out patients (ours). window: RadiomicGAN's, see `harmonict.window_training`.
    """

    width: int = 64
    layers: int = 7
    discriminator_width: int = 64
    upsampling: Upsampling = "transposed"
    residual: bool = False
    generators: int = 2
    discriminators: int = 2
    patch: int = 256
    batch: int = 16
    steps: int = 306_250
    rate: float = 1e-4
    momentum: float = 0.5
    adversarial: float = 1.0
    pixel: float = 100.0
    t_max: int = 1000
    fake_below: float = 0.01
    real_above: float = 0.99
    retries: int = 1
    check_every: int = 3062
    window: WindowKind = "none"

    def __post_init__(self) -> None:
        if min(self.width, self.discriminator_width, self.layers, self.generators, self.discriminators) < 1:
            raise ValueError("ganai needs at least 1 channel, 1 layer and 1 copy of each network")
        if self.patch % 2 ** (self.layers + 1) or self.patch < 32:
            raise ValueError(f"patch must be a multiple of {2 ** (self.layers + 1)} and at least 32, got {self.patch}")
        if self.check_every < 1 or not self.rate > 0:
            raise ValueError("check_every must be at least 1 and rate above 0")
        self.rules()

    def rules(self) -> Rules:
        return Rules(self.t_max, fake_below=self.fake_below, real_above=self.real_above, retries=self.retries)


def generator(config: Config) -> UNet:
    """A residual starts at nearly nothing: from "nothing changed"."""
    return UNet(config.width, config.layers, config.upsampling, last_scale=0.01 if config.residual else 1.0)


class GANai(NetworkHarmonizer):
    """A conditional GAN with alternative training, trained on pairs."""

    name = "ganai"
    paper = "Liang et al. 2019"
    Config = Config
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "compact": {
            "width": 16,
            "discriminator_width": 16,
            "upsampling": "resize",
            "residual": True,
            "generators": 1,
            "discriminators": 1,
            "batch": 4,
            "steps": 2000,
            "rate": 4e-4,
            "t_max": 40,
            "check_every": 200,
        },
    }
    limits = (
        "An adversarial loss draws plausible texture: its single grains are made up.",
        LEARNED_IN_PIXELS,
    )

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        self.network = generator(self.config)

    def fit(self, pairs: SlicePairs, run: Run | None = None) -> Self:
        c, run = self.config, run or Run()
        self.target, self.pixel_mm = pairs.target_protocol, torch.tensor(pairs.pixel_mm)
        with run.seeded():
            contest = Contest(
                [generator(c) for _ in range(c.generators)],
                [Discriminator(c.discriminator_width, channels=2) for _ in range(c.discriminators)],
            )
        adam = {
            side: torch.optim.Adam(contest.side(side).parameters(), lr=c.rate, betas=(c.momentum, 0.999))
            for side in SIDES
        }
        phase = new_phase()

        def output(batch: Batch) -> Tensor:
            return self._convert(contest.generator, batch.source)

        def non_standard(batch: Batch, hu: Tensor) -> tuple[Tensor, Tensor]:
            logits, features = contest.discriminator(torch.cat([batch.source, hu], 1) / HU_UNIT)
            return -logits.mean((1, 2, 3)), features

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
            x0, x, seen = batch.source / HU_UNIT, batch.target / HU_UNIT, batch.measured
            with run.inside():
                with torch.set_grad_enabled(side == "G"):
                    x_hats = [torch.where(seen, self._draw(g, x0), x) for g in contest.generators]
                fake = [[d(torch.cat([x0, x_hat], 1))[0] for d in contest.discriminators] for x_hat in x_hats]
                real = [d(torch.cat([x0, x], 1))[0] for d in contest.discriminators] if side == "D" else []
            flat = [logit for row in fake for logit in row]
            if side == "G":  # functional.softplus(-logit) = -log D, softplus(logit) = -log(1 - D)
                pixel = _mean([(x_hat - x).abs()[seen].mean() for x_hat in x_hats])
                adversarial = _mean([functional.softplus(-logit).mean() for logit in flat])
                losses = {"adversarial G": (c.adversarial, adversarial), "L1": (c.pixel, pixel)}
            else:
                known = _mean([functional.softplus(-logit).mean() for logit in real])
                found = _mean([functional.softplus(logit).mean() for logit in flat])
                losses = {"adversarial D": (0.5, known + found)}
            run.step(losses, adam[side])
            p_fake = torch.stack([logit.detach().sigmoid().mean() for logit in flat])
            p_real = torch.stack([logit.detach().sigmoid().mean() for logit in real]) if real else None
            end_step(run, c.rules(), contest, adam, phase, p_real, p_fake.reshape(c.generators, c.discriminators))
            run.check(pairs.held_out, output)
        self.network = contest.generator
        self.card = run.card(pairs)
        return self.eval().requires_grad_(True)

    def translate(self, x: Tensor, target: ScanProtocol, about: About) -> Tensor:
        self.check_fitted(target)
        # the same numbers whatever the batch
        return torch.cat([self._convert(self.network, x[n : n + 1]) for n in range(len(x))])

    def _draw(self, network: nn.Module, x0: Tensor) -> Tensor:
        drawn = network(x0)
        return x0 + texture_only(drawn, LARGE_SCALE_PX) if self.config.residual else drawn

    def _convert(self, network: UNet, hu: Tensor) -> Tensor:
        return HU_UNIT * to_multiple(hu / HU_UNIT, network.multiple, lambda x0: self._draw(network, x0))


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()
