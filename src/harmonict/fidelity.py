"""Fidelity: a harmonized image, filtered back to the source, must be the source. The guard against invented structure.

A kernel change is a filter: what the result shows below the frequencies that both kernels pass must be in the source
too. The transfer from result back to source, one radial curve a series, is taken from the two images themselves; a
nodule that was planted or removed in a few slices hardly moves it. What is left over after filtering back, low-passed
to the shared band, is the residual. It is judged against the source's own measured noise in that band: a method that
takes noise out leaves a residual as large as that noise and no larger. Blobs and straight steps are looked for with
matched filters. All but the residual map is computed on a grid as coarse as the band allows.
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
WARN_PEAK, FAIL_PEAK = 6.5, 9.0  # the largest blob, in units of its noise
WARN_SEAM, FAIL_SEAM = 5.0, 8.0  # the largest mean step along a piece of a row or column, in units of its noise
BLOBS_MM = (1.5, 3.0)  # Gaussian SD of the structures that are looked for: nodules of about 4 and 8 mm
STEP_MM, ALONG_MM = 2.0, 8.0  # Gaussian SD of the seams that are looked for, across and along
SEAM_MM = 100.0  # a seam is at least about so long
SEAM_CAP = 5.0  # what a point of a seam may add, in units of its noise: anatomy has steps that are large and short
LEVELS = (
    0.6,
    1.5,
)  # of the source's noise: the residual's own level in a slice is the yardstick within these
LOWEST_BAND_PER_MM = 0.1
AIR_HU, BONE_HU = -1000.0, 900.0
AROUND_MM = 10.0  # beyond this distance from the patient everything is taken as air
MARGIN_MM = 5.0  # a filter reaches so far over skin, padding and metal
CLIPPED_SHARE = 0.4  # of the pixels about a point: air that noise cannot be told of any more
OUTSIDE_WINDOW_SHARE = 0.1  # of the pixels about a point: there the method left the source's HU
TAPER_PER_MM = 0.05
TRANSFER_ERROR = 0.03  # of the local contrast: one radial curve is not exact at every edge
ANATOMY_IN_NOISE = 1.1  # SD of the spectrum against that of uniform patches
MIRRORED = 24  # pixels that continue an image beyond its borders, so that its FFT sees no step there
COARSE = 4  # pixels: the grid of local noise and clipped air


@dataclass(frozen=True, eq=False)
class Fidelity:
    """What `check_fidelity` found.

    band_per_mm: up to where both images show structure. noise_hu: the source's noise SD within the band.
    rmse_hu: (z,) in-band RMSE inside the patient; NaN where there is none. peak: (z,) the largest blob of the residual
    in units of its noise. peak_yx_mm: (z, 2) where it lies, from the first pixel. seam: (z,) the piece of a row
    or column with the largest step, in units of its noise. seam_mm: (z,) where it lies; seam_axis: (z,) "row",
    "column" or "". verdict: (z,) pass, warn, fail or "none". residual_hu: (z, y, x) float32, positive where the result
    has more than the source.
    """

    band_per_mm: float
    noise_hu: float
    rmse_hu: np.ndarray
    peak: np.ndarray
    peak_yx_mm: np.ndarray
    seam: np.ndarray
    seam_mm: np.ndarray
    seam_axis: tuple[str, ...]
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
                "seam": _plain(self.seam[z], 1),
                "seam_at": f"{self.seam_axis[z]} at {self.seam_mm[z]:.1f} mm" if self.seam_axis[z] else None,
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

    def note(self) -> str:
        """One line for the user where slices did not pass, else nothing."""
        found = [(word, [z for z, v in enumerate(self.verdict) if v == word]) for word in ("fail", "warn")]
        words = [f"{len(z)} of {len(self.verdict)} slices {word} (first: slice {z[0]})" for word, z in found if z]
        return f"fidelity to the source: {', '.join(words)}" if words else ""


def check_fidelity(
    source: Series,
    result: Series,
    *,
    band_per_mm: float | None = None,
    noise: NoiseSpectrum | None = None,
    window_hu: tuple[float, float] | None = None,
) -> Fidelity:
    """Compare `result`, filtered back to the kernel of `source`, with `source`, both (z, y, x) HU on one grid.

    band_per_mm: the shared band; default: the lower f50 of the two images, measured at the skin. noise: the source's
    spectrum; default: measured in its soft tissue. window_hu: outside of it the method left the source as it was;
    those voxels count for nothing. Raises HarmonictError where the grids differ or no noise can be measured.
    """
    if source.hu.shape != result.hu.shape:
        raise HarmonictError(f"fidelity: source {source.hu.shape} and result {result.hu.shape} differ in their grid")
    noise = noise or source_noise(source)
    band = band_per_mm or _shared_band(source, result)
    grid = _Grid.of(source.hu.shape[1:], source.pixel_mm, band)  # type: ignore[arg-type]
    low_pass = np.clip((band + TAPER_PER_MM / 2 - grid.radius) / TAPER_PER_MM, 0, 1).astype(np.float32)

    def look(z: int) -> _Look | None:
        return _look(source, result, z, grid, window_hu)

    some = spread_slices(len(source.hu), 12)
    kept = dict(zip(some, in_threads(look, some), strict=True))
    back = _transfer(list(kept.values()), grid) * low_pass
    power = noise.at(grid.radius) * low_pass**2
    noise_hu = grid.sd(power)
    blobs = [np.exp(-2 * (np.pi * grid.radius * mm) ** 2).astype(np.float32) for mm in BLOBS_MM]
    steps = [_step(grid.fy, grid.fx), _step(grid.fx, grid.fy)]
    sds = [grid.sd(power * np.abs(f) ** 2) for f in (*blobs, *steps)]
    residual = np.empty(source.hu.shape, np.float32)

    def judge(z: int) -> tuple[float, float, tuple[float, float], float, float, str, str]:
        one = kept[z] if z in kept else look(z)
        if one is None or not one.inside.any():
            residual[z] = 0
            return np.nan, np.nan, (np.nan, np.nan), np.nan, np.nan, "", "none"
        expected = one.source * low_pass
        spectrum = one.result * back - expected
        residual[z] = np.where(one.inside_full, grid.fine(spectrum), 0)
        inside = one.inside
        coarse = np.where(inside, grid.image(spectrum), np.float32(0))
        rmse = float(np.sqrt(np.mean(np.square(coarse[inside], dtype=np.float64))))
        spectrum = fft.rfft2(coarse)
        scores = []
        for shape, sd in zip((*blobs, *steps), sds, strict=True):
            found = grid.image(spectrum * shape)
            edges = _local_sd(grid.image(expected * shape), grid.pixel_mm)
            level = sd * one.louder
            own = float(np.median(np.abs(found[inside]) / level[inside])) / 0.6745  # of a Gaussian: its SD
            level = level * np.clip(own, *LEVELS)
            scores.append(np.where(inside, found / np.hypot(level, TRANSFER_ERROR * edges), 0))
        worst = np.maximum.reduce([np.abs(score) for score in scores[: len(blobs)]])
        y, x = np.unravel_index(int(np.argmax(worst)), worst.shape)
        seams = [_seam(scores[-2], inside, grid.pixel_mm), _seam(scores[-1].T, inside.T, grid.pixel_mm[::-1])]
        axis = int(seams[1][0] > seams[0][0])
        seam, at = seams[axis]
        return (
            rmse,
            float(worst[y, x]),
            (y * grid.pixel_mm[0], x * grid.pixel_mm[1]),
            seam,
            at,
            ("row", "column")[axis],
            _verdict(rmse / noise_hu, float(worst[y, x]), seam),
        )

    rows = in_threads(judge, range(len(residual)))
    rmse, peak, where, seam, at, axis, verdict = zip(*rows, strict=True)
    return Fidelity(
        band,
        noise_hu,
        np.array(rmse),
        np.array(peak),
        np.array(where),
        np.array(seam),
        np.array(at),
        axis,
        verdict,
        residual,
    )


def _verdict(rmse: float, peak: float, seam: float) -> str:
    if rmse > FAIL_RMSE or peak > FAIL_PEAK or seam > FAIL_SEAM:
        return "fail"
    return "warn" if rmse > WARN_RMSE or peak > WARN_PEAK or seam > WARN_SEAM else "pass"


def source_noise(source: Series) -> NoiseSpectrum:
    """The measured spectrum; where anatomy got into it (few slices), that of filtered back-projection, f MTF^2, with
    the measured SD."""
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


@dataclass(frozen=True, eq=False)
class _Grid:
    """The coarsest grid that holds the band, and the half spectra (rfft2's order) of images on it.

    shape: of the slice; full: with its mirrored border; size: the same area in coarse pixels of pixel_mm. radius, fy,
    fx: frequencies of the half spectrum, 1/mm.
    """

    shape: tuple[int, int]
    full: tuple[int, int]
    size: tuple[int, int]
    pixel_mm: tuple[float, float]
    fy: np.ndarray
    fx: np.ndarray
    radius: np.ndarray
    places: tuple[np.ndarray, np.ndarray]  # the slice's pixel at each coarse row and column
    within: np.ndarray  # coarse pixels that lie on the slice

    @classmethod
    def of(cls, shape: tuple[int, int], pixel_mm: tuple[float, float], band_per_mm: float) -> _Grid:
        full, size, coarse_mm, places, within = [], [], [], [], []
        for n, mm in zip(shape, pixel_mm, strict=True):
            whole = fft.next_fast_len(n + min(MIRRORED, n - 1), real=True)
            needed = int(np.ceil(2 * whole * mm * (band_per_mm + TAPER_PER_MM / 2))) + 2
            small = min(fft.next_fast_len(needed, real=True), whole)
            place = np.rint(np.arange(small) * whole / small).astype(int)
            full.append(whole)
            size.append(small)
            coarse_mm.append(whole * mm / small)
            within.append(place < n)
            places.append(np.minimum(place, n - 1))
        fy = np.fft.fftfreq(size[0], coarse_mm[0])[:, None]
        fx = np.fft.rfftfreq(size[1], coarse_mm[1])[None]
        return cls(
            shape,
            tuple(full),
            tuple(size),
            tuple(coarse_mm),
            fy,
            fx,
            np.hypot(fy, fx),
            tuple(places),
            np.outer(*within),
        )

    def crop(self, image: np.ndarray) -> np.ndarray:
        """Half spectrum, on the coarse grid, of a slice (y, x) that is continued by its mirror image."""
        border = [(0, full - n) for full, n in zip(self.full, self.shape, strict=True)]
        spectrum = fft.rfft2(np.pad(np.asarray(image, np.float32), border, "reflect"))
        half = (self.size[0] + 1) // 2
        rows = np.concatenate([spectrum[:half], spectrum[self.full[0] - (self.size[0] - half) :]])
        scale = np.float32(self.size[0] * self.size[1] / (self.full[0] * self.full[1]))
        return rows[:, : self.size[1] // 2 + 1] * scale

    def fine(self, spectrum: np.ndarray) -> np.ndarray:
        """(y, x) on the slice's own grid."""
        half = (self.size[0] + 1) // 2
        whole = np.zeros((self.full[0], self.full[1] // 2 + 1), np.complex64)
        whole[:half, : spectrum.shape[1]] = spectrum[:half]
        whole[self.full[0] - (self.size[0] - half) :, : spectrum.shape[1]] = spectrum[half:]
        scale = np.float32(self.full[0] * self.full[1] / (self.size[0] * self.size[1]))
        return fft.irfft2(whole * scale, self.full)[: self.shape[0], : self.shape[1]]

    def image(self, spectrum: np.ndarray) -> np.ndarray:
        return fft.irfft2(spectrum, self.size)

    def pick(self, image: np.ndarray, step: int = 1) -> np.ndarray:
        """A map of the slice, given at every `step`-th pixel, at the coarse pixels."""
        rows, columns = (np.minimum(place // step, n - 1) for place, n in zip(self.places, image.shape, strict=True))
        return image[np.ix_(rows, columns)]

    def sd(self, power: np.ndarray) -> float:
        """SD of noise whose spectrum (HU^2 mm^2) is given on the half plane."""
        columns = np.full(power.shape[1], 2.0)  # all but the first (and Nyquist's) stand for two
        columns[0] = 1.0
        if self.size[1] % 2 == 0:
            columns[-1] = 1.0
        area = 1 / (self.size[0] * self.pixel_mm[0] * self.size[1] * self.pixel_mm[1])
        return float(np.sqrt(np.sum(power * columns) * area))


def _step(across: np.ndarray, along: np.ndarray) -> np.ndarray:
    """The matched filter of a straight step: difference of both sides, averaged along it."""
    a, b = 2 * np.pi * across * STEP_MM, 2 * np.pi * along * ALONG_MM
    return (1j * a * np.exp(-(a**2) / 2 - b**2 / 2)).astype(np.complex64)


def _seam(score: np.ndarray, inside: np.ndarray, pixel_mm: tuple[float, float]) -> tuple[float, float]:
    """(score, place in mm) of the piece of a row, `SEAM_MM` long, with the largest mean step: the scores along it, each
    capped, summed in units of the sum's noise. What lies outside adds nothing."""
    length = max(1, round(SEAM_MM / pixel_mm[1]))
    capped = np.clip(np.where(inside, score, 0), -SEAM_CAP, SEAM_CAP)
    summed = np.pad(np.cumsum(capped, 1), ((0, 0), (1, 0)))
    length = min(length, capped.shape[1])
    correlated_mm = 2 * np.sqrt(np.pi) * ALONG_MM
    total = np.abs(summed[:, length:] - summed[:, :-length]) * pixel_mm[1] / np.sqrt(SEAM_MM * correlated_mm)
    row = int(np.argmax(total.max(1)))
    return float(total[row].max()), row * pixel_mm[0]


def _transfer(looks: list[_Look | None], grid: _Grid) -> np.ndarray:
    """The radial filter that turns the result into the source with the least error."""
    step = 2.0 / min(n * mm for n, mm in zip(grid.size, grid.pixel_mm, strict=True))
    ring = np.rint(grid.radius / step).astype(np.intp)
    cross, power = np.zeros(ring.max() + 1), np.zeros(ring.max() + 1)
    for one in looks:
        if one is not None:
            cross += np.bincount(ring.ravel(), (one.source * one.result.conj()).real.ravel(), len(cross))
            power += np.bincount(ring.ravel(), (np.abs(one.result) ** 2).ravel(), len(power))
    curve = cross / np.maximum(power, 1e-9)
    return np.interp(grid.radius / step, np.arange(len(curve)), curve).astype(np.float32)


def _local_sd(image: np.ndarray, pixel_mm: tuple[float, float]) -> np.ndarray:
    sigma = 4.0 / np.array(pixel_mm)
    mean = ndimage.gaussian_filter(image, sigma, truncate=3.0)
    square = ndimage.gaussian_filter(np.square(image), sigma, truncate=3.0)
    return np.sqrt(np.maximum(square - np.square(mean), 0))


@dataclass(frozen=True, eq=False)
class _Look:
    """Both images of one slice as spectra (of HU above air, everything around the patient made air), and where a filter
    is all that may have happened: in the patient, away from skin, padding, metal and air that a file clipped.

    louder: how much louder than usual the noise is. inside_full: on the slice's own grid.
    """

    source: np.ndarray
    result: np.ndarray
    inside: np.ndarray
    louder: np.ndarray
    inside_full: np.ndarray


def _look(source: Series, result: Series, z: int, grid: _Grid, window_hu: tuple[float, float] | None) -> _Look | None:
    """None where there is no patient."""
    pixel_mm, shape = np.array(source.pixel_mm), source.hu.shape[1:]
    padding = None if source.padding is None else source.padding[z]
    hu = [
        fill_padding(s.hu[z : z + 1], None if s.padding is None else s.padding[z : z + 1])[0] for s in (source, result)
    ]
    body = body_mask(hu[0], source.pixel_mm)
    if body is None:
        return None
    bad = ~body | (hu[0] > BONE_HU) | (hu[1] > BONE_HU)
    if padding is not None:
        bad |= padding
    half_mm = 2 * pixel_mm
    around = _distance(~body[::2, ::2], half_mm) > AROUND_MM
    inside = _distance(~_any_of_four(bad), half_mm) > MARGIN_MM
    if window_hu is not None:
        left = (hu[0] < window_hu[0]) | (hu[0] > window_hu[1])
        share = ndimage.gaussian_filter(_blocks(left.astype(np.float32)), 3.0 / (COARSE * pixel_mm))
        inside &= _half(share, inside.shape) < OUTSIDE_WINDOW_SHARE
    around_full = _double(around, shape)
    detail = np.square(hu[0] - ndimage.gaussian_filter(hu[0], 1.0 / pixel_mm, truncate=3.0))
    images = []
    for image, series in zip(hu, (source, result), strict=True):
        floor = clip_floor(series.hu[z], None if series.padding is None else series.padding[z])
        if np.isfinite(floor):
            power = detail
            if series is result:
                power = np.square(image - ndimage.gaussian_filter(image, 1.0 / pixel_mm, truncate=3.0))
            lift, known = _clipping(image, power, floor, source.pixel_mm)
            image = image - _spread(lift, shape)
            inside &= _half(known, inside.shape)
        images.append(np.where(around_full, np.float32(0), image - np.float32(AIR_HU)))
    inside_full = _double(inside, shape)
    return _Look(
        grid.crop(images[0]),
        grid.crop(images[1]),
        grid.pick(inside_full) & grid.within,
        grid.pick(_louder(hu[0], detail, inside_full, source.pixel_mm), COARSE),
        inside_full,
    )


def _louder(source: np.ndarray, detail: np.ndarray, inside: np.ndarray, pixel_mm: tuple[float, float]) -> np.ndarray:
    """How much louder the noise is than in most of the patient's soft tissue, at every COARSE-th pixel: it is loudest
    where most was absorbed. Edges are capped; vessels of the lung may count for noise, never for less than half.
    """
    tissue = detail[inside & (np.abs(source) < 200)]
    tissue = tissue if tissue.size else detail[inside] if inside.any() else detail
    usual = max(float(np.median(tissue)) / 0.455, 1e-6)  # of a squared Gaussian the median is 0.455 times the variance
    local = ndimage.gaussian_filter(_blocks(np.minimum(detail, 9 * usual)), 10.0 / (COARSE * np.array(pixel_mm)))
    return np.sqrt(np.clip(local / usual, 0.25, None))


def _clipping(
    hu: np.ndarray, detail: np.ndarray, floor: float, pixel_mm: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """At every COARSE-th pixel: by how many HU noise that a file clips at `floor` lifts the mean, which is what
    Gaussian noise of the local mean and SD would lose; and where so little was clipped that this holds."""
    mm = COARSE * np.array(pixel_mm)
    sigma = 3.0 / mm
    usual = np.median(detail[hu > floor]) / 0.455
    sd = np.sqrt(np.maximum(ndimage.gaussian_filter(_blocks(np.minimum(detail, 9 * usual)), sigma), 1.0))
    mean = ndimage.gaussian_filter(_blocks(hu), sigma)
    depth = (mean - floor) / sd
    lift = sd * (np.exp(-(depth**2) / 2) / np.sqrt(2 * np.pi) - depth * special.ndtr(-depth))
    lift[ndimage.gaussian_filter(_blocks((hu <= floor).astype(np.float32)), sigma) <= 0] = 0
    near = hu <= floor + _spread(sd, hu.shape)
    airway = ndimage.gaussian_filter(_blocks(near.astype(np.float32)), 1.5 / mm) > CLIPPED_SHARE
    away = _distance(~airway, mm) > 6.0
    return lift.astype(np.float32), away


def _distance(mask: np.ndarray, pixel_mm: np.ndarray) -> np.ndarray:
    """Millimetres to the nearest pixel that is not in the mask; infinite where there is none."""
    if mask.all():
        return np.full(mask.shape, np.inf)
    return ndimage.distance_transform_edt(mask, sampling=pixel_mm)


def _blocks(image: np.ndarray) -> np.ndarray:
    """Means of COARSE x COARSE pixels; the last rows and columns are continued."""
    border = [(0, -n % COARSE) for n in image.shape]
    image = np.pad(image, border, "edge") if any(b for _, b in border) else image
    y, x = (n // COARSE for n in image.shape)
    return image.reshape(y, COARSE, x, COARSE).mean((1, 3))


def _spread(coarse: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A map of blocks on the slice's own grid, linear between the blocks' centres."""
    for axis, n in enumerate(shape):
        place = (np.arange(n) - (COARSE - 1) / 2) / COARSE
        low = np.clip(np.floor(place).astype(int), 0, max(coarse.shape[axis] - 2, 0))
        share = np.clip(place - low, 0, 1).astype(np.float32)
        share = share[:, None] if axis == 0 else share
        above = np.minimum(low + 1, coarse.shape[axis] - 1)
        coarse = coarse.take(low, axis) * (1 - share) + coarse.take(above, axis) * share
    return coarse


def _half(coarse: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A map of blocks at every second pixel."""
    times = COARSE // 2
    return np.repeat(np.repeat(coarse, times, 0), times, 1)[: shape[0], : shape[1]]


def _double(half: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.repeat(np.repeat(half, 2, 0), 2, 1)[: shape[0], : shape[1]]


def _any_of_four(mask: np.ndarray) -> np.ndarray:
    """(y, x) -> every second row and column, True where any of the four pixels is."""
    odd = [(0, n % 2) for n in mask.shape]
    mask = np.pad(mask, odd)
    return mask[::2, ::2] | mask[1::2, ::2] | mask[::2, 1::2] | mask[1::2, 1::2]


def _plain(value: float, digits: int) -> float | None:
    return round(float(value), digits) if np.isfinite(value) else None
