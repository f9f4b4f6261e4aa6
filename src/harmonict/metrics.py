"""Numbers that say how alike two images, or two lists of measurements, are.

Every function takes the reference first. Arrays are compared in float64, element by element; `mask` (bool, the shape
of the arrays) restricts them to a region. NaN and infinity are refused: a metric of them would be a silent NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from skimage.metrics import structural_similarity

from harmonict.core import HarmonictError

SSIM_WINDOW = 11  # pixels: Gaussian, sigma 1.5, cut at radius 5 (Wang et al. 2004, section III-B)
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


class BlandAltman(NamedTuple):
    """Bias and 95 % limits of agreement of `value - reference`, in the unit of the values."""

    n: int
    bias: float
    sd: float
    lower: float
    upper: float


def mae(reference: ArrayLike, image: ArrayLike, *, mask: np.ndarray | None = None) -> float:
    """Mean absolute error, in the unit of the images."""
    ref, img = _pair(reference, image, mask)
    return float(np.mean(np.abs(img - ref)))


def bias(reference: ArrayLike, image: ArrayLike, *, mask: np.ndarray | None = None) -> float:
    """Mean of `image - reference`, in the unit of the images."""
    ref, img = _pair(reference, image, mask)
    return float(np.mean(img - ref))


def psnr(reference: ArrayLike, image: ArrayLike, *, data_range: float, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(data_range^2 / MSE) (CVH-CT eq 10); infinite for equal images.

    data_range: the peak: the width of the range that the values can take, in their unit (2024 for HU in [-1024, 1000]).
    """
    ref, img = _pair(reference, image, mask)
    mse = np.mean((img - ref) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(_range(data_range) ** 2 / mse))


def nrmse(reference: ArrayLike, image: ArrayLike, *, data_range: float, mask: np.ndarray | None = None) -> float:
    """Root mean square error divided by `data_range` (not by the reference's own mean or spread)."""
    ref, img = _pair(reference, image, mask)
    return float(np.sqrt(np.mean((img - ref) ** 2)) / _range(data_range))


def ncc(reference: ArrayLike, image: ArrayLike, *, mask: np.ndarray | None = None) -> float:
    """Normalised cross-correlation, mean-free (Pearson's r): -1 to 1, blind to offset and scale.

    Where one of the images is constant r does not exist: 1 if the images are equal, else 0.
    """
    ref, img = _pair(reference, image, mask)
    if np.array_equal(ref, img):
        return 1.0
    return _cosine(ref - ref.mean(), img - img.mean())


def ncc_uncentred(reference: ArrayLike, image: ArrayLike, *, data_min: float, mask: np.ndarray | None = None) -> float:
    """Cross-correlation that is not mean-free, as CVH-CT's eq 12 prints it: sum(xy) / sqrt(sum(x^2) sum(y^2)).

    data_min: the value that counts as 0. The paper scales its images to [0, 1]; the scale cancels, the zero does not:
    the same images score higher the lower it lies. Not comparable with `ncc`.
    """
    ref, img = _pair(reference, image, mask)
    if np.array_equal(ref, img):
        return 1.0
    return _cosine(ref - data_min, img - data_min)


def ssim_map(reference: ArrayLike, image: ArrayLike, *, data_range: float) -> np.ndarray:
    """Structural similarity of one slice (y, x) at every pixel: float64 (y, x). See `ssim`.

    The window hangs over the edge in the outer 5 pixels (mirrored there); `ssim` leaves those out.
    """
    ref, img = _pair(reference, image, None)
    if ref.ndim != 2 or min(ref.shape) < SSIM_WINDOW:
        raise HarmonictError(f"SSIM needs a slice of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {ref.shape}")
    _, full = structural_similarity(
        ref,
        img,
        data_range=_range(data_range),
        gaussian_weights=True,
        sigma=SSIM_SIGMA,
        use_sample_covariance=False,
        K1=SSIM_K1,
        K2=SSIM_K2,
        full=True,
    )
    return full


