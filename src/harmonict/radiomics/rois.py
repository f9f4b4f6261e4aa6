"""Seeded random boxes as regions of interest: where, judged on the reference image, a kind of tissue lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harmonict.core import HarmonictError, Series

HuRange = tuple[float, float]

# lung tissue and its edges; soft tissue with and without fat; contrast and bone; real lung, which is thinner
HU_RANGES: tuple[HuRange, ...] = ((-800, -300), (-100, 250), (10, 250), (300, 800), (-950, -300))
SIZES = (32, 16, 8)  # pixels, tried in this order


@dataclass(frozen=True)
class Roi:
    """A box of voxels. The same box is used on every rendition of the image that it was found on.

    start, shape: first voxel and extent, (z, y, x). mean_hu: of the reference. hu_range: the range it was drawn for.
    """

    name: str
    start: tuple[int, int, int]
    shape: tuple[int, int, int]
    mean_hu: float
    hu_range: HuRange

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """Index of the box in an image (z, y, x)."""
        z, y, x = (slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))
        return z, y, x

    def mask(self, shape: tuple[int, ...]) -> np.ndarray:
        """The box as a bool array (z, y, x) of an image's shape.

        Raises HarmonictError where the box does not lie in such an image.
        """
        if len(shape) != 3 or any(a + n > m for a, n, m in zip(self.start, self.shape, shape, strict=True)):
            raise HarmonictError(
                f"ROI {self.name} ends outside an image of {shape} voxels: it was drawn on another grid"
            )
        mask = np.zeros(shape, bool)
        mask[self.box] = True
        return mask


def random_rois(
    reference: Series | np.ndarray,
    *,
    rng: np.random.Generator,
    hu_ranges: Sequence[HuRange] = HU_RANGES,
    number: int = 24,
    sizes: Sequence[int] = SIZES,
    depth: int = 8,
    within: np.ndarray | None = None,
) -> list[Roi]:
    """Random boxes whose mean HU in the reference lies in each of the ranges (both ends included).

    reference: HU (z, y, x). For each range `number` boxes of `sizes[0]` x `sizes[0]` pixels and `depth` slices (fewer
    where the image has fewer; one for single images) are drawn uniformly among all places, none overlapping another
    of its range; where no further one fits, the next smaller size is tried, until none fits: fewer than `number` may
    come back, `count_rois` says how many. Boxes that touch padding, or leave `within` (bool, (z, y, x)), do not count.
    Names are "HU-800..-300 n01". The same generator state and arguments give the same boxes.
    """
    hu, usable = _usable(reference, within)
    for low, high in hu_ranges:
        if not low < high:
            raise HarmonictError(f"an HU range must name its lower end first, got [{low}, {high}]")
    if number < 1 or depth < 1 or not sizes or min(sizes) < 1:
        raise HarmonictError(f"ROIs need a number, sizes and a depth of at least 1, got {number}, {sizes} and {depth}")
    depth = 1 if isinstance(reference, Series) and not reference.is_volume else min(depth, len(hu))
    found: dict[HuRange, list[Roi]] = {(low, high): [] for low, high in hu_ranges}
    for size in sizes:
        wanted = [r for r in found if len(found[r]) < number]
        if size > min(hu.shape[1:]) or not wanted:
            continue
        shape = (depth, size, size)
        means = _box_means(hu, usable, shape)
        for hu_range in wanted:
            free = (means >= hu_range[0]) & (means <= hu_range[1])
            for roi in found[hu_range]:
                _take(free, roi.start, roi.shape, shape)
            left = np.count_nonzero(free, axis=(1, 2))
            while len(found[hu_range]) < number and left.any():
                start = _draw(free, left, rng)
                name = f"HU{hu_range[0]:g}..{hu_range[1]:g} n{len(found[hu_range]) + 1:02d}"
                found[hu_range].append(Roi(name, start, shape, float(means[start]), hu_range))
                touched = _take(free, start, shape, shape)
                left[touched] = np.count_nonzero(free[touched], axis=(1, 2))
    return [roi for rois in found.values() for roi in rois]


def count_rois(rois: Sequence[Roi], *, hu_ranges: Sequence[HuRange] = HU_RANGES) -> pd.DataFrame:
    """How many boxes of which size each range got: columns hu_min, hu_max, size (z x y x x, "-" for none), number."""
    rows: list[dict[str, object]] = []
    for low, high in hu_ranges:
        sizes = pd.Series(["x".join(map(str, r.shape)) for r in rois if r.hu_range == (low, high)], dtype=object)
        for size, number in sizes.value_counts(sort=False).items() if len(sizes) else [("-", 0)]:
            rows.append({"hu_min": low, "hu_max": high, "size": size, "number": int(number)})
    return pd.DataFrame(rows)


def _usable(reference: Series | np.ndarray, within: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """HU (z, y, x) and, if anything is excluded, where a box may lie."""
    hu = reference.hu if isinstance(reference, Series) else np.asarray(reference)
    if hu.ndim != 3:
        raise HarmonictError(f"ROIs are drawn on an image (z, y, x), got {hu.ndim} axes")
    usable = None
    if within is not None:
        if within.shape != hu.shape or within.dtype != bool:
            raise HarmonictError(f"the region for ROIs must be bool with the shape of the image, {hu.shape}")
        usable = within
    if isinstance(reference, Series) and reference.padding is not None:
        usable = ~reference.padding if usable is None else usable & ~reference.padding
    return hu, usable


def _box_means(hu: np.ndarray, usable: np.ndarray | None, shape: tuple[int, int, int]) -> np.ndarray:
    """Mean HU of the box that starts at each voxel, float32; NaN where the box holds a voxel that is not usable."""
    depth, size = shape[0], shape[1]
    out = np.empty((len(hu) - depth + 1, hu.shape[1] - size + 1, hu.shape[2] - size + 1), np.float32)
    volume = depth * size * size
    column = hu[:depth].sum(0, dtype=np.float64)
    outside = None if usable is None else (~usable[:depth]).sum(0, dtype=np.int32)
    for z in range(len(out)):
        if z:
            column += hu[z + depth - 1]
            column -= hu[z - 1]
        out[z] = _box_sums(column, size) / volume
        if outside is not None and usable is not None:
            if z:
                outside += ~usable[z + depth - 1]
                outside -= ~usable[z - 1]
            out[z][_box_sums(outside, size) > 0.5] = np.nan
    return out


def _box_sums(image: np.ndarray, size: int) -> np.ndarray:
    """Sum over the size x size box that starts at each pixel, from an integral image."""
    integral = np.zeros((image.shape[0] + 1, image.shape[1] + 1))
    np.cumsum(np.cumsum(image, 0, dtype=np.float64), 1, out=integral[1:, 1:])
    return integral[size:, size:] - integral[:-size, size:] - integral[size:, :-size] + integral[:-size, :-size]


def _draw(free: np.ndarray, left: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int]:
    """One of the free starts, all equally likely; `left` counts them in each slice."""
    n = int(rng.integers(left.sum()))
    z = int(np.searchsorted(np.cumsum(left), n, side="right"))
    flat = np.flatnonzero(free[z])[n - int(left[:z].sum())]
    y, x = divmod(int(flat), free.shape[2])
    return z, y, x


def _take(free: np.ndarray, start: Sequence[int], taken: Sequence[int], shape: Sequence[int]) -> slice:
    """Starts of boxes of `shape` that would overlap the box (`start`, `taken`) are no longer free."""
    z, y, x = (slice(max(a - n + 1, 0), a + t) for a, t, n in zip(start, taken, shape, strict=True))
    free[z, y, x] = False
    return z
