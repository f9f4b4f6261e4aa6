"""Small, complete, valid CT DICOM files for the tests. Everything is deterministic: same arguments, same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    generate_uid,
)

ORIENTATIONS = {
    "axial": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "coronal": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0),
    "sagittal": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
}


def phantom_hu(n: int = 5, rows: int = 32, columns: int = 40, *, seed: int = 7) -> np.ndarray:
    """A body of 40 HU with a lung and a bone in air, noise of 12 HU; whole HU, float32 (n, rows, columns)."""
    y, x = np.mgrid[:rows, :columns]
    v = (y - (rows - 1) / 2) / rows
    u = (x - (columns - 1) / 2) / columns
    hu = np.full((n, rows, columns), -1000.0)
    hu[:, (u / 0.42) ** 2 + (v / 0.38) ** 2 < 1] = 40
    hu[:, ((u + 0.18) / 0.12) ** 2 + (v / 0.2) ** 2 < 1] = -850
    hu[:, (u / 0.06) ** 2 + ((v - 0.25) / 0.06) ** 2 < 1] = 700
    hu += np.random.default_rng(seed).normal(0, 12, hu.shape)
    return np.clip(np.round(hu), -1024, 3071).astype(np.float32)


def make_ct_series(
    folder: Path,
    n: int = 5,
    rows: int = 32,
    columns: int = 40,
    *,
    hu: np.ndarray | None = None,
    slope: float | Sequence[float] = 1,
    intercept: float | Sequence[float] = -1024,
    signed: bool = False,
    bits: int = 16,
    transfer_syntax: str = ExplicitVRLittleEndian,
    spacing_mm: tuple[float, float, float] = (1.0, 0.7, 0.7),
    orientation: str | Sequence[float] = "axial",
    tilt: float = 0.0,
    origin_mm: Sequence[float] = (-10.0, -20.0, 100.0),
    padding_value: int | None = None,
    padding_limit: int | None = None,
    missing: Sequence[int] = (),
    duplicate: Sequence[int] = (),
    patient: str = "P1",
    study_uid: str | None = None,
    series_uid: str | None = None,
    frame_of_reference_uid: str | None = None,
    kernel: str | Sequence[str] | None = "B30f",
    manufacturer: str = "SIEMENS",
    model: str = "Somatom Test",
    seed: int = 7,
    **tags: object,
) -> list[Path]:
    """Write a CT series, one classic CT Image Storage file a slice, in the order of position; returns the paths.

    hu (n, rows, columns), default `phantom_hu`; stored values are round((hu - intercept) / slope), which must fit
    the type (`bits` stored of 16 allocated, `signed` or not). slope and intercept: one number or one a slice.
    tilt: degrees; the slices lean by it while their positions step along z, as a tilted gantry makes them.
    missing: indices of slices left out; duplicate: indices written twice, under another SOP Instance UID.
    tags: further attributes by keyword, for all slices; None removes the attribute.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hu = phantom_hu(n, rows, columns, seed=seed) if hu is None else np.asarray(hu)
    n, rows, columns = hu.shape
    slopes = np.broadcast_to(np.asarray(slope, float), n)
    intercepts = np.broadcast_to(np.asarray(intercept, float), n)
    iop = np.array(ORIENTATIONS[orientation] if isinstance(orientation, str) else orientation, float)
    step = np.cross(iop[:3], iop[3:])
    if tilt:
        angle = np.deg2rad(tilt)
        iop[3:] = np.cos(angle) * iop[3:] - np.sin(angle) * step
    study_uid = study_uid or _uid("study", patient)
    frame_uid = frame_of_reference_uid or _uid("frame", patient)
    series_uid = series_uid or _uid("series", patient, folder.name, str(kernel), str(seed))
    indices = [z for z in range(n) if z not in set(missing)]
    paths = []
    for number, z in enumerate(sorted([*indices, *duplicate])):
        uid = _uid("instance", series_uid, str(number))
        ds = _common(CTImageStorage, uid, transfer_syntax, patient, study_uid, series_uid, frame_uid)
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        _equipment(ds, manufacturer, model)
        ds.KVP, ds.SliceThickness = "120", _ds(spacing_mm[0])
        ds.ScanOptions, ds.DataCollectionDiameter, ds.ReconstructionDiameter = "HELICAL MODE", "500", "400"
        ds.GantryDetectorTilt, ds.ExposureTime, ds.XRayTubeCurrent, ds.Exposure = _ds(tilt), "500", "200", "100"
        if kernel is not None:
            ds.ConvolutionKernel = kernel if isinstance(kernel, str) else list(kernel)
        ds.InstanceNumber = str(number + 1)
        ds.ImagePositionPatient = [_ds(v) for v in np.asarray(origin_mm, float) + z * spacing_mm[0] * step]
        ds.ImageOrientationPatient = [_ds(v) for v in iop]
        ds.PixelSpacing = [_ds(v) for v in spacing_mm[1:]]
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = _ds(slopes[z]), _ds(intercepts[z]), "HU"
        _image(ds, rows, columns, signed, bits)
        if padding_value is not None:
            ds.add_new("PixelPaddingValue", "SS" if signed else "US", padding_value)
        if padding_limit is not None:
            ds.add_new("PixelPaddingRangeLimit", "SS" if signed else "US", padding_limit)
        _set_tags(ds, tags)
        path = folder / f"{number:04d}.dcm"
        _save(ds, stored_values(hu[z], slopes[z], intercepts[z], signed=signed, bits=bits), path)
        paths.append(path)
    return paths


