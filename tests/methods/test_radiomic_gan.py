"""RadiomicGAN: the paper's layers, a frozen encoder, an image that stays where it is, and windows that D chooses."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.data import pair_series
from harmonict.harmonizer import make_config
from harmonict.methods import load_model
from harmonict.methods.radiomic_gan import GROUPS, Config, Conv4, Generator, RadiomicGAN, discriminator
from harmonict.nn.vgg import vgg19
from harmonict.train import Run
from toy import toy_series

SHARP = toy_series(blur_mm=0.8, seed=3, slices=8, noise_hu=20, kernel="B70", size=96, pixel_mm=2.4)
SOFT = toy_series(blur_mm=2.4, seed=3, slices=8, noise_hu=20, kernel="B30", size=96, pixel_mm=2.4)
SMALL = {
    "feature_weights": "random:8",
    "feature_width": 8,
    "width": 8,
    "critic_width": 4,
    "patch": 48,
    "batch": 4,
    "steps": 150,
    "rate": 3e-3,
    "l1": 100,
    "check_every": 100,
    "window": "none",
}


def fit(folder=None, source=SHARP, target=SOFT, **changes):
    config = make_config(Config, {**SMALL, **changes})
    return RadiomicGAN(config).fit(pair_series([source], [target]), Run(folder, say=lambda line: None))


def log(folder, name):
    with (folder / "log.csv").open() as stream:
        return [float(row[3]) for row in csv.reader(stream) if row[2] == name]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The paper's G, which draws the image itself, on whole slices."""
    folder = tmp_path_factory.mktemp("radiomic-gan") / "run"
    return fit(folder, patch=None, batch=2, steps=120, rate=2e-3), folder


def test_it_drives_its_pixel_loss_on_eight_slices_under_a_tenth_of_its_start(fitted):
    losses = log(fitted[1], "L1")
    assert len(losses) == 120
    assert np.mean(losses[-20:]) < 0.1 * np.mean(losses[:5])


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("radiomic-gan") / "run"
    return fit(folder, residual=True), folder


def test_a_residual_starts_from_the_source_and_comes_nearer_to_the_target(residual):
    model, folder = residual
    start = np.abs(SHARP.hu - SOFT.hu)[:, 24:72, 24:72].mean()
    assert 0.5 * start < log(folder, "L1")[0] * 1012 < 2 * start
    errors = [np.square(image - SOFT.hu).mean() for image in (SHARP.hu, model.harmonize(SHARP).hu)]
    assert errors[1] < 0.25 * errors[0]


def test_the_frozen_groups_are_the_feature_networks_after_the_training_too(fitted):
    expected = vgg19("random:8").groups()[:GROUPS]
    got = fitted[0].network.encoder
    for a, b in zip(got.parameters(), nn.ModuleList(expected).parameters(), strict=True):
        assert torch.equal(a, b)
    with Run().seeded():
        start = Generator(fitted[0].config)
    for a, b in zip(fitted[0].network.filters.parameters(), start.filters.parameters(), strict=True):
        assert a.ndim == 1 or not torch.equal(a, b)


def test_the_image_stays_where_it_is(residual):
    """The centroid of what a blob adds to the image."""
    flat = replace(SOFT, hu=np.full((2, 96, 96), 40, np.float32), padding=None)
    y, x = np.mgrid[:96, :96]
    blob = 150 * np.exp(-((y - 50) ** 2 + (x - 41) ** 2) / (2 * 2.0**2))
    hu = flat.hu.copy()
    hu[1] += blob
    made = residual[0].harmonize(replace(flat, hu=hu)).hu
    added = (made[1] - made[0])[38:63, 29:54]
    centre = [(added * axis[38:63, 29:54]).sum() / added.sum() for axis in (y, x)]
    assert np.allclose(centre, (50, 41), atol=0.05)


def test_a_4x4_convolution_with_equal_weights_is_centred():
    layer = Conv4(1, 8)
    nn.init.constant_(layer.weight, 1.0)
    nn.init.zeros_(layer.bias)
    point = torch.zeros(1, 1, 21, 21)
    point[0, 0, 10, 10] = 1
    answer = layer(point).detach()
    assert answer.shape == (1, 8, 21, 21)
    sums = answer.sum((0, 1))
    axis = torch.arange(21.0)
    assert float((sums.sum(1) * axis).sum() / sums.sum()) == pytest.approx(10, abs=1e-5)
    assert float((sums.sum(0) * axis).sum() / sums.sum()) == pytest.approx(10, abs=1e-5)


