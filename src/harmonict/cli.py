"""The command line: parse, call, print. Exit code 0 done, 1 done but some series failed, 2 refused in one line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from harmonict import __version__
from harmonict.core import HarmonictError

if TYPE_CHECKING:
    import pandas as pd

    from harmonict.core import Series
    from harmonict.data import SlicePairs
    from harmonict.harmonizer import Harmonizer
    from harmonict.train import Run

app = typer.Typer(
    name="harmonict",
    help="CT image harmonization for radiomics: every series to one standard protocol, DICOM in and DICOM out.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Slicewise = Annotated[bool, typer.Option("--slicewise", help="Take images that form no volume one by one.")]
SpacingMm = Annotated[
    float | None, typer.Option("--spacing-mm", help="In-plane pixel size in mm; overrides a header that lies.")
]
HuRange = Annotated[
    str, typer.Option("--hu-range", help="LOW,HIGH: HU are clipped to it, its width is the peak of PSNR.")
]
Jobs = Annotated[int | None, typer.Option("--jobs", help="Processes; by default the cores, at most 4.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A field of the method's Config; repeat for more."),
]


@app.command(epilog="Example: harmonict inspect ct/ --out cohort.csv")
def inspect(
    path: Annotated[Path, typer.Argument(help="A file, or a folder tree of mixed series.")],
    out: Annotated[Path | None, typer.Option(help="Write the cohort table: .csv or .parquet.")] = None,
    slicewise: Slicewise = False,
    spacing_mm: SpacingMm = None,
    jobs: Jobs = None,
    as_json: AsJson = False,
) -> None:
    """List every series with its protocol, measured noise and sharpness, and what was left out and why."""
    from harmonict.core.cohort import write_cohort
    from harmonict.dicom.inventory import inspect as inspect_path

    with _progress("inspect") as progress:
        table = inspect_path(
            path, slicewise=slicewise, spacing_mm=_both(spacing_mm), jobs=_jobs(jobs), progress=progress
        )
    if out is not None:
        write_cohort(table, out)
    found = table[table["state"] != "left_out"]
    if as_json:
        _print_json(table)
    else:
        _print_table(found, _INSPECT_COLUMNS)
        for note in _notes(found):
            print(note)
        _print_left_out(table[table["state"] == "left_out"])
        if table.attrs["skipped_files"]:
            print(f"{table.attrs['skipped_files']} files are no images of a known kind and were skipped")
        if len(found):
            protocols = found.apply(_protocol_name, axis=1).value_counts()
            print(f"{len(found)} series; most common protocol: {protocols.index[0]} ({protocols.iloc[0]} series)")
    if not len(found):
        raise HarmonictError(f"no CT series in {path}")


@app.command(epilog="Example: harmonict measure scan/ --out scan-mtf.csv")
def measure(
    path: Annotated[Path, typer.Argument(help="A file, or a folder tree.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the MTF of the one series as CSV, for --source-mtf and --target-mtf.")
    ] = None,
    slicewise: Slicewise = False,
    spacing_mm: SpacingMm = None,
    as_json: AsJson = False,
) -> None:
    """Measure MTF (f50, f10 at the skin), noise and detectability of images."""
    import pandas as pd

    from harmonict.physics.detectability import detectability
    from harmonict.physics.kernel import write_kernel
    from harmonict.physics.mtf import skin_air_mtf
    from harmonict.physics.nps import patient_nps, uniform_noise_sd

    series = _read_all(path, slicewise=slicewise, spacing_mm=spacing_mm)
    if out is not None and len(series) > 1:
        raise HarmonictError(f"{path} holds {len(series)} series; --out takes the MTF of one: name its folder or file")
    rows = []
    for one in series:
        row: dict[str, Any] = {"series": one.name, "kernel": one.protocol.kernel}
        try:
            skin = skin_air_mtf(one)
            noise = patient_nps(one)
            row |= {
                "f50_per_mm": skin.f50_per_mm,
                "f10_per_mm": skin.kernel.f10_per_mm,
                "noise_hu": uniform_noise_sd(one),
                "d_prime": detectability(skin.kernel, noise),
            }
            if out is not None:
                write_kernel(skin.kernel, out)
        except HarmonictError as error:
            if out is not None:
                raise
            row["reason"] = str(error)
        rows.append(row)
    table = pd.DataFrame(rows)
    _print_json(table) if as_json else _print_table(table, list(table.columns))


@app.command(epilog="Example: harmonict fit mtf-ratio --out model --source sharp/ --target soft/ --set fit=wiener")
def fit(
    method: Annotated[str, typer.Argument(help="See `harmonict methods`.")],
    out: Annotated[Path, typer.Option(help="Folder of the model; OUT.run beside it holds log and checkpoints.")],
    source: Annotated[Path | None, typer.Option(help="Images with the source protocol: a file or folder.")] = None,
    target: Annotated[Path | None, typer.Option(help="The same anatomy with the target protocol.")] = None,
    cohort: Annotated[Path | None, typer.Option(help="Cohort table, in place of --source and --target.")] = None,
    target_protocol: Annotated[
        str | None, typer.Option(help="The cohort's series to learn from as targets: Bl64, Bl64,thickness=1 or truth.")
    ] = None,
    source_protocol: Annotated[
        list[str] | None, typer.Option(help="Take only these of the cohort as sources; repeat for more.")
    ] = None,
    source_mtf: Annotated[Path | None, typer.Option(help="CSV of the source's MTF (mtf-ratio, no images).")] = None,
    target_mtf: Annotated[Path | None, typer.Option(help="CSV of the target's MTF (mtf-ratio, no images).")] = None,
    size: Annotated[
        str | None, typer.Option(help="Of a network: paper (bridge: full), or compact for a computer without GPU.")
    ] = None,
    settings: Settings = None,
    resample: Annotated[
        str | None,
        typer.Option(metavar="[MM]", help="Resample in the plane to one pixel size: that of most targets, or MM."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches and of who is held out.")] = 0,
    devices: Annotated[int, typer.Option(help="GPUs (or processes without GPU) that share a training.")] = 1,
    slicewise: Slicewise = False,
    spacing_mm: SpacingMm = None,
) -> None:
    """Fit a method to pairs of images (slices paired by position, else by name), to a cohort, or to two MTF curves.

    A training that was stopped goes on when the same command is given again.
    """
    from harmonict.harmonizer import check_model_place, make_config
    from harmonict.methods import get_method
    from harmonict.methods.mtf_ratio import MTFRatio
    from harmonict.physics.kernel import read_kernel

    kind = get_method(method)
    if size is not None and size not in kind.sizes:
        raise HarmonictError(f"{method} has no size {size!r}; it has: {', '.join(kind.sizes) or 'none to choose'}")
    config = make_config(kind.Config, {**kind.sizes.get(size or "", {}), **_settings(settings)})
    check_model_place(out)
    model: Harmonizer | None = None
    if target_mtf is not None:
        if kind is not MTFRatio or any(option is not None for option in (source, target, cohort)):
            raise HarmonictError("--target-mtf is for mtf-ratio alone and takes the place of --source and --target")
        model = MTFRatio.from_mtfs(
            read_kernel(target_mtf), None if source_mtf is None else read_kernel(source_mtf), config=config
        )
    elif cohort is None and source is None and target is not None and kind.paired != "paired":
        model = kind.like(_read_all(target, slicewise=slicewise, spacing_mm=spacing_mm), config)
    else:
        pairs = _pairs(
            kind, source, target, cohort, target_protocol, source_protocol or [], seed, slicewise, spacing_mm, resample
        )
        run = _run(kind, out, config, pairs, seed, devices) if kind.sizes else None
        model = kind(config).fit(pairs, run)
        if run is not None and not run.is_first:
            return
    model.save(out)
    print(f"{method} fitted, {model.digest[:12]}: {out}")


@app.command(epilog="Example: harmonict harmonize ct/ out/ --model mtf-ratio --like ct/C3N-00249")
def harmonize(
    path: Annotated[Path, typer.Argument(metavar="IN", help="A file, or a folder tree of mixed series.")],
    out: Annotated[Path, typer.Argument(help="A folder outside of IN.")],
    model: Annotated[str, typer.Option(help="Folder of a fitted model, or a method that needs no training.")],
    like: Annotated[Path | None, typer.Option(help="An image with the wanted look, of any patient.")] = None,
    target_protocol: Annotated[
        str | None, typer.Option(help="The protocol that IN's own series to imitate have: Bl64 or Bl64,thickness=1.")
    ] = None,
    source_mtf: Annotated[Path | None, typer.Option(help="CSV of the source's MTF instead of its own skin.")] = None,
    settings: Settings = None,
    masks: Annotated[
        str | None, typer.Option(metavar="[PATH]", help="Copy RTSTRUCT and SEG so that they refer to the new series.")
    ] = None,
    resample: Annotated[
        bool,
        typer.Option("--resample", help="Translate in the pixels that the model was trained on, and bring it back."),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a series that is outside what the model was trained on.")
    ] = False,
    uncertainty: Annotated[
        bool,
        typer.Option("--uncertainty", help="A second series: by how many HU samples differ (methods that draw them)."),
    ] = False,
    qc: Annotated[Path | None, typer.Option(help="Write what was done to each series as JSON.")] = None,
    slicewise: Slicewise = False,
    spacing_mm: SpacingMm = None,
    jobs: Jobs = None,
    as_json: AsJson = False,
) -> None:
    """Harmonize every series below IN to one protocol; OUT holds the same formats and cohort.csv."""
    from harmonict.harmonize_cohort import harmonize_cohort, write_qc
    from harmonict.physics.kernel import read_kernel

    curve = None if source_mtf is None else read_kernel(source_mtf)
    harmonizer = _model(model, path, like, target_protocol, settings, slicewise, spacing_mm)
    mask_places = None if masks is None else [] if masks == _BELOW_IN else [Path(masks)]
    with _progress("harmonize") as progress:
        table = harmonize_cohort(
            path,
            out,
            harmonizer,
            slicewise=slicewise,
            spacing_mm=_both(spacing_mm),
            source_mtf=curve,
            masks=mask_places,
            resample=resample,
            strict=strict,
            residuals=None if qc is None else qc.with_name(f"{qc.stem}-residual"),
            uncertainty=uncertainty,
            jobs=_jobs(jobs),
            progress=progress,
            say=lambda line: print(line, file=sys.stderr),
        )
    if qc is not None:
        write_qc(table, qc)
    done, failed = table[table["state"] == "done"], table[table["state"] == "failed"]
    if as_json:
        _print_json(table)
    else:
        _print_table(done, _HARMONIZE_COLUMNS)
        for note in _notes(done):
            print(note)
        _print_left_out(table[table["state"] == "left_out"])
        for _, row in failed.iterrows():
            print(f"FAILED {_label(row)}: {row['reason']}")
        print(f"{len(done)} series done, {len(failed)} failed: {out / 'cohort.csv'}")
    if len(failed):
        raise SystemExit(1 if len(done) else 2)


@app.command(epilog="Example: harmonict evaluate --reference soft/ --images sharp/ --images harmonized/")
def evaluate(
    reference: Annotated[Path, typer.Option(help="The images to be matched.")],
    images: Annotated[list[Path], typer.Option(help="Images of the same anatomy; repeat, or list several.")],
    hu_range: HuRange = "-1024,1000",
    out: Annotated[Path | None, typer.Option(help="Write the table of every slice: .csv or .json.")] = None,
    slicewise: Slicewise = False,
    spacing_mm: SpacingMm = None,
    as_json: AsJson = False,
) -> None:
    """Image quality against a reference: PSNR, SSIM, NRMSE, NCC, MAE in HU, whole image and body."""
    import pandas as pd

    from harmonict.data import pair_series
    from harmonict.evaluate.image import compare

    limits = _hu_range(hu_range)
    references = _read_all(reference, slicewise=slicewise, spacing_mm=spacing_mm)
    tables = []
    for path in images:
        pairs = pair_series(_read_all(path, slicewise=slicewise, spacing_mm=spacing_mm), references)
        for image, truth in pairs.whole_series():
            tables.append(compare(truth, image, hu_range=limits).assign(images=str(path), series=image.name))
    table = pd.concat(tables, ignore_index=True)
    if out is not None:
        _write_table(table, out)
    if as_json:
        _print_json(table)
        return
    several = table["series"].nunique() > len(images)
    _print_table(_mean_and_sd(table, several), ["images", "region", *_QUALITY_COLUMNS.values()])
    print(f"HU clipped to [{limits[0]:g}, {limits[1]:g}], peak {limits[1] - limits[0]:g}; body of the reference")


@app.command(epilog="Example: harmonict simulate demo --out trial/")
def simulate(
    trial: Annotated[str, typer.Argument(metavar="PRESET|CONFIG.toml", help="A preset, its -small form, or a file.")],
    out: Annotated[Path, typer.Option(help="A new folder, or that of the same trial to go on with.")],
    slices: Annotated[int | None, typer.Option(help="Slices of each patient, at the trial's main thickness.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed gives other patients.")] = None,
    jobs: Jobs = None,
    as_json: AsJson = False,
) -> None:
    """Make a virtual imaging trial: patients x doses x kernels x thicknesses, with truth, masks and cohort table."""
    import shutil

    from harmonict.simulate.trial import disk_bytes, load_trial, run_trial, units

    plan = load_trial(trial, slices=slices, seed=seed)
    need = disk_bytes(plan)
    place = next(p for p in [out, *out.absolute().parents] if p.exists())
    free = shutil.disk_usage(place).free
    if need > free:
        raise HarmonictError(f"{plan.name} needs {_bytes(need)}, {place} has {_bytes(free)}; ask for fewer --slices")
    print(f"{plan.name}: {plan.about}; {len(units(plan, out))} parts, {_bytes(need)} on disk", file=sys.stderr)
    with _progress("simulate") as progress:
        table = run_trial(plan, out, jobs=_jobs(jobs), progress=progress, say=lambda line: print(line, file=sys.stderr))
    done, failed = table[table["state"] == "done"], table[table["state"] == "failed"]
    if as_json:
        _print_json(table)
    else:
        shown = done.assign(scans=1).groupby(["group", "split", "role"], sort=False, dropna=False)
        counts = shown.agg(patients=("patient", "nunique"), series=("scans", "sum"), slices=("slices", "sum"))
        _print_table(counts.reset_index(), ["group", "split", "role", "patients", "series", "slices"])
        for _, row in failed.iterrows():
            print(f"FAILED {_label(row)}: {row['reason']}")
        print(f"{len(done)} series: {out / 'cohort.csv'}")
    if len(failed):
        raise SystemExit(1 if len(done) else 2)


@app.command(epilog="Example: harmonict features ct/image --mask ct/rtstruct --roi GTV-1 --out features.csv")
def features(
    paths: Annotated[
        list[Path], typer.Argument(metavar="IMAGE|COHORT...", help="Images, folders of them, or cohort tables.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="A row per ROI: .csv or .parquet, with its settings as .json. Without: printed, a row per feature."
        ),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="RTSTRUCT, SEG or label image of the one image.")] = None,
    roi: Annotated[list[str] | None, typer.Option(help="ROIs of the masks (* and ? allowed); repeat for more.")] = None,
    label: Annotated[int | None, typer.Option(help="The label of a NIfTI, NRRD or MHA mask.")] = None,
    random: Annotated[
        int, typer.Option(metavar="N", help="N seeded random boxes for each HU range, judged on the reference image.")
    ] = 0,
    whole: Annotated[bool, typer.Option("--whole", help="The whole body of the patient as a ROI.")] = False,
    target_protocol: Annotated[
        str | None, typer.Option(help="The reference image of --random and --whole; default: role target, else truth.")
    ] = None,
    feature_set: Annotated[str, typer.Option(help="pyradiomics (93 and shape), ibex (1,401) or ibsi.")] = "pyradiomics",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A field of the feature set's settings, bin_width=10 say."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random boxes.")] = 0,
    slicewise: Slicewise = False,
    spacing_mm: SpacingMm = None,
    jobs: Jobs = None,
    as_json: AsJson = False,
) -> None:
    """Radiomic features of one image, or of every rendition of every patient of a cohort."""
    from harmonict.evaluate.cohort import Regions, cohort_features, feature_columns
    from harmonict.radiomics.rois import count_rois

    with _progress("features") as progress:
        table = cohort_features(
            paths,
            out=out,
            regions=Regions(tuple(roi or ()), label, random, whole, seed),
            feature_set=feature_set,
            values=_settings(settings),
            mask=mask,
            target_protocol=target_protocol,
            slicewise=slicewise,
            spacing_mm=_both(spacing_mm),
            jobs=_jobs(jobs),
            progress=progress,
        )
    done = table[table["state"] == "done"]
    if as_json:
        _print_json(table)
    elif len(done):
        for name, boxes in table.attrs["boxes"].items():
            counts = count_rois(boxes)
            print(f"random ROIs, judged on {name} (z x y x x):")
            _print_table(counts, list(counts.columns))
        if out is None:
            print("patient,scan,roi,feature,value")
            for _, row in done.iterrows():
                place = ",".join(_csv(str(row[key])) for key in ("patient", "scan", "roi"))
                for name in feature_columns(table):
                    print(f"{place},{_csv(name)},{float(row[name])!r}")
        else:
            series = len(done[["patient", "scan"]].drop_duplicates())
            print(f"{len(feature_columns(table))} features of {len(done)} ROIs in {series} series: {out}")
    _end_cohort(table, as_json)


@app.command(epilog="Example: harmonict reproduce features.parquet --target-protocol truth --out reproduced/")
def reproduce(
    tables: Annotated[
        list[Path], typer.Argument(metavar="FEATURES...", help="Feature tables: before, after, and the target's.")
    ],
    target_protocol: Annotated[str, typer.Option(help="Bl64 or Bl64,thickness=1, truth, or the name of a scan.")],
    out: Annotated[Path | None, typer.Option(help="A folder for all tables and the list of stable features.")] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Known classes, to be told apart before and after.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap and of the folds.")] = 0,
    as_json: AsJson = False,
) -> None:
    """How many features agree with the standard protocol, scan by scan and class by class."""
    import numpy as np

    from harmonict.evaluate.cohort import class_map, find_target, join_features, known_classes, read_features
    from harmonict.evaluate.reproducibility import compare_all_scans, write_stable_features
    from harmonict.evaluate.reproducibility import reproduce as reproduce_tables

    table = join_features([read_features(path) for path in tables])
    target = find_target(table, target_protocol)
    result = reproduce_tables(
        table,
        target,
        rng=np.random.default_rng(seed),
        class_map=class_map(table),
        labels=None if labels is None else known_classes(table, labels),
    )
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HarmonictError(f"cannot write to {out}: {error.strerror}") from None
        for name, one in vars(result).items():
            _write_table(one, out / f"{name}.csv")
        write_stable_features(result, out / "stable.csv")
        _write_table(compare_all_scans(table, target, class_map=class_map(table)), out / "tests.csv")
    if as_json:
        print(json.dumps({name: json.loads(t.to_json(orient="records")) for name, t in vars(result).items()}, indent=2))
        return
    _print_table(result.summary, _REPRODUCE_COLUMNS)
    print()
    _print_table(result.classes, _REPRODUCE_COLUMNS)
    print(f"\nagainst {target}; CCC over ROIs: each feature over regions; over features: each region over a class")
    if out is not None:
        stable = int(result.features["stable"].sum())
        print(f"{stable} stable features (CCC > 0.85, RE < 0.15), summed over scans and levels: {out / 'stable.csv'}")


@app.command(name="biomarkers", epilog="Example: harmonict biomarkers cohort.csv --out biomarkers.csv")
def biomarkers_of(
    paths: Annotated[
        list[Path], typer.Argument(metavar="IMAGE|COHORT...", help="Images, folders of them, or cohort tables.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write the table: .csv, .json or .parquet.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Masks named lung..., nodule..., GTV... of the one image.")] = None,
    slicewise: Slicewise = False,
    spacing_mm: SpacingMm = None,
    jobs: Jobs = None,
    as_json: AsJson = False,
) -> None:
    """LAA-950, Perc15, lung mass and volume of every series; size and shape of its nodules."""
    from harmonict.evaluate.cohort import cohort_biomarkers

    with _progress("biomarkers") as progress:
        table = cohort_biomarkers(
            paths, mask=mask, slicewise=slicewise, spacing_mm=_both(spacing_mm), jobs=_jobs(jobs), progress=progress
        )
    if out is not None:
        _write_table(table, out)
    if as_json:
        _print_json(table)
    else:
        _print_table(table[table["state"] == "done"], _biomarker_columns(table))
    _end_cohort(table, as_json)


combat = typer.Typer(
    name="combat",
    help="ComBat on feature tables: numbers harmonized instead of images.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(combat)


@combat.command("fit", epilog="Example: harmonict combat fit features.csv --batch kernel --out combat.json")
def combat_fit(
    tables: Annotated[list[Path], typer.Argument(metavar="FEATURES...", help="Feature tables of the training rows.")],
    batch: Annotated[str, typer.Option(help="The column that names each row's batch: kernel, manufacturer, scan.")],
    out: Annotated[Path, typer.Option(help="The estimates, as JSON.")],
    reference: Annotated[str | None, typer.Option(help="The batch that stays as it is.")] = None,
) -> None:
    """Estimate the shift and scale of each batch."""
    from harmonict.combat import fit_combat, save_combat
    from harmonict.evaluate.cohort import join_features, read_features

    model = fit_combat(join_features([read_features(path) for path in tables]), batch=batch, reference=reference)
    save_combat(model, out)
    rows = ", ".join(f"{name} {n}" for name, n in zip(model.batches, model.rows, strict=True))
    print(f"ComBat of {len(model.features)} features on rows of {batch}: {rows}: {out}")


@combat.command("apply", epilog="Example: harmonict combat apply new.csv --model combat.json --out harmonized.csv")
def combat_apply(
    table: Annotated[Path, typer.Argument(metavar="FEATURES", help="A feature table; its rows may be new.")],
    model: Annotated[Path, typer.Option(help="What `harmonict combat fit` wrote.")],
    out: Annotated[Path, typer.Option(help="The same table with its features harmonized: .csv or .parquet.")],
) -> None:
    """Bring the rows of a feature table to the common batch."""
    from harmonict.combat import apply_combat, load_combat
    from harmonict.evaluate.cohort import read_features

    estimates = load_combat(model)
    result = apply_combat(estimates, read_features(table))
    _write_table(result, out)
    print(f"{len(result)} rows, {len(estimates.features)} features: {out}")


@app.command(epilog="Example: harmonict benchmark configs/kentucky.toml --out runs/kentucky --only identity")
def benchmark(
    plan: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Trial, protocols and models; see configs/.")],
    out: Annotated[Path, typer.Option(help="Folder of the trial, the models and the tables; a new one, or to go on.")],
    only: Annotated[list[str] | None, typer.Option(help="Do this model of the plan alone; repeat for more.")] = None,
    trial: Annotated[Path | None, typer.Option(help="A cohort table in place of the plan's trial.")] = None,
    jobs: Jobs = None,
    as_json: AsJson = False,
) -> None:
    """Train models side by side, apply them to the test patients, and write the tables that hold them together.

    Stopped, it goes on with the same command. Real pairs are taken from the folder HARMONICT_DATA.
    """
    from harmonict.evaluate.benchmark import run_benchmark
    from harmonict.evaluate.benchmark_plan import load_plan

    tables = run_benchmark(
        load_plan(plan),
        out,
        trial=trial,
        only=only or [],
        data=os.environ.get("HARMONICT_DATA"),
        jobs=_jobs(jobs),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if as_json:
        _print_json(tables.summary)
    else:
        _print_table(tables.models, ["model", "method", "size", "state", "series", "seconds_per_slice", "reason"])
        print(f"tables: {out / 'tables.md'}")
    wanted = tables.models[tables.models["model"].isin(only)] if only else tables.models
    bad = wanted["state"].isin(("failed", "part"))
    if bad.any():
        raise SystemExit(2 if (wanted["state"] == "failed").all() else 1)


@app.command(epilog="Example: harmonict methods choe")
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Show the settings of this one.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods: paper, what they are fitted on, what else they need, sizes; or the settings of one.

    A setting is changed with `--set KEY=VALUE`; the docstring of the method's file says where each comes from.
    """
    import dataclasses

    import pandas as pd

    from harmonict.methods import METHODS, get_method

    if name is not None:
        fields = dataclasses.fields(get_method(name).Config)
        sizes = {"default": {}, **{size: values for size, values in get_method(name).sizes.items() if values}}
        table = pd.DataFrame(
            {
                "setting": field.name,
                **{size: str(values.get(field.name, field.default)) for size, values in sizes.items()},
            }
            for field in fields
        )
    else:
        table = pd.DataFrame(_method_row(kind) for kind in METHODS.values())
    _print_json(table) if as_json else _print_table(table, list(table.columns))


