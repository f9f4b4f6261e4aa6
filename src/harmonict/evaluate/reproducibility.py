"""Do features agree with the standard protocol? Tables from a feature table; `reproduce` makes them all.

Rows of the feature table (`harmonict.radiomics.table`) with one (patient, roi) are renditions of one region; `target`
names the scan that is the standard, every other scan (before, after, another method) is held against it. Rows whose
ROI is "image" or starts with "image " are the whole-image level, all others the ROI level.

Two numbers are called CCC in the literature. `ccc_over_rois`: one feature, its values over the ROIs against the
target's; this is Lin's coefficient as it is meant. `ccc_over_features`: one ROI, the values of all features of a class
against the target's, as the papers of this field print it; it is ruled by the feature with the largest numbers and can
be near 1 when most of the class is wrong. They always stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from harmonict import metrics
from harmonict.core import HarmonictError
from harmonict.evaluate import biology
from harmonict.radiomics.table import check_features, feature_classes

CCC_ABOVE = 0.85
RE_BELOW = 0.15
CURVE_THRESHOLDS = tuple(np.round(np.arange(0, 1.0001, 0.01), 2))
INTERVAL = (2.5, 97.5)  # percentiles of the bootstrap

# STAN-CT's five, as scikit-image (and the paper's names) define them, in PyRadiomics' features
STAN_CT_FEATURES = {
    "dissimilarity": ("DifferenceAverage", None),
    "contrast": ("Contrast", None),
    "homogeneity": ("Idm", None),
    "energy": ("JointEnergy", np.sqrt),
    "correlation": ("Correlation", None),
}


@dataclass(frozen=True)
class Reproduction:
    """The tables of `reproduce`; each has the columns `level` ("roi" or "image") and `scan` first.

    summary: one row per scan, the table that ranks methods. Columns: patients, rois (pairs compared), unpaired (rows
        without partner), features, ccc_over_rois_mean, ccc_over_features_mean, reproducible_ccc and reproducible_re
        (numbers of features), re_median; for the first, third and fourth `_low` and `_high`, a 95 % bootstrap interval
        over patients (empty for one patient); between_patient_share (median over features) and, with labels,
        separation_auc, each with its `_target` value; see `harmonict.evaluate.biology`.
    classes: one row per scan and feature class with the same figures: features, ccc_over_rois_mean and _sd over the
        features, ccc_over_features_mean and _sd over the ROIs, reproducible_ccc, reproducible_re, re_median.
    features: one row per scan and feature: class, ccc_over_rois, re_mean, re_median, icc21, wcv, repeatability, bias,
        loa_lower, loa_upper (Bland-Altman), reproducible_ccc, reproducible_re, stable (both).
    curve: DiffusionCT's figure 4: scan, re (threshold), features (how many have a mean relative error up to it).
    glcm: STAN-CT's eq 8: scan, feature, error_mean, error_sd over ROIs; no rows where the GLCM features are not there.
    """

    summary: pd.DataFrame
    classes: pd.DataFrame
    features: pd.DataFrame
    curve: pd.DataFrame
    glcm: pd.DataFrame


def reproduce(
    features: pd.DataFrame,
    target: str,
    *,
    rng: np.random.Generator,
    bootstraps: int = 1000,
    class_map: Mapping[str, str] | None = None,
    labels: Mapping | None = None,
) -> Reproduction:
    """Hold every scan of a feature table against the scan `target`.

    A feature is reproducible where its CCC over ROIs is above 0.85, and where the mean over ROIs of its relative error
    is below 0.15. labels: known classes for `biology.separation`. Figures that need two ROIs are empty where a level
    has one. Shape features that are the same in every scan, because the mask is, say nothing and are left out.
    Raises HarmonictError where the target is not a scan of the table or shares no region with any other.
    """
    table = check_features(features)
    _need_scans(table, target)
    classes = feature_classes(list(table.columns), class_map)
    table = table.drop(columns=_idle_shape(table, classes))
    classes = classes[table.columns]
    tables: dict[str, list[pd.DataFrame]] = {"summary": [], "classes": [], "features": [], "curve": [], "glcm": []}
    for level, part in _levels(table).items():
        if target not in part.index.unique("scan"):
            continue
        for scan in part.index.unique("scan"):
            if scan == target:
                continue
            ref, val, unpaired = _paired(part, target, scan)
            if len(ref) == 0:
                continue
            each = feature_agreement(ref, val, classes)
            over = _ccc_over_features(ref, val, classes)
            per_class = _class_table(each, over)
            total = _summary_row(ref, val, each, over, unpaired, rng, bootstraps)
            total |= _biology(part, scan, target, labels, class_map, rng)
            curve = pd.DataFrame({"re": CURVE_THRESHOLDS})
            curve["features"] = [int((each["re_mean"] <= t).sum()) for t in CURVE_THRESHOLDS]
            found = {
                "summary": pd.DataFrame([total]),
                "classes": per_class,
                "features": each,
                "curve": curve,
                "glcm": _glcm_errors(ref, val),
            }
            for name, one in found.items():
                one.insert(0, "level", level)
                one.insert(1, "scan", scan)
                tables[name].append(one)
    if not tables["summary"]:
        scans = ", ".join(table.index.unique("scan"))
        raise HarmonictError(f"no other scan has a region (patient, roi) of the target {target!r}; scans: {scans}")
    return Reproduction(**{name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()})


def feature_agreement(reference: pd.DataFrame, value: pd.DataFrame, classes: pd.Series) -> pd.DataFrame:
    """Agreement of each feature of two tables with the same rows (ROIs); columns as in `Reproduction.features`."""
    x, y = reference.to_numpy(), value.to_numpy()
    error = metrics.relative_error(x, y)
    n = len(x)
    nothing = np.full(x.shape[1], np.nan)
    within = (y - x) ** 2 / 2  # variance of two values
    middle = np.abs(x + y) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(within == 0, 0.0, within / middle**2)
    difference = y - x
    bias = difference.mean(0)
    sd = difference.std(0, ddof=1) if n > 1 else nothing
    table = pd.DataFrame(
        {
            "feature": reference.columns,
            "class": classes.loc[reference.columns].to_numpy(),
            "ccc_over_rois": ccc_columns(x, y) if n > 1 else nothing,
            "re_mean": error.mean(0),
            "re_median": np.median(error, axis=0),
            "icc21": [icc21(np.stack([a, b], 1)) for a, b in zip(x.T, y.T, strict=True)] if n > 1 else nothing,
            "wcv": np.sqrt(relative.mean(0)),
            "repeatability": 1.96 * np.sqrt(2) * np.sqrt(within.mean(0)),
            "bias": bias,
            "loa_lower": bias - 1.96 * sd,
            "loa_upper": bias + 1.96 * sd,
        }
    )
    table["reproducible_ccc"] = table["ccc_over_rois"] > CCC_ABOVE
    table["reproducible_re"] = table["re_mean"] < RE_BELOW
    table["stable"] = table["reproducible_ccc"] & table["reproducible_re"]
    return table


def ccc_columns(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`metrics.ccc` of each pair of columns of two arrays (rows, features), at once."""
    equal = (np.abs(x - y) <= 1e-12 * np.abs(y)).all(axis=0)
    scale = np.maximum(np.abs(x).max(0), np.abs(y).max(0))
    scale[scale == 0] = 1
    x, y = x / scale, y / scale
    mx, my = x.mean(0), y.mean(0)
    a, b = x - mx, y - my
    below = (a * a).mean(0) + (b * b).mean(0) + (mx - my) ** 2
    return np.where(equal, 1.0, 2 * (a * b).mean(0) / np.where(equal, 1.0, below))


