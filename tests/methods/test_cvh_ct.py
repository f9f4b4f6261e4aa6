"""CVH-CT: nothing moves, attention does not depend on how much air is in view, and each variant has what it should."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.data import unpaired_series
from harmonict.harmonizer import make_config
from harmonict.methods import load_model
from harmonict.methods.cvh_ct import (
    CVHCT,
    DOMAIN_LAYERS,
    Config,
    Generator,
    discriminator,
    domain_loss,
    half_pixel_filter,
)
from harmonict.nn.residual import texture_only
from harmonict.nn.vgg import prepare, vgg19
from harmonict.train import Run
from toy import toy_series

SHARP = toy_series(blur_mm=0.8, seed=3, slices=4, noise_hu=40, kernel="B70", size=128)
SOFT = toy_series(blur_mm=1.6, seed=5, slices=4, noise_hu=10, kernel="B30", size=128, name="other")
SMALL = {
    "channels": 8,
    "reduction": 2,
    "discriminator_channels": 4,
    "residual": True,
    "feature_weights": "random:2",
    "rate": 1e-3,
    "patch": 64,
    "batch": 2,
    "steps": 4,
    "check_every": 2,
}


def config(**changes):
    return make_config(Config, {**SMALL, **changes})


def fit(pairs, folder=None, **changes):
    return CVHCT(config(**changes)).fit(pairs, Run(folder, say=lambda line: None))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cvh-ct") / "run"
    return fit(unpaired_series([SHARP], [SOFT]), folder), folder


def losses(folder):
    table = {}
    with (folder / "log.csv").open() as stream:
        for row in list(csv.reader(stream))[1:]:
            table.setdefault(row[2], []).append(float(row[3]))
    return table


# -- geometry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("place", [(40, 40), (37, 52)])
def test_a_point_stays_where_it_is_to_a_hundredth_of_a_pixel(residual, attention, place):
    """Kernels that are symmetric themselves, so that what would move a point is the padding alone."""
    torch.manual_seed(0)
    network = Generator(config(residual=residual, attention=attention))
    with torch.no_grad():
        for layer in network.layers:
            torch.nn.init.uniform_(layer.weight, 0, 0.1)
            layer.weight += layer.weight.flip(2)
            layer.weight += layer.weight.flip(3)
        for name, value in network.attention.named_parameters():
            if name.endswith("spatial.conv.weight"):
                value += value.flip(2)
                value += value.flip(3)
        point = torch.zeros(1, 1, 90, 90)
        point[0, 0, place[0], place[1]] = 1e-3
        change = (network(point) - network(0 * point))[0, 0].double().numpy()
    spread = np.abs(change)
    at = [float((spread.sum(1 - axis) * np.arange(90)).sum() / spread.sum()) for axis in (0, 1)]
    assert spread.sum() > 0 and (spread > 1e-3 * spread.max()).sum() > 50
    assert np.abs(np.subtract(at, place)).max() < 0.01


def test_the_half_pixel_is_exact_and_without_it_a_point_moves():
    taps = half_pixel_filter().double()
    assert torch.equal(taps, taps.flip(0)) and float(taps.sum()) == pytest.approx(1, abs=1e-6)
    phase = np.exp(-2j * np.pi * np.outer(np.arange(0, 0.401, 0.05), np.arange(8) - 3.5))
    response = phase @ taps.numpy()
    assert np.abs(response.imag).max() < 1e-7 and np.abs(response.real[:8] - 1).max() < 0.05
    assert response.real[-1] > 0.75  # at 0.4 cycles a pixel; the mean of two pixels would keep 0.31


def test_without_the_half_pixel_the_seven_layers_move_a_point():
    """So the test of the point can fail."""
    x = torch.zeros(1, 1, 60, 60)
    x[..., 30, 30] = 1
    box = torch.full((1, 1, 4, 4), 1 / 16)
    for n in range(7):
        low, high = (1, 2) if n % 2 == 0 else (2, 1)
        x = functional.conv2d(functional.pad(x, (low, high, low, high)), box)
    assert float((x[0, 0].sum(0) * torch.arange(60)).sum()) == pytest.approx(29.5, abs=1e-4)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_the_papers_size_has_its_parameters_and_does_a_step_and_a_slice():
    generator = Generator(Config())
    convolutions = 16 * 64 + 64 + 5 * (16 * 64 * 64 + 64) + 16 * 64 + 1
    cbam = 3 * ((64 * 4 + 4) + (4 * 64 + 64) + (2 * 49 + 1))
    assert sum(p.numel() for p in generator.parameters()) == convolutions + cbam == 332_150
    assert len(generator.layers) == 7 and sorted(generator.attention) == ["2", "4", "6"]
    assert len([m for m in discriminator(64) if isinstance(m, torch.nn.Conv2d)]) == 7
    paper = {k: getattr(Config(), k) for k in SMALL if k not in ("steps", "batch", "feature_weights")}
    model = fit(unpaired_series([SHARP], [SOFT]), **paper, steps=1, batch=1)
    small = replace(SHARP, hu=SHARP.hu[:1, :96, :96], padding=None)
    assert model.harmonize(small).hu.shape == (1, 96, 96)


def test_a_discriminator_says_how_likely_each_place_is_real():
    scores = discriminator(4)(torch.randn(2, 1, 80, 80))
    assert scores.shape == (2, 1, 7, 7) and 0 < scores.min() and scores.max() < 1


def test_a_generator_ends_in_tanh_and_a_residual_one_starts_from_nothing_changed():
    torch.manual_seed(0)
    x = torch.rand(1, 1, 70, 81) * 2 - 1
    assert torch.equal(Generator(config())(x), x)
    plain = Generator(config(residual=False))
    plain.layers[-1].weight.data *= 100
    assert 0.99 < plain(x).abs().max() <= 1


def test_a_change_has_no_large_scale_part():
    wave = torch.sin(torch.arange(128) * 2 * np.pi / 64)[None, None, None].expand(1, 1, 128, 128).contiguous()
    fine = torch.sin(torch.arange(128) * 2 * np.pi / 4)[None, None, None].expand(1, 1, 128, 128).contiguous()
    inside = np.s_[..., 20:-20, 20:-20]
    assert texture_only(torch.ones(1, 1, 40, 40), 3).abs().max() < 1e-6
    assert texture_only(wave, 3)[inside].abs().max() < 0.06
    torch.testing.assert_close(texture_only(fine, 3)[inside], fine[inside], atol=2e-3, rtol=0)


def test_channel_gates_do_not_see_how_much_air_is_around_the_patient():
    """Twice the air at the sides leaves the middle of the slice as it was."""
    torch.manual_seed(0)
    network = Generator(config(residual=False, patch=32))
    tissue = torch.randn(1, 1, 96, 96) * 0.05
    padded = {air: functional.pad(tissue, (air, air), value=-1.0) for air in (32, 64)}
    with torch.inference_mode():
        narrow, wide = (network(padded[air])[..., air + 24 : air + 72] for air in (32, 64))
    torch.testing.assert_close(narrow, wide, atol=1e-6, rtol=1e-5)


def test_the_domain_loss_is_zero_for_the_same_batch_and_does_not_ask_which_patch_is_which():
    torch.manual_seed(0)
    vgg = vgg19("random:4")
    a = vgg(prepare(torch.randn(4, 1, 64, 64) * 50), DOMAIN_LAYERS)
    b = vgg(prepare(torch.randn(4, 1, 64, 64) * 150), DOMAIN_LAYERS)
    assert float(domain_loss(a, a)) == 0
    assert float(domain_loss([f.flip(0) for f in a], a)) == pytest.approx(0, abs=1e-9)
    assert float(domain_loss(a, b)) > 0.01
    nothing = [torch.zeros_like(f) for f in b]
    assert float(domain_loss(nothing, b)) == pytest.approx(1)


# -- training ----------------------------------------------------------------------------------------------------------


def test_it_drives_cycle_and_identity_on_eight_slices_under_a_tenth_of_their_start(tmp_path):
    eight = [replace(s, hu=np.concatenate([s.hu, s.hu[:, ::-1]])) for s in (SHARP, SOFT)]
    changes = {"residual": False, "steps": 200, "patch": 32, "rate": 5e-3, "lambda_3": 0, "lambda_1": 10, "lambda_2": 5}
    fit(unpaired_series(*([s] for s in eight)), tmp_path / "run", **changes, check_every=200, batch=1)
    table = losses(tmp_path / "run")
    for name in ("L_cyc", "L_Idt"):
        assert np.mean(table[name][-10:]) < 0.1 * table[name][0], name


@pytest.mark.parametrize(
    ("changes", "attention", "domain"),
    [({}, True, True), ({"attention": "false"}, False, True), ({"lambda_3": "0"}, True, False)],
    ids=["both", "CVS-CT 1: domain loss only", "CVS-CT 2: CBAM only"],
)
def test_each_variant_has_what_it_should(changes, attention, domain, tmp_path):
    model = fit(unpaired_series([SHARP], [SOFT]), tmp_path / "run", **changes)
    assert any("attention" in key for key in model.state_dict()) == attention
    assert ("L_f" in losses(tmp_path / "run")) == domain


def test_the_log_has_the_papers_losses(fitted):
    table = losses(fitted[1])
    assert {"L_adv(G)", "L_adv(D)", "L_cyc", "L_Idt", "L_f"} <= set(table)
    assert all(len(values) == SMALL["steps"] for values in table.values())
    assert table["L_cyc"][0] == table["L_Idt"][0] == 0 < table["L_cyc"][-1]  # it starts from nothing changed


def test_either_domain_can_be_the_target_also_after_loading(fitted, tmp_path):
    model = fitted[0]
    to_soft, to_sharp = model.harmonize(SOFT), model.harmonize(SOFT, ScanProtocol(kernel="B70"))
    assert (to_soft.protocol.kernel, to_sharp.protocol.kernel) == ("B30", "B70")
    assert np.abs(to_soft.hu - to_sharp.hu).max() > 0.1
    model.save(tmp_path / "model")
    back = load_model(tmp_path / "model")
    back.aim(ScanProtocol(kernel="B70"))
    assert np.array_equal(back.harmonize(SOFT).hu, to_sharp.hu)
    with pytest.raises(HarmonictError, match="fitted for B70 and B30, not for B50"):
        back.aim(ScanProtocol(kernel="B50"))


def test_a_killed_training_ends_with_the_same_weights(tmp_path):
    class Killed(Run):
        def check(self, held_out, output):
            if self.step_number == 2:
                raise KeyboardInterrupt

    pairs = unpaired_series([SHARP], [SOFT])
    whole = fit(pairs, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        CVHCT(config()).fit(pairs, Killed(tmp_path / "run", save_every_s=0, say=lambda line: None))
    assert fit(pairs, tmp_path / "run")._weights() == whole._weights()


def test_identical_domains_are_refused_in_one_line():
    with pytest.raises(HarmonictError, match=r"^domains A and B are the same, both B70: give images of two protocols$"):
        fit(unpaired_series([SHARP], [replace(SHARP, hu=SHARP.hu + 1)]))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(HarmonictError, match="patch at least 32"):
        config(patch=16)
    with pytest.raises(HarmonictError, match="not negative"):
        config(lambda_3=-1)
    assert make_config(Config, CVHCT.sizes["paper"]) == Config() and make_config(Config, CVHCT.sizes["compact"])