def _method_row(kind: Any) -> dict[str, str]:
    trained = bool(kind.sizes)
    fitted_on = {"none": "nothing", "paired": "pairs", "unpaired": "unpaired images" if trained else "target images"}
    fields = vars(kind.Config)["__dataclass_fields__"]
    needs = ["feature weights"] if "feature_weights" in fields else []
    if kind.uses_source_mtf:
        needs.append("source MTF, measured or given")
    return {
        "method": kind.name,
        "paper": kind.paper,
        "fitted on": fitted_on[kind.paired],
        "works with --like": "yes" if "like" in vars(kind) else "",
        "needs": ", ".join(needs),
        "changes": ", ".join(kind.changes),
        "sizes": ", ".join(kind.sizes),
    }


# -- shared by the commands ------------------------------------------------------------------------------------------

_BELOW_IN = "@below-in"
_OF_MOST_TARGETS = "@of-most-targets"
_INSPECT_COLUMNS = {
    "patient": "patient",
    "manufacturer": "vendor",
    "model": "model",
    "kernel": "kernel",
    "iterative_strength": "iter",
    "slice_thickness_mm": "mm",
    "spacing_x_mm": "pixel",
    "kvp": "kVp",
    "exposure_mas": "mAs",
    "ctdivol_mgy": "mGy",
    "slices": "slices",
    "body_part": "body",
    "noise_hu": "noise HU",
    "f50_per_mm": "f50 /mm",
}
_HARMONIZE_COLUMNS = {
    "patient": "patient",
    "source_kernel": "kernel",
    "slices": "slices",
    "source_f50_per_mm": "f50 before",
    "f50_per_mm": "f50 after",
    "source_noise_hu": "noise before",
    "noise_hu": "noise after",
    "mean_change_hu": "mean change HU",
    "clipped_voxels": "clipped",
}
_REPRODUCE_COLUMNS = {
    "level": "level",
    "scan": "scan",
    "class": "class",
    "patients": "patients",
    "rois": "ROIs",
    "features": "features",
    "ccc_over_rois_mean": "CCC over ROIs",
    "ccc_over_features_mean": "CCC over features",
    "reproducible_ccc": "CCC > 0.85",
    "reproducible_re": "RE < 0.15",
    "re_median": "median RE",
    "separation_auc": "AUC",
    "separation_auc_target": "AUC target",
    "between_patient_share": "between patients",
    "between_patient_share_target": "between, target",
}
_QUALITY_COLUMNS = {
    "psnr_db": "PSNR dB",
    "ssim": "SSIM",
    "nrmse": "NRMSE",
    "ncc": "NCC",
    "mae_hu": "MAE HU",
    "bias_hu": "bias HU",
    "spectrum_error_db": "spectrum dB",
}


