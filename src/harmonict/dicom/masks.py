"""RTSTRUCT and DICOM SEG: masks on the grid of a CT series, and copies that follow it to its derived series.

A mask belongs to the series whose images it references. It is also right for a series that was derived from those
images voxel by voxel (their UIDs stand in its Source Image Sequence, and the Frame of Reference is the same). Nothing
else is accepted: a mask is never moved, resampled or interpolated here.
"""

from __future__ import annotations

import copy
import os
import secrets
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, CTImageStorage

from harmonict.core import Geometry, HarmonictError, Series
from harmonict.dicom.read import DicomSource
from harmonict.dicom.write import code, encode_file, hashed_uid, lock_file, reason_not_written, refuse_source_folder
from harmonict.volumes import read_mask

RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
LABELMAP = "1.2.840.10008.5.1.4.1.1.66.7"
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")

# A contour may lie this far from the plane of its slice, in slices: planning systems round positions to 0.1 mm.
OFF_PLANE = 0.25
# A SEG voxel may lie this far from a voxel of the series, in voxels.
OFF_GRID = 0.05


def read_masks(path: str | Path, series: Series, roi: str | None = None) -> dict[str, np.ndarray]:
    """ROI name -> bool (z, y, x) on the grid of `series`, from RTSTRUCT, DICOM SEG, NIfTI, NRRD or MHA.

    roi: only this one (exact name, else without regard to case; in NIfTI, NRRD and MHA the label's number, which may
    be left out where there is only one, called by the file's name then). Raises HarmonictError where the file is no
    mask, the ROI is not in it (those that are get listed), or the mask belongs to another series.
    """
    path = Path(path)
    if path.name.lower().endswith(VOLUME_SUFFIXES):
        if roi is not None and not roi.isdecimal():
            raise HarmonictError(f"{path}: a label image has no ROI names; give the label's number instead of {roi!r}")
        name = roi or path.name.split(".")[0]
        return {name: read_mask(path, label=None if roi is None else int(roi), like=series)}
    with _damage_named(path):
        ds = _open(path)
        wanted = None if roi is None else _find(path, roi, list(_rois(ds)))
        return _rtstruct(ds, path, series, wanted) if ds.SOPClassUID == RTSTRUCT else _seg(ds, path, series, wanted)


def read_rtstruct(path: str | Path, series: Series) -> dict[str, np.ndarray]:
    """All ROIs with closed contours of an RTSTRUCT -> bool (z, y, x) on the grid of `series` (PS3.3 C.8.8.6).

    A voxel is in where its centre is inside an odd number of the slice's contours, so holes work whether they are
    drawn as inner contours or through a keyhole. Raises HarmonictError where the file is no RTSTRUCT, belongs to other
    images, or a contour lies between slices or on another slice than the one that it names.
    """
    with _damage_named(path):
        return _rtstruct(_open(Path(path), RTSTRUCT), Path(path), series, None)


def read_seg(path: str | Path, series: Series) -> dict[str, np.ndarray]:
    """All segments of a DICOM SEG (BINARY, FRACTIONAL from 0.5 on, LABELMAP) -> bool (z, y, x) on the series' grid.

    Raises HarmonictError where the file is no SEG, belongs to other images, or lies on another grid.
    """
    with _damage_named(path):
        return _seg(_open(Path(path), SEG, LABELMAP), Path(path), series, None)


def roi_names(path: str | Path) -> list[str]:
    """The ROI or segment names of an RTSTRUCT or SEG, as `read_masks` calls them, in the order of the file."""
    with _damage_named(path):
        return list(_rois(_open(Path(path))))


def mask_references(path: str | Path, series_uid: str) -> bool:
    """True where an RTSTRUCT or SEG says that it was made on the images of that series."""
    with _damage_named(path):
        return series_uid in _referenced_series(_open(Path(path)))