def make_enhanced_ct(
    path: Path,
    n: int = 5,
    rows: int = 32,
    columns: int = 40,
    *,
    hu: np.ndarray | None = None,
    slope: float | Sequence[float] = 1,
    intercept: float | Sequence[float] = -1024,
    signed: bool = False,
    transfer_syntax: str = ExplicitVRLittleEndian,
    spacing_mm: tuple[float, float, float] = (1.0, 0.7, 0.7),
    orientation: str | Sequence[float] = "axial",
    origin_mm: Sequence[float] = (-10.0, -20.0, 100.0),
    patient: str = "P1",
    study_uid: str | None = None,
    series_uid: str | None = None,
    frame_of_reference_uid: str | None = None,
    kernel: str = "B30f",
    manufacturer: str = "SIEMENS",
    model: str = "Somatom Test",
    order: Sequence[int] | None = None,
    seed: int = 7,
    **tags: object,
) -> Path:
    """Write one Enhanced CT file of n frames; `order` is the order in which the slices lie in the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    hu = phantom_hu(n, rows, columns, seed=seed) if hu is None else np.asarray(hu)
    n, rows, columns = hu.shape
    order = list(range(n)) if order is None else list(order)
    slopes = np.broadcast_to(np.asarray(slope, float), n)
    intercepts = np.broadcast_to(np.asarray(intercept, float), n)
    iop = np.array(ORIENTATIONS[orientation] if isinstance(orientation, str) else orientation, float)
    step = np.cross(iop[:3], iop[3:])
    series_uid = series_uid or _uid("series", patient, path.name, kernel, str(seed))
    uid = _uid("instance", series_uid)
    frame_uid = frame_of_reference_uid or _uid("frame", patient)
    study_uid = study_uid or _uid("study", patient)
    ds = _common(EnhancedCTImageStorage, uid, transfer_syntax, patient, study_uid, series_uid, frame_uid)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    _equipment(ds, manufacturer, model)
    ds.DeviceSerialNumber, ds.SoftwareVersions, ds.InstanceNumber = "1", "1", "1"
    ds.AcquisitionNumber, ds.ContentQualification = "1", "RESEARCH"
    ds.PixelPresentation, ds.VolumetricProperties, ds.VolumeBasedCalculationTechnique = "MONOCHROME", "VOLUME", "NONE"
    ds.PresentationLUTShape, ds.BurnedInAnnotation, ds.LossyImageCompression = "IDENTITY", "NO", "00"
    ds.AcquisitionDateTime, ds.ContentDate, ds.ContentTime = "20200101120000", "20200101", "120000"
    _image(ds, rows, columns, signed, 16)
    ds.NumberOfFrames = str(n)
    shared = Dataset()
    shared.PixelMeasuresSequence = _item(
        PixelSpacing=[_ds(v) for v in spacing_mm[1:]],
        SliceThickness=_ds(spacing_mm[0]),
        SpacingBetweenSlices=_ds(spacing_mm[0]),
    )
    shared.PlaneOrientationSequence = _item(ImageOrientationPatient=[_ds(v) for v in iop])
    shared.CTImageFrameTypeSequence = _item(
        FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        PixelPresentation="MONOCHROME",
        VolumetricProperties="VOLUME",
        VolumeBasedCalculationTechnique="NONE",
    )
    shared.CTReconstructionSequence = _item(
        ReconstructionAlgorithm="FILTER_BACK_PROJ",
        ConvolutionKernel=kernel,
        ConvolutionKernelGroup="BODY",
        ReconstructionDiameter=400.0,
        ReconstructionPixelSpacing=[float(v) for v in spacing_mm[1:]],
    )
    shared.CTXRayDetailsSequence = _item(KVP=120.0, FocalSpots=[1.2], FilterType="NONE", FilterMaterial="ALUMINUM")
    shared.CTExposureSequence = _item(
        ExposureTimeInms=500.0,
        XRayTubeCurrentInmA=200.0,
        ExposureInmAs=100.0,
        CTDIvol=6.5,
        ExposureModulationType="NONE",
    )
    anatomy = _item(CodeValue="51185008", CodingSchemeDesignator="SCT", CodeMeaning="Chest")
    shared.FrameAnatomySequence = _item(FrameLaterality="U", AnatomicRegionSequence=anatomy)
    ds.SharedFunctionalGroupsSequence = Items([shared])
    frames = []
    for position, z in enumerate(order):
        frame = Dataset()
        place = [_ds(v) for v in np.asarray(origin_mm, float) + z * spacing_mm[0] * step]
        frame.PlanePositionSequence = _item(ImagePositionPatient=place)
        frame.PixelValueTransformationSequence = _item(
            RescaleIntercept=_ds(intercepts[z]), RescaleSlope=_ds(slopes[z]), RescaleType="HU"
        )
        frame.FrameContentSequence = _item(
            FrameAcquisitionDateTime="20200101120000",
            FrameReferenceDateTime="20200101120000",
            FrameAcquisitionDuration=500.0,
            DimensionIndexValues=[z + 1],
            FrameAcquisitionNumber=position + 1,
        )
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = Items(frames)
    organization = _uid("dimension", series_uid)
    ds.DimensionOrganizationSequence = _item(DimensionOrganizationUID=organization)
    ds.DimensionIndexSequence = _item(
        DimensionOrganizationUID=organization, DimensionIndexPointer=0x00200032, FunctionalGroupPointer=0x00209113
    )
    ds.AcquisitionContextSequence = Items([])
    _set_tags(ds, tags)
    stored = [stored_values(hu[z], slopes[z], intercepts[z], signed=signed) for z in order]
    _save(ds, np.stack(stored), path)
    return path


def stored_values(
    hu: np.ndarray, slope: float, intercept: float, *, signed: bool = False, bits: int = 16
) -> np.ndarray:
    """HU -> whole stored values in 16 bits; ValueError where they do not fit."""
    stored = np.rint((np.asarray(hu, np.float64) - intercept) / slope)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if stored.min() < low or stored.max() > high:
        raise ValueError(f"HU {hu.min()}..{hu.max()} do not fit {bits} bits, signed={signed}")
    return stored.astype(np.int16 if signed else np.uint16)


def transcode(source: Path, target: Path, transfer_syntax: str) -> Path:
    """Copy a file in another transfer syntax with gdcm, which encodes what pydicom cannot (JPEG, JPEG 2000)."""
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(source))
    if not reader.Read():
        raise ValueError(f"gdcm cannot read {source}")
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(transfer_syntax))))
    change.SetInput(reader.GetImage())
    if not change.Change():
        raise ValueError(f"gdcm cannot encode {UID(transfer_syntax).name}")
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    if not writer.Write():
        raise ValueError(f"gdcm cannot write {target}")
    return target


def _uid(*words: str) -> str:
    return generate_uid(entropy_srcs=["harmonict tests", *words])


def _ds(value: float) -> str:
    return f"{float(value):.10g}"[:16]


def _item(**attributes: object) -> Items:
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return Items([item])


def _common(
    sop_class: str, uid: str, transfer_syntax: str, patient: str, study_uid: str, series_uid: str, frame_uid: str
) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, uid
    meta.TransferSyntaxUID, meta.ImplementationClassUID = UID(transfer_syntax), _uid("implementation")
    little = meta.TransferSyntaxUID != ExplicitVRBigEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128, is_implicit_VR=False, is_little_endian=little)
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = sop_class, uid, "CT"
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20200101"
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "120000"
    ds.AccessionNumber, ds.ReferringPhysicianName, ds.StudyID = "A1", "", "1"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = f"Test^{patient}", patient, "19500101", "O"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study_uid, series_uid, frame_uid
    ds.SeriesNumber, ds.AcquisitionNumber, ds.SeriesDescription = "2", "1", "Test series"
    ds.PositionReferenceIndicator, ds.PatientPosition, ds.BodyPartExamined = "", "HFS", "CHEST"
    return ds


def _equipment(ds: Dataset, manufacturer: str, model: str) -> None:
    ds.Manufacturer, ds.ManufacturerModelName = manufacturer, model


def _image(ds: Dataset, rows: int, columns: int, signed: bool, bits: int) -> None:
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.Rows, ds.Columns = 1, "MONOCHROME2", rows, columns
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits, bits - 1, int(signed)


def _set_tags(ds: Dataset, tags: dict[str, object]) -> None:
    for keyword, value in tags.items():
        if value is not None:
            setattr(ds, keyword, value)
        elif keyword in ds:
            delattr(ds, keyword)


def _save(ds: FileDataset, stored: np.ndarray, path: Path) -> None:
    """Write in the syntax of the file's meta header; `stored` is (rows, columns) or (frames, rows, columns)."""
    syntax = ds.file_meta.TransferSyntaxUID
    by_pydicom = syntax in (RLELossless, JPEGLSLossless, JPEGLSNearLossless)
    if syntax.is_compressed and not syntax.is_deflated and not by_pydicom:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        _save(ds, stored, path)
        transcode(path, path, syntax)
        return
    ds.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    ds["PixelData"].VR = "OW"
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = stored.astype(stored.dtype.newbyteorder(">")).tobytes()
    elif by_pydicom:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        near = {"jls_error": 2} if syntax == JPEGLSNearLossless else {}
        ds.compress(syntax, generate_instance_uid=False, **near)
    dcmwrite(path, ds, enforce_file_format=True)
