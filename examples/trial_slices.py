"""One slice of one patient of a trial under several protocols, in a lung and a soft-tissue window.

harmonict simulate duke-small --out duke
python examples/trial_slices.py duke --patient duke-s0-nodule-test-001 --figure slices.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from harmonict.core.cohort import read_cohort
from harmonict.dicom.read import read_series

SHOWN = ("truth", "Br32 6.5", "Br69 6.5", "Br69 1.3", "Br69(3) 1.3")
WINDOWS = {"lung": (-1350, 150), "soft": (-160, 240)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", type=Path)
    parser.add_argument("--patient", required=True)
    parser.add_argument("--show", nargs="+", default=SHOWN, help='"truth" or "KERNEL DOSE", as in "Br40(3) 1.3"')
    parser.add_argument("--width-mm", type=float, default=360.0, help="how much of the image is shown")
    parser.add_argument("--figure", type=Path, required=True)
    chosen = parser.parse_args()
    table = read_cohort(chosen.trial / "cohort.csv")
    paths = {}
    for _, row in table[table["patient"] == chosen.patient].iterrows():
        strength = f"({row['iterative_strength']:g})" if row["iterative_strength"] > 0 else ""
        label = "truth" if row["model"] == "truth" else f"{row['kernel']}{strength} {row['ctdivol_mgy']:g}"
        paths.setdefault(label, Path(row["path"]))
    size = 2.8
    figure, axes = plt.subplots(2, len(chosen.show), figsize=(size * len(chosen.show), 2 * size))
    for label, column in zip(chosen.show, axes.T, strict=True):
        series = read_series(sorted(paths[label].glob("*.dcm")))
        middle = series.hu[len(series.hu) // 2]
        edge = max(0, round((middle.shape[1] - chosen.width_mm / series.pixel_mm[1]) / 2))
        middle = middle[edge : middle.shape[0] - edge, edge : middle.shape[1] - edge]
        for one, (low, high) in zip(column, WINDOWS.values(), strict=True):
            one.imshow(middle, cmap="gray", vmin=low, vmax=high)
            one.axis("off")
        column[0].set_title(label if label == "truth" else f"{label} mGy", fontsize=9)
    figure.subplots_adjust(0, 0, 1, 0.94, 0.01, 0.01)
    figure.savefig(chosen.figure, dpi=58)


if __name__ == "__main__":
    main()
