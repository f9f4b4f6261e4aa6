"""How well `mtf-ratio` converts real images: fitted on pairs, without any pair, and on a mixed cohort.

    HARMONICT_DATA=... python benchmarks/skin_mtf_pairs.py

Data: docs/data.md says where each set is public. Prints the tables of docs/methods/mtf-ratio.md. Nothing is random.
PSNR in dB of HU rounded and clipped to [-1024, 1000], peak 2024, whole image / body (harmonict.evaluate.image).
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from harmonict.core import Series
from harmonict.data import SlicePairs
from harmonict.dicom.inventory import find_series
from harmonict.dicom.read import read_series
from harmonict.evaluate.image import body_mask
from harmonict.methods.mtf_ratio import Config, MTFRatio
from harmonict.metrics import psnr
from harmonict.physics import skin_air_mtf, uniform_noise_sd
from harmonict.volumes import read_volume

SIEMENS = (("B10", "B70"), ("B30", "B50"), ("B50", "B30"), ("B70", "B30"), ("B10", "B30"), ("B70", "B10"))
HALVES = {"left": np.s_[:, :, :256], "right": np.s_[:, :, 256:]}
OTHER = {"left": "right", "right": "left"}


def score(result: Series, reference: Series, part: slice | tuple = np.s_[:]) -> tuple[float, float]:
    """PSNR of the whole slice and of the body, over measured pixels."""
    a, b = (np.clip(np.rint(s.hu), -1024, 1000) for s in (reference, result))
    measured = np.ones(a.shape, bool) if reference.padding is None else ~reference.padding
    scored = np.zeros(a.shape, bool)
    scored[part] = True
    body = body_mask(reference.hu, is_volume=False)
    whole, inside = (psnr(a, b, data_range=2024, mask=m & measured & scored) for m in (np.ones(a.shape, bool), body))
    return whole, inside


def crop(series: Series, side: str) -> Series:
    """One half of a slice, as an image of its own."""
    return replace(series, hu=np.ascontiguousarray(series.hu[HALVES[side]]), padding=None)


def only(series: Series, side: str) -> Series:
    """The slice with the other half marked as not measured."""
    padding = np.ones(series.hu.shape, bool)
    padding[HALVES[side]] = False
    return replace(series, padding=padding)


def text(scores: list[tuple[float, float]]) -> str:
    whole, body = np.mean(scores, axis=0)
    return f"{whole:5.2f} / {body:5.2f}"


def siemens_pairs(images: dict[str, Series]) -> None:
    print(
        "siemens-chest, fitted on one half of the slice and scored on the other (mean of both); in brackets: fitted and"
    )
    print("scored on the whole slice")
    for a, b in SIEMENS:
        s, t = images[a], images[b]
        print(f"  {a}->{b}  none {text([score(s, t)])}")
        for fit in ("ratio", "wiener", "fir"):
            halves = []
            for side in HALVES:
                model = MTFRatio(Config(fit=fit)).fit(SlicePairs([(crop(s, side), 0, crop(t, side), 0)]))
                halves.append(score(model.harmonize(s), t, HALVES[OTHER[side]]))
            whole = MTFRatio(Config(fit=fit)).fit(SlicePairs([(s, 0, t, 0)])).harmonize(s)
            print(f"      {fit:6s} {text(halves)}  [{text([score(whole, t)])}]")


def siemens_unpaired(images: dict[str, Series]) -> None:
    print(
        "siemens-chest without pairs: source MTF at the skin of one half, target MTF at the other half's, whole slice"
    )
    for a, b in SIEMENS[:5]:
        for fit in ("ratio", "wiener"):
            found = []
            for side in HALVES:
                model = MTFRatio.like([only(images[b], OTHER[side])], Config(fit=fit))
                about = model.describe(only(images[a], side))
                found.append(score(model.harmonize(images[a], about=about), images[b]))
            each = "  ".join(f"{whole:.2f} / {body:.2f}" for whole, body in found)
            print(f"  {a}->{b}  {fit:6s} {text(found)}   (each: {each})")


def lungman(images: dict[tuple[str, str], Series]) -> None:
    print("canon-lungman, one slice scored, the other slice fitted on (pairs) or given as --like (no pairs)")
    names = sorted({name for _, name in images})
    for a, b in (("FC51", "FC13"), ("FC13", "FC51")):
        for scored, other in (names, names[::-1]):
            s, t = images[a, scored], images[b, scored]
            line = f"  {a}->{b} on {scored}  none {text([score(s, t)])}"
            for fit in ("ratio", "wiener", "fir"):
                pairs = SlicePairs([(images[a, other], 0, images[b, other], 0)])
                line += f"  {fit} {text([score(MTFRatio(Config(fit=fit)).fit(pairs).harmonize(s), t)])}"
            print(f"{line}  no pairs {text([score(MTFRatio.like([images[b, other]]).harmonize(s), t)])}")


def cohort(folder: Path) -> None:
    series = {found.patient: found.read() for found in find_series(folder).found}
    model = MTFRatio.like([series["C3N-00249"]])
    before, after = [], []
    print("ct/, every series to the skin MTF of C3N-00249 (f50 in 1/mm, median of the slices; noise SD in HU)")
    for name, one in series.items():
        start = time.perf_counter()
        about = model.describe(one)
        described = time.perf_counter()
        result = model.harmonize(one, about=about)
        done = time.perf_counter()
        result = result.with_hu(np.rint(result.hu))
        f50 = [float(np.nanmedian(skin_air_mtf(x).f50_per_slice_per_mm)) for x in (one, result)]
        noise = [uniform_noise_sd(x) for x in (one, result)]
        before.append(f50[0])
        after.append(f50[1])
        print(
            f"  {name:15s} f50 {f50[0]:.3f} -> {f50[1]:.3f}  noise {noise[0]:5.1f} -> {noise[1]:5.1f}  "
            f"largest change {np.abs(result.hu - one.hu).max():.0f} HU  measured in {described - start:.1f} s, "
            f"filtered in {done - described:.1f} s  {about.note}"
        )
    print(f"  spread {np.ptp(before):.3f} -> {np.ptp(after):.3f}")
    print(f"skin_mtf_pairs: ratio {np.ptp(before) / 3 / np.ptp(after):.2f} (ours {np.ptp(after):.3f}, allowed a third)")


def main() -> None:
    folder = os.environ.get("HARMONICT_DATA")
    if not folder:
        sys.exit("set HARMONICT_DATA to the folder of public data")
    data = Path(folder)
    siemens = {
        k: read_volume(data / "paired" / "siemens-chest" / f"{k}.mha", spacing_mm=0.693359)  # two headers say 1.0
        for k in ("B10", "B30", "B50", "B70")
    }
    siemens_pairs(siemens)
    siemens_unpaired(siemens)
    files = sorted((data / "paired" / "canon-lungman").glob("*/*.dcm"))
    lungman({(f.parent.name, f.stem): read_series([f]) for f in files})
    cohort(data / "ct")


if __name__ == "__main__":
    main()
