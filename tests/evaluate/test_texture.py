"""STAN-CT's texture errors: features of the co-occurrence matrix against hand and library, and eq 8."""

import numpy as np
import pytest

from harmonict.core import HarmonictError
from harmonict.evaluate.texture import FEATURES, glcm_texture, texture_errors

NOISE = np.random.default_rng(0).normal(40, 30, (3, 60, 70)).astype(np.float32)


def test_two_stripes_have_the_features_that_a_pencil_gives():
    # levels 1 and 2 in columns: across and along both diagonals always (1, 2), along the columns never
    hu = np.tile(np.array([0.0, 10.0]), (6, 3))
    got = glcm_texture(hu, range_hu=(0, 20), levels=2)
    assert got["contrast"] == pytest.approx((1 + 1 + 1 + 0) / 4)
    assert got["dissimilarity"] == pytest.approx(3 / 4)
    assert got["homogeneity"] == pytest.approx((0.5 * 3 + 1) / 4)
    assert got["energy"] == pytest.approx(np.sqrt(0.5))
    assert got["correlation"] == pytest.approx((-3 + 1) / 4)


def test_the_features_are_those_of_scikit_image():
    feature = pytest.importorskip("skimage.feature")
    hu = NOISE[0]
    levels = np.clip(np.floor((hu.astype(np.float64) + 1000) * 256 / 1900), 0, 255).astype(np.uint8)
    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    matrix = feature.graycomatrix(levels, [1], angles, levels=256, symmetric=True, normed=True)
    ours = glcm_texture(hu)
    for name in FEATURES:
        assert ours[name] == pytest.approx(feature.graycoprops(matrix, name).mean(), rel=1e-9), name


def test_the_error_of_an_image_with_itself_is_0_and_doubled_noise_has_four_times_the_contrast():
    assert (texture_errors(NOISE, NOISE).to_numpy() == 0).all()
    wide = texture_errors((NOISE - 40) * 2 + 40, NOISE, range_hu=(-1000, 1000), levels=2000)
    assert wide["contrast"].to_numpy() == pytest.approx(3, rel=0.02)
    assert wide["dissimilarity"].to_numpy() == pytest.approx(1, rel=0.02)


def test_a_negative_reference_gives_a_positive_error():
    board = np.where(np.indices((8, 8))[1] % 2, 0.0, 10.0)  # correlation -1 across the columns
    flat = np.repeat(np.arange(8.0)[:, None], 8, axis=1)
    errors = texture_errors(flat, board, range_hu=(0, 20), levels=20)
    assert glcm_texture(board, range_hu=(0, 20), levels=20)["correlation"] < 0 < errors["correlation"][0]


def test_pixels_outside_the_mask_count_for_nothing():
    mask = np.zeros(NOISE.shape, bool)
    mask[:, 10:40, 10:50] = True
    spoiled = np.where(mask, NOISE, 3000)
    assert (texture_errors(spoiled, NOISE, mask=mask).to_numpy() == 0).all()
    cut = glcm_texture(NOISE[0, 10:40, 10:50])
    assert glcm_texture(spoiled[0], mask=mask[0]) == pytest.approx(cut)


def test_a_slice_outside_the_mask_and_a_feature_of_0_are_empty():
    mask = np.ones(NOISE.shape, bool)
    mask[1] = False
    errors = texture_errors(NOISE + 20, NOISE, mask=mask)
    assert errors.index.tolist() == [0, 1, 2] and errors.loc[1].isna().all() and errors.loc[[0, 2]].notna().all(None)
    constant = texture_errors(NOISE[0], np.full(NOISE[0].shape, 40.0))
    assert np.isnan(constant["contrast"][0]) and constant["energy"][0] > 0


def test_what_cannot_be_compared_is_refused_in_one_line():
    for call in (
        lambda: texture_errors(NOISE, NOISE[:2]),
        lambda: texture_errors(NOISE, NOISE, mask=np.ones((2, 2), bool)),
        lambda: glcm_texture(NOISE[0], range_hu=(5, 5)),
        lambda: glcm_texture(NOISE[0], levels=1),
        lambda: glcm_texture(np.full((5, 5), np.nan)),
        lambda: glcm_texture(NOISE[0], mask=np.ones(NOISE[0].shape)),
    ):
        with pytest.raises(HarmonictError) as error:
            call()
        assert "\n" not in str(error.value)
