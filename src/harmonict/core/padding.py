"""Padding: the voxels that were never measured (outside the circle of the reconstruction)."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

HIGHEST_UNTAGGED_HU = -1500.0  # in-field values of real scanners reach -1360; air that a file clips sits at -1024
SMALLEST_GAP_HU = 100.0  # padding stands apart: TCGA -2048 and data from -1308, GE -3024 and data from -1024
AIR_HU = -1000.0
FLOOR_SAMPLE = 250_000  # voxels that the floor is looked for among: millions of equal ones are slow to sort


def find_padding(hu: np.ndarray, *, tagged: np.ndarray | None = None) -> np.ndarray | None:
    """Where a volume in HU (z, y, x) holds no measurement: a bool array of its shape, or None for nowhere.

    tagged: what the file itself marks as padding; it is taken as it is. Beside it, in each slice, the lowest value is
    padding where it lies below -1500 HU, at least 100 HU under the next value, and hangs together (in the plane, over
    edges) with the image border. Air clipped at -1024 is a measurement by this rule, and so are dark streaks.
    """
    found = None if tagged is None or not tagged.any() else tagged.copy()
    before = region = None
    for z, image in enumerate(hu):
        lowest = image.min()
        if not lowest < HIGHEST_UNTAGGED_HU:
            continue
        candidate = image == lowest
        if np.min(image, where=~candidate, initial=np.inf) < lowest + SMALLEST_GAP_HU:
            continue
        if before is None or not np.array_equal(candidate, before):  # most series pad every slice alike
            before, region = candidate, connected_to_border(candidate)
        if region is not None and region.any():
            if found is None:
                found = np.zeros(hu.shape, bool)
            found[z] |= region
    return found


def fill_padding(hu: np.ndarray, padding: np.ndarray | None) -> np.ndarray:
    """A copy of `hu` (z, y, x) with padding replaced, so that a filter sees no cliff at the circle's edge.

    Each padded voxel takes the nearest measured value of its slice; a slice without any becomes air, -1000 HU.
    Returns `hu` itself where nothing is padded. Costs one copy of the volume and, beyond that, slices only.
    """
    if padding is None or not padding.any():
        return hu
    filled = hu.copy()
    before = nearest = None
    for z, mask in enumerate(padding):
        if not mask.any():
            continue
        if mask.all():
            filled[z] = AIR_HU
            continue
        if before is None or not np.array_equal(mask, before):
            before = mask
            indices = ndimage.distance_transform_edt(mask, return_distances=False, return_indices=True)
            nearest = tuple(axis[mask] for axis in indices)
        filled[z][mask] = hu[z][nearest]
    return filled


def clip_floor(hu: np.ndarray, padding: np.ndarray | None = None) -> float:
    """The HU at which a file clips air: the low value that at least 0.1 % of the measured voxels lie at, and at most
    0.01 % below (a few strays); else minus infinity.

    hu, padding: (z, y, x) or (y, x); padding counts for nothing.
    """
    step = max(1, round((hu.size / FLOOR_SAMPLE) ** 0.5))  # some voxels are enough to find the value
    sample = hu[..., ::step, ::step]
    if padding is not None:
        sample = sample[~padding[..., ::step, ::step]]
    if not sample.size:
        return -np.inf
    place = int(5e-4 * sample.size)  # above the strays, within the voxels that are clipped
    floor = np.partition(sample, place, axis=None)[place]
    at, below, measured = 0, 0, hu.size
    for z, image in enumerate(hu[None] if hu.ndim == 2 else hu):  # slice by slice: no copy of the volume
        is_at, is_below = image == floor, image < floor
        if padding is not None:
            known = ~padding.reshape(-1, *image.shape)[z]
            is_at &= known
            is_below &= known
            measured -= known.size - int(np.count_nonzero(known))
        at += int(np.count_nonzero(is_at))
        below += int(np.count_nonzero(is_below))
    return float(floor) if at >= 1e-3 * measured and below <= 1e-4 * measured else -np.inf


def connected_to_border(mask: np.ndarray) -> np.ndarray:
    """The parts of a 2-D bool image that touch its border (neighbours share an edge)."""
    labels, count = ndimage.label(mask)
    touching = np.zeros(count + 1, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        touching[edge] = True
    touching[0] = False
    return touching[labels]
