"""Derived series: what their headers say, that a rerun gives the same, and that nothing half written stays."""

import errno
import hashlib
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

import harmonict.dicom.write as write_module
from harmonict.core import HarmonictError, Series
from harmonict.dicom.read import read_series
from harmonict.dicom.write import Derivation, derived_series_uid, stale_temporaries, write_series
from make_dicom import make_ct_series, make_enhanced_ct, phantom_hu

MADE = Derivation("mtf-ratio", "ab" * 32, "fit=ratio, gain=6", "Bl64 1 mm", "0.1.0")


def derive(tmp_path, change=2.0, derivation=MADE, **arguments):
    """Read a small series, add `change` HU, write it; returns (source series, report, source data sets, new ones)."""
    files = make_ct_series(tmp_path / "in", **arguments)
    series = read_series(files)
    report = write_series(series.with_hu(series.hu + np.float32(change)), tmp_path / "out" / "s", derivation)
    return series, report, [dcmread(p) for p in files], [dcmread(p) for p in report.files]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def left_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- headers ---


def test_derived_images_have_new_uids_and_keep_study_patient_and_frame_of_reference(tmp_path):
    _, report, old, new = derive(tmp_path)
    assert len({d.SOPInstanceUID for d in new}) == len(new) == len(old)
    assert not {d.SOPInstanceUID for d in new} & {d.SOPInstanceUID for d in old}
    assert {d.SeriesInstanceUID for d in new} == {report.series_uid}
    assert report.series_uid != old[0].SeriesInstanceUID
    for a, b in zip(old, new, strict=True):
        for keyword in ("StudyInstanceUID", "PatientID", "PatientName", "FrameOfReferenceUID", "AccessionNumber"):
            assert a[keyword].value == b[keyword].value
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "InstanceNumber"):
            assert a[keyword].value == b[keyword].value
        assert b.SOPInstanceUID.is_valid and b.SOPInstanceUID.startswith("2.25.") and len(b.SOPInstanceUID) <= 64
        assert b.file_meta.MediaStorageSOPInstanceUID == b.SOPInstanceUID
        assert b.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert [p.name for p in report.files] == ["0001.dcm", "0002.dcm", "0003.dcm", "0004.dcm", "0005.dcm"]


