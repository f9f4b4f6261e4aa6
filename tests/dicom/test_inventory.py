"""What a folder holds: every series once, and a reason for what was left out."""

import os
import shutil

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import ImplicitVRLittleEndian

from harmonict.core import HarmonictError
from harmonict.core.cohort import COHORT_COLUMNS
from harmonict.core.geometry import Geometry
from harmonict.core.series import Series
from harmonict.dicom import inventory
from harmonict.dicom.inventory import find_series, inspect
from harmonict.volumes import write_mask, write_volume
from make_dicom import make_ct_series, make_enhanced_ct, phantom_hu

OTHER_CLASSES = {
    "RTSTRUCT": ("1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT"),
    "SEG": ("1.2.840.10008.5.1.4.1.1.66.4", "SEG"),
    "dose sheet": ("1.2.840.10008.5.1.4.1.1.7", "CT"),
    "SR": ("1.2.840.10008.5.1.4.1.1.88.67", "SR"),
    "MR": ("1.2.840.10008.5.1.4.1.1.4", "MR"),
}


def make_other(folder, what):
    sop_class, modality = OTHER_CLASSES[what]
    return make_ct_series(folder, n=1, SOPClassUID=sop_class, Modality=modality)[0]


def test_mixed_series_in_one_folder_are_told_apart(tmp_path):
    a = make_ct_series(tmp_path / "a", n=3, kernel="B30f")
    b = make_ct_series(tmp_path / "b", n=4, kernel="B70f", patient="P2")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for k, path in enumerate([b[2], a[1], b[0], a[2], b[3], a[0], b[1]]):
        shutil.move(path, mixed / f"{k}")  # no extension, no order
    found = {f.patient: f for f in find_series(mixed).found}
    assert [len(found[p].paths) for p in ("P1", "P2")] == [3, 4]
    assert found["P2"].protocol.kernel == "B70f"
    assert found["P1"].path == mixed
    assert np.array_equal(found["P2"].read().hu, phantom_hu(4))


def test_a_found_series_says_before_reading_what_reading_gives(tmp_path):
    make_ct_series(tmp_path / "classic", n=4, spacing_mm=(2, 0.9, 0.8), orientation="coronal")
    make_enhanced_ct(tmp_path / "enhanced.dcm", n=3, kernel="Br40d")
    found = find_series(tmp_path).found
    assert len(found) == 2
    for one in found:
        series = one.read()
        assert one.shape == series.hu.shape
        assert one.geometry == series.geometry
        assert one.protocol == series.protocol
        assert (one.name, one.patient) == (series.name, series.patient)


def test_the_first_pass_reads_no_pixels(tmp_path, monkeypatch):
    make_ct_series(tmp_path, n=3)
    monkeypatch.setattr(inventory, "read_series", lambda *_, **__: pytest.fail("pixels were read"))
    asked = []
    original = inventory.open_dicom
    monkeypatch.setattr(inventory, "open_dicom", lambda *a, **k: asked.append(k) or original(*a, **k))
    assert len(find_series(tmp_path).found) == 1
    assert len(asked) == 3
    assert not any(k.get("pixels") for k in asked)


@pytest.mark.parametrize("what", OTHER_CLASSES)
def test_what_is_no_ct_image_is_set_aside_with_a_reason(tmp_path, what):
    make_ct_series(tmp_path / "ct", n=3)
    path = make_other(tmp_path / "other", what)
    result = find_series(tmp_path)
    assert len(result.found) == 1
    (left,) = result.left_out
    assert left.paths == (path,)
    assert left.reason
    assert result.masks == ([path] if what in ("RTSTRUCT", "SEG") else [])


