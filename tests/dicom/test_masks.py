"""Masks: contours become the right voxels, and a mask is taken only for the images that it was made on."""

import hashlib
import warnings
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID, ExplicitVRLittleEndian, RTStructureSetStorage

from harmonict.core import HarmonictError
from harmonict.dicom.masks import (
    mask_references,
    read_masks,
    read_rtstruct,
    read_seg,
    roi_names,
    write_masks,
    write_seg,
)
from harmonict.dicom.read import read_series
from harmonict.dicom.write import Derivation, write_series
from make_dicom import make_ct_series, make_enhanced_ct

MADE = Derivation("mtf-ratio", "ab" * 32, "fit=ratio", "B30f", "0.1.0")


def item(**attributes) -> Dataset:
    ds = Dataset()
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return ds


def make_rtstruct(path: Path, series, rois: dict, *, frame_of_reference=None, references=True, kind="CLOSED_PLANAR"):
    """rois: name -> list of (slice, points (n, 2) as (y, x) in voxels); a slice may be fractional."""
    headers, frames = series.source.headers, series.source.frames
    frame_uid = frame_of_reference or headers[0].FrameOfReferenceUID

    def image(z):
        reference = item(
            ReferencedSOPClassUID=headers[z].SOPClassUID, ReferencedSOPInstanceUID=headers[z].SOPInstanceUID
        )
        if frames:
            reference.ReferencedFrameNumber = frames[z]
        return reference

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = RTStructureSetStorage, UID("1.2.3.4")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = RTStructureSetStorage, "1.2.3.4", "RTSTRUCT"
    ds.StudyDate, ds.StudyTime, ds.AccessionNumber, ds.Manufacturer = "20200101", "120000", "A1", "Test"
    ds.ReferringPhysicianName, ds.StudyID, ds.SeriesNumber, ds.OperatorsName = "", "1", 9, ""
    ds.PatientName, ds.PatientID = headers[0].PatientName, headers[0].PatientID
    ds.PatientBirthDate, ds.PatientSex = "19500101", "O"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = headers[0].StudyInstanceUID, "1.2.3.5"
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator, ds.InstanceNumber = frame_uid, "", 1
    ds.StructureSetLabel, ds.StructureSetDate, ds.StructureSetTime = "TEST", "20200101", "120000"
    of_series = item(SeriesInstanceUID=headers[0].SeriesInstanceUID)
    of_series.ContourImageSequence = [image(z) for z in range(len(headers))]
    study = item(ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1", ReferencedSOPInstanceUID=ds.StudyInstanceUID)
    study.RTReferencedSeriesSequence = [of_series]
    place = item(FrameOfReferenceUID=frame_uid)
    if references:
        place.RTReferencedStudySequence = [study]
    ds.ReferencedFrameOfReferenceSequence = [place]
    ds.StructureSetROISequence, ds.ROIContourSequence, ds.RTROIObservationsSequence = [], [], []
    for number, (name, contours) in enumerate(rois.items(), 1):
        roi = item(ROINumber=number, ROIName=name, ROIGenerationAlgorithm="MANUAL")
        roi.ReferencedFrameOfReferenceUID = frame_uid
        ds.StructureSetROISequence.append(roi)
        sequence = []
        for z, points in contours:
            index = np.column_stack([np.full(len(points), z), points])
            contour = item(ContourGeometricType=kind, NumberOfContourPoints=len(points))
            contour.ContourData = [f"{v:.6f}"[:16] for v in series.geometry.to_patient(index).ravel()]
            if references:
                contour.ContourImageSequence = [image(round(z))]
            sequence.append(contour)
        ds.ROIContourSequence.append(item(ReferencedROINumber=number, ContourSequence=sequence))
        observation = item(ObservationNumber=number, ReferencedROINumber=number)
        observation.RTROIInterpretedType, observation.ROIInterpreter = "", ""
        ds.RTROIObservationsSequence.append(observation)
    path.parent.mkdir(parents=True, exist_ok=True)
    dcmwrite(path, ds, enforce_file_format=True)
    return path


def circle(y, x, radius, n=720):
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.column_stack([y + radius * np.sin(angle), x + radius * np.cos(angle)])


def box(y0, x0, y1, x1):
    return np.array([[y0, x0], [y0, x1], [y1, x1], [y1, x0]], float)


def disc(shape, y, x, radius):
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    return (yy - y) ** 2 + (xx - x) ** 2 < radius**2


@pytest.fixture
def series(tmp_path):
    return read_series(make_ct_series(tmp_path / "in", n=4, rows=48, columns=64))


def derived_of(series, folder):
    """The series that an identity writes, read again, and its folder."""
    report = write_series(series, folder, MADE)
    return read_series(report.files, slicewise=not series.is_volume), report.folder


# --- contours to voxels ---


@pytest.mark.parametrize(
    "y, x, radius", [(20.0, 30.0, 12.3), (20.37, 30.81, 12.3), (23.5, 31.5, 3.2), (10.1, 9.9, 0.8)]
)
def test_a_circle_becomes_the_voxels_whose_centres_it_holds(tmp_path, series, y, x, radius):
    path = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"disc": [(1, circle(y, x, radius, 2000))]})
    mask = read_rtstruct(path, series)["disc"]
    np.testing.assert_array_equal(mask[1], disc((48, 64), y, x, radius))
    assert not mask[[0, 2, 3]].any()


