"""Metrics against closed forms, against published examples and against scikit-image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from harmonict import metrics
from harmonict.core import HarmonictError


@pytest.fixture
def images() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    ref = ndimage.gaussian_filter(rng.normal(0, 400, (40, 48)), 2)
    return ref, ref + rng.normal(0, 30, ref.shape)


def test_psnr_of_a_constant_shift_is_the_closed_form(images):
    ref, _ = images
    assert metrics.psnr(ref, ref + 20.24, data_range=2024) == pytest.approx(40.0, abs=1e-9)
    assert metrics.psnr(ref, ref, data_range=2024) == float("inf")


def test_nrmse_is_the_root_mean_square_over_the_data_range(images):
    ref, _ = images
    checker = np.where(np.indices(ref.shape).sum(0) % 2, 50.0, -50.0)
    assert metrics.nrmse(ref, ref + checker, data_range=2000) == pytest.approx(0.025)
    assert metrics.mae(ref, ref + checker) == pytest.approx(50)
    assert metrics.bias(ref, ref - 7) == pytest.approx(-7)


def test_a_mask_limits_every_metric_to_its_region(images):
    ref, img = images
    mask = np.zeros(ref.shape, bool)
    mask[12:25, 12:30] = True
    far = np.where(mask, img, img + 1e4)
    for function in (metrics.mae, metrics.bias, metrics.ncc):
        assert function(ref, far, mask=mask) == pytest.approx(function(ref[mask], img[mask]))
    for function in (metrics.psnr, metrics.nrmse):
        expected = function(ref[mask], img[mask], data_range=2024)
        assert function(ref, far, data_range=2024, mask=mask) == pytest.approx(expected)


def test_ssim_is_wangs_formula_written_out(images):
    ref, img = images
    r = np.arange(-5, 6)
    window = np.exp(-(r**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def local(x):
        return ndimage.correlate(x, window, mode="mirror")

    c1, c2 = (0.01 * 2024) ** 2, (0.03 * 2024) ** 2
    mx, my = local(ref), local(img)
    vx, vy, cxy = local(ref**2) - mx**2, local(img**2) - my**2, local(ref * img) - mx * my
    expected = (2 * mx * my + c1) * (2 * cxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    inner = expected[5:-5, 5:-5]
    assert metrics.ssim(ref, img, data_range=2024) == pytest.approx(inner.mean(), rel=1e-9)
    mask = np.zeros(ref.shape, bool)
    mask[10:20, 15:40] = True
    assert metrics.ssim(ref, img, data_range=2024, mask=mask) == pytest.approx(expected[mask].mean(), rel=1e-9)
    stack = metrics.ssim(np.stack([ref, ref]), np.stack([img, ref]), data_range=2024)
    assert stack == pytest.approx((inner.mean() + 1) / 2, rel=1e-9)


def test_ssim_of_equal_images_is_one_and_of_too_small_ones_an_error(images):
    ref, _ = images
    assert metrics.ssim(ref, ref, data_range=2024) == pytest.approx(1)
    with pytest.raises(HarmonictError, match="11 x 11"):
        metrics.ssim(ref[:8], ref[:8], data_range=2024)


def test_the_mean_free_correlation_ignores_offset_and_scale_and_the_other_does_not(images):
    ref, img = images
    assert metrics.ncc(ref, 3 * ref + 100) == pytest.approx(1)
    assert metrics.ncc(ref, -ref) == pytest.approx(-1)
    assert metrics.ncc(ref, img) == pytest.approx(np.corrcoef(ref.ravel(), img.ravel())[0, 1])
    scaled, other = (ref + 1024) / 4096, (img + 1024) / 4096
    eq12 = np.sum(scaled * other) / np.sqrt(np.sum(scaled**2) * np.sum(other**2))
    assert metrics.ncc_uncentred(ref, img, data_min=-1024) == pytest.approx(eq12)
    assert metrics.ncc_uncentred(ref, img, data_min=-3000) > metrics.ncc_uncentred(ref, img, data_min=-1024)


def test_correlations_of_constant_images_are_defined():
    flat, ramp = np.full(9, 3.0), np.arange(9.0)
    assert metrics.ncc(flat, flat) == 1
    assert metrics.ncc(flat, ramp) == 0
    assert metrics.ccc(flat, flat) == 1
    assert metrics.ccc(flat, ramp) == 0
    assert metrics.ccc(flat, flat + 1) == 0


def test_ccc_of_shifted_data_is_the_closed_form():
    x = np.array([1.0, 2, 3, 4, 5])  # population variance 2
    assert metrics.ccc(x, x + 1) == pytest.approx(4 / 5)
    assert metrics.ccc(x, 2 * x) == pytest.approx(2 * 4 / (2 + 8 + 9))
    assert metrics.ccc(x, -x + 6) == pytest.approx(-1)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(1e-12, 1e12), st.floats(-100, 100))
def test_ccc_is_symmetric_never_above_pearson_and_unchanged_by_a_common_unit(seed, unit, shift):
    rng = np.random.default_rng(seed)
    x = rng.normal(5, 2, 12)
    y = 0.7 * x + rng.normal(0, 1, 12) + shift
    value = metrics.ccc(x, y)
    assert value == pytest.approx(metrics.ccc(y, x), abs=1e-12)
    assert abs(value) <= abs(np.corrcoef(x, y)[0, 1]) + 1e-12
    assert metrics.ccc(unit * x, unit * y) == pytest.approx(value, abs=1e-9)


def test_relative_error_takes_the_absolute_value_of_the_reference():
    error = metrics.relative_error([-2.0, 4, 0, 0], [-1.0, 5, 0, 1])
    np.testing.assert_allclose(error, [0.5, 0.25, 0, np.inf])


def test_bland_altman_limits_are_the_bias_and_its_spread():
    ref = np.array([10.0, 20, 30, 40])
    result = metrics.bland_altman(ref, ref + np.array([1.0, 3, 1, 3]))
    sd = np.sqrt(4 / 3)
    assert result.n == 4
    assert result[1:] == pytest.approx((2, sd, 2 - 1.96 * sd, 2 + 1.96 * sd))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(bad):
    x = np.array([1.0, 2, bad])
    for function in (metrics.mae, metrics.ncc, metrics.ccc, metrics.relative_error, metrics.bland_altman):
        with pytest.raises(HarmonictError, match="NaN or infinite"):
            function(np.arange(3.0), x)


def test_shapes_masks_and_ranges_that_cannot_be_are_refused():
    x = np.zeros((4, 4))
    with pytest.raises(HarmonictError, match="one shape"):
        metrics.mae(x, x[:2])
    with pytest.raises(HarmonictError, match="mask must be bool"):
        metrics.mae(x, x, mask=np.ones((4, 4)))
    with pytest.raises(HarmonictError, match="empty"):
        metrics.mae(x, x, mask=np.zeros((4, 4), bool))
    with pytest.raises(HarmonictError, match="data_range"):
        metrics.psnr(x, x + 1, data_range=0)
    with pytest.raises(HarmonictError, match="two pairs"):
        metrics.ccc([1.0], [2.0])
    with pytest.raises(TypeError):
        metrics.psnr(x, x + 1, 2024)
