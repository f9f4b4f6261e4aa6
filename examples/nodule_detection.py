"""Table V and figure 8 of Zarei et al.: is a nodule found more surely in harmonized images?

    harmonict simulate examples/nodules.toml --out nodules --jobs 2
    python examples/nodule_detection.py nodules --model physics --out detection

Three detectors: NH/NH learns from and is tested on images as they are, NH/H is the same one on images that MODEL made,
H/H learns from those and is tested on them, until the mean of its last five epochs is no higher than the first one's.
They learn from training patients; every fourth of those is kept out and gives the threshold (highest F1) for precision,
recall and F1. Scored on test patients alone. Writes OUT/tables.md, one CSV each, and OUT/froc.png. Run it again and it
goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harmonict.core import HarmonictError
from harmonict.core.cohort import read_cohort
from harmonict.core.files import write_whole
from harmonict.dicom.inventory import find_series
from harmonict.evaluate.detection import (
    FROC_RATES,
    Outcome,
    Truth,
    auc,
    best_threshold,
    bootstrap_froc,
    froc,
    nodule_truth,
    operate,
    outcome,
    sensitivity_at,
)
from harmonict.harmonizer import Harmonizer
from harmonict.methods import load_model
from harmonict.train import Run
from harmonict.volumes import read_mask

PAPER = {"NH/NH": (0.76, 0.83, 0.97), "NH/H": (0.75, 0.83, 0.97), "H/H": (0.80, 0.86, 0.97)}  # precision, F1, AUC
FEWEST = 10  # test nodules that a table is made of
MARGIN = 8  # voxels about the lungs
KEPT_OUT = 4  # every fourth training patient
ROUNDS = 1000  # of the bootstrap


@dataclass(frozen=True)
class Scan:
    """One series, cut to the box of the patient's lungs: HU (z, y, x) int16, and its nodules in voxels of that box."""

    subject: str
    series: str
    hu: np.ndarray
    spacing_mm: np.ndarray
    truth: Truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", type=Path, help="folder of a simulated trial whose patients have nodules")
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--out", type=Path, default=Path("nodule-detection"))
    parser.add_argument("--renditions", type=int, default=4, help="of each patient, evenly through the trial's list")
    parser.add_argument("--steps", type=int, default=1200, help="of four patches")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        detect(args)
    except HarmonictError as error:
        sys.exit(str(error))


