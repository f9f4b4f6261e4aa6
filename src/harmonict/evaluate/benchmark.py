"""Many models on one trial: each is trained where it is not there yet, applied to the test patients, and measured.

    OUT/trial/            the virtual trial, where the plan names a preset
    OUT/models/NAME       trained models (NAME.run, NAME.log, NAME.fit.json beside them)
    OUT/targets, OUT/results/NAME     what was measured, a file for each test series
    OUT/*.csv, OUT/tables.md          the tables, written anew after every model

Everything resumes: a model that is there with the same settings is not trained again, and what was measured of a model
with the same digest is not measured again. A model that fails is a row with its reason; the others go on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harmonict.core import PROTOCOL_COLUMNS, HarmonictError, ScanProtocol, Series, parse_protocol
from harmonict.core.cohort import read_cohort
from harmonict.core.files import write_whole
from harmonict.data import cohort_pairs
from harmonict.evaluate.benchmark_plan import ModelPlan, Plan
from harmonict.evaluate.benchmark_tables import REFERENCES, Result, Tables, make_tables, write_tables
from harmonict.evaluate.real_pairs import fitted_on_the_other_part, real_pair
from harmonict.evaluate.scores import (
    CaseFiles,
    RealCase,
    measure,
    measure_target,
    read_arrays,
    write_arrays,
)
from harmonict.harmonizer import CONFIG_FILE, Harmonizer
from harmonict.methods import get_method, load_model
from harmonict.scale import map_series
from harmonict.simulate.trial import load_trial, preset_names, run_trial

REAL_ROIS = 24  # as in docs/results-real-pairs.md
TIMING_THREADS = 1
TIMING_REPEATS = 3

Say = Callable[[str], None]
AnyCase = CaseFiles | RealCase


@dataclass(frozen=True)
class Fitted:
    """A model of the plan: one folder, or one for each source protocol that it is for (in words)."""

    folders: dict[str, Path]

    def folder(self, protocol: ScanProtocol) -> Path:
        """The folder for a source: the only one, that of its kernel, or that of the nearest protocol of its kernel."""
        if list(self.folders) == [""]:
            return self.folders[""]
        known = {text: parse_protocol(text) for text in self.folders}
        same = [text for text, p in known.items() if (p.kernel or "").casefold() == (protocol.kernel or "").casefold()]
        if not same:
            raise HarmonictError(f"no filter for the kernel {protocol.kernel}; there are: {', '.join(self.folders)}")

        def apart(text: str) -> tuple[float, ...]:
            fields = ("iterative_strength", "ctdivol_mgy", "slice_thickness_mm")
            pairs = ((getattr(known[text], f), getattr(protocol, f)) for f in fields)
            return tuple(abs((a or 0) - (b or 0)) if a is not None else 0.0 for a, b in pairs)

        return self.folders[min(same, key=apart)]

    @property
    def digest(self) -> str:
        models = {text: load_model(folder).digest for text, folder in sorted(self.folders.items())}
        return hashlib.sha256(json.dumps(models).encode()).hexdigest()


@dataclass(frozen=True)
class Task:
    """What a worker needs to measure one model on one case."""

    case: AnyCase
    folder: Path | None
    fit: str | None  # a reference that is fitted on the real pair itself
    path: Path
    key: str
    tumour: bool


def run_benchmark(
    plan: Plan,
    out: str | Path,
    *,
    trial: str | Path | None = None,
    only: Sequence[str] = (),
    data: str | Path | None = None,
    jobs: int = 1,
    say: Say = lambda line: None,
) -> Tables:
    """Do what is left of a plan, and make its tables.

    trial: a cohort table instead of the plan's trial. only: names of models; the tables hold the others too where an
    earlier run finished them. data: the folder of public images, for real pairs. Raises HarmonictError where nothing
    can be done at all.
    """
    out = Path(out)
    names = [model.name for model in plan.models]
    for name in only:
        if name not in names:
            raise HarmonictError(f"the plan has no model {name!r}; it has: {', '.join(names)}")
    cohort = Path(trial) if trial is not None else _trial(plan, out, jobs, say)
    cases = _cases(plan, cohort, data)
    tumour = tumour_case(plan, cases)
    out.mkdir(parents=True, exist_ok=True)
    targets = _measure_targets(cases, tumour, out, jobs, say)
    results: dict[str, Result] = {}
    references = {
        f"{fit}, fitted here": _reference(fit, cases, out, jobs)
        for fit in (REFERENCES if "real-pairs" in plan.evaluate_on else ())
    }
    last = [name for name in names if not only or name in only][-1]
    for model in plan.models:
        wanted = not only or model.name in only
        try:
            results[model.name] = _one_model(model, plan, cohort, cases, tumour, out, jobs, wanted, say)
        except HarmonictError as error:
            results[model.name] = Result(model.method, reason=str(error))
            if wanted:
                say(f"{model.name}: FAILED: {error}")
        if wanted and model.name != last:
            write_tables(make_tables(plan, cases, targets, results | references, tumour), out)
    tables = make_tables(plan, cases, targets, results | references, tumour)
    write_tables(tables, out)
    return tables


# -- cases -------------------------------------------------------------------------------------------------------------


def test_cases(plan: Plan, cohort: str | Path) -> list[CaseFiles]:
    """Every series of the split "test" that has one of the plan's source protocols, with its patient's target series.

    Raises HarmonictError where there is none, or a patient has several targets.
    """
    table = read_cohort(cohort)
    if "split" not in table:
        raise HarmonictError(f"{cohort}: no column split; a benchmark needs rows of the split test")
    table = table[(table["split"] == "test") & ~table["state"].isin(("left_out", "failed"))]
    rows = [(row, _protocol(row)) for row in table.astype(object).where(table.notna(), None).to_dict("records")]
    truth = [(row, protocol) for row, protocol in rows if row["role"] == "truth"]
    rows = [(row, protocol) for row, protocol in rows if row["role"] not in ("truth", "derived")]
    wanted = parse_protocol(plan.target)
    matching = [(row, p) for row, p in rows if p.matches(wanted)]
    targets = [(row, p) for row, p in matching if row["role"] == "target"] or matching
    if plan.target.casefold() == "truth":
        targets = truth
    sources = [parse_protocol(text) for text in plan.sources]
    found = []
    for row, protocol in rows:
        if not any(protocol.matches(s) for s in sources) or any(row is t for t, _ in targets):
            continue
        own = [(t, p) for t, p in targets if t["patient"] == row["patient"]]
        if len(own) > 1:
            own = [(t, p) for t, p in own if p.slice_thickness_mm == protocol.slice_thickness_mm] or own
        if len(own) > 1:
            raise HarmonictError(f"{cohort}: the target {plan.target} is ambiguous for {row['patient']}; say more")
        if own:
            found.append(_case(row, protocol, *own[0], Path(cohort), plan))
    if not found:
        raise HarmonictError(f"{cohort}: no test series of {', '.join(plan.sources)} with a target {plan.target}")
    return found


def tumour_case(plan: Plan, cases: Sequence[AnyCase]) -> AnyCase | None:
    """The test series that the one-tumour table and figure show."""
    with_nodule = [case for case in cases if isinstance(case, CaseFiles) and case.masks]
    if plan.tumour is not None:
        named = [case for case in with_nodule if case.name == plan.tumour]
        if not named:
            names = ", ".join(case.name for case in with_nodule)
            raise HarmonictError(f"tumour {plan.tumour!r} is no test series with a nodule; there are: {names}")
        return named[0]
    return next((case for case in with_nodule if case.differs == "kernel"), None)


def _cases(plan: Plan, cohort: Path, data: str | Path | None) -> list[AnyCase]:
    cases: list[AnyCase] = []
    if "test" in plan.evaluate_on:
        cases += test_cases(plan, cohort)
    if "real-pairs" in plan.evaluate_on:
        if data is None:
            raise HarmonictError("real pairs: set HARMONICT_DATA to the folder of the public images")
        kernels = [parse_protocol(text).kernel or "" for text in (plan.sources[0], plan.target)]
        cases.append(RealCase(real_pair(data, kernels[0], kernels[1]), REAL_ROIS, plan.seed))
    return cases


def _case(
    row: dict[str, Any],
    protocol: ScanProtocol,
    target: dict[str, Any],
    target_protocol: ScanProtocol,
    cohort: Path,
    plan: Plan,
) -> CaseFiles:
    masks = []
    for item in (target["masks"] or "").split(";"):
        name, equals, path = item.partition("=")
        if equals and name.startswith("nodule"):
            masks.append((name, str(cohort.parent.resolve() / path)))
    pairs = {name: (getattr(protocol, name), getattr(target_protocol, name)) for name in PROTOCOL_COLUMNS}
    # the truth has no strength and no dose
    known = {name for name, (a, b) in pairs.items() if b is not None and a != b}
    if "iterative_strength" in known or (target["role"] == "truth" and protocol.iterative_strength):
        differs = "iterative"
    else:
        differs = "dose or thickness" if known & {"ctdivol_mgy", "slice_thickness_mm", "kvp"} else "kernel"
    return CaseFiles(
        name=f"{row['patient']} {protocol.label()}",
        patient=str(row.get("subject") or row["patient"]),
        differs=differs,
        source=(row["path"], row["series"]),
        target=(target["path"], target["series"]),
        source_protocol=protocol,
        target_protocol=target_protocol,
        masks=tuple(masks),
        slices=plan.slices,
        rois=plan.rois,
        seed=plan.seed,
    )


def _protocol(row: dict[str, Any]) -> ScanProtocol:
    return ScanProtocol(**{name: row[name] for name in PROTOCOL_COLUMNS})


def _trial(plan: Plan, out: Path, jobs: int, say: Say) -> Path:
    if plan.trial not in preset_names():
        return Path(plan.trial)
    table = run_trial(load_trial(plan.trial), out / "trial", jobs=jobs, say=say)
    failed = table[table["state"] == "failed"]
    if len(failed):
        raise HarmonictError(f"{len(failed)} parts of the trial failed; the first: {failed.iloc[0]['reason']}")
    return out / "trial" / "cohort.csv"


# -- training ----------------------------------------------------------------------------------------------------------


def _fitted(model: ModelPlan, plan: Plan, cohort: Path, out: Path, wanted: bool, say: Say) -> Fitted:
    """The model's folder or folders; trained here where `wanted` and not there yet."""
    if model.problem:
        raise HarmonictError(model.problem)
    if model.folder is not None:
        found = load_model(model.folder)
        if found.name != model.method:
            raise HarmonictError(f"{model.folder} holds a model of {found.name}, not of {model.method}")
        return Fitted({"": model.folder})
    place = out / "models" / model.place
    what = _what(model, plan, cohort)
    base = None
    if not model.train:
        base = _fitted(plan.model(model.base or ""), plan, cohort, out, wanted, say)
        what["weights of"] = base.digest
    if place.exists() and _differs(model, place, what) == []:
        return Fitted(_folders(place))
    if not wanted:
        raise HarmonictError("not run yet")
    place.parent.mkdir(parents=True, exist_ok=True)
    _move_aside(model, place, what, say)
    if base is not None:
        _with_other_settings(model, base, place)
    elif get_method(model.method).sizes:
        say(f"{model.name}: training; its log is {place}.log")
        _train(model, plan, cohort, place)
    else:
        _fit_here(model, plan, cohort, place)
    _fit_file(place).write_text(json.dumps(what, indent=2) + "\n")
    return Fitted(_folders(place))