def test_localizers_are_set_aside(tmp_path):
    make_ct_series(tmp_path / "ct", n=3)
    make_ct_series(tmp_path / "scout", n=2, orientation="coronal", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    result = find_series(tmp_path)
    assert len(result.found) == 1
    (left,) = result.left_out
    assert "localizer" in left.reason
    assert len(left.paths) == 2


def test_a_scout_inside_a_series_does_not_spoil_it(tmp_path):
    make_ct_series(tmp_path / "ct", n=3, series_uid="1.2.3")
    make_ct_series(tmp_path / "s", n=1, series_uid="1.2.3", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    result = find_series(tmp_path)
    assert [f.shape[0] for f in result.found] == [3]
    assert len(result.left_out) == 1


def test_derived_ct_is_a_ct_to_take(tmp_path):
    make_ct_series(tmp_path, ImageType=["DERIVED", "SECONDARY", "PROCESSED"])
    assert len(find_series(tmp_path).found) == 1


def test_files_that_are_not_dicom_are_skipped_and_counted(tmp_path):
    make_ct_series(tmp_path / "ct", n=2)
    (tmp_path / "ct" / "notes.txt").write_text("words " * 100)
    (tmp_path / "ct" / "empty").write_bytes(b"")
    (tmp_path / "ct" / "._0000.dcm").write_bytes(b"\0" * 200)
    (tmp_path / ".cache").mkdir()
    make_ct_series(tmp_path / ".cache", n=2, patient="hidden")
    os.mkfifo(tmp_path / "pipe")
    result = find_series(tmp_path)
    assert result.skipped_files == 3
    assert [f.patient for f in result.found] == ["P1"]
    assert result.left_out == []


def test_a_dicomdir_is_no_image(tmp_path):
    (path,) = make_ct_series(tmp_path, n=1)
    ds = dcmread(path)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.1.3.10"
    ds.save_as(tmp_path / "DICOMDIR")
    result = find_series(tmp_path)
    assert (len(result.found), result.left_out, result.skipped_files) == (1, [], 1)


def test_two_kernels_under_one_series_uid_are_two_series(tmp_path):
    make_ct_series(tmp_path / "a", n=3, series_uid="1.2.3", kernel="FC51")
    make_ct_series(tmp_path / "b", n=3, series_uid="1.2.3", kernel="FC13")
    found = find_series(tmp_path).found
    assert [f.key for f in found] == ["1.2.3 FC51", "1.2.3 FC13"]
    assert [f.read().protocol.kernel for f in found] == ["FC51", "FC13"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"missing": (2,)}, "missing between positions 101.00 and 103.00"),
        ({"duplicate": (2,)}, "same position: 102.00 mm"),
        ({"tilt": 10.0}, "gantry tilt of 10.0 degrees"),
    ],
)
def test_an_unfit_series_is_a_row_and_the_rest_goes_on(tmp_path, arguments, reason):
    make_ct_series(tmp_path / "good", patient="P2")
    make_ct_series(tmp_path / "bad", **arguments)
    result = find_series(tmp_path)
    assert [f.patient for f in result.found] == ["P2"]
    (left,) = result.left_out
    assert reason in left.reason
    assert left.row()["state"] == "left_out"
    (single,) = [f for f in find_series(tmp_path, slicewise=True).found if f.patient == "P1"]
    assert not single.is_volume
    assert not single.read().is_volume
    assert single.row()["spacing_z_mm"] is None


def test_copies_of_one_file_are_called_copies(tmp_path):
    files = make_ct_series(tmp_path / "a", n=3)
    shutil.copy(files[1], tmp_path / "copy.dcm")
    assert "copies of one file" in find_series(tmp_path).left_out[0].reason


def test_a_damaged_slice_leaves_its_series_out_with_the_reason(tmp_path):
    files = make_ct_series(tmp_path / "bad", n=5)
    ds = dcmread(files[2])
    del ds.ImagePositionPatient
    ds.save_as(files[2])
    make_ct_series(tmp_path / "good", n=2, patient="P2")
    result = find_series(tmp_path)
    assert [f.patient for f in result.found] == ["P2"]
    assert "ImagePositionPatient" in result.left_out[0].reason


def test_volumes_are_found_beside_dicom_and_labels_are_masks(tmp_path):
    files = make_ct_series(tmp_path / "ct", n=3)
    series = find_series(files[0]).found[0].read()
    for name in ("a.nii.gz", "b.nrrd", "c.mha"):
        write_volume(series, tmp_path / name)
    write_mask(series.hu > 0, series.geometry, tmp_path / "label.nii.gz")
    (tmp_path / "broken.nrrd").write_text("nothing")
    result = find_series(tmp_path)
    assert [f.format for f in result.found] == ["nifti", "nrrd", "mha", "dicom"]
    assert np.array_equal(result.found[0].read().hu, series.hu)
    assert result.masks == [tmp_path / "label.nii.gz"]
    assert {left.paths[0].name for left in result.left_out} == {"label.nii.gz", "broken.nrrd"}


def test_a_single_file_is_a_series_of_one(tmp_path):
    files = make_ct_series(tmp_path, n=3)
    (found,) = find_series(files[1]).found
    assert (found.shape[0], found.path) == (1, files[1])


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(HarmonictError, match="no file or folder"):
        find_series(tmp_path / "gone")


def test_an_empty_folder_holds_nothing(tmp_path):
    result = find_series(tmp_path)
    assert (result.found, result.left_out, result.skipped_files) == ([], [], 0)
    assert list(inspect(tmp_path).columns) == list(COHORT_COLUMNS)


def test_the_order_of_the_inventory_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    for name in "dbca":
        make_ct_series(tmp_path / name, n=2, patient=name)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((p, d, f[::-1]) for p, d, f in walk(*a, **k)))
    assert [f.patient for f in find_series(tmp_path).found] == list("abcd")


