"""SlicePairs: the same anatomy seen with two protocols, slice by slice; whole, or as batches of patches to learn from.

Pairs are found between series in memory (`pair_series`) or in a cohort table (`cohort_pairs`). Those of a table are
read from disk when a slice is asked for, one file at a time, so memory holds a few slices and never the cohort.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from harmonict.core import PROTOCOL_COLUMNS, Geometry, HarmonictError, ScanProtocol, Series, parse_protocol
from harmonict.core.cohort import read_cohort
from harmonict.core.padding import fill_padding
from harmonict.core.resample import resample_series, resample_slice, resampled_geometry, resampled_shape
from harmonict.dicom.inventory import FoundSeries, find_series
from harmonict.dicom.read import read_series

SLICES_IN_MEMORY = 128  # of those read from disk: 160 MB at 512 x 512
PATCH_TRIES, SLICE_TRIES = 20, 50


@dataclass(frozen=True)
class About:
    """What a method knows of the source beside its pixels: computed once a series, carried with every batch of it.

    pixel_mm: in-plane spacing (y, x). measured: arrays that `describe` added under names of the method's own.
    note: one line for the user where the source limits what can be done ("" = nothing to say). outside: sentences that
    say why the source is outside what the model was trained on.
    """

    pixel_mm: tuple[float, float]
    protocol: ScanProtocol = dataclasses.field(default_factory=ScanProtocol)
    measured: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    note: str = ""
    outside: tuple[str, ...] = ()


@dataclass(frozen=True)
class SoftTissue:
    """A patch is taken where at least `share` of its pixels lie in [low_hu, high_hu] (STAN-CT, quality unit 1)."""

    low_hu: float = -1000.0
    high_hu: float = 900.0
    share: float = 0.7


@dataclass(frozen=True)
class SlicePair:
    """One slice with two protocols.

    source, target: float32 (h, w) in HU, on the same grid. measured: bool (h, w), False where either is padding.
    """

    source: np.ndarray
    target: np.ndarray
    measured: np.ndarray
    pixel_mm: tuple[float, float]
    source_protocol: ScanProtocol
    target_protocol: ScanProtocol
    patient: str


@dataclass(frozen=True)
class Batch:
    """Patches or whole slices to learn from.

    source, target: (b, 1, h, w) float32 HU, padding filled with the nearest measured value. source_measured,
    target_measured: bool of that shape, False where it was filled. about: what `describe` said of each source's series
    (empty where nobody asked). items: the places of source and target among the pairs. generator: for the noise of this
    step, seeded like the batch itself.
    """

    source: Tensor
    target: Tensor
    source_measured: Tensor
    target_measured: Tensor
    source_protocol: tuple[ScanProtocol, ...]
    target_protocol: tuple[ScanProtocol, ...]
    about: tuple[About, ...]
    items: tuple[tuple[int, int], ...]
    generator: torch.Generator

    @property
    def measured(self) -> Tensor:
        """Where both were measured; of paired batches only."""
        return self.source_measured & self.target_measured

    def to(self, device: torch.device) -> Batch:
        """The same batch with its images on another device; noise is drawn on the CPU, so that it is the same there."""
        names = ("source", "target", "source_measured", "target_measured")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})  # type: ignore[arg-type]


class Scan:
    """A series of the pairs, in memory or read from disk when it is asked for.

    subject: who may not be on both sides of a split; the patient, unless a cohort table says more. resampled_from_mm:
    its own pixels (y, x), where it is seen in others.
    """

    resampled_from_mm: tuple[float, float] | None = None

    def __init__(
        self, series: Series | FoundSeries, *, protocol: ScanProtocol | None = None, subject: str | None = None
    ) -> None:
        self._from = series
        self.name, self.patient = series.name, series.patient
        self.protocol = protocol or series.protocol
        self.subject = subject or series.patient
        self.geometry: Geometry = series.geometry
        self.is_volume = series.is_volume
        self.shape = tuple(series.hu.shape if isinstance(series, Series) else series.shape)
        self.key = series.name if isinstance(series, Series) else series.key

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """In-plane spacing (y, x)."""
        return self.geometry.spacing_mm[1:]

    @property
    def positions_mm(self) -> np.ndarray | None:
        """(z,) along the slice axis; None where single slices never said where they lie."""
        if isinstance(self._from, Series):
            return self._from.slice_positions_mm
        if not self.is_volume:
            return None
        start = float(np.dot(self.geometry.origin_mm, self.geometry.direction[0]))
        return start + self.geometry.spacing_mm[0] * np.arange(self.shape[0])

    def in_pixels(self, pixel_mm: tuple[float, float]) -> Scan:
        """The scan in pixels of that size (y, x), resampled when a slice is asked for; itself where it has them."""
        if np.allclose(self.pixel_mm, pixel_mm, rtol=1e-3):
            return self
        scan = copy(self)
        scan.resampled_from_mm = self.pixel_mm
        scan.geometry = resampled_geometry(self.geometry, pixel_mm)
        scan.shape = (self.shape[0], *resampled_shape(self.shape[1:], self.pixel_mm, pixel_mm))  # type: ignore[arg-type]
        scan.key = f"{self.key} in pixels of {pixel_mm[0]:.5g} x {pixel_mm[1]:.5g} mm"
        if isinstance(self._from, Series):
            scan._from = resample_series(self._from, pixel_mm)
        return scan

    def read(self) -> Series:
        """The whole series, with the protocol that the pairs know it under."""
        if isinstance(self._from, Series):
            return replace(self._from, protocol=self.protocol)
        series = replace(_whole(self._from), protocol=self.protocol)
        return series if self.resampled_from_mm is None else resample_series(series, self.pixel_mm)

    def slice(self, at: float) -> tuple[np.ndarray, np.ndarray | None]:
        """HU (h, w) and padding (or None) at slice `at`; between two slices, both joined by a straight line."""
        low = int(np.floor(at))
        hu, padding = self._one(low)
        share = at - low
        if share < 1e-3:
            return hu, padding
        above, padding_above = self._one(low + 1)
        joined = [p for p in (padding, padding_above) if p is not None]
        return ((1 - share) * hu + share * above).astype(np.float32), np.logical_or.reduce(joined) if joined else None

    def filled(self, at: float) -> tuple[np.ndarray, np.ndarray]:
        """HU (h, w) with the padding filled, and where it was measured."""
        hu, padding = self.slice(at)
        if padding is None:
            return hu, np.ones(hu.shape, bool)
        return fill_padding(hu[None], padding[None])[0], ~padding

    def _one(self, z: int) -> tuple[np.ndarray, np.ndarray | None]:
        if not isinstance(self._from, Series):
            if self.resampled_from_mm is not None:
                return _resampled_slice(self._from, z, self.resampled_from_mm, self.pixel_mm)
            return _slice(self._from, z)
        padding = self._from.padding
        return self._from.hu[z], None if padding is None else padding[z]


@lru_cache(maxsize=2)
def _whole(found: FoundSeries) -> Series:
    return found.read()


@lru_cache(maxsize=SLICES_IN_MEMORY)
def _slice(found: FoundSeries, z: int) -> tuple[np.ndarray, np.ndarray | None]:
    """One slice from its own file; a file that holds a whole volume is read whole."""
    if found.format == "dicom" and len(found.paths) == found.shape[0]:
        series, z = read_series([found.paths[z]], slicewise=True), 0
    else:
        series = _whole(found)
    return series.hu[z], None if series.padding is None else series.padding[z]


@lru_cache(maxsize=SLICES_IN_MEMORY)
def _resampled_slice(
    found: FoundSeries, z: int, pixel_mm: tuple[float, float], wanted_mm: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray | None]:
    return resample_slice(*_slice.__wrapped__(found, z), pixel_mm, wanted_mm)  # what is kept is the resampled one


class SlicePairs(Sequence[SlicePair]):
    """Pairs of slices from pairs of series. Use `pair_series` or `cohort_pairs` to find them.

    paired: whether source and target show the same anatomy. held_out: pairs of other patients, to judge a training by;
    None where there are no others. left_out: series that could not be used, each with its reason.
    """

    def __init__(self, items: Sequence[tuple[Series | Scan, float, Series | Scan, int]]) -> None:
        """items: (source series, its slice, target series, its slice)."""
        if not items:
            raise HarmonictError("no pairs of slices: source and target have no slice position or file name in common")
        scans: dict[int, Scan] = {}
        of = lambda s: s if isinstance(s, Scan) else scans.setdefault(id(s), Scan(s))  # noqa: E731
        self._sources: list[tuple[Scan, float]] = [(of(s), i) for s, i, _, _ in items]
        self._targets: list[tuple[Scan, int]] = [(of(t), j) for _, _, t, j in items]
        self._of_target = np.arange(len(items))  # which target goes with each source
        self.paired = True
        self.held_out: SlicePairs | None = None
        self.left_out: list[str] = []
        for (source, _), (target, _) in zip(self._sources, self._targets, strict=True):
            _check_grid(source, target)

    @classmethod
    def unpaired(cls, sources: Sequence[tuple[Scan, float]], targets: Sequence[tuple[Scan, int]]) -> SlicePairs:
        """Slices of two protocols that need not show the same anatomy: every source is shown with some target."""
        self = cls.__new__(cls)
        self._sources, self._targets = list(sources), list(targets)
        order = np.random.default_rng(len(targets)).permutation(len(targets))
        self._of_target = order[np.arange(len(sources)) % len(targets)]
        self.paired, self.held_out, self.left_out = False, None, []
        return self

    def shuffled(self) -> SlicePairs:
        """The same slices with the targets shuffled: what a method for unpaired images learns from."""
        result = SlicePairs.unpaired(self._sources, self._targets)
        result.held_out, result.left_out = self.held_out, self.left_out
        return result

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, n):  # type: ignore[no-untyped-def, override]
        if isinstance(n, slice):
            return self.subset(range(len(self))[n])
        (source, i), (target, j) = self._sources[n], self._targets[self._of_target[n]]
        (a, padding_a), (b, padding_b) = source.slice(i), target.slice(j)
        measured = np.ones(a.shape, bool)
        for padding in (padding_a, padding_b):
            if padding is not None:
                measured &= ~padding
        return SlicePair(a, b, measured, source.pixel_mm, source.protocol, target.protocol, source.patient)

    def __iter__(self) -> Iterator[SlicePair]:
        return (self[n] for n in range(len(self)))

    def subset(self, places: Sequence[int]) -> SlicePairs:
        """Some of the pairs, in the order given."""
        items = [(*self._sources[n], *self._targets[self._of_target[n]]) for n in places]
        return SlicePairs(items) if self.paired else SlicePairs.unpaired([i[:2] for i in items], [i[2:] for i in items])

    def whole_series(self) -> list[tuple[Series, Series]]:
        """(source, target) series cut down to the slices that pair, in order: for evaluation over whole series."""
        by_series: dict[tuple[int, int], tuple[Scan, list[int], Scan, list[int]]] = {}
        for (source, i), (target, j) in zip(self._sources, self._targets, strict=True):
            _, a, _, b = by_series.setdefault((id(source), id(target)), (source, [], target, []))
            a.append(int(i))
            b.append(j)
        return [(_take(s.read(), a), _take(t.read(), b)) for s, a, t, b in by_series.values()]

    @property
    def target_protocol(self) -> ScanProtocol:
        """What all targets have in common; fields that differ are left open."""
        return _common(self.scans[1])

    @property
    def source_protocol(self) -> ScanProtocol:
        """What all sources have in common; fields that differ are left open."""
        return _common(self.scans[0])

    @property
    def scans(self) -> tuple[list[Scan], list[Scan]]:
        """The series of the sources and those of the targets, each once."""
        sources, targets = (
            list({id(scan): scan for scan, _ in side}.values()) for side in (self._sources, self._targets)
        )
        return sources, targets

    @property
    def subjects(self) -> list[str]:
        """Everybody who is seen, sorted."""
        return sorted({scan.subject for scan, _ in (*self._sources, *self._targets)})

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """In-plane spacing (y, x) of the first source."""
        return self._sources[0][0].pixel_mm

    @property
    def digest(self) -> str:
        """SHA-256 of which slices pair with which."""
        text = [[scan.key, scan.shape, at] for scan, at in (*self._sources, *self._targets)]
        return hashlib.sha256(repr([text, self._of_target.tolist(), self.paired]).encode()).hexdigest()

    @property
    def source_kernels(self) -> list[str]:
        """The kernel names of the sources; a source without a kernel tag has none."""
        return sorted({source.protocol.kernel for source, _ in self._sources if source.protocol.kernel})

    def protocol_counts(self) -> dict[tuple[str, str], int]:
        """(source, target) in words -> number of pairs."""
        counts: dict[tuple[str, str], int] = {}
        for n, (source, _) in enumerate(self._sources):
            key = source.protocol.label(), self._targets[self._of_target[n]][0].protocol.label()
            counts[key] = counts.get(key, 0) + 1
        return counts

    def resampled(self) -> list[dict[str, Any]]:
        """Which pixels were resampled to which, and of how many series; for the model card."""
        counts = Counter(
            (s.resampled_from_mm[1], s.pixel_mm[1]) for s in chain(*self.scans) if s.resampled_from_mm is not None
        )
        return [{"from_mm": a, "to_mm": b, "series": count} for (a, b), count in sorted(counts.items())]

    def check_spacings(self) -> None:
        """Raise HarmonictError where pixel sizes are mixed: to a network, a texture of 0.5 mm pixels is another one
        at 0.9 mm."""
        by_size = sorted(chain(*self.scans), key=lambda scan: scan.pixel_mm)
        low, high = by_size[0], by_size[-1]
        if not np.allclose(low.pixel_mm, high.pixel_mm, rtol=0.01):
            who = [f"patient {s.patient}" if s.patient else s.name for s in (low, high)]
            raise HarmonictError(
                f"mixed spacings: pixels of {low.pixel_mm[1]:g} mm ({who[0]}) and {high.pixel_mm[1]:g} mm ({who[1]}); "
                "train on series of one pixel size, or resample them all with --resample"
            )

    def split(self, rng: np.random.Generator, *, share: float = 0.2) -> SlicePairs:
        """The pairs of most patients, with those of the others (at least one patient) as `held_out`.

        Raises HarmonictError where there are fewer than two patients, or a side has no source or no target left.
        """
        subjects = self.subjects
        if len(subjects) < 2:
            raise HarmonictError(
                f"too few patients to split: {len(subjects)}; training needs at least 2, one of them to judge it by"
            )
        sources, targets = ({scan.subject for scan, _ in side} for side in (self._sources, self._targets))
        apart: set[str] = set()
        for group in (sources & targets, sources - targets, targets - sources):  # a share of each, in either domain
            names = sorted(group)
            count = min(max(1, round(share * len(names))), max(len(names) - 1, 0))
            apart |= {names[k] for k in rng.permutation(len(names))[:count]}
        sides = [self._only({s for s in subjects if (s in apart) == held_out}) for held_out in (False, True)]
        sides[0].held_out, sides[0].left_out = sides[1], self.left_out
        return sides[0]

    def _only(self, subjects: set[str]) -> SlicePairs:
        """The pairs of some patients."""
        sources, targets = ([x for x in xs if x[0].subject in subjects] for xs in (self._sources, self._targets))
        if self.paired:
            both = zip(self._sources, self._targets, strict=True)
            places = [n for n, ((s, _), (t, _)) in enumerate(both) if {s.subject, t.subject} <= subjects]
            if places:
                return self.subset(places)
        elif sources and targets:
            return SlicePairs.unpaired(sources, targets)  # type: ignore[arg-type]
        raise HarmonictError(
            "too few patients to split: without those held out, or of them alone, there would be no source or no target"
        )

    def batch(
        self,
        seed: Sequence[int],
        *,
        size: int,
        patch: int | None = None,
        augment: bool = True,
        tissue: SoftTissue | None = None,
        describe: Callable[[Scan], About] | None = None,
    ) -> Batch:
        """`size` random patches of `patch` x `patch` pixels, or whole slices (patch None), with what they are.

        The same seed gives the same batch, whatever was drawn before. augment: flips, quarter turns (both leave texture
        and noise as they are, unlike turns by other angles) and, for whole slices, shifts by up to 16 pixels; a patch
        is shifted by where it is taken. Pairs are moved together. tissue: see SoftTissue; none for whole slices.
        Raises HarmonictError where slices are smaller than the patch, differ in size, or hold no soft tissue.
        """
        rng = np.random.default_rng(list(seed))
        tissue = tissue or SoftTissue()
        images: list[tuple[np.ndarray, ...]] = []
        items = []
        for _ in range(size):
            place, image = self._sample(rng, patch, tissue)
            if augment:
                if self.paired:
                    image = _move(image, rng, shift=patch is None)
                else:
                    image = _move(image[:2], rng, shift=patch is None) + _move(image[2:], rng, shift=patch is None)
            items.append(place)
            images.append(image)
        if len({image[n].shape for image in images for n in (0, 2)}) > 1:
            raise HarmonictError("slices of different sizes cannot share a batch: train on patches")
        source, seen, target, target_seen = (
            torch.from_numpy(np.stack([image[n] for image in images])[:, None]) for n in range(4)
        )
        scans = [self._sources[n][0] for n, _ in items]
        return Batch(
            source=source,
            target=target,
            source_measured=seen,
            target_measured=target_seen,
            source_protocol=tuple(scan.protocol for scan in scans),
            target_protocol=tuple(self._targets[m][0].protocol for _, m in items),
            about=() if describe is None else tuple(describe(scan) for scan in scans),
            items=tuple(items),
            generator=torch.Generator().manual_seed(int(rng.integers(2**63 - 1))),
        )

    def _sample(
        self, rng: np.random.Generator, patch: int | None, tissue: SoftTissue
    ) -> tuple[tuple[int, int], tuple[np.ndarray, ...]]:
        """Where the pair lies, and (source, measured, target, measured)."""
        for _ in range(SLICE_TRIES):
            n = int(rng.integers(len(self._sources)))
            m = int(self._of_target[n] if self.paired else rng.integers(len(self._targets)))
            source, target = (
                self._sources[n][0].filled(self._sources[n][1]),
                self._targets[m][0].filled(self._targets[m][1]),
            )
            if patch is None:
                return (n, m), (*source, *target)
            groups = [(*source, *target)] if self.paired else [source, target]
            cut = [_cut(group, patch, rng, tissue) for group in groups]
            if all(part is not None for part in cut):
                return (n, m), tuple(image for part in cut for image in part)  # type: ignore[union-attr]
        raise HarmonictError(
            f"no patch of {patch} pixels with {tissue.share:.0%} of its pixels in [{tissue.low_hu:g}, "
            f"{tissue.high_hu:g}] HU was found in {SLICE_TRIES} slices: take smaller patches"
        )


def _common(scans: list[Scan]) -> ScanProtocol:
    first, *rest = dict.fromkeys(scan.protocol for scan in scans)
    open_fields = {k: None for k, v in first.as_dict().items() if any(p.as_dict()[k] != v for p in rest)}
    return first.with_(**open_fields)


def _cut(
    images: tuple[np.ndarray, ...], patch: int, rng: np.random.Generator, tissue: SoftTissue
) -> tuple[np.ndarray, ...] | None:
    """The same random patch of all images (HU, measured, ...), or None where none of some tries is soft tissue."""
    h, w = images[0].shape
    if min(h, w) < patch:
        raise HarmonictError(f"a slice of {h} x {w} pixels is smaller than the patch, {patch}: take smaller patches")
    for _ in range(PATCH_TRIES):
        y, x = int(rng.integers(h - patch + 1)), int(rng.integers(w - patch + 1))
        part = tuple(image[y : y + patch, x : x + patch] for image in images)
        if all(is_soft_tissue(hu, seen, tissue) for hu, seen in zip(part[::2], part[1::2], strict=True)):
            return part
    return None


def is_soft_tissue(hu: np.ndarray, measured: np.ndarray, tissue: SoftTissue) -> bool:
    """Whether enough of a patch is measured and lies in the range."""
    return float(np.mean((hu >= tissue.low_hu) & (hu <= tissue.high_hu) & measured)) >= tissue.share


def _move(images: tuple[np.ndarray, ...], rng: np.random.Generator, *, shift: bool) -> tuple[np.ndarray, ...]:
    """All images (HU, measured, ...) mirrored, turned and shifted alike."""
    mirror, turns, (dy, dx) = bool(rng.integers(2)), int(rng.integers(4)), rng.integers(-16, 17, 2)
    moved = []
    for n, image in enumerate(images):
        result = np.rot90(image[:, ::-1] if mirror else image, turns)
        if shift:
            result = _shift(result, int(dy), int(dx))
            if n % 2:  # what came in over the edge is a repetition, not a measurement
                inside = np.zeros(result.shape, bool)
                h, w = result.shape
                inside[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)] = True
                result = result & inside
        moved.append(np.ascontiguousarray(result))
    return tuple(moved)


def _shift(image: np.ndarray, dy: int, dx: int) -> np.ndarray:
    h, w = image.shape
    return image[np.clip(np.arange(h) - dy, 0, h - 1)[:, None], np.clip(np.arange(w) - dx, 0, w - 1)]


def _check_grid(source: Scan, target: Scan) -> None:
    if source.shape[1:] != target.shape[1:]:
        raise HarmonictError(
            f"{source.name} has slices of {source.shape[1:]} pixels, {target.name} of "
            f"{target.shape[1:]}: pairs must lie on one grid"
        )
    if not np.allclose(source.pixel_mm, target.pixel_mm, rtol=1e-3):
        raise HarmonictError(
            f"{source.name} has pixels of {source.pixel_mm[1]:g} mm, {target.name} of "
            f"{target.pixel_mm[1]:g} mm: pairs must lie on one grid; --resample brings them to one, or, if a header "
            "lies, give the true size with --spacing-mm"
        )


# -- pairs of series in memory ---------------------------------------------------------------------------------------


def pair_series(
    sources: Sequence[Series], targets: Sequence[Series], *, pixel_mm: tuple[float, float] | None = None
) -> SlicePairs:
    """Find the slices that show the same anatomy: one source with one target, or by name; slices by position, else by
    their order where both have as many.

    Two series pair if they are the only two, or if their names are equal and unique. Slices pair where they lie within
    a tenth of a slice spacing of each other; series without a common position pair slice by slice only where both are
    single images or have the same number of slices. pixel_mm: resample all to pixels (y, x) of that size.
    """
    items: list[tuple[Series | Scan, float, Series | Scan, int]] = []
    for matched in _match(sources, targets):
        source, target = (Scan(s) if pixel_mm is None else Scan(s).in_pixels(pixel_mm) for s in matched)
        by_position = _slices_by_position(source, target)
        if by_position:
            items += [(source, i, target, j) for i, j in by_position]
        elif source.shape[0] == target.shape[0]:
            items += [(source, i, target, i) for i in range(source.shape[0])]
    return SlicePairs(items)


def most_common_pixel(series: Iterable[Series | Scan]) -> tuple[float, float]:
    """The pixel size (y, x) in mm that most of them have; the smallest of several."""
    counts = Counter(tuple(round(size, 4) for size in one.pixel_mm) for one in series)
    most = max(counts.values())
    y, x = min(size for size, count in counts.items() if count == most)
    return y, x


def unpaired_series(
    sources: Sequence[Series], targets: Sequence[Series], *, pixel_mm: tuple[float, float] | None = None
) -> SlicePairs:
    """All slices of two heaps of series, of whatever anatomy; pixel_mm: resample all to pixels (y, x) of that size.

    Raises HarmonictError where one is empty.
    """
    if not sources or not targets:
        raise HarmonictError(f"no {'target' if sources else 'source'} images: both protocols need at least one series")
    heaps = (
        [Scan(s) if pixel_mm is None else Scan(s).in_pixels(pixel_mm) for s in side] for side in (sources, targets)
    )
    a, b = ([(scan, z) for scan in heap for z in range(scan.shape[0])] for heap in heaps)
    return SlicePairs.unpaired(a, b)


def _match(sources: Sequence[Series], targets: Sequence[Series]) -> list[tuple[Series, Series]]:
    if len(sources) == len(targets) == 1:
        return [(sources[0], targets[0])]
    by_name: dict[str, list[Series]] = {}
    for series in targets:
        by_name.setdefault(series.name, []).append(series)
    unclear = [name for name, found in by_name.items() if len(found) > 1]
    if unclear:
        raise HarmonictError(f"several target series are named {unclear[0]!r}; pair them through a cohort table")
    return [(source, by_name[source.name][0]) for source in sources if source.name in by_name]


def _take(series: Series, slices: list[int]) -> Series:
    """Some slices of a series; they keep the grid where they are consecutive and become single images where not."""
    if slices == list(range(len(series.hu))):
        return series
    positions = series.slice_positions_mm
    z = np.asarray(slices)
    geometry = series.geometry
    consecutive = series.is_volume and bool(np.all(np.diff(z) == 1))
    if consecutive:
        origin = tuple(geometry.to_patient(np.array([z[0], 0, 0])).tolist())
        geometry = replace(geometry, origin_mm=origin)
    return replace(
        series,
        hu=series.hu[z],
        geometry=geometry,
        padding=None if series.padding is None else series.padding[z],
        is_volume=consecutive,
        positions_mm=None if consecutive or positions is None else tuple(positions[z].tolist()),
        source=None,
    )


def _slices_by_position(source: Scan, target: Scan) -> list[tuple[int, int]]:
    a, b = source.positions_mm, target.positions_mm
    if a is None or b is None:
        return []
    single = not (source.is_volume and target.is_volume)
    tolerance = 0.05 if single else 0.1 * min(source.geometry.spacing_mm[0], target.geometry.spacing_mm[0])
    nearest = [int(np.argmin(np.abs(b - z))) for z in a]
    return [(i, j) for i, j in enumerate(nearest) if abs(b[j] - a[i]) <= tolerance]


# -- pairs of a cohort table -----------------------------------------------------------------------------------------


def cohort_pairs(
    cohort: str | Path,
    *,
    target: str,
    sources: Sequence[str] = (),
    rng: np.random.Generator,
    unpaired: bool = False,
    along_z: Literal["nearest", "linear"] = "nearest",
    held_out_share: float = 0.2,
    resample: bool = False,
    pixel_mm: float | None = None,
) -> SlicePairs:
    """The training pairs of a cohort table, with those of some patients held out. Only headers are read here.

    target: a protocol in words ("Bl64", "Bl64,thickness=1"), taken from the table's role `target` where rows of that
    role match, or "truth". A patient with several such series has each source paired with that of its own slice
    thickness. sources: protocols in words; by default every other series that is not truth. Where the table has a
    column `split`, only its rows "train" are used: nothing else is opened, or even looked for. Patients are told apart
    by the column `subject`, if there is one.

    Sources of another slice thickness are paired on the target's slices: along_z="nearest" takes the nearest slice of
    the source if it lies within half a target slice, as it is; "linear" joins the two neighbours of every target slice,
    which lowers their noise (to 71 % half way), so a method that shall learn the noise should not have it.
    unpaired: sources and targets of any patients, same or not. resample: see every slice in pixels of one size:
    `pixel_mm`, or that of most targets.

    A series that cannot be read is left out with its reason. Raises HarmonictError where nothing is left, the target is
    ambiguous or missing, pixel sizes are mixed, or there are too few patients to hold one out.
    """
    table = _training_rows(Path(cohort))
    rows = [_CohortRow.of(row) for row in table.astype(object).where(table.notna(), None).to_dict("records")]  # type: ignore[arg-type]
    targets = _target_rows(rows, target)
    wanted = [parse_protocol(text) for text in sources]
    chosen = [
        row
        for row in rows
        if row not in targets and not row.is_truth and (not wanted or any(row.protocol.matches(p) for p in wanted))
    ]
    if not chosen:
        known = sorted({row.protocol.label() for row in rows if row not in targets and not row.is_truth})
        raise HarmonictError(f"{cohort}: no source series beside the target {target}; there are: {', '.join(known)}")
    opened = _Opened()
    if resample and pixel_mm is not None:
        opened.resample((pixel_mm, pixel_mm))
    elif resample and (of_targets := [scan for row in targets if (scan := opened.scan(row)) is not None]):
        opened.resample(most_common_pixel(of_targets))
    if unpaired:
        pairs = _unpaired(chosen, targets, opened)
    else:
        pairs = _paired(chosen, targets, target, along_z, opened)
    if pairs is None:
        reasons = f": {opened.left_out[0]}" if opened.left_out else ""
        raise HarmonictError(f"{cohort}: no pairs of slices for the target {target}{reasons}")
    pairs.check_spacings()
    pairs.left_out = opened.left_out
    return pairs.split(rng, share=held_out_share)


@dataclass(frozen=True)
class _CohortRow:
    path: str
    patient: str
    subject: str
    series: str
    role: str
    protocol: ScanProtocol

    @staticmethod
    def of(row: Mapping[str, Any]) -> _CohortRow:
        patient = row["patient"] or ""
        protocol = ScanProtocol(**{name: row[name] for name in PROTOCOL_COLUMNS})
        return _CohortRow(
            row["path"], patient, row.get("subject") or patient, row["series"] or "", row["role"] or "source", protocol
        )

    @property
    def is_truth(self) -> bool:
        return self.role == "truth" or self.protocol.model == "truth"


def _training_rows(cohort: Path) -> pd.DataFrame:
    table = read_cohort(cohort)
    table = table[table["path"].notna() & ~table["state"].isin(("left_out", "failed")) & (table["role"] != "derived")]
    if "split" in table:
        splits = sorted(table["split"].dropna().unique())
        table = table[table["split"] == "train"]
        if table.empty:
            raise HarmonictError(f"{cohort}: no rows to train on: split must be 'train', there are {splits}")
    if table.empty:
        raise HarmonictError(f"{cohort}: no series to train on")
    if table["patient"].isna().any():
        raise HarmonictError(f"{cohort}: a row has no patient; training must know whose image is whose")
    return table


def _target_rows(rows: list[_CohortRow], target: str) -> list[_CohortRow]:
    if target.casefold() == "truth":
        found = [row for row in rows if row.is_truth]
    else:
        wanted = parse_protocol(target)
        matching = [row for row in rows if not row.is_truth and row.protocol.matches(wanted)]
        found = [row for row in matching if row.role == "target"] or matching
    if not found:
        known = sorted({row.protocol.label() for row in rows if not row.is_truth})
        raise HarmonictError(f"no series to train on has the protocol {target}; there are: {', '.join(known)}")
    return found


def _paired(
    sources: list[_CohortRow], targets: list[_CohortRow], wanted: str, along_z: str, opened: _Opened
) -> SlicePairs | None:
    by_patient: dict[str, list[_CohortRow]] = {}
    for row in targets:
        by_patient.setdefault(row.patient, []).append(row)
    items: list[tuple[Series | Scan, float, Series | Scan, int]] = []
    for row in sources:
        candidates = by_patient.get(row.patient, [])
        if len(candidates) > 1:
            thickness = row.protocol.slice_thickness_mm
            candidates = [c for c in candidates if c.protocol.slice_thickness_mm == thickness] or candidates
        if len(candidates) > 1:
            labels = sorted({c.protocol.label() for c in candidates})
            raise HarmonictError(
                f"the target {wanted} is ambiguous, say more: patient {row.patient} has {', '.join(labels)}"
            )
        source, target = (opened.scan(r) for r in (row, candidates[0])) if candidates else (None, None)
        if source is not None and target is not None:
            _check_grid(source, target)
            _check_origin(source, target)
            items += [(source, at, target, j) for at, j in _on_target_slices(source, target, along_z)]
    return SlicePairs(items) if items else None


def _unpaired(sources: list[_CohortRow], targets: list[_CohortRow], opened: _Opened) -> SlicePairs | None:
    a, b = ([scan for row in rows if (scan := opened.scan(row)) is not None] for rows in (sources, targets))
    if not a or not b:
        return None
    return SlicePairs.unpaired(
        [(scan, z) for scan in a for z in range(scan.shape[0])], [(scan, z) for scan in b for z in range(scan.shape[0])]
    )


class _Opened:
    """The scans of a cohort's rows, opened once, and why some could not be."""

    def __init__(self) -> None:
        self._scans: dict[str, Scan | None] = {}
        self.left_out: list[str] = []
        self._pixel_mm: tuple[float, float] | None = None

    def scan(self, row: _CohortRow) -> Scan | None:
        key = f"{row.path} {row.series}"
        if key not in self._scans:
            try:
                self._scans[key] = self._in_pixels(_open(row))
            except HarmonictError as error:
                self._scans[key] = None
                self.left_out.append(str(error))
        return self._scans[key]

    def resample(self, pixel_mm: tuple[float, float]) -> None:
        """See all scans, those opened already and those to come, in pixels (y, x) of one size."""
        self._pixel_mm = pixel_mm
        self._scans = {key: scan and self._in_pixels(scan) for key, scan in self._scans.items()}

    def _in_pixels(self, scan: Scan) -> Scan:
        return scan if self._pixel_mm is None else scan.in_pixels(self._pixel_mm)


