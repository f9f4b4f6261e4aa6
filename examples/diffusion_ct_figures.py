"""Table 1 and figures 4 and 5 of DiffusionCT (Selim et al. 2023) from a finished benchmark, the table as Markdown.

harmonict simulate configs/diffusion-ct-trial.toml --out runs/dct
harmonict benchmark configs/diffusion-ct.toml --out runs/diffusion-ct
python examples/diffusion_ct_figures.py configs/diffusion-ct.toml runs/diffusion-ct --ceiling encoder-decoder \
    --figure-4 reproducible.png --figure-5 tumour.png

The 1,401 IBEX features in their six classes, of the tumours of the test phantom. The paper's CCC of a class is over its
features, for each tumour; one feature with large numbers decides it. So each cell has beside it the CCC of each feature
over the test's random boxes, mean over the features of the class. A model that is not finished has no row. --ceiling:
one more row, of the target itself after it went through that model: what a translation in its latent cannot surpass.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from figure_one_tumour import draw

from harmonict.evaluate import scores
from harmonict.evaluate.benchmark import test_cases, tumour_images
from harmonict.evaluate.benchmark_plan import Plan, load_plan
from harmonict.evaluate.reproducibility import CURVE_THRESHOLDS, RE_BELOW, ccc_columns
from harmonict.methods import load_model
from harmonict.metrics import ccc, relative_error
from harmonict.radiomics.ibex import ibex_table

WINDOW_HU = (-800.0, 600.0)  # of figure 5
COLUMNS = 5
CLASS = ibex_table()["class6"].to_numpy()
CLASSES = tuple(dict.fromkeys(CLASS))

Features = tuple[np.ndarray, np.ndarray, float]  # of tumours and of boxes, (n, 1401); PSNR in the body, dB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path, help="the folder of the benchmark")
    parser.add_argument("--trial", type=Path, help="a cohort table in place of the plan's, for --ceiling")
    parser.add_argument("--ceiling", metavar="MODEL", help="a model of the plan that the target goes through")
    parser.add_argument("--figure-4", type=Path)
    parser.add_argument("--figure-5", type=Path)
    chosen = parser.parse_args()
    plan = load_plan(chosen.plan)
    target, models = measured(chosen.out, plan)
    rows = dict(models)
    if chosen.ceiling:
        rows[f"target through {chosen.ceiling}"] = rebuilt(chosen.out, plan, chosen.trial or plan.trial, chosen.ceiling)
    print_table(target, rows)
    if chosen.figure_4:
        draw_curves(target, models, chosen.figure_4)
    if chosen.figure_5:
        draw_tumour(chosen.out, plan, chosen.figure_5)


def measured(out: Path, plan: Plan) -> tuple[Features, dict[str, Features]]:
    """Features of the target and of every finished model, the same tumours and boxes in the same order."""
    files = {path.name: path for path in sorted((out / "targets").glob("*.npz"))}
    places = {model.name: out / "results" / model.place for model in plan.models}
    finished = {name: place for name, place in places.items() if files and all((place / f).is_file() for f in files)}
    if not finished:
        raise SystemExit(f"{out} holds no finished model; run `harmonict benchmark` first")

    def features(folder: Path) -> Features:
        found = []
        for name in files:
            with np.load(folder / name, allow_pickle=False) as file:
                found.append(dict(file))
        return joined(found)

    return features(out / "targets"), {name: features(place) for name, place in finished.items()}


def joined(measured: list[dict[str, np.ndarray]]) -> Features:
    """Of all test series. The target has no PSNR."""
    tumours = [m[key] for m in measured for key in sorted(m) if key.startswith("nodule_")]
    psnr = [scores.about(m).get("body_psnr_db", np.nan) for m in measured]
    return np.array(tumours), np.concatenate([m["ibex"] for m in measured]), float(np.mean(psnr))


def rebuilt(out: Path, plan: Plan, cohort: Path | str, name: str) -> Features:
    """The target as that model gives it back."""
    model = load_model(out / "models" / plan.model(name).place)
    cases = [case.read() for case in sorted(test_cases(plan, cohort), key=lambda case: case.name)]
    return joined([scores.measure(case, model.harmonize(case.target)) for case in cases])


def class_cccs(target: np.ndarray, value: np.ndarray) -> dict[str, np.ndarray]:
    """The paper's CCC of each class: over its features, one for each tumour."""
    return {
        c: np.array([ccc(x[CLASS == c], y[CLASS == c]) for x, y in zip(target, value, strict=True)]) for c in CLASSES
    }


def print_table(target: Features, models: dict[str, Features]) -> None:
    print(f"{len(target[0])} tumours: CCC over the features of a class, mean ± SD over the tumours; after the stroke,")
    print(
        f"{len(target[1])} boxes: CCC of each feature over the boxes, mean over the class. Last: features of 1,401 with"
    )
    print(f"a relative error below {100 * RE_BELOW:.0f} %, mean over the tumours, and PSNR in the body.\n")
    print("| | " + " | ".join(CLASSES) + " | reproducible | PSNR (dB) |\n|---|" + "---|" * (len(CLASSES) + 2))
    for name, value in models.items():
        of_class, of_feature = class_cccs(target[0], value[0]), ccc_columns(target[1], value[1])
        cells = [
            f"{of_class[c].mean():.2f} ± {of_class[c].std(ddof=1):.2f} / {of_feature[CLASS == c].mean():.2f}"
            for c in CLASSES
        ]
        print(f"| {name} | " + " | ".join(cells) + f" | {(errors(target, value) < RE_BELOW).sum()} | {value[2]:.1f} |")


def errors(target: Features, value: Features) -> np.ndarray:
    """Relative error of each feature, mean over the tumours."""
    return relative_error(target[0], value[0]).mean(axis=0)


def draw_curves(target: Features, models: dict[str, Features], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for name, value in models.items():
        error = errors(target, value)
        label = "source as it is" if name == "identity" else name
        axis.plot(CURVE_THRESHOLDS, [(error <= t).sum() for t in CURVE_THRESHOLDS], label=label)
    axis.axvline(RE_BELOW, color="0.7", linewidth=0.8, zorder=0)
    axis.set_xlabel("relative error at most")
    axis.set_ylabel("features of 1,401")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_tumour(out: Path, plan: Plan, path: Path) -> None:
    """The slice of one tumour after each model, the tumour magnified; the paper's CCC of GLCM, mean over tumours."""
    images = tumour_images(out, plan)
    target, models = measured(out, plan)
    shown = {"target": images["target"]} | {name: images[name] for name in models if name in images}
    rows, columns = -(-len(shown) // COLUMNS), min(COLUMNS, len(shown))
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.95 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, (hu, mask)) in zip(axes.flat, shown.items(), strict=False):
        draw(axis, hu, mask, WINDOW_HU)
        title = "source" if name == "identity" else name
        if name in models:
            title += f"\nCCC of GLCM {class_cccs(target[0], models[name][0])['GLCM'].mean():.2f}"
        axis.set_title(title, fontsize=8)
    figure.tight_layout(pad=0.3, h_pad=1.5)
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