@pytest.mark.filterwarnings("ignore:The value for the data element")
def test_a_contour_over_64_kilobytes_is_read(tmp_path, series):
    path = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"disc": [(1, circle(20.3, 30.6, 9.1, 6000))]})
    assert dcmread(path).ROIContourSequence[0].ContourSequence[0]["ContourData"].VR == "UN"  # as PS3.5 6.2.2 has it
    np.testing.assert_array_equal(read_rtstruct(path, series)["disc"][1], disc((48, 64), 20.3, 30.6, 9.1))


def test_a_contour_that_is_no_polygon_is_refused(tmp_path, series):
    path = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"r": [(1, circle(20, 30, 8)[:2])]})
    with pytest.raises(HarmonictError, match="6 coordinates"):
        read_rtstruct(path, series)


@pytest.mark.parametrize("orientation", ["coronal", "sagittal"])
def test_contours_follow_the_orientation_of_the_series(tmp_path, orientation):
    series = read_series(make_ct_series(tmp_path / "in", n=4, rows=48, columns=64, orientation=orientation))
    path = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"disc": [(2, circle(20.3, 40.6, 9.1, 2000))]})
    np.testing.assert_array_equal(read_rtstruct(path, series)["disc"][2], disc((48, 64), 20.3, 40.6, 9.1))


def test_an_inner_contour_is_a_hole_and_a_keyhole_is_the_same(tmp_path, series):
    outer, inner = circle(24, 30, 15.3), circle(24, 30, 6.2)
    keyhole = np.vstack([outer, outer[:1], inner[::-1], inner[-1:], outer[:1]])
    rois = {"two": [(0, outer), (0, inner)], "keyhole": [(0, keyhole)], "island": [(0, outer), (0, inner)]}
    rois["island"].append((0, circle(24, 30, 2.5)))
    masks = read_rtstruct(make_rtstruct(tmp_path / "m" / "r.dcm", series, rois), series)
    ring = disc((48, 64), 24, 30, 15.3) & ~disc((48, 64), 24, 30, 6.2)
    np.testing.assert_array_equal(masks["two"][0], ring)
    differing = masks["keyhole"][0] ^ masks["two"][0]
    assert differing.sum() <= 1  # nothing but a voxel on the channel, whose edge runs through centres
    np.testing.assert_array_equal(masks["island"][0], ring | disc((48, 64), 24, 30, 2.5))


