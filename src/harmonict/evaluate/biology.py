"""Does biology survive? A harmonizer that flattens everything agrees perfectly with itself; here it scores at chance.

Two questions to a feature table (`harmonict.radiomics.table`), asked of each scan: can known classes (a nodule's type,
an emphysema grade) still be told apart by the features, and how much of a feature's variance lies between patients.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from harmonict.core import HarmonictError
from harmonict.radiomics.table import check_features, feature_classes

RIDGE = 1.0  # weight of the penalty against the mean squared standardised feature


def separation(
    features: pd.DataFrame,
    labels: Mapping[tuple[str, str], str] | Mapping[str, str],
    *,
    rng: np.random.Generator,
    folds: int = 5,
    repeats: int = 10,
    class_map: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """How well known classes are told apart by the features of each scan, on patients that the rule has not seen.

    labels: the known class of each (patient, roi), or of each patient; rows without one are left out.
    Rows of the result: each scan, for "all" features and for each feature class. Columns: scan, class, features,
    cases, patients, auc: 0.5 is chance, 1 perfect.
    The rule is ridge regression of the balanced labels on features standardised in the training folds; it has no
    intercept, so features without information give every case the same score and exactly 0.5. All cases of a patient
    lie in one fold; `auc` is the area under the ROC curve of the held-back scores (for more than two classes the mean
    of one against the rest), mean of `repeats` random splits into `folds` folds.
    Every scan gets the same splits where it has the same cases.
    Raises HarmonictError where fewer than two classes have at least two patients.
    """
    table = check_features(features)
    known = labels_of(table, labels)
    if known.isna().all():
        raise HarmonictError("no row of the feature table has a label: label its patients or its (patient, roi)")
    table, known = table[known.notna()], known.dropna()
    classes = feature_classes(list(table.columns), class_map)
    seed = int(rng.integers(2**63))
    rows: list[dict[str, object]] = []
    for scan in table.index.unique("scan"):
        here = (table.index.get_level_values("scan") == scan).nonzero()[0]
        patient = table.index.get_level_values("patient")[here].to_numpy()
        label = known.to_numpy()[here]
        splits = _splits(patient, label, folds, repeats, np.random.default_rng(seed), scan)
        for name in ["all", *dict.fromkeys(classes)]:
            columns = np.ones(len(classes), bool) if name == "all" else (classes == name).to_numpy()
            if name != "all" and columns.all():  # one class alone
                rows.append({**rows[-1], "class": name})
                continue
            x = table.to_numpy()[here][:, columns]
            auc = float(np.mean([_auc(_held_back_scores(x, label, fold), label) for fold in splits]))
            rows.append(
                {
                    "scan": scan,
                    "class": name,
                    "features": int(columns.sum()),
                    "cases": len(here),
                    "patients": len(set(patient)),
                    "auc": auc,
                }
            )
    return pd.DataFrame(rows)


def between_patient_share(features: pd.DataFrame, *, pool_scans: bool = False) -> pd.DataFrame:
    """The share of each feature's variance that lies between patients: ICC(1,1), 0 to 1.

    One-way random effects with patients as groups (Shrout and Fleiss 1979, case 1, with n0 for groups of unequal
    size); what varies within a patient is its ROIs, or with `pool_scans` its ROIs and all its scans. Negative
    estimates count as 0, and so does a feature without any variance: a constant tells no patient from another.
    Columns: scan ("all" when pooled), feature, share. Raises HarmonictError where there are fewer than two patients
    or no patient has two rows.
    """
    table = check_features(features)
    parts = {"all": table} if pool_scans else dict(iter(table.groupby(level="scan", sort=False)))
    results = []
    for scan, part in parts.items():
        share = _one_way_icc(part.to_numpy(), part.index.get_level_values("patient").to_numpy(), str(scan))
        results.append(pd.DataFrame({"scan": scan, "feature": part.columns, "share": share}))
    return pd.concat(results, ignore_index=True)


def labels_of(table: pd.DataFrame, labels: Mapping) -> pd.Series:
    """The label of every row of a checked feature table, by (patient, roi) or by patient; None where there is none."""
    patient, roi = (table.index.get_level_values(key) for key in ("patient", "roi"))
    by_roi = any(isinstance(key, tuple) for key in labels)
    keys = zip(patient, roi, strict=True) if by_roi else patient
    known = pd.Series([labels.get(key) for key in keys], index=table.index, dtype=object)
    return known.map(str, na_action="ignore")


def _one_way_icc(values: np.ndarray, patient: np.ndarray, scan: str) -> np.ndarray:
    _, group, sizes = np.unique(patient, return_inverse=True, return_counts=True)
    n, k = len(values), len(sizes)
    if k < 2 or n == k:
        raise HarmonictError(
            f"scan {scan}: the between-patient share of variance needs two patients and one with two rows; "
            f"there are {k} patients with {n} rows"
        )
    centred = values - values.mean(0)
    sums = np.zeros((k, values.shape[1]))
    np.add.at(sums, group, centred)
    means = sums / sizes[:, None]
    between = (sizes[:, None] * means**2).sum(0) / (k - 1)
    within = ((centred - means[group]) ** 2).sum(0) / (n - k)
    n0 = (n - (sizes**2).sum() / n) / (k - 1)
    component = np.maximum(between - within, 0) / n0
    total = component + within
    flat = _constant(values)
    return np.where(flat, 0.0, component / np.where(flat, 1.0, total))


def _splits(
    patient: np.ndarray, label: np.ndarray, folds: int, repeats: int, rng: np.random.Generator, scan: str
) -> list[np.ndarray]:
    """For each repeat the fold of every case; patients stay whole and each class is dealt out evenly."""
    first = {p: label[patient == p][0] for p in sorted(set(patient))}
    counts = {c: len({p for p, q in zip(patient, label, strict=True) if q == c}) for c in sorted(set(label))}
    if len(counts) < 2 or min(counts.values()) < 2:
        found = ", ".join(f"{c}: {n} patients" for c, n in counts.items())
        raise HarmonictError(f"scan {scan}: separation needs two classes with two patients each, got {found}")
    folds = max(2, min(folds, min(counts.values())))
    splits = []
    for _ in range(repeats):
        fold_of, dealt = {}, 0
        for c in counts:
            members = [p for p in first if first[p] == c]
            for p in rng.permutation(members):
                fold_of[p] = dealt % folds
                dealt += 1
        splits.append(np.array([fold_of[p] for p in patient]))
    return splits


def _held_back_scores(x: np.ndarray, label: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Score of every case for every class (cases, classes) by a rule fitted without the case's fold."""
    names = sorted(set(label))
    scores = np.zeros((len(x), len(names)))
    for f in np.unique(fold):
        train, test = fold != f, fold == f
        present = [c for c in names if (label[train] == c).any()]
        # each class counts the same in the centre, in the spread and in the fit
        weight = np.zeros(train.sum())
        for c in present:
            weight[label[train] == c] = 1 / (len(present) * (label[train] == c).sum())
        centre = weight @ x[train]
        spread = np.sqrt(weight @ (x[train] - centre) ** 2)
        use = ~_constant(x[train]) & (spread > 0)
        if not use.any():
            continue
        z, held = ((x[part][:, use] - centre[use]) / spread[use] for part in (train, test))
        root = np.sqrt(weight)[:, None]
        kernel = (root * z) @ (root * z).T / use.sum()
        y = (label[train][:, None] == np.array(names)).astype(float)
        y = root * (y - weight @ y)
        dual = np.linalg.solve(kernel + RIDGE / len(y) * np.eye(len(y)), y)
        scores[test] = held @ ((root * z).T @ dual) / use.sum()
    return scores


def _auc(scores: np.ndarray, label: np.ndarray) -> float:
    names = sorted(set(label))
    if len(names) == 2:
        return _roc_area(scores[:, 1], label == names[1])
    return float(np.mean([_roc_area(scores[:, n], label == c) for n, c in enumerate(names)]))


def _roc_area(score: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative; ties count half."""
    difference = score[positive][:, None] - score[~positive][None, :]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def _constant(values: np.ndarray) -> np.ndarray:
    """Columns that do not vary by more than rounding."""
    return np.ptp(values, axis=0) <= 1e-12 * np.abs(values).max(axis=0)
