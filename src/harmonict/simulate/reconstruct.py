"""Reconstruction: raw data of a slice -> HU with any kernel, filtered back-projection or iterative.

One ramp-filtered image is made per raw data and grid, finer than the output by a whole factor so that it holds every
frequency that a kernel passes. A kernel is then one radial filter on its spectrum, and the output pixels are samples of
the filtered image, so what a kernel passes above the output's Nyquist limit is aliased as a scanner does it (sampling
is a folding of the spectrum).

A named kernel is the MTF of the whole system as it would be measured: the filter divides the scanner's own blur out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numba
import numpy as np
from scipy import fft, ndimage

from harmonict.core import Geometry, HarmonictError, ScanProtocol, Series
from harmonict.physics.kernel import Kernel
from harmonict.simulate.kernels import get_kernel, kernel_vendor
from harmonict.simulate.materials import mu_water_per_mm
from harmonict.simulate.scanner import (
    Projections,
    Scanner,
    dose_mgy,
    expose,
    line_integrals,
    mgy_per_mas,
    needed,
    noise_rng,
    polar_grid,
    slice_profile,
)

# Where the scanner's own blur passes less than this, the filter stops making up for it.
_LEAST_BLUR = 0.1
# Margin of the ramp image beyond the field, in output pixels: a radial filter wraps around there and not in the field.
_MARGIN = 12
_TABLE = 8192


@dataclass(frozen=True, eq=False)
class RampImage:
    """The ramp-filtered image of one raw data on a fine grid, as its spectrum, and how noisy it is.

    spectrum: complex64 (m, m // 2 + 1), `rfft2` of the attenuation (1/mm); m = oversampling * (matrix + 2 * margin).
    pixel_mm, matrix: the output grid. oversampling: fine pixels per output pixel.
    band_per_mm: what lies above this frequency is not in the spectrum.
    """

    spectrum: np.ndarray
    pixel_mm: float
    matrix: int
    margin: int
    oversampling: int
    band_per_mm: float
    centre_mm: tuple[float, float]
    projections: Projections

    @cached_property
    def noise(self) -> np.ndarray:
        """SD of the noise in HU at each output pixel, margin included, for a filter with unit integral of (f H)^2."""
        return _noise_map(self.projections, self.matrix + 2 * self.margin, self.pixel_mm, self.centre_mm)


def filter_response(kernel: Kernel, scanner: Scanner, frequency_per_mm: np.ndarray) -> np.ndarray:
    """What the reconstruction multiplies the ramp image with: the kernel's MTF over the scanner's own blur."""
    return kernel.at(frequency_per_mm) / np.maximum(scanner.blur_mtf(frequency_per_mm), _LEAST_BLUR)


def system_mtf(kernel: Kernel, scanner: Scanner) -> Kernel:
    """The MTF of the whole chain, filter x focal spot x detector, in closed form.

    It is the kernel's own curve wherever the scanner's blur passes a tenth or more, and less beyond. Output pixels are
    samples and take nothing away.
    """
    frequency = np.union1d(kernel.frequency_per_mm, np.linspace(0.0, band_per_mm(kernel), 201))
    chain = filter_response(kernel, scanner, frequency) * scanner.blur_mtf(frequency)
    return Kernel(kernel.name, frequency, chain, f"{kernel.name}: filter x focal spot x detector")


def band_per_mm(kernel: Kernel) -> float:
    """The frequency above which the kernel passes nothing."""
    passed = np.nonzero(np.abs(kernel.mtf) > 1e-6)[0]
    last = passed[-1] + 1
    return float(kernel.frequency_per_mm[last] if last < kernel.mtf.size else 1.1 * kernel.frequency_per_mm[-1])


def ramp_image(
    projections: Projections,
    *,
    fov_mm: float,
    matrix: int = 512,
    band_per_mm: float = 1.0,
    centre_mm: tuple[float, float] = (0.0, 0.0),
) -> RampImage:
    """Filtered back-projection with the bare ramp, on a grid that holds frequencies up to `band_per_mm`.

    fov_mm / matrix is the output's pixel; centre_mm (y, x) is the middle of the output field from the isocentre.
    Raises HarmonictError where the field or matrix is not above 0 or the field is wider than the scanner's.
    """
    scanner = projections.scanner
    if matrix < 1 or not fov_mm > 0:
        raise HarmonictError(f"a reconstruction needs a field and a matrix above 0, got {fov_mm:g} mm, {matrix}")
    if fov_mm > scanner.fov_mm * (1 + 1e-6):
        raise HarmonictError(f"field of view {fov_mm:g} mm is wider than the scanner's {scanner.fov_mm:g} mm")
    pixel = fov_mm / matrix
    band = min(band_per_mm, scanner.nyquist_per_mm)
    oversampling = max(1, int(np.ceil(2 * pixel * band - 1e-6)))
    margin = (int(fft.next_fast_len(matrix + 2 * _MARGIN, real=True)) - matrix) // 2
    size = oversampling * (matrix + 2 * margin)
    # the first fine pixel of a group sits on the output pixel's centre
    fine = pixel / oversampling
    lag = (oversampling - 1) * fine / 2
    centre = (centre_mm[0] + lag, centre_mm[1] + lag)
    polar = polar_grid(scanner, (size, size), fine, centre)
    weights = _ramp(scanner, polar.padded)[: polar.frequency_per_mm.size]
    image = polar.synthesise(polar.to_polar(projections.line_integrals) * weights)
    return RampImage(
        spectrum=fft.rfft2(image),
        pixel_mm=pixel,
        matrix=matrix,
        margin=margin,
        oversampling=oversampling,
        band_per_mm=min(0.5 / fine, scanner.nyquist_per_mm),
        centre_mm=centre_mm,
        projections=projections,
    )


@lru_cache(maxsize=4)
def _ramp(scanner: Scanner, padded: int) -> np.ndarray:
    """Weights of the frequencies of a view: angle step x frequency step x |f|, both halves, sample pitch included.

    |f| is the transform of the sampled band-limited ramp (Ramachandran and Lakshminarayanan), which has no offset.
    """
    n = np.arange(padded)
    n = np.minimum(n, padded - n)
    taps = np.zeros(padded)
    taps[0] = 0.25
    odd = n % 2 == 1
    taps[odd] = -1.0 / (np.pi * n[odd]) ** 2
    ramp = fft.rfft(taps).real / scanner.pitch_mm
    step = 1.0 / (padded * scanner.pitch_mm)
    weights = np.pi / scanner.views * step * scanner.pitch_mm * ramp * 2.0
    weights[0] /= 2.0
    return weights.astype(np.float32)


def _noise_map(projections: Projections, size: int, pixel_mm: float, centre_mm: tuple[float, float]) -> np.ndarray:
    """SD in HU at each output pixel for a filter with unit integral of (f H)^2: the variances, back-projected.

    Noise in a slice varies slowly, so the variances are smoothed to 8 mm.
    """
    scanner = projections.scanner
    coarse, step = int(np.ceil(size * pixel_mm / 8.0)) + 1, 8.0
    polar = polar_grid(scanner, (coarse, coarse), step, centre_mm)
    smooth = 2.0 * polar.step_per_mm * scanner.pitch_mm * np.exp(-((polar.frequency_per_mm * 2 * step) ** 2))
    smooth[0] /= 2.0
    total = polar.synthesise(polar.to_polar(projections.variance()) * smooth.astype(np.float32))
    total = np.maximum(total, 0.02 * total.max())
    position = ((np.arange(size) - (size - 1) / 2) * pixel_mm) / step + (coarse - 1) / 2
    variance = ndimage.map_coordinates(total, np.meshgrid(position, position, indexing="ij"), order=1, mode="nearest")
    scale = np.pi / scanner.views * np.sqrt(scanner.pitch_mm) * 1000.0 / mu_water_per_mm(projections.kvp)
    return (scale * np.sqrt(variance)).astype(np.float32)


def reconstruct(
    raw: Projections | RampImage,
    kernel: Kernel,
    *,
    fov_mm: float | None = None,
    matrix: int = 512,
    iterative_strength: float = 0.0,
    aliasing: bool = True,
    centre_mm: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """HU of one slice, float32 (matrix, matrix), unrounded.

    raw: projections, with `fov_mm`; or a ramp image made once for many kernels, which has its own grid.
    iterative_strength: 0 is filtered back-projection, up to 5 the strengths of `iterate`.
    aliasing: False leaves out what the kernel passes above the output's Nyquist limit, so that two kernels of one
        acquisition differ by nothing but the ratio of their MTFs.

    Raises HarmonictError on a strength outside 0..5 or a kernel that passes more than the ramp image holds.
    """
    if not 0 <= iterative_strength <= 5:
        raise HarmonictError(
            f"iterative strength must be from 0 (filtered back-projection) to 5, got {iterative_strength:g}"
        )
    if isinstance(raw, Projections):
        if fov_mm is None:
            raise HarmonictError("a reconstruction from projections needs fov_mm")
        raw = ramp_image(raw, fov_mm=fov_mm, matrix=matrix, band_per_mm=band_per_mm(kernel), centre_mm=centre_mm)
    scanner = raw.projections.scanner
    if min(band_per_mm(kernel), scanner.nyquist_per_mm) > raw.band_per_mm * (1 + 1e-6):
        raise HarmonictError(
            f"kernel {kernel.name} passes frequencies up to {band_per_mm(kernel):.3g} per mm, the ramp image holds "
            f"{raw.band_per_mm:.3g}; make it with band_per_mm={band_per_mm(kernel):.3g}"
        )
    size = raw.matrix + 2 * raw.margin
    fine = raw.pixel_mm / raw.oversampling
    index, reach = _radius_index(raw.oversampling * size, fine)
    table = filter_response(kernel, scanner, np.arange(_TABLE + 1) * (reach / _TABLE)).astype(np.float32)
    if not aliasing:
        index = np.where(_below_nyquist(raw.oversampling * size, raw.oversampling), index, np.int16(_TABLE + 1))
        table = np.append(table, np.float32(0.0))
    folded = fold(raw.spectrum, index, table, raw.oversampling)
    water = mu_water_per_mm(raw.projections.kvp)
    hu = fft.irfft2(folded, (size, size)) * np.float32(1000.0 / water) - np.float32(1000.0)
    if iterative_strength > 0:
        hu = iterate(hu, raw, kernel, iterative_strength, aliasing=aliasing)
    inner = slice(raw.margin, raw.margin + raw.matrix)
    return np.ascontiguousarray(hu[inner, inner])


@lru_cache(maxsize=4)
def _radius_index(size: int, pixel_mm: float) -> tuple[np.ndarray, float]:
    """For every frequency of an `rfft2` spectrum its place in a table of `_TABLE` steps that ends at `reach` per mm."""
    y = fft.fftfreq(size, pixel_mm)
    x = fft.rfftfreq(size, pixel_mm)
    radius = np.hypot(y[:, None], x[None, :])
    reach = float(radius.max())
    return np.rint(radius * (_TABLE / reach)).astype(np.int16), reach


@numba.njit(cache=True)
def fold(spectrum: np.ndarray, index: np.ndarray, table: np.ndarray, factor: int) -> np.ndarray:
    """Filter an image's `rfft2` spectrum and keep every `factor`-th pixel of it (from the first), as a spectrum again.

    Each frequency is multiplied with table[index] and lands on the one that the coarse grid cannot tell it from.
    """
    size, half = spectrum.shape
    small = size // factor
    top = small // 2
    out = np.zeros((small, top + 1), np.complex64)
    scale = np.float32(1.0 / factor**2)
    for r in range(size):
        to, mirrored = r % small, (size - r) % small
        for c in range(half):
            gain = table[index[r, c]]
            if gain == 0.0:
                continue
            value = spectrum[r, c] * (gain * scale)
            if c % small <= top:
                out[to, c % small] += value
            if 0 < c and 2 * c != size and (size - c) % small <= top:  # the half that an rfft2 leaves out
                out[mirrored, (size - c) % small] += value.conjugate()
    return out


@lru_cache(maxsize=4)
def _below_nyquist(size: int, factor: int) -> np.ndarray:
    """Which frequencies of an `rfft2` spectrum lie below the Nyquist limit of every `factor`-th pixel, bool."""
    limit = size // factor / 2
    row = np.abs(fft.fftfreq(size, 1 / size))
    return (row[:, None] < limit) & (np.arange(size // 2 + 1) < limit)


# Noise that strengths 0 to 5 leave in flat regions, as a share of filtered back-projection's (an emulation: vendors'
# scales run in steps of about a tenth to a half at the top).
_NOISE_LEFT = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_UPDATES = 12
# The Fair potential turns from quadratic to linear around this many SDs of the noise's own pixel differences, and for
# noise as large as that it pulls on average as a quadratic weaker by E[1 / (1 + |t| / 1.5)], t normal.
_EDGE_SD = 1.5
_FAIR_PULL = 0.694


def iterate(hu: np.ndarray, raw: RampImage, kernel: Kernel, strength: float, *, aliasing: bool = True) -> np.ndarray:
    """Model-based iterative reconstruction by penalised weighted least squares in the image domain.

    Minimises over x: 1/2 |W (x - FBP)|^2 + beta sum of psi(neighbour differences of x / sigma). W is the statistical
    weight of the data seen from the image, A^T diag(1/variance) A taken as shift-invariant around each pixel (Fessler
    and Rogers, IEEE TIP 5, 1996): one over sigma(x), the local noise from back-projected variances, in space, and one
    over the noise power spectrum |f| H(f)^2, aliased as the image is, in frequency. Low frequencies are known best and
    keep their noise, so what remains is blotchy, as in real iterative images. psi is the Fair potential, quadratic for
    noise and linear for edges. beta is set so that noise in flat regions falls to about `_NOISE_LEFT[strength]` of
    FBP's. Edges of low contrast lose sharpness with strength, high ones do not, as on real scanners.

    hu: (y, x) the FBP on the grid with its margin. Solved by `_UPDATES` majorise-minimise steps, each one FFT pair.
    """
    size = raw.matrix + 2 * raw.margin
    weight, roughness, beta, edge = _image_model(
        kernel, raw.projections.scanner, size, raw.oversampling, raw.pixel_mm, float(strength), aliasing
    )
    sigma = raw.noise * np.float32(_filter_noise(kernel, raw.projections.scanner))
    start = hu / sigma
    x = start
    step = (1.0 / (weight + beta * roughness)).astype(np.float32)
    for _ in range(_UPDATES):
        gradient = fft.irfft2(weight * fft.rfft2(x - start), (size, size)) + np.float32(beta) * _penalty_gradient(
            x, edge
        )
        x = x - fft.irfft2(step * fft.rfft2(gradient), (size, size))
    return x * sigma


# The four neighbours on one side and the weight of each, 1 / distance
_NEIGHBOURS = ((0, 1, 1.0), (1, 0, 1.0), (1, 1, 0.7071), (1, -1, 0.7071))


def _penalty_gradient(x: np.ndarray, edge: float) -> np.ndarray:
    """Gradient of the sum of Fair potentials of the differences to the eight neighbours (the image wraps around)."""
    total = np.zeros_like(x)
    for dy, dx, weight in _NEIGHBOURS:
        difference = np.roll(x, (-dy, -dx), (0, 1)) - x
        force = np.float32(weight) * difference / (np.float32(1.0) + np.abs(difference) * np.float32(1.0 / edge))
        total -= force
        total += np.roll(force, (dy, dx), (0, 1))
    return total


def _filter_noise(kernel: Kernel, scanner: Scanner) -> float:
    """Square root of the integral of (f H)^2 over all frequencies, which turns `RampImage.noise` into HU."""
    f = np.linspace(0.0, min(band_per_mm(kernel), scanner.nyquist_per_mm), 2001)
    return float(np.sqrt(2.0 * np.trapezoid((f * filter_response(kernel, scanner, f)) ** 2, f)))


@lru_cache(maxsize=64)
def _image_model(
    kernel: Kernel, scanner: Scanner, size: int, oversampling: int, pixel_mm: float, strength: float, aliasing: bool
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """(1 / noise power, roughness penalty) on the `rfft2` grid, beta, and the edge threshold, all for noise of SD 1."""
    fine = pixel_mm / oversampling
    index, reach = _radius_index(oversampling * size, fine)
    f = np.arange(_TABLE + 1) * (reach / _TABLE)
    table = (f * filter_response(kernel, scanner, f) ** 2).astype(np.float32)
    keep = True if aliasing else _below_nyquist(oversampling * size, oversampling)
    flat = np.broadcast_to(np.complex64(1.0) * keep, index.shape).astype(np.complex64)
    power = fold(flat, index, table, oversampling).real.astype(np.float64)
    count = np.full(power.shape[1], 2.0)  # an rfft2 column stands for itself and its mirror
    count[0] = 1.0
    if size % 2 == 0:
        count[-1] = 1.0
    power /= (power * count).sum() / size**2
    ky = 2 * np.pi * np.arange(size)[:, None] / size
    kx = 2 * np.pi * np.arange(size // 2 + 1)[None, :] / size
    rough = np.zeros(power.shape)
    for dy, dx, w in _NEIGHBOURS:
        rough += 2 * w * (1 - np.cos(dy * ky + dx * kx))
    difference = np.sqrt((2 * (1 - np.cos(kx)) * power * count).sum() / size**2)
    # Above the peak of its spectrum the noise is small because the kernel is, and not because the data are good
    radius = np.hypot(np.minimum(ky, 2 * np.pi - ky), kx)
    order = np.argsort(radius, axis=None)
    known = np.empty(power.size, np.float64)
    smooth = ndimage.uniform_filter1d(power.ravel()[order].astype(np.float64), 401, mode="nearest")
    known[order] = np.maximum(np.maximum.accumulate(smooth), 0.03 * smooth.max())
    weight = (1.0 / known.reshape(power.shape)).astype(np.float32)
    low, high = np.floor(strength), np.ceil(strength)
    wanted = np.interp(strength, [low, high], [_NOISE_LEFT[int(low)], _NOISE_LEFT[int(high)]]) if high > low else None
    target = float(_NOISE_LEFT[int(low)] if wanted is None else wanted)
    bottom, top = -12.0, 12.0
    for _ in range(40):
        middle = (bottom + top) / 2
        left = np.sqrt((power * count * (weight / (weight + _FAIR_PULL * np.exp(middle) * rough)) ** 2).sum() / size**2)
        bottom, top = (middle, top) if left > target else (bottom, middle)
    return weight, rough.astype(np.float32), float(np.exp(middle)), float(_EDGE_SD * difference)


def render_slice(
    sub_slices_hu: Sequence[np.ndarray] | np.ndarray,
    weights: Sequence[float] | np.ndarray,
    *,
    pixel_mm: float,
    protocols: Sequence[ScanProtocol],
    scanner: Scanner,
    seed: int | None,
    slice_index: int,
    matrix: int = 512,
    area_averaged: bool = True,
    aliasing: bool = True,
    kernels: dict[str, Kernel] | None = None,
) -> list[np.ndarray]:
    """One slice under every protocol: a list of float32 (matrix, matrix) HU, unrounded, in the order of `protocols`.

    The protocols share kVp and slice thickness; each dose is measured once (its raw data shared by all its kernels and
    strengths) from one projection of the object.

    sub_slices_hu, weights: true HU (y, x) of thin sub-slices and the slice profile's weights (`slice_profile`). Line
        integrals are averaged, as a scanner does that adds neighbouring rows.
    seed: noise depends on (seed, slice_index, dose, kVp, thickness) alone; None is noise-free.
    kernels: a user's kernels by name, before the named ones.
    """
    check_protocols(protocols, scanner=scanner, kernels=kernels)
    kvp, thickness = needed(protocols[0], "kvp"), needed(protocols[0], "slice_thickness_mm")
    if any((p.kvp, p.slice_thickness_mm) != (kvp, thickness) for p in protocols):
        raise HarmonictError("the protocols of one slice must share kVp and slice thickness")
    curves = [_kernel(p, kernels) for p in protocols]
    mean = np.zeros(np.shape(sub_slices_hu[0]), np.float32)
    for sub_slice, weight in zip(sub_slices_hu, weights, strict=True):
        # clipped before averaging: below -1000 there is nothing to attenuate
        mean += np.float32(weight) * np.maximum(sub_slice, np.float32(-1000.0))
    integrals = line_integrals(mean, pixel_mm=pixel_mm, kvp=kvp, scanner=scanner, area_averaged=area_averaged)
    band: dict[float, float] = {}
    for protocol, curve in zip(protocols, curves, strict=True):
        key = needed(protocol, "fov_mm")
        band[key] = max(band.get(key, 0.0), band_per_mm(curve))
    out: list[np.ndarray | None] = [None] * len(protocols)
    for dose in dict.fromkeys(dose_mgy(p) for p in protocols):
        here = [n for n, p in enumerate(protocols) if dose_mgy(p) == dose]
        rng = None if seed is None else noise_rng(seed, slice_index, protocols[here[0]])
        raw = expose(integrals, protocol=protocols[here[0]], scanner=scanner, rng=rng)
        for fov, highest in band.items():
            same = [n for n in here if protocols[n].fov_mm == fov]
            if not same:
                continue
            ramp = ramp_image(raw, fov_mm=fov, matrix=matrix, band_per_mm=highest)
            for n in same:
                strength = protocols[n].iterative_strength or 0.0
                out[n] = reconstruct(ramp, curves[n], iterative_strength=strength, aliasing=aliasing)
    return [image for image in out if image is not None]


def check_protocols(
    protocols: Sequence[ScanProtocol], *, scanner: Scanner, kernels: dict[str, Kernel] | None = None
) -> None:
    """Raise HarmonictError, before any computing, for a protocol that cannot be simulated."""
    if not protocols:
        raise HarmonictError("no protocol to simulate")
    for protocol in protocols:
        mu_water_per_mm(needed(protocol, "kvp"))
        needed(protocol, "slice_thickness_mm")
        dose_mgy(protocol)
        _kernel(protocol, kernels)
        strength = protocol.iterative_strength or 0.0
        if not 0 <= strength <= 5:
            raise HarmonictError(
                f"protocol {protocol.label()}: iterative strength must be from 0 to 5, got {strength:g}"
            )
        if needed(protocol, "fov_mm") > scanner.fov_mm * (1 + 1e-6):
            raise HarmonictError(
                f"protocol {protocol.label()}: field of view {protocol.fov_mm:g} mm is wider than the scanner's "
                f"{scanner.fov_mm:g} mm"
            )


def _kernel(protocol: ScanProtocol, kernels: dict[str, Kernel] | None) -> Kernel:
    if protocol.kernel is None:
        raise HarmonictError(f"protocol {protocol.label()}: a scan needs a kernel")
    if kernels and protocol.kernel in kernels:
        return kernels[protocol.kernel]
    return get_kernel(protocol.kernel)


class HasSlab(Protocol):
    """What can be scanned: a phantom that gives its true HU at the slice centres asked for."""

    def slab(self, z_mm: np.ndarray, spacing_mm: float, *, shape: tuple[int, int], fov_mm: float) -> Any:
        """An object whose `hu(kvp)` is float32 (z, y, x), centred on the field."""


def scan_and_reconstruct(
    phantom: HasSlab,
    protocols: Sequence[ScanProtocol],
    *,
    z_range_mm: tuple[float, float],
    scanner: Scanner,
    seed: int | None,
    sub_slice_mm: float = 0.5,
    matrix: int = 512,
    object_matrix: int = 1024,
    aliasing: bool = True,
    round_hu: bool = True,
    kernels: dict[str, Kernel] | None = None,
) -> list[Series]:
    """Scan a phantom under many protocols: one Series each, in the order of `protocols`.

    Protocols of equal kVp, thickness and dose share their raw data, so their series are exactly paired. Slices touch:
    a series of thickness T has its centres at z_range_mm[0] + T/2, + 3T/2, ... as long as they end within the range.

    object_matrix: pixels of the phantom's grid over the scanner's field; its Nyquist limit bounds what can be seen.
    round_hu: whole HU, as a scanner stores them. seed: None is noise-free.

    Raises HarmonictError on a protocol that cannot be simulated, before any computing.
    """
    check_protocols(protocols, scanner=scanner, kernels=kernels)
    low, high = z_range_mm
    for protocol in protocols:
        thickness = needed(protocol, "slice_thickness_mm")
        slice_profile(sub_slice_mm, thickness, scanner)
        if high - low < thickness * (1 - 1e-6):
            raise HarmonictError(f"the range {low:g} to {high:g} mm holds no slice of {thickness:g} mm")
    out: dict[int, Series] = {}
    for kvp, thickness in dict.fromkeys((needed(p, "kvp"), needed(p, "slice_thickness_mm")) for p in protocols):
        here = [n for n, p in enumerate(protocols) if (p.kvp, p.slice_thickness_mm) == (kvp, thickness)]
        same = [protocols[n] for n in here]
        offsets, weights = slice_profile(sub_slice_mm, thickness, scanner)
        centres = low + thickness * (np.arange(int(np.floor((high - low) / thickness + 1e-6))) + 0.5)
        stacks = np.empty((len(here), len(centres), matrix, matrix), np.float32)
        for index, centre in enumerate(centres):
            slab = phantom.slab(
                centre + offsets, sub_slice_mm, shape=(object_matrix, object_matrix), fov_mm=scanner.fov_mm
            )
            stacks[:, index] = render_slice(
                slab.hu(kvp),
                weights,
                pixel_mm=scanner.fov_mm / object_matrix,
                protocols=same,
                scanner=scanner,
                seed=seed,
                slice_index=index,
                matrix=matrix,
                aliasing=aliasing,
                kernels=kernels,
            )
        if round_hu:
            np.rint(stacks, out=stacks)
        for n, stack in zip(here, stacks, strict=True):
            pixel = needed(protocols[n], "fov_mm") / matrix
            first = -(matrix - 1) / 2 * pixel
            geometry = Geometry((first, first, float(centres[0])), (thickness, pixel, pixel))
            out[n] = Series(
                stack, geometry, complete_protocol(protocols[n], kernels=kernels), name=protocols[n].label()
            )
    return [out[n] for n in range(len(protocols))]


def complete_protocol(protocol: ScanProtocol, *, kernels: dict[str, Kernel] | None = None) -> ScanProtocol:
    """The protocol with what follows from it filled in: vendor of the kernel, strength 0, mAs and CTDIvol."""
    dose = dose_mgy(protocol)
    own = kernels is not None and protocol.kernel in kernels
    return protocol.with_(
        manufacturer=protocol.manufacturer or (None if own else kernel_vendor(protocol.kernel or "")),
        iterative_strength=protocol.iterative_strength or 0.0,
        ctdivol_mgy=dose,
        exposure_mas=protocol.exposure_mas or round(dose / mgy_per_mas(needed(protocol, "kvp")), 3),
    )
