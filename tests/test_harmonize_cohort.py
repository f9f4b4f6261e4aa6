import errno
import json
import os
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from harmonict.core import HarmonictError
from harmonict.core.cohort import read_cohort, write_cohort
from harmonict.dicom.inventory import find_series, inspect
from harmonict.dicom.masks import read_masks
from harmonict.dicom.read import read_series
from harmonict.harmonize_cohort import harmonize_cohort, write_qc
from harmonict.methods.identity import Identity
from harmonict.methods.mtf_ratio import MTFRatio
from harmonict.volumes import read_volume, write_volume
from make_dicom import make_ct_series
from toy import toy_series

TOY = {name: toy_series(blur_mm=blur, seed=n) for n, (name, blur) in enumerate([("soft", 1.3), ("sharp", 0.8)])}


def cohort(folder: Path) -> Path:
    """Two patients of two kernels, one truncated series, one text file."""
    for name, series in TOY.items():
        make_ct_series(
            folder / name,
            hu=series.hu,
            signed=True,
            intercept=0,
            spacing_mm=series.geometry.spacing_mm,
            patient=name,
            kernel=f"K-{name}",
        )
    broken = make_ct_series(folder / "broken", patient="broken")
    broken[2].write_bytes(broken[2].read_bytes()[:-500])
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return cohort(tmp_path_factory.mktemp("cohort"))


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_every_series_is_harmonized_and_one_bad_series_is_a_row_with_its_reason(images, tmp_path):
    before = digests(images)
    table = harmonize_cohort(images, tmp_path / "out", MTFRatio.like([TOY["sharp"]])).set_index("patient")
    assert digests(images) == before, "source files were changed"
    assert table.loc[["soft", "sharp"], "state"].tolist() == ["done", "done"]
    assert table.loc["broken", "state"] == "failed" and "truncated" in table.loc["broken", "reason"]
    soft, sharp = table.loc["soft"], table.loc["sharp"]
    spread = abs(soft.source_f50_per_mm - sharp.source_f50_per_mm)
    assert spread > 0.05 and abs(soft.f50_per_mm - sharp.f50_per_mm) < spread / 3
    (found,) = find_series(soft.path).found
    assert found.patient == "soft" and found.series_uid == soft.series and found.path == Path(soft.path)


def test_a_cohort_row_for_each_series_stands_in_the_file(images, tmp_path):
    table = harmonize_cohort(images, tmp_path / "out", Identity())
    on_disk = read_cohort(tmp_path / "out" / "cohort.csv")
    assert on_disk["state"].tolist() == table["state"].tolist()
    assert set(on_disk["role"].dropna()) == {"derived", "source"}
    assert on_disk.loc[on_disk.state == "done", "derived_from"].str.len().min() > 0


def test_two_processes_write_the_same_bytes_as_one(images, tmp_path):
    harmonize_cohort(images, tmp_path / "one", Identity(), jobs=1)
    harmonize_cohort(images, tmp_path / "two", Identity(), jobs=2)
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    assert {k: v for k, v in one.items() if k.endswith(".dcm")} == {k: v for k, v in two.items() if k.endswith(".dcm")}
    assert len(one) == len(two) == 7


def test_a_second_run_does_nothing_again(images, tmp_path):
    harmonize_cohort(images, tmp_path / "out", Identity())
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.dcm")}
    said: list[str] = []
    table = harmonize_cohort(images, tmp_path / "out", Identity(), say=said.append)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.dcm")} == times
    assert (table["state"] == "done").sum() == 2 and "2 finished series" in said[0]


def test_what_a_method_tells_of_a_series_is_in_its_qc_after_going_on_too(images, tmp_path, monkeypatch):
    def telling(self, series, *arguments, qc, **named):
        qc["identity"] = {"patches": np.int64(7), "errors": np.array([0.5, np.nan])}
        return series

    monkeypatch.setattr(Identity, "harmonize", telling)
    for _ in range(2):  # the second run does nothing again
        table = harmonize_cohort(images, tmp_path / "out", Identity())
        write_qc(table, tmp_path / "report.json")
        rows = {row["patient"]: row for row in json.loads((tmp_path / "report.json").read_text())["series"]}
        assert rows["soft"]["qc"] == rows["sharp"]["qc"] == {"identity": {"patches": 7, "errors": [0.5, None]}}
        assert rows["broken"]["qc"] == {} and "qc" not in table