def write_masks(
    paths: Iterable[str | Path], source_series: Series, derived: str | Path | Sequence[Dataset], out_folder: str | Path
) -> list[Path]:
    """Copy RTSTRUCT and SEG files of `source_series` so that they reference the series derived from it.

    derived: the folder that `write_series` wrote, or the headers of its images. The copies keep contours, pixels and
    Frame of Reference; they get new SOP Instance and Series UIDs that a rerun gives again. Each file appears whole or
    not at all, under its own name in `out_folder`. Raises HarmonictError where a mask does not belong to
    `source_series`, an image that it references has no derived image, or the folder cannot be written.
    """
    files = [Path(p) for p in paths]
    out_folder = Path(out_folder)
    refuse_source_folder(out_folder, tuple(files))
    headers = _headers_in(Path(derived)) if isinstance(derived, str | Path) else list(derived)
    images: dict[tuple[str, int | None], str] = {}
    for header in headers:
        for item in header.get("SourceImageSequence") or []:
            if _image_key(item) in images:
                raise HarmonictError("several derived images come from one source image; a mask cannot tell them apart")
            images[_image_key(item)] = str(header.SOPInstanceUID)
    if not images:
        raise HarmonictError("the derived images name no source images; expected a series that harmonict wrote")
    copies: dict[Path, Dataset] = {}
    for path in files:
        with _damage_named(path):
            ds = _open(path)
            _check_belongs(ds, path, source_series)
            _redirect(ds, path, images, str(headers[0].SeriesInstanceUID), headers[0])
        target = out_folder / path.name
        while target in copies:
            target = target.with_name(f"{target.stem}-2{target.suffix}")
        copies[target] = ds
    for target, ds in copies.items():
        _save(ds, target)
    return list(copies)


