"""Texture features of matrices, each family once, under short names that PyRadiomics' and IBSI's names map to.

Source: Zwanenburg et al., Image biomarker standardisation initiative, reference manual (arXiv 1612.07003), chapter 3.
"""

from __future__ import annotations

import math

import numpy as np

from harmonict.radiomics.jit import compiled

GLCM_NAMES = (
    "joint_max joint_avg joint_var joint_entr diff_avg diff_var diff_entr sum_avg sum_var sum_entr energy contrast "
    "dissimilarity inv_diff inv_diff_norm inv_diff_mom inv_diff_mom_norm inv_var corr auto_corr clust_tend "
    "clust_shade clust_prom info_corr1 info_corr2"
).split()
SIZE_NAMES = (
    "small large low high small_low small_high large_low large_high level_nonuniformity level_nonuniformity_norm "
    "size_nonuniformity size_nonuniformity_norm percentage level_variance size_variance entropy energy"
).split()
NGTDM_NAMES = "coarseness contrast busyness complexity strength".split()


@compiled
def _glcm(counts, values, ng):
    """(k, 25) of symmetric counts (k, n, n); rows of `values` are grey levels; NaN where a matrix is empty."""
    k, n = counts.shape[0], counts.shape[1]
    out = np.full((k, 25), np.nan)
    span = values[n - 1] - values[0] + 1
    for a in range(k):
        total = 0.0
        marginal = np.zeros(n)
        for i in range(n):
            for j in range(n):
                marginal[i] += counts[a, i, j]
            total += marginal[i]
        if total == 0.0:
            continue
        mean = 0.0
        entropy_x = 0.0
        for i in range(n):
            marginal[i] /= total
            mean += marginal[i] * values[i]
            if marginal[i] > 0.0:
                entropy_x -= marginal[i] * math.log2(marginal[i])
        variance = 0.0
        for i in range(n):
            variance += marginal[i] * (values[i] - mean) ** 2
        difference = np.zeros(span)
        addition = np.zeros(2 * span)
        largest = entropy = energy = auto = covariance = 0.0
        for i in range(n):
            for j in range(i + 1):
                c = counts[a, i, j]
                if c == 0.0:
                    continue
                p = c / total
                times = 1.0 if i == j else 2.0
                if p > largest:
                    largest = p
                entropy -= times * p * math.log2(p)
                energy += times * p * p
                auto += times * p * values[i] * values[j]
                covariance += times * p * (values[i] - mean) * (values[j] - mean)
                difference[values[i] - values[j]] += times * p
                addition[values[i] + values[j] - 2 * values[0]] += times * p
        diff_avg = diff_entr = contrast = inv = inv_n = inv_m = inv_mn = inv_var = 0.0
        for d in range(span):
            p = difference[d]
            if p == 0.0:
                continue
            diff_avg += d * p
            contrast += d * d * p
            diff_entr -= p * math.log2(p)
            inv += p / (1.0 + d)
            inv_n += p / (1.0 + d / ng)
            inv_m += p / (1.0 + d * d)
            inv_mn += p / (1.0 + (d / ng) ** 2)
            if d > 0:
                inv_var += p / (d * d)
        diff_var = 0.0
        for d in range(span):
            diff_var += difference[d] * (d - diff_avg) ** 2
        sum_avg = sum_entr = tendency = shade = prominence = 0.0
        for s in range(2 * span):
            p = addition[s]
            if p == 0.0:
                continue
            level = s + 2 * values[0]
            centred = level - 2.0 * mean
            sum_avg += level * p
            sum_entr -= p * math.log2(p)
            tendency += centred**2 * p
            shade += centred**3 * p
            prominence += centred**4 * p
        information = 2.0 * entropy_x - entropy
        if information < 1e-12:  # bits; independent levels up to rounding
            information = 0.0
        out[a, 0] = largest
        out[a, 1] = mean
        out[a, 2] = variance
        out[a, 3] = entropy
        out[a, 4] = diff_avg
        out[a, 5] = diff_var
        out[a, 6] = diff_entr
        out[a, 7] = sum_avg
        out[a, 8] = tendency
        out[a, 9] = sum_entr
        out[a, 10] = energy
        out[a, 11] = contrast
        out[a, 12] = diff_avg
        out[a, 13] = inv
        out[a, 14] = inv_n
        out[a, 15] = inv_m
        out[a, 16] = inv_mn
        out[a, 17] = inv_var
        out[a, 18] = covariance / variance if variance > 0.0 else 1.0
        out[a, 19] = auto
        out[a, 20] = tendency
        out[a, 21] = shade
        out[a, 22] = prominence
        out[a, 23] = -information / entropy_x if entropy_x > 0.0 else 0.0
        out[a, 24] = math.sqrt(1.0 - math.exp(-2.0 * information))
    return out


def glcm_features(counts: np.ndarray, values: np.ndarray, ng: int) -> np.ndarray:
    """(k, 25) features, columns GLCM_NAMES, of symmetric counts (k, n, n) (IBSI 3.6).

    values: (n,) grey levels of the rows. ng: number of grey levels, for the normalised inverse differences. A matrix
    without any pair gives a row of NaN: average with `mean_rows`. A constant ROI has correlation 1.
    """
    return _glcm(np.ascontiguousarray(counts, np.float64), np.asarray(values, np.int64), float(ng))


