"""Reproducibility: closed forms, published examples, and what an identity must give."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harmonict import metrics
from harmonict.core import HarmonictError
from harmonict.evaluate import reproducibility as rep

SHROUT_FLEISS = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])
GLCM = ("DifferenceAverage", "Contrast", "Idm", "JointEnergy", "Correlation")
NAMES = [f"original_glcm_{f}" for f in GLCM] + [f"original_firstorder_{f}" for f in ("Mean", "Energy", "Flat")]


def values(rng, n: int) -> np.ndarray:
    x = rng.uniform(0.1, 0.9, (n, len(NAMES)))
    x[:, 5] = rng.normal(-300, 200, n)  # a mean HU takes both signs
    x[:, 6] *= 1e9  # an energy is huge
    x[:, 7] = 0  # a feature that never varies
    return x


def make(scans: dict, *, patients: int = 8, rois: int = 4, seed: int = 0, image: bool = True) -> pd.DataFrame:
    """Table of a target "T" and of further scans, name -> function of the target's values."""
    rng = np.random.default_rng(seed)
    names = [f"n{r}" for r in range(rois)] + (["image"] if image else [])
    keys = [(f"P{p}", r) for p in range(patients) for r in names]
    target = values(rng, len(keys))
    parts = []
    for scan, function in {"T": lambda x, rng: x, **scans}.items():
        index = pd.MultiIndex.from_tuples([(*k, scan) for k in keys], names=["patient", "roi", "scan"])
        parts.append(pd.DataFrame(function(target.copy(), rng), index=index, columns=NAMES))
    return pd.concat(parts)


def jitter(sd: float):
    def change(x, rng):
        x = x + rng.normal(0, sd, x.shape)
        x[:, 3] = np.abs(x[:, 3])  # a joint energy is never negative
        return x

    return change


def run(table, **arguments):
    return rep.reproduce(table, "T", rng=np.random.default_rng(1), **arguments)


def test_an_identity_agrees_everywhere():
    result = run(make({"same": lambda x, rng: x}))
    each = result.features
    assert set(each["level"]) == {"roi", "image"} and set(each["scan"]) == {"same"}
    assert (each[["ccc_over_rois", "icc21"]] == 1).all(axis=None)
    zero = ["re_mean", "re_median", "wcv", "repeatability", "bias", "loa_lower", "loa_upper"]
    assert (each[zero] == 0).all(axis=None)
    assert each["stable"].all()
    assert (result.classes[["ccc_over_rois_mean", "ccc_over_features_mean"]] == 1).all(axis=None)
    assert (result.summary["reproducible_ccc"] == len(NAMES)).all()
    assert (result.summary[["ccc_over_rois_mean_low", "ccc_over_rois_mean_high"]] == 1).all(axis=None)
    assert (result.summary["reproducible_re_low"] == len(NAMES)).all()
    assert (result.curve["features"] == len(NAMES)).all()
    assert (result.glcm["error_mean"] == 0).all() and len(result.glcm) == 10


def test_each_feature_has_the_figures_of_the_single_functions():
    table = make({"B": lambda x, rng: x * 1.1 + rng.normal(0, 0.05, x.shape)}, image=False)
    each = run(table).features.set_index("feature")
    ref, val = (table.xs(s, level="scan") for s in ("T", "B"))
    for name in NAMES:
        x, y = ref[name].to_numpy(), val[name].to_numpy()
        row = each.loc[name]
        both = np.stack([x, y], 1)
        assert row["ccc_over_rois"] == pytest.approx(metrics.ccc(x, y), abs=1e-12)
        assert row["re_mean"] == pytest.approx(metrics.relative_error(x, y).mean())
        assert row["icc21"] == pytest.approx(rep.icc21(both))
        assert row["wcv"] == pytest.approx(rep.within_subject_cv(both))
        assert row["repeatability"] == pytest.approx(rep.repeatability_coefficient(both))
        assert row[["bias", "loa_lower", "loa_upper"]].tolist() == pytest.approx(
            [getattr(metrics.bland_altman(x, y), k) for k in ("bias", "lower", "upper")]
        )


