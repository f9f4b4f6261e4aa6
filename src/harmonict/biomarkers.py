"""Imaging biomarkers of the lung and of nodules, and the masks that they are read in.

Lung density (Zarei et al., "A Physics-informed Deep Neural Network for Harmonization of CT Images", section II-D):
LAA-950, Perc15 and lung mass in a lung mask. Nodules: volume, surface, surface to volume and sphericity of a K-means
segmentation, read off a mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from scipy import ndimage
from skimage.measure import marching_cubes, mesh_surface_area

from harmonict.core import HarmonictError, Series

LUNG_BELOW_HU = -300.0  # on the smoothed image: the border that radiotherapy contours of lungs follow
LUNG_SMOOTHING_MM = 1.0  # SD, in plane
BODY_OPENING = 3  # double pixels, side of the square: takes the table off
LUNG_CLOSING_MM = 5.0  # radius, in plane: vessels and nodules up to 10 mm wide that open to the border
AERATED_BELOW_HU = -500.0  # on the smoothed image: lung without vessels, consolidation and partial volume
LUNG_PART_ML = 10.0  # a smaller piece of lung is dropped
GAS_BELOW_HU = -960.0  # 5th percentile of a small part that is gas in the bowel or the gullet, not lung
AIRWAY_BELOW_HU = -920.0  # lumen of trachea and main bronchi on the smoothed image
AIRWAY_WALL_MM = 2.0  # the rim of the lumen that is still below LUNG_BELOW_HU
TRACHEA_MM2 = (60.0, 700.0)  # lumen area of a trachea in one slice
TRACHEA_OFF_MIDDLE_MM = 50.0  # from the middle of the image, sideways
TRACHEA_LEAST_MM = 40.0  # a tube that is lost sooner was the larynx, and the search goes on
BRONCHI_REACH_MM = 45.0  # main bronchi end this far from the trachea's axis


@dataclass(frozen=True)
class LungDensity:
    """Density biomarkers of a lung mask.

    laa950_percent: share of the aerated lung's voxels below -950 HU. perc15_hu: 15th percentile of their HU.
    mass_g, volume_ml, mean_hu: of all voxels of the mask.
    """

    laa950_percent: float
    perc15_hu: float
    mass_g: float
    volume_ml: float
    mean_hu: float


@dataclass(frozen=True)
class NoduleShape:
    """Size and shape of one nodule: volume, surface (A), surface to volume (A/V) and sphericity (1 for a ball)."""

    volume_mm3: float
    surface_mm2: float
    surface_to_volume_per_mm: float
    sphericity: float


def lung_density(series: Series, lung: np.ndarray | None = None) -> LungDensity:
    """LAA-950, Perc15, lung mass and volume of a series; `lung`: bool (z, y, x), else `lung_mask(series)`.

    LAA-950 and Perc15 are read in the aerated lung: voxels of the mask that are below -500 HU after smoothing (in
    plane, Gaussian, SD 1 mm). The HU counted are the image's own. Mass is the sum over voxels of (HU + 1000) / 1000
    times the voxel's volume, 1 g/ml for water and 0 for air (Zarei et al. print 1024 for 1000, which gives air a
    mass); voxels below -1000 HU count negative, so that noise cancels. A single image counts with its slice thickness;
    where that is not known, mass and volume are per mm.
    HU that a file clips at -1024 bias LAA-950 and Perc15 once the image is smoothed.
    Raises HarmonictError where the mask has another shape, is empty, or holds no aerated lung.
    """
    lung = lung_mask(series) if lung is None else _checked(series, lung, "lung")
    if not lung.any():
        raise HarmonictError(f"{series.name or 'series'}: no lung in the mask; density biomarkers need a chest CT")
    box = _bounding_box(lung, series.name)
    hu = series.hu[box]
    aerated = hu[lung[box] & (_smoothed(hu, series.pixel_mm) < AERATED_BELOW_HU)]
    if aerated.size == 0:
        raise HarmonictError(f"{series.name or 'series'}: no voxel of the lung mask holds air (-500 HU or less)")
    whole = hu[lung[box]].astype(np.float64)
    voxel_ml = float(np.prod(_voxel_mm(series))) / 1000
    return LungDensity(
        laa950_percent=float(100 * np.mean(aerated < -950)),
        perc15_hu=float(np.percentile(aerated, 15)),
        mass_g=float(np.sum(whole + 1000) / 1000 * voxel_ml),
        volume_ml=float(whole.size * voxel_ml),
        mean_hu=float(whole.mean()),
    )


def lung_mask(series: Series) -> np.ndarray:
    """Both lungs: bool (z, y, x), all False where there is none.

    1. Smoothed in plane (Gaussian, SD 1 mm), below -300 HU, not joined to the image's edge within its slice, and inside
       the body (the largest dense part, its holes filled), so not in a hollow table.
    2. Trachea and main bronchi are followed downwards from the top, slice by slice (lumen below -920 HU), until 45 mm
       beside the trachea's axis, and taken off with a rim of 2 mm, or whole where they do not open into lung. On
       single images small central gas is taken off.
    3. Dropped: parts of less than 10 ml (0.5 cm^2 on single images), and parts below a fifth of the largest that hold
       gas (5th percentile below -960 HU), as bowel and gullet do.
    4. Closed with a disc of 5 mm radius in plane and holes filled, slice by slice: vessels and nodules inside the lung
       belong to it. A tumour that the lung encloses is lung; one that grows from the wall or the mediastinum
       and is wider than the closing stays outside, as it does in radiotherapy contours.
    Raises nothing for an image without lungs: the mask is empty. The axis z may run up or down. A lung that the edge
    of the image cuts (a reconstruction of one lung) is taken for the air outside and lost.
    """
    hu = series.hu
    pixel_mm = series.pixel_mm
    smooth = _smoothed(hu, pixel_mm)
    inner = np.empty(hu.shape, bool)
    volume = series.is_volume and len(hu) > 1
    body = _body(smooth, volume)
    for z, part in enumerate(smooth):
        inner[z] = _not_at_edge(part < LUNG_BELOW_HU) & body[z]
    if volume:
        up = series.geometry.direction[0][2] >= 0
        _take_off_airway(inner, smooth, pixel_mm, series.geometry.spacing_mm[0], up)
        mask = _lung_parts(inner, smooth, LUNG_PART_ML * 1000 / float(np.prod(series.geometry.spacing_mm)))
    else:
        mask = inner
        for z in range(len(mask)):
            _take_off_central_gas(mask[z], smooth[z], pixel_mm)
            mask[z] = _lung_parts(mask[z], smooth[z], 50 / float(np.prod(pixel_mm)))
    del smooth, inner
    return _closed(mask, pixel_mm)


def nodule_mask(series: Series, region: np.ndarray, *, clusters: int = 2) -> np.ndarray:
    """The nodule in `region` (bool (z, y, x), a generous box or mask around it): bool (z, y, x).

    K-means on the HU of the region (Lloyd's algorithm in one dimension, started at equally spaced quantiles, so that
    it has no chance in it), the cluster of the densest voxels, its largest part (joined by faces), holes filled.
    With `clusters=3` a ground-glass rim or a chest wall in the region gets a cluster of its own.
    Raises HarmonictError where the region is empty or holds fewer HU values than clusters.
    """
    region = _checked(series, region, "nodule region")
    box = _bounding_box(region, series.name)
    hu, inside = series.hu[box].astype(np.float64), region[box]
    levels = np.unique(hu[inside])
    if len(levels) < clusters or clusters < 2:
        raise HarmonictError(
            f"{series.name or 'series'}: K-means needs at least 2 clusters and as many HU values in the region, "
            f"got {clusters} clusters and {len(levels)} values"
        )
    centres = _kmeans(hu[inside], clusters)
    dense = inside & (hu > (centres[-1] + centres[-2]) / 2)
    labels, _ = ndimage.label(dense)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    mask = np.zeros(series.hu.shape, bool)
    mask[box] = ndimage.binary_fill_holes(labels == sizes.argmax())
    return mask


def nodule_shape(series: Series, nodule: np.ndarray) -> NoduleShape:
    """Volume, surface, A/V and sphericity of a nodule's mask (bool (z, y, x)), from a mesh around it.

    The mask is smoothed with a Gaussian whose SD is half the longest voxel edge, and meshed at the level that leaves as
    many voxels inside as the mask has: the bare staircase of voxels has a tenth more surface than the ball that it
    stands for. The volume is the mesh's own (signed tetrahedra), so V and A belong to one body; sphericity is
    (36 pi V^2)^(1/3) / A.
    Raises HarmonictError where the mask is empty, or the series is single images (no volume).
    """
    nodule = _checked(series, nodule, "nodule")
    if not series.is_volume:
        raise HarmonictError(f"{series.name or 'series'}: a nodule's shape needs a volume, these are single images")
    box = _bounding_box(nodule, series.name)
    spacing_mm = series.geometry.spacing_mm
    sigma = [max(spacing_mm) / 2 / size_mm for size_mm in spacing_mm]
    solid = np.pad(nodule[box].astype(np.float32), [(int(4 * s) + 2,) * 2 for s in sigma])
    soft = ndimage.gaussian_filter(solid, sigma)
    last_out, first_in = np.sort(soft, axis=None)[-int(solid.sum()) - 1 :][:2]
    vertices, faces, _, _ = marching_cubes(soft, (last_out + first_in) / 2, spacing=spacing_mm)
    a, b, c = (vertices[faces[:, i]].astype(np.float64) for i in range(3))
    volume = abs(float(np.sum(a * np.cross(b, c)) / 6))
    surface = float(mesh_surface_area(vertices, faces))
    return NoduleShape(
        volume_mm3=volume,
        surface_mm2=surface,
        surface_to_volume_per_mm=surface / volume,
        sphericity=float((36 * np.pi * volume**2) ** (1 / 3) / surface),
    )


def biomarkers(
    series: Series, *, lung: np.ndarray | None = None, nodules: Mapping[str, np.ndarray] | None = None
) -> dict[str, float]:
    """One row of numbers: the lung's density and, for each named region in `nodules`, the shape of its nodule.

    Keys: the fields of `LungDensity`, and "NAME_volume_mm3", ... for each nodule (segmented by `nodule_mask`).
    """
    row = asdict(lung_density(series, lung))
    for name, region in (nodules or {}).items():
        shape = nodule_shape(series, nodule_mask(series, region))
        row |= {f"{name}_{key}": value for key, value in asdict(shape).items()}
    return row


def _checked(series: Series, mask: np.ndarray, what: str) -> np.ndarray:
    if mask.shape != series.hu.shape or mask.dtype != bool:
        raise HarmonictError(
            f"{series.name or 'series'}: the {what} mask must be bool with the shape of the image, {series.hu.shape}, "
            f"got {mask.dtype} {mask.shape}"
        )
    return mask


def _voxel_mm(series: Series) -> tuple[float, float, float]:
    z, y, x = series.geometry.spacing_mm
    if not series.is_volume:
        z = series.protocol.slice_thickness_mm or 1.0
    return z, y, x


def _smoothed(hu: np.ndarray, pixel_mm: tuple[float, float]) -> np.ndarray:
    for axis, size_mm in zip((1, 2), pixel_mm, strict=True):
        hu = ndimage.gaussian_filter1d(hu, LUNG_SMOOTHING_MM / size_mm, axis=axis)
    return hu


def _bounding_box(mask: np.ndarray, name: str) -> tuple[slice, ...]:
    if not mask.any():
        raise HarmonictError(f"{name or 'series'}: the mask is empty")
    return ndimage.find_objects(mask.astype(np.uint8))[0]


def _kmeans(values: np.ndarray, clusters: int) -> np.ndarray:
    """Centres in rising order; Lloyd's algorithm on sorted values, where a cluster is an interval."""
    values = np.sort(values)
    sums = np.concatenate([[0], np.cumsum(values)])
    centres = np.quantile(np.unique(values), (np.arange(clusters) + 0.5) / clusters)
    while True:
        cuts = np.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        cuts = np.concatenate([[0], cuts, [len(values)]])
        count = np.diff(cuts)
        moved = np.where(count > 0, np.diff(sums[cuts]) / np.maximum(count, 1), centres)
        if np.array_equal(moved, centres):
            return centres
        centres = moved


