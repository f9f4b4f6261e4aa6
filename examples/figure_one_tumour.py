"""One simulated nodule after every model of a finished benchmark: the slice, and the nodule magnified in a corner.

harmonict benchmark configs/kentucky.toml --out runs/kentucky
python examples/figure_one_tumour.py configs/kentucky.toml runs/kentucky --figure one_tumour.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from harmonict.evaluate.benchmark import tumour_images
from harmonict.evaluate.benchmark_plan import load_plan

WINDOW_HU = (-800.0, 800.0)  # RadiomicGAN, figure 3
HALF_WIDTH = 24  # pixels of the magnified square to each side of the nodule
COLUMNS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path, help="the folder of the benchmark")
    parser.add_argument("--models", nargs="+", help="only these, in this order; the target comes last")
    parser.add_argument("--figure", type=Path, required=True)
    chosen = parser.parse_args()
    images = tumour_images(chosen.out, load_plan(chosen.plan))
    target = images.pop("target")
    shown = {name: images[name] for name in chosen.models or images} | {"target": target}
    table = pd.read_csv(chosen.out / "tumour.csv").drop_duplicates("model").set_index("model")
    rows = -(-len(shown) // COLUMNS)
    columns = min(COLUMNS, len(shown))
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.95 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, (hu, mask)) in zip(axes.flat, shown.items(), strict=False):
        draw(axis, hu, mask)
        title = "source" if name == "identity" else name
        if name in table.index:
            row = table.loc[name]
            title += f"\n{row['reproducible_of_1401']:.0f} features, {row['whole_psnr_db']:.1f} dB"
        axis.set_title(title, fontsize=8)
    figure.tight_layout(pad=0.3, h_pad=0.8)
    figure.savefig(chosen.figure, dpi=110)


def draw(axis: plt.Axes, hu: np.ndarray, mask: np.ndarray, window_hu: tuple[float, float] = WINDOW_HU) -> None:
    """A slice in gray, the nodule in a green square, magnified in the upper left corner."""
    y, x = (round(float(where.mean())) for where in np.nonzero(mask))
    top = min(max(y - HALF_WIDTH, 0), hu.shape[0] - 2 * HALF_WIDTH)
    left = min(max(x - HALF_WIDTH, 0), hu.shape[1] - 2 * HALF_WIDTH)
    low, high = window_hu
    axis.imshow(hu, cmap="gray", vmin=low, vmax=high)
    square = {"fill": False, "edgecolor": "lime", "linewidth": 0.8}
    axis.add_patch(plt.Rectangle((left, top), 2 * HALF_WIDTH, 2 * HALF_WIDTH, **square))
    inset = axis.inset_axes((0, 0.6, 0.4, 0.4))
    inset.imshow(hu[top : top + 2 * HALF_WIDTH, left : left + 2 * HALF_WIDTH], cmap="gray", vmin=low, vmax=high)
    inset.set_xticks([]), inset.set_yticks([])
    for side in inset.spines.values():
        side.set_color("lime")


if __name__ == "__main__":
    main()
