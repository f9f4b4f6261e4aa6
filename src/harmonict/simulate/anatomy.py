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
from harmonict.simulate.materials import material_values

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
    if patient.emphysema:
        hole = patient.emphysema.hole_mm
        frames["hole"] = shapes.noise_frame(rng, hole / 2.2)
        frames["hole_fine"] = shapes.noise_frame(rng, hole / 5.0)
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
        _fissures(patient, rng), _values(patient),
    )  # fmt: skip
    anatomy.back_mm = _back(anatomy)
    tubes |= _bones(anatomy, rng)
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


def _values(patient: Patient) -> dict[str, np.ndarray]:
    names = ("air", "fat", "skin", "muscle", "blood", "cartilage", "gland", "liver", "spleen", "csf", "cord", "water")
    names += (
        "cortical_bone",
        "marrow",
        "carbon_fibre",
        "foam",
        "lung_tissue",
        "polyurethane",
        "epoxy_bone",
        "spongiosa",
    )
    names += ("urethane_tumour",)
    values = {n: material_values(n) for n in names}
    values["cortex"] = 0.5 * values["cortical_bone"] + 0.5 * values["marrow"]
    share = patient.bone_density
    values["trabecular"] = share * values["cortical_bone"] + (1 - share) * values["marrow"]
    iodine = material_values("iodine")
    values["arterial"] = values["blood"] + np.float32(patient.iodine_mg_ml) * iodine
    values["venous"] = values["blood"] + np.float32(0.8 * patient.iodine_mg_ml) * iodine
    values["enhanced_liver"] = values["liver"] + np.float32(0.15 * patient.iodine_mg_ml) * iodine
    values["enhanced_spleen"] = values["spleen"] + np.float32(0.3 * patient.iodine_mg_ml) * iodine
    values["myocardium"] = values["muscle"] + np.float32(0.25 * patient.iodine_mg_ml) * iodine
    if patient.kind == "lungman":
        for name in ("fat", "skin", "muscle", "gland", "cartilage"):
            values[name] = values["polyurethane"]
        for name in ("blood", "arterial", "venous", "myocardium", "enhanced_liver", "enhanced_spleen", "csf", "cord"):
            values[name] = values["polyurethane"] + np.array([45.0, 0.0, 0.0], np.float32)
        values["cortex"] = values["trabecular"] = values["epoxy_bone"] * np.float32(0.6)
    return values


