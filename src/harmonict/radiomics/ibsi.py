"""The IBSI-1 feature families under the tags of the reference table, for one ROI.

Tags: family, feature, then for textures the distance, `_2d_avg`, `_2d_s_mrg`, `_2.5d_d_mrg`, `_2.5d_v_mrg`, `_3d_avg`,
`_3d_v_mrg` (GLCM, GLRLM) or `_2d`, `_2.5d`, `_3d` (the others), then the discretisation, `_fbs_w25.0` or `_fbn_n32`.
Source: Zwanenburg et al., IBSI reference manual (arXiv 1612.07003); section numbers below are the manual's.
"""

from __future__ import annotations

import numpy as np
from scipy import fft
from scipy.signal import fftconvolve
from scipy.spatial import ConvexHull
from scipy.special import eval_legendre

from harmonict.core import HarmonictError
from harmonict.radiomics.discretise import bins_by_width, check_roi, level_image, resample, resegment
from harmonict.radiomics.features import FeatureSettings, discretise
from harmonict.radiomics.formulas import (
    GLCM_NAMES,
    NGTDM_NAMES,
    glcm_features,
    mean_rows,
    ngtdm_features,
    size_features,
)
from harmonict.radiomics.matrices import (
    all_offsets,
    border_distance,
    directions,
    glcm_matrices,
    glrlm_matrices,
    neighbourhood_matrices,
    prepare,
    zone_matrix,
    zones,
)
from harmonict.radiomics.mesh import mesh_area_volume, mesh_diameters, mesh_points
from harmonict.radiomics.shape import axis_lengths

Spacing = tuple[float, float, float]
PEAK_RADIUS_MM = (3 / (4 * np.pi)) ** (1 / 3) * 10  # a sphere of 1 cm3

SIZE_TAGS = {
    "rlm": "sre lre lgre hgre srlge srhge lrlge lrhge glnu glnu_norm rlnu rlnu_norm r_perc gl_var rl_var rl_entr",
    "szm": "sze lze lgze hgze szlge szhge lzlge lzhge glnu glnu_norm zsnu zsnu_norm z_perc gl_var zs_var zs_entr",
    "dzm": "sde lde lgze hgze sdlge sdhge ldlge ldhge glnu glnu_norm zdnu zdnu_norm z_perc gl_var zd_var zd_entr",
    "ngl": "lde hde lgce hgce ldlge ldhge hdlge hdhge glnu glnu_norm dcnu dcnu_norm dc_perc gl_var dc_var dc_entr "
    "dc_energy",
}


def morphology(hu: np.ndarray, mask: np.ndarray, intensity_mask: np.ndarray, spacing_mm: Spacing) -> dict[str, float]:
    """Section 3.1: shape from `mask`, centre of mass shift, integrated intensity, Moran's I and Geary's C."""
    spacing = np.asarray(spacing_mm)
    where = np.argwhere(mask)
    lo, hi = where.min(axis=0), where.max(axis=0) + 1
    small = mask[tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))]
    area, volume = mesh_area_volume(small, spacing_mm)
    if volume <= 0:
        raise HarmonictError("the ROI is so scattered that its surface encloses no volume: take a larger ROI")
    inside = np.argwhere(intensity_mask)
    values = hu[intensity_mask].astype(np.float64)
    sphere = (36 * np.pi * volume**2) ** (1 / 3)  # surface of the sphere of this volume
    shift = (where.mean(axis=0) - values @ inside / values.sum()) * spacing if values.sum() else np.zeros(3)
    # the reference values of the digital phantom follow the sample covariance, PyRadiomics the population's
    major, minor, least = axis_lengths(where * spacing) * np.sqrt(len(where) / (len(where) - 1))
    edges = (hi - lo) * spacing
    hull = ConvexHull(mesh_points(small) * spacing / 2)
    ellipsoid = 4 / 3 * np.pi * major * minor * least / 8  # 0 for a flat ROI, whose densities are given as 0
    moran, geary = spatial_autocorrelation(values, inside, spacing)
    return {
        "morph_volume": volume,
        "morph_vol_approx": float(len(where) * spacing.prod()),
        "morph_area_mesh": area,
        "morph_av": area / volume,
        "morph_comp_1": volume / (np.sqrt(np.pi) * area**1.5),
        "morph_comp_2": 36 * np.pi * volume**2 / area**3,
        "morph_sph_dispr": area / sphere,
        "morph_sphericity": sphere / area,
        "morph_asphericity": area / sphere - 1,
        "morph_com": float(np.linalg.norm(shift)),
        "morph_diam": mesh_diameters(small, spacing_mm)[3],
        "morph_pca_maj_axis": major,
        "morph_pca_min_axis": minor,
        "morph_pca_least_axis": least,
        "morph_pca_elongation": minor / major,
        "morph_pca_flatness": least / major,
        "morph_vol_dens_aabb": volume / edges.prod(),
        "morph_area_dens_aabb": area / (2 * (edges * np.roll(edges, 1)).sum()),
        "morph_vol_dens_aee": volume / ellipsoid if ellipsoid else 0.0,
        "morph_area_dens_aee": area / _ellipsoid_area(major / 2, minor / 2, least / 2) if ellipsoid else 0.0,
        "morph_vol_dens_conv_hull": volume / hull.volume,
        "morph_area_dens_conv_hull": area / hull.area,
        "morph_integ_int": float(values.mean() * volume),
        "morph_moran_i": moran,
        "morph_geary_c": geary,
    }