def icc21(ratings: np.ndarray) -> float:
    """ICC(2,1) of an array (subjects, raters): two-way random effects, absolute agreement, one rating.

    Shrout and Fleiss 1979, case 2. Ratings that agree to 12 digits have 1, also where the subjects do not differ.
    Raises HarmonictError for fewer than two subjects or raters.
    """
    ratings = np.asarray(ratings, np.float64)
    if ratings.ndim != 2 or min(ratings.shape) < 2:
        raise HarmonictError(f"ICC(2,1) needs two subjects and two raters, got an array of {ratings.shape}")
    if np.allclose(ratings, ratings[:, :1], rtol=1e-12, atol=0):
        return 1.0
    n, k = ratings.shape
    ratings = ratings / np.abs(ratings).max()
    rows, columns, mean = ratings.mean(1), ratings.mean(0), ratings.mean()
    bms = k * np.sum((rows - mean) ** 2) / (n - 1)
    jms = n * np.sum((columns - mean) ** 2) / (k - 1)
    ems = np.sum((ratings - rows[:, None] - columns + mean) ** 2) / ((n - 1) * (k - 1))
    below = bms + (k - 1) * ems + k * (jms - ems) / n
    return float((bms - ems) / below)


def within_subject_cv(ratings: np.ndarray) -> float:
    """Within-subject coefficient of variation of an array (subjects, repeats): sqrt(mean(variance / mean^2)).

    The root-mean-square form of the QIBA (variance with n - 1); infinite where a subject varies about 0.
    """
    ratings = _repeats(ratings)
    variance, mean = ratings.var(1, ddof=1), ratings.mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.sqrt(np.mean(np.where(variance == 0, 0.0, variance / mean**2))))


