"""Biology: separable classes stay separable, and flattening is found out."""

import numpy as np
import pandas as pd
import pytest

from harmonict.core import HarmonictError
from harmonict.evaluate.biology import between_patient_share, separation
from harmonict.metrics import ccc


def trial(seed=0, patients=24, rois=3, features=12, signal=2.0, scans=("standard",)) -> tuple[pd.DataFrame, dict]:
    """Patients of two types, several nodules each; the first half of the features knows the type."""
    rng = np.random.default_rng(seed)
    rows, labels = [], {}
    for p in range(patients):
        labels[f"P{p}"] = kind = "solid" if p % 2 else "ground glass"
        own = rng.normal(0, 1, features)
        for r in range(rois):
            values = own + rng.normal(0, 1, features)
            values[: features // 2] += signal * (kind == "solid")
            for scan in scans:
                rows.append(
                    {"patient": f"P{p}", "roi": f"n{r}", "scan": scan}
                    | {f"original_glcm_f{i}": v for i, v in enumerate(values)}
                )
    return pd.DataFrame(rows), labels


def auc(table, labels, scan="standard", **arguments) -> float:
    result = separation(table, labels, rng=np.random.default_rng(7), **arguments)
    return result.set_index(["scan", "class"]).loc[(scan, "all"), "auc"]


def test_classes_that_differ_are_told_apart_on_unseen_patients():
    assert auc(*trial()) > 0.95


def test_labels_without_meaning_score_at_chance():
    values = [auc(*trial(seed=s, signal=0.0), repeats=3) for s in range(20)]
    assert abs(np.mean(values) - 0.5) < 0.05


def test_many_rois_of_a_patient_do_not_leak_into_the_score():
    # every patient is unmistakable and its label chance: a split inside patients would score near 1
    values = []
    for s in range(10):
        table, labels = trial(seed=s, signal=0.0, rois=4)
        names = [c for c in table if c.startswith("original")]
        own = np.random.default_rng(s).normal(0, 50, (24, len(names)))
        table[names] += own[table["patient"].str[1:].astype(int)]
        values.append(auc(table, labels, repeats=1))
    assert abs(np.mean(values) - 0.5) < 0.1


def test_a_flattening_harmonizer_agrees_perfectly_and_tells_nothing_apart():
    table, labels = trial(scans=("standard", "flat source", "flat target"))
    names = [c for c in table if c.startswith("original")]
    table.loc[table["scan"].str.startswith("flat"), names] = 3.7
    flat = {s: table.loc[table["scan"] == s, names[0]].to_numpy() for s in ("flat source", "flat target")}
    assert ccc(flat["flat target"], flat["flat source"]) == 1
    assert auc(table, labels, scan="flat source") == 0.5
    assert auc(table, labels) > 0.95
    share = between_patient_share(table).groupby("scan")["share"].mean()
    assert share["flat source"] == 0
    assert share["standard"] > 0.4


def test_three_grades_are_scored_one_against_the_rest():
    rng = np.random.default_rng(2)
    rows, labels = [], {}
    for p in range(18):
        labels[(f"P{p}", "lung")] = grade = ("none", "mild", "severe")[p % 3]
        shift = {"none": 0, "mild": 4, "severe": 8}[grade]
        rows.append({"patient": f"P{p}", "roi": "lung", "scan": "s", "a_x": shift + rng.normal(), "b_y": rng.normal()})
    result = separation(pd.DataFrame(rows), labels, rng=rng, folds=3).set_index("class")["auc"]
    assert result["a"] > 0.8  # the middle grade is not linear in the feature, so it is not perfect
    assert result["a"] > result["b"] + 0.2


def test_the_share_of_variance_between_patients_is_the_ratio_of_its_parts():
    rng = np.random.default_rng(3)
    patients, rois = 400, 5
    own = rng.normal(0, 3, patients)
    rows = [
        {"patient": f"P{p}", "roi": f"r{r}", "scan": "s", "a_x": own[p] + rng.normal(0, 2), "a_y": rng.normal()}
        for p in range(patients)
        for r in range(rois)
    ]
    share = between_patient_share(pd.DataFrame(rows)).set_index("feature")["share"]
    assert share["a_x"] == pytest.approx(9 / 13, abs=0.04)
    assert share["a_y"] < 0.05


def test_shrout_and_fleiss_case_one_is_met():
    # Shrout and Fleiss 1979, table 2: six targets, four judges; ICC(1,1) = .17
    scores = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    rows = [
        {"patient": f"P{p}", "roi": f"r{r}", "scan": "s", "a_x": v}
        for p, line in enumerate(scores)
        for r, v in enumerate(line)
    ]
    assert between_patient_share(pd.DataFrame(rows))["share"].item() == pytest.approx(0.17, abs=0.005)


def test_pooled_scans_count_as_variation_within_a_patient():
    table, _ = trial(scans=("a", "b"))
    names = [c for c in table if c.startswith("original")]
    table.loc[table["scan"] == "b", names] += 10
    apart = between_patient_share(table)["share"].mean()
    pooled = between_patient_share(table, pool_scans=True)["share"].mean()
    assert pooled < apart / 3


def test_what_cannot_be_separated_is_refused_in_words():
    table, labels = trial(patients=4)
    with pytest.raises(HarmonictError, match="two classes with two patients each"):
        separation(table, labels | {"P1": "ground glass", "P3": "solid"}, rng=np.random.default_rng(0))
    with pytest.raises(HarmonictError, match="no row of the feature table has a label"):
        separation(table, {"nobody": "solid"}, rng=np.random.default_rng(0))
    with pytest.raises(HarmonictError, match="two patients and one with two rows"):
        between_patient_share(table[table["patient"] == "P0"])