def test_headers_say_how_the_series_was_made(tmp_path):
    _, _, old, new = derive(tmp_path, kernel="B70f")
    for a, b in zip(old, new, strict=True):
        assert list(b.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
        for word in ("mtf-ratio", "Bl64 1 mm", "fit=ratio, gain=6", "ab" * 32, "0.1.0"):
            assert word in b.DerivationDescription
        assert "research use only" in b.DerivationDescription.lower()
        assert b.DerivationCodeSequence[0].CodingSchemeDesignator == "DCM"
        [source] = b.SourceImageSequence
        assert source.ReferencedSOPInstanceUID == a.SOPInstanceUID
        assert source.ReferencedSOPClassUID == CTImageStorage
        purpose = source.PurposeOfReferenceCodeSequence[0]
        assert (purpose.CodeValue, purpose.CodingSchemeDesignator) == ("121322", "DCM")
        [maker] = b.ContributingEquipmentSequence
        assert maker.PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
        assert (maker.Manufacturer, maker.ManufacturerModelName) == ("harmonict", "harmonict")
        assert maker.SoftwareVersions == "0.1.0"
        assert "ab" * 32 in maker.ContributionDescription
        assert b.ConvolutionKernel == "B70f"
        assert b.Manufacturer == a.Manufacturer
        assert "Bl64 1 mm" in b.SeriesDescription and "Test series" in b.SeriesDescription
        assert b.SeriesNumber != a.SeriesNumber
        assert "InstanceCreationDate" not in b


def test_earlier_equipment_and_derivations_stay_before_ours(tmp_path):
    earlier = Dataset()
    earlier.Manufacturer = "Other"
    earlier.PurposeOfReferenceCodeSequence = [write_module.code("109104", "De-identifying Equipment")]
    lossy = write_module.code("113040", "Lossy Compression")
    _, _, _, new = derive(
        tmp_path,
        ContributingEquipmentSequence=[earlier],
        DerivationCodeSequence=[lossy],
        DerivationDescription="made smaller",
        LossyImageCompression="01",
        LossyImageCompressionRatio="8",
        LossyImageCompressionMethod="ISO_15444_1",
    )
    assert [i.Manufacturer for i in new[0].ContributingEquipmentSequence] == ["Other", "harmonict"]
    assert [i.CodeValue for i in new[0].DerivationCodeSequence] == ["113040", "110001"]
    assert "made smaller" in new[0].DerivationDescription
    assert new[0].LossyImageCompression == "01" and new[0].LossyImageCompressionRatio == 8
    assert new[0].LossyImageCompressionMethod == "ISO_15444_1"


def test_long_and_strange_texts_are_cut_to_what_dicom_allows(tmp_path):
    derivation = Derivation("m\u00fcller", "cd" * 32, "x=1\n" * 600, "a\\b\u00b5" * 40, "1.2.3")
    _, _, _, new = derive(tmp_path, derivation=derivation, SeriesDescription="S" * 64, DerivationDescription="d" * 1000)
    assert len(new[0].SeriesDescription) <= 64
    assert len(new[0].DerivationDescription) <= 1024
    assert "cd" * 32 in new[0].DerivationDescription
    assert len(new[0].ContributingEquipmentSequence[0].ContributionDescription) <= 1024


def test_a_description_in_another_script_survives(tmp_path):
    _, _, _, new = derive(tmp_path, SpecificCharacterSet="ISO_IR 192", SeriesDescription="胸部 5mm")
    assert new[0].SeriesDescription == "胸部 5mm > harmonict Bl64 1 mm"


def test_what_describes_the_old_pixels_is_dropped(tmp_path):
    files = make_ct_series(tmp_path / "in", SmallestImagePixelValue=0, LargestImagePixelValue=3000)
    for path in files:
        ds = dcmread(path)
        block = ds.private_block(0x0029, "VENDOR HEADER", create=True)
        block.add_new(0x10, "OB", b"12")
        icon = Dataset()
        icon.Rows = icon.Columns = 1
        ds.IconImageSequence = [icon]
        ds.InstanceCreationDate = "20200101"
        ds.add_new(0x60000010, "US", 3)  # an overlay in the spare bits of the pixels: no data of its own
        ds.add_new(0x60020010, "US", 3)
        ds.add_new(0x60023000, "OW", b"\0\0")
        ds.save_as(path)
    before = digests(tmp_path / "in")
    series = read_series(files)
    new = dcmread(write_series(series, tmp_path / "out", MADE).files[0])
    for keyword in ("SmallestImagePixelValue", "LargestImagePixelValue", "IconImageSequence", "InstanceCreationDate"):
        assert keyword not in new
    assert not [e for e in new if e.tag.is_private]
    assert 0x60000010 not in new and 0x60023000 in new
    assert digests(tmp_path / "in") == before


def test_the_source_headers_in_memory_are_not_changed(tmp_path):
    series = read_series(make_ct_series(tmp_path / "in", transfer_syntax=ImplicitVRLittleEndian))
    before = [h.to_json() for h in series.source.headers]
    write_series(series, tmp_path / "out", MADE)
    assert [h.to_json() for h in series.source.headers] == before


def test_a_missing_frame_of_reference_gets_one_for_the_whole_series(tmp_path):
    _, _, _, new = derive(tmp_path, FrameOfReferenceUID=None)
    assert len({d.FrameOfReferenceUID for d in new}) == 1
    assert new[0].FrameOfReferenceUID.is_valid


def test_an_enhanced_file_becomes_classic_images(tmp_path):
    path = make_enhanced_ct(tmp_path / "in" / "e.dcm", order=[1, 0, 2, 4, 3])
    series = read_series([path])
    new = [dcmread(p) for p in write_series(series, tmp_path / "out", MADE).files]
    assert {d.SOPClassUID for d in new} == {CTImageStorage}
    assert len({d.SOPInstanceUID for d in new}) == 5
    assert {d.SourceImageSequence[0].ReferencedSOPClassUID for d in new} == {EnhancedCTImageStorage}
    assert [d.SourceImageSequence[0].ReferencedFrameNumber for d in new] == [2, 1, 3, 5, 4]
    for keyword in ("NumberOfFrames", "PerFrameFunctionalGroupsSequence", "DimensionIndexSequence"):
        assert keyword not in new[0]
    again = read_series(sorted((tmp_path / "out").iterdir()))
    np.testing.assert_array_equal(again.hu, series.hu)
    assert again.geometry.same_grid(series.geometry)


def test_images_that_form_no_volume_are_written_just_the_same(tmp_path):
    files = make_ct_series(tmp_path / "in", n=6, missing=[2, 3])
    series = read_series(files, slicewise=True)
    report = write_series(series, tmp_path / "out", MADE)
    again = read_series(report.files, slicewise=True)
    np.testing.assert_array_equal(again.hu, series.hu)


# --- pixels ---


def test_a_slice_that_does_not_fit_its_encoding_becomes_int16_hu_and_the_others_keep_theirs(tmp_path):
    series = read_series(make_ct_series(tmp_path / "in", slope=0.5, intercept=-1024))
    hu = series.hu.copy()
    hu[1, 3, 4] = -1360.4
    report = write_series(series.with_hu(hu), tmp_path / "out", MADE)
    assert (report.rescaled_slices, report.clipped_voxels) == (1, 0)
    new = [dcmread(p) for p in report.files]
    assert [float(d.RescaleSlope) for d in new] == [0.5, 1, 0.5, 0.5, 0.5]
    assert (new[1].RescaleIntercept, new[1].PixelRepresentation, new[1].BitsStored, new[1].HighBit) == (0, 1, 16, 15)
    assert new[1].pixel_array[3, 4] == -1360
    assert np.abs(read_series(report.files).hu[1] - hu[1]).max() <= 0.5


def test_values_that_fit_nothing_are_clipped_and_counted(tmp_path):
    series = read_series(make_ct_series(tmp_path / "in"))
    hu = series.hu.copy()
    hu[0, 0, :3] = 40_000, -40_000, 90_000
    report = write_series(series.with_hu(hu), tmp_path / "out", MADE)
    # the source's own unsigned 16 bits from -1024 on hold 40,000 and lose two; int16 would lose all three
    assert (report.clipped_voxels, report.rescaled_slices) == (2, 0)
    assert read_series(report.files).hu[0, 0, :3].tolist() == [40_000, -1024, 65_535 - 1024]


def test_values_are_rounded_to_the_nearest_step_and_never_truncated(tmp_path):
    series = read_series(make_ct_series(tmp_path / "in", slope=2, intercept=-1000, hu=np.full((1, 8, 8), -900.0)))
    hu = np.full_like(series.hu, -900.0)
    hu[0, 0, :4] = -899.1, -898.9, 100.9, 101.1
    report = write_series(series.with_hu(hu), tmp_path / "out", MADE)
    assert read_series(report.files).hu[0, 0, :4].tolist() == [-900, -898, 100, 102]


def padded(tmp_path, **arguments):
    hu = phantom_hu(3, 32, 32)
    hu[:, :6], hu[:, -6:], hu[:, :, :4], hu[:, :, -4:] = -2000, -2000, -2000, -2000
    arguments = {"intercept": -1024, "signed": True, "padding_value": -976} | arguments
    return read_series(make_ct_series(tmp_path / "in", hu=hu, **arguments))


def test_padding_keeps_its_stored_value_and_its_tag(tmp_path):
    series = padded(tmp_path)
    hu = np.where(series.padding, series.hu, series.hu + 3).astype(np.float32)
    new = [dcmread(p) for p in write_series(series.with_hu(hu), tmp_path / "out", MADE).files]
    for z, ds in enumerate(new):
        assert ds.PixelPaddingValue == -976 and ds["PixelPaddingValue"].VR == "SS"
        assert set(ds.pixel_array[series.padding[z]]) == {-976}


def test_the_padding_tag_moves_with_the_encoding(tmp_path):
    series = padded(tmp_path, intercept=-3000, signed=False, padding_value=1000, padding_limit=1010)
    hu = series.hu.copy()
    hu[0, 16, 16] = -3500  # does not fit
    new = [dcmread(p) for p in write_series(series.with_hu(hu), tmp_path / "out", MADE).files]
    assert (new[0].PixelPaddingValue, new[0].PixelPaddingRangeLimit) == (-2000, -1990)
    assert new[0]["PixelPaddingValue"].VR == "SS"
    assert (new[1].PixelPaddingValue, new[1].PixelPaddingRangeLimit) == (1000, 1010)
    assert set(new[0].pixel_array[series.padding[0]]) == {-2000}


def test_the_padding_tag_is_dropped_where_a_measured_voxel_came_to_have_its_value(tmp_path):
    series = padded(tmp_path)
    hu = series.hu.copy()
    hu[1, 16, 16] = -2000
    new = [dcmread(p) for p in write_series(series.with_hu(hu), tmp_path / "out", MADE).files]
    assert ["PixelPaddingValue" in d for d in new] == [True, False, True]


# --- the same twice ---


def test_a_rerun_gives_the_same_bytes_and_replaces_the_folder(tmp_path):
    series, report, _, _ = derive(tmp_path)
    first = digests(report.folder)
    again = write_series(series.with_hu(series.hu + np.float32(2)), report.folder, MADE)
    assert digests(report.folder) == first and again.series_uid == report.series_uid
    assert left_in(tmp_path / "out") == ["s", *(f"s/{n:04d}.dcm" for n in range(1, 6))]
    assert derived_series_uid(series, MADE) == report.series_uid


@pytest.mark.parametrize("field", ["method", "digest", "parameters", "target", "version"])
def test_another_derivation_makes_another_series(tmp_path, field):
    series = read_series(make_ct_series(tmp_path / "in", n=2))
    other = replace(MADE, **{field: "other"})
    assert derived_series_uid(series, other) != derived_series_uid(series, MADE)
    a = write_series(series, tmp_path / "a", MADE)
    b = write_series(series, tmp_path / "b", other)
    assert not {dcmread(p).SOPInstanceUID for p in a.files} & {dcmread(p).SOPInstanceUID for p in b.files}


def test_a_source_that_gained_a_slice_makes_another_series(tmp_path):
    files = make_ct_series(tmp_path / "in", n=4)
    assert derived_series_uid(read_series(files[:3]), MADE) != derived_series_uid(read_series(files), MADE)


def test_slices_that_share_one_uid_get_one_each(tmp_path):
    _, _, _, new = derive(tmp_path, SOPInstanceUID="1.2.3")
    assert len({d.SOPInstanceUID for d in new}) == 5


# --- refusals ---


def test_the_source_folder_is_refused_and_what_lies_in_it(tmp_path):
    series = read_series(make_ct_series(tmp_path / "in"))
    before = digests(tmp_path / "in")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for folder in (tmp_path / "in", tmp_path / "in" / "out" / "s", tmp_path / "link" / "s"):
        with pytest.raises(HarmonictError, match="source's folder"):
            write_series(series, folder, MADE)
    assert digests(tmp_path / "in") == before and len(left_in(tmp_path / "in")) == 5


def test_a_folder_with_other_files_is_refused_and_left_as_it_is(tmp_path):
    series = read_series(make_ct_series(tmp_path / "in"))
    other = write_series(series, tmp_path / "out", replace(MADE, digest="00" * 32))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "0001.dcm").write_text("mine")
    before = digests(tmp_path)
    for folder in (other.folder, tmp_path / "notes", tmp_path / "notes" / "0001.dcm"):
        with pytest.raises(HarmonictError, match=r"other files|is a file"):
            write_series(series, folder, MADE)
    assert digests(tmp_path) == before


