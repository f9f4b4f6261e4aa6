"""The MTF-conditioned harmonizer: it learns, it filters in cycles per mm, it measures each series, and it refuses."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from harmonict.core import Geometry, HarmonictError, ScanProtocol, Series
from harmonict.data import SlicePairs, pair_series
from harmonict.harmonizer import make_config
from harmonict.methods.physics import STEP_PER_MM, Config, Generator, Omega, Physics
from harmonict.nn.physics_losses import HU_UNIT, HU_ZERO, RESIDUAL_HU
from harmonict.physics.kernel import Kernel
from harmonict.physics.mtf import FREQUENCIES_PER_MM, skin_air_mtf
from harmonict.train import Run
from toy import toy_series

TRUTH = replace(
    toy_series(blur_mm=1.4, seed=3, slices=8, noise_hu=1e-3, size=192, pixel_mm=1.5),
    protocol=ScanProtocol(manufacturer="harmonict", model="truth"),
)
SHARP = toy_series(blur_mm=0.9, seed=3, slices=8, noise_hu=2, kernel="Br64", size=192, pixel_mm=1.5)
SOFT = toy_series(blur_mm=2.2, seed=4, slices=8, noise_hu=2, kernel="Br32", size=192, pixel_mm=1.5)
SMALL = {
    "feature_weights": "random:4",
    "feature_width": 4,
    "depth": 3,
    "decoder": "16,16",
    "omega": 4,
    "filters": 8,
    "critic_width": 4,
    "patch": 64,
    "batch": 4,
    "affine": 0,
    "noise_hu": 0,
    "jitter": 0,
    "mtf_noise": 0,
    "rate_peak": 1.5e-2,
}


def config(**changes):
    return make_config(Config, {**SMALL, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("physics") / "run"


@pytest.fixture(scope="module")
def fitted(folder):
    """Four slices of each kernel, both at once, to the truth: pixel loss alone, for speed."""
    c = config(adversarial=0, texture=0, steps=320, cycle=320, check_every=320)
    pairs = SlicePairs([(s, z, TRUTH, z) for s in (SHARP, SOFT) for z in range(4)])
    return Physics(c).fit(pairs, Run(folder, say=lambda line: None))


def test_it_drives_its_pixel_loss_on_eight_slices_under_a_tenth_of_its_start(fitted, folder):
    with (folder / "log.csv").open() as stream:
        losses = [float(row[3]) for row in csv.reader(stream) if row[2] == "L_d"]
    assert len(losses) == 320
    assert np.mean(losses[-10:]) < 0.1 * np.mean(losses[:5])


def test_one_model_brings_two_kernels_nearer_to_the_truth_and_to_each_other(fitted):
    inside = np.hypot(*(np.mgrid[:192, :192] - 95.5)) < 70
    made = [fitted.harmonize(series).hu for series in (SHARP, SOFT)]
    for series, hu in zip((SHARP, SOFT), made, strict=True):
        before, after = (np.square(image - TRUTH.hu)[:, inside].mean() for image in (series.hu, hu))
        assert after < 0.5 * before
    apart = [np.square(a - b)[:, inside].mean() for a, b in (made, (SHARP.hu, SOFT.hu))]
    assert apart[0] < 0.5 * apart[1]


def test_what_it_is_told_of_the_sharpness_changes_what_it_makes(fitted):
    model = fitted
    told, mistold = (model.describe(series) for series in (SOFT, SHARP))
    right, wrong = (model.harmonize(SOFT, about=about).hu for about in (told, mistold))
    assert np.abs(right - wrong).max() > 1


def test_the_adversarial_and_texture_losses_move_and_everything_resumes(tmp_path):
    c = config(steps=4, cycle=4, check_every=2, critic_width=4, affine=0.5, noise_hu=5, jitter=0.01)
    pairs = pair_series([SHARP], [TRUTH])
    whole = Physics(c).fit(pairs, Run(tmp_path / "whole", say=lambda line: None))

    class Killed(Run):
        def check(self, *args):
            super().check(*args)
            if self.step_number == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Physics(c).fit(pairs, Killed(tmp_path / "killed", save_every_s=0, say=lambda line: None))
    again = Physics(c).fit(pairs, Run(tmp_path / "killed", say=lambda line: None))
    assert again.digest == whole.digest
    with (tmp_path / "whole" / "log.csv").open() as stream:
        names = {row[2] for row in csv.reader(stream)}
    assert {"WGAN", "gradient penalty", "L_d", "L_a", "L_t"} <= names


# -- cycles per mm -----------------------------------------------------------------------------------------------------


def on_the_grid(of_frequency):
    """What Omega would have to give for a filter that is this function of (f_y, f_x)."""
    n = 4 * (len(FREQUENCIES_PER_MM) + 4)  # two samples more on each side
    f = torch.from_numpy((((np.arange(n) + 0.5) / 4 - 0.5 - 2) * STEP_PER_MM).astype(np.float32))
    return of_frequency(f[:, None], f[None, :]).expand(n, n)[None, None]


@pytest.mark.parametrize(("shape", "pixel_mm"), [((64, 64), (0.5, 0.5)), ((37, 90), (0.9, 0.7)), ((512, 512), (1, 1))])
def test_filters_are_read_at_the_frequencies_of_the_image(shape, pixel_mm):
    omega, pixels = Omega(2, 1), torch.tensor([pixel_mm], dtype=torch.float32)
    fy, fx = np.abs(np.fft.fftfreq(shape[0], pixel_mm[0])), np.fft.rfftfreq(shape[1], pixel_mm[1])
    for of_frequency, wanted in ((lambda y, x: y + 0 * x, fy[:, None]), (lambda y, x: x + 0 * y, fx[None, :])):
        read = omega.at(on_the_grid(of_frequency), shape, pixels)[0, 0].numpy()
        assert np.allclose(read, np.broadcast_to(wanted, read.shape), atol=2e-5)


def test_a_patch_and_the_whole_slice_are_filtered_alike():
    omega, pixels = Omega(4, 3), torch.tensor([[0.7, 0.7]])
    filters = omega(torch.rand(1, 64), pixels)
    patch, whole = (omega.at(filters, (n, n), pixels) for n in (64, 512))
    assert torch.allclose(patch[..., :32, :32], whole[..., : 32 * 8 : 8, : 32 * 8 : 8], atol=1e-5)


def test_smaller_pixels_only_add_higher_frequencies():
    """What is left out above an image's highest frequency changes nothing below it."""
    omega, mtf = Omega(4, 3), torch.rand(1, 64)
    coarse, fine = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.25, 0.25]])
    a, b = omega.at(omega(mtf, coarse), (64, 64), coarse), omega.at(omega(mtf, fine), (256, 256), fine)
    assert torch.allclose(a[..., :32, :33], b[..., :32, :33], atol=1e-5)
    assert torch.allclose(a[..., 33:, :33], b[..., -31:, :33], atol=1e-5)