def _ellipsoid_area(a: float, b: float, c: float) -> float:
    """IBSI's "surface" of the ellipsoid with semi-axes a >= b >= c: 21 terms of a Legendre series (3.1.17).

    The manual's alpha and beta are not those for which the series gives the ellipsoid's surface (it is right for a
    sphere only, 4 % low for the digital phantom); the reference values follow it, so it stands.
    """
    alpha, beta = np.sqrt(1 - b * b / a / a), np.sqrt(1 - c * c / a / a)
    if alpha * beta == 0:  # the series' limit: every term but the first vanishes with alpha
        order = np.arange(21)
        # (alpha beta)^v P_v(x) -> (2v choose v) / 4^v beta^(2v) as alpha -> 0
        factor = np.cumprod(np.concatenate([[1.0], (2 * order[1:] - 1) / (2 * order[1:])]))
        return float(4 * np.pi * a * b * (beta ** (2 * order) * factor / (1 - 4 * order**2)).sum())
    order = np.arange(21)
    terms = (alpha * beta) ** order / (1 - 4 * order**2)
    terms = terms * eval_legendre(order, (alpha**2 + beta**2) / (2 * alpha * beta))
    return float(4 * np.pi * a * b * terms.sum())


def spatial_autocorrelation(values: np.ndarray, where: np.ndarray, spacing_mm: np.ndarray) -> tuple[float, float]:
    """Moran's I and Geary's C (3.1.21, 3.1.22), weights 1 / distance between all pairs of voxels.

    values: (n,). where: (n, 3) voxel indices. The sums over pairs are correlations, taken by FFT on the bounding box.
    A constant ROI has I = 0 and C = 1 (no correlation to be found).
    """
    centred = values - values.mean()
    n, power = len(values), float(centred @ centred)
    if power == 0.0 or n < 2:
        return 0.0, 1.0
    where = where - where.min(axis=0)
    shape = where.max(axis=0) + 1
    size = tuple(fft.next_fast_len(int(2 * s - 1), real=True) for s in shape)
    grid = [np.minimum(np.arange(m), m - np.arange(m)) * s for m, s in zip(size, spacing_mm, strict=True)]
    square = grid[0][:, None, None] ** 2 + grid[1][None, :, None] ** 2 + grid[2][None, None, :] ** 2
    square[0, 0, 0] = np.inf
    weight = fft.rfftn(1 / np.sqrt(square))
    signal, ones = np.zeros(size), np.zeros(size)
    signal[tuple(where.T)], ones[tuple(where.T)] = centred, 1.0
    around = fft.irfftn(weight * fft.rfftn(signal), s=size)[tuple(where.T)]
    reach = fft.irfftn(weight * fft.rfftn(ones), s=size)[tuple(where.T)]
    total = reach.sum()
    cross = float(centred @ around)
    moran = n / total * cross / power
    geary = (n - 1) / (2 * total) * 2 * (float(reach @ centred**2) - cross) / power
    return float(moran), float(geary)


