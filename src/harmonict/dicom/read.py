"""DICOM CT files -> Series in HU, with the headers that a writer needs to make DICOM of it again."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gdcm
import numpy as np
from pydicom import DataElement, Dataset, dcmread
from pydicom.datadict import dictionary_VR
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder, pixel_array
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSTransferSyntaxes,
    LegacyConvertedEnhancedCTImageStorage,
)

from harmonict.core import Geometry, HarmonictError, ScanProtocol, Series
from harmonict.core.padding import connected_to_border, find_padding

CLASSIC = {CTImageStorage}
MULTI_FRAME = {EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage}
HU_TYPES = {"", "HU", "HU_MOD", "US"}  # PS3.3 C.11.1.1.2; "US" is "unspecified", which CT defines as HU
HIGHEST_TAGGED_HU = -800.0  # a padding tag above this is believed at the border only: 0 would be water

# Positions may stray from the regular stack by a part of the step or by what rounding in the file makes of them.
STEP_TOLERANCE, POSITION_TOLERANCE_MM = 0.01, 0.02
# ... and sideways from the normal by this much: a tilt of 0.1 degrees is 0.0017.
TILT_TOLERANCE, SIDEWAYS_TOLERANCE_MM = 0.001, 0.05
LARGEST_RATIO, SMALL_FRAME_BYTES = 1000, 4 << 20  # a compressed frame may grow by this, or to this, when it is decoded


@dataclass(frozen=True)
class DicomSource:
    """What the files of a series said, one header a slice in the order of `hu[z]`, without the pixels.

    headers: each with `file_meta` (transfer syntax), BitsAllocated, BitsStored, PixelRepresentation, RescaleSlope and
        RescaleIntercept of its slice. Never changed in place: frames share their elements. Those of a multi-frame file
        are flattened: its functional groups stand at the top as in classic CT, InstanceNumber is the frame number,
        SOPClassUID and SOPInstanceUID stay the file's own.
    paths: the file of each slice.
    frames: frame number of each slice, from 1 (as in ReferencedFrameNumber); None for single-frame files.
    """

    headers: tuple[Dataset, ...]
    paths: tuple[Path, ...]
    frames: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Slice:
    """One slice before its pixels: where it lies and what it belongs to. Lengths mm, patient frame."""

    path: Path
    frame: int  # from 1; 0 in a single-frame file
    header: Dataset
    shape: tuple[int, int]
    position: np.ndarray
    row: np.ndarray  # unit vector along increasing column index
    column: np.ndarray  # unit vector along increasing row index
    pixel_mm: tuple[float, float]
    thickness_mm: float | None

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.row, self.column)


@contextmanager
def quiet() -> Iterator[None]:
    """Without pydicom's warnings: they quote header values, and files are judged here in our own words."""
    with warnings.catch_warnings(action="ignore"):
        yield


@quiet()
def read_series(files: Sequence[Path], *, slicewise: bool = False) -> Series:
    """Read the files of ONE CT series, in any order -> Series in HU, slices sorted along their normal.

    Each slice has its own slope and intercept; HU = stored * slope + intercept, exact in float32 for whole numbers and
    rounded once from float64 otherwise. Positions come from ImagePositionPatient, never from SliceThickness.

    slicewise: slices that form no regular stack (gaps, tilt, uneven steps, the same position twice) come back with
    `is_volume=False` instead of being refused. Sizes, pixel spacing and orientation must be the same in either case.

    Raises HarmonictError where a file is damaged or not CT, where a transfer syntax has no decoder, and where the
    slices form no volume; the message names the series, the file or the positions.
    """
    if not files:
        raise HarmonictError("no DICOM files given: a CT series needs at least one")
    slices: list[Slice] = []
    stored: dict[tuple[Path, int], np.ndarray] = {}
    for path in map(Path, files):
        slices += _open_file(path, stored)
    name = series_name(slices[0])
    order, geometry, is_volume = stack(slices, name, slicewise=slicewise)
    slices = [slices[k] for k in order]
    check_one_series(slices, name)
    hu = np.empty((len(slices), *slices[0].shape), np.float32)
    tagged: np.ndarray | None = None
    for z, one in enumerate(slices):
        raw = stored.pop((one.path, one.frame))
        slope, intercept = _rescale(one.header, one.path)
        _to_hu(raw, slope, intercept, out=hu[z])
        mask = _tagged_padding(raw, one.header, slope, intercept)
        if mask is not None:
            tagged = np.zeros(hu.shape, bool) if tagged is None else tagged
            tagged[z] = mask
    headers = [one.header for one in slices]
    multi_frame = any(one.frame for one in slices)
    return Series(
        hu=hu,
        geometry=geometry,
        protocol=series_protocol(headers),
        padding=find_padding(hu, tagged=tagged),
        is_volume=is_volume,
        positions_mm=None if is_volume else tuple(float(one.position @ slices[0].normal) for one in slices),
        patient=text(headers[0], "PatientID"),
        name=name,
        source=DicomSource(
            headers=tuple(headers),
            paths=tuple(one.path for one in slices),
            frames=tuple(max(one.frame, 1) for one in slices) if multi_frame else None,
        ),
    )


