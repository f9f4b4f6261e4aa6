"""Every layout of a CT file gives the same HU; what is no volume is refused in words."""

import dataclasses
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from harmonict.core import HarmonictError
from harmonict.dicom.read import DicomSource, protocol_from_header, read_series
from make_dicom import make_ct_series, make_enhanced_ct, phantom_hu, transcode

LOSSLESS = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLSLossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEG2000Lossless,
    JPEG2000,
)


# ------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda s: s.keyword)
@pytest.mark.parametrize(
    ("signed", "bits", "intercept"), [(False, 16, -1024), (True, 16, 0), (False, 12, -1024), (True, 12, 0)]
)
def test_hu_are_exact_in_every_layout(tmp_path, syntax, signed, bits, intercept):
    hu = phantom_hu(2).clip(-1024, 2047)
    files = make_ct_series(tmp_path, hu=hu, signed=signed, bits=bits, intercept=intercept, transfer_syntax=syntax)
    assert dcmread(files[0]).file_meta.TransferSyntaxUID == syntax
    assert np.array_equal(read_series(files).hu, hu)


def test_near_lossless_files_are_read_within_their_error(tmp_path):
    files = make_ct_series(tmp_path, n=2, transfer_syntax=JPEGLSNearLossless)
    assert 0 < np.abs(read_series(files).hu - phantom_hu(2)).max() <= 2


def test_slope_and_intercept_change_from_slice_to_slice(tmp_path):
    hu = phantom_hu(4) * 0.5
    slopes, intercepts = [1, 0.5, 0.25, 0.1], [-1024, -1000, -2000, -1024.5]
    series = read_series(make_ct_series(tmp_path, hu=hu, slope=slopes, intercept=intercepts))
    assert np.abs(series.hu - hu).max(axis=(1, 2)) == pytest.approx([0.5, 0, 0, 0], abs=1e-3)
    assert [float(h.RescaleSlope) for h in series.source.headers] == slopes


def test_values_below_minus_1024_are_kept(tmp_path):
    hu = phantom_hu(2)
    hu[0, 5, 5] = -1360
    files = make_ct_series(tmp_path, hu=hu, signed=True, intercept=0)
    assert read_series(files).hu.min() == -1360


def test_unused_bits_are_removed_only_where_an_overlay_owns_them(tmp_path):
    (path,) = make_ct_series(tmp_path, n=1, bits=12)
    ds = dcmread(path)
    pixels = np.frombuffer(ds.PixelData, "<u2").copy()
    ds.PixelData = (pixels | 0x8000).tobytes()
    ds.save_as(path)
    with pytest.raises(HarmonictError, match="do not fit the 12 bits"):
        read_series([path])
    ds.add_new(0x60000102, "US", 15)  # Overlay Bit Position
    ds.save_as(path)
    assert np.array_equal(read_series([path]).hu, phantom_hu(1))


def test_signed_values_without_extended_sign_are_read(tmp_path):
    hu = phantom_hu(1).clip(-1024, 2047)
    (path,) = make_ct_series(tmp_path, hu=hu, bits=12, signed=True, intercept=0)
    ds = dcmread(path)
    ds.PixelData = (np.frombuffer(ds.PixelData, "<u2") & 0x0FFF).tobytes()
    ds.save_as(path)
    assert np.array_equal(read_series([path]).hu, hu)


def test_12_bit_jpeg_is_decoded(tmp_path):
    example = dcmread(get_testdata_file("JPGExtended.dcm"))
    (path,) = make_ct_series(tmp_path, n=1, rows=1024, columns=256, bits=12)
    ds = dcmread(path)
    ds.PixelData = encapsulate([get_frame(example.PixelData, 0, number_of_frames=1)])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = JPEGExtended12Bit
    ds.save_as(path)
    stored = read_series([path]).hu[0] + 1024
    # values of pydicom's own tests for this file, decoded with libjpeg
    assert (stored[420, 140], stored[230, 120]) == (244, 95)


def test_8_bit_jpeg_is_decoded(tmp_path):
    image = Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (32, 1)))
    code = BytesIO()
    image.save(code, "JPEG", quality=95)
    (path,) = make_ct_series(tmp_path, n=1, bits=12)
    ds = dcmread(path)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelData = encapsulate([code.getvalue()])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    ds.save_as(path)
    assert np.abs(read_series([path]).hu[0] + 1024 - np.asarray(Image.open(code), float)).max() <= 1


