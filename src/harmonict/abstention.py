"""Abstention: is a series like those that a model was trained on? Sharpness, noise, thickness and HU, with the numbers.

`trained_on` is measured once, when a model is fitted, and stands in its card. `outside` compares a series with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from harmonict.core import HarmonictError, Series
from harmonict.data import Scan, SlicePairs
from harmonict.physics.mtf import body_mask, in_threads, skin_air_mtf, spread_slices
from harmonict.physics.nps import uniform_noise_sd

SERIES, SLICES = 16, 3  # of the training that are measured: some seconds
EDGES_HU = (-900.0, -700.0, -400.0, -150.0, -30.0, 100.0, 300.0)  # of the bins; the first and the last are open
SMOOTH_MM = 1.5  # Gaussian SD before the histogram, so that it tells of tissue and HU scale and not of noise
F50_MARGIN = 1.15  # beyond the range of the training, by this factor at either end
NOISE_MARGIN = 1.5
THICKNESS_MARGIN = 1.3
HU_MARGIN, HU_FLOOR = 1.5, 0.2  # share of the patient in other bins: this times the training's largest, at least that


@dataclass(frozen=True, eq=False)
class Looks:
    """What is measured of a series; None where it cannot be.

    hu_shares: share of the patient's voxels in the bins between `EDGES_HU`.
    """

    f50_per_mm: float | None
    noise_hu: float | None
    thickness_mm: float | None
    pixel_mm: tuple[float, float]
    hu_shares: tuple[float, ...] | None


def looks(series: Series, *, f50_per_mm: float | None = None, noise_hu: float | None = None) -> Looks:
    """Measure a series in up to 12 slices; what was measured already (NaN: in vain) is not measured again."""
    f50 = _measured(lambda: skin_air_mtf(series).f50_per_mm) if f50_per_mm is None else f50_per_mm
    noise = _measured(lambda: uniform_noise_sd(series)) if noise_hu is None else noise_hu
    thickness = series.protocol.slice_thickness_mm
    return Looks(_finite(f50), _finite(noise), thickness, series.pixel_mm, _hu_shares(series))


def trained_on(pairs: SlicePairs) -> dict[str, Any]:
    """What a model card says of the images on the source side, and of those on the target side where they are no pairs
    (a model of unpaired images may be turned round). Plain values."""
    sides = {"source": pairs.scans[0]} | ({} if pairs.paired else {"target": pairs.scans[1]})
    return {name: _summary(scans) for name, scans in sides.items()}


def outside(seen: Looks, trained: Mapping[str, Any]) -> tuple[str, ...]:
    """Why a series is outside what the model was trained on (one side of `trained_on`), a sentence each."""
    sentences = []
    for key, value, margin, words, unit in (
        ("f50_per_mm", seen.f50_per_mm, F50_MARGIN, "sharpness (MTF f50)", "per mm"),
        ("noise_hu", seen.noise_hu, NOISE_MARGIN, "noise", "HU"),
        ("thickness_mm", seen.thickness_mm, THICKNESS_MARGIN, "slices of", "mm"),
    ):
        known = trained.get(key)
        if known and value is not None and not known[0] / margin <= value <= known[1] * margin:
            ends = " to ".join(dict.fromkeys(map(_text, known)))
            sentences.append(f"{words} {_text(value)} {unit}, trained on {ends} {unit}")
    known = trained.get("hu_shares")
    if known and seen.hu_shares is not None:
        difference = np.subtract(seen.hu_shares, known["mean"])
        away, allowed = _away(seen.hu_shares, known["mean"]), _allowed(known["largest_away"])
        if away > allowed:
            most = int(np.argmax(difference))
            sentences.append(
                f"{away:.0%} of the patient at other HU than in training (there at most "
                f"{known['largest_away']:.0%}): {seen.hu_shares[most]:.0%} {_bin(most)}, trained on "
                f"{known['mean'][most]:.0%}"
            )
    return tuple(sentences)


def _summary(scans: Sequence[Scan]) -> dict[str, Any]:
    some = [scans[n] for n in spread_slices(len(scans), SERIES)]
    found = in_threads(lambda n: looks(_part(some[n])), range(len(some)))
    summary: dict[str, Any] = {"series": len(some), "of": len(scans)}
    for key in ("f50_per_mm", "noise_hu", "thickness_mm"):
        values = [v for one in found if (v := getattr(one, key)) is not None]
        if values:
            summary[key] = [float(min(values)), float(max(values))]
    pixels = np.array([one.pixel_mm for one in found])
    summary["pixel_mm"] = [float(pixels.min()), float(pixels.max())]
    shares = [(scan.subject, one.hu_shares) for scan, one in zip(some, found, strict=True) if one.hu_shares is not None]
    if shares:
        table = np.array([values for _, values in shares])
        away: list[float] = []
        for subject, own in shares:
            others = table[[other != subject for other, _ in shares]]
            away.append(_away(own, (others if len(others) else table).mean(0)))
        summary["hu_shares"] = {
            "edges_hu": list(EDGES_HU),
            "mean": table.mean(0).tolist(),
            "sd": table.std(0).tolist(),
            "largest_away": max(away),
        }
    return summary


def _part(scan: Scan) -> Series:
    """A few slices of a scan, read one by one."""
    slices = [scan.slice(z) for z in spread_slices(scan.shape[0], SLICES)]
    padded = np.stack([np.zeros(hu.shape, bool) if padding is None else padding for hu, padding in slices])
    hu = np.stack([hu for hu, _ in slices])
    return Series(hu, scan.geometry, scan.protocol, padded if padded.any() else None, name=scan.name)


def _hu_shares(series: Series) -> tuple[float, ...] | None:
    """Share of the voxels of the patient in each bin, over up to 12 slices."""
    counts = np.zeros(len(EDGES_HU) + 1)

    def one(z: int) -> np.ndarray:
        hu = series.hu[z] if series.padding is None else np.where(series.padding[z], np.float32(-1000), series.hu[z])
        body = body_mask(hu, series.pixel_mm)
        if body is None:
            return np.zeros_like(counts)
        smooth = ndimage.gaussian_filter(hu, SMOOTH_MM / np.array(series.pixel_mm), truncate=3.0)
        return np.bincount(np.digitize(smooth[body], EDGES_HU), minlength=counts.size)

    for found in in_threads(one, spread_slices(len(series.hu), 12)):
        counts += found
    return tuple(float(v) for v in counts / counts.sum()) if counts.any() else None


def _away(one: Sequence[float], other: Sequence[float] | np.ndarray) -> float:
    """Total variation distance: the share that would have to change its bin."""
    return float(np.abs(np.subtract(one, other)).sum() / 2)


def _allowed(largest: float) -> float:
    return max(HU_MARGIN * largest, HU_FLOOR)


def _bin(n: int) -> str:
    if n == 0:
        return f"below {EDGES_HU[0]:g} HU"
    return f"above {EDGES_HU[-1]:g} HU" if n == len(EDGES_HU) else f"from {EDGES_HU[n - 1]:g} to {EDGES_HU[n]:g} HU"


def _text(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def _measured(measure: Any) -> float:
    try:
        return float(measure())
    except HarmonictError:
        return float("nan")


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
