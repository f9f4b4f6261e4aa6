"""Writes src/harmonict/simulate/kernels.csv: kernels measured in the public pairs, the others from a few numbers.

    HARMONICT_DATA=... python examples/calibrate_kernels.py [--out kernels.csv]

Measured: B10, B30, B50, B70 (one patient slice) and FC13, FC51 (two slices of a Lungman). Between two kernels of one
scan the ratio of the MTFs is the cross-spectrum of the two images over the power of the sharper one, over all patches
without clipped pixels; it holds to 1-2 % up to 0.65 per mm and is extrapolated (straight in the logarithm) beyond.
The absolute curve of the sharpest kernel is the mean, weighted by what each can tell, of the MTFs at the skin of all
kernels of the scan, each brought to the sharpest by its ratio; beyond 0.7 per mm it goes on straight in the logarithm
and is taken to 0 at 1 per mm.
"""

from __future__ import annotations

import argparse
import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter1d

from harmonict.core import Series
from harmonict.dicom.read import read_series
from harmonict.physics import Kernel, skin_air_mtf
from harmonict.volumes import read_volume

AXIS = np.round(np.arange(0.0, 1.0001, 0.05), 2)  # the table's frequencies, 1/mm

# name: the two measured kernels whose shapes are mixed, the share of the second, f50 (1/mm), why
SHAPES: dict[str, tuple[str, str, float, float, str]] = {
    "Br32": ("B30", "B10", 0.0, 0.29, "assumed: the shape of B30, a little softer"),
    "Br40": ("B30", "B50", 0.4, 0.37, "assumed: between B30 and B50"),
    "Br49": ("B50", "B70", 0.1, 0.48, "assumed: as B50"),
    "Br59": ("B50", "B70", 0.5, 0.58, "assumed: between B50 and B70"),
    "Br62": ("B50", "B70", 0.8, 0.61, "assumed: a little softer than B70"),
    "Br64": ("B50", "B70", 1.0, 0.64, "assumed: as B70"),
    "Br69": ("B50", "B70", 1.0, 0.71, "assumed: the shape of B70, sharper; ends at 1 per mm, the real one goes on"),
    "Qr32": ("B30", "B10", 0.5, 0.28, "assumed: near Br of the same number, without edge enhancement"),
    "Qr49": ("B50", "B70", 0.0, 0.46, "assumed: near Br of the same number, without edge enhancement"),
    "Qr59": ("B50", "B70", 0.0, 0.55, "assumed: near Br of the same number, without edge enhancement"),
    "Qr61": ("B50", "B70", 0.0, 0.57, "assumed: near Br of the same number, without edge enhancement"),
}

# name: vendor, f50, f10 (1/mm), peak of the MTF (1: no edge enhancement), where the numbers come from
EMULATIONS: dict[str, tuple[str, float, float, float, str]] = {
    "Bl57": ("Siemens", 0.57, 0.82, 1.25, "assumed: as Br of the same number, edge-enhancing for the lung"),
    "Bl64": ("Siemens", 0.66, 0.89, 1.35, "assumed: as Br of the same number, edge-enhancing for the lung"),
    "B19f": ("Siemens", 0.25, 0.45, 1.00, "f50 measured at the skin of LUNG1-001 (TCIA); the rest assumed"),
    "B40f": (
        "Siemens",
        0.34,
        0.58,
        1.00,
        "assumed, near 0.30 at the skin of C3N-00249 (TCIA)",
    ),
    "STANDARD": ("GE", 0.42, 0.68, 1.05, "assumed: f50 and f10 near the 4.2 and 6.8 per cm that are quoted for it"),
    "LUNG": ("GE", 0.60, 0.86, 1.50, "assumed: known for its strong edge enhancement"),
    "BONE": ("GE", 0.70, 0.93, 1.25, "assumed: sharper than LUNG with less enhancement"),
    "B": ("Philips", 0.34, 0.58, 1.00, "assumed: a body kernel softer than D"),
    "D": ("Philips", 0.40, 0.65, 1.08, "f50 measured at the skin of LIDC-IDRI-0314 (TCIA); the rest assumed"),
}


