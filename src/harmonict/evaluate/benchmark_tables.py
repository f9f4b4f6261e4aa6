"""The tables of a benchmark, made from what was measured: data frames, CSV files and one Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from harmonict.core import HarmonictError
from harmonict.core.files import write_whole
from harmonict.evaluate import biology
from harmonict.evaluate.benchmark_plan import Plan
from harmonict.evaluate.reproducibility import CCC_ABOVE, RE_BELOW, ccc_columns
from harmonict.evaluate.scores import IBEX_RANGES, about, texture_names
from harmonict.evaluate.texture import FEATURES
from harmonict.radiomics.rois import HU_RANGES
from harmonict.radiomics.table import feature_classes

REFERENCES = ("ratio", "wiener", "fir")
FEWEST_ROIS = 8  # a CCC of fewer values says little: such a range has no count
BIOLOGY_ROWS = 400  # drawn with the seed where a set has more: the rule's time grows with their cube
BIOLOGY_SETS = ("all", "kernel", "iterative", "dose or thickness")
RANGE_NAMES = tuple(f"[{low:g}, {high:g}]" for low, high in IBEX_RANGES)
SET_TITLES = {
    "all": "All test series",
    "kernel": "(home of mtf-ratio) FBP, same dose and slice thickness, only the kernel differs",
    "iterative": "(b) Sources reconstructed iteratively",
    "dose or thickness": "(c) FBP sources of another dose or slice thickness",
    "real": "(a) Real pairs",
}

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Result:
    """What is known of one model: measured[case name] -> arrays of `scores.measure`; reason: why something failed."""

    method: str
    size: str | None = None
    measured: Mapping[str, Arrays] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    settings: str = ""


@dataclass(frozen=True)
class Tables:
    """models: one row a model, state "done", "part" (some series failed), "failed" or "not run". cases: a row for each
    model and test series. summary: for each model and set of series, mean and SD over the series. tumour, tests: see
    docs/benchmark.md. page: all of it in Markdown.
    """

    models: pd.DataFrame
    cases: pd.DataFrame
    summary: pd.DataFrame
    tumour: pd.DataFrame
    tests: pd.DataFrame
    page: str


def make_tables(
    plan: Plan,
    cases: Sequence[Any],
    targets: Mapping[str, Arrays],
    results: Mapping[str, Result],
    tumour: Any | None,
) -> Tables:
    """All tables of what is measured so far."""
    rows = []
    for name, result in results.items():
        for case in cases:
            if case.name in result.measured:
                rows.append({"model": name, **_case_row(case, targets[case.name], result.measured[case.name])})
    per_case = pd.DataFrame(rows)
    summary = _summary(plan, cases, targets, results, per_case)
    models = _models(results)
    one = _tumour(tumour, targets, results)
    tests = _tests(plan, per_case)
    return Tables(models, per_case, summary, one, tests, _page(plan, models, summary, one, tests, tumour))


def write_tables(tables: Tables, out: str | Path) -> None:
    """models.csv, cases.csv, summary.csv, tumour.csv, tests.csv and tables.md in `out`."""
    for name in ("models", "cases", "summary", "tumour", "tests"):
        table: pd.DataFrame = getattr(tables, name)
        write_whole(Path(out) / f"{name}.csv", lambda path, t=table: t.to_csv(path, index=False))  # type: ignore[misc]
    write_whole(Path(out) / "tables.md", lambda path: Path(path).write_text(tables.page))


# -- rows --------------------------------------------------------------------------------------------------------------


def _case_row(case: Any, target: Arrays, value: Arrays) -> dict[str, Any]:
    scalars, reference = about(value), about(target)
    row: dict[str, Any] = {
        "case": case.name,
        "patient": case.patient,
        "kernel": case.source_protocol.kernel,
        **{k: v for k, v in scalars.items() if not k.startswith("nodule_")},
        "target_noise_hu": reference["noise_hu"],
        "target_f50_per_mm": reference["f50_per_mm"],
    }
    classes = feature_classes(texture_names())
    x, y = target["features"], value["features"]
    if len(x) > 1:
        agreement = ccc_columns(x, y)
        row["ccc_over_rois"] = agreement.mean()
        row |= {f"ccc_{c}": agreement[(classes == c).to_numpy()].mean() for c in dict.fromkeys(classes)}
        row["reproducible_of_93"] = int((agreement > CCC_ABOVE).sum())
    ranges = target["ibex_range"]
    for n, name in enumerate(RANGE_NAMES):
        here = ranges == n
        if here.sum() >= FEWEST_ROIS:
            agreement = ccc_columns(target["ibex"][here], value["ibex"][here])
            row[f"ibex_{name}"] = int((agreement > CCC_ABOVE).sum())
    counts = [row[f"ibex_{name}"] for name in RANGE_NAMES if f"ibex_{name}" in row]
    row["ibex_mean"] = float(np.mean(counts)) if counts else np.nan
    return row


def _sets(per_case: pd.DataFrame) -> dict[str, pd.Series]:
    """Name of a set of series -> which rows belong to it."""
    everything = per_case["differs"] != "real"
    found = {"all": everything} if everything.any() else {}
    for differs in ("kernel", "iterative", "dose or thickness", "real"):
        if (per_case["differs"] == differs).any():
            found[differs] = per_case["differs"] == differs
    for kernel in sorted(per_case.loc[everything, "kernel"].dropna().unique()):
        found[kernel] = everything & (per_case["kernel"] == kernel)
        for differs in ("kernel", "iterative", "dose or thickness"):
            rows = (per_case["kernel"] == kernel) & (per_case["differs"] == differs)
            if rows.any():
                found[f"{kernel}, {differs}"] = rows
    return found


def _summary(
    plan: Plan, cases: Sequence[Any], targets: Mapping[str, Arrays], results: Mapping[str, Result], per: pd.DataFrame
) -> pd.DataFrame:
    if per.empty:
        return pd.DataFrame()
    numbers = [c for c in per.columns if pd.api.types.is_numeric_dtype(per[c]) and c not in ("slices", "rois")]
    by_name = {case.name: case for case in cases}
    rows = []
    for name, chosen in _sets(per).items():
        for model, part in per[chosen].groupby("model", sort=False):
            finite = part[numbers].replace([np.inf, -np.inf], np.nan)
            row: dict[str, Any] = {"set": name, "model": model, "series": len(part)}
            row |= {"patients": part["patient"].nunique(), "rois": int(part["rois"].sum())}
            row |= {column: finite[column].mean() for column in numbers}
            row |= {f"{column}_sd": finite[column].std() for column in numbers}
            for column in ("whole_psnr_db", "body_psnr_db"):
                if np.isinf(part[column]).all():
                    row[column] = np.inf
            members = [by_name[c] for c in part["case"]]
            row |= _whole_image(members, targets, results[str(model)].measured)
            if name in BIOLOGY_SETS:
                row |= _biology(plan, members, targets, results[str(model)].measured)
            rows.append(row)
    return pd.DataFrame(rows)


def _whole_image(
    members: Sequence[Any], targets: Mapping[str, Arrays], measured: Mapping[str, Arrays]
) -> dict[str, Any]:
    """Reproducible features at the level of the image: one slice of each series, CCC over the series."""
    pairs = [
        (targets[c.name]["image"], measured[c.name]["image"])
        for c in members
        if "image" in targets[c.name] and "image" in measured[c.name]
    ]
    if len(pairs) < FEWEST_ROIS:
        return {}
    x, y = (np.stack(side) for side in zip(*pairs, strict=True))
    return {"ibex_image": int((ccc_columns(x, y) > CCC_ABOVE).sum()), "ibex_images": len(pairs)}


def _biology(
    plan: Plan, members: Sequence[Any], targets: Mapping[str, Arrays], measured: Mapping[str, Arrays]
) -> dict[str, Any]:
    """Variance between patients, and how well features tell tissues apart, of the model and of the target."""
    parts: list[pd.DataFrame] = []
    labels: dict[tuple[str, str], str] = {}
    for case in members:
        tissue = targets[case.name]["feature_range"]
        names = [f"{case.name} {n}" for n in range(len(tissue))]
        for scan, arrays in (("model", measured[case.name]), ("target", targets[case.name])):
            table = pd.DataFrame(arrays["features"], columns=texture_names())
            parts.append(table.assign(patient=case.patient, roi=names, scan=scan))
        labels |= {(case.patient, roi): f"{HU_RANGES[n]}" for roi, n in zip(names, tissue, strict=True)}
    table = pd.concat(parts, ignore_index=True)
    rows = table["roi"].nunique()
    if rows > BIOLOGY_ROWS:
        drawn = np.random.default_rng(plan.seed).choice(table["roi"].unique(), BIOLOGY_ROWS, replace=False)
        table = table[table["roi"].isin(drawn)]
    row: dict[str, Any] = {}
    try:
        share = biology.between_patient_share(table).groupby("scan")["share"].median()
        row |= {"between_patients": share["model"], "between_patients_target": share["target"]}
        # one class for all features: only their sum is asked for
        one_class = dict.fromkeys(texture_names(), "texture")
        areas = biology.separation(table, labels, rng=np.random.default_rng(plan.seed), repeats=2, class_map=one_class)
        auc = areas[areas["class"] == "all"].set_index("scan")["auc"]
        row |= {"tissue_auc": auc["model"], "tissue_auc_target": auc["target"]}
    except HarmonictError:  # one patient, or features that are not finite: there is no such figure
        pass
    return row


def _models(results: Mapping[str, Result]) -> pd.DataFrame:
    rows = []
    for name, result in results.items():
        state = "failed" if not result.measured else "done" if not result.reason else "part"
        state = "not run" if result.reason == "not run yet" else state
        rows.append(
            {
                "model": name,
                "method": result.method,
                "size": result.size,
                "settings": result.settings,
                "state": state,
                "reason": result.reason,
                "series": len(result.measured),
                **{k: result.facts.get(k) for k in _FACTS},
            }
        )
    return pd.DataFrame(rows)


def _tumour(tumour: Any | None, targets: Mapping[str, Arrays], results: Mapping[str, Result]) -> pd.DataFrame:
    """One nodule: features of the 1,401 within 15 % of the target's (one region has no CCC), and PSNR."""
    columns = ["model", "nodule", "reproducible_of_1401", "nodule_psnr_db", "whole_psnr_db"]
    if tumour is None:
        return pd.DataFrame(columns=columns)
    target = targets[tumour.name]
    names = [k for k in target if k.startswith("nodule_")]
    rows = []
    for model, result in results.items():
        arrays = result.measured.get(tumour.name)
        for name in names if arrays is not None else ():
            assert arrays is not None
            x, y = target[name], arrays[name]
            within = np.abs(y - x) <= RE_BELOW * np.abs(x)
            scalars = about(arrays)
            row = [model, name.removeprefix("nodule_"), int(within.sum())]
            rows.append([*row, scalars[f"{name}_psnr_db"], scalars["whole_psnr_db"]])
    return pd.DataFrame(rows, columns=columns)


