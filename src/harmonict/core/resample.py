"""Resampling in the plane: the same field of view in pixels of another size, without aliasing."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from harmonict.core.geometry import Geometry
from harmonict.core.padding import clip_floor, fill_padding
from harmonict.core.series import Series

LOBES, BETA = 8, 7.0  # Kaiser-windowed sinc: flat to 0.05 % up to three quarters of the lower Nyquist frequency

Pixel = tuple[float, float]


def resampled_shape(shape: tuple[int, int], pixel_mm: Pixel, wanted_mm: Pixel) -> tuple[int, int]:
    """Rows and columns that cover the field of view of `shape` pixels of `pixel_mm` in pixels of `wanted_mm`."""
    h, w = (max(1, round(n * a / b)) for n, a, b in zip(shape, pixel_mm, wanted_mm, strict=True))
    return h, w


def resample_plane(image: np.ndarray, pixel_mm: Pixel, wanted_mm: Pixel, shape: tuple[int, int]) -> np.ndarray:
    """An image (h, w) with pixels of `pixel_mm` (y, x), seen with `shape` pixels of `wanted_mm`; float32.

    The upper left corner of the first pixel stays where it is; beyond the edges the image is mirrored. The kernel is a
    windowed sinc, as wide as the larger of the two pixels, so that what the new pixels cannot show is gone and not
    folded back.
    """
    rows, columns = (
        _matrix(n, m, wanted / have) for n, m, have, wanted in zip(image.shape, shape, pixel_mm, wanted_mm, strict=True)
    )
    return rows @ image.astype(np.float32, copy=False) @ columns.T


def resample_mask(mask: np.ndarray, pixel_mm: Pixel, wanted_mm: Pixel, shape: tuple[int, int]) -> np.ndarray:
    """A bool image (h, w) on the other grid: the value of the pixel that holds the new pixel's centre."""
    places = (
        np.clip(((np.arange(m) + 0.5) * wanted / have).astype(int), 0, n - 1)
        for n, m, have, wanted in zip(mask.shape, shape, pixel_mm, wanted_mm, strict=True)
    )
    return mask[np.ix_(*places)]


def resampled_geometry(geometry: Geometry, wanted_mm: Pixel) -> Geometry:
    """The grid of `resample_plane`'s result."""
    first = [0.0, *(0.5 * b / a - 0.5 for a, b in zip(geometry.spacing_mm[1:], wanted_mm, strict=True))]
    x, y, z = geometry.to_patient(np.array(first)).tolist()
    return replace(geometry, origin_mm=(x, y, z), spacing_mm=(geometry.spacing_mm[0], *wanted_mm))


def resample_slice(
    hu: np.ndarray, padding: np.ndarray | None, pixel_mm: Pixel, wanted_mm: Pixel
) -> tuple[np.ndarray, np.ndarray | None]:
    """HU (h, w) and padding of a slice in pixels of another size.

    Padding is filled first, so that its value does not ring into the image; a file that clips air clips it again.
    """
    shape = resampled_shape(hu.shape, pixel_mm, wanted_mm)  # type: ignore[arg-type]
    floor = clip_floor(hu, padding)
    filled = hu if padding is None else fill_padding(hu[None], padding[None])[0]
    image = np.maximum(resample_plane(filled, pixel_mm, wanted_mm, shape), np.float32(floor))
    return image, None if padding is None else resample_mask(padding, pixel_mm, wanted_mm, shape)


def resample_series(series: Series, wanted_mm: Pixel) -> Series:
    """A series in pixels of another size (y, x), slice by slice; it has no source headers any more."""
    count, shape = len(series.hu), resampled_shape(series.hu.shape[1:], series.pixel_mm, wanted_mm)  # type: ignore[arg-type]
    hu = np.empty((count, *shape), np.float32)
    padding = None if series.padding is None else np.empty(hu.shape, bool)
    for z in range(count):
        mask = None if series.padding is None else series.padding[z]
        hu[z], mask = resample_slice(series.hu[z], mask, series.pixel_mm, wanted_mm)
        if padding is not None:
            padding[z] = mask
    geometry = resampled_geometry(series.geometry, wanted_mm)
    return replace(series, hu=hu, geometry=geometry, padding=padding, source=None)


@lru_cache(maxsize=32)
def _matrix(count: int, wanted: int, step: float) -> np.ndarray:
    """(wanted, count): each row holds the weights of the old pixels; `step` is the new pixel in old ones."""
    width = max(step, 1.0)
    centre = (np.arange(wanted) + 0.5) * step - 0.5
    reach = int(np.ceil(LOBES * width))
    near = np.floor(centre).astype(int)[:, None] + np.arange(-reach, reach + 2)
    u = (near - centre[:, None]) / width
    weight = np.sinc(u) * np.i0(BETA * np.sqrt(np.clip(1 - (u / LOBES) ** 2, 0, None))) * (np.abs(u) < LOBES)
    weight /= weight.sum(1, keepdims=True)
    place = near % (2 * count)  # mirrored at both edges
    place = np.where(place < count, place, 2 * count - 1 - place)
    matrix = np.zeros((wanted, count))
    np.add.at(matrix, (np.arange(wanted)[:, None], place), weight)
    return matrix.astype(np.float32)
