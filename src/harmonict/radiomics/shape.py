"""Shape of a mask under PyRadiomics' names, in three dimensions and for a single slice."""

from __future__ import annotations

import numpy as np

from harmonict.radiomics.discretise import crop_to_mask
from harmonict.radiomics.mesh import farthest, mesh_area_volume, mesh_diameters

Spacing = tuple[float, float, float]


def axis_lengths(points_mm: np.ndarray) -> np.ndarray:
    """Principal axis lengths (mm), longest first, 4 sqrt(eigenvalue) of the points' population covariance (n, d)."""
    centred = points_mm - points_mm.mean(axis=0)
    eigen = np.linalg.eigvalsh(centred.T @ centred / len(points_mm))
    return 4 * np.sqrt(np.clip(eigen[::-1], 0, None))


def shape_features(mask: np.ndarray, spacing_mm: Spacing, dimension: str = "3D") -> dict[str, float]:
    """PyRadiomics' 14 features `shape_...`, or for "2D" with a mask of one slice its 9 features `shape2D_...`.

    mask: bool (z, y, x). spacing_mm: (z, y, x). Lengths in mm, areas in mm2, volumes in mm3.
    """
    _, mask = crop_to_mask(mask, mask)
    if dimension == "2D" and mask.shape[0] == 1:
        return _shape_2d(mask[0], spacing_mm[1:])
    area, volume = mesh_area_volume(mask, spacing_mm)
    in_slice, in_column, in_row, anywhere = mesh_diameters(mask, spacing_mm)
    major, minor, least = axis_lengths(np.argwhere(mask) * np.asarray(spacing_mm))
    return {
        "shape_MeshVolume": volume,
        "shape_VoxelVolume": float(mask.sum() * np.prod(spacing_mm)),
        "shape_SurfaceArea": area,
        "shape_SurfaceVolumeRatio": area / volume if volume else 0.0,  # a mesh pinched everywhere may enclose nothing
        "shape_Sphericity": (36 * np.pi * volume**2) ** (1 / 3) / area,
        "shape_Maximum3DDiameter": anywhere,
        "shape_Maximum2DDiameterSlice": in_slice,
        "shape_Maximum2DDiameterColumn": in_column,
        "shape_Maximum2DDiameterRow": in_row,
        "shape_MajorAxisLength": major,
        "shape_MinorAxisLength": minor,
        "shape_LeastAxisLength": least,
        "shape_Elongation": minor / major,
        "shape_Flatness": least / major,
    }


def _shape_2d(mask: np.ndarray, spacing_mm: tuple[float, float]) -> dict[str, float]:
    dy, dx = spacing_mm
    inside = np.pad(mask, 1).astype(np.int64)
    a, b, c, d = inside[:-1, :-1], inside[:-1, 1:], inside[1:, 1:], inside[1:, :-1]
    count = a + b + c + d
    corner = int(((count == 1) | (count == 3)).sum())
    crossed = (count == 2) & (a == c)  # inside corners face each other diagonally and are kept apart
    half = (count == 2) & ~crossed
    across = int((half & (a == b)).sum())  # the contour runs along x
    along = int((half & (a == d)).sum())
    perimeter = (corner + 2 * int(crossed.sum())) * np.hypot(dy, dx) / 2 + across * dx + along * dy
    share = np.array([0.0, 1 / 8, 1 / 2, 7 / 8, 1.0])[count]
    surface = float(np.where(crossed, 1 / 4, share).sum() * dy * dx)
    ys = np.argwhere(np.diff(inside, axis=0) != 0) + (0.5, 0.0)
    xs = np.argwhere(np.diff(inside, axis=1) != 0) + (0.0, 0.5)
    diameter = farthest(np.concatenate([ys, xs]) * (dy, dx))
    major, minor = axis_lengths(np.argwhere(mask) * np.array([dy, dx]))
    return {
        "shape2D_MeshSurface": surface,
        "shape2D_PixelSurface": float(mask.sum() * dy * dx),
        "shape2D_Perimeter": perimeter,
        "shape2D_PerimeterSurfaceRatio": perimeter / surface,
        "shape2D_Sphericity": 2 * np.sqrt(np.pi * surface) / perimeter,
        "shape2D_MaximumDiameter": diameter,
        "shape2D_MajorAxisLength": major,
        "shape2D_MinorAxisLength": minor,
        "shape2D_Elongation": minor / major,
    }
