"""Public images that were reconstructed twice from the same raw data: no simulation, and the truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from harmonict.core import HarmonictError, Series
from harmonict.data import SlicePairs
from harmonict.dicom.inventory import find_series
from harmonict.methods.mtf_ratio import Config, MTFRatio
from harmonict.volumes import read_volume

SIEMENS_MM = 0.693359  # the headers of B10 and B70 say 1.0, which is wrong
SIEMENS_KERNELS = ("B10", "B30", "B50", "B70")
LUNGMAN_KERNELS = ("FC13", "FC51")


@dataclass(frozen=True)
class RealPair:
    """Slices of one patient (or phantom) with two kernels.

    parts: bool masks (z, y, x) that divide the image: a filter that is fitted on all other parts is scored on each.
    within: where a region of interest may lie, so that none is cut by the border of two parts; None is everywhere.
    """

    name: str
    source: Series
    target: Series
    parts: tuple[np.ndarray, ...]
    within: np.ndarray | None


def real_pair(data: str | Path, source: str, target: str) -> RealPair:
    """The pair of two kernels below `data` (the folder with `paired/`).

    siemens-chest (B10, B30, B50, B70; one slice, its halves are the parts; Choe et al., Radiology 2019), canon-lungman
    (FC13, FC51; two slices of a phantom; github.com/shizuo-kaji/CTKernelConversion).
    Raises HarmonictError where there is no such pair.
    """
    folder = Path(data) / "paired"
    if {source, target} <= set(SIEMENS_KERNELS):
        x, y = (read_volume(folder / f"siemens-chest/{k}.mha", spacing_mm=SIEMENS_MM) for k in (source, target))
        half = x.hu.shape[2] // 2
        left = np.zeros(x.hu.shape, bool)
        left[:, :, :half] = True
        within = np.ones(x.hu.shape, bool)
        within[:, :, half - 1 : half + 1] = False  # a box that holds neither column lies in one half
        return RealPair(f"siemens-chest {source} to {target}", x, y, (left, ~left), within)
    if {source, target} <= set(LUNGMAN_KERNELS):
        x, y = (_one(folder / f"canon-lungman/{k}") for k in (source, target))
        first = np.zeros(x.hu.shape, bool)
        first[0] = True
        return RealPair(f"canon-lungman {source} to {target}", x, y, (first, ~first), None)
    raise HarmonictError(
        f"no real pair {source} to {target}; there are: {', '.join(SIEMENS_KERNELS)} (siemens-chest), "
        f"{', '.join(LUNGMAN_KERNELS)} (canon-lungman)"
    )


def fitted_on_the_other_part(pair: RealPair, fit: str) -> Series:
    """The source after mtf-ratio's `fit`, each part by the filter that was fitted on the other."""
    hu = np.empty_like(pair.source.hu)
    for part, other in zip(pair.parts, pair.parts[::-1], strict=True):
        x, y = (_cut(series, other) for series in (pair.source, pair.target))
        slices = SlicePairs([(x, z, y, z) for z in range(len(x.hu))])
        model = MTFRatio(Config(fit=fit)).fit(slices)  # type: ignore[arg-type]
        hu[part] = model.harmonize(pair.source).hu[part]
    return pair.source.with_hu(hu)


def _cut(series: Series, part: np.ndarray) -> Series:
    """The box of a part, as an image of its own."""
    box = tuple(slice(int(where.min()), int(where.max()) + 1) for where in np.nonzero(part))
    padding = None if series.padding is None else np.ascontiguousarray(series.padding[box])
    positions = series.positions_mm
    return replace(
        series,
        hu=np.ascontiguousarray(series.hu[box]),
        padding=padding,
        positions_mm=None if positions is None else tuple(positions[box[0]]),
        source=None,
    )


def _one(folder: Path) -> Series:
    found: Sequence = find_series(folder, slicewise=True).found
    if len(found) != 1:
        raise HarmonictError(f"{folder} must hold one CT series, there are {len(found)}")
    return found[0].read()
