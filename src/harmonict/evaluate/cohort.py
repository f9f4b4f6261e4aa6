"""Feature and biomarker tables of many series: every rendition of a patient in the same regions, a row for each.

A series that fails is a row with its reason, never the end of the run. What was extracted before with the same files
and settings is not extracted again, also after the process was killed.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import ndimage

from harmonict import __version__
from harmonict.biomarkers import biomarkers
from harmonict.core import PROTOCOL_COLUMNS, Geometry, HarmonictError, ScanProtocol, Series, parse_protocol
from harmonict.core.cohort import COHORT_COLUMNS, read_cohort
from harmonict.core.files import write_whole
from harmonict.dicom.inventory import FoundSeries, Inventory, find_series
from harmonict.dicom.masks import mask_references, read_masks, roi_names
from harmonict.evaluate.image import body_mask
from harmonict.radiomics import FeatureSettings, crop_to_mask, extract_features, ibsi_features
from harmonict.radiomics.features import FAMILIES
from harmonict.radiomics.ibex import IbexSettings, ibex_features, ibex_table
from harmonict.radiomics.rois import Roi, random_rois
from harmonict.radiomics.table import KEYS, feature_columns
from harmonict.scale import map_series
from harmonict.volumes import read_mask, volume_format, volume_stem

FEATURE_SETS: dict[str, tuple[Any, Callable[..., dict[str, float]]]] = {
    "pyradiomics": (FeatureSettings, extract_features),
    "ibex": (IbexSettings, ibex_features),
    "ibsi": (FeatureSettings, ibsi_features),
}
WHOLE = "image body"
NODULE_MARGIN_MM = 3.0  # around a given nodule mask, so that K-means sees nodule and lung
EMPHYSEMA_GRADES = ((0.0, "none"), (0.06, "mild"), (0.14, "moderate"), (1.0, "severe"))  # up to and with this share

_ROW_FRONT = ("roi_kind", "state", "reason", "lung_from", "diagnostics_voxels")
_COHORT_FRONT = (
    *PROTOCOL_COLUMNS,
    *("role", "path", "series", "derived_from", "made_by", "spacing_z_mm", "spacing_y_mm", "spacing_x_mm"),
)
# what `harmonict harmonize` measured of a series
_QC_COLUMNS = (
    *("mean_change_hu", "sd_change_hu", "largest_change_hu", "source_f50_per_mm", "source_noise_hu"),
    *("clipped_voxels", "source_kernel"),
)

Progress = Callable[[int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Regions:
    """Where features are taken.

    names: ROIs of the masks, with * and ? as wildcards, without regard to case; none: all of them, or, where `random`
        or `whole` ask for something else, no mask at all. label: which label of NIfTI, NRRD and MHA masks.
    random: so many seeded boxes for each HU range, judged on the patient's reference image. whole: the patient's body.
    """

    names: tuple[str, ...] = ()
    label: int | None = None
    random: int = 0
    whole: bool = False
    seed: int = 0

    @property
    def from_masks(self) -> bool:
        return bool(self.names) or self.label is not None or not (self.random or self.whole)


@dataclass(frozen=True)
class Entry:
    """One series of a run. found: None where it cannot be worked on, `problem` says why. masks: (ROI or None, file).

    about: columns of the cohort table and of the user's own. root: the path of the command that it came from.
    """

    found: FoundSeries | None
    about: dict[str, Any]
    root: str
    masks: tuple[tuple[str | None, Path], ...] = ()
    problem: str = ""
    scan: str = ""

    @property
    def protocol(self) -> ScanProtocol:
        return ScanProtocol(**{name: self.about.get(name) for name in PROTOCOL_COLUMNS})  # type: ignore[arg-type]

    @property
    def patient(self) -> str:
        return str(self.about.get("patient") or Path(str(self.about["path"])).name)


@dataclass(frozen=True)
class Task:
    """All that a worker needs for one series."""

    entry: Entry
    regions: Regions
    feature_set: str
    settings: Any
    spacing_mm: tuple[float, float] | None
    reference: FoundSeries | None = None
    boxes: tuple[Roi, ...] = ()


# -- the two jobs ------------------------------------------------------------------------------------------------------


def cohort_features(
    paths: Sequence[str | Path],
    *,
    out: str | Path | None,
    regions: Regions,
    feature_set: str = "pyradiomics",
    values: Mapping[str, Any] | None = None,
    mask: str | Path | None = None,
    target_protocol: str | None = None,
    slicewise: bool = False,
    spacing_mm: tuple[float, float] | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The feature table of everything in `paths`: images, folders (a folder's own cohort.csv counts), cohort tables.

    One row per (patient, roi, scan). First the keys, roi_kind ("mask", "random", "image"), state ("done", "failed"),
    reason and what the cohort table says of the series (further numbers of it as `parameter_NAME`), then the features.
    scan: the kernel, or its model for a derived series; as much of thickness, dose, kVp, exposure and path as tells
    the renditions of every patient apart; or a column `scan` of the cohort table.
    out: .csv or .parquet, rewritten whole; beside it the same name with .json holds every parameter. Series whose rows
    it (or an unfinished run) already holds are not done again. None writes nothing.
    values: fields of `FeatureSettings` or `IbexSettings`. mask: for a single series. target_protocol: the scan on
    which random boxes are judged; by default the patient's series of role target, else truth, else its only one.
    `table.attrs`: "left_out" (what is no CT series, and why), "boxes" (a list of Roi for each reference image).
    Raises HarmonictError where nothing can be done at all.
    """
    if feature_set not in FEATURE_SETS:
        raise HarmonictError(f"unknown feature set {feature_set!r}; there are: {', '.join(FEATURE_SETS)}")
    if regions.random < 0:
        raise HarmonictError(f"the number of random ROIs must be 0 or more, got {regions.random}")
    out = _place(out)
    settings = _settings(feature_set, dict(values or {}), regions)
    entries, left_out = resolve(paths, slicewise=slicewise, jobs=jobs)
    if mask is not None:
        entries = _with_mask(entries, Path(mask))
    references = _references(entries, target_protocol, spacing_mm) if regions.random or regions.whole else {}
    entries = [replace(e, problem=e.problem or references.get(n, ("", None))[0]) for n, e in enumerate(entries)]
    tasks = [
        Task(e, regions, feature_set, settings, spacing_mm, references.get(n, ("", None))[1])
        for n, e in enumerate(entries)
    ]
    keys = [_key(task) for task in tasks]
    earlier = _earlier(out, keys)
    drawn = _draw_boxes([t for t, key in zip(tasks, keys, strict=True) if key not in earlier], jobs)
    work, results, boxes = [], dict[int, list[dict[str, Any]]](), dict[str, list[Roi]]()
    for n, (task, key) in enumerate(zip(tasks, keys, strict=True)):
        found = drawn.get(task.reference.key) if task.reference is not None else []
        if key in earlier:
            results[n] = earlier[key]
        elif task.entry.problem or isinstance(found, HarmonictError):
            results[n] = [_failed("-", task.entry.problem or f"the reference image of its ROIs: {found}")]
        else:
            work.append((n, replace(task, boxes=tuple(found or ()))))
            if task.reference is not None and regions.random:
                boxes[task.reference.name] = list(found or ())
    for done, (index, result) in enumerate(map_series(extract_series, [task for _, task in work], jobs=jobs)):
        n = work[index][0]
        results[n] = [_failed("-", str(result))] if isinstance(result, HarmonictError) else result
        _write_part(out, keys[n], results[n])
        if progress:
            progress(done + 1, len(work), results[n][0])
    table = _assemble(entries, keys, results)
    if out is not None:
        _write_features(table, out)
        _write_settings(out, table, feature_set, settings, regions, spacing_mm)
        shutil.rmtree(_parts(out), ignore_errors=True)
    table.attrs["left_out"] = left_out
    table.attrs["boxes"] = boxes
    return table


