"""The detector on spheres in noise, its patches, its training and its sliding window."""

import copy

import numpy as np
import pytest
import torch

from harmonict.core import HarmonictError
from harmonict.evaluate.detection import froc, outcome, sensitivity_at
from harmonict.evaluate.detector import Example, NoduleDetector, PatchSource, train_detector
from harmonict.train import Run

PATCH = 32


def spheres(seed, shape=(32, 48, 48), count=2):
    """Lung with noise of 60 HU, spheres of 3 to 6 voxels radius and two rods as bright: example, centres, radii."""
    rng = np.random.default_rng(seed)
    hu = np.full(shape, -850.0) + rng.normal(0, 60, shape)
    grid = np.indices(shape)
    for axis in (1, 2):
        hu[np.hypot(grid[0] - rng.uniform(8, 24), grid[axis] - rng.uniform(4, 44)) < 2] = 0
    centres, radii = [], []
    while len(centres) < count:
        radius = rng.uniform(3, 6)
        centre = rng.uniform(radius, np.array(shape) - radius)
        if all(np.linalg.norm(centre - c) > 14 for c in centres):
            hu[np.linalg.norm(grid - centre[:, None, None, None], axis=0) <= radius] = 30
            centres.append(centre)
            radii.append(radius)
    centres, radii = np.array(centres), np.array(radii)
    boxes = np.hstack([centres + 0.5 - radii[:, None], centres + 0.5 + radii[:, None]])
    return Example(hu.astype(np.int16), boxes), centres, radii


def sensitivity(detector, rate):
    """At so many false positives per scan, on eight images that no training saw."""
    found = []
    for seed in range(100, 108):
        example, centres, radii = spheres(seed)
        found.append(outcome(str(seed), *detector.detect(example.hu), centres, radii))
    return sensitivity_at(froc(found), (rate,))[0]


def quiet(folder=None):
    return Run(folder, seed=0, save_every_s=0, say=lambda line: None)


@pytest.fixture(scope="module")
def trained():
    return train_detector([spheres(seed)[0] for seed in range(12)], quiet(), patch=PATCH, steps=80)[0]


def test_a_trained_detector_finds_spheres_in_noise_among_rods(trained):
    assert sensitivity(trained, 0.5) >= 0.9


def test_the_same_detector_with_shuffled_weights_does_not(trained):
    shuffled = copy.deepcopy(trained)
    order = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in shuffled.parameters():
            weights.copy_(weights.flatten()[torch.randperm(weights.numel(), generator=order)].view_as(weights))
    assert sensitivity(shuffled, 0.5) <= 0.2


def test_the_window_finds_a_sphere_wherever_it_lies_in_a_larger_image(trained):
    rng = np.random.default_rng(5)
    hu = (-850 + rng.normal(0, 60, (45, 70, 101))).astype(np.int16)
    places = np.array([[10, 10, 10], [34, 60, 92], [22, 33, 50]])
    for place in places:
        hu[np.linalg.norm(np.indices(hu.shape) - place[:, None, None, None], axis=0) <= 5] = 30
    centres, scores = trained.detect(hu)
    assert (np.diff(scores) <= 0).all()
    best = centres[:3]
    assert max(np.linalg.norm(best - place, axis=1).min() for place in places) < 2


def test_a_slab_thinner_than_the_patch_gives_centres_inside_it(trained):
    hu = spheres(3)[0].hu[14:19]
    centres, _ = trained.detect(hu)
    assert ((centres > -1) & (centres < hu.shape)).all()


def test_boxes_stay_on_their_spheres_through_flips_and_turns():
    source = PatchSource([spheres(seed)[0] for seed in range(3)], patch=PATCH)
    boxes = 0
    for step in range(6):
        batch = source.batch((0, step), size=4)
        for image, found in zip(batch.images[:, 0], batch.boxes, strict=True):
            for box in found.numpy():
                middle = tuple(np.clip((box[:3] + box[3:]) / 2, 0, PATCH - 1).astype(int))
                assert image[middle] == pytest.approx((30 + 1000) / 1400, abs=0.01)
                boxes += 1
    assert boxes > 20


def test_a_batch_follows_from_its_seed_alone():
    source = PatchSource([spheres(0)[0]], patch=PATCH)
    first = source.batch((0, 1), size=2)
    other = source.batch((0, 2), size=2)
    again = source.batch((0, 1), size=2)
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    assert all(torch.equal(a, b) for a, b in zip(first.boxes, again.boxes, strict=True))


def test_a_patch_of_a_thin_slab_is_filled_up_with_air():
    example = spheres(0)[0]
    batch = PatchSource([Example(example.hu[:6] + 500, example.boxes * 0 + 2)], patch=PATCH).batch((0,), size=4)
    layers = (batch.images > 0).flatten(3).any(3).sum(2)
    assert batch.images.shape == (4, 1, PATCH, PATCH, PATCH) and (layers == 6).all()


def test_an_anchor_belongs_to_the_box_it_equals_and_none_to_no_box():
    detector = NoduleDetector(patch=PATCH)
    anchors = detector.anchor_generator(
        torch.zeros(1, 1, 32, 32, 32), [torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 4, 4, 4)]
    )[0]
    levels = [8**3, 4**3]
    (matched,) = detector.compute_anchor_matched_idxs([anchors], [{"boxes": anchors[[200, 700]]}], levels)
    assert matched[200] == 0 and matched[700] == 1
    assert (matched >= 0).sum() < 30
    (none,) = detector.compute_anchor_matched_idxs([anchors], [{"boxes": torch.zeros(0, 6)}], levels)
    assert (none == -1).all()


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    examples = [spheres(seed)[0] for seed in range(2)]
    whole, loss = train_detector(examples, quiet(tmp_path / "whole"), patch=24, steps=8)

    batch, calls = PatchSource.batch, []

    def dies(self, seed, **options):
        calls.append(seed)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return batch(self, seed, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PatchSource, "batch", dies)
        with pytest.raises(KeyboardInterrupt):
            train_detector(examples, quiet(tmp_path / "killed"), patch=24, steps=8)
    resumed, same = train_detector(examples, quiet(tmp_path / "killed"), patch=24, steps=8)
    assert same == loss
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    finished, same = train_detector(examples, quiet(tmp_path / "whole"), patch=24, steps=8)
    assert same == loss
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), finished.parameters(), strict=True))


@pytest.mark.parametrize(("wanted", "steps"), [(np.inf, 5), (-1.0, 16)])
def test_a_training_ends_when_five_epochs_reach_the_wanted_loss_or_after_twice_its_steps(wanted, steps):
    run = quiet()
    train_detector([spheres(0)[0]], run, patch=24, steps=8, until_loss=wanted)
    assert run.step_number == steps


def test_images_without_a_nodule_and_odd_patches_are_refused():
    with pytest.raises(HarmonictError, match="none in the 1 images"):
        PatchSource([Example(np.zeros((8, 8, 8)), np.zeros((0, 6)))])
    for patch in (16, 28):
        with pytest.raises(HarmonictError, match="multiple of 8 from 24 on"):
            NoduleDetector(patch=patch)
