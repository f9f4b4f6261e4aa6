"""features, reproduce, biomarkers and combat on the command line, and what they refuse in one line."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harmonict import cli
from harmonict.volumes import write_mask, write_volume
from toy import toy_series


def small(**changes):
    return toy_series(**{"size": 96, "pixel_mm": 3.0, "slices": 3, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four patients with three kernels, masks, and inputs that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("cohort")
    rows = []
    for patient in range(4):
        for kernel, blur in (("B30", 1.8), ("B50", 1.2), ("B70", 0.6)):
            path = folder / f"p{patient}-{kernel}.nrrd"
            write_volume(small(seed=patient, blur_mm=blur, noise_hu=6 + patient), path)
            rows.append({"path": path.name, "patient": f"p{patient}", "kernel": kernel, "group": "ab"[patient % 2]})
    table = pd.DataFrame(rows)
    table.to_csv(folder / "cohort.csv", index=False)
    table.assign(path=[p if n else "gone.nrrd" for n, p in enumerate(table["path"])]).to_csv(
        folder / "broken.csv", index=False
    )
    series = small()
    labels = np.zeros(series.hu.shape, np.float32)
    labels[:, 40:56, 25:37] = 2
    labels[:, 40:56, 60:72] = 5
    write_volume(series.with_hu(labels), folder / "two-labels.nrrd")
    write_mask(labels == 2, series.geometry, folder / "mask.nii.gz")
    write_mask(labels == 2, small(pixel_mm=2.0).geometry, folder / "elsewhere.nii.gz")
    write_mask(labels == 7, series.geometry, folder / "empty.nii.gz")
    hu = series.hu.copy()
    hu[:, 45, 30] = 30000
    write_volume(series.with_hu(hu), folder / "bright.nrrd")
    (folder / "nan.mha").write_bytes(
        b"ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = 4 4 2\nElementSpacing = 1 1 1\n"
        b"ElementType = MET_FLOAT\nElementDataFile = LOCAL\n" + np.full(32, np.nan, np.float32).tobytes()
    )
    return folder


@pytest.fixture(scope="module")
def features(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("features") / "features.csv"
    with pytest.raises(SystemExit) as end:
        cli.main(
            f"features {folder}/cohort.csv --random 4 --target-protocol B70 --jobs 1 --out {out} "
            "--set families=firstorder,glcm".split()
        )
    assert not end.value.code
    return out


@pytest.mark.parametrize("command", ["features", "reproduce", "biomarkers", "combat fit", "combat apply"])
def test_every_help_shows_an_example(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and f"Example: harmonict {command}" in out


def test_one_image_prints_a_feature_a_row_with_the_value_last(run, folder):
    code, out, _ = run("features", folder / "p0-B30.nrrd", "--mask", folder / "mask.nii.gz")
    rows = list(csv.reader(io.StringIO(out)))
    assert code == 0 and rows[0] == ["patient", "scan", "roi", "feature", "value"] and len(rows) == 1 + 107
    assert {r[2] for r in rows[1:]} == {"mask"} and all(np.isfinite(float(r[-1])) for r in rows[1:])


def test_one_image_writes_one_row_of_csv(run, folder, tmp_path):
    image = folder / "p0-B30.nrrd"
    arguments = ["features", image, "--mask", folder / "two-labels.nrrd", "--label", 5]
    code, out, _ = run(*arguments, "--out", tmp_path / "f.csv")
    table = pd.read_csv(tmp_path / "f.csv")
    assert code == 0 and len(table) == 1 and "107 features of 1 ROIs in 1 series" in out
    printed = {r[3]: float(r[4]) for r in list(csv.reader(io.StringIO(run(*arguments)[1])))[1:]}
    assert printed == {name: table[name].iloc[0] for name in printed}
    code, out, _ = run(*arguments, "--feature-set", "ibex", "--json")
    (row,) = json.loads(out)
    assert code == 0 and sum(name not in table for name in row) == 1401 and row["roi"] == "two-labels 5"


def test_a_cohort_prints_its_counts_of_random_rois(run, folder, tmp_path):
    arguments = ["--random", 2, "--target-protocol", "B70", "--out", tmp_path / "f.parquet", "--jobs", 1]
    code, out, _ = run("features", folder / "cohort.csv", *arguments, "--set", "families=firstorder")
    assert code == 0 and "3x32x32" in out and "in 12 series" in out
    assert set(pd.read_parquet(tmp_path / "f.parquet")["scan"]) == {"B30", "B50", "B70"}


def test_a_failed_series_gives_exit_code_1_and_its_reason(run, folder, tmp_path):
    arguments = ["--random", 2, "--target-protocol", "B70", "--out", tmp_path / "f.csv", "--jobs", 1]
    code, out, _ = run("features", folder / "broken.csv", *arguments, "--set", "families=firstorder")
    assert code == 1 and "FAILED p0 B30, ROI -: no file or folder" in out and "in 11 series" in out


def test_reproduce_prints_both_kinds_of_ccc_and_writes_the_stable_features(run, features, tmp_path):
    code, out, _ = run("reproduce", features, "--target-protocol", "B70", "--out", tmp_path / "r", "--labels", "group")
    assert (
        code == 0
        and "CCC over ROIs" in out
        and "CCC over features" in out
        and "between patients" in out
        and "AUC target" in out
    )
    assert sorted(p.stem for p in (tmp_path / "r").iterdir()) == [
        "classes",
        "curve",
        "features",
        "glcm",
        "stable",
        "summary",
        "tests",
    ]
    tests = pd.read_csv(tmp_path / "r" / "tests.csv")
    assert set(tests["scan_a"]) == {"B30"} and set(tests["scan_b"]) == {"B50"} and set(tests["unit"]) == {"roi"}
    assert (tests["nearer"] == "b").any() and not (tests["nearer"] == "a").any()
    summary = pd.read_csv(tmp_path / "r" / "summary.csv").set_index("scan")
    assert summary.loc["B50", "ccc_over_rois_mean"] > summary.loc["B30", "ccc_over_rois_mean"]
    each = pd.read_csv(tmp_path / "r" / "features.csv")
    assert len(pd.read_csv(tmp_path / "r" / "stable.csv")) == each["stable"].sum()
    code, out, _ = run("reproduce", features, "--target-protocol", "B70", "--json")
    assert code == 0 and {"summary", "classes", "features", "curve", "glcm"} == set(json.loads(out))


def test_reproduce_joins_several_tables(run, features, tmp_path):
    table = pd.read_csv(features)
    for name, part in table.groupby("scan"):
        part.to_csv(tmp_path / f"{name}.csv", index=False)
    parts = [tmp_path / f"{name}.csv" for name in ("B30", "B50", "B70")]
    together = run("reproduce", *parts, "--target-protocol", "B70", "--json")
    assert together[0] == 0 and together[1] == run("reproduce", features, "--target-protocol", "B70", "--json")[1]


def test_ibex_features_keep_the_papers_classes(run, folder, tmp_path):
    out = tmp_path / "f.parquet"
    arguments = ["--random", 1, "--target-protocol", "B70", "--feature-set", "ibex", "--jobs", 1, "--out", out]
    assert run("features", folder / "cohort.csv", *arguments)[0] == 0
    code, printed, _ = run("reproduce", out, "--target-protocol", "B70", "--json")
    counts = {r["class"]: r["features"] for r in json.loads(printed)["classes"]}
    assert code == 0 and set(counts) == {"GOH", "GLCM", "GLRLM", "ID", "IH", "NID"} and sum(counts.values()) == 1401


def test_combat_is_fitted_on_some_rows_and_applied_to_others(run, features, tmp_path):
    table = pd.read_csv(features)
    train, unseen = table[table["patient"] != "p3"], table[table["patient"] == "p3"]
    train.to_csv(tmp_path / "train.csv", index=False)
    unseen.to_csv(tmp_path / "unseen.csv", index=False)
    varied = [c for c in table if c.startswith("original_")]
    constant = [c for c in varied if train.groupby("kernel")[c].agg(np.ptp).min() <= 1e-12 * train[c].abs().max()]
    for name in ("train", "unseen"):
        pd.read_csv(tmp_path / f"{name}.csv").drop(columns=constant).to_csv(tmp_path / f"{name}.csv", index=False)
    model = tmp_path / "model.json"
    code, out, _ = run(
        "combat", "fit", tmp_path / "train.csv", "--batch", "kernel", "--reference", "B70", "--out", model
    )
    assert code == 0 and "B30" in out and "B70" in out
    code, _, _ = run("combat", "apply", tmp_path / "unseen.csv", "--model", model, "--out", tmp_path / "after.csv")
    after = pd.read_csv(tmp_path / "after.csv")
    assert code == 0 and after["roi"].tolist() == unseen["roi"].tolist()
    name = "original_firstorder_Variance"
    gap = {n: t.groupby("kernel")[name].mean() for n, t in (("before", unseen), ("after", after))}
    assert abs(gap["after"]["B30"] / gap["after"]["B70"] - 1) < abs(gap["before"]["B30"] / gap["before"]["B70"] - 1)
    assert gap["after"]["B70"] == gap["before"]["B70"]


def test_biomarkers_are_printed_and_written(run, folder, tmp_path):
    code, out, _ = run("biomarkers", folder / "cohort.csv", "--out", tmp_path / "b.csv", "--jobs", 1)
    table = pd.read_csv(tmp_path / "b.csv")
    assert code == 0 and "LAA-950 %" in out and len(table) == 12 and table["volume_ml"].gt(100).all()
    code, out, _ = run("reproduce", tmp_path / "b.csv", "--target-protocol", "B70")
    assert code == 0 and "laa950" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["features", "{f}/p0-B30.nrrd"], "give --mask"),
        (["features", "{f}/none.nrrd", "--whole"], "no file or folder"),
        (["features", "{f}/p0-B30.nrrd", "--mask", "{f}/none.nii"], "no mask at"),
        (["features", "{f}/p0-B30.nrrd", "--mask", "{f}/elsewhere.nii.gz"], "another grid"),
        (["features", "{f}/p0-B30.nrrd", "--mask", "{f}/two-labels.nrrd"], "found 2, 5; say which (--label)"),
        (["features", "{f}/p0-B30.nrrd", "--mask", "{f}/two-labels.nrrd", "--label", "3"], "there are: 2, 5"),
        (["features", "{f}/p0-B30.nrrd", "--mask", "{f}/mask.nii.gz", "--roi", "GTV"], "there are: mask"),
        (["features", "{f}/p0-B30.nrrd", "--mask", "{f}/empty.nii.gz"], "expected one label, found none"),
        (["features", "{f}/p0-B30.nrrd", "--whole", "--set", "bin_width=0"], "bin width must be above 0"),
        (["features", "{f}/p0-B30.nrrd", "--whole", "--set", "bins=3"], "unknown setting"),
        (["features", "{f}/p0-B30.nrrd", "--whole", "--feature-set", "mine"], "there are: pyradiomics, ibex, ibsi"),
        (["features", "{f}/bright.nrrd", "--mask", "{f}/mask.nii.gz", "--set", "bin_width=1"], "10,000"),
        (["features", "{f}/nan.mha", "--whole"], "NaN or infinite HU"),
        (["features", "{f}/p0-B30.nrrd", "--whole", "--out", "{t}/f.xlsx"], ".csv or .parquet"),
        (["features", "{f}/cohort.csv", "--mask", "{f}/mask.nii.gz"], "--mask is for one image"),
        (["features", "{f}/p0-B30.nrrd", "--random", "-1"], "0 or more"),
        (["biomarkers", "{f}/nan.mha"], "NaN or infinite HU"),
        (["reproduce", "{t}/none.csv", "--target-protocol", "B70"], "no feature table"),
        (["reproduce", "{x}", "--target-protocol", "B99"], "its scans: B30, B50, B70"),
        (["reproduce", "{x}", "--target-protocol", "B70", "--labels", "kind"], "no column 'kind'"),
        (["combat", "fit", "{x}", "--batch", "site", "--out", "{t}/m.json"], "no column 'site'"),
        (["combat", "apply", "{x}", "--model", "{t}/m.json", "--out", "{t}/f.csv"], "cannot read"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, folder, features, tmp_path, arguments, words):
    code, _, err = run(*[a.format(f=folder, t=tmp_path, x=features) for a in arguments])
    assert code == 2, err
    assert words in err and len(err.strip().splitlines()) == 1 and err.startswith("harmonict: ")


def test_a_harmonized_table_alone_says_that_its_sources_name_the_masks(run, folder, tmp_path):
    source = folder / "p0-B30.nrrd"
    assert run("harmonize", source, tmp_path / "out", "--model", "identity", "--jobs", 1)[0] == 0
    code, _, err = run("features", tmp_path / "out" / "cohort.csv", "--jobs", 1)
    assert code == 2 and "give the table of its sources, which names the masks, beside this one" in err
