"""Modulation transfer functions: at the skin-air border of patients (Sanders et al. 2016), from wires and edges."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from scipy import ndimage
from scipy.optimize import least_squares
from scipy.spatial import cKDTree
from scipy.special import j0, ndtr
from skimage.measure import find_contours

from harmonict.core import HarmonictError, Series
from harmonict.physics.kernel import Kernel, crossing

Result = TypeVar("Result")

FREQUENCIES_PER_MM = np.arange(64) * 0.02
"""The 64 frequencies at which a skin-air MTF is given, 0 to 1.26 cycles per mm (Sanders 2016 uses 64 samples)."""

AIR_HU = -1000.0
BORDER_HU = -500.0  # about half way from air to skin and fat
SECTOR_MM = 10.0  # length of border that is aligned, and kept or dropped, as one
REACH_MM = 12.0  # rays run this far out and in
BIN_MM = 0.1
CLIP_HU = -1024.0
THICK_MM = 3.0  # from here on skin that slants through a slice is reckoned with
LEAST_PASSED = 0.3  # of a frequency by slanting skin, for it to be restored in full
SKIN_SCATTER_MM = 0.25  # SD of skin thickness around a patient


@dataclass(frozen=True, eq=False)
class SkinMTF:
    """An MTF measured at the skin of one series.

    kernel: the median over the slices at `FREQUENCIES_PER_MM`.
    slices: the slices that were measured (index), `f50_per_slice_per_mm` and `mtf_sd` (64 samples) their spread.
    sectors_used / sectors: how many 10 mm pieces of the border were clean, of how many.
    """

    kernel: Kernel
    slices: tuple[int, ...]
    f50_per_slice_per_mm: np.ndarray = field(repr=False)
    mtf_sd: np.ndarray = field(repr=False)
    sectors_used: int
    sectors: int

    @property
    def f50_per_mm(self) -> float:
        """First frequency where the MTF falls to 0.5."""
        return self.kernel.f50_per_mm

    @property
    def f50_sd_per_mm(self) -> float:
        """SD of f50 between slices (NaN for one slice)."""
        f50 = self.f50_per_slice_per_mm[np.isfinite(self.f50_per_slice_per_mm)]
        return float(np.std(f50, ddof=1)) if f50.size > 1 else float("nan")


def skin_air_mtf(series: Series, *, max_slices: int = 12) -> SkinMTF:
    """The in-plane MTF at the patient's skin-air border, after Sanders et al., Med Phys 43, 5330 (2016).

    For `max_slices` slices spread over the series: the body's outline at sub-pixel precision; every pixel near it gets
    its distance to the outline along the normal; sectors of 10 mm are aligned with each other, sectors whose rays
    cross clothes, table or padding are dropped; the rest make one edge spread function in bins of 0.1 mm; its
    derivative is tapered and Fourier transformed; the thin skin over fat (an echo in the line spread function) is
    divided out. Air that the file clips at its minimum is restored by the mean of a clipped normal distribution.

    Skin that slants through a slice is blurred over slice thickness times slope, which is no property of the kernel. In
    slices of more than 3 mm the slope of each sector is taken from the outlines of the two neighbours, the half of the
    sectors that slants more is dropped, and the sinc of what is left is divided out.

    Raises HarmonictError where no slice shows enough clean skin beside air (a head in a holder, a body that fills the
    field of view, an image in other units than HU).
    """

    def measure(z: int):
        padding = None if series.padding is None else series.padding[z]
        return _slice_mtf(series.hu[z], series.pixel_mm, padding, _Neighbours.of(series, z))

    slices = spread_slices(series.hu.shape[0], max_slices)
    results = [(z, *found) for z, found in zip(slices, in_threads(measure, slices), strict=True) if found is not None]
    if not results:
        raise HarmonictError(
            f"{series.name or 'series'}: no clean border between skin and air, so no MTF can be measured there; "
            "give the MTF of this series as a file: --source-mtf FILE"
        )
    curves = np.stack([r[1] for r in results])
    mtf = np.median(curves, 0)
    mtf[0] = 1.0
    sd = curves.std(0, ddof=1) if len(results) > 1 else np.full(FREQUENCIES_PER_MM.size, np.nan)
    return SkinMTF(
        kernel=Kernel(f"skin of {series.name or 'series'}", FREQUENCIES_PER_MM, mtf, "measured at the skin-air border"),
        slices=tuple(r[0] for r in results),
        f50_per_slice_per_mm=np.array([crossing(FREQUENCIES_PER_MM, c, 0.5) for c in curves]),
        mtf_sd=sd,
        sectors_used=sum(r[2] for r in results),
        sectors=sum(r[3] for r in results),
    )


def in_threads(work: Callable[[int], Result], slices: Sequence[int]) -> list[Result]:
    """work(z) for each slice, in order; NumPy and SciPy let go of the interpreter for most of it."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, slices))


