"""The main job: every series below a path through one model, written as it came, with a row for each and its reason."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harmonict import __version__
from harmonict.abstention import looks
from harmonict.abstention import outside as outside_training
from harmonict.core import HarmonictError, ScanProtocol, Series
from harmonict.core.cohort import cohort_table, read_cohort, write_cohort
from harmonict.core.files import write_whole
from harmonict.core.resample import resample_plane
from harmonict.dicom.inventory import FoundSeries, find_series
from harmonict.dicom.masks import mask_references, write_masks
from harmonict.dicom.write import Derivation, derived_series_uid, stale_temporaries, write_series
from harmonict.fidelity import check_fidelity
from harmonict.harmonizer import About, Harmonizer, in_trained_pixels, on_own_grid
from harmonict.methods import load_model
from harmonict.physics.kernel import Kernel, crossing
from harmonict.physics.mtf import FREQUENCIES_PER_MM, skin_air_mtf
from harmonict.physics.nps import uniform_noise_sd
from harmonict.scale import map_series
from harmonict.volumes import volume_stem, write_volume

SPREAD_WORDS = "pixels hold the standard deviation of several samples in HU"
QC_FILE = "qc.json"  # beside cohort.csv, so that a run that goes on knows what the earlier one told


@dataclass(frozen=True)
class Task:
    """All that a worker needs for one series."""

    found: FoundSeries
    root: Path  # what the user named; volumes keep their place below it
    out: Path
    model: Path
    source_mtf: Kernel | None
    spacing_mm: tuple[float, float] | None
    masks: tuple[Path, ...]
    resample: bool
    strict: bool
    key: str
    uncertainty: bool = False
    residuals: Path | None = None  # where the residual maps of the fidelity check go; None: it is not wanted


def harmonize_cohort(
    path: str | Path,
    out: str | Path,
    model: Harmonizer,
    *,
    slicewise: bool = False,
    spacing_mm: tuple[float, float] | None = None,
    source_mtf: Kernel | None = None,
    masks: Sequence[Path] | None = None,
    resample: bool = False,
    strict: bool = False,
    uncertainty: bool = False,
    residuals: Path | None = None,
    jobs: int = 1,
    progress: Callable[[int, int, dict[str, Any]], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """Harmonize every series below `path`, or of a cohort table, into `out`; returns this run's cohort table.

    `out/cohort.csv` holds it too, beside the series that earlier runs put there. One row a series: what was measured
    before and after, state "done", "failed" or "left_out", and the reason. A series that an earlier run finished with
    the same model is not done again. masks: RTSTRUCT and SEG files or folders of them to copy so that they refer to the
    new series; an empty list takes those found below `path`, None copies none. resample: translate a series in the
    pixels that the model was trained on, and bring the change back onto its own grid. strict: a series outside what the
    model was trained on fails, instead of being done with a note. uncertainty: a second series beside each result holds
    how much several samples of it differ, in HU. residuals: check the fidelity of every result to its source, and write
    the residual maps into this folder.
    Raises HarmonictError where nothing can be done at all.
    """
    path, out = Path(path), Path(out)
    if uncertainty and type(model).spread is Harmonizer.spread:
        raise HarmonictError(f"{model.name} gives one result and draws no samples: leave --uncertainty out")
    inventory = find_series(path, slicewise=slicewise)
    if not inventory.found:
        reasons = sorted({left.reason for left in inventory.left_out})
        why = f": {'; '.join(reasons[:3])}" if reasons else ""
        raise HarmonictError(f"no CT series to harmonize in {path}{why}")
    _check_place(path, out)
    _check_names(inventory.found, path, out)
    earlier, qc = _earlier(out), _earlier_qc(out)
    stale = stale_temporaries(out)
    if earlier or stale:
        say(f"{out} holds {len(earlier)} finished series and {len(stale)} unfinished from an earlier run: going on")
    mask_files = _mask_files(masks, inventory.masks)
    rows: list[dict[str, Any]] = [left.row() for left in inventory.left_out]
    tasks = []
    with tempfile.TemporaryDirectory(prefix="harmonict-") as scratch:
        model_folder = Path(scratch) / "model"
        model.save(model_folder)
        for found in inventory.found:
            wanted = tuple(f for f in mask_files if mask_references(f, found.series_uid))
            key = _key(
                found, model, source_mtf, spacing_mm, wanted, resample, strict, uncertainty, residuals is not None
            )
            if key in earlier and Path(earlier[key]["path"]).exists():
                rows.append(earlier[key])
            else:
                more = (source_mtf, spacing_mm, wanted, resample, strict, key, uncertainty, residuals)
                tasks.append(Task(found, path, out, model_folder, *more))
        again = {task.key for task in tasks} | {row["digest"] for row in rows if "digest" in row}
        kept = [row for key, row in earlier.items() if key not in again and Path(row["path"]).exists()]
        write_cohort(cohort_table(kept + rows), out / "cohort.csv")
        for n, (index, result) in enumerate(map_series(harmonize_one, tasks, jobs=jobs)):
            if isinstance(result, HarmonictError):
                result = {**tasks[index].found.row(), "state": "failed", "reason": str(result)}
            told = result.pop("qc", None)
            if told:
                qc[result["digest"]] = told
                write_json(qc, out / QC_FILE)
            rows.append(result)
            kept = [row for row in kept if row["path"] != result.get("path")]  # made again in another way
            write_cohort(cohort_table(kept + rows), out / "cohort.csv")
            if progress:
                progress(n + 1, len(tasks), result)
    write_cohort(_sorted(kept + rows), out / "cohort.csv")
    table = _sorted(rows)
    table.attrs["qc"] = {key: qc[key] for key in table["digest"] if key in qc}
    return table


def _sorted(rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = cohort_table(rows).sort_values(["patient", "series"], kind="stable", na_position="last")
    return table.reset_index(drop=True)


def harmonize_one(task: Task) -> dict[str, Any]:
    """Read, measure, harmonize, write, measure one series; its row of the cohort table, with the further key "qc"."""
    model = load_model(task.model)
    series = task.found.read(spacing_mm=task.spacing_mm)
    qc: dict[str, Any] = {}
    work = in_trained_pixels(model, series) if task.resample else series
    about = model.describe(work, source_mtf=task.source_mtf)
    source_f50, source_noise = _measure(lambda: _source_f50(series, about)), _measure(lambda: uniform_noise_sd(series))
    trained = model.card.get("trained_on", {}).get(model.trained_side, {})
    outside = about.outside
    if trained:
        seen = looks(series, f50_per_mm=source_f50, noise_hu=source_noise)
        outside = (*outside, *outside_training(seen, trained))
        qc["training"] = {"outside": outside, "measured": vars(seen), "trained_on": trained}
    if task.strict and outside:
        raise HarmonictError(f"outside what the model was trained on: {'; '.join(outside)} (--strict refuses it)")
    result = model.harmonize(work, about=about, qc=qc)
    resampled = ""
    if work is not series:
        result = on_own_grid(model, series, work, result)
        resampled = f"translated in pixels of {work.pixel_mm[1]:.3g} mm, its own are of {series.pixel_mm[1]:.3g} mm"
    f50 = _measure(lambda: skin_air_mtf(result).f50_per_mm)
    checked = ""
    if task.residuals is not None:
        qc["fidelity"], checked = _fidelity(task, model, series, result, (source_f50, f50))
    notes = (*outside, about.note, resampled, checked, *qc.get("notes", ()))
    row = task.found.row()
    row |= {
        "role": "derived",
        "derived_from": task.found.series_uid or str(task.found.path),
        "made_by": f"{model.name} {model.digest[:12]}",
        "digest": task.key,
        **result.protocol.as_dict(),
        "state": "done",
        "reason": "; ".join(dict.fromkeys(filter(None, notes))),
        "source_kernel": series.protocol.kernel,
        **_change(series, result),
        "source_f50_per_mm": source_f50,
        "f50_per_mm": f50,
        "source_noise_hu": source_noise,
        "noise_hu": _measure(lambda: uniform_noise_sd(result)),
    }
    if task.found.format == "dicom":
        derivation = derivation_of(model, about, resampled)
        uid = derived_series_uid(series, derivation)
        folder = task.out / _safe(series.patient) / f"{_safe(series.protocol.kernel or 'series')}-{uid[-8:]}"
        report = write_series(result, folder, derivation)
        row |= {"path": str(folder), "series": uid, "format": "dicom", "clipped_voxels": report.clipped_voxels}
        if task.uncertainty:
            second = derivation_of(model, about, "; ".join(filter(None, (resampled, SPREAD_WORDS))))
            second = replace(second, target=f"uncertainty of {second.target}")
            beside = folder.with_name(f"{folder.name}-uncertainty")
            write_series(_spread(model, series, work, about), beside, second)
            row["uncertainty"] = str(beside)
        if task.masks:
            written = write_masks(task.masks, series, folder, folder.with_name(f"{folder.name}-masks"))
            row["masks"] = ";".join(str(f) for f in written)
    else:
        target = volume_place(task.found.paths[0], task.root, task.out)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_volume(result, target)
        row |= {"path": str(target), "series": target.name}
        if task.uncertainty:
            beside = target.with_name(f"uncertainty-{target.name}")
            write_volume(_spread(model, series, work, about), beside)
            row["uncertainty"] = str(beside)
    return row | {"qc": plain(qc)}


def _spread(model: Harmonizer, series: Series, work: Series, about: About) -> Series:
    """How much samples differ in HU, on the series' own grid; `work` is the series in the trained pixels."""
    spread = model.spread(work, about=about)
    if work is series:
        return spread
    planes = [resample_plane(hu, work.pixel_mm, series.pixel_mm, series.hu.shape[1:]) for hu in spread.hu]  # type: ignore[arg-type]
    hu = np.maximum(np.stack(planes), 0).astype(np.float32)
    if series.padding is not None:
        hu[series.padding] = series.hu[series.padding]
    return series.with_hu(hu, protocol=spread.protocol)


