"""Histogram matching: every HU is replaced by the HU of the same rank in images of the target protocol.

    textbook (Gonzalez & Woods, Digital Image Processing, 3.3.2)   here
    cumulative histogram of the reference images                   reference_hu, fitted
    cumulative histogram of the input                              Histogram.describe, of the whole series
    output = inverse reference CDF (input CDF)                     Histogram.translate
Symbols: F source CDF, G reference CDF, z = G^-1(F(x)).
Departures: 1. both CDFs are sampled at `levels` quantiles and joined by straight lines, so that equal HU stay equal
and the map is continuous. 2. The source CDF is the series', not the slice's: a slice then does not depend on how much
lung happens to be in it. 3. Padding is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from harmonict.core import HarmonictError, ScanProtocol, Series
from harmonict.data import SlicePairs
from harmonict.harmonizer import About, Harmonizer
from harmonict.physics.kernel import Kernel


@dataclass(frozen=True)
class Config:
    """levels: quantiles that describe a histogram (ours: finer than 1 HU for most tissue at 1,024)."""

    levels: int = 1024

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"levels must be at least 2, got {self.levels}")


class Histogram(Harmonizer):
    """Histogram matching to the images of a target protocol."""

    name = "histogram"
    paper = "Gonzalez & Woods"
    paired = "unpaired"
    Config = Config
    reference_hu: Tensor  # (levels,) quantiles of the target protocol's HU, increasing

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        self.register_buffer("reference_hu", torch.zeros(0))

    def fit(self, pairs: SlicePairs, run: Any = None) -> Self:
        """Only the targets count: nothing is learned from the pairing."""
        self.target = pairs.target_protocol
        share = -(-(2**24) // len(pairs))  # of a large cohort each slice counts by a sample of its pixels
        values = []
        for pair in pairs:
            pixels = pair.target[pair.measured]
            values.append(pixels[:: max(1, -(-pixels.size // share))])
        self.reference_hu = torch.from_numpy(_quantiles(np.concatenate(values), self.config.levels))
        return self

    @classmethod
    def like(cls, examples: Sequence[Series], config: Any = None) -> Self:
        """A reference histogram from the examples, each counting by its number of voxels."""
        model = cls(config, target=examples[0].protocol if len(examples) == 1 else None)
        values = np.concatenate([_measured(series) for series in examples])
        model.reference_hu = torch.from_numpy(_quantiles(values, model.config.levels))
        return model

    def describe(self, series: Series, *, source_mtf: Kernel | None = None) -> About:
        about = super().describe(series, source_mtf=source_mtf)
        return replace(about, measured={"source_hu": _quantiles(_measured(series), self.config.levels)})

    def translate(self, x: Tensor, target: ScanProtocol, about: About) -> Tensor:
        if not len(self.reference_hu):
            raise HarmonictError(
                "histogram has no reference yet: fit it, or give --like an image of the target protocol"
            )
        f, g = _one_to_one(about.measured["source_hu"], self.reference_hu.numpy())
        return torch.from_numpy(np.interp(x.numpy(), f, g).astype(np.float32))


def _measured(series: Series) -> np.ndarray:
    return series.hu.ravel() if series.padding is None else series.hu[~series.padding]


def _quantiles(hu: np.ndarray, levels: int) -> np.ndarray:
    """(levels,) float32 quantiles; a histogram of 2 to the power of 20 values picked evenly is exact to 0.1 %."""
    if not hu.size:
        raise HarmonictError("no measured voxels: the images are padding only")
    step = max(1, hu.size // 2**20)
    return np.quantile(hu[::step], np.linspace(0, 1, levels)).astype(np.float32)


def _one_to_one(source: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where many quantiles share one source HU (air clipped at -1024) it maps to their mean reference HU."""
    values, inverse, counts = np.unique(source, return_inverse=True, return_counts=True)
    return values, np.bincount(inverse, reference.astype(float)) / counts
