"""Fidelity: a harmonized image, filtered back to the source, must be the source. The guard against invented structure.

A kernel change is a filter: what the result shows below the frequencies that both kernels pass must be in the source
too. The transfer from result back to source, one radial curve a series, is taken from the two images themselves; a
nodule that was planted or removed in a few slices hardly moves it. What is left over after filtering back, low-passed to
the shared band, is the residual. It is judged against the source's own measured noise in that band: a method that takes
noise out leaves a residual as large as that noise and no larger.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import fft, ndimage, special

from harmonict.core import HarmonictError, Series
from harmonict.core.padding import clip_floor, fill_padding
from harmonict.physics.mtf import body_mask, in_threads, skin_air_mtf, spread_slices
from harmonict.physics.nps import NoiseSpectrum, patient_nps, uniform_noise_sd

WARN_RMSE, FAIL_RMSE = 1.5, 2.5  # in-band RMSE, in units of the source's noise in the band
WARN_PEAK, FAIL_PEAK = 7.0, 10.0  # the largest blob or edge, in units of its noise
BLOBS_MM = (1.5, 3.0)  # Gaussian SD of the structures that are looked for: nodules of about 4 and 8 mm
LOWEST_BAND_PER_MM = 0.1
AIR_HU, BONE_HU = -1000.0, 900.0
AROUND_MM = 10.0  # beyond this distance from the patient everything is taken as air
CLIPPED_SHARE = 0.4  # of the pixels about a point: air that noise cannot be told of any more
TAPER_PER_MM = 0.05
TRANSFER_ERROR = 0.03  # of the local contrast: one radial curve is not exact at every edge
ANATOMY_IN_NOISE = 1.1  # SD of the spectrum against that of uniform patches


@dataclass(frozen=True, eq=False)
class Fidelity:
    """What `check_fidelity` found.

    band_per_mm: up to where both images show structure. noise_hu: the source's noise SD within the band.
    rmse_hu: (z,) in-band RMSE inside the patient; NaN where there is none. peak: (z,) the largest blob of the residual
    in units of its noise. peak_yx_mm: (z, 2) where it lies, from the first pixel. verdict: (z,) pass, warn, fail or
    "none". residual_hu: (z, y, x) float32, positive where the result has more than the source.
    """

    band_per_mm: float
    noise_hu: float
    rmse_hu: np.ndarray
    peak: np.ndarray
    peak_yx_mm: np.ndarray
    verdict: tuple[str, ...]
    residual_hu: np.ndarray = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a report, one row a slice."""
        slices = [
            {
                "slice": z,
                "verdict": verdict,
                "rmse_hu": _plain(self.rmse_hu[z], 2),
                "peak": _plain(self.peak[z], 1),
                "peak_yx_mm": [_plain(v, 1) for v in self.peak_yx_mm[z]],
            }
            for z, verdict in enumerate(self.verdict)
        ]
        counts = {word: self.verdict.count(word) for word in ("pass", "warn", "fail", "none")}
        return {
            "band_per_mm": round(self.band_per_mm, 3),
            "source_noise_in_band_hu": round(self.noise_hu, 2),
            "slices": counts,
            "per_slice": slices,
        }