def test_two_boxes_that_touch_share_no_voxel_and_leave_none_out(tmp_path, series):
    rois = {"a": [(1, box(5, 5, 12, 20))], "b": [(1, box(5, 20, 12, 30))], "c": [(1, box(12, 5, 20, 30))]}
    masks = read_rtstruct(make_rtstruct(tmp_path / "m" / "r.dcm", series, rois), series)
    assert [int(m.sum()) for m in masks.values()] == [7 * 15, 7 * 10, 8 * 25]
    assert not (masks["a"] & masks["b"]).any() and not (masks["a"] & masks["c"]).any()
    assert (masks["a"] | masks["b"] | masks["c"])[1, 5:20, 5:30].all()


def test_a_contour_may_reach_over_the_edge_of_the_image(tmp_path, series):
    path = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"r": [(1, circle(0, 63, 10.5))]})
    np.testing.assert_array_equal(read_rtstruct(path, series)["r"][1], disc((48, 64), 0, 63, 10.5))


def test_a_contour_between_two_slices_is_refused(tmp_path, series):
    path = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"r": [(1.4, circle(20, 30, 8))]})
    with pytest.raises(HarmonictError, match=r"0\.40 slices off"):
        read_rtstruct(path, series)


def test_a_contour_on_another_slice_than_it_references_is_refused(tmp_path, series):
    path = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"r": [(1, circle(20, 30, 8))]})
    ds = dcmread(path)
    contour = ds.ROIContourSequence[0].ContourSequence[0]
    contour.ContourImageSequence[0].ReferencedSOPInstanceUID = series.source.headers[3].SOPInstanceUID
    ds.save_as(path)
    with pytest.raises(HarmonictError, match="slice 2 but references slice 4"):
        read_rtstruct(path, series)


def test_contours_find_their_image_where_the_images_form_no_volume(tmp_path):
    series = read_series(make_ct_series(tmp_path / "in", n=7, rows=48, columns=64, missing=[2, 3, 4]), slicewise=True)
    assert not series.is_volume
    whole = read_series(make_ct_series(tmp_path / "whole", n=7, rows=48, columns=64))
    path = make_rtstruct(tmp_path / "m" / "r.dcm", whole, {"r": [(5, circle(20, 30, 8.3))]})
    ds = dcmread(path)
    image = series.source.headers[2].SOPInstanceUID  # the sixth position is the third of the images that are left
    for reference in (
        ds.ROIContourSequence[0].ContourSequence[0].ContourImageSequence[0],
        *ds.ReferencedFrameOfReferenceSequence[0]
        .RTReferencedStudySequence[0]
        .RTReferencedSeriesSequence[0]
        .ContourImageSequence,
    ):
        reference.ReferencedSOPInstanceUID = image
    ds.save_as(path)
    mask = read_rtstruct(path, series)["r"]
    assert mask.any(axis=(1, 2)).tolist() == [False, False, True, False]
    np.testing.assert_array_equal(mask[2], disc((48, 64), 20, 30, 8.3))


# --- what belongs together ---


def test_a_mask_of_the_source_is_right_for_the_derived_series(tmp_path, series):
    path = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"r": [(2, circle(20, 30, 8))]})
    derived, _ = derived_of(series, tmp_path / "out")
    np.testing.assert_array_equal(read_rtstruct(path, derived)["r"], read_rtstruct(path, series)["r"])


def test_a_mask_of_another_series_of_the_same_patient_is_refused(tmp_path, series):
    other = read_series(make_ct_series(tmp_path / "other", n=4, rows=48, columns=64, kernel="B70f"))
    assert other.source.headers[0].FrameOfReferenceUID == series.source.headers[0].FrameOfReferenceUID
    path = make_rtstruct(tmp_path / "m" / "r.dcm", other, {"r": [(2, circle(20, 30, 8))]})
    with pytest.raises(HarmonictError, match="none of the 4 images"):
        read_rtstruct(path, series)
    assert mask_references(path, str(other.source.headers[0].SeriesInstanceUID))
    assert not mask_references(path, str(series.source.headers[0].SeriesInstanceUID))


