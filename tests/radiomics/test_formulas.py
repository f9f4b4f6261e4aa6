import numpy as np
import pytest

from harmonict.radiomics.formulas import (
    GLCM_NAMES,
    NGTDM_NAMES,
    SIZE_NAMES,
    glcm_features,
    maximal_correlation,
    mean_rows,
    ngtdm_features,
    size_features,
)


def glcm(counts, values, ng):
    return dict(zip(GLCM_NAMES, glcm_features(np.array([counts], float), np.array(values), ng)[0], strict=True))


def test_the_glcm_of_alternating_levels_has_its_closed_forms():
    found = glcm([[0, 5], [5, 0]], [1, 2], 2)
    wanted = {
        "contrast": 1,
        "joint_avg": 1.5,
        "joint_var": 0.25,
        "joint_entr": 1,
        "energy": 0.5,
        "corr": -1,
        "diff_avg": 1,
    }
    wanted |= {"diff_entr": 0, "sum_avg": 3, "sum_entr": 0, "inv_diff": 0.5, "inv_diff_norm": 2 / 3, "inv_var": 1}
    wanted |= {"inv_diff_mom_norm": 0.8, "auto_corr": 2, "clust_tend": 0, "info_corr1": -1, "joint_max": 0.5}
    wanted |= {"info_corr2": np.sqrt(1 - np.exp(-2))}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_the_glcm_of_independent_levels_has_no_information():
    found = glcm([[1, 2], [2, 4]], [1, 2], 2)
    assert found["corr"] == pytest.approx(0, abs=1e-12)
    assert found["info_corr1"] == 0 and found["info_corr2"] == 0
    assert maximal_correlation(np.array([[[1.0, 2], [2, 4]]]))[0] == pytest.approx(0, abs=1e-7)


def test_glcm_features_equal_the_definitions_summed_over_all_pairs():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, (6, 6)).astype(float)
    counts += counts.T
    values = np.array([1, 2, 5, 6, 9, 12])
    p = counts / counts.sum()
    i, j = np.meshgrid(values, values, indexing="ij")
    mean = (p * i).sum()
    found = glcm(counts, values, 12)
    assert found["contrast"] == pytest.approx((p * (i - j) ** 2).sum())
    assert found["auto_corr"] == pytest.approx((p * i * j).sum())
    assert found["clust_shade"] == pytest.approx((p * (i + j - 2 * mean) ** 3).sum())
    assert found["clust_prom"] == pytest.approx((p * (i + j - 2 * mean) ** 4).sum())
    assert found["corr"] == pytest.approx((p * (i - mean) * (j - mean)).sum() / (p * (i - mean) ** 2).sum())
    assert found["inv_diff_mom"] == pytest.approx((p / (1 + (i - j) ** 2)).sum())
    assert found["inv_diff_norm"] == pytest.approx((p / (1 + np.abs(i - j) / 12)).sum())
    assert found["diff_var"] == pytest.approx((p * (np.abs(i - j) - found["diff_avg"]) ** 2).sum())
    assert found["joint_entr"] == pytest.approx(-(p[p > 0] * np.log2(p[p > 0])).sum())


def test_the_maximal_correlation_of_two_separate_blocks_is_one():
    counts = np.zeros((1, 4, 4))
    counts[0, :2, :2] = counts[0, 2:, 2:] = 1
    assert maximal_correlation(counts)[0] == pytest.approx(1)
    assert maximal_correlation(np.ones((3, 1, 1))).tolist() == [1, 1, 1]


def test_an_empty_matrix_is_left_out_of_the_mean():
    counts = np.zeros((2, 2, 2))
    counts[0] = [[0, 1], [1, 0]]
    rows = glcm_features(counts, np.array([1, 2]), 2)
    assert np.isnan(rows[1]).all()
    np.testing.assert_array_equal(mean_rows(rows), rows[0])
    assert np.isnan(mean_rows(rows[1:])).all()


def test_size_features_of_one_cell_have_their_closed_forms():
    found = dict(zip(SIZE_NAMES, size_features(np.full((1, 1, 1), 3.0), np.array([2]), np.array([4]))[0], strict=True))
    wanted = {"small": 1 / 16, "large": 16, "low": 1 / 4, "high": 4, "small_low": 1 / 64, "small_high": 1 / 4}
    wanted |= {"large_low": 4, "large_high": 64, "level_nonuniformity": 3, "level_nonuniformity_norm": 1}
    wanted |= {"percentage": 0.25, "level_variance": 0, "size_variance": 0, "entropy": 0, "energy": 1}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value), name


def test_size_features_equal_the_definitions_summed_over_all_cells():
    rng = np.random.default_rng(2)
    counts = rng.integers(0, 5, (2, 3, 4)).astype(float)
    i, j = np.array([1, 4, 6]), np.array([1, 2, 5, 9])
    rows = size_features(counts, i, j)
    for row, p in zip(rows, counts / counts.sum(axis=(1, 2), keepdims=True), strict=True):
        found = dict(zip(SIZE_NAMES, row, strict=True))
        assert found["small_high"] == pytest.approx((p * i[:, None] ** 2 / j**2).sum())
        assert found["large_low"] == pytest.approx((p / i[:, None] ** 2 * j**2).sum())
        assert found["size_variance"] == pytest.approx((p * j**2).sum() - (p * j).sum() ** 2)
        assert found["entropy"] == pytest.approx(-(p[p > 0] * np.log2(p[p > 0])).sum())
        assert found["percentage"] == pytest.approx(1 / (p * j).sum())


def test_ngtdm_features_equal_the_definitions_summed_over_all_pairs():
    i, s, n = np.array([1, 2, 4, 7]), np.array([2.0, 3.0, 0.5, 8.0]), np.array([5.0, 2.0, 6.0, 3.0])
    p = n / n.sum()
    gap, both = i[:, None] - i[None, :], p[:, None] + p[None, :]
    wanted = {
        "coarseness": 1 / (p @ s),
        "contrast": (p[:, None] * p * gap**2).sum() / 12 * s.sum() / 16,
        "busyness": (p @ s) / np.abs((i * p)[:, None] - i * p).sum(),
        "complexity": (np.abs(gap) * ((p * s)[:, None] + p * s) / both).sum() / 16,
        "strength": (both * gap**2).sum() / s.sum(),
    }
    found = dict(zip(NGTDM_NAMES, ngtdm_features(i, s, n), strict=True))
    assert found == pytest.approx(wanted)


def test_a_flat_neighbourhood_has_the_largest_coarseness_and_nothing_else():
    assert ngtdm_features(np.array([3]), np.array([0.0]), np.array([9.0])).tolist() == [1e6, 0, 0, 0, 0]
    assert ngtdm_features(np.array([3]), np.array([0.0]), np.array([0.0])).tolist() == [1e6, 0, 0, 0, 0]