def cohort_biomarkers(
    paths: Sequence[str | Path],
    *,
    mask: str | Path | None = None,
    slicewise: bool = False,
    spacing_mm: tuple[float, float] | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Lung density (`harmonict.biomarkers.lung_density`) of every series, and the shape of each of its nodules.

    One row per series, ROI "lung", in the form of a feature table, so that `reproduce` takes it. `lung_from`: "masks"
    where masks named lung... are given (their union), else "segmented". Masks named nodule..., GTV... or tumo... say
    where a nodule is: K-means in the mask grown by 3 mm; columns NAME_volume_mm3, ..., empty for series without it.
    """
    entries, left_out = resolve(paths, slicewise=slicewise, jobs=jobs)
    if mask is not None:
        entries = _with_mask(entries, Path(mask))
    results: dict[int, list[dict[str, Any]]] = {
        n: [_failed("lung", e.problem)] for n, e in enumerate(entries) if e.problem
    }
    work = [(n, e) for n, e in enumerate(entries) if not e.problem]
    measure = partial(measure_series, spacing_mm=spacing_mm)
    for done, (index, result) in enumerate(map_series(measure, [e for _, e in work], jobs=jobs)):
        row = _failed("lung", str(result)) if isinstance(result, HarmonictError) else result
        results[work[index][0]] = [row]
        if progress:
            progress(done + 1, len(work), row)
    table = _assemble(entries, [""] * len(entries), results)
    table.attrs["left_out"] = left_out
    return table


def read_features(path: str | Path) -> pd.DataFrame:
    """Read a feature table that `cohort_features` (or anyone) wrote, .csv or .parquet; text stays text.

    Raises HarmonictError where it is not there or no table.
    """
    path = Path(path)
    if not path.is_file():
        raise HarmonictError(f"no feature table at {path}; `harmonict features` makes one")
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        names = list(pd.read_csv(path, nrows=0).columns)
        text = {n: str for n in (*KEYS, "roi_kind", *_text_columns(path)) if n in names}
        return pd.read_csv(path, dtype=text, na_values=[""], keep_default_na=False)
    except (ValueError, OSError) as error:
        raise HarmonictError(f"{path} is not a feature table: {' '.join(str(error).split())}") from None


def join_features(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Several feature tables as one. Rows that several hold with the same values count once.

    Raises HarmonictError for a table that is none of features, and where two do not have the same features.
    """
    for table in tables:
        absent = [key for key in KEYS if key not in table]
        if absent:
            raise HarmonictError(
                f"a feature table has no column {absent[0]!r}; `harmonict features` makes feature tables"
            )
    first = set(feature_columns(tables[0]))
    for table in tables[1:]:
        differ = first.symmetric_difference(feature_columns(table))
        if differ:
            raise HarmonictError(
                f"the feature tables do not hold the same features ({len(differ)} differ, such as "
                f"{sorted(differ)[0]!r}); extract all with the same settings"
            )
    whole = pd.concat(tables, ignore_index=True)
    return whole.loc[~whole.duplicated([*KEYS, *feature_columns(tables[0])])].reset_index(drop=True)


def find_target(table: pd.DataFrame, wanted: str) -> str:
    """The scan of a feature table that `wanted` names: a scan, "truth", or a protocol ("Bl64", "Bl64,thickness=1").

    Series that a model made do not count as a protocol. Raises HarmonictError where it names none or several.
    """
    scans = list(dict.fromkeys(table["scan"].dropna().astype(str)))
    if wanted in scans:
        return wanted
    columns = [c for c in (*PROTOCOL_COLUMNS, "role", "scan") if c in table]
    rows = table[columns].drop_duplicates().astype(object)
    rows = rows.where(rows.notna(), None).to_dict("records")
    found = sorted({str(r["scan"]) for r in rows if _is_wanted(r, wanted)})
    if len(found) != 1:
        what = "ambiguous; candidates" if found else "not in the feature table; its scans"
        raise HarmonictError(f"target protocol {wanted!r} is {what}: {', '.join(found or scans)}")
    return found[0]


def known_classes(table: pd.DataFrame, column: str) -> dict[tuple[str, str], str]:
    """(patient, roi) -> class, from a column of a feature table, for `reproduce` and `biology.separation`."""
    if column not in table:
        known = ", ".join(c for c in table if c not in feature_columns(table))
        raise HarmonictError(f"the feature table has no column {column!r} with known classes; there are: {known}")
    rows = table[table[column].notna()]
    places = zip(rows["patient"].astype(str), rows["roi"].astype(str), strict=True)
    return dict(zip(places, rows[column].astype(str), strict=True))


def class_map(table: pd.DataFrame) -> dict[str, str] | None:
    """Feature -> class where the names do not say it: DiffusionCT's six classes for the IBEX set, else None."""
    ibex = ibex_table()
    known = dict(zip(ibex["name"], ibex["class6"], strict=True))
    return known if set(feature_columns(table)) <= set(known) else None


# -- what a worker does ------------------------------------------------------------------------------------------------


def extract_series(task: Task) -> list[dict[str, Any]]:
    """The rows of one series: roi, roi_kind, state, reason, diagnostics_voxels and the features."""
    _, function = FEATURE_SETS[task.feature_set]
    assert task.entry.found is not None
    series = task.entry.found.read(spacing_mm=task.spacing_mm)
    spacing_mm = series.geometry.spacing_mm
    if not series.is_volume:
        spacing_mm = (series.protocol.slice_thickness_mm or 1.0, *series.pixel_mm)
    whole_image = (
        task.feature_set == "ibsi"
        or getattr(task.settings, "filters", ("Original",)) != ("Original",)
        or getattr(task.settings, "resample_mm", None) is not None
    )
    rows: list[dict[str, Any]] = []
    for name, kind, mask in _regions(task, series):
        if isinstance(mask, HarmonictError):
            rows.append(_failed(name, str(mask), kind))
            continue
        for label, part in _apart(name, mask, series):
            row: dict[str, Any] = {"roi": label, "roi_kind": kind, "state": "done", "reason": None}
            try:
                image = series.hu
                if not whole_image and part.any():
                    image, part = crop_to_mask(image, part)
                row |= {"diagnostics_voxels": int(part.sum()), **function(image, part, spacing_mm, task.settings)}
            except HarmonictError as error:
                row = _failed(label, str(error), kind)
            rows.append(row)
    return rows or [_failed("-", "no ROI fits this series")]


def measure_series(entry: Entry, *, spacing_mm: tuple[float, float] | None = None) -> dict[str, Any]:
    """The biomarker row of one series."""
    assert entry.found is not None
    series = entry.found.read(spacing_mm=spacing_mm)
    lung, nodules = None, {}
    for name, load in _masks_of(entry, series, None):
        if re.match("lung", name, re.IGNORECASE):
            lung = load() if lung is None else lung | load()
        elif re.match("nodule|gtv|tumo", name, re.IGNORECASE):
            nodules[name] = _grown(load(), series.geometry.spacing_mm, NODULE_MARGIN_MM)
    values = biomarkers(series, lung=lung, nodules=nodules)
    return {
        "roi": "lung",
        "roi_kind": "mask",
        "lung_from": "segmented" if lung is None else "masks",
        "state": "done",
        "reason": None,
        **values,
    }


def draw_boxes(task: Task) -> list[Roi]:
    """The random boxes of the task's reference image; the same for every rendition that refers to it."""
    assert task.reference is not None
    reference = task.reference.read(spacing_mm=task.spacing_mm)
    patient = int.from_bytes(hashlib.sha256(task.entry.patient.encode()).digest()[:8], "little")
    rng = np.random.default_rng([task.regions.seed, patient])
    return random_rois(reference, rng=rng, number=task.regions.random)


def _regions(task: Task, series: Series) -> Iterator[tuple[str, str, np.ndarray | HarmonictError]]:
    """(ROI, kind, mask on the series' grid, or why there is none), one at a time: masks are as large as images."""
    regions = task.regions
    if regions.from_masks:
        masks = list(_masks_of(task.entry, series, regions.label))
        if not masks:
            need = "give --mask, a table with a column 'masks', --random N or --whole"
            if task.entry.about.get("role") == "derived":
                need = (
                    "give the table of its sources, which names the masks, beside this one, or harmonize with --masks"
                )
            yield "-", "mask", HarmonictError(f"{series.name}: no mask and no other ROI: {need}")
        for wanted in regions.names:
            if not any(_fits(name, wanted) for name, _ in masks):
                known = ", ".join(name for name, _ in masks) or "none"
                yield wanted, "mask", HarmonictError(f"{series.name}: no ROI {wanted!r}; there are: {known}")
        for name, load in masks:
            if not regions.names or any(_fits(name, wanted) for wanted in regions.names):
                try:
                    yield name, "mask", load()
                except HarmonictError as error:
                    yield name, "mask", error
    for box in task.boxes:
        try:
            yield box.name, "random", box.mask(series.hu.shape)
        except HarmonictError as error:
            yield box.name, "random", error
    if regions.whole:
        other = task.reference is not None and task.entry.found is not None and task.reference != task.entry.found
        reference = task.reference.read(spacing_mm=task.spacing_mm) if other and task.reference else series
        yield WHOLE, "image", body_mask(reference.hu, is_volume=reference.is_volume)


def _masks_of(entry: Entry, series: Series, label: int | None) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Name and reader of every mask of a series; the names of all files are unique."""
    seen: dict[str, int] = {}
    for name, path in entry.masks:
        if volume_format(path) is not None:
            number = int(name) if name and name.isdecimal() else label
            title = name or volume_stem(path) + (f" {label}" if label is not None else "")
            yield title, partial(read_mask, path, label=number, like=series)
            continue
        for roi in [name] if name else roi_names(path):
            seen[roi] = seen.get(roi, 0) + 1
            title = roi if seen[roi] == 1 else f"{roi} ({path.name})"
            yield title, partial(_one_mask, path, series, roi)


def _one_mask(path: Path, series: Series, roi: str) -> np.ndarray:
    return next(iter(read_masks(path, series, roi).values()))


def _fits(name: str, wanted: str) -> bool:
    return name.casefold() == wanted.casefold() or fnmatchcase(name.casefold(), wanted.casefold())


def _apart(name: str, mask: np.ndarray, series: Series) -> list[tuple[str, np.ndarray]]:
    """Single images are no volume: what a ROI has on each of them is a ROI of its own."""
    if series.is_volume or np.count_nonzero(mask.any(axis=(1, 2))) <= 1:
        return [(name, mask)]
    parts = []
    for z in np.flatnonzero(mask.any(axis=(1, 2))):
        alone = np.zeros_like(mask)
        alone[z] = mask[z]
        parts.append((f"{name} slice {z + 1}", alone))
    return parts


def _grown(mask: np.ndarray, spacing_mm: tuple[float, float, float], margin_mm: float) -> np.ndarray:
    if not mask.any():
        return mask
    reach = [int(margin_mm / s) + 1 for s in spacing_mm]
    box = tuple(
        slice(max(s.start - r, 0), s.stop + r)
        for s, r in zip(ndimage.find_objects(mask.view(np.uint8))[0], reach, strict=True)
    )
    out = np.zeros_like(mask)
    out[box] = ndimage.distance_transform_edt(~mask[box], sampling=spacing_mm) <= margin_mm
    return out


def _failed(roi: str, reason: str, kind: str | None = None) -> dict[str, Any]:
    return {"roi": roi, "roi_kind": kind, "state": "failed", "reason": reason}


# -- which series ------------------------------------------------------------------------------------------------------


def resolve(
    paths: Sequence[str | Path], *, slicewise: bool = False, jobs: int = 1
) -> tuple[list[Entry], list[tuple[str, str]]]:
    """The series behind images, folders and cohort tables, and what was left out: (path, reason).

    Raises HarmonictError where a path is not there or there is no series at all.
    """
    entries: list[Entry] = []
    left_out: list[tuple[str, str]] = []
    for path in map(Path, paths):
        table = path / "cohort.csv" if (path / "cohort.csv").is_file() else path
        if table.suffix.lower() in (".csv", ".parquet") and table.is_file():
            entries += _from_table(table, slicewise, jobs)
            continue
        inventory = find_series(path, slicewise=slicewise)
        root = path.name if path.is_dir() else volume_stem(path)
        entries += [
            Entry(found, found.row(), root, tuple((None, m) for m in _masks_in(inventory, found)))
            for found in inventory.found
        ]
        left_out += [
            (str(left.row()["path"]), left.reason)
            for left in inventory.left_out
            if not set(left.paths) & set(inventory.masks)
        ]
    if not entries:
        reasons = "; ".join(sorted({reason for _, reason in left_out})[:3])
        where = ", ".join(map(str, paths))
        raise HarmonictError(f"no CT series in {where}" + (f": {reasons}" if reasons else ""))
    entries = _inherit(entries)
    names = _scan_names(entries)
    return [replace(e, scan=name) for e, name in zip(entries, names, strict=True)], left_out


def _from_table(path: Path, slicewise: bool, jobs: int) -> list[Entry]:
    table = read_cohort(path).astype(object)
    rows = table.where(table.notna(), None).to_dict("records")
    rows = [r for r in rows if r["path"] is not None and r.get("state") != "left_out"]
    places = list(dict.fromkeys(str(r["path"]) for r in rows))
    inventories: dict[str, Inventory | HarmonictError] = {}
    for n, result in map_series(partial(find_series, slicewise=slicewise), places, jobs=_worth(places, jobs)):
        inventories[places[n]] = result
    root = path.parent.resolve().name
    entries = []
    for row in rows:
        about = {str(k): v for k, v in row.items()}
        masks = tuple(_mask_places(row.get("masks"), path.parent))
        inventory = inventories[str(row["path"])]
        if row.get("state") == "failed":
            entries.append(Entry(None, about, root, masks, f"failed before: {row.get('reason')}"))
        elif isinstance(inventory, HarmonictError):
            entries.append(Entry(None, about, root, masks, str(inventory)))
        else:
            found, problem = _pick(inventory, row)
            known = {k: v for k, v in found.row().items() if about.get(k) is None} if found else {}
            if found and not masks:
                masks = tuple((None, m) for m in _masks_in(inventory, found))
            entries.append(Entry(found, about | known, root, masks, problem))
    return entries


def _pick(inventory: Inventory, row: dict[str, Any]) -> tuple[FoundSeries | None, str]:
    found = inventory.found
    if row.get("series") is not None and len(found) > 1:
        found = [f for f in found if f.series_uid == row["series"]]
        if len(found) > 1 and row.get("kernel") is not None:
            found = [f for f in found if f.protocol.kernel == row["kernel"]]
    if len(found) == 1:
        return found[0], ""
    if found:
        return None, f"{row['path']} holds {len(found)} series; name one in the column 'series'"
    reasons = "; ".join(sorted({left.reason for left in inventory.left_out})[:2])
    return None, f"no such CT series in {row['path']}" + (f": {reasons}" if reasons else "")


def _mask_places(text: object, folder: Path) -> Iterator[tuple[str | None, Path]]:
    """The column `masks`: PATH or ROI=PATH, ";" between them; paths from the table's folder, else from here."""
    for item in str(text or "").split(";"):
        name, equals, place = item.strip().partition("=")
        if not equals:
            name, place = "", name
        if place:
            path = folder / place if (folder / place).exists() else Path(place)
            yield name or None, path


def _masks_in(inventory: Inventory, found: FoundSeries) -> list[Path]:
    """RTSTRUCT and SEG files of the same folder that refer to the series."""
    if found.format != "dicom":
        return []
    masks = []
    for path in inventory.masks:
        try:
            if volume_format(path) is None and mask_references(path, found.series_uid):
                masks.append(path)
        except HarmonictError:  # a damaged mask is nobody's
            continue
    return masks


def _with_mask(entries: list[Entry], mask: Path) -> list[Entry]:
    if len(entries) != 1:
        raise HarmonictError(
            f"--mask is for one image, there are {len(entries)} series; "
            "name their masks in the column 'masks' of a cohort table"
        )
    if not mask.exists():
        raise HarmonictError(f"no mask at {mask}")
    files = find_series(mask).masks if mask.is_dir() else [mask]
    if not files:
        raise HarmonictError(f"no RTSTRUCT, SEG or label image in {mask}")
    return [replace(entries[0], masks=tuple((None, path) for path in files))]


def _inherit(entries: list[Entry]) -> list[Entry]:
    """A derived series lies on its source's grid: what was drawn there, and what is known of the patient, holds."""
    by_series = {str(e.about.get("series")): e for e in entries}
    result = []
    for e in entries:
        source = by_series.get(str(e.about.get("derived_from")))
        if source is not None:
            known = {k: v for k, v in source.about.items() if k not in COHORT_COLUMNS and e.about.get(k) is None}
            e = replace(e, masks=e.masks or source.masks, about=e.about | known)
        result.append(e)
    return result


def _scan_names(entries: Sequence[Entry]) -> list[str]:
    """What each rendition is called: the shortest name, built alike for all, that tells a patient's series apart."""
    by_series = {str(e.about.get("series")): e for e in entries}

    def base(e: Entry) -> str:
        if e.about.get("scan"):
            return str(e.about["scan"])
        if e.about.get("made_by"):
            source = by_series.get(str(e.about.get("derived_from")), e)
            before = e.about.get("source_kernel") or (base(source) if source is not e else e.about.get("kernel")) or "?"
            return f"{before} by {e.about['made_by']}"
        kernel = e.about.get("kernel")
        if _is_truth(e.about):
            return "truth"
        strength = e.about.get("iterative_strength")
        return f"{kernel}({strength:g})" if kernel and strength else str(kernel or e.root)

    names = [base(e) for e in entries]
    fields = [
        ("slice_thickness_mm", "{:g} mm"),
        ("ctdivol_mgy", "{:g} mGy"),
        ("kvp", "{:g} kV"),
        ("exposure_mas", "{:g} mAs"),
    ]
    further = [
        [text.format(float(e.about[name])) if e.about.get(name) is not None else "" for e in entries]
        for name, text in fields
    ]
    further.append([f"({e.root})" for e in entries])
    for parts in further:
        longer = [f"{name} {part}".strip() for name, part in zip(names, parts, strict=True)]
        if _doubled(entries, longer) < _doubled(entries, names):
            names = longer
    count: dict[tuple[str, str], int] = {}
    for n, (e, name) in enumerate(zip(entries, names, strict=True)):
        count[e.patient, name] = count.get((e.patient, name), 0) + 1
        if count[e.patient, name] > 1:
            names[n] = f"{name} #{count[e.patient, name]}"
    return names


def _doubled(entries: Sequence[Entry], names: Sequence[str]) -> int:
    return len(names) - len({(e.patient, name) for e, name in zip(entries, names, strict=True)})


def _is_truth(about: Mapping[str, Any]) -> bool:
    return about.get("role") == "truth" or about.get("model") == "truth"


def _is_wanted(about: Mapping[str, Any], wanted: str) -> bool:
    if about.get("role") == "derived":
        return False
    if wanted.casefold() == "truth":
        return _is_truth(about)
    return ScanProtocol(**{name: about.get(name) for name in PROTOCOL_COLUMNS}).matches(parse_protocol(wanted))  # type: ignore[arg-type]


def _references(
    entries: Sequence[Entry], target: str | None, spacing_mm: tuple[float, float] | None
) -> dict[int, tuple[str, FoundSeries | None]]:
    """For each series (its number) the image on which its regions are judged, or why there is none."""
    result: dict[int, tuple[str, FoundSeries | None]] = {}
    for n, e in enumerate(entries):
        if e.found is None:
            continue
        family = [o for o in entries if o.patient == e.patient and o.found is not None]
        if target is not None:
            chosen = [o for o in family if o.scan == target or _is_wanted(o.about, target)]
        elif len(family) == 1:
            chosen = family
        else:
            chosen = [o for o in family if o.about.get("role") == "target"]
            chosen = chosen or [o for o in family if _is_truth(o.about)]
        here = [o for o in chosen if o.found and _same_grid(o.found, e.found, spacing_mm)]
        if len(here) == 1:
            result[n] = "", here[0].found
        elif here:
            names = ", ".join(o.scan for o in here)
            result[n] = f"several reference images for its ROIs: {names}; name one with --target-protocol", None
        elif chosen:
            result[n] = f"no reference image on its grid; ROIs are judged on {', '.join(o.scan for o in chosen)}", None
        else:
            there = ", ".join(o.scan for o in family)
            result[n] = f"no reference image for its ROIs; name one with --target-protocol, there are: {there}", None
    return result


def _same_grid(a: FoundSeries, b: FoundSeries, spacing_mm: tuple[float, float] | None) -> bool:
    def grid(found: FoundSeries) -> Geometry:
        own = found.geometry
        return replace(own, spacing_mm=(own.spacing_mm[0], *(spacing_mm or own.spacing_mm[1:])))

    return a.shape == b.shape and grid(a).same_grid(grid(b), tolerance_mm=0.05)


def _draw_boxes(tasks: Sequence[Task], jobs: int) -> dict[str, list[Roi] | HarmonictError]:
    """Random boxes by the key of the reference image."""
    wanted = {t.reference.key: t for t in tasks if t.regions.random and t.reference is not None and not t.entry.problem}
    order = list(wanted.values())
    return {order[n].reference.key: boxes for n, boxes in map_series(draw_boxes, order, jobs=_worth(order, jobs))}  # type: ignore[union-attr]


def _worth(items: Sequence[object], jobs: int) -> int:
    """Starting processes takes seconds: a few quick items do without."""
    return jobs if len(items) > 16 else 1


# -- settings, files, resume -------------------------------------------------------------------------------------------


def _settings(feature_set: str, values: dict[str, Any], regions: Regions) -> Any:
    from harmonict.harmonizer import make_config  # brings torch, which no worker needs

    kind, _ = FEATURE_SETS[feature_set]
    if feature_set == "pyradiomics" and "families" not in values and not regions.from_masks:
        values["families"] = [name for name in FAMILIES if name != "shape"]  # a box has no shape worth a feature
    return make_config(kind, values)


def _key(task: Task) -> str:
    """What decides the numbers of a series: its files, masks, reference image and every setting."""
    entry = task.entry
    if entry.found is None:
        return ""
    files = [*entry.found.paths, *(path for _, path in entry.masks), *(task.reference.paths if task.reference else ())]
    stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()]
    words = f"{__version__} {entry.found.key} {entry.patient} {entry.masks} {stamps} {task.regions} {task.feature_set}"
    return hashlib.sha256(f"{words} {task.settings} {task.spacing_mm}".encode()).hexdigest()