@pytest.mark.parametrize("references", [True, False])
def test_a_mask_of_another_frame_of_reference_is_refused(tmp_path, series, references):
    path = make_rtstruct(
        tmp_path / "m" / "r.dcm",
        series,
        {"r": [(2, circle(20, 30, 8))]},
        frame_of_reference="1.2.99",
        references=references,
    )
    with pytest.raises(HarmonictError, match=r"Frame of Reference 1\.2\.99"):
        read_rtstruct(path, series)


def test_a_mask_without_references_is_placed_by_its_frame_of_reference(tmp_path, series):
    path = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"r": [(2, circle(20, 30, 8))]}, references=False)
    assert read_rtstruct(path, series)["r"][2].any()


def test_a_contour_on_an_image_that_is_not_there_is_refused(tmp_path):
    files = make_ct_series(tmp_path / "in", n=4, rows=48, columns=64)
    path = make_rtstruct(tmp_path / "m" / "r.dcm", read_series(files), {"r": [(3, circle(20, 30, 8))]})
    with pytest.raises(HarmonictError, match="not among the slices"):
        read_rtstruct(path, read_series(files[:3]))


# --- names and files ---


def test_a_wanted_roi_is_found_and_an_absent_one_lists_those_that_are_there(tmp_path, series):
    rois = {"GTV-1": [(2, circle(20, 30, 8))], "Lung": [(1, circle(20, 30, 9))], "empty": []}
    path = make_rtstruct(tmp_path / "m" / "r.dcm", series, rois)
    assert roi_names(path) == ["GTV-1", "Lung", "empty"]
    assert list(read_masks(path, series, "gtv-1")) == ["GTV-1"]
    assert list(read_masks(path, series)) == ["GTV-1", "Lung"]
    with pytest.raises(HarmonictError, match="no ROI 'Heart'; there are: GTV-1, Lung, empty"):
        read_masks(path, series, "Heart")
    with pytest.raises(HarmonictError, match="no closed contours"):
        read_masks(path, series, "empty")


def test_two_rois_of_one_name_stay_apart(tmp_path, series):
    path = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"N": [(0, circle(20, 30, 8))], "M": [(1, circle(9, 9, 4))]})
    ds = dcmread(path)
    ds.StructureSetROISequence[1].ROIName = "N"
    ds.save_as(path)
    masks = read_masks(path, series)
    assert list(masks) == ["N", "N #2"]
    assert masks["N"][0].any() and masks["N #2"][1].any()


def test_open_contours_are_no_region(tmp_path, series):
    path = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"line": [(2, circle(20, 30, 8))]}, kind="OPEN_PLANAR")
    with pytest.raises(HarmonictError, match="no ROI with closed contours"):
        read_rtstruct(path, series)


def test_what_is_no_mask_is_named(tmp_path, series):
    (tmp_path / "text.dcm").write_text("no DICOM at all")
    with pytest.raises(HarmonictError, match="no DICOM file"):
        read_masks(tmp_path / "text.dcm", series)
    with pytest.raises(HarmonictError, match="CT Image Storage; expected an RTSTRUCT"):
        read_masks(series.source.paths[0], series)
    with pytest.raises(HarmonictError, match="cannot read"):
        read_masks(tmp_path / "nothing.dcm", series)


def test_label_images_are_read_on_the_grid_of_the_series(tmp_path, series):
    import SimpleITK as sitk

    labels = np.zeros(series.hu.shape, np.uint8)
    labels[1, 5:9, 6:12], labels[2, 3, 3] = 1, 2
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(series.geometry.spacing_mm[::-1])
    image.SetOrigin(series.geometry.origin_mm)
    sitk.WriteImage(image, str(tmp_path / "m.nrrd"))
    np.testing.assert_array_equal(read_masks(tmp_path / "m.nrrd", series, "2")["2"], labels == 2)
    with pytest.raises(HarmonictError, match="no ROI names"):
        read_masks(tmp_path / "m.nrrd", series, "tumour")


