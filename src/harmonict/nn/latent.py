"""The encoder-decoder of DiffusionCT (Selim et al. 2023, sec. 3.1): ResNet-18 down to a latent, five blocks up again.

encoder   ResNet-18's children 0-2, 3-4, 5, 6 and 7: five blocks, each half as large as the one before
latent    Z: one vector of all that the last block gives for a patch
decoder   five blocks, each doubling the size, then 1-D convolutions along rows and columns; no skips at all, so
          whatever is drawn came through Z
linear    (ours, optional) principal components of 32 x 32 pixels, added to the encoder's and to the decoder's output:
          a Z of the same size then holds from the first step what a linear code can hold
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from harmonict.core import HarmonictError
from harmonict.nn.resnet import ResNet18, resnet18
from harmonict.nn.vgg import prepare

CELL_PX = 32  # of the image, for each place of the latent
HU_UNIT = 1000.0
HU_ZERO = -1024.0
LINES = 4  # 1-D convolutions at the end
FLOOR_SD = 1e-3  # of a component, as a share of the first one's


class EncoderDecoder(nn.Module):
    """Slices (b, 1, h, w) in HU -> the same from their latents, (b, 1, h, w) in HU; sides are multiples of 32.

    feature_width: channels of ResNet-18's first block (64 is the paper's); its last has eight times as many, which are
    the latent's. width: channels of the decoder's last block; the ones before have 2, 4, 8 and 16 times as many.
    linear: add principal components, see `find_components`.
    """

    components: Tensor  # (c, 1, 32, 32) orthonormal
    component_sd: Tensor  # (c, 1, 1), in units of HU_UNIT
    middle: Tensor  # () the HU that components are counted from

    def __init__(self, feature_width: int, width: int, linear: bool = False) -> None:
        super().__init__()
        self.channels, self.linear = 8 * feature_width, linear
        if linear:
            self.register_buffer("components", torch.zeros(self.channels, 1, CELL_PX, CELL_PX))
            self.register_buffer("component_sd", torch.ones(self.channels, 1, 1))
            self.register_buffer("middle", torch.zeros(()))
            self.share = nn.Parameter(torch.zeros(self.channels, 1, 1))  # of the encoder, in Z: it starts at none
        self.encoder = ResNet18(feature_width)
        inner = [self.channels, *(width * 2**n for n in range(4, -1, -1))]
        self.decoder = nn.ModuleList(_Up(a, b) for a, b in pairwise(inner))
        shapes = [(1, 5) if n % 2 == 0 else (5, 1) for n in range(LINES)]
        outs = [*[width] * (LINES - 1), 1]
        self.lines = nn.ModuleList(
            nn.Conv2d(width, out, shape, padding=(shape[0] // 2, shape[1] // 2))
            for out, shape in zip(outs, shapes, strict=True)
        )
        if linear:
            nn.init.zeros_(self.lines[-1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.lines[-1].bias)  # type: ignore[arg-type]

    def encode(self, hu: Tensor) -> Tensor:
        """(b, 1, h, w) HU, sides multiples of 32 -> Z (b, c, h / 32, w / 32), float32."""
        z = self.encoder(prepare(hu)).float()
        if not self.linear:
            return z
        with torch.autocast(z.device.type, enabled=False):
            own = functional.conv2d((hu - self.middle) / HU_UNIT, self.components, stride=CELL_PX)
            return own / self.component_sd + self.share * z

    def decode(self, z: Tensor) -> Tensor:
        """Z (b, c, h / 32, w / 32) -> (b, 1, h, w) HU, float32."""
        x = z
        for block in self.decoder:
            x = block(x)
        for line in self.lines[:-1]:  # type: ignore[union-attr]
            x = torch.relu(line(x))
        with torch.autocast(z.device.type, enabled=False):
            drawn = self.lines[-1](x.float())
            if not self.linear:
                return HU_ZERO + HU_UNIT * drawn
            own = functional.conv_transpose2d(z.float() * self.component_sd, self.components, stride=CELL_PX)
            return self.middle + HU_UNIT * (own + drawn)

    def forward(self, hu: Tensor) -> Tensor:
        return self.decode(self.encode(hu))

    def use_features(self, weights: str) -> None:
        """Begin with trained weights of ResNet-18 (see `nn.resnet.resnet18`). Raises HarmonictError where they are of
        another width."""
        state = resnet18(weights)
        if state.width != self.encoder.width:
            raise HarmonictError(
                f"feature weights {weights} have {state.width} channels, feature_width is {self.encoder.width}: "
                f"--set feature_width={state.width}"
            )
        self.encoder.load_state_dict(state.state_dict())

    @torch.no_grad()
    def find_components(self, images: Iterable[Tensor]) -> None:
        """The principal components of squares of 32 x 32 pixels of images (b, 1, h, w) in HU: as many as Z has
        channels. With `linear` only."""
        side = CELL_PX**2
        total, product, count = torch.zeros(side).double(), torch.zeros(side, side).double(), 0
        for image in images:
            cells = functional.unfold(image.cpu(), CELL_PX, stride=CELL_PX)
            cells = cells.movedim(1, 2).flatten(0, 1).double() / HU_UNIT
            total, product, count = total + cells.sum(0), product + cells.T @ cells, count + len(cells)
        mean = total / count
        middle = mean.mean()
        about = product / count - middle * (mean[:, None] + mean[None]) + middle**2
        variances, directions = torch.linalg.eigh(about)  # the least first
        found = directions.flip(1)[:, : self.channels].T.reshape_as(self.components)
        sd = variances.flip(0)[: self.channels].clamp_min(0).sqrt()
        self.components.copy_(found)
        self.component_sd.copy_(sd.clamp_min(FLOOR_SD * float(sd[0])).view_as(self.component_sd))
        self.middle.copy_(HU_UNIT * middle)

    @property
    def digest(self) -> bytes:
        """SHA-256 of its weights: a latent means the same only to the network that made it."""
        found = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return found.digest()


def as_vectors(z: Tensor, side: int) -> Tensor:
    """Maps (b, c, rows, columns) -> sequences (b * patches, c, side * side): the latent of each patch of side x side
    places as one line, row by row. rows and columns are multiples of side."""
    b, c, rows, columns = z.shape
    z = z.reshape(b, c, rows // side, side, columns // side, side)
    return z.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, side * side)


def as_maps(vectors: Tensor, shape: torch.Size | tuple[int, ...], side: int) -> Tensor:
    """The inverse of `as_vectors`, for maps of `shape`."""
    b, c, rows, columns = shape
    z = vectors.reshape(b, rows // side, columns // side, c, side, side)
    return z.permute(0, 3, 1, 4, 2, 5).reshape(b, c, rows, columns)


class _Up(nn.Module):
    """Twice the size: pixels doubled, then two 3x3 convolutions."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)
