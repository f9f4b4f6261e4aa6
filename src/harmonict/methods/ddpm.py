"""DDPM in image space (the row "DDPM" of Selim et al. 2023): the target image is drawn from noise, given the source.

    paper                                                      here
    "the original DDPM" (sec. 4), conditional (sec. 1)         DDPM.fit, losses "diffusion"
    denoising U-Net of Ho et al. 2020                          nn.diffusion.DenoisingUNet over two axes
    Markov chain from Gaussian noise (sec. 1)                  DDPM.draw
Symbols: A source, B target, x_0 what is drawn, x_t the same with noise eps of step t of T.
Departures: 1. The paper gives no setting of this row: widths, blocks, T and schedule are Ho et al.'s. 2. The
condition is the source beside x_t, and beside it the source less its mean over 5 x 5 pixels: texture is a hundredth
of the HU range, and a network sees it sooner on its own scale. Both are linear in the source. 3. No self-attention
and no group norm: both depend on the whole image, so a patch would be denoised in another way than the slice (see
DenoisingUNet). 4. `compact` draws what must be added to the source (`residual`), in units of its own deviation, and
predicts the velocity, which has no pole at t = T: both let it sample in few steps. 5. Trained on patches, used
on whole slices, which it may as it is fully convolutional.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from harmonict.core import ScanProtocol
from harmonict.data import About, Batch, SlicePairs
from harmonict.harmonizer import LEARNED_IN_PIXELS
from harmonict.nn.diffusion import DenoisingUNet, Noise, Predicts, Sampler, check_steps, noised, sample
from harmonict.sampling import SampledHarmonizer
from harmonict.tiles import to_multiple
from harmonict.train import Run
from harmonict.window_training import WindowKind, WindowSettings, window_batches

HU_UNIT = 1000.0
DETAIL_PX = 5  # side of the mean that the source's detail is taken from
SCALE_BATCHES = 64  # of one patch, that the units are measured on
CHECK_STEPS = 8  # of the sampler when a training is judged


@dataclass(frozen=True)
class Config:
    """Ho et al.'s size. widths: channels at each size; blocks: residual blocks at each. steps_noise (T), predicts: Ho.

    residual: draw target minus source instead of the target. patch, batch, steps: not given; 20 epochs of 9,893
    pairs, 16 a step, as for the other networks of the paper. rate: Adam's (Sec. 4). rate_end: the rate's share that
    is left at the end, on a logarithmic scale (paper: 1, constant). steps_sampled, sampler: "ddpm" through all steps
    is Ho's; "dpm" and "ddim" take few. samples: how many a spread is taken of (ours). check_every: steps between two
    looks at the held-out patients (ours). window: RadiomicGAN's window training.
    """

    widths: tuple[int, ...] = (128, 256, 256, 256)
    blocks: int = 2
    residual: bool = False
    predicts: Predicts = "noise"
    patch: int = 256
    batch: int = 16
    steps: int = 12_366
    rate: float = 1e-4
    rate_end: float = 1.0
    steps_noise: int = 1000
    steps_sampled: int = 1000
    sampler: Sampler = "ddpm"
    samples: int = 8
    check_every: int = 618
    window: WindowKind = "none"

    def __post_init__(self) -> None:
        if not self.widths or min(self.blocks, self.check_every, *self.widths) < 1:
            raise ValueError("widths, blocks and check_every must be at least 1")
        if not (self.rate > 0 and 0 < self.rate_end <= 1):
            raise ValueError("rate must be above 0 and rate_end in (0, 1]")
        if self.patch % self.multiple or self.patch < 2 * self.multiple:
            raise ValueError(f"patch must be a multiple of {self.multiple} and at least twice that, got {self.patch}")
        check_steps(self.steps_sampled, self.steps_noise, self.sampler)

    @property
    def multiple(self) -> int:
        """Of pixels, that the sides of an image must have."""
        return 2 ** (len(self.widths) - 1)


class DDPM(SampledHarmonizer):
    """A conditional diffusion model of images, trained on pairs."""

    name = "ddpm"
    paper = "Ho et al. 2020; Selim et al. 2023"
    Config = Config
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "compact": {
            "widths": (12, 32, 64),
            "blocks": 1,
            "residual": True,
            "predicts": "velocity",
            "patch": 64,
            "batch": 8,
            "steps": 3500,
            "rate": 2e-3,
            "rate_end": 0.05,
            "steps_sampled": 6,
            "sampler": "dpm",
            "check_every": 350,
        },
    }
    limits = (
        "A sample: its single grains are made up. --uncertainty says where samples differ.",
        LEARNED_IN_PIXELS,
    )
    scale: Tensor  # (3,) HU: unit and largest size of what is drawn, and unit of the source's detail

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        self._build()
        self.register_buffer("scale", torch.ones(3))

    def _build(self) -> None:
        c = self.config
        self.network = DenoisingUNet(2, 3, 1, tuple(c.widths), blocks=c.blocks)

    def fit(self, pairs: SlicePairs, run: Run | None = None) -> Self:
        c, run = self.config, run or Run()
        self.target, self.pixel_mm = pairs.target_protocol, torch.tensor(pairs.pixel_mm)
        with run.seeded():
            self._build()
        self.scale = self._measured_scale(pairs, run).to(run.device)
        unit = self.scale[0]
        adam = torch.optim.Adam(self.network.parameters(), lr=c.rate)
        rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda n: c.rate_end ** (n / c.steps))
        output = self._judged
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
            x_0 = (batch.target - self._start(batch.source)) / unit
            x_t, t, wanted = noised(x_0, c.steps_noise, c.predicts, batch.generator)
            with run.inside():
                found = self.network(torch.cat([x_t, self._condition(batch.source)], dim=1), t)
            run.step({"diffusion": (1.0, (found - wanted).square()[batch.measured].mean())}, adam)
            rate.step()
            run.check(pairs.held_out, output)
        self.card = run.card(pairs)
        return self.eval()

    def draw(self, x: Tensor, target: ScanProtocol, about: About, noise: Noise) -> Tensor:
        self.check_fitted(target)
        c = self.config
        return to_multiple(x, c.multiple, lambda hu: self._synthesize(hu, noise, c.sampler, c.steps_sampled))

    def _synthesize(self, a: Tensor, noise: Noise, sampler: Sampler, steps: int) -> Tensor:
        condition = self._condition(a)
        unit, largest = (float(v) for v in self.scale[:2])
        x_0 = sample(
            lambda x_t, t: self.network(torch.cat([x_t, condition], dim=1), t),
            lambda n: noise.field(n, (1, *a.shape[2:])).to(a.device),
            sampler=sampler,
            steps=steps,
            steps_noise=self.config.steps_noise,
            predicts=self.config.predicts,
            clip=largest / unit,
        )
        return self._start(a) + unit * x_0

    def _judged(self, batch: Batch) -> Tensor:
        c = self.config
        steps = min(CHECK_STEPS, c.steps_sampled)
        return torch.cat([self._synthesize(x[None], Noise(), "dpm", steps) for x in batch.source])

    def _start(self, source: Tensor) -> Tensor:
        """What the sample is added to, HU."""
        return source if self.config.residual else torch.zeros_like(source)

    def _condition(self, source: Tensor) -> Tensor:
        """(b, 2, h, w): the source, and what it is beside its local mean."""
        return torch.cat([source / HU_UNIT, _detail(source) / self.scale[2]], dim=1)

    @torch.no_grad()
    def _measured_scale(self, pairs: SlicePairs, run: Run) -> Tensor:
        """Deviation and largest size of what is to be drawn, and deviation of the source's detail, in the training."""
        squares = detail = 0.0
        largest = 1.0
        for n in range(SCALE_BATCHES):
            batch = pairs.batch((run.seed, 2**31 + 1, n), size=1, patch=self.config.patch, augment=False)
            drawn = (batch.target - self._start(batch.source))[batch.measured]
            squares += float(drawn.square().mean()) / SCALE_BATCHES
            detail += float(_detail(batch.source).square().mean()) / SCALE_BATCHES
            largest = max(largest, float(drawn.abs().max()))
        return torch.tensor([max(squares, 1.0) ** 0.5, largest, max(detail, 1.0) ** 0.5])


def _detail(source: Tensor) -> Tensor:
    mean = functional.avg_pool2d(source, DETAIL_PX, stride=1, padding=DETAIL_PX // 2, count_include_pad=False)
    return source - mean
