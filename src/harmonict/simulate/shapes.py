"""Painting shapes on a slice: coverage from signed distance, capsules, ellipsoids, layers and band-limited noise.

A pixel of width `w` at signed distance d from a border (negative inside) is covered by clip(1/2 - d/w, 0, 1): exact for
a straight border along the grid, right to second order elsewhere. Images are float32 (3, y, x): HU at 120 kVp and the
two spectral numbers of materials.py.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit

HOLE_MIX = (0.92, 0.39)  # shares of the coarse and the fine noise that shape emphysema
CUBE = 64  # side of the periodic noise cube, a power of two


@lru_cache(maxsize=1)
def noise_cube() -> np.ndarray:
    """A periodic Gaussian random field, mean 0, variance 1, correlation sigma 1.2 cells: float32 (64, 64, 64)."""
    white = np.random.default_rng(20240229).standard_normal((CUBE,) * 3)
    f = np.fft.fftfreq(CUBE)
    radius2 = f[:, None, None] ** 2 + f[None, :, None] ** 2 + f[None, None, : CUBE // 2 + 1] ** 2
    smooth = np.fft.irfftn(np.fft.rfftn(white) * np.exp(-2 * (np.pi * 1.2) ** 2 * radius2), s=white.shape)
    smooth -= smooth.mean()
    return (smooth / smooth.std()).astype(np.float32)


def noise_frame(rng: np.random.Generator, scale_mm: float) -> np.ndarray:
    """How a patient looks into the noise cube: float32 (12,), a random rotation / scale (9) and an offset (3).

    `scale_mm` is one cell: features are about 3 of them wide.
    """
    q, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    return np.concatenate([(q / scale_mm).ravel(), rng.uniform(0, CUBE, 3)]).astype(np.float32)


@njit(cache=True, fastmath=True, inline="always")
def _noise(cube, m, x, y, z):
    u = m[0] * x + m[1] * y + m[2] * z + m[9]
    v = m[3] * x + m[4] * y + m[5] * z + m[10]
    w = m[6] * x + m[7] * y + m[8] * z + m[11]
    iu = int(np.floor(u))
    iv = int(np.floor(v))
    iw = int(np.floor(w))
    fu = np.float32(u - iu)
    fv = np.float32(v - iv)
    fw = np.float32(w - iw)
    a = iu & 63
    b = iv & 63
    c = iw & 63
    a1 = (a + 1) & 63
    b1 = (b + 1) & 63
    c1 = (c + 1) & 63
    p00 = cube[a, b, c] * (1 - fw) + cube[a, b, c1] * fw
    p01 = cube[a, b1, c] * (1 - fw) + cube[a, b1, c1] * fw
    p10 = cube[a1, b, c] * (1 - fw) + cube[a1, b, c1] * fw
    p11 = cube[a1, b1, c] * (1 - fw) + cube[a1, b1, c1] * fw
    return (p00 * (1 - fv) + p01 * fv) * (1 - fu) + (p10 * (1 - fv) + p11 * fv) * fu


@njit(cache=True)
def sample_noise(cube, frame, points):
    """Noise at `points` (n, 3), mm."""
    out = np.empty(len(points), np.float32)
    for i in range(len(points)):
        out[i] = _noise(cube, frame, points[i, 0], points[i, 1], points[i, 2])
    return out


@njit(cache=True, fastmath=True, inline="always")
def _cover(d, w):
    c = 0.5 - d / w
    return 0.0 if c < 0.0 else (1.0 if c > 1.0 else c)


@njit(cache=True, fastmath=True, inline="always")
def _put(image, i, j, c, v0, v1, v2):
    image[0, i, j] += c * (v0 - image[0, i, j])
    image[1, i, j] += c * (v1 - image[1, i, j])
    image[2, i, j] += c * (v2 - image[2, i, j])


@njit(cache=True, fastmath=True)
def blend(image, cover, value, offset):
    """Lay a material over the image where `cover` > 0; `offset` (y, x) HU are added to it (0-size array: none)."""
    textured = offset.size > 0
    for i in range(cover.shape[0]):
        for j in range(cover.shape[1]):
            c = cover[i, j]
            if c > 0.0:
                _put(image, i, j, c, value[0] + (offset[i, j] if textured else 0.0), value[1], value[2])


@njit(cache=True, fastmath=True)
def cover_capsules(cover, x, y, z, segments, w):
    """Maximum coverage of round cones (n, 8): x0 y0 z0 r0 x1 y1 z1 r1, cut by the plane z.

    One thinner than the pixel keeps its cross-section: its profile is scaled to the area that it has.
    """
    nx, ny = len(x), len(y)
    for s in range(len(segments)):
        x0, y0, z0, r0, x1, y1, z1, r1 = segments[s]
        rmax = max(r0, r1) + w
        if z < min(z0, z1) - rmax or z > max(z0, z1) + rmax:
            continue
        dx, dy, dz = x1 - x0, y1 - y0, z1 - z0
        length2 = dx * dx + dy * dy + dz * dz + 1e-9
        # the part of the axis that comes near the plane bounds the pixels to visit
        ta, tb = 0.0, 1.0
        if abs(dz) > 1e-6:
            t0 = (z - rmax - z0) / dz
            t1 = (z + rmax - z0) / dz
            ta = max(0.0, min(t0, t1))
            tb = min(1.0, max(t0, t1))
            if ta > tb:
                continue
        xa, xb = x0 + ta * dx, x0 + tb * dx
        ya, yb = y0 + ta * dy, y0 + tb * dy
        j0 = max(0, int((min(xa, xb) - rmax - x[0]) / w))
        j1 = min(nx - 1, int((max(xa, xb) + rmax - x[0]) / w) + 1)
        i0 = max(0, int((min(ya, yb) - rmax - y[0]) / w))
        i1 = min(ny - 1, int((max(ya, yb) + rmax - y[0]) / w) + 1)
        pz = z - z0
        for i in range(i0, i1 + 1):
            py = y[i] - y0
            for j in range(j0, j1 + 1):
                px = x[j] - x0
                t = (px * dx + py * dy + pz * dz) / length2
                t = 0.0 if t < 0.0 else (1.0 if t > 1.0 else t)
                ex, ey, ez = px - t * dx, py - t * dy, pz - t * dz
                r = r0 + t * (r1 - r0)
                # the soft border adds pi w^2 / 12 to the area: a thick one is drawn that much thinner
                drawn = np.sqrt(r * r - w * w / 12.0) if r >= w else r
                d = np.sqrt(ex * ex + ey * ey + ez * ez) - drawn
                c = _cover(d, w)
                if c > 0.0:
                    if r < 0.5 * w:
                        edge = r + 0.5 * w
                        c *= 3.0 * r * r * w / (edge * edge * edge)
                    elif r < w:
                        c *= r * r / (r * r + w * w / 12.0)
                    if c > cover[i, j]:
                        cover[i, j] = c


@njit(cache=True, fastmath=True, inline="always")
def _ellipsoid(e, px, py, pz):
    dx, dy, dz = px - e[0], py - e[1], pz - e[2]
    u = (e[3] * dx + e[4] * dy + e[5] * dz) / e[12]
    v = (e[6] * dx + e[7] * dy + e[8] * dz) / e[13]
    s = (e[9] * dx + e[10] * dy + e[11] * dz) / e[14]
    k0 = np.sqrt(u * u + v * v + s * s)
    uu, vv, ss = u / e[12], v / e[13], s / e[14]
    k1 = np.sqrt(uu * uu + vv * vv + ss * ss) + 1e-9
    if k0 < 1e-6:
        return -min(e[12], e[13], e[14])
    return k0 * (k0 - 1.0) / k1


@njit(cache=True, fastmath=True)
def ellipsoid_distance(x, y, z, ellipsoids, k, out):
    """Smooth union (exponential, reach k mm) of ellipsoids (n, 15): centre, three axes, semi-axes; distance in mm."""
    for i in range(len(y)):
        for j in range(len(x)):
            best = np.float64(1e9)
            for n in range(len(ellipsoids)):
                best = min(best, _ellipsoid(ellipsoids[n], x[j], y[i], z))
            if best < 6.0 * k:
                total = 0.0
                for n in range(len(ellipsoids)):
                    total += np.exp((best - _ellipsoid(ellipsoids[n], x[j], y[i], z)) / k)
                best -= k * np.log(total)
            out[i, j] = best


@njit(cache=True, fastmath=True)
def capsule_distance(x, y, z, segments, out):
    """out = min(out, distance to round cones); only within 40 mm of them."""
    w = x[1] - x[0]
    for s in range(len(segments)):
        x0, y0, z0, r0, x1, y1, z1, r1 = segments[s]
        reach = max(r0, r1) + 40.0
        if z < min(z0, z1) - reach or z > max(z0, z1) + reach:
            continue
        dx, dy, dz = x1 - x0, y1 - y0, z1 - z0
        length2 = dx * dx + dy * dy + dz * dz + 1e-9
        j0 = max(0, int((min(x0, x1) - reach - x[0]) / w))
        j1 = min(len(x) - 1, int((max(x0, x1) + reach - x[0]) / w) + 1)
        i0 = max(0, int((min(y0, y1) - reach - y[0]) / w))
        i1 = min(len(y) - 1, int((max(y0, y1) + reach - y[0]) / w) + 1)
        pz = z - z0
        for i in range(i0, i1 + 1):
            for j in range(j0, j1 + 1):
                px, py = x[j] - x0, y[i] - y0
                t = (px * dx + py * dy + pz * dz) / length2
                t = 0.0 if t < 0.0 else (1.0 if t > 1.0 else t)
                ex, ey, ez = px - t * dx, py - t * dy, pz - t * dz
                d = np.sqrt(ex * ex + ey * ey + ez * ez) - (r0 + t * (r1 - r0))
                if d < out[i, j]:
                    out[i, j] = d


@njit(cache=True, fastmath=True)
def smooth_min(a, b, k):
    """Polynomial smooth minimum of two distance maps, in place in `a`; rounds over k mm."""
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            h = max(k - abs(a[i, j] - b[i, j]), 0.0) / k
            a[i, j] = min(a[i, j], b[i, j]) - h * h * k * 0.25


@njit(cache=True, fastmath=True)
def paint_distance(image, distance, w, value):
    """Lay a material over everything inside a distance map."""
    for i in range(distance.shape[0]):
        for j in range(distance.shape[1]):
            c = _cover(distance[i, j], w)
            if c > 0.0:
                _put(image, i, j, c, value[0], value[1], value[2])


@njit(cache=True, fastmath=True, inline="always")
def _look(table, a):
    n = len(table)
    k = int(a)
    f = a - k
    return table[k % n] * (1.0 - f) + table[(k + 1) % n] * f


@njit(cache=True, fastmath=True)
def paint_wall(image, d_cage, x, y, z, w, radial, ribs, rib_z, rib_fade, values, numbers, cube, frames, breasts):
    """The chest wall and what lies around it, in polar layers about (0, 0).

    radial (10, n) by angle (index 0 at -180 degrees, 0 degrees in front, + to the left), mm: cage radius, its
    distance factor, muscle tiers a1 b1 a2 b2 a3 b3 (depth outside the cage), skin radius, its factor.
    ribs (m, 6): side (+1 left), half thickness, half height, angle where cartilage starts, shell mm, depth.
    rib_z, rib_fade (m, n): height of the rib's axis at each angle and whether it is there (0 to 1).
    values (10, 3): skin, fat, muscle, cortex, spongiosa, cartilage, gland, inner (cavity), intercostal fat, unused.
    numbers: skin mm, rib layer mm, marbling, muscle roughness mm, gland share, spongiosa contrast, turn (degrees).
    breasts (k, 5): x, y, z of the gland's centre, half width, half height.
    """
    n = radial.shape[1]
    pi = np.pi
    skin_mm, layer_mm, marbling, rough, gland, spongy = (
        numbers[0],
        numbers[1],
        numbers[2],
        numbers[3],
        numbers[4],
        numbers[5],
    )
    for i in range(len(y)):
        for j in range(len(x)):
            px, py = x[j], y[i]
            rho = np.sqrt(px * px + py * py)
            a = (np.arctan2(px, -py) + pi) / (2 * pi) * n
            d_skin = (rho - _look(radial[8], a)) * _look(radial[9], a)
            c = _cover(d_skin, w)
            if c <= 0.0:
                d_cage[i, j] = 1e3
                continue
            _put(image, i, j, c, values[0, 0], values[0, 1], values[0, 2])
            c = _cover(d_skin + skin_mm, w)
            if c <= 0.0:
                d_cage[i, j] = 1e3
                continue
            coarse = _noise(cube, frames[0], px, py, z)
            fine = _noise(cube, frames[1], px, py, z)
            septa = max(0.0, 1.0 - abs(coarse + 0.3 * fine) * 6.0)
            _put(
                image,
                i,
                j,
                c,
                values[1, 0] + 5.0 * fine + 30.0 * septa,
                values[1, 1],
                values[1, 2],
            )
            for b in range(len(breasts)):
                ux = (px - breasts[b, 0]) / breasts[b, 3]
                uy = (py - breasts[b, 1]) / breasts[b, 3] * 1.6
                uz = (z - breasts[b, 2]) / breasts[b, 4]
                inside = 1.0 - ux * ux - uy * uy - uz * uz
                if inside > -0.5 and d_skin < -6.0:
                    share = 0.5 + 1.4 * (coarse + 0.3 * fine + 2.2 * inside - 2.4 + 2.0 * gland)
                    share = min(max(share, 0.0), 1.0) * c
                    _put(image, i, j, share, values[6, 0] + 6.0 * fine, values[6, 1], values[6, 2])
            q = (rho - _look(radial[0], a)) * _look(radial[1], a)
            d_cage[i, j] = q + 0.7 * coarse
            if q > 110.0:
                continue
            qn = q + 0.35 * rough * coarse + rough * _noise(cube, frames[2], px, py, z)
            # muscles: tiers with fat planes between, streaked with fat
            for t in range(3):
                lo, hi = _look(radial[2 + 2 * t], a), _look(radial[3 + 2 * t], a)
                if hi - lo < 0.3:
                    continue
                d = max(lo - qn, qn - hi)
                m = _cover(d, w) * min(1.0, (hi - lo - 0.3))
                if m > 0.0:
                    streak = 1.0 - abs(coarse + 0.35 * fine - 0.6) * 9.0
                    if (
                        t == 2 and hi - lo > 20.0
                    ):  # the thick mass of the shoulder is many muscles: planes of fat between
                        plane = _noise(cube, frames[2], 0.35 * px, 0.45 * py, 0.3 * z) + 0.06 * coarse
                        m *= min(1.0, max(0.0, abs(np.sin(2.4 * plane)) * 8.0 - 0.9))
                    hu = values[2, 0] + 5.0 * fine - (streak * 110.0 * marbling if streak > 0 else 0.0)
                    _put(image, i, j, m, hu, values[2, 1], values[2, 2])
            # between the ribs: inner and outer intercostals with a thin plane of fat
            if q < layer_mm + 2.0:
                m = _cover(q - layer_mm - 0.4 * fine, w)
                _put(image, i, j, m, values[2, 0] - 8.0 + 6.0 * fine, values[2, 1], values[2, 2])
                m = 0.35 * max(0.0, 1.0 - abs(q - 0.45 * layer_mm - 0.8 * coarse) / 1.4)
                _put(image, i, j, m, values[8, 0], values[8, 1], values[8, 2])
                side = 1.0 if px >= 0 else -1.0
                for r in range(len(ribs)):
                    if ribs[r, 0] != side:
                        continue
                    fade = _look(rib_fade[r], a)
                    if fade <= 0.02:
                        continue
                    slope = (_look(rib_z[r], a + 2.0) - _look(rib_z[r], a - 2.0)) / (4.0 * 2 * pi / n * rho)
                    v = (z - _look(rib_z[r], a)) / np.sqrt(1.0 + slope * slope)
                    hh = ribs[r, 2] * (0.35 + 0.65 * fade)
                    ht = ribs[r, 1] * (0.5 + 0.5 * fade)
                    if abs(v) > hh + 2.0:
                        continue
                    u = q - ribs[r, 5]
                    eu, ev = u / ht, v / hh
                    k0 = np.sqrt(eu * eu + ev * ev)
                    if k0 < 1e-4:
                        d = -ht
                    else:
                        k1 = np.sqrt((eu / ht) ** 2 + (ev / hh) ** 2)
                        d = k0 * (k0 - 1.0) / k1
                    m = _cover(d, w)
                    if m <= 0.0:
                        continue
                    front = abs(a / n * 360.0 - 180.0 - numbers[6]) < ribs[r, 3]
                    if front:
                        _put(image, i, j, m, values[5, 0] + 12.0 * fine, values[5, 1], values[5, 2])
                        m *= 0.0
                    else:
                        _put(image, i, j, m, values[3, 0], values[3, 1], values[3, 2])
                        m = _cover(d + ribs[r, 4] * (1.0 + 0.3 * coarse), w)
                        g = 1.0 + spongy * fine
                        _put(image, i, j, m, values[4, 0] * g, values[4, 1] * g, values[4, 2])
            m = _cover(q, w)
            if m > 0.0:
                # the fat of the mediastinum holds strands, small vessels, nodes and thymus
                lump = _noise(cube, frames[2], 1.7 * px, 1.7 * py, 1.2 * z) + 0.3 * coarse - 0.55
                hu = values[7, 0] + 5.0 * fine + 45.0 * septa + 75.0 * min(max(lump, 0.0), 1.0)
                _put(image, i, j, m, hu, values[7, 1], values[7, 2])


@njit(cache=True, fastmath=True)
def paint_table(image, x, y, w, top_mm, radius_mm, half_width_mm, shell, core, plate_mm):
    """A curved couch below y = top_mm: two shells and a core, following a circle of `radius_mm` about x = 0."""
    for i in range(len(y)):
        if y[i] < top_mm - 70.0:
            continue
        for j in range(len(x)):
            if abs(x[j]) > half_width_mm + 5:
                continue
            d = np.sqrt(x[j] ** 2 + (y[i] - top_mm + radius_mm) ** 2) - radius_mm  # > 0 below the table's top
            thick = plate_mm * (1.0 - (x[j] / half_width_mm) ** 4)
            if thick <= 0:
                continue
            c = _cover(max(-d, d - thick), w)
            if c > 0:
                _put(image, i, j, c, shell[0], shell[1], shell[2])
                c = _cover(max(2.2 - d, d - thick + 2.2), w)
                _put(image, i, j, c, core[0], core[1], core[2])


@njit(cache=True, fastmath=True)
def paint_lung(image, d_lung, side_map, x, y, z, w, numbers, cube, frames, fissures, threshold, emphysema, hole_grad):
    """Parenchyma with its gradient, texture, fissures and emphysema inside `d_lung` < 0.

    numbers: HU at y = 0, HU per mm of y, HU per mm of z above its reference, reference z, texture SD fine, mid, coarse,
    HU of a hole, fissure HU gain. threshold (y, x): the noise level above which tissue is gone (inf: nowhere).
    """
    for i in range(d_lung.shape[0]):
        for j in range(d_lung.shape[1]):
            d = d_lung[i, j]
            c = _cover(d, w)
            if c <= 0.0:
                continue
            px, py = x[j], y[i]
            fine = _noise(cube, frames[0], px, py, z)
            mid = _noise(cube, frames[1], px, py, z)
            coarse = _noise(cube, frames[2], px, py, z)
            hu = numbers[0] + numbers[1] * py + numbers[2] * (z - numbers[3])
            # texture grows with density, so that thin lung stays above air
            gain = (hu + 1000.0) / 140.0
            hu += gain * (numbers[4] * fine * (1.0 + 0.25 * mid) + numbers[5] * mid + numbers[6] * coarse)
            if d > -2.5:
                hu += 35.0 * (1.0 + d / 2.5)  # the subpleural line
            for f in range(len(fissures)):
                if fissures[f, 0] * side_map[i, j] < 0:
                    continue
                e = (
                    fissures[f, 1] * px
                    + fissures[f, 2] * py
                    + fissures[f, 3] * z
                    - fissures[f, 4]
                    + 3.0 * coarse * fissures[f, 6]
                )
                e = abs(e) / 0.55
                if e < 3.0:
                    if fissures[f, 5] * (py - fissures[f, 7]) <= 0.0:
                        hu += numbers[8] * np.exp(-0.5 * e * e)
            level = threshold[i, j]
            if level < 50.0:
                g = HOLE_MIX[0] * _noise(cube, frames[3], px, py, z) + HOLE_MIX[1] * _noise(cube, frames[4], px, py, z)
                rim = 1.0 - (level - g) / 0.6  # the tissue around a hole is thinned
                if rim > 0.0:
                    hu -= 55.0 * min(rim, 1.0) * gain
                hole = _cover((level - g) / hole_grad, w)
                if hole > 0.0:
                    hu += hole * (numbers[7] + 9.0 * fine - hu)
                    if hole > 0.5 and d < 0.0:
                        emphysema[i, j] = True
            _put(image, i, j, c, max(hu, -995.0), 0.0, 0.0)


@njit(cache=True)
def grow_fan(points, roots, straight, power, terminal_mm):
    """Trees that reach every point from the nearest of `roots`, with long branches that fan out.

    A point joins the tree where its distance to it plus `straight` times the way back to the root is least (a balanced
    spanning tree: 0 is the shortest wiring, 1 and more a star), then the branches are smoothed.
    points (n, 3), roots (m, 3). Returns float64 (n, 10): x0 y0 z0 r0 x1 y1 z1 r1, the number of ends served and 1 where
    the branch leaves a root. Radii follow Murray: r = terminal_mm * ends^(1/power).
    """
    n, m = len(points), len(roots)
    at = np.empty((m + n, 3))
    at[:m] = roots
    parent = np.full(m + n, -1)
    way = np.zeros(m + n)
    best = np.full(n, 1e18)
    near = np.zeros(n, np.int64)
    done = np.zeros(n, np.bool_)
    for step in range(m + n):
        if step >= m:
            low = 1e18
            chosen = -1
            for i in range(n):
                if not done[i] and best[i] < low:
                    low, chosen = best[i], i
            done[chosen] = True
            at[step] = points[chosen]
            parent[step] = near[chosen]
            way[step] = way[near[chosen]] + np.sqrt(((at[step] - at[near[chosen]]) ** 2).sum())
        qx, qy, qz = at[step]
        for i in range(n):
            if not done[i]:
                d = np.sqrt((points[i, 0] - qx) ** 2 + (points[i, 1] - qy) ** 2 + (points[i, 2] - qz) ** 2)
                cost = d + straight * (d + way[step])
                if cost < best[i]:
                    best[i], near[i] = cost, step
    ends = np.zeros(m + n)
    heir = np.full(m + n, -1)
    for k in range(m + n - 1, m - 1, -1):  # a child comes after its parent
        ends[k] = ends[k] + 0.25 if ends[k] > 0 else 1.0
        up = parent[k]
        if heir[up] < 0 or ends[k] > ends[heir[up]]:
            heir[up] = k
        ends[up] += ends[k]
    for _ in range(4):
        old = at.copy()
        for k in range(m, m + n):
            if heir[k] >= 0:
                at[k] = 0.4 * old[k] + 0.3 * (old[parent[k]] + old[heir[k]])
    out = np.empty((n, 10))
    for k in range(m, m + n):
        up = parent[k]
        radius = terminal_mm * ends[k] ** (1.0 / power)
        above = terminal_mm * ends[up] ** (1.0 / power) if up >= m else radius
        out[k - m, 0:3] = at[up]
        out[k - m, 3] = min(above, 1.12 * radius)
        out[k - m, 4:7] = at[k]
        out[k - m, 7] = radius if heir[k] >= 0 else 0.6 * radius
        out[k - m, 8] = ends[k]
        out[k - m, 9] = 1.0 if up < m else 0.0
    return out
