"""The chest of one patient: tables, tubes and trees made from the numbers of a `Patient`, and one slice of it.

Heights are shares of the lung's height L: t = z / L is 0 at the posterior costophrenic recess and 1 at the apex. Angles
are counted from the front (0) over the left side (+90) to the back (180). Proportions are those of adult anatomy
textbooks, tuned by eye beside public chest CT; they are no measurement of anybody.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import gaussian_filter1d

from harmonict.core import HarmonictError
from harmonict.simulate import shapes
from harmonict.simulate.disease import NoduleSpec, emphysema_weight
from harmonict.simulate.materials import COMPOSITIONS, material_values

if TYPE_CHECKING:
    from harmonict.simulate.phantom import Patient

BINS = 720
ALPHA = np.abs(np.arange(BINS) / BINS * 360.0 - 180.0)  # degrees from the front
SIDE = np.where(np.arange(BINS) >= BINS // 2, 1.0, -1.0)  # +1 left
_HEIGHTS = (-0.15, 0.0, 0.3, 0.55, 0.75, 0.88, 0.96, 1.05)


@dataclass
class PlacedNodule:
    """A nodule with its place; `radii_mm` are the ball's (or the core's) radius and that of its spicules' tips."""

    spec: NoduleSpec
    centre_mm: tuple[float, float, float]
    frame: np.ndarray
    spicules: np.ndarray


@dataclass
class Anatomy:
    """Everything of a patient that does not depend on the slice; made by `build`, read by `render`."""

    patient: Patient
    cube: np.ndarray
    frames: dict[str, np.ndarray]
    jitter: np.ndarray  # (BINS,) of the cage's outline
    ribs: np.ndarray
    rib_z: np.ndarray
    rib_fade: np.ndarray
    vertebrae: np.ndarray  # (12, 2): height of the centre, spacing
    back_mm: float
    tubes: dict[str, np.ndarray]
    heart: np.ndarray
    chambers: np.ndarray
    fissures: np.ndarray
    values: dict[str, np.ndarray]
    turn_deg: float  # how far the patient lies rolled to the left
    trees: dict[str, np.ndarray] = field(default_factory=dict)
    nodules: list[PlacedNodule] = field(default_factory=list)
    emphysema_scale: float = 0.0
    hole_levels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # sorted values of the hole noise


def build(patient: Patient) -> Anatomy:
    """The anatomy of a patient, from its numbers and its seed alone. About a second."""
    streams = np.random.SeedSequence([patient.seed, 7]).spawn(6)
    rng = np.random.default_rng(streams[0])
    scale = {"marbling": 3.0, "fine": 1.0, "lung_fine": 0.42, "lung_mid": 1.5, "lung_coarse": 7.0, "warp": 6.0}
    frames = {name: shapes.noise_frame(rng, s) for name, s in scale.items()}
    if patient.emphysema:  # a stream of its own: disease does not move the body
        hole_rng, hole = np.random.default_rng(streams[4]), patient.emphysema.hole_mm
        frames["hole"] = shapes.noise_frame(hole_rng, hole / 2.2)
        frames["hole_fine"] = shapes.noise_frame(hole_rng, hole / 5.0)
    length = patient.lung_height_mm
    turn = np.deg2rad(np.arange(BINS) / BINS * 360.0)
    jitter = sum(
        rng.normal(0, 0.012 / k) * np.cos(k * turn) + rng.normal(0, 0.014 / k) * np.sin(k * turn) for k in range(1, 5)
    )
    heads = length * (1.03 - 0.0885 * np.arange(12))
    ribs, rib_z, rib_fade = _ribs(patient, rng, heads)
    vertebrae = np.stack([heads - 9.0, np.full(12, 0.0885 * length)], 1)
    tubes, heart, chambers = _mediastinum(patient, rng)
    anatomy = Anatomy(
        patient, shapes.noise_cube(), frames, jitter, ribs, rib_z, rib_fade, vertebrae, 0.0, tubes, heart, chambers,
        _fissures(patient, rng), _values(patient), 0.5 * round(2 * float(np.clip(rng.normal(0, 2.2), -5, 5))),
    )  # fmt: skip
    anatomy.back_mm = _back(anatomy)
    tubes |= _bones(anatomy, rng)
    bins = round(anatomy.turn_deg / 360.0 * BINS)
    anatomy.rib_z, anatomy.rib_fade = np.roll(rib_z, bins, 1), np.roll(rib_fade, bins, 1)
    for name in tubes:
        tubes[name] = turn_points(tubes[name], (0, 4), anatomy.turn_deg)
    anatomy.heart = turn_points(heart, (0, 3, 6, 9), anatomy.turn_deg)
    anatomy.chambers = turn_points(chambers, (0, 3, 6, 9), anatomy.turn_deg)
    coarse = _coarse_lung(anatomy)
    anatomy.nodules = _place_nodules(patient, np.random.default_rng(streams[1]), coarse)
    anatomy.trees = _trees(anatomy, np.random.default_rng(streams[2]), coarse)
    if patient.emphysema and patient.emphysema.share > 0:
        weight = emphysema_weight(coarse[:, 2] / length, patient.emphysema.distribution)
        anatomy.emphysema_scale = patient.emphysema.share / float(weight.mean())
        points = coarse[:, :3] + np.random.default_rng(streams[3]).uniform(-2.5, 2.5, (len(coarse), 3))
        noise = [shapes.sample_noise(anatomy.cube, frames[name], points) for name in ("hole", "hole_fine")]
        anatomy.hole_levels = np.sort(shapes.HOLE_MIX[0] * noise[0] + shapes.HOLE_MIX[1] * noise[1])
    return anatomy