def write_seg(masks: dict[str, np.ndarray], headers: Sequence[Dataset], path: str | Path) -> Path:
    """Write bool masks (z, y, x), one segment each, as a BINARY DICOM SEG of the classic CT images `headers`.

    headers: one per slice in the order of the masks. The same masks and images give the same UIDs and dates.
    Raises HarmonictError where shapes differ, nothing is marked, or the file cannot be written.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes

    first = headers[0]
    shape = (len(headers), int(first.Rows), int(first.Columns))
    for name, mask in masks.items():
        if mask.shape != shape or mask.dtype != bool:
            raise HarmonictError(f"mask {name}: expected bool {shape}, got {mask.dtype} {mask.shape}")
    if not any(mask.any() for mask in masks.values()):
        raise HarmonictError(f"{path}: no voxel is marked; a SEG needs at least one")
    key = (str(first.SeriesInstanceUID), *masks, *(np.packbits(m).tobytes().hex() for m in masks.values()))
    segments = [
        hd.seg.SegmentDescription(
            segment_number=n,
            segment_label=name,
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for n, name in enumerate(masks, 1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # patient names without a caret
        seg = hd.seg.Segmentation(
            source_images=list(headers),
            pixel_array=np.stack(list(masks.values()), axis=-1).astype(np.uint8),
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=hashed_uid("seg series", *key),
            series_number=int(first.get("SeriesNumber") or 0) + 1,
            sop_instance_uid=hashed_uid("seg", *key),
            instance_number=1,
            manufacturer="harmonict",
            manufacturer_model_name="harmonict",
            software_versions="1",
            device_serial_number="1",
        )
    seg["ContentDate"].value = first.get("StudyDate") or "19000101"
    seg["ContentTime"].value = first.get("StudyTime") or "000000"
    for keyword in ("InstanceCreationDate", "InstanceCreationTime", "SeriesDate", "SeriesTime"):
        seg.pop(keyword, None)
    for item in _items(seg):  # highdicom's own clock and random numbers
        item.pop("ContributionDateTime", None)
        if "DimensionOrganizationUID" in item:
            item.DimensionOrganizationUID = UID(hashed_uid("seg dimensions", *key))
    _save(seg, Path(path))
    return Path(path)


# --- RTSTRUCT ---------------------------------------------------------------------------------------------------------


def _rtstruct(ds: Dataset, path: Path, series: Series, wanted: str | None) -> dict[str, np.ndarray]:
    _check_belongs(ds, path, series)
    slices = _slices_by_uid(series)
    contours = {int(item.ReferencedROINumber): item for item in ds.get("ROIContourSequence") or []}
    masks = {}
    for name, roi in _rois(ds).items():
        if wanted is not None and name != wanted:
            continue
        item = contours.get(int(roi.ROINumber))
        closed = [c for c in (item.get("ContourSequence") or [] if item else []) if _is_closed(c)]
        if not closed:
            if wanted is not None:
                raise HarmonictError(f"{path}: ROI {name} has no closed contours, so it is no region")
            continue
        masks[name] = _rasterise(closed, f"{path}: ROI {name}", series, slices)
    if not masks:
        raise HarmonictError(f"{path}: no ROI with closed contours")
    return masks


def _is_closed(contour: Dataset) -> bool:
    return str(contour.get("ContourGeometricType", "")).startswith("CLOSED") and "ContourData" in contour


def _rasterise(contours: list[Dataset], what: str, series: Series, slices: Slices) -> np.ndarray:
    depth, rows, columns = series.hu.shape
    turns: dict[int, np.ndarray] = {}  # slice -> where the number of enclosing contours changes, going along a row
    for contour in contours:
        z, yx = _place(_points(contour, what), contour, what, series, slices)
        if not 0 <= z < depth:
            raise HarmonictError(f"{what}: a contour lies outside the series, {abs(z)} slices from its first")
        grid = turns.setdefault(z, np.zeros((rows, columns + 1), np.int32))
        _count_crossings(yx, grid)
    mask = np.zeros(series.hu.shape, bool)
    for z, grid in turns.items():
        mask[z] = (np.cumsum(grid, axis=1)[:, :columns] & 1).astype(bool)
    if not mask.any():
        raise HarmonictError(f"{what}: no voxel centre lies inside its contours; is it of another image?")
    return mask


def _points(contour: Dataset, what: str) -> np.ndarray:
    """Contour Data (n, 3) in mm, from the bytes: quick, and right for those over 64 kB, stored as UN."""
    value = contour.get_item("ContourData").value  # type: ignore[union-attr]
    try:
        text = value.decode("ascii").rstrip("\0 ").split("\\") if isinstance(value, bytes) else value
        points = np.array(text, float)
    except (ValueError, TypeError):
        raise HarmonictError(f"{what}: a contour holds something else than numbers") from None
    if points.size < 9 or points.size % 3 or not np.all(np.isfinite(points)):
        raise HarmonictError(f"{what}: a contour has {points.size} coordinates; expected three or more points")
    return points.reshape(-1, 3)


def _place(points: np.ndarray, contour: Dataset, what: str, series: Series, slices: Slices) -> tuple[int, np.ndarray]:
    """Slice and in-plane index coordinates (n, 2) of a contour; its plane and the image it names must agree."""
    named = _named(contour.get("ContourImageSequence") or [], slices)
    if contour.get("ContourImageSequence") and not named:
        raise HarmonictError(f"{what}: a contour references an image that is not among the slices of {series.name}")
    if series.is_volume:
        index = series.geometry.to_index(points)
        z = int(np.rint(np.median(index[:, 0])))
    else:
        z, index = _nearest_image(points, series, named)
    off = float(np.abs(index[:, 0] - z).max())
    if off > OFF_PLANE:
        raise HarmonictError(
            f"{what}: a contour lies {off:.2f} slices off the nearest slice, {z + 1}; it fits no slice"
        )
    if named and z not in named:
        raise HarmonictError(f"{what}: a contour lies on slice {z + 1} but references slice {min(named) + 1}")
    return z, index[:, 1:]


def _nearest_image(points: np.ndarray, series: Series, named: set[int]) -> tuple[int, np.ndarray]:
    """For slices that form no volume: the image whose plane the contour lies in, each with its own grid."""
    found = []
    for z in sorted(named) or range(len(series.hu)):
        index = _grid(_source(series).headers[z]).to_index(points)
        found.append((float(np.abs(index[:, 0]).max()), z, index))
    _, z, index = min(found, key=lambda f: f[:2])
    return z, index + np.array([z, 0, 0])


def _count_crossings(yx: np.ndarray, grid: np.ndarray) -> None:
    """Add one polygon, index coordinates (n, 2), to `grid` (rows, columns + 1).

    Every edge crosses the lines of voxel centres y = row with low <= row < high; at the first voxel centre that is
    not left of the crossing the number of contours around the voxel changes.
    """
    rows, columns = grid.shape[0], grid.shape[1] - 1
    (y0, x0), (y1, x1) = yx.T, np.roll(yx, -1, axis=0).T
    first = np.clip(np.ceil(np.minimum(y0, y1)), 0, rows).astype(int)
    stop = np.clip(np.ceil(np.maximum(y0, y1)), 0, rows).astype(int)
    count = stop - first
    edge = np.repeat(np.arange(len(yx)), count)
    row = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    x = x0[edge] + (row - y0[edge]) / (y1 - y0)[edge] * (x1 - x0)[edge]
    np.add.at(grid, (row, np.clip(np.ceil(x), 0, columns).astype(int)), 1)


# --- SEG --------------------------------------------------------------------------------------------------------------


def _seg(ds: Dataset, path: Path, series: Series, wanted: str | None) -> dict[str, np.ndarray]:
    _check_belongs(ds, path, series)
    kind = str(ds.get("SegmentationType", ""))
    names = {int(item.SegmentNumber): name for name, item in _rois(ds).items()}
    masks = {name: np.zeros(series.hu.shape, bool) for name in names.values() if wanted in (None, name)}
    try:
        pixels = ds.pixel_array
    except Exception as error:
        raise HarmonictError(f"{path}: its pixels cannot be decoded ({type(error).__name__})") from error
    pixels = pixels.reshape(-1, int(ds.Rows), int(ds.Columns))
    shared = (ds.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    slices = _slices_by_uid(series)
    for groups, frame in zip(ds.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        where = _frame_slot(groups, shared, frame.shape, path, series, slices)
        if kind == "LABELMAP":
            marked = {number: frame == number for number in names}
        else:
            item = _group(groups, shared, "SegmentIdentificationSequence", path)
            inside = frame >= 0.5 * int(ds.MaximumFractionalValue) if kind == "FRACTIONAL" else frame > 0
            marked = {int(item.ReferencedSegmentNumber): inside}
        for number, inside in marked.items():
            if names.get(number) in masks:
                masks[names[number]][where] |= inside
    return masks


def _frame_slot(groups: Dataset, shared: Dataset, shape, path: Path, series: Series, slices: Slices):
    """Index (z, rows, columns) of the series that a frame covers; its voxels must be voxels of the series."""
    plane = Dataset()
    plane.ImagePositionPatient = _group(groups, shared, "PlanePositionSequence", path).ImagePositionPatient
    plane.ImageOrientationPatient = _group(groups, shared, "PlaneOrientationSequence", path).ImageOrientationPatient
    plane.PixelSpacing = _group(groups, shared, "PixelMeasuresSequence", path).PixelSpacing
    rows, columns = shape
    grid = _grid(plane)
    corners = grid.to_patient(np.array([[0, 0, 0], [0, rows - 1, 0], [0, 0, columns - 1]]))
    if series.is_volume:
        index = series.geometry.to_index(corners)
    else:
        sources = [i for d in groups.get("DerivationImageSequence") or [] for i in d.get("SourceImageSequence") or []]
        named = _named(sources, slices)
        _, index = _nearest_image(corners, series, named)
    z, y, x = np.rint(index[0]).astype(int)
    expected = np.array([[z, y, x], [z, y + rows - 1, x], [z, y, x + columns - 1]])
    off = float(np.abs(index - expected).max())
    if off > OFF_GRID:
        raise HarmonictError(f"{path}: a frame lies {off:.2f} voxels off the grid of {series.name}; resample it first")
    inside = 0 <= z < series.hu.shape[0] and y >= 0 and x >= 0
    if not inside or y + rows > series.hu.shape[1] or x + columns > series.hu.shape[2]:
        raise HarmonictError(f"{path}: a frame reaches outside the grid of {series.name}")
    return z, slice(y, y + rows), slice(x, x + columns)


def _group(groups: Dataset, shared: Dataset, keyword: str, path: Path) -> Dataset:
    for place in (groups, shared):
        if place.get(keyword):
            return place[keyword].value[0]
    raise HarmonictError(f"{path}: a frame has no {keyword}; it cannot be placed")


# --- what belongs together --------------------------------------------------------------------------------------------


def _check_belongs(ds: Dataset, path: Path, series: Series) -> None:
    """Raise HarmonictError, saying what differs, unless the mask references this series or the source of it."""
    headers = _source(series).headers
    frame, frames = str(headers[0].get("FrameOfReferenceUID") or ""), _frames_of_reference(ds)
    if frames and frame not in frames:
        raise HarmonictError(
            f"{path}: its Frame of Reference {min(frames)} is not that of {series.name}, {frame or 'none'}; "
            "it belongs to another examination"
        )
    known = {uid for uid, _ in _slices_by_uid(series)}
    referenced = {str(i.ReferencedSOPInstanceUID) for i in _image_items(ds)}
    if referenced and not referenced & known:
        raise HarmonictError(
            f"{path}: none of the {len(referenced)} images that it references is in {series.name} or is a source of "
            "it; give the mask of this series"
        )
    own = {str(headers[0].get("SeriesInstanceUID"))}
    named = _referenced_series(ds)
    if not referenced and named and not named & own:
        raise HarmonictError(f"{path}: it references series {min(named)}, not that of {series.name}, {min(own)}")
    if not frames and not referenced and not named:
        raise HarmonictError(f"{path}: it references no images and no Frame of Reference; it cannot be matched")


def _source(series: Series) -> DicomSource:
    if not isinstance(series.source, DicomSource):
        raise HarmonictError(
            f"{series.name or 'series'}: was not read from DICOM; a DICOM mask cannot be matched to it"
        )
    return series.source


Slices = dict[tuple[str, int | None], set[int]]


def _slices_by_uid(series: Series) -> Slices:
    """(SOP Instance UID, frame number or None) -> slices, for the series' own images and those it was made from.

    One image is one slice, but some software gives all slices one UID.
    """
    slices: Slices = {}
    source = _source(series)
    for z, header in enumerate(source.headers):
        frame = None if source.frames is None else source.frames[z]
        slices.setdefault((str(header.get("SOPInstanceUID")), frame), set()).add(z)
        for item in header.get("SourceImageSequence") or []:
            if "DERIVED" in (header.get("ImageType") or []) and item.get("SpatialLocationsPreserved") != "NO":
                slices.setdefault(_image_key(item), set()).add(z)
    return slices


def _named(items: Iterable[Dataset], slices: Slices) -> set[int]:
    return set().union(*(slices.get(_image_key(item), set()) for item in items))


def _image_key(item: Dataset) -> tuple[str, int | None]:
    return str(item.get("ReferencedSOPInstanceUID")), _frame_number(item)


def _frame_number(item: Dataset) -> int | None:
    number = item.get("ReferencedFrameNumber")
    if number is None:
        return None
    return int(number[0]) if isinstance(number, Sequence) and not isinstance(number, str) else int(number)


def _items(ds: Dataset) -> Iterator[Dataset]:
    """All sequence items below `ds`, at any depth; other elements stay raw, which is what makes this quick."""
    for tag in list(ds.keys()):
        element = ds.get_item(tag)
        if element.VR == "SQ" or (element.VR is None and dictionary_has_tag(tag) and dictionary_VR(tag) == "SQ"):
            for item in ds[tag].value or []:
                yield item
                yield from _items(item)


def _image_items(ds: Dataset) -> list[Dataset]:
    """The items that reference CT images: not those that reference studies, structure sets or segmentations."""
    images = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
    return [i for i in _items(ds) if "ReferencedSOPInstanceUID" in i and i.get("ReferencedSOPClassUID") in images]


def _frames_of_reference(ds: Dataset) -> set[str]:
    if ds.SOPClassUID != RTSTRUCT:
        return {str(ds.FrameOfReferenceUID)} if ds.get("FrameOfReferenceUID") else set()
    items = [*(ds.get("ReferencedFrameOfReferenceSequence") or [])]
    found = {str(i.FrameOfReferenceUID) for i in items if i.get("FrameOfReferenceUID")}
    rois = ds.get("StructureSetROISequence") or []
    return found | {str(r.ReferencedFrameOfReferenceUID) for r in rois if r.get("ReferencedFrameOfReferenceUID")}


def _referenced_series(ds: Dataset) -> set[str]:
    return {str(i.SeriesInstanceUID) for i in _items(ds) if i.get("SeriesInstanceUID")}


def _rois(ds: Dataset) -> dict[str, Dataset]:
    """Name -> item of the ROI or segment; a second one of the same name is called "name #number"."""
    if ds.SOPClassUID == RTSTRUCT:
        entries = [(i.get("ROIName"), i.get("ROINumber"), i) for i in ds.get("StructureSetROISequence") or []]
    else:
        entries = [(i.get("SegmentLabel"), i.get("SegmentNumber"), i) for i in ds.get("SegmentSequence") or []]
    rois: dict[str, Dataset] = {}
    for name, number, item in entries:
        label = str(name or f"#{number}").strip()
        rois[f"{label} #{number}" if label in rois else label] = item
    return rois


def _find(path: Path, roi: str, names: list[str]) -> str:
    matches = [n for n in names if n == roi] or [n for n in names if n.casefold() == roi.casefold()]
    if len(matches) != 1:
        raise HarmonictError(f"{path}: no ROI {roi!r}; there are: {', '.join(names) or 'none'}")
    return matches[0]


def _grid(plane: Dataset) -> Geometry:
    iop = np.asarray(plane.ImageOrientationPatient, float)
    row, column = iop[:3], iop[3:]
    y_mm, x_mm = (float(v) for v in plane.PixelSpacing)
    return Geometry(
        tuple(float(v) for v in plane.ImagePositionPatient),  # type: ignore[arg-type]
        (1.0, y_mm, x_mm),
        tuple(tuple(float(v) for v in d) for d in (np.cross(row, column), column, row)),  # type: ignore[arg-type]
    )


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def _damage_named(path: str | Path) -> Iterator[None]:
    """pydicom raises whatever damaged bytes provoke; the user hears which file it was."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except HarmonictError:
        raise
    except Exception as error:
        raise HarmonictError(f"{path}: damaged or incomplete DICOM file ({type(error).__name__})") from error