def detect(args: argparse.Namespace) -> None:
    table = chosen(read_cohort(args.trial / "cohort.csv"), args.renditions)
    model = load_model(args.model)
    truths = {patient: truth_of(args.trial, rows.iloc[0]) for patient, rows in table.groupby("patient", sort=False)}
    with_nodules = table[[len(truths[p][1].boxes) > 0 for p in table["patient"]]]
    learners = list(dict.fromkeys(with_nodules.loc[with_nodules["split"] == "train", "subject"]))
    testers = table[table["split"] == "test"]
    counted = sum(int(truths[p][1].counted.sum()) for p in testers["patient"].unique())
    if counted < FEWEST or len(learners) < KEPT_OUT:
        raise HarmonictError(
            f"{args.trial}: {len(learners)} training patients with nodules, {counted} test nodules of which half is "
            f"scanned; a table needs {KEPT_OUT} and {FEWEST}: harmonict simulate examples/nodules.toml --out nodules"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    page = args.out / "tables.md"
    page.write_text("")
    kept_out = learners[KEPT_OUT - 1 :: KEPT_OUT]
    kept = with_nodules["subject"].isin(kept_out)
    learn = with_nodules["subject"].isin(learners) & ~kept
    sides = {"learn": with_nodules[learn], "keep": with_nodules[kept], "test": testers}
    folder = args.out / "harmonized" / model.digest[:16]
    scans = {
        (kind, side): [
            read(row, truths[row["patient"]], model if kind == "H" else None, folder) for row in rows.to_dict("records")
        ]
        for kind in ("NH", "H")
        for side, rows in sides.items()
    }
    slices = sorted({len(scan.hu) for part in scans.values() for scan in part})
    say(
        page,
        f"Model: {model.name}, `{args.model.name}`. Trial: {args.trial.name}, {len(table)} series. Learned from "
        f"{len(learners) - len(kept_out)} patients, threshold from {len(kept_out)}, tested on "
        f"{testers['subject'].nunique()} with "
        f"{counted} nodules, {len(scans['NH', 'test'])} scans of {slices[0]} to {slices[-1]} slices"
        f"{', filled up with air to 64' if slices[0] < 64 else ''}. Seed {args.seed}, {args.steps} steps.",
    )
    outcomes, thresholds = trained_and_tested(scans, model, args, page)
    tables(outcomes, thresholds, args, page)


# -- images and nodules ------------------------------------------------------------------------------------------------


def chosen(table: pd.DataFrame, renditions: int) -> pd.DataFrame:
    """So many series of each training and test patient, evenly through their list; no truth, nothing that failed."""
    needed = {"split", "subject", "masks", "nodules"}
    if not needed <= set(table) or not table["split"].isin(("train", "test")).any():
        raise HarmonictError(f"a simulated trial's cohort table has the columns {', '.join(sorted(needed))}")
    usable = (table["state"] == "done") & (table["model"] != "truth") & table["split"].isin(("train", "test"))
    parts = [
        rows.iloc[np.unique(np.linspace(0, len(rows) - 1, renditions).round().astype(int))]
        for _, rows in table[usable].groupby("patient", sort=False)
    ]
    return pd.concat(parts)


def truth_of(trial: Path, row: pd.Series) -> tuple[tuple[slice, ...], Truth]:
    """(box of the lungs in a patient's series, the nodules in voxels of that box)."""
    like = find_series(row["path"]).found[0].read()
    files = dict(entry.split("=") for entry in row["masks"].split(";"))
    lung = np.argwhere(read_mask(trial / files["lung"], like=like))
    low = np.maximum(lung.min(0) - MARGIN, 0)
    box = tuple(slice(a, b) for a, b in zip(low, lung.max(0) + 1 + MARGIN, strict=True))
    words = row["nodules"].split(";") if isinstance(row["nodules"], str) and row["nodules"] else []
    diameters = {name: float(text.split()[-1]) for name, text in (word.split("=") for word in words)}
    masks = {name: read_mask(trial / files[name], like=like)[box] for name in diameters}
    return box, nodule_truth(masks, diameters, like.geometry.spacing_mm)


def read(row: dict[str, Any], truth: tuple[tuple[slice, ...], Truth], model: Harmonizer | None, folder: Path) -> Scan:
    """A series as it is or as the model makes it; what a model made is kept in `folder`."""
    place = folder / f"{row['series']}.npy"
    series = find_series(row["path"]).found[0].read()
    if model is None:
        hu = whole(series.hu[truth[0]])
    elif place.exists():
        hu = np.load(place)
    else:
        print(f"harmonizing {row['patient']}, {row['kernel']}, {row['ctdivol_mgy']} mGy", file=sys.stderr)
        hu = whole(model.harmonize(series).hu[truth[0]])
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(place, lambda name: save(name, hu))
    return Scan(row["subject"], row["series"], hu, np.array(series.geometry.spacing_mm), truth[1])


def save(name: str, hu: np.ndarray) -> None:
    with Path(name).open("wb") as stream:  # given a name, numpy appends its own ending
        np.save(stream, hu)


def whole(hu: np.ndarray) -> np.ndarray:
    """HU as a file holds them."""
    return np.clip(np.round(hu), -32768, 32767).astype(np.int16)


# -- training and testing ----------------------------------------------------------------------------------------------


def trained_and_tested(
    scans: dict[tuple[str, str], list[Scan]], model: Harmonizer, args: argparse.Namespace, page: Path
) -> tuple[dict[str, list[Outcome]], dict[str, float]]:
    """Outcomes on the test patients and the threshold of each of the three detectors."""
    from harmonict.evaluate.detector import Example, train_detector

    def trained(kind: str, until_loss: float | None) -> tuple[Callable[[str, str], list[Outcome]], float]:
        examples = [Example(scan.hu, scan.truth.boxes) for scan in scans[kind, "learn"]]
        series = hashlib.sha256(" ".join(scan.series for scan in scans[kind, "learn"]).encode()).hexdigest()
        identity = {"method": "nodule detector", "images": kind, "series": series, "steps": args.steps}
        if kind == "H":
            identity |= {"model": model.digest, "until_loss": until_loss}
        run = Run(args.out / f"{kind}.run", seed=args.seed, identity=identity)
        detector, loss = train_detector(examples, run, steps=args.steps, until_loss=until_loss)
        say(page, f"Detector {kind}: {run.step_number} steps, mean loss of its last five epochs {loss:.4f}.")

        def tested(kind: str, side: str) -> list[Outcome]:
            with run.inside():
                return [outcome_of(detector.detect(scan.hu), scan) for scan in scans[kind, side]]

        return tested, loss

    outcomes, thresholds = {}, {}
    plain, loss = trained("NH", None)
    thresholds["NH/NH"] = thresholds["NH/H"] = best_threshold(plain("NH", "keep"))
    outcomes["NH/NH"], outcomes["NH/H"] = plain("NH", "test"), plain("H", "test")
    harmonized, _ = trained("H", loss)
    thresholds["H/H"] = best_threshold(harmonized("H", "keep"))
    outcomes["H/H"] = harmonized("H", "test")
    return outcomes, thresholds


def outcome_of(found: tuple[np.ndarray, np.ndarray], scan: Scan) -> Outcome:
    """Candidates of a scan against its nodules, in mm."""
    (centres, scores), truth, mm = found, scan.truth, scan.spacing_mm
    return outcome(scan.subject, centres * mm, scores, truth.centres * mm, truth.radii_mm, truth.counted)


# -- tables and figure -------------------------------------------------------------------------------------------------


def tables(
    outcomes: dict[str, list[Outcome]], thresholds: dict[str, float], args: argparse.Namespace, page: Path
) -> None:
    rows, figure, drawn = {}, {}, {}
    for name, found in outcomes.items():
        at, curve = operate(found, thresholds[name]), froc(found)
        drawn[name] = bootstrap_froc(found, rounds=ROUNDS, seed=args.seed)
        reached = sensitivity_at(curve)
        low, high = np.percentile(drawn[name], (2.5, 97.5), axis=0)
        mean_low, mean_high = np.percentile(drawn[name].mean(1), (2.5, 97.5))
        rows[name] = {
            "precision": f"{at.precision:.2f}",
            "paper's": PAPER[name][0],
            "F1": f"{at.f1:.2f}",
            "paper's F1": PAPER[name][1],
            "AUC": f"{auc(found):.2f}",
            "paper's AUC": PAPER[name][2],
            "recall": f"{at.recall:.2f}",
            "false per scan": f"{at.false_per_scan:.2f}",
            "threshold": f"{at.threshold:.3f}",
        }
        figure[name] = {
            f"{rate:g}": f"{s:.2f} ({a:.2f}-{b:.2f})"
            for rate, s, a, b in zip(FROC_RATES, reached, low, high, strict=True)
        }
        figure[name]["mean"] = f"{reached.mean():.2f} ({mean_low:.2f}-{mean_high:.2f})"
    show(page, "table5", "Trained on / tested on (paper: table V, on LUNA16)", rows)
    title = f"Sensitivity at false positives per scan (95 % of {ROUNDS:,} bootstraps over patients; paper: figure 8)"
    show(page, "figure8", title, figure)
    plot(outcomes, drawn, args.out / "froc.png")


def show(page: Path, name: str, title: str, rows: dict[str, dict[str, Any]]) -> None:
    """A table as Markdown on the page and on screen, and as OUT/NAME.csv."""
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.to_csv(page.with_name(f"{name}.csv"))
    lines = ["| " + " | ".join(["", *table.columns]) + " |", "|---" * (len(table.columns) + 1) + "|"]
    lines += ["| " + " | ".join([str(n), *map(str, row)]) + " |" for n, row in zip(rows, table.to_numpy(), strict=True)]
    say(page, "\n".join([f"### {title}", "", *lines]))


def say(page: Path, text: str) -> None:
    print(text + "\n")
    with page.open("a") as stream:
        stream.write(text + "\n\n")


def plot(outcomes: dict[str, list[Outcome]], drawn: dict[str, np.ndarray], path: Path) -> None:
    """The FROC curves with the bootstrap's 95 % at LUNA16's rates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.5), constrained_layout=True)
    for (name, found), color in zip(outcomes.items(), ("black", "tab:red", "tab:blue"), strict=True):
        rates = np.geomspace(FROC_RATES[0], FROC_RATES[-1], 400)
        axes.plot(rates, sensitivity_at(froc(found), rates), color=color, label=name)
        low, high = np.percentile(drawn[name], (2.5, 97.5), axis=0)
        axes.fill_between(FROC_RATES, low, high, color=color, alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(FROC_RATES, [f"{rate:g}" for rate in FROC_RATES])
    axes.set(xlabel="false positives per scan", ylabel="sensitivity", ylim=(0, 1.02))
    axes.legend(title="trained on / tested on", loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
