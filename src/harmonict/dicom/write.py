"""A harmonized series as DICOM: classic CT images, DERIVED, with new UIDs that a rerun gives again.

The header of a derived image is that of its source image, less what describes pixels that are no longer there, plus
what says how it was made. Nothing in it comes from the clock, so the same source and the same model give the same
bytes. `docs/derived-dicom.md` lists every attribute and the reason.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import struct
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.dataelem import DataElement
from pydicom.dataset import FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
)

from harmonict.core import HarmonictError, Series
from harmonict.dicom.read import DicomSource, number, text

# A fixed UID of our own (2.25 form, PS3.5 B.2) by which other software knows what wrote the file.
IMPLEMENTATION_UID = "2.25.220433467184379216463027353091286480275"

INT16 = (-32768, 32767)

# Attributes that describe the source's pixels, or the file it came in, and would be wrong in the derived image.
_DROPPED = {
    (0x0004, 0x0000, 0x0004, 0xFFFF),  # a media directory's
    (0x0008, 0x0001, 0x0008, 0x0001),  # Length to End (retired)
    (0x0008, 0x0012, 0x0008, 0x0014),  # Instance Creation Date, Time, Creator UID
    (0x0008, 0x9205, 0x0008, 0x9207),  # Pixel Presentation, Volumetric Properties, ... (multi-frame)
    (0x0018, 0x9004, 0x0018, 0x9004),  # Content Qualification (multi-frame)
    (0x0020, 0x9056, 0x0020, 0x9057),  # Stack ID, In-Stack Position Number
    (0x0020, 0x9128, 0x0020, 0x9128),  # Temporal Position Index
    (0x0020, 0x9157, 0x0020, 0x9167),  # Dimension Index Values, Concatenations
    (0x0020, 0x9221, 0x0020, 0x9222),  # Dimension Organization, Dimension Index Sequence
    (0x0020, 0x9228, 0x0020, 0x9228),  # Concatenation Frame Offset Number
    (0x0020, 0x9311, 0x0020, 0x9311),  # Dimension Organization Type
    (0x0028, 0x0008, 0x0028, 0x0009),  # Number of Frames, Frame Increment Pointer
    (0x0028, 0x0104, 0x0028, 0x0111),  # Smallest and Largest Pixel Values
    (0x0028, 0x0120, 0x0028, 0x0121),  # Pixel Padding Value and Range Limit: set anew where they still hold
    (0x0028, 0x3000, 0x0028, 0x3000),  # Modality LUT Sequence: the rescale below says it all
    (0x0088, 0x0200, 0x0088, 0x0200),  # Icon Image Sequence: a thumbnail of the source
    (0x0100, 0x0410, 0x0100, 0x0426),  # SOP Instance Status, authorisation
    (0x0400, 0x0500, 0x0400, 0x0500),  # Encrypted Attributes
    (0x4FFE, 0x0001, 0x4FFE, 0x0001),  # MAC Parameters
    (0x5200, 0x9229, 0x5200, 0x9230),  # Functional Groups
    (0x7FE0, 0x0000, 0xFFFF, 0xFFFF),  # Pixel Data and what follows it: signatures, padding
}
_DROPPED_RANGES = tuple(((a << 16) | b, (c << 16) | d) for a, b, c, d in _DROPPED)
_TYPE_2 = ("KVP", "AcquisitionNumber", "InstanceNumber", "PositionReferenceIndicator")  # present, may be empty


@dataclass(frozen=True)
class Derivation:
    """How a derived series was made: what goes into its headers and, hashed, into its UIDs.

    method: name of the harmonization method ("mtf-ratio").
    digest: SHA-256 (hex) of the model's configuration and weights.
    parameters: the settings of this run, short and readable; everything that changes the pixels must be in it.
    target: label of the target protocol.
    version: harmonict's version.
    """

    method: str
    digest: str
    parameters: str
    target: str
    version: str


@dataclass(frozen=True)
class WriteReport:
    """What `write_series` wrote.

    folder: where; files: one path per slice, in the order of hu[z]; series_uid: the new Series Instance UID.
    clipped_voxels: voxels whose HU fit neither the source's encoding nor 16 bits and were cut to the nearest value.
    rescaled_slices: slices that could not keep the source's encoding and are int16 with slope 1, intercept 0.
    """

    folder: Path
    files: tuple[Path, ...]
    series_uid: str
    clipped_voxels: int
    rescaled_slices: int


def derived_series_uid(series: Series, derivation: Derivation) -> str:
    """The Series Instance UID that `write_series` gives: the same for the same source images and derivation.

    A hash of the source's Series and SOP Instance UIDs and the derivation, so a source that gained a slice, another
    model or other parameters make another series. Raises HarmonictError where the series is not from DICOM.
    """
    source = _source(series)
    return _derived_uid("series", derivation, text(source.headers[0], "SeriesInstanceUID"), *_identities(source))


def write_series(
    series: Series, folder: str | Path, derivation: Derivation, *, out_of: Series | None = None
) -> WriteReport:
    """Write a changed series (`series.source` still names its source) as `folder/0001.dcm`, `0002.dcm`, ...

    The files appear together or not at all: they are written and flushed in a hidden folder beside `folder`, which is
    then renamed. A `folder` that already holds this same derived series is replaced; the source files are never
    opened. A slice keeps the source's slope, intercept, signedness and bit depth where every rounded value fits them,
    else it becomes int16, slope 1, intercept 0. Explicit VR Little Endian, not compressed.

    out_of: the source's own Series, where `series` was built anew and does not carry `source` any more.

    Raises HarmonictError in one line where the series is not from DICOM, the folder lies in the source's folder or
    holds something else, or the disk refuses (full, read-only, no permission); nothing half written is left.
    """
    origin = out_of or series
    source = _source(origin)
    name = series.name or "series"
    _check_shape(series.hu.shape, source, name)
    folder = Path(folder)
    refuse_source_folder(folder, source.paths)
    series_uid = derived_series_uid(origin, derivation)
    padding = series.padding
    width = max(4, len(str(len(series.hu))))
    clipped = rescaled = 0
    with _quiet():
        shared, appended = _shared_elements(source, derivation, series_uid), _appended_elements(derivation)

    with new_folder(folder, lambda old: _holds_series(old, series_uid)) as temporary:
        for z, identity in enumerate(_identities(source)):
            header = source.headers[z]
            pixels = _encode(series.hu[z], None if padding is None else padding[z], header)
            clipped += pixels.clipped
            rescaled += pixels.rescaled
            sop_uid = _derived_uid("image", derivation, identity)
            try:
                with _quiet():
                    data = encode_file(_derived_image(source, z, pixels, sop_uid, derivation, shared, appended))
            except Exception as error:  # a header that pydicom read but cannot convert or write
                raise HarmonictError(
                    f"{name}: the header of slice {z + 1} cannot be written again ({type(error).__name__}); "
                    "repair that file or leave it out"
                ) from error
            _write_bytes(temporary / f"{z + 1:0{width}d}.dcm", data, _pixel_element(pixels.data), pixels.data)
    files = tuple(folder / f"{z + 1:0{width}d}.dcm" for z in range(len(series.hu)))
    return WriteReport(folder, files, series_uid, clipped, rescaled)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without pydicom's warnings: values of the source that break the rules of their VR stay as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def encode_file(ds: Dataset) -> bytes:
    """The file of a data set, in the transfer syntax of its meta header. In memory: pydicom hides the disk's errors."""
    buffer = BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