def spread_slices(count: int, wanted: int) -> list[int]:
    """Up to `wanted` slice indices spread evenly over `count` slices, ends spared."""
    n = min(count, wanted)
    return sorted({int((i + 0.5) * count / n) for i in range(n)})


@dataclass(frozen=True, eq=False)
class _Neighbours:
    """The two slices beside a thick one, or the one of them there is: the outlines tell how the skin slants."""

    below: np.ndarray
    above: np.ndarray
    apart_mm: float
    thickness_mm: float

    @classmethod
    def of(cls, series: Series, z: int) -> _Neighbours | None:
        """None for thin slices, and for a single one."""
        spacing = series.geometry.spacing_mm[0]
        thickness = series.protocol.slice_thickness_mm or spacing
        low, high = max(z - 1, 0), min(z + 1, len(series.hu) - 1)
        if thickness <= THICK_MM or low == high:
            return None
        return cls(series.hu[low], series.hu[high], (high - low) * spacing, thickness)

    def blur_mm(self, point: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Over how many mm of depth the skin at points (n, 2) of the outline runs within the slice; NaN where a
        neighbour shows no skin near."""
        depths = [_depth_in(hu, point, scale) for hu in (self.below, self.above)]
        return np.abs(depths[1] - depths[0]) / self.apart_mm * self.thickness_mm


def _depth_in(hu: np.ndarray, point: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Signed distance in mm of points (n, 2) from the outline of another slice, > 0 inside; NaN beyond 20 mm."""
    smooth = _smoothed(hu, scale)
    mask = _body_mask(smooth, scale)
    lines = [] if mask is None else [line for line in find_contours(smooth, BORDER_HU) if len(line) > 60]
    if mask is None or not lines:
        return np.full(len(point), np.nan)
    depth = _half_size_distance(mask, scale) - _half_size_distance(~mask, scale)
    outline = np.concatenate(lines)
    index = np.rint(outline).astype(int)
    outline = outline[np.abs(depth[index[:, 0], index[:, 1]]) < 4] * scale
    if not len(outline):
        return np.full(len(point), np.nan)
    distance, _ = cKDTree(outline).query(point, distance_upper_bound=20.0)
    index = np.clip(np.rint(point / scale).astype(int), 0, np.array(hu.shape) - 1)
    inside = smooth[index[:, 0], index[:, 1]] > BORDER_HU
    return np.where(np.isfinite(distance), np.where(inside, distance, -distance), np.nan)


def _slice_mtf(
    hu: np.ndarray, pixel_mm: tuple[float, float], padding: np.ndarray | None, beside: _Neighbours | None = None
):
    """(MTF at FREQUENCIES_PER_MM, sectors used, sectors) of one slice, or None."""
    rays = _border_rays(hu, pixel_mm, padding)
    if rays is None:
        return None
    depth, along, value, sector, count, outline = rays
    blur = None
    if beside is not None:
        blur = _by_sector(beside.blur_mm(outline[0], np.array(pixel_mm, float)), outline[1], count)
        if not np.isfinite(blur).any():
            return None
        upright = blur <= np.nanmedian(blur)
        rows = upright[sector]
        depth, along, value, sector = depth[rows], along[rows], value[rows], sector[rows]
    clean, depth = _align(depth, along, value, sector, count)
    used = int(clean.sum())
    if used < max(6, 0.03 * count):
        return None
    keep = clean[sector]
    profile = _edge_spread(depth[keep], value[keep])
    if profile is None:
        return None
    mtf = _edge_to_mtf(*profile)
    if mtf is None:
        return None
    if blur is not None:
        passed = np.sinc(FREQUENCIES_PER_MM[:, None] * blur[clean]).mean(1)
        mtf = mtf / np.maximum(passed, LEAST_PASSED)
    return mtf, used, count


def _by_sector(value: np.ndarray, sector: np.ndarray, count: int) -> np.ndarray:
    """The median of each sector; NaN where there is none."""
    found = np.full(count, np.nan)
    for n in np.unique(sector[np.isfinite(value)]):
        found[n] = np.median(value[(sector == n) & np.isfinite(value)])
    return found


def source_mtf(series: Series, given: Kernel | None) -> np.ndarray:
    """The MTF of a series at `FREQUENCIES_PER_MM`: what the user gave, else measured at its own skin.

    Raises HarmonictError where it shows no clean skin beside air.
    """
    return skin_air_mtf(series).kernel.mtf if given is None else given.at(FREQUENCIES_PER_MM)


def body_mask(hu: np.ndarray, pixel_mm: tuple[float, float]) -> np.ndarray | None:
    """The patient in one slice, bool (y, x): the largest piece above -500 HU once thin things (table top, clothes,
    tubes under 5 mm) are opened away, holes filled. None where there is nothing.
    """
    return _body_mask(_smoothed(hu, np.array(pixel_mm, float)), np.array(pixel_mm, float))


def _smoothed(hu: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(hu, 1.0 / scale, truncate=3.0)


def _body_mask(smooth: np.ndarray, scale: np.ndarray) -> np.ndarray | None:
    reach = (2.5 // (2 * scale)).astype(int)  # at half size: four times faster
    y, x = (np.arange(-n, n + 1) * 2 * d for n, d in zip(reach, scale, strict=True))
    disc = np.hypot(y[:, None], x[None]) <= 2.5
    mask = ndimage.binary_erosion(smooth[::2, ::2] > BORDER_HU, disc, border_value=1)
    labels, count = ndimage.label(mask)
    if count == 0:
        return None
    mask = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    mask = ndimage.binary_fill_holes(ndimage.binary_dilation(mask, disc))
    return np.repeat(np.repeat(mask, 2, 0), 2, 1)[: smooth.shape[0], : smooth.shape[1]]


def _border_rays(hu: np.ndarray, pixel_mm: tuple[float, float], padding: np.ndarray | None):
    """Pixels within REACH_MM of the skin: depth (mm, > 0 inside), place along the sector, HU, sector index, sectors;
    the outline's points (n, 2) in mm and their sectors."""
    scale = np.array(pixel_mm, float)
    outside = np.zeros(hu.shape, bool) if padding is None else padding
    hu = np.where(outside, np.float32(AIR_HU), hu)
    smooth = _smoothed(hu, scale)
    mask = _body_mask(smooth, scale)
    if mask is None or min(hu.shape) < 16 or mask.mean() < 0.01:
        return None
    depth = _half_size_distance(mask, scale) - _half_size_distance(~mask, scale)
    smooth[depth > 4] = 0.0  # the outline is sought near the mask's rim only
    smooth[depth < -4] = AIR_HU
    # Where the image or the reconstruction circle cuts the body there is no skin.
    y, x = (np.minimum(np.arange(n), np.arange(n)[::-1]) * d for n, d in zip(hu.shape, scale, strict=True))
    from_edge = np.minimum(y[:, None], x[None, :])
    if outside.any():
        from_edge = np.minimum(from_edge, _half_size_distance(~outside, scale))
    points, tangents, sectors, places = [], [], [], []
    count = 0
    for line in find_contours(smooth, BORDER_HU):
        line = line * scale
        arc = np.append(0.0, np.cumsum(np.hypot(*np.diff(line, axis=0).T)))
        if arc[-1] < 60:
            continue
        t = np.arange(0.0, arc[-1], 0.25)
        closed = np.allclose(line[0], line[-1])
        point = np.stack([np.interp(t, arc, line[:, 0]), np.interp(t, arc, line[:, 1])], 1)
        point = ndimage.gaussian_filter1d(point, 8.0, axis=0, mode="wrap" if closed else "nearest")  # SD 2 mm
        tangent = np.gradient(point, axis=0)
        tangent /= np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-9)
        pieces = int(arc[-1] // SECTOR_MM)
        sector = np.minimum((t / arc[-1] * pieces).astype(int), pieces - 1)
        points.append(point)
        tangents.append(tangent)
        sectors.append(sector + count)
        places.append(t - (sector + 0.5) * arc[-1] / pieces)
        count += pieces
    if not points:
        return None
    point, tangent = np.concatenate(points), np.concatenate(tangents)
    sector, place = np.concatenate(sectors), np.concatenate(places)
    index = np.clip(np.rint(point / scale).astype(int), 0, np.array(hu.shape) - 1)
    cut = np.zeros(count, bool)
    cut[sector[from_edge[index[:, 0], index[:, 1]] < 8.0]] = True

    near = (np.abs(depth) < REACH_MM + 3) & (from_edge > 2.0)
    where = np.argwhere(near) * scale
    distance, k = cKDTree(point).query(where, workers=-1)
    offset = where - point[k]
    normal = np.stack([tangent[k][:, 1], -tangent[k][:, 0]], 1)
    inwards = np.where(mask[near], 1.0, -1.0)
    across = (offset * normal).sum(1)
    # One sign per contour point: the side on which the mask lies.
    votes = np.bincount(k, across * inwards, len(point))
    votes = ndimage.gaussian_filter1d(votes, 40.0)
    d = across * np.sign(votes)[k]
    ok = (distance <= REACH_MM) & (distance - np.abs(d) < 0.1) & ~cut[sector[k]]
    along = place[k] + (offset * tangent[k]).sum(1)
    return d[ok], along[ok], hu[near][ok].astype(np.float64), sector[k][ok], count, (point, sector)


def _half_size_distance(mask: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Distance to the nearest False in mm, exact to two pixels: it only says where to look."""
    distance = ndimage.distance_transform_edt(mask[::2, ::2], sampling=2 * scale)
    return np.repeat(np.repeat(distance, 2, 0), 2, 1)[: mask.shape[0], : mask.shape[1]]


def _rings(depth: np.ndarray, value: np.ndarray, sector: np.ndarray, count: int, step: float):
    """Mean HU and number of pixels per sector and ring of `step` mm from -REACH_MM to REACH_MM: two (count, n)."""
    n = round(2 * REACH_MM / step)
    cell = sector * n + np.clip(((depth + REACH_MM) / step).astype(int), 0, n - 1)
    number = np.bincount(cell, minlength=count * n).reshape(count, n)
    total = np.bincount(cell, value, count * n).reshape(count, n)
    with np.errstate(invalid="ignore"):
        return np.where(number > 0, total / np.maximum(number, 1), np.nan), number


def _align(depth, along, value, sector, count):
    """Align the sectors with each other and judge them.

    Returns: clean (count,) bool; the depths, shifted sector by sector.
    """
    clean = np.ones(count, bool)
    template = None
    for _ in range(5):
        rings, number = _rings(depth, value, sector, count, 0.5)
        centre = (np.arange(rings.shape[1]) + 0.5) * 0.5 - REACH_MM
        if template is None:
            # First by the half level of each sector's own profile.
            shift = _half_level(rings, centre)
            depth = depth - np.where(np.isfinite(shift), shift, 0.0)[sector]
            rings, number = _rings(depth, value, sector, count, 0.5)
        clean = _judge(rings, number, centre)
        if clean.sum() < 3:
            return clean, depth
        keep = clean[sector]
        template = _smooth_profile(depth[keep], value[keep])
        grid, level = template
        slope = np.gradient(level, grid)
        s, e = np.interp(depth, grid, slope), np.interp(depth, grid, level)
        near = np.abs(depth) < 4
        u = along / SECTOR_MM
        w = np.where(near, s, 0.0)
        r = (value - e) * near
        a = np.bincount(sector, w * w, count)
        b = np.bincount(sector, w * w * u, count)
        c = np.bincount(sector, w * w * u * u, count)
        p, q = np.bincount(sector, w * r, count), np.bincount(sector, w * r * u, count)
        ridge = 0.02 * np.maximum(a, 1e-9)
        det = np.maximum((a + 1e-9) * (c + ridge) - b * b, 1e-12)
        offset = np.clip(((c + ridge) * p - b * q) / det, -1, 1)
        tilt = np.clip(((a + 1e-9) * q - b * p) / det, -1, 1)
        depth = depth + offset[sector] + tilt[sector] * u
    rings, number = _rings(depth, value, sector, count, 0.5)
    return _judge(rings, number, (np.arange(rings.shape[1]) + 0.5) * 0.5 - REACH_MM), depth


def _half_level(rings: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Depth at which each sector's profile last rises through the half level, going in; NaN where it does not."""
    out = np.full(len(rings), np.nan)
    for i, row in enumerate(rings):
        ok = np.isfinite(row)
        if ok.sum() < 12:
            continue
        row = np.interp(centre, centre[ok], row[ok])
        up = np.nonzero((row[:-1] < BORDER_HU) & (row[1:] >= BORDER_HU) & (np.abs(centre[:-1]) < 4))[0]
        if up.size:
            n = up[-1]
            out[i] = centre[n] + 0.5 * (BORDER_HU - row[n]) / (row[n + 1] - row[n])
    return out


def _judge(rings: np.ndarray, number: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Which sectors have clear air before the skin and soft tissue behind it."""
    # Rings of 1 mm (mean of two): fewer gaps, less noise.
    total = np.nansum((rings * number).reshape(len(rings), -1, 2), 2)
    number = number.reshape(len(rings), -1, 2).sum(2)
    with np.errstate(invalid="ignore", divide="ignore"):
        rings = np.where(number > 0, total / number, np.nan)
    centre = centre.reshape(-1, 2).mean(1)
    full = np.all(number > 0, axis=1)[:, None]
    air, tissue = (centre > -7) & (centre < -1), (centre > 2) & (centre < 7)
    behind = np.where(full, rings[:, tissue], 9e9)
    good = (np.abs(behind.mean(1) + 50) < 150) & (behind.max(1) < 350)
    if good.sum() < 3:
        return good
    base = np.percentile(rings[good], 15, axis=0)
    spread = (rings - base)[:, air]
    worst = np.max(np.where(np.isfinite(spread), spread, 9e9), 1)
    for tolerance in (40.0, 60.0, 90.0, 130.0):
        clean = good & (worst < tolerance)
        if clean.sum() >= max(12, 0.15 * len(rings)):
            break
    return clean


def _smooth_profile(depth: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean HU over depth in bins of BIN_MM, smoothed by 0.2 mm (the template that sectors are aligned with)."""
    grid, level, number = _bin(depth, value)
    w = ndimage.gaussian_filter1d(number.astype(float), 2.0)
    return grid, ndimage.gaussian_filter1d(np.nan_to_num(level) * number, 2.0) / np.maximum(w, 1e-9)


def _bin(depth: np.ndarray, value: np.ndarray):
    n = round(2 * REACH_MM / BIN_MM)
    cell = np.clip(((depth + REACH_MM) / BIN_MM).astype(int), 0, n - 1)
    number = np.bincount(cell, minlength=n)
    with np.errstate(invalid="ignore"):
        level = np.bincount(cell, value, n) / number
    return (np.arange(n) + 0.5) * BIN_MM - REACH_MM, level, number


def _edge_spread(depth: np.ndarray, value: np.ndarray):
    """The edge spread function (depth axis in mm, HU), clipped air restored; None where bins stay empty."""
    grid, level, number = _bin(depth, value)
    inner = np.abs(grid) < 9
    if (number[inner] == 0).mean() > 0.2:
        return None
    ok = number > 0
    level = np.interp(grid, grid[ok], level[ok])
    floor = float(value.min())
    air = (depth < -3) & (depth > -8)
    # More than 0.8 at the floor is an image without noise there, or flat padding: nothing to restore.
    if floor >= CLIP_HU - 1 and 0.01 < np.mean(value[air] <= floor) < 0.8:
        level = _unclip(level, value[air], floor)
    return grid, level


def _unclip(level: np.ndarray, air: np.ndarray, floor: float) -> np.ndarray:
    """Undo the bias that clipping at `floor` puts on mean air values: invert the mean of a clipped normal.

    The noise SD comes from the share of clipped pixels and the mean of the air beside the skin.
    """
    share, mean = float(np.mean(air <= floor)), float(air.mean())
    z = np.linspace(-4, 4, 801)  # (true mean - floor) / sd
    excess = z * ndtr(z) + np.exp(-z * z / 2) / np.sqrt(2 * np.pi)  # (clipped mean - floor) / sd
    z_air = float(np.interp(-share, -ndtr(-z), z))
    sd = (mean - floor) / float(np.interp(z_air, z, excess))
    restored = floor + sd * np.interp((level - floor) / sd, excess, z)
    return np.where(level < floor + 3.9 * sd, restored, level)


def _edge_to_mtf(grid: np.ndarray, level: np.ndarray) -> np.ndarray | None:
    """Derivative, taper, Fourier transform, skin echo divided out, real part."""
    spread = np.gradient(level, grid)
    smooth = ndimage.gaussian_filter1d(spread, 3.0)
    middle = np.abs(grid) < 3
    peak = grid[middle][np.argmax(smooth[middle])]
    above = smooth > smooth[middle].max() / 2
    left = np.nonzero(~above & (grid < peak))[0][-1]
    right = np.nonzero(~above & (grid > peak))[0][0]
    width = grid[right] - grid[left]
    flat = float(np.clip(2.0 * width, 3.0, 5.0))
    x = grid - peak
    taper = np.clip((REACH_MM - 3 - np.abs(x)) / (REACH_MM - 3 - flat), 0, 1)
    taper = np.sin(np.pi / 2 * taper) ** 2
    f = FREQUENCIES_PER_MM
    wave = np.exp(-2j * np.pi * f[:, None] * x)
    transform = wave @ (spread * taper) * (grid[1] - grid[0])
    if transform[0].real <= 300:  # less than a third of the step from air to tissue: not skin
        return None
    transform = transform / transform[0].real / _bin_response(f)
    return _without_skin(f, transform)


def _bin_response(f: np.ndarray) -> np.ndarray:
    """What bins of BIN_MM and a central difference over two of them pass."""
    return np.sinc(f * BIN_MM) * np.sinc(2 * f * BIN_MM)


def _without_skin(f: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Divide out the thin skin over fat and the error of the origin.

    Skin of thickness t over fat is an echo -a exp(-2 pi i f t) of the border. An MTF without it is real: a, t and the
    origin are those that leave the least imaginary part below 0.24 per mm, where every kernel passes something: the
    same band for all, so that the same skin gets the same echo whatever the kernel. a and t are held near what was
    found over many patients (a 0.13 +- 0.03: fat at -105 HU under skin at 30; t 1.7 +- 0.2 mm; both 0 in a phantom
    without skin), an imaginary part of 0.01 weighing as one SD.
    """
    band = (f > 0) & (f <= 0.24) & np.cumprod(np.abs(transform) > 0.15).astype(bool)

    def corrected(p: np.ndarray) -> np.ndarray:
        origin, a, t = p
        echo = a * np.exp(-2j * np.pi * f * t - 2 * (np.pi * f * SKIN_SCATTER_MM) ** 2)
        return transform * np.exp(2j * np.pi * f * origin) * (1 - a) / (1 - echo)

    def misfit(p: np.ndarray) -> np.ndarray:
        return np.append(corrected(p)[band].imag / 0.01, [(p[1] - 0.13) / 0.03, (p[2] - 1.7) / 0.2])

    mtf = corrected(least_squares(misfit, [0.0, 0.13, 1.7]).x).real
    return mtf / mtf[0]


def wire_mtf(
    image: np.ndarray, *, pixel_mm: tuple[float, float], radius_mm: float = 10.0, oversampling: int = 1
) -> Kernel:
    """The MTF from the image (h, w) of a wire or bead across the slice: a point in a uniform background.

    The background (median of the ring from 0.8 to 1 `radius_mm` around the point) is taken off, the disc tapered over
    its outer fifth, and its radial mean Fourier transformed (a Hankel sum over the pixels, so that the point may lie
    between pixels). Frequencies: 0 to the Nyquist frequency of the larger pixel, 64 samples; times `oversampling` where
    the image is known to hold more than its grid (a wire in several phases).
    Raises HarmonictError where the image shows no point.
    """
    image = np.asarray(image, np.float64)
    y, x = np.indices(image.shape)
    scale = np.array(pixel_mm)
    smooth = ndimage.gaussian_filter(image - np.median(image), 1.0)
    cy, cx = (float(n) for n in np.unravel_index(np.argmax(smooth), image.shape))
    for _ in range(5):  # centre of mass, closer and closer
        r = np.hypot((y - cy) * scale[0], (x - cx) * scale[1])
        ring = (r > 0.8 * radius_mm) & (r < radius_mm)
        if ring.sum() < 8:
            raise HarmonictError(f"wire: the point lies within {radius_mm:g} mm of the border of the image")
        excess = image - np.median(image[ring])
        weight = excess * (r < 0.4 * radius_mm)
        total = weight.sum()
        if not total > 0:
            raise HarmonictError("wire: no bright point in the image")
        cy, cx = float((weight * y).sum() / total), float((weight * x).sum() / total)
    taper = np.sin(np.pi / 2 * np.clip((radius_mm - r) / (0.2 * radius_mm), 0, 1)) ** 2
    use = taper > 0
    f = np.linspace(0, 0.5 / max(pixel_mm) * oversampling, 64)
    curve = j0(2 * np.pi * f[:, None] * r[use]) @ (excess * taper)[use]
    return Kernel("wire", f, curve / curve[0], "measured on a wire")


def edge_mtf(
    image: np.ndarray,
    *,
    pixel_mm: tuple[float, float],
    centre_mm: tuple[float, float] | None = None,
    radius_mm: float | None = None,
    reach_mm: float = 8.0,
) -> Kernel:
    """The MTF across an edge: of a disc (`centre_mm` (y, x) and `radius_mm` as a first guess) or, without them, of a
    straight edge that runs through the whole image at a slant (Richard et al. 2012; ISO 12233 for the slanted edge).

    Edge spread in bins of 0.1 mm over the distance from the edge (whose place is refined from the image), derivative,
    taper, Fourier transform. 64 frequencies from 0 to the Nyquist frequency of the larger pixel.
    Raises HarmonictError where there is no edge.
    """
    image = np.asarray(image, np.float64)
    scale = np.array(pixel_mm)
    y, x = np.indices(image.shape).astype(float)
    y, x = y * scale[0], x * scale[1]
    low, high = np.percentile(image, [2, 98])
    half = (low + high) / 2
    points = [line * scale for line in find_contours(ndimage.gaussian_filter(image, 0.7), half)] if high > low else []
    if not points:
        raise HarmonictError("edge: the image shows no edge between two levels")
    if centre_mm is not None and radius_mm is not None:
        all_points = np.concatenate(points)
        near = np.abs(np.hypot(*(all_points - centre_mm).T) - radius_mm) < reach_mm / 2
        if near.sum() < 12:
            raise HarmonictError(f"edge: no edge within {reach_mm / 2:g} mm of the given circle")
        p = all_points[near]
        # Algebraic circle through the half-level points.
        a = np.column_stack([2 * p, np.ones(len(p))])
        c = np.linalg.lstsq(a, (p**2).sum(1), rcond=None)[0]
        r = np.sqrt(c[2] + c[0] ** 2 + c[1] ** 2)
        distance = r - np.hypot(y - c[0], x - c[1])
    else:
        p = max(points, key=len)
        middle = p.mean(0)
        normal = np.linalg.svd(p - middle, full_matrices=False)[2][1]
        distance = (y - middle[0]) * normal[0] + (x - middle[1]) * normal[1]
    use = np.abs(distance) < reach_mm
    n = round(2 * reach_mm / BIN_MM)
    cell = np.minimum(((distance[use] + reach_mm) / BIN_MM).astype(int), n - 1)
    number = np.bincount(cell, minlength=n)
    if (number == 0).mean() > 0.3:
        raise HarmonictError(
            "edge: too few pixels across the edge, or an edge along the pixel rows; slant it or enlarge"
        )
    grid = (np.arange(n) + 0.5) * BIN_MM - reach_mm
    level = np.interp(grid, grid[number > 0], np.bincount(cell, image[use], n)[number > 0] / number[number > 0])
    spread = np.gradient(level, grid)
    taper = np.sin(np.pi / 2 * np.clip((reach_mm - np.abs(grid)) / (0.3 * reach_mm), 0, 1)) ** 2
    f = np.linspace(0, 0.5 / max(pixel_mm), 64)
    curve = np.abs(np.exp(-2j * np.pi * f[:, None] * grid) @ (spread * taper))
    if not curve[0] > 0:
        raise HarmonictError("edge: the image shows no edge between two levels")
    return Kernel("edge", f, curve / curve[0] / _bin_response(f), "measured on an edge")


def mtf_2d(kernel: Kernel, *, shape: tuple[int, int], pixel_mm: tuple[float, float]) -> np.ndarray:
    """The MTF of an isotropic kernel on the frequency plane of an image (h, w), in numpy's FFT order."""
    fy, fx = np.fft.fftfreq(shape[0], pixel_mm[0]), np.fft.fftfreq(shape[1], pixel_mm[1])
    return kernel.at(np.hypot(fy[:, None], fx[None, :]))
