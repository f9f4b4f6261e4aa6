"""Random regions of interest: what they promise, on made images."""

import itertools

import numpy as np
import pytest

from harmonict.core import HarmonictError, Series
from harmonict.radiomics.rois import HU_RANGES, count_rois, random_rois


@pytest.fixture
def image() -> np.ndarray:
    """Lung on the left, soft tissue on the right, a small insert of bone, with noise; 10 slices."""
    rng = np.random.default_rng(0)
    hu = np.full((10, 160, 200), -700.0)
    hu[:, :, 100:] = 60
    hu[:, 20:40, 150:170] = 500
    return (hu + rng.normal(0, 20, hu.shape)).astype(np.float32)


def draw(image, seed=1, **arguments):
    return random_rois(image, rng=np.random.default_rng(seed), **arguments)


def overlap(a, b) -> bool:
    return all(p.start < q.stop and q.start < p.stop for p, q in zip(a.box, b.box, strict=True))


def test_every_box_has_its_mean_on_the_reference_in_its_range_and_inside_the_image(image):
    rois = draw(image)
    assert {r.hu_range for r in rois} == set(HU_RANGES)
    for roi in rois:
        part = image[roi.box]
        assert part.shape == roi.shape
        assert roi.mean_hu == pytest.approx(part.mean(dtype=float), abs=0.01)
        assert roi.hu_range[0] <= roi.mean_hu <= roi.hu_range[1]


def test_boxes_of_one_range_do_not_overlap(image):
    rois = draw(image)
    for hu_range in HU_RANGES:
        mine = [r for r in rois if r.hu_range == hu_range]
        assert not any(overlap(a, b) for a, b in itertools.combinations(mine, 2))


def test_a_seed_gives_the_same_boxes_and_another_seed_others(image):
    assert draw(image) == draw(image)
    assert draw(image) != draw(image, seed=2)


def test_smaller_boxes_come_where_large_ones_do_not_fit_and_the_counts_say_so(image):
    rois = draw(image)
    bone = [r for r in rois if r.hu_range == (300, 800)]
    assert 0 < len(bone) < 24
    assert {r.shape[1] for r in bone} <= {16, 8}
    counts = count_rois(rois)
    assert counts["number"].sum() == len(rois)
    assert (counts.loc[(counts["hu_min"] == 300), "number"]).sum() == len(bone)
    nothing = count_rois(draw(np.zeros((1, 40, 40), np.float32), hu_ranges=[(300, 800)]), hu_ranges=[(300, 800)])
    assert list(nothing["size"]) == ["-"] and list(nothing["number"]) == [0]


def test_large_boxes_come_first_and_the_wanted_number_is_reached_where_there_is_room():
    flat = np.zeros((8, 512, 512), np.float32)
    rois = draw(flat, hu_ranges=[(-100, 250)])
    assert len(rois) == 24
    assert {r.shape for r in rois} == {(8, 32, 32)}


def test_boxes_are_spread_over_all_places():
    flat = np.zeros((1, 64, 64), np.float32)
    rng = np.random.default_rng(5)
    starts = [random_rois(flat, rng=rng, hu_ranges=[(-1, 1)], number=1)[0].start for _ in range(400)]
    y, x = np.array(starts)[:, 1:].T
    # uniform on 0..32: mean 16, SD 9.5, so 400 draws have a standard error of 0.48
    assert abs(y.mean() - 16) < 2 and abs(x.mean() - 16) < 2
    assert y.min() == 0 and y.max() == 32 and x.min() == 0 and x.max() == 32


def test_a_single_slice_gives_boxes_one_voxel_deep(image):
    assert {r.shape[0] for r in draw(image[:1])} == {1}
    assert {r.shape[0] for r in draw(image[:5])} == {5}
    assert {r.shape[0] for r in draw(image)} == {8}
    assert {r.shape[0] for r in draw(Series(image, is_volume=False))} == {1}


def test_boxes_keep_out_of_padding_and_stay_within_the_region(image):
    padding = np.zeros(image.shape, bool)
    padding[:, :100] = True
    for roi in draw(Series(image, padding=padding)):
        assert not padding[roi.box].any()
    region = np.zeros(image.shape, bool)
    region[:, :, 60:180] = True
    rois = draw(image, within=region)
    assert rois and all(region[r.box].all() for r in rois)


def test_the_mask_of_a_box_is_the_box_and_another_grid_is_refused(image):
    roi = draw(image)[0]
    mask = roi.mask(image.shape)
    assert mask.sum() == np.prod(roi.shape) and mask[roi.box].all()
    with pytest.raises(HarmonictError, match="another grid"):
        roi.mask((1, 8, 8))


def test_arguments_that_cannot_be_are_refused(image):
    with pytest.raises(HarmonictError, match="lower end first"):
        draw(image, hu_ranges=[(100, 0)])
    with pytest.raises(HarmonictError, match="at least 1"):
        draw(image, number=0)
    with pytest.raises(HarmonictError, match="z, y, x"):
        draw(image[0])