def _open(row: _CohortRow) -> Scan:
    inventory = find_series(row.path)
    found = [f for f in inventory.found if f.series_uid == row.series] or inventory.found
    if len(found) != 1:
        why = inventory.left_out[0].reason if inventory.left_out and not found else f"{len(found)} CT series there"
        raise HarmonictError(f"{row.path}: {why}")
    return Scan(replace(found[0], patient=row.patient), protocol=row.protocol, subject=row.subject)


def _check_origin(source: Scan, target: Scan) -> None:
    axes = np.asarray(target.geometry.direction)[1:]
    apart = np.abs(axes @ (np.asarray(source.geometry.origin_mm) - np.asarray(target.geometry.origin_mm)))
    if np.any(apart > 0.1 * np.asarray(target.pixel_mm)):
        raise HarmonictError(
            f"{source.name} and {target.name} of patient {source.patient} lie {apart.max():.2f} mm apart in the plane: "
            "pairs must lie on one grid"
        )


def _on_target_slices(source: Scan, target: Scan, along_z: str) -> list[tuple[float, int]]:
    """(slice of the source, fractional if joined; slice of the target)."""
    a, b = source.positions_mm, target.positions_mm
    if a is None or b is None:
        return [(z, z) for z in range(source.shape[0])] if source.shape[0] == target.shape[0] else []
    step, half = source.geometry.spacing_mm[0], target.geometry.spacing_mm[0] / 2
    pairs: list[tuple[float, int]] = []
    for j, at in enumerate((b - a[0]) / step):
        nearest = int(np.clip(np.floor(at + 0.5), 0, len(a) - 1))
        apart = abs(at - nearest) * step
        if apart <= 0.1 * min(step, 2 * half) or (along_z == "nearest" and apart <= half * (1 + 1e-6)):
            pairs.append((nearest, j))
        elif along_z == "linear" and 0 <= at <= len(a) - 1:
            pairs.append((float(at), j))
    return pairs