def ssim(reference: ArrayLike, image: ArrayLike, *, data_range: float, mask: np.ndarray | None = None) -> float:
    """Mean structural similarity (Wang et al. 2004), -1 to 1.

    At each pixel, with a Gaussian window of 11 x 11 pixels (sigma 1.5) and population moments,
    `(2 mu_x mu_y + c1) (2 sigma_xy + c2) / ((mu_x^2 + mu_y^2 + c1) (sigma_x^2 + sigma_y^2 + c2))`,
    c1 = (0.01 data_range)^2, c2 = (0.03 data_range)^2: sums in the denominator and the covariance in the numerator
    (CVH-CT's eq 11 is misprinted). A stack (z, y, x) is compared slice by slice.
    The mean is over the pixels whose window lies inside the slice and, with a mask, whose centre lies in the mask.
    """
    ref, img = _pair(reference, image, None)
    if ref.ndim == 2:
        ref, img, mask = ref[None], img[None], None if mask is None else np.asarray(mask)[None]
    inside = np.zeros(ref.shape, bool)
    edge = SSIM_WINDOW // 2
    inside[:, edge:-edge, edge:-edge] = True
    if mask is not None:
        inside &= _mask(mask, ref.shape)
    if not inside.any():
        raise HarmonictError("SSIM: the mask has no pixel whose 11 x 11 window lies inside the slice")
    total = 0.0
    for r, i, keep in zip(ref, img, inside, strict=True):
        if keep.any():
            total += float(ssim_map(r, i, data_range=data_range)[keep].sum())
    return total / int(inside.sum())


def ccc(reference: ArrayLike, value: ArrayLike) -> float:
    """Lin's concordance correlation coefficient (Lin 1989) of two lists of at least two numbers, -1 to 1.

    `2 s_xy / (s_x^2 + s_y^2 + (m_x - m_y)^2)` with population moments, as Lin estimates it (the denominator is
    misprinted in RadiomicGAN eq 1 and CVH-CT eq 9). Lists that are equal to 12 digits have CCC 1, constant ones too;
    a constant list against anything else has 0.
    """
    ref, val = _pair(reference, value, None)
    if ref.size < 2:
        raise HarmonictError(f"CCC needs at least two pairs of values, got {ref.size}")
    if np.allclose(ref, val, rtol=1e-12, atol=0):
        return 1.0
    # a common scale keeps squares of very large or small features in range, and cancels
    scale = max(np.abs(ref).max(), np.abs(val).max())
    ref, val = ref.ravel() / scale, val.ravel() / scale
    r, v = ref - ref.mean(), val - val.mean()
    return float(2 * np.mean(r * v) / (np.mean(r * r) + np.mean(v * v) + (ref.mean() - val.mean()) ** 2))


def relative_error(reference: ArrayLike, value: ArrayLike) -> np.ndarray:
    """`|value - reference| / |reference|`, element by element (DiffusionCT eq 1, STAN-CT eq 8).

    Both papers print the denominator without the bars: a negative feature would have a negative error. A reference of
    0 gives 0 where the value is 0 too, else infinity.
    """
    ref, val = _pair(reference, value, None)
    error = np.abs(val - ref)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, error / np.abs(ref))


def bland_altman(reference: ArrayLike, value: ArrayLike) -> BlandAltman:
    """Bias and 95 % limits of agreement, bias +- 1.96 SD of the differences (Bland and Altman 1986; SD with n - 1)."""
    ref, val = _pair(reference, value, None)
    if ref.size < 2:
        raise HarmonictError(f"Bland-Altman limits need at least two pairs of values, got {ref.size}")
    difference = (val - ref).ravel()
    mean, sd = float(difference.mean()), float(difference.std(ddof=1))
    return BlandAltman(difference.size, mean, sd, mean - 1.96 * sd, mean + 1.96 * sd)


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    norm = np.sqrt(np.sum(x * x)) * np.sqrt(np.sum(y * y))
    return 0.0 if norm == 0 else float(np.clip(np.sum(x * y) / norm, -1, 1))


def _pair(reference: ArrayLike, image: ArrayLike, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    ref, img = np.asarray(reference, np.float64), np.asarray(image, np.float64)
    if ref.shape != img.shape:
        raise HarmonictError(f"the two images must have one shape, got {ref.shape} and {img.shape}")
    if mask is not None:
        keep = _mask(mask, ref.shape)
        ref, img = ref[keep], img[keep]
    if ref.size == 0:
        raise HarmonictError("nothing to compare: the image or the mask is empty")
    if not (np.isfinite(ref).all() and np.isfinite(img).all()):
        raise HarmonictError("NaN or infinite values cannot be compared")
    return ref, img


def _mask(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.shape != shape or mask.dtype != bool:
        raise HarmonictError(
            f"the mask must be bool with the shape of the images, {shape}, got {mask.dtype} {mask.shape}"
        )
    return mask


def _range(data_range: float) -> float:
    if not (np.isfinite(data_range) and data_range > 0):
        raise HarmonictError(f"data_range must be a number above 0, got {data_range}")
    return float(data_range)