def test_a_series_without_dicom_headers_is_refused(tmp_path):
    with pytest.raises(HarmonictError, match="not read from DICOM"):
        write_series(Series(hu=np.zeros((1, 4, 4), np.float32)), tmp_path / "out", MADE)


def test_a_series_built_anew_is_written_with_the_headers_of_the_one_it_came_from(tmp_path):
    source = read_series(make_ct_series(tmp_path / "in"))
    report = write_series(Series(hu=source.hu + np.float32(1)), tmp_path / "out", MADE, out_of=source)
    assert report.series_uid == derived_series_uid(source, MADE)
    np.testing.assert_array_equal(read_series(report.files).hu, source.hu + 1)


def test_a_result_on_another_grid_is_refused(tmp_path):
    series = read_series(make_ct_series(tmp_path / "in"))
    other = replace(series, hu=series.hu[:, :16].copy(), padding=None)
    with pytest.raises(HarmonictError, match="5 x 16 x 40 voxels, its source 5 x 32 x 40"):
        write_series(other, tmp_path / "out", MADE)


def test_an_image_without_study_is_refused_by_name_of_the_attribute(tmp_path):
    series = read_series(make_ct_series(tmp_path / "in", StudyInstanceUID=None))
    with pytest.raises(HarmonictError, match="StudyInstanceUID"):
        write_series(series, tmp_path / "out", MADE)
    assert not (tmp_path / "out").exists()


