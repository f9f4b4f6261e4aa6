"""DiffusionCT: two loops, one model; its parts belong together, and latents that it does not know are told."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.data import pair_series
from harmonict.evaluate.benchmark_plan import load_plan
from harmonict.harmonizer import make_config
from harmonict.methods import diffusion_ct, load_model
from harmonict.methods.diffusion_ct import FURTHEST, SHARE, Config, DiffusionCT
from harmonict.nn.diffusion import Noise
from harmonict.simulate.trial import load_trial
from harmonict.train import Run
from toy import toy_series

SHARP = toy_series(blur_mm=2.0, seed=3, slices=8, noise_hu=8, kernel="B70", size=64, pixel_mm=3.2)
# darker by 60 HU: a change that passes through a small latent
SOFT = toy_series(blur_mm=4.0, seed=3, slices=8, noise_hu=8, kernel="B30", size=64, pixel_mm=3.2)
SOFT = SOFT.with_hu(SOFT.hu - 60)
SMALL = {"feature_weights": "random:8", "feature_width": 8, "width": 8, "patch": 64, "batch": 2, "steps": 300}
SMALL |= {"rate": 5e-3, "rate_end": 0.05, "check_every": 300, "widths": (128, 128), "blocks": 1, "batch_diffusion": 8}
SMALL |= {"steps_diffusion": 900, "rate_diffusion": 2e-3, "steps_sampled": 10, "sampler": "dpm"}


def fit(folder=None, **changes):
    config = make_config(Config, {**SMALL, **changes})
    return DiffusionCT(config).fit(pair_series([SOFT], [SHARP]), Run(folder, say=lambda line: None))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion") / "run"
    return fit(folder), folder


def test_two_loops_are_run_and_both_losses_fall(fitted):
    with (fitted[1] / "log.csv").open() as stream:
        rows = [(row[0], row[2], float(row[3])) for row in list(csv.reader(stream))[1:]]
    for loop, name, steps, left in (("0", "L2", 300, 0.1), ("1", "diffusion", 900, 0.7), ("1", "L1", 900, 0.85)):
        losses = [value for number, key, value in rows if (number, key) == (loop, name)]
        assert len(losses) == steps and np.mean(losses[-20:]) < left * np.mean(losses[:5]), name
    assert [loop["of"] for loop in fitted[0].card["training"]] == [300, 900]


def test_what_it_draws_is_the_target_as_far_as_that_passes_through_the_latent(fitted):
    model, _ = fitted
    inside = np.hypot(*(np.mgrid[:64, :64] - 31.5)) < 24
    made, source, target = (series.hu[:, inside] for series in (model.harmonize(SOFT), SOFT, SHARP))
    with torch.inference_mode():
        rebuilt = model.encoder_decoder(torch.from_numpy(SHARP.hu[:, None]))[:, 0].numpy()[:, inside]
    error, ceiling = (np.sqrt(np.square(hu - target).mean()) for hu in (made, rebuilt))
    print(f"RMS error {error:.0f} HU, rebuilt {ceiling:.0f}; mean {made.mean():.0f}, {source.mean():.0f} before,")
    print(f"{target.mean():.0f} wanted, {rebuilt.mean():.0f} rebuilt")
    assert error < 0.5 * target.std()
    assert ceiling < error


def test_what_it_draws_of_eight_slices_comes_under_a_tenth_of_its_first_squared_error(fitted):
    """Its own loss is of noise, of which no network can know all; an image that is drawn can be right."""
    once = fit(steps=1, steps_diffusion=1, check_every=9)
    errors = [np.square(model.harmonize(SOFT).hu - SHARP.hu).mean() for model in (once, fitted[0])]
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("residual", [True, False])
def test_what_is_drawn_is_added_to_the_sources_latent_or_stands_for_it(residual, monkeypatch):
    model = DiffusionCT(make_config(Config, {**SMALL, "residual": residual})).eval()
    channels = model.encoder_decoder.channels
    model.latent = torch.tensor([0.0, 1.0, -1e9, 1e9])[:, None].expand(4, channels).clone()
    model.change = torch.tensor([0.25, 2.0, 4.0])[:, None].expand(3, channels).clone()
    monkeypatch.setattr(diffusion_ct, "sample", lambda _, draw, **__: torch.full_like(draw(0), 0.5))
    x = torch.randn(1, 1, 64, 64) * 100
    with torch.inference_mode():
        z_a = model.encoder_decoder.encode(x)
        wanted = model.encoder_decoder.decode(torch.full_like(z_a, 1.25) + (z_a if residual else 0))
        torch.testing.assert_close(model._synthesize(x, Noise(), "dpm", 2), wanted)
        z_b = torch.randn_like(z_a)
        drawn = model._to_draw(z_a, z_b) * 2 + 0.25 + (z_a if residual else 0)
    torch.testing.assert_close(drawn, z_b)


def test_the_encoder_decoder_is_frozen_in_the_second_loop():
    short = {"steps": 2, "check_every": 2}
    once, longer = fit(**short, steps_diffusion=1), fit(**short, steps_diffusion=5)
    assert once.encoder_decoder.digest == longer.encoder_decoder.digest
    weights = [next(m.p_theta.parameters()).detach() for m in (once, longer)]
    assert not torch.equal(*weights)


def test_parts_of_different_trainings_are_refused(fitted, tmp_path):
    model, _ = fitted
    model.save(tmp_path / "model")
    mixed = load_model(tmp_path / "model")
    with torch.no_grad():
        mixed.encoder_decoder.lines[-1].bias += 0.1
    with pytest.raises(HarmonictError, match=r"trained on latents of the encoder-decoder \w{12}, this one is \w{12}"):
        mixed.harmonize(SOFT)
    mixed.save(tmp_path / "mixed")
    with pytest.raises(HarmonictError, match="mixed: the diffusion model was trained on latents of"):
        load_model(tmp_path / "mixed")


def test_latents_outside_those_of_the_training_are_told_with_their_numbers(fitted):
    model, _ = fitted
    qc = {}
    about = model.describe(SOFT)
    assert about.outside == ()
    model.harmonize(SOFT, about=about, qc=qc)
    assert qc["diffusion-ct"][SHARE] < 0.01 and qc["diffusion-ct"]["steps_sampled"] == 10
    strange = SOFT.with_hu(3 * SOFT.hu + 2000)
    about = model.describe(strange)
    assert about.measured[SHARE] > 0.01 and about.measured[FURTHEST] > 1
    (words,) = about.outside
    assert f"{100 * about.measured[SHARE]:.1f} % of its latent values lie outside" in words


def test_padding_is_not_taken_for_a_strange_image(fitted):
    padded = np.zeros(SOFT.hu.shape, bool)
    padded[:, :6] = True
    hu = SOFT.hu.copy()
    hu[padded] = -8000
    about = fitted[0].describe(replace(SOFT, hu=hu, padding=padded))
    assert about.outside == ()


def test_a_slice_of_any_size_is_drawn(fitted):
    odd = toy_series(slices=1, size=101, kernel="B30")
    assert fitted[0].harmonize(odd).hu.shape == (1, 101, 101)


def test_the_papers_size_does_a_step_of_each_loop_and_a_slice():
    assert make_config(Config, DiffusionCT.sizes["paper"]) == Config()
    paper = {"feature_weights": "random:64", "feature_width": 64, "width": 32, "widths": Config.widths, "blocks": 2}
    once = {"patch": 64, "batch": 1, "steps": 1, "batch_diffusion": 1, "steps_diffusion": 1, "check_every": 9}
    model = fit(**paper, **once)
    assert model.harmonize(replace(SOFT, hu=SOFT.hu[:1])).hu.shape == (1, 64, 64)
    assert model.latent.shape == (4, 512)


def test_what_cannot_be_is_refused(fitted):
    with pytest.raises(HarmonictError, match="no weights yet"):
        DiffusionCT().harmonize(SOFT)
    with pytest.raises(HarmonictError, match="fitted for B70, not for B50"):
        fitted[0].harmonize(SOFT, ScanProtocol(kernel="B50"))
    for settings, words in (({"steps_sampled": 0}, "at least 1, got 0"), ({"patch": 100}, "multiple of 32 pixels")):
        with pytest.raises(HarmonictError, match=words):
            make_config(Config, settings)


def test_the_papers_experiment_is_a_trial_and_a_plan_with_every_row():
    plan, trial = load_plan("configs/diffusion-ct.toml"), load_trial("configs/diffusion-ct-trial.toml")
    assert {model.name: model.problem for model in plan.models if model.problem} == {}
    paper = ["identity", "ganai", "stan-ct", "radiomic-gan", "cvh-ct", "encoder-decoder", "ddpm", "diffusion-ct"]
    ours = ["bridge", "encoder-decoder, networks alone"]
    assert sorted(model.name for model in plan.models) == sorted([*paper, *ours])
    scanned = {group.split: set() for group in trial.groups}
    for group in trial.groups:
        scanned[group.split] |= set(group.thicknesses_mm)
    assert scanned == {"train": {1.0, 1.5, 3.0}, "test": {5.0}}
