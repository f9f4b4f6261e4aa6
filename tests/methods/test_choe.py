"""Choe's residual network: it learns, it is the paper's, and it refuses what it was not trained for."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from harmonict.core import Geometry, HarmonictError, ScanProtocol
from harmonict.data import pair_series
from harmonict.harmonizer import CARD_FILE, CARD_PAGE, make_config
from harmonict.methods import load_model
from harmonict.methods.choe import Choe, Config, ResidualCNN
from harmonict.train import Run
from toy import toy_series

SHARP = toy_series(blur_mm=0.8, seed=3, slices=8, noise_hu=20, kernel="B70", size=192)
SOFT = toy_series(blur_mm=1.2, seed=3, slices=8, noise_hu=20, kernel="B30", size=192)
TRUTH = toy_series(blur_mm=1.2, seed=3, slices=8, noise_hu=0, size=192)
SMALL = {"layers": 4, "channels": 16, "patch": 64, "batch": 4, "steps": 250, "rate": 3e-3, "check_every": 125}


def fit(source, target, folder=None, **changes):
    config = make_config(Config, {**SMALL, **changes})
    run = Run(folder, say=lambda line: None)
    return Choe(config).fit(pair_series([source], [target]), run)


@pytest.fixture(scope="module", params=["sharp to soft", "soft to sharp"])
def fitted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("choe") / "run"
    source, target = (SHARP, SOFT) if request.param == "sharp to soft" else (SOFT, SHARP)
    return fit(source, target, folder), source, target, folder


def test_it_drives_its_loss_on_eight_slices_under_a_tenth_of_its_start(fitted):
    with (fitted[3] / "log.csv").open() as stream:
        losses = [float(row[3]) for row in csv.reader(stream) if row[2] == "L2"]
    assert len(losses) == SMALL["steps"]
    assert np.mean(losses[-20:]) < 0.1 * np.mean(losses[:5])


def test_what_it_makes_is_nearer_to_the_target_than_the_source(fitted):
    model, source, target, _ = fitted
    inside = np.hypot(*(np.mgrid[:192, :192] - 95.5)) < 60
    error = [np.square(s.hu - target.hu)[:, inside].mean() for s in (source, model.harmonize(source))]
    assert error[1] < 0.5 * error[0]
    assert abs((model.harmonize(source).hu - target.hu)[:, inside].mean()) < 1  # no bias


def test_bf16_inside_costs_under_half_a_hu(fitted):
    """Training may compute in bf16 because the residual, not the image, goes through it; images are made in float32."""
    model, source, _, _ = fitted
    x = torch.from_numpy(source.hu[:2, None])
    with torch.inference_mode():
        exact = model._convert(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model._convert(x)
    difference = rough - exact
    assert exact.dtype == rough.dtype == torch.float32
    print(f"bf16 - float32: SD {difference.std():.3f} HU, largest {difference.abs().max():.2f} HU")
    assert 0 < difference.std() < 0.5 and difference.abs().max() < 5


@pytest.mark.parametrize("window", ["growing", "both"])
def test_window_training_takes_as_many_steps_and_ends_valid_on_the_whole_range(window, tmp_path):
    """Every tissue is nearer to the target than the source was, those that no early window showed too."""
    model = fit(SHARP, SOFT, tmp_path / "run", window=window)
    with (tmp_path / "run" / "log.csv").open() as stream:
        names = [row[2] for row in csv.reader(stream)]
    assert names.count("L2") == SMALL["steps"] and "window high HU" in names
    made = model.harmonize(SHARP).hu
    for low, high in ((-900, -800), (0, 80), (350, 450)):
        inside = (TRUTH.hu > low) & (TRUTH.hu < high)
        errors = [np.square(image - SOFT.hu)[inside].mean() for image in (SHARP.hu, made)]
        assert errors[1] < 0.8 * errors[0]


def test_the_number_of_threads_changes_no_bit(fitted):
    model, source, _, _ = fitted
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(model.harmonize(source).hu)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(*results)


def test_an_untrained_network_changes_nothing():
    network = ResidualCNN(Config(channels=4))
    assert not network(torch.randn(1, 1, 16, 16)).any()


def test_the_papers_size_has_its_parameters_and_does_a_step_and_a_slice():
    weights = [(64, 1), (64, 64), (64, 64), (64, 64), (64, 64), (1, 64)]
    assert sum(p.numel() for p in Choe().parameters()) == sum(a * b * 9 + a for a, b in weights) == 148_929
    model = fit(SHARP, SOFT, layers=6, channels=64, patch=None, batch=1, steps=1)
    assert model.harmonize(replace(SHARP, hu=SHARP.hu[:1])).hu.shape == (1, 192, 192)


def test_both_sizes_are_settings_of_its_config():
    assert make_config(Config, Choe.sizes["paper"]) == Config()
    compact = Choe(make_config(Config, Choe.sizes["compact"]))
    assert sum(p.numel() for p in compact.parameters()) == 32 * 25 + 32 + 4 * (32 * 32 * 25 + 32) + 32 * 25 + 1


def test_the_model_card_says_data_protocols_training_and_limits(fitted, tmp_path):
    model = fitted[0]
    model.save(tmp_path / "model")
    page, card = (tmp_path / "model" / CARD_PAGE).read_text(), json.loads((tmp_path / "model" / CARD_FILE).read_text())
    source, target = fitted[1].protocol.kernel, fitted[2].protocol.kernel
    for words in (f"{source} -> {target}: 8 slices", "8 slices of 1 patients", "trained for 250 of 250", "too smooth"):
        assert words in page
    assert "no patients were held out" in page
    assert card["protocol_pairs"] == [{"source": source, "target": target, "slice_pairs": 8}]
    back = load_model(tmp_path / "model")
    assert back.card == model.card and back.digest == model.digest
    back.card = {}
    assert back.digest == model.digest  # what is said of a model does not change what it does


def test_other_pixels_than_those_of_the_training_are_said():
    model = fit(SHARP, SOFT, steps=1)
    wide = replace(SHARP, geometry=Geometry((0.0, 0.0, 0.0), (3.0, 1.5, 1.5)))
    assert model.describe(SHARP).outside == () and "trained on pixels of 1.2 mm" in model.describe(wide).outside[0]


def test_what_it_was_not_fitted_for_is_refused():
    with pytest.raises(HarmonictError, match="no weights yet"):
        Choe().harmonize(SHARP)
    model = fit(SHARP, SOFT, steps=1)
    with pytest.raises(HarmonictError, match="fitted for B30, not for B50"):
        model.harmonize(SHARP, ScanProtocol(kernel="B50"))
    with pytest.raises(HarmonictError, match="odd kernel"):
        make_config(Config, {"kernel": "4"})
