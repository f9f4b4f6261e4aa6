"""Hits, FROC, precision, F1 and AUC against examples counted by hand and closed forms."""

import numpy as np
import pytest
from scipy.stats import norm

from harmonict.core import HarmonictError
from harmonict.evaluate.detection import (
    MISSED,
    Outcome,
    auc,
    best_threshold,
    bootstrap_froc,
    froc,
    nodule_truth,
    operate,
    outcome,
    sensitivity_at,
)


def made(patient, nodules, false):
    return Outcome(patient, np.array(nodules, float), np.array(false, float))


# Two scans, three nodules (one never found), three false candidates. From the highest threshold down:
#   0.9 hit | 0.8 false | 0.7 hit | 0.6 false | 0.2 false
BY_HAND = (made("a", [0.9, MISSED], [0.8, 0.2]), made("b", [0.7], [0.6]))


def test_a_ball_becomes_its_box_centre_and_radius_and_one_that_is_cut_off_does_not_count():
    spacing = np.array([1.0, 0.5, 0.5])
    grid = np.indices((30, 60, 60)) * spacing[:, None, None, None]
    balls = {
        name: np.linalg.norm(grid - np.array(centre)[:, None, None, None], axis=0) <= 4
        for name, centre in {"whole": (12, 10, 20), "most of it": (1, 10, 20), "cut": (-2, 10, 20)}.items()
    }
    truth = nodule_truth(balls, dict.fromkeys(balls, 8.0), spacing)
    assert truth.counted.tolist() == [True, True, False] and truth.radii_mm.tolist() == [4, 4, 4]
    assert truth.boxes[0].tolist() == [8.5, 12.5, 32.5, 16.5, 28.5, 48.5]
    assert truth.boxes[2][[0, 3]].tolist() == [0, pytest.approx(5, abs=0.5)]
    assert truth.centres[0].tolist() == [12, 20, 40]
    assert nodule_truth({}, {}, spacing).boxes.shape == (0, 6)
    with pytest.raises(HarmonictError, match="mask of nodule_1 is empty"):
        nodule_truth({"nodule_1": np.zeros((2, 2, 2), bool)}, {"nodule_1": 8.0}, spacing)


def test_a_candidate_hits_within_the_radius_and_not_beyond_it():
    nodule, radius = np.array([[10.0, 20.0, 30.0]]), np.array([4.0])
    at = outcome("a", np.array([[10.0, 20.0, 34.0]]), np.array([0.5]), nodule, radius)
    beyond = outcome("a", np.array([[10.0, 20.0, 34.01]]), np.array([0.5]), nodule, radius)
    assert at.nodule_scores.tolist() == [0.5] and not len(at.false_scores)
    assert beyond.nodule_scores.tolist() == [MISSED] and beyond.false_scores.tolist() == [0.5]


def test_several_hits_of_one_nodule_count_once_with_the_best_score():
    found = outcome("a", np.array([[0.0, 0, 0], [0, 0, 1], [0, 1, 0]]), [0.3, 0.8, 0.1], [[0.0, 0, 0]], [3.0])
    assert found.nodule_scores.tolist() == [0.8] and not len(found.false_scores)


def test_a_candidate_within_two_nodules_belongs_to_the_nearer():
    found = outcome("a", np.array([[0.0, 0, 4]]), [0.6], np.array([[0.0, 0, 0], [0, 0, 6]]), [5.0, 5.0])
    assert found.nodule_scores.tolist() == [MISSED, 0.6]


def test_a_nodule_that_does_not_count_is_neither_found_nor_a_mistake():
    nodules = np.array([[0.0, 0, 0], [0, 0, 50]])
    found = outcome("a", nodules, [0.6, 0.9], nodules, [5.0, 5.0], counted=np.array([True, False]))
    assert found.nodule_scores.tolist() == [0.6] and not len(found.false_scores)


def test_a_scan_without_candidates_misses_every_nodule():
    found = outcome("a", np.empty((0, 3)), [], np.array([[0.0, 0, 0]]), [5.0])
    assert found.nodule_scores.tolist() == [MISSED] and not len(found.false_scores)
    assert operate([found], 0.5).recall == 0


def test_candidates_and_scores_of_different_number_are_refused():
    with pytest.raises(HarmonictError, match="1 candidates, 2 scores"):
        outcome("a", np.array([[0.0, 0, 0]]), [0.6, 0.7], np.array([[0.0, 0, 0]]), [5.0])