def test_a_syntax_without_decoder_is_named_with_the_package_that_has_one(tmp_path):
    (path,) = make_ct_series(tmp_path, n=1, transfer_syntax=JPEGLSLossless)
    ds = dcmread(path)
    ds.file_meta.TransferSyntaxUID = HTJ2KLossless
    ds.save_as(path)
    with pytest.raises(HarmonictError, match=r"High-Throughput JPEG 2000.*pip install pylibjpeg.*pylibjpeg-openjpeg"):
        read_series([path])


# ----------------------------------------------------------------------------------------------------- padding


def test_a_tagged_padding_value_is_padding_and_keeps_its_value(tmp_path):
    hu = phantom_hu(3)
    hu[:, :4, :6] = -1024
    series = read_series(make_ct_series(tmp_path, hu=hu, padding_value=0))
    expected = hu == -1024
    assert np.array_equal(series.padding, expected)
    assert np.array_equal(series.hu, hu)


def test_a_padding_range_covers_all_values_up_to_its_limit(tmp_path):
    hu = phantom_hu(1)
    hu[0, 0, :4] = [-1300, -1200, -1100, -1050]
    files = make_ct_series(tmp_path, hu=hu, intercept=-1500, padding_value=0, padding_limit=400)
    assert np.argwhere(read_series(files).padding).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]


def test_a_padding_value_written_with_the_wrong_sign_is_understood(tmp_path):
    hu = phantom_hu(2)
    hu[:, :3] = -2000
    files = make_ct_series(tmp_path, hu=hu, signed=True, intercept=0)
    for path in files:
        ds = dcmread(path)
        ds.add_new("PixelPaddingValue", "US", 63536)  # -2000 in 16 bits
        ds.save_as(path)
    assert np.array_equal(read_series(files).padding, hu == -2000)


def test_a_padding_tag_at_the_value_of_water_is_believed_at_the_border_only(tmp_path):
    hu = phantom_hu(1)
    hu[0, :2] = 0
    hu[0, 16, 20] = 0
    files = make_ct_series(tmp_path, hu=hu, signed=True, intercept=0, padding_value=0)
    padding = read_series(files).padding
    assert padding[0, :2].all()
    assert not padding[0, 16, 20]


# ---------------------------------------------------------------------------------------------------- geometry


def test_slices_are_sorted_along_their_normal_whatever_the_order_of_the_files(tmp_path):
    files = make_ct_series(tmp_path, n=7, spacing_mm=(2.5, 0.8, 0.7))
    shuffled = [files[k] for k in (3, 6, 0, 5, 1, 4, 2)]
    series = read_series(shuffled)
    assert np.array_equal(series.hu, phantom_hu(7))
    assert series.source.paths == tuple(files)
    assert series.geometry.spacing_mm == pytest.approx((2.5, 0.8, 0.7))
    assert series.geometry.origin_mm == pytest.approx((-10, -20, 100))


@pytest.mark.parametrize(
    ("orientation", "normal"), [("axial", (0, 0, 1)), ("coronal", (0, 1, 0)), ("sagittal", (-1, 0, 0))]
)
def test_any_orientation_is_a_volume(tmp_path, orientation, normal):
    series = read_series(make_ct_series(tmp_path, orientation=orientation)[::-1])
    assert series.geometry.direction[0] == pytest.approx(normal)
    assert np.array_equal(series.hu, phantom_hu())
    for header, z in zip(series.source.headers, range(5), strict=True):
        assert series.geometry.to_patient([z, 0, 0]) == pytest.approx(np.array(header.ImagePositionPatient, float))


def test_the_slice_distance_comes_from_positions_not_from_the_thickness(tmp_path):
    files = make_ct_series(tmp_path, spacing_mm=(1.25, 1, 1), SliceThickness="2.5", SpacingBetweenSlices="9")
    assert read_series(files).geometry.spacing_mm[0] == pytest.approx(1.25)


def test_a_single_image_is_a_volume_of_one_slice(tmp_path):
    series = read_series(make_ct_series(tmp_path, n=1, spacing_mm=(3, 1, 1)))
    assert series.hu.shape == (1, 32, 40)
    assert series.is_volume
    assert series.geometry.spacing_mm[0] == 3


