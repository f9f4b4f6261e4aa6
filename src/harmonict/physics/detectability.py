"""Detectability of a small lesion: one number from MTF and noise spectrum."""

from __future__ import annotations

import numpy as np
from scipy.special import j1

from harmonict.core import HarmonictError
from harmonict.physics.kernel import Kernel
from harmonict.physics.nps import NoiseSpectrum

VIEWING_MM = 500.0
ALPHA = 1e-8


def disc_task(frequency_per_mm: np.ndarray, *, diameter_mm: float, contrast_hu: float) -> np.ndarray:
    """Fourier transform of a disc, HU mm^2, at radial frequencies: C d J1(pi d f) / (2 f), at 0 its area times C."""
    f = np.asarray(frequency_per_mm, float)
    x = np.pi * diameter_mm * f
    shape = np.where(x > 1e-8, 2 * j1(np.maximum(x, 1e-8)) / np.maximum(x, 1e-8), 1.0)
    return contrast_hu * np.pi * diameter_mm**2 / 4 * shape


def eye_filter(frequency_per_mm: np.ndarray, *, viewing_mm: float = VIEWING_MM) -> np.ndarray:
    """The eye's response E (Burgess 1994, as in Richard and Siewerdsen 2008): r^1.3 exp(-c r^2), r in cycles per degree
    at the viewing distance, c so that it is highest at 4 cycles per degree; scaled to 1 there.
    """
    r = np.asarray(frequency_per_mm, float) * viewing_mm * np.pi / 180
    c = 1.3 / (2 * 4.0**2)
    return (r / 4.0) ** 1.3 * np.exp(-c * (r**2 - 4.0**2))


def detectability(
    mtf: Kernel,
    nps: NoiseSpectrum,
    *,
    diameter_mm: float = 4.0,
    contrast_hu: float = 100.0,
    viewing_mm: float = VIEWING_MM,
    alpha: float = ALPHA,
    eye: bool = True,
) -> float:
    """Detectability index d' of a disc in a uniform background (Zarei et al., eq 9, whose left side is d'^2).

    d'^2 = integral of W^2 MTF^2 E^2 / (E^2 NPS + alpha D^2) over the frequency plane, up to the last frequency of the
    noise spectrum: W the disc's Fourier transform (HU mm^2), NPS in HU^2 mm^2, E the eye filter, D the viewing distance
    in mm (500: images shown at life size). The defaults are the paper's task: 4 mm, 100 HU, alpha 1e-8. The paper does
    not give E and D. eye=False: E = 1 and no internal noise, the prewhitening observer.
    Raises HarmonictError for a diameter, contrast or distance that is not above 0.
    """
    for name, value in (("diameter", diameter_mm), ("contrast", contrast_hu), ("viewing distance", viewing_mm)):
        if not value > 0:
            raise HarmonictError(f"d': the {name} must be above 0, got {value:g}")
    f = np.linspace(0, nps.frequency_per_mm[-1], 2001)[1:]
    signal = (disc_task(f, diameter_mm=diameter_mm, contrast_hu=contrast_hu) * mtf.at(f)) ** 2
    noise = np.maximum(nps.at(f), 1e-12)
    if eye:
        e2 = eye_filter(f, viewing_mm=viewing_mm) ** 2
        integrand = signal * e2 / (e2 * noise + alpha * viewing_mm**2)
    else:
        integrand = signal / noise
    return float(np.sqrt(np.trapezoid(2 * np.pi * f * integrand, f)))
