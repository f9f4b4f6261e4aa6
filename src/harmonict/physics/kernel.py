"""Kernel: a reconstruction kernel is its modulation transfer function."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from harmonict.core import HarmonictError

COLUMNS = ("frequency_per_mm", "mtf")


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel, named or measured: the MTF `mtf` at the spatial frequencies `frequency_per_mm` (cycles per mm).

    name: "Bl64", or where the curve was measured.
    frequency_per_mm: (n,) float64, from 0 strictly upwards, n >= 2.
    mtf: (n,) float64, 1 at frequency 0. Edge-enhancing kernels pass 1; a measured tail may dip below 0 by its noise.
    note: where the curve comes from, or what it was built from.

    Raises HarmonictError, naming the kernel, where the arrays are no such curve.
    """

    name: str
    frequency_per_mm: np.ndarray = field(repr=False)
    mtf: np.ndarray = field(repr=False)
    note: str = ""

    def __post_init__(self) -> None:
        frequency = np.array(self.frequency_per_mm, np.float64)
        mtf = np.array(self.mtf, np.float64)
        if frequency.ndim != 1 or frequency.shape != mtf.shape or frequency.size < 2:
            raise HarmonictError(
                f"MTF {self.name}: expected two lists of equal length (2 or more), "
                f"got {frequency.shape} frequencies and {mtf.shape} values"
            )
        if not (np.all(np.isfinite(frequency)) and np.all(np.isfinite(mtf))):
            raise HarmonictError(f"MTF {self.name}: NaN or infinite numbers in the curve; give a number in every row")
        if frequency[0] != 0:
            raise HarmonictError(f"MTF {self.name}: the first frequency must be 0 per mm, got {frequency[0]:g}")
        steps = np.diff(frequency)
        if np.any(steps <= 0):
            n = int(np.argmax(steps <= 0)) + 1
            raise HarmonictError(
                f"MTF {self.name}: frequencies must rise from row to row, got {frequency[n]:g} after "
                f"{frequency[n - 1]:g} per mm"
            )
        if abs(mtf[0] - 1) > 1e-3:
            raise HarmonictError(
                f"MTF {self.name}: the value at frequency 0 must be 1, got {mtf[0]:g}; divide the curve by it"
            )
        frequency.setflags(write=False)
        mtf.setflags(write=False)
        object.__setattr__(self, "frequency_per_mm", frequency)
        object.__setattr__(self, "mtf", mtf)

    def at(self, frequency_per_mm: np.ndarray | float) -> np.ndarray:
        """The MTF at any frequencies >= 0, linear between samples.

        Beyond the last sample it falls from the last value to 0 over one tenth of the axis and stays 0: what was not
        measured is not passed.
        """
        last = self.frequency_per_mm[-1]
        axis = np.append(self.frequency_per_mm, 1.1 * last)
        return np.interp(np.asarray(frequency_per_mm, float), axis, np.append(self.mtf, 0.0))

    @property
    def f50_per_mm(self) -> float:
        """The first frequency where the MTF falls to 0.5 (NaN where it never does)."""
        return crossing(self.frequency_per_mm, self.mtf, 0.5)

    @property
    def f10_per_mm(self) -> float:
        """The first frequency where the MTF falls to 0.1 (NaN where it never does)."""
        return crossing(self.frequency_per_mm, self.mtf, 0.1)


def crossing(frequency_per_mm: np.ndarray, mtf: np.ndarray, level: float) -> float:
    """The first frequency at which `mtf` falls through `level`, linear between samples; NaN where it never does."""
    below = np.nonzero(mtf < level)[0]
    if below.size == 0 or below[0] == 0:
        return float("nan")
    n = below[0]
    share = (mtf[n - 1] - level) / (mtf[n - 1] - mtf[n])
    return float(frequency_per_mm[n - 1] + share * (frequency_per_mm[n] - frequency_per_mm[n - 1]))


def read_kernel(path: Path | str) -> Kernel:
    """Read a CSV with the columns `frequency_per_mm` and `mtf`; lines that begin with # are notes.

    The kernel is named after the file. Raises HarmonictError, naming the file, where it is missing or is no MTF curve.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise HarmonictError(f"cannot read the MTF file {path}: {reason}") from None
    lines = text.splitlines()
    notes = [line[1:].strip() for line in lines if line.startswith("#")]
    rows = list(csv.DictReader(line for line in lines if line.strip() and not line.startswith("#")))
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise HarmonictError(f"{path}: expected a CSV with the columns {', '.join(COLUMNS)}")
    try:
        values = np.array([[float(row[c]) for c in COLUMNS] for row in rows])
    except (TypeError, ValueError):
        raise HarmonictError(f"{path}: every row must hold two numbers, frequency in 1/mm and MTF") from None
    try:
        return Kernel(path.stem, values[:, 0], values[:, 1], " ".join(notes))
    except HarmonictError as error:
        raise HarmonictError(f"{path}: {error}") from None


def write_kernel(kernel: Kernel, path: Path | str) -> None:
    """Write the curve as a CSV that `read_kernel` reads; the note becomes a line that begins with #."""
    out = io.StringIO()
    if kernel.note:
        out.write("# " + " ".join(kernel.note.split()) + "\n")
    out.write(",".join(COLUMNS) + "\n")
    for frequency, value in zip(kernel.frequency_per_mm, kernel.mtf, strict=True):
        out.write(f"{frequency:.6g},{value:.6g}\n")
    try:
        Path(path).write_text(out.getvalue(), encoding="utf-8")
    except OSError as error:
        raise HarmonictError(f"cannot write {path}: {error.strerror}") from None
