"""Simulated images: valid CT Image Storage, and nothing that could be taken for a patient."""

import shutil
import subprocess

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import CTImageStorage

from harmonict.core import Geometry, ScanProtocol
from harmonict.dicom.read import read_series
from harmonict.dicom.simulated import Simulation, simulated_image, simulation_key, write_simulated_image

PROTOCOL = ScanProtocol(
    manufacturer="Siemens",
    kernel="Br40",
    iterative_strength=3.0,
    slice_thickness_mm=1.5,
    kvp=120.0,
    exposure_mas=20.0,
    ctdivol_mgy=1.3,
    fov_mm=350.0,
)
TRUTH = ScanProtocol(manufacturer="harmonict", model="truth", slice_thickness_mm=1.5, kvp=120.0, fov_mm=350.0)
ONE = Simulation("tiny-s0-x-001", "Br40-i3 1.5mm 1.3mGy", simulation_key("a"), 4, 2, "0.1.0")
GEOMETRY = Geometry((-174.7, -174.7, 31.25), (1.5, 350 / 600, 350 / 600))


def write(folder, hu, protocol=PROTOCOL, one=ONE):
    folder.mkdir()
    for z, part in enumerate(hu):
        write_simulated_image(simulated_image(part, z, GEOMETRY, protocol, one), folder, z)
    return sorted(folder.glob("*.dcm"))


@pytest.fixture
def volume():
    return np.random.default_rng(0).uniform(-1400, 3000, (3, 20, 24)).astype(np.float32)


def test_what_is_written_reads_back_rounded_with_its_grid_and_protocol(tmp_path, volume):
    series = read_series(write(tmp_path / "s", volume))
    assert np.array_equal(series.hu, np.rint(volume))
    assert series.geometry.same_grid(GEOMETRY, tolerance_mm=1e-4)
    assert series.protocol == PROTOCOL.with_(model="simulated scanner")
    assert series.padding is None and series.is_volume


def test_every_image_says_that_no_patient_was_scanned(tmp_path, volume):
    for path in write(tmp_path / "s", volume):
        image = dcmread(path)
        assert image.SOPClassUID == image.file_meta.MediaStorageSOPClassUID == CTImageStorage
        assert image.ImageType[0] == "DERIVED" and image.QualityControlImage == "YES"
        assert str(image.PatientName).startswith("SIMULATED") and image.SeriesDescription.startswith("SIMULATED")
        assert "no patient was scanned" in image.DerivationDescription
        assert image.ManufacturerModelName == "simulated scanner"


def test_equal_keys_give_equal_bytes_and_other_keys_other_uids(tmp_path, volume):
    a, b = write(tmp_path / "a", volume), write(tmp_path / "b", volume)
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]
    other = Simulation(ONE.patient, ONE.label, simulation_key("b"), 4, 2, "0.1.0")
    c = write(tmp_path / "c", volume, one=other)
    for name in (
        "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID", "IrradiationEventUID"
    ):  # fmt: skip
        assert len({dcmread(p)[name].value for p in (a[0], b[0], c[0])}) == 2


def test_series_of_one_patient_share_study_and_frame_and_those_of_one_exposure_its_event(tmp_path, volume):
    made = {}
    for label, acquisition in (("sharp 1.3mGy", 2), ("soft 1.3mGy", 2), ("soft 6.5mGy", 3), ("truth", None)):
        one = Simulation(ONE.patient, label, ONE.key, 1, acquisition, "0.1.0")
        protocol = PROTOCOL if acquisition else TRUTH
        made[label] = dcmread(write(tmp_path / label, volume, protocol, one)[0])
    assert len({(i.StudyInstanceUID, i.FrameOfReferenceUID) for i in made.values()}) == 1
    assert len({i.SeriesInstanceUID for i in made.values()}) == len({i.SOPInstanceUID for i in made.values()}) == 4
    events = {label: i.get("IrradiationEventUID") for label, i in made.items()}
    assert events["sharp 1.3mGy"] == events["soft 1.3mGy"] != events["soft 6.5mGy"] and events["truth"] is None
    assert "CTDIvol" not in made["truth"] and "ConvolutionKernel" not in made["truth"]


def test_values_beyond_16_bits_are_cut_off_and_not_wrapped(tmp_path):
    hu = np.array([[[-40000.0, 40000.0], [-0.5, 0.51]]], np.float32)
    [path] = write(tmp_path / "s", hu)
    assert dcmread(path).pixel_array.tolist() == [[-32768, 32767], [0, 1]]


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy (Debian: dicom3tools) is not here")
@pytest.mark.parametrize("protocol", [PROTOCOL, TRUTH, PROTOCOL.with_(iterative_strength=0.0, manufacturer=None)])
def test_dciodvfy_has_nothing_to_say(tmp_path, volume, protocol):
    one = ONE if protocol is not TRUTH else Simulation(ONE.patient, "truth", ONE.key, 9, None, "0.1.0")
    for path in write(tmp_path / "s", volume, protocol, one):
        run = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
        assert (run.stdout + run.stderr).strip() == "CTImage"