def test_positions_rounded_to_hundredths_are_still_regular(tmp_path):
    files = make_ct_series(tmp_path, n=9, spacing_mm=(0.625, 1, 1))
    for z, path in enumerate(files):
        ds = dcmread(path)
        ds.ImagePositionPatient = ["-10", "-20", f"{100 + 0.625 * z:.2f}"]
        ds.save_as(path)
    assert read_series(files).geometry.spacing_mm[0] == pytest.approx(0.625, abs=0.002)


REFUSED = {
    "a missing slice": (dict(n=7, missing=(3,)), r"missing between positions 102\.00 and 104\.00 mm"),
    "a slice twice": (dict(duplicate=(2,)), r"same position: 102\.00 mm"),
    "a gantry tilt": (dict(tilt=12.0), r"gantry tilt of 12\.0 degrees"),
    "two single images": (dict(n=2, spacing_mm=(339.0, 0.7, 0.7), SliceThickness="1"), r"two slices 339 mm apart"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_slices_that_form_no_volume_are_refused_by_name_or_taken_one_by_one(tmp_path, what):
    arguments, message = REFUSED[what]
    files = make_ct_series(tmp_path / "study" / "thorax", **arguments)
    with pytest.raises(HarmonictError, match=message) as refusal:
        read_series(files)
    assert "study/thorax series 2" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    series = read_series(files, slicewise=True)
    assert not series.is_volume
    assert len(series.hu) == len(files)


def test_uneven_spacing_is_refused_with_its_range(tmp_path):
    files = make_ct_series(tmp_path, n=5)
    ds = dcmread(files[2])
    ds.ImagePositionPatient[2] = "102.3"
    ds.save_as(files[2])
    with pytest.raises(HarmonictError, match=r"uneven slice spacing: 0\.700 to 1\.300 mm"):
        read_series(files)


def test_regular_slices_far_apart_are_a_volume(tmp_path):
    files = make_ct_series(tmp_path, n=4, spacing_mm=(10, 1, 1), SliceThickness="1")
    assert read_series(files).is_volume


def test_slicewise_leaves_a_regular_volume_a_volume(tmp_path):
    assert read_series(make_ct_series(tmp_path), slicewise=True).is_volume


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 30}, "mixed image sizes"),
        ({"orientation": "coronal"}, "mixed orientations"),
        ({"spacing_mm": (1, 0.8, 0.8)}, "mixed pixel spacings"),
        ({"kernel": "B70f"}, "several kernels"),
        ({"series_uid": "1.2.3"}, "files of 2 series"),
    ],
)
@pytest.mark.parametrize("slicewise", [False, True])
def test_mixed_slices_are_refused(tmp_path, change, message, slicewise):
    common = {"n": 3, "series_uid": "1.2.4"}
    files = make_ct_series(tmp_path / "a", **common)
    files += make_ct_series(tmp_path / "b", origin_mm=(-10, -20, 103), **{**common, **change})
    with pytest.raises(HarmonictError, match=message):
        read_series(files, slicewise=slicewise)


# ------------------------------------------------------------------------------------------------- multi-frame


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEGLSLossless, RLELossless], ids=lambda s: s.keyword)
def test_enhanced_ct_gives_the_series_that_its_frames_are(tmp_path, syntax):
    order = [3, 0, 4, 1, 2]
    path = make_enhanced_ct(
        tmp_path / "enhanced.dcm", order=order, intercept=[-1024, -1025, -1026, -1027, -1028], transfer_syntax=syntax
    )
    series = read_series([path])
    assert np.array_equal(series.hu, phantom_hu())
    assert series.geometry.spacing_mm == pytest.approx((1, 0.7, 0.7))
    assert series.source.frames == tuple(order.index(z) + 1 for z in range(5))
    assert set(series.source.paths) == {path}
    assert series.protocol.kernel == "B30f"
    assert series.protocol.exposure_mas == 100
    assert series.protocol.ctdivol_mgy == 6.5


def test_headers_of_frames_read_like_classic_ones(tmp_path):
    series = read_series([make_enhanced_ct(tmp_path / "e.dcm", intercept=[-1024, -1025, -1026, -1027, -1028])])
    header = series.source.headers[3]
    assert float(header.RescaleIntercept) == -1027
    assert [float(v) for v in header.ImagePositionPatient] == [-10, -20, 103]
    assert [float(v) for v in header.PixelSpacing] == [0.7, 0.7]
    assert (header.ConvolutionKernel, header.KVP, header.InstanceNumber) == ("B30f", 120, 4)
    assert header.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    for keyword in ("PixelData", "NumberOfFrames", "PerFrameFunctionalGroupsSequence"):
        assert keyword not in header


