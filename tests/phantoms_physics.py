"""Analytic images of known blur for the physics tests."""

import functools

import numpy as np

from harmonict.core import Geometry, Series
from harmonict.dicom.read import read_series
from harmonict.volumes import read_volume


def gaussian_mtf(frequency, f50):
    return np.exp(-np.log(2) * (np.asarray(frequency) / f50) ** 2)


def sharp_mtf(frequency, f50):
    """An edge-enhancing kernel: over 1 in the middle, then a steep fall."""
    f = np.asarray(frequency)
    mtf = lambda f: (1 + 1.2 * (f / 0.3) ** 2 * np.exp(-((f / 0.35) ** 2))) * np.exp(-((f / 0.62) ** 4))  # noqa: E731
    grid = np.linspace(0, 2, 4001)
    return mtf(f * np.interp(-0.5, -mtf(grid)[600:], grid[600:]) / f50)


def blurred(fine, mtf, *, pixel_mm, fine_factor):
    """An object sampled at pixel_mm / fine_factor, filtered with `mtf` (cycles per mm), sampled at pixel centres."""
    step = pixel_mm / fine_factor
    n = fine.shape[0]
    f = np.hypot(np.fft.fftfreq(n, step)[:, None], np.fft.rfftfreq(n, step)[None])
    image = np.fft.irfft2(np.fft.rfft2(fine + 1000) * mtf(f), fine.shape) - 1000
    return image[fine_factor // 2 :: fine_factor, fine_factor // 2 :: fine_factor]


def soft_edge(distance, step):
    """Share of a pixel of side `step` that lies on the positive side of an edge at signed `distance`."""
    return np.clip(distance / step + 0.5, 0, 1)


def disc(*, radius_mm, size, pixel_mm, inside=0.0, outside=-1000.0, centre_mm=(0.0, 0.0), fine_factor=4):
    """A disc on the fine grid, edges soft by one fine pixel."""
    step = pixel_mm / fine_factor
    axis = (np.arange(size * fine_factor) - size * fine_factor / 2) * step
    r = np.hypot(axis[:, None] - centre_mm[0], axis[None] - centre_mm[1])
    return outside + (inside - outside) * soft_edge(radius_mm - r, step)


def patient_slice(
    mtf, *, size=384, pixel_mm=0.9, skin_hu=30.0, skin_mm=1.7, fat_hu=-105.0, noise_hu=0.0, rng=None, grown_mm=0.0
):
    """A wavy oval body: skin over fat over muscle, two lungs; noise with the spectrum |f| MTF^2. grown_mm: the skin
    lies farther out by so much on one side, not at all on the other."""
    factor = 4
    step = pixel_mm / factor
    axis = (np.arange(size * factor) - size * factor / 2) * step
    y, x = axis[:, None] * 1.25, axis[None]
    angle = np.arctan2(y, x)
    radius = np.hypot(y, x)
    edge = 0.40 * size * pixel_mm * (1 + 0.03 * np.cos(3 * angle + 1) + 0.01 * np.sin(7 * angle))
    # Distance to the border to first order.
    depth = (edge - radius) / np.hypot(x / radius.clip(1), 1.25 * y / radius.clip(1)).clip(0.1)
    depth = depth + grown_mm * (1 + np.cos(angle)) / 2
    fine = np.full(depth.shape, -1000.0)
    fine += (skin_hu + 1000) * soft_edge(depth, step)
    fine += (fat_hu - skin_hu) * soft_edge(depth - skin_mm, step)
    fine += (40 - fat_hu) * soft_edge(depth - 15, step)
    for side in (-1, 1):
        lung = 0.13 * size * pixel_mm - np.hypot(y / 1.3, x - side * 0.19 * size * pixel_mm)
        fine += (-860 - 40) * soft_edge(lung, step)
    image = blurred(fine, mtf, pixel_mm=pixel_mm, fine_factor=factor)
    if noise_hu:
        image = image + noise_hu * ramp_noise(image.shape, mtf, pixel_mm, rng)
    return image


def ramp_noise(shape, mtf, pixel_mm, rng):
    """Noise of SD 1 with the spectrum of filtered back-projection, |f| MTF^2."""
    f = np.hypot(np.fft.fftfreq(shape[0], pixel_mm)[:, None], np.fft.rfftfreq(shape[1], pixel_mm)[None])
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * np.sqrt(f) * mtf(f), shape)
    return noise / noise.std()


def series_of(slices, pixel_mm, name="phantom", **more):
    hu = np.stack(slices).astype(np.float32)
    return Series(hu, Geometry(spacing_mm=(3.0, pixel_mm, pixel_mm)), name=name, **more)


@functools.cache
def real_pairs(data):
    """The public kernel pairs, name -> Series of one slice: B10 B30 B50 B70, FC13-00000016 and so on."""
    found = {
        # Two of the four headers say 1.0 mm.
        k: read_volume(data / "paired" / "siemens-chest" / f"{k}.mha", spacing_mm=0.693359)
        for k in ("B10", "B30", "B50", "B70")
    }
    for path in sorted((data / "paired" / "canon-lungman").glob("*/*.dcm")):
        found[f"{path.parent.name}-{path.stem}"] = read_series([path])
    return found
