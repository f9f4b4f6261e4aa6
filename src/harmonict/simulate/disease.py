"""Emphysema and lung nodules: what they are, before they have a place in a lung."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from harmonict.core import HarmonictError

DENSITIES = ("solid", "part-solid", "ground-glass")
DISTRIBUTIONS = ("upper", "diffuse")
SEVERITY = {"mild": 0.05, "moderate": 0.15, "severe": 0.30}


@dataclass(frozen=True)
class EmphysemaSpec:
    """Lung tissue that is gone.

    share: part of the lung volume (0 to 0.6); SEVERITY has 0.05 mild, 0.15 moderate, 0.30 severe.
    distribution: "upper" (centrilobular: four times as much at the apex as at the base) or "diffuse".
    hole_mm: typical width of a hole, 2 to 20 mm.
    """

    share: float
    distribution: Literal["upper", "diffuse"] = "upper"
    hole_mm: float = 5.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 0.6:
            raise HarmonictError(f"emphysema share must lie between 0 and 0.6 of the lung, got {self.share}")
        if self.distribution not in DISTRIBUTIONS:
            raise HarmonictError(f"emphysema distribution must be one of {DISTRIBUTIONS}, got {self.distribution!r}")
        if not 2.0 <= self.hole_mm <= 20.0:
            raise HarmonictError(f"emphysema hole_mm must lie between 2 and 20 mm, got {self.hole_mm}")


@dataclass(frozen=True)
class NoduleSpec:
    """One lung nodule.

    diameter_mm: 2 to 60. density: "solid" (as muscle), "part-solid" (a ground-glass ball with a solid core of half its
    diameter) or "ground-glass". spiculation: 0 smooth, 1 lobulated and with many spicules; 0 is an exact ball.
    position_mm: (x, y, z) of the centre, or None: somewhere in the lung, by the patient's seed.
    """

    diameter_mm: float
    density: Literal["solid", "part-solid", "ground-glass"] = "solid"
    spiculation: float = 0.0
    position_mm: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if not 2.0 <= self.diameter_mm <= 60.0:
            raise HarmonictError(f"nodule diameter_mm must lie between 2 and 60 mm, got {self.diameter_mm}")
        if self.density not in DENSITIES:
            raise HarmonictError(f"nodule density must be one of {DENSITIES}, got {self.density!r}")
        if not 0.0 <= self.spiculation <= 1.0:
            raise HarmonictError(f"nodule spiculation must lie between 0 and 1, got {self.spiculation}")


def draw_nodules(rng: np.random.Generator, count: int) -> tuple[NoduleSpec, ...]:
    """`count` nodules of 4 to 30 mm: 55 % solid, 20 % part-solid, 25 % ground-glass; larger ones more spiculated."""
    nodules = []
    for _ in range(count):
        diameter = float(np.clip(rng.lognormal(np.log(10.0), 0.5), 4.0, 30.0))
        density = str(rng.choice(DENSITIES, p=(0.55, 0.20, 0.25)))
        spiculation = float(np.clip(rng.normal((diameter - 4.0) / 30.0, 0.25), 0.0, 1.0))
        nodules.append(NoduleSpec(round(diameter, 2), density, round(spiculation, 2)))  # type: ignore[arg-type]
    return tuple(nodules)


def emphysema_weight(height: np.ndarray, distribution: str) -> np.ndarray:
    """Relative risk of a place to be gone; `height` 0 at the base, 1 at the apex."""
    if distribution == "diffuse":
        return np.ones_like(height)
    return 0.4 + 1.2 * np.clip(height, 0.0, 1.0)
