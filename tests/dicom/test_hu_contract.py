"""The HU contract: reading and writing without a change gives every HU back."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from harmonict.dicom.read import read_series
from harmonict.dicom.write import Derivation, write_series
from make_dicom import make_ct_series, make_enhanced_ct

IDENTITY = Derivation("identity", "0" * 64, "", "as it is", "0.1.0")
SLOPES = [1, 0.5, 2, 1.25]
INTERCEPTS = [0, -1024, -1000, -8192, -1000.5]
SYNTAXES = {
    "implicit": ImplicitVRLittleEndian,
    "explicit": ExplicitVRLittleEndian,
    "big-endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "RLE": RLELossless,
    "JPEG-LS": JPEGLSLossless,
    "JPEG": JPEGLosslessSV1,
    "JPEG 2000": JPEG2000Lossless,
}


def full_range(signed: bool, bits: int, n: int = 2, rows: int = 12, columns: int = 14) -> np.ndarray:
    """Stored values (n, rows, columns) that hold both ends of the type, zero and what lies between."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    stored = np.random.default_rng(5).integers(low, high, (n, rows, columns), endpoint=True)
    stored[:, 0, :5] = low, high, 0, low + 1, high - 1
    return stored


def stored_of(path) -> np.ndarray:
    ds = dcmread(path)
    return ds.pixel_array.astype(np.int64)


def there_and_back(tmp_path, files):
    series = read_series(files)
    report = write_series(series, tmp_path / "out", IDENTITY)
    assert report.clipped_voxels == 0
    return series, read_series(report.files), report


def check_exact(tmp_path, files, stored):
    before, after, report = there_and_back(tmp_path, files)
    assert report.rescaled_slices == 0
    np.testing.assert_array_equal(after.hu, before.hu)
    for z, path in enumerate(report.files):
        np.testing.assert_array_equal(stored_of(path), stored[z])  # against what the test put into the files
    return before


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("slope, intercept", list(itertools.product(SLOPES, INTERCEPTS)))
def test_identity_is_exact_for_every_sign_slope_intercept_and_depth(tmp_path, slope, intercept, signed, bits):
    stored = full_range(signed, bits)
    files = make_ct_series(
        tmp_path / "in", hu=stored * slope + intercept, slope=slope, intercept=intercept, signed=signed, bits=bits
    )
    before = check_exact(tmp_path, files, stored)
    np.testing.assert_array_equal(before.hu, (stored * slope + intercept).astype(np.float32))


@pytest.mark.parametrize("name", SYNTAXES)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [12, 16])
def test_identity_is_exact_for_every_transfer_syntax(tmp_path, name, signed, bits):
    stored = full_range(signed, bits)
    files = make_ct_series(
        tmp_path / "in", hu=stored - 1000.0, intercept=-1000, signed=signed, bits=bits, transfer_syntax=SYNTAXES[name]
    )
    assert dcmread(files[0]).file_meta.TransferSyntaxUID == SYNTAXES[name]
    check_exact(tmp_path, files, stored)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_each_slice_keeps_a_slope_and_intercept_of_its_own(tmp_path, signed):
    stored = full_range(signed, 16, n=4)
    slope, intercept = np.array([1, 0.5, 1.25, 2]), np.array([-1024, -1000, -8192.5, 24])
    hu = stored * slope[:, None, None] + intercept[:, None, None]
    files = make_ct_series(tmp_path / "in", hu=hu, slope=slope, intercept=intercept, signed=signed)
    check_exact(tmp_path, files, stored)
    written = [dcmread(p) for p in sorted((tmp_path / "out").iterdir())]
    assert [float(d.RescaleSlope) for d in written] == slope.tolist()
    assert [float(d.RescaleIntercept) for d in written] == intercept.tolist()
    assert {d.PixelRepresentation for d in written} == {int(signed)}


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_identity_is_exact_for_enhanced_ct(tmp_path, signed):
    stored = full_range(signed, 16, n=3)
    slope, intercept = np.array([1, 0.5, 2]), np.array([-1024, -1000, -8192])
    hu = stored * slope[:, None, None] + intercept[:, None, None]
    path = make_enhanced_ct(
        tmp_path / "in" / "e.dcm", hu=hu, slope=slope, intercept=intercept, signed=signed, order=[2, 0, 1]
    )
    check_exact(tmp_path, [path], stored)


@pytest.mark.parametrize("value, tagged", [(-2000, False), (-2000, True), (-1024, True)])
def test_identity_is_exact_with_padding(tmp_path, value, tagged):
    hu = np.random.default_rng(2).integers(-1000, 500, (3, 32, 32)).astype(float)
    hu[:, :5], hu[:, -5:], hu[:, :, :5], hu[:, :, -5:] = value, value, value, value
    files = make_ct_series(tmp_path / "in", hu=hu, intercept=0, signed=True, padding_value=value if tagged else None)
    before = check_exact(tmp_path, files, hu)
    assert before.padding is not None and before.padding[:, 0].all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    signed=st.booleans(),
    bits=st.sampled_from([12, 13, 14, 15, 16]),
    slope=st.integers(-400, 400).filter(bool).map(lambda v: v / 100),
    intercept=st.integers(-100_000, 100_000).map(lambda v: v / 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_identity_is_exact_whatever_the_encoding(tmp_path_factory, signed, bits, slope, intercept, seed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    stored = np.random.default_rng(seed).integers(low, high, (1, 4, 6), endpoint=True)
    stored[0, 0, :2] = low, high
    folder = tmp_path_factory.mktemp("encoding")
    files = make_ct_series(
        folder / "in", hu=stored * slope + intercept, slope=slope, intercept=intercept, signed=signed, bits=bits
    )
    check_exact(folder, files, stored)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    signed=st.booleans(),
    slope=st.sampled_from(SLOPES),
    intercept=st.sampled_from(INTERCEPTS),
    seed=st.integers(0, 2**32 - 1),
)
def test_changed_hu_are_written_to_half_a_step(tmp_path_factory, signed, slope, intercept, seed):
    """Arbitrary new HU: within half of the slope where the source's grid is kept, else within half a HU."""
    folder = tmp_path_factory.mktemp("changed")
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 2**12, (3, 6, 8))
    files = make_ct_series(
        folder / "in", hu=stored * slope + intercept, slope=slope, intercept=intercept, signed=signed, bits=16
    )
    series = read_series(files)
    hu = (series.hu + rng.normal(0, 300, series.hu.shape)).astype(np.float32)
    report = write_series(series.with_hu(hu, padding=None), folder / "out", IDENTITY)
    after = read_series(report.files)
    assert report.clipped_voxels == 0
    for z, path in enumerate(report.files):
        step = float(dcmread(path, specific_tags=["RescaleSlope"]).RescaleSlope)
        assert np.abs(after.hu[z].astype(float) - hu[z]).max() <= step / 2 + 1e-3