def _place(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    out = Path(out)
    if out.suffix.lower() not in (".csv", ".parquet"):
        raise HarmonictError(f"{out}: a feature table is written as .csv or .parquet")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise HarmonictError(f"cannot write to {out.parent}: {error.strerror}") from None
    return out


def _parts(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")


def _write_part(out: Path | None, key: str, rows: list[dict[str, Any]]) -> None:
    """A finished series goes to the disk at once; the table itself is written at the end."""
    if out is None or any(row["state"] != "done" for row in rows):
        return
    _parts(out).mkdir(exist_ok=True)
    write_whole(_parts(out) / f"{key}.parquet", lambda path: pd.DataFrame(rows).to_parquet(path, index=False))


def _earlier(out: Path | None, keys: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows that the table, or the parts of an unfinished run, hold for the wanted keys."""
    if out is None:
        return {}
    tables = [pd.read_parquet(_parts(out) / f"{k}.parquet") for k in keys if (_parts(out) / f"{k}.parquet").is_file()]
    named = [k for k in keys if (_parts(out) / f"{k}.parquet").is_file()]
    tables = [t.assign(digest=k) for t, k in zip(tables, named, strict=True)]
    if out.is_file():
        try:
            table = read_features(out)
        except HarmonictError:
            table = pd.DataFrame()
        if {"digest", "state", *KEYS} <= set(table.columns):
            tables.append(table)
    found: dict[str, list[dict[str, Any]]] = {}
    for table in tables:
        keep = [c for c in ("roi", "roi_kind", "state", "reason", "diagnostics_voxels") if c in table]
        keep += feature_columns(table)
        for key, part in table.groupby("digest"):
            if key in keys and (part["state"] == "done").all():
                rows = part[keep].astype(object)
                found[str(key)] = rows.where(rows.notna(), None).to_dict("records")  # type: ignore[assignment]
    return found


def _assemble(
    entries: Sequence[Entry], keys: Sequence[str], results: Mapping[int, list[dict[str, Any]]]
) -> pd.DataFrame:
    """The table: keys, state, what is known of the series, features; in the order of the series."""
    rows = []
    features: dict[str, None] = {}
    for n, e in enumerate(entries):
        about = _about(e)
        for row in results[n]:
            front = {"patient": e.patient, "roi": row["roi"], "scan": e.scan}
            front |= {name: row.get(name) for name in _ROW_FRONT}
            front |= {**about, "digest": keys[n] or None, "nodule_type": _nodule_type(e, str(row["roi"]))}
            values = {k: v for k, v in row.items() if k not in front}
            features |= dict.fromkeys(values)
            rows.append(front | values)
    table = pd.DataFrame(rows)
    front_columns = [c for c in table if c not in features and (c in ("reason", "digest") or table[c].notna().any())]
    table[list(features)] = table[list(features)].astype(np.float64)
    return table[front_columns + list(features)]


def _about(entry: Entry) -> dict[str, Any]:
    """Columns of the cohort table that go along; numbers of the user's own must not be taken for features."""
    about = {name: entry.about.get(name) for name in _COHORT_FRONT}
    for name, value in entry.about.items():
        if name not in (*COHORT_COLUMNS, *KEYS, *_ROW_FRONT, *_QC_COLUMNS):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            about[f"parameter_{name}" if number else name] = value
    share = entry.about.get("emphysema_share")
    if isinstance(share, int | float):
        about["emphysema_grade"] = next(grade for limit, grade in EMPHYSEMA_GRADES if share <= limit)
    return about


def _nodule_type(entry: Entry, roi: str) -> str | None:
    """The simulated nodule's type, from the column `nodules`: "nodule_1=solid 8.0;nodule_2=ground-glass 12.0"."""
    for item in str(entry.about.get("nodules") or "").split(";"):
        name, equals, kind = item.partition("=")
        if equals and name.casefold() == roi.casefold():
            return kind.split()[0]
    return None


def _write_features(table: pd.DataFrame, out: Path) -> None:
    write = table.to_parquet if out.suffix.lower() == ".parquet" else table.to_csv
    write_whole(out, lambda path: write(path, index=False))


def _write_settings(
    out: Path,
    table: pd.DataFrame,
    feature_set: str,
    settings: Any,
    regions: Regions,
    spacing_mm: tuple[float, float] | None,
) -> None:
    """What a report on the features must state (IBSI reporting guidelines), as JSON beside the table."""
    features = feature_columns(table)
    content = {
        "harmonict": __version__,
        "libraries": {n: version(n) for n in ("numpy", "scipy", "numba", "PyWavelets", "pandas")}
        | {"python": platform.python_version()},
        "intensities": "HU as stored in the files, no further filtering before extraction",
        "spacing_mm_given": spacing_mm,
        "feature_set": feature_set,
        "features": len(features),
        "settings": asdict(settings),
        "regions": asdict(regions),
        "text_columns": [c for c in table if c not in features and table[c].dtype == object],
    }
    write_whole(out.with_suffix(".json"), lambda path: Path(path).write_text(json.dumps(content, indent=2) + "\n"))


def _text_columns(out: Path) -> list[str]:
    try:
        return list(json.loads(out.with_suffix(".json").read_text())["text_columns"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
