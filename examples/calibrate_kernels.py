"""Writes src/harmonict/simulate/kernels.csv: kernels measured in the public pairs, the others from a few numbers.

HARMONICT_DATA=... python examples/calibrate_kernels.py [--out kernels.csv]
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from scipy.interpolate import PchipInterpolator

AXIS = np.round(np.arange(0.0, 1.0001, 0.05), 2)

# name: vendor, f50, f10 (1/mm), peak of the MTF (1: no edge enhancement), where the numbers come from
EMULATIONS: dict[str, tuple[str, float, float, float, str]] = {
    "Br32": ("Siemens", 0.29, 0.50, 1.00, "assumed: a little softer than B30, whose f50 was measured"),
    "Br40": ("Siemens", 0.37, 0.63, 1.03, "assumed: between B30 and B50"),
    "Br49": ("Siemens", 0.49, 0.75, 1.10, "assumed: as B50, whose f50 was measured"),
    "Br59": ("Siemens", 0.59, 0.83, 1.15, "assumed: between B50 and B70"),
    "Br62": ("Siemens", 0.62, 0.86, 1.18, "assumed: a little softer than B70"),
    "Br64": ("Siemens", 0.65, 0.88, 1.20, "assumed: as B70, whose f50 was measured"),
    "Br69": ("Siemens", 0.72, 0.93, 1.25, "assumed: sharper than B70; ends at 1 per mm, the real one goes on"),
    "Qr32": ("Siemens", 0.29, 0.50, 1.00, "assumed: Br of the same number without edge enhancement"),
    "Qr49": ("Siemens", 0.46, 0.74, 1.00, "assumed: Br of the same number without edge enhancement"),
    "Qr59": ("Siemens", 0.56, 0.82, 1.00, "assumed: Br of the same number without edge enhancement"),
    "Qr61": ("Siemens", 0.59, 0.85, 1.00, "assumed: Br of the same number without edge enhancement"),
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
    "B10": ("Siemens", 0.257, 0.45, 1.00, "f50 measured at the skin of two patients"),
    "B30": ("Siemens", 0.322, 0.53, 1.00, "f50 measured at the skin of two patients"),
    "B50": ("Siemens", 0.498, 0.75, 1.10, "f50 measured at the skin of two patients"),
    "B70": ("Siemens", 0.645, 0.88, 1.20, "f50 measured at the skin of two patients"),
    "FC13": ("Canon", 0.27, 0.47, 1.00, "f50 measured at a Lungman's skin"),
    "FC51": ("Canon", 0.59, 0.83, 1.20, "f50 measured at a Lungman's skin"),
    "STANDARD": ("GE", 0.42, 0.68, 1.05, "assumed, near what GE states for its scanners (4.2 and 6.8 per cm)"),
    "LUNG": ("GE", 0.60, 0.86, 1.50, "assumed: known for its strong edge enhancement"),
    "BONE": ("GE", 0.70, 0.93, 1.25, "assumed: sharper than LUNG with less enhancement"),
    "B": ("Philips", 0.34, 0.58, 1.00, "assumed: a body kernel softer than D"),
    "D": ("Philips", 0.40, 0.65, 1.08, "f50 measured at the skin of LIDC-IDRI-0314 (TCIA); the rest assumed"),
}


def emulate(f50: float, f10: float, peak: float) -> np.ndarray:
    """A smooth curve through 1 at 0, the peak, f50, f10 and 0 at the end, on AXIS."""
    end = min(1.0, f10 + 0.7 * (f10 - f50))
    if peak > 1:
        inner = [(0.25 * f50, 1 + 0.45 * (peak - 1)), (0.5 * f50, peak), (0.75 * f50, 0.5 + 0.76 * (peak - 0.5))]
    else:
        inner = [(0.25 * f50, 0.955), (0.5 * f50, 0.84), (0.75 * f50, 0.68)]
    points = [(0.0, 1.0), *inner, (f50, 0.5), (f10, 0.1), (end, 0.0)]
    mirrored = [(-f, m) for f, m in points[:0:-1]]
    f, m = np.array(mirrored + points).T
    return np.where(end > AXIS, PchipInterpolator(f, m)(np.minimum(AXIS, end)), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("src/harmonict/simulate/kernels.csv"))
    out = parser.parse_args().out
    rows = []
    for name, (vendor, f50, f10, peak, source) in EMULATIONS.items():
        text = f"f50 {f50:g}, f10 {f10:g} per mm, peak {peak:g}; {source}"
        rows.append([name, vendor, "emulation", text, *(f"{v:.4g}" for v in emulate(f50, f10, peak))])
    with out.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["name", "vendor", "status", "source", *(f"{f:g}" for f in AXIS)])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