def _open(path: Path, *classes: str) -> Dataset:
    expected = "an RTSTRUCT or DICOM SEG" if not classes else "an RTSTRUCT" if classes[0] == RTSTRUCT else "a DICOM SEG"
    try:
        ds = dcmread(path)
        found = str(ds.get("SOPClassUID", "nothing"))
    except OSError as error:
        raise HarmonictError(f"cannot read {path}: {error.strerror}") from None
    except (InvalidDicomError, EOFError, ValueError, KeyError, NotImplementedError):
        raise HarmonictError(f"{path} is no DICOM file; expected {expected}") from None
    if found not in (classes or (RTSTRUCT, SEG, LABELMAP)):
        name = UID(found).name if found[:1].isdigit() else found
        raise HarmonictError(f"{path} is {name}; expected {expected}")
    return ds


def _headers_in(folder: Path) -> list[Dataset]:
    tags = [
        "SOPInstanceUID",
        "SOPClassUID",
        "SeriesInstanceUID",
        "SourceImageSequence",
        "ContributingEquipmentSequence",
    ]
    paths = sorted(folder.glob("*.dcm"))
    if not paths:
        raise HarmonictError(f"{folder} holds no derived images (*.dcm)")
    return [dcmread(p, specific_tags=tags, stop_before_pixels=True) for p in paths]


