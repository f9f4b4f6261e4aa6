"""Named reconstruction kernels: `kernels.csv`, one row a kernel, as the MTF of the whole system.

Columns: name, vendor, status (`measured`: fitted to public images made with it; `emulation`: a smooth curve through
assumed or published numbers), source, and the MTF at 0, 0.05 ... 1 per mm. Between these the curve is a monotone cubic.
"""

from __future__ import annotations

import csv
import difflib
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from scipy.interpolate import PchipInterpolator

from harmonict.core import HarmonictError
from harmonict.physics.kernel import Kernel, read_kernel

_STEP_PER_MM = 0.005


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, str]]:
    text = files("harmonict.simulate").joinpath("kernels.csv").read_text(encoding="utf-8")
    return {row["name"]: row for row in csv.DictReader(text.splitlines())}


def kernel_names() -> tuple[str, ...]:
    """The names of the kernels that `get_kernel` knows, in the order of the table."""
    return tuple(_table())


def get_kernel(name: str) -> Kernel:
    """The kernel of that name (letter case does not matter, and Siemens' trailing f or d is no other kernel).

    Its `note` says whether it was measured or is an emulation, and from what. Raises HarmonictError where the name is
    unknown, with the nearest known one and the list.
    """
    return _curve(_known(name))


def kernel_vendor(name: str) -> str:
    """The manufacturer whose kernel this is. Raises HarmonictError as `get_kernel`."""
    return _table()[_known(name)]["vendor"]


def load_kernel_csv(path: Path | str) -> Kernel:
    """A user's kernel: a CSV with the columns `frequency_per_mm` and `mtf`, the MTF of the whole system.

    Raises HarmonictError where the frequencies do not rise from 0, the value at 0 is not 1, or the curve is not down to
    a tenth at its end (what lies beyond would have to be guessed).
    """
    kernel = read_kernel(path)
    if abs(kernel.mtf[-1]) > 0.1:
        raise HarmonictError(
            f"{path}: the MTF is still {kernel.mtf[-1]:.2g} at its last frequency, "
            f"{kernel.frequency_per_mm[-1]:g} per mm; give the curve down to 0.1 or less"
        )
    return kernel


def _known(name: str) -> str:
    by_lower = {known.lower(): known for known in _table()}
    key = str(name).strip().lower()
    for candidate in (key, key.removesuffix("f"), key.removesuffix("d"), key + "f"):
        if candidate in by_lower:
            return by_lower[candidate]
    near = difflib.get_close_matches(key, by_lower, n=1, cutoff=0.0)
    raise HarmonictError(f"unknown kernel {name!r}; did you mean {by_lower[near[0]]}? Known: {', '.join(_table())}")


@lru_cache(maxsize=64)
def _curve(name: str) -> Kernel:
    row = _table()[name]
    axis = [column for column in row if column[:1].isdigit()]
    frequency = np.array([float(column) for column in axis])
    fine = np.round(np.arange(0.0, frequency[-1] + _STEP_PER_MM / 2, _STEP_PER_MM), 6)
    values = np.array([float(row[column]) for column in axis])
    # mirrored at 0: a kink there would be a point spread with tails across the whole image
    both = np.concatenate([-frequency[:0:-1], frequency]), np.concatenate([values[:0:-1], values])
    curve = PchipInterpolator(*both)(fine)
    mtf = np.maximum(np.round(curve, 9), 0.0)  # a zero in the table is a zero here
    return Kernel(name, fine, mtf, f"{row['status']}: {row['source']}")