def _ribs(patient: Patient, rng: np.random.Generator, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    drop = np.array([25, 45, 62, 76, 88, 98, 104, 104, 96, 84, 55, 35.0]) * patient.lung_height_mm / 270.0
    rise = np.array([0, 0, 5, 12, 24, 38, 55, 66, 70, 60, 0, 0.0]) * patient.lung_height_mm / 270.0
    junction = np.array([0.78, 0.80, 0.82, 0.83, 0.82, 0.80, 0.78, 0.74, 0.70, 0.66, 0.55, 0.40])
    end = np.array([0.95, 0.955, 0.955, 0.955, 0.955, 0.95, 0.95, 0.93, 0.88, 0.82, 0.54, 0.39])
    beta = (180.0 - ALPHA) / 180.0
    shape, heights, fades = [], [], []
    for side in (-1.0, 1.0):
        for i in range(12):
            b = np.minimum(beta / junction[i], 1.0)
            fall = drop[i] * (1.0 + rng.normal(0, 0.04))
            z = heads[i] + rng.normal(0, 2.5) - fall * (0.25 * b + 0.75 * b**1.5)
            z += rise[i] * np.clip((beta - junction[i]) / (1.0 - junction[i]), 0, 1)
            z += rng.normal(0, 1.2) * np.sin(2 * np.pi * beta) + rng.normal(0, 0.8) * np.sin(5 * np.pi * beta)
            thick, high = (4.2, 4.2) if i == 0 else (rng.normal(3.5, 0.2), rng.normal(6.6, 0.4))
            if i > 9:
                thick, high = 3.0, 4.8
            shape.append([side, thick, high, 180.0 * (1.0 - junction[i]), rng.uniform(0.8, 1.2), 4.6])
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


def _bump(centre: float, half: float) -> np.ndarray:
    return np.clip(1.0 - ((ALPHA - centre) / half) ** 2, 0.0, 1.0) ** 0.7


def _outline(anatomy: Anatomy, z: float) -> np.ndarray:
    """The ten polar tables of `shapes.paint_wall` for the slice, float64 (10, BINS)."""
    p = anatomy.patient
    t = z / p.lung_height_mm
    smooth, cage = cage_table(anatomy, z)
    step = 2 * np.pi / BINS
    tilt = np.gradient(np.concatenate([cage[-2:], cage, cage[:2]]), step)[2:-2] / cage
    g = np.maximum(1.0 / np.sqrt(1.0 + tilt**2), 0.72)  # the dip is steep: there depth is counted half along the radius
    m = p.muscle
    layer = 9.5

    def at(points: tuple[float, ...], values: tuple[float, ...]) -> float:
        return float(np.interp(t, points, values))

    serratus = m * at((0.0, 0.2, 0.5, 0.75, 0.9), (2, 6, 7, 8, 3)) * _bump(100, 30)
    pec_minor = m * at((0.5, 0.62, 0.85, 0.95), (0, 7, 8, 4)) * _bump(50, 20)
    subscapular = m * at((0.42, 0.55, 0.85, 1.0), (0, 11, 20, 14)) * _bump(116, 32)
    erector = (smooth - cage) * g + m * at((0.0, 0.5, 1.0), (13, 9, 11)) * np.clip((ALPHA - 146) / 12, 0, 1) ** 0.6
    erector = erector - 6.0 * np.clip((ALPHA - 172.0) / 8.0, 0, 1)  # the furrow over the spinous processes
    tier1 = np.maximum.reduce([serratus, pec_minor, subscapular, np.where(ALPHA > 145, erector, 0.0)])
    pec = m * at((0.30, 0.42, 0.6, 0.85, 1.0), (0, 7, 14, 17, 10)) * _bump(44, 34)
    latissimus = m * at((0.0, 0.3, 0.55, 0.7), (6, 11, 16, 5)) * _bump(112, 20)
    infraspinatus = m * at((0.45, 0.58, 0.85, 1.0), (0, 12, 20, 16)) * _bump(124, 26)
    oblique = m * at((-0.1, 0.15, 0.3), (8, 6, 0)) * _bump(70, 60)
    rectus = m * at((-0.1, 0.2, 0.32), (9, 8, 0)) * _bump(16, 15)
    tier2 = np.maximum.reduce([pec, latissimus, infraspinatus, oblique, rectus])
    trapezius = m * at((0.2, 0.4, 0.7, 1.0), (0, 5, 8, 14)) * _bump(165, 26)
    gap = 0.5 + 0.05 * p.fat_mm
    a1 = layer + gap + np.zeros(BINS)
    b1 = a1 + tier1
    a2 = b1 + gap + at((0.5, 0.68, 0.85, 1.0), (0, 1, 6, 4)) * _bump(88, 24)
    b2 = a2 + tier2
    a3 = b2 + gap
    b3 = a3 + trapezius
    outer = (
        cage
        + np.maximum.reduce([layer + 0 * b1, b1, np.where(tier2 > 0.3, b2, 0), np.where(trapezius > 0.3, b3, 0)]) / g
    )
    outer = gaussian_filter1d(outer, 7.0, mode="wrap")
    # the shoulder girdle widens the upper chest beyond the cage; arms are up and out of the picture
    if t > 0.55:
        wide = p.half_width_mm * at((0.55, 0.72, 0.85, 0.95, 1.05), (1.05, 1.22, 1.36, 1.42, 1.38))
        front = p.depth_front_mm * at((0.55, 0.75, 0.9, 1.05), (0.85, 0.88, 0.78, 0.62))
        back = (anatomy.back_mm - 8.0 if anatomy.back_mm else p.depth_back_mm + 20.0) * at(
            (0.6, 0.9, 1.05), (0.86, 0.84, 0.8)
        )
        a = np.deg2rad(ALPHA)
        depth = np.where(ALPHA < 90.0, front, back)
        girdle = (np.abs(np.sin(a) / wide) ** 2.5 + np.abs(np.cos(a) / depth) ** 2.5) ** (-1 / 2.5)
        top = np.maximum(outer, girdle)
        outer = top + 4.0 * np.exp(-np.abs(outer - girdle) / 8.0)
        fill = (outer - cage) * g
        extra = np.where((fill > a3 + 3.0) & (ALPHA > 30), fill, b3)
        b3 = np.maximum(b3, gaussian_filter1d(extra, 3.0, mode="wrap"))
    fat = p.fat_mm * np.interp(ALPHA, (0, 25, 60, 100, 140, 180), (0.55, 0.75, 1.0, 1.25, 1.0, 0.55))
    fat = fat * at((-0.1, 0.1, 0.5, 0.8, 1.0), (1.25, 1.1, 0.95, 0.9, 0.8)) + 2.0
    skin = outer + fat
    # supine breasts: a bulge in front, spread to the side
    depth = p.breast_mm * at((0.22, 0.32, 0.42, 0.55, 0.68), (0.15, 0.75, 1.0, 0.75, 0.1))
    skin = skin + depth * np.exp(-(np.abs((ALPHA - 42.0) / 27.0) ** 2.6))
    skin = gaussian_filter1d(skin, 6.0, mode="wrap") * (1.0 + 0.6 * anatomy.jitter)
    if anatomy.back_mm:  # the back rests on the table
        below = np.cos(np.deg2rad(180.0 - ALPHA))
        limit = np.where(below > 0.05, anatomy.back_mm / np.maximum(below, 0.05), 1e4)
        h = np.maximum(14.0 - np.abs(skin - limit), 0.0) / 14.0
        skin = np.minimum(skin, limit) - h * h * 14.0 / 4.0
    skin = np.maximum(skin, cage + layer / g + 2.0)
    tilt = np.gradient(np.concatenate([skin[-2:], skin, skin[:2]]), step)[2:-2] / skin
    return np.stack([cage, g, a1, b1, a2, b2, a3, b3, skin, 1.0 / np.sqrt(1.0 + tilt**2)])


def _back(anatomy: Anatomy) -> float:
    """y of the table's top: a little less than where the free back would come, so that it flattens."""
    skin = _outline(anatomy, 0.45 * anatomy.patient.lung_height_mm)[8]
    return float(np.quantile(skin[ALPHA > 150.0] * np.cos(np.deg2rad(180.0 - ALPHA[ALPHA > 150.0])), 0.7)) - 3.0


def reach_mm(anatomy: Anatomy, z_mm: np.ndarray) -> float:
    """Largest distance of the skin from the centre in these slices, mm."""
    return max(float(_outline(anatomy, float(z))[8].max()) for z in z_mm)


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
            _chain([(-6 * s, y0 + 12, arch_z, 6.5), (-13 * s, sp(0.85 * length) - 42, arch_z + 25 * e, 6.0), (-24 * s, sp(0.95 * length) - 40, 1.1 * length, 4.5)]),
            _chain([(4 * s, y0 + 22, arch_z + 2, 4.2), (14 * s, sp(0.85 * length) - 36, arch_z + 25 * e, 3.8), (20 * s, sp(0.95 * length) - 32, 1.1 * length, 3.5)]),
            _chain([(15 * s, sp(arch_z) - 28, arch_z + 3, 5.0), (27 * s, sp(0.9 * length) - 24, arch_z + 28 * e, 4.8), (46 * s, sp(0.95 * length) - 28, 1.02 * length, 4.2), (80 * s, sp(length) - 40, 1.03 * length, 4.0)]),
        ]
    )  # fmt: skip
    tubes["vein"] = np.vstack(
        [
            _chain([(-33 * s, y0 + 8, zh + 22 * e, 11), (-30 * s, y0 + 4, zh + 50 * e, 9.5), (-29 * s, y0 + 2, zh + 88 * e, 8.5), (-32 * s, sp(0.9 * length) - 48, 0.93 * length, 7.5), (-44 * s, sp(length) - 48, 1.05 * length, 6.5)]),
            _chain([(-27 * s, y0, zh + 90 * e, 7.5), (0 * s, y0 - 8, zh + 104 * e, 7.0), (30 * s, sp(0.9 * length) - 52, 0.92 * length, 6.5), (44 * s, sp(length) - 46, 1.05 * length, 6.0)]),
            _chain([(-26 * s, y0 + 16, zh - 5, 14), (-27 * s, y0 + 22, zh - 34 * e, 13), (-25 * s, y0 + 34, -0.1 * length, 12)]),
            _chain([(-8 * s, sp(0.6 * length) - 22, -0.1 * length, 3.0), (-8 * s, sp(0.6 * length) - 21, zh + 66 * e, 3.2), (-20 * s, sp(0.65 * length) - 28, zh + 78 * e, 3.4), (-27 * s, y0 + 18, zh + 72 * e, 3.6)]),
        ]
    )  # fmt: skip
    hilum_r = np.array([-46 * s, y0 + 32, zh + 46 * e])
    hilum_l = np.array([47 * s, y0 + 34, zh + 54 * e])
    tubes["pulmonary"] = np.vstack(
        [
            _chain([(16 * s, y0 - 16, zh + 22 * e, 13.5), (18 * s, y0 - 4, zh + 42 * e, 13.5), (15 * s, y0 + 12, zh + 54 * e, 12.5)]),
            _chain([(15 * s, y0 + 12, zh + 54 * e, 12), (32 * s, y0 + 28, zh + 58 * e, 11), (*hilum_l, 9)]),
            _chain([(13 * s, y0 + 13, zh + 52 * e, 12), (-12 * s, y0 + 20, zh + 50 * e, 10.5), (-32 * s, y0 + 28, zh + 48 * e, 10), (*hilum_r, 9)]),
        ]
    )  # fmt: skip
    carina = zh + 70 * e
    y_car = sp(carina) - 30
    r = patient.trachea_mm / 2
    right = np.array([-42 * s, y0 + 40, zh + 46 * e])
    left = np.array([44 * s, y0 + 42, zh + 38 * e])
    tubes["airway"] = np.vstack(
        [
            _chain([(-1, sp(1.1 * length) - 40, 1.1 * length, r), (-1, sp(0.9 * length) - 36, 0.88 * length, r), (-2 + j(), y_car, carina + 4, r * 1.04), (-2, y_car + 1, carina - 3, r * 0.9)]),
            _chain([(-3, y_car, carina, r * 0.82), (-22 * s, y_car + 3, carina - 12 * e, r * 0.78), (*right, r * 0.62)]),
            _chain([(0, y_car, carina, r * 0.78), (20 * s, y_car + 2, carina - 15 * e, r * 0.70), (*left, r * 0.58)]),
        ]
    )  # fmt: skip
    oes = lambda z, x, d: (x * s, sp(z) - d, z)  # noqa: E731
    tubes["oesophagus"] = _chain(
        [
            (*oes(1.1 * length, 3, 25), 7.0),
            (*oes(0.85 * length, 5, 23), 6.5),
            (*oes(0.6 * length, 2, 24), 6.5),
            (*oes(0.4 * length, 4, 28), 7.5),
            (*oes(0.25 * length, 12, 34), 8.0),
            (*oes(0.15 * length, 22, 44), 8.5),
        ]
    )
    tubes["hila"] = np.array([[*hilum_r, 9.0, *hilum_l, 9.0], [*right, r * 0.62, *left, r * 0.58]])
    tubes["left_atrium"] = np.array([[-30 * s, y0 + 36, zh + 24 * e, 7.0, 32 * s, y0 + 38, zh + 26 * e, 7.0]])

    def ellipsoid(c: tuple[float, ...], long: tuple[float, ...], axes: tuple[float, ...]) -> list[float]:
        u = np.array(long, float)
        u /= np.linalg.norm(u)
        v = np.cross(u, (0.0, 0.0, 1.0))
        v /= np.linalg.norm(v)
        w = np.cross(u, v)
        return [*c, *u, *v, *w, *axes]

    k = patient.heart
    axis = (0.72, -0.52, -0.38 + rng.normal(0, 0.06))
    at = lambda x, y, z: (x * s, y0 + y, zh + z * e)  # noqa: E731
    heart = np.array(
        [
            ellipsoid(at(40, 2, -8), axis, (48 * k, 35 * k, 35 * k)),
            ellipsoid(at(8, -18, -8), (0.9, -0.2, -0.3), (46 * k, 30 * k, 36 * k)),
            ellipsoid(at(-24, 4, 4), (0.1, 0.1, 1.0), (36 * k, 27 * k, 29 * k)),
            ellipsoid(at(2, 36, 24), (1.0, 0.05, 0.1), (34 * k, 20 * k, 22 * k)),
        ]
    )
    chambers = np.array(
        [
            ellipsoid(at(39, 2, -7), axis, (38 * k, 24 * k, 24 * k)),
            ellipsoid(at(6, -19, -8), (0.9, -0.2, -0.3), (41 * k, 25 * k, 31 * k)),
            ellipsoid(at(-24, 4, 4), (0.1, 0.1, 1.0), (33 * k, 24 * k, 26 * k)),
            ellipsoid(at(2, 36, 24), (1.0, 0.05, 0.1), (32 * k, 18 * k, 20 * k)),
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
            bones.append([side * 14, y + 23, zc + 2, 5.0, side * 3, y + 34, zc - 4, 3.4])  # lamina
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
    n = np.array([0.1, 0.14, 1.0])
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
    fall = length * np.where(y[:, None] < -6.0, 0.22 + 0.14 * np.clip(np.abs(ux), 0, 1), 0.36)
    height = top - fall * q**2.3
    slope = fall * 2.3 * q**1.3 / (0.7 * w)
    return height.astype(np.float32), (1.0 / np.sqrt(1.0 + slope**2)).astype(np.float32)


def _distances(
    anatomy: Anatomy, x: np.ndarray, y: np.ndarray, z: float, w: float, d_cage: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distance maps of the slice: lung, mediastinum, diaphragm (negative above it), heart."""
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
    bulge = 2.5 * _texture(anatomy, "lung_coarse", x, y, z)
    heart = heart + 0.6 * bulge
    shapes.smooth_min(middle, heart - 2.0 - p.fat_mm * 0.2 - 1.4 * bulge, 9.0)
    ys = spine_y(p, z)
    spine = np.hypot(x[None, :] / 1.12, y[:, None] - ys - 2.0) - 18.5
    shapes.smooth_min(middle, spine, 14.0)
    # the plate of fat between the lungs, thin in front of the heart and aorta
    half = float(np.interp(t, (0.2, 0.45, 0.6, 0.75, 0.88, 1.0), (9.0, 6.0, 9.0, 17.0, 22.0, 27.0)))
    front = -0.9 * p.depth_front_mm
    narrow = np.clip((y[:, None] - front) / (0.5 * p.depth_front_mm), 0.0, 1.0)
    plate = np.abs(x[None, :] - 4.0) - half * (0.25 + 0.75 * narrow)
    plate = np.maximum(plate, y[:, None] - ys)
    shapes.smooth_min(middle, plate, 12.0)
    height, factor = _dome(anatomy, x, y)
    below = (height - z) * factor
    lung = d_cage.copy()
    lung *= -1.0
    shapes.smooth_min(lung, middle, 5.0)
    shapes.smooth_min(lung, -below.astype(np.float64), 5.0)
    return -lung, middle, below, heart


def _cage_distance(anatomy: Anatomy, x: np.ndarray, y: np.ndarray, z: float) -> np.ndarray:
    table = _outline(anatomy, z)
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
        d = _distances(anatomy, x, y, float(z), step, _cage_distance(anatomy, x, y, float(z)))[0]
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
        count = int(round(spec.spiculation * 22))
        spicules = np.zeros((count, 8))
        for n in range(count):
            u = rng.standard_normal(3)
            u /= np.linalg.norm(u)
            far = radius * rng.uniform(1.3, 1.9) + 1.0
            spicules[n] = [*(centre + u * radius * 0.6), max(0.08 * radius, 0.5), *(centre + u * far), 0.25]
        placed.append(PlacedNodule(spec, tuple(centre), shapes.noise_frame(rng, max(radius / 2.2, 1.0)), spicules))  # type: ignore[arg-type]
    return placed


def _bend(tree: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Long straight branches become gently curved: three pieces each, the ends stay."""
    start, end, r0, r1 = tree[:, 0:3], tree[:, 4:7], tree[:, 3], tree[:, 7]
    length = np.linalg.norm(end - start, axis=1)
    side = np.cross(end - start, rng.standard_normal(start.shape))
    side /= np.linalg.norm(side, axis=1)[:, None] + 1e-9
    side *= (length * rng.normal(0, 0.09, len(tree)))[:, None]
    nodes = [start, start + (end - start) / 3 + side, start + (end - start) * 2 / 3 + 0.8 * side, end]
    radii = [r0, (2 * r0 + r1) / 3, (r0 + 2 * r1) / 3, r1]
    pieces = [np.column_stack([nodes[k], radii[k], nodes[k + 1], radii[k + 1], tree[:, 8]]) for k in range(3)]
    return np.concatenate(pieces)


def _trees(anatomy: Anatomy, rng: np.random.Generator, lung: np.ndarray) -> dict[str, np.ndarray]:
    """Arteries, veins and airways of both lungs, sorted into one array each (n, 9)."""
    p = anatomy.patient
    out: dict[str, list[np.ndarray]] = {"artery": [], "vein": [], "airway": []}
    hila = anatomy.tubes["hila"]
    for side, (artery_root, airway_root) in (
        (-1.0, (hila[0, 0:3], hila[1, 0:3])),
        (1.0, (hila[0, 4:7], hila[1, 4:7])),
    ):
        here = lung[(lung[:, 0] * side > 0) & (lung[:, 3] < -2.5)]
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
                clear &= ~front | (np.abs(d) > 4.0)
        for kind in ("artery", "vein"):
            root = artery_root if kind == "artery" else artery_root + np.array([-6.0 * side, 2.0, -26.0])
            for n in np.unique(lobe):
                places = here[(lobe == n) & clear, :3]
                want = max(int(len(places) * 0.24 * p.vessels), 8)
                chosen = places[rng.choice(len(places), min(want, len(places)), replace=False)]
                chosen = chosen + rng.uniform(-2.4, 2.4, chosen.shape)
                if kind == "artery":  # lobar vessels leave the trunk along their bronchus
                    tree = shapes.grow_tree(chosen, root, rng.uniform(size=len(chosen)), 2.75, p.vessel_mm / 2)
                    thick = tree[tree[:, 8] > 34]
                    air = thick.copy()
                    shift = np.array([0.25 * side, 0.75, 0.6])
                    for a in (0, 4):
                        gap = thick[:, a + 3] * 1.8 + 0.6
                        blend = np.clip(np.linalg.norm(thick[:, a : a + 3] - root, axis=1) / 15.0, 0, 1)[:, None]
                        air[:, a : a + 3] = (
                            thick[:, a : a + 3] + shift * gap[:, None] * blend + (airway_root - root) * (1 - blend)
                        )
                        air[:, a + 3] = np.minimum(thick[:, a + 3] * 0.8, 5.0)
                    out["airway"].append(air)
                else:
                    tree = shapes.grow_tree(chosen, root, rng.uniform(size=len(chosen)), 2.75, p.vessel_mm / 2)
                out[kind].append(_bend(tree, rng))
    return {name: np.concatenate(parts) for name, parts in out.items()}


def _near(segments: np.ndarray, z: float, margin: float) -> np.ndarray:
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
    radial = _outline(anatomy, z)
    d_cage = np.empty(shape)
    bone = v["trabecular"]
    wall = np.stack(
        [v["skin"], v["fat"], v["muscle"], v["cortex"], bone, v["cartilage"], v["gland"], v["fat"], v["fat"], v["fat"]]
    )
    numbers = np.array([0.1 if lungman else p.skin_mm, 9.5, 0.0 if lungman else p.marbling, 1.1, p.gland, 0.12])
    side = np.array([[-1.0], [1.0]])
    row = np.array([[0.42 * p.half_width_mm + 30, -p.depth_front_mm * 0.85 - 22, 0.42 * p.lung_height_mm, 62.0, 58.0]])
    breasts = np.repeat(row, 2, 0) * np.where(np.arange(5) == 0, side, 1.0)
    if p.breast_mm < 12 or lungman:
        breasts = breasts[:0]
    near = np.abs(anatomy.rib_z - z).min(1) < 25.0
    shapes.paint_wall(
        image, d_cage, x, y, z, w, radial, anatomy.ribs[near], anatomy.rib_z[near], anatomy.rib_fade[near],
        wall, numbers, cube, np.stack([frames["marbling"], frames["fine"], frames["warp"]]), breasts,
    )  # fmt: skip
    d_lung, middle, below, heart = _distances(anatomy, x, y, z, w, d_cage)
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
        chosen = _near(segments, z, w + abs(grow))
        cover[:] = 0.0
        if len(chosen):
            if grow:
                chosen[:, 3] = np.maximum(chosen[:, 3] + grow, 0.05)
                chosen[:, 7] = np.maximum(chosen[:, 7] + grow, 0.05)
            shapes.cover_capsules(cover, x, y, z, chosen, w)
            shapes.blend(image, cover, value, _NONE)
        return cover

    tubes(anatomy.tubes["vein"], v["venous"])
    tubes(anatomy.tubes["left_atrium"], v["arterial"])
    tubes(anatomy.tubes["pulmonary"], v["arterial"])
    tubes(anatomy.tubes["aorta"], v["arterial"])
    tubes(anatomy.tubes["oesophagus"], v["muscle"])
    if not lungman:
        tubes(anatomy.tubes["oesophagus"], v["air"], grow=-5.6)
    tubes(anatomy.trees["vein"], v["venous"])
    tubes(anatomy.trees["artery"], v["arterial"])
    lumen = np.zeros(shape, bool)
    if not lungman:
        walls = anatomy.trees["airway"].copy()
        walls[:, [3, 7]] += 0.3 + 0.10 * walls[:, [3, 7]]
        tubes(walls, v["muscle"])
        tubes(anatomy.tubes["airway"], v["muscle"], grow=1.3)
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
    shapes.paint_table(
        image,
        x,
        y,
        w,
        anatomy.back_mm + 1.5,
        620.0,
        205.0,
        anatomy.values["carbon_fibre"],
        anatomy.values["foam"],
        22.0,
    )


def _parenchyma(
    image: np.ndarray, anatomy: Anatomy, d_lung: np.ndarray, side_map: np.ndarray, x: np.ndarray, y: np.ndarray, z: float,
    w: float, emphysema: np.ndarray,
) -> None:  # fmt: skip
    p, frames = anatomy.patient, anatomy.frames
    level = np.full(d_lung.shape, 99.0, np.float32)
    if p.emphysema and anatomy.emphysema_scale > 0:
        share = anatomy.emphysema_scale * float(
            emphysema_weight(np.array(z / p.lung_height_mm), p.emphysema.distribution)
        )
        level[:] = np.quantile(anatomy.hole_levels, 1.0 - min(share, 0.95))
    holes = frames.get("hole", frames["lung_mid"])
    numbers = np.array(
        [p.parenchyma_hu, p.gradient_hu_per_mm, -0.06, 0.5 * p.lung_height_mm, 17.0, 19.0, 18.0, -990.0, 95.0]
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
    edge = 0.28 * half - 0.25 * (y[:, None] + 20.0)
    liver = np.maximum(inside + 3.0, x[None, :] - np.broadcast_to(edge, below.shape))
    liver = np.maximum(liver, y[:, None] - spine_y(p, z) + 2.0 - np.clip(-x[None, :] - 25.0, 0.0, 200.0))
    shapes.paint_distance(image, liver.astype(np.float64), w, v["enhanced_liver"])
    spleen = np.array(
        [[0.70 * half, 0.42 * p.depth_back_mm, 0.10 * length, 0.3, 0.8, 0.3, 0.95, -0.3, 0, 0, 0, 1, 46, 26, 46.0]]
    )
    stomach = np.array(
        [[0.42 * half, -0.25 * p.depth_front_mm, 0.10 * length, 0.9, 0.3, 0, -0.3, 0.9, 0, 0, 0, 1, 46, 34, 52.0]]
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


def _texture(anatomy: Anatomy, name: str, x: np.ndarray, y: np.ndarray, z: float) -> np.ndarray:
    gx, gy = np.meshgrid(x, y)
    points = np.column_stack([gx.ravel(), gy.ravel(), np.full(gx.size, z)])
    return shapes.sample_noise(anatomy.cube, anatomy.frames[name], points).reshape(gx.shape)


def _spine(image: np.ndarray, anatomy: Anatomy, x: np.ndarray, y: np.ndarray, z: float, w: float) -> None:
    p, v = anatomy.patient, anatomy.values
    n = int(np.argmin(np.abs(anatomy.vertebrae[:, 0] - z)))
    zc, pitch = anatomy.vertebrae[n]
    if abs(z - zc) > pitch:
        zc = z
    ys = spine_y(p, z)
    rows, columns = _crop(x, y, (-34.0, 34.0, ys - 30.0, ys + 40.0))
    px, py = x[columns][None, :], y[rows][:, None] - ys
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
    fine = _texture(anatomy, "lung_fine", x[columns], y[rows], 0.55 * z)
    mid = _texture(anatomy, "fine", x[columns], y[rows], z)
    gain = (1.0 + 0.22 * fine + 0.12 * mid).astype(np.float32)
    vein = np.clip(1.0 - np.hypot(px / 1.5, py - b + 5.0) / 4.0, 0, 1) * (abs(z - zc) < 3.5)  # basivertebral
    gain = gain * (1.0 - 0.5 * vein).astype(np.float32)
    _lay(image, rows, columns, body + 0.7, w, v["trabecular"][:, None, None] * gain)


def _sternum(image: np.ndarray, anatomy: Anatomy, x: np.ndarray, y: np.ndarray, z: float, w: float) -> None:
    p, v = anatomy.patient, anatomy.values
    t = z / p.lung_height_mm
    if not 0.30 < t < 0.90:
        return
    yc = -cage_table(anatomy, z)[0][BINS // 2] - 7.5
    a = float(np.interp(t, (0.30, 0.36, 0.42, 0.6, 0.70, 0.74, 0.80, 0.88, 0.90), (4, 8, 17, 16, 14, 20, 29, 27, 20)))
    b = float(np.interp(t, (0.30, 0.36, 0.6, 0.72, 0.8, 0.9), (2.5, 4.5, 5.2, 6.2, 7.0, 7.0)))
    rows, columns = _crop(x, y, (-42.0, 42.0, yc - 20.0, yc + 20.0))
    px, py = x[columns][None, :], y[rows][:, None] - yc - 0.004 * x[columns][None, :] ** 2
    d = ((np.abs(px / a) ** 3 + np.abs(py / b) ** 3) ** (1 / 3) - 1.0) * b
    gap = abs(t - 0.725) < 0.008  # the joint of manubrium and body
    _lay(image, rows, columns, d, w, v["cartilage"] if gap else v["cortex"])
    if not gap:
        gain = 1.0 + 0.2 * _texture(anatomy, "fine", x[columns], y[rows], z)
        _lay(image, rows, columns, d + 1.1, w, v["trabecular"][:, None, None] * (0.8 * gain).astype(np.float32))


def _scapulae(image: np.ndarray, anatomy: Anatomy, x: np.ndarray, y: np.ndarray, z: float, w: float) -> None:
    """The blade between subscapularis and infraspinatus, its spine, and the head of the humerus, each side."""
    p, v = anatomy.patient, anatomy.values
    t = z / p.lung_height_mm
    if t < 0.47:
        return
    table = _outline(anatomy, z)
    medial = float(np.interp(t, (0.47, 0.6, 0.8, 1.05), (128, 142, 146, 144)))
    lateral = float(np.interp(t, (0.47, 0.6, 0.8, 1.05), (120, 108, 101, 96)))
    cover = np.zeros((len(y), len(x)), np.float32)
    inner = np.zeros_like(cover)
    for side in (-1.0, 1.0):
        angle = np.linspace(medial, lateral, 7)
        k = ((180.0 + side * angle) / 360.0 * BINS) % BINS
        bins = np.arange(BINS)
        radius = np.interp(k, bins, table[0]) + (np.interp(k, bins, table[3]) + 1.5) / np.interp(k, bins, table[1])
        if t > 0.8:  # the glenoid stands further out
            radius[-2:] += np.array([3.0, 8.0]) * (t - 0.8) / 0.2 * 2
        radius = radius + p.muscle * np.linspace(-2.0, 5.0, 7) * float(np.interp(t, (0.47, 0.7), (0.3, 1.0)))
        px, py = side * radius * np.sin(np.deg2rad(angle)), -radius * np.cos(np.deg2rad(angle))
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
        bumps = 0.13 * rough * radius * shapes.sample_noise(anatomy.cube, nodule.frame, points).reshape(distance.shape)
    d = distance - radius - bumps
    cover = np.clip(0.5 - d / w, 0.0, 1.0).astype(np.float32)
    if len(nodule.spicules):
        chosen = _near(nodule.spicules, z, w)
        if len(chosen):
            shapes.cover_capsules(cover, xs, ys, z, chosen, w)
    tissue = anatomy.values["muscle"] if anatomy.patient.kind == "chest" else anatomy.values["urethane_tumour"]
    texture = _texture(anatomy, "fine", xs, ys, z)
    value = np.empty((3, *distance.shape), np.float32)
    part = image[:, rows, columns]
    if nodule.spec.density == "solid":
        value[:] = tissue[:, None, None]
        value[0] += 6.0 * texture
    else:  # ground glass: a third of the air is filled
        share = 0.36 + 0.05 * texture
        value[:] = np.maximum(part, part + share * (tissue[:, None, None] - part))
        value[1:] = part[1:]
        if nodule.spec.density == "part-solid":
            core = np.clip(0.5 - (distance - 0.5 * radius - 0.7 * bumps) / w, 0.0, 1.0).astype(np.float32)
            value += core * (tissue[:, None, None] - value)
    part += cover * (value - part)
    mask[rows, columns] = cover >= 0.5
    return mask
