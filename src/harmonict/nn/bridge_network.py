"""What the bridge is made of: a small conditioned U-Net, filters given as radial curves, and local band powers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

FILTER_MARGIN_PX = 32  # mirrored border around an image that is filtered
BAND_SIGMAS_PX = (0.0, 0.5, 1.0, 2.0, 4.0)  # between them lie the bands: differences of Gaussians
BAND_WINDOW_PX, BAND_STRIDE_PX = 16, 8
BAND_FLOOR_HU2 = 4.0  # under a power of so much nobody sees texture
MULTIPLE = 4  # of pixels, that the sides of an image must have
DETAIL_PX = 5


class BridgeNetwork(nn.Module):
    """(b, 3, h, w) HU and a condition (b, k) -> (b, 1, h, w), without unit; sides are multiples of 4.

    It computes at half and at a quarter of the size (2 x 2 pixels become four channels and back, so nothing is lost):
    six times as fast as at full size, and it sees 60 pixels around. Each block is told the condition (FiLM, Perez et
    al. 2018). Beside them one linear layer, seven wide, learns what a better filter would do. No layer takes statistics
    of the image. The last ones start at 0 and stay float32.
    """

    def __init__(self, channels: int, blocks: int, conditions: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.told = nn.Sequential(nn.Linear(conditions, wide), nn.SiLU(), nn.Linear(wide, wide), nn.SiLU())
        self.first = nn.Conv2d(4 * 5, channels, 3, padding=1)
        self.before = nn.ModuleList(_Block(channels, wide) for _ in range(blocks))
        self.smaller = nn.Conv2d(channels, wide, 2, stride=2)
        self.middle = nn.ModuleList(_Block(wide, wide) for _ in range(blocks))
        self.larger = nn.Conv2d(wide, 4 * channels, 1)
        self.after = nn.ModuleList(_Block(channels, wide) for _ in range(blocks))
        self.last = nn.Conv2d(channels, 4, 3, padding=1)
        self.straight = nn.Conv2d(4 * 5, 4, 7, padding=3)
        for layer in (self.last, self.straight):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, hu: Tensor, condition: Tensor) -> Tensor:
        told = self.told(condition)
        seen = functional.pixel_unshuffle(_seen(hu), 2)
        x = self.first(seen)
        for block in self.before:
            x = block(x, told)
        small = self.smaller(x)
        for block in self.middle:
            small = block(small, told)
        x = x + functional.pixel_shuffle(self.larger(small), 2)
        for block in self.after:
            x = block(x, told)
        with torch.autocast(x.device.type, enabled=False):
            return functional.pixel_shuffle(self.last(x.float()) + self.straight(seen), 2)


class _Block(nn.Module):
    def __init__(self, channels: int, told: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(told, 2 * channels)
        for layer in (self.two, self.film):  # a new block changes nothing, whatever it is told
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.film(told)[..., None, None].chunk(2, dim=1)
        return x + self.two(functional.silu(self.one(functional.silu(x)) * (1 + scale) + shift))


def _seen(hu: Tensor) -> Tensor:
    """(b, 3, h, w) state, start and source -> (b, 5, h, w): how the state left the start, start and source each on the
    scale of tissues, and of texture, which is a twentieth of it."""
    state, images = hu[:, :1], hu[:, 1:]
    mean = functional.avg_pool2d(images, DETAIL_PX, stride=1, padding=DETAIL_PX // 2, count_include_pad=False)
    detail = (images - mean) / 50
    return torch.cat([(state - images[:, :1]) / 50, images / 1000, detail], dim=1).clamp(-20, 20)


# -- filters -----------------------------------------------------------------------------------------------------------


def filtered(image: Tensor, curve: Tensor, step_per_mm: float, pixel_mm: Tensor) -> Tensor:
    """Images (b, 1, h, w) times a real radial filter each, in Fourier space; mirrored at the border. float32.

    curve: (b, n) the filter at 0, 1, 2 ... times `step_per_mm`; held beyond its end. pixel_mm: (b, 2), (y, x).
    """
    with torch.autocast(image.device.type, enabled=False):
        h, w = image.shape[-2:]
        my, mx = min(FILTER_MARGIN_PX, h - 1), min(FILTER_MARGIN_PX, w - 1)
        wide = functional.pad(image.float(), (mx, mx, my, my), mode="reflect")
        shape = wide.shape[-2:]
        fy = torch.fft.fftfreq(shape[0], device=image.device) / pixel_mm[:, :1]
        fx = torch.fft.rfftfreq(shape[1], device=image.device) / pixel_mm[:, 1:]
        place = (torch.hypot(fy[:, :, None], fx[:, None, :]) / step_per_mm).clamp(max=curve.shape[1] - 1.001)
        low = place.long()
        flat = low.flatten(1)
        below, above = curve.gather(1, flat), curve.gather(1, flat + 1)
        response = torch.lerp(below, above, (place - low).flatten(1)).reshape(place.shape)[:, None]
        return torch.fft.irfft2(torch.fft.rfft2(wide) * response, s=shape)[..., my : my + h, mx : mx + w]


# -- texture -----------------------------------------------------------------------------------------------------------


def band_powers(hu: Tensor) -> Tensor:
    """Logarithm of the power in each of four octave bands, in overlapping windows of 16 pixels: (b, 4, y, x).

    Phases do not count: what is compared is how strong the texture of each size is, and where.
    """
    with torch.autocast(hu.device.type, enabled=False):
        levels = [_smoothed(hu.float(), sigma) for sigma in BAND_SIGMAS_PX]
        bands = torch.cat([(a - b).square() for a, b in pairwise(levels)], dim=1)
        size = min(BAND_WINDOW_PX, *hu.shape[-2:])
        return (functional.avg_pool2d(bands, size, stride=min(BAND_STRIDE_PX, size)) + BAND_FLOOR_HU2).log()


def _smoothed(hu: Tensor, sigma_px: float) -> Tensor:
    if sigma_px == 0:
        return hu
    half = min(round(3 * sigma_px) + 1, *(n - 1 for n in hu.shape[-2:]))
    taps = torch.exp(-0.5 * (torch.arange(-half, half + 1, device=hu.device) / sigma_px).square())
    taps = taps / taps.sum()
    wide = functional.pad(hu, (half, half, half, half), mode="reflect")
    return functional.conv2d(functional.conv2d(wide, taps[None, None, :, None]), taps[None, None, None, :])