def _tests(plan: Plan, per: pd.DataFrame) -> pd.DataFrame:
    """Paired t-tests over the test series (and the real pair, where it is alone, none)."""
    rows = []
    measures = {
        f"features reproducible of 1,401 in {RANGE_NAMES[1]} HU": f"ibex_{RANGE_NAMES[1]}",
        "features reproducible of 1,401, mean of ranges": "ibex_mean",
        "CCC over ROIs": "ccc_over_rois",
        "PSNR body (dB)": "body_psnr_db",
        "GLCM contrast error": "glcm_contrast",
    }
    for comparison in plan.comparisons:
        sides = [per[per["model"] == name] if len(per) else per for name in (comparison.a, comparison.b)]
        if any(side.empty for side in sides):
            continue
        a, b = (side.set_index("case") for side in sides)
        common = a.index.intersection(b.index)
        for title, column in measures.items():
            if column not in per:
                continue
            x, y = a.loc[common, column].astype(float), b.loc[common, column].astype(float)
            both = x.notna() & y.notna() & np.isfinite(x) & np.isfinite(y)
            x, y = x[both], y[both]
            if not len(x):
                continue
            tested = stats.ttest_rel(y, x) if len(x) > 1 and (y - x).std() > 0 else None
            rows.append(
                {
                    "table": comparison.table,
                    "a": comparison.a,
                    "b": comparison.b,
                    "measure": title,
                    "series": len(x),
                    "mean_a": x.mean(),
                    "mean_b": y.mean(),
                    "difference": (y - x).mean(),
                    "t": np.nan if tested is None else tested.statistic,
                    "p": np.nan if tested is None else tested.pvalue,
                }
            )
    return pd.DataFrame(rows)


