"""The bridge: filters where a filter knows, learns where none does, and draws noise that has a place."""

import csv
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.data import pair_series
from harmonict.harmonizer import make_config
from harmonict.methods.bridge import (
    Bridge,
    Config,
    clean_tail,
    free_share,
    ratio_gain,
    raw_noise_ratio,
    strength_factors,
)
from harmonict.nn.bridge_network import BAND_FLOOR_HU2, BridgeNetwork, band_powers, filtered
from harmonict.physics.kernel import Kernel
from harmonict.physics.mtf import FREQUENCIES_PER_MM
from harmonict.train import Run
from toy import toy_series

SOFT = toy_series(blur_mm=1.2, seed=3, slices=8, noise_hu=20, kernel="B30", size=192)
SHARP = toy_series(blur_mm=0.8, seed=3, slices=8, noise_hu=20, kernel="B70", size=192)
TWO = toy_series(blur_mm=1.2, seed=5, slices=2, noise_hu=20, kernel="B30", size=192)
INSIDE = np.hypot(*(np.mgrid[:192, :192] - 95.5)) < 60
SMALL = {"channels": 24, "blocks": 1, "patch": 64, "batch": 4, "steps": 300, "rate": 4e-3, "check_every": 150}
SMALL |= {"steps_sampled": 1, "temperature": 0.0}


def gaussian(blur_mm):
    return np.exp(-2 * (np.pi * blur_mm * FREQUENCIES_PER_MM) ** 2)


def fit(source, target, folder=None, **changes):
    config = make_config(Config, {**SMALL, **changes})
    return Bridge(config).fit(pair_series([source], [target]), Run(folder, say=lambda line: None))


@pytest.fixture(scope="module")
def to_sharp():
    return fit(SOFT, SHARP)


@pytest.fixture(scope="module")
def to_soft():
    return fit(SHARP, SOFT, steps=1, check_every=1)


