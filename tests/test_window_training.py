"""Window training: Algorithm 1, on a toy method of one number and on Grad-CAM's own terms."""

import csv
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from harmonict.core import HarmonictError
from harmonict.data import pair_series
from harmonict.train import Run
from harmonict.window_training import WindowSettings, failed_hu, grad_cam, window_batches
from toy import toy_series

SOURCE = toy_series(blur_mm=1.2, noise_hu=3, slices=2, size=96, pixel_mm=3, seed=1)
TARGET = SOURCE.with_hu(SOURCE.hu + 30)
PAIRS = pair_series([SOURCE], [TARGET])
STEPS = 90  # three an epoch


class Shift(nn.Module):
    """x -> x + 100 * shift; D's score is of the mean, its map the image itself."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([shift]))

    def forward(self, batch):
        return batch.source + 100 * self.shift


def bright_is_fake(batch, image):
    features = torch.relu((image + 1024) / 1000)
    return features.mean((1, 2, 3)), features


def train(
    kind, folder=None, *, stop_at=None, shift=0.0, rate=0.0, score=None, steps=STEPS, save_every_s=60, **settings
):
    """(HU range of each batch, its window) and the network, of a whole training or up to a kill."""
    run = Run(folder, save_every_s=save_every_s, say=lambda line: None)
    network = Shift(shift)
    adam = torch.optim.Adam(network.parameters(), lr=rate)
    window = WindowSettings(kind, **settings)
    seen = []
    for batch in window_batches(
        run, PAIRS, window, output=network, steps=steps, size=2, patch=32, score=score, network=network, adam=adam
    ):
        seen.append((float(batch.source.min()), float(batch.source.max()), float(batch.target.max())))
        run.step({"L1": (1.0, (network(batch) - batch.target).abs().mean())}, adam)
        if len(seen) == stop_at:
            break
    return seen, network, run


def log(folder, name):
    with (folder / "log.csv").open() as stream:
        return [float(row[3]) for row in csv.reader(stream) if row[2] == name]


def test_without_a_window_the_batches_are_those_of_the_run():
    run, seen = Run(), []
    for batch in run.batches(PAIRS, size=2, patch=32, steps=STEPS):
        seen.append((float(batch.source.min()), float(batch.source.max()), float(batch.target.max())))
    assert train("none")[0] == seen


def test_the_window_grows_by_256_hu_an_epoch_and_the_rest_of_the_budget_is_the_whole_range(tmp_path):
    seen, _, _ = train("growing", tmp_path / "run", shift=3.0)
    assert log(tmp_path / "run", "window high HU") == [-768, -512, -256, 0, 256, 512, 768]
    assert log(tmp_path / "run", "window low HU") == [-1024] * 7
    assert len(seen) == STEPS
    for n, (_, source, target) in enumerate(seen[:21]):
        assert max(source, target) <= -768 + 256 * (n // 3)
    assert max(target for _, _, target in seen[21:]) > 400


def test_a_window_that_is_learned_grows_at_once_and_one_that_is_not_waits(tmp_path):
    """Two epochs a window at most; 100 HU of error in it are no accuracy, 30 HU are where 40 are allowed."""
    common = {"epochs": 2, "last_share": 0.5}
    train("growing", tmp_path / "wrong", shift=1.3, **common)
    assert log(tmp_path / "wrong", "window high HU") == [h for h in range(-768, 1000, 256) for _ in (1, 2)]
    assert max(log(tmp_path / "wrong", "window accuracy")) < 0.2
    train("growing", tmp_path / "right", shift=0.3, **common)
    assert log(tmp_path / "right", "window high HU") == list(range(-768, 1000, 256))
    assert min(log(tmp_path / "right", "window accuracy")) > 0.9


@pytest.mark.parametrize(("kind", "kill"), [("growing", 20), ("dynamic", 43), ("both", 70)])
def test_a_killed_training_goes_on_to_the_same_weights_and_windows(kind, kill, tmp_path):
    whole, network, _ = train(kind, tmp_path / "whole", rate=1e-2)
    train(kind, tmp_path / "killed", stop_at=kill, save_every_s=0, rate=1e-2)
    rest, again, _ = train(kind, tmp_path / "killed", rate=1e-2)
    assert rest == whole[-len(rest) :] and STEPS - kill <= len(rest) <= STEPS - kill + 2
    assert torch.equal(again.shift, network.shift)
    for name in ("window high HU", "window low HU", "window critic"):
        assert log(tmp_path / "killed", name) == log(tmp_path / "whole", name)


def test_a_dynamic_window_is_where_the_discriminator_sees_the_fake(tmp_path):
    seen, _, _ = train("dynamic", tmp_path / "run", score=bright_is_fake, width_hu=1.0)
    low, high = log(tmp_path / "run", "window low HU"), log(tmp_path / "run", "window high HU")
    assert low[:12] == [-1024] * 12 and high[:12] == [1000] * 12  # top-down: first the whole range
    assert (
        len(low) == 18 and min(low[12:]) > -500 and max(high[12:]) < 600
    )  # six rounds; half of what soft tissue gives
    assert min(lowest for lowest, _, _ in seen[36:54]) >= min(low[12:])
    assert len(seen) == STEPS and min(lowest for lowest, _, _ in seen[54:]) < -900


def test_it_ends_early_where_the_window_is_narrow_and_the_budget_stays(tmp_path):
    seen, _, _ = train("dynamic", tmp_path / "run", score=bright_is_fake, width_hu=2000.0)
    assert log(tmp_path / "run", "window low HU") == [-1024] * 12
    assert len(seen) == STEPS


def test_both_grow_first_and_choose_then(tmp_path):
    train("both", tmp_path / "run", score=bright_is_fake, width_hu=1.0, shift=3.0)
    high = log(tmp_path / "run", "window high HU")
    assert high[:12] == [-768, -512, -256, 0, 256, 512, 768, *[1000] * 5] and len(high) == 18


def test_networks_are_back_in_training_after_a_look():
    network = nn.Sequential(nn.BatchNorm2d(1))
    adam = torch.optim.Adam(network.parameters())
    run = Run(say=lambda line: None)
    output = lambda batch: network(batch.source)  # noqa: E731
    means = []
    window = WindowSettings("both")
    for batch in window_batches(
        run, PAIRS, window, output=output, steps=30, size=1, patch=32, network=network, adam=adam
    ):
        assert network.training
        before = network[0].running_mean.clone()
        run.step({"L1": (1.0, output(batch).abs().mean())}, adam)
        means.append((before, network[0].running_mean.clone()))
    assert all(torch.equal(after, before) for (_, after), (before, _) in pairwise(means))


def test_grad_cam_of_a_linear_score_is_its_weighted_maps():
    """score = 2 a - b, mean over pixels, so the map is relu(2 a - b) over its largest value."""
    features = torch.randn(3, 2, 6, 6, requires_grad=True)
    weights = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1)
    cam = grad_cam((features * weights).mean((2, 3)).sum(1), features, (6, 6))
    expected = torch.relu((features * weights).sum(1, keepdim=True))
    assert torch.allclose(cam, expected / expected.amax((2, 3), keepdim=True), atol=1e-6)
    assert cam.amax((1, 2, 3)).tolist() == [1, 1, 1] and cam.min() == 0


def test_grad_cam_is_drawn_to_the_size_of_the_image_and_is_nothing_where_nothing_is_fake():
    features = torch.zeros(1, 1, 8, 8)
    features[0, 0, 2, 5] = 3
    features.requires_grad_()
    cam = grad_cam(features.sum((1, 2, 3)), features, (64, 64))[0, 0]
    assert cam.shape == (64, 64) and divmod(int(cam.argmax()), 64)[0] // 8 == 2 and int(cam.argmax()) % 64 // 8 == 5
    assert not grad_cam(-features.sum((1, 2, 3)), features, (8, 8)).any()


def test_intensities_that_failed_once_in_an_image_are_noise():
    hu = torch.tensor([[-900.2, -900.4, 40.0], [700.0, 41.0, 40.3]])
    everywhere = torch.ones(2, 3, dtype=torch.bool)
    assert failed_hu(hu, everywhere) == (-900, 40)
    assert failed_hu(hu, hu > 0) == (40, 40)
    assert failed_hu(hu, hu > 40.5) is None


def test_what_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match="leaves less than last_share"):
        WindowSettings("growing", epochs=4)
    with pytest.raises(ValueError, match="HU range"):
        WindowSettings("growing", step_hu=3000)
    with pytest.raises(HarmonictError, match="at least 30 steps"):
        train("growing", steps=29)
    assert np.isclose(WindowSettings("growing").first_epochs, 7)
