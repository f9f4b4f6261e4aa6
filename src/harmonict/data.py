"""SlicePairs: the same anatomy seen with two protocols, slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harmonict.core import HarmonictError, ScanProtocol, Series


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


class SlicePairs(Sequence[SlicePair]):
    """Pairs of slices from pairs of series. Use `pair_series` to find them."""

    def __init__(self, items: Sequence[tuple[Series, int, Series, int]]) -> None:
        """items: (source series, its slice, target series, its slice)."""
        if not items:
            raise HarmonictError("no pairs of slices: source and target have no slice position or file name in common")
        for source, _, target, _ in items:
            if source.hu.shape[1:] != target.hu.shape[1:]:
                raise HarmonictError(
                    f"{source.name} has slices of {source.hu.shape[1:]} pixels, {target.name} of "
                    f"{target.hu.shape[1:]}: pairs must lie on one grid"
                )
            if not np.allclose(source.pixel_mm, target.pixel_mm, rtol=1e-3):
                raise HarmonictError(
                    f"{source.name} has pixels of {source.pixel_mm[1]:g} mm, {target.name} of "
                    f"{target.pixel_mm[1]:g} mm: pairs must lie on one grid; if a header lies, give the true size with "
                    "--spacing-mm"
                )
        self._items = list(items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, n):  # type: ignore[no-untyped-def, override]
        if isinstance(n, slice):
            return SlicePairs(self._items[n])
        source, i, target, j = self._items[n]
        measured = np.ones(source.hu.shape[1:], bool)
        for series, z in ((source, i), (target, j)):
            if series.padding is not None:
                measured &= ~series.padding[z]
        return SlicePair(
            source.hu[i], target.hu[j], measured, source.pixel_mm, source.protocol, target.protocol, source.patient
        )

    def __iter__(self) -> Iterator[SlicePair]:
        return (self[n] for n in range(len(self)))

    def whole_series(self) -> list[tuple[Series, Series]]:
        """(source, target) series cut down to the slices that pair, in order: for evaluation over whole series."""
        by_series: dict[tuple[int, int], list[tuple[Series, int, Series, int]]] = {}
        for item in self._items:
            by_series.setdefault((id(item[0]), id(item[2])), []).append(item)
        return [
            (_take(items[0][0], [i for _, i, _, _ in items]), _take(items[0][2], [j for _, _, _, j in items]))
            for items in by_series.values()
        ]

    @property
    def target_protocol(self) -> ScanProtocol:
        """What all targets have in common; fields that differ are left open."""
        first, *rest = [target.protocol for _, _, target, _ in self._items]
        open_fields = {k: None for k, v in first.as_dict().items() if any(p.as_dict()[k] != v for p in rest)}
        return first.with_(**open_fields)


def pair_series(sources: Sequence[Series], targets: Sequence[Series]) -> SlicePairs:
    """Find the slices that show the same anatomy: one source with one target, or by name; slices by position, else by
    their order where both have as many.

    Two series pair if they are the only two, or if their names are equal and unique. Slices pair where they lie within
    a tenth of a slice spacing of each other; series without a common position pair slice by slice only where both are
    single images or have the same number of slices.
    """
    items: list[tuple[Series, int, Series, int]] = []
    for source, target in _match(sources, targets):
        by_position = _slices_by_position(source, target)
        if by_position:
            items += [(source, i, target, j) for i, j in by_position]
        elif len(source.hu) == len(target.hu):
            items += [(source, i, target, i) for i in range(len(source.hu))]
    return SlicePairs(items)


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


def _slices_by_position(source: Series, target: Series) -> list[tuple[int, int]]:
    a, b = source.slice_positions_mm, target.slice_positions_mm
    if a is None or b is None:
        return []
    single = not (source.is_volume and target.is_volume)
    tolerance = 0.05 if single else 0.1 * min(source.geometry.spacing_mm[0], target.geometry.spacing_mm[0])
    nearest = [int(np.argmin(np.abs(b - z))) for z in a]
    return [(i, j) for i, j in enumerate(nearest) if abs(b[j] - a[i]) <= tolerance]