# ---------------------------------------------------------------------------------------------------- one file


@quiet()
def open_dicom(path: Path, *, tags: Iterable[str] | None = None, pixels: bool = False) -> Dataset:
    """dcmread that answers with a Dataset or a HarmonictError, also for files without the DICOM preamble.

    tags: keywords to keep (all, if None). Without `pixels`, reading stops before the pixel data.
    """
    wanted = None if tags is None else list(tags)
    try:
        try:
            return dcmread(path, stop_before_pixels=not pixels, specific_tags=wanted)
        except InvalidDicomError:
            if not looks_like_dicom(path):
                raise HarmonictError(f"{path} is not a DICOM file") from None
            return dcmread(path, stop_before_pixels=not pixels, specific_tags=wanted, force=True)
    except HarmonictError:
        raise
    except OSError as error:
        raise HarmonictError(f"cannot read {path}: {error.strerror or type(error).__name__}") from None
    except Exception as error:  # pydicom raises whatever the bytes provoke
        raise HarmonictError(_damaged(path, error)) from None


@quiet()
def slices_of(ds: Dataset, path: Path) -> list[Slice]:
    """The slices of one file's header: one, or one a frame. Raises HarmonictError where it is no CT image."""
    try:
        _check_ct(ds, path)
        if text(ds, "SOPClassUID") in MULTI_FRAME:
            return [_slice(header, path, n) for n, header in enumerate(flatten_frames(ds, path), start=1)]
        if number(ds, "NumberOfFrames", 1) != 1:
            raise HarmonictError(f"{path}: several frames in a CT Image Storage file; expected one")
        return [_slice(ds, path, 0)]
    except HarmonictError:
        raise
    except Exception as error:
        raise HarmonictError(_damaged(path, error)) from None


def _open_file(path: Path, stored: dict[tuple[Path, int], np.ndarray]) -> list[Slice]:
    """Header and pixels of one file; the stored values go into `stored` under (path, frame)."""
    ds = open_dicom(path, pixels=True)
    try:
        _check_ct(ds, path)
        multi_frame = text(ds, "SOPClassUID") in MULTI_FRAME
        frames = _frame_count(ds, path) if multi_frame else 1
        for n, raw in enumerate(_decode(ds, _transfer_syntax(ds), frames, path)):
            stored[path, n + 1 if multi_frame else 0] = _stored_bits(raw, ds, path)
        for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"):
            if keyword in ds:
                delattr(ds, keyword)
        return slices_of(ds, path)
    except HarmonictError:
        raise
    except Exception as error:
        raise HarmonictError(_damaged(path, error)) from None


def _check_ct(ds: Dataset, path: Path) -> None:
    reason = not_ct(ds)
    if reason:
        raise HarmonictError(f"{path}: {reason}")


def not_ct(ds: Dataset) -> str | None:
    """Why a DICOM file holds no CT slice, in words, or None where it may hold one."""
    sop_class, modality = text(ds, "SOPClassUID"), text(ds, "Modality")
    if modality and not re.fullmatch(r"[A-Z]{2,16}", modality):
        return "the modality is not readable; expected CT"
    if sop_class not in CLASSIC | MULTI_FRAME and not (sop_class == "" and modality == "CT"):
        name = UID(sop_class).name if sop_class else "no SOP Class"
        name = "an unknown kind of object" if name == sop_class and sop_class else name
        return f"{name}{f' ({modality})' if modality else ''}; expected CT images"
    if modality not in ("", "CT"):
        return f"modality {modality}; expected CT"
    return "localizer (scout) image, not a CT slice" if is_localizer(ds) else None


def is_localizer(ds: Dataset) -> bool:
    """True for a scout: LOCALIZER among the values of ImageType (PS3.3 C.8.2.1.1.1)."""
    return "LOCALIZER" in [str(v).strip().upper() for v in values(ds, "ImageType")]


