"""GANai: it learns, it is the paper's, resumes to the last bit, and refuses what it was not trained for."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.data import pair_series
from harmonict.harmonizer import make_config
from harmonict.methods import load_model
from harmonict.methods.ganai import Config, GANai, generator
from harmonict.train import Run
from test_train import Killed
from toy import toy_series

SHARP = toy_series(blur_mm=0.8, seed=3, slices=8, noise_hu=20, kernel="B70", size=192)
SOFT = toy_series(blur_mm=1.2, seed=3, slices=8, noise_hu=20, kernel="B30", size=192)
TINY = {"layers": 2, "width": 8, "discriminator_width": 8, "residual": True, "upsampling": "resize", "patch": 64}
SMALL = {**TINY, "batch": 2, "steps": 240, "rate": 3e-3, "t_max": 10, "check_every": 120, "discriminators": 1}


def fit(source, target, folder=None, **changes):
    run = Run(folder, say=lambda line: None, save_every_s=0 if folder and "die_at" in changes else 60)
    die_at = changes.pop("die_at", None)
    if die_at is not None:
        log = run.log

        def dying(name, value):
            if run.step_number == die_at:
                raise Killed
            log(name, value)

        run.log = dying
    return GANai(make_config(Config, {**SMALL, **changes})).fit(pair_series([source], [target]), run)


def losses(folder, name):
    with (folder / "log.csv").open() as stream:
        return [float(row[3]) for row in csv.reader(stream) if row[2] == name]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ganai") / "run"
    return fit(SHARP, SOFT, folder), folder


def test_both_sides_learn_in_turns(fitted):
    _, folder = fitted
    phases = losses(folder, "phase")
    assert phases[0] == 0 and phases[-1] > 4 and sorted(phases) == phases
    assert len(losses(folder, "adversarial G")) + len(losses(folder, "adversarial D")) == SMALL["steps"]
    assert len(losses(folder, "L1")) == len(losses(folder, "adversarial G"))


def test_what_it_makes_is_nearer_to_the_target_than_the_source(fitted):
    inside = np.hypot(*(np.mgrid[:192, :192] - 95.5)) < 60
    error = [np.square(s.hu - SOFT.hu)[:, inside].mean() for s in (SHARP, fitted[0].harmonize(SHARP))]
    assert error[1] < 0.5 * error[0]


def test_without_an_adversary_it_drives_the_pixel_loss_on_eight_slices_under_a_tenth_of_its_start(tmp_path):
    """Not as a residual, whose start is good already."""
    options = {
        "residual": False,
        "adversarial": 0,
        "fake_below": 0.55,
        "real_above": 0.6,
        "t_max": 40,
    }  # D is soon content
    fit(SHARP, SOFT, tmp_path / "run", **options, steps=240)
    pixel = losses(tmp_path / "run", "L1")
    assert np.mean(pixel[-10:]) < 0.1 * pixel[0]


def test_the_network_that_is_kept_is_the_leading_copy_and_d_is_not_saved(tmp_path):
    model = fit(SHARP, SOFT, steps=12, generators=2, discriminators=2, t_max=3)
    model.save(tmp_path / "model")
    back = load_model(tmp_path / "model")
    assert back.digest == model.digest and not any("discriminator" in key for key in back.state_dict())
    assert sum(p.numel() for p in back.parameters()) == sum(p.numel() for p in generator(model.config).parameters())


def test_a_killed_fit_goes_on_to_the_last_bit(tmp_path):
    options = {"steps": 14, "t_max": 3, "generators": 2, "check_every": 5}
    whole = fit(SHARP, SOFT, tmp_path / "whole", **options)
    with pytest.raises(Killed):
        fit(SHARP, SOFT, tmp_path / "killed", die_at=9, **options)
    assert fit(SHARP, SOFT, tmp_path / "killed", **options).digest == whole.digest
    assert losses(tmp_path / "killed", "score G") == losses(tmp_path / "whole", "score G")


@pytest.mark.parametrize("size", [(96, 96), (97, 121)])
def test_every_image_size_is_taken_and_keeps_its_shape(fitted, size):
    series = replace(SHARP, hu=SHARP.hu[:1, : size[0], : size[1]])
    assert fitted[0].harmonize(series).hu.shape == (1, *size)


def test_the_papers_size_has_its_parameters_and_does_a_step_and_a_slice():
    source, target = (toy_series(blur_mm=b, slices=1, size=256, kernel=k) for b, k in ((0.8, "B70"), (1.2, "B30")))
    config = make_config(Config, {"batch": 1, "steps": 1, "generators": 1, "discriminators": 1})
    model = GANai(config).fit(pair_series([source], [target]), Run(say=lambda line: None))
    assert sum(p.numel() for p in model.parameters()) == 54_403_457
    assert model.harmonize(source).hu.shape == (1, 256, 256)


def test_it_trains_by_windows_and_goes_on_with_its_phases(tmp_path):
    fit(SHARP, SOFT, tmp_path / "run", steps=60, window="both", t_max=4, batch=1)
    phases = losses(tmp_path / "run", "phase")
    assert len(phases) == 60 and sorted(phases) == phases and phases[-1] > 5
    assert losses(tmp_path / "run", "window high HU")


def test_compact_is_a_narrow_network_of_the_same_layers():
    assert make_config(Config, GANai.sizes["paper"]) == Config()
    compact = make_config(Config, GANai.sizes["compact"])
    assert (compact.layers, compact.patch) == (Config().layers, Config().patch)
    assert sum(p.numel() for p in GANai(compact).parameters()) < 4e6


def test_what_it_cannot_do_is_refused():
    with pytest.raises(HarmonictError, match="no weights yet"):
        GANai().harmonize(SHARP)
    model = fit(SHARP, SOFT, steps=1)
    with pytest.raises(HarmonictError, match="fitted for B30, not for B50"):
        model.harmonize(SHARP, ScanProtocol(kernel="B50"))
    for wrong in ({"patch": 100}, {"generators": 0}, {"t_max": 0}, {"fake_below": 0.995}, {"rate": 0}):
        with pytest.raises(HarmonictError, match=f"{next(iter(wrong))}|1 copy"):
            make_config(Config, wrong)
