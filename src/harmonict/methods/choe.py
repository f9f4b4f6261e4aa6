"""Choe et al. (Radiology 292, 365, 2019): a plain convolutional network draws what the target kernel would have added.

    paper and its public code                                    here
    six 3x3 convolutions of 64 channels, ReLU between            ResidualCNN
    learns target minus source, squared error                    Choe.fit
    converted image = source + network(source)                   Choe.translate
Symbols: x source, y target, r = y - x, all in units of 1000 HU with -1024 HU at 0.
Departures: 1. The paper subtracts the mean training image from x; a shift by 1024 HU does the same for the network
without tying it to where the patient lay. 2. Weights start at He's scale and the last layer at 0, so that training
starts from "nothing changed"; the public code draws all of them from N(0, 0.001^2). 3. The last layer computes in
float32: in bf16 a residual of 100 HU would be known to 0.4 HU only. 4. Two sizes: the paper's, and `compact` for two
CPU cores, narrower with a wider kernel, on patches instead of whole slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from harmonict.core import ScanProtocol
from harmonict.data import SlicePairs
from harmonict.harmonizer import LEARNED_IN_PIXELS, About, NetworkHarmonizer
from harmonict.train import Run
from harmonict.window_training import WindowKind, WindowSettings, window_batches

HU_UNIT = 1000.0
HU_ZERO = -1024.0


@dataclass(frozen=True)
class Config:
    """The paper's size. layers, channels, kernel, batch, steps, rate, decay_every: the public code (model and solver).

    patch: side in pixels, none = whole slices, as in the paper. rate: Adam's. rate_drop: the rate is multiplied by it
    after each third of the steps (public code: 0.1 after 39,402 of 119,400). weight_decay: public code.
    check_every: steps between two looks at the held-out patients (ours). window: RadiomicGAN's window training.
    """

    layers: int = 6
    channels: int = 64
    kernel: int = 3
    patch: int | None = None
    batch: int = 5
    steps: int = 119_400
    rate: float = 1e-4
    rate_drop: float = 0.1
    weight_decay: float = 1e-6
    check_every: int = 1990
    window: WindowKind = "none"

    def __post_init__(self) -> None:
        if self.layers < 2 or self.channels < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError("choe needs at least 2 layers, 1 channel and an odd kernel")
        if self.check_every < 1 or not self.rate > 0:
            raise ValueError("check_every must be at least 1 and rate above 0")


class ResidualCNN(nn.Module):
    """(b, 1, h, w) -> (b, 1, h, w): convolutions with ReLU between; the last one starts at 0 and stays float32."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, k = config.channels, config.kernel
        widths = [1, *[c] * (config.layers - 1)]
        self.body = nn.ModuleList(nn.Conv2d(a, b, k, padding=k // 2) for a, b in pairwise(widths))
        self.last = nn.Conv2d(c, 1, k, padding=k // 2)
        for name, value in self.named_parameters():
            if name.startswith("body") and name.endswith("weight"):
                nn.init.kaiming_normal_(value, nonlinearity="relu")
            else:
                nn.init.zeros_(value)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = torch.relu(layer(x))
        with torch.autocast(x.device.type, enabled=False):
            return self.last(x.float())


class Choe(NetworkHarmonizer):
    """A residual CNN, trained on pairs."""

    name = "choe"
    paper = "Choe et al. 2019"
    Config = Config
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "compact": {
            "channels": 32,
            "kernel": 5,
            "patch": 96,
            "batch": 6,
            "steps": 4000,
            "rate": 1e-3,
            "check_every": 200,
        },
    }
    limits = (
        "Least squared error: texture that the source does not determine comes out too smooth.",
        LEARNED_IN_PIXELS,
    )

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        self.network = ResidualCNN(self.config)

    def fit(self, pairs: SlicePairs, run: Run | None = None) -> Self:
        c, run = self.config, run or Run()
        self.target, self.pixel_mm = pairs.target_protocol, torch.tensor(pairs.pixel_mm)
        with run.seeded():
            self.network = ResidualCNN(c)
        adam = torch.optim.Adam(self.network.parameters(), lr=c.rate, weight_decay=c.weight_decay)
        rate = torch.optim.lr_scheduler.StepLR(adam, max(1, round(c.steps / 3)), c.rate_drop)
        output = lambda batch: self._convert(batch.source)  # noqa: E731
        for batch in window_batches(
            run,
            pairs,
            WindowSettings(c.window),
            output=output,
            size=c.batch,
            patch=c.patch,
            steps=c.steps,
            epoch_steps=c.check_every,
            network=self.network,
            adam=adam,
            rate=rate,
        ):
            with run.inside():
                r_hat = self.network((batch.source - HU_ZERO) / HU_UNIT)
            r = (batch.target - batch.source) / HU_UNIT
            seen = batch.measured
            run.step({"L2": (1.0, (r_hat - r).square()[seen].mean())}, adam)
            rate.step()
            run.check(pairs.held_out, output)
        self.card = run.card(pairs)
        return self.eval()

    def translate(self, x: Tensor, target: ScanProtocol, about: About) -> Tensor:
        self.check_fitted(target)
        return torch.cat([self._convert(x[n : n + 1]) for n in range(len(x))])  # the same numbers whatever the batch

    def _convert(self, x: Tensor) -> Tensor:
        return x + HU_UNIT * self.network((x - HU_ZERO) / HU_UNIT)
