"""CVH-CT, called CVS-CT in its text (Selim et al. 2021): CycleGAN at full resolution with attention, and a loss that
compares the texture of translated images with that of the other vendor's, whatever anatomy either shows.

    Selim et al.                                              here
    generators G_A2B, G_B2A, Fig 2                            Generator: seven convolutions, CBAM after 2, 4 and 6
    discriminators D_A, D_B (seven layers)                    discriminator
    domain loss, eq 1-3                                       "L_f": CVHCT.fit, texture_loss on relu5_1 to relu5_4
    adversarial loss, eq 4-5                                  "L_adv(G)"; of the discriminators "L_adv(D)"
    cycle consistency, eq 6                                   "L_cyc"
    identity, eq 7                                            "L_Idt"
    total loss, eq 8                                          total_loss, of the weights 1, lambda_1 to lambda_3
    variants CVS-CT^1 (domain loss), CVS-CT^2 (CBAM)          attention=False; lambda_3=0
Symbols: a, b real images of A and B, b_hat = G_A2B(a), a_hat = G_B2A(b); units of the window [-1000, 900] HU, -1 to 1.
Departures: 1. Padding is not given. Kernels of 4 move the image: (1, 2) and (2, 1) take turns, and the half pixel
that seven layers leave over is interpolated by an 8-tap windowed sinc before the tanh; a point stays to 0.01 pixel.
The mean of two shifted kernels would be exact too, but it is blind at the highest frequency: it keeps 31 % of 0.4
cycles a pixel, the sinc 79 %. Borders repeat. 2. CBAM after layers 2, 4 and 6 ("every two of seven layers, three
blocks, none in the last three" contradicts itself), with Woo's sum and sigmoid: the softmax over places of the text
would change its scale 41 times from 80 x 80 to 512 x 512. Channel gates of a slice are the mean of those of its
patches of training size that are soft tissue. Measured on one chest, model of a short run: gates pooled over the
whole slice differ from those of patches by 0.04 and 0.10 (layers 2, 4), by tiles 0.01 and 0.01; the image differs
from that of the patch alone by 1.9 and 0.8 HU. 3. `residual` (in `compact`): the tanh, without its large-scale part
(Gaussian of 3 pixels), is added to the input, and starts at 0. Measured on Br40 and Bl64 of kentucky-small, one
patient held out, 80 steps: texture gap 6.6 / 2.8 dB without and 3.3 / 4.6 dB with it (5.0 / 4.9 as it is),
large-scale change 134 / 241 HU and under 4 HU. With the large-scale part left in, the networks shifted whole regions
by 20 HU and more in as many steps, and their texture stayed. 4. L_f compares the mean Gram matrix of a batch, not
that of each patch with one of another anatomy (eq 1-2): between random patches of Bl64 the printed loss is 6.8e-5,
between Br40 and Bl64 6.6e-5, so that it would be least where nothing is changed; by batches of 32 it is 0.03 within
and 0.4 to 0.7 between. It is divided by the mean square of the real one, so that lambda_3 means the same for any
feature network. 5. lambda_1 to lambda_3 are "in [0, 1]" and not given: 1 in `paper`. L_cyc and L_Idt are means over
pixels here; `compact` has 3 and 1.5, as its `cyclegan` (with 10 and 5 and twice the rate the texture gap of the held-
out patient stopped at 3.0 dB instead of 2.3, Br40 to Bl64). 6. Eq 8's adversarial term is the generators' (it prints
D's); no loss of the discriminators is printed: least squares. Sigmoid and 4 x 4 as given; strides 2, 1, 2, 1, 2, 1, 1
and widths are ours. "Momentum 0.5" is read as Adam's beta 1. 7. The text has 11,508 GE slices, Table 1 11,070: steps
are of the latter. 8. Misprints elsewhere: eq 9's denominator is var_s + var_t + (mu_s - mu_t)^2, eq 11 has sums in
place of products and sigma_st in the numerator, eq 12 is not mean-free, GLCM 0.018 (Siemens to GE) is 0.18. 9. What
leaves the network is float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from harmonict.core import ScanProtocol
from harmonict.data import SlicePairs
from harmonict.harmonizer import LEARNED_IN_PIXELS
from harmonict.nn.attention import CBAM, tile_shares
from harmonict.nn.losses import texture_loss
from harmonict.nn.residual import texture_only
from harmonict.nn.vgg import prepare, vgg19
from harmonict.train import Run
from harmonict.two_way import LARGE_SCALE_PX, SEES, Judge, TwoWay, convert, scaled, to_hu

LAYERS, KERNEL = 7, 4
ATTENDED = (2, 4, 6)  # CBAM after these layers
SLOPE = 0.2  # of LeakyReLU; not given: pix2pix's
DOMAIN_LAYERS = ("relu5_1", "relu5_2", "relu5_3", "relu5_4")  # those nearest to VGG's fully connected layers
HALF_PIXEL_TAPS = 8
D_WIDTHS, D_STRIDES = (1, 1, 2, 2, 4, 4), (2, 1, 2, 1, 2, 1, 1)


@dataclass(frozen=True)
class Config:
    """The paper's size.

    channels: 64 filters in each layer. attention: CBAM. reduction: of its MLP (Woo et al.: 16).
    discriminator_channels: of its first layer (not given: 64). residual: add the generator's output to its input
    (departure 3). lambda_1, lambda_2, lambda_3: weights of L_cyc, L_Idt and L_f ("in [0, 1]", no values given).
    feature_weights: of the VGG-19 of L_f (ImageNet's). rate: 0.0001. beta: "momentum 0.5". patch, batch: 80, 32. steps:
    50 epochs of the 11,070 slices of Table 1, one patch each. check_every: one epoch.
    """

    channels: int = 64
    attention: bool = True
    reduction: int = 16
    discriminator_channels: int = 64
    residual: bool = False
    lambda_1: float = 1.0
    lambda_2: float = 1.0
    lambda_3: float = 1.0
    feature_weights: str = "imagenet"
    rate: float = 1e-4
    beta: float = 0.5
    patch: int = 80
    batch: int = 32
    steps: int = 17_300
    check_every: int = 346

    def __post_init__(self) -> None:
        counts = (self.channels, self.reduction, self.discriminator_channels, self.batch, self.steps, self.check_every)
        if min(counts) < 1 or self.patch < 32:
            raise ValueError(
                "channels, discriminator_channels, reduction, batch, steps and check_every must be at least 1, "
                "patch at least 32"
            )
        if not self.rate > 0 or min(self.lambda_1, self.lambda_2, self.lambda_3) < 0:
            raise ValueError("rate must be above 0, lambda_1 to lambda_3 not negative")


def half_pixel_filter() -> Tensor:
    """(taps,) of sum 1: the value half way between two pixels, by a windowed sinc (Lanczos). Its symmetry makes the
    shift exactly half a pixel."""
    at = torch.arange(HALF_PIXEL_TAPS, dtype=torch.float64) - (HALF_PIXEL_TAPS - 1) / 2
    taps = torch.sinc(at) * torch.sinc(at / (HALF_PIXEL_TAPS / 2))
    return (taps / taps.sum()).float()


class Generator(nn.Module):
    """Seven 4x4 convolutions at full resolution, (b, 1, h, w) -> (b, 1, h, w), without moving the image.

    A convolution of an even kernel lies half a pixel off: padded by (1, 2) it looks half a pixel ahead, by (2, 1) half
    a pixel back. They take turns; what the seventh leaves over is undone by half-pixel interpolation before the tanh.
    """

    taps: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config.channels
        self.residual, self.tile = config.residual, config.patch
        widths = [1, *[c] * (LAYERS - 1), 1]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, KERNEL) for a, b in pairwise(widths))
        self.attention = nn.ModuleDict(
            {str(n): CBAM(c, config.reduction) for n in ATTENDED} if config.attention else {}
        )
        self.register_buffer("taps", half_pixel_filter(), persistent=False)
        for name, value in self.layers.named_parameters():
            nn.init.zeros_(value) if name.endswith("bias") else nn.init.kaiming_normal_(value, a=SLOPE)
        if config.residual:
            nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        gates = self._tiles(x)
        features = x
        for n, layer in enumerate(self.layers[:-1], start=1):
            features = functional.leaky_relu(layer(_padded(features, ahead=n % 2 == 1)), SLOPE)
            if str(n) in self.attention:
                features = self.attention[str(n)](features, **gates)
        with torch.autocast(x.device.type, enabled=False):
            y = torch.tanh(_half_pixel_back(self.layers[-1](_padded(features.float(), ahead=True)), self.taps))
        return x.float() + texture_only(y, LARGE_SCALE_PX) if self.residual else y

    def _tiles(self, x: Tensor) -> dict[str, Any]:
        """How CBAM's channel gates are pooled: over patches as in training, those of soft tissue alone."""
        if max(x.shape[-2:]) <= self.tile:
            return {}
        weight = (tile_shares(x.abs() < 1, self.tile) >= SEES.share).to(x.dtype)
        nothing = weight.sum((2, 3), keepdim=True) == 0
        return {"tile": self.tile, "weight": torch.where(nothing, torch.ones_like(weight), weight)}


def _padded(x: Tensor, *, ahead: bool) -> Tensor:
    low, high = (1, 2) if ahead else (2, 1)
    return functional.pad(x, (low, high, low, high), mode="replicate")


def _half_pixel_back(x: Tensor, taps: Tensor) -> Tensor:
    """(b, 1, h, w) -> out[i] = x[i - 1/2], in both directions."""
    before = HALF_PIXEL_TAPS // 2
    x = functional.pad(x, (before, before - 1, before, before - 1), mode="replicate")
    x = functional.conv2d(x, taps.view(1, 1, 1, -1))
    return functional.conv2d(x, taps.view(1, 1, -1, 1))


def discriminator(channels: int) -> nn.Sequential:
    """Seven 4x4 convolutions with LeakyReLU, then a sigmoid: for each place, how likely it is real."""
    widths = [1, *(channels * w for w in D_WIDTHS), 1]
    layers: list[nn.Module] = []
    for (a, b), stride in zip(pairwise(widths), D_STRIDES, strict=True):
        layers += [nn.Conv2d(a, b, KERNEL, stride=stride, padding=1), nn.LeakyReLU(SLOPE)]
        nn.init.kaiming_normal_(layers[-2].weight, a=SLOPE)  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())


