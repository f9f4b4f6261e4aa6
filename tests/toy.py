"""Toy images: a round patient with lungs, blurred and noisy, whose true blur is known."""

import numpy as np
from scipy import ndimage

from harmonict.core import Geometry, ScanProtocol, Series


def toy_series(
    *, blur_mm=0.8, noise_hu=8.0, slices=3, size=256, pixel_mm=1.2, seed=0, kernel="B30", padding=False, name="toy"
):
    """A water disc of 115 mm radius with two lungs, Gaussian point spread of `blur_mm` SD, noise of the same blur."""
    rng = np.random.default_rng(seed)
    fine = 4
    axis = (np.arange(size * fine) - (size * fine - 1) / 2) * pixel_mm / fine
    y, x = np.meshgrid(axis, axis, indexing="ij")
    body = np.where(np.hypot(y / 0.9, x) < 115, 40.0, -1000.0)
    body[np.hypot(y / 1.4, abs(x) - 50) < 38] = -850
    body[np.hypot(y - 60, x) < 15] = 400
    body = ndimage.gaussian_filter(body, blur_mm / pixel_mm * fine, mode="nearest")
    body = body.reshape(size, fine, size, fine).mean((1, 3))
    hu = np.empty((slices, size, size), np.float32)
    for z in range(slices):
        noise = ndimage.gaussian_filter(rng.standard_normal((size, size)), blur_mm / pixel_mm)
        hu[z] = body + noise_hu * noise / noise.std()
    mask = None
    if padding:
        outside = np.hypot(y, x)[::fine, ::fine] > size * pixel_mm / 2
        mask = np.broadcast_to(outside, hu.shape).copy()
        hu[mask] = -2048
    geometry = Geometry((0.0, 0.0, 0.0), (3.0, pixel_mm, pixel_mm))
    return Series(np.round(hu), geometry, ScanProtocol(kernel=kernel), mask, name=name, patient="toy")