def test_an_mtf_is_one_at_the_middle_of_the_plane_and_falls_as_measured():
    mtf = torch.exp(-torch.from_numpy(FREQUENCIES_PER_MM).float())[None]
    omega = Omega(2, 1)
    planes = []
    omega.up.register_forward_pre_hook(lambda module, args: planes.append(args[0]))
    omega(mtf, torch.tensor([[0.4, 0.4]]))
    plane = planes[0][0, 0, 2:66, 2:66]
    assert torch.allclose(plane[0], mtf[0], atol=1e-5) and torch.allclose(plane[:, 0], mtf[0], atol=1e-5)
    assert plane[30, 40].item() == pytest.approx(mtf[0, 50].item(), abs=1e-4)  # 3, 4, 5
    assert torch.equal(planes[0][0, 0, :2], planes[0][0, 0, 3:5].flip(0))  # even


@pytest.mark.parametrize("pixel_mm", [0.7, 1.1])
def test_with_one_filter_alone_it_is_the_filter_of_equation_2(pixel_mm):
    """Omega set to a Gaussian, all behind it to a ReLU: what is added is I, blurred by so many mm and whitened."""
    sigma_mm, g = 1.5, Generator(config()).eval()
    for layer in (g.after, g.last):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        layer.weight.data[0, 0, 1, 1] = 1
    nn.init.zeros_(g.attention.weight.weight)
    nn.init.constant_(g.attention.weight.bias, 30.0)  # open
    nn.init.zeros_(g.mix.weight)
    g.mix.weight.data[0, -1] = 1  # Omega times I
    gauss = on_the_grid(lambda y, x: torch.exp(-2 * (np.pi * sigma_mm) ** 2 * (x**2 + y**2)))
    hu = torch.from_numpy(toy_series(slices=1, size=100).hu[:, None])
    with torch.inference_mode():
        blurred = g(hu, gauss.expand(-1, 17, -1, -1), torch.tensor([[pixel_mm, pixel_mm]])) - hu
    blurred = blurred / RESIDUAL_HU
    f = np.hypot(np.fft.fftfreq(132, pixel_mm)[:, None], np.fft.rfftfreq(132, pixel_mm))
    image = np.pad((hu[0, 0].numpy() - HU_ZERO) / HU_UNIT, 16, mode="reflect")
    filtered = np.fft.rfft2(image) * np.exp(-2 * (np.pi * sigma_mm * f) ** 2) * np.hypot(f, 0.05) / 0.2
    wanted = np.fft.irfft2(filtered)[16:-16, 16:-16].clip(min=0)  # the ReLU behind it
    assert np.abs(blurred[0, 0].numpy() - wanted).max() < 5e-4


# -- describe ----------------------------------------------------------------------------------------------------------


def test_each_series_is_measured_at_its_own_skin():
    measured = [Physics(config()).describe(series).measured["source_mtf"] for series in (SHARP, SOFT)]
    assert np.array_equal(measured[0], skin_air_mtf(SHARP).kernel.mtf)
    assert np.all(measured[0][4:12] > measured[1][4:12])


