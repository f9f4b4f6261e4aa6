"""CycleGAN (Zhu et al., ICCV 2017): two networks learn the look of the other domain from images of other patients, and
must find back to where they came from. The baseline of CVH-CT (Selim et al. 2021).

    Zhu et al.                                                    here
    G and F, from A to B and back                                 a2b, b2a: ResNet
    D_X and D_Y, 70 x 70 PatchGAN                                 discriminator (MONAI's)
    adversarial loss, eq 1 with least squares (Sec. 4)            adversarial, CycleGAN.fit
    cycle consistency, eq 2                                       "cycle"
    identity (Sec. 5.2)                                           "identity"
    history of 50 generated images (Sec. 4)                       from_pool
Symbols: a, b real images of A and B, a_hat = F(b), b_hat = G(a); in units of the window [-1000, 900] HU, -1 to 1.
Departures: 1. No instance normalisation: in the generators it takes the mean and the spread of a slice away, which
are HU here, and they differ between patches of tissue and whole slices with air. The second convolution of each
residual block starts at 0 in its place. In the discriminators it would hide how strong the noise is; with it, cycle
weight 10 and Br40 to Bl64, the generators went to changing nothing within 100 steps (`compact` weighs the cycle by
3). ReLU leaks (0.2) as in the discriminators: without the normalisation a whole layer stopped for good after 600 steps
(at a rate of 0.001; Br40 to Bl64). 2. `residual` (in `compact`): the generator's tanh, without its large-scale part (a
Gaussian of 3 pixels), is added to its input and starts at 0, so that training starts from "nothing changed", minutes
suffice, detail need not pass the strided layers, and neither contrast nor the mean of a region can turn over; what
that is worth was measured for cvh-ct (its departure 3). Values beyond the window are possible then; discriminators see
them cut. 3. 80 x 80 soft-tissue patches as for CVH-CT instead of 256 x 256 photographs. 4. Steps instead of 200
epochs; the rate stays for the first half and falls straight to 0 in the second, as there. 5. The last layer computes
in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from harmonict.core import ScanProtocol
from harmonict.data import SlicePairs
from harmonict.harmonizer import LEARNED_IN_PIXELS
from harmonict.nn.residual import texture_only
from harmonict.train import Run
from harmonict.two_way import LARGE_SCALE_PX, SEES, Judge, TwoWay, convert, scaled

LEAK = 0.2  # of ReLU


@dataclass(frozen=True)
class Config:
    """The paper's size.

    channels: of the first layer (appendix 7.2: 64). blocks: residual blocks (6 for images up to 128 pixels).
    discriminator_channels: 64. residual: add the generator's output to its input (departure 2). cycle: lambda (10).
    identity: its weight as a share of `cycle` (0.5). pool: generated images that the discriminators remember (50).
    rate: Adam's (0.0002). beta: its first (0.5). batch: 1. patch: side in pixels (CVH-CT: 80). steps: not given for CT:
    ours. check_every: steps between two looks at the held-out patients (ours).
    """

    channels: int = 64
    blocks: int = 6
    discriminator_channels: int = 64
    residual: bool = False
    cycle: float = 10.0
    identity: float = 0.5
    pool: int = 50
    rate: float = 2e-4
    beta: float = 0.5
    patch: int = 80
    batch: int = 1
    steps: int = 200_000
    check_every: int = 5_000

    def __post_init__(self) -> None:
        if min(self.channels, self.discriminator_channels, self.batch, self.steps, self.check_every) < 1:
            raise ValueError("channels, batch, steps and check_every must be at least 1")
        if self.blocks < 0 or self.pool < 0 or self.patch < 32 or self.patch % 4:
            raise ValueError("blocks and pool must not be negative, and patch a multiple of 4 from 32 on")
        if not self.rate > 0 or min(self.cycle, self.identity) < 0:
            raise ValueError("rate must be above 0, cycle and identity not negative")


class Block(nn.Module):
    """x + two 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect") for _ in "12")
        nn.init.kaiming_normal_(self.first.weight, a=LEAK)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(functional.leaky_relu(self.first(x), LEAK))