def _what(model: ModelPlan, plan: Plan, cohort: Path) -> dict[str, Any]:
    """What makes a training itself."""
    series = sorted(read_cohort(cohort)["series"].dropna().astype(str))
    what: dict[str, Any] = {
        "method": model.method,
        "settings": dataclasses.asdict(model.config()),
        "each": model.each,
        "target": plan.target,
        "sources": list(plan.sources),
        "seed": plan.seed,
        "cohort": hashlib.sha256("\n".join(series).encode()).hexdigest(),
    }
    return json.loads(json.dumps(what))


def _differs(model: ModelPlan, place: Path, what: dict[str, Any]) -> list[str] | None:
    """What has changed since the model of this place was made; nothing: it is the wanted one. None: no whole model."""
    file = _fit_file(place)
    if file.exists():
        known = json.loads(file.read_text())
        changed = sorted(k for k in what if what[k] != known.get(k))
        if changed == ["settings"]:
            have, want = known["settings"], what["settings"]
            return sorted(k for k in have.keys() | want.keys() if k not in have or k not in want or have[k] != want[k])
        return changed
    if not (place / CONFIG_FILE).is_file():
        return None  # filters of an unfinished run
    found = load_model(place)  # put there by hand
    if found.name != model.method:
        return ["method"]
    have, want = (json.loads(json.dumps(dataclasses.asdict(config))) for config in (found.config, model.config()))
    return sorted(k for k in want if want[k] != have[k])


