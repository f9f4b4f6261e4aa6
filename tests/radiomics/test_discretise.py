import numpy as np
import pytest

from harmonict.core import HarmonictError
from harmonict.radiomics.discretise import (
    bins_by_count,
    bins_by_width,
    check_roi,
    crop_to_mask,
    level_image,
    resample,
    resegment,
)


def test_bin_edges_lie_at_multiples_of_the_width_when_no_start_is_given():
    values = np.array([-1.0, 0.0, 24.9, 25.0, 49.0, 50.0])
    assert bins_by_width(values, 25).tolist() == [1, 2, 2, 3, 3, 4]


def test_the_first_level_starts_at_the_start_that_is_given():
    values = np.array([-500.0, -476.0, -475.0, 400.0])
    assert bins_by_width(values, 25, start=-500).tolist() == [1, 1, 2, 37]


def test_a_fixed_number_of_bins_covers_the_range_and_the_maximum_is_in_the_last_bin():
    values = np.linspace(-100, 300, 401)
    levels = bins_by_count(values, 32)
    assert levels[0] == 1 and levels[-1] == 32
    assert np.all(np.diff(levels) >= 0)
    assert np.bincount(levels)[1:].min() >= 12


@pytest.mark.parametrize("scale, shift", [(2.0, 0.0), (0.5, 100.0), (4.0, -1024.0)])
def test_a_fixed_number_of_bins_does_not_see_an_affine_change_of_intensity(scale, shift):
    values = np.random.default_rng(0).integers(-900, 200, 500).astype(float)
    np.testing.assert_array_equal(bins_by_count(values, 64), bins_by_count(values * scale + shift, 64))


@pytest.mark.parametrize("width", [0, -25, np.inf, np.nan])
def test_a_bin_width_that_is_no_width_is_refused(width):
    with pytest.raises(HarmonictError, match="bin width must be above 0"):
        bins_by_width(np.array([1.0, 2.0]), width)


def test_more_than_ten_thousand_grey_levels_are_refused_with_the_cure():
    with pytest.raises(HarmonictError, match="wider bins"):
        bins_by_width(np.array([-1024.0, 3071.0]), 0.1)
    with pytest.raises(HarmonictError, match="10,000"):
        bins_by_count(np.array([0.0, 1.0]), 10_001)
    assert bins_by_count(np.array([0.0, 1.0]), 10_000).max() == 10_000


@pytest.mark.parametrize(
    "hu, mask, message",
    [
        (np.zeros((2, 3, 4)), np.ones((2, 3, 5), bool), "shape"),
        (np.zeros((3, 4)), np.ones((3, 4), bool), "3-D"),
        (np.zeros((2, 3, 4)), np.zeros((2, 3, 4), bool), "empty"),
        (np.full((2, 3, 4), np.nan), np.ones((2, 3, 4), bool), "NaN"),
        (np.full((2, 3, 4), np.inf), np.ones((2, 3, 4), bool), "infinite"),
        (np.zeros((2, 3, 4)), np.full((2, 3, 4), 7), "pick one label"),
    ],
)
def test_a_mask_that_does_not_fit_its_image_is_refused_in_words(hu, mask, message):
    with pytest.raises(HarmonictError, match=message):
        check_roi(hu, mask)


def test_nan_outside_the_roi_does_not_matter():
    hu = np.zeros((2, 3, 4))
    hu[0, 0, 0] = np.nan
    mask = np.ones(hu.shape, np.uint8)
    mask[0, 0, 0] = 0
    assert check_roi(hu, mask).sum() == 23


def test_cropping_keeps_the_mask_and_the_asked_margin():
    mask = np.zeros((6, 7, 8), bool)
    mask[2:4, 3, 0:2] = True
    hu, small = crop_to_mask(np.arange(336).reshape(6, 7, 8), mask, margin=1)
    assert small.shape == (4, 3, 3) and small.sum() == mask.sum()
    assert hu[1, 1, 0] == 2 * 56 + 3 * 8


