"""From HU to grey levels: ROI checks, resampling, resegmentation, fixed bin width and fixed bin number."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from harmonict.core import HarmonictError

MAX_BINS = 10_000
SPLINE_MARGIN = 24  # voxels around the ROI; a cubic spline's memory fades by 0.268 a voxel, 2e-14 here


def check_roi(hu: np.ndarray, mask: np.ndarray, name: str = "ROI") -> np.ndarray:
    """The mask as bool (z, y, x), once image and mask fit each other.

    Raises HarmonictError, one line each: shapes differ, not three-dimensional, a mask with values other than 0 and 1,
    an empty mask, NaN or infinite HU inside it.
    """
    hu, mask = np.asarray(hu), np.asarray(mask)
    if hu.ndim != 3 or mask.ndim != 3:
        raise HarmonictError(f"{name}: image and mask must be 3-D (z, y, x), got {hu.ndim}-D and {mask.ndim}-D")
    if hu.shape != mask.shape:
        raise HarmonictError(
            f"{name}: the mask has shape {mask.shape}, the image {hu.shape} (z, y, x): resample the mask to the image"
        )
    if mask.dtype != bool:
        values = np.unique(mask)
        if not np.all(np.isin(values, (0, 1))):
            raise HarmonictError(f"{name}: a mask holds 0 and 1, this one holds {values[:6].tolist()}: pick one label")
        mask = mask.astype(bool)
    if not mask.any():
        raise HarmonictError(f"{name}: the mask is empty: check the label or the ROI name")
    if not np.all(np.isfinite(hu[mask])):
        raise HarmonictError(f"{name}: NaN or infinite HU inside the ROI: repair the image before taking features")
    return mask


def bounding_box(mask: np.ndarray) -> list[tuple[int, int]]:
    """First index and one past the last of the mask's voxels along each axis."""
    bounds = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        where = np.flatnonzero(mask.any(axis=others))
        bounds.append((int(where[0]), int(where[-1]) + 1))
    return bounds