def check_fidelity(
    source: Series,
    result: Series,
    *,
    band_per_mm: float | None = None,
    noise: NoiseSpectrum | None = None,
) -> Fidelity:
    """Compare `result`, filtered back to the kernel of `source`, with `source`, both (z, y, x) HU on one grid.

    band_per_mm: the shared band; default: the lower f50 of the two images, measured at the skin. noise: the source's
    spectrum; default: measured in its soft tissue. Raises HarmonictError where the grids differ or no noise can be
    measured.
    """
    if source.hu.shape != result.hu.shape:
        raise HarmonictError(f"fidelity: source {source.hu.shape} and result {result.hu.shape} differ in their grid")
    noise = noise or _source_noise(source)
    band = band_per_mm or _shared_band(source, result)
    shape, pixel_mm = source.hu.shape[1:], source.pixel_mm
    full = tuple(fft.next_fast_len(size + min(32, size - 1), real=True) for size in shape)
    radius = np.hypot(np.fft.fftfreq(full[0], pixel_mm[0])[:, None], np.fft.fftfreq(full[1], pixel_mm[1])[None])
    low_pass = np.clip((band + TAPER_PER_MM / 2 - radius) / TAPER_PER_MM, 0, 1)
    half = np.s_[:, : full[1] // 2 + 1]
    back = _transfer(source, result, radius) * low_pass
    power = noise.at(radius) * low_pass**2
    cell = 1 / (pixel_mm[0] * pixel_mm[1] * radius.size)  # area of one sample of the frequency plane, 1/mm^2
    noise_hu = float(np.sqrt(np.sum(power) * cell))
    blobs = [np.exp(-2 * (np.pi * radius * mm) ** 2) for mm in BLOBS_MM]
    blob_noise = [float(np.sqrt(np.sum(power * blob**2) * cell)) for blob in blobs]
    residual = np.empty(source.hu.shape, np.float32)
    rows: list[tuple[float, float, tuple[float, float], str]] = [(np.nan, np.nan, (np.nan, np.nan), "none")] * len(
        residual
    )

    def judge(z: int) -> None:
        one = _slice(source, result, z)
        inside = one.inside
        spectrum = _fft(one.result, full) * back[half] - _fft(one.source, full) * low_pass[half]
        residual[z] = np.where(inside, _back(spectrum, full, shape), 0)
        if not inside.any():
            return
        rmse = float(np.sqrt(np.mean(np.square(residual[z][inside], dtype=np.float64))))
        louder = _local_noise(one.source, inside, pixel_mm)
        expected = low_pass[half] * _fft(one.source, full)
        scores = []
        for blob, sd in zip(blobs, blob_noise, strict=True):
            found = np.abs(_back(spectrum * blob[half], full, shape))
            edges = _local_sd(_back(expected * blob[half], full, shape), pixel_mm)
            scores.append(np.where(inside, found / np.hypot(sd * louder, TRANSFER_ERROR * edges), 0))
        worst = np.maximum.reduce(scores)
        y, x = np.unravel_index(int(np.argmax(worst)), shape)
        rows[z] = (rmse, float(worst[y, x]), (y * pixel_mm[0], x * pixel_mm[1]), _verdict(rmse / noise_hu, worst[y, x]))

    in_threads(judge, range(len(residual)))
    rmse, peak, where, verdict = zip(*rows, strict=True)
    return Fidelity(band, noise_hu, np.array(rmse), np.array(peak), np.array(where), tuple(verdict), residual)


def _verdict(rmse: float, peak: float) -> str:
    if rmse > FAIL_RMSE or peak > FAIL_PEAK:
        return "fail"
    return "warn" if rmse > WARN_RMSE or peak > WARN_PEAK else "pass"


def _source_noise(source: Series) -> NoiseSpectrum:
    """The measured spectrum; where anatomy got into it (few slices), that of filtered back-projection, f MTF^2, with the
    measured SD."""
    noise, sd = patient_nps(source), uniform_noise_sd(source)
    if noise.sd_hu <= ANATOMY_IN_NOISE * sd:
        return noise
    f = np.linspace(0.005, 1.5, 300)
    shape = f * skin_air_mtf(source).kernel.at(f) ** 2
    return NoiseSpectrum(f, shape * sd**2 / np.trapezoid(2 * np.pi * f * shape, f), sd, noise.patches)


def _shared_band(source: Series, result: Series) -> float:
    found = []
    for series in (source, result):
        try:
            found.append(skin_air_mtf(series).f50_per_mm)
        except HarmonictError:
            continue
    if not found:
        raise HarmonictError(f"{source.name or 'series'}: no skin to measure the shared band at; give band_per_mm")
    return max(min(found), LOWEST_BAND_PER_MM)


def _fft(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Half spectrum of an image that is continued by its mirror image, so that no border is a step."""
    y, x = (full - size for full, size in zip(shape, image.shape, strict=True))
    return fft.rfft2(np.pad(image, ((0, y), (0, x)), "reflect"))


def _back(spectrum: np.ndarray, full: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    return fft.irfft2(spectrum, full)[: shape[0], : shape[1]]


def _transfer(source: Series, result: Series, radius: np.ndarray) -> np.ndarray:
    """The radial filter that turns the result into the source with the least error, over up to 12 slices."""
    step = 1.0 / (min(source.hu.shape[1:]) * max(source.pixel_mm))
    ring = np.rint(radius / (2 * step)).astype(np.intp)
    cross, power = np.zeros(ring.max() + 1), np.zeros(ring.max() + 1)

    def one(z: int) -> tuple[np.ndarray, np.ndarray]:
        both = _slice(source, result, z)
        a, b = (_fft(image - AIR_HU, radius.shape) for image in (both.source, both.result))
        bins = ring[:, : a.shape[1]].ravel()
        return (
            np.bincount(bins, (a * b.conj()).real.ravel(), len(cross)),
            np.bincount(bins, (np.abs(b) ** 2).ravel(), len(cross)),
        )

    for c, p in in_threads(one, spread_slices(len(source.hu), 12)):
        cross += c
        power += p
    curve = cross / np.maximum(power, 1e-9)
    return np.interp(radius / (2 * step), np.arange(len(curve)), curve)


def _local_noise(source: np.ndarray, inside: np.ndarray, pixel_mm: tuple[float, float]) -> np.ndarray:
    """(y, x) how much louder the noise is than in most of the patient's soft tissue: it is loudest where most was
    absorbed. Edges are capped; vessels of the lung may count for noise, never for less than half of it."""
    detail = np.square(source - ndimage.gaussian_filter(source, 1.0 / np.array(pixel_mm)))
    tissue = inside & (np.abs(source) < 200)
    usual = float(np.median(detail[tissue if tissue.any() else inside])) / 0.455
    local = ndimage.gaussian_filter(np.minimum(detail, 9 * usual), 10.0 / np.array(pixel_mm))
    return np.sqrt(np.clip(local / usual, 0.25, None))


def _local_sd(image: np.ndarray, pixel_mm: tuple[float, float]) -> np.ndarray:
    sigma = 4.0 / np.array(pixel_mm)
    mean = ndimage.gaussian_filter(image, sigma)
    return np.sqrt(np.maximum(ndimage.gaussian_filter(np.square(image), sigma) - np.square(mean), 0))


@dataclass(frozen=True)
class _Slice:
    """Both images of one slice with everything around the patient made air, and where a filter is all that may have
    happened: in the patient, away from skin, padding, metal and air that a file clipped."""

    source: np.ndarray
    result: np.ndarray
    inside: np.ndarray


def _slice(source: Series, result: Series, z: int) -> _Slice:
    hu = [
        fill_padding(s.hu[z : z + 1], None if s.padding is None else s.padding[z : z + 1])[0] for s in (source, result)
    ]
    body = body_mask(hu[0], source.pixel_mm)
    if body is None:
        return _Slice(*(np.full_like(a, AIR_HU) for a in hu), np.zeros(hu[0].shape, bool))
    bad = ~body | (hu[0] > BONE_HU) | (hu[1] > BONE_HU)
    if source.padding is not None:
        bad |= source.padding[z]
    around = ndimage.distance_transform_edt(~body, sampling=source.pixel_mm) > AROUND_MM
    inside = ndimage.distance_transform_edt(~bad, sampling=source.pixel_mm) > 5.0
    images = []
    for image, series in zip(hu, (source, result), strict=True):
        floor = clip_floor(series.hu[z : z + 1], None if series.padding is None else series.padding[z : z + 1])
        if np.isfinite(floor):
            image, known = _unclipped(image, floor, source.pixel_mm)
            inside &= known
        images.append(np.where(around, np.float32(AIR_HU), image))
    return _Slice(*images, inside)


def _unclipped(hu: np.ndarray, floor: float, pixel_mm: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Noise that a file clips at `floor` lifts the mean; taken back by what Gaussian noise of the local mean and SD
    would have lost. Also where so little was clipped that this holds."""
    sigma = 3.0 / np.array(pixel_mm)
    share = ndimage.gaussian_filter((hu <= floor).astype(np.float32), sigma)
    mean = ndimage.gaussian_filter(hu, sigma)
    detail = hu - ndimage.gaussian_filter(hu, 1.0 / np.array(pixel_mm))
    power = np.square(detail)
    usual = np.median(power[hu > floor]) / 0.455  # of a squared Gaussian the median is 0.455 times the variance
    sd = np.sqrt(np.maximum(ndimage.gaussian_filter(np.minimum(power, 9 * usual), sigma), 1.0))  # edges are no noise
    depth = (mean - floor) / sd
    lift = sd * (np.exp(-(depth**2) / 2) / np.sqrt(2 * np.pi) - depth * special.ndtr(-depth))
    airway = ndimage.gaussian_filter((hu <= floor + sd).astype(np.float32), 1.5 / np.array(pixel_mm)) > CLIPPED_SHARE
    away = ndimage.distance_transform_edt(~airway, sampling=pixel_mm) > 6.0
    return hu - np.where(share > 0, lift, 0).astype(np.float32), away


def _plain(value: float, digits: int) -> float | None:
    return round(float(value), digits) if np.isfinite(value) else None