# -- the page ----------------------------------------------------------------------------------------------------------

_FACTS = ("parameters", "steps", "training_seconds", "seconds_per_slice", "threads", "digest")


def _page(
    plan: Plan,
    models: pd.DataFrame,
    summary: pd.DataFrame,
    tumour: pd.DataFrame,
    tests: pd.DataFrame,
    case: Any | None,
) -> str:
    lines = [
        f"Trained on the trial {Path(plan.trial).name}, {' and '.join(plan.sources)} to {plan.target}, "
        f"seed {plan.seed}. HU clipped to [-1024, 1000] for PSNR, SSIM and NRMSE, peak 2024; mean ± SD over series.",
        "",
        "## Models",
        "",
        *_markdown(models[models["state"] != "not run"], _MODEL_COLUMNS),
    ]
    waiting = models.loc[models["state"] == "not run", "model"]
    if len(waiting):
        lines += ["", f"Not run yet: {'; '.join(waiting)}."]
    for name in ("real", "all", "kernel", "iterative", "dose or thickness"):
        part = _part(summary, name)
        if part.empty:
            continue
        if name not in ("all", "real") and part["series"].max() == _part(summary, "all")["series"].max():
            continue  # the only set there is: said already
        some = part.iloc[0]
        target = f"; the target's noise is {some['target_noise_hu']:.1f} HU, its f50 {some['target_f50_per_mm']:.2f}/mm"
        counted = f"{part['series'].max()} series of {some['patients']} patients, {part['rois'].max()} ROIs{target}."
        lines += ["", f"## {SET_TITLES[name]}", "", counted, "", *_markdown(part, _MAIN_COLUMNS), ""]
        lines += ["CCC over ROIs by class of feature:", "", *_markdown(part, _CLASS_COLUMNS)]
        if name in BIOLOGY_SETS:
            lines += ["", *_biology_lines(part)]
    for name in _paper_sets(summary):
        part = _part(summary, name)
        title = "real pairs" if name == "real" else f"{name.split(',')[0]} to {plan.target}"
        lines += ["", f"## Of 1,401 features, how many are reproducible: {title}", ""]
        lines += [f"CCC over ROIs > {CCC_ABOVE}, per series; mean ± SD over {part['series'].max()} series.", ""]
        lines += _markdown(part, {f"ibex_{r}": r for r in RANGE_NAMES} | {"ibex_mean": "mean"})
        lines += ["", f"GLCM errors (STAN-CT eq 8): {title}", ""]
        lines += _markdown(part, {f"glcm_{feature}": feature for feature in FEATURES})
    lines += _image_lines(summary)
    if len(tumour):
        lines += ["", f"## One nodule: {case.name if case else ''}", ""]
        lines += _markdown(tumour, _TUMOUR_COLUMNS)
    for table in dict.fromkeys(tests["table"]) if len(tests) else ():
        lines += [
            "",
            f"## {table}",
            "",
            "Paired t-test over test series; those of one patient are not independent.",
            "",
        ]
        lines += _markdown(tests[tests["table"] == table], _TEST_COLUMNS)
    return "\n".join(lines) + "\n"