def _move_aside(model: ModelPlan, place: Path, what: dict[str, Any], say: Say) -> None:
    """A model of other settings makes room for the wanted one; it is never thrown away."""
    changed = _differs(model, place, what) if place.exists() else None
    if changed is None:
        return
    old = hashlib.sha256(json.dumps(_folder_state(place)).encode()).hexdigest()[:8]
    for path in (place, place.with_name(f"{place.name}.run"), _fit_file(place)):
        if path.exists():
            path.rename(path.with_name(f"{path.name}.old-{old}"))
    say(f"{model.name}: {', '.join(changed)} changed; the model that was there is now {place.name}.old-{old}")


def _folder_state(place: Path) -> list[Any]:
    return [[str(p.relative_to(place)), p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(place.rglob("*"))]


def _folders(place: Path) -> dict[str, Path]:
    if (place / CONFIG_FILE).is_file():
        return {"": place}
    return {(p / "source.txt").read_text(): p for p in sorted(place.iterdir()) if (p / "source.txt").is_file()}


def _fit_file(place: Path) -> Path:
    return place.with_name(f"{place.name}.fit.json")


def _train(model: ModelPlan, plan: Plan, cohort: Path, place: Path) -> None:
    """`harmonict fit` in a process of its own: its memory is gone with it, and a killed one goes on."""
    command = [sys.executable, "-m", "harmonict", "fit", model.method, "--out", str(place), "--cohort", str(cohort)]
    command += ["--target-protocol", plan.target, "--seed", str(plan.seed)]
    for source in plan.sources:
        command += ["--source-protocol", source]
    if model.size is not None:
        command += ["--size", model.size]
    for key, value in model.settings.items():
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        command += ["--set", f"{key}={text}"]
    log = place.with_name(f"{place.name}.log")
    with open(log, "ab") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("harmonict: ")]
        why = lines[-1].removeprefix("harmonict: ") if lines and code > 0 else f"the training ended with code {code}"
        raise HarmonictError(f"{why} (see {log.name})")