FINE = np.round(np.arange(0.0, 1.0001, 0.005), 3)
PAIRED_TO_PER_MM = 0.65
PATCH = 64


def emulate(f50: float, f10: float, peak: float) -> np.ndarray:
    """A smooth curve on FINE through 1 at 0, the peak, f50, f10 and 0 at the end."""
    end = min(1.0, f10 + 0.7 * (f10 - f50))
    if peak > 1:
        inner = [(0.25 * f50, 1 + 0.45 * (peak - 1)), (0.5 * f50, peak), (0.75 * f50, 0.5 + 0.76 * (peak - 0.5))]
    else:
        inner = [(0.25 * f50, 0.955), (0.5 * f50, 0.84), (0.75 * f50, 0.68)]
    points = [(0.0, 1.0), *inner, (f50, 0.5), (f10, 0.1), (end, 0.0)]
    curve = np.where(end > FINE, PchipInterpolator(*np.array(points).T)(np.minimum(FINE, end)), 0.0)
    smooth = gaussian_filter1d(np.concatenate([curve[:0:-1], curve, np.zeros(FINE.size)]), 6)
    smooth = smooth[FINE.size - 1 : 2 * FINE.size - 1]
    return smooth / smooth[0] * taper(FINE)


def mix(one: np.ndarray, two: np.ndarray, share: float, f50: float) -> np.ndarray:
    """The shapes of two curves on FINE, each stretched so that its f50 is `f50`, averaged."""
    curve = np.zeros(FINE.size)
    for part, weight in ((one, 1 - share), (two, share)):
        own = Kernel("shape", FINE, part).f50_per_mm
        curve += weight * np.interp(FINE * own / f50, FINE, part, right=0.0)
    return curve * taper(FINE)


def taper(frequency: np.ndarray) -> np.ndarray:
    """1 up to 0.85 per mm, 0 at 1 per mm."""
    return np.cos(np.pi / 2 * np.clip((frequency - 0.85) / 0.15, 0.0, 1.0)) ** 2