def test_inspect_without_measuring_fills_the_header_columns(tmp_path):
    make_ct_series(tmp_path / "a", n=3, spacing_mm=(2, 0.8, 0.7), CTDIvol=7.5, transfer_syntax=ImplicitVRLittleEndian)
    make_other(tmp_path / "sr", "SR")
    table = inspect(tmp_path, measure=False)
    row = table.iloc[0]
    assert list(table.state) == ["found", "left_out"]
    assert (row.kernel, row.manufacturer, row.model, row.body_part) == ("B30f", "Siemens", "Somatom Test", "CHEST")
    assert (row.slices, row.rows, row["columns"]) == (3, 32, 40)
    assert (row.spacing_z_mm, row.spacing_y_mm, row.spacing_x_mm) == pytest.approx((2, 0.8, 0.7))
    assert (row.kvp, row.exposure_mas, row.ctdivol_mgy, row.fov_mm) == (120, 100, 7.5, 400)
    assert np.isnan(row.noise_hu)


def test_what_cannot_be_measured_stays_empty_and_says_why(tmp_path):
    flat = np.full((1, 32, 40), -1000, np.float32)
    make_ct_series(tmp_path, hu=flat)
    row = inspect(tmp_path).iloc[0]
    assert row.state == "found"
    assert np.isnan(row.f50_per_mm)
    assert "f50_per_mm: " in row.reason


def test_a_series_whose_pixels_are_cut_off_is_left_out_when_it_is_measured(tmp_path):
    files = make_ct_series(tmp_path, n=3)
    files[1].write_bytes(files[1].read_bytes()[:-500])
    assert inspect(tmp_path, measure=False).iloc[0].state == "found"
    row = inspect(tmp_path).iloc[0]
    assert (row.state, "truncated" in row.reason) == ("left_out", True)


def test_a_lying_spacing_is_overridden(tmp_path):
    series = Series(hu=phantom_hu(1), geometry=Geometry(spacing_mm=(1, 1, 1)))
    write_volume(series, tmp_path / "a.mha")
    assert find_series(tmp_path).found[0].read(spacing_mm=0.693359).pixel_mm == (0.693359, 0.693359)
    assert inspect(tmp_path, measure=False, spacing_mm=0.5).iloc[0].spacing_x_mm == 0.5


def test_the_real_cohort_is_listed_rightly(data):
    result = find_series(data / "ct")
    table = inspect(data / "ct", measure=False)
    assert list(table.state) == ["found"] * 5 + ["left_out"]
    rows = table.set_index("patient")[:5]
    assert rows.slices.to_dict() == {
        "C3N-00249": 72,
        "CRLM-CT-1006": 16,
        "LIDC-IDRI-0314": 80,
        "LUNG1-001": 134,
        "TCGA-09-2043": 30,
    }
    assert rows.manufacturer.tolist() == ["Siemens", "GE", "Philips", "Siemens", "Canon"]
    assert rows.kernel.fillna("").tolist() == ["B40f", "", "D", "B19f", "FC13"]
    assert rows.slice_thickness_mm.tolist() == [3, 5, 1, 3, 3]
    assert rows.exposure_mas.isna().tolist() == [False, True, False, False, False]
    assert [m.name for m in result.masks] == ["rtstruct.dcm"]


def test_the_lungman_folders_are_left_out_by_name_or_taken_slice_by_slice(data):
    result = find_series(data / "paired")
    assert [f.format for f in result.found] == ["mha"] * 4
    assert ["339 mm apart" in left.reason for left in result.left_out] == [True, True]
    slicewise = find_series(data / "paired" / "canon-lungman", slicewise=True)
    assert {(f.path.name, f.protocol.kernel, f.shape[0]) for f in slicewise.found} == {
        ("FC51", "FC51", 2),
        ("FC13", "FC13", 2),
    }


def test_real_series_are_measured(data):
    row = inspect(data / "ct" / "TCGA-09-2043").iloc[0]
    assert row.f50_per_mm == pytest.approx(0.18, abs=0.03)  # a soft kernel at 1.03 mm pixels
    assert 8 < row.noise_hu < 30


def test_two_folders_of_one_series_are_named(tmp_path):
    make_ct_series(tmp_path / "a", series_uid="1.2.3")
    make_ct_series(tmp_path / "b", series_uid="1.2.3")
    found = find_series(tmp_path)
    (left,) = found.left_out
    assert not found.found and f"2 folders hold this one series ({tmp_path / 'a'}, {tmp_path / 'b'})" in left.reason
    assert len(find_series(tmp_path / "a").found) == 1