def _slice(header: Dataset, path: Path, frame: int) -> Slice:
    place = f"{path} frame {frame}" if frame else str(path)
    rows, columns = number(header, "Rows"), number(header, "Columns")
    if not rows or not columns or rows < 1 or columns < 1:
        raise HarmonictError(f"{place}: no image size (Rows, Columns)")
    position = _numbers(header, "ImagePositionPatient", 3, place)
    orientation = _numbers(header, "ImageOrientationPatient", 6, place)
    row, column = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if abs(lengths[0] - 1) > 1e-2 or abs(lengths[1] - 1) > 1e-2 or abs(row @ column) > 1e-3:
        raise HarmonictError(f"{place}: ImageOrientationPatient is not two unit vectors at right angles")
    row = row / lengths[0]
    column = column - (column @ row) * row
    spacing = _numbers(header, "PixelSpacing", 2, place)
    if np.any(spacing <= 0):
        raise HarmonictError(f"{place}: PixelSpacing must be above 0 mm")
    thickness = number(header, "SliceThickness")
    return Slice(
        path=path,
        frame=frame,
        header=header,
        shape=(int(rows), int(columns)),
        position=position,
        row=row,
        column=column / np.linalg.norm(column),
        pixel_mm=(float(spacing[0]), float(spacing[1])),
        thickness_mm=thickness if thickness and thickness > 0 else None,
    )


# ------------------------------------------------------------------------------------------------- multi-frame

