"""Pictures of slices side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from harmonict.core import HarmonictError

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


def _save(figure: plt.Figure, path: str | Path) -> None:
    try:
        figure.savefig(path, dpi=130, metadata={"Software": None})
    except OSError as error:
        raise HarmonictError(f"cannot write {path}: {error.strerror}") from None
    finally:
        plt.close(figure)