def _model(
    name: str,
    path: Path,
    like: Path | None,
    target_protocol: str | None,
    settings: list[str] | None,
    slicewise: bool,
    spacing_mm: float | None,
) -> Harmonizer:
    """A saved model, or a method made ready by example images."""
    from harmonict.core import choose_protocol, parse_protocol
    from harmonict.dicom.inventory import find_series
    from harmonict.harmonizer import make_config
    from harmonict.methods import METHODS, get_method, load_model

    if name not in METHODS and Path(name).is_dir():
        model = load_model(name)
        if settings:
            model.adjust(_settings(settings))
        if like is not None:
            raise HarmonictError("--like is for a method by itself; a saved model already has its target")
        if target_protocol:
            model.aim(parse_protocol(target_protocol))
        return model
    if name not in METHODS and (os.sep in name or name.startswith(".")):
        raise HarmonictError(f"no model at {name}; `harmonict fit` makes one")
    kind = get_method(name)
    config = make_config(kind.Config, _settings(settings))
    if like is not None and target_protocol is not None:
        raise HarmonictError("give --like or --target-protocol, not both")
    if like is not None:
        return kind.like(_read_all(like, slicewise=slicewise, spacing_mm=spacing_mm), config)
    if target_protocol is not None:
        found = find_series(path, slicewise=slicewise).found
        chosen = choose_protocol(parse_protocol(target_protocol), [f.protocol for f in found])
        return kind.like([f.read() for f in found if f.protocol == chosen], config)
    if kind.paired == "none":
        return kind(config)
    raise HarmonictError(
        f"{name} by itself needs the wanted look: --like IMAGE, or --target-protocol P of series in IN"
    )


