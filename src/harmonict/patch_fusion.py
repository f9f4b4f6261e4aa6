"""STAN-CT's DICOM reconstruction (Selim et al., AMIA 2020): a slice from overlapping patches, with its quality units.

    paper                                                  here
    Step 1, soft tissue patches, 50 % overlap              draw_patches
    Step 2, patches that do not fool D are discarded       _Patches.add
    Step 3, gray to HU, eq 7                               stretch_to_source
    Step 3, soft-tissue mask, integration                  _Patches.fuse
    Step 3, box artifacts and missing values               patch_steps, _Patches.reintegrate
Symbols: P_g a synthesized patch in the network's gray, MIN and MAX of the source.
What the paper leaves open, and what was chosen, is in `docs/patch-fusion.md`. No network lives here: one is handed in
as two functions.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from harmonict.core import HarmonictError
from harmonict.core.padding import fill_padding

MODES = ("straightforward", "overlap", "real-fake", "all")
CANDIDATES = 32  # positions looked at for each patch; the one that adds most coverage is taken
REACH_SIDES = 5  # sides of patches that are tried when asking which pixels a soft-tissue patch can reach at all
MEDIAN_TO_SD = 1.4826  # of values around 0
PIECE_PX, MIN_PAIRS = 48, 16  # a border is looked at in pieces; one with fewer tissue pixels has no measurable step
CLIP_SDS, CLIP_HU = 2.0, 50.0  # no pair of pixels counts for a higher step
SOLID_PX = 15  # coverage is asked for where tissue fills squares of this side too
CROP_PX = 8  # what one more re-integration crops from each border of a patch
FEATHER_PX = 16  # over which a re-integrated patch fades in behind its crop
REINTEGRATIONS = 3

Box = tuple[int, int, int]  # top row, left column, side, in pixels


@dataclass(frozen=True)
class FusionSettings:
    """What the pipeline does; the paper's values where it gives them (DICOM Reconstruction Framework, steps 1 to 3).

    mode: the ablation. "straightforward" pastes a plain grid; "overlap" adds unit 1; "real-fake" units 1 and 2; "all"
        also repairs box artifacts and fills empty pixels.
    low_hu, high_hu: soft tissue, ends included. share: of a patch's pixels that must be soft tissue.
    patch_px: smallest and largest side. multiple_px: sides are multiples of it (not in the paper: a network's stride).
    coverage: patches that each soft-tissue pixel must lie in. overlap: share of each patch that others must cover.
    realness: D's probability from which on a patch is kept (Experimental result: 0.99).
    max_patches, max_redraws: caps on the patches drawn at first, and on those drawn in the place of dropped ones.
    gray: "affine" takes HU as the network's own inverse gives them; "minmax" is eq 7 with the source patch's MIN and
        MAX; "minmax-slice" is eq 7 with those of the whole source slice, as printed.
    resize_px: patches are resized to this side for the network and back (the paper: 256); None keeps native pixels.
    blend: a patch fades out towards its borders; False: the mean of all patches over a pixel.
    seam_hu, seam_sds: a border is a box artifact where its mean step exceeds both this many HU and this many SD of the
        steps elsewhere.
    """

    mode: Literal["straightforward", "overlap", "real-fake", "all"] = "all"
    low_hu: float = -1000.0
    high_hu: float = 900.0
    share: float = 0.7
    patch_px: tuple[int, int] = (100, 256)
    multiple_px: int = 1
    coverage: int = 2
    overlap: float = 0.5
    realness: float = 0.99
    max_patches: int = 200
    max_redraws: int = 40
    gray: Literal["affine", "minmax", "minmax-slice"] = "affine"
    resize_px: int | None = None
    blend: bool = False
    seam_hu: float = 4.0
    seam_sds: float = 5.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise HarmonictError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}")
        if self.gray not in ("affine", "minmax", "minmax-slice"):
            raise HarmonictError(f"gray must be affine, minmax or minmax-slice; got {self.gray!r}")
        low, high = self.patch_px
        if not 1 <= low <= high or self.multiple_px < 1 or high // self.multiple_px * self.multiple_px < low:
            raise HarmonictError(
                f"patch_px must hold a smallest and a largest side with a multiple of {self.multiple_px} px between "
                f"them; got {low} and {high}"
            )
        if not self.low_hu < self.high_hu:
            raise HarmonictError(f"soft tissue must go from low to high HU; got {self.low_hu:g} to {self.high_hu:g}")
        if not (0 < self.share <= 1 and 0 <= self.overlap <= 1 and 0 <= self.realness <= 1):
            raise HarmonictError("share, overlap and realness must lie between 0 and 1")
        if self.coverage < 1 or self.max_patches < 1 or self.max_redraws < 0:
            raise HarmonictError("coverage and max_patches must be at least 1, max_redraws at least 0")


def slice_seed(source_hu: np.ndarray, seed: int = 0) -> int:
    """A seed from the pixels of a slice: the same slice draws the same patches wherever it stands in its series."""
    return zlib.crc32(np.ascontiguousarray(source_hu, np.float32).tobytes(), seed & 0xFFFFFFFF)


def fuse_slice(
    source_hu: np.ndarray,
    *,
    padding: np.ndarray | None,
    translate_patch: Callable[[Tensor], Tensor],
    realness: Callable[[Tensor], Tensor] | None,
    settings: FusionSettings,
    seed: int,
) -> tuple[np.ndarray, dict[str, Any]]:
    """One slice, translated patch by patch and put together; and what each quality unit did.

    source_hu: (h, w). padding: bool (h, w) or None; it never counts as tissue and the network sees it filled.
    translate_patch: float32 HU (n, 1, s, s) -> the same shape; HU for `gray="affine"`, else any gray. realness: what
    translate_patch gave -> (n,), D's probability that it is a standard image; may be None in the modes without unit 2.
    seed: see `slice_seed`.

    Returns float32 (h, w), where every pixel that is not soft tissue, or that no patch reaches, has its source HU; and
    a dict of plain numbers. Raises HarmonictError where a function returns another shape or values that are not finite.
    """
    source = np.asarray(source_hu, np.float32)
    if source.ndim != 2 or (padding is not None and padding.shape != source.shape):
        raise HarmonictError(f"patch fusion takes one slice (h, w) and its padding; got shape {source.shape}")
    units = MODES.index(settings.mode)
    if units >= 2 and realness is None:
        raise HarmonictError(f"patch fusion in mode {settings.mode!r} needs a discriminator: choose mode 'overlap'")
    filled = source if padding is None else fill_padding(source[None], padding[None])[0]
    tissue = (source >= settings.low_hu) & (source <= settings.high_hu)
    if padding is not None:
        tissue &= ~padding
    rng = np.random.default_rng(seed)
    patches = _Patches(filled, tissue, translate_patch, realness if units >= 2 else None, settings)
    if units == 0:
        patches.add(grid_patches(source.shape, settings))
        reached, redrawn = tissue, 0
    else:
        reached = tissue & reachable(tissue, settings)
        patches.add(draw_patches(tissue, reached, patches.boxes, rng, settings, cap=settings.max_patches))
        redrawn = 0
        while patches.dropped and redrawn < settings.max_redraws:
            left = settings.max_redraws - redrawn
            again = draw_patches(tissue, reached, patches.boxes, rng, settings, cap=left)
            if not again:
                break
            redrawn += len(again)
            patches.add(again)
    fused, weight = patches.fuse()
    count = patches.count()
    reached |= tissue & (count > 0)
    record: dict[str, Any] = {
        "mode": settings.mode,
        "patches_drawn": len(patches.boxes) + len(patches.dropped),
        "patches_dropped_by_d": len(patches.dropped),
        "patches_redrawn": redrawn,
        "median_realness": patches.median_realness(),
        "tissue_pixels": int(tissue.sum()),
        "tissue_pixels_out_of_reach": int((tissue & ~reached).sum()),
        "tissue_pixels_below_coverage": int((reached & (count < settings.coverage)).sum()) if units else 0,
        "smallest_overlap": patches.smallest_overlap(),
        "tissue_pixels_empty": int((reached & (weight == 0)).sum()),
        "tissue_pixels_from_dropped_patches": 0,
        "eq7_shift_hu": patches.eq7_shift_hu(),
        "eq7_largest_shift_hu": patches.eq7_largest_hu,
    }
    if units == 3 and patches.dropped:
        record["tissue_pixels_from_dropped_patches"] = patches.fill_empty(reached)
        fused, weight = patches.fuse()
    covered = tissue & (weight > 0)
    found = patches.seams(fused, covered)
    record |= {"box_artifacts_found": int(found.sum()), "largest_step_found_hu": patches.largest_step_hu}
    rounds, uncropped = 0, fused
    while units == 3 and found.any() and rounds < REINTEGRATIONS:
        rounds += 1
        fused = patches.reintegrate(found, covered, uncropped, rng)
        found = patches.seams(fused, covered)
    record |= {
        "reintegrations": rounds,
        "patches_cropped": int((patches.crops > 0).sum()),
        "tissue_pixels_left_with_cropped_borders": patches.only_in_crops,
        "box_artifacts_left": int(found.sum()),
        "largest_step_left_hu": patches.largest_step_hu,
        "largest_patch_offset_hu": patches.largest_offset_hu(fused),
        "patches_used": len(patches.boxes),
    }
    return np.where(covered, fused, source).astype(np.float32), record


# -- unit 1: soft-tissue patches that overlap ------------------------------------------------------------------------


def patch_sides(shape: Sequence[int], settings: FusionSettings) -> np.ndarray:
    """The sides in pixels that a patch of an image (h, w) may have; the smaller side of an image that holds none."""
    low, high = (min(side, *shape) for side in settings.patch_px)
    sides = np.arange(low, high + 1)
    fitting = sides[sides % settings.multiple_px == 0]
    return fitting if len(fitting) else sides[-1:]


def grid_patches(shape: Sequence[int], settings: FusionSettings) -> list[Box]:
    """A plain grid of squares of the middle side over an image (h, w), the last row and column moved inwards."""
    sides = patch_sides(shape, settings)
    side = int(sides[len(sides) // 2])
    rows, columns = ([*range(0, n - side, side), n - side] for n in shape)
    return [(y, x, side) for y in rows for x in columns]


def reachable(tissue: np.ndarray, settings: FusionSettings) -> np.ndarray:
    """Bool (h, w): the pixels that lie in some soft-tissue patch, of a few sides from smallest to largest.

    And in some square of 15 pixels with the same share of tissue: in the air around the patient noise lifts about every
    second pixel over -1000 HU, and to ask for patches over each of those would multiply their number.
    """
    sides = _few(patch_sides(tissue.shape, settings))
    of_patches = np.logical_or.reduce([_squares_over(tissue, side, settings.share) for side in sides])
    return np.asarray(of_patches & _squares_over(tissue, min(SOLID_PX, sides[0]), settings.share))


def draw_patches(
    tissue: np.ndarray,
    wanted: np.ndarray,
    kept: Sequence[Box],
    rng: np.random.Generator,
    settings: FusionSettings,
    *,
    cap: int,
    inset: int = 0,
) -> list[Box]:
    """Random soft-tissue patches until, with those `kept`, the overlap is reached, or `cap` of them.

    tissue, wanted: bool (h, w). Reached means that every pixel of `wanted` lies in at least `coverage` patches and that
    each patch shares at least `overlap` of its area with others. Sides are uniform; of some random positions around
    pixels that still lack coverage the one is taken that adds most. inset: the outermost pixels of new patches do not
    count as covered.
    """
    count = _counted(tissue.shape, kept)
    table, sides = _table(tissue), patch_sides(tissue.shape, settings)
    new: list[Box] = []
    given_up = np.zeros(tissue.shape, bool)
    while len(new) < cap:
        lacking = wanted & (count < settings.coverage) & ~given_up
        if not lacking.any():
            lacking = _thin(count, [*kept, *new], settings.overlap) & ~given_up
        places = np.flatnonzero(lacking)
        if not len(places):
            break
        side = int(rng.choice(sides))
        edge = min(inset, (side - 1) // 2)
        at_y, at_x = np.divmod(rng.choice(places, CANDIDATES), tissue.shape[1])
        y, x = (
            np.clip(at - rng.integers(edge, side - edge, CANDIDATES), 0, n - side)
            for at, n in zip((at_y, at_x), tissue.shape, strict=True)
        )
        good = _sums(table, y, x, side) >= settings.share * side**2
        gain = np.where(good, _sums(_table(lacking), y + edge, x + edge, side - 2 * edge), 0)
        best = int(gain.argmax())
        box = (int(y[best]), int(x[best]), side)
        if not gain[best]:
            place = divmod(int(rng.choice(places)), tissue.shape[1])
            sure = _patch_over(place, table, rng, settings, tissue.shape, inset)
            if sure is None:
                given_up[tuple(slice(max(at - CROP_PX, 0), at + CROP_PX + 1) for at in place)] = True
                continue
            box = sure
        new.append(box)
        count[_inner(box, edge if gain[best] else inset)] += 1
    return new


def _few(sides: np.ndarray) -> list[int]:
    places = np.linspace(0, len(sides) - 1, min(REACH_SIDES, len(sides)))
    return [int(side) for side in sides[np.rint(places).astype(int)]]


def _table(mask: np.ndarray) -> np.ndarray:
    """Summed-area table (h + 1, w + 1) of a bool image."""
    out = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int32)
    np.cumsum(mask, axis=0, dtype=np.int32, out=out[1:, 1:])
    np.cumsum(out[1:, 1:], axis=1, out=out[1:, 1:])
    return out


def _sums(table: np.ndarray, y: np.ndarray, x: np.ndarray, side: int) -> np.ndarray:
    """How many pixels of the table's mask lie in each square of `side` pixels that begins at (y, x)."""
    return table[y + side, x + side] - table[y, x + side] - table[y + side, x] + table[y, x]


def _squares_over(tissue: np.ndarray, side: int, share: float) -> np.ndarray:
    """Bool (h, w): the pixels that some square of `side` pixels with enough tissue holds."""
    start = _table(_is_tissue(_table(tissue), side, share))
    (low_y, high_y), (low_x, high_x) = (
        (np.maximum(np.arange(n) - side + 1, 0), np.minimum(np.arange(n) + 1, n - side + 1)) for n in tissue.shape
    )
    columns = start[:, high_x] - start[:, low_x]
    return (columns[high_y] - columns[low_y]) > 0


def _is_tissue(table: np.ndarray, side: int, share: float) -> np.ndarray:
    """Bool (h - side + 1, w - side + 1): where a patch of `side` pixels that begins there holds enough tissue."""
    inside = table[side:, side:] - table[:-side, side:] - table[side:, :-side] + table[:-side, :-side]
    return inside >= share * side**2


def _patch_over(
    place: Sequence[int],
    table: np.ndarray,
    rng: np.random.Generator,
    settings: FusionSettings,
    shape: Sequence[int],
    inset: int,
) -> Box | None:
    """Any soft-tissue patch that holds a pixel at least `inset` from its border; None where there is none."""
    for side in rng.permutation(_few(patch_sides(shape, settings))):
        (low_y, high_y), (low_x, high_x) = (
            (max(at - side + 1 + inset, 0), min(at - inset, n - side)) for at, n in zip(place, shape, strict=True)
        )
        if high_y < low_y or high_x < low_x:
            continue
        part = table[low_y : high_y + side + 1, low_x : high_x + side + 1]
        starts = np.argwhere(_is_tissue(part, side, settings.share))
        if len(starts):
            y, x = starts[rng.integers(len(starts))]
            return int(low_y + y), int(low_x + x), int(side)
    return None


def _inner(box: Box, inset: int = 0) -> tuple[slice, slice]:
    y, x, side = box
    return slice(y + inset, y + side - inset), slice(x + inset, x + side - inset)


def _counted(shape: Sequence[int], boxes: Sequence[Box]) -> np.ndarray:
    count = np.zeros(shape, np.int32)
    for box in boxes:
        count[_inner(box)] += 1
    return count


def _thin(count: np.ndarray, boxes: Sequence[Box], overlap: float) -> np.ndarray:
    """Bool (h, w): the pixels that a patch with too little overlap holds alone."""
    out = np.zeros(count.shape, bool)
    for box in boxes:
        alone = count[_inner(box)] < 2
        if alone.mean() > 1 - overlap:
            out[_inner(box)] |= alone
    return out


# -- units 2 and 3: which patches count, gray to HU, integration -----------------------------------------------------


def stretch_to_source(p_g: np.ndarray, low_hu: float, high_hu: float) -> np.ndarray:
    """Eq 7 with the `+ MIN` that its print lacks: gray (h, w) -> HU, its least value at MIN and its greatest at MAX.

    A patch of one gray becomes MIN.
    """
    low, high = float(p_g.min()), float(p_g.max())
    return (p_g - low) * ((high_hu - low_hu) / max(high - low, 1e-12)) + low_hu


class _Patches:
    """The patches of one slice, translated, and how each counts."""

    def __init__(
        self,
        source: np.ndarray,
        tissue: np.ndarray,
        translate_patch: Callable[[Tensor], Tensor],
        realness: Callable[[Tensor], Tensor] | None,
        settings: FusionSettings,
    ) -> None:
        self.source, self.tissue, self.settings = source, tissue, settings
        self.translate_patch, self.realness = translate_patch, realness
        self.boxes: list[Box] = []
        self.hu: list[np.ndarray] = []
        self.dropped: list[tuple[float, Box, np.ndarray]] = []
        self.crops = np.zeros(0, int)
        self.scores: list[float] = []
        self.shifts: list[float] = []
        self.instead = np.full(source.shape, np.nan)  # HU for pixels that no kept patch reaches
        self.largest_step_hu = 0.0
        self.only_in_crops = 0

    def add(self, boxes: Sequence[Box]) -> None:
        """Translate; keep what fools D."""
        for box in boxes:
            hu, score = self._translate(self.source[_inner(box)])
            if score is not None:
                self.scores.append(score)
            if score is not None and not score >= self.settings.realness:
                self.dropped.append((score, box, hu))
                continue
            self.boxes.append(box)
            self.hu.append(hu)
            self.crops = np.append(self.crops, 0)

    def _translate(self, x: np.ndarray) -> tuple[np.ndarray, float | None]:
        size, resize = x.shape, self.settings.resize_px
        patch = torch.from_numpy(np.ascontiguousarray(x))[None, None]
        if resize is not None:
            patch = functional.interpolate(patch, (resize, resize), mode="bilinear", antialias=True)
        x_hat = self.translate_patch(patch)
        if x_hat.shape != patch.shape:
            raise HarmonictError(f"a translated patch has shape {tuple(x_hat.shape)}, expected {tuple(patch.shape)}")
        score = None
        if self.realness is not None:
            score = float(self.realness(x_hat).reshape(-1)[0])
        x_hat = x_hat.float()
        if resize is not None:
            x_hat = functional.interpolate(x_hat, size, mode="bilinear", antialias=True)
        p_g = x_hat[0, 0].detach().cpu().numpy()
        if not np.isfinite(p_g).all():
            raise HarmonictError("a translated patch holds NaN or infinite values: train the model again")
        stretched = stretch_to_source(p_g, float(x.min()), float(x.max()))
        self.shifts.append(float((stretched - p_g).mean()))
        if self.settings.gray == "minmax":
            return stretched, score
        if self.settings.gray == "minmax-slice":
            return stretch_to_source(p_g, float(self.source.min()), float(self.source.max())), score
        return p_g, score

    def count(self) -> np.ndarray:
        """(h, w): how many kept patches hold each pixel."""
        return _counted(self.source.shape, self.boxes)

    def smallest_overlap(self) -> float:
        """The least share of its area that a kept patch has in common with others."""
        count = self.count()
        return min((float((count[_inner(box)] > 1).mean()) for box in self.boxes), default=0.0)

    def median_realness(self) -> float | None:
        return float(np.median(self.scores)) if self.scores else None

    def eq7_shift_hu(self) -> float:
        """Mean over the patches of how far eq 7 moves a patch's mean from what translate_patch gave."""
        return float(np.mean(self.shifts)) if self.shifts else 0.0

    @property
    def eq7_largest_hu(self) -> float:
        return float(np.max(np.abs(self.shifts))) if self.shifts else 0.0

    def fuse(self) -> tuple[np.ndarray, np.ndarray]:
        """The weighted mean (h, w) of the patches over each pixel in HU, and the sum of their weights."""
        total, weight = np.zeros(self.source.shape), np.zeros(self.source.shape)
        height, width = self.source.shape
        for n, box in enumerate(self.boxes):
            part = _inner(box)
            if self.settings.mode == "straightforward":  # pasted: the last one counts
                total[part], weight[part] = self.hu[n], 1.0
                continue
            y, x, side = box
            w = np.outer(self._profile(y, side, height, n), self._profile(x, side, width, n))
            total[part] += w * self.hu[n]
            weight[part] += w
        empty = weight == 0
        fused = np.where(empty, self.instead, total / np.where(empty, 1.0, weight))
        return fused, np.where(empty & np.isfinite(self.instead), 1.0, weight)

    def _profile(self, start: int, side: int, length: int, n: int) -> np.ndarray:
        """(side,) weights along one axis: 0 in the crop, a ramp behind it; nothing is cropped at the image's edge."""
        crop = min(int(self.crops[n]), side // 4)
        depth = np.minimum(np.arange(1, side + 1), np.arange(side, 0, -1)).astype(float)  # 1 at the border
        if self.settings.blend:
            profile = np.maximum(depth - crop, 0) / (side / 2)
        elif crop:
            profile = np.clip((depth - crop) / FEATHER_PX, 0, 1)
        else:
            return np.ones(side)
        inwards = np.arange(side) < side // 2
        if start == 0:
            profile[inwards] = profile.max()
        if start + side == length:
            profile[~inwards] = profile.max()
        return profile

    def fill_empty(self, reached: np.ndarray) -> int:
        """Give pixels that lie in dropped patches only the HU of the most real of these; returns how many."""
        empty = reached & (self.count() == 0)
        for _, box, hu in sorted(self.dropped, key=lambda d: d[0]):
            part = _inner(box)
            self.instead[part][empty[part]] = hu[empty[part]]
        return int((empty & np.isfinite(self.instead)).sum())

    def seams(self, fused: np.ndarray, covered: np.ndarray) -> np.ndarray:
        """Bool (n,): the kept patches of which a border shows."""
        s = self.settings
        change = np.where(covered, fused - self.source, 0.0)
        whole = [(y, y + side, x, x + side) for y, x, side in self.boxes]
        cropped = [
            (y + (c if y else 0), y + side - c, x + (c if x else 0), x + side - c)
            for (y, x, side), c in zip(self.boxes, (int(c) for c in self.crops), strict=True)
        ]
        found = np.zeros(len(self.boxes), bool)
        self.largest_step_hu = 0.0
        for boxes in (whole, cropped) if self.crops.any() else (whole,):
            steps, shown = patch_steps(change, covered, boxes, least_hu=s.seam_hu, sds=s.seam_sds)
            self.largest_step_hu = max(self.largest_step_hu, float(steps[shown].max(initial=0.0)))
            found |= shown.any(axis=1)
        return found

    def reintegrate(
        self, which: np.ndarray, covered: np.ndarray, uncropped: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Fuse again with the borders of some patches cropped by `CROP_PX` more.

        Pixels that only cropped borders would reach get new patches, or else keep what they had in `uncropped`.
        """
        self.crops[which] += CROP_PX
        _, weight = self.fuse()
        bare = covered & (weight == 0)
        if bare.any():
            known = len(self.boxes)
            once = replace(self.settings, coverage=1, overlap=0.0)
            crop = int(self.crops.max())
            room = self.settings.max_redraws
            self.add(draw_patches(self.tissue, bare, [], rng, once, cap=room, inset=crop + 1))
            self.crops[known:] = crop
        fused, weight = self.fuse()
        left = covered & (weight == 0)
        self.only_in_crops = int(left.sum())
        return np.where(left, uncropped, fused)

    def largest_offset_hu(self, fused: np.ndarray) -> float:
        """How far the mean of a patch's tissue lies from that of the fused image: patches that do not agree."""
        largest = 0.0
        for box, hu in zip(self.boxes, self.hu, strict=True):
            tissue = self.tissue[_inner(box)]
            if tissue.any():
                largest = max(largest, abs(float((hu - fused[_inner(box)])[tissue].mean())))
        return largest


def patch_steps(
    change: np.ndarray, valid: np.ndarray, boxes: Sequence[tuple[int, int, int, int]], *, least_hu: float, sds: float
) -> tuple[np.ndarray, np.ndarray]:
    """How high the step along each border of each box is, and whether it stands out.

    change: (h, w) HU, result minus source, so that anatomy that both show makes no step. valid: bool (h, w).
    boxes: (top, bottom, left, right), ends excluded. A border is looked at in pieces of about 48 pixels: the mean step
    between the two pixels across it, 0 on the image's edge and where fewer than 16 pairs are valid. The few pixels on
    the edge of a bone shall not make a seam: a pair counts for no more than 2 SD of all the image's, or 50 HU where
    that is less. A piece stands out where its step exceeds `least_hu` and `sds` times the SD (all SD here are from the
    median) of the parallel pieces across the image.

    Returns (n, 4), for left, right, top and bottom: the highest absolute step in HU, of the pieces that stand out where
    any does; and bool, whether any does.
    """
    steps, shown = np.zeros((len(boxes), 4)), np.zeros((len(boxes), 4), bool)
    for across in (0, 1) if boxes else ():
        image, ok = (change, valid) if across == 0 else (change.T, valid.T)
        if image.shape[1] < 2:
            continue
        pairs = ok[:, 1:] & ok[:, :-1]
        sums = np.zeros((image.shape[0] + 1, image.shape[1] - 1))
        jumps = np.where(pairs, np.diff(image, axis=1), 0.0)
        limit = (
            max(CLIP_SDS * MEDIAN_TO_SD * float(np.median(np.abs(jumps[pairs]))), CLIP_HU) if pairs.any() else CLIP_HU
        )
        np.cumsum(np.clip(jumps, -limit, limit), axis=0, out=sums[1:])
        numbers = np.zeros(sums.shape, np.int32)
        np.cumsum(pairs, axis=0, dtype=np.int32, out=numbers[1:])
        pieces = []
        for n, box in enumerate(boxes):
            first, last, left, right = box if across == 0 else (*box[2:], *box[:2])
            cuts = np.linspace(first, last, max(1, round((last - first) / PIECE_PX)) + 1).round().astype(int)
            for a, b in pairwise(cuts):
                pieces.append((n, int(a), int(b), left - 1, right - 1))
        low, high = [piece[1] for piece in pieces], [piece[2] for piece in pieces]
        number = numbers[high] - numbers[low]  # (pieces, w - 1)
        root = np.sqrt(np.maximum(number, 1))
        z = np.abs(sums[high] - sums[low]) / root  # of one SD whatever the number of pairs
        z[number < MIN_PAIRS] = np.nan
        usable = ~np.isnan(z).all(axis=1)
        sd = np.zeros(len(z))
        sd[usable] = MEDIAN_TO_SD * np.nanmedian(z[usable], axis=1)
        for piece, (n, _, _, *both) in enumerate(pieces):
            for side, line in enumerate(both):
                if not 0 <= line < z.shape[1] or np.isnan(z[piece, line]):
                    continue
                at, here = (n, 2 * across + side), root[piece, line]
                step = z[piece, line] / here
                stands_out = step > max(least_hu, sds * sd[piece] / here)
                if (stands_out, step) > (shown[at], steps[at]):
                    shown[at], steps[at] = stands_out, step
    return steps, shown