# --- interruptions ---


class FullDisk:
    """Fails like a full disk at the n-th file."""

    def __init__(self, real, n, number=errno.ENOSPC):
        self.real, self.left, self.number = real, n, number

    def __call__(self, *arguments, **options):
        self.left -= 1
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*arguments, **options)


@pytest.mark.parametrize("place, n", [("_write_bytes", 0), ("_write_bytes", 3), ("_flush", 2), ("_take_place", 0)])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, place, n):
    series = read_series(make_ct_series(tmp_path / "in"))
    before = digests(tmp_path / "in")
    monkeypatch.setattr(write_module, place, FullDisk(getattr(write_module, place), n))
    with pytest.raises(HarmonictError, match="no space left") as error:
        write_series(series, tmp_path / "out" / "patient" / "s", MADE)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert digests(tmp_path / "in") == before


def test_a_full_disk_keeps_the_finished_series_that_was_to_be_replaced(tmp_path, monkeypatch):
    series, report, _, _ = derive(tmp_path)
    before = digests(report.folder)
    monkeypatch.setattr(write_module, "_write_bytes", FullDisk(write_module._write_bytes, 2))
    with pytest.raises(HarmonictError, match="no space left"):
        write_series(series, report.folder, MADE)
    assert digests(report.folder) == before and left_in(tmp_path / "out")[0] == "s"


