"""TwoWay: what the methods that learn from unpaired images share.

Two domains A (the sources) and B (the targets), one network for each direction, both kept in one model; and a stand-in
for a validation, since no truth says how a translated image should look.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.data import About, SlicePairs, SoftTissue
from harmonict.harmonizer import NetworkHarmonizer
from harmonict.train import Run

WINDOW_HU = (-1000.0, 900.0)  # CVH-CT, Model Implementation
LARGE_SCALE_PX = 3  # what is wider stays the source's
CHECK_PATCHES = 24
BAND_SD_PIXELS = (0.0, 1.0, 2.0, 4.0)  # neighbours make a band: difference of Gaussians
BLOCK = 8  # pixels: small enough to lie between vessels
TISSUES_HU = ((-950.0, -600.0), (-150.0, 200.0))  # lung and soft tissue, by the smoothed image
HU_PER_DB = 10.0  # this much change of what every kernel shows alike weighs as much as 1 dB of texture
SEES = SoftTissue(*WINDOW_HU)


class TwoWay(NetworkHarmonizer):
    """Harmonizes from A to B and back: the target says which way.

    A method makes the networks `a2b` and `b2a`: (b, 1, h, w) in units of the window (-1 its lower, 1 its upper end)
    to the same.
    """

    paired = "unpaired"
    changes: ClassVar[tuple[str, ...]] = ("manufacturer", "kernel")
    window_hu = WINDOW_HU
    a2b: nn.Module
    b2a: nn.Module
    domain_a: Tensor  # uint8, JSON: what is known of the protocol of A; empty before it was fitted
    domain_b: Tensor

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        self.register_buffer("domain_a", torch.zeros(0, dtype=torch.uint8))
        self.register_buffer("domain_b", torch.zeros(0, dtype=torch.uint8))

    def meet(self, pairs: SlicePairs) -> SlicePairs:
        """Learn who A and B are. Returns the slices unpaired; raises HarmonictError where the domains are the same."""
        a, b = pairs.source_protocol, pairs.target_protocol
        if a == b and a != ScanProtocol():
            raise HarmonictError(f"domains A and B are the same, both {a.label()}: give images of two protocols")
        for one in pairs.scans[0]:
            for other in pairs.scans[1]:
                if _same_images(one, other):
                    raise HarmonictError(
                        f"domains A and B are the same: both hold the images of {one.name or 'one series'}; "
                        "give images of two protocols"
                    )
        self.target, self.pixel_mm = b, torch.tensor(pairs.pixel_mm)
        self.domain_a, self.domain_b = _as_bytes(a), _as_bytes(b)
        return pairs.shuffled() if pairs.paired else pairs

    @property
    def domains(self) -> tuple[ScanProtocol, ScanProtocol]:
        """What is known of the protocols of A and B."""
        return _protocol(self.domain_a), _protocol(self.domain_b)

    def aim(self, wanted: ScanProtocol) -> None:
        """Make A or B the target, whichever `wanted` names."""
        a, b = self.domains
        self.target = a if self._way(wanted) is self.b2a else b

    @property
    def trained_side(self) -> str:
        return "target" if self._way(self.target) is self.b2a else "source"

    def _way(self, target: ScanProtocol) -> nn.Module:
        """The network that leads to a protocol."""
        self.check_fitted()
        a, b = self.domains
        to_a, to_b = a.matches(target), b.matches(target)
        if to_a and to_b:  # what `target` says holds for both, a dose perhaps
            to_a = self.target == a
        if not (to_a or to_b):
            raise HarmonictError(f"this model was fitted for {a.label()} and {b.label()}, not for {target.label()}")
        return self.b2a if to_a else self.a2b

    def translate(self, x: Tensor, target: ScanProtocol, about: About) -> Tensor:
        network = self._way(target)
        return torch.cat([convert(network, x[n : n + 1]) for n in range(len(x))])  # the same whatever the batch


def scaled(hu: Tensor) -> Tensor:
    """HU -> units of the window, cut at its ends."""
    low, high = WINDOW_HU
    return ((hu - low) / (high - low) * 2 - 1).clamp(-1, 1)


def to_hu(x: Tensor) -> Tensor:
    """Units of the window -> HU, float32."""
    low, high = WINDOW_HU
    return (x.float() + 1) / 2 * (high - low) + low


def convert(network: nn.Module, hu: Tensor) -> Tensor:
    """Slices (b, 1, h, w) in HU through a network that sees them in units of the window."""
    return to_hu(network(scaled(hu)))


def _as_bytes(protocol: ScanProtocol) -> Tensor:
    known = {name: value for name, value in protocol.as_dict().items() if value is not None}
    return torch.frombuffer(bytearray(json.dumps(known).encode()), dtype=torch.uint8).clone()


def _protocol(data: Tensor) -> ScanProtocol:
    return ScanProtocol(**json.loads(bytes(data.tolist()))) if len(data) else ScanProtocol()


def _same_images(one: Any, other: Any) -> bool:
    if one.shape != other.shape or one.protocol != other.protocol:
        return False
    middle = one.shape[0] // 2
    return bool(np.array_equal(one.slice(middle)[0], other.slice(middle)[0]))


# -- a stand-in for a validation ---------------------------------------------------------------------------------------


class Judge:
    """Keeps the state of the best check, where no truth says what is right.

    A direction's gap: by how many dB the texture of translated patches of held-out patients is off that of real ones
    of the other domain (`texture_db`); to it comes how far what every kernel shows alike was moved (`content_hu`), 10
    HU as 1 dB. The best state is that of the least mean over both directions. `state` belongs into `run.batches`, so
    that a killed training knows the best so far.
    """

    def __init__(self, networks: Mapping[str, nn.Module], held_out: SlicePairs | None, *, patch: int) -> None:
        self.state: dict[str, Any] = {}
        self._networks, self._held_out, self._patch = networks, held_out, patch
        self._seen: tuple[list[Tensor], list[Tensor]] | None = None

    def look(self, run: Run) -> None:
        """At the end of an epoch."""
        if self._held_out is None or not run.ends_epoch:
            return
        a, b = self._seen = self._seen or self._draw(run.seed)
        a2b, b2a = self._networks["a2b"], self._networks["b2a"]
        with torch.inference_mode():
            ab = [convert(a2b, x.to(run.device)).cpu() for x in a]
            ba = [convert(b2a, x.to(run.device)).cpu() for x in b]
        figures = {
            "texture gap A to B dB": texture_db(ab, b),
            "texture gap B to A dB": texture_db(ba, a),
            "content A to B HU": content_hu(ab, [x.clamp(*WINDOW_HU) for x in a]),
            "content B to A HU": content_hu(ba, [x.clamp(*WINDOW_HU) for x in b]),
        }
        for name, value in figures.items():
            run.log(name, value)
        gaps, moved = list(figures.values())[:2], list(figures.values())[2:]
        score = float(np.mean(gaps) + np.mean(moved) / HU_PER_DB)
        run.log("unpaired score dB", score)
        if score < self.state.get("score", np.inf):
            weights = {
                name: {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}
                for name, network in self._networks.items()
            }
            untouched = texture_db(a, b)
            self.state.update(score=score, step=run.step_number + 1, untouched_gap_db=untouched, weights=weights)
            self.state.update(figures=figures)

    def use_best(self) -> None:
        """Put the weights of the best check back, where there was one."""
        for name, weights in self.state.get("weights", {}).items():
            self._networks[name].load_state_dict(weights)

    def card(self) -> dict[str, Any]:
        """For the model card."""
        if not self.state:
            return {}
        kept = {"kept_step": self.state["step"], "score_db": self.state["score"], **self.state["figures"]}
        return {"unpaired_validation": {**kept, "texture gap as it is dB": self.state["untouched_gap_db"]}}

    def _draw(self, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        assert self._held_out is not None
        batches = [
            self._held_out.batch((seed, 2**31, n), size=1, patch=self._patch, augment=False, tissue=SEES)
            for n in range(CHECK_PATCHES)
        ]
        return [batch.source for batch in batches], [batch.target for batch in batches]


def texture_db(images: list[Tensor], wanted: list[Tensor]) -> float:
    """How far the noise and texture of images are off those of others of any anatomy, in dB; 0 is the same.

    Both: (1, 1, h, w) in HU. For lung and for soft tissue, and in three octave bands: the median over blocks of 8
    pixels of the band's RMS, which vessels and borders do not move much. The gap is the mean of |20 log10 of the
    ratio|. NaN where no tissue is in both.
    """
    gaps = []
    for found, aim in zip(_levels(images), _levels(wanted), strict=True):
        if found is not None and aim is not None:
            gaps += list(np.abs(20 * np.log10(found / aim)))
    return float(np.mean(gaps)) if gaps else float("nan")


def _levels(images: list[Tensor]) -> list[np.ndarray | None]:
    """Per tissue: (3,) median RMS in each band, HU; None where a tissue is not seen."""
    rms: list[np.ndarray] = []
    smooth: list[np.ndarray] = []
    for image in images:
        hu = image[0, 0].numpy().astype(np.float64)
        steps = [ndimage.gaussian_filter(hu, sd, mode="reflect") for sd in BAND_SD_PIXELS]
        rms.append(np.stack([np.sqrt(_blocks((p - q) ** 2)) for p, q in pairwise(steps)], -1))
        smooth.append(_blocks(steps[-1]))
    all_rms, level = np.concatenate(rms), np.concatenate(smooth)
    chosen = [all_rms[(level > low) & (level < high)] for low, high in TISSUES_HU]
    return [np.maximum(np.median(rows, axis=0), 1e-3) if len(rows) >= 8 else None for rows in chosen]


def _blocks(image: np.ndarray) -> np.ndarray:
    h, w = (n // BLOCK * BLOCK for n in image.shape)
    return image[:h, :w].reshape(h // BLOCK, BLOCK, w // BLOCK, BLOCK).mean((1, 3)).ravel()


def content_hu(images: list[Tensor], sources: list[Tensor]) -> float:
    """Mean absolute change, in HU, of images (1, 1, h, w) smoothed by 4 pixels: what every kernel shows alike."""
    smooth = [ndimage.gaussian_filter((i - s)[0, 0].numpy(), 4.0) for i, s in zip(images, sources, strict=True)]
    return float(np.mean([np.abs(part).mean() for part in smooth]))
