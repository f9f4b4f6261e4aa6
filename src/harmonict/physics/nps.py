"""Noise in uniform tissue: its SD and its power spectrum (ICRU Report 87, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from harmonict.core import HarmonictError, Series
from harmonict.physics.mtf import body_mask, in_threads, spread_slices

TISSUE_HU = (-30.0, 200.0)  # heart, vessels, liver, muscle; fat is streaked with strands
FAT_TO_TISSUE_HU = (-150.0, 200.0)  # where there is too little of the former


@dataclass(frozen=True, eq=False)
class NoiseSpectrum:
    """A radial noise power spectrum.

    frequency_per_mm: (n,), strictly rising, the first above 0 (the mean of a patch is not noise).
    nps_hu2_mm2: (n,), HU^2 mm^2, so that the integral over the frequency plane is the variance.
    sd_hu: the noise SD of the same patches. patches: how many.
    """

    frequency_per_mm: np.ndarray = field(repr=False)
    nps_hu2_mm2: np.ndarray = field(repr=False)
    sd_hu: float
    patches: int

    def at(self, frequency_per_mm: np.ndarray | float) -> np.ndarray:
        """The spectrum at any frequencies, linear between samples, held constant outside them."""
        return np.interp(frequency_per_mm, self.frequency_per_mm, self.nps_hu2_mm2)


def nps_2d(patches: np.ndarray, *, pixel_mm: tuple[float, float], detrend: int = 2, window: bool = False):
    """Two-dimensional NPS of an ensemble of patches.

    patches: (n, h, w) HU, each a piece of a uniform region. detrend: order of the polynomial (0 mean, 1 plane, 2
    quadratic) that is taken out of each. window: a Hann window against leakage from steep spectra.

    Returns (frequency_y (h,), frequency_x (w,), NPS (h, w) in HU^2 mm^2), in numpy's FFT order. Its sum times
    1 / (h dy w dx) is the mean variance of the patches (with window=False, exactly).
    """
    patches = np.asarray(patches, np.float64)
    if patches.ndim != 3 or min(patches.shape) < 1:
        raise HarmonictError(f"NPS: expected patches (n, h, w), got shape {patches.shape}")
    h, w = patches.shape[1:]
    flat = _detrended(patches, detrend)
    taper = np.outer(np.hanning(h + 1)[:h], np.hanning(w + 1)[:w]) if window else np.ones((h, w))
    power = np.abs(np.fft.fft2(flat * taper)) ** 2
    nps = power.mean(0) * pixel_mm[0] * pixel_mm[1] / np.sum(taper**2)
    return np.fft.fftfreq(h, pixel_mm[0]), np.fft.fftfreq(w, pixel_mm[1]), nps


def nps_radial(patches: np.ndarray, *, pixel_mm: tuple[float, float], detrend: int = 2, window: bool = False):
    """`nps_2d` averaged over rings of one frequency step, up to the lower of the two Nyquist frequencies."""
    fy, fx, nps = nps_2d(patches, pixel_mm=pixel_mm, detrend=detrend, window=window)
    radius = np.hypot(fy[:, None], fx[None, :])
    step = max(1 / (len(fy) * pixel_mm[0]), 1 / (len(fx) * pixel_mm[1]))
    ring = np.rint(radius / step).astype(int)
    top = int(0.5 / max(pixel_mm) / step)
    number = np.bincount(ring.ravel())[1 : top + 1]
    power = np.bincount(ring.ravel(), nps.ravel())[1 : top + 1]
    mean_radius = np.bincount(ring.ravel(), radius.ravel())[1 : top + 1] / number
    sd = float(np.sqrt(_detrended(np.asarray(patches, np.float64), detrend).var(axis=(1, 2)).mean()))
    return NoiseSpectrum(mean_radius, power / number, sd, len(patches))


def uniform_noise_sd(series: Series, *, max_slices: int = 12) -> float:
    """Noise SD in HU: the most frequent SD of 10 mm patches of soft tissue, each freed of its plane.

    Soft tissue: inside the patient, patch mean -30 to 200 HU (-150 to 200 where there is too little). Taken over up to
    `max_slices` slices spread over the series. The mode, not the mean: patches that hold anatomy have a higher SD and
    do not move it. Raises HarmonictError where the series shows no soft tissue.
    """
    sds = [sd for _, sd in _patches(series, max_slices, 10.0)]
    if not sds:
        raise HarmonictError(
            f"{series.name or 'series'}: no patch of soft tissue (10 mm, -150 to 200 HU), so noise cannot be measured"
        )
    return float(np.exp(_half_sample_mode(np.log(np.maximum(np.concatenate(sds), 1e-3)))))


def patient_nps(series: Series, *, max_slices: int = 12, patch_mm: float = 20.0) -> NoiseSpectrum:
    """The radial NPS of a patient from the most uniform patches of soft tissue.

    Patches of `patch_mm`, freed of their plane, Hann windowed; those whose SD is at most 1.2 times the most frequent
    one (at least 8: the most uniform ones), so that little anatomy remains. Raises HarmonictError as
    `uniform_noise_sd`.
    """
    found = _patches(series, max_slices, patch_mm)
    if not found:
        raise HarmonictError(
            f"{series.name or 'series'}: no patch of soft tissue ({patch_mm:g} mm, -150 to 200 HU) for a noise spectrum"
        )
    patches, sds = np.concatenate([p for p, _ in found]), np.concatenate([s for _, s in found])
    limit = max(1.2 * np.exp(_half_sample_mode(np.log(np.maximum(sds, 1e-3)))), np.sort(sds)[:8][-1])
    chosen = sds <= limit
    return nps_radial(patches[chosen], pixel_mm=series.pixel_mm, detrend=1, window=True)


def _patches(series: Series, max_slices: int, patch_mm: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per slice: patches (n, h, w) of soft tissue and their detrended SD (n,)."""
    slices = spread_slices(series.hu.shape[0], max_slices)
    for hu_range in (TISSUE_HU, FAT_TO_TISSUE_HU):

        def look(z: int, hu_range: Sequence[float] = hu_range):
            padding = None if series.padding is None else series.padding[z]
            patches = _slice_patches(series.hu[z], series.pixel_mm, padding, patch_mm, hu_range)
            return (patches, _detrended(patches, 1).std(axis=(1, 2))) if len(patches) else None

        found = [f for f in in_threads(look, slices) if f is not None]
        if sum(len(p) for p, _ in found) >= 8:
            return found
    return found


