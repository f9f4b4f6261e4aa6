"""Image quality of a harmonized image against its reference: one table, slice by slice, whole image and body.

All figures are of HU clipped to `hu_range`, whose width is the peak of PSNR and the data range of SSIM and NRMSE; the
range stands in the table beside them, because they mean nothing without it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import ndimage

from harmonict import metrics
from harmonict.core import HarmonictError, Series

BODY_ABOVE_HU = -400.0
BODY_SMOOTHING = 1.5  # pixels, SD of the in-plane Gaussian
BODY_OPENING = 7  # pixels, side of the square
BODY_CLOSING = 11  # pixels, side of the square
ROUNDING_NOISE_HU2 = 1 / 12  # variance of a whole-HU rounding: no file holds less, so no spectrum is taken below it

MEASURES = ("psnr_db", "ssim", "nrmse", "ncc", "mae_hu", "bias_hu", "spectrum_error_db")


def body_mask(hu: np.ndarray, *, is_volume: bool = True) -> np.ndarray:
    """The patient in an image: bool, the shape of `hu` (z, y, x) or (y, x); all False where nothing is denser than air.

    In-plane Gaussian smoothing of 1.5 pixels SD; above -400 HU; opened with a square of 7 x 7 pixels in plane (takes
    off the table and tubes); the largest component, joined by faces, of the volume (of each slice for
    `is_volume=False`); closed with a square of 11 x 11 pixels in plane; holes filled slice by slice, so lungs belong
    to the body. The image's edge neither erodes nor dilates a body that is cut there.
    """
    hu = np.asarray(hu)
    if hu.ndim == 2:
        return body_mask(hu[None])[0]
    smooth = ndimage.gaussian_filter1d(hu.astype(np.float32, copy=False), BODY_SMOOTHING, axis=1)
    smooth = ndimage.gaussian_filter1d(smooth, BODY_SMOOTHING, axis=2)
    mask = smooth > BODY_ABOVE_HU
    del smooth
    mask = _dilate(_erode(mask, BODY_OPENING), BODY_OPENING)
    if is_volume:
        mask = _largest_component(mask)
    else:
        mask = np.stack([_largest_component(part) for part in mask])
    mask = _erode(_dilate(mask, BODY_CLOSING), BODY_CLOSING)
    return np.stack([_fill_holes(part) for part in mask])


def compare(
    reference: Series | np.ndarray,
    image: Series | np.ndarray,
    *,
    hu_range: tuple[float, float] = (-1024, 1000),
    body: np.ndarray | None = None,
) -> pd.DataFrame:
    """Image quality of `image` against `reference`, two Series or two HU arrays (z, y, x) on one grid.

    Rows: each slice ("0", "1", ...), then "mean" and "sd" over slices (n - 1; empty for one slice), each for the
    regions "whole" (every pixel, padding included) and "body" (`body_mask` of the reference, or `body`, bool (z, y, x);
    a slice without body has `pixels` 0, empty values and no part in the mean). Columns: slice, region, pixels,
    psnr_db, ssim, nrmse, ncc (mean-free), mae_hu, bias_hu (image - reference), spectrum_error_db (whole only), hu_min,
    hu_max. Formulas: `harmonict.metrics`, `spectrum_error_db`.

    Raises HarmonictError where the grids differ or `hu_range` is no range.
    """
    ref, img, name = _same_grid(reference, image)
    low, high = hu_range
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise HarmonictError(f"the HU range must be two numbers, the lower first, got {low} and {high}")
    if body is None:
        is_volume = reference.is_volume if isinstance(reference, Series) else True
        body = body_mask(np.clip(ref, low, high), is_volume=is_volume)
    elif body.shape != ref.shape or body.dtype != bool:
        raise HarmonictError(f"{name}: the body mask must be bool with the shape of the image, {ref.shape}")

    pixel_mm = reference.pixel_mm if isinstance(reference, Series) else (1.0, 1.0)
    rows = []
    for z in range(len(ref)):
        r, i = (np.clip(a[z].astype(np.float64), low, high) for a in (ref, img))
        for region, measures in _measure_slice(r, i, body[z], high - low, pixel_mm).items():
            rows.append({"slice": str(z), "region": region, **measures})
    table = pd.DataFrame(rows)
    parts = [table]
    for name_of, reduce in (("mean", pd.DataFrame.mean), ("sd", pd.DataFrame.std)):
        for region, part in table.groupby("region", sort=False):
            # equal images have an infinite PSNR: their mean is infinite, their SD empty
            with np.errstate(invalid="ignore"):
                summary = reduce(part[list(MEASURES)])
            parts.append(
                pd.DataFrame([{"slice": name_of, "region": region, "pixels": part["pixels"].sum(), **summary}])
            )
    return pd.concat(parts, ignore_index=True).assign(hu_min=float(low), hu_max=float(high))


def radial_power_spectrum(slice_hu: np.ndarray, *, pixel_mm: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Radial power spectrum of one slice (y, x): frequency in 1/mm and power in HU^2.

    Mean taken off, 2-D Hann window, |DFT|^2 over the sum of the squared window (white noise of variance s^2 has the
    power s^2 everywhere), averaged over rings from above 0 to the Nyquist frequency of the coarser axis; the ring's
    width is one frequency step of the shorter side.
    """
    window = np.outer(*(np.hanning(n + 1)[:n] for n in slice_hu.shape))
    power = np.abs(np.fft.rfft2(window * (slice_hu - slice_hu.mean()))) ** 2 / np.sum(window**2)
    fy = np.fft.fftfreq(slice_hu.shape[0], pixel_mm[0])
    fx = np.fft.rfftfreq(slice_hu.shape[1], pixel_mm[1])
    # the half spectrum holds its inner columns once for two
    twice = np.full(len(fx), 2.0)
    twice[0] = 1
    if slice_hu.shape[1] % 2 == 0:
        twice[-1] = 1
    step = 1 / min(n * d for n, d in zip(slice_hu.shape, pixel_mm, strict=True))
    rings = int(np.floor(0.5 / max(pixel_mm) / step))
    ring = np.rint(np.hypot(fy[:, None], fx[None, :]) / step).astype(int)
    weight = np.broadcast_to(twice, ring.shape)
    total = np.bincount(ring.ravel(), (power * weight).ravel())[1 : rings + 1]
    count = np.bincount(ring.ravel(), weight.ravel())[1 : rings + 1]
    return step * np.arange(1, rings + 1), total / count