_GROUPS = (  # functional group -> attributes that classic CT keeps at the top level
    ("PlanePositionSequence", ("ImagePositionPatient",)),
    ("PlaneOrientationSequence", ("ImageOrientationPatient",)),
    ("PixelMeasuresSequence", ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices")),
    ("PixelValueTransformationSequence", ("RescaleIntercept", "RescaleSlope", "RescaleType")),
    ("CTPixelValueTransformationSequence", ("RescaleIntercept", "RescaleSlope", "RescaleType")),
    ("FrameVOILUTSequence", ("WindowCenter", "WindowWidth", "WindowCenterWidthExplanation")),
    (
        "CTReconstructionSequence",
        ("ConvolutionKernel", "ConvolutionKernelGroup", "ReconstructionDiameter", "ReconstructionAlgorithm"),
    ),
    ("CTXRayDetailsSequence", ("KVP", "FocalSpots")),
    ("CTAcquisitionDetailsSequence", ("GantryDetectorTilt", "TableHeight", "RotationDirection")),
    ("CTExposureSequence", ("CTDIvol", "ExposureModulationType")),
)
_ENHANCED_ONLY = (
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "NumberOfFrames",
    "DimensionOrganizationSequence",
    "DimensionOrganizationType",
    "DimensionIndexSequence",
    "PixelPresentation",
    "VolumetricProperties",
    "VolumeBasedCalculationTechnique",
    "ContentQualification",
    "PresentationLUTShape",
    "MultienergyCTAcquisition",
)


def flatten_frames(ds: Dataset, path: Path) -> list[Dataset]:
    """Headers of an Enhanced CT file, one a frame, with the functional groups (PS3.3 C.7.6.16) at the top level."""
    count = _frame_count(ds, path)
    per_frame = ds.get("PerFrameFunctionalGroupsSequence") or []
    if len(per_frame) != count:
        raise HarmonictError(f"{path}: {count} frames but {len(per_frame)} per-frame functional groups")
    shared = (ds.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    kept = [e for e in ds if e.keyword not in _ENHANCED_ONLY and e.tag.group != 0x7FE0]
    headers = []
    for n, groups in enumerate(per_frame, start=1):
        header = Dataset()
        for element in kept:
            header[element.tag] = element
        if hasattr(ds, "file_meta"):
            header.file_meta = ds.file_meta
        for place in (shared, groups):
            for sequence, keywords in _GROUPS:
                for item in list(place.get(sequence) or [])[:1]:
                    for keyword in keywords:
                        if keyword in item:
                            header[item[keyword].tag] = item[keyword]
            for item in list(place.get("CTExposureSequence") or [])[:1]:
                _classic_exposure(header, item)
            for item in list(place.get("FrameAnatomySequence") or [])[:1]:
                regions = item.get("AnatomicRegionSequence")
                if regions and "BodyPartExamined" not in header:
                    _replace(header, "BodyPartExamined", text(regions[0], "CodeMeaning").upper()[:16])
        _replace(header, "ImageType", [*(values(ds, "ImageType") or ["ORIGINAL", "PRIMARY"])[:2], "AXIAL"])
        _replace(header, "InstanceNumber", n)
        headers.append(header)
    return headers


def _classic_exposure(header: Dataset, item: Dataset) -> None:
    for keyword, source in (
        ("Exposure", "ExposureInmAs"),
        ("ExposureTime", "ExposureTimeInms"),
        ("XRayTubeCurrent", "XRayTubeCurrentInmA"),
    ):
        value = number(item, source)
        if value is not None:
            _replace(header, keyword, round(value))


def _replace(header: Dataset, keyword: str, value: object) -> None:
    """Set an attribute with an element of its own: the frames' headers share their elements."""
    header[keyword] = DataElement(Tag(keyword), dictionary_VR(keyword), value)


def _frame_count(ds: Dataset, path: Path) -> int:
    count = number(ds, "NumberOfFrames", 1)
    if not count or count != int(count) or not 1 <= count <= 100_000:
        raise HarmonictError(f"{path}: NumberOfFrames is no number of frames")
    return int(count)


# ------------------------------------------------------------------------------------------------------ pixels


def _transfer_syntax(ds: Dataset) -> UID:
    syntax = text(getattr(ds, "file_meta", Dataset()), "TransferSyntaxUID")
    if syntax:
        return UID(syntax)
    implicit, little = ds.original_encoding  # no meta header: what pydicom found the bytes to be
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def _decode(ds: Dataset, syntax: UID, frames: int, path: Path) -> list[np.ndarray]:
    """Stored values of every frame, (rows, columns) each, sized from the header and checked against the file."""
    rows, columns = int(number(ds, "Rows") or 0), int(number(ds, "Columns") or 0)
    allocated = int(number(ds, "BitsAllocated") or 0)
    if "PixelData" not in ds:
        raise HarmonictError(f"{path}: no pixel data; the file is a header only or was cut off")
    if rows < 1 or columns < 1 or allocated not in (8, 16, 32) or number(ds, "SamplesPerPixel", 1) != 1:
        raise HarmonictError(f"{path}: not a grey image of 8, 16 or 32 bits with Rows and Columns")
    signed = number(ds, "PixelRepresentation")
    if signed not in (0, 1):
        raise HarmonictError(f"{path}: PixelRepresentation must be 0 or 1")
    dtype = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
    data = ds.PixelData
    if syntax.is_private or not syntax.is_transfer_syntax:
        raise HarmonictError(f"{path}: not a known transfer syntax, so its pixels cannot be read")
    if not syntax.is_encapsulated:
        size = rows * columns * dtype.itemsize
        if len(data) < size * frames:
            raise HarmonictError(
                f"{path}: truncated, {len(data)} of {size * frames} bytes of pixels ({frames} x {rows} x {columns})"
            )
        if len(data) >= 2 * size * frames:
            raise HarmonictError(f"{path}: {len(data)} bytes of pixels where {frames} x {rows} x {columns} need half")
        big = dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")
        whole = np.frombuffer(data, big, count=rows * columns * frames).reshape(frames, rows, columns)
        return list(whole)
    _check_decoder(syntax, path)
    frame_bytes = rows * columns * dtype.itemsize
    if frame_bytes * frames > max(SMALL_FRAME_BYTES, LARGEST_RATIO * len(data)):
        raise HarmonictError(f"{path}: {frames} x {rows} x {columns} cannot come out of {len(data)} bytes")
    return [_decode_frame(ds, syntax, n, frames, path) for n in range(frames)]


def _check_decoder(syntax: UID, path: Path) -> None:
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise HarmonictError(
            f"{path}: transfer syntax {syntax.name} is no CT image coding that can be decoded"
        ) from None
    if not decoder.is_available:
        needs = [m.split(" - ")[-1].removeprefix("requires ") for m in decoder.missing_dependencies]
        packages = " or ".join(n.replace(" and ", " ") for n in needs) or "another decoder"
        raise HarmonictError(f"{path}: no installed decoder reads {syntax.name}; pip install {packages}")


def _decode_frame(ds: Dataset, syntax: UID, index: int, frames: int, path: Path) -> np.ndarray:
    code = get_frame(ds.PixelData, index, number_of_frames=frames)
    rows, columns = int(ds.Rows), int(ds.Columns)
    precision = _check_codestream(code, syntax, rows, columns, path)
    if syntax in (JPEGExtended12Bit, JPEGBaseline8Bit) and precision == 12:
        return _decode_with_gdcm(ds, code, syntax, path)
    plugin = "pyjpegls" if syntax in JPEGLSTransferSyntaxes else "pillow" if syntax in JPEG2000TransferSyntaxes else ""
    if plugin not in get_decoder(syntax).available_plugins:
        plugin = ""
    frame = pixel_array(ds, index=index, raw=True, decoding_plugin=plugin)
    if frame.shape != (rows, columns):
        raise HarmonictError(f"{path}: the coded image is {frame.shape}, the header says {rows} x {columns}")
    return frame


def _decode_with_gdcm(ds: Dataset, code: bytes, syntax: UID, path: Path) -> np.ndarray:
    """12-bit JPEG (process 4): pydicom hands it to no decoder, gdcm reads it."""
    rows, columns = int(ds.Rows), int(ds.Columns)
    allocated, stored, signed = int(ds.BitsAllocated), int(ds.BitsStored), int(ds.PixelRepresentation)
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(code)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetPhotometricInterpretation(
        gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.GetPIType("MONOCHROME2"))
    )
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    image.SetPixelFormat(gdcm.PixelFormat(1, allocated, stored, stored - 1, signed))
    image.SetDataElement(element)
    buffer = image.GetBuffer().encode("utf-8", "surrogateescape")
    dtype = np.dtype(f"<{'i' if signed else 'u'}{allocated // 8}")
    if len(buffer) != rows * columns * dtype.itemsize:
        raise HarmonictError(f"{path}: damaged 12-bit JPEG stream")
    return np.frombuffer(buffer, dtype).reshape(rows, columns)


def _check_codestream(code: bytes, syntax: UID, rows: int, columns: int, path: Path) -> int | None:
    """Compare the size inside a JPEG, JPEG-LS or JPEG 2000 stream with the header's; returns its bits a sample.

    A decoder trusts the stream, so a damaged one could ask it for gigabytes.
    """
    if syntax in JPEG2000TransferSyntaxes:
        start = code.find(b"\xff\x4f\xff\x51", 0, 4096)
        siz = code[start + 4 : start + 4 + 36 + 3]
        if start < 0 or len(siz) < 39:
            raise HarmonictError(f"{path}: damaged JPEG 2000 stream")
        right, bottom, left, top = (int.from_bytes(siz[4 + 4 * k : 8 + 4 * k], "big") for k in range(4))
        found, bits = (bottom - top, right - left), (siz[38] & 0x7F) + 1
        components = int.from_bytes(siz[36:38], "big")
    elif syntax.name.startswith("JPEG"):
        frame = _jpeg_frame_header(code)
        if frame is None or not code.rstrip(b"\0\xff").endswith(b"\xff\xd9"):  # decoders fill in what is cut off
            raise HarmonictError(f"{path}: damaged or truncated JPEG stream")
        bits, found, components = frame
    else:
        return None
    if found != (rows, columns) or components != 1:
        raise HarmonictError(f"{path}: the coded image is {found} x {components}, the header says {rows} x {columns}")
    return bits


def _jpeg_frame_header(code: bytes) -> tuple[int, tuple[int, int], int] | None:
    """(bits, (rows, columns), components) from the SOFn segment (ITU T.81 B.2.2, T.87 C.2.2)."""
    at = 2
    if code[:2] != b"\xff\xd8":
        return None
    while at + 9 < len(code):
        if code[at] != 0xFF:
            return None
        marker = code[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        length = int.from_bytes(code[at + 2 : at + 4], "big")
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows = int.from_bytes(code[at + 5 : at + 7], "big")
            columns = int.from_bytes(code[at + 7 : at + 9], "big")
            return code[at + 4], (rows, columns), code[at + 9]
        if length < 2:
            return None
        at += 2 + length
    return None


def _stored_bits(raw: np.ndarray, ds: Dataset, path: Path) -> np.ndarray:
    """Stored values that hold what BitsStored and HighBit promise (PS3.5 8.1.1); the same array where they do."""
    allocated, signed = raw.dtype.itemsize * 8, raw.dtype.kind == "i"
    stored = int(number(ds, "BitsStored", allocated) or 0)
    high = int(number(ds, "HighBit", stored - 1) or 0)
    if not 1 <= stored <= allocated or not stored - 1 <= high < allocated:
        raise HarmonictError(f"{path}: BitsStored {stored} and HighBit {high} do not fit {allocated} bits")
    if stored == allocated:
        return raw
    low, top = (-(1 << (stored - 1)), (1 << (stored - 1)) - 1) if signed else (0, (1 << stored) - 1)
    least, most = int(raw.min()), int(raw.max())
    if high == stored - 1 and low <= least and most <= top:
        return raw
    overlays = any(0x6000 <= e.group <= 0x60FF and e.element == 0x0102 for e in ds.keys())
    sign_not_extended = signed and high == stored - 1 and 0 <= least and most < 1 << stored
    if not (overlays or sign_not_extended or high != stored - 1):
        raise HarmonictError(
            f"{path}: stored values {least} to {most} do not fit the {stored} bits that BitsStored declares"
        )
    native = raw.astype(raw.dtype.newbyteorder("="))
    return (native << (allocated - 1 - high)) >> (allocated - stored)


def _rescale(header: Dataset, path: Path) -> tuple[float, float]:
    slope, intercept = number(header, "RescaleSlope"), number(header, "RescaleIntercept")
    if slope is None or intercept is None or slope == 0:
        raise HarmonictError(f"{path}: no RescaleSlope and RescaleIntercept, so its values cannot be made HU")
    if "ModalityLUTSequence" in header:
        raise HarmonictError(f"{path}: a Modality LUT instead of slope and intercept; CT in HU is expected")
    if text(header, "RescaleType").upper() not in HU_TYPES:
        raise HarmonictError(f"{path}: RescaleType is not HU, so its values are no CT numbers")
    return slope, intercept


def _to_hu(raw: np.ndarray, slope: float, intercept: float, *, out: np.ndarray) -> None:
    if slope == 1 and intercept == int(intercept) and raw.dtype.itemsize <= 2 and abs(intercept) < 1 << 22:
        np.add(raw, np.float32(intercept), out=out)  # whole numbers below 2^24: exact
        return
    out[...] = raw.astype(np.float64) * slope + intercept


def _tagged_padding(raw: np.ndarray, header: Dataset, slope: float, intercept: float) -> np.ndarray | None:
    """Where a slice holds PixelPaddingValue, or a value up to PixelPaddingRangeLimit (PS3.3 C.7.5.1.1.2)."""
    value = number(header, "PixelPaddingValue")
    if value is None:
        return None
    limit = number(header, "PixelPaddingRangeLimit", value)
    span = 1 << (raw.dtype.itemsize * 8)
    signed = raw.dtype.kind == "i"
    ends = []
    for end in (value, value if limit is None else limit):  # files mix up the two 16-bit readings of one number
        ends.append(end - span if signed and end >= span // 2 else end + span if not signed and end < 0 else end)
    low, high = min(ends), max(ends)
    mask = raw == low if low == high else (raw >= low) & (raw <= high)
    if not mask.any():
        return None
    if max(low * slope, high * slope) + intercept > HIGHEST_TAGGED_HU:
        mask = connected_to_border(mask)
    return mask


# ------------------------------------------------------------------------------------------------------- stack


def check_one_series(slices: Sequence[Slice], name: str) -> None:
    """Raises HarmonictError where the slices come from several series or kernels."""
    uids = {text(s.header, "SeriesInstanceUID") for s in slices}
    if len(uids) > 1:
        raise HarmonictError(f"{name}: files of {len(uids)} series; read one series at a time (`inspect` lists them)")
    kernels = {kernel_name(s.header) for s in slices}
    if len(kernels) > 1:
        raise HarmonictError(f"{name}: several kernels in one series: {', '.join(sorted(str(k) for k in kernels))}")


def stack(slices: Sequence[Slice], name: str, *, slicewise: bool = False) -> tuple[list[int], Geometry, bool]:
    """Order of the slices along their normal, the grid, and whether they form a regular volume.

    Regular: each position within max(1 % of the step, 0.02 mm) of an even line along the normal (sideways: 0.05 mm
    + 0.1 % of the length). Two slices alone are a volume only where they are at most twice their thickness apart.
    Raises HarmonictError, naming the positions, for mixed sizes, spacings and orientations, and unless `slicewise` for
    the same position twice, gaps, uneven steps and tilt.
    """
    first = slices[0]
    for what, attribute, tolerance in (
        ("image sizes", lambda s: s.shape, 0.0),
        ("pixel spacings", lambda s: s.pixel_mm, 1e-4),
        ("orientations", lambda s: (*s.row, *s.column), 1e-3),
    ):
        odd = [s for s in slices if not np.allclose(attribute(s), attribute(first), rtol=0, atol=tolerance)]
        if odd:
            places = ", ".join(_place(s) for s in odd[:3]) + (", ..." if len(odd) > 3 else "")
            raise HarmonictError(
                f"{name}: mixed {what}: {_short(attribute(first))} and {_short(attribute(odd[0]))} (at {places}); "
                "put each kind in a series of its own"
            )
    normal = first.normal
    along = np.array([s.position @ normal for s in slices])
    order = [int(k) for k in np.argsort(along, kind="stable")]
    along = along[order]
    problem = None if len(slices) == 1 else _stack_problem([slices[k] for k in order], along, normal)
    if problem and not slicewise:
        raise HarmonictError(f"{name}: {problem}; or take the images one by one (--slicewise)")
    if len(slices) == 1:
        between = number(first.header, "SpacingBetweenSlices")
        step = first.thickness_mm or (abs(between) if between else 0.0) or 1.0
    else:
        step = round(float(along[-1] - along[0]) / (len(slices) - 1), 9)
        if step <= 0:
            step = first.thickness_mm or 1.0
    bottom = slices[order[0]]
    geometry = Geometry(
        origin_mm=_vector(bottom.position),
        spacing_mm=(step, *bottom.pixel_mm),
        direction=(_vector(normal), _vector(bottom.column), _vector(bottom.row)),
    )
    return order, geometry, problem is None


def _stack_problem(slices: Sequence[Slice], along: np.ndarray, normal: np.ndarray) -> str | None:
    """Why sorted slices form no regular volume, in words, or None."""
    steps = np.diff(along)
    usual = float(np.median(steps[steps > POSITION_TOLERANCE_MM])) if np.any(steps > POSITION_TOLERANCE_MM) else 0.0
    tolerance = max(STEP_TOLERANCE * usual, POSITION_TOLERANCE_MM)
    twice = np.flatnonzero(steps <= tolerance)
    if len(twice):
        uids = [text(s.header, "SOPInstanceUID") for s in slices]
        copies = any(uids[k] and uids[k] == uids[k + 1] and not slices[k].frame for k in map(int, twice))
        hint = "copies of one file; remove them" if copies else "keep one image a position"
        return f"several images at the same position: {_list_mm(along[twice])} ({hint})"
    thickness = slices[0].thickness_mm
    if len(slices) == 2 and thickness and usual > 2 * thickness + tolerance:
        return (
            f"two slices {usual:g} mm apart ({_list_mm(along)}) of {thickness:g} mm thickness are single images, "
            "not a volume; add the slices between"
        )
    wide = np.flatnonzero(steps > 1.5 * usual)
    if len(wide):
        gaps = ", ".join(f"{along[k]:.2f} and {along[k + 1]:.2f}" for k in wide[:3]) + (
            ", ..." if len(wide) > 3 else ""
        )
        return f"slices are missing between positions {gaps} mm (usual step {usual:g} mm); add them"
    even = np.linspace(along[0], along[-1], len(along))
    if np.abs(along - even).max() > tolerance:
        worst = int(np.argmax(np.abs(steps - usual)))
        return (
            f"uneven slice spacing: {steps.min():.3f} to {steps.max():.3f} mm, "
            f"usual {usual:.3f} (worst between {along[worst]:.2f} and {along[worst + 1]:.2f} mm); resample it first"
        )
    offsets = np.array([s.position - slices[0].position for s in slices])
    sideways = offsets - np.outer(offsets @ normal, normal)
    length = float(along[-1] - along[0])
    if np.linalg.norm(sideways, axis=1).max() > SIDEWAYS_TOLERANCE_MM + TILT_TOLERANCE * length:
        angle = math.degrees(math.atan2(float(np.linalg.norm(sideways[-1])), length))
        line = np.outer(np.linspace(0, 1, len(slices)), sideways[-1])
        if np.linalg.norm(sideways - line, axis=1).max() > SIDEWAYS_TOLERANCE_MM + TILT_TOLERANCE * length:
            return f"slices are shifted sideways against each other, by up to {np.abs(sideways).max():.2f} mm"
        return (
            f"gantry tilt of {angle:.1f} degrees: positions {along[0]:.2f} to {along[-1]:.2f} mm do not run along the "
            "slice normal; resample it first"
        )
    return None


def series_name(one: Slice) -> str:
    """What messages call a series: folder, series number and the end of the UID; no free text of the header."""
    folder = one.path.resolve().parent
    series = number(one.header, "SeriesNumber")
    uid = text(one.header, "SeriesInstanceUID")
    parts = [f"{folder.parent.name}/{folder.name}".strip("/")]
    if series is not None:
        parts.append(f"series {series:g}")
    if uid:
        parts.append(f"(UID ...{uid[-8:]})")
    return " ".join(parts)


# ---------------------------------------------------------------------------------------------------- protocol


def protocol_from_header(ds: Dataset) -> ScanProtocol:
    """How the image was made, from its public attributes; what the file does not say stays None.

    The vendor is one of Siemens, GE, Philips, Canon (Toshiba too) or as written. Siemens writes the strength of its
    iterative reconstruction as a second value of ConvolutionKernel ("Br40d\\3"); other vendors keep it in private
    attributes, which are not read. Exposure in mAs: ExposureInuAs, Exposure, or tube current times time.
    """
    vendor = _vendor(text(ds, "Manufacturer"))
    return ScanProtocol(
        manufacturer=vendor,
        model=text(ds, "ManufacturerModelName") or None,
        kernel=kernel_name(ds),
        iterative_strength=_strength(ds, vendor),
        slice_thickness_mm=_positive(number(ds, "SliceThickness")),
        kvp=_positive(number(ds, "KVP")),
        exposure_mas=_exposure_mas(ds),
        ctdivol_mgy=_positive(number(ds, "CTDIvol")),
        fov_mm=_fov_mm(ds),
    )


def series_protocol(headers: Sequence[Dataset]) -> ScanProtocol:
    """Protocol of a series: that of its middle slice; mAs and CTDIvol, which follow the patient, as the median."""
    protocol = protocol_from_header(headers[len(headers) // 2])
    for field, of in (
        ("exposure_mas", _exposure_mas),
        ("ctdivol_mgy", lambda h: _positive(number(h, "CTDIvol"))),
    ):
        known = [v for v in map(of, headers) if v is not None]
        protocol = protocol.with_(**{field: float(np.median(known)) if known else None})
    return protocol


def kernel_name(ds: Dataset) -> str | None:
    """First value of ConvolutionKernel, or None."""
    return next((v for v in (str(v).strip() for v in values(ds, "ConvolutionKernel")) if v), None)


def _strength(ds: Dataset, vendor: str | None) -> float | None:
    parts = [str(v).strip() for v in values(ds, "ConvolutionKernel")]
    if vendor == "Siemens" and parts:
        if len(parts) > 1 and re.fullmatch(r"[1-5]", parts[1]):
            return float(parts[1])
        if len(parts) == 1 and re.fullmatch(r"(?![IJ])[A-Z][a-z]?\d+[a-z]*", parts[0]):
            return 0.0  # I and J kernels are iterative; the others, without a second value, are back-projection
    if text(ds, "ReconstructionAlgorithm").upper() == "FILTER_BACK_PROJ":
        return 0.0
    return None


def _vendor(name: str) -> str | None:
    low = name.lower()
    for start, short in (("siemens", "Siemens"), ("philips", "Philips"), ("toshiba", "Canon"), ("canon", "Canon")):
        if low.startswith(start):
            return short
    return "GE" if re.match(r"ge\b", low) else name or None


def _exposure_mas(ds: Dataset) -> float | None:
    current = _positive(number(ds, "XRayTubeCurrent")) or _scaled(ds, "XRayTubeCurrentInuA", 1e-3)
    seconds = _scaled(ds, "ExposureTime", 1e-3) or _scaled(ds, "ExposureTimeInuS", 1e-6)
    return (
        _scaled(ds, "ExposureInuAs", 1e-3)
        or _positive(number(ds, "Exposure"))
        or (current * seconds if current and seconds else None)
    )


def _fov_mm(ds: Dataset) -> float | None:
    diameter = _positive(number(ds, "ReconstructionDiameter"))
    if diameter:
        return diameter
    spacing, columns = values(ds, "PixelSpacing"), number(ds, "Columns")
    try:
        return _positive(float(str(spacing[1])) * columns) if len(spacing) == 2 and columns else None
    except (TypeError, ValueError):
        return None


def _scaled(ds: Dataset, keyword: str, factor: float) -> float | None:
    value = _positive(number(ds, keyword))
    return None if value is None else value * factor


def _positive(value: float | None) -> float | None:
    return value if value is not None and value > 0 else None


# ---------------------------------------------------------------------------------------- values of attributes


def values(ds: Dataset, keyword: str) -> list[object]:
    """The values of an attribute as a list; empty where it is absent, empty or unreadable."""
    try:
        value = ds.get(keyword)
    except Exception:  # a damaged element raises whatever its bytes provoke
        return []
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]


def text(ds: Dataset, keyword: str) -> str:
    """The first value of an attribute as text, "" where there is none."""
    found = values(ds, keyword)
    return str(found[0]).strip() if found else ""


def number(ds: Dataset, keyword: str, default: float | None = None) -> float | None:
    """The first value of an attribute as a finite number, `default` where there is none."""
    found = values(ds, keyword)
    try:
        value = float(str(found[0])) if found else math.nan
    except ValueError:
        return default
    return value if math.isfinite(value) else default


def _numbers(ds: Dataset, keyword: str, count: int, place: str) -> np.ndarray:
    try:
        found = np.array([float(str(v)) for v in values(ds, keyword)])
    except ValueError:
        found = np.empty(0)
    if found.shape != (count,) or not np.all(np.isfinite(found)) or np.abs(found).max() > 1e6:
        raise HarmonictError(f"{place}: {keyword} must hold {count} numbers; without it the image has no place")
    return found


def _vector(v: np.ndarray) -> tuple[float, float, float]:
    return float(v[0]), float(v[1]), float(v[2])


def _place(one: Slice) -> str:
    return f"{one.position @ one.normal:.2f} mm in {one.path.name}" + (f" frame {one.frame}" if one.frame else "")


def _list_mm(positions: np.ndarray) -> str:
    shown = ", ".join(f"{p:.2f}" for p in positions[:4])
    return f"{shown}{', ...' if len(positions) > 4 else ''} mm"


def _short(found: tuple[float, ...]) -> str:
    return " x ".join(f"{v:.4g}" for v in found)


def _damaged(path: Path, error: Exception) -> str:
    return f"{path}: damaged DICOM file ({type(error).__name__}); get a fresh copy"


def looks_like_dicom(path: Path) -> bool:
    """True where a file has the DICM mark, or begins with a plausible first element of group 0002 or 0008."""
    with open(path, "rb") as file:
        start = file.read(132)
    if start[128:] == b"DICM":
        return True
    if len(start) < 132:
        return False
    little = start[:2] in (b"\x02\x00", b"\x08\x00") and start[3] == 0
    big = start[:2] == b"\x00\x08" and start[2] == 0
    explicit = start[4:6].isalpha() and start[4:6].isupper()
    implicit = little and int.from_bytes(start[4:8], "little") < 1024
    return (little or big) and (explicit or implicit)
