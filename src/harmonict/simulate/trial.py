"""The virtual imaging trial: patients x doses x kernels x thicknesses -> DICOM, truth, masks and the cohort table.

A trial is a TOML file (`presets/`): groups of patients, and for each group the renditions that its patients get. One
patient at one slice thickness is the unit of work: its projections are made once and shared by all doses and kernels.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

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
from harmonict.simulate.phantom import SUBSLICE_MM, DigitalObject, Patient, make_patient
from harmonict.simulate.reconstruct import check_protocols, complete_protocol, render_slice
from harmonict.simulate.scanner import Scanner, slice_profile
from harmonict.volumes import write_mask

STATE_FILE = "trial.json"
TRUTH_KVP = 120.0
SPLITS = ("train", "test", "score")


@dataclass(frozen=True)
class Group:
    """Patients that are scanned in the same way.

    split: "train", "test", or "score" (never read in training). models: representations of each patient, differing in
    their emphysema alone; emphysema: least and greatest share of lung that is gone, model k drawn from the k-th part of
    that range. renditions: "Br40" or "Br40(3)" for iterative strength 3.
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
                    kernel, _, strength = rendition.removesuffix(")").partition("(")
                    found.append(
                        ScanProtocol(
                            kernel=kernel,
                            iterative_strength=float(strength or 0),
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
    the others shall be harmonized to, or "truth". kernel_files: CSVs of the user's own MTFs.
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
    """One patient model at one slice thickness."""

    trial: Trial
    out: Path
    group: Group
    patient: Patient
    patient_id: str
    subject: str
    seed: int
    thickness_mm: float


def preset_names() -> list[str]:
    """Presets and their small forms."""
    names = sorted(f.name.removesuffix(".toml") for f in _presets().iterdir() if f.name.endswith(".toml"))
    return [form for name in names for form in (name, f"{name}-small") if form != "demo-small"]


def load_trial(name: str | Path, *, slices: int | None = None, seed: int | None = None) -> Trial:
    """A preset ("duke", "duke-small") or a TOML file -> Trial, checked before anything is computed.

    Raises HarmonictError on an unknown preset (the nearest is suggested), key, kernel, a dose that is not above 0, ...
    """
    text = str(name)
    base, small = (text.removesuffix("-small"), True) if text.endswith("-small") else (text, False)
    folder: Path | None = None
    if text.endswith(".toml"):
        folder = Path(text).parent
        try:
            content = Path(text).read_text()
        except OSError as error:
            raise HarmonictError(f"cannot read {text}: {error.strerror}") from None
    elif text in preset_names():
        content = _presets().joinpath(f"{base}.toml").read_text()
    else:
        near = get_close_matches(text, preset_names(), n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise HarmonictError(f"no preset {text!r}{hint} Presets: {', '.join(preset_names())}; or give a .toml file")
    try:
        values = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise HarmonictError(f"{text} is not TOML: {error}") from None
    shrink = values.pop("small", {})
    if small and not folder:
        values = _shrunk(values, shrink)
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
    if trial.slices < 1 or not trial.slice_mm > 0:
        raise HarmonictError(f"trial {trial.name}: slices and slice_mm must be above 0")
    if not 16 <= trial.matrix <= 2048 or trial.object_matrix < trial.matrix / 2:
        raise HarmonictError(f"trial {trial.name}: matrix must be 16 to 2048, object_matrix at least half of it")
    if trial.seed < 0:
        raise HarmonictError(f"trial {trial.name}: the seed must be 0 or more, got {trial.seed}")
    if trial.target != "truth":
        parse_protocol(trial.target)
    kernels = user_kernels(trial)
    for group in trial.groups:
        if group.split not in SPLITS:
            raise HarmonictError(f"group {group.name}: split must be one of {', '.join(SPLITS)}, got {group.split!r}")
        if group.patients < 1 or group.models < 1:
            raise HarmonictError(f"group {group.name}: patients and models must be at least 1")
        for thickness in group.thicknesses_mm:
            check_protocols(group.protocols(thickness, trial.fov_mm), scanner=Scanner(), kernels=kernels)
            slice_profile(SUBSLICE_MM, thickness, Scanner())
            if thickness > trial.length_mm * (1 + 1e-6):
                raise HarmonictError(
                    f"group {group.name}: {trial.length_mm:g} mm are scanned, too few for a slice of {thickness:g} mm; "
                    "ask for more slices"
                )


def user_kernels(trial: Trial) -> dict[str, Kernel]:
    """The user's own kernels by name (the file's name without .csv)."""
    kernels = {}
    for path in trial.kernel_files:
        name = Path(path).stem
        if name in kernel_names():
            raise HarmonictError(f"{path}: {name} is a kernel that is known already; rename the file")
        kernels[name] = replace(load_kernel_csv(path), name=name)
    return kernels


def disk_bytes(trial: Trial) -> int:
    """What the trial needs on disk: the images at 2 bytes a voxel and 1.5 kB a header."""
    slices = 0
    for group in trial.groups:
        for thickness in group.thicknesses_mm:
            series = len(group.protocols(thickness, trial.fov_mm)) + 1
            slices += group.patients * group.models * series * len(_centres(trial, 0.0, thickness))
    return slices * (2 * trial.matrix**2 + 1500)


def units(trial: Trial, out: Path) -> list[Unit]:
    """The work, patient by patient."""
    found = []
    number = 0
    for group in trial.groups:
        for n in range(group.patients):
            seed = int(np.random.SeedSequence([trial.seed, number]).generate_state(1)[0] % 2**31)
            number += 1
            subject = f"{trial.name}-{group.name}-{n + 1:03d}"
            for model in range(group.models):
                patient_id = subject if group.models == 1 else f"{subject}{chr(ord('a') + model)}"
                patient = make_patient(
                    seed,
                    kind=group.kind,
                    nodules=group.nodules,
                    emphysema=_emphysema(group, model, seed),
                )
                for thickness in group.thicknesses_mm:
                    found.append(Unit(trial, out, group, patient, patient_id, subject, seed, thickness))
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

    Everything follows from the configuration and the seed: a finished patient is not made again, and an interrupted run
    goes on. Raises HarmonictError where `out` holds anything else.
    """
    out = Path(out).resolve()
    check_trial(trial)
    config = {"harmonict": __version__, **asdict(trial)}
    config = json.loads(json.dumps(config))
    _check_folder(out, config)
    stale_temporaries(out)
    work = units(trial, out)
    for unit in work:  # before any computing: a body outside the field of view, or a scan longer than the phantom
        start = _start(unit)
        unit.patient.check(np.array([start - 1, start + trial.length_mm + 1]), Scanner().fov_mm)
    rows: list[dict[str, Any]] = []
    done: set[tuple[str, float]] = set()
    if (out / "cohort.csv").exists():
        earlier = read_cohort(out / "cohort.csv").astype(object)
        rows = earlier.where(earlier.notna(), None).to_dict("records")  # type: ignore[assignment]
        done = {(str(r["patient"]), float(r["slice_thickness_mm"])) for r in rows}
        say(f"{len(done)} of {len(work)} parts of this trial are there: going on")
    left = [unit for unit in work if (unit.patient_id, unit.thickness_mm) not in done]
    for n, (index, result) in enumerate(map_series(run_unit, left, jobs=jobs)):
        if isinstance(result, HarmonictError):
            raise HarmonictError(f"{left[index].patient_id}, {left[index].thickness_mm:g} mm: {result}")
        rows += result
        write_cohort(cohort_table(rows), out / "cohort.csv")
        if progress:
            progress(n + 1, len(left), result[0])
    order = {(unit.patient_id, unit.thickness_mm): n for n, unit in enumerate(work)}
    rows.sort(key=lambda row: order[str(row["patient"]), float(row["slice_thickness_mm"])])
    table = cohort_table(rows)
    write_cohort(table, out / "cohort.csv")
    return table


def run_unit(unit: Unit) -> list[dict[str, Any]]:
    """Scan one patient at one thickness under every protocol; writes series, truth and masks, returns their rows."""
    trial, group, thickness = unit.trial, unit.group, unit.thickness_mm
    scanner, kernels = Scanner(), user_kernels(trial)
    protocols = group.protocols(thickness, trial.fov_mm)
    labels = [_label(p, group) for p in protocols]
    pixel = trial.fov_mm / trial.matrix
    centres = _centres(trial, _start(unit), thickness)
    corner = -(trial.matrix - 1) / 2 * pixel
    geometry = Geometry((corner, corner, float(centres[0])), (thickness, pixel, pixel))
    truth = ScanProtocol(
        manufacturer="harmonict",
        model="truth",
        slice_thickness_mm=thickness,
        kvp=TRUTH_KVP,
        fov_mm=trial.fov_mm,
    )
    complete = [*(complete_protocol(p, kernels=kernels) for p in protocols), truth]
    labels.append(f"truth {thickness:g}mm")
    key = simulation_key(__version__, trial.seed, asdict(unit.patient), trial.matrix, trial.object_matrix, scanner)
    series = [
        Simulation(unit.patient_id, label, key, 100 * group.thicknesses_mm.index(thickness) + n + 1, __version__)
        for n, label in enumerate(labels)
    ]
    home = unit.out / unit.patient_id
    masks: dict[str, np.ndarray] = {}
    average = _area_average(trial, scanner)
    with ExitStack() as stack:
        folders = [stack.enter_context(new_folder(home / _slug(s.label), lambda old: True)) for s in series]
        for z, slab in enumerate(_slabs(unit, centres, scanner)):
            images = _render(slab, protocols, unit, scanner, z, kernels)
            inside = np.abs(np.arange(len(slab.hu120)) - (len(slab.hu120) - 1) / 2) * SUBSLICE_MM < thickness / 2
            images.append(average(slab.hu(TRUTH_KVP)[inside].mean(0)))
            for name, mask in slab.masks.items():
                part = average(mask[inside].mean(0, dtype=np.float32)) >= 0.5
                masks.setdefault(name, np.zeros((len(centres), *part.shape), bool))[z] = part
            for image, protocol, one, folder in zip(images, complete, series, folders, strict=True):
                write_simulated_image(simulated_image(image, z, geometry, protocol, one), folder, z)
    mask_folder = home / f"masks-{thickness:g}mm"
    mask_folder.mkdir(exist_ok=True)
    mask_paths = []
    for name, mask in sorted(masks.items()):
        write_mask(mask, geometry, mask_folder / f"{name}.nii.gz")
        mask_paths.append(f"{name}={(mask_folder / f'{name}.nii.gz').relative_to(unit.out)}")
    emphysema = unit.patient.emphysema
    common = {
        "patient": unit.patient_id,
        "format": "dicom",
        "masks": ";".join(mask_paths),
        "slices": len(centres),
        "rows": trial.matrix,
        "columns": trial.matrix,
        "spacing_z_mm": thickness,
        "spacing_y_mm": pixel,
        "spacing_x_mm": pixel,
        "body_part": "CHEST",
        "state": "done",
        "subject": unit.subject,
        "group": group.name,
        "split": group.split,
        "emphysema_share": emphysema.share if emphysema else 0.0,
        "nodules": ";".join(f"{n.density} {n.diameter_mm:g}" for n in unit.patient.nodules),
    }
    return [
        {
            **common,
            **protocol.as_dict(),
            "path": str(home / _slug(one.label)),
            "series": one.series_uid,
            "role": _role(protocol, trial),
        }
        for protocol, one in zip(complete, series, strict=True)
    ]


# -- parts of a unit -------------------------------------------------------------------------------------------------


def _slabs(unit: Unit, centres: np.ndarray, scanner: Scanner) -> Iterator[DigitalObject]:
    """The thin sub-slices of each slice."""
    shape = (unit.trial.object_matrix,) * 2
    offsets, _ = slice_profile(SUBSLICE_MM, unit.thickness_mm, scanner)
    for centre in centres:
        yield unit.patient.slab(centre + offsets, SUBSLICE_MM, shape=shape, fov_mm=scanner.fov_mm)


def _render(
    slab: DigitalObject,
    protocols: list[ScanProtocol],
    unit: Unit,
    scanner: Scanner,
    z: int,
    kernels: dict[str, Kernel],
) -> list[np.ndarray]:
    """One slice under every protocol."""
    _, weights = slice_profile(SUBSLICE_MM, unit.thickness_mm, scanner)
    images: list[np.ndarray] = []
    for kvp in dict.fromkeys(p.kvp for p in protocols):
        images += render_slice(
            slab.hu(kvp or TRUTH_KVP),
            weights,
            pixel_mm=scanner.fov_mm / unit.trial.object_matrix,
            protocols=[p for p in protocols if p.kvp == kvp],
            scanner=scanner,
            seed=unit.seed,
            slice_index=z,
            matrix=unit.trial.matrix,
            kernels=kernels,
        )
    return images


def _area_average(trial: Trial, scanner: Scanner) -> Callable[[np.ndarray], np.ndarray]:
    """From the object's grid to the image's: each pixel the exact mean of what lies in it."""
    size, wide = trial.matrix, trial.object_matrix
    step, pixel = scanner.fov_mm / wide, trial.fov_mm / size
    low = -trial.fov_mm / 2 + pixel * np.arange(size)[:, None]
    start = -scanner.fov_mm / 2 + step * np.arange(wide)[None, :]
    overlap = np.clip(np.minimum(low + pixel, start + step) - np.maximum(low, start), 0, None)
    weights = (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)
    return lambda image: weights @ image @ weights.T


def _centres(trial: Trial, start: float, thickness_mm: float) -> np.ndarray:
    count = int(np.floor(trial.length_mm / thickness_mm + 1e-6))
    return start + thickness_mm * (np.arange(count) + 0.5)


def _start(unit: Unit) -> float:
    """Where the scan begins: about the first nodule, else at a place of the lung that follows from the seed."""
    low, high = unit.patient.lung_z_mm
    margin = unit.trial.length_mm / 2 + 6
    placed = unit.patient.placed_nodules()
    if placed:
        centre = placed[0][0][2]
    else:
        centre = low + (0.3 + 0.4 * np.random.default_rng([unit.seed, 7]).uniform()) * (high - low)
    middle = float(np.clip(centre, low + margin, max(high - margin, low + margin)))
    return round((middle - unit.trial.length_mm / 2) / SUBSLICE_MM) * SUBSLICE_MM


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


# -- configuration and folder ----------------------------------------------------------------------------------------


def _presets() -> Any:
    return files("harmonict.simulate").joinpath("presets")


def _shrunk(values: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """The small form: [small] replaces fields of the trial, [small.group] fields of every group."""
    groups = small.get("group", {})
    own = {k: v for k, v in small.items() if k != "group"}
    return {**values, **own, "group": [{**g, **groups.get(g["name"], {})} for g in values["group"]]}


def _trial_from(values: dict[str, Any], where: str) -> Trial:
    values = dict(values)
    groups = values.pop("group", None)
    if not groups:
        raise HarmonictError(f"{where}: expected at least one [[group]] of patients")
    try:
        return Trial(**_tuples(values), groups=tuple(Group(**_tuples(g)) for g in groups))
    except TypeError as error:
        words = re.sub(r"^\w+\.__init__\(\) ", "", str(error))
        raise HarmonictError(f"{where}: {words}") from None


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _check_folder(out: Path, config: dict[str, Any]) -> None:
    if out.exists() and not out.is_dir():
        raise HarmonictError(f"{out} is a file; the output must be a folder")
    state = out / STATE_FILE
    if state.exists():
        try:
            found = json.loads(state.read_text())
        except ValueError:
            found = None
        if found != config:
            raise HarmonictError(f"{out} holds a trial of another configuration or seed; choose another --out")
        return
    if out.exists() and any(out.iterdir()):
        raise HarmonictError(f"{out} is not empty and holds no trial; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise HarmonictError(f"cannot write to {out}: {error.strerror}") from None