def _pairs(
    kind: type[Harmonizer],
    source: Path | None,
    target: Path | None,
    cohort: Path | None,
    target_protocol: str | None,
    source_protocols: list[str],
    seed: int,
    slicewise: bool,
    spacing_mm: float | None,
    resample: str | None,
) -> SlicePairs:
    """What a method is fitted to: a cohort table with some patients held out, or two sets of images."""
    import numpy as np

    from harmonict.data import cohort_pairs, most_common_pixel, pair_series, unpaired_series

    pixel_mm = None if resample in (None, _OF_MOST_TARGETS) else _millimetres(resample)
    if cohort is not None:
        if source is not None or target is not None:
            raise HarmonictError("give --cohort, or --source and --target, not both")
        if target_protocol is None:
            raise HarmonictError(
                "--cohort needs --target-protocol: a kernel of the table, more (Bl64,thickness=1), or truth"
            )
        rng = np.random.default_rng(seed)
        unpaired = kind.paired == "unpaired"
        pairs = cohort_pairs(
            cohort,
            target=target_protocol,
            sources=source_protocols,
            rng=rng,
            unpaired=unpaired,
            resample=resample is not None,
            pixel_mm=pixel_mm,
        )
    else:
        if target_protocol is not None or source_protocols:
            raise HarmonictError("--target-protocol and --source-protocol choose rows of a --cohort")
        if source is None or target is None:
            raise HarmonictError(
                f"{kind.name} is fitted to images: give --source and --target (files or folders), or --cohort"
            )
        sources, targets = (_read_all(path, slicewise=slicewise, spacing_mm=spacing_mm) for path in (source, target))
        of_unpaired = kind.paired == "unpaired" and kind.sizes  # a network that learns from two heaps of images
        wanted = None if resample is None else most_common_pixel(targets)
        if pixel_mm is not None:
            wanted = (pixel_mm, pixel_mm)
        pairs = (unpaired_series if of_unpaired else pair_series)(sources, targets, pixel_mm=wanted)
        if kind.sizes:  # a network, which learns in pixels
            pairs.check_spacings()
    for reason in pairs.left_out:
        print(f"left out: {reason}", file=sys.stderr)
    held_out = pairs.held_out
    apart = "" if held_out is None else f"; {len(held_out)} of {len(held_out.subjects)} patients held out to judge by"
    print(f"pairs of slices: {len(pairs)}{apart}", file=sys.stderr)
    for part in pairs.resampled():
        words = f"{part['series']} series from pixels of {part['from_mm']:.3g} mm to {part['to_mm']:.3g} mm"
        print(f"resampled in the plane: {words}", file=sys.stderr)
    return pairs


