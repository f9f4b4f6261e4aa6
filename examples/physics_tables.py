"""The tables of Zarei et al. ("A Physics-informed Deep Neural Network for Harmonization of CT Images") on a trial.

    harmonict simulate duke-small --out duke --jobs 2
    python examples/physics_tables.py duke --copd-only duke/copd.csv      patients for the ablation, as a cohort table
    harmonict fit physics  --size compact --cohort duke/cohort.csv --target-protocol truth --out physics
    harmonict fit physics  --size compact --cohort duke/copd.csv --target-protocol truth --set steps=3000 \
        --set cycle=1000 --out physics-copd
    harmonict fit vgg-unet --size compact --cohort duke/copd.csv --target-protocol truth --set steps=3000 \
        --set cycle=1000 --out vgg-unet-copd
    python examples/physics_tables.py duke --model physics --ablation physics-copd vgg-unet-copd --out tables
    HARMONICT_DATA=... python examples/physics_tables.py --real --model physics --out tables

Only test patients are scored, each under every kernel, strength and dose. LAA-950, Perc15 and lung mass are read in the
true lung mask; nodules are segmented by K-means around their true mask. ComBat is fitted on the training COPD patients
and applied to the test ones. What was measured stands in OUT/measurements.csv and is not measured again while the
models are the same; tables in OUT/tables.md and one CSV each, figures as PNG beside them. The weakest kernels and doses
are listed last.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import ndimage

from harmonict.biomarkers import lung_density, lung_mask, nodule_mask, nodule_shape
from harmonict.combat import apply_combat, fit_combat
from harmonict.core import HarmonictError, Series
from harmonict.core.cohort import read_cohort, write_cohort
from harmonict.dicom.inventory import find_series
from harmonict.evaluate.image import compare
from harmonict.harmonizer import Harmonizer
from harmonict.methods import load_model
from harmonict.metrics import bland_altman
from harmonict.physics.detectability import detectability
from harmonict.physics.mtf import skin_air_mtf
from harmonict.physics.nps import patient_nps, uniform_noise_sd
from harmonict.volumes import read_mask, read_volume

RAW, COMBAT = "as it is", "ComBat"
SMOOTH, AVERAGE, SHARP = "smooth", "average", "sharp"  # 32 and 40; 49 and 59; from 61 on
DOSES = {6.5: "high", 1.3: "low"}
GOAL = 0.70  # of the spread over kernels and doses of Perc15 and LAA-950, on test patients
DENSITY = {"laa950_percent": "LAA-950 %", "perc15_hu": "Perc15 HU", "mass_g": "lung mass g"}
SHAPE = {"volume_mm3": "V", "surface_to_volume_per_mm": "A/V", "sphericity": "sphericity"}
QUALITY = {"nrmse": "NRMSE %", "ssim": "SSIM %", "psnr_db": "PSNR dB"}
PHYSICS = {"noise_hu": "noise SD HU", "f50_per_mm": "MTF f50 1/mm", "d_prime": "d'"}
NODULE_MARGIN_MM = 3.0
SIEMENS_MM = 0.693359  # the headers of B10 and B70 say 1.0, which is wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", type=Path, nargs="?", help="folder of a duke trial")
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="model folders")
    parser.add_argument("--ablation", type=Path, nargs="*", default=[], help="models fitted on the COPD patients alone")
    parser.add_argument(
        "--copd-only", type=Path, help="only write the trial's cohort table with its COPD patients here"
    )
    parser.add_argument("--real", action="store_true", help="the models on the public images instead of a trial")
    parser.add_argument("--out", type=Path, default=Path("physics-tables"))
    args = parser.parse_args()
    try:
        if args.copd_only:
            copd_only(args.trial / "cohort.csv", args.copd_only)
            return
        models = {folder.name: load_model(folder) for folder in (*args.model, *args.ablation)}
        args.out.mkdir(parents=True, exist_ok=True)
        page = Page(args.out)
        if args.real:
            real(Path(os.environ["HARMONICT_DATA"]), models, page)
        else:
            tables(args.trial, models, [folder.name for folder in args.ablation], page)
    except HarmonictError as error:
        sys.exit(str(error))


def copd_only(cohort: Path, out: Path) -> None:
    """The cohort table without the patients of other groups."""
    table = read_cohort(cohort)
    if "group" not in table:
        raise HarmonictError(f"{cohort} has no column 'group'; give the cohort table of a duke trial")
    write_cohort(table[table["group"].isin(("copd", "copd-test"))], out)


class Page:
    """Tables as Markdown, on screen and in OUT/tables.md, and as one CSV each."""

    def __init__(self, out: Path) -> None:
        self.out = out
        (out / "tables.md").write_text("")

    def say(self, text: str) -> None:
        print(text + "\n")
        with (self.out / "tables.md").open("a") as stream:
            stream.write(text + "\n\n")

    def table(self, name: str, title: str, table: pd.DataFrame) -> None:
        table.to_csv(self.out / f"{name}.csv")
        head = "| " + " | ".join(["", *map(str, table.columns)]) + " |"
        rows = [
            f"| {index} | " + " | ".join(map(str, row)) + " |"
            for index, row in zip(table.index, table.to_numpy(), strict=True)
        ]
        self.say("\n".join([f"### {title}", "", head, "|---" * (table.shape[1] + 1) + "|", *rows]))


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(trial: Path, models: dict[str, Harmonizer], out: Path) -> pd.DataFrame:
    """A row for each test series as it is and as each model makes it, one for each truth, and the raw training COPD."""
    table = read_cohort(trial / "cohort.csv")
    place = out / "measurements.csv"
    done = pd.read_csv(place) if place.exists() else pd.DataFrame({"series": [], "method": [], "digest": []})
    digests = {RAW: "", **{name: model.digest for name, model in models.items()}}
    known = {(s, m, d) for s, m, d in zip(done["series"], done["method"], done["digest"].fillna(""), strict=True)}
    rows = done.to_dict("records")
    truths = table[table["model"] == "truth"].set_index("patient")
    wanted = table[(table["split"] == "test") | ((table["group"] == "copd") & (table["model"] != "truth"))]
    for n, row in enumerate(wanted.astype(object).where(wanted.notna(), None).to_dict("records")):
        methods = digests if row["split"] == "test" and row["model"] != "truth" else {RAW: ""}
        left = [name for name, digest in methods.items() if (row["series"], name, digest) not in known]
        if not left:
            continue
        source = read(row["path"])
        truth = read(truths.loc[row["patient"], "path"]) if row["split"] == "test" else None
        masks = {k: read_mask(trial / p, like=source) for k, p in (m.split("=") for m in row["masks"].split(";"))}
        for name in left:
            series = source if name == RAW else models[name].harmonize(source)
            about = {"series": row["series"], "method": name, "digest": methods[name]}
            about |= {key: row[key] for key in ("patient", "group", "split", "kernel", "iterative_strength")}
            about |= {"dose_mgy": row["ctdivol_mgy"], "truth": row["model"] == "truth"}
            rows.append(about | measured(series, truth, masks))
        print(f"\r{n + 1} of {len(wanted)} series", end="", file=sys.stderr)
        pd.DataFrame(rows).to_csv(place, index=False)
    print(file=sys.stderr)
    found = pd.DataFrame(rows)
    found["digest"] = found["digest"].fillna("")
    return found[[digests.get(m) == d for m, d in zip(found["method"], found["digest"], strict=True)]]


def read(path: str | Path) -> Series:
    return find_series(path).found[0].read()


def measured(series: Series, truth: Series | None, masks: dict[str, np.ndarray]) -> dict[str, Any]:
    """All numbers of one series; without a truth (training patients) the lung's density alone."""
    density = lung_density(series, masks["lung"])
    row: dict[str, Any] = {key: getattr(density, key) for key in DENSITY}
    if truth is None:
        return row
    quality = compare(truth, series)
    for region in ("whole", "body"):
        mean = quality[(quality["slice"] == "mean") & (quality["region"] == region)].iloc[0]
        row |= {f"{key}_{region}": float(mean[key]) for key in QUALITY}
    for name, mask in masks.items():
        if name.startswith("nodule") and mask.any():
            near = ndimage.distance_transform_edt(~mask, sampling=series.geometry.spacing_mm) <= NODULE_MARGIN_MM
            shape = or_none(lambda near=near: nodule_shape(series, nodule_mask(series, near)))
            row |= {f"{name} {key}": getattr(shape, key, np.nan) for key in SHAPE}
    return row | physics_of(series)