def test_the_class_form_hides_seventeen_scrambled_features_and_the_other_does_not():
    rng = np.random.default_rng(2)
    names = [f"original_firstorder_f{i}" for i in range(18)]
    target = rng.uniform(1, 2, (30, 18))
    target[:, 0] = rng.uniform(1e8, 2e8, 30)  # one energy rules the class
    other = rng.uniform(1, 2, (30, 18))
    other[:, 0] = target[:, 0] * 1.01
    parts = []
    for scan, x in (("T", target), ("B", other)):
        keys = [(f"P{i % 6}", f"n{i}", scan) for i in range(30)]
        index = pd.MultiIndex.from_tuples(keys, names=["patient", "roi", "scan"])
        parts.append(pd.DataFrame(x, index=index, columns=names))
    row = run(pd.concat(parts)).classes.iloc[0]
    assert row["ccc_over_features_mean"] > 0.999
    assert row["ccc_over_rois_mean"] < 0.2
    assert row["reproducible_ccc"] == 1


def test_the_counts_and_the_curve_follow_the_relative_error():
    factors = np.array([1, 1.05, 1.10, 1.14, 1.16, 1.3, 0.5, 1])
    result = run(make({"B": lambda x, rng: x * factors}, image=False))
    assert result.summary["reproducible_re"].item() == 5  # 0, .05, .10, .14 and the one that stays 0
    curve = result.curve.set_index("re")["features"]
    assert curve.loc[0.0] == 2 and curve.loc[0.06] == 3 and curve.loc[0.2] == 6 and curve.loc[0.55] == 8
    assert (curve.diff().dropna() >= 0).all()


def test_shape_counts_only_where_the_mask_moved():
    table = make({"B": jitter(0.3)}, image=False)
    names = [f"original_shape_{n}" for n in ("MeshVolume", "Sphericity")]
    table[names] = 5.0
    table = table.sort_index()
    assert set(run(table).features["feature"]) == set(NAMES)
    table.loc[("P1", "n0", "B"), names[0]] = 6.0
    assert set(run(table).features["feature"]) == {*NAMES, names[0]}


def test_glcm_errors_are_equation_eight_with_the_absolute_value():
    def change(x, rng):
        x[:, 1] *= 1.2
        x[:, 3] *= 1.21  # energy is the root of the joint energy
        x[:, 4] *= 0.9
        return x

    table = make({"B": change}, image=False)
    table["original_glcm_Correlation"] *= -1
    errors = run(table).glcm.set_index("feature")["error_mean"]
    assert list(errors.index) == ["dissimilarity", "contrast", "homogeneity", "energy", "correlation"]
    np.testing.assert_allclose(errors, [0, 0.2, 0, 0.1, 0.1], atol=1e-12)


def test_icc_of_shrout_and_fleiss_is_the_published_value():
    assert rep.icc21(SHROUT_FLEISS) == pytest.approx(0.29, abs=0.005)


def test_icc_knows_agreement_and_its_absence():
    x = np.arange(10.0)
    assert rep.icc21(np.stack([x, x], 1)) == 1
    assert rep.icc21(np.full((5, 3), 2.0)) == 1
    assert rep.icc21(np.stack([x, x[::-1]], 1)) < 0
    assert rep.icc21(np.stack([x, x + 100], 1)) < 0.01  # consistency would be 1, agreement is not


def test_within_subject_variation_and_the_repeatability_coefficient_are_their_closed_forms():
    mean = np.array([10.0, 20, 40])
    pairs = np.stack([mean * 0.9, mean * 1.1], 1)  # SD of a pair is 0.1 sqrt(2) of its mean
    assert rep.within_subject_cv(pairs) == pytest.approx(0.1 * np.sqrt(2))
    wsd = np.sqrt(np.mean((0.1 * np.sqrt(2) * mean) ** 2))
    assert rep.repeatability_coefficient(pairs) == pytest.approx(1.96 * np.sqrt(2) * wsd)
    with pytest.raises(HarmonictError, match="two repeats"):
        rep.within_subject_cv(mean[:, None])