def _run(kind: type[Harmonizer], out: Path, config: Any, pairs: SlicePairs, seed: int, devices: int) -> Run:
    """The run that serves a training; its folder is that of the same command, so that it goes on."""
    import dataclasses

    from harmonict.train import Run

    if devices < 1:
        raise HarmonictError(f"--devices must be at least 1, got {devices}")
    held_out = None if pairs.held_out is None else pairs.held_out.digest
    identity = {
        "method": kind.name,
        "settings": dataclasses.asdict(config),
        "pairs": pairs.digest,
        "held out": held_out,
    }
    return Run(out.with_name(f"{out.name}.run"), seed=seed, identity=identity, devices=devices)


def _read_all(path: Path, *, slicewise: bool, spacing_mm: float | None) -> list[Series]:
    """Every CT series below a path; one that cannot be read is an error here."""
    from harmonict.dicom.inventory import find_series

    inventory = find_series(path, slicewise=slicewise)
    if not inventory.found:
        reasons = "; ".join(sorted({left.reason for left in inventory.left_out})[:3])
        raise HarmonictError(f"no CT series in {path}" + (f": {reasons}" if reasons else ""))
    return [found.read(spacing_mm=_both(spacing_mm)) for found in inventory.found]


def _mean_and_sd(table: pd.DataFrame, several: bool) -> pd.DataFrame:
    """One row for each image and region: "mean ± SD" over slices."""
    import pandas as pd

    rows = []
    for (images, series, region), part in table.groupby(["images", "series", "region"], sort=False):
        mean, sd = (part[part["slice"] == name].iloc[0] for name in ("mean", "sd"))
        name = f"{_tail(images)} {series}" if several else _tail(images)
        row = {"images": name, "region": region}
        for column, title in _QUALITY_COLUMNS.items():
            digits = 4 if column in ("ssim", "nrmse", "ncc") else 2
            spread = f" ± {sd[column]:.{digits}f}" if sd[column] == sd[column] else ""
            row[title] = f"{mean[column]:.{digits}f}{spread}" if mean[column] == mean[column] else None
        rows.append(row)
    return pd.DataFrame(rows)


