"""Tables 2 and 3 and figures 3 and 4 of CVH-CT (Selim et al. 2021) on the virtual cross-vendor trial, as Markdown.

    harmonict simulate cross-vendor-small --out cv
    harmonict fit cyclegan --size compact --cohort cv/cohort.csv --source-protocol LUNG --target-protocol Bl64 \
        --out cyclegan
    harmonict fit cvh-ct --size compact --cohort cv/cohort.csv --source-protocol LUNG --target-protocol Bl64 \
        --out cvh-ct
    python examples/cvh_ct_tables.py cv cyclegan=cyclegan cvh-ct=cvh-ct --figure-3 residuals.png > tables.md
    python examples/cvh_ct_tables.py cv --figure-4 epochs.png --set steps=1200

Scored on the patients that both vendors scanned, whose images no training opens: every slice and kVp, both directions.
ROIs: seeded boxes of soft tissue; the 93 features of six classes that the paper names. "Input" is the image as it is;
histogram matching has the training patients of the target as its reference. Figure 4 trains: the epochs of a Siemens
image on its way to GE, learned from GE images of other patients; its CCC is against the GE image of the same patient.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from harmonict.core import ScanProtocol, Series
from harmonict.core.cohort import read_cohort
from harmonict.data import cohort_pairs
from harmonict.dicom.inventory import find_series
from harmonict.evaluate.image import body_mask, compare
from harmonict.evaluate.reproducibility import reproduce
from harmonict.harmonizer import Harmonizer, make_config
from harmonict.methods import METHODS, load_model
from harmonict.metrics import ncc_uncentred
from harmonict.physics.nps import uniform_noise_sd
from harmonict.radiomics import FeatureSettings, extract_features
from harmonict.radiomics.features import FAMILIES
from harmonict.radiomics.rois import random_rois
from harmonict.train import Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEED = 0
SOFT_HU = (-150.0, 200.0)
ROIS = 24
TEXTURE = FeatureSettings(families=tuple(f for f in FAMILIES if f != "shape"))
HU_RANGE = (-1000.0, 900.0)
RED_HU = 200.0  # of the heat maps
SHOWN_EPOCHS = 5
KINDS = ("ccc_over_rois", "ccc_over_features")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", type=Path)
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--kernels", nargs=2, default=("LUNG", "Bl64"), metavar=("A", "B"))
    parser.add_argument("--figure-3", type=Path)
    parser.add_argument("--figure-4", type=Path)
    parser.add_argument("--set", action="append", default=[], help="Config of cvh-ct for figure 4, over `compact`")
    options = parser.parse_args()
    a, b = options.kernels
    if options.figure_4 is not None:
        epochs(options.trial, b, a, options.figure_4, dict(text.split("=", 1) for text in options.set))
        return
    models = {name: load_model(folder) for name, folder in (text.split("=", 1) for text in options.models)}
    pictures = []
    for source, target in ((a, b), (b, a)):
        pictures.append(tables(options.trial, source, target, models))
    if options.figure_3 is not None:
        heat_maps(pictures, options.figure_3)


# -- images ------------------------------------------------------------------------------------------------------------


def rows(trial: Path, split: str) -> pd.DataFrame:
    table = read_cohort(trial / "cohort.csv")
    return table[table["split"] == split]


def read(path: str) -> Series:
    return find_series(path).found[0].read()


def scored(trial: Path, source: str, target: str) -> list[tuple[str, Series, Series]]:
    """(patient and kVp, source, target) of the patients that both vendors scanned."""
    table = rows(trial, "score")
    found = []
    for (patient, kvp), part in table[table["kernel"].isin((source, target))].groupby(["patient", "kvp"]):
        paths = part.set_index("kernel")["path"]
        found.append((f"{patient} {kvp:g} kVp", read(paths[source]), read(paths[target])))
    return found


def made(models: dict[str, Harmonizer], trial: Path, target: str, x: Series) -> dict[str, Series]:
    """What each method makes of an image; `Input` is the image itself."""
    table = rows(trial, "train")
    examples = [read(path) for path in table[table["kernel"] == target]["path"]]
    protocol = ScanProtocol(kernel=target)
    result = {"Input": x, "histogram": METHODS["histogram"].like(examples).harmonize(x)}
    return result | {name: model.harmonize(x, protocol) for name, model in models.items()}


def features(scans: dict[str, Series], where: str, reference: Series) -> list[dict]:
    rois = random_rois(reference, rng=np.random.default_rng(SEED), hu_ranges=(SOFT_HU,), number=ROIS)
    return [
        {"patient": where, "roi": roi.name, "scan": scan}
        | extract_features(part, np.ones(part.shape, bool), series.geometry.spacing_mm, TEXTURE)
        for scan, series in scans.items()
        for roi in rois
        for part in (series.hu[roi.box],)
    ]


# -- tables 2 and 3 ----------------------------------------------------------------------------------------------------


def tables(
    trial: Path, source: str, target: str, models: dict[str, Harmonizer]
) -> tuple[str, dict[str, Series], Series]:
    found, quality, noise = [], [], []
    picture = None
    for where, x, y in scored(trial, source, target):
        scans = made(models, trial, target, x)
        picture = picture or (f"{source} to {target}", scans, y)
        found += features({**scans, "target": y}, where, y)
        body = body_mask(y.hu)
        for name, image in scans.items():
            one = compare(y, image, hu_range=HU_RANGE, body=body)
            one = one[(one["region"] == "body") & ~one["slice"].isin(("mean", "sd"))]
            cut = [np.clip(s.hu, *HU_RANGE) for s in (y, image)]
            printed = [ncc_uncentred(p, q, data_min=HU_RANGE[0]) for p, q in zip(*cut, strict=True)]
            quality.append(one.assign(scan=name, ncc_printed=printed))
        noise += [{"scan": name, "noise": uniform_noise_sd(s)} for name, s in {**scans, "target": y}.items()]
    result = reproduce(pd.DataFrame(found), "target", rng=np.random.default_rng(SEED))
    names = [name for name in dict.fromkeys(row["scan"] for row in found) if name != "target"]
    count = len({(row["patient"], row["roi"]) for row in found})
    print(f"## {source} to {target}\n")
    print(f"Table 2, {count} ROIs: CCC over ROIs / CCC over features, mean ± SD\n")
    classes = list(dict.fromkeys(result.classes["class"]))
    print("| | " + " | ".join(classes) + " |\n|---|" + "---|" * len(classes))
    agreement = result.classes.set_index(["class", "scan"])
    for name in names:
        cells = [
            " / ".join(f"{row[f'{kind}_mean']:.2f} ± {row[f'{kind}_sd']:.2f}" for kind in KINDS)
            for c in classes
            for row in (agreement.loc[c, name],)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    table = pd.concat(quality).groupby("scan")
    low, high = HU_RANGE
    print(
        f"\nTable 3, body, HU {low:g} to {high:g}, mean ± SD over slices; NCC without the mean, and as eq 12 prints it"
    )
    print("(whole image, zero at the lower end)\n")
    print("| | PSNR (dB) | SSIM | NCC | NCC, eq 12 | bias (HU) | noise SD in soft tissue (HU) |")
    print("|---|---|---|---|---|---|---|")
    level = pd.DataFrame(noise).groupby("scan")["noise"].mean()
    for name in names:
        part = table.get_group(name)
        cells = [
            f"{part[c].mean():.{d}f} ± {part[c].std():.{d}f}"
            for c, d in (("psnr_db", 2), ("ssim", 4), ("ncc", 4), ("ncc_printed", 4), ("bias_hu", 1))
        ]
        print(f"| {name} | " + " | ".join(cells) + f" | {level[name]:.1f} (target {level['target']:.1f}) |")
    print(flush=True)
    assert picture is not None
    return picture


# -- figures -----------------------------------------------------------------------------------------------------------


def heat_maps(pictures: list[tuple[str, dict[str, Series], Series]], path: Path) -> None:
    """Figure 3: each image over the size of its difference from the target; blue 0, red 200 HU and more."""
    columns = len(pictures[0][1])
    figure, axes = plt.subplots(2 * len(pictures), columns, figsize=(2.4 * columns, 4.8 * len(pictures)), squeeze=False)
    for n, (title, scans, target) in enumerate(pictures):
        z = len(target.hu) // 2
        for column, (name, image) in enumerate(scans.items()):
            top, below = axes[2 * n, column], axes[2 * n + 1, column]
            top.imshow(image.hu[z], cmap="gray", vmin=-1000, vmax=400)
            below.imshow(np.abs(image.hu[z] - target.hu[z]) / RED_HU, cmap="jet", vmin=0, vmax=1)
            top.set_title(f"{name}\n{title}", fontsize=7)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def epochs(trial: Path, source: str, target: str, path: Path, settings: dict[str, str]) -> None:
    """Figure 4: an image of the source at every epoch of a training towards the target's other patients."""
    kind = METHODS["cvh-ct"]
    config = make_config(kind.Config, {**kind.sizes["compact"], **settings})
    pairs = cohort_pairs(
        trial / "cohort.csv", target=target, sources=[source], rng=np.random.default_rng(SEED), unpaired=True
    )
    where, x, y = scored(trial, source, target)[0]
    images: list[tuple[int, Series]] = [(0, x)]

    class Watched(Run):
        def check(self, held_out, output) -> None:  # type: ignore[no-untyped-def]
            super().check(held_out, output)
            if self.ends_epoch:
                images.append((self.step_number + 1, x.with_hu(through(output, x))))

    kind(config).fit(pairs, Watched(seed=SEED))
    found = features({**{str(step): image for step, image in images}, "target": y}, where, y)
    result = reproduce(pd.DataFrame(found), "target", rng=np.random.default_rng(SEED)).summary.set_index("scan")
    print(
        f"Figure 4, {source} to {target}, {where}: CCC over ROIs of 93 features against the same patient's {target}\n"
    )
    print("| step | CCC |\n|---|---|")
    for step, _ in images:
        print(f"| {step} | {result.loc[str(step), 'ccc_over_rois_mean']:.3f} |")
    chosen = np.unique(np.linspace(0, len(images) - 1, SHOWN_EPOCHS).round().astype(int))
    unpaired = pairs[0].target
    figure, axes = plt.subplots(1, len(chosen) + 1, figsize=(2.4 * (len(chosen) + 1), 2.8))
    for axis, n in zip(axes, chosen, strict=False):
        step, image = images[n]
        axis.imshow(image.hu[len(image.hu) // 2], cmap="gray", vmin=-1000, vmax=400)
        axis.set_title(f"step {step}, CCC {result.loc[str(step), 'ccc_over_rois_mean']:.2f}", fontsize=7)
    axes[-1].imshow(unpaired, cmap="gray", vmin=-1000, vmax=400)
    axes[-1].set_title(f"{target}, another patient", fontsize=7)
    for axis in axes:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def through(output, series: Series) -> np.ndarray:  # type: ignore[no-untyped-def]
    """The state of a training on whole slices, as `harmonize` would treat them."""
    from types import SimpleNamespace

    import torch

    with torch.inference_mode():
        images = [output(SimpleNamespace(source=torch.from_numpy(hu[None, None])))[0, 0] for hu in series.hu]
    outside = (series.hu < HU_RANGE[0]) | (series.hu > HU_RANGE[1])
    return np.where(outside, series.hu, np.stack([image.cpu().numpy() for image in images]))


if __name__ == "__main__":
    main()
