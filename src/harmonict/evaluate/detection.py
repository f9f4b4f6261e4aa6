"""Scores of a detector: what is to be found, which candidates are hits, FROC with its bootstrap, precision, F1, AUC.

A hit is a candidate whose centre is no farther from a nodule's centre than the nodule's radius, as LUNA16 counts, the
data of Zarei et al.'s table V and figure 8. Of several hits of one nodule the best score counts, the others count
for nothing. "Scan" is one series.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harmonict.core import HarmonictError

FROC_RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives per scan, as in LUNA16
MISSED = -np.inf  # the score of a nodule that no candidate hits


@dataclass(frozen=True)
class Truth:
    """The nodules of a scan. boxes: (n, 6) voxels (z0, y0, x0, z1, y1, x1), voxel i covering [i, i + 1).

    Each box holds the ball of the nodule's diameter without its spicules, as far as that was scanned. centres: (n, 3)
    voxels (z, y, x). counted: (n,) False where less than half of the nodule was scanned.
    """

    boxes: np.ndarray
    centres: np.ndarray
    radii_mm: np.ndarray
    counted: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What a detector made of one scan.

    nodule_scores: (nodules,) the best score of each nodule's hits, MISSED where it has none. false_scores: (n,) scores
    of the candidates that hit nothing. patient: what the bootstrap draws.
    """

    patient: str
    nodule_scores: np.ndarray
    false_scores: np.ndarray


@dataclass(frozen=True)
class Froc:
    """Sensitivity against false positives per scan, one point for each threshold, from the highest threshold down."""

    threshold: np.ndarray
    false_per_scan: np.ndarray
    sensitivity: np.ndarray


@dataclass(frozen=True)
class Operation:
    """A detector at one threshold. Precision is NaN where nothing was found."""

    threshold: float
    precision: float
    recall: float
    f1: float
    false_per_scan: float


def nodule_truth(
    masks: Mapping[str, np.ndarray], diameters_mm: Mapping[str, float], spacing_mm: Sequence[float]
) -> Truth:
    """Masks of nodules (name -> bool (z, y, x)) and their diameters (same names) -> what is to be found.

    A nodule counts where its mask holds at least half of a ball of its diameter; a scan may end within a nodule.
    """
    boxes, centres, counted = [], [], []
    spacing = np.asarray(spacing_mm, float)
    for name, mask in masks.items():
        voxels = np.argwhere(mask)
        if not len(voxels):
            raise HarmonictError(f"the mask of {name} is empty: a nodule that is not scanned has no mask")
        centre, reach = voxels.mean(0), diameters_mm[name] / 2 / spacing
        boxes.append(
            np.concatenate([np.maximum(centre + 0.5 - reach, 0), np.minimum(centre + 0.5 + reach, mask.shape)])
        )
        centres.append(centre)
        counted.append(len(voxels) * np.prod(spacing) >= np.pi / 12 * diameters_mm[name] ** 3)
    radii = np.array([diameters_mm[name] / 2 for name in masks], float)
    return Truth(np.reshape(boxes, (-1, 6)).astype(float), np.reshape(centres, (-1, 3)), radii, np.array(counted, bool))


def outcome(
    patient: str,
    centres_mm: np.ndarray,
    scores: np.ndarray,
    nodules_mm: np.ndarray,
    radii_mm: np.ndarray,
    counted: np.ndarray | None = None,
) -> Outcome:
    """Match candidates, centres (n, 3) in mm and scores (n,), with nodules, centres (m, 3) and radii (m,) in mm.

    A candidate within several nodules belongs to the nearest. counted: bool (m,); a nodule where it is False is neither
    to be found nor a mistake: its hits count for nothing.
    """
    centres, nodules = np.reshape(centres_mm, (-1, 3)), np.reshape(nodules_mm, (-1, 3))
    if len(centres) != len(scores) or len(nodules) != len(radii_mm):
        raise HarmonictError(
            f"each candidate needs a score and each nodule a radius, got {len(centres)} candidates, "
            f"{len(scores)} scores, {len(nodules)} nodules, {len(radii_mm)} radii"
        )
    best = np.full(len(nodules), MISSED)
    false = []
    for centre, score in zip(centres, scores, strict=True):
        distance = np.linalg.norm(nodules - centre, axis=1)
        distance[distance > radii_mm] = np.inf
        if np.isfinite(distance).any():
            nearest = int(distance.argmin())
            best[nearest] = max(best[nearest], score)
        else:
            false.append(score)
    return Outcome(patient, best if counted is None else best[counted], np.array(false, float))