def _tail(path: str) -> str:
    """The last two parts of a path."""
    return "/".join(Path(path).parts[-2:])


def _biomarker_columns(table: pd.DataFrame) -> dict[str, str]:
    from harmonict.evaluate.cohort import feature_columns

    titles = {"laa950_percent": "LAA-950 %", "perc15_hu": "Perc15 HU", "mass_g": "mass g", "volume_ml": "volume ml"}
    names = {"patient": "patient", "scan": "scan", "lung_from": "lung from"}
    return names | {name: titles.get(name, name) for name in feature_columns(table)}


def _end_cohort(table: pd.DataFrame, as_json: bool) -> None:
    """Say what was left out and what failed; exit code 1 where something failed, 2 where everything did."""
    failed = table[table["state"] == "failed"]
    if len(table) == 1 and len(failed):
        raise HarmonictError(str(failed.iloc[0]["reason"]))
    if not as_json:
        for path, reason in table.attrs["left_out"]:
            print(f"left out {path}: {reason}")
        for _, row in failed.iterrows():
            print(f"FAILED {row['patient']} {row['scan']}, ROI {row['roi']}: {row['reason']}")
    if len(failed):
        raise SystemExit(1 if len(failed) < len(table) else 2)


def _csv(text: str) -> str:
    return f'"{text}"' if "," in text else text


