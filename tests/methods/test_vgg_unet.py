"""The ablation: the paper's size, the same training as `physics`, and it learns."""

import csv
from dataclasses import fields, replace

import numpy as np
import pytest

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.data import pair_series
from harmonict.harmonizer import make_config
from harmonict.methods.physics import Physics
from harmonict.methods.vgg_unet import Config, VGGUNetAblation
from harmonict.nn.physics_losses import Training
from harmonict.train import Run
from toy import toy_series

SIZE = {"slices": 8, "size": 128, "pixel_mm": 2.4}
SOURCE = toy_series(blur_mm=2.0, seed=3, noise_hu=10, kernel="Br32", **SIZE)
TARGET = toy_series(blur_mm=2.8, seed=3, noise_hu=1e-3, kernel="Br20", **SIZE)
SMALL = {
    "feature_weights": "random:4",
    "feature_width": 4,
    "depth": 2,
    "decoder": "16,16",
    "critic_width": 4,
    "patch": 64,
    "batch": 4,
    "affine": 0,
    "noise_hu": 0,
    "jitter": 0,
    "steps": 250,
    "cycle": 250,
    "check_every": 250,
    "rate_peak": 6e-3,
}


def fit(folder=None, **changes):
    config = make_config(Config, {**SMALL, **changes})
    return VGGUNetAblation(config).fit(pair_series([SOURCE], [TARGET]), Run(folder, say=lambda line: None))


def test_it_drives_its_pixel_loss_on_eight_slices_under_a_tenth_of_its_start(tmp_path):
    fit(tmp_path / "run", adversarial=0, texture=0)
    with (tmp_path / "run" / "log.csv").open() as stream:
        losses = [float(row[3]) for row in csv.reader(stream) if row[2] == "L_d"]
    assert len(losses) == SMALL["steps"]
    assert np.mean(losses[-10:]) < 0.1 * np.mean(losses[:5])


def test_losses_schedule_and_augmentation_are_those_of_physics():
    for size in ("paper", "compact"):
        ours, theirs = (make_config(kind.Config, kind.sizes[size]) for kind in (VGGUNetAblation, Physics))
        for field in fields(Training):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_the_papers_size_has_its_29_million_parameters_and_does_a_step_and_a_slice():
    assert sum(p.numel() for p in VGGUNetAblation().network.parameters()) == 29_065_137
    config = make_config(Config, {"feature_weights": "random:64", "patch": 32, "batch": 1, "steps": 1})
    model = VGGUNetAblation(config).fit(pair_series([SOURCE], [TARGET]), Run(None, say=lambda line: None))
    assert model.harmonize(replace(SOURCE, hu=SOURCE.hu[:1])).hu.shape == (1, 128, 128)


def test_both_compact_sizes_are_about_as_large():
    counts = [
        sum(p.numel() for p in kind(make_config(kind.Config, kind.sizes["compact"])).network.parameters())
        for kind in (VGGUNetAblation, Physics)
    ]
    assert 0.7 < counts[0] / counts[1] < 1.5


def test_what_it_was_not_fitted_for_is_refused():
    with pytest.raises(HarmonictError, match="no weights yet"):
        VGGUNetAblation(make_config(Config, SMALL)).harmonize(SOURCE)
    with pytest.raises(HarmonictError, match="not for B50"):
        fit(steps=1).harmonize(SOURCE, ScanProtocol(kernel="B50"))