def test_a_disk_that_is_really_full_is_one_line_and_leaves_nothing(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        series = read_series(make_ct_series(tmp_path / "in", n=8, rows=128, columns=128))
        with pytest.raises(HarmonictError, match="no space left"):
            write_series(series, small / "patient" / "s", MADE)
        assert left_in(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_folder_without_permission_is_one_line(tmp_path, monkeypatch):
    series = read_series(make_ct_series(tmp_path / "in"))
    monkeypatch.setattr(Path, "mkdir", FullDisk(Path.mkdir, 0, errno.EACCES))  # root may write anywhere
    with pytest.raises(HarmonictError, match=r"cannot write .*Permission denied"):
        write_series(series, tmp_path / "out" / "s", MADE)


def test_an_output_below_a_file_is_one_line(tmp_path):
    series = read_series(make_ct_series(tmp_path / "in"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(HarmonictError, match="cannot write") as error:
        write_series(series, tmp_path / "file" / "s", MADE)
    assert "\n" not in str(error.value)


def test_after_a_kill_the_leftover_is_found_removed_and_the_series_written(tmp_path):
    files = make_ct_series(tmp_path / "in")
    program = f"""
        import os, signal, sys
        from pathlib import Path
        import harmonict.dicom.write as w
        from harmonict.dicom.read import read_series
        real, calls = w._write_bytes, []
        def killed(*a, **k):
            real(*a, **k)
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        w._write_bytes = killed
        made = w.Derivation({MADE.method!r}, {MADE.digest!r}, {MADE.parameters!r}, {MADE.target!r}, {MADE.version!r})
        w.write_series(read_series([Path(p) for p in sys.argv[2:]]), sys.argv[1], made)
    """
    target = tmp_path / "out" / "patient" / "s"
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(target), *map(str, files)])
    assert run.returncode == -signal.SIGKILL
    assert not target.exists()
    [stale] = stale_temporaries(tmp_path / "out")
    assert re.fullmatch(r"\.s\.[0-9a-f]{8}\.harmonict", stale.name)
    assert not stale.exists() and stale_temporaries(tmp_path / "out") == []
    report = write_series(read_series(files), target, MADE)
    assert len(report.files) == 5 and left_in(tmp_path / "out" / "patient")[0] == "s"


def test_a_folder_that_a_live_run_is_writing_is_left_alone(tmp_path):
    with write_module.new_folder(tmp_path / "out" / "s", lambda old: False) as temporary:
        (temporary / "0001.dcm").write_bytes(b"x")
        assert stale_temporaries(tmp_path / "out") == []
    assert left_in(tmp_path / "out") == ["s", "s/0001.dcm"]


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    series = read_series(make_ct_series(tmp_path / "in"))

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(write_module, "_write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_series(series, tmp_path / "out" / "s", MADE)
    assert not (tmp_path / "out").exists()


def test_a_header_that_cannot_be_written_names_the_slice_and_not_its_values(tmp_path):
    files = make_ct_series(tmp_path / "in", n=2)
    series = read_series(files)
    with pytest.warns(UserWarning):
        series.source.headers[1].add_new("PatientComments", "US", "secret")
    with pytest.raises(HarmonictError, match="slice 2") as error:
        write_series(series, tmp_path / "out", MADE)
    assert "secret" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error::UserWarning")
def test_mutated_files_that_can_be_read_are_written_or_refused_in_one_line(tmp_path):
    [path] = make_ct_series(tmp_path / "in", n=1, rows=8, columns=8)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(3)
    outcomes = {"written": 0, "refused": 0, "not read": 0}
    for n in range(300):
        mutated = whole.copy()
        where = rng.integers(132, len(whole) - 128, rng.integers(1, 12))
        mutated[where] = rng.integers(0, 256, len(where))
        path.write_bytes(mutated.tobytes())
        try:
            series = read_series([path])
        except HarmonictError:
            outcomes["not read"] += 1
            continue
        try:
            [written] = write_series(series, tmp_path / "out" / str(n), MADE).files
            assert np.abs(read_series([written]).hu - series.hu).max() <= 0.5
            outcomes["written"] += 1
        except HarmonictError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["written"] > 20


@pytest.mark.parametrize("name", ["LUNG1-001", "LIDC-IDRI-0314", "C3N-00249", "TCGA-09-2043", "CRLM-CT-1006"])
def test_real_series_come_back_exactly(data, tmp_path, name):
    files = sorted((data / "ct" / name / "image").glob("*.dcm"))[:8]
    series = read_series(files)
    report = write_series(series, tmp_path / "out", MADE)
    assert (report.clipped_voxels, report.rescaled_slices) == (0, 0)
    again = read_series(report.files)
    np.testing.assert_array_equal(again.hu, series.hu)
    assert again.geometry == series.geometry and again.protocol == series.protocol