# --- SEG ---


def two_masks(series):
    masks = {"a": np.zeros(series.hu.shape, bool), "b": np.zeros(series.hu.shape, bool)}
    masks["a"][1:3, 10:20, 15:30] = True
    masks["b"][0, 5:7, 5:9], masks["b"][2, 15:25, 25:40] = True, True  # overlaps a
    return masks


def test_a_seg_comes_back_as_it_was_written(tmp_path, series):
    masks = two_masks(series)
    path = write_seg(masks, series.source.headers, tmp_path / "m" / "s.dcm")
    found = read_masks(path, series)
    assert list(found) == roi_names(path) == ["a", "b"]
    for name, mask in masks.items():
        np.testing.assert_array_equal(found[name], mask)
    assert list(read_masks(path, series, "b")) == ["b"]
    with pytest.raises(HarmonictError, match="expected an RTSTRUCT"):
        read_rtstruct(path, series)


def test_the_same_seg_twice_is_the_same_file(tmp_path, series):
    a = write_seg(two_masks(series), series.source.headers, tmp_path / "a" / "s.dcm")
    b = write_seg(two_masks(series), series.source.headers, tmp_path / "b" / "s.dcm")
    assert a.read_bytes() == b.read_bytes()


def test_masks_of_another_shape_make_no_seg(tmp_path, series):
    with pytest.raises(HarmonictError, match="expected bool"):
        write_seg({"a": np.ones((2, 2, 2), bool)}, series.source.headers, tmp_path / "s.dcm")


@pytest.mark.parametrize("kind", ["FRACTIONAL", "LABELMAP"])
def test_fractional_segs_count_from_one_half_on_and_label_maps_by_number(tmp_path, series, kind):
    masks = two_masks(series)
    if kind == "LABELMAP":
        masks["b"] &= ~masks["a"]
        pixels = (masks["a"] + 2 * masks["b"].astype(np.uint8)).astype(np.uint8)
    else:
        pixels = np.stack([masks["a"] * 0.51, masks["b"] * 0.9 + masks["a"] * 0.09], axis=-1).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seg = hd.seg.Segmentation(
            list(series.source.headers),
            pixels,
            segmentation_type=kind,
            segment_descriptions=[
                hd.seg.SegmentDescription(n, name, codes.SCT.Tissue, codes.SCT.Tissue, "MANUAL")
                for n, name in enumerate(masks, 1)
            ],
            series_instance_uid="1.2.3",
            series_number=5,
            sop_instance_uid="1.2.4",
            instance_number=1,
            manufacturer="T",
            manufacturer_model_name="T",
            software_versions="1",
            device_serial_number="1",
        )
        seg.save_as(tmp_path / "s.dcm")
    found = read_seg(tmp_path / "s.dcm", series)
    for name, mask in masks.items():
        np.testing.assert_array_equal(found[name], mask)


def test_a_seg_off_the_grid_is_refused(tmp_path, series):
    path = write_seg(two_masks(series), series.source.headers, tmp_path / "s.dcm")
    ds = dcmread(path)
    for frame in ds.PerFrameFunctionalGroupsSequence:
        place = frame.PlanePositionSequence[0]
        place.ImagePositionPatient = [float(place.ImagePositionPatient[0]) + 0.3, *place.ImagePositionPatient[1:]]
    ds.save_as(path)
    with pytest.raises(HarmonictError, match="voxels off the grid"):
        read_seg(path, series)