class ResNet(nn.Module):
    """c7s1-64, d128, d256, residual blocks, u128, u64, c7s1-1 (appendix 7.2): (b, 1, h, w) -> (b, 1, h, w)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config.channels
        self.residual = config.residual
        self.body = nn.Sequential(
            nn.Conv2d(1, c, 7, padding=3, padding_mode="reflect"),
            nn.LeakyReLU(LEAK),
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1),
            nn.LeakyReLU(LEAK),
            nn.Conv2d(2 * c, 4 * c, 3, stride=2, padding=1),
            nn.LeakyReLU(LEAK),
            *(Block(4 * c) for _ in range(config.blocks)),
            nn.ConvTranspose2d(4 * c, 2 * c, 3, stride=2, padding=1, output_padding=1),
            nn.LeakyReLU(LEAK),
            nn.ConvTranspose2d(2 * c, c, 3, stride=2, padding=1, output_padding=1),
            nn.LeakyReLU(LEAK),
        )
        for layer in self.body:
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(layer.weight, a=LEAK)
        self.last = nn.Conv2d(c, 1, 7, padding=3, padding_mode="reflect")
        if config.residual:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        features = self.body(functional.pad(x, (0, -w % 4, 0, -h % 4), mode="replicate"))
        with torch.autocast(x.device.type, enabled=False):
            y = torch.tanh(self.last(features.float())[..., :h, :w])
        return x.float() + texture_only(y, LARGE_SCALE_PX) if self.residual else y


def discriminator(channels: int) -> nn.Module:
    """The 70 x 70 PatchGAN; its last output is the score of each place."""
    from monai.networks.nets.patchgan_discriminator import PatchDiscriminator

    network = PatchDiscriminator(2, channels, in_channels=1, num_layers_d=3, norm=None, bias=True)  # type: ignore[arg-type]
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, a=LEAK)
    return network


def adversarial(scores: Tensor, wanted: float) -> Tensor:
    """Least squares: how far the scores are off what they should be, 1 for real and 0 for generated."""
    return (scores.float() - wanted).square().mean()


def from_pool(pool: dict[str, Any], name: str, images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Generated images (b, 1, h, w), about half of them exchanged for earlier ones, once `size` are kept."""
    if size == 0:
        return images
    chosen = []
    for image in images:
        known = pool.setdefault(name, [])
        if len(known) < size:
            known.append(image.cpu())
        elif float(torch.rand((), generator=generator)) < 0.5:
            place = int(torch.randint(size, (), generator=generator))
            image, known[place] = known[place].to(image.device), image.cpu()
        chosen.append(image)
    return torch.stack(chosen)


class CycleGAN(TwoWay):
    """Two generators and two discriminators, trained on unpaired images."""

    name = "cyclegan"
    paper = "Zhu et al. 2017"
    Config = Config
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "compact": {
            "channels": 16,
            "blocks": 3,
            "discriminator_channels": 16,
            "residual": True,
            "cycle": 3.0,
            "rate": 5e-4,
            "batch": 4,
            "steps": 2000,
            "check_every": 100,
        },
    }
    limits = (
        "Nothing ties what it makes to the truth of this patient but the way back: it can invent or remove structure.",
        LEARNED_IN_PIXELS,
        "Pixels below -1000 or above 900 HU stay as the source has them.",
    )

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        self.a2b, self.b2a = ResNet(self.config), ResNet(self.config)

    def fit(self, pairs: SlicePairs, run: Run | None = None) -> Self:
        c, run = self.config, run or Run()
        pairs = self.meet(pairs)
        with run.seeded():
            self.a2b, self.b2a = G, F = ResNet(c), ResNet(c)
            D_A, D_B = discriminator(c.discriminator_channels), discriminator(c.discriminator_channels)
        adam_G, adam_D = (
            torch.optim.Adam([*one.parameters(), *other.parameters()], lr=c.rate, betas=(c.beta, 0.999))
            for one, other in ((G, F), (D_A, D_B))
        )
        rates = [
            torch.optim.lr_scheduler.LambdaLR(adam, lambda k: min(1.0, 2 * (1 - k / c.steps)))
            for adam in (adam_G, adam_D)
        ]
        pool: dict[str, Any] = {}
        judge = Judge({"a2b": G, "b2a": F}, pairs.held_out, patch=c.patch)
        for batch in run.batches(
            pairs,
            size=c.batch,
            patch=c.patch,
            steps=c.steps,
            epoch_steps=c.check_every,
            tissue=SEES,
            a2b=G,
            b2a=F,
            d_a=D_A,
            d_b=D_B,
            adam_g=adam_G,
            adam_d=adam_D,
            rate_g=rates[0],
            rate_d=rates[1],
            pool=pool,
            best=judge.state,
        ):
            a, b = scaled(batch.source), scaled(batch.target)
            for D in (D_A, D_B):
                D.requires_grad_(False)
            with run.inside():
                b_hat, a_hat = G(a), F(b)
                scores = [D_B(b_hat.clamp(-1, 1))[-1], D_A(a_hat.clamp(-1, 1))[-1]]
                cycle = (F(b_hat) - a).abs().mean() + (G(a_hat) - b).abs().mean()
                identity = (G(b) - b).abs().mean() + (F(a) - a).abs().mean()
            losses = {
                "adversarial G": (1.0, adversarial(scores[0], 1)),
                "adversarial F": (1.0, adversarial(scores[1], 1)),
                "cycle": (c.cycle, cycle),
                "identity": (c.cycle * c.identity, identity),
            }
            run.step(losses, adam_G)
            for D in (D_A, D_B):
                D.requires_grad_(True)
            old_a, old_b = (
                from_pool(pool, name, images.detach().clamp(-1, 1), c.pool, batch.generator)
                for name, images in (("a", a_hat), ("b", b_hat))
            )
            with run.inside():
                scores = [D(images)[-1] for D, images in ((D_A, a), (D_A, old_a), (D_B, b), (D_B, old_b))]
            of_a, of_b = (
                0.5 * (adversarial(real, 1) + adversarial(fake, 0)) for real, fake in (scores[:2], scores[2:])
            )
            run.step({"D_A": (1.0, of_a), "D_B": (1.0, of_b)}, adam_D)
            for rate in rates:
                rate.step()
            judge.look(run)
            run.check(pairs.held_out, lambda batch: convert(G, batch.source))
        judge.use_best()
        self.card = run.card(pairs) | judge.card()
        return self.eval()