def _fidelity(
    task: Task, model: Harmonizer, series: Series, result: Series, f50_per_mm: tuple[float, float]
) -> tuple[dict[str, Any], str]:
    """What the fidelity check found, for the report, and a line for the user; its residual map is written."""
    assert task.residuals is not None
    band = float(np.nanmin(f50_per_mm)) if np.isfinite(f50_per_mm).any() else None
    try:
        found = check_fidelity(series, result, band_per_mm=band, window_hu=model.window_hu)
    except HarmonictError as error:
        return {"not_checked": str(error)}, f"fidelity to the source not checked: {error}"
    stem = _safe(series.patient or volume_stem(task.found.paths[0]))
    place = task.residuals / f"{stem}-{task.key[:8]}.nii.gz"
    task.residuals.mkdir(parents=True, exist_ok=True)
    write_volume(replace(series, hu=found.residual_hu, padding=None, source=None), place)
    return {**found.as_dict(), "residual": str(place)}, found.note()


def derivation_of(model: Harmonizer, about: About, further: str = "") -> Derivation:
    """What the DICOM headers say of how the series was made; `further`: what else decided the result."""
    settings = ", ".join(f"{k}={v}" for k, v in vars(model.config).items())
    measured = hashlib.sha256()
    for name, values in sorted(about.measured.items()):
        measured.update(name.encode() + np.ascontiguousarray(values).tobytes())
    seen = f"source measured {measured.hexdigest()[:12]}" if about.measured else ""
    parameters = "; ".join(filter(None, (settings, seen, further)))
    return Derivation(model.name, model.digest, parameters, target_label(model.target), __version__)


