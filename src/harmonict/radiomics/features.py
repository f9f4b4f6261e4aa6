"""Radiomic features of a ROI under PyRadiomics' names, and the settings they depend on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from harmonict.core import HarmonictError
from harmonict.radiomics.discretise import (
    MAX_BINS,
    bins_by_count,
    bins_by_width,
    check_roi,
    crop_to_mask,
    level_image,
    resample,
    resegment,
)
from harmonict.radiomics.filters import MARGIN_SIGMAS, WAVELET_MARGIN, filtered_images
from harmonict.radiomics.formulas import (
    GLCM_NAMES,
    SIZE_NAMES,
    glcm_features,
    maximal_correlation,
    ngtdm_features,
    size_features,
)
from harmonict.radiomics.matrices import (
    Levels,
    all_offsets,
    directions,
    glcm_matrices,
    glrlm_matrices,
    neighbourhood_matrices,
    prepare,
    zone_matrix,
    zones,
)
from harmonict.radiomics.shape import shape_features

FAMILIES = ("shape", "firstorder", "glcm", "glrlm", "glszm", "gldm", "ngtdm")
FILTERS = ("Original", "LoG", "Wavelet")
MAX_GLCM_LEVELS = 4_000
GLCM_BYTES = 64e6  # of matrices held at once

GLCM = {
    "Autocorrelation": "auto_corr",
    "ClusterProminence": "clust_prom",
    "ClusterShade": "clust_shade",
    "ClusterTendency": "clust_tend",
    "Contrast": "contrast",
    "Correlation": "corr",
    "DifferenceAverage": "diff_avg",
    "DifferenceEntropy": "diff_entr",
    "DifferenceVariance": "diff_var",
    "Id": "inv_diff",
    "Idm": "inv_diff_mom",
    "Idmn": "inv_diff_mom_norm",
    "Idn": "inv_diff_norm",
    "Imc1": "info_corr1",
    "Imc2": "info_corr2",
    "InverseVariance": "inv_var",
    "JointAverage": "joint_avg",
    "JointEnergy": "energy",
    "JointEntropy": "joint_entr",
    "MCC": "mcc",
    "MaximumProbability": "joint_max",
    "SumAverage": "sum_avg",
    "SumEntropy": "sum_entr",
    "SumSquares": "joint_var",
}
SIZES = {
    "glrlm": {
        "ShortRunEmphasis": "small",
        "LongRunEmphasis": "large",
        "LowGrayLevelRunEmphasis": "low",
        "HighGrayLevelRunEmphasis": "high",
        "ShortRunLowGrayLevelEmphasis": "small_low",
        "ShortRunHighGrayLevelEmphasis": "small_high",
        "LongRunLowGrayLevelEmphasis": "large_low",
        "LongRunHighGrayLevelEmphasis": "large_high",
        "GrayLevelNonUniformity": "level_nonuniformity",
        "GrayLevelNonUniformityNormalized": "level_nonuniformity_norm",
        "RunLengthNonUniformity": "size_nonuniformity",
        "RunLengthNonUniformityNormalized": "size_nonuniformity_norm",
        "RunPercentage": "percentage",
        "GrayLevelVariance": "level_variance",
        "RunVariance": "size_variance",
        "RunEntropy": "entropy",
    },
    "glszm": {
        "SmallAreaEmphasis": "small",
        "LargeAreaEmphasis": "large",
        "LowGrayLevelZoneEmphasis": "low",
        "HighGrayLevelZoneEmphasis": "high",
        "SmallAreaLowGrayLevelEmphasis": "small_low",
        "SmallAreaHighGrayLevelEmphasis": "small_high",
        "LargeAreaLowGrayLevelEmphasis": "large_low",
        "LargeAreaHighGrayLevelEmphasis": "large_high",
        "GrayLevelNonUniformity": "level_nonuniformity",
        "GrayLevelNonUniformityNormalized": "level_nonuniformity_norm",
        "SizeZoneNonUniformity": "size_nonuniformity",
        "SizeZoneNonUniformityNormalized": "size_nonuniformity_norm",
        "ZonePercentage": "percentage",
        "GrayLevelVariance": "level_variance",
        "ZoneVariance": "size_variance",
        "ZoneEntropy": "entropy",
    },
    "gldm": {
        "SmallDependenceEmphasis": "small",
        "LargeDependenceEmphasis": "large",
        "LowGrayLevelEmphasis": "low",
        "HighGrayLevelEmphasis": "high",
        "SmallDependenceLowGrayLevelEmphasis": "small_low",
        "SmallDependenceHighGrayLevelEmphasis": "small_high",
        "LargeDependenceLowGrayLevelEmphasis": "large_low",
        "LargeDependenceHighGrayLevelEmphasis": "large_high",
        "GrayLevelNonUniformity": "level_nonuniformity",
        "DependenceNonUniformity": "size_nonuniformity",
        "DependenceNonUniformityNormalized": "size_nonuniformity_norm",
        "GrayLevelVariance": "level_variance",
        "DependenceVariance": "size_variance",
        "DependenceEntropy": "entropy",
    },
}
NGTDM = ("Coarseness", "Contrast", "Busyness", "Complexity", "Strength")


@dataclass(frozen=True)
class FeatureSettings:
    """Everything that a feature's value depends on beside image and mask. Lengths in mm, intensities in HU.

    bin_width: fixed bin width. bin_count: fixed number of bins instead of a width. With bin_width None and no count the
        HU themselves are the grey levels (whole numbers from 1).
    dimension: "3D", or "2D" = neighbours within the slice only (PyRadiomics' force2D).
    distances: Chebyshev distances of neighbours for GLCM, GLDM and NGTDM.
    merge_directions: one matrix summed over the directions instead of the mean feature (IBSI's "merged";
        PyRadiomics' weightingNorm "no_weighting").
    dependence_alpha: GLDM / NGLDM coarseness, in grey levels.
    resample_mm: new voxel spacing (z, y, x), 0 keeps an axis; None: no resampling. resample_order: 1 linear, 3 cubic.
    resegment_hu: keep voxels inside this range (ends included). resegment_sigma: keep voxels within so many SD.
    energy_shift_hu: added to the HU for Energy, TotalEnergy and RootMeanSquared.
    families: of FAMILIES. filters: of FILTERS. log_sigma_mm: widths of the LoG. wavelet: a PyWavelets name.
    ivh_bin_width, ivh_bin_count: discretisation of the intensity-volume histogram (`ibsi_features` only).
    """

    bin_width: float | None = 25.0
    bin_count: int | None = None
    dimension: str = "3D"
    distances: tuple[int, ...] = (1,)
    merge_directions: bool = False
    dependence_alpha: float = 0.0
    resample_mm: tuple[float, float, float] | None = None
    resample_order: int = 1
    resegment_hu: tuple[float, float] | None = None
    resegment_sigma: float | None = None
    energy_shift_hu: float = 0.0
    families: tuple[str, ...] = FAMILIES
    filters: tuple[str, ...] = ("Original",)
    log_sigma_mm: tuple[float, ...] = (1.0, 3.0, 5.0)
    wavelet: str = "coif1"
    ivh_bin_width: float | None = None
    ivh_bin_count: int | None = None

    def __post_init__(self) -> None:
        if self.bin_width is not None and not (np.isfinite(self.bin_width) and self.bin_width > 0):
            raise HarmonictError(f"bin width must be above 0 HU, got {self.bin_width}")
        if self.bin_count is not None and self.bin_count < 1:
            raise HarmonictError(f"the number of bins must be at least 1, got {self.bin_count}")
        if self.dimension not in ("2D", "3D"):
            raise HarmonictError(f'dimension must be "2D" or "3D", got {self.dimension!r}')
        if not self.distances or any(d < 1 for d in self.distances):
            raise HarmonictError(f"neighbour distances must be 1 voxel or more, got {self.distances}")
        for given, known, what in ((self.families, FAMILIES, "family"), (self.filters, FILTERS, "filter")):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise HarmonictError(f"unknown {what} {unknown[0]!r}: choose of {', '.join(known)}")
        if self.resegment_hu is not None and not self.resegment_hu[0] < self.resegment_hu[1]:
            raise HarmonictError(f"the resegmentation range must go from low to high HU, got {self.resegment_hu}")


def discretise(values: np.ndarray, settings: FeatureSettings, start: float | None = None) -> np.ndarray:
    """Grey levels (int64, from 1) of the ROI's values (1-D) under the settings; start: see `bins_by_width`."""
    if settings.bin_count is not None:
        return bins_by_count(values, settings.bin_count)
    if settings.bin_width is not None:
        return bins_by_width(values, settings.bin_width, start)
    levels = np.round(values).astype(np.int64)
    if levels.min() < 1 or not np.array_equal(levels, values):
        raise HarmonictError(
            "without a bin width or number of bins the HU must be whole numbers from 1: give a bin width"
        )
    if levels.max() > MAX_BINS:
        raise HarmonictError(f"{levels.max()} grey levels, at most {MAX_BINS:,} are allowed: give a bin width")
    return levels


def first_order(
    values: np.ndarray, levels: np.ndarray, voxel_mm3: float, energy_shift_hu: float = 0.0
) -> dict[str, float]:
    """PyRadiomics' 18 first-order features of the ROI's values (1-D) and their grey levels. Kurtosis is not excess."""
    x = values.astype(np.float64)
    p10, p25, median, p75, p90 = np.percentile(x, (10, 25, 50, 75, 90))
    mean = x.mean()
    centred = x - mean
    square = centred * centred
    variance = square.mean()
    robust = x[(x >= p10) & (x <= p90)]
    energy = float(np.square(x + energy_shift_hu).sum())
    counts = np.bincount(levels)
    share = counts[counts > 0] / len(x)
    return {
        "Energy": energy,
        "TotalEnergy": energy * voxel_mm3,
        "Entropy": float(-(share * np.log2(share)).sum()) + 0.0,
        "Minimum": x.min(),
        "10Percentile": p10,
        "90Percentile": p90,
        "Maximum": x.max(),
        "Mean": mean,
        "Median": median,
        "InterquartileRange": p75 - p25,
        "Range": x.max() - x.min(),
        "MeanAbsoluteDeviation": np.abs(centred).mean(),
        "RobustMeanAbsoluteDeviation": np.abs(robust - robust.mean()).mean() if len(robust) else 0.0,
        "RootMeanSquared": np.sqrt(energy / len(x)),
        "Skewness": (square * centred).mean() / variance**1.5 if variance > 0 else 0.0,
        "Kurtosis": (square * square).mean() / variance**2 if variance > 0 else 0.0,
        "Variance": variance,
        "Uniformity": float((share * share).sum()),
    }


def _glcm(levels: Levels, settings: FeatureSettings) -> dict[str, float]:
    n, ng = len(levels.values), int(levels.values[-1])
    if n > MAX_GLCM_LEVELS:
        raise HarmonictError(
            f"{n} grey levels occur in the ROI, a GLCM may have {MAX_GLCM_LEVELS}: take wider bins or leave glcm out"
        )
    offsets = np.concatenate([directions(settings.dimension, d) for d in settings.distances])
    at_once = max(1, int(GLCM_BYTES // (8 * n * n)))
    parts: Iterable[np.ndarray]
    parts = (glcm_matrices(levels, offsets[k : k + at_once]) for k in range(0, len(offsets), at_once))
    if settings.merge_directions:
        parts = [np.sum([part.sum(axis=0) for part in parts], axis=0)[None]]
    rows = []
    for part in parts:
        counts = part[part.any(axis=(1, 2))]
        if len(counts):
            basic = glcm_features(counts, levels.values, ng)
            rows.append(np.concatenate([basic, maximal_correlation(counts)[:, None]], axis=1))
    if not rows:
        raise HarmonictError(
            f"no two voxels of the ROI are neighbours at distance {settings.distances}: the GLCM is empty; "
            "take a larger ROI or leave the family glcm out"
        )
    row = dict(zip([*GLCM_NAMES, "mcc"], np.concatenate(rows).mean(axis=0), strict=True))
    return {name: row[short] for name, short in GLCM.items()}


def _glrlm(levels: Levels, settings: FeatureSettings) -> dict[str, float]:
    counts, lines = glrlm_matrices(levels, directions(settings.dimension))
    counts = counts[lines]
    if not len(counts):
        raise HarmonictError(
            "no line of voxels meets the ROI twice: the GLRLM is empty; take a larger ROI or leave the family glrlm out"
        )
    if settings.merge_directions:
        counts = counts.sum(axis=0, keepdims=True)
    return _named("glrlm", size_features(counts, levels.values, np.arange(1, counts.shape[2] + 1)).mean(axis=0))


def _glszm(levels: Levels, settings: FeatureSettings) -> dict[str, float]:
    rows, sizes, _ = zones(levels, all_offsets(settings.dimension))
    counts, columns = zone_matrix(rows, sizes, len(levels.values))
    return _named("glszm", size_features(counts[None], levels.values, columns)[0])


def _named(family: str, row: np.ndarray) -> dict[str, float]:
    short = dict(zip(SIZE_NAMES, row, strict=True))
    return {name: short[key] for name, key in SIZES[family].items()}


def texture(levels: Levels, settings: FeatureSettings) -> dict[str, dict[str, float]]:
    """Texture features by family and PyRadiomics name, of the families that the settings ask for."""
    out = {}
    for family, function in (("glcm", _glcm), ("glrlm", _glrlm), ("glszm", _glszm)):
        if family in settings.families:
            out[family] = function(levels, settings)
    if "gldm" in settings.families or "ngtdm" in settings.families:
        offsets = np.concatenate([all_offsets(settings.dimension, d) for d in settings.distances])
        dependence, difference, _ = neighbourhood_matrices(levels, offsets, settings.dependence_alpha)
        if "gldm" in settings.families:
            columns = np.arange(1, dependence.shape[1] + 1)
            out["gldm"] = _named("gldm", size_features(dependence[None], levels.values, columns)[0])
        if "ngtdm" in settings.families:
            # PyRadiomics counts voxels without neighbours too, as differing by 0
            row = ngtdm_features(levels.values, difference, dependence.sum(axis=1))
            out["ngtdm"] = dict(zip(NGTDM, row, strict=True))
    return out


def extract_features(
    hu: np.ndarray,
    mask: np.ndarray,
    spacing_mm: tuple[float, float, float],
    settings: FeatureSettings = FeatureSettings(),
) -> dict[str, float]:
    """Features of one ROI under PyRadiomics' names (`original_firstorder_Mean`), in a fixed order.

    hu: (z, y, x). mask: (z, y, x), bool or 0 / 1. spacing_mm: (z, y, x). With the default settings these are
    PyRadiomics' 14 shape and 93 other features; each further filter adds 93. Shape is taken before resegmentation.

    Raises HarmonictError, in one line, for shapes that differ, an empty mask, a ROI of one voxel, NaN or infinite HU in
    the ROI, more than 10,000 grey levels, or a family that is not defined for so sparse a ROI.
    """
    mask = check_roi(hu, mask)
    spacing = tuple(float(s) for s in spacing_mm)
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise HarmonictError(f"voxel spacing must be three numbers above 0 mm (z, y, x), got {spacing_mm}")
    if settings.resample_mm is not None:
        hu, mask, spacing = resample(
            hu, mask, spacing, settings.resample_mm, order=settings.resample_order, margin=_reach(settings, spacing)
        )
    out: dict[str, float] = {}
    _enough(mask)
    if "shape" in settings.families:
        out |= {f"original_{k}": float(v) for k, v in shape_features(mask, spacing, settings.dimension).items()}
    if settings.resegment_hu is not None or settings.resegment_sigma is not None:
        mask = resegment(hu, mask, range_hu=settings.resegment_hu, outlier_sigma=settings.resegment_sigma)
        _enough(mask)
    _, small_mask = crop_to_mask(mask, mask)
    voxel_mm3 = float(np.prod(spacing))
    images = filtered_images(
        hu,
        mask,
        spacing,
        filters=settings.filters,
        log_sigma_mm=settings.log_sigma_mm,
        wavelet=settings.wavelet,
        in_plane=settings.dimension == "2D",
    )
    for name, image in images:
        values = image[small_mask]
        if not np.all(np.isfinite(values)):
            raise HarmonictError(f"{name}: NaN or infinite HU near the ROI: repair the image before filtering it")
        levels = discretise(values, settings)
        found: dict[str, dict[str, float]] = {}
        if "firstorder" in settings.families:
            found["firstorder"] = first_order(values, levels, voxel_mm3, settings.energy_shift_hu)
        prepared = prepare(level_image(levels, small_mask), max(settings.distances))
        found |= texture(prepared, settings)
        for family, row in found.items():
            out |= {f"{name}_{family}_{key}": float(value) for key, value in row.items()}
    return out


def _enough(mask: np.ndarray) -> None:
    if int(mask.sum()) < 2:
        raise HarmonictError("the ROI holds one voxel: texture and shape need at least 2, take a larger ROI")


def _reach(settings: FeatureSettings, spacing_mm: tuple[float, ...]) -> int:
    """New voxels around a resampled ROI that the filters look at."""
    sigma = max(settings.log_sigma_mm, default=0.0) if "LoG" in settings.filters else 0.0
    finest = min(n if n > 0 else s for n, s in zip(settings.resample_mm or (), spacing_mm, strict=True))
    return max(WAVELET_MARGIN if "Wavelet" in settings.filters else 0, int(np.ceil(MARGIN_SIGMAS * sigma / finest)))