def physics_of(series: Series) -> dict[str, float]:
    """Noise SD, f50 and d' (4 mm, 100 HU); NaN where one cannot be measured."""
    skin, noise = or_none(lambda: skin_air_mtf(series)), or_none(lambda: patient_nps(series))
    sd = or_none(lambda: uniform_noise_sd(series))
    return {
        "noise_hu": np.nan if sd is None else sd,
        "f50_per_mm": np.nan if skin is None else skin.f50_per_mm,
        "d_prime": np.nan if skin is None or noise is None else detectability(skin.kernel, noise),
    }


def or_none(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except HarmonictError:
        return None


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(trial: Path, models: dict[str, Harmonizer], ablation: list[str], page: Page) -> None:
    found = measure(trial, models, page.out)
    found["kernel group"] = found["kernel"].map(kernel_group)
    truths = found[found["truth"].astype(bool)].set_index("patient")
    train = found[found["split"] == "train"]
    found = found[(found["split"] == "test") & ~found["truth"].astype(bool)].copy()
    for key in DENSITY:
        found[f"error {key}"] = (found[key] - found["patient"].map(truths[key])).abs()
    copd = found[found["group"] == "copd-test"]
    full = [RAW, *(name for name in models if name not in ablation)]

    page.table("table1", "COPD test patients against the truth (paper: table I)", against_truth(copd, full))
    groups = [
        against_truth(copd[copd["kernel group"] == group], full).rename(lambda m, group=group: f"{group}, {m}")
        for group in (SMOOTH, AVERAGE, SHARP)
        if (copd["kernel group"] == group).any()
    ]
    page.table("figure4", "The same by kernel (paper: figure 4)", pd.concat(groups))
    page.table("table2", "Nodule test patients against the truth (paper: table II)", nodules(found, truths, full))
    if ablation:
        title = "Ablation: fitted on the COPD patients alone (paper: table III)"
        page.table("table3", title, against_truth(copd, [RAW, *ablation]))
    copd = pd.concat([copd, combat(train, copd)])
    spread = renditions(copd)
    page.table("table4", "Spread over kernels and doses, SD (paper: table IV)", spread)
    page.table(
        "weakest",
        "By how much kernels and doses miss the truth on average, worst first",
        weakest(copd, [*full, *ablation]),
    )
    page.table("figure6", "Difference to the smooth kernel at high dose, as it is (paper: figure 6)", agreement(copd))
    page.table(
        "figure7", "Noise, sharpness, detectability (paper: figure 7)", mean_sd(found, [*full, *ablation], PHYSICS)
    )
    errors = {f"error {key}": f"error {title}" for key, title in DENSITY.items()}
    boxes(copd, full, {"ssim_body": "SSIM (body)"} | errors, page.out / "figure4.png", by="kernel group")
    limits_of_agreement(copd, page.out / "figure6.png")
    boxes(found, [*full, *ablation], PHYSICS, page.out / "figure7.png")
    verdicts(spread, copd, full, ablation, page)


def kernel_group(kernel: object) -> str | None:
    """Br32 -> smooth; the number of a Siemens kernel is its sharpness."""
    digits = "".join(c for c in str(kernel) if c.isdigit())
    if not digits:
        return None
    return SMOOTH if int(digits) <= 40 else AVERAGE if int(digits) < 60 else SHARP


def mean_sd(table: pd.DataFrame, methods: list[str], columns: dict[str, str]) -> pd.DataFrame:
    """Methods x columns: mean ± SD over series."""
    by = table.groupby("method")
    out = {
        title: [f"{number(by[c].mean()[m])} ± {number(by[c].std()[m])}" for m in methods]
        for c, title in columns.items()
    }
    return pd.DataFrame(out, index=methods)


def number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def against_truth(table: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """Image quality (body and whole image) and absolute errors of the biomarkers, mean ± SD over series."""
    table = table.assign(**{f"{k}_{r}": 100 * table[f"{k}_{r}"] for k in ("nrmse", "ssim") for r in ("whole", "body")})
    columns = {f"{key}_{region}": f"{title} {region}" for region in ("whole", "body") for key, title in QUALITY.items()}
    return mean_sd(table, methods, columns | {f"error {key}": f"error {title}" for key, title in DENSITY.items()})


def nodules(found: pd.DataFrame, truths: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """Image quality, and the NRMSE over renditions of each nodule's shape, in percent of its true value."""
    found = found[found["group"] == "nodule-test"]
    quality = against_truth(found, methods).filter(regex="whole|body")
    names = sorted({c.rpartition(" ")[0] for c in found.columns if c.startswith("nodule_")})
    for key, title in SHAPE.items():
        column = []
        for method in methods:
            rows = found[found["method"] == method]
            errors = []
            for name in names:
                true = rows["patient"].map(truths[f"{name} {key}"])
                error = (rows[f"{name} {key}"] - true) / true
                errors += [100 * np.sqrt(np.mean(np.square(e))) for _, e in error.dropna().groupby(rows["patient"])]
            column.append(f"{number(float(np.mean(errors)))} ({len(errors)} nodules)" if errors else "no nodule")
        quality[f"{title} NRMSE %"] = column
    return quality


def combat(train: pd.DataFrame, copd: pd.DataFrame) -> pd.DataFrame:
    """Biomarkers of the test renditions as ComBat brings them to smooth kernels at high dose."""

    def batches(table: pd.DataFrame) -> pd.DataFrame:
        table = table[table["method"] == RAW].copy()
        table["batch"] = table["kernel group"] + " " + table["dose_mgy"].map(DOSES)
        return table.assign(roi="lung", scan=table["series"])[["patient", "roi", "scan", "batch", *DENSITY]]

    model = fit_combat(batches(train), batch="batch", reference=f"{SMOOTH} high")
    moved = apply_combat(model, batches(copd)).set_index("scan")
    out = copd[copd["method"] == RAW].copy()
    for key in DENSITY:
        out[key] = out["series"].map(moved[key])
    return out.assign(method=COMBAT)


def renditions(copd: pd.DataFrame) -> pd.DataFrame:
    """SD over the renditions of each patient (mean over patients), and by how much it is smaller than before."""
    sd = copd.groupby(["method", "patient"])[list(DENSITY)].std().groupby("method").mean()
    mean = copd.groupby("method")[list(DENSITY)].mean()
    out = pd.DataFrame(index=[m for m in dict.fromkeys(copd["method"])])
    for key, title in DENSITY.items():
        out[f"{title}: mean"] = [number(mean[key][m]) for m in out.index]
        out[f"{title}: SD"] = [number(sd[key][m]) for m in out.index]
        out[f"{title}: SD less by %"] = [f"{100 * (1 - sd[key][m] / sd[key][RAW]):.0f}" for m in out.index]
    return out


def agreement(copd: pd.DataFrame) -> pd.DataFrame:
    """Bland-Altman of every rendition against the mean of the patient's smooth ones at high dose, as they are."""
    reference = reference_of(copd)
    rows = {}
    for method, part in copd.groupby("method", sort=False):
        rows[method] = {}
        for key, title in DENSITY.items():
            found = bland_altman(part["patient"].map(reference[key]), part[key])
            rows[method] |= {f"{title}: bias": number(found.bias), f"{title}: SD": number(found.sd)}
            rows[method][f"{title}: limits"] = f"{number(found.lower)} to {number(found.upper)}"
    return pd.DataFrame.from_dict(rows, orient="index")


def reference_of(copd: pd.DataFrame) -> pd.DataFrame:
    """Patients x biomarkers: the mean of the patient's smooth renditions at high dose, as they are."""
    best = copd[(copd["method"] == RAW) & (copd["kernel group"] == SMOOTH) & (copd["dose_mgy"].map(DOSES) == "high")]
    return best.groupby("patient")[list(DENSITY)].mean()


def weakest(copd: pd.DataFrame, methods: list[str], *, count: int = 6) -> pd.DataFrame:
    """The renditions (kernel, strength, dose) with the largest mean error of LAA-950, of each method."""
    errors = [f"error {key}" for key in ("laa950_percent", "perc15_hu")]
    strength = copd["iterative_strength"].map(lambda i: f"({i:.0f})" if i else "")
    rendition = copd["kernel"] + strength + copd["dose_mgy"].map(lambda d: f" {d:g} mGy")
    mean = copd.assign(rendition=rendition).groupby(["method", "rendition"])[errors].mean()
    columns = {}
    for method in methods:
        worst = mean.loc[method].nlargest(count, errors[0])
        texts = [f"{name}: {number(laa)} %, {number(hu)} HU" for name, laa, hu in worst.itertuples()]
        columns[method] = pd.Series(texts, index=range(1, len(texts) + 1))
    return pd.DataFrame(columns).fillna("")


def verdicts(spread: pd.DataFrame, copd: pd.DataFrame, full: list[str], ablation: list[str], page: Page) -> None:
    """The two goals in plain words."""
    for method in (m for m in (*full, *ablation) if m != RAW):
        less = {title: float(spread[f"{title}: SD less by %"][method]) for title in ("LAA-950 %", "Perc15 HU")}
        words = ", ".join(f"{title.split()[0]} by {value:.0f} %" for title, value in less.items())
        word = "reached" if min(less.values()) >= 100 * GOAL else "NOT reached"
        page.say(f"**{method}: spread over kernels and doses reduced: {words}; goal {100 * GOAL:.0f} %: {word}.**")
    by = copd.groupby("method")
    told = [name for name in ablation if name.startswith("physics")]
    for ours in told:
        for other in (name for name in ablation if name not in told):
            for column, title, sign in (
                ("ssim_body", "SSIM (body)", 1),
                ("ssim_whole", "SSIM (whole)", 1),
                ("error laa950_percent", "LAA-950 error", -1),
            ):
                a, b = (by[column].mean()[name] for name in (ours, other))
                word = "beats" if sign * (a - b) > 0 else "does NOT beat"
                page.say(f"**{ours} {word} {other} on {title}: {a:.4g} against {b:.4g}.**")


# -- figures -----------------------------------------------------------------------------------------------------------


def boxes(
    table: pd.DataFrame, methods: list[str], columns: Mapping[str, str], path: Path, *, by: str | None = None
) -> None:
    """A panel for each column, a box over series for each method, in groups by another column."""
    import matplotlib.pyplot as plt

    groups = [g for g in (SMOOTH, AVERAGE, SHARP) if (table[by] == g).any()] if by else [""]
    figure, axes = plt.subplots(1, len(columns), figsize=(4.2 * len(columns), 4.2), layout="constrained")
    colours, black = plt.get_cmap("tab10").colors, {"color": "black"}
    for axis, (column, title) in zip(np.ravel(axes), columns.items(), strict=True):
        for m, method in enumerate(methods):
            rows = table[table["method"] == method]
            values = [(rows[rows[by] == g] if by else rows)[column].dropna() for g in groups]
            places = np.arange(len(groups)) + (m - (len(methods) - 1) / 2) * 0.8 / len(methods)
            drawn = axis.boxplot(
                values, positions=places, widths=0.7 / len(methods), patch_artist=True, sym=".", medianprops=black
            )
            for box in drawn["boxes"]:
                box.set_facecolor(colours[m])
            axis.plot([], [], "s", color=colours[m], label=method)
        axis.set_xticks(range(len(groups)), groups)
        axis.set_title(title)
    handles, labels = np.ravel(axes)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(methods))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def limits_of_agreement(copd: pd.DataFrame, path: Path) -> None:
    """Bland-Altman panels: biomarkers downwards, methods across, a colour for each kernel group."""
    import matplotlib.pyplot as plt

    reference, methods = reference_of(copd), list(dict.fromkeys(copd["method"]))
    size = (3.2 * len(methods), 2.8 * len(DENSITY))
    figure, axes = plt.subplots(
        len(DENSITY), len(methods), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for (key, title), row in zip(DENSITY.items(), axes, strict=True):
        for method, axis in zip(methods, row, strict=True):
            part = copd[copd["method"] == method]
            wanted = part["patient"].map(reference[key])
            for group in (SMOOTH, AVERAGE, SHARP):
                mine = part["kernel group"] == group
                axis.plot((wanted + part[key])[mine] / 2, (part[key] - wanted)[mine], ".", label=group)
            found = bland_altman(wanted, part[key])
            for y, style in ((found.bias, "-"), (found.lower, ":"), (found.upper, ":")):
                axis.axhline(y, linestyle=style, color="black", linewidth=1)
            axis.set_title(method if key == next(iter(DENSITY)) else "")
            axis.set_xlabel(f"mean {title}")
        row[0].set_ylabel(f"difference {title}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def before_and_after(images: list[tuple[str, list[tuple[str, np.ndarray]]]], path: Path) -> None:
    """A row for each scan: its middle slice as it is and as each model makes it; -1100 to 300 HU."""
    import matplotlib.pyplot as plt

    wide = max(len(row) for _, row in images)
    figure, axes = plt.subplots(
        len(images), wide, figsize=(3 * wide, 3.1 * len(images)), squeeze=False, layout="constrained"
    )
    for (name, row), line in zip(images, axes, strict=True):
        for axis in line:
            axis.axis("off")
        for (method, hu), axis in zip(row, line, strict=False):
            axis.imshow(hu, cmap="gray", vmin=-1100, vmax=300)
            axis.set_title(f"{name}, {method}", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# -- real images -------------------------------------------------------------------------------------------------------


def real(data: Path, models: dict[str, Harmonizer], page: Page) -> None:
    """The models on images that no simulator made: kernel pairs of one scan each, and one series of each vendor."""
    rows = []
    for patient, renderings in real_pairs(data):
        lung = lung_mask(next(iter(renderings.values())))  # of the softest kernel
        for method in (RAW, *models):
            made = {k: s if method == RAW else models[method].harmonize(s) for k, s in renderings.items()}
            wanted = None if method == RAW else models[method].target.kernel
            density = pd.DataFrame([vars(lung_density(s, lung)) for s in made.values()]) if lung.any() else None
            apart = [np.mean(np.abs(a.hu - b.hu)) for a, b in pairs_of(list(made.values()))]
            row = {
                "patient": patient,
                "method": method,
                "kernels": " ".join(made),
                "mean difference HU": np.mean(apart),
            }
            if density is not None:
                row |= {f"{title}: SD": density[key].std() for key, title in DENSITY.items() if key != "mass_g"}
            if wanted in renderings:
                for kernel, series in made.items():
                    body = compare(renderings[wanted], series).query("slice == 'mean' and region == 'body'")
                    before = compare(renderings[wanted], renderings[kernel]).query(
                        "slice == 'mean' and region == 'body'"
                    )
                    if kernel != wanted:
                        change = [float(t["psnr_db"].iloc[0]) for t in (before, body)]
                        row[f"{kernel} to {wanted}: PSNR body dB"] = f"{change[0]:.1f} to {change[1]:.1f}"
            rows.append(row)
    shown = pd.DataFrame(rows).set_index("patient").map(lambda v: number(v) if isinstance(v, float) else v)
    page.table("real-pairs", "Kernel pairs of real scans: how far apart the kernels' images are", shown.fillna(""))
    rows, images = [], []
    for folder in sorted((data / "ct").iterdir()):
        for found in find_series(folder).found:
            series = found.read()
            shown: list[tuple[str, np.ndarray]] = []
            images.append((f"{folder.name} {series.protocol.kernel or ''}", shown))
            for method in (RAW, *models):
                try:
                    made = series if method == RAW else models[method].harmonize(series)
                    shown.append((method, made.hu[len(made.hu) // 2]))
                    physics = physics_of(made)
                    row = {title: number(physics[key]) for key, title in PHYSICS.items()}
                except HarmonictError as error:
                    row = {"refused": str(error)}
                rows.append({"patient": folder.name, "kernel": series.protocol.kernel or "", "method": method} | row)
    before_and_after(images, page.out / "figure9.png")
    page.table("real-ct", "Other real scans (paper: figure 9)", pd.DataFrame(rows).set_index("patient").fillna(""))


def real_pairs(data: Path) -> Iterator[tuple[str, dict[str, Series]]]:
    """(whom it shows, kernel -> series), the softest kernel first."""
    folder = data / "paired" / "siemens-chest"
    images = {k: read_volume(folder / f"{k}.mha", spacing_mm=SIEMENS_MM) for k in ("B10", "B30", "B50", "B70")}
    yield "siemens-chest", {k: replace(s, protocol=s.protocol.with_(kernel=k)) for k, s in images.items()}
    found = {k: find_series(data / "paired" / "canon-lungman" / k, slicewise=True).found[0] for k in ("FC13", "FC51")}
    yield "canon-lungman", {k: one.read() for k, one in found.items()}


def pairs_of(items: list[Series]) -> Iterator[tuple[Series, Series]]:
    return ((a, b) for n, a in enumerate(items) for b in items[n + 1 :])


if __name__ == "__main__":
    main()