_MODEL_COLUMNS = {
    "model": "model",
    "method": "method",
    "size": "size",
    "settings": "settings",
    "parameters": "parameters",
    "steps": "steps",
    "training_seconds": "training (s)",
    "seconds_per_slice": "slice (s, 1 thread)",
    "state": "state",
    "reason": "reason",
}
_MAIN_COLUMNS = {
    "body_psnr_db": "PSNR body (dB)",
    "ccc_over_rois": "CCC over ROIs",
    "whole_psnr_db": "PSNR whole (dB)",
    "body_ssim": "SSIM body",
    "whole_ssim": "SSIM whole",
    "body_nrmse": "NRMSE body",
    "body_mae_hu": "MAE body (HU)",
    "body_bias_hu": "bias body (HU)",
    "noise_hu": "noise (HU)",
    "f50_per_mm": "f50 (1/mm)",
    "reproducible_of_93": "of 93",
    "ibex_mean": "of 1,401, mean of ranges",
}
_CLASS_COLUMNS = {f"ccc_{c}": c for c in ("firstorder", "glcm", "glrlm", "glszm", "gldm", "ngtdm")}
_TUMOUR_COLUMNS = {
    "model": "model",
    "nodule": "nodule",
    "reproducible_of_1401": "features within 15 % of 1,401",
    "nodule_psnr_db": "PSNR around it (dB)",
    "whole_psnr_db": "PSNR whole (dB)",
}
_TEST_COLUMNS = {
    "a": "a",
    "b": "b",
    "measure": "measure",
    "series": "series",
    "mean_a": "mean a",
    "mean_b": "mean b",
    "difference": "b - a",
    "t": "t",
    "p": "p",
}
_DIGITS = {"": 1, "ccc": 3, "body_ssim": 3, "whole_ssim": 3, "body_nrmse": 4, "glcm": 3, "f50_per_mm": 3}
_DIGITS |= {"reproducible_of": 0, "ibex": 0, "p": 4, "seconds_per_slice": 3, "training_seconds": 0, "mean_": 3, "t": 2}
_DIGITS |= {"difference": 3, "between": 3, "tissue": 3}


