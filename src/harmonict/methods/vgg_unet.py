"""The U-Net that Zarei et al. compare their MTF-conditioned harmonizer with: the same training, no physics.

    paper                                                          here
    U-Net with a VGG encoder backbone, 29 M parameters             nn.squeeze_excitation.VGGUNet
    same losses, weights, schedule and optimizer      (eq 4-8)     nn.physics_losses
Symbols: I source, I_h harmonized.
Departures: 1. VGG-19 (the paper says VGG; this decoder with it gives the 29 M). 2. The result is I plus what the U-Net
gives, which starts at 0, as in `physics`: the two differ in what they are told, not in their long skip. 3. The lung of
a patch is told by its HU; the critic has no normalisation layers (both as in `physics`). 4. `compact`: as wide as that
of `physics`, and as there by the pixel loss alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from harmonict.core import ScanProtocol
from harmonict.data import SlicePairs
from harmonict.harmonizer import LEARNED_IN_PIXELS, About, NetworkHarmonizer
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
from harmonict.nn.squeeze_excitation import VGGUNet
from harmonict.nn.vgg import prepare
from harmonict.train import Run
from harmonict.window_training import WindowKind, WindowSettings, window_batches


@dataclass(frozen=True)
class Config(Training):
    """The paper's size. depth, decoder: groups of VGG-19's encoder and channels of the steps up, the first of them from
    a centre of two convolutions (not given: usual for this U-Net). window: RadiomicGAN's window training.
    """

    depth: int = 5
    decoder: tuple[int, ...] = (256, 128, 64, 32, 16)
    window: WindowKind = "none"


class Generator(nn.Module):
    """HU (b, 1, h, w) -> HU (b, 1, h, w); the last layer in float32."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.unet = VGGUNet(c.feature_width, c.decoder, depth=c.depth, centre=True)
        self.last = nn.Conv2d(c.decoder[-1], 1, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, hu: Tensor) -> Tensor:
        features = self.unet(prepare(hu))
        with torch.autocast(hu.device.type, enabled=False):
            return hu + RESIDUAL_HU * self.last(features.float())


class VGGUNetAblation(NetworkHarmonizer):
    """A U-Net that must find out by itself how sharp an image is."""

    name = "vgg-unet"
    paper = "Zarei et al., ablation"
    Config = Config
    changes = ("kernel", "iterative_strength", "ctdivol_mgy", "exposure_mas")
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "compact": {**COMPACT, "decoder": "64,64,32,16"},
    }
    limits = (
        "Learned on virtual patients: what they do not show (contrast agent, metal, other organs) is unknown to it.",
        "Texture that the source does not determine is made up or left out; it is no proof of a lesion.",
        LEARNED_IN_PIXELS,
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
        self.network.unet.copy_encoder(features)
        adam, rate = adam_cyclic(c, self.network)
        adam_d, rate_d = adam_cyclic(c, critic)
        state: dict[str, Any] = {"network": self.network, "adam": adam, "rate": rate}
        if c.adversarial:
            state |= {"critic": critic, "adam_d": adam_d, "rate_d": rate_d}
        output = lambda batch: self.network(batch.source)  # noqa: E731
        for batch in window_batches(
            run,
            pairs,
            WindowSettings(c.window),
            output=output,
            size=c.batch,
            patch=c.patch,
            steps=c.steps,
            epoch_steps=c.check_every,
            **state,
        ):
            shown = augmented(c, batch.source, batch.target, batch.measured, generator=batch.generator)
            i_nh, i_r = scaled(shown.source), scaled(shown.target)
            with run.inside():
                i_h = scaled(self.network(shown.source))
            if c.adversarial:
                run.step(critic_losses(c, critic, i_nh, i_h, i_r, generator=batch.generator), adam_d)
                rate_d.step()
            with run.inside():
                losses = generator_losses(c, i_nh, i_h, i_r, shown.seen, critic=critic, features=features)
            run.step(losses, adam)
            rate.step()
            run.check(pairs.held_out, output)
        self.card = run.card(pairs)
        return self.eval()

    def translate(self, x: Tensor, target: ScanProtocol, about: About) -> Tensor:
        self.check_fitted(target)
        return torch.cat([self.network(x[n : n + 1]) for n in range(len(x))])  # the same numbers whatever the batch
