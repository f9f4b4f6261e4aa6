"""Radiomic features before and after kernel conversion, on real images that were reconstructed twice.

    HARMONICT_DATA=... python examples/kernel_features.py > table.md        (under two minutes on one core)
    HARMONICT_DATA=... python examples/kernel_features.py MODEL B10 B70     a fitted model on one of the Siemens pairs

Real pairs: every fit of mtf-ratio is scored where it was not fitted. siemens-chest is one slice: each half is converted
by the filter that was fitted on the other half. canon-lungman has two slices: each is converted by the filter fitted on
the other. `like` sees no pair: only the target's MTF and noise at the skin. ROIs are seeded boxes (harmonict.radiomics.
rois) judged on the target image, none across the border of the halves; 93 features, bin width 25 HU.
LUNG1-001 to the kernel of C3N-00249: there is no truth, so what changed in tumour and lungs, noise and sharpness.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from harmonict.core import Geometry, HarmonictError, Series
from harmonict.data import SlicePairs
from harmonict.dicom.inventory import find_series
from harmonict.dicom.masks import read_masks
from harmonict.evaluate.image import compare
from harmonict.evaluate.real_pairs import RealPair, fitted_on_the_other_part, real_pair
from harmonict.evaluate.reproducibility import reproduce
from harmonict.harmonizer import Harmonizer
from harmonict.methods import load_model
from harmonict.methods.mtf_ratio import Config, MTFRatio
from harmonict.physics.mtf import skin_air_mtf
from harmonict.physics.nps import uniform_noise_sd
from harmonict.radiomics import FeatureSettings, crop_to_mask, extract_features
from harmonict.radiomics.features import FAMILIES
from harmonict.radiomics.rois import Roi, count_rois, random_rois

SEED = 0
TEXTURE = FeatureSettings(families=tuple(f for f in FAMILIES if f != "shape"))
FITS = ("ratio", "wiener", "fir")
LUNGS = ("GTV-1", "Lung-Left", "Lung-Right")
SHOWN = (
    "firstorder_Mean",
    "firstorder_Variance",
    "firstorder_10Percentile",
    "glcm_Contrast",
    "glcm_JointEntropy",
    "glcm_Correlation",
    "glrlm_ShortRunEmphasis",
    "glszm_ZonePercentage",
    "gldm_DependenceEntropy",
    "ngtdm_Coarseness",
)


def main() -> None:
    folder = os.environ.get("HARMONICT_DATA")
    if not folder:
        sys.exit("HARMONICT_DATA is not set: it names the folder of the public images")
    data = Path(folder)
    if sys.argv[1:]:
        model, source, target = sys.argv[1:]
        siemens_chest_by(load_model(model), data, source, target)
        return
    siemens_chest(data)
    lungman(data)
    lung1(data / "ct")


# -- pairs -------------------------------------------------------------------------------------------------------------


def siemens_chest(data: Path) -> None:
    print("## siemens-chest, one slice: fitted on one half, scored on the other\n")
    for source, target in (("B10", "B70"), ("B30", "B50"), ("B50", "B30"), ("B70", "B30"), ("B10", "B30")):
        score_pair(f"{source} to {target}", real_pair(data, source, target))


def siemens_chest_by(model: Harmonizer, data: Path, source: str, target: str) -> None:
    """A model that was fitted elsewhere, beside the fits on this very slice: an upper bound for filters."""
    pair = real_pair(data, source, target)
    x = pair.source
    pairs = SlicePairs([(x, 0, pair.target, 0)])
    after = {model.name: model.harmonize(x)}
    after |= {f"{fit}, fitted here": MTFRatio(Config(fit=fit)).fit(pairs).harmonize(x) for fit in FITS}
    score(f"{source} to {target}", x, pair.target, after, None)


def lungman(data: Path) -> None:
    print("## canon-lungman, two slices: fitted on one, scored on the other\n")
    for source, target in (("FC51", "FC13"), ("FC13", "FC51")):
        score_pair(f"{source} to {target}", real_pair(data, source, target))


def score_pair(name: str, pair: RealPair) -> None:
    after = {fit: fitted_on_the_other_part(pair, fit) for fit in FITS}
    score(name, pair.source, pair.target, after, pair.within)


def score(name: str, source: Series, target: Series, after: dict[str, Series], inside: np.ndarray | None) -> None:
    """Print quality and feature agreement of the source, and of what each fit made of it, against the target."""
    try:
        after["like"] = MTFRatio.like([target]).harmonize(source)
    except HarmonictError as error:
        print(f"without pairs: {error}\n")
    scans = {"before": source} | after
    rois = random_rois(target, rng=np.random.default_rng(SEED), within=inside)
    rows = []
    for scan, series in {**scans, "target": target}.items():
        rows += [{"patient": name, "roi": roi.name, "scan": scan, **features(series, roi)} for roi in rois]
    result = reproduce(pd.DataFrame(rows), "target", rng=np.random.default_rng(SEED))
    # headers of a pair may differ in where they say that it lies
    here = [replace(s, geometry=Geometry(spacing_mm=target.geometry.spacing_mm)) for s in (target, *scans.values())]
    quality = {scan: compare(here[0], image) for scan, image in zip(scans, here[1:], strict=True)}
    psnr = {
        (scan, region): float(q[(q["slice"] == "mean") & (q["region"] == region)]["psnr_db"].iloc[0])
        for scan, q in quality.items()
        for region in ("whole", "body")
    }
    print(f"### {name}: {len(rois)} ROIs ({sizes(rois)})\n")
    whole = result.summary.set_index("scan")
    print("| | PSNR whole / body (dB) | CCC over ROIs | CCC over features | CCC > 0.85 | RE < 0.15 | median RE |")
    print("|---|---|---|---|---|---|---|")
    for scan in scans:
        row = whole.loc[scan]
        print(
            f"| {scan} | {psnr[scan, 'whole']:.1f} / {psnr[scan, 'body']:.1f} | {row['ccc_over_rois_mean']:.3f} "
            f"| {row['ccc_over_features_mean']:.3f} | {row['reproducible_ccc']} of {row['features']} "
            f"| {row['reproducible_re']} | {row['re_median']:.3f} |"
        )
    print("\nPer class, CCC over ROIs / CCC over features / median RE:\n")
    print("| class | " + " | ".join(scans) + " |\n|---|" + "---|" * len(scans))
    classes = result.classes.set_index(["class", "scan"])
    for family in dict.fromkeys(result.classes["class"]):
        cells = [
            f"{r['ccc_over_rois_mean']:.2f} / {r['ccc_over_features_mean']:.2f} / {r['re_median']:.2f}"
            for r in (classes.loc[family, scan] for scan in scans)
        ]
        print(f"| {family} | " + " | ".join(cells) + " |")
    print(flush=True)


def features(series: Series, roi: Roi) -> dict[str, float]:
    box = series.hu[roi.box]
    return extract_features(box, np.ones(box.shape, bool), series.geometry.spacing_mm, TEXTURE)


def sizes(rois: list[Roi]) -> str:
    counts = count_rois(rois)
    return ", ".join(f"[{r.hu_min}, {r.hu_max}]: {r.number} x {r.size}" for r in counts.itertuples())


# -- no truth ----------------------------------------------------------------------------------------------------------


def lung1(folder: Path) -> None:
    (source,) = [found.read() for found in find_series(folder / "LUNG1-001/image").found]
    (example,) = [found.read() for found in find_series(folder / "C3N-00249/image").found]
    (structures,) = find_series(folder / "LUNG1-001/rtstruct").masks
    masks = {name: read_masks(structures, source, name)[name] for name in LUNGS}
    images = {"before": source}
    images |= {f: MTFRatio.like([example], Config(fit=f)).harmonize(source) for f in ("ratio", "wiener")}
    print("## LUNG1-001 (B19f) to the look of C3N-00249 (B40f)\n")
    print("| | f50 at the skin (1/mm) | noise in uniform tissue (HU) |\n|---|---|---|")
    for name, image in {**images, "C3N-00249": example}.items():
        print(f"| {name} | {skin_air_mtf(image).f50_per_mm:.3f} | {uniform_noise_sd(image):.1f} |")
    values = {}
    for roi, mask in masks.items():
        for name, image in images.items():
            hu, inside = crop_to_mask(image.hu, mask)
            values[roi, name] = extract_features(hu, inside, image.geometry.spacing_mm, TEXTURE)
    print("\nChange of the 93 features, median over a class of |after - before| / |before|:\n")
    print("| class | " + " | ".join(f"{roi} {fit}" for roi in LUNGS for fit in ("ratio", "wiener")) + " |")
    print("|---|" + "---|" * 6)
    names = list(values["GTV-1", "before"])
    for family in TEXTURE.families:
        cells = []
        for roi in LUNGS:
            for fit in ("ratio", "wiener"):
                a, b = values[roi, "before"], values[roi, fit]
                moved = [abs(b[n] - a[n]) / abs(a[n]) for n in names if n.split("_")[1] == family and a[n]]
                cells.append(f"{np.median(moved):.3f}")
        print(f"| {family} | " + " | ".join(cells) + " |")
    print("\nSome of them, before / ratio / wiener:\n")
    print("| feature | " + " | ".join(LUNGS) + " |\n|---|" + "---|" * len(LUNGS))
    for name in SHOWN:
        cells = [" / ".join(f"{values[roi, scan][f'original_{name}']:.4g}" for scan in images) for roi in LUNGS]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()


if __name__ == "__main__":
    main()