def _not_at_edge(air: np.ndarray) -> np.ndarray:
    """Parts of a slice's air that do not reach the image's edge."""
    labels, n = ndimage.label(air)
    inner = np.ones(n + 1, bool)
    inner[0] = False
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        inner[edge] = False
    return inner[labels]


def _body(smooth: np.ndarray, volume: bool) -> np.ndarray:
    """The largest dense part, opened in plane, holes filled slice by slice; found at half the resolution."""
    half = (smooth[:, ::2, ::2] > LUNG_BELOW_HU).view(np.uint8)
    for operation in (ndimage.minimum_filter1d, ndimage.maximum_filter1d):
        for axis in (1, 2):
            half = operation(half, BODY_OPENING, axis=axis, mode="nearest")
    for part in [half] if volume else np.split(half, len(half)):
        labels, _ = ndimage.label(part)
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        part[...] = (labels == sizes.argmax()) & (part > 0)
    for part in half:
        part |= _not_at_edge(part == 0)
    return half.view(bool).repeat(2, 1).repeat(2, 2)[:, : smooth.shape[1], : smooth.shape[2]]


def _lung_parts(mask: np.ndarray, smooth: np.ndarray, least_voxels: float) -> np.ndarray:
    """The connected parts of a mask that are large enough and lung rather than gas."""
    labels, n = ndimage.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=n + 1)
    sizes[0] = 0
    keep = sizes >= least_voxels
    for part in np.flatnonzero(keep & (sizes < sizes.max() / 5)):
        keep[part] = np.percentile(smooth[labels == part], 5) > GAS_BELOW_HU
    return keep[labels]