def spectrum_error_db(reference: np.ndarray, image: np.ndarray, *, pixel_mm: tuple[float, float] = (1.0, 1.0)) -> float:
    """RMS over frequency, up to Nyquist, of 10 log10(power of the image / power of the reference), in dB.

    Slices (y, x) in HU. It sees texture where pixel errors do not: an image that is too smooth scores badly here and
    well there. Both powers have 1/12 HU^2 added, the noise of rounding to whole HU.
    """
    _, ref = radial_power_spectrum(np.asarray(reference, np.float64), pixel_mm=pixel_mm)
    _, img = radial_power_spectrum(np.asarray(image, np.float64), pixel_mm=pixel_mm)
    ratio = 10 * np.log10((img + ROUNDING_NOISE_HU2) / (ref + ROUNDING_NOISE_HU2))
    return float(np.sqrt(np.mean(ratio**2)))


def _measure_slice(
    ref: np.ndarray, img: np.ndarray, body: np.ndarray, data_range: float, pixel_mm: tuple[float, float]
) -> dict[str, dict[str, float]]:
    similarity = metrics.ssim_map(ref, img, data_range=data_range)
    edge = metrics.SSIM_WINDOW // 2
    inside = np.zeros(ref.shape, bool)
    inside[edge:-edge, edge:-edge] = True
    result = {}
    for region, mask in (("whole", np.ones(ref.shape, bool)), ("body", body)):
        if not (mask & inside).any():
            result[region] = {"pixels": 0, **dict.fromkeys(MEASURES, np.nan)}
            continue
        result[region] = {
            "pixels": int(mask.sum()),
            "psnr_db": metrics.psnr(ref, img, data_range=data_range, mask=mask),
            "ssim": float(similarity[mask & inside].mean()),
            "nrmse": metrics.nrmse(ref, img, data_range=data_range, mask=mask),
            "ncc": metrics.ncc(ref, img, mask=mask),
            "mae_hu": metrics.mae(ref, img, mask=mask),
            "bias_hu": metrics.bias(ref, img, mask=mask),
            "spectrum_error_db": spectrum_error_db(ref, img, pixel_mm=pixel_mm) if region == "whole" else np.nan,
        }
    return result


def _same_grid(reference: Series | np.ndarray, image: Series | np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    if isinstance(reference, Series) and isinstance(image, Series):
        name = image.name or "image"
        if reference.hu.shape != image.hu.shape:
            raise HarmonictError(
                f"{name} has {image.hu.shape} voxels (z, y, x), its reference {reference.name or ''} "
                f"{reference.hu.shape}: give images of one grid"
            )
        if not reference.geometry.same_grid(image.geometry):
            raise HarmonictError(
                f"{name} does not lie where its reference {reference.name or ''} lies: {_where(image)} and "
                f"{_where(reference)}; if a header lies, give the true pixel spacing"
            )
        return reference.hu, image.hu, name
    if isinstance(reference, Series) or isinstance(image, Series):
        raise HarmonictError("compare two Series or two arrays, not one of each: an array does not say where it lies")
    ref, img = np.asarray(reference), np.asarray(image)
    if ref.shape != img.shape or ref.ndim not in (2, 3):
        raise HarmonictError(f"the image and its reference must have one shape (z, y, x), got {img.shape}, {ref.shape}")
    return (ref[None], img[None], "image") if ref.ndim == 2 else (ref, img, "image")


def _where(series: Series) -> str:
    spacing = " x ".join(f"{s:.4g}" for s in series.geometry.spacing_mm)
    origin = ", ".join(f"{o:.1f}" for o in series.geometry.origin_mm)
    return f"voxels of {spacing} mm from ({origin}) mm"


def _erode(mask: np.ndarray, size: int) -> np.ndarray:
    for axis in (-2, -1):
        mask = ndimage.minimum_filter1d(mask.view(np.uint8), size, axis=axis, mode="nearest").view(bool)
    return mask


def _dilate(mask: np.ndarray, size: int) -> np.ndarray:
    for axis in (-2, -1):
        mask = ndimage.maximum_filter1d(mask.view(np.uint8), size, axis=axis, mode="nearest").view(bool)
    return mask


def _largest_component(mask: np.ndarray) -> np.ndarray:
    labels, n = ndimage.label(mask)
    if n < 2:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()


def _fill_holes(mask: np.ndarray) -> np.ndarray:
    """Background of a slice (y, x) that does not reach the image's edge becomes mask."""
    labels, n = ndimage.label(~mask)
    outside = np.zeros(n + 1, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        outside[edge] = True
    outside[0] = False
    return ~outside[labels]