def test_a_body_that_the_field_of_view_cuts_is_measured_on_what_is_left():
    whole = toy_series(blur_mm=0.8)
    cut = replace(whole, hu=np.ascontiguousarray(whole.hu[:, 40:, 50:]))
    model = Physics(config())
    left, full = (model.describe(series).measured["source_mtf"] for series in (cut, whole))
    assert np.abs(left - full)[:12].max() < 0.05


def test_without_any_skin_one_line_asks_for_a_file_and_a_given_curve_is_taken():
    inside = Series(np.full((2, 96, 96), 40, np.float32), Geometry((0, 0, 0), (1, 1, 1)), name="inside")
    model = Physics(config())
    with pytest.raises(HarmonictError, match=r"inside: no clean border between skin and air.*--source-mtf FILE"):
        model.describe(inside)
    curve = Kernel("mine", FREQUENCIES_PER_MM, np.exp(-FREQUENCIES_PER_MM))
    told = model.describe(inside, source_mtf=curve)
    assert np.allclose(told.measured["source_mtf"], np.exp(-FREQUENCIES_PER_MM))


def round_body(radius_mm, *, skull):
    y, x = np.mgrid[:256, :256] - 127.5
    r = np.hypot(y, x)
    hu = np.where(r < radius_mm, 40.0, -1000.0)
    if skull:
        hu[(r < radius_mm - 5) & (r > radius_mm - 12)] = 900
    hu = ndimage.gaussian_filter(hu, 1)[None].repeat(3, 0).astype(np.float32)
    return Series(hu, Geometry((0, 0, 0), (1, 1, 1)), name="one")


def test_a_head_is_refused_and_a_childs_trunk_is_not():
    model = Physics(config())
    with pytest.raises(HarmonictError, match="one: it shows a head"):
        model.describe(round_body(88, skull=True))
    curve = Kernel("mine", FREQUENCIES_PER_MM, np.exp(-FREQUENCIES_PER_MM))
    with pytest.raises(HarmonictError, match="it shows a head"):
        model.describe(round_body(88, skull=True), source_mtf=curve)
    assert "source_mtf" in model.describe(round_body(88, skull=False)).measured


def test_sagittal_slices_are_refused():
    turned = Geometry((0, 0, 0), (3.0, 1.5, 1.5), ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 1.0, 0.0)))
    with pytest.raises(HarmonictError, match="do not lie across the body"):
        Physics(config()).describe(replace(SHARP, geometry=turned))


# -- what else it promises ---------------------------------------------------------------------------------------------


def test_the_result_is_of_no_kernel_that_a_scanner_has(fitted):
    result = fitted.harmonize(replace(SHARP, protocol=SHARP.protocol.with_(iterative_strength=3.0)))
    assert result.protocol.kernel is None


def test_the_result_names_the_kernel_strength_and_dose_of_the_rendition_it_was_fitted_for():
    wanted = ScanProtocol(kernel="Br32", iterative_strength=0.0, ctdivol_mgy=6.5, exposure_mas=100.0)
    model = Physics(config(), target=wanted)
    model.pixel_mm = torch.tensor(SHARP.pixel_mm)
    low = SHARP.protocol.with_(iterative_strength=3.0, ctdivol_mgy=1.3, exposure_mas=20.0)
    assert model.harmonize(replace(SHARP, protocol=low)).protocol == wanted


def test_an_untrained_network_changes_nothing():
    g, hu = Generator(config()), 100 * torch.randn(1, 1, 40, 40)
    pixels = torch.ones(1, 2)
    assert torch.equal(g(hu, g.filters(torch.rand(1, 64), pixels), pixels), hu)


def test_the_papers_size_has_its_parameters_and_does_a_step_and_a_slice():
    """26.5 million in the paper; ours is within 3 %."""
    assert sum(p.numel() for p in Physics().network.parameters()) == 26_753_539
    assert abs(26_753_539 / 26.5e6 - 1) < 0.03
    c = make_config(Config, {"feature_weights": "random:64", "patch": 32, "batch": 1, "steps": 1})
    model = Physics(c).fit(pair_series([SHARP], [TRUTH]), Run(None, say=lambda line: None))
    assert model.harmonize(replace(SHARP, hu=SHARP.hu[:1])).hu.shape == (1, 192, 192)


def test_both_sizes_are_settings_of_its_config():
    assert make_config(Config, Physics.sizes["paper"]) == Config()
    compact = Physics(make_config(Config, Physics.sizes["compact"]))
    assert sum(p.numel() for p in compact.parameters()) < 1e6


def test_what_it_was_not_fitted_for_is_refused(fitted):
    with pytest.raises(HarmonictError, match="no weights yet"):
        Physics(config()).harmonize(SHARP)
    with pytest.raises(HarmonictError, match="not for B50"):
        fitted.harmonize(SHARP, ScanProtocol(kernel="B50"))
