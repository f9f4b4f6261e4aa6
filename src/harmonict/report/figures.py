"""Pictures of slices side by side, and of curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from harmonict.core import HarmonictError
from harmonict.physics.kernel import Kernel

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LUNG_WINDOW_HU, SOFT_WINDOW_HU = (-1350.0, 150.0), (-160.0, 240.0)


def save_montage(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    titles: Sequence[str],
    path: str | Path,
    *,
    window_hu: tuple[float, float] = LUNG_WINDOW_HU,
    size_inch: float = 2.6,
) -> None:
    """Slices (y, x) in HU as a grid of gray images: one row a label, one column a title."""
    columns = max(len(images) for _, images in rows)
    shape = (size_inch * columns + 0.3, size_inch * len(rows) + 0.35)
    figure, axes = plt.subplots(len(rows), columns, figsize=shape, squeeze=False, layout="constrained")
    for line, (label, images) in zip(axes, rows, strict=True):
        for n, axis in enumerate(line):
            axis.set_xticks([]), axis.set_yticks([])
            if n < len(images):
                axis.imshow(images[n], cmap="gray", vmin=window_hu[0], vmax=window_hu[1], interpolation="nearest")
        line[0].set_ylabel(label, fontsize=9)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=9)
    _save(figure, path)


def save_mtf_plot(curves: Sequence[tuple[str, Kernel]], path: str | Path, *, highest_per_mm: float = 1.0) -> None:
    """MTF curves over spatial frequency in cycles per mm."""
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for label, kernel in curves:
        seen = kernel.frequency_per_mm <= highest_per_mm
        axis.plot(kernel.frequency_per_mm[seen], kernel.mtf[seen], label=label, linewidth=1.5)
    axis.axhline(0.5, color="0.8", linewidth=0.8, zorder=0)
    axis.set(xlabel="spatial frequency, cycles per mm", ylabel="MTF", xlim=(0, highest_per_mm), ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _save(figure: plt.Figure, path: str | Path) -> None:
    try:
        figure.savefig(path, dpi=130, metadata={"Software": None})
    except OSError as error:
        raise HarmonictError(f"cannot write {path}: {error.strerror}") from None
    finally:
        plt.close(figure)