@pytest.mark.parametrize("order", [1, 3])
def test_resampling_keeps_a_linear_image_and_shares_the_grids_centre(order):
    z, y, x = np.meshgrid(np.arange(40), np.arange(41), np.arange(42), indexing="ij")
    hu = 3.0 * z + 2.0 * y * 0.9 + 1.0 * x * 0.7
    mask = np.zeros(hu.shape, bool)
    mask[15:25, 15:26, 15:27] = True
    new, new_mask, spacing = resample(hu, mask, (1.0, 0.9, 0.7), (2.0, 2.0, 2.0), order=order, round_hu=False)
    assert spacing == (2.0, 2.0, 2.0)
    steps = [
        np.diff(new, axis=a)[new_mask[tuple(slice(1, None) if b == a else slice(None) for b in range(3))]]
        for a in range(3)
    ]
    for step, slope in zip(steps, (6.0, 4.0, 2.0), strict=True):
        np.testing.assert_allclose(step, slope, atol=1e-6)
    inside = np.argwhere(new_mask).mean(axis=0)
    value_at_centre = hu[(19.5).__floor__(), 20, 20] + 1.5 + 0.35  # the grid's centre is at (19.5, 20, 20.5)
    corner = np.array(new_mask.shape) // 2
    middle = new[tuple(corner)] + (inside - corner) @ (6.0, 4.0, 2.0)
    assert middle == pytest.approx(value_at_centre, abs=1e-6)


def test_resampling_to_the_same_spacing_changes_nothing():
    rng = np.random.default_rng(3)
    hu = rng.integers(-1000, 400, (9, 10, 11)).astype(float)
    mask = np.zeros(hu.shape, bool)
    mask[2:7, 3:8, 2:9] = True
    new, new_mask, _ = resample(hu, mask, (3.0, 1.0, 1.0), (0, 0, 0), order=3)
    wide, narrow = crop_to_mask(hu, mask, margin=1)
    assert new_mask.sum() == mask.sum()
    np.testing.assert_array_equal(new[new_mask], hu[mask])
    assert new.shape == wide.shape and narrow.shape == new_mask.shape


def test_resampled_hu_are_whole_numbers_and_the_mask_is_cut_at_one_half():
    hu = np.random.default_rng(0).normal(0, 50, (8, 8, 8))
    mask = np.zeros(hu.shape, bool)
    mask[:, :, :4] = True
    new, new_mask, _ = resample(hu, mask, (1.0, 1.0, 1.0), (1.0, 1.0, 0.5), order=1)
    np.testing.assert_array_equal(new, np.round(new))
    assert new_mask.sum() == 8 * 8 * 8  # 4 voxels of 1 mm are 8 of 0.5 mm


def test_a_roi_that_vanishes_on_the_new_grid_is_an_error_in_words():
    hu = np.zeros((20, 20, 20))
    mask = np.zeros(hu.shape, bool)
    mask[4, 4, 4] = True
    with pytest.raises(HarmonictError, match="vanishes"):
        resample(hu, mask, (1.0, 1.0, 1.0), (8.0, 8.0, 8.0), order=1)
    with pytest.raises(HarmonictError, match="above 0 mm"):
        resample(hu, mask, (1.0, 1.0, 1.0), (-1.0, 1.0, 1.0), order=1)


def test_resegmentation_keeps_the_ends_of_the_range_and_then_the_outlier_limit():
    hu = np.array([[[-1000.0, -500.0, 0.0, 10.0, 400.0, 401.0]]])
    mask = np.ones(hu.shape, bool)
    assert resegment(hu, mask, range_hu=(-500, 400)).tolist() == [[[False, True, True, True, True, False]]]
    values = np.concatenate([np.zeros(99), [1000.0]]).reshape(1, 10, 10)
    assert resegment(values, np.ones(values.shape, bool), outlier_sigma=3).sum() == 99
    assert resegment(values, np.ones(values.shape, bool)).all()
    with pytest.raises(HarmonictError, match="widen the resegmentation range"):
        resegment(hu, mask, range_hu=(500, 600))


def test_a_level_image_holds_the_levels_inside_and_zero_outside():
    mask = np.array([[[True, False, True]]])
    image = level_image(np.array([4, 9]), mask)
    assert image.dtype == np.int32 and image.tolist() == [[[4, 0, 9]]]