# ----------------------------------------------------------------------------------------------------- headers


def test_the_source_keeps_what_a_writer_needs_and_no_pixels(tmp_path):
    series = read_series(make_ct_series(tmp_path, signed=True, intercept=0, transfer_syntax=RLELossless))
    assert isinstance(series.source, DicomSource)
    assert series.source.frames is None
    for header in series.source.headers:
        assert "PixelData" not in header
        assert header.file_meta.TransferSyntaxUID == RLELossless
        assert (header.PixelRepresentation, header.BitsStored, float(header.RescaleSlope)) == (1, 16, 1)


def header(**tags: object) -> Dataset:
    ds = Dataset()
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return ds


@pytest.mark.parametrize(
    ("written", "short"),
    [
        ("SIEMENS", "Siemens"),
        ("Siemens Healthineers", "Siemens"),
        ("GE MEDICAL SYSTEMS", "GE"),
        ("Philips Medical Systems", "Philips"),
        ("TOSHIBA", "Canon"),
        ("Canon Medical Systems", "Canon"),
        ("Gemini Imaging", "Gemini Imaging"),
    ],
)
def test_vendors_have_one_name_each(written, short):
    assert protocol_from_header(header(Manufacturer=written)).manufacturer == short


@pytest.mark.parametrize(
    ("vendor", "values", "kernel", "strength"),
    [
        ("SIEMENS", ["Br40d", "3"], "Br40d", 3),
        ("SIEMENS", ["I31f", "3"], "I31f", 3),
        ("SIEMENS", "I31f", "I31f", None),
        ("SIEMENS", "B40f", "B40f", 0),
        ("GE MEDICAL SYSTEMS", "STANDARD", "STANDARD", None),
        ("TOSHIBA", "FC13", "FC13", None),
    ],
)
def test_kernel_and_iterative_strength_are_told_apart(vendor, values, kernel, strength):
    protocol = protocol_from_header(header(Manufacturer=vendor, ConvolutionKernel=values))
    assert (protocol.kernel, protocol.iterative_strength) == (kernel, strength)


@pytest.mark.parametrize(
    ("tags", "mas"),
    [
        ({"Exposure": "120"}, 120),
        ({"ExposureInuAs": "95000"}, 95),
        ({"ExposureTime": "500", "XRayTubeCurrent": "200"}, 100),
        ({"Exposure": "0", "ExposureTime": "500", "XRayTubeCurrent": "200"}, 100),
        ({"XRayTubeCurrent": "200"}, None),
    ],
)
def test_exposure_is_given_or_current_times_time(tags, mas):
    assert protocol_from_header(header(**tags)).exposure_mas == mas


def test_exposure_of_a_series_is_the_median_of_its_slices(tmp_path):
    files = make_ct_series(tmp_path, n=3)
    for path, mas in zip(files, (50, 90, 400), strict=True):
        ds = dcmread(path)
        ds.Exposure = mas
        ds.save_as(path)
    assert read_series(files).protocol.exposure_mas == 90


# --------------------------------------------------------------------------------------------------- bad input


def test_no_files_are_refused():
    with pytest.raises(HarmonictError, match="no DICOM files"):
        read_series([])


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(HarmonictError, match=r"cannot read .*gone\.dcm: No such file"):
        read_series([tmp_path / "gone.dcm"])


def test_text_is_no_dicom(tmp_path):
    (tmp_path / "notes.dcm").write_text("not an image " * 50)
    with pytest.raises(HarmonictError, match="is not a DICOM file"):
        read_series([tmp_path / "notes.dcm"])


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000])
@pytest.mark.parametrize("kept", [0.2, 0.9])
def test_a_truncated_file_is_refused(tmp_path, syntax, kept):
    files = make_ct_series(tmp_path, n=3, transfer_syntax=syntax)
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(HarmonictError, match=files[1].name):
        read_series(files)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, r"MR Image Storage \(MR\); expected CT"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"RescaleSlope": None}, "no RescaleSlope"),
        ({"RescaleType": "ZEFF"}, "RescaleType is not HU"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient must hold 3 numbers"),
        ({"PixelSpacing": ["0", "1"]}, "PixelSpacing must be above 0"),
        ({"ImageOrientationPatient": ["1", "0", "0", "1", "0", "0"]}, "right angles"),
        ({"Rows": 60000, "Columns": 60000}, "truncated"),
    ],
)
def test_an_unfit_image_is_refused_in_words(tmp_path, tags, message):
    files = make_ct_series(tmp_path, n=1, **tags)
    with pytest.raises(HarmonictError, match=message):
        read_series(files)


