"""One slice of a patient: the anatomy painted back to front, and the masks that belong to it."""

from __future__ import annotations

import numpy as np

from harmonict.simulate import shapes
from harmonict.simulate.anatomy import (
    BINS,
    Anatomy,
    PlacedNodule,
    cage_table,
    distances,
    outline,
    spine_xy,
    spine_y,
    texture,
    turn_points,
)
from harmonict.simulate.disease import emphysema_weight


def near(segments: np.ndarray, z: float, margin: float) -> np.ndarray:
    low = np.minimum(segments[:, 2] - segments[:, 3], segments[:, 6] - segments[:, 7]) - margin
    high = np.maximum(segments[:, 2] + segments[:, 3], segments[:, 6] + segments[:, 7]) + margin
    return np.ascontiguousarray(segments[(low <= z) & (z <= high), :8])


_NONE = np.zeros((0, 0), np.float32)


def render(
    anatomy: Anatomy, x: np.ndarray, y: np.ndarray, z: float, w: float
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One slice: image float32 (3, y, x) and its masks (y, x)."""
    p, v, cube, frames = anatomy.patient, anatomy.values, anatomy.cube, anatomy.frames
    lungman = p.kind == "lungman"
    shape = (len(y), len(x))
    t = z / p.lung_height_mm
    image = np.empty((3, *shape), np.float32)
    image[:] = v["air"][:, None, None]
    _table(image, anatomy, x, y, w)
    radial = outline(anatomy, z)
    d_cage = np.empty(shape)
    bone = v["trabecular"]
    wall = np.stack(
        [v["skin"], v["fat"], v["muscle"], v["cortex"], bone, v["cartilage"], v["gland"], v["fat"], v["fat"], v["fat"]]
    )
    numbers = np.array(
        [0.1 if lungman else p.skin_mm, 11.0, 0.0 if lungman else p.marbling, 1.0, p.gland, 0.12, anatomy.turn_deg]
    )
    side = np.array([[-1.0], [1.0]])
    row = np.array([[0.42 * p.half_width_mm + 30, -p.depth_front_mm * 0.85 - 22, 0.42 * p.lung_height_mm, 62.0, 58.0]])
    breasts = turn_points(np.repeat(row, 2, 0) * np.where(np.arange(5) == 0, side, 1.0), (0,), anatomy.turn_deg)
    if p.breast_mm < 12 or lungman:
        breasts = breasts[:0]
    shown = np.abs(anatomy.rib_z - z).min(1) < 25.0
    shapes.paint_wall(
        image, d_cage, x, y, z, w, radial, anatomy.ribs[shown], anatomy.rib_z[shown], anatomy.rib_fade[shown],
        wall, numbers, cube, np.stack([frames["marbling"], frames["fine"], frames["warp"]]), breasts,
    )  # fmt: skip
    d_lung, below, heart = distances(anatomy, x, y, z, d_cage)
    fat_noise = np.zeros(shape, np.float32)
    _abdomen(image, anatomy, x, y, z, w, d_cage, below)
    # lungs
    emphysema = np.zeros(shape, bool)
    side_map = np.broadcast_to(np.where(x < 3.0, -1.0, 1.0)[None, :], shape)
    masks = {"lung": (d_lung < 0) & (d_cage < 0)}
    if lungman:
        shapes.paint_distance(image, d_lung, w, v["air"])
    else:
        _parenchyma(image, anatomy, d_lung, side_map, x, y, z, w, emphysema)
    # mediastinum
    shapes.paint_distance(image, np.maximum(heart, -d_lung - 2.0), w, v["myocardium"])
    if not lungman and heart.min() < 0:
        inner = np.full(shape, 60.0)
        j0, j1 = np.searchsorted(x, (-120.0, 130.0))
        i0, i1 = np.searchsorted(y, (-120.0, 110.0))
        shapes.ellipsoid_distance(x[j0:j1], y[i0:i1], z, anatomy.chambers, 1.5, inner[i0:i1, j0:j1])
        shapes.paint_distance(image, inner, w, v["arterial"])
    cover = fat_noise

    def tubes(segments: np.ndarray, value: np.ndarray, grow: float = 0.0) -> np.ndarray:
        chosen = near(segments, z, w + abs(grow))
        cover[:] = 0.0
        if len(chosen):
            if grow:
                chosen[:, 3] = np.maximum(chosen[:, 3] + grow, 0.05)
                chosen[:, 7] = np.maximum(chosen[:, 7] + grow, 0.05)
            shapes.cover_capsules(cover, x, y, z, chosen, w)
            shapes.blend(image, cover, value, _NONE)
        return cover

    if not lungman:
        tubes(anatomy.tubes["nodes"], v["node"])
    tubes(anatomy.tubes["vein"], v["venous"])
    tubes(anatomy.tubes["left_atrium"], v["arterial"])
    tubes(anatomy.tubes["pulmonary"], v["arterial"])
    tubes(anatomy.tubes["aorta"], v["arterial"])
    tubes(anatomy.tubes["oesophagus"], v["muscle"])
    if not lungman:
        swallowed = shapes.sample_noise(cube, frames["warp"], np.array([[0.0, 0.0, z]]))[0]
        if swallowed > 0.2:  # most of it lies collapsed
            tubes(anatomy.tubes["oesophagus"], v["air"], grow=-5.4 + min(swallowed, 2.0))
    tubes(anatomy.trees["vein"], v["venous"])
    tubes(anatomy.trees["artery"], v["arterial"])
    lumen = np.zeros(shape, bool)
    if not lungman:
        walls = anatomy.trees["airway"].copy()
        walls[:, [3, 7]] += 0.3 + 0.08 * walls[:, [3, 7]]
        tubes(walls, v["muscle"])
        tubes(anatomy.tubes["airway"], v["muscle"], grow=1.0)
        lumen |= tubes(anatomy.trees["airway"], v["air"]) > 0.5
    lumen |= tubes(anatomy.tubes["airway"], v["air"]) > 0.5
    _spine(image, anatomy, x, y, z, w)
    _sternum(image, anatomy, x, y, z, w)
    if t > 0.4 and not lungman:
        _scapulae(image, anatomy, x, y, z, w)
    tubes(anatomy.tubes["bone"], v["cortex"])
    tubes(anatomy.tubes["bone"], v["trabecular"], grow=-1.5)
    masks["lung"] &= ~lumen
    for number, nodule in enumerate(anatomy.nodules, 1):
        masks[f"nodule_{number}"] = _nodule(image, anatomy, nodule, x, y, z, w)
    masks["lung_left"] = masks["lung"] & (side_map > 0)
    masks["lung_right"] = masks["lung"] & (side_map < 0)
    masks["emphysema"] = emphysema & masks["lung"]
    return image, masks


def _table(image: np.ndarray, anatomy: Anatomy, x: np.ndarray, y: np.ndarray, w: float) -> None:
    model = np.random.default_rng([anatomy.patient.seed, 9])  # couches differ from scanner to scanner
    radius, plate = model.uniform(600.0, 1100.0), model.uniform(17.0, 30.0)
    carbon, foam = anatomy.values["carbon_fibre"], anatomy.values["foam"]
    shapes.paint_table(image, x, y, w, anatomy.back_mm + 1.5, radius, 205.0, carbon, foam, plate)


def _parenchyma(
    image: np.ndarray,
    anatomy: Anatomy,
    d_lung: np.ndarray,
    side_map: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    z: float,
    w: float,
    emphysema: np.ndarray,
) -> None:
    p, frames = anatomy.patient, anatomy.frames
    level = np.full(d_lung.shape, 99.0, np.float32)
    if p.emphysema and anatomy.emphysema_scale > 0:
        share = anatomy.emphysema_scale * float(
            emphysema_weight(np.array(z / p.lung_height_mm), p.emphysema.distribution)
        )
        level[:] = np.quantile(anatomy.hole_levels, 1.0 - min(share, 0.95))
    holes = frames.get("hole", frames["lung_mid"])
    numbers = np.array(
        [p.parenchyma_hu, p.gradient_hu_per_mm, -0.06, 0.5 * p.lung_height_mm, 17.0, 21.0, 27.0, -990.0, 95.0]
    )
    stack = np.stack(
        [frames["lung_fine"], frames["lung_mid"], frames["lung_coarse"], holes, frames.get("hole_fine", holes)]
    )
    grad = 1.5 / (p.emphysema.hole_mm if p.emphysema else 5.0)
    # a pixel of width w spans w * grad of the noise that cuts the holes
    shapes.paint_lung(
        image, d_lung, side_map, x, y, z, w, numbers, anatomy.cube, stack, anatomy.fissures, level, emphysema, w * grad
    )


def _abdomen(
    image: np.ndarray,
    anatomy: Anatomy,
    x: np.ndarray,
    y: np.ndarray,
    z: float,
    w: float,
    d_cage: np.ndarray,
    below: np.ndarray,
) -> None:
    """Diaphragm, liver, spleen and stomach under the domes."""
    p, v = anatomy.patient, anatomy.values
    length, half = p.lung_height_mm, p.half_width_mm
    if z > 0.4 * length:
        return
    inside = np.maximum(d_cage + 1.5, -below)
    shell = np.maximum(inside, below - 3.0)
    edge = (
        0.20 * half
        - 0.55 * (y[:, None] + 20.0)
        - 0.003 * (y[:, None] + 20.0) ** 2
        + 3.0 * texture(anatomy, "warp", x, y, z)
    )
    liver = np.maximum(inside + 3.0, x[None, :] - np.broadcast_to(edge, below.shape))
    liver = np.maximum(liver, y[:, None] - spine_y(p, z) + 2.0 - np.clip(-x[None, :] - 25.0, 0.0, 200.0))
    shapes.paint_distance(image, liver.astype(np.float64), w, v["enhanced_liver"])
    spleen = np.array(
        [[0.70 * half, 0.42 * p.depth_back_mm, 0.10 * length, 0.3, 0.8, 0.3, 0.95, -0.3, 0, 0, 0, 1, 46, 26, 46.0]]
    )
    stomach = np.array(
        [[0.44 * half, -0.30 * p.depth_front_mm, 0.09 * length, 0.9, 0.3, 0, -0.3, 0.9, 0, 0, 0, 1, 54, 42, 56.0]]
    )
    for shape, value in ((stomach, v["muscle"]), (spleen, v["enhanced_spleen"])):
        d = np.empty(below.shape)
        shapes.ellipsoid_distance(x, y, z, shape, 1.0, d)
        d = np.maximum(d, inside + 3.0)
        shapes.paint_distance(image, d, w, value)
        if shape is stomach and p.kind != "lungman":
            shapes.paint_distance(image, d + 4.0, w, v["water"] + np.array([25.0, 0.0, 0.0], np.float32))
            gas = np.maximum(d + 4.0, y[:, None] + 0.45 * p.depth_front_mm)
            shapes.paint_distance(image, gas, w, v["air"])
    shapes.paint_distance(image, shell, w, v["muscle"])


def _crop(x: np.ndarray, y: np.ndarray, box: tuple[float, float, float, float]) -> tuple[slice, slice]:
    j0, j1 = np.searchsorted(x, box[:2])
    i0, i1 = np.searchsorted(y, box[2:])
    return slice(i0, i1), slice(j0, j1)


def _lay(image: np.ndarray, rows: slice, columns: slice, distance: np.ndarray, w: float, value: np.ndarray) -> None:
    part = image[:, rows, columns]
    cover = np.clip(0.5 - distance / w, 0.0, 1.0).astype(np.float32)
    value = value if value.ndim == 3 else value[:, None, None]
    part += cover * (value - part)


def _spine(image: np.ndarray, anatomy: Anatomy, x: np.ndarray, y: np.ndarray, z: float, w: float) -> None:
    v = anatomy.values
    n = int(np.argmin(np.abs(anatomy.vertebrae[:, 0] - z)))
    zc, pitch = anatomy.vertebrae[n]
    if abs(z - zc) > pitch:
        zc = z
    xs, ys = spine_xy(anatomy, z)
    rows, columns = _crop(x, y, (xs - 34.0, xs + 34.0, ys - 30.0, ys + 40.0))
    px, py = x[columns][None, :] - xs, y[rows][:, None] - ys
    a, b = 15.5 + 0.35 * n, 12.5 + 0.25 * n
    half = pitch / 2 - 2.4
    rim = 1.0 + 0.09 * ((z - zc) / half) ** 2  # the waist of the body
    waist = (np.abs(px / (a * rim)) ** 2.5 + np.abs(py / (b * rim)) ** 2.5) ** (1 / 2.5)
    outline = (waist - 1.0) * min(a, b)
    outline = np.maximum(outline, py - (b * rim - 1.0) - 0.012 * px**2)
    body = np.maximum(outline, abs(z - zc) - half)
    canal = np.hypot(px / 1.15, py - b - 8.0) - 8.0
    _lay(image, rows, columns, canal - 2.0, w, v["fat"])
    _lay(image, rows, columns, canal + 1.0, w, v["csf"])
    _lay(image, rows, columns, np.hypot(px / 1.3, py - b - 8.0) - 4.2, w, v["cord"])
    _lay(image, rows, columns, outline - 0.3, w, v["cartilage"] * np.float32(0.8))
    _lay(image, rows, columns, body, w, v["cortex"])
    fine = texture(anatomy, "lung_fine", x[columns], y[rows], 0.55 * z)
    mid = texture(anatomy, "fine", x[columns], y[rows], z)
    gain = (1.0 + 0.22 * fine + 0.12 * mid).astype(np.float32)
    vein = np.clip(1.0 - np.hypot(px / 1.5, py - b + 5.0) / 4.0, 0, 1) * (abs(z - zc) < 3.5)  # basivertebral
    gain = gain * (1.0 - 0.5 * vein).astype(np.float32)
    _lay(image, rows, columns, body + 0.7, w, v["trabecular"][:, None, None] * gain)


def _sternum(image: np.ndarray, anatomy: Anatomy, x: np.ndarray, y: np.ndarray, z: float, w: float) -> None:
    p, v = anatomy.patient, anatomy.values
    t = z / p.lung_height_mm
    if not 0.30 < t < 0.90:
        return
    turn = np.deg2rad(anatomy.turn_deg)
    ahead = cage_table(anatomy, z)[0][BINS // 2] + 7.5
    xc, yc = ahead * np.sin(turn), -ahead * np.cos(turn)
    a = float(np.interp(t, (0.30, 0.36, 0.42, 0.6, 0.70, 0.74, 0.80, 0.88, 0.90), (4, 8, 17, 16, 14, 20, 29, 27, 20)))
    b = float(np.interp(t, (0.30, 0.36, 0.6, 0.72, 0.8, 0.9), (2.5, 4.5, 5.2, 6.2, 7.0, 7.0)))
    rows, columns = _crop(x, y, (xc - 42.0, xc + 42.0, yc - 22.0, yc + 22.0))
    px, py = x[columns][None, :] - xc, y[rows][:, None] - yc - 0.004 * (x[columns][None, :] - xc) ** 2
    py = py - np.tan(np.deg2rad(anatomy.turn_deg)) * px
    d = ((np.abs(px / a) ** 3 + np.abs(py / b) ** 3) ** (1 / 3) - 1.0) * b
    gap = abs(t - 0.725) < 0.008  # the joint of manubrium and body
    _lay(image, rows, columns, d, w, v["cartilage"] if gap else v["cortex"])
    if not gap:
        gain = 1.0 + 0.2 * texture(anatomy, "fine", x[columns], y[rows], z)
        _lay(image, rows, columns, d + 1.1, w, v["trabecular"][:, None, None] * (0.8 * gain).astype(np.float32))


def _scapulae(image: np.ndarray, anatomy: Anatomy, x: np.ndarray, y: np.ndarray, z: float, w: float) -> None:
    """The blade between subscapularis and infraspinatus, its spine, and the head of the humerus, each side."""
    p, v = anatomy.patient, anatomy.values
    t = z / p.lung_height_mm
    if t < 0.47:
        return
    table = outline(anatomy, z)
    medial = float(np.interp(t, (0.47, 0.6, 0.8, 1.05), (126, 138, 143, 142)))
    lateral = float(np.interp(t, (0.47, 0.6, 0.8, 1.05), (118, 107, 101, 96)))
    cover = np.zeros((len(y), len(x)), np.float32)
    inner = np.zeros_like(cover)
    for side in (-1.0, 1.0):
        angle = np.linspace(medial, lateral, 7)
        where = side * angle + anatomy.turn_deg
        k = ((180.0 + where) / 360.0 * BINS) % BINS
        bins = np.arange(BINS)
        radius = np.interp(k, bins, table[0]) + (np.interp(k, bins, table[3]) + 1.5) / np.interp(k, bins, table[1])
        if t > 0.8:  # the glenoid stands further out
            radius[-2:] += np.array([3.0, 8.0]) * (t - 0.8) / 0.2 * 2
        radius = radius + p.muscle * np.linspace(-1.0, 4.0, 7) * float(np.interp(t, (0.47, 0.7), (0.3, 1.0)))
        px, py = radius * np.sin(np.deg2rad(where)), -radius * np.cos(np.deg2rad(where))
        thick = np.interp(np.linspace(0, 1, 7), (0, 0.12, 0.4, 0.75, 1.0), (2.2, 1.5, 1.2, 2.2, 4.2))
        thick = thick * float(np.interp(t, (0.47, 0.52, 0.9), (0.5, 1.0, 1.25)))
        parts = [[px[i], py[i], z, thick[i], px[i + 1], py[i + 1], z, thick[i + 1]] for i in range(6)]
        if t > 0.76:  # the spine of the scapula
            out = 1.0 + 0.14 * min((t - 0.76) / 0.1, 1.0)
            parts.append([px[3], py[3], z, 2.2, px[4] * out, py[4] * out * 1.1, z, 3.0])
        segments = np.array(parts)
        shapes.cover_capsules(cover, x, y, z, segments, w)
        segments[:, [3, 7]] = np.maximum(segments[:, [3, 7]] - 1.3, 0.05)
        shapes.cover_capsules(inner, x, y, z, segments[segments[:, 3] > 0.3], w)
        reach = p.half_width_mm * 1.18
        if t > 0.9:
            head = np.array(
                [
                    [
                        side * reach,
                        8.0,
                        1.0 * p.lung_height_mm,
                        22.0,
                        side * (reach + 4),
                        0.0,
                        1.2 * p.lung_height_mm,
                        18.0,
                    ]
                ]
            )
            shapes.cover_capsules(cover, x, y, z, head, w)
            head[:, [3, 7]] -= 2.5
            shapes.cover_capsules(inner, x, y, z, head, w)
    shapes.blend(image, cover, v["cortex"], _NONE)
    shapes.blend(image, inner, v["trabecular"], _NONE)


def _nodule(
    image: np.ndarray, anatomy: Anatomy, nodule: PlacedNodule, x: np.ndarray, y: np.ndarray, z: float, w: float
) -> np.ndarray:
    """Paint a nodule and return its mask in the slice (half covered or more, spicules included)."""
    mask = np.zeros((len(y), len(x)), bool)
    cx, cy, cz = nodule.centre_mm
    radius = nodule.spec.diameter_mm / 2
    reach = 2.1 * radius + 2.0
    if abs(z - cz) > reach:
        return mask
    rows, columns = _crop(x, y, (cx - reach, cx + reach, cy - reach, cy + reach))
    xs, ys = x[columns], y[rows]
    if not len(xs) or not len(ys):
        return mask
    px, py, pz = xs[None, :] - cx, ys[:, None] - cy, z - cz
    distance = np.sqrt(px**2 + py**2 + pz**2)
    rough = nodule.spec.spiculation
    bumps = 0.0
    if rough:
        points = np.column_stack(
            [np.broadcast_to(a, distance.shape).ravel() for a in (px, py, np.full(distance.shape, pz))]
        )
        points *= radius / np.maximum(distance.ravel(), 1e-3)[:, None]
        bumps = 0.18 * rough * radius * shapes.sample_noise(anatomy.cube, nodule.frame, points).reshape(distance.shape)
    d = distance - radius - bumps
    cover = np.clip(0.5 - d / w, 0.0, 1.0).astype(np.float32)
    if len(nodule.spicules):
        chosen = near(nodule.spicules, z, w)
        if len(chosen):
            shapes.cover_capsules(cover, xs, ys, z, chosen, w)
    tissue = anatomy.values["muscle"] if anatomy.patient.kind == "chest" else anatomy.values["urethane_tumour"]
    grain = texture(anatomy, "fine", xs, ys, z)
    value = np.empty((3, *distance.shape), np.float32)
    part = image[:, rows, columns]
    if nodule.spec.density == "solid":
        value[:] = tissue[:, None, None]
        value[0] += 6.0 * grain
    else:  # ground glass: a third of the air is filled
        share = 0.36 + 0.05 * grain
        value[:] = np.maximum(part, part + share * (tissue[:, None, None] - part))
        value[1:] = part[1:]
        if nodule.spec.density == "part-solid":
            core = np.clip(0.5 - (distance - 0.5 * radius - 0.7 * bumps) / w, 0.0, 1.0).astype(np.float32)
            value += core * (tissue[:, None, None] - value)
    part += cover * (value - part)
    mask[rows, columns] = cover >= 0.5
    return mask