def turn_points(rows: np.ndarray, at: tuple[int, ...], angle_deg: float) -> np.ndarray:
    """A copy with the (x, y) pairs that start at the columns `at` turned about the centre, front to left."""
    c, s = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    out = rows.copy()
    for a in at:
        out[:, a] = c * rows[:, a] - s * rows[:, a + 1]
        out[:, a + 1] = s * rows[:, a] + c * rows[:, a + 1]
    return out


def spine_xy(anatomy: Anatomy, z: float) -> tuple[float, float]:
    """Centre of the vertebral bodies in the slice, with the patient's turn."""
    y, turn = spine_y(anatomy.patient, z), np.deg2rad(anatomy.turn_deg)
    return -y * float(np.sin(turn)), y * float(np.cos(turn))


def _values(patient: Patient) -> dict[str, np.ndarray]:
    values = {n: material_values(n) for n in COMPOSITIONS}
    values["cortex"] = 0.5 * values["cortical_bone"] + 0.5 * values["marrow"]
    share = patient.bone_density
    values["trabecular"] = share * values["cortical_bone"] + (1 - share) * values["marrow"]
    iodine = material_values("iodine")
    values["arterial"] = values["blood"] + np.float32(patient.iodine_mg_ml) * iodine
    values["venous"] = values["blood"] + np.float32(0.8 * patient.iodine_mg_ml) * iodine
    values["enhanced_liver"] = values["liver"] + np.float32(0.15 * patient.iodine_mg_ml) * iodine
    values["enhanced_spleen"] = values["spleen"] + np.float32(0.3 * patient.iodine_mg_ml) * iodine
    values["myocardium"] = values["muscle"] + np.float32(0.25 * patient.iodine_mg_ml) * iodine
    values["node"] = 0.85 * values["muscle"] + 0.15 * values["fat"]
    if patient.kind == "lungman":
        for name in ("fat", "skin", "muscle", "gland", "cartilage"):
            values[name] = values["polyurethane"]
        for name in ("blood", "arterial", "venous", "myocardium", "enhanced_liver", "enhanced_spleen", "csf", "cord"):
            values[name] = values["polyurethane"] + np.array([45.0, 0.0, 0.0], np.float32)
        values["cortex"] = values["trabecular"] = values["epoxy_bone"] * np.float32(0.6)
    return values