def _part(summary: pd.DataFrame, name: str) -> pd.DataFrame:
    return summary[summary["set"] == name] if len(summary) else summary


def _paper_sets(summary: pd.DataFrame) -> list[str]:
    names = list(dict.fromkeys(summary["set"])) if len(summary) else []
    return [n for n in names if n.endswith(", kernel") or n == "real"]


def _image_lines(summary: pd.DataFrame) -> list[str]:
    """Reproducible features of whole images, kernel by kernel over all doses, thicknesses and strengths."""
    if "ibex_image" not in summary:
        return []
    found = summary[summary["ibex_image"].notna() & ~summary["set"].isin(SET_TITLES)]
    if found.empty:
        return []
    counted = {name: int(part["ibex_images"].max()) for name, part in found.groupby("set", sort=False)}
    wide = found.pivot(index="model", columns="set", values="ibex_image")[list(counted)]
    wide = wide.astype(int, errors="ignore").reindex(dict.fromkeys(found["model"])).reset_index()
    titles = {name: f"{name} ({n} series)" for name, n in counted.items()}
    return [
        *("", "## Of 1,401 features, how many are reproducible: whole image", ""),
        "The body in the middle slice of each series, CCC over all series of a kernel.",
        *("", *_markdown(wide, titles)),
    ]


def _biology_lines(part: pd.DataFrame) -> list[str]:
    if "tissue_auc" not in part:
        return []
    columns = {"between_patients": "share of variance between patients", "tissue_auc": "AUC of tissue classes"}
    some = part.iloc[0]
    target = f"The target has {some['between_patients_target']:.3f} and {some['tissue_auc_target']:.3f}."
    return ["Does biology survive?", target, "", *_markdown(part, columns)]


def _markdown(table: pd.DataFrame, columns: Mapping[str, str]) -> list[str]:
    """A Markdown table; a column with an SD column prints "mean ± SD"; columns that hold nothing are left out."""
    shown = {c: t for c, t in columns.items() if c in table and table[c].notna().any() and (table[c] != "").any()}
    if "model" not in shown and "model" in table:
        shown = {"model": "", **shown}
    lines = ["| " + " | ".join(shown.values()) + " |", "|" + "---|" * len(shown)]
    for _, row in table.iterrows():
        lines.append("| " + " | ".join(_cell(row, column) for column in shown) + " |")
    return lines


def _cell(row: pd.Series, column: str) -> str:
    value, sd = row[column], row.get(f"{column}_sd")
    if value is None or value != value:
        return ""
    if not isinstance(value, float | np.floating):
        return str(value)
    digits = _DIGITS[max((start for start in _DIGITS if column.startswith(start)), key=len)]
    if column in ("parameters", "steps"):
        return f"{value:,.0f}"
    spread = "" if sd is None or sd != sd else f" ± {sd:.{digits}f}"
    return f"{value:.{digits}f}{spread}"