def repeatability_coefficient(ratings: np.ndarray) -> float:
    """1.96 sqrt(2) within-subject SD of an array (subjects, repeats), in the unit of the ratings (Bland and Altman).

    Two readings of one subject differ by less than this in 95 % of cases. Between protocols the QIBA calls the same
    figure the reproducibility coefficient.
    """
    return float(1.96 * np.sqrt(2 * np.mean(_repeats(ratings).var(1, ddof=1))))


def compare_scans(
    features: pd.DataFrame, target: str, a: str, b: str, *, unit: str, class_map: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Is scan (method) `b` nearer to the target than `a`? A paired test for each feature, false discoveries controlled.

    For each unit, "patient" (mean over its ROIs) or "roi", the distance |value - target| of both is compared with
    Wilcoxon's signed-rank test, two-sided (zero differences left out); q is the p-value after Benjamini and Hochberg
    over the features. ROIs of one patient are not independent: with unit="roi" p-values are too small, so say so.
    Columns: feature, class, n, distance_a, distance_b (medians over units), p, q, nearer ("a", "b"; "" for q > 0.05).
    Raises HarmonictError for fewer than six units: no outcome could reach p < 0.05.
    """
    table = check_features(features)
    _need_scans(table, target, a, b)
    if unit not in ("patient", "roi"):
        raise HarmonictError(f"the unit of a test is 'patient' or 'roi', got {unit!r}")
    parts = [table.xs(s, level="scan") for s in (target, a, b)]
    common = parts[0].index.intersection(parts[1].index).intersection(parts[2].index)
    ref, one, two = (part.loc[common] for part in parts)
    distances = [(one - ref).abs(), (two - ref).abs()]
    if unit == "patient":
        distances = [d.groupby(level="patient").mean() for d in distances]
    da, db = (d.to_numpy() for d in distances)
    if len(da) < 6:
        raise HarmonictError(f"a paired test needs six {unit}s with {target}, {a} and {b}; there are {len(da)}")
    p = np.array([_signed_rank(x, y) for x, y in zip(da.T, db.T, strict=True)])
    result = pd.DataFrame(
        {
            "feature": table.columns,
            "class": feature_classes(list(table.columns), class_map).to_numpy(),
            "n": len(da),
            "distance_a": np.median(da, axis=0),
            "distance_b": np.median(db, axis=0),
            "p": p,
            "q": stats.false_discovery_control(p, method="bh"),
        }
    )
    signed = np.sign((da - db).mean(0))
    nearer = np.where(signed > 0, "b", np.where(signed < 0, "a", ""))
    result["nearer"] = np.where(result["q"] <= 0.05, nearer, "")
    return result


def compare_all_scans(
    features: pd.DataFrame, target: str, *, class_map: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """`compare_scans` for every two scans but the target: its columns behind scan_a, scan_b and unit.

    Patients are the unit where six of them have the scans, else ROIs (p-values then are too small, see there); scans
    with fewer than six ROIs in common are left out. Empty where nothing is left.
    """
    scans = [scan for scan in check_features(features).index.unique("scan") if scan != target]
    tables = []
    for a, b in combinations(scans, 2):
        for unit in ("patient", "roi"):
            try:
                found = compare_scans(features, target, a, b, unit=unit, class_map=class_map)
            except HarmonictError:
                continue
            found.insert(0, "scan_a", a)
            found.insert(1, "scan_b", b)
            found.insert(2, "unit", unit)
            tables.append(found)
            break
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["scan_a", "scan_b", "unit"])


def bland_altman_table(features: pd.DataFrame, target: str) -> pd.DataFrame:
    """`metrics.bland_altman` of every feature and scan against the target: scan, feature, n, bias, sd, lower, upper."""
    table = check_features(features)
    _need_scans(table, target)
    rows = []
    for scan in table.index.unique("scan"):
        if scan != target:
            ref, val, _ = _paired(table, target, scan)
            for name in ref.columns if len(ref) > 1 else ():
                rows.append({"scan": scan, "feature": name, **metrics.bland_altman(ref[name], val[name])._asdict()})
    if not rows:
        raise HarmonictError(f"no scan shares two regions (patient, roi) with the target {target!r}")
    return pd.DataFrame(rows)


def write_stable_features(reproduction: Reproduction, path: str | Path) -> pd.DataFrame:
    """Write the stable features (CCC over ROIs > 0.85 and mean RE < 0.15) of every scan as CSV, and return them."""
    columns = ["level", "scan", "feature", "class", "ccc_over_rois", "re_mean"]
    stable = reproduction.features.loc[reproduction.features["stable"], columns].reset_index(drop=True)
    try:
        stable.to_csv(path, index=False)
    except OSError as error:
        raise HarmonictError(f"cannot write {path}: {error.strerror}") from None
    return stable


def _need_scans(table: pd.DataFrame, *wanted: str) -> None:
    scans = table.index.unique("scan")
    for scan in wanted:
        if scan not in scans:
            raise HarmonictError(f"no row of the feature table is of scan {scan!r}; its scans: {', '.join(scans)}")


def _idle_shape(table: pd.DataFrame, classes: pd.Series) -> list[str]:
    """Shape features that no rendition of a region changes: they would count as reproducible whatever the images."""
    shape = table[[name for name in table if classes[name].startswith("shape")]]
    regions = shape.groupby(level=["patient", "roi"])
    moved = (regions.max() - regions.min() > 1e-9 * regions.max().abs()).any()
    idle = list(moved.index[~moved])
    return idle if len(idle) < table.shape[1] else []


def _levels(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    roi = table.index.get_level_values("roi")
    image = (roi == "image") | roi.str.startswith("image ")
    return {name: part for name, part in (("roi", table[~image]), ("image", table[image])) if len(part)}


def _paired(table: pd.DataFrame, target: str, scan: str) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Target and scan rows of the regions that both have, indexed (patient, roi), and how many rows had no partner."""
    ref, val = (
        table.xs(s, level="scan") if s in table.index.unique("scan") else table.iloc[:0] for s in (target, scan)
    )
    common = ref.index.intersection(val.index)
    return ref.loc[common], val.loc[common], len(ref) + len(val) - 2 * len(common)


def _ccc_over_features(ref: pd.DataFrame, val: pd.DataFrame, classes: pd.Series) -> pd.DataFrame:
    """Per ROI (rows) and class (columns) the CCC over the class's features; empty for a class of one feature."""
    out = {}
    for name in dict.fromkeys(classes):
        columns = (classes == name).to_numpy()
        x, y = ref.to_numpy()[:, columns].T, val.to_numpy()[:, columns].T
        out[name] = ccc_columns(x, y) if columns.sum() > 1 else np.full(len(ref), np.nan)
    return pd.DataFrame(out, index=ref.index)


def _class_table(each: pd.DataFrame, over: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for name, part in each.groupby("class", sort=False):
        rows.append(
            {
                "class": name,
                "features": len(part),
                "ccc_over_rois_mean": part["ccc_over_rois"].mean(),
                "ccc_over_rois_sd": part["ccc_over_rois"].std(ddof=1),
                "ccc_over_features_mean": over[name].mean(),
                "ccc_over_features_sd": over[name].std(ddof=1),
                "reproducible_ccc": int(part["reproducible_ccc"].sum()),
                "reproducible_re": int(part["reproducible_re"].sum()),
                "re_median": part["re_mean"].median(),
            }
        )
    return pd.DataFrame(rows)


def _summary_row(
    ref: pd.DataFrame,
    val: pd.DataFrame,
    each: pd.DataFrame,
    over: pd.DataFrame,
    unpaired: int,
    rng: np.random.Generator,
    bootstraps: int,
) -> dict[str, object]:
    patients = ref.index.get_level_values("patient")
    row: dict[str, object] = {
        "patients": patients.nunique(),
        "rois": len(ref),
        "unpaired": unpaired,
        "features": len(each),
        "ccc_over_rois_mean": each["ccc_over_rois"].mean(),
        "ccc_over_features_mean": over.mean().mean(),
        "reproducible_ccc": int(each["reproducible_ccc"].sum()),
        "reproducible_re": int(each["reproducible_re"].sum()),
        "re_median": each["re_mean"].median(),
    }
    drawn = _bootstrap(ref.to_numpy(), val.to_numpy(), patients.to_numpy(), rng, bootstraps)
    for name, values in drawn.items():
        low, high = np.percentile(values, INTERVAL) if len(values) else (np.nan, np.nan)
        row |= {f"{name}_low": low, f"{name}_high": high}
    return row


def _bootstrap(
    x: np.ndarray, y: np.ndarray, patient: np.ndarray, rng: np.random.Generator, bootstraps: int
) -> dict[str, np.ndarray]:
    """Mean CCC over ROIs and the two counts, with patients drawn with replacement; empty for one patient.

    A draw of patients only adds up sums that each patient has once, so a thousand draws cost one matrix product.
    """
    _, group = np.unique(patient, return_inverse=True)
    k = group.max() + 1
    names = ("ccc_over_rois_mean", "reproducible_ccc", "reproducible_re")
    if k < 2 or bootstraps < 1:
        return {name: np.empty(0) for name in names}
    centre = (x + y).mean(0) / 2
    spread = np.maximum(np.abs(x - centre).max(0), np.abs(y - centre).max(0))
    spread[spread == 0] = 1
    a, b = (x - centre) / spread, (y - centre) / spread
    error = metrics.relative_error(x, y)
    weights = rng.multinomial(k, np.full(k, 1 / k), size=bootstraps).astype(float)

    def drawn(values: np.ndarray) -> np.ndarray:
        sums = np.zeros((k, values.shape[1]))
        np.add.at(sums, group, values)
        return weights @ sums

    n = drawn(np.ones((len(x), 1)))
    ma, mb = drawn(a) / n, drawn(b) / n
    apart = drawn((a - b) ** 2) / n
    # s_x^2 + s_y^2 + (m_x - m_y)^2 = mean (x - y)^2 + 2 s_xy
    covariance = drawn(a * b) / n - ma * mb
    below = apart + 2 * covariance
    ccc = np.where(apart <= 1e-24, 1.0, 2 * covariance / np.where(below <= 0, 1.0, below))
    infinite = drawn(np.isinf(error).astype(float)) > 0
    re = drawn(np.where(np.isinf(error), 0.0, error)) / n
    return {
        "ccc_over_rois_mean": ccc.mean(1),
        "reproducible_ccc": (ccc > CCC_ABOVE).sum(1),
        "reproducible_re": ((re < RE_BELOW) & ~infinite).sum(1),
    }


def _biology(
    part: pd.DataFrame,
    scan: str,
    target: str,
    labels: Mapping | None,
    class_map: Mapping[str, str] | None,
    rng: np.random.Generator,
) -> dict[str, float]:
    both = part[part.index.get_level_values("scan").isin([scan, target])]
    row: dict[str, float] = {}
    try:
        share = biology.between_patient_share(both).groupby("scan")["share"].median()
    except HarmonictError:  # one patient, or one region each: there is no such share
        share = pd.Series({scan: np.nan, target: np.nan})
    row |= {"between_patient_share": share[scan], "between_patient_share_target": share[target]}
    if labels is not None and biology.labels_of(both, labels).notna().any():
        table = biology.separation(both, labels, rng=rng, class_map=class_map)
        auc = table[table["class"] == "all"].set_index("scan")["auc"]
        row |= {"separation_auc": auc[scan], "separation_auc_target": auc[target]}
    return row


def _glcm_errors(ref: pd.DataFrame, val: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for name, (feature, transform) in STAN_CT_FEATURES.items():
        column = f"original_glcm_{feature}"
        if column not in ref:
            continue
        x, y = ref[column].to_numpy(), val[column].to_numpy()
        if transform is not None:
            x, y = transform(x), transform(y)
        error = metrics.relative_error(x, y)
        sd = float(error.std(ddof=1)) if len(error) > 1 and np.isfinite(error).all() else np.nan
        rows.append({"feature": name, "error_mean": float(error.mean()), "error_sd": sd})
    return pd.DataFrame(rows, columns=["feature", "error_mean", "error_sd"])


def _signed_rank(x: np.ndarray, y: np.ndarray) -> float:
    difference = x - y
    if not difference.any():
        return 1.0
    return float(stats.wilcoxon(difference, zero_method="wilcox").pvalue)


def _repeats(ratings: np.ndarray) -> np.ndarray:
    ratings = np.asarray(ratings, np.float64)
    if ratings.ndim != 2 or len(ratings) < 1 or ratings.shape[1] < 2:
        raise HarmonictError(f"repeatability needs an array (subjects, repeats) of two repeats, got {ratings.shape}")
    return ratings
