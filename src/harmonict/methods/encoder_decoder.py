"""The encoder-decoder of DiffusionCT by itself (Selim et al. 2023): any image of any protocol, rebuilt from a latent.

    paper                                                   here
    ResNet-18 in five blocks, asymmetric decoder (3.1)      nn.latent.EncoderDecoder
    trained with L2 on all images (3.1)                     latent_training.learn_to_rebuild, sources and targets
    row "Encoder-Decoder" of Table 1                        translate: decode(encode(x))
Symbols: x an image, Z its latent.
It knows no target: what it makes of a source is that source, as far as it passes through Z. It shows how much of an
image the latent of `diffusion-ct` can hold, and is the row that its gain is counted from.
Departures: 1. The paper's encoder has four blocks in one line and five in the next (five here), and is "pre-trained" in
sec. 3.1 and "randomly initialised" in sec. 4 (`feature_weights`). 2. "U-Net structured", yet "the decoder accepts a
latent representation": there are no skips at all, or the image would go around Z. 3. "1D convolutional layers in the
last layers" are convolutions along rows and along columns, in turn. 4. Slices of any size: the encoder is
convolutional, and the latent of a patch is what it gives for that patch. 5. Patch, batch and decoder widths are not
given. 6. `compact` adds the principal components of squares of 32 pixels to encoder and decoder (`linear`): a short
training else reaches a small part of what a Z of its size can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from harmonict.core import ScanProtocol
from harmonict.data import About, SlicePairs
from harmonict.harmonizer import LEARNED_IN_PIXELS, NetworkHarmonizer
from harmonict.latent_training import learn_to_rebuild
from harmonict.nn.latent import CELL_PX, EncoderDecoder
from harmonict.tiles import to_multiple
from harmonict.train import Run


@dataclass(frozen=True)
class Config:
    """The paper's size. rate: Adam's (Sec. 4). steps: 20 epochs of 19,786 images (Sec. 4), 16 a step.

    feature_weights: see `nn.resnet.resnet18` (Sec. 3.1: pre-trained). feature_width: channels of ResNet-18's first
    block, 64. width: channels of the decoder's last block, not given. linear: principal components beside the networks
    (ours, see `nn.latent`). patch: side in pixels, not given. batch: pairs, so twice as many images, not given.
    rate_end: the rate's share that is left at the end, reached evenly on a logarithmic scale (paper: 1, constant).
    check_every: steps between two looks at the held-out patients (ours).
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

    def __post_init__(self) -> None:
        if self.patch < CELL_PX or self.patch % CELL_PX:
            raise ValueError(f"patch must be a multiple of {CELL_PX} pixels, got {self.patch}")
        if min(self.feature_width, self.width, self.check_every) < 1 or not (self.rate > 0 and 0 < self.rate_end <= 1):
            raise ValueError("widths and check_every must be at least 1, rate above 0 and rate_end in (0, 1]")


class EncoderDecoderMethod(NetworkHarmonizer):
    """Rebuilds an image from its latent."""

    name = "encoder-decoder"
    paper = "Selim et al. 2023, encoder-decoder alone"
    Config = Config
    changes = ()
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
        },
    }
    limits = (
        "It draws no target: it gives each source back, as far as that passes through its latent.",
        "The validation figures are of target images rebuilt from their own latents.",
        "Fine texture and noise do not pass through the latent: the result is smooth.",
        LEARNED_IN_PIXELS,
    )

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        self.network = EncoderDecoder(self.config.feature_width, self.config.width, self.config.linear)

    def fit(self, pairs: SlicePairs, run: Run | None = None) -> Self:
        c, run = self.config, run or Run()
        self.target, self.pixel_mm = pairs.target_protocol, torch.tensor(pairs.pixel_mm)
        with run.seeded():
            self.network = EncoderDecoder(c.feature_width, c.width, c.linear)
        learn_to_rebuild(self.network, c, pairs, run)
        self.card = run.card(pairs)
        return self.eval()

    def translate(self, x: Tensor, target: ScanProtocol, about: About) -> Tensor:
        self.check_fitted(target)
        # the same numbers whatever the batch
        return torch.cat([to_multiple(x[n : n + 1], CELL_PX, self.network) for n in range(len(x))])