def test_another_model_makes_other_series_beside_the_first(images, tmp_path):
    first = harmonize_cohort(images, tmp_path / "out", Identity())
    second = harmonize_cohort(images, tmp_path / "out", MTFRatio.like([TOY["sharp"]]))
    uids = [set(t.loc[t.state == "done", "series"]) for t in (first, second)]
    assert not uids[0] & uids[1]
    assert len(list((tmp_path / "out").rglob("*.dcm"))) == 12
    on_disk = read_cohort(tmp_path / "out" / "cohort.csv")
    assert set(on_disk.loc[on_disk.state == "done", "series"]) == uids[0] | uids[1]


@pytest.mark.parametrize("name", ["image.nii.gz", "image.nrrd", "image.mha"])
def test_a_volume_file_gives_the_same_format_out(tmp_path, name):
    (tmp_path / "in").mkdir()
    write_volume(TOY["soft"], tmp_path / "in" / name)
    table = harmonize_cohort(tmp_path / "in", tmp_path / "out", Identity())
    assert table["state"].tolist() == ["done"]
    assert np.array_equal(read_volume(tmp_path / "out" / name).hu, TOY["soft"].hu)


def volumes_of_one_name(folder: Path) -> Path:
    for n, patient in enumerate(["p1", "p2"]):
        (folder / patient).mkdir(parents=True)
        write_volume(TOY["soft"].with_hu(TOY["soft"].hu + n), folder / patient / "image.nii.gz")
    return folder


def test_volumes_of_one_name_in_a_cohort_table_keep_their_folders(tmp_path):
    images = volumes_of_one_name(tmp_path / "in")
    write_cohort(inspect(images), tmp_path / "in" / "table.csv")
    table = harmonize_cohort(tmp_path / "in" / "table.csv", tmp_path / "out", Identity())
    assert table["state"].tolist() == ["done", "done"]
    for n, patient in enumerate(["p1", "p2"]):
        hu = read_volume(tmp_path / "out" / patient / "image.nii.gz").hu
        assert np.array_equal(hu, read_volume(images / patient / "image.nii.gz").hu), n


def test_volumes_that_would_overwrite_each_other_are_refused(tmp_path):
    images = volumes_of_one_name(tmp_path / "in")
    (tmp_path / "tables").mkdir()
    write_cohort(inspect(images), tmp_path / "tables" / "table.csv")
    with pytest.raises(HarmonictError, match="both be written"):
        harmonize_cohort(tmp_path / "tables" / "table.csv", tmp_path / "out", Identity())
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_the_input_table_is_never_overwritten(tmp_path):
    images = volumes_of_one_name(tmp_path / "in")
    write_cohort(inspect(images), images / "cohort.csv")
    before = digests(images)
    with pytest.raises(HarmonictError, match="would be overwritten"):
        harmonize_cohort(images / "cohort.csv", images, Identity())
    assert digests(images) == before


def test_masks_asked_for_in_a_second_run_are_copied(tmp_path, monkeypatch):
    make_ct_series(tmp_path / "in", patient="one")
    monkeypatch.setattr("harmonict.harmonize_cohort.mask_references", lambda file, uid: True)
    asked = []
    monkeypatch.setattr("harmonict.harmonize_cohort.write_masks", lambda masks, *_: asked.append(masks) or list(masks))
    (tmp_path / "rtstruct.dcm").write_bytes(b"a mask")
    harmonize_cohort(tmp_path / "in", tmp_path / "out", Identity())
    for _ in range(2):
        harmonize_cohort(tmp_path / "in", tmp_path / "out", Identity(), masks=[tmp_path / "rtstruct.dcm"])
    assert asked == [(tmp_path / "rtstruct.dcm",)], "copied once, by the second run"