def test_a_compressed_image_larger_than_its_stream_says_is_refused(tmp_path):
    (path,) = make_ct_series(tmp_path, n=1, transfer_syntax=JPEGLSLossless)
    ds = dcmread(path)
    ds.Rows = ds.Columns = 60000
    ds.save_as(path)
    with pytest.raises(HarmonictError, match="cannot come out of"):
        read_series([path])
    ds.Rows, ds.Columns = 33, 40
    ds.save_as(path)
    with pytest.raises(HarmonictError, match=r"the coded image is \(32, 40\)"):
        read_series([path])


def test_no_name_of_a_patient_is_in_a_message(tmp_path):
    files = make_ct_series(tmp_path, duplicate=(1,), PatientName="Secret^Person", SeriesDescription="Secret words")
    with pytest.raises(HarmonictError) as refusal:
        read_series(files)
    assert "Secret" not in str(refusal.value)


def test_a_file_without_preamble_is_read(tmp_path):
    (path,) = make_ct_series(tmp_path, n=1, transfer_syntax=ImplicitVRLittleEndian)
    ds = dcmread(path)
    del ds.file_meta
    ds.preamble = None
    ds.save_as(path, enforce_file_format=False, implicit_vr=True, little_endian=True)
    assert path.read_bytes()[128:132] != b"DICM"
    assert np.array_equal(read_series([path]).hu, phantom_hu(1))


# --------------------------------------------------------------------------------------------------- real data

REAL = {
    "C3N-00249": ((72, 512, 512), (3, 0.8828125, 0.8828125), "Siemens", "Sensation 64", "B40f"),
    "CRLM-CT-1006": ((16, 512, 512), (5, 0.804688, 0.804688), "GE", "LightSpeed16", None),
    "LIDC-IDRI-0314": ((80, 512, 512), (1, 0.78125, 0.78125), "Philips", "Brilliance 16P", "D"),
    "LUNG1-001": ((134, 512, 512), (3, 0.9765625, 0.9765625), "Siemens", "Biograph 40", "B19f"),
    "TCGA-09-2043": ((30, 512, 512), (3, 1.03, 1.03), "Canon", "Aquilion", "FC13"),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_series_is_read_with_its_protocol(data, name):
    shape, spacing, vendor, model, kernel = REAL[name]
    series = read_series(sorted((data / "ct" / name / "image").iterdir(), reverse=True))
    assert series.hu.shape == shape
    assert series.geometry.spacing_mm == pytest.approx(spacing, abs=1e-6)
    assert (series.protocol.manufacturer, series.protocol.model, series.protocol.kernel) == (vendor, model, kernel)
    assert (series.patient, series.protocol.kvp) == (name, 120)
    assert (np.diff([float(h.ImagePositionPatient[2]) for h in series.source.headers]) > 0).all()
    middle = len(series.hu) // 2
    ds = dcmread(series.source.paths[middle])
    expected = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    assert np.array_equal(series.hu[middle], expected)


@pytest.mark.parametrize("kernel", ["FC51", "FC13"])
def test_two_lungman_slices_are_single_images(data, kernel):
    files = sorted((data / "paired" / "canon-lungman" / kernel).iterdir())
    with pytest.raises(HarmonictError, match=r"two slices 339 mm apart \(1279\.50, 1618\.50 mm\)"):
        read_series(files)
    series = read_series(files, slicewise=True)
    assert not series.is_volume
    assert series.protocol.kernel == kernel
    assert series.padding.mean() == pytest.approx(0.2146, abs=1e-3)
    assert -1400 < series.hu[~series.padding].min() < -1024


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless], ids=lambda s: s.keyword)
def test_a_real_slice_compressed_by_another_library_reads_the_same(data, tmp_path, syntax):
    source = data / "ct" / "TCGA-09-2043" / "image" / "0010.dcm"
    coded = transcode(source, tmp_path / "coded.dcm", syntax)
    a, b = read_series([source]), read_series([coded])
    assert np.array_equal(a.hu, b.hu)
    assert np.array_equal(a.padding, b.padding)
    assert dataclasses.asdict(a.protocol) == dataclasses.asdict(b.protocol)