def _slice_patches(
    hu: np.ndarray,
    pixel_mm: tuple[float, float],
    padding: np.ndarray | None,
    patch_mm: float,
    hu_range: Sequence[float],
) -> np.ndarray:
    size = [max(8, round(patch_mm / p)) for p in pixel_mm]
    hu = hu if padding is None else np.where(padding, np.float32(-1000), hu)
    mask = body_mask(hu, pixel_mm)
    if mask is None or size[0] > hu.shape[0] or size[1] > hu.shape[1]:
        return np.empty((0, *size), np.float32)
    smooth = ndimage.gaussian_filter(hu, 1.5 / np.array(pixel_mm), truncate=3.0)
    tissue = mask & (smooth > hu_range[0]) & (smooth < hu_range[1])
    # Every pixel of the patch, slightly smoothed, must be tissue: minimum filter by an integral image.
    total = np.pad(tissue.astype(np.int32).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    h, w = size
    inside = total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w]
    step = [max(1, s // 2) for s in size]
    corners = np.argwhere(inside[:: step[0], :: step[1]] == h * w) * step
    return np.stack([hu[y : y + h, x : x + w] for y, x in corners]) if len(corners) else np.empty((0, h, w), np.float32)


def _detrended(patches: np.ndarray, order: int) -> np.ndarray:
    """Patches (n, h, w) less the polynomial of `order` that fits each best."""
    n, h, w = patches.shape
    y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
    terms = [x**i * y**j for i in range(order + 1) for j in range(order + 1 - i)]
    q, _ = np.linalg.qr(np.stack([t.ravel() for t in terms], 1))
    flat = patches.reshape(n, -1).astype(np.float64)
    return (flat - (flat @ q) @ q.T).reshape(n, h, w)


def _half_sample_mode(values: np.ndarray) -> float:
    """The mode of a sample: the densest half, of it the densest half, and so on (Robertson and Cryer 1974)."""
    values = np.sort(values)
    while values.size > 3:
        half = (values.size + 1) // 2
        width = values[half - 1 :] - values[: values.size - half + 1]
        start = int(np.argmin(width))
        values = values[start : start + half]
    return float(np.mean(values))