def target_label(target: ScanProtocol) -> str:
    """A target in words; a target that is only a measured curve has no name."""
    return target.label() if any(v is not None for v in target.as_dict().values()) else "measured target"


def volume_place(source: Path, root: Path, out: Path) -> Path:
    """Where the result of a NIfTI, NRRD or MHA file goes: the same name and format at the same place below `out`."""
    base = root if root.is_dir() else root.parent  # a cohort table names files below its own folder
    source, base = Path(os.path.abspath(source)), Path(os.path.abspath(base))
    return out / (source.relative_to(base) if source.is_relative_to(base) else source.name)


def write_qc(table: pd.DataFrame, path: str | Path) -> None:
    """What was done to each series, as JSON: its row and, under "qc", what the method told of it."""
    rows = json.loads(table.to_json(orient="records"))
    told = table.attrs.get("qc", {})
    write_json({"harmonict": __version__, "series": [row | {"qc": told.get(row["digest"], {})} for row in rows]}, path)


def write_json(value: Any, path: str | Path) -> None:
    """A JSON file, whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    write_whole(path, lambda name: Path(name).write_text(text))


def plain(value: Any) -> Any:
    """What JSON can hold: arrays as lists, NumPy's numbers as Python's, what is not a finite number as nothing."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _check_place(path: Path, out: Path) -> None:
    source = (path if path.is_dir() else path.parent).resolve()
    if path.is_file() and (out / "cohort.csv").resolve() == path.resolve():
        raise HarmonictError(f"{path} would be overwritten by the table of the results; choose another output folder")
    if out.exists() and not out.is_dir():
        raise HarmonictError(f"{out} is a file; the output must be a folder")
    if path.is_dir() and (out.resolve() == source or out.resolve().is_relative_to(source)):
        raise HarmonictError(f"the output {out} lies inside the input {path}; choose a folder outside of it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise HarmonictError(f"cannot write to {out}: {error.strerror}; choose another output folder") from None


def _check_names(found: Sequence[FoundSeries], root: Path, out: Path) -> None:
    """Two volume files never share a name below `out`."""
    places: dict[Path, Path] = {}
    for one in found:
        if one.format != "dicom":
            source = one.paths[0]
            first = places.setdefault(volume_place(source, root, out), source)
            if first != source:
                raise HarmonictError(
                    f"{first} and {source} would both be written to {volume_place(source, root, out)}; "
                    "harmonize their folders one by one, or put the table into a folder above both"
                )


def _earlier(out: Path) -> dict[str, dict[str, Any]]:
    """Finished rows of an earlier run by their key."""
    if not (out / "cohort.csv").is_file():
        return {}
    table = read_cohort(out / "cohort.csv").astype(object)
    rows = table.where(table.notna(), None).to_dict("records")
    return {str(row["digest"]): row for row in rows if row["state"] == "done"}


def _earlier_qc(out: Path) -> dict[str, Any]:
    """What earlier runs told of their series, by the key of the row."""
    try:
        return json.loads((out / QC_FILE).read_text())
    except (OSError, ValueError):
        return {}


def _mask_files(masks: Sequence[Path] | None, found: Sequence[Path]) -> list[Path]:
    if masks is None:
        return []
    if not masks:
        return list(found)
    files: list[Path] = []
    for place in masks:
        if not place.exists():
            raise HarmonictError(f"no masks at {place}")
        files += find_series(place).masks if place.is_dir() else [place]
    return files


def _key(
    found: FoundSeries,
    model: Harmonizer,
    source_mtf: Kernel | None,
    spacing: tuple[float, float] | None,
    masks: Sequence[Path],
    resample: bool,
    strict: bool,
    uncertainty: bool,
    checked: bool,
) -> str:
    """What decides the output: the source files, the model, what the user said of the source, masks, and checks."""
    mtf = "" if source_mtf is None else (source_mtf.frequency_per_mm.tolist(), source_mtf.mtf.tolist())
    asked = (("resampled", resample), ("strict", strict), ("uncertainty", uncertainty), ("checked", checked))
    how = "".join(f" {word}" for word, wanted in asked if wanted)
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in (*found.paths, *masks)]
    return hashlib.sha256(f"{found.key} {files} {model.digest} {mtf} {spacing}{how}".encode()).hexdigest()


def _change(before: Series, after: Series) -> dict[str, float]:
    """Mean, SD and largest size of the change in HU, slice by slice so that no full copy is made."""
    total = squares = largest = 0.0
    for a, b in zip(before.hu, after.hu, strict=True):
        difference = (b - a).astype(np.float64)
        total += difference.sum()
        squares += np.square(difference).sum()
        largest = max(largest, float(np.abs(difference).max()))
    mean = total / before.hu.size
    return {
        "mean_change_hu": round(mean, 3),
        "sd_change_hu": round(float(np.sqrt(max(squares / before.hu.size - mean**2, 0))), 3),
        "largest_change_hu": round(largest, 1),
    }


def _measure(measure: Callable[[], float]) -> float:
    """A measurement for the table, or nothing where the image does not allow it."""
    try:
        return round(float(measure()), 4)
    except HarmonictError:
        return float("nan")


def _source_f50(series: Series, about: About) -> float:
    """What the method measured already is not measured again."""
    mtf = about.measured.get("source_mtf")
    return skin_air_mtf(series).f50_per_mm if mtf is None else crossing(FREQUENCIES_PER_MM, mtf, 0.5)


def _safe(name: str) -> str:
    """A patient ID as a folder name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "unnamed"