def maximal_correlation(counts: np.ndarray) -> np.ndarray:
    """(k,) maximal correlation coefficient of symmetric counts (k, n, n); 1 for a single grey level, NaN if empty.

    It is the second singular value of p(i, j) / sqrt(p(i) p(j)), whose largest is 1.
    """
    if counts.shape[1] < 2:
        return np.ones(len(counts))
    total = counts.sum(axis=(1, 2))
    marginal = counts.sum(axis=2)
    weight = np.sqrt(np.where(marginal > 0, marginal, 1.0))
    scaled = counts / (weight[:, :, None] * weight[:, None, :])
    eigen = np.sort(np.abs(np.linalg.eigvalsh(scaled)), axis=1)
    return np.where(total > 0, eigen[:, -2], np.nan)


def size_features(
    counts: np.ndarray, levels: np.ndarray, sizes: np.ndarray, voxels: np.ndarray | None = None
) -> np.ndarray:
    """(k, 17) features, columns SIZE_NAMES, of counts (k, n, m) over grey level and run length, zone size, zone
    distance or dependence (IBSI 3.7 to 3.9, 3.11).

    levels: (n,). sizes: (m,). voxels: (k,) number of voxels that the counts stand for; None: sum of count x size.
    """
    p = np.asarray(counts, np.float64)
    i2, j2 = levels.astype(np.float64) ** 2, sizes.astype(np.float64) ** 2
    by_level, by_size = p.sum(axis=2), p.sum(axis=1)
    total = by_level.sum(axis=1)
    if voxels is None:
        voxels = by_size @ sizes.astype(np.float64)
    over_level_low, over_level_high = (1 / i2) @ p, i2 @ p  # (k, m)
    q = p / total[:, None, None]
    log = np.zeros_like(q)
    np.log2(q, out=log, where=q > 0)

    def variance(marginal: np.ndarray, value: np.ndarray) -> np.ndarray:
        weight = marginal / total[:, None]
        mean = weight @ value
        return (weight * (value - mean[:, None]) ** 2).sum(axis=1)

    out = np.empty((len(p), len(SIZE_NAMES)))
    out[:, 0] = by_size @ (1 / j2)
    out[:, 1] = by_size @ j2
    out[:, 2] = by_level @ (1 / i2)
    out[:, 3] = by_level @ i2
    out[:, 4] = over_level_low @ (1 / j2)
    out[:, 5] = over_level_high @ (1 / j2)
    out[:, 6] = over_level_low @ j2
    out[:, 7] = over_level_high @ j2
    out[:, 8] = (by_level**2).sum(axis=1)
    out[:, 9] = out[:, 8] / total
    out[:, 10] = (by_size**2).sum(axis=1)
    out[:, 11] = out[:, 10] / total
    out[:, :12] /= total[:, None]
    out[:, 12] = total / voxels
    out[:, 13] = variance(by_level, levels.astype(np.float64))
    out[:, 14] = variance(by_size, sizes.astype(np.float64))
    out[:, 15] = -(q * log).sum(axis=(1, 2))
    out[:, 16] = (q**2).sum(axis=(1, 2))
    return out


@compiled
def _level_pairs(i, p, s):
    """Sums over all pairs of levels that NGTDM's contrast, busyness, complexity and strength need."""
    contrast = busyness = complexity = strength = 0.0
    for a in range(i.size):
        for b in range(a):
            gap = abs(i[a] - i[b])
            both = p[a] + p[b]
            contrast += 2.0 * p[a] * p[b] * gap * gap
            busyness += 2.0 * abs(i[a] * p[a] - i[b] * p[b])
            complexity += 2.0 * gap * (p[a] * s[a] + p[b] * s[b]) / both
            strength += 2.0 * both * gap * gap
    return contrast, busyness, complexity, strength


def ngtdm_features(levels: np.ndarray, difference: np.ndarray, count: np.ndarray) -> np.ndarray:
    """(5,) coarseness, contrast, busyness, complexity, strength (IBSI 3.10).

    levels: (n,) grey levels. difference: (n,) summed difference to the neighbourhood mean. count: (n,) voxels counted.
    A flat ROI has coarseness 1e6 and 0 else.
    """
    present = count > 0
    i, s, total = levels[present].astype(np.float64), difference[present], count.sum()
    if not total:
        return np.array([1e6, 0.0, 0.0, 0.0, 0.0])
    p = count[present] / total
    n, weighted = len(i), float(p @ s)
    if n < 2 or weighted == 0.0:
        return np.array([1 / weighted if weighted else 1e6, 0.0, 0.0, 0.0, 0.0])
    contrast, spread, complexity, strength = _level_pairs(i, p, s)
    return np.array(
        [
            1 / weighted,
            contrast / (n * (n - 1)) * s.sum() / total,
            weighted / spread if spread else 0.0,
            complexity / total,
            strength / s.sum(),
        ]
    )


def mean_rows(rows: np.ndarray) -> np.ndarray:
    """Mean over the rows that are not NaN; NaN where none is."""
    kept = rows[~np.isnan(rows[:, 0])]
    return kept.mean(axis=0) if len(kept) else np.full(rows.shape[1], np.nan)
