"""Texture matrices in one pass over the ROI: GLCM, GLRLM, zones (GLSZM, GLDZM), GLDM / NGLDM and NGTDM.

Every function takes an int32 image of grey levels (z, y, x), 0 outside the ROI, and voxel offsets (k, 3) in (z, y, x).
Rows of a matrix belong to the grey levels that occur in the ROI (`levels`), so that empty levels cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from harmonict.radiomics.jit import compiled


def directions(dimension: str = "3D", distance: int = 1) -> np.ndarray:
    """Offsets (k, 3) at one Chebyshev distance, one of each pair of opposites: at 1, 4 in "2D", 13 in "3D"."""
    offsets = all_offsets(dimension, distance)
    return offsets[: len(offsets) // 2]


def all_offsets(dimension: str = "3D", distance: int = 1) -> np.ndarray:
    """All offsets (2k, 3) at one Chebyshev distance: 8 in "2D", 26 in "3D" at distance 1."""
    reach = np.arange(distance, -distance - 1, -1)
    out_of_plane = reach if dimension == "3D" else np.zeros(1, int)
    grid = np.stack(np.meshgrid(out_of_plane, reach, reach, indexing="ij"), axis=-1).reshape(-1, 3)
    return grid[np.abs(grid).max(axis=1) == distance]


@dataclass(frozen=True)
class Levels:
    """A level image prepared for the kernels: padded, flat, its levels numbered 1..n without gaps."""

    flat: np.ndarray  # int32, the padded image in C order
    voxels: np.ndarray  # int64, indices of the ROI's voxels in `flat`
    values: np.ndarray  # int64 (n,), grey level of each row
    strides: np.ndarray  # int64 (3,)
    image: np.ndarray  # int32 (z, y, x), the unpadded level image

    def steps(self, offsets: np.ndarray) -> np.ndarray:
        """Offsets as steps in `flat`."""
        return np.ascontiguousarray(np.asarray(offsets, np.int64) @ self.strides)


def prepare(level_image: np.ndarray, reach: int = 1) -> Levels:
    """`Levels` of an int image (z, y, x), 0 outside the ROI; reach: the largest offset that will be asked for."""
    z, y, x = level_image.shape
    padded = np.zeros((z + 2 * reach, y + 2 * reach, x + 2 * reach), np.int32)
    present = np.bincount(level_image.ravel())
    values = np.flatnonzero(present[1:]) + 1
    rank = np.zeros(len(present), np.int32)
    rank[values] = np.arange(1, len(values) + 1)
    padded[reach : reach + z, reach : reach + y, reach : reach + x] = rank[level_image]
    flat = padded.ravel()
    strides = np.array([padded.shape[1] * padded.shape[2], padded.shape[2], 1], np.int64)
    return Levels(flat, np.flatnonzero(flat), values, strides, level_image)


@compiled
def _cooccurrences(flat, voxels, steps, n):
    counts = np.zeros((steps.size, n, n))
    for v in voxels:
        i = flat[v] - 1
        for a in range(steps.size):
            j = flat[v + steps[a]]
            if j > 0:
                counts[a, i, j - 1] += 1.0
    return counts


@compiled
def _runs(flat, voxels, steps, n, longest):
    counts = np.zeros((steps.size, n, longest))
    touching = np.zeros(steps.size, np.bool_)
    for v in voxels:
        i = flat[v]
        for a in range(steps.size):
            s = steps[a]
            if flat[v + s] > 0:
                touching[a] = True
            if flat[v - s] == i:  # inside a run, counted where it began
                continue
            length = 1
            w = v + s
            while flat[w] == i:
                length += 1
                w += s
            counts[a, i - 1, length - 1] += 1.0
    return counts, touching


@compiled
def _zones(flat, voxels, steps, border):
    todo = flat.copy()
    stack = np.empty(voxels.size, np.int64)
    level = np.empty(voxels.size, np.int64)
    size = np.empty(voxels.size, np.int64)
    distance = np.empty(voxels.size, np.int64)
    n = 0
    for v in voxels:
        i = todo[v]
        if i == 0:
            continue
        todo[v] = 0
        stack[0] = v
        top = 1
        count = 0
        nearest = border[v]
        while top > 0:
            top -= 1
            w = stack[top]
            count += 1
            if border[w] < nearest:
                nearest = border[w]
            for a in range(steps.size):
                u = w + steps[a]
                if todo[u] == i:
                    todo[u] = 0
                    stack[top] = u
                    top += 1
        level[n] = i - 1
        size[n] = count
        distance[n] = nearest
        n += 1
    return level[:n], size[:n], distance[:n]


@compiled
def _neighbourhoods(flat, voxels, steps, values, alpha):
    n = values.size
    dependence = np.zeros((n, steps.size + 1))
    difference = np.zeros(n)
    with_neighbour = np.zeros(n)
    for v in voxels:
        i = flat[v] - 1
        level = values[i]
        dependent = 0
        neighbours = 0
        total = 0
        for a in range(steps.size):
            j = flat[v + steps[a]]
            if j > 0:
                other = values[j - 1]
                neighbours += 1
                total += other
                if abs(other - level) <= alpha:
                    dependent += 1
        dependence[i, dependent] += 1.0
        if neighbours > 0:
            with_neighbour[i] += 1.0
            difference[i] += abs(level - total / neighbours)
    return dependence, difference, with_neighbour


def glcm_matrices(levels: Levels, offsets: np.ndarray) -> np.ndarray:
    """Symmetric co-occurrence counts (k, n, n), float64, one matrix for each offset (IBSI 3.6)."""
    counts = _cooccurrences(levels.flat, levels.voxels, levels.steps(offsets), len(levels.values))
    return counts + counts.transpose(0, 2, 1)


def glrlm_matrices(levels: Levels, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Run counts (k, n, longest run) and, per offset (k,), whether any line along it meets two voxels of the ROI.

    Column r holds runs of r + 1 voxels (IBSI 3.7). Offsets must be the unit steps of `directions`.
    """
    longest = max(levels.image.shape)
    counts, touching = _runs(levels.flat, levels.voxels, levels.steps(offsets), len(levels.values), longest)
    counts = counts[:, :, : int(np.flatnonzero(counts.any(axis=(0, 1)))[-1]) + 1]
    if not touching.all():
        where = np.argwhere(levels.image > 0)
        for a in np.flatnonzero(~touching):
            step = np.asarray(offsets[a])
            axis = int(np.flatnonzero(step)[0])
            along = where[:, axis] * step[axis]
            lines = where - along[:, None] * step
            touching[a] = len(np.unique(lines, axis=0)) < len(lines)
    return counts, touching