def _ribs(patient: Patient, rng: np.random.Generator, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    drop = np.array([34, 62, 86, 104, 118, 128, 132, 128, 115, 96, 62, 38.0]) * patient.lung_height_mm / 270.0
    rise = np.array([0, 0, 5, 12, 24, 38, 55, 66, 70, 60, 0, 0.0]) * patient.lung_height_mm / 270.0
    junction = np.array([0.78, 0.80, 0.82, 0.83, 0.82, 0.80, 0.78, 0.74, 0.70, 0.66, 0.55, 0.40])
    end = np.array([0.95, 0.955, 0.955, 0.955, 0.955, 0.95, 0.95, 0.93, 0.88, 0.82, 0.54, 0.39])
    beta = (180.0 - ALPHA) / 180.0
    shape, heights, fades = [], [], []
    for side in (-1.0, 1.0):
        for i in range(12):
            b = np.minimum(beta / junction[i], 1.0)
            fall = drop[i] * (1.0 + rng.normal(0, 0.04))
            z = heads[i] + rng.normal(0, 2.5) - fall * (0.45 * b + 0.55 * b**1.5)
            z += rise[i] * np.clip((beta - junction[i]) / (1.0 - junction[i]), 0, 1)
            z += rng.normal(0, 1.2) * np.sin(2 * np.pi * beta) + rng.normal(0, 0.8) * np.sin(5 * np.pi * beta)
            thick, high = (4.2, 4.2) if i == 0 else (rng.normal(3.9, 0.25), rng.normal(6.6, 0.4))
            if i > 9:
                thick, high = 3.0, 4.8
            shape.append([side, thick, high, 180.0 * (1.0 - junction[i]), rng.uniform(0.75, 1.1), 5.6])
            heights.append(z)
            fades.append(np.clip((end[i] - beta) / 0.03, 0, 1))
    return np.array(shape), np.array(heights), np.array(fades)


def cage_table(anatomy: Anatomy, z: float) -> tuple[np.ndarray, np.ndarray]:
    """Radius (mm) of the pleural hull by angle in the slice, without and with the dip that the spine makes."""
    p = anatomy.patient
    t = z / p.lung_height_mm
    width = p.half_width_mm * np.interp(t, _HEIGHTS, (0.99, 1.0, 1.0, 0.965, 0.87, 0.72, 0.58, 0.42))
    front = p.depth_front_mm * np.interp(t, _HEIGHTS, (1.0, 1.0, 0.98, 0.90, 0.73, 0.52, 0.36, 0.26))
    back = p.depth_back_mm * np.interp(t, _HEIGHTS, (0.94, 0.97, 1.0, 1.0, 0.93, 0.80, 0.67, 0.54))
    a = np.deg2rad(ALPHA)
    depth = np.where(ALPHA < 90.0, front, back)
    n = np.where(ALPHA < 90.0, 2.25, 2.45)
    radius = (np.abs(np.sin(a) / width) ** n + np.abs(np.cos(a) / depth) ** n) ** (-1.0 / n)
    radius = radius * (1.0 + anatomy.jitter)
    dip = 1.0 - 0.40 * np.exp(-(((180.0 - ALPHA) / 19.0) ** 2.2))
    return radius, radius * dip


def spine_y(patient: Patient, z: float) -> float:
    """y of the vertebral bodies' centre in the slice."""
    t = z / patient.lung_height_mm
    return patient.depth_back_mm * float(
        np.interp(t, (-0.15, 0.0, 0.3, 0.6, 0.85, 1.05), (0.56, 0.59, 0.62, 0.61, 0.50, 0.38))
    )


def _lens(start: float, peak: float, end: float) -> np.ndarray:
    """A muscle's thickness over the angle: 0 at its two ends, 1 at its belly."""
    half = np.where(ALPHA < peak, peak - start, end - peak)
    return np.clip(1.0 - ((ALPHA - peak) / half) ** 2, 0.0, 1.0) ** 0.55


def outline(anatomy: Anatomy, z: float) -> np.ndarray:
    """The ten polar tables of `shapes.paint_wall` for the slice, float64 (10, BINS)."""
    p = anatomy.patient
    t = z / p.lung_height_mm
    smooth, cage = cage_table(anatomy, z)
    step = 2 * np.pi / BINS
    tilt = np.gradient(np.concatenate([cage[-2:], cage, cage[:2]]), step)[2:-2] / cage
    g = np.maximum(1.0 / np.sqrt(1.0 + tilt**2), 0.72)  # the dip is steep: there depth is counted half along the radius
    m = p.muscle * (1.0 + 0.012 * anatomy.turn_deg * SIDE * np.abs(np.sin(np.deg2rad(ALPHA))))
    layer = 11.0

    def at(points: tuple[float, ...], values: tuple[float, ...]) -> float:
        return float(np.interp(t, points, values))

    slips = 0.9 + 0.25 * np.cos(np.deg2rad(ALPHA) * 26.0 + 9.0 * t + SIDE)  # serratus: a slip for each rib
    serratus = m * at((0.0, 0.2, 0.5, 0.75, 0.9), (3, 5, 6, 7, 3)) * _lens(66, 96, 126) * slips
    pec_minor = m * at((0.55, 0.65, 0.85, 0.95), (0, 7, 8, 4)) * _lens(34, 56, 74)
    subscapular = m * at((0.42, 0.5, 0.62, 0.85, 1.0), (0, 11, 19, 21, 14)) * _lens(97, 110, 146)
    erector = (smooth - cage) * g * 0.85 + m * at((0.0, 0.5, 1.0), (9, 6, 8)) * np.clip((ALPHA - 146) / 12, 0, 1) ** 0.6
    erector = erector - 5.0 * np.clip((ALPHA - 171.0) / 9.0, 0, 1)  # the furrow over the spinous processes
    tier1 = np.maximum.reduce([serratus, pec_minor, subscapular, np.where(ALPHA > 146, erector, 0.0)])
    pec = m * at((0.30, 0.42, 0.55, 0.7, 0.85, 1.0), (0, 5, 9, 14, 16, 10)) * _lens(5, 57, 82)
    latissimus = m * at((0.0, 0.25, 0.42, 0.5, 0.56), (5, 10, 14, 10, 0)) * _lens(90, 108, 148)
    infraspinatus = m * at((0.43, 0.51, 0.62, 0.85, 1.0), (0, 12, 20, 21, 14)) * _lens(103, 122, 147)
    rhomboid = m * at((0.58, 0.68, 0.9), (0, 6, 7)) * _lens(148, 160, 178)
    oblique = m * at((-0.1, 0.15, 0.3), (8, 6, 0)) * _lens(12, 66, 122)
    rectus = m * at((-0.1, 0.2, 0.32), (9, 8, 0)) * _lens(1, 15, 30)
    tier2 = np.maximum.reduce([pec, latissimus, infraspinatus, rhomboid, oblique, rectus])
    trapezius = m * at((0.2, 0.4, 0.7, 1.0), (0, 4, 6, 13)) * np.clip((ALPHA - 150) / 14, 0, 1) ** 0.7
    teres = m * at((0.46, 0.54, 0.75, 0.88), (0, 14, 20, 14)) * _lens(92, 103, 118)
    tier3 = np.maximum(trapezius, teres)
    gap = 0.6 + 0.07 * p.fat_mm
    a1 = layer + gap + 0.1 * p.fat_mm * _lens(60, 90, 140)
    b1 = a1 + tier1
    a2 = b1 + gap + at((0.3, 0.5, 0.68, 0.85, 1.0), (1, 2, 4, 6, 4)) * _lens(62, 90, 116)
    b2 = a2 + tier2
    a3 = b2 + gap
    b3 = a3 + tier3
    outer = (
        cage + np.maximum.reduce([layer + 0 * b1, b1, np.where(tier2 > 0.3, b2, 0), np.where(tier3 > 0.3, b3, 0)]) / g
    )
    outer = gaussian_filter1d(outer, 11.0, mode="wrap")
    # the shoulder girdle widens the upper chest beyond the cage; arms are up and out of the picture
    if t > 0.55:
        wide = p.half_width_mm * at((0.55, 0.72, 0.85, 0.95, 1.05), (1.05, 1.24, 1.38, 1.42, 1.38))
        front = p.depth_front_mm * at((0.55, 0.75, 0.9, 1.05), (0.85, 0.88, 0.78, 0.62))
        back = (anatomy.back_mm - 8.0 if anatomy.back_mm else p.depth_back_mm + 20.0) * at(
            (0.6, 0.8, 0.92, 1.05), (0.86, 0.9, 0.98, 0.95)
        )
        a = np.deg2rad(ALPHA)
        depth = np.where(ALPHA < 90.0, front, back)
        girdle = (np.abs(np.sin(a) / wide) ** 2.5 + np.abs(np.cos(a) / depth) ** 2.5) ** (-1 / 2.5)
        top = np.maximum(outer, girdle)
        outer = top + 4.0 * np.exp(-np.abs(outer - girdle) / 8.0)
        fill = (outer - cage) * g
        fill = b3 + (fill - b3) * at((0.70, 0.86), (0.0, 1.0))
        extra = np.where((fill > a3 + 3.0) & (ALPHA > 30), fill, b3)
        b3 = np.maximum(b3, gaussian_filter1d(extra, 3.0, mode="wrap"))
    fat = p.fat_mm * np.interp(ALPHA, (0, 25, 60, 100, 140, 180), (0.5, 0.7, 0.95, 1.2, 0.8, 0.3))
    fat = fat * at((-0.1, 0.1, 0.5, 0.8, 1.0), (1.25, 1.1, 0.95, 0.9, 0.8)) + 2.0
    skin = outer + fat
    # supine breasts: a bulge in front, spread to the side
    bulge = p.breast_mm * at((0.22, 0.32, 0.42, 0.55, 0.68), (0.15, 0.75, 1.0, 0.75, 0.1))
    skin = skin + bulge * np.exp(-(np.abs((ALPHA - 42.0) / 27.0) ** 2.6))
    skin = gaussian_filter1d(skin, 6.0, mode="wrap") * (1.0 + 0.6 * anatomy.jitter)
    cage, g, a1, b1, a2, b2, a3, b3, skin = np.roll(
        np.stack([cage, g, a1, b1, a2, b2, a3, b3, skin]), round(anatomy.turn_deg / 360.0 * BINS), 1
    )
    if anatomy.back_mm:  # the back rests on the table
        below = np.cos(np.deg2rad(180.0 - ALPHA))
        limit = np.where(below > 0.05, anatomy.back_mm / np.maximum(below, 0.05), 1e4)
        h = np.maximum(14.0 - np.abs(skin - limit), 0.0) / 14.0
        skin = np.minimum(skin, limit) - h * h * 14.0 / 4.0
    skin = np.maximum(skin, cage + layer / g + 2.0)
    skin = skin - 12.0 * np.logaddexp(0.0, (skin - 228.0) / 12.0)  # nobody is wider than the scanner's field
    tilt = np.gradient(np.concatenate([skin[-2:], skin, skin[:2]]), step)[2:-2] / skin
    return np.stack([cage, g, a1, b1, a2, b2, a3, b3, skin, 1.0 / np.sqrt(1.0 + tilt**2)])


def _back(anatomy: Anatomy) -> float:
    """y of the table's top: a little less than where the free back would come, so that it flattens."""
    skin = outline(anatomy, 0.45 * anatomy.patient.lung_height_mm)[8]
    return float(np.quantile(skin[ALPHA > 150.0] * np.cos(np.deg2rad(180.0 - ALPHA[ALPHA > 150.0])), 0.7)) - 3.0


def reach_mm(anatomy: Anatomy, z_mm: np.ndarray) -> float:
    """Largest distance of the skin from the centre in these slices, mm."""
    return max(float(outline(anatomy, float(z))[8].max()) for z in z_mm)


def _chain(points: list[tuple[float, ...]], steps: int = 6) -> np.ndarray:
    """(x, y, z, r) points -> round cones along a smooth curve through them, (n, 8)."""
    p = np.array(points, float)
    t = np.arange(len(p))
    if len(p) > 2:
        from scipy.interpolate import PchipInterpolator

        fine = PchipInterpolator(t, p)(np.linspace(0, len(p) - 1, steps * (len(p) - 1) + 1))
    else:
        fine = p
    return np.hstack([fine[:-1], fine[1:]])


def _mediastinum(patient: Patient, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    s, length = patient.half_width_mm / 135.0, patient.lung_height_mm
    e = length / 270.0
    zh = 0.30 * length + 22.0 * e
    y0 = -0.30 * patient.depth_front_mm + 2.0
    j = lambda: rng.normal(0, 1.5)  # noqa: E731
    wide = patient.aorta_mm / 2

    def sp(z: float) -> float:
        return spine_y(patient, z)

    tubes: dict[str, np.ndarray] = {}
    arch_z = zh + 94 * e
    tubes["aorta"] = np.vstack(
        [
            _chain(
                [
                    (2 * s + j(), y0 + 4, zh + 18 * e, wide * 1.05),
                    (-12 * s, y0 - 4, zh + 44 * e, wide),
                    (-11 * s, y0 + 2, zh + 72 * e, wide * 0.97),
                    (0 * s, y0 + 18, arch_z, wide * 0.93),
                    (14 * s, sp(arch_z) - 30, arch_z + 2 * e, wide * 0.88),
                    (24 * s, sp(arch_z) - 12, arch_z - 14 * e, wide * 0.84),
                    (25 * s, sp(zh + 40) - 10, zh + 40 * e, wide * 0.8),
                    (22 * s, sp(zh) - 13, zh, wide * 0.78),
                    (12 * s, sp(40) - 24, 0.15 * length, wide * 0.75),
                    (4 * s, sp(0) - 28, -0.15 * length, wide * 0.72),
                ]
            ),
            _chain(
                [
                    (-6 * s, y0 + 12, arch_z, 6.5),
                    (-13 * s, sp(0.85 * length) - 42, arch_z + 25 * e, 6.0),
                    (-24 * s, sp(0.95 * length) - 40, 1.1 * length, 4.5),
                ]
            ),
            _chain(
                [
                    (4 * s, y0 + 22, arch_z + 2, 4.2),
                    (14 * s, sp(0.85 * length) - 36, arch_z + 25 * e, 3.8),
                    (20 * s, sp(0.95 * length) - 32, 1.1 * length, 3.5),
                ]
            ),
            _chain(
                [
                    (15 * s, sp(arch_z) - 28, arch_z + 3, 5.0),
                    (27 * s, sp(0.9 * length) - 24, arch_z + 28 * e, 4.8),
                    (46 * s, sp(0.95 * length) - 28, 1.02 * length, 4.2),
                    (80 * s, sp(length) - 40, 1.03 * length, 4.0),
                ]
            ),
        ]
    )
    tubes["vein"] = np.vstack(
        [
            _chain(
                [
                    (-33 * s, y0 + 8, zh + 22 * e, 11),
                    (-30 * s, y0 + 4, zh + 50 * e, 9.5),
                    (-29 * s, y0 + 2, zh + 88 * e, 8.5),
                    (-32 * s, sp(0.9 * length) - 48, 0.93 * length, 7.5),
                    (-44 * s, sp(length) - 48, 1.05 * length, 6.5),
                ]
            ),
            _chain(
                [
                    (-27 * s, y0, zh + 90 * e, 7.5),
                    (0 * s, y0 - 8, zh + 104 * e, 7.0),
                    (30 * s, sp(0.9 * length) - 52, 0.92 * length, 6.5),
                    (44 * s, sp(length) - 46, 1.05 * length, 6.0),
                ]
            ),
            _chain(
                [
                    (-26 * s, y0 + 16, zh - 5, 14),
                    (-27 * s, y0 + 22, zh - 34 * e, 13),
                    (-25 * s, y0 + 34, -0.1 * length, 12),
                ]
            ),
            _chain(
                [
                    (-8 * s, sp(0.6 * length) - 22, -0.1 * length, 3.0),
                    (-8 * s, sp(0.6 * length) - 21, zh + 66 * e, 3.2),
                    (-20 * s, sp(0.65 * length) - 28, zh + 78 * e, 3.4),
                    (-27 * s, y0 + 18, zh + 72 * e, 3.6),
                ]
            ),
        ]
    )
    carina = zh + 70 * e
    y_car = sp(carina) - 30
    r = patient.trachea_mm / 2
    at = lambda x, y, z, r: (x * s, y0 + y, zh + z * e, r)  # noqa: E731
    by = lambda x, y, z, r: (x * s, y_car + y, carina + z * e, r)  # noqa: E731, about the carina
    descending = {
        "right": _chain([by(-37, -11, -25, 9), by(-46, 1, -42, 7.6), by(-52, 11, -64, 6), by(-58, 19, -88, 4.2)]),
        "left": _chain([by(43, 0, -13, 9.5), by(51, 8, -26, 8), by(53, 13, -44, 6.4), by(59, 22, -80, 4.0)]),
    }
    upper = {
        "right": _chain([by(-30, -14, -20, 7), by(-44, -12, -5, 5.5), by(-50, -10, 6, 4.5)]),
        "left": _chain([by(40, -4, -10, 6), by(48, -10, 2, 4.6)]),
    }
    tubes["pulmonary"] = np.vstack(
        [
            _chain([at(16, -16, 22, 13.5), at(18, -4, 42, 13.5), at(15, 12, 54, 12.5)]),
            _chain([at(15, 12, 54, 12), by(28, -10, -9, 11), by(43, 0, -13, 9.5)]),
            _chain([at(13, 13, 52, 12), at(-12, 22, 49, 10.5), by(-28, -15, -22, 10), by(-37, -11, -25, 9)]),
            *descending.values(),
            *upper.values(),
        ]
    )
    bronchi = {
        "right": np.vstack(
            [
                _chain([by(-25, 1, -17, r * 0.55), by(-38, -1, -15, r * 0.48), by(-48, -4, -10, r * 0.36)]),
                _chain([by(-33, 1, -46, r * 0.42), by(-42, -12, -55, r * 0.36), by(-50, -24, -60, r * 0.3)]),
                _chain(
                    [
                        by(-27, 2, -20, r * 0.6),
                        by(-32, 2, -42, r * 0.54),
                        by(-38, 7, -58, r * 0.44),
                        by(-48, 17, -84, r * 0.32),
                    ]
                ),
            ]
        ),
        "left": np.vstack(
            [
                _chain([by(36, 2, -30, r * 0.48), by(46, -8, -28, r * 0.4), by(52, -16, -22, r * 0.32)]),
                _chain(
                    [
                        by(36, 3, -30, r * 0.54),
                        by(41, 8, -46, r * 0.44),
                        by(50, 19, -78, r * 0.3),
                    ]
                ),
            ]
        ),
    }
    tubes["airway"] = np.vstack(
        [
            _chain(
                [
                    (-1, sp(1.1 * length) - 40, 1.1 * length, r),
                    (-1, sp(0.9 * length) - 36, 0.88 * length, r),
                    (-2 + j(), y_car, carina + 4, r * 1.04),
                    (-2, y_car + 1, carina - 3, r * 0.9),
                ]
            ),
            _chain([(-3, y_car, carina, r * 0.8), by(-16, 1, -11, r * 0.72), by(-27, 2, -20, r * 0.64)]),
            _chain([(0, y_car, carina, r * 0.76), by(18, 1, -18, r * 0.66), by(36, 3, -30, r * 0.56)]),
            *bronchi.values(),
        ]
    )
    veins = {
        "right": [
            _chain([at(-26, 36, 30, 8), by(-38, -24, -30, 6.5), by(-48, -26, -22, 4.6)]),
            _chain([at(-26, 42, 16, 8), by(-40, 6, -62, 6.2), by(-52, 13, -66, 4.6)]),
        ],
        "left": [
            _chain([at(28, 36, 32, 8), by(42, -22, -30, 6.4), by(50, -26, -18, 4.6)]),
            _chain([at(28, 42, 16, 8), by(42, 5, -60, 6.2), by(54, 13, -66, 4.6)]),
        ],
    }
    tubes["left_atrium"] = np.vstack([*veins["right"], *veins["left"]])
    for name in ("right", "left"):  # where the trees of the lungs may start
        tubes[f"root_artery_{name}"] = np.vstack([descending[name], upper[name]])
        tubes[f"root_airway_{name}"] = bronchi[name]
        tubes[f"root_vein_{name}_upper"], tubes[f"root_vein_{name}_lower"] = (v[6:] for v in veins[name])
    # fat and nodes around the vessels and bronchi: the lung keeps off
    tubes["hilar"] = np.vstack(
        [
            _chain([by(0, -8, -6, 13), by(0, -12, -34, 17), (4 * s, sp(zh) - 34, zh - 10 * e, 13)]),
            _chain([by(-12, -14, 4, 14), by(-12, -16, 44, 10)]),
            _chain([by(24, -22, -8, 12), by(20, -12, 22, 11)]),
            _chain([(-12 * s, sp(0.65 * length) - 28, zh + 72 * e, 10), at(-17, 18, 72, 10), at(-18, 6, 70, 10)]),
            _chain([by(-20, -8, -12, 13), by(-34, -6, -34, 11), by(-40, 5, -58, 6)]),
            _chain([by(24, -8, -14, 13), by(38, -3, -28, 11), by(43, 7, -52, 6)]),
        ]
    )
    spots = [by(-1, -4, -14, 6), by(6, -8, -24, 4), by(-13, -12, 10, 4.5), by(-12, -10, 24, 3.2), by(22, -10, 6, 4),
             by(26, -20, 0, 3), by(-33, -4, -30, 4.5), by(36, -6, -40, 4), by(-42, -3, -24, 4), by(45, -3, -36, 3.5),
             at(-8, -24, 84, 2.6), at(12, -22, 78, 3), at(-4, -22, 62, 2.4)]  # fmt: skip
    tubes["nodes"] = np.array(
        [
            [*(np.array(c[:3]) - d), 0.75 * k * c[3], *(np.array(c[:3]) + d), 0.6 * k * c[3]]
            for c in spots
            for d, k in [(rng.normal(0, 2.6, 3), rng.uniform(0.6, 1.25))]
        ]
    )
    oes = lambda z, x, d: (x * s, sp(z) - d, z)  # noqa: E731
    tubes["oesophagus"] = _chain(
        [
            (*oes(1.1 * length, 3, 25), 5.6),
            (*oes(0.85 * length, 5, 23), 5.2),
            (*oes(0.6 * length, 2, 24), 5.2),
            (*oes(0.4 * length, 4, 28), 5.8),
            (*oes(0.25 * length, 12, 34), 6.5),
            (*oes(0.15 * length, 22, 44), 7.0),
        ]
    )

    def ellipsoid(c: tuple[float, ...], long: tuple[float, ...], axes: tuple[float, ...]) -> list[float]:
        u = np.array(long, float)
        u /= np.linalg.norm(u)
        v = np.cross(u, (0.0, 0.0, 1.0))
        v /= np.linalg.norm(v)
        w = np.cross(u, v)
        return [*c, *u, *v, *w, *axes]

    k = patient.heart
    axis = (0.72, -0.52, -0.38 + rng.normal(0, 0.06))
    centre = lambda x, y, z: (x * s, y0 + y, zh + z * e)  # noqa: E731
    heart = np.array(
        [
            ellipsoid(centre(42, 7, -8), axis, (47 * k, 32 * k, 33 * k)),
            ellipsoid(centre(8, -18, -8), (0.9, -0.2, -0.3), (46 * k, 30 * k, 36 * k)),
            ellipsoid(centre(-29, 6, 4), (0.1, 0.1, 1.0), (36 * k, 24 * k, 27 * k)),
            ellipsoid(centre(2, 36, 24), (1.0, 0.05, 0.1), (34 * k, 20 * k, 22 * k)),
        ]
    )
    chambers = np.array(
        [
            ellipsoid(centre(41, 7, -7), axis, (37 * k, 22 * k, 23 * k)),
            ellipsoid(centre(6, -19, -8), (0.9, -0.2, -0.3), (41 * k, 25 * k, 31 * k)),
            ellipsoid(centre(-29, 6, 4), (0.1, 0.1, 1.0), (33 * k, 21 * k, 24 * k)),
            ellipsoid(centre(2, 36, 24), (1.0, 0.05, 0.1), (32 * k, 18 * k, 20 * k)),
        ]
    )
    return tubes, heart, chambers


def _bones(anatomy: Anatomy, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Arches of the vertebrae, clavicles, shoulder: round cones of bone."""
    p = anatomy.patient
    bones = []
    for zc, pitch in anatomy.vertebrae:
        y = spine_y(p, zc)
        up = 0.16 * pitch
        for side in (-1.0, 1.0):
            bones.append([side * 11, y + 9, zc + up, 4.4, side * 14, y + 22, zc + up * 0.6, 4.6])  # pedicle
            bones.append([side * 14, y + 23, zc + 4, 4.4, side * 2, y + 34, zc + 1, 3.2])  # lamina
            bones.append([side * 13, y + 24, zc - 6, 4.0, side * 2, y + 35, zc - 10, 3.2])
            bones.append(
                [side * 14, y + 23, zc + 3, 4.6, side * 32, y + 33 + rng.normal(0, 1), zc + 4, 4.0]
            )  # transverse
            bones.append([side * 12, y + 24, zc - 9, 4.2, side * 13, y + 22, zc + 11, 4.2])  # articular pillar
        bones.append([0, y + 34, zc - 3, 3.6, rng.normal(0, 1.0), y + 56, zc - 24, 3.0])  # spinous
    length, w = p.lung_height_mm, p.half_width_mm
    for side in (-1.0, 1.0):
        front = -cage_table(anatomy, 0.9 * length)[0][BINS // 2]
        for part in _chain(
            [
                (side * 17, front - 9, 0.885 * length, 8.5),
                (side * 48, front - 6, 0.955 * length, 5.5),
                (side * 90, front + 24, 1.02 * length, 5.5),
                (side * 1.05 * w, front + 40, 1.08 * length, 6.0),
            ],
            4,
        ):
            bones.append(list(part))
    return {"bone": np.array(bones, float)}


def _fissures(patient: Patient, rng: np.random.Generator) -> np.ndarray:
    """Planes n.x = c: side, nx, ny, nz, c, which way of y (0: all), warp, y limit."""
    length = patient.lung_height_mm
    rows = []
    for side in (-1.0, 1.0):
        # oblique: from high in the back to the front of the diaphragm
        n = np.array([0.08 * side, 0.62 + rng.normal(0, 0.03), -0.78])
        n /= np.linalg.norm(n)
        through = np.array([side * 0.5 * patient.half_width_mm, 8.0, 0.50 * length])
        rows.append([side, *n, n @ through, 0.0, 1.0, 0.0])
    n = np.array([0.16, 0.24 + rng.normal(0, 0.05), 1.0])
    n /= np.linalg.norm(n)
    through = np.array([-0.5 * patient.half_width_mm, -30.0, 0.50 * length])
    rows.append([-1.0, *n, n @ through, 1.0, 1.0, 2.0])
    return np.array(rows)


def _dome(anatomy: Anatomy, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height (mm) of the diaphragm over the grid and the factor from vertical to true distance."""
    p = anatomy.patient
    length, w = p.lung_height_mm, p.half_width_mm
    right = x[None, :] < 0
    top = length * np.where(right, p.dome[0], p.dome[1])
    cx = np.where(right, -0.47 * w, 0.48 * w)
    ux = (x[None, :] - cx) / (0.60 * w)
    # towards the middle the dome stays high: the heart lies on it
    ux = np.where(np.abs(x[None, :]) < np.abs(cx), ux * 0.45, ux)
    uy = (y[:, None] + 6.0) / np.where(y[:, None] < -6.0, p.depth_front_mm * 0.98, p.depth_back_mm * 0.98)
    q = np.sqrt(ux**2 + uy**2 + 1e-6)
    # the front recess is shallow, the side and the back are deep
    ahead = np.clip((10.0 - y[:, None]) / (0.9 * p.depth_front_mm), 0.0, 1.0)
    ahead = ahead * ahead * (3.0 - 2.0 * ahead) * (1.0 - 0.8 * np.clip(np.abs(ux), 0, 1) ** 2)
    fall = length * (0.36 - 0.23 * ahead)
    height = top - fall * q**2.3
    slope = fall * 2.3 * q**1.3 / (0.7 * w)
    return height.astype(np.float32), (1.0 / np.sqrt(1.0 + slope**2)).astype(np.float32)


def distances(
    anatomy: Anatomy, x: np.ndarray, y: np.ndarray, z: float, d_cage: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance maps (y, x) of the slice: lung, diaphragm (negative above it), heart."""
    p = anatomy.patient
    t = z / p.lung_height_mm
    heart = np.full(d_cage.shape, 60.0)
    tube = np.full(d_cage.shape, 60.0)
    j0, j1 = np.searchsorted(x, (-120.0, 130.0))
    i0, i1 = np.searchsorted(y, (-120.0, 110.0))
    shapes.ellipsoid_distance(x[j0:j1], y[i0:i1], z, anatomy.heart, 3.0, heart[i0:i1, j0:j1])
    for name in ("aorta", "vein", "pulmonary", "airway", "oesophagus", "left_atrium"):
        shapes.capsule_distance(x, y, z, anatomy.tubes[name], tube)
    middle = tube - 2.0
    filler = np.full(d_cage.shape, 60.0)
    shapes.capsule_distance(x, y, z, anatomy.tubes["hilar"], filler)
    shapes.smooth_min(middle, filler, 10.0)
    bulge = 2.5 * texture(anatomy, "lung_coarse", x, y, z)
    heart = heart + 0.6 * bulge
    shapes.smooth_min(middle, heart - 2.0 - p.fat_mm * 0.2 - 1.4 * bulge, 9.0)
    xs, ys = spine_xy(anatomy, z)
    spine = np.hypot((x[None, :] - xs) / 1.12, y[:, None] - ys - 2.0) - 18.5
    shapes.smooth_min(middle, spine, 14.0)
    # the plate of fat between the lungs, thin in front of the heart and aorta
    half = float(np.interp(t, (0.2, 0.45, 0.6, 0.75, 0.88, 1.0), (9.0, 8.0, 15.0, 22.0, 24.0, 27.0)))
    front = -0.9 * p.depth_front_mm
    narrow = np.clip((y[:, None] - front) / (0.5 * p.depth_front_mm), 0.0, 1.0)
    plate = np.abs(x[None, :] - 4.0 + np.sin(np.deg2rad(anatomy.turn_deg)) * y[:, None]) - half * (0.25 + 0.75 * narrow)
    plate = np.maximum(plate + 1.6 * bulge, y[:, None] - ys)
    shapes.smooth_min(middle, plate, 12.0)
    height, factor = _dome(anatomy, x, y)
    below = (height - z) * factor
    lung = d_cage.copy()
    lung *= -1.0
    shapes.smooth_min(lung, middle, 5.0)
    shapes.smooth_min(lung, -below.astype(np.float64), 5.0)
    return -lung, below, heart


def _cage_distance(anatomy: Anatomy, x: np.ndarray, y: np.ndarray, z: float) -> np.ndarray:
    table = outline(anatomy, z)
    angle = (np.arctan2(x[None, :], -y[:, None]) + np.pi) / (2 * np.pi) * BINS
    radius = np.interp(angle, np.arange(BINS + 1), np.append(table[0], table[0][0]))
    factor = np.interp(angle, np.arange(BINS + 1), np.append(table[1], table[1][0]))
    return (np.hypot(x[None, :], y[:, None]) - radius) * factor


def _coarse_lung(anatomy: Anatomy) -> np.ndarray:
    """Points (n, 4) on a 5 mm lattice inside the lungs: x, y, z and the distance to the border (negative)."""
    p = anatomy.patient
    step = 5.0
    x = np.arange(-160.0, 161.0, step)
    y = np.arange(-130.0, 131.0, step)
    points = []
    for z in np.arange(-5.0, 1.05 * p.lung_height_mm, step):
        d = distances(anatomy, x, y, float(z), _cage_distance(anatomy, x, y, float(z)))[0]
        i, j = np.nonzero(d < 0)
        points.append(np.stack([x[j], y[i], np.full(len(i), z), d[i, j]], 1))
    return np.concatenate(points)


def _place_nodules(patient: Patient, rng: np.random.Generator, lung: np.ndarray) -> list[PlacedNodule]:
    placed: list[PlacedNodule] = []
    for number, spec in enumerate(patient.nodules, 1):
        radius = spec.diameter_mm / 2
        if spec.position_mm is not None:
            centre = np.array(spec.position_mm, float)
        else:
            fits = lung[lung[:, 3] < -(radius + 1.0)]
            for other in placed:
                apart = np.linalg.norm(fits[:, :3] - other.centre_mm, axis=1)
                fits = fits[apart > radius + other.spec.diameter_mm / 2 + 4.0]
            if not len(fits):
                raise HarmonictError(
                    f"nodule {number} of {spec.diameter_mm:g} mm finds no place in the lung; take a smaller one"
                )
            centre = fits[rng.integers(len(fits)), :3] + rng.uniform(-2.4, 2.4, 3)
        count = round(spec.spiculation * 22)
        spicules = np.zeros((count, 8))
        for n in range(count):
            u = rng.standard_normal(3)
            u /= np.linalg.norm(u)
            far = radius * rng.uniform(1.3, 1.9) + 1.0
            spicules[n] = [*(centre + u * radius * 0.6), max(0.11 * radius, 0.7), *(centre + u * far), 0.35]
        placed.append(
            PlacedNodule(
                spec,
                (float(centre[0]), float(centre[1]), float(centre[2])),
                shapes.noise_frame(rng, max(radius / 2.2, 1.0)),
                spicules,
            )
        )
    return placed


def _limb(tree: np.ndarray, shift: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The bronchi beside the thick arteries of a lobe: moved aside by `shift`, the first ones from `start` (n, 3)."""
    thick = tree[tree[:, 8] > 24]
    first = thick[:, 9] > 0
    air = thick[:, :9].copy()
    for a in (0, 4):
        air[:, a : a + 3] += shift * (thick[:, a + 3] * 1.75 + 0.4)[:, None]
        air[:, a + 3] = np.minimum(thick[:, a + 3] * 0.74, 3.2)
    for n in np.flatnonzero(first):
        air[n, :3] = start[np.argmin(np.linalg.norm(start - air[n, 4:7], axis=1))]
    return air


def _trees(anatomy: Anatomy, rng: np.random.Generator, lung: np.ndarray) -> dict[str, np.ndarray]:
    """Arteries, veins and airways of both lungs, sorted into one array each (n, 9)."""
    p = anatomy.patient
    out: dict[str, list[np.ndarray]] = {"artery": [], "vein": [], "airway": []}
    for side, name in ((-1.0, "right"), (1.0, "left")):
        here = lung[(lung[:, 0] * side > 0) & (lung[:, 3] < -3.5)]
        lobe = np.zeros(len(here), int)
        clear = np.ones(len(here), bool)
        for f in anatomy.fissures:
            if f[0] != side:
                continue
            d = here[:, :3] @ f[1:4] - f[4]
            if f[5] == 0:
                lobe += d > 0
                clear &= np.abs(d) > 4.0
            else:
                front = lobe == 0
                lobe[front & (d > 0)] = 2
                clear &= ~front | (np.abs(d) > 1.5)
        airway = anatomy.tubes[f"root_airway_{name}"][:, :3]
        for kind in ("artery", "vein"):
            for n in np.unique(lobe):
                places = here[(lobe == n) & clear, :3]
                want = max(int(len(places) * 0.58 * p.vessels), 8)
                chosen = places[rng.choice(len(places), min(want, len(places)), replace=False)]
                chosen = chosen + rng.uniform(-2.4, 2.4, chosen.shape)
                if kind == "vein":
                    root = anatomy.tubes[f"root_vein_{name}_{'lower' if n == 1 else 'upper'}"]
                else:
                    root = anatomy.tubes[f"root_artery_{name}"]
                tree = shapes.grow_fan(chosen, root[:, 4:7].copy(), 0.42, 2.9, p.vessel_mm / 2)
                out[kind].append(tree[:, :9])
                if kind == "artery":
                    out["airway"].append(_limb(tree, np.array([-0.35 * side, 0.75, 0.5]), airway))
    return {name: np.concatenate(parts) for name, parts in out.items()}


def texture(anatomy: Anatomy, name: str, x: np.ndarray, y: np.ndarray, z: float) -> np.ndarray:
    gx, gy = np.meshgrid(x, y)
    points = np.column_stack([gx.ravel(), gy.ravel(), np.full(gx.size, z)])
    return shapes.sample_noise(anatomy.cube, anatomy.frames[name], points).reshape(gx.shape)