# --- folders: whole or not at all -------------------------------------------------------------------------------------


def refuse_source_folder(folder: Path, sources: tuple[Path, ...]) -> None:
    """Raise HarmonictError where `folder` is, or lies in, a folder that holds one of the source files."""
    target = Path(folder).resolve()
    for parent in {Path(p).resolve().parent for p in sources}:
        if target == parent or parent in target.parents:
            raise HarmonictError(f"{folder} lies in the source's folder {parent}; choose an output folder outside it")


def stale_temporaries(out: str | Path) -> list[Path]:
    """Remove the hidden folders and files that killed runs left half written below `out`; returns their paths.

    One that a live run is writing (it holds a lock on it) is left alone.
    """
    found = []
    for path in sorted(Path(out).rglob(".*.harmonict")):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.harmonict", path.name) and not _locked(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            found.append(path)
    return found


@contextmanager
def new_folder(folder: Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a hidden folder to fill; at the end of the block it is flushed to disk and becomes `folder`.

    An existing `folder` is replaced if it is empty or `replaceable` says so, else refused. Any error removes what was
    written. OSError comes out as HarmonictError.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise HarmonictError(f"{folder} is a file; the output must be a folder")
    made: list[Path] = []
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.harmonict"
    lock = None
    try:
        if folder.exists() and any(folder.iterdir()) and not replaceable(folder):
            raise HarmonictError(f"{folder} already holds other files; choose another output folder or remove it")
        for parent in reversed([folder.parent, *folder.parent.parents]):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                made.append(parent)
        for stale in folder.parent.glob(f".{folder.name}.*.harmonict"):
            if not _locked(stale):
                shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY)
        lock_file(lock)
        yield temporary
        with ThreadPoolExecutor(8) as pool:  # a disk takes many flushes at once in the time of one
            list(pool.map(_flush, sorted(temporary.iterdir())))
        _flush(temporary)
        _take_place(temporary, folder)
        _flush(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in reversed(made):
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise HarmonictError(reason_not_written(folder, error)) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _take_place(temporary: Path, folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        old = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.harmonict"
        os.rename(folder, old)  # a kill between these two lines leaves only hidden folders, which a rerun removes
        os.rename(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(temporary, folder)


def _pixel_element(data: bytes) -> bytes:
    """Tag, VR and length of Pixel Data in Explicit VR Little Endian (PS3.5 7.1.2)."""
    return struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OW", 0, len(data))


def _write_bytes(path: Path, *parts: bytes) -> None:
    with path.open("xb") as file:
        file.writelines(parts)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot flush a folder
            raise
    finally:
        os.close(handle)


def lock_file(handle: int) -> None:
    """Mark an open file or folder as being written; the mark goes with the process."""
    with suppress(OSError):  # file systems without locks
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(handle)


def reason_not_written(folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to write {folder}; nothing of it was kept: free some space and run again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot write {folder}: {error.strerror}; choose an output folder that you may write to"
    return f"cannot write {folder}: {error.strerror or type(error).__name__}; nothing of it was kept"


def _holds_series(folder: Path, series_uid: str) -> bool:
    """True where the folder holds nothing but images of that series, as an earlier run of ours leaves it."""
    paths = sorted(folder.iterdir())
    if not all(re.fullmatch(r"\d{4,}\.dcm", p.name) and stat.S_ISREG(p.stat().st_mode) for p in paths):
        return False
    try:
        return all(str(dcmread(p, specific_tags=["SeriesInstanceUID"]).SeriesInstanceUID) == series_uid for p in paths)
    except (InvalidDicomError, AttributeError, ValueError, EOFError):
        return False


# --- pixels -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pixels:
    data: bytes
    bits: int
    signed: bool
    padding: tuple[int, int | None] | None  # Pixel Padding Value and Range Limit that hold for these pixels
    clipped: int
    rescaled: bool  # slope 1, intercept 0 instead of the source's


def _encode(hu: np.ndarray, padding: np.ndarray | None, header: Dataset) -> _Pixels:
    """HU (y, x) -> stored values in the source's encoding where they fit it, else int16 HU; rounded to nearest."""
    slope = number(header, "RescaleSlope") or 1.0
    intercept = number(header, "RescaleIntercept") or 0.0
    signed = _integer(header, "PixelRepresentation", 0) == 1
    bits = min(max(_integer(header, "BitsStored", 16), 12), 16)  # what a CT image may have
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    stored = hu.astype(np.float64)
    stored -= intercept
    if slope != 1:
        stored /= slope
    np.rint(stored, out=stored)
    outside = _outside(stored, low, high)
    tags = _padding_values(header)
    if outside:
        whole = np.rint(hu).astype(np.float64)
        over = _outside(whole, *INT16)
        if over < outside:
            moved = None if tags is None else _moved_tags(tags, slope, intercept)
            return _pack(whole, INT16, 16, True, padding, moved, over, rescaled=True)
    return _pack(stored, (low, high), bits, signed, padding, tags, outside, rescaled=False)


def _pack(
    values: np.ndarray,
    limits: tuple[int, int],
    bits: int,
    signed: bool,
    padding: np.ndarray | None,
    tags: tuple[int, int | None] | None,
    clipped: int,
    *,
    rescaled: bool,
) -> _Pixels:
    if clipped:
        values = np.clip(values, *limits)
    pixels = values.astype("<i2" if signed else "<u2")
    if tags is not None:
        first, last = tags[0], tags[0] if tags[1] is None else tags[1]
        marked = (pixels >= min(first, last)) & (pixels <= max(first, last))
        if padding is not None and np.any(marked & ~padding):
            tags = None  # a measured voxel came to have that value: the tag would call it padding
    return _Pixels(pixels.tobytes(), bits, signed, tags, clipped, rescaled)


def _outside(values: np.ndarray, low: int, high: int) -> int:
    if values.min() >= low and values.max() <= high:
        return 0
    return int(np.count_nonzero((values < low) | (values > high)))


def _moved_tags(tags: tuple[int, int | None], slope: float, intercept: float) -> tuple[int, int | None] | None:
    """Padding tags as whole HU, or None where int16 cannot hold them."""
    first = round(tags[0] * slope + intercept)
    limit = None if tags[1] is None else round(tags[1] * slope + intercept)
    fits = all(t is None or INT16[0] <= t <= INT16[1] for t in (first, limit))
    return (first, limit) if fits else None


def _padding_values(header: Dataset) -> tuple[int, int | None] | None:
    value = _padding_number(header, "PixelPaddingValue")
    return None if value is None else (value, _padding_number(header, "PixelPaddingRangeLimit"))


def _padding_number(header: Dataset, keyword: str) -> int | None:
    """The tag as a stored value: its VR (US or SS) often contradicts the pixels' sign, the 16 bits are right."""
    value = number(header, keyword)
    if value is None:
        return None
    bits = int(value) & 0xFFFF
    return bits - 0x10000 if _integer(header, "PixelRepresentation", 0) == 1 and bits >= 0x8000 else bits


# --- headers ----------------------------------------------------------------------------------------------------------


def _derived_image(
    source: DicomSource,
    z: int,
    pixels: _Pixels,
    sop_uid: str,
    derivation: Derivation,
    shared: Dataset,
    appended: Dataset,
) -> Dataset:
    """The data set of the image made from slice z, less its pixels, which come last in the file.

    Elements that do not change are the source's own, not copies.
    """
    header = source.headers[z]
    image = Dataset({t: header.get_item(t) for t in header.keys() if not _is_dropped(int(t))})
    implicit, little = header.original_encoding
    image.set_original_encoding(implicit, little, header.original_character_set)
    _purge_overlays(image)

    put = partial(_put, image)
    put("SOPInstanceUID", sop_uid)
    for element in shared:
        image[element.tag] = element
    for keyword in _TYPE_2:
        if keyword not in image:
            put(keyword, None)
    if not text(header, "FrameOfReferenceUID"):
        put("FrameOfReferenceUID", hashed_uid("frame of reference", text(header, "SeriesInstanceUID")))

    before = text(header, "DerivationDescription")
    put("DerivationDescription", (_describe(derivation) + (f" Before: {before}" if before else ""))[:1024])
    put("SourceImageSequence", [_source_image(header, source, z)])
    for element in appended:
        earlier = _items(header, element.keyword)
        if earlier:
            put(element.keyword, [*earlier, *(copy.deepcopy(item) for item in element.value)])
        else:
            image[element.tag] = element

    put("PhotometricInterpretation", text(header, "PhotometricInterpretation") or "MONOCHROME2")
    put("BitsStored", pixels.bits)
    put("HighBit", pixels.bits - 1)
    put("PixelRepresentation", int(pixels.signed))
    if not text(header, "RescaleType") or pixels.rescaled:
        put("RescaleType", "HU")
    if pixels.rescaled:
        put("RescaleSlope", "1")
        put("RescaleIntercept", "0")
        if "VOILUTSequence" in image:
            del image["VOILUTSequence"]  # its descriptor follows the pixels' sign, which may have changed
    if pixels.padding is not None:
        vr = "SS" if pixels.signed else "US"
        for tag, value in zip((0x00280120, 0x00280121), pixels.padding, strict=True):
            if value is not None:
                image[tag] = DataElement(tag, vr, value)
    image.file_meta = file_meta(CTImageStorage, image.SOPInstanceUID, derivation.version)
    return image


def _put(image: Dataset, keyword: str, value: object) -> None:
    """Set an attribute as a new element: the old one belongs to the source's header and must not change."""
    image.pop(keyword, None)
    setattr(image, keyword, value)


def _items(header: Dataset, keyword: str) -> list[Dataset]:
    """The items of a source's sequence, copied: an item belongs to one sequence only."""
    return [copy.deepcopy(item) for item in header.get(keyword) or []]


def _shared_elements(source: DicomSource, derivation: Derivation, series_uid: str) -> Dataset:
    """What is the same in all images of the derived series, made once."""
    first = source.headers[0]
    shared = Dataset()
    shared.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    shared.SOPClassUID = CTImageStorage
    shared.Modality = "CT"
    shared.SeriesInstanceUID = series_uid
    step = int(hashed_uid("number", derivation.digest, derivation.parameters, derivation.target)[5:]) % 9 + 1
    # the source's number can still be read in the last five digits
    shared.SeriesNumber = _integer(first, "SeriesNumber", 0) % 100_000 + 100_000 * step
    label = _fit(f"harmonict {derivation.target}", 64, line=True)
    before = text(first, "SeriesDescription").replace("\\", "/")[: max(0, 64 - len(label) - 3)]
    shared.SeriesDescription = f"{before} > {label}" if before else label
    shared.SamplesPerPixel = 1
    shared.BitsAllocated = 16
    return shared


def _appended_elements(derivation: Derivation) -> Dataset:
    """The sequences to which harmonict adds an item after those that the source has."""
    appended = Dataset()
    appended.DerivationCodeSequence = [code("110001", "Image Processing")]
    appended.ContributingEquipmentSequence = [equipment(derivation)]
    return appended


def _describe(derivation: Derivation) -> str:
    """The sentence for Derivation Description."""
    return _fit(
        f"Research use only, not for diagnosis. harmonict {derivation.version}: CT harmonization by "
        f"{derivation.method} to {derivation.target}; model SHA-256 {derivation.digest}; {derivation.parameters}.",
        900,
    )


def equipment(derivation: Derivation) -> Dataset:
    """The item of Contributing Equipment Sequence that names harmonict (PS3.3 C.12.1)."""
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [code("109102", "Processing Equipment")]
    item.Manufacturer = "harmonict"
    item.ManufacturerModelName = "harmonict"
    item.SoftwareVersions = _fit(derivation.version, 64, line=True)
    item.ContributionDescription = _fit(
        f"CT harmonization, research use only. Method: {derivation.method}. Target: {derivation.target}. "
        f"Weights SHA-256: {derivation.digest}. Parameters: {derivation.parameters}",
        1024,
    )
    return item


def code(value: str, meaning: str) -> Dataset:
    """A code of the DICOM scheme as a sequence item."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def file_meta(sop_class: str, sop_uid: str, version: str) -> FileMetaDataset:
    """File meta information of a file that harmonict writes."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(sop_class)
    meta.MediaStorageSOPInstanceUID = UID(sop_uid)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(IMPLEMENTATION_UID)
    meta.ImplementationVersionName = _fit(f"HARMONICT {version}", 16, line=True)
    return meta


def _source_image(header: Dataset, source: DicomSource, z: int) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = text(header, "SOPClassUID") or CTImageStorage
    item.ReferencedSOPInstanceUID = text(header, "SOPInstanceUID")
    if source.frames is not None:
        item.ReferencedFrameNumber = source.frames[z]
    item.SpatialLocationsPreserved = "YES"
    item.PurposeOfReferenceCodeSequence = [code("121322", "Source image for image processing operation")]
    return item


@cache
def _is_dropped(tag: int) -> bool:
    group, element = tag >> 16, tag & 0xFFFF
    if group % 2 or element == 0:  # private: meaning unknown, so not known to be still true; group lengths
        return True
    return any(low <= tag <= high for low, high in _DROPPED_RANGES)


def _purge_overlays(image: Dataset) -> None:
    """Overlays kept in spare bits of the source's pixels are gone with them; those with data of their own stay."""
    for group in range(0x6000, 0x6020, 2):
        if (group, 0x0010) in image and (group, 0x3000) not in image:
            for tag in [t for t in image.keys() if t.group == group]:
                del image[tag]


def _source(series: Series) -> DicomSource:
    source = series.source
    name = series.name or "series"
    if not isinstance(source, DicomSource):
        raise HarmonictError(f"{name}: was not read from DICOM, so there are no headers to write DICOM with")
    with _quiet():
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            for z, header in enumerate(source.headers):
                if not text(header, keyword):
                    raise HarmonictError(f"{name}: slice {z + 1} has no {keyword}, so nothing can be derived from it")
    return source


def _check_shape(shape: tuple[int, ...], source: DicomSource, name: str) -> None:
    first = source.headers[0]
    expected = len(source.headers), _integer(first, "Rows", 0), _integer(first, "Columns", 0)
    if shape != expected:
        raise HarmonictError(
            f"{name}: the result is {' x '.join(map(str, shape))} voxels, its source {' x '.join(map(str, expected))}; "
            "only a result on the source's own grid can be written with its headers"
        )


def _identities(source: DicomSource) -> list[str]:
    """One string a slice: its SOP Instance UID, with the frame in a multi-frame file.

    Some software gives all slices one UID; then the place in the stack tells them apart.
    """
    uids = [text(h, "SOPInstanceUID") for h in source.headers]
    if source.frames is not None:
        return [f"{uid}#{frame}" for uid, frame in zip(uids, source.frames, strict=True)]
    return uids if len(set(uids)) == len(uids) else [f"{uid}@{z}" for z, uid in enumerate(uids)]


def _derived_uid(kind: str, derivation: Derivation, *identity: str) -> str:
    d = derivation
    return hashed_uid(kind, d.method, d.digest, d.parameters, d.target, d.version, *identity)


def hashed_uid(*parts: str) -> str:
    """A UID of the 2.25 form (PS3.5 B.2) from the SHA-256 of the parts."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def _integer(header: Dataset, keyword: str, default: int) -> int:
    value = number(header, keyword)
    return default if value is None else int(value)


def _fit(text: str, length: int, line: bool = False) -> str:
    """ASCII of at most `length` characters without control characters; for LO and SH (`line`) without backslash."""
    text = re.sub(r"[\x00-\x1f\x7f]+", " ", text).encode("ascii", "replace").decode()
    if line:
        text = text.replace("\\", "/")
    return text[:length].strip()
