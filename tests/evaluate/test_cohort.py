"""Feature tables of many series: the same regions for every rendition, nothing done twice, nothing lost."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harmonict.biomarkers import lung_density
from harmonict.core import HarmonictError
from harmonict.evaluate import cohort
from harmonict.evaluate.cohort import (
    Regions,
    cohort_biomarkers,
    cohort_features,
    feature_columns,
    find_target,
    join_features,
    known_classes,
    read_features,
)
from harmonict.evaluate.reproducibility import reproduce
from harmonict.radiomics import FeatureSettings, extract_features, ibsi_features
from harmonict.radiomics.ibex import ibex_features
from harmonict.volumes import read_volume, write_mask, write_volume
from make_dicom import make_ct_series
from toy import toy_series

BOXES = Regions(random=3, seed=1)


def small(**changes):
    return toy_series(**{"size": 96, "pixel_mm": 3.0, "slices": 3, **changes})


def ball(series, radius=6, centre=(48, 31)):
    y, x = np.mgrid[: series.hu.shape[1], : series.hu.shape[2]]
    return np.broadcast_to(np.hypot(y - centre[0], x - centre[1]) < radius, series.hu.shape).copy()


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Path:
    """Two patients, two kernels and a truth each, with masks: the cohort table that a simulation writes."""
    folder = tmp_path_factory.mktemp("trial")
    rows = []
    for n, patient in enumerate(("001", "002")):
        truth = small(seed=10 + n, blur_mm=0.5, noise_hu=1 + n)
        masks = []
        for name, mask in {"nodule_1": ball(truth), "lung": ball(truth, 12)}.items():
            write_mask(mask, truth.geometry, folder / f"{patient}-{name}.nii.gz")
            masks.append(f"{name}={patient}-{name}.nii.gz")
        for kernel, role, blur in (("Bl40", "source", 2.0), ("Bl64", "target", 0.8), (None, "truth", 0.5)):
            path = folder / f"{patient}-{role}.nii.gz"
            write_volume(small(seed=10 + n, blur_mm=blur, noise_hu=8), path)
            rows.append(
                {
                    "path": path.name,
                    "patient": patient,
                    "kernel": kernel,
                    "role": role,
                    "model": "truth" if role == "truth" else None,
                    "masks": ";".join(masks),
                    "nodules": "nodule_1=ground-glass 12",
                    "group": "nodule",
                    "emphysema_share": 0.1 * n,
                }
            )
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    return folder


@pytest.mark.parametrize(
    ("feature_set", "values", "direct"),
    [
        ("pyradiomics", {"bin_width": "10"}, lambda h, m, s: extract_features(h, m, s, FeatureSettings(bin_width=10))),
        (
            "pyradiomics",
            {"filters": "Original,Wavelet", "dimension": "2D", "families": "firstorder"},
            lambda h, m, s: extract_features(
                h,
                m,
                s,
                FeatureSettings(filters=("Original", "Wavelet"), dimension="2D", families=("firstorder",)),
            ),
        ),
        ("ibex", {}, ibex_features),
        ("ibsi", {}, ibsi_features),
    ],
)
def test_a_row_holds_what_the_extractor_gives_for_the_whole_image(trial, feature_set, values, direct):
    table = cohort_features(
        [trial / "001-source.nii.gz"],
        out=None,
        regions=Regions(),
        mask=trial / "001-nodule_1.nii.gz",
        feature_set=feature_set,
        values=values,
    )
    series = read_volume(trial / "001-source.nii.gz")
    expected = direct(series.hu, ball(series), series.geometry.spacing_mm)
    assert table["state"].tolist() == ["done"] and table["roi"].tolist() == ["001-nodule_1"]
    assert feature_columns(table) == list(expected)
    np.testing.assert_allclose(table[list(expected)].to_numpy()[0], list(expected.values()), rtol=1e-12)


def test_every_rendition_has_the_same_boxes_judged_on_the_target(trial):
    table = cohort_features([trial], out=None, regions=BOXES, values={"families": "firstorder"})
    assert set(table["state"]) == {"done"} and set(table["roi_kind"]) == {"random"}
    assert table["scan"].unique().tolist() == ["Bl40", "Bl64", "truth"]
    regions = table.groupby("scan")[["patient", "roi"]].apply(lambda part: set(part.itertuples(index=False)))
    assert len(set(map(frozenset, regions))) == 1
    on_target = table[(table["scan"] == "Bl64")]
    low = on_target["roi"].str.extract(r"HU(-?\d+)\.\.(-?\d+)").astype(float)
    mean = on_target["original_firstorder_Mean"]
    assert ((mean >= low[0]) & (mean <= low[1])).all()


def test_a_harmonization_that_changes_nothing_agrees_perfectly(trial, tmp_path):
    rows = pd.read_csv(trial / "cohort.csv", dtype={"patient": str})
    rows["path"] = [str(trial / p) for p in rows["path"]]
    rows["masks"] = None
    same = rows[rows["role"] == "target"].assign(role="derived", made_by="identity 0123", derived_from="none")
    pd.concat([rows, same]).to_csv(tmp_path / "all.csv", index=False)
    table = cohort_features([tmp_path / "all.csv"], out=None, regions=replace(BOXES, whole=True))
    result = reproduce(table, find_target(table, "Bl64"), rng=np.random.default_rng(0))
    each = result.features[result.features["scan"] == "Bl64 by identity 0123"]
    assert len(each) == 2 * 93 and (each["ccc_over_rois"] == 1).all() and (each["re_mean"] == 0).all()
    assert set(result.summary["level"]) == {"roi", "image"}
    before = result.summary[(result.summary["scan"] == "Bl40") & (result.summary["level"] == "roi")]
    assert before["ccc_over_rois_mean"].iloc[0] < 0.9


def test_two_processes_give_the_same_bytes_as_one(trial, tmp_path):
    one = cohort_features([trial], out=tmp_path / "one.csv", regions=BOXES)
    two = cohort_features([trial], out=tmp_path / "two.csv", regions=BOXES, jobs=2)
    pd.testing.assert_frame_equal(one, two)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_second_run_extracts_nothing_again_unless_a_setting_changed(trial, tmp_path, monkeypatch, ending):
    out = tmp_path / f"f.{ending}"
    first = cohort_features([trial], out=out, regions=BOXES)
    written = out.read_bytes()

    def never(task):
        raise HarmonictError("extracted again")

    monkeypatch.setattr(cohort, "extract_series", never)
    pd.testing.assert_frame_equal(first, cohort_features([trial], out=out, regions=BOXES))
    assert out.read_bytes() == written
    for changed in ({"regions": replace(BOXES, seed=2)}, {"regions": BOXES, "values": {"bin_width": 10}}):
        assert cohort_features([trial], out=out, **changed)["reason"].eq("extracted again").all()


def test_a_killed_run_goes_on_where_it_stopped(trial, tmp_path, monkeypatch):
    calls = []
    real = cohort.extract_series

    def counted(task):
        calls.append(task.entry.scan)
        return real(task)

    class Killed(BaseException):
        pass

    def kill(done, total, row):
        if done == 4:
            raise Killed

    monkeypatch.setattr(cohort, "extract_series", counted)
    with pytest.raises(Killed):
        cohort_features([trial], out=tmp_path / "f.csv", regions=BOXES, progress=kill)
    assert not (tmp_path / "f.csv").exists() and len(calls) == 4
    table = cohort_features([trial], out=tmp_path / "f.csv", regions=BOXES)
    assert len(calls) == 6 and set(table["state"]) == {"done"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.csv", "f.json"]
    pd.testing.assert_frame_equal(table, cohort_features([trial], out=None, regions=BOXES))


def test_a_changed_image_is_extracted_again(trial, tmp_path):
    write_volume(small(seed=1), tmp_path / "a.nrrd")
    first = cohort_features([tmp_path / "a.nrrd"], out=tmp_path / "f.csv", regions=BOXES)
    write_volume(small(seed=2), tmp_path / "a.nrrd")
    second = cohort_features([tmp_path / "a.nrrd"], out=tmp_path / "f.csv", regions=BOXES)
    name = "original_firstorder_Mean"
    assert not np.allclose(first[name].iloc[:3], second[name].iloc[:3])


def test_one_bad_series_is_a_row_with_its_reason_and_the_rest_goes_on(trial, tmp_path):
    rows = pd.read_csv(trial / "cohort.csv", dtype={"patient": str}).astype(object)
    rows["path"] = [str(trial / p) for p in rows["path"]]
    rows["masks"] = [";".join(m.replace("=", f"={trial}/") for m in row.split(";")) for row in rows["masks"]]
    rows.loc[0, "path"] = str(tmp_path / "gone.nii.gz")
    other = small(pixel_mm=2.5)
    write_mask(ball(other), other.geometry, tmp_path / "other.nii.gz")
    rows.loc[1, "masks"] = f"nodule_1={tmp_path / 'other.nii.gz'}"
    point = np.zeros(other.hu.shape, bool)
    point[1, 40, 30] = True
    write_mask(point, small().geometry, tmp_path / "point.nii.gz")
    rows.loc[2, "masks"] += f";point={tmp_path / 'point.nii.gz'}"
    rows.to_csv(tmp_path / "cohort.csv", index=False)
    table = cohort_features([tmp_path / "cohort.csv"], out=tmp_path / "f.csv", regions=Regions())
    failed = table[table["state"] == "failed"].set_index(["patient", "scan"])["reason"]
    assert "no file or folder" in failed["001", "Bl40"]
    assert "another grid" in failed["001", "Bl64"]
    assert "one voxel" in failed["001", "truth"] and len(failed) == 3
    assert table["state"].eq("done").sum() == 2 + 6
    result = reproduce(read_features(tmp_path / "f.csv"), "truth", rng=np.random.default_rng(0))
    assert set(result.summary["scan"]) == {"Bl40", "Bl64"}


def test_masks_carry_their_names_and_an_absent_one_lists_those_there(trial):
    table = cohort_features([trial], out=None, regions=Regions(names=("NODULE*",)), values={"families": "firstorder"})
    assert set(table["roi"]) == {"nodule_1"} and table["nodule_type"].eq("ground-glass").all()
    assert table.groupby("patient")["emphysema_grade"].first().to_dict() == {"001": "none", "002": "moderate"}
    table = cohort_features([trial], out=None, regions=Regions(names=("GTV",)))
    assert table["reason"].str.endswith("no ROI 'GTV'; there are: nodule_1, lung").all()


def test_a_derived_series_takes_masks_and_classes_of_its_source_and_the_name_of_its_model(trial):
    rows = pd.read_csv(trial / "cohort.csv", dtype={"patient": str}).astype(object)
    sources = rows[rows["patient"] == "001"].assign(series=["s0", "s1", "s2"])
    derived = sources.assign(series=["d0", "d1", "d2"], derived_from=["s0", "s1", "s2"], role="derived", kernel="Bl64")
    derived = derived.assign(made_by="mtf-ratio abc", model=None, masks=None, nodules=None, group=None)
    pd.concat([sources, derived]).to_csv(trial / "derived.csv", index=False)
    table = cohort_features([trial / "derived.csv"], out=None, regions=Regions(names=("nodule_1",)))
    assert set(table["state"]) == {"done"} and table["nodule_type"].eq("ground-glass").all()
    assert table["scan"].tolist()[3:] == [f"{name} by mtf-ratio abc" for name in ("Bl40", "Bl64", "truth")]
    assert find_target(table, "Bl64") == "Bl64" and table["group"].eq("nodule").all()


def test_scans_have_the_shortest_names_that_tell_them_apart(trial, tmp_path):
    def names(**columns) -> list[str]:
        n = len(next(iter(columns.values())))
        rows = {"path": [str(trial / "001-source.nii.gz")] * n, "patient": ["p"] * n, **columns}
        pd.DataFrame(rows).to_csv(tmp_path / "c.csv", index=False)
        return [e.scan for e in cohort.resolve([tmp_path / "c.csv"])[0]]

    assert names(kernel=["B30", "B70"], ctdivol_mgy=[1.0, 2.0]) == ["B30", "B70"]
    assert names(kernel=["B30", "B30"], ctdivol_mgy=[1.0, 2.5]) == ["B30 1 mGy", "B30 2.5 mGy"]
    assert names(kernel=["B30", "B30"], slice_thickness_mm=[1, 1]) == ["B30", "B30 #2"]
    assert names(kernel=["I30", "I30"], iterative_strength=[0, 3]) == ["I30", "I30(3)"]
    assert names(kernel=["B30", "B30"], scan=["first", "second"]) == ["first", "second"]


def test_two_folders_of_the_same_patients_need_no_table(tmp_path):
    for folder, blur in (("soft", 2.0), ("sharp", 0.8)):
        (tmp_path / folder).mkdir()
        for patient in ("p1", "p2"):
            write_volume(small(blur_mm=blur), tmp_path / folder / f"{patient}.nrrd")
    places = [tmp_path / "soft", tmp_path / "sharp"]
    table = cohort_features(places, out=None, regions=BOXES, target_protocol="sharp", values={"families": "glcm"})
    assert table["scan"].unique().tolist() == ["soft", "sharp"] and set(table["state"]) == {"done"}
    assert reproduce(table, "sharp", rng=np.random.default_rng(0)).summary["patients"].tolist() == [2]
    table = cohort_features(places, out=None, regions=BOXES)
    assert table["reason"].str.contains("--target-protocol, there are: soft, sharp").all()


def test_regions_on_another_grid_than_the_reference_are_refused(tmp_path):
    for name, pixel in (("a", 3.0), ("b", 2.9)):
        write_volume(small(pixel_mm=pixel), tmp_path / f"{name}.nrrd")
    rows = [
        {"path": f"{n}.nrrd", "patient": "p", "kernel": n, "role": r} for n, r in (("a", "target"), ("b", "source"))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "c.csv", index=False)
    table = cohort_features([tmp_path / "c.csv"], out=None, regions=BOXES)
    assert table[table["state"] == "failed"]["reason"].tolist() == [
        "no reference image on its grid; ROIs are judged on a"
    ]
    fixed = cohort_features([tmp_path / "c.csv"], out=None, regions=BOXES, spacing_mm=(3.0, 3.0))
    assert set(fixed["state"]) == {"done"}


def test_every_parameter_stands_beside_the_numbers(trial, tmp_path):
    cohort_features([trial], out=tmp_path / "f.parquet", regions=BOXES, values={"bin_width": "10"})
    report = json.loads((tmp_path / "f.json").read_text())
    assert report["settings"]["bin_width"] == 10 and report["settings"]["resample_mm"] is None
    assert report["regions"]["random"] == 3 and report["regions"]["seed"] == 1
    assert report["feature_set"] == "pyradiomics" and report["features"] == 93 and report["libraries"]["numpy"]
    assert "shape" not in report["settings"]["families"]


def test_text_stays_text_and_own_numbers_are_no_features(trial, tmp_path):
    written = cohort_features([trial], out=tmp_path / "f.csv", regions=BOXES)
    read = read_features(tmp_path / "f.csv")
    assert set(read["patient"]) == {"001", "002"}
    assert feature_columns(read) == feature_columns(written) and len(feature_columns(read)) == 93
    assert read["parameter_emphysema_share"].nunique() == 2
    assert known_classes(read, "group")["001", read["roi"].iloc[0]] == "nodule"
    with pytest.raises(HarmonictError, match="no column 'type'"):
        known_classes(read, "type")


def test_single_images_are_regions_of_their_own(tmp_path):
    series = small(slices=2)
    make_ct_series(
        tmp_path / "in", hu=series.hu, signed=True, intercept=0, spacing_mm=(339.0, 3.0, 3.0), SliceThickness="2"
    )
    kwargs = {"out": None, "slicewise": True, "values": {"families": "firstorder"}}
    table = cohort_features([tmp_path / "in"], regions=Regions(whole=True), **kwargs)
    assert table["roi"].tolist() == ["image body slice 1", "image body slice 2"]
    energy, total = table["original_firstorder_Energy"], table["original_firstorder_TotalEnergy"]
    np.testing.assert_allclose(total / energy, 2 * 3 * 3)


def test_the_target_is_a_scan_or_a_protocol(trial):
    table = cohort_features([trial], out=None, regions=BOXES, values={"families": "glcm"})
    assert [find_target(table, w) for w in ("Bl64", "bl64", "truth", "Truth")] == ["Bl64", "Bl64", "truth", "truth"]
    with pytest.raises(HarmonictError, match="not in the feature table; its scans: Bl40, Bl64, truth"):
        find_target(table, "Bl57")
    two = pd.concat([table, table.assign(scan="again")])
    with pytest.raises(HarmonictError, match="ambiguous; candidates: Bl40, again"):
        find_target(two, "bl40")


def test_a_table_without_regions_is_refused_in_words():
    images = pd.DataFrame({"patient": ["a"], "path": ["a.nii.gz"], "slices": [3]})
    with pytest.raises(HarmonictError, match="no column 'roi'; `harmonict features` makes"):
        join_features([images])


def test_tables_join_only_with_the_same_features(trial):
    table = cohort_features([trial], out=None, regions=BOXES, values={"families": "glcm"})
    assert len(join_features([table, table])) == len(table)
    with pytest.raises(HarmonictError, match="1 differ, such as 'original_glcm_Id'"):
        join_features([table, table.drop(columns="original_glcm_Id")])


def test_biomarkers_of_a_cohort_use_its_masks(trial):
    table = cohort_biomarkers([trial])
    row = table[(table["patient"] == "001") & (table["scan"] == "Bl40")].iloc[0]
    series = read_volume(trial / "001-source.nii.gz")
    expected = lung_density(series, ball(series, 12))
    assert row["lung_from"] == "masks" and row["mass_g"] == expected.mass_g
    assert row["laa950_percent"] == expected.laa950_percent and "nodule_1_volume_mm3" in table
    alone = cohort_biomarkers([trial / "001-source.nii.gz"])
    assert alone["lung_from"].tolist() == ["segmented"] and alone["volume_ml"].iloc[0] > 100
    reproduce(table.drop(columns=[c for c in table if "nodule_1" in c]), "truth", rng=np.random.default_rng(0))


def test_an_image_without_lungs_costs_its_own_row_only(trial, tmp_path):
    write_volume(small().with_hu(np.full((3, 96, 96), 40, np.float32)), tmp_path / "water.nrrd")
    table = cohort_biomarkers([trial / "001-source.nii.gz", tmp_path / "water.nrrd"])
    assert table["state"].tolist() == ["done", "failed"] and "no lung" in table["reason"].iloc[1]


def test_lung1_tumour_and_lungs_by_their_rtstruct(data):
    table = cohort_features(
        [data / "ct/LUNG1-001"],
        out=None,
        regions=Regions(names=("gtv-1", "Lung-*")),
        values={"families": "firstorder"},
    )
    assert table["roi"].tolist() == ["GTV-1", "Lung-Left", "Lung-Right"] and table["scan"].unique().tolist() == ["B19f"]
    assert table["diagnostics_voxels"].iloc[0] == 54639
