"""Derived files have no error that their source does not have, says dciodvfy (Debian's dicom3tools)."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from harmonict.dicom.masks import write_masks, write_seg
from harmonict.dicom.read import read_series
from harmonict.dicom.write import Derivation, write_series
from make_dicom import make_ct_series, make_enhanced_ct

MADE = Derivation("mtf-ratio", "ab" * 32, "fit=ratio, gain=6", "B40f 3 mm", "0.1.0")

pytestmark = pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy (Debian: dicom3tools) is not here")


def errors(path: Path) -> set[str]:
    run = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, errors="replace")
    lines = (run.stdout + run.stderr).splitlines()
    assert lines, "dciodvfy said nothing at all"
    return {line for line in lines if line.startswith("Error")}


def new_errors(source: Path, derived: Path) -> set[str]:
    return errors(derived) - errors(source)


def changed(series, step=37.3):
    """Values that force a slice into int16 as well as values that fit."""
    hu = series.hu + np.float32(step)
    hu[0] -= 3000  # below unsigned values
    hu[1] += 31800  # above signed ones from -1024 on
    return series.with_hu(hu)


def test_an_invalid_file_is_told_from_a_valid_one(tmp_path):
    [good] = make_ct_series(tmp_path / "good", n=1)
    [bad] = make_ct_series(tmp_path / "bad", n=1, KVP=None, ImageType=["NEW", "PRIMARY", "AXIAL"])
    assert len(errors(bad) - errors(good)) >= 2


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"signed": True, "bits": 12, "intercept": -1024},
        {"transfer_syntax": ImplicitVRLittleEndian, "padding_value": 0},
        {"transfer_syntax": ExplicitVRBigEndian, "signed": True, "padding_value": -2000, "padding_limit": -1990},
        {"transfer_syntax": RLELossless, "slope": 0.5},
        {"transfer_syntax": JPEGLSLossless},
        {"transfer_syntax": JPEG2000Lossless},
        {
            "LossyImageCompression": "01",
            "LossyImageCompressionRatio": "8",
            "LossyImageCompressionMethod": "ISO_15444_1",
        },
        {"FrameOfReferenceUID": None, "RescaleType": None},
        {"SmallestImagePixelValue": 0, "LargestImagePixelValue": 4000, "WindowCenter": ["40", "-600"]},
    ],
)
def test_derived_files_of_synthetic_series_have_no_new_error(tmp_path, arguments):
    files = make_ct_series(tmp_path / "in", **arguments)
    series = read_series(files)
    for n, one in enumerate((series, changed(series))):
        report = write_series(one, tmp_path / f"out{n}", MADE)
        assert (report.rescaled_slices > 0) == bool(n)
        for source, derived in zip(files[:2], report.files[:2], strict=True):
            assert new_errors(source, derived) == set()


def test_derived_files_of_an_enhanced_file_have_no_new_error(tmp_path):
    path = make_enhanced_ct(tmp_path / "in" / "e.dcm")
    for derived in write_series(read_series([path]), tmp_path / "out", MADE).files[:2]:
        assert new_errors(path, derived) == set()


def test_a_derived_series_may_be_derived_again(tmp_path):
    files = make_ct_series(tmp_path / "in")
    once = write_series(read_series(files), tmp_path / "once", MADE)
    twice = write_series(read_series(once.files), tmp_path / "twice", MADE)
    assert new_errors(files[0], twice.files[0]) == set()


@pytest.mark.parametrize("name", ["LUNG1-001", "LIDC-IDRI-0314", "C3N-00249", "TCGA-09-2043", "CRLM-CT-1006"])
def test_derived_files_of_real_series_have_no_new_error(data, tmp_path, name):
    files = sorted((data / "ct" / name / "image").glob("*.dcm"))[:3]
    series = read_series(files)
    by_path = dict(zip(series.source.paths, range(len(files)), strict=True))
    for n, one in enumerate((series, changed(series))):
        report = write_series(one, tmp_path / f"out{n}", MADE)
        for source, z in by_path.items():
            assert new_errors(source, report.files[z]) == set()


@pytest.mark.parametrize("kernel", ["FC51", "FC13"])
def test_derived_files_of_the_phantom_have_no_new_error(data, tmp_path, kernel):
    files = sorted((data / "paired" / "canon-lungman" / kernel).glob("*"))
    series = read_series(files, slicewise=True)
    report = write_series(series, tmp_path / "out", MADE)
    for source, derived in zip(series.source.paths, report.files, strict=True):
        assert new_errors(source, derived) == set()


def test_copied_masks_have_no_new_error(data, tmp_path):
    series = read_series(sorted((data / "ct" / "LUNG1-001" / "image").glob("*.dcm")))
    [structures] = (data / "ct" / "LUNG1-001" / "rtstruct").glob("*.dcm")
    mask = np.zeros(series.hu.shape, bool)
    mask[60:62, 200:210, 200:220] = True
    segmentation = write_seg({"box": mask}, series.source.headers, tmp_path / "masks" / "seg.dcm")
    assert errors(segmentation) <= errors(series.source.paths[0])
    report = write_series(series, tmp_path / "out" / "series", MADE)
    copies = write_masks([structures, segmentation], series, report.folder, tmp_path / "out" / "masks")
    for source, copied in zip((structures, segmentation), copies, strict=True):
        assert new_errors(source, copied) == set()