def _fit_here(model: ModelPlan, plan: Plan, cohort: Path, place: Path) -> None:
    """A method without a network, for all sources or for each."""
    kind = get_method(model.method)
    config = model.config()

    def fit(sources: Sequence[str], folder: Path) -> None:
        rng = np.random.default_rng(plan.seed)
        pairs = cohort_pairs(cohort, target=plan.target, sources=sources, rng=rng, unpaired=kind.paired == "unpaired")
        kind(config).fit(pairs).save(folder)

    if model.each == "all":
        return fit(plan.sources, place)
    texts = list(plan.sources) if model.each == "kernel" else training_protocols(plan, cohort)
    for text in texts:
        folder = place / re.sub(r"[^A-Za-z0-9.]+", "_", text)
        fit([text], folder)
        (folder / "source.txt").write_text(text)
    return None


def training_protocols(plan: Plan, cohort: str | Path) -> list[str]:
    """Every source protocol of the training patients, in words."""
    table = read_cohort(cohort)
    table = table[(table["split"] == "train") & (table["role"] != "truth")]
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    sources = [parse_protocol(text) for text in plan.sources]
    found: dict[str, None] = {}
    for row in rows:
        p = _protocol(row)
        if any(p.matches(s) for s in sources):
            keys = (("strength", p.iterative_strength), ("thickness", p.slice_thickness_mm), ("dose", p.ctdivol_mgy))
            found[",".join([p.kernel or "", *(f"{k}={v:g}" for k, v in keys if v is not None)])] = None
    return list(found)


