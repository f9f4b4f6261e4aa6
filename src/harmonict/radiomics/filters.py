"""Filtered images: recursive Laplacian of Gaussian and undecimated wavelet, as PyRadiomics feeds them to its features.

Both work on the ROI and a margin around it, so that a whole-lung CT never needs a second full-size image.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from harmonict.core import HarmonictError
from harmonict.radiomics.discretise import bounding_box
from harmonict.radiomics.jit import compiled

# Farnebäck and Westin, "Improving Deriche-style recursive Gaussian filters" (J. Math. Imaging Vis. 26, 2006): the
# fourth-order fit of the Gaussian (row 0) and of its second derivative (row 1); W, L are common to both.
A1, B1 = (1.3530, -1.3563), (1.8151, 5.2318)
A2, B2 = (-0.3531, 0.3446), (0.0902, -2.2355)
W1, L1, W2, L2 = 0.6681, -1.3932, 2.0787, -1.3732

# The slowest mode decays as exp(L2 x / sigma): after 16 sigma 3e-10 of an edge's height is left.
MARGIN_SIGMAS = 16.0
WAVELET_MARGIN = 8  # voxels; more than the longest reach (6) of coif1 at level 1


def _numerator(sigma: float, order: int) -> np.ndarray:
    """N0..N3 of the causal filter; `order` 0 = Gaussian, 1 = second derivative. sigma in voxels."""
    a1, b1, a2, b2 = A1[order], B1[order], A2[order], B2[order]
    sin1, sin2 = np.sin(W1 / sigma), np.sin(W2 / sigma)
    cos1, cos2 = np.cos(W1 / sigma), np.cos(W2 / sigma)
    exp1, exp2 = np.exp(L1 / sigma), np.exp(L2 / sigma)
    n0 = a1 + a2
    n1 = exp2 * (b2 * sin2 - (a2 + 2 * a1) * cos2) + exp1 * (b1 * sin1 - (a1 + 2 * a2) * cos1)
    n2 = (a1 + a2) * cos2 * cos1
    n2 -= b1 * cos2 * sin1 + b2 * cos1 * sin2
    n2 *= 2 * exp1 * exp2
    n2 += a2 * exp1 * exp1 + a1 * exp2 * exp2
    n3 = exp2 * exp1 * exp1 * (b2 * sin2 - a2 * cos2)
    n3 += exp1 * exp2 * exp2 * (b1 * sin1 - a1 * cos1)
    return np.array([n0, n1, n2, n3])


def _denominator(sigma: float) -> np.ndarray:
    """D1..D4, shared by the Gaussian and its derivatives."""
    cos1, cos2 = np.cos(W1 / sigma), np.cos(W2 / sigma)
    exp1, exp2 = np.exp(L1 / sigma), np.exp(L2 / sigma)
    d4 = exp1 * exp1 * exp2 * exp2
    d3 = -2 * cos1 * exp1 * exp2 * exp2
    d3 += -2 * cos2 * exp2 * exp1 * exp1
    d2 = 4 * cos2 * cos1 * exp1 * exp2
    d2 += exp1 * exp1 + exp2 * exp2
    d1 = -2 * (exp2 * cos2 + exp1 * cos1)
    return np.array([d1, d2, d3, d4])


def _moments(n: np.ndarray) -> tuple[float, float, float]:
    """Sum, first and second moment of the numerator."""
    return n[0] + n[1] + n[2] + n[3], n[1] + 2 * n[2] + 3 * n[3], n[1] + 4 * n[2] + 9 * n[3]


def recursive_coefficients(sigma_voxels: float, *, derivative: int, scale: float = 1.0) -> np.ndarray:
    """(20,) N0..N3, D1..D4, M1..M4, BN1..BN4, BM1..BM4 of the recursive Gaussian or its second derivative.

    sigma_voxels: standard deviation in voxels of the filtered axis. derivative: 0 or 2. scale: factor on the result.
    The Gaussian has unit sum; the second derivative has zero sum and second moment 2. Source: Farnebäck and Westin
    2006, with the boundary treatment (the edge value goes on forever) of Deriche's recursive filter.
    """
    d = _denominator(sigma_voxels)
    sd = 1.0 + d[0] + d[1] + d[2] + d[3]
    dd = d[0] + 2 * d[1] + 3 * d[2] + 4 * d[3]
    ed = d[0] + 4 * d[1] + 9 * d[2] + 16 * d[3]
    n = _numerator(sigma_voxels, 0)
    if derivative == 0:
        alpha = 2 * _moments(n)[0] / sd - n[0]
    else:
        n2 = _numerator(sigma_voxels, 1)
        s0, d0, e0 = _moments(n)
        s2, d2, e2 = _moments(n2)
        beta = -(2 * s2 - sd * n2[0]) / (2 * s0 - sd * n[0])
        n = n2 + beta * n
        sn, dn, en = s2 + beta * s0, d2 + beta * d0, e2 + beta * e0
        alpha = en * sd * sd - ed * sn * sd - 2 * dn * dd * sd + 2 * dd * dd * sn
        alpha /= sd * sd * sd
    n = n * (scale / alpha)
    m = np.array([n[1] - d[0] * n[0], n[2] - d[1] * n[0], n[3] - d[2] * n[0], -d[3] * n[0]])
    sn, sm = n.sum(), m.sum()
    return np.concatenate([n, d, m, d * sn / sd, d * sm / sd])


@compiled
def _filter_lines(source, coefficients, out):
    """Causal plus anticausal pass along the last axis of (lines, length); sums in float64, results in float32."""
    n0, n1, n2, n3, d1, d2, d3, d4, m1, m2, m3, m4, bn1, bn2, bn3, bn4, bm1, bm2, bm3, bm4 = coefficients
    lines, length = source.shape
    forward = np.empty(length)
    backward = np.empty(length)
    for line in range(lines):
        x = source[line]
        e = np.float64(x[0])
        for i in range(length):
            x0 = np.float64(x[i])
            x1 = np.float64(x[i - 1]) if i > 0 else e
            x2 = np.float64(x[i - 2]) if i > 1 else e
            x3 = np.float64(x[i - 3]) if i > 2 else e
            y1 = forward[i - 1] * d1 if i > 0 else e * bn1
            y2 = forward[i - 2] * d2 if i > 1 else e * bn2
            y3 = forward[i - 3] * d3 if i > 2 else e * bn3
            y4 = forward[i - 4] * d4 if i > 3 else e * bn4
            forward[i] = (x0 * n0 + x1 * n1 + x2 * n2 + x3 * n3) - (y1 + y2 + y3 + y4)
        e = np.float64(x[length - 1])
        for k in range(length):
            i = length - 1 - k
            x1 = np.float64(x[i + 1]) if k > 0 else e
            x2 = np.float64(x[i + 2]) if k > 1 else e
            x3 = np.float64(x[i + 3]) if k > 2 else e
            x4 = np.float64(x[i + 4]) if k > 3 else e
            y1 = backward[i + 1] * d1 if k > 0 else e * bm1
            y2 = backward[i + 2] * d2 if k > 1 else e * bm2
            y3 = backward[i + 3] * d3 if k > 2 else e * bm3
            y4 = backward[i + 4] * d4 if k > 3 else e * bm4
            backward[i] = (x1 * m1 + x2 * m2 + x3 * m3 + x4 * m4) - (y1 + y2 + y3 + y4)
        for i in range(length):
            out[line, i] = np.float32(forward[i] + backward[i])


def _along(image: np.ndarray, axis: int, coefficients: np.ndarray) -> np.ndarray:
    moved = np.ascontiguousarray(np.moveaxis(image, axis, -1))
    out = np.empty(moved.shape, np.float32)
    _filter_lines(moved.reshape(-1, moved.shape[-1]), tuple(coefficients), out.reshape(-1, moved.shape[-1]))
    return np.moveaxis(out, -1, axis)


def laplacian_of_gaussian(image: np.ndarray, spacing_mm: tuple[float, float, float], *, sigma_mm: float) -> np.ndarray:
    """Scale-normalised Laplacian of Gaussian, float32 (z, y, x), of an image in the same order.

    sigma_mm: standard deviation of the Gaussian. Recursive fourth-order filters, each pass rounded to float32, the
    result times sigma^2: the arithmetic of ITK's LaplacianRecursiveGaussianImageFilter, which PyRadiomics calls.

    Raises HarmonictError for fewer than 4 voxels along an axis or a sigma that does not fit the image.
    """
    if not sigma_mm > 0:
        raise HarmonictError(f"LoG sigma must be above 0 mm, got {sigma_mm}")
    need = [max(4, int(np.ceil(sigma_mm / s)) + 1) for s in spacing_mm]
    if any(have < least for have, least in zip(image.shape, need, strict=True)):
        raise HarmonictError(
            f"LoG with sigma {sigma_mm:g} mm needs at least {tuple(need)} voxels (z, y, x), the image has "
            f"{image.shape}: take a smaller sigma, more slices or leave the LoG filter out"
        )
    total = np.zeros(image.shape, np.float32)
    # axes in the order x, y, z: the order of the additions decides the last bit
    for axis in (2, 1, 0):
        sigma = sigma_mm / spacing_mm[axis]
        part = _along(image, axis, recursive_coefficients(sigma, derivative=2, scale=sigma_mm * sigma_mm))
        for other in (2, 1, 0):
            if other != axis:
                smooth = recursive_coefficients(sigma_mm / spacing_mm[other], derivative=0)
                part = _along(part, other, smooth)
        total = (total.astype(np.float64) + part.astype(np.float64) * (1.0 / spacing_mm[axis] ** 2)).astype(np.float32)
    return total


def _log_crop(
    hu: np.ndarray, box: list[tuple[int, int]], spacing_mm: tuple[float, float, float], sigma_mm: float
) -> np.ndarray:
    margin = [int(np.ceil(MARGIN_SIGMAS * sigma_mm / s)) for s in spacing_mm]
    wide = [(max(lo - m, 0), min(hi + m, n)) for (lo, hi), m, n in zip(box, margin, hu.shape, strict=True)]
    image = laplacian_of_gaussian(hu[tuple(slice(lo, hi) for lo, hi in wide)], spacing_mm, sigma_mm=sigma_mm)
    return image[tuple(slice(lo - w, hi - w) for (lo, hi), (w, _) in zip(box, wide, strict=True))]


def _wavelet_crop(
    hu: np.ndarray, box: list[tuple[int, int]], wavelet: str, axes: tuple[int, ...]
) -> Iterator[tuple[str, np.ndarray]]:
    import pywt

    # PyRadiomics repeats the first voxel after an odd axis and then lets the wavelet wrap around: the same periodic
    # image is read here around the ROI only.
    data = hu
    inner = []
    for axis, (lo, hi) in enumerate(box):
        n = hu.shape[axis]
        period = n + n % 2
        if axis not in axes:
            data = np.take(data, np.arange(lo, hi), axis=axis)
            inner.append(slice(None))
            continue
        count = hi - lo + 2 * WAVELET_MARGIN
        count += count % 2
        index = np.arange(lo - WAVELET_MARGIN, lo - WAVELET_MARGIN + count) % period
        data = np.take(data, np.where(index == n, 0, index), axis=axis)
        inner.append(slice(WAVELET_MARGIN, WAVELET_MARGIN + hi - lo))
    bands = pywt.swtn(data.astype(np.float64), wavelet, level=1, start_level=0, axes=axes)[0]
    low = "a" * len(axes)
    for name in [*(n for n in bands if n != low), low]:  # the approximation comes last, as in PyRadiomics
        yield "wavelet-" + name.replace("a", "L").replace("d", "H"), bands[name][tuple(inner)]


def filtered_images(
    hu: np.ndarray,
    mask: np.ndarray,
    spacing_mm: tuple[float, float, float],
    *,
    filters: tuple[str, ...],
    log_sigma_mm: tuple[float, ...],
    wavelet: str,
    in_plane: bool,
) -> Iterator[tuple[str, np.ndarray]]:
    """(PyRadiomics' image name, filtered image cropped to the mask's bounding box), one at a time.

    hu, mask: (z, y, x). filters: of "Original", "LoG", "Wavelet", in this order of output. log_sigma_mm: one image
    each, named `log-sigma-3-0-mm-3D`. wavelet: a PyWavelets name; one undecimated level along x, y and, unless
    `in_plane`, z; letters of the name in the order x, y, z, `L` low and `H` high.
    Original and wavelet images are float64, LoG images float32 as ITK makes them.
    """
    box = bounding_box(mask)
    if "Original" in filters:
        yield "original", hu[tuple(slice(lo, hi) for lo, hi in box)].astype(np.float64)
    if "LoG" in filters:
        for sigma in log_sigma_mm:
            name = f"log-sigma-{str(float(sigma)).replace('.', '-')}-mm-3D"
            yield name, _log_crop(hu, box, spacing_mm, float(sigma))
    if "Wavelet" in filters:
        yield from _wavelet_crop(hu, box, wavelet, (2, 1) if in_plane else (2, 1, 0))