def test_the_bootstrap_interval_covers_and_narrows_with_patients():
    noise = {"B": jitter(0.15)}
    few, many = (run(make(noise, patients=n, image=False)).summary.iloc[0] for n in (6, 60))
    for row in (few, many):
        assert row["ccc_over_rois_mean_low"] < row["ccc_over_rois_mean"] < row["ccc_over_rois_mean_high"] + 0.02
    width_few, width_many = (r["ccc_over_rois_mean_high"] - r["ccc_over_rois_mean_low"] for r in (few, many))
    assert width_many < width_few / 2


def test_the_bootstrap_is_the_statistic_of_the_drawn_patients():
    table = make({"B": jitter(0.2)}, image=False)
    ref, val = (table.xs(s, level="scan") for s in ("T", "B"))
    patient = ref.index.get_level_values("patient").to_numpy()
    x, y = ref.to_numpy(), val.to_numpy()
    drawn = rep._bootstrap(x, y, patient, np.random.default_rng(9), 5)
    weights = np.random.default_rng(9).multinomial(8, np.full(8, 1 / 8), size=5)
    names = np.unique(patient)
    for n, weight in enumerate(weights):
        rows = np.concatenate(
            [np.flatnonzero(patient == p) for p, w in zip(names, weight, strict=True) for _ in range(w)]
        )
        each = rep.feature_agreement(ref.iloc[rows], val.iloc[rows], pd.Series("c", index=NAMES))
        assert drawn["ccc_over_rois_mean"][n] == pytest.approx(each["ccc_over_rois"].mean(), abs=1e-9)
        assert drawn["reproducible_ccc"][n] == each["reproducible_ccc"].sum()
        assert drawn["reproducible_re"][n] == each["reproducible_re"].sum()


def test_the_same_generator_gives_the_same_tables():
    table = make({"B": jitter(0.2)})
    pd.testing.assert_frame_equal(run(table).summary, run(table).summary)


def test_a_nearer_method_is_found_and_chance_is_not():
    table = make(
        {
            "far": jitter(0.5),
            "near": jitter(0.05),
        },
        patients=20,
    )
    result = rep.compare_scans(table, "T", "far", "near", unit="patient").set_index("feature")
    assert (result["nearer"] == "b").all() and (result["n"] == 20).all()
    turned = rep.compare_scans(table, "T", "near", "far", unit="patient")
    assert (turned["nearer"] == "a").all()
    null = make({s: jitter(0.2) for s in ("a", "b")}, patients=20)
    assert (rep.compare_scans(null, "T", "a", "b", unit="patient")["nearer"] == "").all()
    same = rep.compare_scans(table, "T", "far", "far", unit="roi")
    assert (same["p"] == 1).all() and (same["q"] == 1).all() and (same["nearer"] == "").all()


def test_every_two_scans_are_tested_by_patients_where_there_are_six_else_by_rois():
    scans = {"far": jitter(0.5), "near": jitter(0.05), "other": jitter(0.05)}
    many = rep.compare_all_scans(make(scans, patients=20), "T")
    assert set(zip(many["scan_a"], many["scan_b"], strict=True)) == {
        ("far", "near"),
        ("far", "other"),
        ("near", "other"),
    }
    assert set(many["unit"]) == {"patient"} and (many.loc[many["scan_a"] == "far", "nearer"] == "b").all()
    assert set(rep.compare_all_scans(make(scans, patients=2), "T")["unit"]) <= {"roi"}
    assert rep.compare_all_scans(make({"far": jitter(0.5)}), "T").empty