@pytest.mark.parametrize("kind", ["rtstruct", "seg"])
def test_mutated_masks_are_read_or_refused_in_one_line(tmp_path, series, kind):
    if kind == "rtstruct":
        path = make_rtstruct(tmp_path / "m" / "m.dcm", series, {"r": [(1, circle(20, 30, 8, 12))]})
    else:
        path = write_seg({"a": two_masks(series)["a"]}, series.source.headers, tmp_path / "m" / "m.dcm")
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(11)
    outcomes = {"read": 0, "refused": 0}
    for n in range(150):
        mutated = whole.copy()
        where = rng.integers(132, len(whole), rng.integers(1, 30))
        mutated[where] = rng.integers(0, 256, len(where))
        if n % 5 == 0:
            mutated = mutated[: rng.integers(0, len(whole))]
        path.write_bytes(mutated.tobytes())
        try:
            masks = read_masks(path, series)
            assert all(m.shape == series.hu.shape and m.dtype == bool for m in masks.values())
            outcomes["read"] += 1
        except HarmonictError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 5


# --- copies for the derived series ---


def test_copies_reference_the_derived_series_and_nothing_else(tmp_path, series):
    rt = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"r": [(2, circle(20, 30, 8))], "s": [(0, circle(9, 9, 4))]})
    seg = write_seg(two_masks(series), series.source.headers, tmp_path / "m" / "s.dcm")
    before = {p: p.read_bytes() for p in (rt, seg)}
    derived, folder = derived_of(series, tmp_path / "out" / "series")
    copies = write_masks([rt, seg], series, folder, tmp_path / "out" / "masks")
    assert [p.name for p in copies] == ["r.dcm", "s.dcm"]
    assert {p: p.read_bytes() for p in (rt, seg)} == before
    old_uids = [
        *(str(h.SOPInstanceUID) for h in series.source.headers),
        str(series.source.headers[0].SeriesInstanceUID),
    ]
    for original, copied in zip((rt, seg), copies, strict=True):
        old, new = dcmread(original), dcmread(copied)
        assert new.SOPInstanceUID != old.SOPInstanceUID and new.SeriesInstanceUID != old.SeriesInstanceUID
        assert new.file_meta.MediaStorageSOPInstanceUID == new.SOPInstanceUID
        assert (new.StudyInstanceUID, new.PatientID) == (old.StudyInstanceUID, old.PatientID)
        text = str(new)
        assert not [uid for uid in old_uids if uid in text]
        assert str(derived.source.headers[0].SeriesInstanceUID) in text
        assert new.ContributingEquipmentSequence[-1].Manufacturer == "harmonict"
        assert mask_references(copied, str(derived.source.headers[0].SeriesInstanceUID))
        for name, mask in read_masks(original, series).items():
            np.testing.assert_array_equal(read_masks(copied, derived)[name], mask)
        with pytest.raises(HarmonictError, match="none of the"):
            read_masks(copied, series)


def test_copies_are_the_same_bytes_in_a_rerun(tmp_path, series):
    rt = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"r": [(2, circle(20, 30, 8))]})
    _, folder = derived_of(series, tmp_path / "out" / "series")
    digests = []
    for _ in range(2):
        [copied] = write_masks([rt], series, folder, tmp_path / "out" / "masks")
        digests.append(hashlib.sha256(copied.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    assert [p.name for p in (tmp_path / "out" / "masks").iterdir()] == ["r.dcm"]


def test_masks_of_one_name_do_not_overwrite_each_other(tmp_path, series):
    a = make_rtstruct(tmp_path / "a" / "r.dcm", series, {"a": [(2, circle(20, 30, 8))]})
    b = make_rtstruct(tmp_path / "b" / "r.dcm", series, {"b": [(2, circle(20, 30, 8))]})
    derived, folder = derived_of(series, tmp_path / "out" / "series")
    copies = write_masks([a, b], series, folder, tmp_path / "out" / "masks")
    assert [list(read_masks(p, derived)) for p in copies] == [["a"], ["b"]]


def test_contours_on_frames_of_an_enhanced_file_move_to_classic_images(tmp_path):
    series = read_series([make_enhanced_ct(tmp_path / "in" / "e.dcm", rows=48, columns=64, order=[1, 0, 2, 4, 3])])
    rt = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"r": [(2, circle(20, 30, 8)), (3, circle(20, 30, 7))]})
    mask = read_rtstruct(rt, series)["r"]
    assert mask[2].sum() > mask[3].sum() > 0
    derived, folder = derived_of(series, tmp_path / "out" / "series")
    np.testing.assert_array_equal(read_rtstruct(rt, derived)["r"], mask)
    [copied] = write_masks([rt], series, folder, tmp_path / "out" / "masks")
    np.testing.assert_array_equal(read_rtstruct(copied, derived)["r"], mask)
    assert "ReferencedFrameNumber" not in str(dcmread(copied)) and "Enhanced" not in str(dcmread(copied))