def border_distance(mask: np.ndarray, *, in_plane: bool) -> np.ndarray:
    """int64 (z, y, x): steps through voxel faces from each voxel of the mask to the outside, 1 at the border.

    in_plane: count within each slice only. The image's edge counts as outside. Source: IBSI 3.9.
    """
    padded = np.pad(mask, 1)
    if not in_plane:
        return ndimage.distance_transform_cdt(padded, "taxicab")[1:-1, 1:-1, 1:-1].astype(np.int64)
    slices = [ndimage.distance_transform_cdt(s, "taxicab")[1:-1, 1:-1] for s in padded[1:-1]]
    return np.stack(slices).astype(np.int64)


def zones(levels: Levels, offsets: np.ndarray, border: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Row, size in voxels and distance to the border of each connected zone of equal level (IBSI 3.8, 3.9).

    offsets: all neighbours (`all_offsets`). border: `border_distance` of the morphological mask (z, y, x), or None
    where the distance is not needed (it is then 0).
    """
    padded = np.zeros(len(levels.flat), np.int64)
    if border is not None:
        padded[levels.voxels] = border[levels.image > 0]
    return _zones(levels.flat, levels.voxels, levels.steps(offsets), padded)


def zone_matrix(rows: np.ndarray, columns: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts (count, m) of (row, column value) pairs and the m column values that occur, ascending."""
    values = np.flatnonzero(np.bincount(columns))
    place = np.zeros(values[-1] + 1, np.int64)
    place[values] = np.arange(len(values))
    flat = np.bincount(rows * len(values) + place[columns], minlength=count * len(values))
    return flat.reshape(count, len(values)).astype(np.float64), values


def neighbourhood_matrices(
    levels: Levels, offsets: np.ndarray, alpha: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dependence counts (n, neighbours + 1), and per level (n,) NGTDM's summed difference and its voxel count.

    Column d of the first holds voxels with d neighbours no further than `alpha` levels away (IBSI 3.11; PyRadiomics'
    GLDM). The count holds voxels with at least one neighbour in the ROI (IBSI 3.10).
    """
    return _neighbourhoods(levels.flat, levels.voxels, levels.steps(offsets), levels.values, float(alpha))