def test_q_values_are_those_of_benjamini_and_hochberg():
    table = make({s: jitter(0.2) for s in ("a", "b")}, patients=12)
    result = rep.compare_scans(table, "T", "a", "b", unit="patient")
    p = result["p"].to_numpy()
    order = np.argsort(p)
    q = np.minimum.accumulate((p[order] * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1]
    np.testing.assert_allclose(result["q"].to_numpy()[order], np.minimum(q, 1))
    rows = table.groupby(level=["patient", "scan"]).mean().index  # patients, not ROIs, are the unit
    assert (result["n"] == len(rows.unique("patient"))).all()
    assert np.isfinite(p).all() and stats.false_discovery_control(p) == pytest.approx(result["q"])


def test_too_few_units_for_a_test_are_refused():
    table = make({"a": lambda x, rng: x + 1, "b": lambda x, rng: x + 2}, patients=3)
    with pytest.raises(HarmonictError, match="needs six patients"):
        rep.compare_scans(table, "T", "a", "b", unit="patient")
    with pytest.raises(HarmonictError, match="'patient' or 'roi'"):
        rep.compare_scans(table, "T", "a", "b", unit="slice")


def test_one_patient_has_no_interval_and_one_image_no_ccc_over_rois():
    result = run(make({"B": lambda x, rng: x * 1.02}, patients=1))
    summary = result.summary.set_index("level")
    assert np.isnan(summary.loc["roi", "ccc_over_rois_mean_low"])
    assert np.isfinite(summary.loc["roi", "ccc_over_rois_mean"])
    assert np.isnan(summary.loc["image", "ccc_over_rois_mean"])
    assert summary.loc["image", "ccc_over_features_mean"] > 0.99
    assert summary.loc["image", "reproducible_re"] == len(NAMES)


def test_rows_without_a_partner_are_counted_and_left_out():
    table = make({"B": lambda x, rng: x}, image=False)
    summary = run(table.drop(("P0", "n0", "B"))).summary.iloc[0]
    assert summary["unpaired"] == 1 and summary["rois"] == 31


def test_an_unknown_target_and_a_lonely_one_are_refused():
    table = make({"B": lambda x, rng: x})
    with pytest.raises(HarmonictError, match="of scan 'X'; its scans: T, B"):
        rep.reproduce(table, "X", rng=np.random.default_rng(0))
    with pytest.raises(HarmonictError, match="no other scan"):
        run(table.xs("T", level="scan", drop_level=False))


def test_biology_stands_in_the_table_that_ranks_methods():
    table = make({"flat": lambda x, rng: np.full_like(x, 2.0)}, patients=12, image=False)
    labels = {f"P{p}": "AB"[p % 2] for p in range(12)}
    grouped = table.index.get_level_values("patient").str[1:].astype(int) % 2 == 1
    standard = table.index.get_level_values("scan") == "T"
    table.loc[grouped & standard, "original_glcm_Contrast"] += 2
    row = run(table, labels=labels).summary.iloc[0]
    assert row["separation_auc_target"] > 0.9 and row["separation_auc"] == 0.5
    assert row["between_patient_share"] == 0


def test_labels_of_rois_leave_the_image_level_without_separation():
    table = make({"B": jitter(0.1)}, patients=12)
    labels = {(f"P{p}", f"n{r}"): "AB"[p % 2] for p in range(12) for r in range(4)}
    auc = run(table, labels=labels).summary.set_index("level")["separation_auc"]
    assert np.isfinite(auc["roi"]) and np.isnan(auc["image"])


def test_the_bland_altman_table_is_that_of_the_metric():
    table = make({"B": lambda x, rng: x + rng.normal(0.1, 0.2, x.shape)}, image=False)
    row = rep.bland_altman_table(table, "T").set_index("feature").loc[NAMES[0]]
    expected = metrics.bland_altman(*(table.xs(s, level="scan")[NAMES[0]] for s in ("T", "B")))
    assert row[["n", "bias", "sd", "lower", "upper"]].tolist() == pytest.approx(list(expected))


def test_the_list_of_stable_features_is_a_file(tmp_path):
    factors = np.array([1, 1, 1, 3, 3, 3, 3, 1])
    result = run(make({"B": lambda x, rng: x * factors}, image=False))
    stable = rep.write_stable_features(result, tmp_path / "stable.csv")
    read = pd.read_csv(tmp_path / "stable.csv")
    assert list(read["feature"]) == list(stable["feature"]) == [NAMES[i] for i in (0, 1, 2, 7)]
    with pytest.raises(HarmonictError, match="cannot write"):
        rep.write_stable_features(result, tmp_path / "no" / "stable.csv")