def _settings(pairs: list[str] | None) -> dict[str, str]:
    values = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise HarmonictError(f"--set expects KEY=VALUE, got {pair!r}")
        values[key.strip()] = value.strip()
    return values


def _millimetres(text: str | None) -> float:
    try:
        size = float(text or "")
    except ValueError:
        size = 0.0
    if not 0 < size < 100:
        raise HarmonictError(f"--resample takes a pixel size in mm, or stands alone; got {text!r}")
    return size


def _both(spacing_mm: float | None) -> tuple[float, float] | None:
    if spacing_mm is None:
        return None
    if not spacing_mm > 0:
        raise HarmonictError(f"--spacing-mm must be above 0, got {spacing_mm:g}")
    return (spacing_mm, spacing_mm)


def _jobs(jobs: int | None) -> int:
    if jobs is not None and jobs < 1:
        raise HarmonictError(f"--jobs must be at least 1, got {jobs}")
    return jobs or min(os.cpu_count() or 1, 4)


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _hu_range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise HarmonictError(f"--hu-range expects LOW,HIGH, got {text!r}") from None
    return low, high


class _progress:
    """A progress bar on standard error, with the time left; called with (done, total, row)."""

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> _progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, row: dict[str, Any]) -> None:
        self._bar.update(self._task, completed=done, total=total)


