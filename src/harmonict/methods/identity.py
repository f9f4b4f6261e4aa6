"""Identity: no harmonization, the row that every other method must beat. It proves that reading and writing change
nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from harmonict.core import ScanProtocol, Series
from harmonict.data import SlicePairs
from harmonict.harmonizer import About, Harmonizer


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""


class Identity(Harmonizer):
    """Returns the HU that it was given."""

    name = "identity"
    paired = "none"
    changes = ()
    Config = Config

    def fit(self, pairs: SlicePairs, run: Any = None) -> Self:
        return self

    @classmethod
    def like(cls, examples: Sequence[Series], config: Any = None) -> Self:
        return cls(config)

    def translate(self, x: Tensor, target: ScanProtocol, about: About) -> Tensor:
        return x