def _with_other_settings(model: ModelPlan, base: Fitted, place: Path) -> None:
    """The base's weights under other settings."""
    if list(base.folders) != [""]:
        raise HarmonictError("train = false needs a base of one model for all sources")
    temporary = place.with_name(f".{place.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(base.folders[""], temporary)
    saved = json.loads((temporary / CONFIG_FILE).read_text())
    saved["config"] = dataclasses.asdict(model.config())
    (temporary / CONFIG_FILE).write_text(json.dumps(saved, indent=2) + "\n")
    load_model(temporary)  # refuses settings that the weights do not fit
    temporary.rename(place)


# -- measuring ---------------------------------------------------------------------------------------------------------


def _one_model(
    model: ModelPlan,
    plan: Plan,
    cohort: Path,
    cases: Sequence[AnyCase],
    tumour: AnyCase | None,
    out: Path,
    jobs: int,
    wanted: bool,
    say: Say,
) -> Result:
    fitted = _fitted(model, plan, cohort, out, wanted, say)
    place = out / "results" / model.place
    tasks, reasons = [], []
    for case in cases:
        try:
            folder = fitted.folder(case.source_protocol)
        except HarmonictError as error:
            reasons.append(str(error))
            continue
        key = hashlib.sha256(f"{case.key} {load_model(folder).digest} {case is tumour}".encode()).hexdigest()
        tasks.append(Task(case, folder, None, _file(place, case), key, case is tumour))
    started = time.perf_counter()
    measured, failed, new = _measure(tasks, jobs if wanted else 0)
    reasons += failed
    if not measured:
        raise HarmonictError(reasons[0] if reasons else "nothing measured yet")
    facts = _facts(fitted, place, tasks[0].case if wanted else None)
    if new:
        seconds = time.perf_counter() - started
        say(f"{model.name}: {new} of {len(cases)} series measured in {seconds:.0f} s")
    return Result(model.method, model.size, measured, facts, reasons[0] if reasons else "", settings_words(model))


def settings_words(model: ModelPlan) -> str:
    """The settings that the plan gives, for the table of models."""
    words = [f"{key} {value}" for key, value in model.settings.items()]
    if model.each != "all":
        words.append(f"one for each {model.each}")
    return ", ".join(words)


def _measure(tasks: list[Task], jobs: int) -> tuple[dict[str, dict[str, np.ndarray]], list[str], int]:
    """Case name -> arrays; reasons of failures; how many were measured now."""
    found: dict[str, dict[str, np.ndarray]] = {}
    left = []
    for task in tasks:
        arrays = read_arrays(task.path, task.key)
        if arrays is None:
            left.append(task)
        else:
            found[task.case.name] = arrays
    reasons, measured = [], 0
    if jobs:
        for index, result in map_series(_measure_one, left, jobs=jobs):
            if isinstance(result, HarmonictError):
                reasons.append(f"{left[index].case.name}: {result}")
            else:
                arrays = read_arrays(left[index].path, left[index].key)
                assert arrays is not None
                found[left[index].case.name] = arrays
                measured += 1
    return {task.case.name: found[task.case.name] for task in tasks if task.case.name in found}, reasons, measured


def _measure_one(task: Task) -> str:
    case = task.case.read()
    if task.fit is not None:
        assert isinstance(task.case, RealCase)
        image = fitted_on_the_other_part(task.case.pair, task.fit)
    else:
        assert task.folder is not None
        image = harmonized(load_model(task.folder), case.source)
    arrays = measure(case, image)
    if task.tumour:
        arrays |= _slice_of(case.nodules, image)
    write_arrays(arrays, task.key, task.path)
    return str(task.path)


def harmonized(model: Harmonizer, series: Series) -> Series:
    """The series after the model, in whole HU as a file holds them."""
    result = model.harmonize(series, about=model.describe(series))
    return result.with_hu(np.rint(result.hu))


def _slice_of(nodules: dict[str, np.ndarray], image: Series) -> dict[str, np.ndarray]:
    """The slice where the first nodule is largest, and its mask there."""
    mask = next(iter(nodules.values()))
    z = int(mask.sum((1, 2)).argmax())
    return {"slice": np.rint(image.hu[z]).astype(np.int16), "slice_mask": mask[z]}


def _measure_targets(
    cases: Sequence[AnyCase], tumour: AnyCase | None, out: Path, jobs: int, say: Say
) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    left = []
    for case in cases:
        path = _file(out / "targets", case)
        arrays = read_arrays(path, _target_key(case, tumour))
        if arrays is None:
            left.append((case, path, case is tumour, _target_key(case, tumour)))
        else:
            found[case.name] = arrays
    if left:
        say(f"measuring the targets of {len(left)} test series")
    for index, result in map_series(_measure_one_target, left, jobs=jobs):
        if isinstance(result, HarmonictError):
            raise HarmonictError(f"the target of {left[index][0].name}: {result}")
        arrays = read_arrays(left[index][1], left[index][3])
        assert arrays is not None
        found[left[index][0].name] = arrays
    return found


def _measure_one_target(work: tuple[AnyCase, Path, bool, str]) -> None:
    files, path, tumour, key = work
    case = files.read()
    arrays = measure_target(case)
    if tumour:
        arrays |= _slice_of(case.nodules, case.target)
    write_arrays(arrays, key, path)


def _target_key(case: AnyCase, tumour: AnyCase | None) -> str:
    return hashlib.sha256(f"{case.key} {case is tumour}".encode()).hexdigest()


def _reference(fit: str, cases: Sequence[AnyCase], out: Path, jobs: int) -> Result:
    real = [case for case in cases if isinstance(case, RealCase)]
    place = out / "results" / f"reference-{fit}"
    keys = [hashlib.sha256(f"{case.key} reference {fit}".encode()).hexdigest() for case in real]
    tasks = [Task(c, None, fit, _file(place, c), key, False) for c, key in zip(real, keys, strict=True)]
    measured, reasons, _ = _measure(tasks, jobs)
    words = "fitted on the other half of the very image" if real else ""
    return Result("mtf-ratio", None, measured, {}, reasons[0] if reasons else "", words)


def _facts(fitted: Fitted, place: Path, case: AnyCase | None) -> dict[str, Any]:
    """Digest, parameters, training and speed of a model; timed once, on an otherwise idle process."""
    path = place / "model.json"
    digest = fitted.digest
    if path.is_file():
        known = json.loads(path.read_text())
        if known.get("digest") == digest:
            return known
    first = load_model(next(iter(fitted.folders.values())))
    training = first.card.get("training", [])
    facts: dict[str, Any] = {
        "digest": digest,
        "parameters": sum(p.numel() for p in first.parameters()) + sum(b.numel() for b in first.buffers()),
        "training_seconds": sum(loop["seconds"] for loop in training) if training else None,
        "steps": sum(loop["steps"] for loop in training) if training else None,
    }
    if case is not None:
        model = load_model(fitted.folder(case.source_protocol))
        facts |= {"seconds_per_slice": seconds_per_slice(model, case.read().source), "threads": TIMING_THREADS}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda name: Path(name).write_text(json.dumps(facts, indent=2) + "\n"))
    return facts


