"""The benchmark on a toy trial whose answers are known: what is trained, what is measured, what the tables say."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harmonict.core import Geometry, HarmonictError, Series
from harmonict.evaluate.benchmark import Fitted, run_benchmark, test_cases, training_protocols, tumour_images
from harmonict.evaluate.benchmark_plan import load_plan
from harmonict.evaluate.real_pairs import fitted_on_the_other_part, real_pair
from harmonict.evaluate.reproducibility import ccc_columns, reproduce
from harmonict.evaluate.scores import RealCase, about, common_slices, measure, measure_target, texture_names
from harmonict.methods import load_model
from toy_trial import PLAN, write_toy_trial

test_cases.__test__ = False

CHOE = """
[[model]]
name = "choe"
method = "choe"
size = "compact"
settings = { layers = 2, channels = 4, kernel = 3, patch = 32, batch = 2, steps = 2, check_every = 2 }
"""


def plan_of(folder, text):
    path = folder / "plan.toml"
    path.write_text(text)
    return load_plan(path)


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return write_toy_trial(tmp_path_factory.mktemp("trial"))


@pytest.fixture(scope="module")
def finished(trial, tmp_path_factory):
    """A run of PLAN: plan, folder, tables."""
    out = tmp_path_factory.mktemp("out")
    compare = '[[compare]]\ntable = "against identity"\na = "identity"\nb = "ratio"\n'
    plan = plan_of(trial, PLAN + compare)
    return plan, out, run_benchmark(plan, out)


def value(tables, model, name, column):
    rows = tables.summary[(tables.summary["model"] == model) & (tables.summary["set"] == name)]
    return float(rows.iloc[0][column])


# -- cases -----------------------------------------------------------------------------------------------------------


def test_only_test_patients_are_measured_and_sorted_by_what_differs_from_the_target(trial):
    cases = test_cases(plan_of(trial, PLAN), trial / "cohort.csv")
    assert {case.patient for case in cases} == {"x", "y"} and len(cases) == 2 * 4
    by_name = {case.name: case.differs for case in cases if case.patient == "x"}
    assert by_name == {
        "x Br40 1 mm 6.5 mGy": "kernel",
        "x Br40(3) 1 mm 6.5 mGy": "iterative",
        "x Br40 3 mm 1.3 mGy": "dose or thickness",
        "x Bl57 1 mm 6.5 mGy": "kernel",
    }


def stack(count, spacing):
    return Series(np.zeros((count, 4, 4), np.float32), Geometry((0.0, 0.0, spacing / 2), (spacing, 1.0, 1.0)))


@pytest.mark.parametrize(
    ("source", "pairs"),
    [
        (stack(6, 1.0), [(z, z) for z in range(6)]),
        (stack(2, 3.0), [(0, 1), (1, 4)]),
        (stack(1, 5.0), [(0, 2)]),
        (stack(12, 0.5), [(2 * z, z) for z in range(6)]),
    ],
)
def test_a_source_slice_is_held_against_the_target_slice_that_its_centre_lies_in(source, pairs):
    assert common_slices(source, stack(6, 1.0)) == pairs


def test_a_thick_source_is_compared_on_single_slices_of_the_target(trial):
    thick = next(c for c in test_cases(plan_of(trial, PLAN), trial / "cohort.csv") if "3 mm" in c.name).read()
    assert thick.source.hu.shape == thick.target.hu.shape == (1, 128, 128) and not thick.target.is_volume
    assert {roi.shape[0] for roi in thick.rois} == {1}
    assert thick.nodules["nodule_1"].sum() == 48


# -- models ----------------------------------------------------------------------------------------------------------


def test_a_filter_for_each_protocol_is_fitted_to_every_one_and_the_nearest_serves_an_unknown_one(trial, finished):
    plan, out, _ = finished
    known = training_protocols(plan, trial / "cohort.csv")
    assert known == [
        "Br40,strength=0,thickness=1,dose=6.5",
        "Br40,strength=3,thickness=1,dose=6.5",
        "Br40,strength=0,thickness=3,dose=1.3",
        "Bl57,strength=0,thickness=1,dose=6.5",
    ]
    fitted = Fitted({text: out / text for text in known})
    protocol = test_cases(plan, trial / "cohort.csv")[0].source_protocol
    assert fitted.folder(protocol.with_(kernel="Br40", slice_thickness_mm=5.0, ctdivol_mgy=1.3)).name == known[2]
    assert fitted.folder(protocol.with_(iterative_strength=3.0, ctdivol_mgy=1.3)).name == known[1]
    with pytest.raises(HarmonictError, match="no filter for the kernel B99"):
        fitted.folder(protocol.with_(kernel="B99"))


def test_a_model_that_cannot_be_made_is_a_row_with_its_reason_and_the_others_go_on(finished):
    models = finished[2].models.set_index("model")
    assert models["state"].to_dict() == {"identity": "done", "ratio": "done", "not there": "failed"}
    assert "no method 'no-such-method'" in models.loc["not there", "reason"]


def test_a_filter_brings_the_source_to_the_target_and_a_source_that_is_the_target_is_perfect(finished):
    tables = finished[2]
    for name, gain in (("all", 0.05), ("Br40, kernel", 0.1)):
        assert value(tables, "ratio", name, "body_psnr_db") > value(tables, "identity", name, "body_psnr_db") + 3
        assert value(tables, "ratio", name, "ccc_over_rois") > value(tables, "identity", name, "ccc_over_rois") + gain
    assert value(tables, "identity", "Bl57, kernel", "body_psnr_db") == np.inf
    assert value(tables, "identity", "Bl57, kernel", "ccc_over_rois") == 1
    assert value(tables, "identity", "Bl57, kernel", "reproducible_of_93") == 93
    assert value(tables, "identity", "Bl57, kernel", "glcm_contrast") == 0
    assert value(tables, "identity", "all", "ibex_image") > 0


def test_the_same_run_again_does_nothing_and_says_the_same(finished):
    plan, out, tables = finished
    said = []
    stamps = {p: p.stat().st_mtime_ns for p in (out / "results").rglob("*.npz")}
    again = run_benchmark(plan, out, say=said.append)
    assert [line for line in said if "FAILED" not in line] == []
    assert {p: p.stat().st_mtime_ns for p in (out / "results").rglob("*.npz")} == stamps
    assert again.page == tables.page == (out / "tables.md").read_text()


def test_a_measurement_that_is_lost_is_made_again_and_only_that(finished):
    plan, out, tables = finished
    lost = sorted((out / "results" / "ratio").glob("*.npz"))[0]
    stamps = {p: p.stat().st_mtime_ns for p in (out / "results").rglob("*.npz") if p != lost}
    lost.write_bytes(b"half a file")
    assert run_benchmark(plan, out, only=["ratio"]).page == tables.page
    assert {p: p.stat().st_mtime_ns for p in (out / "results").rglob("*.npz") if p != lost} == stamps


def test_a_network_is_trained_once_and_one_of_other_settings_is_moved_aside(trial, tmp_path):
    text = PLAN.split("[[model]]")[0] + CHOE
    variant = '[[model]]\nname = "choe, checked"\nbase = "choe"\ntrain = false\nsettings = { check_every = 1 }\n'
    tables = run_benchmark(plan_of(trial, text + variant), tmp_path)
    assert tables.models["state"].tolist() == ["done", "done"]
    row = tables.models.iloc[0]
    assert row["steps"] == 2 and row["parameters"] > 50 and row["seconds_per_slice"] > 0
    first, second = (load_model(tmp_path / "models" / name) for name in ("choe", "choe_checked"))
    assert first.config.check_every == 2 and second.config.check_every == 1
    assert all(np.array_equal(a, second.state_dict()[k]) for k, a in first.state_dict().items())

    said = []
    changed = plan_of(trial, text.replace("steps = 2", "steps = 3"))
    assert run_benchmark(changed, tmp_path, only=["choe"], say=said.append).models["steps"].tolist() == [3]
    assert any("steps changed; the model that was there is now choe.old-" in line for line in said)
    (old,) = [p for p in (tmp_path / "models").glob("choe.old-*")]
    assert load_model(old).digest == first.digest

    # put there by hand: taken where its settings are the plan's
    shutil.copytree(old, tmp_path / "by-hand" / "models" / "choe")
    said.clear()
    run_benchmark(plan_of(trial, text), tmp_path / "by-hand", say=said.append)
    assert not any("training" in line for line in said)


def test_a_training_that_fails_says_why_in_its_row(trial, tmp_path):
    plan = plan_of(trial, PLAN.split("[[model]]")[0] + CHOE.replace("patch = 32", "patch = 400"))
    row = run_benchmark(plan, tmp_path).models.iloc[0]
    assert row["state"] == "failed" and "smaller than the patch" in row["reason"] and "choe.log" in row["reason"]


# -- tables ----------------------------------------------------------------------------------------------------------


def test_ccc_of_the_tables_is_that_of_reproduce(trial, finished):
    plan, _, tables = finished
    case = next(c for c in test_cases(plan, trial / "cohort.csv") if c.name == "x Br40 1 mm 6.5 mGy").read()
    target, image = measure_target(case), measure(case, case.source)
    parts = [
        pd.DataFrame(arrays["features"], columns=texture_names()).assign(
            patient="x", scan=scan, roi=[r.name for r in case.rois]
        )
        for scan, arrays in (("target", target), ("source", image))
    ]
    expected = reproduce(pd.concat(parts), "target", rng=np.random.default_rng(0)).summary.iloc[0]
    rows = tables.cases[(tables.cases["model"] == "identity") & (tables.cases["case"] == case.name)]
    assert rows.iloc[0]["ccc_over_rois"] == pytest.approx(expected["ccc_over_rois_mean"], abs=1e-12)
    assert rows.iloc[0]["reproducible_of_93"] == expected["reproducible_ccc"]
    assert about(image)["rois"] == len(case.rois) == len(target["feature_range"])
    assert len(target["ibex_range"]) == len(target["ibex"]) == sum(r.hu_range[0] != -950 for r in case.rois)


def test_one_nodule_is_counted_against_the_targets_own(finished):
    plan, out, tables = finished
    rows = tables.tumour.set_index("model")
    assert rows.loc["ratio", "reproducible_of_1401"] > rows.loc["identity", "reproducible_of_1401"]
    images = tumour_images(out, plan)
    assert list(images) == ["target", "identity", "ratio"] and images["ratio"][1].sum() == 48
    error = {name: np.abs(hu - images["target"][0]).mean() for name, (hu, _) in images.items()}
    assert error["ratio"] < error["identity"]


def test_the_paired_test_is_scipys_over_the_series_of_both(finished):
    tables = finished[2]
    wide = tables.cases.pivot(index="case", columns="model", values="ccc_over_rois")
    expected = stats.ttest_rel(wide["ratio"], wide["identity"])
    row = tables.tests[tables.tests["measure"] == "CCC over ROIs"].iloc[0]
    assert row["t"] == pytest.approx(expected.statistic) and row["p"] == pytest.approx(expected.pvalue)
    assert row["series"] == 8 and row["difference"] == pytest.approx((wide["ratio"] - wide["identity"]).mean())


def test_biology_of_the_target_stands_beside_that_of_each_model(finished):
    summary = finished[2].summary
    everything = summary[summary["set"] == "all"]
    assert everything["tissue_auc_target"].nunique() == 1 and everything["tissue_auc"].between(0.5, 1).all()
    assert everything["between_patients"].between(0, 1).all()


def test_every_table_prints_psnr_and_ccc_side_by_side(finished):
    heads = [line for line in finished[2].page.splitlines() if line.startswith("|  | PSNR body")]
    assert heads and all("CCC over ROIs" in line for line in heads)


# -- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("trial =", "trail ="), "unknown key 'trail'"),
        (('target = "Bl64"', ""), "target is missing"),
        (('"cohort.csv"', '"kentuky"'), "kentucky-small"),
        (("rois = 3", "rois = 0"), "rois must be a whole number from 1 on"),
        (("rois = 3", 'evaluate_on = ["real"]'), "evaluate_on takes test, real-pairs"),
        (("rois = 3", 'evaluate_on = ["real-pairs"]'), "real pairs need one source"),
        (('name = "ratio"', 'name = "identity"'), "two of this name"),
        (('each = "protocol"', 'each = "patient"'), "each must be one of all, kernel, protocol"),
        (('each = "protocol"', "train = false"), "needs a base"),
        (('each = "protocol"', 'base = "choe"'), "its base 'choe' must stand before it"),
        (('each = "protocol"', "steps = 3"), "unknown key 'steps'"),
        (('each = "protocol"', "["), "is not TOML"),
    ],
)
def test_a_plan_that_cannot_be_done_is_refused_in_one_line(trial, change, words):
    with pytest.raises(HarmonictError, match=words) as error:
        plan_of(trial, PLAN.replace(*change))
    assert "\n" not in str(error.value)


def test_a_variant_has_its_bases_settings_but_for_what_it_says():
    plan = load_plan("configs/kentucky.toml")
    base, variant = (plan.model(name) for name in ("stan-ct quarter", "stan-ct quarter, no latent loss"))
    assert variant.method == "stan-ct" and variant.size == "compact"
    assert dict(variant.settings) == {**base.settings, "latent": 0.0}
    assert replace(variant.config(), latent=base.config().latent) == base.config()


@pytest.mark.parametrize("path", [path for path in sorted(Path("configs").glob("*.toml")) if "trial" not in path.stem])
def test_the_shipped_plans_name_settings_that_exist(path):
    plan = load_plan(path)
    assert {model.name: model.problem for model in plan.models if model.problem} == {}


@pytest.mark.parametrize("name", ["kentucky", "real-pairs"])
def test_the_plans_of_paired_methods_ask_all_of_them(name):
    plan = load_plan(f"configs/{name}.toml")
    assert {"identity", "histogram", "ratio", "wiener", "fir", "choe", "ganai", "stan-ct", "radiomic-gan"} <= {
        model.name for model in plan.models
    }


# -- real pairs ------------------------------------------------------------------------------------------------------


def test_the_real_pair_gives_the_figures_that_the_docs_state(data):
    pair = real_pair(data, "B10", "B70")
    case = RealCase(pair, 24, 0).read()
    target = measure_target(case)
    images = {"before": pair.source, "ratio": fitted_on_the_other_part(pair, "ratio")}
    values = {name: measure(case, image) for name, image in images.items()}
    ccc = {name: ccc_columns(target["features"], v["features"]).mean() for name, v in values.items()}
    assert ccc == pytest.approx({"before": 0.376, "ratio": 0.920}, abs=0.001)
    assert about(values["before"])["whole_psnr_db"] == pytest.approx(25.6, abs=0.05)
    assert about(values["ratio"])["body_psnr_db"] == pytest.approx(26.0, abs=0.05)


def test_a_real_pair_that_is_not_there_is_refused(data):
    with pytest.raises(HarmonictError, match="no real pair B10 to FC51"):
        real_pair(data, "B10", "FC51")
