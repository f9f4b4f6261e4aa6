"""How small a planted nodule, a removed nodule and a tile seam the fidelity check catches, and its false alarms.

    HARMONICT_DATA=... python benchmarks/fidelity_detection.py [TRIAL]

Data: the four kernels of one real slice (docs/data.md says where they are public), and in TRIAL, a folder that
`harmonict simulate kentucky-small` wrote, the series of a test patient. Prints the tables of docs/fidelity.md.
Places are drawn with seed 0. A result is what `mtf-ratio --like` makes of the source, or the true target image itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
from scipy import ndimage

from harmonict.core import Series
from harmonict.dicom.inventory import find_series
from harmonict.fidelity import Fidelity, check_fidelity, source_noise
from harmonict.methods.mtf_ratio import MTFRatio
from harmonict.physics import skin_air_mtf
from harmonict.physics.mtf import body_mask
from harmonict.volumes import read_volume

DIAMETERS_MM = (4.0, 6.0, 10.0)
NODULE_HU = (15, 25, 50, 75, 100, 150, 200, 300, 400, 600, 800)
SEAM_HU = (2, 3, 5, 7, 10, 15, 20, 30, 40)
PLACES, CAUGHT = 6, 5 / 6  # caught: at five of six places
TILE = 192  # pixels, of the tile whose mean is off
PATIENT = "kentucky-s0-test-001"
SIMULATED = (("Br40_1mm_6.5mGy", "Bl64_1mm_6.5mGy"), ("Bl64_1mm_1.3mGy", "Br40_1mm_1.3mGy"))
TRUTHS = (("Br40_1mm_6.5mGy", "truth_1mm"), ("Bl64_1mm_1.3mGy", "truth_1mm"), ("Br40_1mm_6.5mGy", "Br40_1mm_1.3mGy"))
REAL = (("B30", "B70"), ("B70", "B30"))


class Case:
    """One result and what its check needs to know once."""

    def __init__(self, name: str, source: Series, result: Series) -> None:
        self.name, self.noise = name, source_noise(source)
        self.band_per_mm = check_fidelity(source, result, noise=self.noise).band_per_mm
        self.source, self.result = middle(source), middle(result)
        f50 = skin_air_mtf(result).f50_per_mm
        self.blur_px = [np.sqrt(np.log(2) / 2) / (np.pi * f50) / mm for mm in source.pixel_mm]  # a Gaussian of that f50
        body = body_mask(self.source.hu[0], source.pixel_mm)
        assert body is not None
        smooth = ndimage.gaussian_filter(self.source.hu[0], 2.0 / np.array(source.pixel_mm))
        deep = ndimage.distance_transform_edt(body, sampling=source.pixel_mm) > 15
        self.deep = deep
        self.lung, self.tissue = deep & (smooth > -900) & (smooth < -750), deep & (smooth > 0) & (smooth < 100)
        self.centre = np.argwhere(body).mean(0)

    def check(self, change: np.ndarray) -> str:
        """The verdict on the slice whose result was changed."""
        lowest = self.result.hu.min()  # a file that clips air clips it still; else nothing would be known of its floor
        result = self.result.with_hu(np.maximum(self.result.hu + change, lowest))
        return check_fidelity(self.source, result, band_per_mm=self.band_per_mm, noise=self.noise).verdict[0]

    def sphere(self, place: np.ndarray, diameter_mm: float, hu: float) -> np.ndarray:
        """The middle slice of a sphere as the kernel of the result would show it."""
        axes = [np.arange(n) * mm for n, mm in zip(self.source.hu.shape[1:], self.source.pixel_mm, strict=True)]
        at = place * self.source.pixel_mm
        distance = np.hypot(axes[0][:, None] - at[0], axes[1][None] - at[1])
        disc = np.clip((diameter_mm / 2 - distance) / max(self.source.pixel_mm) + 0.5, 0, 1)
        return (hu * ndimage.gaussian_filter(disc, self.blur_px)).astype(np.float32)


def middle(series: Series) -> Series:
    """Its middle slice alone."""
    z = len(series.hu) // 2
    padding = None if series.padding is None else series.padding[z : z + 1]
    return replace(series, hu=series.hu[z : z + 1], padding=padding)


def smallest(levels: Sequence[int], verdict: Callable[[int, int], str], places: int) -> str:
    """The lowest level that is caught at `CAUGHT` of the places, "warn / fail", by halving."""
    seen: dict[tuple[int, int], str] = {}

    def caught(level: int, words: tuple[str, ...]) -> bool:
        missed = 0
        for place in range(places):
            if (level, place) not in seen:
                seen[level, place] = verdict(level, place)
            missed += seen[level, place] not in words
            if missed > (1 - CAUGHT) * places + 1e-9:
                return False
        return True

    found = []
    for words in (("warn", "fail"), ("fail",)):
        low, high = 0, len(levels)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if caught(levels[middle], words) else (middle + 1, high)
        found.append(str(levels[low]) if low < len(levels) else f"> {levels[-1]}")
    return " / ".join(found)


def planted(case: Case) -> None:
    rng = np.random.default_rng(0)
    for word, region in (("lung", case.lung), ("soft tissue", case.tissue)):
        inside = np.argwhere(region)
        if len(inside) < 100:
            continue
        places = rng.permutation(inside)[:PLACES]
        cells = []
        for diameter in DIAMETERS_MM:

            def verdict(hu: int, n: int, places: np.ndarray = places, diameter: float = diameter) -> str:
                return case.check(case.sphere(places[n], diameter, hu))

            cells.append(smallest(NODULE_HU, verdict, len(places)))
        print(f"| {case.name} | {word} | {' | '.join(cells)} |", flush=True)


def seams(case: Case) -> None:
    shape = case.source.hu.shape[1:]
    corners = [(case.centre - TILE * np.array(part)).astype(int) for part in ((0.5, 0.9), (0.9, 0.5), (0.3, 0.2))]

    def verdict(hu: int, n: int) -> str:
        y, x = np.clip(corners[n], 0, np.array(shape) - TILE)
        change = np.zeros(shape, np.float32)
        change[y : y + TILE, x : x + TILE] = hu
        return case.check(change)

    print(f"| {case.name} | {smallest(SEAM_HU, verdict, len(corners))} |", flush=True)


def removed(case: Case) -> None:
    """Vessels (and, in the simulated patient, nodules) of the lung painted over with what lies about them."""
    pixel_mm = np.array(case.source.pixel_mm)
    smooth = ndimage.gaussian_filter(case.source.hu[0], 0.7 / pixel_mm)
    about = ndimage.median_filter(case.source.hu[0], tuple(np.rint(15 / pixel_mm).astype(int)))
    lung = ndimage.distance_transform_edt((about < -700) & case.deep, sampling=pixel_mm) > 6  # not the air around
    raised = np.where(lung, smooth - about, 0)
    labels, count = ndimage.label(raised > 150)
    clean = check_fidelity(case.source, case.result, band_per_mm=case.band_per_mm, noise=case.noise)
    judged = clean.residual_hu[0] != 0
    share = f"nothing painted over; {judged[lung].mean():.0%} of the lung is judged"
    print(f"| {case.name} | {share} | 1 | {clean.verdict[0]} |")
    seen: dict[str, list[tuple[str, bool]]] = {}
    for n in range(1, count + 1):
        piece = labels == n
        diameter = 2 * np.sqrt(piece.sum() * pixel_mm.prod() / np.pi)
        if diameter < 2.5:
            continue
        soft = ndimage.gaussian_filter(ndimage.binary_dilation(piece, iterations=2).astype(np.float32), 1.0)
        change = soft * np.minimum(about - ndimage.gaussian_filter(case.result.hu[0], 0.7 / pixel_mm), 0)
        kind = "2.5-4 mm" if diameter < 4 else "4-7 mm" if diameter < 7 else "over 7 mm"
        seen.setdefault(kind, []).append((case.check(change.astype(np.float32)), bool(judged[piece].mean() > 0.5)))
    for kind, verdicts in sorted(seen.items()):
        for word, wanted in (("judged there", True), ("not judged there", False)):
            those = [v for v, inside in verdicts if inside == wanted]
            caught = sum(v in ("warn", "fail") for v in those), sum(v == "fail" for v in those)
            print(f"| {case.name} | {kind}, {word} | {len(those)} | {caught[0]} / {caught[1]} |", flush=True)


def alarms(name: str, found: Fidelity) -> None:
    rmse = np.nanmax(found.rmse_hu) / found.noise_hu
    words = " ".join(f"{found.verdict.count(word)}" for word in ("pass", "warn", "fail"))
    print(
        f"| {name} | {found.band_per_mm:.2f} | {found.noise_hu:.1f} | {rmse:.2f} | {np.nanmax(found.peak):.1f} | "
        f"{np.nanmax(found.seam):.1f} | {words} |",
        flush=True,
    )


def by_ratio(source: Series, target: Series) -> Series:
    result = MTFRatio.like([target]).harmonize(source)
    return result.with_hu(np.rint(result.hu))


def main() -> None:
    folder = os.environ.get("HARMONICT_DATA")
    if not folder:
        sys.exit("set HARMONICT_DATA to the folder of public data")
    place = Path(folder) / "paired" / "siemens-chest"
    real = {k: read_volume(place / f"{k}.mha", spacing_mm=0.693359) for k in ("B10", "B30", "B50", "B70")}
    simulated: dict[str, Series] = {}
    if len(sys.argv) > 1:
        for one in find_series(Path(sys.argv[1]) / PATIENT).found:
            simulated[one.path.name] = replace(one.read(), name=one.path.name)
    print("### Clean results\n\n| result | band /mm | noise HU | RMSE / noise | blob | seam | pass warn fail |")
    print("|---|---|---|---|---|---|---|")
    for a, b in permutations(real, 2):
        alarms(f"{a} -> {b}, true image", check_fidelity(real[a], real[b]))
        alarms(f"{a} -> {b}, mtf-ratio", check_fidelity(real[a], by_ratio(real[a], real[b])))
    if simulated:
        for a, b in (*SIMULATED, *TRUTHS):
            alarms(f"{a} -> {b}, true image", check_fidelity(simulated[a], simulated[b]))
    cases = [Case(f"{a} -> {b}, true image", real[a], real[b]) for a, b in REAL]
    if simulated:
        cases += [Case(f"{a} -> {b}, true image", simulated[a], simulated[b]) for a, b in SIMULATED]
        a, b = SIMULATED[1]
        cases.append(Case(f"{a} -> {b}, mtf-ratio", simulated[a], by_ratio(simulated[a], simulated[b])))
    print("\n### Planted nodules: the contrast in HU that is caught (warn / fail)\n")
    print(f"| result | in | {' | '.join(f'{d:g} mm' for d in DIAMETERS_MM)} |")
    print("|---|---|" + "---|" * len(DIAMETERS_MM))
    for case in cases:
        planted(case)
    print("\n### Vessels and nodules painted over (warn or fail / fail)\n\n| result | size | how many | caught |")
    print("|---|---|---|---|")
    for case in cases:
        removed(case)
    print("\n### The mean of one tile of 192 pixels off by HU (warn / fail)\n\n| result | caught |\n|---|---|")
    for case in cases:
        seams(case)
    source = simulated.get(SIMULATED[0][0], real["B30"])
    result, noise = by_ratio(source, source), source_noise(source)
    start = time.process_time()
    check_fidelity(source, result, noise=noise, band_per_mm=0.38)
    each = (time.process_time() - start) / len(source.hu)
    print(f"\nfidelity_detection: ratio {0.15 / each:.2f} (ours {each:.3f} s of processor a slice, allowed 0.15 s)")


if __name__ == "__main__":
    main()
