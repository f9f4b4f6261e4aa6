"""The virtual imaging trial: presets, bytes, resume, masks, cohort table, refusals."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from scipy import ndimage

from harmonict.core import HarmonictError
from harmonict.core.cohort import COHORT_COLUMNS, read_cohort
from harmonict.dicom.read import read_series
from harmonict.physics.kernel import Kernel, write_kernel
from harmonict.simulate import trial as module
from harmonict.simulate.scanner import Scanner, slice_profile
from harmonict.simulate.trial import check_trial, disk_bytes, load_trial, preset_names, run_trial, run_unit, units
from harmonict.volumes import read_mask

TINY = """
name = "tiny"
about = "a trial for tests"
target = "Br40,dose=6.5,thickness=1.5,strength=0"
fov_mm = 420.0
slices = 1
slice_mm = 1.5
matrix = 84
object_matrix = 168
seed = 9

[[group]]
name = "copd"
split = "train"
patients = 1
models = 2
emphysema = [0.05, 0.3]
renditions = ["Br40", "Br40(3)", "Bl64"]
doses_mgy = [1.3, 6.5]
thicknesses_mm = [0.5, 1.5]

[[group]]
name = "nodule"
split = "test"
patients = 1
nodules = 1
renditions = ["Br40", "B10"]
doses_mgy = [6.5]
thicknesses_mm = [1.5]
kvp = [80, 120]
"""


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder`, hidden ones too, and its digest."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def series_at(path: Path):
    return read_series(sorted(Path(path).glob("*.dcm")))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    """The tiny trial, made in this process: (folder, its table as read back)."""
    out = tmp_path_factory.mktemp("made") / "trial"
    run_trial(load_trial(config), out)
    return out, read_cohort(out / "cohort.csv")


# -- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_plans_patients_who_stay_on_one_side_of_the_split(name):
    trial = load_trial(name)
    work = units(trial, Path("out"))
    splits: dict[str, set[str]] = {}
    for unit in work:
        splits.setdefault(unit.subject, set()).add(unit.group.split)
        splits.setdefault(f"seed {unit.patient.seed}", set()).add(unit.group.split)
    assert all(len(s) == 1 for s in splits.values())
    assert len({(u.patient_id, u.thickness_mm) for u in work}) == len(work)
    assert len({u.patient.seed for u in work}) == sum(g.patients for g in trial.groups)
    assert len({u.noise_seed for u in work}) == sum(g.patients * g.models for g in trial.groups)
    if name.endswith("-small") or name == "demo":
        assert disk_bytes(trial) < 2e9


def test_small_forms_scan_patients_of_the_full_preset():
    for name in preset_names():
        if name.endswith("-small"):
            full = {u.patient_id: u.patient for u in units(load_trial(name.removesuffix("-small")), Path("out"))}
            small = {u.patient_id: u.patient for u in units(load_trial(name), Path("out"))}
            assert small and all(full[key] == patient for key, patient in small.items())


def by_split(trial):
    return {s: [g for g in trial.groups if g.split == s] for s in ("train", "test", "score")}


def test_duke_is_the_trial_of_zarei_and_others():
    trial = load_trial("duke")
    groups = by_split(trial)
    assert [(g.patients, g.models, g.nodules) for g in groups["train"]] == [(9, 2, 0), (29, 1, 1)]
    assert [(g.patients, g.models, g.nodules) for g in groups["test"]] == [(1, 2, 0), (1, 1, 1)]
    settings = (
        "Br32 Br32(3) Br40 Br40(3) Br49 Br49(3) Br59 Br59(3) Br62 Br64 Br69 Br69(3) Qr32 Qr49 Qr59 Qr61"
    ).split()
    assert all(list(g.renditions) == settings and g.doses_mgy == (1.3, 6.5) for g in trial.groups)
    assert trial.fov_mm == 500 and trial.matrix == 512 and trial.target == "truth"


def test_kentucky_is_the_trial_of_selim_and_others():
    trial = load_trial("kentucky")
    groups = by_split(trial)
    assert [(g.patients, g.kind) for g in groups["train"]] == [(9, "chest"), (1, "lungman")]
    assert [(g.patients, g.kind) for g in groups["test"]] == [(3, "chest"), (1, "lungman")]
    for group in trial.groups:
        assert group.doses_mgy == (1.3, 6.5)
        assert set(group.renditions) == {"Bl57", "Bl64", "Br40", "Bl57(3)", "Bl64(3)", "Br40(3)"}
        assert group.thicknesses_mm == (0.5, 1.0, 1.5, 3.0) + ((5.0,) if group.name == "lungman-test" else ())
    assert trial.fov_mm == 350
    targets = [p for g in trial.groups for t in g.thicknesses_mm for p in g.protocols(t, 350.0)
               if module._role(p, trial) == "target"]  # fmt: skip
    assert {p.label() for p in targets} == {"Bl64 1 mm 6.5 mGy"} and len(targets) == len(trial.groups)


def test_cross_vendor_scores_250_pairs_of_patients_it_never_trains_on():
    trial = load_trial("cross-vendor")
    groups = by_split(trial)
    assert [g.renditions for g in groups["train"]] == [("LUNG",), ("Bl64",)] and not groups["test"]
    [both] = groups["score"]
    assert both.renditions == ("LUNG", "Bl64") and both.kvp == (70, 80, 100, 120, 140)
    assert both.thicknesses_mm == (5.0,) and trial.slice_mm == 5.0
    assert both.patients * trial.slices * len(both.kvp) * len(both.doses_mgy) == 250


def test_real_pairs_has_the_kernels_and_pixels_of_the_real_pairs():
    trial = load_trial("real-pairs")
    assert {g.renditions for g in trial.groups} == {("B10", "B30", "B50", "B70"), ("FC13", "FC51")}
    assert 0.68 <= trial.fov_mm / trial.matrix <= 0.71
    assert all(by_split(trial)[s] for s in ("train", "test"))


# -- what is made ----------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_every_rendition_and_truth(made):
    out, table = made
    assert list(table.columns[: len(COHORT_COLUMNS)]) == list(COHORT_COLUMNS)
    assert len(table) == 2 * 2 * (6 + 1) + (4 + 1) and set(table["state"]) == {"done"}
    assert table["series"].is_unique and table["path"].is_unique
    assert table.groupby("subject")["split"].nunique().eq(1).all()
    assert table["role"].value_counts().to_dict() == {"source": 24, "truth": 5, "target": 4}
    target = table[table["role"] == "target"]
    assert set(target["kernel"]) == {"Br40"} and set(target["slice_thickness_mm"]) == {1.5}
    assert set(target["iterative_strength"]) == {0.0} and set(target["ctdivol_mgy"]) == {6.5}
    shares = table[table["group"] == "copd"].groupby("patient")["emphysema_share"].first()
    assert 0.05 <= shares.iloc[0] <= 0.175 <= shares.iloc[1] <= 0.3
    assert (out / "cohort.csv").read_text().count(str(out)) == 0, "paths are relative, so that the folder can move"


def test_every_series_reads_back_with_the_protocol_and_grid_of_its_row(made):
    for _, row in made[1].iterrows():
        series = series_at(row["path"])
        assert series.hu.shape == (row["slices"], row["rows"], row["columns"])
        assert np.allclose(series.geometry.spacing_mm, row[["spacing_z_mm", "spacing_y_mm", "spacing_x_mm"]].to_list())
        if row["role"] == "truth":
            assert series.protocol.kernel is None and series.protocol.model == "truth"
        else:
            assert (
                series.protocol.label()
                == f"{series.protocol.kernel}"
                + (f"({row['iterative_strength']:g})" if row["iterative_strength"] else "")
                + f" {row['slice_thickness_mm']:g} mm {row['ctdivol_mgy']:g} mGy"
            )
            assert (series.protocol.kernel, series.protocol.kvp) == (row["kernel"], row["kvp"])
            assert series.protocol.manufacturer == row["manufacturer"] == "Siemens"
            assert series.protocol.exposure_mas == pytest.approx(row["exposure_mas"], abs=0.5)
        assert series.patient == row["patient"]


def test_all_thicknesses_cover_the_same_length(made):
    table = made[1]
    ends = {
        t: (s.slice_positions_mm[0] - t / 2, s.slice_positions_mm[-1] + t / 2)
        for t in (0.5, 1.5)
        for s in [series_at(table[(table["slice_thickness_mm"] == t)]["path"].iloc[0])]
    }
    assert ends[0.5] == pytest.approx(ends[1.5])


def test_a_scan_lies_where_most_nodules_are(tmp_path):
    for unit in units(load_trial("kentucky"), tmp_path):
        if unit.thickness_mm == 1.0 and unit.group.kind == "lungman":
            heights = [centre[2] for centre, _ in unit.patient.placed_nodules()]
            start, length = module._start(unit), unit.trial.length_mm
            held = sum(start < h < start + length for h in heights)
            most = max(sum(z <= h <= z + 0.7 * length for h in heights) for z in heights)
            assert len(heights) == 3 and held >= most >= 1


def test_renditions_of_one_dose_share_their_noise_and_doses_and_models_do_not(made):
    table = made[1]
    copd = table[(table["group"] == "copd") & (table["slice_thickness_mm"] == 1.5)]

    def noise(model, kernel, dose, strength=0.0):
        row = copd[
            copd["patient"].str.endswith(model)
            & (copd["kernel"] == kernel)
            & (copd["ctdivol_mgy"] == dose)
            & (copd["iterative_strength"] == strength)
        ].iloc[0]
        truth = copd[copd["patient"].str.endswith(model) & (copd["role"] == "truth")].iloc[0]
        series, known = series_at(row["path"]), series_at(truth["path"]).hu[0]
        flat = known == -1000  # air, and nothing but air around it
        for axis in (0, 1):
            for step in (-3, -2, -1, 1, 2, 3):
                flat &= np.roll(known, step, axis) == -1000
        assert flat.sum() > 500
        header = dcmread(next(Path(row["path"]).glob("*.dcm")), stop_before_pixels=True)
        return series.hu[0][flat] - series.hu[0][flat].mean(), header.IrradiationEventUID

    def correlation(a, b):
        return np.corrcoef(a[0], b[0])[0, 1], a[1] == b[1]

    reference = noise("a", "Bl64", 1.3)
    shared, same = correlation(reference, noise("a", "Br40", 1.3))
    assert shared > 0.4 and same
    for other in (noise("a", "Bl64", 6.5), noise("b", "Bl64", 1.3)):
        r, same = correlation(reference, other)
        assert abs(r) < 0.15 and not same


def inside(mask: np.ndarray) -> np.ndarray:
    """The mask without a rim of one pixel in plane."""
    return ndimage.binary_erosion(mask, np.ones((1, 3, 3)))


def test_the_truth_is_what_the_images_show_without_noise_and_blur(made):
    table = made[1]
    for patient, rows in table[table["slice_thickness_mm"] == 1.5].groupby("patient"):
        truth = series_at(rows[rows["role"] == "truth"]["path"].iloc[0])
        [scan] = [series_at(p) for p in rows[(rows["role"] == "target") & (rows["kvp"] == 120)]["path"]]
        lung = inside(read_mask(made[0] / f"{patient}/masks-1.5mm/lung.nii.gz", like=truth))
        assert truth.hu.min() == -1000
        assert abs((scan.hu - truth.hu)[lung].mean()) < 10 and abs((scan.hu - truth.hu).mean()) < 5
        assert np.corrcoef(scan.hu.ravel(), truth.hu.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("thickness", [0.5, 1.5, 0.7])
def test_shared_sub_slices_are_those_of_each_slice_alone(config, tmp_path, thickness):
    unit = replace(units(load_trial(config), tmp_path)[0], thickness_mm=thickness)
    offsets, _ = slice_profile(0.5, thickness, Scanner())
    centres = 60.0 + thickness * (np.arange(3) + 0.5)
    for centre, slab in zip(centres, module._slabs(unit, centres), strict=True):
        alone = unit.patient.slab(centre + offsets, 0.5, shape=slab.hu120.shape[1:])
        assert slab.hu120.shape == alone.hu120.shape
        assert np.allclose(slab.hu120, alone.hu120, atol=0.01) and np.allclose(slab.spectral, alone.spectral, atol=1e-4)
        assert slab.masks.keys() == alone.masks.keys()
        assert all(np.array_equal(slab.masks[name], alone.masks[name]) for name in slab.masks)


def test_truth_weighs_sub_slices_by_what_lies_in_the_slice():
    assert module._covered(2, 0.5) == pytest.approx([0.5, 0.5])
    assert module._covered(4, 1.5) == pytest.approx([1 / 6, 1 / 3, 1 / 3, 1 / 6])
    assert module._covered(4, 1.0) == pytest.approx([0, 0.5, 0.5, 0])


def test_truth_pixels_are_exact_means_over_their_area():
    trial = load_trial("demo")
    x = (np.arange(trial.object_matrix) - (trial.object_matrix - 1) / 2) * 500 / trial.object_matrix
    ramp = (3.0 * x[:, None] - 2.0 * x[None, :]).astype(np.float32)
    centre = (np.arange(trial.matrix) - (trial.matrix - 1) / 2) * trial.fov_mm / trial.matrix
    found = module._area_average(trial)(ramp)
    # a ramp's mean over a pixel is its value at the centre, up to the steps of the object's grid
    assert np.abs(found - (3.0 * centre[:, None] - 2.0 * centre[None, :])).max() < 500 / trial.object_matrix
    assert found.mean() == pytest.approx(0, abs=1e-3)


def test_masks_lie_on_the_grid_of_their_series_and_over_what_they_name(made):
    out, table = made
    seen = set()
    for _, row in table[table["role"] == "truth"].iterrows():
        truth = series_at(row["path"])
        masks = {}
        for entry in row["masks"].split(";"):
            name, _, path = entry.partition("=")
            masks[name] = read_mask(out / path, like=truth)
        seen |= set(masks)
        assert all(m.any() for m in masks.values())
        assert np.array_equal(masks["lung"], masks["lung_left"] | masks["lung_right"])
        assert -950 < truth.hu[masks["lung"]].mean() < -650
        if row["emphysema_share"]:
            deep, dark = inside(masks["lung"]), truth.hu < -945
            assert dark[deep & masks["emphysema"]].mean() > 4 * dark[deep & ~masks["emphysema"]].mean()
            assert not (masks["emphysema"] & ~masks["lung"]).any()
        if "nodule_1" in masks:
            density, diameter = row["nodules"].removeprefix("nodule_1=").split()
            assert density in ("solid", "part-solid", "ground-glass") and 4 <= float(diameter) <= 30
            assert truth.hu[masks["nodule_1"]].mean() > truth.hu[masks["lung"]].mean()
    assert {"lung", "emphysema", "nodule_1"} <= seen


def test_the_disk_need_that_is_stated_is_what_is_used(made, config):
    used = sum(p.stat().st_size for p in made[0].rglob("*") if p.is_file())
    assert used == pytest.approx(disk_bytes(load_trial(config)), rel=0.15)


# -- the same bytes --------------------------------------------------------------------------------------------------


def test_two_processes_make_the_same_bytes_as_one(made, config, tmp_path):
    calls = []
    run_trial(load_trial(config), tmp_path / "b", jobs=2, progress=lambda *a: calls.append(a))
    assert tree(tmp_path / "b") == tree(made[0])
    assert [c[:2] for c in calls] == [(n, 5) for n in range(1, 6)]


def test_a_killed_run_goes_on_to_the_same_bytes(made, config, tmp_path):
    out = tmp_path / "k"
    code = f"from harmonict.simulate.trial import *; run_trial(load_trial({str(config)!r}), {str(out)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 120
    # killed while the second part is being written, so that a half-written series lies there
    while not ((out / "cohort.csv").exists() and list(out.rglob(".*.harmonict"))):
        assert process.poll() is None and time.monotonic() < end, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read_cohort(out / "cohort.csv")
    assert 0 < len(before) < len(made[1])
    said = []
    run_trial(load_trial(config), out, say=said.append)
    assert tree(out) == tree(made[0])
    assert any("going on" in line for line in said)


def test_a_part_that_fails_costs_no_other_and_is_tried_again(made, config, tmp_path, monkeypatch):
    out = tmp_path / "f"
    shutil.copytree(made[0], out)
    lost = "tiny-s9-copd-001b"
    shutil.rmtree(out / lost)  # two parts whose files are gone, though the table names them
    real = module.run_unit

    def fails(unit):
        if unit.thickness_mm == 0.5:
            raise HarmonictError("the disk is made of cheese")
        return real(unit)

    monkeypatch.setattr(module, "run_unit", fails)
    table = run_trial(load_trial(config), out)
    [failed] = table[table["state"] == "failed"].to_dict("records")
    assert (failed["patient"], failed["slice_thickness_mm"]) == (lost, 0.5)
    assert failed["reason"] == "the disk is made of cheese"
    assert len(table) == len(made[1]) - 7 + 1 and len(read_cohort(out / "cohort.csv")) == len(table)
    monkeypatch.undo()
    run_trial(load_trial(config), out)
    assert tree(out) == tree(made[0])


def test_a_finished_trial_is_not_made_again(made, config, monkeypatch):
    monkeypatch.setattr(module, "run_unit", lambda unit: pytest.fail("made again"))
    before = tree(made[0])
    table = run_trial(load_trial(config), made[0])
    assert len(table) == len(made[1]) and tree(made[0]) == before


def test_another_seed_gives_other_patients_noise_and_uids(made, config, tmp_path):
    other = [u for u in units(load_trial(config, seed=1), tmp_path) if u.group.name == "nodule"]
    rows = run_unit(other[0])
    table = made[1]
    assert not set(table["patient"]) & {r["patient"] for r in rows}
    assert not set(table["series"]) & {r["series"] for r in rows}
    mine = table[table["group"] == "nodule"]
    for (_, a), b in zip(mine.iterrows(), rows, strict=True):
        assert not np.array_equal(series_at(a["path"]).hu, series_at(b["path"]).hu)


def test_memory_does_not_grow_with_the_number_of_patients(tmp_path):
    text = TINY.split("[[group]]")
    text[2] = text[2].replace("patients = 1", "patients = 5").replace("kvp = [80, 120]", "")
    (tmp_path / "five.toml").write_text("[[group]]".join([text[0], text[2]]))
    kept, peak = [], []

    def note(*_):
        now, highest = tracemalloc.get_traced_memory()
        kept.append(now)
        peak.append(highest)
        tracemalloc.reset_peak()

    tracemalloc.start()
    try:
        run_trial(load_trial(tmp_path / "five.toml"), tmp_path / "out", progress=note)
    finally:
        tracemalloc.stop()
    # from the second patient on two are remembered, of different sizes
    assert len(kept) == 5 and max(kept[2:]) < 1.15 * max(kept[:2]) and max(peak[2:]) < 1.15 * max(peak[:2])


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"Bl64"]', '"Bl46"]', "did you mean Bl"),
        ('"Br40(3)"', '"Br40(9)"', "strength must be from 0 to 5"),
        ('"Br40(3)"', '"Br40(x)"', "as in Br40(3)"),
        ('"Br40(3)"', '"Br40"', "without repetition"),
        ("[1.3, 6.5]", "[0.0, 6.5]", "CTDIvol in mGy must be above 0, got 0"),
        ("[1.3, 6.5]", "[-1, 6.5]", "above 0, got -1"),
        ("[1.3, 6.5]", "6.5", "doses_mgy must be a list of numbers"),
        ("[1.3, 6.5]", "[]", "without repetition, got []"),
        ("[0.5, 1.5]", "[0.25, 1.5]", "finer|thinner than the phantom's sampling of 0.5 mm"),
        ("[0.5, 1.5]", "[0.5, 3.0]", "ask for more slices"),
        ("fov_mm = 420.0", "fov_mm = 600.0", "wider than the scanner's 500 mm"),
        ("fov_mm = 420.0", "fov_mm = 0.0", "fov_mm must be above 0"),
        ("kvp = [80, 120]", "kvp = [90]", "kVp"),
        ("kvp = [80, 120]", 'kind = "torso"', "kind must be one of chest, lungman"),
        ('split = "test"', 'split = "exam"', "split must be one of train, test, score"),
        ("emphysema = [0.05, 0.3]", "emphysema = [0.3, 0.05]", "emphysema must be"),
        ("emphysema = [0.05, 0.3]", "", "give emphysema"),
        ('name = "nodule"', 'name = "copd"', "same name"),
        ('name = "nodule"', 'name = "../x"', "a name is a letter"),
        ("slices = 1", "slices = 0", "slices and slice_mm must be above 0"),
        ("slices = 1", 'slices = "1"', "slices must be a whole number"),
        ("slices = 1", "slice = 1", "unknown key 'slice'; did you mean slices?"),
        ("slices = 1", "", "slices is missing"),
        ("slices = 1", "slices = ", "is not TOML"),
        ("thickness=1.5", "thickness=2", "no group makes the target"),
        ("thickness=1.5", "thick=2", "unknown key 'thick'"),
        ("matrix = 84", "matrix = 5000", "matrix must be 16 to 2048"),
        ("[[group]]", "[[patients]]", "at least one [[group]]"),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_line(tmp_path, old, new, words):
    assert old in TINY
    path = tmp_path / "wrong.toml"
    path.write_text(TINY.replace(old, new))
    with pytest.raises(HarmonictError) as error:
        load_trial(path)
    assert any(w in str(error.value) for w in words.split("|")) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "near"), [("duk", "duke"), ("kentuky-small", "kentucky-small"), ("pairs", "real-pairs")]
)
def test_an_unknown_preset_names_the_nearest_and_lists_them(name, near):
    with pytest.raises(HarmonictError, match=f"did you mean {near}\\?") as error:
        load_trial(name)
    assert all(p in str(error.value) for p in preset_names())


def test_a_negative_seed_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(HarmonictError, match="seed must be 0 or more"):
        load_trial("demo", seed=-1)
    with pytest.raises(HarmonictError, match="slices and slice_mm"):
        load_trial("demo", slices=0)
    with pytest.raises(HarmonictError, match=r"cannot read .*none\.toml"):
        load_trial(tmp_path / "none.toml")


def test_a_body_outside_the_field_of_view_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SCANNER", Scanner(fov_mm=320.0))
    monkeypatch.setattr(module, "run_unit", lambda unit: pytest.fail("computing began"))
    (tmp_path / "narrow.toml").write_text(TINY.replace("fov_mm = 420.0", "fov_mm = 320.0"))
    with pytest.raises(HarmonictError, match="outside a field of view of 320 mm"):
        run_trial(load_trial(tmp_path / "narrow.toml"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scan_longer_than_the_patient_is_refused(config, tmp_path):
    with pytest.raises(HarmonictError, match=r"lies at .* mm, the slices at"):
        run_trial(load_trial(config, slices=400), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_anything_else_in_it_is_refused(made, config, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(HarmonictError, match="not empty and holds no trial"):
        run_trial(load_trial(config), tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HarmonictError, match="is a file"):
        run_trial(load_trial(config), tmp_path / "file")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "trial.json").write_text("[1]")
    with pytest.raises(HarmonictError, match="not the state of a trial"):
        run_trial(load_trial(config), tmp_path / "odd")
    before = tree(made[0])
    for other, field in ((load_trial(config, seed=5), "seed"), (load_trial(config, slices=2), "slices")):
        with pytest.raises(HarmonictError, match=f"another configuration or seed \\({field}\\)"):
            run_trial(other, made[0])
    assert tree(made[0]) == before
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine" and len(list((tmp_path / "full").iterdir())) == 1


# -- the user's own kernels ------------------------------------------------------------------------------------------


def own(tmp_path: Path, rows: str, name: str = "mine.csv") -> Path:
    (tmp_path / name).write_text("frequency_per_mm,mtf\n" + rows)
    path = tmp_path / "own.toml"
    text = TINY.split("[[group]]")
    group = text[2].replace('["Br40", "B10"]', '["Br40", "mine"]').replace("kvp = [80, 120]", "")
    path.write_text("[[group]]".join([text[0] + f'kernel_files = ["{name}"]\n\n', group]))
    return path


def test_a_users_kernel_is_used_under_its_name(tmp_path):
    f = np.linspace(0, 1, 21)
    write_kernel(Kernel("mine", f, np.exp(-((f / 0.1) ** 2)), ""), tmp_path / "mine.csv")
    text = (tmp_path / "mine.csv").read_text().split("\n", 1)[1]
    trial = load_trial(own(tmp_path, text))
    [unit] = units(trial, tmp_path / "out")
    rows = run_unit(unit)
    assert [r["kernel"] for r in rows] == ["Br40", "mine", None]
    sharp, soft = (series_at(r["path"]) for r in rows[:2])
    assert soft.protocol.kernel == "mine"
    assert np.abs(np.diff(soft.hu, axis=2)).mean() < 0.8 * np.abs(np.diff(sharp.hu, axis=2)).mean()
    (tmp_path / "mine.csv").write_text((tmp_path / "mine.csv").read_text().replace("0.1,", "0.11,"))
    [other] = units(load_trial(tmp_path / "own.toml"), tmp_path / "out")
    assert other.key != unit.key, "another curve under the same name gives other UIDs"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("0,1\n0.2,0.6\n0.1,0.5\n0.5,0\n", "frequencies must rise"),
        ("0,0.9\n0.2,0.6\n0.5,0\n", "at frequency 0 must be 1, got 0.9"),
        ("0,1\n0.2,0.6\n", "down to 0.1"),
    ],
)
def test_a_wrong_mtf_of_the_user_is_refused_before_computing(tmp_path, rows, words):
    with pytest.raises(HarmonictError, match=words):
        load_trial(own(tmp_path, rows))


def test_a_users_kernel_may_not_take_a_known_name(tmp_path):
    with pytest.raises(HarmonictError, match="name of another kernel"):
        load_trial(own(tmp_path, "0,1\n0.5,0\n", "B30.csv"))


def test_a_loaded_trial_passes_its_own_check():
    for name in preset_names():
        check_trial(load_trial(name))