def test_a_mask_of_another_series_is_not_copied(tmp_path, series):
    other = read_series(make_ct_series(tmp_path / "other", n=4, rows=48, columns=64, kernel="B70f"))
    rt = make_rtstruct(tmp_path / "m" / "r.dcm", other, {"r": [(2, circle(20, 30, 8))]})
    _, folder = derived_of(series, tmp_path / "out" / "series")
    with pytest.raises(HarmonictError, match="none of the"):
        write_masks([rt], series, folder, tmp_path / "out" / "masks")
    assert not (tmp_path / "out" / "masks").exists()


def test_an_original_mask_is_never_overwritten(tmp_path, series):
    rt = make_rtstruct(tmp_path / "m" / "r.dcm", series, {"r": [(2, circle(20, 30, 8))]})
    _, folder = derived_of(series, tmp_path / "out" / "series")
    before = rt.read_bytes()
    with pytest.raises(HarmonictError, match="source's folder"):
        write_masks([rt], series, folder, tmp_path / "m")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "r.dcm").write_text("mine")
    with pytest.raises(HarmonictError, match="already exists"):
        write_masks([rt], series, folder, tmp_path / "notes")
    assert rt.read_bytes() == before and (tmp_path / "notes" / "r.dcm").read_text() == "mine"


# --- real ---


def test_the_structures_of_lung1_lie_where_the_anatomy_is(data):
    files = sorted((data / "ct" / "LUNG1-001" / "image").glob("*.dcm"))
    [path] = (data / "ct" / "LUNG1-001" / "rtstruct").glob("*.dcm")
    series = read_series(files)
    assert roi_names(path) == ["GTV-1", "Spinal-Cord", "Lung-Left", "Lung-Right"]
    masks = read_rtstruct(path, series)
    voxel_ml = np.prod(series.geometry.spacing_mm) / 1000
    contours = {
        r.ROIName: c
        for r, c in zip(
            *(dcmread(path)[k].value for k in ("StructureSetROISequence", "ROIContourSequence")), strict=True
        )
    }
    for name, mask in masks.items():
        planes: dict[float, float] = {}
        for contour in contours[name].ContourSequence:  # shoelace; these files draw holes into the outer contour
            x, y, z = np.array(contour.ContourData, float).reshape(-1, 3).T
            area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
            planes[z[0]] = planes.get(z[0], 0.0) + area
        volume_ml = sum(planes.values()) * series.geometry.spacing_mm[0] / 1000
        assert abs(mask.sum() * voxel_ml / volume_ml - 1) < 0.02, name
    for side in ("Lung-Left", "Lung-Right"):
        assert np.median(series.hu[masks[side]]) < -750
    assert -100 < np.median(series.hu[masks["GTV-1"]]) < 100
    assert -20 < np.median(series.hu[masks["Spinal-Cord"]]) < 80
    left, right = (np.argwhere(masks[f"Lung-{s}"]).mean(axis=0)[2] for s in ("Left", "Right"))
    assert left > right  # supine, head first: the patient's left is on the right of the image