def test_the_froc_curve_is_the_one_counted_by_hand():
    curve = froc(BY_HAND)
    assert curve.threshold.tolist() == [np.inf, 0.9, 0.8, 0.7, 0.6, 0.2]
    assert curve.false_per_scan.tolist() == [0, 0, 0.5, 0.5, 1, 1.5]
    np.testing.assert_allclose(curve.sensitivity, np.array([0, 1, 1, 2, 2, 2]) / 3)
    np.testing.assert_allclose(sensitivity_at(curve, (0.125, 0.5, 8)), np.array([1, 2, 2]) / 3)


def test_a_hit_and_a_mistake_of_the_same_score_come_together():
    curve = froc([made("a", [0.5], [0.5])])
    assert curve.false_per_scan.tolist() == [0, 1] and curve.sensitivity.tolist() == [0, 1]
    assert sensitivity_at(curve, (0.5, 1)).tolist() == [0, 1]


def test_precision_recall_and_f1_are_those_counted_by_hand():
    at = operate(BY_HAND, 0.7)  # 2 hits, 1 mistake, 1 missed
    assert (at.precision, at.recall, at.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert at.false_per_scan == 0.5
    high = operate(BY_HAND, 0.85)  # 1 hit, 2 missed
    assert (high.precision, high.recall, high.f1) == pytest.approx((1, 1 / 3, 1 / 2))


def test_precision_of_nothing_is_unknown_and_f1_is_zero():
    at = operate(BY_HAND, 1.5)
    assert np.isnan(at.precision) and at.f1 == 0


def test_the_best_threshold_has_the_highest_f1_of_all():
    assert best_threshold(BY_HAND) == 0.7
    assert best_threshold([made("a", [0.9, 0.4], [0.1])]) == 0.4


def test_auc_is_counted_by_hand_and_a_missed_nodule_lies_below_all():
    # 0.9 above three of three, 0.7 above two, the missed one above none: 5 of 9
    assert auc(BY_HAND) == pytest.approx(5 / 9)
    assert auc([made("a", [0.5], [0.5])]) == 0.5
    assert np.isnan(auc([made("a", [0.5], [])]))


def test_auc_of_two_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    scans = [made("a", rng.normal(1.5, 1, 4000), rng.normal(0, 1, 4000))]
    assert auc(scans) == pytest.approx(norm.cdf(1.5 / np.sqrt(2)), abs=0.01)


def test_froc_of_gaussian_scores_is_the_closed_form():
    """Hits score N(1.5, 1) and 5 false candidates a scan score N(0, 1): sensitivity is a function of the rate."""
    rng = np.random.default_rng(1)
    scans = [made(str(n), rng.normal(1.5, 1, 3), rng.normal(0, 1, 5)) for n in range(2000)]
    rates = np.array([0.25, 0.5, 1, 2, 4])
    expected = norm.sf(norm.isf(rates / 5) - 1.5)
    np.testing.assert_allclose(sensitivity_at(froc(scans), rates), expected, atol=0.025)


def test_the_bootstrap_draws_patients_and_not_scans():
    """Of two patients one is always found and one never: a resample finds 0, a half or all, 1 : 2 : 1."""
    scans = [made("a", [0.9], [])] * 5 + [made("b", [MISSED], [])] * 5
    drawn = bootstrap_froc(scans, (1.0,), rounds=1000, seed=0)[:, 0]
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [0, 0.5, 1]
    np.testing.assert_allclose(counts / 1000, [0.25, 0.5, 0.25], atol=0.05)  # SD 0.016


def test_the_bootstrap_has_the_binomial_spread_and_follows_from_its_seed():
    scans = [made(str(n), [0.9] if n % 4 else [MISSED], [0.1]) for n in range(80)]
    drawn = bootstrap_froc(scans, (0.5,), rounds=1000, seed=3)[:, 0]
    assert drawn.mean() == pytest.approx(0.75, abs=0.01)
    assert drawn.std() == pytest.approx(np.sqrt(0.75 * 0.25 / 80), rel=0.1)
    assert np.array_equal(drawn, bootstrap_froc(scans, (0.5,), rounds=1000, seed=3)[:, 0])
    assert not np.array_equal(drawn, bootstrap_froc(scans, (0.5,), rounds=1000, seed=4)[:, 0])


def test_resamples_without_a_nodule_are_drawn_again():
    drawn = bootstrap_froc([made("a", [0.9], []), made("b", [], [0.5])], rounds=50)
    assert drawn.shape == (50, 7) and (drawn == 1).all()


@pytest.mark.parametrize("score", [froc, auc, bootstrap_froc, best_threshold, lambda scans: operate(scans, 0.5)])
def test_scans_without_a_nodule_are_refused_in_words(score):
    with pytest.raises(HarmonictError, match="without a nodule"):
        score([made("a", [], [0.5])])