def domain_loss(made: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the Gram matrices of two batches of maps, in units of the mean square of the real."""
    of_made, of_real = ([f.transpose(0, 1).flatten(1, 2)[None] for f in maps] for maps in (made, real))
    nothing = [torch.zeros_like(f) for f in of_real]
    return texture_loss(of_made, of_real) / texture_loss(of_real, nothing).detach()


def squared(scores: Tensor, wanted: float) -> Tensor:
    """Mean of (wanted - D)^2 (eq 4-5)."""
    return (wanted - scores.float()).square().mean()


class CVHCT(TwoWay):
    """Cross-vendor harmonization without pairs."""

    name = "cvh-ct"
    paper = "Selim et al. 2021"
    Config = Config
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "compact": {
            "channels": 16,
            "reduction": 4,
            "discriminator_channels": 16,
            "residual": True,
            "feature_weights": "trial",
            "lambda_1": 3.0,
            "lambda_2": 1.5,
            "rate": 5e-4,
            "batch": 4,
            "steps": 1200,
            "check_every": 60,
        },
    }
    limits = (
        "Nothing ties what it makes to the truth of this patient but the way back: it can invent or remove structure.",
        LEARNED_IN_PIXELS,
        "Pixels below -1000 or above 900 HU stay as the source has them.",
    )

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        self.a2b, self.b2a = Generator(self.config), Generator(self.config)

    def fit(self, pairs: SlicePairs, run: Run | None = None) -> Self:
        c, run = self.config, run or Run()
        pairs = self.meet(pairs)
        with run.seeded():
            self.a2b, self.b2a = G_A2B, G_B2A = Generator(c), Generator(c)
            D_A, D_B = discriminator(c.discriminator_channels), discriminator(c.discriminator_channels)
        adam_G, adam_D = (
            torch.optim.Adam([*one.parameters(), *other.parameters()], lr=c.rate, betas=(c.beta, 0.999))
            for one, other in ((G_A2B, G_B2A), (D_A, D_B))
        )
        vgg = vgg19(c.feature_weights).to(run.device) if c.lambda_3 else None

        def textures(x: Tensor) -> list[Tensor]:
            return vgg(prepare(to_hu(x)), DOMAIN_LAYERS)  # type: ignore[misc]

        judge = Judge({"a2b": G_A2B, "b2a": G_B2A}, pairs.held_out, patch=c.patch)
        for batch in run.batches(
            pairs,
            size=c.batch,
            patch=c.patch,
            steps=c.steps,
            epoch_steps=c.check_every,
            tissue=SEES,
            a2b=G_A2B,
            b2a=G_B2A,
            d_a=D_A,
            d_b=D_B,
            adam_g=adam_G,
            adam_d=adam_D,
            best=judge.state,
        ):
            a, b = scaled(batch.source), scaled(batch.target)
            for D in (D_A, D_B):
                D.requires_grad_(False)
            with run.inside():
                b_hat, a_hat = G_A2B(a), G_B2A(b)
                seen_b, seen_a = b_hat.clamp(-1, 1), a_hat.clamp(-1, 1)  # as real images are
                L_adv = squared(D_B(seen_b), 1) + squared(D_A(seen_a), 1)
                L_cyc = (G_B2A(b_hat) - a).abs().mean() + (G_A2B(a_hat) - b).abs().mean()
                L_Idt = (G_A2B(b) - b).abs().mean() + (G_B2A(a) - a).abs().mean()
            losses = {"L_adv(G)": (1.0, L_adv), "L_cyc": (c.lambda_1, L_cyc), "L_Idt": (c.lambda_2, L_Idt)}
            if vgg is not None:
                with run.inside():
                    L_f = sum(domain_loss(textures(made), textures(real)) for made, real in ((seen_b, b), (seen_a, a)))
                losses["L_f"] = (c.lambda_3, L_f)
            run.step(losses, adam_G)
            for D in (D_A, D_B):
                D.requires_grad_(True)
            with run.inside():
                of_a = squared(D_A(a), 1) + squared(D_A(seen_a.detach()), 0)
                of_b = squared(D_B(b), 1) + squared(D_B(seen_b.detach()), 0)
            run.step({"L_adv(D)": (0.5, of_a + of_b)}, adam_D)
            judge.look(run)
            run.check(pairs.held_out, lambda batch: convert(G_A2B, batch.source))
        judge.use_best()
        self.card = run.card(pairs) | judge.card()
        return self.eval()
