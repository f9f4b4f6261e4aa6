"""Series: the HU of one CT series and where they came from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from harmonict.core.errors import HarmonictError
from harmonict.core.geometry import Geometry
from harmonict.core.protocol import ScanProtocol


@dataclass(frozen=True)
class Series:
    """One CT series in HU. Valid or not built.

    hu: float32 (z, y, x), finite, at least one slice. Never changed in place; `with_hu` makes the changed one.
    geometry: the grid. For `is_volume=False` it is the first slice's and the z spacing means nothing.
    protocol: how it was made, as far as the file says.
    padding: bool (z, y, x), True where nothing was measured (outside the reconstruction circle); None = nowhere.
        `hu` holds the file's own value there, so a writer restores it exactly.
    is_volume: False for slices that form no regular stack and are worked on one by one.
    positions_mm: where each slice lies along the slice axis, for `is_volume=False` only (a volume's grid says it).
    patient: patient ID (an opaque key, never printed in a log).
    name: what messages call the series: a file or a folder name with the series description or number.
    source: the source file's headers; only the package that read the file opens it.
    """

    hu: np.ndarray
    geometry: Geometry = field(default_factory=Geometry)
    protocol: ScanProtocol = field(default_factory=ScanProtocol)
    padding: np.ndarray | None = None
    is_volume: bool = True
    positions_mm: tuple[float, ...] | None = None
    patient: str = ""
    name: str = ""
    source: object | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        hu = self.hu
        if not isinstance(hu, np.ndarray) or hu.dtype != np.float32 or hu.ndim != 3 or 0 in hu.shape:
            got = f"{hu.dtype} {hu.shape}" if isinstance(hu, np.ndarray) else type(hu).__name__
            raise HarmonictError(f"{self.name or 'series'}: HU must be a float32 array (z, y, x), got {got}")
        if not np.isfinite(hu.min()) or not np.isfinite(hu.max()):  # no full-size temporary
            raise HarmonictError(f"{self.name or 'series'}: NaN or infinite HU")
        if self.padding is not None and (self.padding.shape != hu.shape or self.padding.dtype != bool):
            raise HarmonictError(f"{self.name or 'series'}: padding must be bool with the shape of the HU, {hu.shape}")

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """In-plane spacing (y, x) in mm."""
        return self.geometry.spacing_mm[1:]

    @property
    def slice_positions_mm(self) -> np.ndarray | None:
        """(z,) position of each slice along the slice axis in mm; None for single slices that never said where."""
        if self.is_volume:
            start = float(np.dot(self.geometry.origin_mm, self.geometry.direction[0]))
            return start + self.geometry.spacing_mm[0] * np.arange(len(self.hu))
        return None if self.positions_mm is None else np.asarray(self.positions_mm, float)

    def with_hu(self, hu: np.ndarray, **changes: object) -> Series:
        """The same series with other HU of the same shape; `changes` replaces further fields."""
        if hu.shape != self.hu.shape:
            raise HarmonictError(f"{self.name or 'series'}: new HU have shape {hu.shape}, the series {self.hu.shape}")
        return replace(self, hu=np.ascontiguousarray(hu, np.float32), **changes)  # type: ignore[arg-type]