def _take_off_airway(
    inner: np.ndarray, smooth: np.ndarray, pixel_mm: tuple[float, float], slice_mm: float, up: bool
) -> None:
    """Follow the trachea from the top of the volume down to the main bronchi and take it off `inner`, in place."""
    order = range(len(inner))[::-1] if up else range(len(inner))
    lumen: np.ndarray | None = None
    followed_mm, axis_x = 0.0, 0.0
    for z in order:
        labels, _ = ndimage.label(inner[z] & (smooth[z] < AIRWAY_BELOW_HU))
        if lumen is not None:
            lumen = _next_lumen(labels, lumen, pixel_mm, slice_mm, axis_x)
            followed_mm += slice_mm
            if lumen is None and followed_mm > TRACHEA_LEAST_MM:
                return
        first = lumen is None  # nothing yet, or lost in the larynx
        if lumen is None:
            lumen, followed_mm = _trachea(labels, smooth[z], pixel_mm), 0.0
            if lumen is None:
                continue
        x = np.flatnonzero(lumen.any(0)) * pixel_mm[1]
        if first or np.ptp(x) < 30:  # one tube: still the trachea
            axis_x = float(x.mean())
        inner[z] &= ~(_grown(lumen, AIRWAY_WALL_MM, pixel_mm) | _own_part(inner[z], lumen, pixel_mm))