def test_the_identity_gives_back_the_hu_of_the_source(images, tmp_path):
    harmonize_cohort(images / "soft", tmp_path / "out", Identity())
    back = read_series(sorted((tmp_path / "out").rglob("*.dcm")))
    assert np.array_equal(back.hu, TOY["soft"].hu)


def test_the_output_may_not_lie_inside_the_input(images):
    before = digests(images)
    for out in (images, images / "out"):
        with pytest.raises(HarmonictError, match="outside of it"):
            harmonize_cohort(images, out, Identity())
    assert digests(images) == before


def test_an_empty_folder_and_an_unwritable_output_are_refused_in_words(images, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(HarmonictError, match="no CT series"):
        harmonize_cohort(tmp_path / "empty", tmp_path / "out", Identity())
    (tmp_path / "file").write_text("")
    with pytest.raises(HarmonictError, match="is a file"):
        harmonize_cohort(images, tmp_path / "file", Identity())
    with pytest.raises(HarmonictError, match="cannot write"):
        harmonize_cohort(images, Path("/proc/nowhere"), Identity())


def test_a_full_disk_fails_in_words_and_leaves_nothing_half_written(images, tmp_path, monkeypatch):
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    table = harmonize_cohort(images / "soft", tmp_path / "out", Identity())
    assert table["state"].tolist() == ["failed"] and "no space left" in table["reason"][0]
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["cohort.csv"]


def test_after_kill_9_the_same_command_says_what_it_found_and_goes_on(tmp_path):
    for n in range(4):
        hu = np.repeat(toy_series(seed=n).hu, 8, axis=0)
        make_ct_series(
            tmp_path / "in" / str(n), hu=hu, signed=True, intercept=0, spacing_mm=(3.0, 1.2, 1.2), patient=f"P{n}"
        )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "harmonict", "harmonize", str(tmp_path / "in"), str(out), "--model", "identity"]
    killed = subprocess.Popen([*command, "--jobs", "1"], start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while time.time() < deadline and not (out.exists() and any(out.glob("P0/*/0001.dcm"))):
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    for series in out.glob("P*/K-*"):
        assert len(list(series.glob("*.dcm"))) == 24, "a half series stands under its final name"
    again = subprocess.run([*command, "--jobs", "1"], capture_output=True, text=True)
    assert again.returncode == 0 and "4 series done, 0 failed" in again.stdout
    assert not list(out.rglob("*.partial"))
    assert len(list(out.rglob("*.dcm"))) == 96


def test_a_real_mixed_cohort_comes_to_one_sharpness_and_stays_valid(data, tmp_path):
    example = data / "ct" / "C3N-00249"
    (like,) = [found.read() for found in find_series(example).found]
    table = harmonize_cohort(data / "ct", tmp_path / "out", MTFRatio.like([like]), masks=[]).set_index("patient")
    done = table[table["state"] == "done"]
    assert sorted(done.index) == ["C3N-00249", "CRLM-CT-1006", "LIDC-IDRI-0314", "LUNG1-001", "TCGA-09-2043"]
    after = inspect(tmp_path / "out").set_index("patient")
    after = after[after["state"] == "found"]["f50_per_mm"]
    before = done["source_f50_per_mm"]
    assert after.max() - after.min() <= (before.max() - before.min()) / 3
    assert done.loc["C3N-00249", "largest_change_hu"] <= 1, "the example itself passes untouched"
    assert (done["clipped_voxels"] == 0).all()
    structures = Path(done.loc["LUNG1-001", "masks"])
    (derived,) = find_series(done.loc["LUNG1-001", "path"]).found
    gtv = read_masks(structures, derived.read(), "GTV-1")["GTV-1"]
    (source,) = find_series(data / "ct" / "LUNG1-001" / "image").found
    (original,) = find_series(data / "ct" / "LUNG1-001").masks
    assert np.array_equal(gtv, read_masks(original, source.read(), "GTV-1")["GTV-1"])
