"""STAN-CT: its losses are its equations, it learns, it resumes, its pipeline runs, and what it cannot do is refused."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.data import pair_series
from harmonict.harmonizer import make_config
from harmonict.methods import load_model
from harmonict.methods.stan_ct import (
    FEATURE_MARGIN,
    STANCT,
    Config,
    _crops,
    critic_loss,
    f,
    generator_loss,
    latent_loss,
)
from harmonict.nn.unet import Discriminator, UNet
from harmonict.train import Run
from test_train import Killed
from toy import toy_series

SHARP = toy_series(blur_mm=0.8, seed=3, slices=8, noise_hu=20, kernel="B70", size=192)
SOFT = toy_series(blur_mm=1.2, seed=3, slices=8, noise_hu=20, kernel="B30", size=192)
TINY = {"layers": 2, "width": 8, "discriminator_width": 8, "residual": True, "upsampling": "resize", "patch": 64}
SMALL = {**TINY, "batch": 2, "steps": 300, "rate": 3e-3, "t_max": 10, "check_every": 100, "discriminators": 1}
SMALL |= {"generators": 1, "resize_crops": False, "units": "none", "pixel": 0.1}


def fit(source=SHARP, target=SOFT, folder=None, die_at=None, **changes):
    run = Run(folder, say=lambda line: None, save_every_s=60 if die_at is None else 0)
    log = run.log

    def dying(name, value):
        if run.step_number == die_at:
            raise Killed
        log(name, value)

    run.log = dying
    return STANCT(make_config(Config, {**SMALL, **changes})).fit(pair_series([source], [target]), run)


def losses(folder, name):
    with (folder / "log.csv").open() as stream:
        return [float(row[3]) for row in csv.reader(stream) if row[2] == name]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stan-ct") / "run"
    return fit(folder=folder), folder


# -- losses ----------------------------------------------------------------------------------------------------------


def images(n=2, size=64):
    torch.manual_seed(1)
    return torch.randn(n, 1, size, size), torch.randn(n, 1, size, size)


def test_the_critics_loss_is_equations_1_to_3_and_its_penalty_is_0_for_a_slope_of_1():
    torch.manual_seed(0)
    x, x_hat = images()
    critic = Discriminator(4)
    share = torch.full((2, 1, 1, 1), 0.5)
    found, values = critic_loss(Config(feature=0.5), critic, x, x_hat, share)
    assert found["adversarial D"][1].item() == pytest.approx((f(critic, x_hat)[0] - f(critic, x)[0]).mean().item())
    apart = (f(critic, x)[1] - f(critic, x_hat)[1]).abs().mean().item()
    assert found["feature"][0] == 0.5 and found["feature"][1].item() == pytest.approx(max(FEATURE_MARGIN - apart, 0))
    assert values.shape == (4,) and found["centre"][1].item() == pytest.approx(values.mean().square().item())

    class Sum(torch.nn.Module):
        """A logit for each image whose slope is 1 in every 70-pixel patch: 1/70 for each pixel."""

        def forward(self, image):
            logit = image.mean(dim=(1, 2, 3), keepdim=True) * 70
            return logit, image

    for size in (64, 128):
        found, _ = critic_loss(Config(), Sum(), *images(size=size), share)
        assert found["gradient penalty"][1].item() == pytest.approx(0, abs=1e-8)


def test_d_learns_to_pull_features_apart_and_the_feature_weight_0_leaves_them_alone():
    x, x_hat = images()
    share = torch.full((2, 1, 1, 1), 0.5)
    apart = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        critic = Discriminator(4)
        with torch.no_grad():
            critic.layers[-1].weight.mul_(0.1)  # under the margin
        sgd = torch.optim.SGD(critic.layers.parameters(), lr=0.1)
        for _ in range(5):
            found = critic_loss(Config(feature=weight), critic, x, x_hat, share)[0]
            weight_of, raw = found["feature"]
            sgd.zero_grad()
            (weight_of * raw).backward()
            sgd.step()
        apart[weight] = (f(critic, x)[1] - f(critic, x_hat)[1]).abs().mean().item()
    assert apart[1.0] > 1.1 * apart[0.0]


def test_the_latent_loss_is_0_for_the_standard_image_and_moves_the_image_but_not_the_encoder():
    torch.manual_seed(0)
    network = UNet(4, 2, "resize")
    x, x_hat = images()
    assert latent_loss(network, x, x).item() == 0
    x_hat.requires_grad_(True)
    loss = latent_loss(network, x, x_hat)
    expected = (network.encode(x)[-1] - network.encode(x_hat)[-1]).abs().mean()
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert x_hat.grad.abs().max() > 0 and all(p.grad is None for p in network.parameters())


def test_the_generators_loss_is_equations_4_to_6():
    x, x_hat = images()
    seen = torch.ones(x.shape, dtype=torch.bool)
    seen[..., :10] = False
    values = torch.tensor([[1.0, 3.0]])
    found = generator_loss(Config(latent=0.5, pixel=0.01), values, (x - x_hat).abs(), seen, torch.tensor(0.25))
    total = sum(weight * raw for weight, raw in found.values()).item()
    l1 = (x - x_hat).abs()[..., 10:].mean().item() * 64 * 64
    assert total == pytest.approx(-2 + 0.5 * 0.25 + 0.01 * l1, rel=1e-5)


# -- training --------------------------------------------------------------------------------------------------------


def test_the_latent_loss_is_logged_in_both_phases_and_falls(fitted):
    latent, phases = losses(fitted[1], "latent"), losses(fitted[1], "phase")
    assert len(latent) == len(phases) == SMALL["steps"] and phases[-1] > 3
    assert np.mean(latent[-20:]) < np.mean(latent[:10])


def test_what_it_makes_is_nearer_to_the_target_than_the_source(fitted):
    inside = np.hypot(*(np.mgrid[:192, :192] - 95.5)) < 60
    error = [np.square(s.hu - SOFT.hu)[:, inside].mean() for s in (SHARP, fitted[0].harmonize(SHARP))]
    assert error[1] < 0.7 * error[0]


def test_it_drives_the_pixel_loss_on_eight_slices_under_a_tenth_of_its_start(tmp_path):
    """With L1 at its largest weight, and not as a residual, whose start is good already."""
    options = {"residual": False, "pixel": 1.0, "latent": 0, "fake_below": 0.55, "real_above": 0.6, "t_max": 400}
    fit(folder=tmp_path / "run", **options, width=12, steps=420, rate=2e-3)
    pixel = losses(tmp_path / "run", "L1")
    assert np.mean(pixel[-10:]) < 0.1 * pixel[0]


def test_a_killed_fit_goes_on_to_the_last_bit(tmp_path):
    options = {"steps": 12, "t_max": 3, "generators": 2, "discriminators": 2, "check_every": 5, "resize_crops": True}
    whole = fit(folder=tmp_path / "whole", **options)
    with pytest.raises(Killed):
        fit(folder=tmp_path / "killed", die_at=8, **options)
    assert fit(folder=tmp_path / "killed", **options).digest == whole.digest
    assert losses(tmp_path / "killed", "score G") == losses(tmp_path / "whole", "score G")


def test_resized_crops_show_a_part_of_the_patch_at_its_size():
    series = toy_series(size=256)
    target = series.with_hu(series.hu + 5, protocol=ScanProtocol(kernel="B50"))
    batch = pair_series([series], [target]).batch((0, 1), size=3, patch=224, augment=False)
    x0, x, seen = _crops(batch)
    assert x0.shape == x.shape == seen.shape == (3, 1, 224, 224) and seen.dtype == torch.bool and seen.all()
    assert torch.allclose(x - x0, torch.full_like(x, 5.0), atol=1e-2)  # both cut and resized alike
    assert not torch.equal(x0, batch.source)


def test_it_trains_by_windows(tmp_path):
    fit(folder=tmp_path / "run", steps=60, window="both", t_max=4, batch=1)
    assert len(losses(tmp_path / "run", "phase")) == 60 and losses(tmp_path / "run", "window high HU")


# -- harmonizing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", ["straightforward", "overlap", "real-fake", "all"])
def test_its_pipeline_tells_what_each_unit_did(fitted, units):
    config = replace(fitted[0].config, units=units, real_above=0.05)  # of this toy, D finds all else
    model = STANCT(config, target=fitted[0].target)
    model.pixel_mm = fitted[0].pixel_mm
    model.load_state_dict(fitted[0].state_dict())
    series = replace(SHARP, hu=SHARP.hu[:1])
    qc = {}
    result = model.eval().harmonize(series, qc=qc)
    (record,) = qc["stan-ct"]
    assert record["mode"] == units and record["patches_drawn"] > 1
    outside = (series.hu < -1000) | (series.hu > 900)
    assert outside.any() and np.array_equal(result.hu[outside], series.hu[outside])
    assert result.protocol.kernel == "B30" and not np.array_equal(result.hu, series.hu)
    assert (record["median_realness"] is None) == (units in ("straightforward", "overlap"))
    assert np.array_equal(model.harmonize(series).hu, result.hu)


def test_outside_of_soft_tissue_whole_slices_keep_their_hu(fitted):
    outside = (SHARP.hu < -1000) | (SHARP.hu > 900)
    assert np.array_equal(fitted[0].harmonize(SHARP).hu[outside], SHARP.hu[outside])


def test_the_discriminator_is_saved_for_the_quality_unit(fitted, tmp_path):
    fitted[0].save(tmp_path / "model")
    back = load_model(tmp_path / "model")
    x = torch.from_numpy(SHARP.hu[:1, None] / 1000)
    with torch.inference_mode():
        values = [f(model.discriminator, x)[0].item() for model in (back, fitted[0])]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_the_papers_size_has_its_parameters_and_does_a_step_and_a_slice():
    source, target = (toy_series(blur_mm=b, slices=1, size=256, kernel=k) for b, k in ((0.8, "B70"), (1.2, "B30")))
    config = make_config(Config, {"batch": 1, "steps": 1, "generators": 1, "discriminators": 1, "units": "overlap"})
    model = STANCT(config).fit(pair_series([source], [target]), Run(say=lambda line: None))
    assert sum(p.numel() for p in model.network.parameters()) == 54_403_457
    x = torch.from_numpy(source.hu[:, None])
    assert model.translate(x, model.target, model.describe(source)).shape == x.shape


def test_compact_is_a_narrow_network_of_the_same_layers():
    assert make_config(Config, STANCT.sizes["paper"]) == Config()
    compact = make_config(Config, STANCT.sizes["compact"])
    assert (compact.layers, compact.patch) == (Config().layers, Config().patch)
    assert sum(p.numel() for p in STANCT(compact).parameters()) < 4e6


def test_what_it_cannot_do_is_refused(fitted):
    for units in ("none", "overlap"):
        with pytest.raises(HarmonictError, match="no weights yet"):
            STANCT(make_config(Config, {**TINY, "units": units})).harmonize(SHARP)
    with pytest.raises(HarmonictError, match="fitted for B30, not for B50"):
        fitted[0].harmonize(SHARP, ScanProtocol(kernel="B50"))
    wrongs = ({"patch": 100}, {"t_max": 0}, {"pixel": 1.5}, {"units": "none", "gray_to_hu": "minmax"})
    for wrong, words in zip(wrongs, ("multiple of 256", "t_max", "weights from 0", "is for patches"), strict=True):
        with pytest.raises(HarmonictError, match=words):
            make_config(Config, wrong)
