"""Texture errors as STAN-CT counts them (Selim et al., AMIA 2020, eq 8): five features of the co-occurrence matrix.

The paper gives neither the grey levels nor the formulas; the five names together are those of scikit-image's
`graycoprops`, whose formulas are taken: homogeneity is the sum of p / (1 + (i - j)^2), energy the root of the sum of
p^2. Eq 8 divides by the feature of the target, whose correlation may be below 0; here by its absolute value.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from harmonict.core import HarmonictError
from harmonict.radiomics.discretise import MAX_BINS, crop_to_mask, level_image
from harmonict.radiomics.formulas import GLCM_NAMES, glcm_features, mean_rows
from harmonict.radiomics.matrices import directions, glcm_matrices, prepare

FEATURES = ("dissimilarity", "contrast", "homogeneity", "energy", "correlation")
_COLUMNS = [GLCM_NAMES.index(name) for name in ("dissimilarity", "contrast", "inv_diff_mom", "energy", "corr")]
_ENERGY = FEATURES.index("energy")


def glcm_texture(
    hu: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    range_hu: tuple[float, float] = (-1000.0, 900.0),
    levels: int = 256,
) -> dict[str, float]:
    """The five features of one slice: the mean over the four directions at a distance of one pixel.

    hu: (h, w). mask: bool (h, w), only pairs inside it count; None: all pixels. range_hu is cut into `levels` grey
    levels of equal width, HU outside it fall into the first or last; default: STAN-CT's soft tissue in 8 bit. Contrast
    and dissimilarity are in grey levels (squared for contrast). NaN where the mask holds no two neighbours; a constant
    image has correlation 1. Raises HarmonictError for shapes that differ, a range that is none, HU that are not finite.
    """
    hu = np.asarray(hu)
    mask = np.ones(hu.shape, bool) if mask is None else np.asarray(mask)
    low, high = range_hu
    if hu.ndim != 2 or mask.shape != hu.shape or mask.dtype != bool:
        raise HarmonictError(f"texture takes a slice (h, w) and a bool mask of its shape, got {hu.shape}, {mask.shape}")
    if not (np.isfinite(low) and np.isfinite(high) and low < high and 2 <= levels <= MAX_BINS):
        raise HarmonictError(f"texture needs a range of HU and at least 2 grey levels, got {range_hu} in {levels}")
    if not np.isfinite(hu[mask]).all():
        raise HarmonictError("texture: NaN or infinite HU in the image; repair it first")
    if not mask.any():
        return dict.fromkeys(FEATURES, float("nan"))
    part, inside = crop_to_mask(hu[None], mask[None])
    bins = np.floor((part[inside].astype(np.float64) - low) * (levels / (high - low)))
    image = level_image(np.clip(bins, 0, levels - 1).astype(np.int64) + 1, inside)
    prepared = prepare(image)
    rows = glcm_features(glcm_matrices(prepared, directions("2D")), prepared.values, levels)[:, _COLUMNS]
    rows[:, _ENERGY] = np.sqrt(rows[:, _ENERGY])
    return dict(zip(FEATURES, map(float, mean_rows(rows)), strict=True))


def texture_errors(
    image: np.ndarray,
    reference: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    range_hu: tuple[float, float] = (-1000.0, 900.0),
    levels: int = 256,
) -> pd.DataFrame:
    """|feature(image) - feature(reference)| / |feature(reference)| of each slice (eq 8).

    image, reference: HU (z, y, x) or (y, x) on one grid. mask: bool of that shape, the same pixels for both. Returns
    one row a slice, index `slice`, columns dissimilarity, contrast, homogeneity, energy, correlation; NaN where the
    reference's feature is 0 or the mask holds no two neighbours. The paper's tables: `.mean()` of it. Raises
    HarmonictError as `glcm_texture`, and where the shapes differ.
    """
    image, reference = np.asarray(image), np.asarray(reference)
    if image.shape != reference.shape or image.ndim not in (2, 3) or (mask is not None and mask.shape != image.shape):
        shapes = f"{image.shape} and {reference.shape}" + ("" if mask is None else f", mask {mask.shape}")
        raise HarmonictError(f"texture errors: image, reference and mask must have one shape (z, y, x), got {shapes}")
    if image.ndim == 2:
        image, reference, mask = image[None], reference[None], None if mask is None else mask[None]
    rows = []
    for z in range(len(image)):
        of_slice = None if mask is None else mask[z]
        a, b = (glcm_texture(v[z], mask=of_slice, range_hu=range_hu, levels=levels) for v in (image, reference))
        rows.append([abs(a[f] - b[f]) / abs(b[f]) if b[f] else float("nan") for f in FEATURES])
    return pd.DataFrame(rows, columns=list(FEATURES), index=pd.RangeIndex(len(rows), name="slice"))
