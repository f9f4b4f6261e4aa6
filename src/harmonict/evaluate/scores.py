"""One image against its target, in every way that the benchmark's tables need: a Case, its ROIs, and what is measured.

What is measured of the target alone is measured once and kept. Everything about features is kept as numbers of each
ROI, so that tables are made from them without touching an image again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from harmonict import metrics
from harmonict.core import Geometry, HarmonictError, ScanProtocol, Series
from harmonict.core.files import write_whole
from harmonict.data import SlicePairs
from harmonict.dicom.inventory import find_series
from harmonict.evaluate.image import body_mask, compare
from harmonict.evaluate.real_pairs import RealPair
from harmonict.evaluate.texture import texture_errors
from harmonict.physics.mtf import skin_air_mtf
from harmonict.physics.nps import uniform_noise_sd
from harmonict.radiomics import FeatureSettings, crop_to_mask, extract_features
from harmonict.radiomics.features import FAMILIES
from harmonict.radiomics.ibex import NAMES as IBEX_NAMES
from harmonict.radiomics.ibex import ibex_features
from harmonict.radiomics.rois import HU_RANGES, Roi, random_rois
from harmonict.volumes import read_mask

VERSION = 2  # of what is measured: another number measures everything anew
IBEX_RANGES = HU_RANGES[:4]  # RadiomicGAN's four
TEXTURE = FeatureSettings(families=tuple(f for f in FAMILIES if f != "shape"))
MTF_SLICES = 2  # the middle ones: the MTF at the skin costs a third of a second a slice
NODULE_MARGIN_MM = 10.0
PEAK_HU = 2024.0  # of PSNR: HU are clipped to [-1024, 1000]
TARGETS_IN_MEMORY = 4
_targets: dict[str, dict[str, np.ndarray]] = {}
QUALITY = ("psnr_db", "ssim", "nrmse", "mae_hu", "bias_hu")


@dataclass(frozen=True)
class Case:
    """A source series and the target's slices at the same places, on one grid.

    patient: a key that tells patients apart. differs: "kernel" (FBP, same dose and thickness), "iterative", "dose or
    thickness", or "real". rois: boxes judged on the target. nodules: masks (z, y, x) on the target, by name. key: a
    digest of all that decides what is measured of the target and the source.
    """

    name: str
    patient: str
    differs: str
    source: Series
    target: Series
    rois: tuple[Roi, ...]
    nodules: dict[str, np.ndarray] = field(default_factory=dict)
    key: str = ""


@dataclass(frozen=True)
class CaseFiles:
    """Where a case of a trial lies; `read` makes the Case.

    source, target: folder or file, and series UID. masks: nodule name -> mask file, on the target's grid.
    """

    name: str
    patient: str
    differs: str
    source: tuple[str, str]
    target: tuple[str, str]
    source_protocol: ScanProtocol
    target_protocol: ScanProtocol
    masks: tuple[tuple[str, str], ...]
    slices: int
    rois: int
    seed: int

    @property
    def key(self) -> str:
        """Digest of what decides the numbers."""
        return hashlib.sha256(repr((self, VERSION)).encode()).hexdigest()

    def read(self) -> Case:
        """Both series, cut down to (at most `slices`, around the nodules) slices that lie at the same place."""
        source, target = (_read(*place) for place in (self.source, self.target))
        masks = {name: read_mask(path, like=target) for name, path in self.masks}
        pairs = common_slices(source, target)
        if not pairs:
            raise HarmonictError(f"{self.name}: source and target have no slice position in common")
        pairs = _some(pairs, self.slices, masks)
        series = SlicePairs([(source, i, target, j) for i, j in pairs])
        ((x, y),) = series.whole_series()
        of_target = [j for _, j in pairs]
        nodules = {name: mask[of_target] for name, mask in masks.items() if mask[of_target].any()}
        volume = x.is_volume and y.is_volume and math.isclose(*(s.geometry.spacing_mm[0] for s in (x, y)), rel_tol=0.01)
        y = _on_grid(y, x, volume)
        return Case(
            self.name,
            self.patient,
            self.differs,
            replace(x, protocol=self.source_protocol),
            y,
            tuple(random_rois(y, rng=np.random.default_rng(self.seed), number=self.rois)),
            nodules,
            self.key,
        )


@dataclass(frozen=True)
class RealCase:
    """A real pair as a case."""

    pair: RealPair
    rois: int
    seed: int

    @property
    def name(self) -> str:
        return self.pair.name

    @property
    def differs(self) -> str:
        return "real"

    @property
    def patient(self) -> str:
        return self.pair.name.split()[0]

    @property
    def source_protocol(self) -> ScanProtocol:
        return self.pair.source.protocol

    @property
    def key(self) -> str:
        digest = hashlib.sha256(repr((self.pair.name, self.rois, self.seed, VERSION)).encode())
        for series in (self.pair.source, self.pair.target):
            digest.update(series.hu.tobytes())
        return digest.hexdigest()

    def read(self) -> Case:
        pair = self.pair
        target = _on_grid(pair.target, pair.source, False)
        rois = random_rois(target, rng=np.random.default_rng(self.seed), number=self.rois, within=pair.within)
        return Case(self.name, self.patient, self.differs, pair.source, target, tuple(rois), {}, self.key)


def common_slices(source: Series, target: Series) -> list[tuple[int, int]]:
    """(slice of the source, slice of the target) for every source slice whose centre lies in a target slice.

    The nearest target slice within half a target slice, each taken once.
    """
    a, b = source.slice_positions_mm, target.slice_positions_mm
    if a is None or b is None:
        return [(z, z) for z in range(len(source.hu))] if len(source.hu) == len(target.hu) else []
    half = target.geometry.spacing_mm[0] / 2 * (1 + 1e-6)
    pairs: dict[int, tuple[float, int]] = {}
    for i, z in enumerate(a):
        j = int(np.argmin(np.abs(b - z)))
        apart = float(abs(b[j] - z))
        if apart <= half and apart < pairs.get(j, (np.inf, 0))[0]:
            pairs[j] = apart, i
    return [(i, j) for j, (_, i) in sorted(pairs.items())]


# -- measuring -------------------------------------------------------------------------------------------------------


def measure_target(case: Case) -> dict[str, np.ndarray]:
    """What is measured of the target alone: as in `measure`, and the place in HU_RANGES of each ROI, feature_range (of
    those in features) and ibex_range (of those in ibex)."""
    same = hashlib.sha256(case.target.hu.tobytes() + repr((case.rois, sorted(case.nodules))).encode()).hexdigest()
    if same not in _targets:  # the doses and kernels of a patient share a target
        ranges = np.array([HU_RANGES.index(roi.hu_range) for roi in case.rois], int)
        while len(_targets) >= TARGETS_IN_MEMORY:
            del _targets[next(iter(_targets))]
        _targets[same] = _features(case, case.target.hu) | {
            "feature_range": ranges,
            "ibex_range": ranges[ranges < len(IBEX_RANGES)],
            "about": _about(_physics(case.target)),
        }
    return dict(_targets[same])


def measure(case: Case, image: Series) -> dict[str, np.ndarray]:
    """What is measured of an image of the case: arrays by name.

    features (rois, 93), ibex (rois of RadiomicGAN's four ranges, 1401), image (1401,) of the body in the middle slice,
    nodule_NAME (1401,); about: JSON of the scalars: quality against the target (whole_psnr_db, body_psnr_db, ...),
    STAN-CT's GLCM errors over the body (glcm_contrast, ...), noise_hu, f50_per_mm, nodule_NAME_psnr_db.
    """
    hu = image.hu
    flat = case.target.with_hu(hu)
    table = compare(case.target, flat, body=_body(case))
    means = table[table["slice"] == "mean"].set_index("region")
    row: dict[str, Any] = {
        f"{region}_{name}": float(means.loc[region, name]) for region in ("whole", "body") for name in QUALITY
    }
    row["spectrum_error_db"] = float(means.loc["whole", "spectrum_error_db"])
    errors = texture_errors(hu, case.target.hu, mask=_body(case))
    row |= {f"glcm_{feature}": float(errors[feature].mean()) for feature in errors}
    row |= {"differs": case.differs, "slices": len(hu), "rois": len(case.rois), **_physics(flat)}
    for name, mask in case.nodules.items():
        box = nodule_box(mask, case.target.geometry.spacing_mm)
        ref, img = (np.clip(s.hu[box], -1024, 1000) for s in (case.target, flat))
        row[f"nodule_{name}_psnr_db"] = metrics.psnr(ref, img, data_range=PEAK_HU)
    return _features(case, hu) | {"about": _about(row)}


def nodule_box(mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[slice, slice, slice]:
    """The box of a mask and 10 mm around it in plane: index into (z, y, x)."""
    box = []
    for axis, where in enumerate(np.nonzero(mask)):
        margin = 0 if axis == 0 else round(NODULE_MARGIN_MM / spacing_mm[axis])
        box.append(slice(max(int(where.min()) - margin, 0), min(int(where.max()) + 1 + margin, mask.shape[axis])))
    z, y, x = box
    return z, y, x


def write_arrays(arrays: dict[str, np.ndarray], key: str, path: Path) -> None:
    """Keep measurements as one file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(name: str) -> None:
        with open(name, "wb") as file:
            np.savez(file, key=np.array(key), **arrays)  # type: ignore[arg-type]

    write_whole(path, write)


def read_arrays(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """Measurements that were kept under this key; None where there are none, or of something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files} if str(file["key"]) == key else None
    except (OSError, ValueError, KeyError):
        return None


def about(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The scalars of measurements."""
    return json.loads(str(arrays["about"]))


@cache
def texture_names() -> list[str]:
    """The 93 features in the order of their columns."""
    return list(extract_features(np.zeros((1, 2, 2)), np.ones((1, 2, 2), bool), (1.0, 1.0, 1.0), TEXTURE))


def _about(row: dict[str, Any]) -> np.ndarray:
    return np.array(json.dumps(row))


def _features(case: Case, hu: np.ndarray) -> dict[str, np.ndarray]:
    spacing = case.target.geometry.spacing_mm
    small, ibex = [], []
    for roi in case.rois:
        box = hu[roi.box]
        whole = np.ones(box.shape, bool)
        small.append(list(extract_features(box, whole, spacing, TEXTURE).values()))
        if roi.hu_range in IBEX_RANGES:
            ibex.append(list(ibex_features(box, whole, spacing).values()))
    found = {"features": np.array(small), "ibex": np.array(ibex, np.float64).reshape(-1, len(IBEX_NAMES))}
    middle = len(hu) // 2
    body = _body(case)[middle : middle + 1]
    if body.any():
        part, mask = crop_to_mask(hu[middle : middle + 1], body)
        found["image"] = np.array(list(ibex_features(part, mask, spacing).values()))
    for name, mask in case.nodules.items():
        part, inside = crop_to_mask(hu, mask)
        found[f"nodule_{name}"] = np.array(list(ibex_features(part, inside, spacing).values()))
    return found


def _body(case: Case) -> np.ndarray:
    return body_mask(np.clip(case.target.hu, -1024, 1000), is_volume=case.target.is_volume)


def _physics(series: Series) -> dict[str, float]:
    """Noise in uniform tissue (HU) and f50 at the skin (1/mm), NaN where the image does not allow it."""
    start = max(0, (len(series.hu) - MTF_SLICES) // 2)
    part = slice(start, start + MTF_SLICES)
    padding = None if series.padding is None else series.padding[part]
    positions = None if series.positions_mm is None else series.positions_mm[part]
    middle = replace(series, hu=series.hu[part], padding=padding, positions_mm=positions)
    row = {}
    for name, value in (
        ("noise_hu", lambda: uniform_noise_sd(series)),
        ("f50_per_mm", lambda: skin_air_mtf(middle).f50_per_mm),
    ):
        try:
            row[name] = float(value())
        except HarmonictError:
            row[name] = float("nan")
    return row


# -- slices ------------------------------------------------------------------------------------------------------------


def _read(path: str, uid: str) -> Series:
    inventory = find_series(path)
    found = [f for f in inventory.found if f.series_uid == uid] or inventory.found
    if len(found) != 1:
        raise HarmonictError(f"{path} must hold one CT series, there are {len(found)}")
    return found[0].read()


def _some(pairs: list[tuple[int, int]], slices: int, masks: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """At most `slices` neighbouring pairs, around the first nodule or the middle."""
    if len(pairs) <= slices:
        return pairs
    middle = pairs[len(pairs) // 2][1]
    for mask in masks.values():
        if mask.any():
            middle = round(float(np.mean(np.nonzero(mask)[0])))
            break
    nearest = int(np.argmin([abs(j - middle) for _, j in pairs]))
    start = min(max(nearest - slices // 2, 0), len(pairs) - slices)
    return pairs[start : start + slices]


def _on_grid(target: Series, source: Series, volume: bool) -> Series:
    """The target as an image of the source's grid; single slices where one of them is no stack of the other's."""
    positions = None if volume else tuple(float(z) for z in range(len(target.hu)))
    padding = target.padding
    if source.padding is not None:
        padding = source.padding if padding is None else padding | source.padding
    geometry = Geometry(spacing_mm=target.geometry.spacing_mm)
    return replace(target, geometry=geometry, is_volume=volume, positions_mm=positions, padding=padding, source=None)
