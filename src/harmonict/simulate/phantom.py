"""Digital objects with a known truth: computational patients, QA phantoms, and any scan taken as one.

A `Patient` is a few numbers drawn from a seed; `patient.slab(...)` evaluates its shapes at the slices asked for and
nowhere else. Coordinates are millimetres: x to the patient's left, y to the back, z to the head; (0, 0) is the centre
of the field of view. Boundaries are painted by their signed distance, so a pixel holds the share of each tissue in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

from harmonict.core import Geometry, HarmonictError, ScanProtocol, Series
from harmonict.simulate import anatomy, materials, slices
from harmonict.simulate.disease import EmphysemaSpec, NoduleSpec, draw_nodules

KINDS = ("chest", "lungman")
MIN_SPACING_MM = 0.1
SUBSLICE_MM = 0.5


@dataclass(frozen=True)
class DigitalObject:
    """What lies in the scanner, on a grid, with its truth.

    hu120: float32 (z, y, x), true HU at 120 kVp.
    spectral: float32 (2, z, y, x), how each voxel moves with kVp (materials.spectral_shift).
    masks: name -> bool (z, y, x): lung, lung_left, lung_right, emphysema, nodule_1, ...
    geometry: the grid, with x and y centred on (0, 0).
    """

    hu120: np.ndarray
    spectral: np.ndarray
    geometry: Geometry
    masks: dict[str, np.ndarray] = field(default_factory=dict)

    def hu(self, kvp: float) -> np.ndarray:
        """True HU at `kvp` (70, 80, 100, 120 or 140), float32 (z, y, x). Raises HarmonictError for another kVp."""
        b0, b1 = materials.spectral_shift(kvp)
        if b0 == 0.0 and b1 == 0.0:
            return self.hu120
        return self.hu120 + np.float32(b0) * self.spectral[0] + np.float32(b1) * self.spectral[1]

    def mu_per_mm(self, kvp: float) -> np.ndarray:
        """Effective linear attenuation coefficient, 1/mm, float32 (z, y, x): mu_water(kvp) (1 + HU / 1000), air 0."""
        return np.float32(materials.mu_water_per_mm(kvp)) * (1.0 + self.hu(kvp) / np.float32(1000.0))


@dataclass(frozen=True)
class Patient:
    """A computational chest: the numbers that, with the seed, say everything. Made by `make_patient`.

    Lengths in mm. half_width, depth_front, depth_back: the pleural hull about the centre. dome: height of the right and
    left diaphragm as a share of the lung's height. bone_density: share of mineralised bone in marrow spaces.
    """

    seed: int
    kind: Literal["chest", "lungman"]
    sex: Literal["female", "male"]
    half_width_mm: float
    depth_front_mm: float
    depth_back_mm: float
    lung_height_mm: float
    dome: tuple[float, float]
    fat_mm: float
    muscle: float
    marbling: float
    breast_mm: float
    gland: float
    skin_mm: float
    heart: float
    aorta_mm: float
    trachea_mm: float
    vessels: float
    vessel_mm: float
    bone_density: float
    parenchyma_hu: float
    gradient_hu_per_mm: float
    iodine_mg_ml: float
    emphysema: EmphysemaSpec | None = None
    nodules: tuple[NoduleSpec, ...] = ()

    @property
    def name(self) -> str:
        """ "chest-0007": kind and seed."""
        return f"{self.kind}-{self.seed:04d}"

    @property
    def z_range_mm(self) -> tuple[float, float]:
        """Lowest and highest slice that the phantom is made for."""
        return -0.06 * self.lung_height_mm, 1.05 * self.lung_height_mm

    @property
    def lung_z_mm(self) -> tuple[float, float]:
        """From the posterior costophrenic recess to the apex."""
        return 0.0, self.lung_height_mm

    def placed_nodules(self) -> list[tuple[tuple[float, float, float], NoduleSpec]]:
        """Centre (x, y, z) in mm and description of nodule_1, nodule_2, ..."""
        return [(n.centre_mm, n.spec) for n in _anatomy(self).nodules]

    def slab(
        self,
        z_mm: np.ndarray,
        spacing_mm: float = SUBSLICE_MM,
        *,
        shape: tuple[int, int] = (512, 512),
        fov_mm: float = 500.0,
        allow_crop: bool = False,
    ) -> DigitalObject:
        """The patient at the slice centres `z_mm` (mm, rising by `spacing_mm`), and nowhere else.

        shape: (ny, nx) pixels over a field of view `fov_mm` wide, centred on (0, 0). Each slice is a plane cut through
        its centre: take thin ones and average. Raises HarmonictError where the body passes the field of view (unless
        `allow_crop`), a slice lies outside `z_range_mm`, or the slices are finer than 0.1 mm.
        """
        z, x, y, pixel = grid_of(z_mm, spacing_mm, shape, fov_mm)
        self.check(z, fov_mm, allow_crop=allow_crop)
        made = _anatomy(self)
        hu = np.empty((len(z), *shape), np.float32)
        spectral = np.empty((2, len(z), *shape), np.float32)
        masks: dict[str, np.ndarray] = {}
        for n, height in enumerate(z):
            image, found = slices.render(made, x, y, float(height), pixel)
            hu[n], spectral[:, n] = image[0], image[1:]
            for name, mask in found.items():
                masks.setdefault(name, np.zeros((len(z), *shape), bool))[n] = mask
        return DigitalObject(hu, spectral, geometry_of(z, spacing_mm, x, y, pixel), masks)

    def check(self, z_mm: np.ndarray, fov_mm: float, *, allow_crop: bool = False) -> None:
        """Raise HarmonictError, before anything is computed, where the body does not fit the field of view or a slice

        lies outside the phantom.
        """
        low, high = self.z_range_mm
        if np.min(z_mm) < low - 1e-6 or np.max(z_mm) > high + 1e-6:
            raise HarmonictError(
                f"{self.name} lies at {low:.0f} to {high:.0f} mm, the slices at {np.min(z_mm):g} to {np.max(z_mm):g} mm"
            )
        if not allow_crop:
            reach = anatomy.reach_mm(_anatomy(self), np.asarray(z_mm)[:: max(1, len(z_mm) // 8)])
            if reach > fov_mm / 2:
                raise HarmonictError(
                    f"{self.name} reaches {reach:.0f} mm from the centre, outside a field of view of {fov_mm:g} mm; "
                    f"take at least {2 * reach:.0f} mm"
                )


@lru_cache(maxsize=2)
def _anatomy(patient: Patient) -> anatomy.Anatomy:
    return anatomy.build(patient)


def make_patient(
    seed: int,
    *,
    kind: Literal["chest", "lungman"] = "chest",
    sex: Literal["female", "male"] | None = None,
    emphysema: EmphysemaSpec | None = None,
    nodules: int | Sequence[NoduleSpec] = 0,
    iodine_mg_ml: float | None = None,
) -> Patient:
    """A patient from a seed: the same seed and arguments give the same bytes, disease does not move the body.

    kind: "chest", or "lungman": a plastic chest with vessels in air, no parenchyma and three tumours (8, 10 and 12 mm)
    unless `nodules` says otherwise. nodules: how many to draw, or their descriptions. iodine_mg_ml: in arterial blood;
    None draws it (none in two of three patients). Raises HarmonictError for an unknown kind or a negative count.
    """
    if kind not in KINDS:
        raise HarmonictError(f"patient kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if seed < 0 or (isinstance(nodules, int) and nodules < 0):
        raise HarmonictError(f"seed and number of nodules must be 0 or more, got {seed} and {nodules}")
    streams = np.random.SeedSequence([seed, 1]).spawn(3)
    rng = np.random.default_rng(streams[0])
    drawn_sex: Literal["female", "male"] = "female" if rng.uniform() < 0.5 else "male"
    female = (sex or drawn_sex) == "female"
    size = float(np.clip(rng.normal(1.0, 0.06), 0.88, 1.13))
    habitus = float(np.clip(rng.gamma(4.0, 0.25), 0.25, 2.2))
    width = (122.0 if female else 136.0) * size
    barrel = float(np.clip(rng.normal(1.0, 0.06), 0.88, 1.14))
    contrast = float(rng.uniform(4.0, 9.0)) if rng.uniform() < 0.33 else 0.0
    specs = draw_nodules(np.random.default_rng(streams[1]), nodules) if isinstance(nodules, int) else tuple(nodules)
    if kind == "lungman" and isinstance(nodules, int) and not nodules:
        specs = tuple(NoduleSpec(d) for d in (8.0, 10.0, 12.0))
    lungman = kind == "lungman"
    return Patient(
        seed=seed,
        kind=kind,
        sex="female" if female else "male",
        half_width_mm=width,
        depth_front_mm=width * 0.72 * barrel,
        depth_back_mm=width * 0.80 * float(np.clip(rng.normal(1.0, 0.03), 0.93, 1.07)),
        lung_height_mm=(252.0 if female else 275.0) * size * float(np.clip(rng.normal(1.0, 0.05), 0.88, 1.12)),
        dome=(float(rng.uniform(0.28, 0.37)), float(rng.uniform(0.24, 0.32))),
        fat_mm=3.0 + 13.0 * habitus if not lungman else 6.0,
        muscle=float(rng.uniform(0.75, 1.0) if female else rng.uniform(0.9, 1.3)),
        marbling=float(rng.uniform(0.15, 0.7)),
        breast_mm=float(rng.uniform(14.0, 48.0)) * (0.6 + 0.4 * habitus) if female and not lungman else 4.0 * habitus,
        gland=float(rng.beta(2.0, 3.0)),
        skin_mm=float(rng.uniform(1.4, 2.2)),
        heart=float(np.clip(rng.normal(1.06, 0.07), 0.92, 1.25)) * size,
        aorta_mm=float(rng.uniform(25.0, 36.0)),
        trachea_mm=(15.5 if female else 18.5) * float(rng.uniform(0.9, 1.1)),
        vessels=float(rng.uniform(0.9, 1.2)) * (0.6 if lungman else 1.0),
        vessel_mm=float(rng.uniform(0.72, 0.88)) * (1.8 if lungman else 1.0),
        bone_density=float(rng.uniform(0.09, 0.17)),
        parenchyma_hu=float(rng.normal(-889.0, 8.0)),
        gradient_hu_per_mm=float(rng.uniform(0.15, 0.45)),
        iodine_mg_ml=(contrast if iodine_mg_ml is None else iodine_mg_ml) if not lungman else 0.0,
        emphysema=None if lungman else emphysema,
        nodules=specs,
    )


def truth_series(
    phantom: Patient | QAPhantom,
    z_mm: np.ndarray,
    spacing_mm: float,
    *,
    shape: tuple[int, int] = (512, 512),
    fov_mm: float = 500.0,
    kvp: float = 120.0,
) -> Series:
    """The truth as a series: each slice is the mean over its thickness of sub-slices of at most 0.5 mm.

    The field of view may cut the body. Memory holds one slice's sub-slices at a time.
    """
    z, x, y, pixel = grid_of(z_mm, spacing_mm, shape, fov_mm)
    materials.check_kvp(kvp)
    count = max(1, int(np.ceil(spacing_mm / SUBSLICE_MM - 1e-9)))
    step = spacing_mm / count
    hu = np.empty((len(z), *shape), np.float32)
    for n, height in enumerate(z):
        inside = height + (np.arange(count) - (count - 1) / 2) * step
        thin = phantom.slab(inside, step, shape=shape, fov_mm=fov_mm, allow_crop=True)
        hu[n] = thin.hu(kvp).mean(0)
    protocol = ScanProtocol(
        manufacturer="harmonict", model="truth", slice_thickness_mm=spacing_mm, kvp=kvp, fov_mm=fov_mm
    )
    geometry = geometry_of(z, spacing_mm, x, y, pixel)
    return Series(hu, geometry, protocol, patient=phantom.name, name=f"{phantom.name} truth")


@dataclass(frozen=True)
class QAPhantom:
    """A test object that is the same in every slice; made by `water_cylinder`, `wire_phantom`, ... below.

    discs: (x mm, y mm, radius mm, material or HU at 120 kVp), painted in this order.
    edge_angle_deg: the first disc keeps only the half left of a line through its centre, tilted by this angle.
    """

    name: str
    discs: tuple[tuple[float, float, float, str | float], ...]
    edge_angle_deg: float | None = None

    def slab(
        self,
        z_mm: np.ndarray,
        spacing_mm: float = 0.5,
        *,
        shape: tuple[int, int] = (512, 512),
        fov_mm: float = 500.0,
        allow_crop: bool = False,
    ) -> DigitalObject:
        """The object at the slice centres `z_mm`; see Patient.slab."""
        z, x, y, pixel = grid_of(z_mm, spacing_mm, shape, fov_mm)
        reach = max(np.hypot(cx, cy) + r for cx, cy, r, _ in self.discs)
        if reach > fov_mm / 2 and not allow_crop:
            raise HarmonictError(f"{self.name} reaches {reach:.0f} mm from the centre; fov_mm must be {2 * reach:.0f}")
        image = np.empty((3, *shape), np.float32)
        image[:] = materials.material_values("air")[:, None, None]
        for n, (cx, cy, radius, content) in enumerate(self.discs):
            cover = _disc_cover(x, y, cx, cy, radius, pixel)
            if n == 0 and self.edge_angle_deg is not None:
                angle = np.deg2rad(self.edge_angle_deg)
                across = (x[None, :] - cx) * np.cos(angle) + (y[:, None] - cy) * np.sin(angle)
                cover *= np.clip(0.5 - across / pixel, 0.0, 1.0)
            if isinstance(content, str):
                value = materials.material_values(content)
            else:
                value = np.array([content, 0.0, 0.0], np.float32)
            image += cover.astype(np.float32) * (value[:, None, None] - image)
        volume = np.repeat(image[:, None], len(z), axis=1)
        return DigitalObject(volume[0], volume[1:], geometry_of(z, spacing_mm, x, y, pixel))


def water_cylinder(diameter_mm: float = 200.0) -> QAPhantom:
    """Water in air."""
    return QAPhantom("water cylinder", ((0.0, 0.0, diameter_mm / 2, "water"),))


def wire_phantom(
    *, wire_mm: float = 0.2, wire_hu: float = 20000.0, offset_mm: tuple[float, float] = (10.3, 7.7), body: str = "air"
) -> QAPhantom:
    """A thin wire along z at (x, y) = `offset_mm`, in air or in an 80 mm cylinder of water (`body` a material).

    The wire's share of a pixel keeps its area, so a wire thinner than a pixel is a point of the right mass.
    """
    return QAPhantom("wire phantom", ((0.0, 0.0, 40.0, body), (*offset_mm, wire_mm / 2, wire_hu)))


def edge_phantom(*, angle_deg: float = 3.0, material: str = "water", diameter_mm: float = 160.0) -> QAPhantom:
    """Half a cylinder: a straight edge between air and `material`, tilted by `angle_deg` against the pixel columns."""
    return QAPhantom("edge phantom", ((0.0, 0.0, diameter_mm / 2, material),), edge_angle_deg=angle_deg)


def disc_phantom(
    *,
    diameter_mm: float = 200.0,
    inserts: tuple[str | float, ...] = ("air", "polyethylene", "acrylic", "delrin", 100.0, -100.0),
    insert_mm: float = 25.0,
) -> QAPhantom:
    """Water with a ring of disc inserts (materials by name, or HU at 120 kVp of water-like contrast)."""
    ring = diameter_mm / 4 + insert_mm / 4
    angle = 2 * np.pi * np.arange(len(inserts)) / len(inserts)
    discs = [(ring * np.cos(a), ring * np.sin(a), insert_mm / 2, m) for a, m in zip(angle, inserts, strict=True)]
    return QAPhantom("disc phantom", ((0.0, 0.0, diameter_mm / 2, "water"), *discs))


def object_from_series(series: Series) -> DigitalObject:
    """Any scan as the digital object: its HU (at its own kVp, 120 where the header has none) are taken as truth.

    The scan's noise and blur become part of the object. How a voxel moves with kVp follows from its HU
    (materials.spectral_from_hu120); of a scan at another kVp the HU are carried to 120 by the same rule, once.
    """
    kvp = 120.0 if series.protocol.kvp is None else series.protocol.kvp
    hu = np.maximum(series.hu, np.float32(-1000.0))
    if series.padding is not None:
        hu = np.where(series.padding, np.float32(-1000.0), hu)
    b0, b1 = materials.spectral_shift(kvp)
    spectral = materials.spectral_from_hu120(hu)
    hu120 = hu - np.float32(b0) * spectral[0] - np.float32(b1) * spectral[1]
    return DigitalObject(hu120.astype(np.float32), spectral, series.geometry)


def grid_of(
    z_mm: np.ndarray, spacing_mm: float, shape: tuple[int, int], fov_mm: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Checked slice centres, pixel centres x (nx,) and y (ny,), and the pixel in mm. Raises HarmonictError."""
    z = np.atleast_1d(np.asarray(z_mm, float))
    if z.ndim != 1 or not len(z) or not np.all(np.isfinite(z)):
        raise HarmonictError("slice centres z_mm must be a list of finite numbers in mm")
    if not fov_mm > 0 or min(shape) < 2:
        raise HarmonictError(f"expected a field of view above 0 mm and at least 2x2 pixels, got {fov_mm} mm, {shape}")
    if not spacing_mm >= MIN_SPACING_MM:
        raise HarmonictError(f"slices of {spacing_mm:g} mm are finer than the phantom's sampling, {MIN_SPACING_MM} mm")
    if len(z) > 1 and not np.allclose(np.diff(z), spacing_mm, rtol=0, atol=1e-3):
        raise HarmonictError(f"slice centres must lie spacing_mm = {spacing_mm:g} mm apart, upwards")
    ny, nx = shape
    pixel = fov_mm / nx
    return z, (np.arange(nx) - (nx - 1) / 2) * pixel, (np.arange(ny) - (ny - 1) / 2) * pixel, pixel