def ratio(sharp: list[np.ndarray], soft: list[np.ndarray], pixel_mm: float, floor_hu: float) -> np.ndarray:
    """MTF of the soft over that of the sharp kernel on FINE, from aligned slices (y, x) of the same scans."""
    window = np.hanning(PATCH)[:, None] * np.hanning(PATCH)
    f = np.fft.fftfreq(PATCH, pixel_mm)
    width = 0.025
    index = (np.hypot(f[:, None], f) / width).astype(int)
    cross, power = np.zeros(index.max() + 1), np.zeros(index.max() + 1)
    for a, b in zip(sharp, soft, strict=True):
        for y in range(0, a.shape[0] - PATCH, PATCH // 4):
            for x in range(0, a.shape[1] - PATCH, PATCH // 4):
                one, two = a[y : y + PATCH, x : x + PATCH], b[y : y + PATCH, x : x + PATCH]
                if one.min() <= floor_hu or two.min() <= floor_hu:
                    continue
                fa, fb = (np.fft.fft2(window * (p - p.mean())) for p in (one, two))
                np.add.at(cross, index, (fb * fa.conj()).real)
                np.add.at(power, index, np.abs(fa) ** 2)
    use = int(PAIRED_TO_PER_MM / width)
    centre = (np.arange(use) + 0.5) * width
    value = cross[:use] / power[:use]
    # the window leaks power into the first bins, where the ratio of any two kernels is 1
    value[:2] = 1.0
    curve = np.interp(FINE, np.append(0.0, centre), np.append(1.0, value))
    # where nothing of a soft kernel is left, its ratio is that of the noise: stop at 2 %
    last = int(np.argmax(np.append(curve, 0.0) < 0.02))
    last = min(last, int(np.searchsorted(FINE, centre[-1])))
    tail = slice(last - 30, last)
    slope, level = np.polyfit(FINE[tail], np.log(curve[tail]), 1)
    curve[last:] = np.exp(level + min(slope, 0.0) * FINE[last:])
    return gaussian_filter1d(curve, 3, mode="nearest")


def skin(series: list[Series]) -> np.ndarray:
    """The MTF at the skin on FINE, slices weighted by their clean sectors."""
    found = [skin_air_mtf(s) for s in series]
    return np.average([m.kernel.at(FINE) for m in found], axis=0, weights=[m.sectors_used for m in found])


def measured(scans: dict[str, list[Series]], floor_hu: float) -> dict[str, np.ndarray]:
    """Curves on FINE of kernels, soft to sharp, that reconstructed the same slices."""
    names = list(scans)
    slices = {name: [s.hu[0].astype(float) for s in scans[name]] for name in names}
    pixel = scans[names[0]][0].pixel_mm[0]
    share = {n: ratio(slices[names[-1]], slices[n], pixel, floor_hu) for n in names[:-1]}
    share[names[-1]] = np.ones(FINE.size)
    top = sum(share[n] * skin(scans[n]) for n in names) / sum(share[n] ** 2 for n in names)
    top = np.maximum(gaussian_filter1d(np.concatenate([top[:0:-1], top]), 5)[FINE.size - 1 :], 0.0)
    top = top / top[0]
    # from 0.7 per mm on (nearly the pixels' limit) the skin tells little: straight on in the logarithm
    end, tail = int(np.searchsorted(FINE, 0.7)), slice(int(np.searchsorted(FINE, 0.6)), int(np.searchsorted(FINE, 0.7)))
    slope = np.polyfit(FINE[tail], np.log(top[tail]), 1)[0]
    top[end:] = top[end] * np.exp(slope * (FINE[end:] - FINE[end])) * taper(FINE[end:])
    return {n: top * share[n] for n in names}


def public_pairs(data: Path) -> dict[str, np.ndarray]:
    """The six measured kernels."""
    siemens = {
        k: [read_volume(data / "paired" / "siemens-chest" / f"{k}.mha", spacing_mm=0.693359)]
        for k in ("B10", "B30", "B50", "B70")
    }
    canon = {}
    for k in ("FC13", "FC51"):
        files = sorted((data / "paired" / "canon-lungman" / k).glob("*.dcm"))
        canon[k] = [replace(read_series([f], slicewise=True), name=f"{k}/{f.name}") for f in files]
    return measured(siemens, -1024.0) | measured(canon, -2000.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("src/harmonict/simulate/kernels.csv"))
    out = parser.parse_args().out
    if "HARMONICT_DATA" not in os.environ:
        parser.error("HARMONICT_DATA must name the folder of the public pairs")
    curves = {}
    for name, curve in public_pairs(Path(os.environ["HARMONICT_DATA"])).items():
        vendor, where = ("Canon", "two Lungman slices") if name.startswith("FC") else ("Siemens", "one patient slice")
        curves[name] = (
            vendor,
            "measured",
            f"skin-air MTF and kernel ratios of {where}; beyond 0.65 per mm assumed",
            curve,
        )
    for name, (one, two, share, f50, source) in SHAPES.items():
        curves[name] = ("Siemens", "emulation", source, mix(curves[one][3], curves[two][3], share, f50))
    for name, (vendor, f50, f10, peak, source) in EMULATIONS.items():
        curves[name] = (vendor, "emulation", source, emulate(f50, f10, peak))
    with out.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["name", "vendor", "status", "source", *(f"{f:g}" for f in AXIS)])
        for name, (vendor, status, source, curve) in curves.items():
            values = np.interp(AXIS, FINE, np.where(curve < 5e-4, 0.0, curve))
            k = Kernel(name, FINE, curve)
            numbers = f"f50 {k.f50_per_mm:.2f} f10 {k.f10_per_mm:.2f} per mm, peak {curve.max():.2f}"
            writer.writerow([name, vendor, status, f"{source}; {numbers}", *(f"{v:.4g}" for v in values)])


if __name__ == "__main__":
    main()