def local_intensity(hu: np.ndarray, intensity_mask: np.ndarray, spacing_mm: Spacing) -> dict[str, float]:
    """Section 3.2: mean HU in a sphere of 1 cm3 around the brightest voxel, and its largest value over the ROI.

    The sphere takes all voxels of the image, inside and outside the ROI.
    """
    spacing = np.asarray(spacing_mm)
    reach = np.floor(PEAK_RADIUS_MM / spacing).astype(int)
    where = np.argwhere(intensity_mask)
    lo = np.maximum(where.min(axis=0) - reach, 0)
    hi = np.minimum(where.max(axis=0) + 1 + reach, hu.shape)
    box = tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))
    image, inside = hu[box].astype(np.float64), intensity_mask[box]
    grid = np.meshgrid(*(np.arange(-r, r + 1) * s for r, s in zip(reach, spacing, strict=True)), indexing="ij")
    ball = (sum(g**2 for g in grid) <= PEAK_RADIUS_MM**2).astype(np.float64)
    means = fftconvolve(image, ball, mode="same") / np.round(fftconvolve(np.ones_like(image), ball, mode="same"))
    brightest = inside & (image == image[inside].max())
    return {"loc_peak_loc": float(means[brightest].max()), "loc_peak_glob": float(means[inside].max())}


def statistics(values: np.ndarray) -> dict[str, float]:
    """Section 3.3: 18 statistics of the ROI's values (1-D). Kurtosis is excess kurtosis."""
    x = values.astype(np.float64)
    p10, p25, median, p75, p90 = np.percentile(x, (10, 25, 50, 75, 90))
    mean = x.mean()
    centred = x - mean
    variance = (centred**2).mean()
    robust = x[(x >= p10) & (x <= p90)]
    energy = (x**2).sum()
    return {
        "mean": mean,
        "var": variance,
        "skew": (centred**3).mean() / variance**1.5 if variance > 0 else 0.0,
        "kurt": (centred**4).mean() / variance**2 - 3 if variance > 0 else 0.0,
        "median": median,
        "min": x.min(),
        "p10": p10,
        "p90": p90,
        "max": x.max(),
        "iqr": p75 - p25,
        "range": x.max() - x.min(),
        "mad": np.abs(centred).mean(),
        "rmad": np.abs(robust - robust.mean()).mean() if len(robust) else 0.0,  # two voxels: none lies between
        "medad": np.abs(x - median).mean(),
        "cov": np.sqrt(variance) / mean if mean else 0.0,
        "qcod": (p75 - p25) / (p75 + p25) if p75 + p25 else 0.0,
        "energy": energy,
        "rms": np.sqrt(energy / len(x)),
    }


def intensity_histogram(levels: np.ndarray, count: int) -> dict[str, float]:
    """Section 3.4: 23 features of the histogram of grey levels 1..count."""
    out = statistics(levels)
    del out["energy"], out["rms"]
    histogram = np.bincount(levels, minlength=count + 1)[1:].astype(np.float64)
    share = histogram[histogram > 0] / len(levels)
    modes = np.flatnonzero(histogram == histogram.max()) + 1
    gradient = np.gradient(histogram) if count > 1 else np.zeros(1)
    return out | {
        "mode": float(modes[np.abs(modes - out["mean"]).argmin()]),
        "entropy": float(-(share * np.log2(share)).sum()) + 0.0,
        "uniformity": float((share**2).sum()),
        "max_grad": gradient.max(),
        "max_grad_g": float(gradient.argmax() + 1),
        "min_grad": gradient.min(),
        "min_grad_g": float(gradient.argmin() + 1),
    }