def test_with_equal_weights_everywhere_the_network_is_centred():
    """Pooling draws a point to the middle of its 8 pixels; over all 8 places of a point in them nothing moves."""
    network = Generator(make_config(Config, {**SMALL, "feature_width": 2, "width": 2})).eval()
    for name, value in network.named_parameters():
        nn.init.constant_(value, 1 / value[0].numel() if name.endswith("weight") and value.ndim == 4 else 0)
    for block in network.filters:
        nn.init.ones_(block[1].weight)
    axis, moved = torch.arange(128.0), []
    with torch.inference_mode():
        dark = torch.full((1, 1, 128, 128), 1000.0)
        for place in range(60, 68):
            image = dark.clone()
            image[0, 0, place, place] = 3000
            added = (network(image) - network(dark))[0, 0].double()
            moved.append([float((added.sum(d) * axis).sum() / added.sum()) - place for d in (0, 1)])
    assert np.allclose(np.mean(moved, axis=0), 0, atol=0.01)


def test_the_papers_size_has_its_layers_and_parameters():
    model = RadiomicGAN()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 26 + 1  # hidden layers, and the last
    assert [m.kernel_size for m in convolutions if not isinstance(m, Conv4)] == [(3, 3)] * 13
    vgg = sum(a * b * 9 + b for a, b in [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), *[(256, 256)] * 3])
    vgg += sum(a * b * 9 + b for a, b in [(256, 512), *[(512, 512)] * 3])
    filters = sum(c * c * 16 + c + 2 * c for c in (64, 128, 256, 512))
    decoder = 512 * 512 * 16 + 512 + sum(5 * c * c * 16 + 3 * c for c in (64, 128, 256))
    assert sum(p.numel() for p in model.parameters()) == vgg + filters + decoder + 64 * 3 * 9 + 3 == 27_237_763
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == vgg
    critic = discriminator(64)
    assert sum(isinstance(m, nn.Conv2d) for m in critic.modules()) == 6
    assert critic(torch.zeros(1, 1, 96, 96))[-1].shape == (1, 2, 4, 4)


def test_the_papers_size_does_a_step_and_a_slice():
    model = fit(feature_weights="random:64", feature_width=64, width=64, critic_width=64, batch=1, steps=1, l1=0)
    one = replace(SHARP, hu=SHARP.hu[:1, :48, :48], padding=None)
    assert model.harmonize(one).hu.shape == (1, 48, 48)


def test_both_sizes_are_settings_of_its_config():
    assert make_config(Config, RadiomicGAN.sizes["paper"]) == Config()
    compact = make_config(Config, RadiomicGAN.sizes["compact"])
    assert vgg19(compact.feature_weights).width == compact.feature_width


def test_a_slice_of_any_size_is_translated(fitted):
    odd = replace(SHARP, hu=SHARP.hu[:1, :90, :77], padding=None)
    assert fitted[0].harmonize(odd).hu.shape == (1, 90, 77)


def test_outside_of_its_range_the_source_stays(fitted):
    hu = SHARP.hu[:1].copy()
    hu[0, 40, 40], hu[0, 41, 41] = 2500, -1030
    made = fitted[0].harmonize(replace(SHARP, hu=hu)).hu
    assert made[0, 40, 40] == 2500 and made[0, 41, 41] == -1030
    assert made[0, 60, 40] != hu[0, 60, 40]


@pytest.mark.parametrize("window", ["growing", "dynamic", "both"])
def test_windows_grow_and_are_chosen_by_the_discriminator_within_the_steps(window, tmp_path):
    fit(tmp_path / "run", window=window, steps=30, l1=0, feature_weights="random:4", feature_width=4, width=4)
    low, high = log(tmp_path / "run", "window low HU"), log(tmp_path / "run", "window high HU")
    assert len(log(tmp_path / "run", "adversarial G")) == 30
    assert not log(tmp_path / "run", "window critic")  # it has a discriminator of its own
    if window in ("growing", "both"):
        assert high[:7] == [-768, -512, -256, 0, 256, 512, 768]
    if window in ("dynamic", "both"):
        assert (low[11], high[11]) == (-1024, 1000)
        chosen = list(zip(low[12:], high[12:], strict=True))
        assert chosen and all(-1024 <= a < b <= 1000 and (a, b) != (-1024, 1000) for a, b in chosen)


def test_save_and_load_needs_no_other_file(fitted, tmp_path, monkeypatch):
    fitted[0].save(tmp_path / "model")
    monkeypatch.setattr("harmonict.methods.radiomic_gan.vgg19", None)
    assert np.array_equal(load_model(tmp_path / "model").harmonize(SHARP).hu, fitted[0].harmonize(SHARP).hu)


def test_what_it_was_not_fitted_for_is_refused(fitted):
    with pytest.raises(HarmonictError, match="no weights yet"):
        RadiomicGAN(make_config(Config, SMALL)).harmonize(SHARP)
    with pytest.raises(HarmonictError, match="fitted for B30, not for B50"):
        fitted[0].harmonize(SHARP, ScanProtocol(kernel="B50"))
    with pytest.raises(HarmonictError, match="multiple of 8 and at least 48"):
        make_config(Config, {"patch": "44"})
    with pytest.raises(HarmonictError, match="set feature_width=8"):
        fit(feature_width=32)
