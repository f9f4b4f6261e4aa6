"""The set of 1,401 features that RadiomicGAN and DiffusionCT count with, of the classes that IBEX offers.

The papers name the classes and the total, not the parameters. The choice made here is in `docs/ibex-features.md`, row
by row in `ibex_table`. No feature looks at a voxel outside the ROI.

Sources: Zhang et al., IBEX, Med Phys 42 (2015) 1341 (names, directions, classes); formulas from the image biomarker
standardisation initiative (IBSI, arXiv 1612.07003), chapter 3, except where `docs/ibex-features.md` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harmonict.core import HarmonictError
from harmonict.radiomics.discretise import check_roi, crop_to_mask, level_image
from harmonict.radiomics.formulas import GLCM_NAMES, SIZE_NAMES, glcm_features, ngtdm_features, size_features
from harmonict.radiomics.jit import compiled
from harmonict.radiomics.matrices import Levels, glcm_matrices, glrlm_matrices, prepare

MAX_LEVELS = 1024  # 13 matrices of 1024 x 1024 take 109 MB

PERCENTILES = tuple(range(1, 100))
GLCM25_OFFSETS = (1, 4, 7)
NID_SIZES = (3, 5, 7)
LOCAL_SIZES = (3, 9)
ALL = "all"  # matrices added over the directions

# One of each pair of opposite directions, as (z, y, x). y grows downwards on the screen, so 45 degrees is up and right.
DIRECTIONS25 = {"0": (0, 0, 1), "45": (0, -1, 1), "90": (0, -1, 0), "135": (0, -1, -1)}
DIRECTIONS3 = {
    "0": (0, 0, 1),
    "1": (0, 1, 0),
    "2": (1, 0, 0),
    "3": (0, 1, 1),
    "4": (0, 1, -1),
    "5": (1, 1, 0),
    "6": (-1, 1, 0),
    "7": (1, 0, 1),
    "8": (-1, 0, 1),
    "9": (1, 1, 1),
    "10": (1, 1, -1),
    "11": (-1, 1, 1),
    "12": (-1, 1, -1),
}
# The 3-D directions that are the 2.5-D ones; a symmetric matrix does not tell a direction from its opposite
IN_PLANE = {"0": "0", "45": "4", "90": "1", "135": "3"}

GLCM = {
    "AutoCorrelation": "auto_corr",
    "ClusterProminence": "clust_prom",
    "ClusterShade": "clust_shade",
    "ClusterTendency": "clust_tend",
    "Contrast": "contrast",
    "Correlation": "corr",
    "DifferenceEntropy": "diff_entr",
    "Dissimilarity": "dissimilarity",
    "Energy": "energy",
    "Entropy": "joint_entr",
    "Homogeneity": "inv_diff",
    "Homogeneity2": "inv_diff_mom",
    "InformationMeasureCorr1": "info_corr1",
    "InformationMeasureCorr2": "info_corr2",
    "InverseDiffMomentNorm": "inv_diff_mom_norm",
    "InverseDiffNorm": "inv_diff_norm",
    "InverseVariance": "inv_var",
    "MaxProbability": "joint_max",
    "SumAverage": "sum_avg",
    "SumEntropy": "sum_entr",
    "SumVariance": "sum_var",
    "Variance": "joint_var",
}
GLRLM = {
    "GrayLevelNonuniformity": "level_nonuniformity",
    "HighGrayLevelRunEmphasis": "high",
    "LongRunEmphasis": "large",
    "LongRunHighGrayLevelEmphasis": "large_high",
    "LongRunLowGrayLevelEmphasis": "large_low",
    "LowGrayLevelRunEmphasis": "low",
    "RunLengthNonuniformity": "size_nonuniformity",
    "RunPercentage": "percentage",
    "ShortRunEmphasis": "small",
    "ShortRunHighGrayLevelEmphasis": "small_high",
    "ShortRunLowGrayLevelEmphasis": "small_low",
}
NID = ("Coarseness", "Contrast", "Busyness", "Complexity", "TextureStrength")
SPREAD = ("InterQuartileRange", "Kurtosis", "MeanAbsoluteDeviation", "MedianAbsoluteDeviation", "Range", "Skewness")
GLOBAL = (
    "Energy EnergyNorm GlobalEntropy GlobalMax GlobalMean GlobalMedian GlobalMin GlobalStd GlobalUniformity "
    "RootMeanSquare Variance"
).split()
LOCAL = [
    f"Local{map_}{stat}" for map_ in ("Entropy", "Range", "Std") for stat in ("Max", "Mean", "Median", "Min", "Std")
]

# Family -> (DiffusionCT's six classes, RadiomicGAN's seven)
CLASSES = {
    "GOH": ("GOH", "IH"),
    "GLCM25": ("GLCM", "GLCM25"),
    "GLCM3": ("GLCM", "GLCM3"),
    "GLRLM25": ("GLRLM", "GLRLM25"),
    "ID": ("ID", "ID"),
    "IDMaxSlice": ("ID", "ID"),
    "IH": ("IH", "IH"),
    "NID25": ("NID", "NID25"),
    "NID3": ("NID", "NID3"),
}

_GLCM_COLUMNS = [GLCM_NAMES.index(short) for short in GLCM.values()]
_SUM_VARIANCE = list(GLCM).index("SumVariance")
_GLRLM_COLUMNS = [SIZE_NAMES.index(short) for short in GLRLM.values()]


@dataclass(frozen=True)
class IbexSettings:
    """What the values depend on beside image and mask; the number of features depends on nothing.

    range_hu: this range of HU is cut into `levels` grey levels of equal width, HU outside it fall into the first or
        last. The default is the range of a 12-bit CT in levels of 16 HU.
    levels: number of grey levels, at most 1,024.
    orientation_bins: bins of the gradient orientation histogram over 0 to 180 degrees.
    """

    range_hu: tuple[float, float] = (-1024.0, 3072.0)
    levels: int = 256
    orientation_bins: int = 32

    def __post_init__(self) -> None:
        low, high = self.range_hu
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise HarmonictError(f"the range of grey levels must go from low to high HU, got {self.range_hu}")
        if not 1 <= self.levels <= MAX_LEVELS:
            raise HarmonictError(f"the number of grey levels must lie in 1 to {MAX_LEVELS:,}, got {self.levels}")
        if self.orientation_bins < 1:
            raise HarmonictError(f"the number of orientation bins must be at least 1, got {self.orientation_bins}")


def ibex_table() -> pd.DataFrame:
    """One row per feature, in the order of `ibex_features`.

    Columns: name; class6 and class7, the class in DiffusionCT's and RadiomicGAN's table; family (a part of the set with
    one set of parameters); feature; direction (degrees in 2.5-D, a number of `DIRECTIONS3` in 3-D, "all" for the sum
    over the directions, else ""); parameter (offset in voxels, width of the neighbourhood in voxels, or percent; <NA>
    where there is none).
    """
    table = pd.DataFrame(_rows(), columns=["family", "feature", "direction", "parameter"])
    table["parameter"] = table["parameter"].astype("Int64")
    table.insert(0, "name", [_name(*row) for row in _rows()])
    table.insert(1, "class6", [CLASSES[family][0] for family in table["family"]])
    table.insert(2, "class7", [CLASSES[family][1] for family in table["family"]])
    return table


def ibex_features(
    hu: np.ndarray,
    mask: np.ndarray,
    spacing_mm: tuple[float, float, float],
    settings: IbexSettings = IbexSettings(),
) -> dict[str, float]:
    """The 1,401 features of one ROI, all finite, under the names and in the order of `ibex_table`.

    hu: (z, y, x). mask: (z, y, x), bool or 0 / 1. spacing_mm: (z, y, x); only the in-plane ratio matters, to gradients.

    A direction along which no two voxels of the ROI meet takes the values of its offset's sum over directions, so that
    2.5-D and 3-D coincide on a single slice (GLCM at offset 1, NID); where no direction has a pair, all features of the
    offset are 0. Correlation of a constant ROI is 1, its coarseness 1e6, its orientation features, kurtosis and
    skewness 0.

    Raises HarmonictError, in one line, for shapes that differ, an empty mask, NaN or infinite HU in the ROI.
    """
    mask = check_roi(hu, mask)
    spacing = tuple(float(s) for s in spacing_mm)
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise HarmonictError(f"voxel spacing must be three numbers above 0 mm (z, y, x), got {spacing_mm}")
    cropped, mask = crop_to_mask(np.asarray(hu), mask)
    image = np.zeros(mask.shape)
    image[mask] = cropped[mask]
    levels = level_image(_discretise(image[mask], settings), mask)
    prepared = prepare(levels, max(GLCM25_OFFSETS))
    glcm25, glcm3 = _glcm(prepared, settings.levels)
    values = np.concatenate(
        [
            _goh(image, mask, spacing, settings.orientation_bins),
            glcm25.ravel(),
            glcm3.ravel(),
            _glrlm(prepared).ravel(),
            *_direct(image, levels, mask),
            _histogram(levels[mask].astype(np.float64), np.bincount(levels[mask]), -0.5, 1.0),
            _nid(prepared, levels),
        ]
    )
    return dict(zip(NAMES, (values + 0.0).tolist(), strict=True))  # + 0.0: no negative zeros


Row = tuple[str, str, str, int | None]  # family, feature, direction, parameter


def _rows() -> list[Row]:
    def histogram(family: str) -> list[Row]:
        spread: list[Row] = [(family, feature, "", None) for feature in SPREAD]
        return spread + [(family, f, "", p) for f in ("Percentile", "PercentileArea") for p in PERCENTILES]

    def direct(family: str) -> list[Row]:
        scalars: list[Row] = [(family, feature, "", None) for feature in (*GLOBAL, *SPREAD)]
        local: list[Row] = [(family, feature, "", size) for size in LOCAL_SIZES for feature in LOCAL]
        return scalars + local + [(family, "Percentile", "", p) for p in PERCENTILES]

    rows = histogram("GOH")
    rows += [("GLCM25", f, d, o) for o in GLCM25_OFFSETS for d in (ALL, *DIRECTIONS25) for f in GLCM]
    rows += [("GLCM3", f, d, 1) for d in (ALL, *DIRECTIONS3) for f in GLCM]
    rows += [("GLRLM25", f, d, None) for d in (ALL, "0", "90") for f in GLRLM]
    rows += direct("ID") + direct("IDMaxSlice") + histogram("IH")
    return rows + [(family, f, "", size) for family in ("NID25", "NID3") for size in NID_SIZES for f in NID]


def _name(family: str, feature: str, direction: str, parameter: int | None) -> str:
    parts = ["IBEX", family, feature, direction, "" if parameter is None else str(parameter)]
    return "_".join(part for part in parts if part)


NAMES = tuple(_name(*row) for row in _rows())


def _discretise(values: np.ndarray, settings: IbexSettings) -> np.ndarray:
    low, high = settings.range_hu
    level = np.floor((values - low) * (settings.levels / (high - low)))
    return np.clip(level, 0, settings.levels - 1).astype(np.int64) + 1


def _spread(x: np.ndarray) -> tuple[float, ...]:
    """SPREAD of sorted values."""
    if x[0] == x[-1]:
        return (0.0,) * len(SPREAD)
    centred = x - x.mean()
    scaled = centred / np.sqrt(np.square(centred).mean())
    square = scaled * scaled
    lower, median, upper = np.percentile(x, (25, 50, 75))
    return (
        upper - lower,
        np.square(square).mean(),
        np.abs(centred).mean(),
        np.median(np.abs(x - median)),
        x[-1] - x[0],
        (square * scaled).mean(),
    )


def _histogram(values: np.ndarray, counts: np.ndarray, start: float, width: float) -> np.ndarray:
    """SPREAD, percentiles of the values, and percentiles of the area of their histogram, linear within a bin.

    counts: voxels of each bin; the first bin's lower edge is `start`. Without any value all is 0.
    """
    if len(values) == 0:
        return np.zeros(len(SPREAD) + 2 * len(PERCENTILES))
    x = np.sort(values)
    wanted = np.array(PERCENTILES) * len(x) / 100.0
    below = np.cumsum(counts)
    bin_ = np.searchsorted(below, wanted)  # the first bin that reaches the area, so never an empty one
    area = start + width * (bin_ + (wanted - (below - counts)[bin_]) / counts[bin_])
    return np.concatenate([_spread(x), np.percentile(x, PERCENTILES), area])


def _goh(image: np.ndarray, mask: np.ndarray, spacing: Sequence[float], bins: int) -> np.ndarray:
    degrees = _orientations(image, mask, spacing)
    width = 180.0 / bins
    counts = np.bincount(np.minimum((degrees / width).astype(np.int64), bins - 1), minlength=bins)
    return _histogram(degrees, counts, 0.0, width)


def _orientations(image: np.ndarray, mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Degrees in [0, 180) of the in-plane gradient at each voxel of the ROI that has one, 0 along x."""
    found = []
    for slice_, inside in zip(image, mask, strict=True):
        dy = _slope(slice_, inside)[inside] / spacing[1]
        dx = _slope(slice_.T, inside.T).T[inside] / spacing[2]
        sloped = (dy != 0) | (dx != 0)
        found.append(np.degrees(np.arctan2(dy[sloped], dx[sloped])) % 180.0)
    degrees = np.concatenate(found)
    degrees[degrees == 180.0] = 0.0  # the remainder of a tiny negative angle
    return degrees