def seconds_per_slice(model: Harmonizer, series: Series) -> float:
    """Seconds to harmonize one slice on one thread: the median of three, after one that does not count.

    Without a GPU it is the processor's time, which others on the machine do not change. What `describe` measures once a
    series is not in it.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    about = model.describe(series)
    padding = None if series.padding is None else series.padding[:1]
    positions = None if series.positions_mm is None else series.positions_mm[:1]
    one = replace(series, hu=series.hu[:1], padding=padding, positions_mm=positions)
    threads = torch.get_num_threads()
    torch.set_num_threads(TIMING_THREADS)
    try:
        times = []
        for _ in range(TIMING_REPEATS + 1):
            started = clock()
            model.harmonize(one, about=about)
            times.append(clock() - started)
    finally:
        torch.set_num_threads(threads)
    return float(np.median(times[1:]))


def _file(place: Path, case: AnyCase) -> Path:
    return place / f"{re.sub(r'[^A-Za-z0-9.()+-]+', '_', case.name)}.npz"


def tumour_images(out: str | Path, plan: Plan) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For the figure of one tumour: (slice HU (y, x), nodule mask (y, x)) of the target and of every finished model."""
    found = {}
    for name, folder in [("target", Path(out) / "targets")] + [
        (model.name, Path(out) / "results" / model.place) for model in plan.models
    ]:
        for path in sorted(folder.glob("*.npz")):
            with np.load(path, allow_pickle=False) as file:
                if "slice" in file.files:
                    found[name] = (file["slice"].astype(np.float32), file["slice_mask"])
    if len(found) < 2:
        raise HarmonictError(f"{out} holds no finished benchmark with a nodule; run `harmonict benchmark` first")
    return found
