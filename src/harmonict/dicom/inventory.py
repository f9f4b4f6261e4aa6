"""What is in a folder: every CT series with its protocol, and what was left out and why."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pandas as pd
from pydicom import Dataset
from pydicom.uid import MediaStorageDirectoryStorage, RTStructureSetStorage, SegmentationStorage

from harmonict.core import Geometry, HarmonictError, ScanProtocol, Series
from harmonict.core.cohort import cohort_table, read_cohort
from harmonict.dicom.read import (
    Slice,
    check_one_series,
    kernel_name,
    looks_like_dicom,
    not_ct,
    open_dicom,
    quiet,
    read_series,
    series_name,
    series_protocol,
    slices_of,
    stack,
    text,
)
from harmonict.physics.mtf import skin_air_mtf
from harmonict.physics.nps import uniform_noise_sd
from harmonict.scale import map_series
from harmonict.volumes import read_volume, volume_format, volume_grid, volume_stem

# What the first pass keeps of a header; the pixels are not read.
_TAGS = """SpecificCharacterSet ImageType SOPClassUID SOPInstanceUID Modality Manufacturer ManufacturerModelName
PatientID BodyPartExamined SliceThickness KVP SpacingBetweenSlices ReconstructionDiameter ExposureTime XRayTubeCurrent
Exposure ExposureInuAs ExposureTimeInuS XRayTubeCurrentInuA ConvolutionKernel CTDIvol StudyInstanceUID
SeriesInstanceUID SeriesNumber InstanceNumber ImagePositionPatient ImageOrientationPatient FrameOfReferenceUID
NumberOfFrames Rows Columns PixelSpacing ReconstructionAlgorithm SharedFunctionalGroupsSequence
PerFrameFunctionalGroupsSequence""".split()


@dataclass(frozen=True)
class FoundSeries:
    """One series that can be read.

    key: unique in its inventory, the same in every run: the SeriesInstanceUID (a kernel's name follows where one
        series holds several), or the path of a volume file.
    paths: its files; format: dicom, nifti, nrrd or mha. shape and geometry: (z, y, x), as `read` will give them.
    """

    key: str
    patient: str
    series_uid: str
    name: str
    paths: tuple[Path, ...]
    format: str
    protocol: ScanProtocol
    shape: tuple[int, ...]
    geometry: Geometry
    is_volume: bool = True
    body_part: str = ""
    frame_of_reference_uid: str = ""
    slicewise: bool = False

    @property
    def path(self) -> Path:
        """Its file where it is one, else the folder that holds all of its files."""
        return _common(self.paths)

    def row(self) -> dict[str, object]:
        """Columns of the cohort table that the header knows."""
        z, y, x = self.geometry.spacing_mm
        return {
            "path": str(self.path),
            "patient": self.patient,
            "series": self.series_uid,
            "format": self.format,
            "role": "source",
            **self.protocol.as_dict(),
            "slices": self.shape[0],
            "rows": self.shape[1],
            "columns": self.shape[2],
            "spacing_z_mm": z if self.is_volume else None,
            "spacing_y_mm": y,
            "spacing_x_mm": x,
            "body_part": self.body_part or None,
            "state": "found",
        }

    def read(self, *, spacing_mm: float | tuple[float, float] | None = None) -> Series:
        """The Series in HU. spacing_mm: in-plane spacing that overrides a lying header."""
        if self.format != "dicom":
            return read_volume(self.paths[0], spacing_mm=spacing_mm)
        series = read_series(self.paths, slicewise=self.slicewise)
        if spacing_mm is None:
            return series
        y, x = spacing_mm if isinstance(spacing_mm, tuple) else (spacing_mm, spacing_mm)
        grid = series.geometry
        return replace(series, geometry=Geometry(grid.origin_mm, (grid.spacing_mm[0], y, x), grid.direction))


@dataclass(frozen=True)
class LeftOut:
    """Files that are images or DICOM but no series to work on, and why."""

    paths: tuple[Path, ...]
    reason: str
    patient: str = ""
    series_uid: str = ""
    format: str = "dicom"

    def row(self) -> dict[str, object]:
        """Columns of the cohort table: state `left_out` and the reason."""
        return {
            "path": str(_common(self.paths)),
            "patient": self.patient or None,
            "series": self.series_uid or None,
            "format": self.format,
            "state": "left_out",
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Inventory:
    """What a path holds. found and left_out are sorted by path; masks are RTSTRUCT and SEG files, which are also
    listed as left out; skipped_files counts the files that are neither DICOM nor a volume."""

    found: list[FoundSeries] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    skipped_files: int = 0

    def rows(self) -> list[dict[str, object]]:
        """Rows of the cohort table, found ones first."""
        return [f.row() for f in self.found] + [f.row() for f in self.left_out]


@quiet()
def find_series(path: str | Path, *, slicewise: bool = False) -> Inventory:
    """Find every CT series in a file or a folder tree, from the headers alone.

    DICOM files are known by their content, volumes by their name (.nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd). Files and
    folders whose name begins with a dot are passed over. A damaged or unfit series is a row of `left_out`, never an
    error. A cohort table (.csv, .parquet) stands for its rows of role source or target, or of no role. slicewise: as in
    `read_series`. Raises HarmonictError where the path is not there.
    """
    path = Path(path)
    if path.suffix.lower() in (".csv", ".parquet"):
        return _from_cohort(path, slicewise)
    if not path.exists():
        raise HarmonictError(f"no file or folder at {path}")
    found: list[FoundSeries] = []
    left_out: list[LeftOut] = []
    files = _files(path, left_out) if path.is_dir() else [path]
    masks: list[Path] = []
    groups: dict[str, list[tuple[Path, Dataset]]] = defaultdict(list)
    others: dict[tuple[str, str], list[tuple[Path, Dataset]]] = defaultdict(list)
    skipped = 0
    for file in files:
        kind = volume_format(file)
        try:
            if kind is not None and file.is_file():
                found.append(_volume(file, kind))
                continue
            if not file.is_file() or not looks_like_dicom(file):  # a pipe would wait for ever
                skipped += 1
                continue
            ds = open_dicom(file, tags=_TAGS)
        except HarmonictError as error:
            left_out.append(LeftOut((file,), str(error), format=kind or "dicom"))
            if str(error).endswith("taken as a mask"):
                masks.append(file)
            continue
        except OSError as error:
            left_out.append(LeftOut((file,), f"cannot read {file}: {error.strerror}"))
            continue
        sop_class = text(ds, "SOPClassUID")
        if _is_dicomdir(ds):
            skipped += 1
            continue
        if sop_class in (RTStructureSetStorage, SegmentationStorage):
            masks.append(file)
        reason = _set_aside(ds)
        uid = text(ds, "SeriesInstanceUID")
        if reason:
            others[uid or str(file.parent), reason].append((file, ds))
        else:
            groups[uid or str(file.parent)].append((file, ds))
    for (_, reason), members in others.items():
        left_out.append(_left_out([p for p, _ in members], reason, members[0][1]))
    for uid, members in groups.items():
        _sort_out(uid, members, slicewise, found, left_out)
    found.sort(key=lambda f: (str(f.paths[0]), f.key))
    left_out.sort(key=lambda f: str(f.paths[0]))
    return Inventory(found=found, left_out=left_out, masks=sorted(masks), skipped_files=skipped)


def inspect(
    path: str | Path,
    *,
    measure: bool = True,
    slicewise: bool = False,
    jobs: int = 1,
    spacing_mm: float | tuple[float, float] | None = None,
    progress: Callable[[int, int, dict[str, object]], None] | None = None,
) -> pd.DataFrame:
    """Cohort table of everything in a path, found series first, then what was left out and why.

    measure: read the pixels too and fill noise_hu (HU SD in uniform tissue) and f50_per_mm (MTF at the skin); where
    one cannot be measured it stays empty and `reason` says why. A series whose pixels cannot be read is left out.
    jobs: processes. spacing_mm: in-plane spacing that overrides a lying header. progress: called with (done, all, row).
    The number of files that were neither DICOM nor a volume is `table.attrs["skipped_files"]`.
    """
    inventory = find_series(path, slicewise=slicewise)
    rows: list[dict[str, object]] = []
    if not measure:
        rows = [found.row() for found in inventory.found]
        for row in rows if spacing_mm is not None else ():
            row["spacing_y_mm"], row["spacing_x_mm"] = _pair(spacing_mm)
    else:
        look = partial(measured_row, spacing_mm=spacing_mm)
        for index, result in map_series(look, inventory.found, jobs=jobs):
            row = {} if isinstance(result, HarmonictError) else result
            if isinstance(result, HarmonictError):
                row = {**inventory.found[index].row(), "state": "left_out", "reason": str(result)}
            rows.append({**row, "order": index})
            if progress:
                progress(len(rows), len(inventory.found), row)
        rows.sort(key=lambda row: (row["state"] != "found", row.pop("order")))
    table = cohort_table(rows + [left.row() for left in inventory.left_out])
    table.attrs["skipped_files"] = inventory.skipped_files
    return table


def measured_row(found: FoundSeries, spacing_mm: float | tuple[float, float] | None = None) -> dict[str, object]:
    """The row of one series with its noise and its MTF, measured on its pixels."""
    row = found.row()
    try:
        series = found.read(spacing_mm=spacing_mm)
    except HarmonictError as error:
        return {**row, "state": "left_out", "reason": str(error)}
    row["spacing_y_mm"], row["spacing_x_mm"] = series.pixel_mm
    notes = []
    for column, measured in (
        ("noise_hu", lambda: uniform_noise_sd(series)),
        ("f50_per_mm", lambda: skin_air_mtf(series).f50_per_mm),
    ):
        try:
            row[column] = float(measured())
        except HarmonictError as error:
            notes.append(f"{column}: {error}")
    return {**row, "reason": "; ".join(notes) or None}


def _sort_out(
    uid: str,
    members: list[tuple[Path, Dataset]],
    slicewise: bool,
    found: list[FoundSeries],
    left_out: list[LeftOut],
) -> None:
    """Put the CT files of one SeriesInstanceUID among the found or the left out; several kernels are several series."""
    by_kernel: dict[str | None, list[tuple[Path, Dataset, list[Slice]]]] = defaultdict(list)
    for path, ds in members:
        try:
            slices = slices_of(ds, path)
        except HarmonictError as error:
            # one unreadable slice leaves a hole: the whole series goes, with the reason that began it
            left_out.append(_left_out([p for p, _ in members], str(error), ds))
            return
        by_kernel[kernel_name(slices[0].header)].append((path, ds, slices))
    for kernel, part in by_kernel.items():
        slices = [one for _, _, several in part for one in several]
        paths = [path for path, _, _ in part]
        first = slices[0].header
        name = series_name(slices[0])
        try:
            order, geometry, is_volume = stack(slices, name, slicewise=slicewise)
            slices = [slices[k] for k in order]
            check_one_series(slices, name)
        except HarmonictError as error:
            folders = sorted({path.parent for path in paths})
            reason = str(error)
            if len(folders) > 1 and "at the same position" in reason:
                where = ", ".join(map(str, folders[:2]))
                reason = f"{len(folders)} folders hold this one series ({where}): name one of them; {reason}"
            left_out.append(_left_out(paths, reason, part[0][1]))
            continue
        found.append(
            FoundSeries(
                key=f"{uid} {kernel}" if len(by_kernel) > 1 else uid,
                patient=text(first, "PatientID"),
                series_uid=uid,
                name=name,
                paths=tuple(dict.fromkeys(one.path for one in slices)),
                format="dicom",
                protocol=series_protocol([one.header for one in slices]),
                shape=(len(slices), *slices[0].shape),
                geometry=geometry,
                is_volume=is_volume,
                body_part=text(first, "BodyPartExamined"),
                frame_of_reference_uid=text(first, "FrameOfReferenceUID"),
                slicewise=slicewise,
            )
        )


def _from_cohort(path: Path, slicewise: bool) -> Inventory:
    table = read_cohort(path)
    wanted = table[table["role"].fillna("source").isin(("source", "target")) & (table["state"] != "left_out")]
    parts = [find_series(place, slicewise=slicewise) for place in dict.fromkeys(wanted["path"].dropna())]
    return Inventory(
        found=[found for part in parts for found in part.found],
        left_out=[left for part in parts for left in part.left_out],
        masks=sorted({mask for part in parts for mask in part.masks}),
        skipped_files=sum(part.skipped_files for part in parts),
    )


def _volume(path: Path, kind: str) -> FoundSeries:
    shape, geometry, dtype = volume_grid(path)
    if dtype in ("uint8", "int8"):
        raise HarmonictError(f"{path}: {dtype} values hold no HU; taken as a mask")
    return FoundSeries(
        key=str(path.resolve()),
        patient=volume_stem(path),
        series_uid=path.name,
        name=path.name,
        paths=(path,),
        format=kind,
        protocol=ScanProtocol(),
        shape=shape,
        geometry=geometry,
    )


def _set_aside(ds: Dataset) -> str | None:
    """Why a DICOM file is not a CT slice, in words, or None where it may be one."""
    sop_class = text(ds, "SOPClassUID")
    if sop_class == RTStructureSetStorage:
        return "RTSTRUCT: contours, not images (used as masks)"
    if sop_class == SegmentationStorage:
        return "SEG: a segmentation, not an image (used as masks)"
    return not_ct(ds)


def _left_out(paths: list[Path], reason: str, ds: Dataset) -> LeftOut:
    return LeftOut(tuple(sorted(paths)), reason, text(ds, "PatientID"), text(ds, "SeriesInstanceUID"))


def _is_dicomdir(ds: Dataset) -> bool:
    classes = text(ds, "SOPClassUID"), text(getattr(ds, "file_meta", Dataset()), "MediaStorageSOPClassUID")
    return MediaStorageDirectoryStorage in classes


def _files(folder: Path, left_out: list[LeftOut]) -> list[Path]:
    """All files below a folder, sorted; a folder that cannot be listed is a row of `left_out`."""

    def refused(error: OSError) -> None:
        left_out.append(LeftOut((Path(error.filename, "*"),), f"cannot list {error.filename}: {error.strerror}"))

    files = []
    for place, folders, names in os.walk(folder, onerror=refused):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        files += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return files


def _common(paths: tuple[Path, ...]) -> Path:
    return paths[0] if len(paths) == 1 else Path(os.path.commonpath([p.parent for p in paths]))


def _pair(spacing_mm: float | tuple[float, float] | None) -> tuple[float, float]:
    return spacing_mm if isinstance(spacing_mm, tuple) else (float(spacing_mm or 0), float(spacing_mm or 0))
