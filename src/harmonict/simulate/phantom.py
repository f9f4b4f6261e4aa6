"""Digital objects with a known truth: computational patients, QA phantoms, and any scan taken as one.

A `Patient` is a few numbers drawn from a seed; `patient.slab(...)` evaluates its shapes at the slices asked for and
nowhere else. Coordinates are millimetres: x to the patient's left, y to the back, z to the head; (0, 0) is the centre
of the field of view. Boundaries are painted by their signed distance, so a pixel holds the share of each tissue in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from harmonict.core import Geometry, HarmonictError, Series
from harmonict.simulate import materials


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


MIN_SPACING_MM = 0.1


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
