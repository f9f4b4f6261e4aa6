"""The encoder-decoder: it learns to give every image back through its latent."""

import csv

import numpy as np
import pytest

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.data import pair_series
from harmonict.harmonizer import make_config
from harmonict.methods.encoder_decoder import Config, EncoderDecoderMethod
from harmonict.train import Run
from toy import toy_series

SHARP = toy_series(blur_mm=2.0, seed=3, slices=4, noise_hu=8, kernel="B70", size=64, pixel_mm=3.2)
SOFT = toy_series(blur_mm=4.0, seed=3, slices=4, noise_hu=8, kernel="B30", size=64, pixel_mm=3.2)
SMALL = {"feature_weights": "random:8", "feature_width": 8, "width": 8, "patch": 64, "batch": 2, "steps": 300}
SMALL |= {"rate": 5e-3, "rate_end": 0.05, "check_every": 300}


def fit(folder=None, **changes):
    config = make_config(Config, {**SMALL, **changes})
    return EncoderDecoderMethod(config).fit(pair_series([SOFT], [SHARP]), Run(folder, say=lambda line: None))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent") / "run"
    return fit(folder), folder


def test_it_drives_its_loss_on_eight_slices_under_a_tenth_of_its_start(fitted):
    with (fitted[1] / "log.csv").open() as stream:
        losses = [float(row[3]) for row in csv.reader(stream) if row[2] == "L2"]
    assert len(losses) == SMALL["steps"] and np.mean(losses[-20:]) < 0.1 * np.mean(losses[:5])


def test_it_gives_an_image_of_either_protocol_back_and_draws_no_target(fitted):
    for series in (SOFT, SHARP):
        made = fitted[0].harmonize(series).hu
        assert np.square(made - series.hu).mean() < 0.1 * series.hu.var()


def test_a_slice_of_any_size_is_rebuilt(fitted):
    odd = toy_series(slices=1, size=101, kernel="B30")
    assert fitted[0].harmonize(odd).hu.shape == (1, 101, 101)


def test_the_papers_size_does_a_step_and_a_slice():
    model = fit(feature_weights="random:64", feature_width=64, width=32, patch=64, batch=1, steps=1)
    assert model.harmonize(SOFT).hu.shape == SOFT.hu.shape
    assert make_config(Config, EncoderDecoderMethod.sizes["paper"]) == Config()
    assert EncoderDecoderMethod(make_config(Config, EncoderDecoderMethod.sizes["compact"])).config.patch == 128


def test_what_cannot_be_is_refused(fitted):
    with pytest.raises(HarmonictError, match="no weights yet"):
        EncoderDecoderMethod().harmonize(SOFT)
    with pytest.raises(HarmonictError, match="fitted for B70, not for B50"):
        fitted[0].harmonize(SOFT, ScanProtocol(kernel="B50"))
    with pytest.raises(HarmonictError, match="multiple of 32 pixels, got 100"):
        make_config(Config, {"patch": 100})
    with pytest.raises(HarmonictError, match="have 4 channels, feature_width is 8"):
        fit(feature_weights="random:4", steps=1)
