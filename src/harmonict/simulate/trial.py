"""The virtual imaging trial: patients x doses x kernels x thicknesses -> DICOM, truth, masks and the cohort table.

A trial is a TOML file (`presets/`): groups of patients, and for each group the renditions that its patients get. One
patient at one slice thickness is the unit of work: its projections are made once and shared by all doses and kernels.
The cohort table is also the state of the work: a unit whose rows are in it, and whose files are there, is finished.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, fields, replace
from difflib import get_close_matches
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
import pandas as pd

from harmonict import __version__
from harmonict.core import Geometry, HarmonictError, ScanProtocol, parse_protocol
from harmonict.core.cohort import cohort_table, read_cohort, write_cohort
from harmonict.dicom.simulated import Simulation, simulated_image, simulation_key, write_simulated_image
from harmonict.dicom.write import new_folder, stale_temporaries
from harmonict.physics.kernel import Kernel
from harmonict.scale import map_series
from harmonict.simulate.disease import EmphysemaSpec
from harmonict.simulate.kernels import kernel_names, load_kernel_csv
from harmonict.simulate.phantom import KINDS, SUBSLICE_MM, DigitalObject, Patient, make_patient
from harmonict.simulate.reconstruct import check_protocols, complete_protocol, render_slice
from harmonict.simulate.scanner import Scanner, slice_profile
from harmonict.volumes import write_mask

STATE_FILE = "trial.json"
TRUTH_KVP = 120.0
SPLITS = ("train", "test", "score")
_SCANNER = Scanner()
_RENDITION = re.compile(r"([^()\s]+)(?:\((\d+(?:\.\d+)?)\))?")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,15}")
_MODELS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Group:
    """Patients that are scanned in the same way.

    split: "train", "test", or "score" (never read in training). models: representations of each patient, differing in
    their emphysema alone; emphysema: least and greatest share of lung that is gone, model k drawn from the k-th part of
    that range. renditions: "Br40" or "Br40(3)" for iterative strength 3. kind: "chest" or "lungman".
    """

    name: str
    split: str
    patients: int
    renditions: tuple[str, ...]
    doses_mgy: tuple[float, ...]
    thicknesses_mm: tuple[float, ...]
    kvp: tuple[float, ...] = (120.0,)
    kind: Literal["chest", "lungman"] = "chest"
    nodules: int = 0
    models: int = 1
    emphysema: tuple[float, float] | None = None

    def protocols(self, thickness_mm: float, fov_mm: float) -> list[ScanProtocol]:
        """Every rendition of a patient at one slice thickness."""
        found = []
        for kvp in self.kvp:
            for dose in self.doses_mgy:
                for rendition in self.renditions:
                    kernel, strength = _rendition(rendition)
                    found.append(
                        ScanProtocol(
                            kernel=kernel,
                            iterative_strength=strength,
                            slice_thickness_mm=thickness_mm,
                            kvp=kvp,
                            ctdivol_mgy=dose,
                            fov_mm=fov_mm,
                        )
                    )
        return found


@dataclass(frozen=True)
class Trial:
    """A trial's configuration.

    slices: how many of `slice_mm` each patient gets; other thicknesses cover the same length. target: the protocol that
    the others shall be harmonized to, or "truth". matrix: pixels of an image over `fov_mm`; object_matrix: pixels of
    the digital patient over the scanner's field (500 mm). kernel_files: CSVs of the user's own MTFs.
    """

    name: str
    about: str
    target: str
    fov_mm: float
    slices: int
    slice_mm: float
    groups: tuple[Group, ...]
    matrix: int = 512
    object_matrix: int = 1024
    kernel_files: tuple[str, ...] = ()
    seed: int = 0

    @property
    def length_mm(self) -> float:
        """Scanned length of each patient."""
        return self.slices * self.slice_mm


@dataclass(frozen=True)
class Unit:
    """One patient model at one slice thickness.

    subject: the patient, whatever the model; patient_id: the patient with the model's letter. noise_seed: of this model
    (slice, dose, kVp and thickness are added for each exposure). key: a digest of everything that decides the pixels.
    """

    trial: Trial
    out: Path
    group: Group
    patient: Patient
    patient_id: str
    subject: str
    seed: int
    noise_seed: int
    thickness_mm: float
    kernels: dict[str, Kernel]
    key: str


def preset_names() -> list[str]:
    """Presets and their small forms."""
    names = sorted(f.name.removesuffix(".toml") for f in _presets().iterdir() if f.name.endswith(".toml"))
    return [form for name in names for form in (name, f"{name}-small") if form != "demo-small"]


def load_trial(name: str | Path, *, slices: int | None = None, seed: int | None = None) -> Trial:
    """A preset ("duke", "duke-small") or a TOML file -> Trial, checked before anything is computed.

    Raises HarmonictError on an unknown preset (the nearest is suggested), key, kernel, a dose that is not above 0, ...
    """
    text = str(name)
    folder: Path | None = None
    if text.endswith(".toml"):
        folder = Path(text).parent
        try:
            content = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise HarmonictError(f"cannot read {text}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise HarmonictError(f"cannot read {text}: it is not a text file") from None
    elif text in preset_names():
        content = _presets().joinpath(f"{text.removesuffix('-small')}.toml").read_text(encoding="utf-8")
    else:
        near = get_close_matches(text, preset_names(), n=1, cutoff=0.0)[0]
        raise HarmonictError(
            f"unknown preset {text!r}; did you mean {near}? Presets: {', '.join(preset_names())}; or give a .toml file"
        )
    try:
        values = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise HarmonictError(f"{text} is not TOML: {error}") from None
    if folder is None:
        small = values.pop("small", {})
        if text.endswith("-small"):
            values = _shrunk(values, small)
    trial = _trial_from(values, text)
    if folder is not None:
        trial = replace(trial, kernel_files=tuple(str((folder / f).resolve()) for f in trial.kernel_files))
    if slices is not None:
        trial = replace(trial, slices=slices)
    if seed is not None:
        trial = replace(trial, seed=seed)
    check_trial(trial)
    return trial


def check_trial(trial: Trial) -> None:
    """Raise HarmonictError where a trial cannot be run."""
    where = f"trial {trial.name}"
    for what, name in [("trial", trial.name), *(("group", g.name) for g in trial.groups)]:
        if not _NAME.fullmatch(name):
            raise HarmonictError(f"{what} {name!r}: a name is a letter and up to 15 letters, digits or hyphens")
    if len({g.name for g in trial.groups}) < len(trial.groups):
        raise HarmonictError(f"{where}: two groups have the same name")
    if trial.slices < 1 or not 0 < trial.slice_mm < np.inf:
        raise HarmonictError(f"{where}: slices and slice_mm must be above 0, got {trial.slices} and {trial.slice_mm:g}")
    if not 16 <= trial.matrix <= 2048 or not 64 <= trial.object_matrix <= 4096:
        raise HarmonictError(f"{where}: matrix must be 16 to 2048 and object_matrix 64 to 4096")
    if trial.seed < 0:
        raise HarmonictError(f"{where}: the seed must be 0 or more, got {trial.seed}")
    kernels = user_kernels(trial)
    for group in trial.groups:
        _check_group(group, trial, kernels)
    _check_target(trial)


def user_kernels(trial: Trial) -> dict[str, Kernel]:
    """The user's own kernels by name (the file's name without .csv)."""
    kernels: dict[str, Kernel] = {}
    for path in trial.kernel_files:
        name = Path(path).stem
        if name.casefold() in {n.casefold() for n in (*kernel_names(), *kernels)}:
            raise HarmonictError(f"{path}: {name} is the name of another kernel; rename the file")
        kernels[name] = replace(load_kernel_csv(path), name=name)
    return kernels


def disk_bytes(trial: Trial) -> int:
    """What the trial needs on disk: the images at 2 bytes a voxel and 1.5 kB a header."""
    slices = 0
    for group in trial.groups:
        for thickness in group.thicknesses_mm:
            series = len(group.protocols(thickness, trial.fov_mm)) + 1  # and the truth
            slices += group.patients * group.models * series * len(_centres(trial, 0.0, thickness))
    return slices * (2 * trial.matrix**2 + 1500)


def units(trial: Trial, out: Path) -> list[Unit]:
    """The work, patient by patient.

    A patient follows from the trial's name and seed, the group's name and a number, and from nothing else: the small
    form of a preset scans patients of the full one, and two groups never share one.
    """
    kernels = user_kernels(trial)
    configuration = _configuration(trial, kernels)
    found = []
    for group in trial.groups:
        for number in range(1, group.patients + 1):
            entropy = [trial.seed, crc32(trial.name.encode()), crc32(group.name.encode()), number]
            seed = _seed(*entropy)
            subject = f"{trial.name}-s{trial.seed}-{group.name}-{number:03d}"
            for model in range(group.models):
                patient = make_patient(
                    seed, kind=group.kind, nodules=group.nodules, emphysema=_emphysema(group, model, seed)
                )
                found += [
                    Unit(
                        trial=trial,
                        out=out,
                        group=group,
                        patient=patient,
                        patient_id=subject if group.models == 1 else subject + _MODELS[model],
                        subject=subject,
                        seed=seed,
                        noise_seed=_seed(*entropy, model + 1),
                        thickness_mm=thickness,
                        kernels=kernels,
                        key=simulation_key(configuration, asdict(patient), _SCANNER),
                    )
                    for thickness in group.thicknesses_mm
                ]
    return found


def run_trial(
    trial: Trial,
    out: str | Path,
    *,
    jobs: int = 1,
    progress: Callable[[int, int, dict[str, Any]], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """Make (or go on with) a trial in `out`; returns its cohort table, which is also `out/cohort.csv`.

    Everything follows from the configuration and the seed. A finished part is not made again, so an interrupted run
    goes on; a part that fails is a row with state "failed" and a reason, costs no other part, and is tried again by the
    next run. progress: called with (parts done, parts to do, first row of the part). Raises HarmonictError, before any
    computing and with nothing written, where the trial cannot be run or `out` holds anything else.
    """
    out = Path(out).resolve()
    check_trial(trial)
    configuration = _configuration(trial, user_kernels(trial))
    _check_folder(out, configuration)
    work = units(trial, out)
    rows = _finished_rows(work, out)
    finished = {(row["patient"], row["slice_thickness_mm"]) for row in rows}
    left = [unit for unit in work if (unit.patient_id, unit.thickness_mm) not in finished]
    if finished:
        say(f"{len(finished)} of {len(work)} parts of this trial are there: going on")
    patients = {unit.patient_id: unit for unit in left}
    say(f"checking that {len(patients)} patients fit the scanner")
    for unit in patients.values():
        start = _start(unit)
        unit.patient.check(np.array([start - 1, start + trial.length_mm + 1]), _SCANNER.fov_mm)
    _open_folder(out, configuration)
    order = {(unit.patient_id, unit.thickness_mm): n for n, unit in enumerate(work)}
    table = cohort_table(rows)
    for n, (index, result) in enumerate(map_series(run_unit, left, jobs=jobs), 1):
        if isinstance(result, HarmonictError):
            result = [{**_common(left[index]), "state": "failed", "reason": str(result)}]
        rows += result
        rows.sort(key=lambda row: order[row["patient"], row["slice_thickness_mm"]])
        table = cohort_table(rows)
        write_cohort(table, out / "cohort.csv")
        if progress:
            progress(n, len(left), result[0])
    return table


def run_unit(unit: Unit) -> list[dict[str, Any]]:
    """Scan one patient at one thickness under every protocol; writes series, truth and masks, returns their rows.

    Memory holds one slice, and the masks of the series at one bit a voxel.
    """
    trial, thickness = unit.trial, unit.thickness_mm
    wanted = unit.group.protocols(thickness, trial.fov_mm)
    truth = ScanProtocol(
        manufacturer="harmonict", model="truth", slice_thickness_mm=thickness, kvp=TRUTH_KVP, fov_mm=trial.fov_mm
    )
    protocols = [*(complete_protocol(p, kernels=unit.kernels) for p in wanted), truth]
    series = _series(unit, protocols)
    home = unit.out / unit.patient_id
    centres = _centres(trial, _start(unit), thickness)
    pixel = trial.fov_mm / trial.matrix
    corner = -(trial.matrix - 1) / 2 * pixel
    geometry = Geometry((corner, corner, float(centres[0])), (thickness, pixel, pixel))
    average = _area_average(trial)
    masks: dict[str, list[np.ndarray]] = {}
    with ExitStack() as stack:
        folders = [stack.enter_context(new_folder(home / _slug(s.label), lambda old: True)) for s in series]
        for z, slab in enumerate(_slabs(unit, centres)):
            images = _render(slab, wanted, unit, z)
            share = _covered(len(slab.hu120), thickness)
            images.append(average(np.tensordot(share, slab.hu(TRUTH_KVP), 1)))
            for name, mask in slab.masks.items():
                part = average(sum(s * m for s, m in zip(share, mask, strict=True) if s)) >= 0.5
                masks.setdefault(name, []).append(np.packbits(part, axis=1))
            for image, protocol, one, folder in zip(images, protocols, series, folders, strict=True):
                write_simulated_image(simulated_image(image, z, geometry, protocol, one), folder, z)
    written = _write_masks(masks, geometry, home / f"masks-{thickness:g}mm", trial.matrix)
    nodules = {f"nodule_{n}": f"{s.density} {s.diameter_mm:g}" for n, s in enumerate(unit.patient.nodules, 1)}
    common = {
        **_common(unit),
        "masks": ";".join(f"{name}={path.relative_to(unit.out)}" for name, path in written.items()),
        "nodules": ";".join(f"{name}={nodules[name]}" for name in written if name in nodules),
        "state": "done",
    }
    return [
        {
            **common,
            **protocol.as_dict(),
            "path": str(home / _slug(one.label)),
            "series": one.series_uid,
            "role": _role(protocol, trial),
        }
        for protocol, one in zip(protocols, series, strict=True)
    ]


# -- parts of a unit -------------------------------------------------------------------------------------------------


def _common(unit: Unit) -> dict[str, Any]:
    """What all rows of a unit say, and what is known of it before it is made."""
    trial, emphysema = unit.trial, unit.patient.emphysema
    pixel = trial.fov_mm / trial.matrix
    return {
        "patient": unit.patient_id,
        "path": str(unit.out / unit.patient_id),
        "format": "dicom",
        "slice_thickness_mm": unit.thickness_mm,
        "fov_mm": trial.fov_mm,
        "slices": len(_centres(trial, 0.0, unit.thickness_mm)),
        "rows": trial.matrix,
        "columns": trial.matrix,
        "spacing_z_mm": unit.thickness_mm,
        "spacing_y_mm": pixel,
        "spacing_x_mm": pixel,
        "body_part": "CHEST",
        "subject": unit.subject,
        "group": unit.group.name,
        "split": unit.group.split,
        "emphysema_share": emphysema.share if emphysema else 0.0,
    }


def _series(unit: Unit, protocols: list[ScanProtocol]) -> list[Simulation]:
    """Name, number and acquisition of each series; those of one dose and kVp come from one acquisition."""
    group = unit.group
    acquisitions = len(group.kvp) * len(group.doses_mgy)
    place = group.thicknesses_mm.index(unit.thickness_mm)
    made = []
    for n, protocol in enumerate(protocols):
        is_truth = protocol.model == "truth"
        made.append(
            Simulation(
                patient=unit.patient_id,
                label=f"truth {unit.thickness_mm:g}mm" if is_truth else _label(protocol, group),
                key=unit.key,
                number=place * len(protocols) + n + 1,
                acquisition=None if is_truth else place * acquisitions + n // len(group.renditions) + 1,
                version=__version__,
            )
        )
    return made


def _slabs(unit: Unit, centres: np.ndarray) -> Iterator[DigitalObject]:
    """The thin sub-slices of each slice; those that two slices share (the profile's ramp) are made once."""
    shape = (unit.trial.object_matrix,) * 2
    offsets, _ = slice_profile(SUBSLICE_MM, unit.thickness_mm, _SCANNER)
    slab, before = None, np.zeros(0)
    for centre in centres:
        z = centre + offsets
        fresh = ~np.isclose(z[:, None], before, rtol=0, atol=1e-6).any(1)
        new = unit.patient.slab(z[fresh], SUBSLICE_MM, shape=shape, fov_mm=_SCANNER.fov_mm)
        slab = new if slab is None else _stacked(slab, new, len(z))
        before = z
        yield slab


def _stacked(old: DigitalObject, new: DigitalObject, count: int) -> DigitalObject:
    """The last sub-slices of `old` and all of `new`, `count` together."""
    keep = count - len(new.hu120)
    if keep == 0:
        return new

    def join(a: np.ndarray, b: np.ndarray, axis: int = 0) -> np.ndarray:
        return np.concatenate([np.take(a, range(a.shape[axis] - keep, a.shape[axis]), axis), b], axis)

    return DigitalObject(
        join(old.hu120, new.hu120),
        join(old.spectral, new.spectral, 1),
        new.geometry,
        {name: join(old.masks[name], mask) for name, mask in new.masks.items()},
    )


def _render(slab: DigitalObject, protocols: list[ScanProtocol], unit: Unit, z: int) -> list[np.ndarray]:
    """One slice under every protocol."""
    _, weights = slice_profile(SUBSLICE_MM, unit.thickness_mm, _SCANNER)
    images: list[np.ndarray] = []
    for kvp in unit.group.kvp:
        images += render_slice(
            slab.hu(kvp),
            weights,
            pixel_mm=_SCANNER.fov_mm / unit.trial.object_matrix,
            protocols=[p for p in protocols if p.kvp == kvp],
            scanner=_SCANNER,
            seed=unit.noise_seed,
            slice_index=z,
            matrix=unit.trial.matrix,
            kernels=unit.kernels,
        )
    return images


def _covered(sub_slices: int, thickness_mm: float) -> np.ndarray:
    """How much of the slice each sub-slice fills, sum 1, float32: the truth has a slice profile with sharp edges."""
    low = (np.arange(sub_slices) - sub_slices / 2) * SUBSLICE_MM
    overlap = np.minimum(low + SUBSLICE_MM, thickness_mm / 2) - np.maximum(low, -thickness_mm / 2)
    share = np.clip(overlap, 0.0, None)
    return (share / share.sum()).astype(np.float32)


def _area_average(trial: Trial) -> Callable[[np.ndarray], np.ndarray]:
    """From the object's grid to the image's: each pixel the exact mean of what lies in it."""
    size, wide = trial.matrix, trial.object_matrix
    step, pixel = _SCANNER.fov_mm / wide, trial.fov_mm / size
    low = -trial.fov_mm / 2 + pixel * np.arange(size)[:, None]
    start = -_SCANNER.fov_mm / 2 + step * np.arange(wide)[None, :]
    overlap = np.clip(np.minimum(low + pixel, start + step) - np.maximum(low, start), 0, None)
    weights = (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)
    return lambda image: weights @ image @ weights.T


def _write_masks(masks: dict[str, list[np.ndarray]], geometry: Geometry, folder: Path, matrix: int) -> dict[str, Path]:
    """Write every mask (bits packed along x) that holds a voxel: name -> file."""
    written = {}
    with new_folder(folder, lambda old: True) as filling:
        for name, packed in sorted(masks.items()):
            mask = np.unpackbits(np.stack(packed), axis=2, count=matrix)
            if mask.any():
                write_mask(mask, geometry, filling / f"{name}.nii.gz")
                written[name] = folder / f"{name}.nii.gz"
    return written


def _centres(trial: Trial, start: float, thickness_mm: float) -> np.ndarray:
    count = int(np.floor(trial.length_mm / thickness_mm + 1e-6))
    return start + thickness_mm * (np.arange(count) + 0.5)


def _start(unit: Unit) -> float:
    """Where the scan begins: about as many nodules as it can hold, else at a place that follows from the seed."""
    length = unit.trial.length_mm
    low, high = unit.patient.lung_z_mm
    heights = sorted(centre[2] for centre, _ in unit.patient.placed_nodules())
    if heights:
        together = max(([h for h in heights if z <= h <= z + 0.7 * length] for z in heights), key=len)
        middle = (together[0] + together[-1]) / 2
    else:
        middle = low + (0.3 + 0.4 * np.random.default_rng([unit.seed, 7]).uniform()) * (high - low)
    margin = length / 2 + 6
    middle = float(np.clip(middle, low + margin, max(high - margin, low + margin)))
    return round((middle - length / 2) / SUBSLICE_MM) * SUBSLICE_MM


def _emphysema(group: Group, model: int, seed: int) -> EmphysemaSpec | None:
    if group.emphysema is None:
        return None
    rng = np.random.default_rng([seed, 11, model])
    low, high = group.emphysema
    share = low + (high - low) * (model + rng.uniform()) / group.models
    distribution = "upper" if rng.uniform() < 0.5 else "diffuse"
    return EmphysemaSpec(round(float(share), 3), distribution, round(float(rng.uniform(3, 12)), 1))  # type: ignore[arg-type]


def _role(protocol: ScanProtocol, trial: Trial) -> str:
    if protocol.model == "truth":
        return "target" if trial.target == "truth" else "truth"
    return "target" if trial.target != "truth" and protocol.matches(parse_protocol(trial.target)) else "source"


def _label(protocol: ScanProtocol, group: Group) -> str:
    kvp = f" {protocol.kvp:g}kV" if len(group.kvp) > 1 else ""
    strength = f"-i{protocol.iterative_strength:g}" if protocol.iterative_strength else ""
    return f"{protocol.kernel}{strength} {protocol.slice_thickness_mm:g}mm {protocol.ctdivol_mgy:g}mGy{kvp}"


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", label)


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)