def _print_table(table: pd.DataFrame, columns: dict[str, str] | list[str]) -> None:
    """A table that people can read; columns that hold nothing are left out."""
    from rich.console import Console
    from rich.table import Table

    names = columns if isinstance(columns, dict) else {c: c for c in columns}
    names = {c: title for c, title in names.items() if c in table and table[c].notna().any()}
    if not len(table) or not names:
        return
    view = Table(box=None, header_style="bold", pad_edge=False)
    for column, title in names.items():
        view.add_column(title, justify="right" if _is_number(table[column]) else "left", overflow="fold")
    for _, row in table.iterrows():
        view.add_row(*[_cell(row[c]) for c in names])
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False).print(view)


def _is_number(column: pd.Series) -> bool:
    return all(isinstance(v, int | float) or v is None for v in column)


def _cell(value: object) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return (
            f"{value:.0f}"
            if value == int(value) and abs(value) < 1e6
            else f"{value:.4g}"
            if abs(value) < 1
            else f"{value:.2f}"
        )
    return str(value)


def _print_json(table: pd.DataFrame) -> None:
    print(json.dumps(json.loads(table.to_json(orient="records")), indent=2))


def _write_table(table: pd.DataFrame, path: Path) -> None:
    if path.suffix not in (".csv", ".json", ".parquet"):
        raise HarmonictError(f"{path}: a table is written as .csv, .json or .parquet")
    try:
        if path.suffix == ".json":
            path.write_text(table.to_json(orient="records", indent=2))
        elif path.suffix == ".parquet":
            table.to_parquet(path, index=False)
        else:
            table.to_csv(path, index=False)
    except OSError as error:
        raise HarmonictError(f"cannot write {path}: {error.strerror or error}") from None


def _print_left_out(table: pd.DataFrame) -> None:
    masks = table["reason"].astype(str).str.endswith("taken as a mask")
    for _, row in table[~masks].iterrows():
        print(f"left out {_label(row)}: {row['reason']}")
    if masks.any():
        print(f"left out {masks.sum()} label images (used as masks)")


def _protocol_name(row: pd.Series) -> str:
    from harmonict.core import PROTOCOL_COLUMNS, ScanProtocol

    known = {name: row[name] for name in PROTOCOL_COLUMNS if isinstance(row[name], str) or row[name] == row[name]}
    label = ScanProtocol(**{**known, "ctdivol_mgy": None}).label()
    return f"{known.get('manufacturer') or 'unknown vendor'} {label.replace('?', '(no kernel tag)')}"


def _notes(table: pd.DataFrame) -> list[str]:
    return [
        f"note {_label(row)}: {row['reason']}"
        for _, row in table.iterrows()
        if isinstance(row["reason"], str) and row["reason"]
    ]


def _label(row: pd.Series) -> str:
    return str(row["patient"] if isinstance(row["patient"], str) and row["patient"] else row["path"])


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Everything that a user can get wrong ends in one line on standard error and exit code 2."""
    arguments = _optional_values(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = typer.main.get_command(app)(args=arguments, prog_name="harmonict", standalone_mode=False)
    except HarmonictError as error:
        print(f"harmonict: {error}", file=sys.stderr)
        code = 2
    except TyperException as error:
        print(f"harmonict: {error.format_message()}", file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("harmonict: stopped; the same command goes on where it stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        print(f"harmonict: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _optional_values(arguments: list[str]) -> list[str]:
    """`--masks` and `fit --resample` may stand alone, and `--images` may be followed by several."""
    result: list[str] = []
    images = False
    for n, argument in enumerate(arguments):
        after = arguments[n + 1] if n + 1 < len(arguments) else "-"
        if argument.startswith("-"):
            images = argument == "--images"
        elif images and arguments[n - 1] != "--images":
            result.append("--images")
        result.append(argument)
        if argument == "--masks" and after.startswith("-"):
            result.append(_BELOW_IN)
        if argument == "--resample" and arguments[0] == "fit" and after.startswith("-"):
            result.append(_OF_MOST_TARGETS)
    return result


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"harmonict {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    main()