def crop_to_mask(hu: np.ndarray, mask: np.ndarray, margin: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Views of image and mask (z, y, x) around the mask's bounding box, `margin` voxels wider within the image."""
    box = tuple(slice(max(lo - margin, 0), hi + margin) for lo, hi in bounding_box(mask))
    return hu[box], mask[box]


def _axis_positions(count: int, spacing: float, new_spacing: float, lo: int, hi: int) -> np.ndarray:
    """Positions (in old voxels) of the new grid's voxels that touch [lo, hi), both grids sharing their centre."""
    new_count = int(np.ceil(count * spacing / new_spacing - 1e-9))
    step = new_spacing / spacing
    position = 0.5 * (count - 1) + (np.arange(new_count) - 0.5 * (new_count - 1)) * step
    return position[(position > lo - 1) & (position < hi)]


def resample(
    hu: np.ndarray,
    mask: np.ndarray,
    spacing_mm: tuple[float, float, float],
    new_spacing_mm: tuple[float, float, float],
    *,
    order: int,
    round_hu: bool = True,
    margin: int = 0,
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Image (float64), mask (bool) and spacing on a new grid aligned by the grid centres (IBSI, section 2.4).

    hu, mask: (z, y, x). new_spacing_mm: (z, y, x), 0 keeps an axis as it is. order: 1 trilinear, 3 cubic spline. The
    mask is resampled linearly and cut at 0.5; HU are rounded to whole numbers where `round_hu`. The result covers the
    mask and `margin` new voxels around it where the image reaches that far.
    """
    if any(s < 0 or not np.isfinite(s) for s in new_spacing_mm):
        raise HarmonictError(f"resampled voxel spacing must be above 0 mm, or 0 to keep an axis, got {new_spacing_mm}")
    new_z, new_y, new_x = (float(n) if n > 0 else float(s) for n, s in zip(new_spacing_mm, spacing_mm, strict=True))
    target = (new_z, new_y, new_x)
    vanished = f"the ROI vanishes when resampled to {target} mm: take a smaller spacing or leave such small ROIs out"
    positions, crop = [], []
    for axis, (first_inside, after) in enumerate(bounding_box(mask)):
        reach = int(np.ceil(margin * target[axis] / spacing_mm[axis])) + 1
        lo, hi = max(first_inside - reach, 0), min(after + reach, hu.shape[axis])
        position = _axis_positions(hu.shape[axis], spacing_mm[axis], target[axis], lo, hi)
        if not len(position):
            raise HarmonictError(vanished)
        first = max(lo - SPLINE_MARGIN, 0)
        crop.append(slice(first, min(hi + SPLINE_MARGIN, hu.shape[axis])))
        positions.append(position - first)
    image, part = hu[tuple(crop)].astype(np.float64), mask[tuple(crop)].astype(np.float64)
    if order > 1:
        image = ndimage.spline_filter(image, order=order, mode="nearest")
    shape = tuple(len(p) for p in positions)
    matrix = np.array([t / s for t, s in zip(target, spacing_mm, strict=True)])
    offset = np.array([p[0] for p in positions])
    new = ndimage.affine_transform(
        image, matrix, offset, output_shape=shape, order=order, mode="nearest", prefilter=False
    )
    inside = ndimage.affine_transform(part, matrix, offset, output_shape=shape, order=1, mode="nearest")
    new_mask = inside >= 0.5 - 1e-9
    if not new_mask.any():
        raise HarmonictError(vanished)
    return (np.round(new) if round_hu else new), new_mask, target


def resegment(
    hu: np.ndarray,
    mask: np.ndarray,
    *,
    range_hu: tuple[float, float] | None = None,
    outlier_sigma: float | None = None,
) -> np.ndarray:
    """The intensity mask: voxels of `mask` inside range_hu (ends included) and within `outlier_sigma` SD of the mean.

    Mean and SD (population) are those of the voxels that the range left (IBSI, section 2.6). Raises HarmonictError
    where nothing is left.
    """
    kept = mask
    if range_hu is not None:
        low, high = range_hu
        kept = kept & (hu >= low) & (hu <= high)
        if not kept.any():
            values = hu[mask]
            raise HarmonictError(
                f"no voxel of the ROI lies in [{low:g}, {high:g}] HU (it spans {values.min():g} to {values.max():g}): "
                "widen the resegmentation range"
            )
    if outlier_sigma is not None:
        values = hu[kept].astype(np.float64)
        mean, sd = values.mean(), values.std()
        kept = kept & (hu >= mean - outlier_sigma * sd) & (hu <= mean + outlier_sigma * sd)
        if not kept.any():
            raise HarmonictError(f"no voxel of the ROI lies within {outlier_sigma:g} SD of its mean: widen the limit")
    return kept


def _check_bins(count: float) -> None:
    if not count <= MAX_BINS:
        raise HarmonictError(
            f"{count:.6g} grey levels asked for, at most {MAX_BINS:,} are allowed: take wider bins or resegment the ROI"
        )


def bins_by_width(values: np.ndarray, bin_width: float, start: float | None = None) -> np.ndarray:
    """Grey level (int64, from 1) of each value, fixed bin width.

    start: lower edge of level 1 (IBSI: the lower end of the resegmentation range). None puts the edges at multiples of
    the width, level 1 holding the lowest value, as PyRadiomics does.
    Raises HarmonictError for a width <= 0 or more than 10,000 levels.
    """
    if not bin_width > 0 or not np.isfinite(bin_width):
        raise HarmonictError(f"bin width must be above 0 HU, got {bin_width}")
    low, high = values.min(), values.max()
    if start is not None:
        _check_bins((float(high) - start) / bin_width)
        return np.maximum(np.floor((values.astype(np.float64) - start) / bin_width), 0).astype(np.int64) + 1
    _check_bins((float(high) - float(low)) / bin_width)
    edges = np.arange(low - low % bin_width, high + 2 * bin_width, bin_width)
    return np.digitize(values, edges)


def bins_by_count(values: np.ndarray, bin_count: int) -> np.ndarray:
    """Grey level 1..bin_count (int64) of each value, the range of the values cut into equal bins.

    The edges are NumPy's, in the values' own precision; the last bin holds its upper edge (IBSI 2.7, PyRadiomics).
    Raises HarmonictError for a count below 1 or above 10,000.
    """
    if bin_count < 1:
        raise HarmonictError(f"the number of bins must be at least 1, got {bin_count}")
    _check_bins(bin_count)
    edges = np.histogram_bin_edges(values, bin_count)
    edges[-1] += 1
    return np.digitize(values, edges)


def level_image(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """int32 image (z, y, x) of grey levels, 0 outside the mask; values: the levels of the masked voxels in C order."""
    image = np.zeros(mask.shape, np.int32)
    image[mask] = values
    return image