def intensity_volume_histogram(values: np.ndarray, settings: FeatureSettings) -> dict[str, float]:
    """Section 3.5: volume fractions V10, V90 and intensities I10, I90.

    Discretised by ivh_bin_width (intensities at bin centres) or ivh_bin_count (intensities are bin numbers); with
    neither, the whole HU themselves. The intensity fraction spans the resegmentation range where one is set with a bin
    width or none, else the ROI's own range.
    """
    x = values.astype(np.float64)
    limits = settings.resegment_hu
    if settings.ivh_bin_count is not None:
        low, high, step = 1.0, float(settings.ivh_bin_count), 1.0
        width = (x.max() - x.min()) / settings.ivh_bin_count
        x = np.minimum(np.floor((x - x.min()) / width) + 1, high) if width else np.ones_like(x)
    elif settings.ivh_bin_width is not None:
        step = settings.ivh_bin_width
        start = limits[0] if limits else x.min()
        stop = limits[1] if limits else x.max()
        x = start + (bins_by_width(x, step, start) - 0.5) * step
        low, high = start + 0.5 * step, max(stop - 0.5 * step, float(x.max()))
    else:
        low, high = limits if limits else (x.min(), x.max())
        step = 1.0
    grey = low + np.arange(round(float(high - low) / step) + 1) * step
    ordered = np.sort(x)
    volume = 1 - np.searchsorted(ordered, grey - step / 4, side="left") / len(x)  # share of voxels at or above
    fraction = (grey - low) / (high - low) if high > low else np.zeros(1)

    def v(percent: float) -> float:
        return float(volume[fraction >= percent / 100 - 1e-12].max(initial=0.0))

    def i(percent: float) -> float:
        return float(grey[volume <= percent / 100].min(initial=grey[-1] + step))

    out = {"v10": v(10), "v90": v(90), "i10": i(10), "i90": i(90)}
    return out | {"diff_v10_v90": out["v10"] - out["v90"], "diff_i10_i90": out["i10"] - out["i90"]}


def _slices(image: np.ndarray) -> list[np.ndarray]:
    return [image[k : k + 1] for k in range(len(image)) if image[k].any()]


def _glcm_glrlm(image: np.ndarray, ng: int, dimensions: tuple[str, ...], distance: int) -> dict[str, float]:
    out: dict[str, float] = {}

    def put(suffix: str, glcm_rows: np.ndarray, glrlm_rows: np.ndarray) -> None:
        glcm, glrlm = mean_rows(glcm_rows), mean_rows(glrlm_rows)
        if np.isnan(glcm[0]):
            raise HarmonictError(
                f"no two voxels of the ROI are neighbours at distance {distance}: the GLCM is empty; take a larger ROI"
            )
        out.update({f"cm_{k}_d{distance}{suffix}": v for k, v in zip(GLCM_NAMES, glcm, strict=True)})
        out.update({f"rlm_{k}{suffix}": v for k, v in zip(SIZE_TAGS["rlm"].split(), glrlm, strict=False)})

    def rows(part: np.ndarray, dimension: str) -> tuple[np.ndarray, ...]:
        levels = prepare(part, distance)
        offsets = directions(dimension) * distance
        together = glcm_matrices(levels, offsets)
        runs, _ = glrlm_matrices(levels, directions(dimension))
        lengths = np.arange(1, runs.shape[2] + 1)
        return (
            glcm_features(together, levels.values, ng),
            size_features(runs, levels.values, lengths),
            glcm_features(together.sum(axis=0, keepdims=True), levels.values, ng),
            size_features(runs.sum(axis=0, keepdims=True), levels.values, lengths),
        )

    if "2D" in dimensions:
        each = [np.concatenate(r) for r in zip(*(rows(part, "2D") for part in _slices(image)), strict=True)]
        put("_2d_avg", each[0], each[1])
        put("_2d_s_mrg", each[2], each[3])
    if "2.5D" in dimensions:
        whole = rows(image, "2D")
        put("_2.5d_d_mrg", whole[0], whole[1])
        put("_2.5d_v_mrg", whole[2], whole[3])
    if "3D" in dimensions:
        whole = rows(image, "3D")
        put("_3d_avg", whole[0], whole[1])
        put("_3d_v_mrg", whole[2], whole[3])
    return out


