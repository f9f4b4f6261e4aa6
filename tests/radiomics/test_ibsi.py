import numpy as np
import pytest
from scipy import ndimage

from harmonict.core import HarmonictError
from harmonict.radiomics import FeatureSettings, ibsi_features
from harmonict.radiomics.ibsi import (
    PEAK_RADIUS_MM,
    _ellipsoid_area,
    intensity_histogram,
    intensity_volume_histogram,
    local_intensity,
    spatial_autocorrelation,
)


def roi(seed=0, shape=(6, 12, 13)):
    rng = np.random.default_rng(seed)
    hu = np.round(ndimage.gaussian_filter(rng.normal(size=shape), 1) * 600 - 50).astype(np.float32)
    return hu, ndimage.gaussian_filter(rng.normal(size=shape), 1.5) > -0.05


def test_moran_and_geary_equal_the_sums_over_all_pairs():
    hu, mask = roi()
    where, values, spacing = np.argwhere(mask), hu[mask].astype(float), np.array([3.0, 0.9, 1.1])
    place = where * spacing
    distance = np.sqrt(((place[:, None] - place[None]) ** 2).sum(axis=2))
    weight = np.where(distance > 0, 1 / np.where(distance > 0, distance, 1), 0)
    centred = values - values.mean()
    moran = len(values) / weight.sum() * (centred @ weight @ centred) / (centred @ centred)
    gaps = (values[:, None] - values[None]) ** 2
    geary = (len(values) - 1) / (2 * weight.sum()) * (weight * gaps).sum() / (centred @ centred)
    assert spatial_autocorrelation(values, where, spacing) == pytest.approx((moran, geary), rel=1e-9)


def test_the_ellipsoids_series_has_its_closed_forms():
    assert _ellipsoid_area(4.0, 4.0, 4.0) == pytest.approx(4 * np.pi * 16)
    # b = c: every Legendre polynomial is 1, the series sums to (1 + (1 - x^2) atanh(x) / x) / 2
    x = np.sqrt(1 - (4 / 6) ** 2)
    assert _ellipsoid_area(6.0, 4.0, 4.0) == pytest.approx(4 * np.pi * 24 * (1 + (1 - x * x) * np.arctanh(x) / x) / 2)
    # a = b is the limit of a nearly equal pair
    assert _ellipsoid_area(5.0, 5.0, 2.0) == pytest.approx(_ellipsoid_area(5.0, 5.0 - 1e-7, 2.0), rel=1e-5)


def test_local_peaks_equal_the_mean_over_a_sphere_taken_by_hand():
    hu, mask = roi(1, (8, 14, 15))
    spacing = (3.0, 2.0, 2.0)
    place = np.indices(hu.shape).reshape(3, -1).T * spacing
    flat = hu.ravel().astype(float)

    def sphere(index):
        near = ((place - np.array(index) * spacing) ** 2).sum(axis=1) <= PEAK_RADIUS_MM**2
        return flat[near].mean()

    found = local_intensity(hu, mask, spacing)
    brightest = np.argwhere(mask & (hu == hu[mask].max()))
    assert found["loc_peak_loc"] == pytest.approx(max(sphere(i) for i in brightest))
    assert found["loc_peak_glob"] == pytest.approx(max(sphere(i) for i in np.argwhere(mask)))


def test_histogram_features_of_a_small_histogram_have_their_closed_forms():
    found = intensity_histogram(np.array([1, 1, 1, 1, 2, 4]), 4)
    assert found["mode"] == 1 and found["uniformity"] == pytest.approx(18 / 36)
    assert found["max_grad"] == 1 and found["max_grad_g"] == 4  # counts 4 1 0 1, gradient -3 -2 0 1
    assert found["min_grad"] == -3 and found["min_grad_g"] == 1


def test_the_mode_nearest_to_the_mean_is_taken_of_several():
    assert intensity_histogram(np.array([1, 1, 5, 5, 6]), 6)["mode"] == 5


def test_the_volume_histogram_of_equally_filled_levels_is_a_staircase():
    found = intensity_volume_histogram(np.arange(1.0, 101.0), FeatureSettings())
    assert found["v10"] == pytest.approx(0.90) and found["v90"] == pytest.approx(0.10)
    assert found["i10"] == pytest.approx(91) and found["i90"] == pytest.approx(11)


def test_a_constant_roi_has_defined_values_in_every_ibsi_family():
    hu = np.full((4, 6, 6), 12.0, np.float32)
    for settings in (
        FeatureSettings(),
        FeatureSettings(bin_count=32, ivh_bin_count=100),
        FeatureSettings(bin_width=None),
    ):
        found = ibsi_features(hu, np.ones(hu.shape, bool), (1.0, 1.0, 1.0), settings, dimensions=("2D", "2.5D", "3D"))
        assert all(np.isfinite(v) for v in found.values())
        assert found["morph_moran_i"] == 0 and found["morph_geary_c"] == 1


def test_one_slice_gives_the_same_2d_and_25d_features():
    hu, mask = roi(2, (1, 20, 20))
    found = ibsi_features(hu, mask, (1.0, 1.0, 1.0), FeatureSettings(bin_width=25), dimensions=("2D", "2.5D"))
    for tag in ("szm_lze", "dzm_zd_entr", "ngt_busyness", "ngl_dc_entr_d1_a0.0"):
        assert found[f"{tag}_2d_fbs_w25.0"] == pytest.approx(found[f"{tag}_2.5d_fbs_w25.0"])
    assert found["cm_contrast_d1_2d_avg_fbs_w25.0"] == pytest.approx(found["cm_contrast_d1_2.5d_d_mrg_fbs_w25.0"])


def test_the_dimension_of_the_settings_chooses_the_tags():
    hu, mask = roi(3)
    flat = ibsi_features(hu, mask, (3.0, 1.0, 1.0), FeatureSettings(dimension="2D", bin_count=32))
    solid = ibsi_features(hu, mask, (3.0, 1.0, 1.0), FeatureSettings(bin_count=32))
    assert len(flat) == 346 and len(solid) == 210
    assert "szm_sze_2.5d_fbn_n32" in flat and "szm_sze_3d_fbn_n32" in solid


def test_an_empty_or_single_voxel_roi_is_refused():
    hu, mask = roi(4)
    with pytest.raises(HarmonictError, match="empty"):
        ibsi_features(hu, mask & False, (1.0, 1.0, 1.0))
    one = np.zeros(mask.shape, bool)
    one[2, 2, 2] = True
    with pytest.raises(HarmonictError, match="one voxel"):
        ibsi_features(hu, one, (1.0, 1.0, 1.0))
