"""A CT series that never had a patient: simulated images as valid CT Image Storage, marked as what they are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from harmonict.core import Geometry, ScanProtocol
from harmonict.dicom.write import IMPLEMENTATION_UID, hashed_uid

_EPOCH = "20200101"  # no clock: the same trial gives the same bytes


@dataclass(frozen=True)
class Simulation:
    """Whose images they are. key: says everything that decides the pixels; equal keys give equal UIDs.

    patient: patient ID; one Study and one Frame of Reference for each patient and key. label: what the series shows.
    number: of the series. acquisition: series of one acquisition share their raw data, and so their noise; None for an
    image that no scan made. version: of harmonict.
    """

    patient: str
    label: str
    key: str
    number: int
    acquisition: int | None
    version: str

    @property
    def series_uid(self) -> str:
        """Series Instance UID."""
        return hashed_uid("simulated series", self.key, self.patient, self.label)


def simulated_image(
    hu: np.ndarray, z: int, geometry: Geometry, protocol: ScanProtocol, simulation: Simulation
) -> Dataset:
    """Slice `z` (y, x) in HU, rounded to whole numbers, as a CT image (PS3.3 A.3). Values beyond int16 are cut off.

    It says that it is simulated in Image Type (DERIVED), Derivation Description, Patient's Name, Patient Comments,
    Series Description, Quality Control Image and the model's name; the manufacturer is the imitated kernel's.
    """
    image = Dataset()
    meta = FileMetaDataset()
    image.SOPClassUID = meta.MediaStorageSOPClassUID = CTImageStorage
    uid = UID(hashed_uid("simulated image", simulation.series_uid, str(z)))
    meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(IMPLEMENTATION_UID)
    image.file_meta = meta
    image.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
    image.StudyDate = image.SeriesDate = image.ContentDate = _EPOCH
    image.StudyTime = image.SeriesTime = image.ContentTime = "120000"
    image.AccessionNumber = image.ReferringPhysicianName = ""
    image.StudyID = "1"
    image.Modality = "CT"
    image.Manufacturer = protocol.manufacturer or "harmonict"
    image.ManufacturerModelName = protocol.model or "simulated scanner"
    image.SoftwareVersions = f"harmonict {simulation.version}"
    image.StudyDescription = "harmonict virtual imaging trial"
    image.SeriesDescription = f"SIMULATED {simulation.label}"[:64]
    image.DerivationDescription = "simulated by harmonict; no patient was scanned; research use only"
    image.PatientName = f"SIMULATED^{simulation.patient}"
    image.PatientID = simulation.patient
    image.PatientBirthDate = image.PatientSex = ""
    image.PatientComments = "computational phantom"
    image.QualityControlImage = "YES"
    image.BodyPartExamined = "CHEST"
    image.PatientPosition = "HFS"
    image.SliceThickness = _ds(protocol.slice_thickness_mm or geometry.spacing_mm[0])
    image.KVP = _ds(protocol.kvp) if protocol.kvp else None
    if protocol.fov_mm:
        image.ReconstructionDiameter = _ds(protocol.fov_mm)
    if protocol.exposure_mas:
        image.Exposure = str(round(protocol.exposure_mas))
        image.add_new("ExposureInuAs", "IS", str(round(protocol.exposure_mas * 1000)))
    if protocol.ctdivol_mgy:
        image.CTDIvol = float(protocol.ctdivol_mgy)
        body = Dataset()
        body.CodeValue, body.CodingSchemeDesignator = "113691", "DCM"
        body.CodeMeaning = "IEC Body Dosimetry Phantom"
        image.CTDIPhantomTypeCodeSequence = [body]
    if protocol.kernel:
        strength = protocol.iterative_strength
        image.ConvolutionKernel = [protocol.kernel, f"{strength:g}"] if strength else protocol.kernel
    image.StudyInstanceUID = hashed_uid("simulated study", simulation.key, simulation.patient)
    image.FrameOfReferenceUID = hashed_uid("simulated frame", simulation.key, simulation.patient)
    image.SeriesInstanceUID = simulation.series_uid
    image.SeriesNumber = str(simulation.number)
    image.AcquisitionNumber = None if simulation.acquisition is None else str(simulation.acquisition)
    if simulation.acquisition is not None:
        image.IrradiationEventUID = hashed_uid(
            "simulated exposure", simulation.key, simulation.patient, str(simulation.acquisition)
        )
    image.InstanceNumber = str(z + 1)
    image.PositionReferenceIndicator = ""
    image.ImagePositionPatient = [_ds(v) for v in geometry.to_patient(np.array([z, 0, 0]))]
    image.ImageOrientationPatient = [_ds(v) for v in (*geometry.direction[2], *geometry.direction[1])]
    image.PixelSpacing = [_ds(v) for v in geometry.spacing_mm[1:]]
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.Rows, image.Columns = hu.shape
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
    image.RescaleIntercept, image.RescaleSlope, image.RescaleType = "0", "1", "HU"
    image.WindowCenter, image.WindowWidth = ["-600", "40"], ["1500", "400"]
    image.PixelData = np.clip(np.rint(hu), -32768, 32767).astype("<i2").tobytes()
    return image


def write_simulated_image(image: Dataset, folder: Path, z: int) -> None:
    """Write one image as `folder/NNNN.dcm`."""
    with (folder / f"{z + 1:04d}.dcm").open("xb") as file:
        dcmwrite(file, image, implicit_vr=False, little_endian=True, enforce_file_format=True)


def simulation_key(*parts: object) -> str:
    """A digest of everything that decides the pixels of a simulated series."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _ds(value: float) -> str:
    """A decimal string of at most 16 characters (PS3.5 6.2)."""
    text = f"{value:.10g}"
    return text if len(text) <= 16 else f"{value:.8g}"