def _own_part(inner: np.ndarray, lumen: np.ndarray, pixel_mm: tuple[float, float]) -> np.ndarray:
    """The parts of a slice that the lumen lies in, wall and mucus with it, where they are no larger than an airway."""
    labels, n = ndimage.label(inner)
    area = np.bincount(labels.ravel(), minlength=n + 1) * pixel_mm[0] * pixel_mm[1]
    touched = np.zeros(n + 1, bool)
    touched[labels[lumen]] = True
    touched[0] = False
    return (touched & (area <= 2 * TRACHEA_MM2[1]))[labels]


def _trachea(labels: np.ndarray, smooth: np.ndarray, pixel_mm: tuple[float, float]) -> np.ndarray | None:
    """Gas of a slice that is central, round, as large as a trachea or main bronchus and in soft tissue; else None."""
    found = np.zeros(labels.shape, bool)
    for part, box in enumerate(ndimage.find_objects(labels), start=1):
        height, width = ((s.stop - s.start) * d for s, d in zip(box, pixel_mm, strict=True))
        area = float((labels[box] == part).sum()) * pixel_mm[0] * pixel_mm[1]
        round_ = max(height, width) <= 2.5 * min(height, width) and area >= 0.5 * height * width
        off_middle = abs((box[1].start + box[1].stop) / 2 - labels.shape[1] / 2) * pixel_mm[1]
        if not (TRACHEA_MM2[0] <= area <= TRACHEA_MM2[1] and round_ and off_middle < TRACHEA_OFF_MIDDLE_MM):
            continue
        own = labels == part
        around = _grown(own, 8.0, pixel_mm) & ~_grown(own, 3.0, pixel_mm)
        if smooth[around].mean() > AERATED_BELOW_HU:  # a bulla lies in lung
            found |= own
    return found if found.any() else None


