"""Geometry: where the voxels of a series lie in the patient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harmonict.core.errors import HarmonictError

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Geometry:
    """A regular voxel grid in the DICOM patient frame (LPS, mm), axes in the order (z, y, x).

    origin_mm: patient (x, y, z) of the centre of voxel [0, 0, 0].
    spacing_mm: distance between voxel centres along (z, y, x); all > 0.
    direction: rows are the patient-frame unit vectors of the axes (z, y, x): rows[2] runs along a row of pixels
        (increasing column index), rows[1] down a column, rows[0] from slice to slice. Orthonormal to 1e-3.

    Raises HarmonictError where the numbers are no grid.
    """

    origin_mm: Vector = (0.0, 0.0, 0.0)
    spacing_mm: Vector = (1.0, 1.0, 1.0)
    direction: tuple[Vector, Vector, Vector] = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))

    def __post_init__(self) -> None:
        spacing = np.asarray(self.spacing_mm, float)
        rows = np.asarray(self.direction, float)
        if spacing.shape != (3,) or not np.all(np.isfinite(spacing)) or np.any(spacing <= 0):
            raise HarmonictError(f"voxel spacing must be three numbers above 0 mm, got {self.spacing_mm}")
        if not np.all(np.isfinite(np.asarray(self.origin_mm, float))):
            raise HarmonictError(f"image position must be finite, got {self.origin_mm}")
        if rows.shape != (3, 3) or not np.allclose(rows @ rows.T, np.eye(3), atol=1e-3):
            raise HarmonictError("image orientation is not orthonormal: the rows and columns must be at right angles")

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) matrix from index (z, y, x, 1) to patient position (x, y, z, 1) in mm."""
        matrix = np.eye(4)
        matrix[:3, :3] = (np.asarray(self.direction) * np.asarray(self.spacing_mm)[:, None]).T
        matrix[:3, 3] = self.origin_mm
        return matrix

    def to_patient(self, index: np.ndarray) -> np.ndarray:
        """Index (..., 3) in (z, y, x) -> patient position (..., 3) in mm (x, y, z)."""
        return np.asarray(index, float) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_index(self, position_mm: np.ndarray) -> np.ndarray:
        """Patient position (..., 3) in mm (x, y, z) -> fractional index (..., 3) in (z, y, x)."""
        inverse = np.linalg.inv(self.affine[:3, :3])
        return (np.asarray(position_mm, float) - self.affine[:3, 3]) @ inverse.T

    def same_grid(self, other: Geometry, tolerance_mm: float = 0.01) -> bool:
        """True where both grids put voxel [0, 0, 0] and a voxel 100 steps away at the same place."""
        far = np.array([[0, 0, 0], [100, 100, 100]], float)
        return bool(np.allclose(self.to_patient(far), other.to_patient(far), atol=tolerance_mm * 10, rtol=0)) and bool(
            np.allclose(self.origin_mm, other.origin_mm, atol=tolerance_mm, rtol=0)
        )