def froc(outcomes: Sequence[Outcome]) -> Froc:
    """The whole curve. It starts at (0, 0) above every score. Raises HarmonictError where there is no nodule."""
    nodules, false = _pooled(outcomes)
    found = nodules[nodules > MISSED]
    threshold = np.concatenate([[np.inf], np.unique(np.concatenate([found, false]))[::-1]])
    return Froc(
        threshold,
        _at_least(false, threshold) / len(outcomes),
        _at_least(found, threshold) / len(nodules),
    )


def sensitivity_at(curve: Froc, rates: Sequence[float] | np.ndarray = FROC_RATES) -> np.ndarray:
    """(rates,) the best sensitivity at no more than so many false positives per scan; steps, nothing in between."""
    place = np.searchsorted(curve.false_per_scan, np.asarray(rates, float), side="right") - 1
    return curve.sensitivity[place]


def bootstrap_froc(
    outcomes: Sequence[Outcome], rates: Sequence[float] = FROC_RATES, *, rounds: int = 1000, seed: int = 0
) -> np.ndarray:
    """(rounds, rates) `sensitivity_at` of resamples of the patients, drawn with replacement, each with all its scans.

    A round without a nodule is drawn again.
    """
    _pooled(outcomes)
    rng = np.random.default_rng(seed)
    by_patient: dict[str, list[Outcome]] = {}
    for one in outcomes:
        by_patient.setdefault(one.patient, []).append(one)
    patients = list(by_patient.values())
    rows: list[np.ndarray] = []
    while len(rows) < rounds:
        drawn = [one for n in rng.integers(len(patients), size=len(patients)) for one in patients[n]]
        if any(len(one.nodule_scores) for one in drawn):
            rows.append(sensitivity_at(froc(drawn), rates))
    return np.array(rows)


def operate(outcomes: Sequence[Outcome], threshold: float) -> Operation:
    """Precision, recall and F1 of the candidates that score at least `threshold`."""
    nodules, false = _pooled(outcomes)
    hits, mistakes = int((nodules >= threshold).sum()), int((false >= threshold).sum())
    return Operation(
        threshold=float(threshold),
        precision=hits / (hits + mistakes) if hits + mistakes else float("nan"),
        recall=hits / len(nodules),
        f1=2 * hits / (len(nodules) + hits + mistakes),
        false_per_scan=mistakes / len(outcomes),
    )


def best_threshold(outcomes: Sequence[Outcome]) -> float:
    """The threshold of the highest F1, the higher one where several reach it; of patients that are not scored by it."""
    curve = froc(outcomes)
    return max(curve.threshold, key=lambda t: operate(outcomes, t).f1)  # max keeps the first: thresholds fall


def auc(outcomes: Sequence[Outcome]) -> float:
    """The probability that a nodule scores above a false candidate, ties half (Mann-Whitney): area under the ROC curve.

    A missed nodule lies below all. NaN without a false candidate. It grows with the number of weak false candidates
    that a detector puts out: compare detectors that keep candidates by the same rule.
    """
    nodules, false = _pooled(outcomes)
    if not len(false):
        return float("nan")
    false = np.sort(false)
    below, upto = (np.searchsorted(false, nodules, side=side) for side in ("left", "right"))
    return float((below + upto).mean() / 2 / len(false))


def _pooled(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all nodules and of all false candidates."""
    if not sum(len(one.nodule_scores) for one in outcomes):
        raise HarmonictError("a detector cannot be scored on scans without a nodule")
    return (
        np.concatenate([one.nodule_scores for one in outcomes]),
        np.concatenate([one.false_scores for one in outcomes]),
    )


def _at_least(scores: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    return len(scores) - np.searchsorted(np.sort(scores), threshold, side="left")
