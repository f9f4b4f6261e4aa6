"""NIfTI, NRRD and MetaImage keep every HU and every millimetre, and are written whole or not at all."""

import numpy as np
import pytest
import SimpleITK as sitk

from harmonict.core import Geometry, HarmonictError, Series
from harmonict.volumes import read_mask, read_volume, volume_format, volume_grid, volume_stem, write_mask, write_volume
from make_dicom import phantom_hu

ENDINGS = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
OBLIQUE = Geometry(
    origin_mm=(-12.5, 30.0, 101.0),
    spacing_mm=(2.5, 0.75, 0.5),
    direction=((0.0, -0.6, 0.8), (0.0, 0.8, 0.6), (1.0, 0.0, 0.0)),
)


def series(geometry: Geometry = OBLIQUE) -> Series:
    return Series(hu=phantom_hu(4, 20, 30), geometry=geometry)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_volume_survives_writing_and_reading(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    write_volume(series(), path)
    back = read_volume(path)
    assert np.array_equal(back.hu, series().hu)
    assert back.geometry.same_grid(OBLIQUE, tolerance_mm=1e-3)
    assert back.source.dtype == "int16"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "something temporary was left"


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_header_alone_gives_grid_and_pixel_type(tmp_path, ending):
    write_volume(series(), tmp_path / f"a{ending}")
    shape, geometry, dtype = volume_grid(tmp_path / f"a{ending}")
    assert (shape, dtype) == ((4, 20, 30), "int16")
    assert geometry == read_volume(tmp_path / f"a{ending}").geometry


def test_places_agree_with_simpleitk(tmp_path):
    write_volume(series(), tmp_path / "a.nii.gz")
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    point = image.TransformIndexToPhysicalPoint((7, 5, 2))  # x, y, z
    assert read_volume(tmp_path / "a.nii.gz").geometry.to_patient([2, 5, 7]) == pytest.approx(point, abs=1e-3)


def test_a_2d_image_is_one_slice_and_is_written_as_2d_again(tmp_path):
    image = sitk.GetImageFromArray(phantom_hu(1)[0].astype(np.int16))
    image.SetSpacing((0.7, 0.8))
    sitk.WriteImage(image, str(tmp_path / "flat.mha"))
    flat = read_volume(tmp_path / "flat.mha")
    assert flat.hu.shape == (1, 32, 40)
    assert flat.geometry.spacing_mm == (1, 0.8, 0.7)
    write_volume(flat, tmp_path / "again.mha")
    again = sitk.ReadImage(str(tmp_path / "again.mha"))
    assert (again.GetDimension(), again.GetSpacing()) == (2, (0.7, 0.8))


def test_an_in_plane_spacing_overrides_a_lying_header(tmp_path):
    write_volume(series(), tmp_path / "a.nrrd")
    assert read_volume(tmp_path / "a.nrrd", spacing_mm=0.7).geometry.spacing_mm == (2.5, 0.7, 0.7)
    assert read_volume(tmp_path / "a.nrrd", spacing_mm=(0.7, 0.6)).geometry.spacing_mm == (2.5, 0.7, 0.6)


@pytest.mark.parametrize(
    ("source", "low", "high", "written"),
    [
        ("int16", -1024, 3000, "int16"),
        ("int32", -1024, 3000, "int32"),
        ("uint16", 0, 3000, "uint16"),
        ("uint16", -100, 3000, "int16"),
        ("int16", -1024, 40000, "float32"),
        ("float32", -1024, 3000, "float32"),
        ("float64", -1024, 3000, "float32"),
    ],
)
def test_the_pixel_type_is_the_sources_where_values_fit(tmp_path, source, low, high, written):
    image = sitk.GetImageFromArray(np.zeros((2, 3, 4), source))
    sitk.WriteImage(image, str(tmp_path / "source.mha"))
    hu = np.full((2, 3, 4), low, np.float32)
    hu[0, 0, 0] = high
    write_volume(read_volume(tmp_path / "source.mha").with_hu(hu), tmp_path / "out.mha")
    back = read_volume(tmp_path / "out.mha")
    assert back.source.dtype == written
    assert np.array_equal(back.hu, hu)


def test_values_are_rounded_never_truncated(tmp_path):
    hu = np.array([[[-1000.6, -0.6, 0.6, 99.7]]], np.float32)
    write_volume(Series(hu=hu), tmp_path / "a.mha")
    assert read_volume(tmp_path / "a.mha").hu.tolist() == [[[-1001, -1, 1, 100]]]


def test_untagged_padding_is_found(tmp_path):
    hu = phantom_hu(2)
    hu[:, :5] = -2048
    write_volume(Series(hu=hu), tmp_path / "a.mha")
    assert np.array_equal(read_volume(tmp_path / "a.mha").padding, hu == -2048)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_volume(series(), tmp_path / "a.mha")
    before = (tmp_path / "a.mha").read_bytes()

    def full(image, name, **_):
        open(name, "wb").write(b"half")
        raise RuntimeError("sitk::ERROR:\nNo space left on device")

    monkeypatch.setattr(sitk, "WriteImage", full)
    with pytest.raises(HarmonictError, match=r"cannot write .*a\.mha: No space left") as error:
        write_volume(series(), tmp_path / "a.mha")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mha"]
    assert (tmp_path / "a.mha").read_bytes() == before


def test_the_source_is_never_written_to(tmp_path):
    write_volume(series(), tmp_path / "a.mha")
    with pytest.raises(HarmonictError, match="is the source file"):
        write_volume(read_volume(tmp_path / "a.mha"), tmp_path / "a.mha")


def test_vectors_and_time_series_are_refused_in_words(tmp_path):
    sitk.WriteImage(sitk.Image([4, 5, 6], sitk.sitkVectorFloat32, 3), str(tmp_path / "v.nrrd"))
    sitk.WriteImage(sitk.Image([4, 5, 6, 2], sitk.sitkInt16), str(tmp_path / "t.nii"))
    with pytest.raises(HarmonictError, match="3 values a voxel"):
        read_volume(tmp_path / "v.nrrd")
    with pytest.raises(HarmonictError, match="a 4-D image"):
        read_volume(tmp_path / "t.nii")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    write_volume(series(), path)
    whole = path.read_bytes()
    for kept in (0, 40, len(whole) // 2, len(whole) - 60):
        path.write_bytes(whole[:kept])
        with pytest.raises(HarmonictError) as error:
            read_volume(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_refused_in_one_line_never_read_as_0(tmp_path, ending, value):
    hu = phantom_hu(4, 20, 30)
    hu[3, 19, 29] = value
    sitk.WriteImage(sitk.GetImageFromArray(hu), str(tmp_path / f"a{ending}"))
    with pytest.raises(HarmonictError, match=r"NaN or infinite") as error:
        read_volume(tmp_path / f"a{ending}")
    assert f"a{ending}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [1e9, -2e5])
def test_values_that_are_no_hu_are_refused_in_one_line(tmp_path, value):
    hu = phantom_hu(4, 20, 30).astype(np.float32)
    hu[3, 19, 29] = value
    sitk.WriteImage(sitk.GetImageFromArray(hu), str(tmp_path / "a.nii"))
    with pytest.raises(HarmonictError, match=r"a\.nii: values from .* are no HU") as error:
        read_volume(tmp_path / "a.nii")
    assert f"{value:g}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("order", "<>")
def test_a_float_nifti_of_either_byte_order_is_read_whole_and_refused_cut(tmp_path, order):
    sitk.WriteImage(sitk.GetImageFromArray(phantom_hu(4, 20, 30) + np.float32(0.5)), str(tmp_path / "a.nii"))
    raw = (tmp_path / "a.nii").read_bytes()
    if order == ">":
        head = bytearray(raw[:352])
        swaps = {0: 4, 32: 4, 36: 2, **dict.fromkeys(range(40, 56, 2), 2), 68: 2, 70: 2, 72: 2, 74: 2, 252: 2, 254: 2}
        swaps |= dict.fromkeys([*range(56, 68, 4), *range(76, 120, 4), 124, 128, 132, 136, 140, 144], 4)
        swaps |= dict.fromkeys(range(256, 328, 4), 4)
        for at, size in swaps.items():
            head[at : at + size] = head[at : at + size][::-1]
        raw = bytes(head) + np.frombuffer(raw[352:], "<f4").astype(">f4").tobytes()
        (tmp_path / "a.nii").write_bytes(raw)
    assert np.array_equal(read_volume(tmp_path / "a.nii").hu, phantom_hu(4, 20, 30) + np.float32(0.5))
    (tmp_path / "a.nii").write_bytes(raw[:-7])
    with pytest.raises(HarmonictError, match="truncated"):
        read_volume(tmp_path / "a.nii")


def test_a_scaled_nifti_is_as_long_as_its_own_pixel_type_says(tmp_path):
    write_volume(series(), tmp_path / "a.nii")
    scaled = bytearray((tmp_path / "a.nii").read_bytes())
    scaled[112:120] = np.array([2.0, -10.0], "<f4").tobytes()  # scl_slope, scl_inter
    (tmp_path / "a.nii").write_bytes(scaled)
    assert np.array_equal(read_volume(tmp_path / "a.nii").hu, 2 * series().hu - 10)


def test_a_missing_file_and_a_strange_name_are_refused(tmp_path):
    with pytest.raises(HarmonictError, match="no image file"):
        read_volume(tmp_path / "gone.nii")
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(HarmonictError, match=r"expected a name ending in \.nii"):
        read_volume(tmp_path / "a.png")


def test_names_tell_formats():
    assert [volume_format(f"x{e}") for e in ENDINGS] == ["nifti", "nifti", "nrrd", "nrrd", "mha", "mha"]
    assert volume_format("x.NII.GZ") == "nifti"
    assert volume_format("x.dcm") is None
    assert [volume_stem(n) for n in ("a.b.nii.gz", "a.mha", "a")] == ["a.b", "a", "a"]


def test_a_mask_comes_back_on_the_grid_of_its_image(tmp_path):
    image = series()
    write_mask(image.hu > 0, image.geometry, tmp_path / "m.nii.gz")
    assert np.array_equal(read_mask(tmp_path / "m.nii.gz", like=image), image.hu > 0)


def test_a_mask_on_another_grid_is_refused(tmp_path):
    image = series()
    write_mask(image.hu > 0, Geometry(spacing_mm=(2.5, 0.75, 0.5)), tmp_path / "m.mha")
    with pytest.raises(HarmonictError, match="lies on another grid"):
        read_mask(tmp_path / "m.mha", like=image)
    write_mask(image.hu[:2] > 0, image.geometry, tmp_path / "m.mha")
    with pytest.raises(HarmonictError, match=r"the mask is \(2, 20, 30\)"):
        read_mask(tmp_path / "m.mha", like=image)


def test_one_of_several_labels_must_be_named(tmp_path):
    image = series()
    labels = sitk.GetImageFromArray((image.hu > 0).astype(np.uint8) + 2 * (image.hu > 500))
    labels.SetOrigin(OBLIQUE.origin_mm)
    labels.SetSpacing(OBLIQUE.spacing_mm[::-1])
    labels.SetDirection(np.array(OBLIQUE.direction)[::-1].T.ravel().tolist())
    sitk.WriteImage(labels, str(tmp_path / "l.mha"))
    with pytest.raises(HarmonictError, match="found 1, 3"):
        read_mask(tmp_path / "l.mha", like=image)
    with pytest.raises(HarmonictError, match="no label 2; there are: 1, 3"):
        read_mask(tmp_path / "l.mha", label=2, like=image)
    assert np.array_equal(read_mask(tmp_path / "l.mha", label=3, like=image), image.hu > 500)


@pytest.mark.parametrize(("kernel", "written"), [("B10", 1.0), ("B30", 0.693359), ("B50", 0.693359), ("B70", 1.0)])
def test_the_siemens_chest_slices_are_read_and_their_spacing_put_right(data, kernel, written):
    path = data / "paired" / "siemens-chest" / f"{kernel}.mha"
    slice_ = read_volume(path)
    assert slice_.hu.shape == (1, 512, 512)
    assert slice_.pixel_mm == pytest.approx((written, written))
    assert slice_.hu.min() == -1024
    assert slice_.padding is None, "air clipped at -1024 is no padding"
    assert read_volume(path, spacing_mm=0.693359).pixel_mm == pytest.approx((0.693359, 0.693359))


def test_the_ibsi_phantom_and_its_mask_share_a_grid(data):
    folder = data / "ibsi" / "ibsi_1_ct_radiomics_phantom" / "nifti"
    image = read_volume(folder / "image" / "phantom.nii.gz")
    mask = read_mask(folder / "mask" / "mask.nii.gz", like=image)
    assert mask.shape == (60, 201, 204)
    assert 1000 < mask.sum() < mask.size / 4
