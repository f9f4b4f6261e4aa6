"""Other pixels show the same anatomy: what both can show is unchanged, and what the coarser cannot show is gone."""

import numpy as np
import pytest

from harmonict.core import Geometry, Series
from harmonict.core.resample import resample_mask, resample_plane, resample_series, resampled_geometry, resampled_shape


def blobs(shape, pixel_mm, width_mm=2.0):
    """Smooth blobs at fixed places of the field of view, whose upper left corner is 0 mm."""
    y, x = ((np.arange(n) + 0.5) * d for n, d in zip(shape, pixel_mm, strict=True))
    image = np.zeros(shape)
    for cy, cx, hu in ((40, 60, 800), (70, 30, -600), (90, 90, 300)):
        image += hu * np.exp(-((y[:, None] - cy) ** 2 + (x[None] - cx) ** 2) / 2 / width_mm**2)
    return image.astype(np.float32)


@pytest.mark.parametrize(("have", "wanted"), [((0.7, 0.7), (0.9, 0.9)), ((0.9, 0.8), (0.6, 0.7)), ((0.5, 0.5), (1, 1))])
def test_a_smooth_image_is_what_the_other_pixels_would_have_shown(have, wanted):
    shape = tuple(round(120 / d) for d in have)
    other = resampled_shape(shape, have, wanted)
    result = resample_plane(blobs(shape, have), have, wanted, other)
    assert result.dtype == np.float32 and np.abs(result - blobs(other, wanted)).max() < 0.5


def test_there_and_back_changes_nothing_that_both_can_show():
    image = blobs((160, 150), (0.75, 0.75))
    there = resample_plane(image, (0.75, 0.75), (0.9, 0.9), resampled_shape(image.shape, (0.75, 0.75), (0.9, 0.9)))
    back = resample_plane(there, (0.9, 0.9), (0.75, 0.75), image.shape)
    assert np.abs(back - image).max() < 0.5


def test_a_constant_stays_constant_up_to_the_edges():
    image = np.full((50, 41), -1000, np.float32)
    assert np.abs(resample_plane(image, (0.7, 0.7), (1.1, 0.4), (32, 72)) + 1000).max() < 1e-3


@pytest.mark.parametrize(
    ("frequency_per_mm", "least", "most"), [(0.2, 0.99, 1.01), (0.38, 0.97, 1.03), (0.65, 0, 0.01)]
)
def test_waves_under_the_new_nyquist_frequency_stay_and_those_over_it_do_not_fold_back(frequency_per_mm, least, most):
    wave = 100 * np.cos(2 * np.pi * frequency_per_mm * (np.arange(400) + 0.5) * 0.5)
    image = np.broadcast_to(wave, (20, 400)).astype(np.float32)
    result = resample_plane(image, (0.5, 0.5), (0.5, 1.0), (20, 200))  # its Nyquist frequency: 0.5 per mm
    assert least <= result[10, 20:-20].std() / wave.std() <= most


def test_a_mask_is_that_of_the_pixel_in_which_the_new_one_lies():
    mask = np.zeros((4, 4), bool)
    mask[:, 2:] = True
    assert np.array_equal(resample_mask(mask, (1, 1), (2, 0.5), (2, 8)), np.repeat([[False, True]], 4, 1).repeat(2, 0))


def test_the_grid_says_where_the_new_pixels_lie_in_the_patient():
    tilted = ((0.0, 0.0, 1.0), (-0.6, 0.8, 0.0), (0.8, 0.6, 0.0))
    old = Geometry((5.0, -7.0, 3.0), (2.0, 0.7, 0.8), tilted)
    new = resampled_geometry(old, (1.0, 0.5))
    assert new.spacing_mm == (2.0, 1.0, 0.5) and new.direction == old.direction
    corner = np.array([0, -0.5, -0.5])
    assert np.allclose(new.to_patient(corner), old.to_patient(corner))


def test_a_series_keeps_its_padding_its_clipped_air_and_its_slices():
    hu = np.stack([blobs((100, 100), (0.7, 0.7)) - 1024] * 2)
    hu[:, 55:, 41:44] = 300  # a sharp edge, which rings
    padding = np.zeros(hu.shape, bool)
    padding[:, :, :9] = True
    hu[padding] = -2048
    result = resample_series(
        Series(hu.clip(-1024, None) * ~padding + hu * padding, Geometry((0, 0, 0), (3, 0.7, 0.7)), padding=padding),
        (1.0, 1.0),
    )
    assert result.hu.shape == (2, 70, 70) and result.pixel_mm == (1.0, 1.0) and result.geometry.spacing_mm[0] == 3
    assert result.padding[:, :, :6].all() and not result.padding[:, :, 7:].any()
    assert result.hu.min() == -1024