def _next_lumen(
    labels: np.ndarray, lumen: np.ndarray, pixel_mm: tuple[float, float], slice_mm: float, axis_x: float
) -> np.ndarray | None:
    """The lumen one slice further: gas that touches the last one and lies no further out than an airway can bend."""
    near = _grown(lumen, max(3.0, slice_mm), pixel_mm)
    touched = np.unique(labels[lumen])
    found = near & np.isin(labels, touched[touched > 0])
    x = np.arange(labels.shape[1]) * pixel_mm[1]
    found[:, np.abs(x - axis_x) > BRONCHI_REACH_MM] = False
    area = found.sum() * pixel_mm[0] * pixel_mm[1]
    if area < 15 or area > 2 * TRACHEA_MM2[1]:
        return None
    return found


def _take_off_central_gas(mask: np.ndarray, smooth: np.ndarray, pixel_mm: tuple[float, float]) -> None:
    """Trachea and main bronchi of a single slice: small, gas, near the middle; taken off `mask`, in place."""
    labels, _ = ndimage.label(mask)
    for part, box in enumerate(ndimage.find_objects(labels), start=1):
        own = labels[box] == part
        area = float(own.sum()) * pixel_mm[0] * pixel_mm[1]
        off_middle = abs((box[1].start + box[1].stop) / 2 - mask.shape[1] / 2) * pixel_mm[1]
        if (
            area < 2 * TRACHEA_MM2[1]
            and off_middle < TRACHEA_OFF_MIDDLE_MM
            and np.percentile(smooth[box][own], 25) < AIRWAY_BELOW_HU
        ):
            mask[box][own] = False


def _grown(mask: np.ndarray, radius_mm: float, pixel_mm: tuple[float, float]) -> np.ndarray:
    """A slice's mask with everything within a radius of it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    margin = [int(radius_mm / d) + 1 for d in pixel_mm]
    box = (
        slice(max(rows[0] - margin[0], 0), rows[-1] + margin[0] + 1),
        slice(max(columns[0] - margin[1], 0), columns[-1] + margin[1] + 1),
    )
    out = np.zeros_like(mask)
    out[box] = ndimage.distance_transform_edt(~mask[box], sampling=pixel_mm) <= radius_mm
    return out


def _closed(mask: np.ndarray, pixel_mm: tuple[float, float]) -> np.ndarray:
    """Closing with a disc, and holes filled, slice by slice."""
    margin = int(LUNG_CLOSING_MM / min(pixel_mm)) + 2
    for part in mask:
        if not part.any():
            continue
        rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        own = np.pad(part[box], margin)
        grown = ndimage.distance_transform_edt(~own, sampling=pixel_mm) <= LUNG_CLOSING_MM
        closed = ndimage.distance_transform_edt(grown, sampling=pixel_mm) > LUNG_CLOSING_MM
        closed |= _not_at_edge(~(closed | own))
        part[box] |= closed[margin:-margin, margin:-margin]
    return mask