def _redirect(
    ds: Dataset, path: Path, images: dict[tuple[str, int | None], str], series_uid: str, derived: Dataset
) -> None:
    """Make every reference to a source image or series one to its derived image or series."""
    old_class, old_uid, old_series = str(ds.SOPClassUID), str(ds.SOPInstanceUID), str(ds.SeriesInstanceUID)
    for item in _image_items(ds):
        uid = images.get(_image_key(item))
        if uid is None:
            raise HarmonictError(f"{path}: it references image {item.ReferencedSOPInstanceUID}, which was not derived")
        item.ReferencedSOPClassUID = CTImageStorage
        item.ReferencedSOPInstanceUID = UID(uid)
        item.pop("ReferencedFrameNumber", None)
    for item in _items(ds):
        if "SeriesInstanceUID" in item and any(
            k in item for k in ("ContourImageSequence", "ReferencedInstanceSequence")
        ):
            item.SeriesInstanceUID = UID(series_uid)
    ds.SOPInstanceUID = UID(hashed_uid("mask", old_uid, series_uid))
    ds.SeriesInstanceUID = UID(hashed_uid("mask series", old_series, series_uid))
    ds.SeriesDescription = f"{str(ds.get('SeriesDescription') or ds.Modality)[:40]} > harmonict"
    for keyword in ("InstanceCreationDate", "InstanceCreationTime", "InstanceCreatorUID", "DigitalSignaturesSequence"):
        ds.pop(keyword, None)
    if old_class == RTSTRUCT:
        before = Dataset()
        before.ReferencedSOPClassUID, before.ReferencedSOPInstanceUID = UID(old_class), UID(old_uid)
        ds.PredecessorStructureSetSequence = [before]
    equipment = [copy.deepcopy(i) for i in derived.get("ContributingEquipmentSequence") or []][-1:]
    for item in equipment:
        item.PurposeOfReferenceCodeSequence = [code("109103", "Modifying Equipment")]
        item.ContributionDescription = (
            "References moved to the harmonized images; regions unchanged. Research use only."
        )
    ds.ContributingEquipmentSequence = [*(ds.get("ContributingEquipmentSequence") or []), *equipment]
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID


def _save(ds: Dataset, path: Path) -> None:
    """Write beside, flush, rename; an existing file is replaced only by the same object."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.harmonict"
    try:
        if path.exists() and str(dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID) != ds.SOPInstanceUID:
            raise HarmonictError(f"{path} already exists and is another object; choose another output folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        data = encode_file(ds)
        with temporary.open("xb") as file:
            lock_file(file.fileno())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise HarmonictError(reason_not_written(path, error)) from error
        if isinstance(error, InvalidDicomError | AttributeError) and path.exists():
            raise HarmonictError(
                f"{path} already exists and is no DICOM object; choose another output folder"
            ) from error
        raise
