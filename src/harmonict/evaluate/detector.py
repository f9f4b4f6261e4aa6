"""A small 3-D detector of lung nodules: MONAI's RetinaNet heads, ATSS matcher and hard-negative sampler on a pyramid.

Paper: Zarei et al. judge harmonized images by the winner of a competition (Lin et al., "Focal Loss for Dense Object
Detection", ICCV 2017: RetinaNet) on LUNA16, whose patches are 64^3.

Departures: (1) the pyramid is ours, of 0.65 M parameters, small enough for a CPU;
MONAI's own is built on torchvision. (2) MONAI's ATSS matcher (Zhang et al., CVPR 2020) chooses the anchors, and hard
negatives stand in for the focal loss. (3) No second network against false positives.

Boxes are (z0, y0, x0, z1, y1, x1) in voxels, voxel i covering [i, i + 1). Importing this module imports MONAI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
from monai.apps.detection.networks.retinanet_network import RetinaNet
from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
from torch import Tensor, nn
from torch.nn import functional

from harmonict.core import HarmonictError
from harmonict.train import Run

PATCH = 64  # voxels: LUNA16's usual, and the paper's
WINDOW_HU = (-1000.0, 400.0)  # to 0 ... 1
DIVISIBLE = 8  # the stride of the coarser level
ANCHORS = (6.0, 10.0)  # voxels at the finer level, twice that at the coarser: nodules of 4 to 30 mm
BATCH, RATE = 4, 1e-3
EPOCHS = 20  # in the steps asked for; the loss of an epoch is the mean over its steps
LAST_EPOCHS = 5  # the paper's "last five training losses"
NODULE_SHARE = 0.5  # of the patches; the others lie anywhere in the image


@dataclass(frozen=True)
class Example:
    """An image to learn from: HU (z, y, x) of any number type, and the boxes (n, 6) of its nodules."""

    hu: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class Patches:
    """A batch: images (b, 1, p, p, p) of 0 to 1, and the boxes (n, 6) in each."""

    images: Tensor
    boxes: tuple[Tensor, ...]

    def to(self, device: torch.device) -> Patches:
        """The same batch on another device."""
        return Patches(self.images.to(device), tuple(boxes.to(device) for boxes in self.boxes))


class Stage(nn.Module):
    """Half the resolution, then a residual block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Sequential(*_layer(inputs, outputs, 2), nn.ReLU())
        self.block = nn.Sequential(*_layer(outputs, outputs), nn.ReLU(), *_layer(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return functional.relu(x + self.block(x))


class Pyramid(nn.Module):
    """(b, 1, z, y, x) -> features (b, 32, ...) at strides of 4 and 8 voxels (Lin et al., CVPR 2017, two levels)."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(Stage(1, 16), Stage(16, 32))
        self.coarse = Stage(32, 64)
        self.fine_lateral, self.coarse_lateral = nn.Conv3d(32, 32, 1), nn.Conv3d(64, 32, 1)
        self.fine_out, self.coarse_out = (nn.Conv3d(32, 32, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.fine(x)
        coarse = self.coarse_lateral(self.coarse(fine))
        fine = self.fine_lateral(fine) + functional.interpolate(coarse, scale_factor=2)
        return [self.fine_out(fine), self.coarse_out(coarse)]


class NoduleDetector(RetinaNetDetector):
    """Patches with boxes -> losses in training; images -> boxes and scores otherwise."""

    def __init__(self, *, patch: int = PATCH) -> None:
        # 3 cells a side at least: of 2, oneDNN's bf16 gradient of a 3-D convolution is wrong (error 100 %, or infinite)
        if patch < 3 * DIVISIBLE or patch % DIVISIBLE:
            raise HarmonictError(f"a detector's patch must be a multiple of {DIVISIBLE} from 24 on, got {patch}")
        anchors = AnchorGeneratorWithAnchorShape((1, 2), [(side,) * 3 for side in ANCHORS])
        super().__init__(RetinaNet(3, 1, len(ANCHORS), Pyramid(), size_divisible=DIVISIBLE), anchors)
        self.patch = patch
        self.set_atss_matcher(num_candidates=4)
        self.set_hard_negative_sampler(batch_size_per_image=256, positive_fraction=0.3, min_neg=128, pool_size=20)
        self.set_box_selector_parameters(score_thresh=0.02, nms_thresh=0.2, detections_per_img=100)
        self.set_sliding_window_inferer(patch, overlap=0.25, mode="gaussian")

    def compute_anchor_matched_idxs(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]], num_anchor_locs_per_level: Sequence[int]
    ) -> list[Tensor]:
        """(anchors,) of each image: the box that an anchor belongs to, -1 for none. MONAI's own asks torchvision."""
        matched = []
        for places, target in zip(anchors, targets, strict=True):
            boxes = target[self.target_box_key]
            if len(boxes):
                matcher = self.proposal_matcher
                matched.append(matcher(boxes, places, num_anchor_locs_per_level, self.num_anchors_per_loc)[1])
            else:
                matched.append(torch.full((len(places),), -1, device=places.device))
        return matched

    def losses(self, patches: Patches) -> dict[str, Tensor]:
        """Cross-entropy of the sampled anchors, and smooth L1 of the boxes of those that belong to a nodule."""
        labels = (torch.zeros(len(boxes), dtype=torch.long, device=boxes.device) for boxes in patches.boxes)
        targets = [{"boxes": b, "labels": n} for b, n in zip(patches.boxes, labels, strict=True)]
        return {name: value.float() for name, value in self(patches.images, targets).items()}

    @torch.inference_mode()
    def detect(self, hu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """HU (z, y, x) of any size -> centres (n, 3) in voxels (z, y, x), scores (n,), the best first.

        A window of the patch's size slides over the image, a quarter of it overlapping. Padded with air at the end.
        """
        self.eval()
        device = next(self.parameters()).device
        sides = [max(self.patch, -(-side // DIVISIBLE) * DIVISIBLE) for side in hu.shape]  # else MONAI pads unevenly
        image = _scaled(hu, sides)
        found = self([torch.from_numpy(image)[None].to(device)], use_inferer=True)[0]
        boxes, scores = (found[key].float().cpu().numpy() for key in ("boxes", "labels_scores"))
        centres = (boxes[:, :3] + boxes[:, 3:]) / 2 - 0.5
        inside = (centres < hu.shape).all(1)
        return centres[inside], scores[inside]


class PatchSource:
    """Random patches of images with nodules, as `Run.batches` asks for them."""

    def __init__(self, examples: Sequence[Example], *, patch: int = PATCH) -> None:
        self.examples, self.patch = list(examples), patch
        self._places = [(n, k) for n, one in enumerate(self.examples) for k in range(len(one.boxes))]
        if not self._places:
            raise HarmonictError(f"a detector learns from nodules: none in the {len(self.examples)} images given")

    def batch(self, seed: Sequence[int], *, size: int, **_: Any) -> Patches:
        """The same seed gives the same batch. Half of the patches hold a drawn nodule; all are flipped and turned."""
        rng = np.random.default_rng(list(seed))
        images, boxes = zip(*(self._patch(rng) for _ in range(size)), strict=True)
        return Patches(torch.from_numpy(np.stack(images)[:, None]), tuple(map(torch.from_numpy, boxes)))

    def _patch(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        if rng.random() < NODULE_SHARE:
            n, k = self._places[rng.integers(len(self._places))]
            centre = self.examples[n].boxes[k].reshape(2, 3).mean(0)
            low = centre - self.patch * rng.uniform(0.2, 0.8, 3)
        else:
            n = int(rng.integers(len(self.examples)))
            low = rng.uniform(0, 1, 3) * (np.array(self.examples[n].hu.shape) - self.patch)
        one = self.examples[n]
        start = np.clip(np.round(low), 0, np.maximum(np.array(one.hu.shape) - self.patch, 0)).astype(int)
        part = one.hu[tuple(slice(s, s + self.patch) for s in start)]
        image = _scaled(part, (self.patch,) * 3)
        boxes = one.boxes - np.tile(start, 2)
        middle = (boxes[:, :3] + boxes[:, 3:]) / 2
        boxes = np.clip(boxes[((middle >= 0) & (middle < self.patch)).all(1)], 0, self.patch)
        for axis in range(3):
            if rng.random() < 0.5:
                image = np.flip(image, axis)
                boxes[:, [axis, axis + 3]] = self.patch - boxes[:, [axis + 3, axis]]
        if rng.random() < 0.5:
            image, boxes = image.swapaxes(1, 2), boxes[:, [0, 2, 1, 3, 5, 4]]
        return np.ascontiguousarray(image), boxes.astype(np.float32)


def train_detector(
    examples: Sequence[Example],
    run: Run,
    *,
    steps: int,
    patch: int = PATCH,
    until_loss: float | None = None,
) -> tuple[NoduleDetector, float]:
    """(detector, mean loss of its last five epochs). An epoch is a twentieth of `steps`.

    until_loss: train on, up to twice as many steps, until the mean of the last five epochs is no higher (the paper's
    rule for the detector of harmonized images). A finished training comes back from its run's folder.
    """
    with run.seeded():
        detector = NoduleDetector(patch=patch).to(run.device)
    detector.train()
    adam = torch.optim.AdamW(detector.parameters(), lr=RATE, weight_decay=1e-4)
    # a plain namespace: `Run` lays modules out for 2-D convolutions
    weights = SimpleNamespace(state_dict=detector.state_dict, load_state_dict=detector.load_state_dict)
    seen: dict[str, Any] = {"epoch": [], "epochs": []}
    most = steps if until_loss is None else 2 * steps
    batches: Any = run.batches(
        PatchSource(examples, patch=patch),  # type: ignore[arg-type]
        size=BATCH,
        steps=most,
        epoch_steps=max(1, steps // EPOCHS),
        weights=weights,
        adam=adam,
        seen=seen,
    )
    for batch in batches:
        with run.inside():
            losses = detector.losses(batch)
        run.step({name: (1.0, value) for name, value in losses.items()}, adam)
        seen["epoch"].append(float(sum(losses.values()).detach()))  # type: ignore[union-attr]
        if run.ends_epoch:
            seen["epochs"].append(float(np.mean(seen["epoch"])))
            seen["epoch"].clear()
            if until_loss is not None and _last(seen["epochs"]) <= until_loss and len(seen["epochs"]) >= LAST_EPOCHS:
                run.stop()
    return detector, _last(seen["epochs"])


def _last(losses: Sequence[float]) -> float:
    return float(np.mean(losses[-LAST_EPOCHS:]))


def _layer(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv3d(inputs, outputs, 3, stride, padding=1, bias=False), nn.GroupNorm(8, outputs)


def _scaled(hu: np.ndarray, sides: Sequence[int]) -> np.ndarray:
    """HU -> 0 ... 1 in the window, float32, filled up with air at the far ends to `sides` voxels."""
    low, high = WINDOW_HU
    out = np.zeros(tuple(sides), np.float32)
    out[tuple(slice(side) for side in hu.shape)] = np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1)
    return out
