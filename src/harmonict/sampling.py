"""Methods that draw a sample: the same scan gives the same bytes, and several samples say how sure a result is.

The noise of a voxel follows from the series' own HU, the number of the sample and the voxel's place, so neither
batches, tiles nor workers change it. Slices that lie nearer to each other than the slice thickness share noise in
part, as they do in a scanner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from harmonict.core import HarmonictError, ScanProtocol, Series
from harmonict.data import About
from harmonict.harmonizer import NetworkHarmonizer
from harmonict.nn.diffusion import Noise
from harmonict.tiles import in_tiles

KEY, PLANES = "noise key", "noise planes"  # names in About.measured


class SampledHarmonizer(NetworkHarmonizer):
    """A method writes `draw` in place of `translate`; its Config has the fields `adjustable`."""

    adjustable: ClassVar[tuple[str, ...]] = ("steps_sampled", "sampler", "samples")

    def draw(self, x: Tensor, target: ScanProtocol, about: About, noise: Noise) -> Tensor:
        """One slice, or a tile of it, (1, 1, h, w) in HU -> a sample of what the target protocol would show."""
        raise NotImplementedError

    # -- what it inherits ----------------------------------------------------------------------------------------------

    def translate(self, x: Tensor, target: ScanProtocol, about: About) -> Tensor:
        return torch.cat([self.draw(x[n : n + 1], target, about, noise_of(about, n)) for n in range(len(x))])

    def harmonize(
        self,
        series: Series,
        target: ScanProtocol | None = None,
        *,
        about: About | None = None,
        slices_at_once: int = 8,
        qc: dict[str, Any] | None = None,
    ) -> Series:
        """See Harmonizer; the first sample."""
        about = with_noise(about or self.describe(series), series, sample=0)
        if qc is not None:
            names = [n for n in (*self.adjustable, "steps_noise") if hasattr(self.config, n)]
            qc.setdefault(self.name, {}).update({name: getattr(self.config, name) for name in names})
        return super().harmonize(series, target, about=about, slices_at_once=slices_at_once, qc=qc)

    def spread(self, series: Series, target: ScanProtocol | None = None, *, about: About | None = None) -> Series:
        """How much `samples` samples differ: their standard deviation in HU, voxel by voxel, as a series.

        The first sample is the one that `harmonize` gives. 0 in padding and where the source's HU stay. Needs three
        more copies of the HU. It holds what the method knows that it does not know, not what it gets wrong.
        """
        count = self.config.samples
        if count < 2:
            raise HarmonictError(f"a spread needs at least 2 samples, got samples={count}")
        about = about or self.describe(series)
        mean, squares = np.zeros_like(series.hu), np.zeros_like(series.hu)
        result = series
        for n in range(count):
            result = super().harmonize(series, target, about=with_noise(about, series, sample=n))
            for z, hu in enumerate(result.hu):  # Welford's sums, slice by slice: no further copy
                change = hu - mean[z]
                mean[z] += change / (n + 1)
                squares[z] += change * (hu - mean[z])
        spread = np.sqrt(np.maximum(squares, 0, out=squares) / (count - 1), out=squares)
        if series.padding is not None:
            spread[series.padding] = series.hu[series.padding]  # a writer puts the file's own value there
        return result.with_hu(spread)

    def _translated(
        self, hu: np.ndarray, part: slice, tile: int | None, target: ScanProtocol, about: About, device: torch.device
    ) -> np.ndarray:
        result = np.empty_like(hu)
        h, w = hu.shape[1:]
        rows, columns = (v.to(device) for v in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
        for n, one in enumerate(hu):
            noise = noise_of(about, part.start + n)
            x = torch.from_numpy(np.array(one)).to(device)
            if tile is None:
                drawn = self.draw(x[None, None], target, about, noise)
            else:  # each tile carries its place with it

                def convert(placed: Tensor, noise: Noise = noise) -> Tensor:
                    corner = noise.at(int(placed[0, 1, 0, 0]), int(placed[0, 2, 0, 0]))
                    return self.draw(placed[:, :1], target, about, corner)

                drawn = in_tiles(torch.stack([x, rows.to(x), columns.to(x)])[None], tile, convert)
            result[n] = drawn[0, 0].cpu().numpy()
        return result


def with_noise(about: About, series: Series, *, sample: int) -> About:
    """What `noise_of` needs for any slice of the series: a key from its HU, and each slice's place."""
    digest = hashlib.sha256(np.ascontiguousarray(series.hu).tobytes() + sample.to_bytes(8, "little")).digest()
    positions = series.slice_positions_mm
    apart = series.protocol.slice_thickness_mm or (series.geometry.spacing_mm[0] if series.is_volume else None)
    if positions is None or not apart:
        planes = np.arange(len(series.hu), dtype=float)
    else:
        planes = np.round((positions - positions.min()) / apart, 3)
    known: Mapping[str, np.ndarray] = {**about.measured, KEY: np.frombuffer(digest[:16], np.uint64), PLANES: planes}
    return replace(about, measured=known)


def noise_of(about: About, z: int) -> Noise:
    """The noise of slice z; without a series (patches of a training), that of key 0 and plane z."""
    if KEY not in about.measured:
        return Noise(planes=((z, 1.0),))
    high, low = (int(word) for word in about.measured[KEY])
    place = float(about.measured[PLANES][z])
    below = int(np.floor(place))
    share = place - below
    if share == 0:
        return Noise(high << 64 | low, ((below, 1.0),))
    angle = share * np.pi / 2  # the squares of sine and cosine sum to 1: the noise keeps its strength
    return Noise(high << 64 | low, ((below, float(np.cos(angle))), (below + 1, float(np.sin(angle)))))