def _rendition(text: str) -> tuple[str, float]:
    """ "Br40(3)" -> ("Br40", 3.0)."""
    found = _RENDITION.fullmatch(text)
    if not found:
        raise HarmonictError(f"rendition {text!r}: expected a kernel, or a kernel and its strength as in Br40(3)")
    return found[1], float(found[2] or 0)


# -- configuration ---------------------------------------------------------------------------------------------------


def _presets() -> Any:
    return files("harmonict.simulate").joinpath("presets")


def _shrunk(values: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """The small form: [small] replaces fields of the trial, [small.group.NAME] fields of one group."""
    groups = small.get("group", {})
    own = {k: v for k, v in small.items() if k != "group"}
    return {**values, **own, "group": [{**g, **groups.get(g["name"], {})} for g in values["group"]]}


def _trial_from(values: dict[str, Any], where: str) -> Trial:
    groups = values.pop("group", None)
    if not isinstance(groups, list) or not groups or not all(isinstance(g, dict) for g in groups):
        raise HarmonictError(f"{where}: expected at least one [[group]] of patients")
    made = [Group(**_typed(Group, g, f"{where}: [[group]] {n}")) for n, g in enumerate(groups, 1)]
    return Trial(**_typed(Trial, values, where), groups=tuple(made))


def _typed(kind: type[Trial] | type[Group], values: dict[str, Any], where: str) -> dict[str, Any]:
    """What a TOML table says, as the fields of `kind`: lists as tuples, whole numbers as floats where they are read so.

    Raises HarmonictError on a key that is unknown or missing, and on a value of another type.
    """
    known = {f.name: f for f in fields(kind) if f.name != "groups"}
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise HarmonictError(f"{where}: unknown key {key!r}; did you mean {near}? Keys: {', '.join(known)}")
    missing = [name for name, f in known.items() if f.default is MISSING and name not in values]
    if missing:
        raise HarmonictError(f"{where}: {', '.join(missing)} is missing")
    typed = {}
    for key, value in values.items():
        text = str(known[key].type)
        many = text.startswith("tuple")
        one, words = (
            (float, "numbers" if many else "a number")
            if "float" in text
            else (int, "a whole number")
            if text == "int"
            else (str, "texts" if many else "a text")
        )
        items = value if isinstance(value, list) else [value]
        right = all(isinstance(v, (int, float) if one is float else one) and not isinstance(v, bool) for v in items)
        if isinstance(value, list) != many or not right:
            raise HarmonictError(f"{where}: {key} must be {'a list of ' if many else ''}{words}, got {value!r}")
        typed[key] = tuple(one(v) for v in items) if many else one(value)
    return typed


def _check_group(group: Group, trial: Trial, kernels: dict[str, Kernel]) -> None:
    where = f"group {group.name}"
    if group.split not in SPLITS:
        raise HarmonictError(f"{where}: split must be one of {', '.join(SPLITS)}, got {group.split!r}")
    if group.kind not in KINDS:
        raise HarmonictError(f"{where}: kind must be one of {', '.join(KINDS)}, got {group.kind!r}")
    if not 1 <= group.patients <= 999 or not 1 <= group.models <= len(_MODELS) or group.nodules < 0:
        raise HarmonictError(f"{where}: patients must be 1 to 999, models 1 to {len(_MODELS)}, nodules 0 or more")
    if group.emphysema is None:
        if group.models > 1:
            raise HarmonictError(
                f"{where}: {group.models} models differ in their emphysema, so give emphysema = [A, B]"
            )
    elif len(group.emphysema) != 2 or not 0 <= group.emphysema[0] <= group.emphysema[1] <= 0.6:
        raise HarmonictError(
            f"{where}: emphysema must be the least and the greatest share of lung, between 0 and 0.6, "
            f"got {list(group.emphysema)}"
        )
    for name in ("renditions", "doses_mgy", "thicknesses_mm", "kvp"):
        values = getattr(group, name)
        if not values or len({str(v).casefold() for v in values}) < len(values):
            raise HarmonictError(f"{where}: {name} must be a list without repetition, got {list(values)}")
    for thickness in group.thicknesses_mm:
        try:
            check_protocols(group.protocols(thickness, trial.fov_mm), scanner=_SCANNER, kernels=kernels)
            slice_profile(SUBSLICE_MM, thickness, _SCANNER)
        except HarmonictError as error:
            raise HarmonictError(f"{where}: {error}") from None
        if thickness > trial.length_mm * (1 + 1e-6):
            raise HarmonictError(
                f"{where}: {trial.length_mm:g} mm are scanned, too few for a slice of {thickness:g} mm; ask for more "
                "slices"
            )


def _check_target(trial: Trial) -> None:
    if trial.target == "truth":
        return
    wanted = parse_protocol(trial.target)
    made = [p for g in trial.groups for t in g.thicknesses_mm for p in g.protocols(t, trial.fov_mm)]
    if not any(complete_protocol(p, kernels=user_kernels(trial)).matches(wanted) for p in made):
        labels = dict.fromkeys(p.label() for p in made)
        raise HarmonictError(
            f"trial {trial.name}: no group makes the target {trial.target!r}; it must be truth or one of: "
            f"{', '.join(labels)}"
        )


def _configuration(trial: Trial, kernels: dict[str, Kernel]) -> dict[str, Any]:
    """All that decides a trial's bytes, as JSON holds it: a user's kernels by their curves, not by their paths."""
    curves = {
        name: simulation_key(kernel.frequency_per_mm.tolist(), kernel.mtf.tolist()) for name, kernel in kernels.items()
    }
    values = {"harmonict": __version__, **asdict(trial), "kernel_files": curves}
    return json.loads(json.dumps(values))


# -- the output folder -----------------------------------------------------------------------------------------------


def _check_folder(out: Path, configuration: dict[str, Any]) -> None:
    """Raise HarmonictError where `out` is anything but new, empty, or a trial of this configuration."""
    if out.exists() and not out.is_dir():
        raise HarmonictError(f"{out} is a file; the output must be a folder")
    state = out / STATE_FILE
    if state.exists():
        try:
            found = json.loads(state.read_text(encoding="utf-8"))
            differ = [k for k in configuration if found.get(k) != configuration[k]]
        except (OSError, ValueError, AttributeError):
            raise HarmonictError(f"{state} is not the state of a trial; choose another --out") from None
        if differ:
            raise HarmonictError(
                f"{out} holds a trial of another configuration or seed ({', '.join(differ)}); choose another --out"
            )
    elif out.exists() and any(f.name != _unfinished(state).name for f in out.iterdir()):
        raise HarmonictError(f"{out} is not empty and holds no trial; choose another --out")


def _open_folder(out: Path, configuration: dict[str, Any]) -> None:
    """Make the folder, or clear away what a killed run left half written."""
    state = out / STATE_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not state.exists():
            _unfinished(state).write_text(json.dumps(configuration, indent=2) + "\n", encoding="utf-8")
            os.replace(_unfinished(state), state)
        for leftover in out.glob(".cohort.csv.*"):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise HarmonictError(f"cannot write to {out}: {error.strerror}") from None
    stale_temporaries(out)


def _unfinished(state: Path) -> Path:
    return state.with_name(f".{state.name}.part")


def _finished_rows(work: list[Unit], out: Path) -> list[dict[str, Any]]:
    """Rows of `out/cohort.csv` that belong to finished parts of `work`, with their series still in place."""
    if not (out / "cohort.csv").exists():
        return []
    series = {(unit.patient_id, unit.thickness_mm): _series_count(unit) for unit in work}
    table = read_cohort(out / "cohort.csv").astype(object)
    rows: list[dict[str, Any]] = table.where(table.notna(), None).to_dict("records")  # type: ignore[assignment]
    kept = []
    for part, group in groupby(rows, key=lambda row: (row["patient"], row["slice_thickness_mm"])):
        found = list(group)
        whole = all(r["state"] == "done" and len(list(Path(r["path"]).glob("*.dcm"))) == r["slices"] for r in found)
        if whole and len(found) == series.get(part):
            kept += found
    return kept


def _series_count(unit: Unit) -> int:
    return len(unit.group.protocols(unit.thickness_mm, unit.trial.fov_mm)) + 1