def _slope(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """HU a voxel along the first axis: the mean of the differences to the neighbours in the ROI, 0 without any."""
    both = inside[1:] & inside[:-1]
    step = np.where(both, image[1:] - image[:-1], 0.0)
    rise, steps = np.zeros(image.shape), np.zeros(image.shape, np.int8)
    for side in (slice(1, None), slice(None, -1)):
        rise[side] += step
        steps[side] += both
    return rise / np.maximum(steps, 1)


def _glcm(levels: Levels, ng: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (3 offsets x 5, 22) in 2.5-D and (14, 22) in 3-D, the sum over directions first."""
    near = glcm_matrices(levels, np.array(list(DIRECTIONS3.values())))
    in_plane = near[[list(DIRECTIONS3).index(IN_PLANE[d]) for d in DIRECTIONS25]]
    directions = np.array(list(DIRECTIONS25.values()))
    far = [glcm_matrices(levels, directions * offset) for offset in GLCM25_OFFSETS[1:]]
    return np.vstack([_glcm_rows(counts, levels, ng) for counts in (in_plane, *far)]), _glcm_rows(near, levels, ng)


def _glcm_rows(counts: np.ndarray, levels: Levels, ng: int) -> np.ndarray:
    """Features (1 + k, 22) of the sum of k matrices and of each."""
    row = glcm_features(np.concatenate([counts.sum(axis=0, keepdims=True), counts]), levels.values, ng)
    row = np.where(np.isnan(row), row[:1], row)[:, _GLCM_COLUMNS]
    # about the sum entropy, as Haralick printed it and IBEX has it; about the sum average it is the cluster tendency
    short = dict(zip(GLCM, row.T, strict=True))
    row[:, _SUM_VARIANCE] += (short["SumAverage"] - short["SumEntropy"]) ** 2
    return np.nan_to_num(row, nan=0.0)


def _glrlm(levels: Levels) -> np.ndarray:
    """Features (3, 11): of the mean of both directions' matrices, along x, along y."""
    counts, _ = glrlm_matrices(levels, np.array([(0, 0, 1), (0, 1, 0)]))
    counts = np.concatenate([counts.mean(axis=0, keepdims=True), counts])
    return size_features(counts, levels.values, np.arange(1, counts.shape[2] + 1))[:, _GLRLM_COLUMNS]


def _direct(image: np.ndarray, levels: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Intensity direct features of the whole ROI, then of its slice of largest area (the first of equals)."""
    areas = mask.sum(axis=(1, 2))
    largest = int(areas.argmax())
    first = int(areas[:largest].sum())
    parts = (slice(None), slice(first, first + int(areas[largest])))  # of the ROI's voxels, which lie slice by slice
    local = _local_statistics(image, levels, parts)
    values, level = image[mask], levels[mask]
    return [_direct_row(values[part], level[part], row) for part, row in zip(parts, local, strict=True)]


def _local_statistics(image: np.ndarray, levels: np.ndarray, parts: Sequence[slice]) -> list[list[float]]:
    """LOCAL of each window size, once for each part of the ROI's voxels."""
    widest = max(LOCAL_SIZES) // 2
    around = ((0, 0), (widest, widest), (widest, widest))
    padded = np.pad(levels, around)
    voxels, row_length = np.flatnonzero(padded), padded.shape[2]
    flat_levels, flat_image = padded.ravel(), np.pad(image, around).ravel()
    out: list[list[float]] = [[] for _ in parts]
    for size in LOCAL_SIZES:
        reach = np.arange(-(size // 2), size // 2 + 1)
        steps = (reach[:, None] * row_length + reach[None, :]).ravel()
        maps = _local(flat_image, flat_levels, voxels, steps, int(levels.max()) + 1)
        for row, part in zip(out, parts, strict=True):
            row += [f(one[part]) for one in maps for f in (np.max, np.mean, np.median, np.min, np.std)]
        del maps  # the largest arrays of all, gone before the next
    return out


def _direct_row(values: np.ndarray, levels: np.ndarray, local: list[float]) -> np.ndarray:
    x = np.sort(values)
    energy = float(np.square(x).sum())
    variance = x.var() if x[0] < x[-1] else 0.0
    share = np.bincount(levels) / len(levels)
    share = share[share > 0]
    entropy = float(share @ -np.log2(share))
    power = energy / len(x)
    whole = (
        *(energy, power, entropy, x[-1], x.mean(), np.median(x), x[0]),
        *(np.sqrt(variance), share @ share, np.sqrt(power), variance),
    )
    return np.concatenate([whole, _spread(x), local, np.percentile(x, PERCENTILES)])


@compiled
def _local(image, levels, voxels, steps, count):
    """(3, voxels): entropy of the grey levels in bits, range and SD of the HU around each voxel, inside the ROI."""
    out = np.empty((3, voxels.size))
    seen = np.zeros(count, np.int64)
    bits = np.zeros(steps.size + 1)
    for c in range(1, steps.size + 1):
        bits[c] = c * math.log2(c)
    for k in range(voxels.size):
        v = voxels[k]
        centre = image[v]
        n = 0
        low = high = total = square = 0.0
        for s in steps:
            level = levels[v + s]
            if level > 0:
                d = image[v + s] - centre
                n += 1
                total += d
                square += d * d
                low = min(low, d)
                high = max(high, d)
                seen[level] += 1
        entropy = bits[n]
        for s in steps:
            level = levels[v + s]
            if level > 0:
                entropy -= bits[seen[level]]  # once a level: the next look finds 0
                seen[level] = 0
        mean = total / n
        out[0, k] = max(entropy / n, 0.0)
        out[1, k] = high - low
        out[2, k] = math.sqrt(max(square / n - mean * mean, 0.0))
    return out


def _nid(prepared: Levels, levels: np.ndarray) -> np.ndarray:
    """NID features (2.5-D and 3-D x 3 sizes x 5): level against the mean of its neighbours in the ROI (IBSI 3.10)."""
    inside = levels > 0
    level = levels[inside]
    rank = np.searchsorted(prepared.values, level)
    n = len(prepared.values)

    def features(count: np.ndarray, total: np.ndarray) -> np.ndarray:
        neighbours = count[inside] - 1
        some = neighbours > 0
        neighbours, own, of_level = neighbours[some], level[some], rank[some]
        difference = np.abs(own - (total[inside][some] - own) / neighbours)
        summed = np.bincount(of_level, weights=difference, minlength=n)
        return ngtdm_features(prepared.values, summed, np.bincount(of_level, minlength=n).astype(np.float64))

    rows = []
    for size in NID_SIZES:
        in_plane = [_box_sum(image, size, (1, 2)) for image in (inside.astype(np.int32), levels)]
        rows.append((features(*in_plane), features(*[_box_sum(image, size, (0,)) for image in in_plane])))
    return np.array(rows).transpose(1, 0, 2).ravel()


def _box_sum(image: np.ndarray, size: int, axes: Sequence[int]) -> np.ndarray:
    """Sum of an int32 image over a box of `size` voxels along each of the axes, 0 outside the image."""
    for axis in axes:
        around = [(0, 0)] * 3
        around[axis] = (size // 2 + 1, size // 2)
        running = np.cumsum(np.pad(image, around), axis=axis, dtype=np.int32)  # 1,024 x 7 x 7 x 40,000 voxels fit
        upper: list[slice] = [slice(None)] * 3
        lower = list(upper)
        upper[axis], lower[axis] = slice(size, None), slice(None, -size)
        image = running[tuple(upper)] - running[tuple(lower)]
    return image