def _zones_and_neighbours(
    image: np.ndarray, mask: np.ndarray, dimensions: tuple[str, ...], alpha: float
) -> dict[str, float]:
    out: dict[str, float] = {}

    def features(part: np.ndarray, border: np.ndarray, dimension: str) -> dict[str, np.ndarray]:
        levels = prepare(part)
        offsets = all_offsets(dimension)
        rows, sizes, distance = zones(levels, offsets, border)
        n = len(levels.values)
        by_size, size_values = zone_matrix(rows, sizes, n)
        by_distance, distance_values = zone_matrix(rows, distance, n)
        dependence, difference, counted = neighbourhood_matrices(levels, offsets, alpha)
        voxels = np.array([float(len(levels.voxels))])
        return {
            "szm": size_features(by_size[None], levels.values, size_values)[0],
            "dzm": size_features(by_distance[None], levels.values, distance_values, voxels)[0],
            "ngt": ngtdm_features(levels.values, difference, counted),
            "ngl": size_features(dependence[None], levels.values, np.arange(1, len(offsets) + 2), voxels)[0],
        }

    def put(suffix: str, found: list[dict[str, np.ndarray]]) -> None:
        for family in ("szm", "dzm", "ngt", "ngl"):
            row = np.mean([f[family] for f in found], axis=0)
            names = NGTDM_NAMES if family == "ngt" else SIZE_TAGS[family].split()
            more = f"_d1_a{float(alpha)}" if family == "ngl" else ""
            out.update({f"{family}_{k}{more}{suffix}": v for k, v in zip(names, row, strict=False)})

    in_plane = border_distance(mask, in_plane=True) if {"2D", "2.5D"} & set(dimensions) else None
    if "2D" in dimensions:
        kept = [k for k in range(len(image)) if image[k].any()]
        put("_2d", [features(image[k : k + 1], in_plane[k : k + 1], "2D") for k in kept])  # type: ignore[index]
    if "2.5D" in dimensions:
        put("_2.5d", [features(image, in_plane, "2D")])  # type: ignore[arg-type]
    if "3D" in dimensions:
        put("_3d", [features(image, border_distance(mask, in_plane=False), "3D")])
    return out


def ibsi_features(
    hu: np.ndarray,
    mask: np.ndarray,
    spacing_mm: Spacing,
    settings: FeatureSettings = FeatureSettings(),
    *,
    dimensions: tuple[str, ...] | None = None,
) -> dict[str, float]:
    """The IBSI-1 features of one ROI under the reference table's tags.

    hu: (z, y, x). mask: (z, y, x), bool or 0 / 1. spacing_mm: (z, y, x). dimensions: of "2D", "2.5D", "3D"; None: "2D"
    and "2.5D" where settings.dimension is "2D", else "3D". The order is IBSI's: resample, round to whole HU,
    resegment, discretise. Morphology uses the mask before resegmentation. Of the settings, `families`, `filters` and
    `merge_directions` are not used: all families of the unfiltered image come, merged and averaged; the GLCM looks
    `distances[0]` steps along each direction.

    Raises HarmonictError as `extract_features` does.
    """
    mask = check_roi(hu, mask)
    spacing: Spacing = (float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2]))
    if settings.resample_mm is not None:
        finest = min(n if n > 0 else s for n, s in zip(settings.resample_mm, spacing, strict=True))
        margin = int(np.ceil(PEAK_RADIUS_MM / finest))
        hu, mask, spacing = resample(
            hu, mask, spacing, settings.resample_mm, order=settings.resample_order, margin=margin
        )
    if int(mask.sum()) < 2:
        raise HarmonictError("the ROI holds one voxel: texture and shape need at least 2, take a larger ROI")
    intensity_mask = resegment(hu, mask, range_hu=settings.resegment_hu, outlier_sigma=settings.resegment_sigma)
    values = hu[intensity_mask].astype(np.float64)
    start = None
    suffix = ""
    if settings.bin_count is not None:
        suffix = f"_fbn_n{settings.bin_count}"
    elif settings.bin_width is not None:
        suffix = f"_fbs_w{float(settings.bin_width)}"
        start = settings.resegment_hu[0] if settings.resegment_hu else float(values.min())
    levels = discretise(values, settings, start)
    ng = int(levels.max())
    where = np.argwhere(mask)
    box = tuple(slice(a, b) for a, b in zip(where.min(axis=0), where.max(axis=0) + 1, strict=True))
    image = level_image(levels, intensity_mask)[box]
    wanted = dimensions or (("2D", "2.5D") if settings.dimension == "2D" else ("3D",))
    out = morphology(hu, mask, intensity_mask, spacing)
    out |= local_intensity(hu, intensity_mask, spacing)
    out |= {f"stat_{k}": v for k, v in statistics(values).items()}
    out |= {f"ih_{k}{suffix}": v for k, v in intensity_histogram(levels, ng).items()}
    out |= {f"ivh_{k}": v for k, v in intensity_volume_histogram(values, settings).items()}
    texture = _glcm_glrlm(image, ng, wanted, settings.distances[0])
    texture |= _zones_and_neighbours(image, mask[box], wanted, settings.dependence_alpha)
    out |= {k + suffix: v for k, v in texture.items()}
    return {k: float(v) for k, v in out.items()}
