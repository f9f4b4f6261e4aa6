"""Padding is what was never measured; air that a file clips is measured."""

import numpy as np
import pytest
from scipy import ndimage

from harmonict.core.padding import clip_floor, connected_to_border, fill_padding, find_padding


def circle(size: int = 64, radius: float = 30.0) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return x**2 + y**2 > radius**2


def scan(padding_hu: float, slices: int = 3) -> tuple[np.ndarray, np.ndarray]:
    outside = np.broadcast_to(circle(), (slices, 64, 64)).copy()
    hu = np.random.default_rng(1).normal(-980, 40, outside.shape).round().clip(-1300, None).astype(np.float32)
    hu[outside] = padding_hu
    return hu, outside


@pytest.mark.parametrize("value", [-3024, -2048, -2000])
def test_an_untagged_value_far_below_air_outside_the_circle_is_padding(value):
    hu, outside = scan(value)
    assert np.array_equal(find_padding(hu), outside)


@pytest.mark.parametrize("value", [-1024, -1000, -1360])
def test_air_that_a_file_clips_is_no_padding(value):
    hu, _ = scan(value)
    assert find_padding(np.maximum(hu, value)) is None


def test_a_low_value_inside_the_image_is_no_padding():
    hu, outside = scan(-2048)
    hu[:, 30:33, 30:33] = -2048
    found = find_padding(hu)
    assert np.array_equal(found, outside)


def test_a_lowest_value_that_data_reach_down_to_is_no_padding():
    hu, _ = scan(-2048)
    hu[:, 20, 20] = -2000
    assert find_padding(hu) is None


def test_each_slice_is_judged_by_itself():
    hu, outside = scan(-3024)
    hu[1][outside[1]] = -1000
    found = find_padding(hu)
    assert np.array_equal(found[[0, 2]], outside[[0, 2]])
    assert not found[1].any()


def test_what_the_file_tags_is_taken_as_it_is_and_joined_with_what_is_seen():
    hu, outside = scan(-2048)
    tagged = np.zeros(hu.shape, bool)
    tagged[0, 32, 32] = True
    found = find_padding(hu, tagged=tagged)
    assert np.array_equal(found, outside | tagged)
    assert tagged.sum() == 1, "the argument was changed"


def test_filling_takes_the_nearest_measured_value_and_leaves_the_rest_alone():
    hu, outside = scan(-3024)
    filled = fill_padding(hu, outside)
    assert np.array_equal(filled[~outside], hu[~outside])
    assert filled.min() >= hu[~outside].min()
    assert filled[0, 0, 32] == hu[0][:, 32][~outside[0][:, 32]][0], "straight above the circle, its top value"
    assert hu[outside].max() == -3024, "the argument was changed"


def test_a_filter_sees_no_cliff_at_the_edge_of_a_filled_circle():
    _, outside = scan(-3024)
    air = np.where(outside, -3024, -1000).astype(np.float32)
    sharpen = np.array([-0.5, 2.0, -0.5])
    padded, filled = (ndimage.convolve1d(image, sharpen, axis=2) for image in (air, fill_padding(air, outside)))
    assert np.abs(padded[~outside] + 1000).max() > 900
    assert np.abs(filled[~outside] + 1000).max() == 0


def test_nothing_padded_gives_the_same_array_back():
    hu, outside = scan(-2048)
    assert fill_padding(hu, None) is hu
    assert fill_padding(hu, np.zeros_like(outside)) is hu


def test_a_slice_of_nothing_but_padding_becomes_air():
    hu = np.full((1, 8, 8), -2048, np.float32)
    padding = find_padding(hu)
    assert padding.all()
    assert (fill_padding(hu, padding) == -1000).all()


def test_only_parts_at_the_border_are_connected_to_it():
    mask = np.zeros((6, 6), bool)
    mask[0, :3] = mask[1, 1] = mask[3, 3] = mask[5, 5] = True
    expected = mask.copy()
    expected[3, 3] = False
    assert np.array_equal(connected_to_border(mask), expected)


@pytest.mark.parametrize(
    ("series", "value", "share"),
    [("ct/CRLM-CT-1006/image", -3024, 0.21), ("ct/TCGA-09-2043/image", -2048, 0.29)],
)
def test_the_padding_of_real_series_is_found(data, series, value, share):
    from harmonict.dicom.read import read_series

    found = read_series(sorted((data / series).iterdir()))
    assert found.padding.mean() == pytest.approx(share, abs=0.01)
    assert (found.hu[found.padding] == value).all()
    assert found.hu[~found.padding].min() > -1500


@pytest.mark.parametrize("series", ["LUNG1-001", "C3N-00249", "LIDC-IDRI-0314"])
def test_real_series_whose_air_is_clipped_have_no_padding(data, series):
    from harmonict.dicom.read import read_series

    files = sorted((data / "ct" / series / "image").iterdir())[:5]
    assert read_series(files).padding is None


def test_a_file_clips_where_many_voxels_share_the_lowest_value():
    rng = np.random.default_rng(0)
    hu = rng.normal(-1000, 20, (4, 50, 50)).astype(np.float32)
    assert clip_floor(hu) == -np.inf
    assert clip_floor(np.maximum(hu, -1024)) == -1024
    padding = np.zeros(hu.shape, bool)
    padding[:, :5] = True
    assert clip_floor(np.where(padding, np.float32(-2048), hu), padding) == -np.inf
    assert clip_floor(np.where(padding, np.float32(-2048), np.maximum(hu, -1024)), padding) == -1024
    assert clip_floor(np.maximum(hu, -1024)[0]) == -1024
    stray = np.maximum(hu, -1024)
    stray[0, 1, 1] = -1100
    assert clip_floor(stray) == -1024