def geometry_of(z: np.ndarray, spacing_mm: float, x: np.ndarray, y: np.ndarray, pixel: float) -> Geometry:
    """The grid of `grid_of` as a Geometry (LPS, so z runs to the head)."""
    return Geometry((float(x[0]), float(y[0]), float(z[0])), (float(spacing_mm), float(pixel), float(pixel)))


def _disc_cover(x: np.ndarray, y: np.ndarray, cx: float, cy: float, radius: float, pixel: float) -> np.ndarray:
    """Share of each pixel inside a disc, 16 x 16 points where the border passes; its sum is the disc's area."""
    distance = np.hypot(x[None, :] - cx, y[:, None] - cy)
    cover = (distance < radius).astype(float)
    rows, columns = np.nonzero(np.abs(distance - radius) < pixel)
    sub = ((np.arange(16) + 0.5) / 16 - 0.5) * pixel
    dx = x[columns][:, None, None] + sub[None, None, :] - cx
    dy = y[rows][:, None, None] + sub[None, :, None] - cy
    share = (dx**2 + dy**2 < radius**2).mean((1, 2))
    cover[rows, columns] = share
    # the border of a small disc is scaled so that the whole has exactly its area: a thin wire keeps its mass
    inner = cover.sum() - share.sum()
    wanted = np.pi * radius**2 / pixel**2 - inner
    inside_grid = abs(cx) + radius < -x[0] and abs(cy) + radius < -y[0]
    if inside_grid and radius < 3 * pixel and share.sum() > 0:
        cover[rows, columns] = share * wanted / share.sum()
    return cover