def shaken(model):
    """The model with a network that wants to change everything."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for value in (model.network.last.weight, model.network.last.bias):
            value.copy_(torch.randn(value.shape, generator=generator))
    return model


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_it_drives_its_pixel_loss_on_eight_slices_under_a_tenth_of_its_start(tmp_path):
    """Without the filter, which does most of it before the first step."""
    fit(SOFT, SHARP, tmp_path / "run", start="source", texture=0, refilter=0, source_noise_hu=0)
    with (tmp_path / "run" / "log.csv").open() as stream:
        losses = [float(row[3]) for row in csv.reader(stream) if row[2] == "bridge"]
    assert len(losses) == SMALL["steps"]
    assert np.mean(losses[-20:]) < 0.1 * np.mean(losses[:5])


def test_it_is_nearer_to_the_target_than_its_filter_in_hu_and_in_texture(to_sharp):
    about = to_sharp.describe(SOFT)
    told = to_sharp._told((about,), torch.device("cpu"))
    result = to_sharp.harmonize(SOFT, about=about).hu
    errors, textures = [], []
    target = torch.from_numpy(SHARP.hu[:2, None])
    for image in (
        torch.cat([filtered(x[None, None], told.gain, 0.0025, told.pixel_mm) for x in torch.from_numpy(SOFT.hu[:2])]),
        torch.from_numpy(result[:2, None]),
    ):
        errors.append(float((image - target)[:, 0, INSIDE].square().mean()))
        textures.append(float((band_powers(image) - band_powers(target))[:, :, 6:18, 6:18].abs().mean()))
    assert errors[1] < 0.5 * errors[0]
    assert textures[1] < 0.7 * textures[0]
    assert abs((result - SHARP.hu)[:, INSIDE].mean()) < 1


def test_from_sharp_to_soft_the_filter_stands_alone(to_soft):
    before = to_soft.harmonize(SHARP).hu
    after = shaken(deepcopy(to_soft)).harmonize(SHARP).hu
    assert np.abs(after - before).max() < 0.01
    error = [np.square(hu - SOFT.hu)[:, INSIDE].mean() for hu in (SHARP.hu, after)]
    assert error[1] < 0.25 * error[0]  # the toy's noise has one SD whatever its blur: it is no filter's image


def test_means_are_the_sources_whatever_the_network_wants(to_sharp):
    model = shaken(deepcopy(to_sharp))
    result = model.harmonize(SOFT).hu
    changed = np.abs(result - SOFT.hu).mean()
    assert changed > 20
    assert np.abs(result.mean((1, 2)) - SOFT.hu.mean((1, 2))).max() < 0.02 * changed


def test_noise_has_a_place_and_only_a_temperature_lets_it_in(to_sharp):
    quiet = to_sharp.harmonize(TWO).hu
    model = deepcopy(to_sharp)
    model.adjust({"steps_sampled": 3, "samples": 2})
    walked = model.harmonize(TWO).hu
    still = model.spread(TWO).hu  # asks for a temperature by itself, and leaves the model as it was
    assert still[:, INSIDE].mean() > 0.1
    assert model.config.temperature == 0 and np.array_equal(model.harmonize(TWO).hu, walked)
    model.adjust({"temperature": 1.0})
    noisy = model.harmonize(TWO).hu
    assert np.array_equal(noisy, model.harmonize(TWO, slices_at_once=1).hu)
    assert not np.array_equal(noisy, walked) and not np.array_equal(noisy[0] - walked[0], noisy[1] - walked[1])
    spread = model.spread(TWO).hu
    assert 0.1 < spread[:, INSIDE].mean() < 40
    model.adjust({"steps_sampled": 4})
    assert np.array_equal(model.spread(TWO).hu, spread)  # three steps were too few for it
    assert np.array_equal(to_sharp.harmonize(TWO).hu, quiet)


def test_a_source_that_it_was_not_trained_for_is_said(to_sharp):
    assert to_sharp.describe(SOFT).outside == ()
    (words,) = to_sharp.describe(SHARP).outside
    assert "trained on sources with f50" in words


def test_without_skin_the_user_is_asked_for_the_mtf(to_sharp):
    blank = SOFT.with_hu(np.full_like(SOFT.hu, 30.0))
    with pytest.raises(HarmonictError, match="--source-mtf"):
        to_sharp.describe(blank)
    about = to_sharp.describe(blank, source_mtf=Kernel("mine", FREQUENCIES_PER_MM, gaussian(1.2)))
    assert np.array_equal(about.measured["source_mtf"], gaussian(1.2))


def test_it_refuses_what_it_was_not_fitted_for(to_sharp):
    with pytest.raises(HarmonictError, match="no weights yet"):
        Bridge().harmonize(SOFT)
    with pytest.raises(HarmonictError, match="was fitted for"):
        to_sharp.harmonize(SOFT, replace(SHARP.protocol, kernel="B10"))
    for settings, words in (
        ({"steps_sampled": 0}, "at least 1"),
        ({"patch": 50}, "multiple of 4"),
        ({"direct": 2}, "shares"),
        ({"temperature": -1}, "at least 0"),
        ({"gain_cap": 0.5}, "at least 1"),
    ):
        with pytest.raises(HarmonictError, match=words):
            make_config(Config, settings)


def test_a_source_is_made_from_the_target_with_the_mtf_that_is_told(to_sharp):
    pairs = pair_series([SOFT], [SHARP])
    batch = pairs.batch((0,), size=6, patch=64, describe=lambda scan: to_sharp.describe(scan.read()))
    batch = replace(batch, target=batch.target[:1].expand(6, -1, -1, -1))
    model = deepcopy(to_sharp)
    model.config = replace(model.config, refilter=1.0, source_noise_hu=0.0)
    made, about = model._varied(batch)
    assert torch.equal(made, made.round())
    own, target = batch.about[0].measured["source_mtf"], model.target_mtf.numpy()
    mtfs = [a.measured["source_mtf"] for a in about]
    powers = [np.log(mtf[5] / target[5]) / np.log(own[5] / target[5]) for mtf in mtfs]
    assert 0 <= min(powers) < 1 and max(powers) <= 1.2
    detail = [float((x[:, 1:] - x[:, :-1]).square().mean()) for x in made[:, 0]]
    assert np.all(np.diff(np.array(detail)[np.argsort(powers)]) < 0)  # the softer, the less of it
    model.config = replace(model.config, refilter=0.0, source_noise_hu=3.0)
    noise = model._varied(batch)[0] - batch.source
    assert 0 < noise.std() < 3 and model._varied(batch)[1] == batch.about


def test_the_full_size_learns_and_translates():
    network = BridgeNetwork(Config().channels, Config().blocks, 24)
    assert sum(p.numel() for p in network.parameters()) == 1_121_304
    out = network(torch.randn(1, 3, 32, 36), torch.randn(1, 24))
    assert out.shape == (1, 1, 32, 36) and not out.any()
    out.sub(1).square().mean().backward()
    assert network.last.weight.grad.any()


# -- filters -----------------------------------------------------------------------------------------------------------


def test_the_gain_is_the_ratio_where_the_source_is_known_and_held_beyond():
    source, target = gaussian(1.2), gaussian(0.8)
    gain = ratio_gain(source, target, gain_cap=50)
    known = source > 0.05
    assert np.allclose(gain[known], (target / source)[known])
    assert np.allclose(gain[~known], gain[~known][0]) and gain[~known][0] > gain[known].max()
    assert ratio_gain(source, target, gain_cap=2).max() == 2


def test_the_gain_to_a_softer_target_never_rises_and_that_to_the_same_is_one():
    gain = ratio_gain(gaussian(0.5), gaussian(1.2), gain_cap=6)
    assert gain.max() == 1 and (np.diff(gain) <= 1e-4).all()
    assert np.allclose(ratio_gain(gaussian(0.8), gaussian(0.8), gain_cap=6), 1)


def test_a_noisy_tail_goes_on_as_a_gaussian():
    mtf = gaussian(1.0)
    noisy = np.where(mtf < 0.05, 0.02 * np.cos(np.arange(64)), mtf)
    assert np.allclose(clean_tail(noisy), mtf, atol=0.01) and (clean_tail(noisy) > 0).all()


def test_the_network_may_change_what_the_filter_amplifies_or_leaves_too_noisy():
    gain = np.where(FREQUENCIES_PER_MM < 0.2, 1.0, 2.0)
    assert np.allclose(free_share(gain, 1.0), np.where(gain > 1, 0.75, 0))
    assert not free_share(np.full(64, 0.5), 1.2).any()
    loud = free_share(np.full(64, 0.5), 5.0)
    assert loud[0] == 0 and np.allclose(loud[20:], 1 - (1.25 / 5) ** 2)


def test_a_wave_leaves_a_filter_with_the_gain_of_its_frequency():
    y, x = np.mgrid[:128, :128]
    curve = torch.linspace(1.0, 3.0, 401)[None]  # 1 + 2 f at 0 to 1 per mm
    pixel = torch.tensor([[0.5, 0.8]])
    for fy, fx in ((0.25, 0.0), (0.0, 0.25), (0.15, 0.2)):
        wave = torch.from_numpy(np.cos(2 * np.pi * (fy * 0.5 * y + fx * 0.8 * x)).astype(np.float32))[None, None]
        out = filtered(wave, curve, 0.0025, pixel)
        inner = np.s_[..., 40:-40, 40:-40]
        assert torch.allclose(out[inner], 1.5 * wave[inner], atol=0.02)
    flat = torch.ones(2, 401)
    image = torch.randn(2, 1, 33, 50) * 100
    assert torch.allclose(filtered(image, flat, 0.0025, pixel.expand(2, 2)), image, atol=1e-3)


# -- texture -----------------------------------------------------------------------------------------------------------


def test_band_powers_of_white_noise_are_those_of_the_filters():
    noise = 300 * torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(1))
    found = band_powers(noise)[..., 2:-2, 2:-2].exp().mean((0, 2, 3)) - BAND_FLOOR_HU2
    f = torch.fft.fftfreq(512, dtype=torch.float64)
    radius = (f[:, None].square() + f[None, :].square()).sqrt()
    for power, (a, b) in zip(found[2:], ((1.0, 2.0), (2.0, 4.0)), strict=True):  # sampled Gaussians of wide ones
        response = torch.exp(-2 * (torch.pi * a * radius) ** 2) - torch.exp(-2 * (torch.pi * b * radius) ** 2)
        assert float(power) == pytest.approx(90_000 * float(response.square().mean()), rel=0.06)
    assert torch.allclose(band_powers(2 * noise) - band_powers(noise), torch.tensor(np.log(4.0)).float(), atol=0.02)


def test_band_powers_see_how_strong_texture_is_and_not_where_its_grains_lie():
    generator = torch.Generator().manual_seed(2)
    a, b = (200 * torch.randn(1, 1, 96, 96, generator=generator) for _ in range(2))
    same = (band_powers(a) - band_powers(b)).abs().mean()
    weaker = (band_powers(a) - band_powers(0.5 * b)).abs().mean()
    assert same < 0.35 and weaker > 1.0


# -- how loud the source is --------------------------------------------------------------------------------------------


def test_dose_and_thickness_say_how_much_louder_the_target_s_raw_data_are():
    low, high = ScanProtocol(ctdivol_mgy=1.3, slice_thickness_mm=3), ScanProtocol(ctdivol_mgy=6.5, slice_thickness_mm=1)
    assert raw_noise_ratio(low, high) == pytest.approx((1.3 / 6.5 * 3) ** 0.5)
    assert raw_noise_ratio(ScanProtocol(exposure_mas=50, kvp=120), ScanProtocol(exposure_mas=200, kvp=120)) == 0.5
    assert raw_noise_ratio(ScanProtocol(exposure_mas=50, kvp=120), ScanProtocol(exposure_mas=200, kvp=80)) is None
    assert raw_noise_ratio(ScanProtocol(), high) is None


def test_the_network_may_denoise_all_of_a_source_that_is_louder_than_the_target():
    same = np.ones(len(FREQUENCIES_PER_MM))
    assert not free_share(same, 1.0).any() and not free_share(same, 1.2).any()
    much_louder = free_share(same, 2.5)
    assert much_louder[0] == 0 and much_louder[-1] == pytest.approx(0.75, rel=1e-3)
    assert not free_share(same, 1 / 2.5).any()


def test_what_iterative_reconstruction_took_away_is_learned_apart_from_dose_and_thickness():
    target = ScanProtocol(ctdivol_mgy=6.5, slice_thickness_mm=1)
    sources = [
        (ScanProtocol(ctdivol_mgy=dose, slice_thickness_mm=mm, iterative_strength=strength), sd)
        for dose, mm, strength, sd in (
            (6.5, 1, None, 40.0),
            (1.3, 1, 0, 40.0 * 5**0.5),
            (6.5, 3, 3, 24.0 / 3**0.5),
            (6.5, 1, 3, 24.0),
            (6.5, 1, 3, None),
            (None, 1, 5, 3.0),
        )
    ]
    assert strength_factors(sources, target) == pytest.approx(np.array([[0, 1], [3, 0.6]]))
    assert strength_factors([], target) == pytest.approx(np.array([[0, 1]]))


def test_loudness_follows_from_the_protocols_and_is_measured_where_they_are_silent(to_sharp):
    model = deepcopy(to_sharp)
    model.strengths = torch.tensor([[0.0, 1.0], [4.0, 0.5]], dtype=torch.float64)
    model.target_noise_hu = torch.tensor([20.0], dtype=torch.float64)
    model.target = ScanProtocol(kernel="B70", ctdivol_mgy=5, slice_thickness_mm=1)
    low = ScanProtocol(ctdivol_mgy=1.25, slice_thickness_mm=1)
    assert model._louder(low, 999.0) == pytest.approx(2)
    assert model._louder(replace(low, iterative_strength=2), None) == pytest.approx(1.5)
    assert model._louder(replace(low, slice_thickness_mm=4), None) == pytest.approx(1)
    unknown = ScanProtocol(kernel="B30")
    assert model._louder(unknown, 60.0) == pytest.approx(3)
    assert model._louder(unknown, 22.0) == model._louder(unknown, None) == 1
