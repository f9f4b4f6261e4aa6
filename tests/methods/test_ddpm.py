"""DDPM in image space: it learns, it samples texture, and tiles, sizes and bad input are what they should be."""

import csv
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.data import pair_series
from harmonict.harmonizer import make_config
from harmonict.methods.ddpm import DDPM, Config
from harmonict.train import Run
from toy import toy_series

SHARP = toy_series(blur_mm=0.8, seed=3, slices=8, noise_hu=20, kernel="B70", size=160)
SOFT = toy_series(blur_mm=1.2, seed=3, slices=8, noise_hu=20, kernel="B30", size=160)
ONE = replace(SOFT, hu=SOFT.hu[:1])
SMALL = {"widths": (12, 24), "blocks": 1, "residual": True, "predicts": "velocity", "patch": 48, "batch": 4}
SMALL |= {"steps": 600, "rate": 3e-3, "rate_end": 0.1, "check_every": 600, "steps_sampled": 8, "sampler": "dpm"}


def fit(source, target, folder=None, **changes):
    config = make_config(Config, {**SMALL, **changes})
    return DDPM(config).fit(pair_series([source], [target]), Run(folder, say=lambda line: None))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddpm") / "run"
    return fit(SOFT, SHARP, folder), folder


def test_its_loss_falls_and_what_it_draws_is_nearer_to_the_target_than_the_source(fitted):
    model, folder = fitted
    with (folder / "log.csv").open() as stream:
        losses = [float(row[3]) for row in csv.reader(stream) if row[2] == "diffusion"]
    assert len(losses) == SMALL["steps"] and np.mean(losses[-20:]) < 0.4 * np.mean(losses[:5])
    inside = np.hypot(*(np.mgrid[:160, :160] - 79.5)) < 60
    made = model.harmonize(SOFT).hu
    errors = [np.square(hu - SHARP.hu)[:, inside].mean() for hu in (SOFT.hu, made)]
    assert errors[1] < 0.3 * errors[0]
    assert abs((made - SHARP.hu)[:, inside].mean()) < 3  # no bias


def test_what_it_draws_of_eight_slices_comes_under_a_tenth_of_its_first_squared_error(fitted):
    """Its own loss is of noise, of which no network can know all; an image that is drawn can be right."""
    first, last = (model.harmonize(SOFT).hu for model in (fit(SOFT, SHARP, steps=1), fitted[0]))
    errors = [np.square(hu - SHARP.hu).mean() for hu in (first, last)]
    assert errors[1] < 0.1 * errors[0]


def test_another_number_of_steps_or_sampler_draws_another_sample_of_the_same(fitted):
    model, _ = fitted
    made = {}
    before = model.config
    for sampler, steps in (("dpm", 8), ("ddim", 20), ("ddpm", 50)):
        model.adjust({"sampler": sampler, "steps_sampled": steps})
        made[sampler] = model.harmonize(ONE).hu[0]
    model.config = before
    assert not np.array_equal(made["dpm"], made["ddim"])
    for hu in made.values():
        assert np.abs(hu - made["dpm"]).mean() < np.abs(SOFT.hu[0] - SHARP.hu[0]).mean()


def test_tiles_agree_with_the_whole_slice(fitted):
    """A machine with little memory draws the same image but for what a tile cannot see beyond its edge."""
    model, _ = fitted

    class Tiled(DDPM):
        tile = 96

    tiled = Tiled(model.config, target=model.target)
    tiled.pixel_mm, tiled.scale = model.pixel_mm, model.scale
    tiled.load_state_dict(model.state_dict())
    difference = tiled.eval().harmonize(ONE).hu - model.harmonize(ONE).hu
    spread = model.spread(ONE).hu
    assert np.abs(difference).mean() < 0.1 * spread.mean()


def test_a_slice_whose_sides_no_stride_divides_is_drawn(fitted):
    odd = toy_series(blur_mm=1.2, seed=3, slices=1, kernel="B30", size=101)
    assert fitted[0].harmonize(odd).hu.shape == (1, 101, 101)


def test_the_papers_size_has_its_parameters_and_does_a_step_and_a_slice():
    w = (128, 256, 256, 256)
    conv = lambda a, b, k=9: a * b * k + b  # noqa: E731
    block = lambda a, b: conv(a, b) + conv(b, b) + conv(512, 2 * b, 1) + (a != b) * conv(a, b, 1)  # noqa: E731
    levels = sum(2 * block(a, a) for a in w) + sum(block(2 * a, a) + block(a, a) for a in w[:-1])
    ways = sum(conv(a, b) + conv(b, a) for a, b in pairwise(w))
    ends = conv(3, 128) + conv(128, 1) + conv(128, 512, 1) + conv(512, 512, 1)
    assert sum(p.numel() for p in DDPM().parameters()) == levels + ways + ends == 21_040_769
    model = fit(
        SOFT,
        SHARP,
        **{
            **DDPM.sizes["paper"],
            "widths": Config.widths,
            "blocks": 2,
            "patch": 32,
            "batch": 1,
            "steps": 1,
            "steps_sampled": 1,
        },
    )
    tiny = toy_series(slices=1, size=64, kernel="B30")
    assert model.harmonize(tiny).hu.shape == (1, 64, 64)


def test_both_sizes_are_settings_of_its_config():
    assert make_config(Config, DDPM.sizes["paper"]) == Config()
    assert make_config(Config, DDPM.sizes["compact"]).sampler == "dpm"


def test_what_it_was_not_fitted_for_is_refused(fitted):
    with pytest.raises(HarmonictError, match="no weights yet"):
        DDPM().harmonize(SOFT)
    with pytest.raises(HarmonictError, match="fitted for B70, not for B50"):
        fitted[0].harmonize(SOFT, ScanProtocol(kernel="B50"))
    for settings, words in (({"steps_sampled": 0}, "at least 1, got 0"), ({"patch": 33}, "multiple of 8")):
        with pytest.raises(HarmonictError, match=words):
            make_config(Config, settings)


def test_without_memory_for_a_slice_it_draws_tiles_and_says_so(fitted, monkeypatch):
    model, _ = fitted
    draw = DDPM.draw

    def short(self, x, *rest):
        if x.shape[-1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(self, x, *rest)

    monkeypatch.setattr(DDPM, "draw", short)
    qc = {}
    assert np.isfinite(model.harmonize(ONE, qc=qc).hu).all()
    assert "translated in blended tiles of 80 pixels" in qc["notes"][0]
