import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from harmonict.core import HarmonictError
from harmonict.radiomics import FeatureSettings, extract_features, ibsi_features
from harmonict.radiomics.features import FAMILIES

ISOTROPIC = (1.0, 1.0, 1.0)


def roi(seed=0, shape=(10, 14, 16)):
    rng = np.random.default_rng(seed)
    hu = np.round(ndimage.gaussian_filter(rng.normal(size=shape), 1) * 600 - 50)
    mask = ndimage.gaussian_filter(rng.normal(size=shape), 1.5) > -0.05
    return hu.astype(np.float32), mask


def test_the_default_settings_give_the_shape_and_93_further_features_of_pyradiomics():
    names = list(extract_features(*roi(), ISOTROPIC))
    counts = {family: sum(n.split("_")[1] == family for n in names) for family in FAMILIES}
    assert counts == {"shape": 14, "firstorder": 18, "glcm": 24, "glrlm": 16, "glszm": 16, "gldm": 14, "ngtdm": 5}
    assert all(n.startswith("original_") for n in names)


def test_filters_add_their_images_under_pyradiomics_names():
    settings = FeatureSettings(filters=("Original", "LoG", "Wavelet"), log_sigma_mm=(1.5,), families=("firstorder",))
    images = {name.split("_")[0] for name in extract_features(*roi(), ISOTROPIC, settings)}
    bands = {f"wavelet-{a}{b}{c}" for a in "LH" for b in "LH" for c in "LH"}
    assert images == {"original", "log-sigma-1-5-mm-3D"} | bands


def test_first_order_features_have_their_closed_forms():
    hu = np.arange(1, 101, dtype=np.float32).reshape(1, 10, 10)
    found = extract_features(hu, np.ones(hu.shape, bool), (2.0, 1.0, 1.0), FeatureSettings(families=("firstorder",)))
    wanted = {"Mean": 50.5, "Median": 50.5, "Minimum": 1, "Maximum": 100, "Range": 99, "Variance": (100**2 - 1) / 12}
    wanted |= {"Energy": 338350, "TotalEnergy": 676700, "RootMeanSquared": np.sqrt(3383.5), "Skewness": 0}
    wanted |= {"MeanAbsoluteDeviation": 25, "10Percentile": 10.9, "90Percentile": 90.1, "InterquartileRange": 49.5}
    wanted |= {"Kurtosis": 3 - 1.2 * (100**2 + 1) / (100**2 - 1)}  # not excess: 3 for a Gaussian
    # bins [0, 25), [25, 50), ... hold 24, 25, 25, 25 and 1 values
    share = np.array([24, 25, 25, 25, 1]) / 100
    wanted |= {"Entropy": -(share * np.log2(share)).sum(), "Uniformity": (share**2).sum()}
    for name, value in wanted.items():
        assert found[f"original_firstorder_{name}"] == pytest.approx(value, abs=1e-9), name


def test_a_constant_roi_has_defined_values_in_every_family():
    hu = np.full((4, 5, 6), 37.0, np.float32)
    for settings in (FeatureSettings(), FeatureSettings(bin_count=32), FeatureSettings(dimension="2D")):
        found = extract_features(hu, np.ones(hu.shape, bool), ISOTROPIC, settings)
        assert all(np.isfinite(v) for v in found.values())
        assert found["original_firstorder_Variance"] == 0 and found["original_firstorder_Entropy"] == 0
        assert found["original_firstorder_Skewness"] == 0 and found["original_firstorder_Kurtosis"] == 0
        assert found["original_glcm_Contrast"] == 0 and found["original_glcm_JointEnergy"] == 1
        assert found["original_glcm_Correlation"] == 1 and found["original_glcm_MCC"] == 1
        assert found["original_glcm_Imc1"] == 0 and found["original_glcm_Imc2"] == 0
        assert found["original_glszm_LargeAreaEmphasis"] == (120**2 if settings.dimension == "3D" else 30**2)
        assert found["original_ngtdm_Coarseness"] == 1e6


@pytest.mark.parametrize("merged", [False, True])
def test_flips_and_quarter_turns_change_no_feature_of_an_isotropic_image(merged):
    hu, mask = roi(3)
    settings = FeatureSettings(merge_directions=merged)
    wanted = extract_features(hu, mask, ISOTROPIC, settings)
    turns = [
        lambda a: a[::-1],
        lambda a: a[:, :, ::-1],
        lambda a: np.rot90(a, axes=(1, 2)),
        lambda a: np.rot90(a, axes=(0, 2)),
    ]
    for turn in turns:
        found = extract_features(np.ascontiguousarray(turn(hu)), turn(mask), ISOTROPIC, settings)
        # a mesh with pinched corners depends on how it lies; texture and first order do not
        skip = ("Mesh", "Surface", "Sphericity", "Maximum2D")
        for name, value in wanted.items():
            if not any(s in name for s in skip):
                assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


def test_in_plane_turns_change_no_feature_within_slices():
    hu, mask = roi(4)
    settings = FeatureSettings(dimension="2D", families=("glcm", "glrlm", "glszm", "gldm", "ngtdm"))
    wanted = extract_features(hu, mask, (3.0, 1.0, 1.0), settings)
    turned = extract_features(np.rot90(hu, axes=(1, 2)), np.rot90(mask, axes=(1, 2)), (3.0, 1.0, 1.0), settings)
    assert turned == pytest.approx(wanted, rel=1e-9)
    assert extract_features(hu[::-1], mask[::-1], (3.0, 1.0, 1.0), settings) == pytest.approx(wanted, rel=1e-9)


def test_texture_with_a_fixed_number_of_bins_does_not_see_an_affine_change_of_hu():
    hu, mask = roi(5)
    settings = FeatureSettings(bin_count=32, families=("glcm", "glrlm", "glszm", "gldm", "ngtdm"))
    wanted = extract_features(hu, mask, ISOTROPIC, settings)
    assert extract_features(hu * 2 + 64, mask, ISOTROPIC, settings) == pytest.approx(wanted, rel=1e-12)


def test_texture_with_a_fixed_bin_width_does_not_see_a_shift_by_whole_bins():
    hu, mask = roi(6)
    settings = FeatureSettings(bin_width=25, families=("glcm", "glrlm", "glszm", "gldm", "ngtdm"))
    wanted = extract_features(hu, mask, ISOTROPIC, settings)
    assert extract_features(hu + 250, mask, ISOTROPIC, settings) == pytest.approx(wanted, rel=1e-12)


def test_what_lies_outside_the_roi_does_not_change_its_features():
    hu, mask = roi(7)
    other = np.where(mask, hu, 3000).astype(np.float32)
    wide, wide_mask = np.pad(other, 3, constant_values=np.nan), np.pad(mask, 3)
    assert extract_features(wide, wide_mask, ISOTROPIC) == extract_features(hu, mask, ISOTROPIC)


def test_one_slice_gives_two_dimensional_shape_and_texture():
    hu, mask = roi(8, (1, 20, 20))
    found = extract_features(hu, mask, ISOTROPIC, FeatureSettings(dimension="2D"))
    assert sum("_shape2D_" in name for name in found) == 9 and sum("_shape_" in name for name in found) == 0
    assert all(np.isfinite(v) for v in found.values()) and len(found) == 9 + 93


def test_all_directions_of_a_merged_matrix_count_alike():
    hu, mask = roi(9)
    apart = extract_features(hu, mask, ISOTROPIC, FeatureSettings(families=("glcm", "glszm")))
    merged = extract_features(hu, mask, ISOTROPIC, FeatureSettings(families=("glcm", "glszm"), merge_directions=True))
    assert apart["original_glszm_ZoneEntropy"] == merged["original_glszm_ZoneEntropy"]
    assert apart["original_glcm_JointEntropy"] < merged["original_glcm_JointEntropy"]  # entropy is concave


def test_many_grey_levels_are_worked_off_in_parts_with_the_same_result(monkeypatch):
    hu, mask = roi(10)
    settings = FeatureSettings(bin_width=2, families=("glcm",))
    wanted = extract_features(hu, mask, ISOTROPIC, settings)
    monkeypatch.setattr("harmonict.radiomics.features.GLCM_BYTES", 1.0)
    assert extract_features(hu, mask, ISOTROPIC, settings) == pytest.approx(wanted, rel=1e-12)
    monkeypatch.setattr("harmonict.radiomics.features.MAX_GLCM_LEVELS", 20)
    with pytest.raises(HarmonictError, match="wider bins"):
        extract_features(hu, mask, ISOTROPIC, settings)


def test_resampling_and_resegmentation_are_applied_before_discretisation():
    hu, mask = roi(11)
    settings = FeatureSettings(resample_mm=(2, 2, 2), resegment_hu=(-100, 50), families=("shape", "firstorder"))
    found = extract_features(hu, mask, ISOTROPIC, settings)
    assert found["original_firstorder_Minimum"] >= -100 and found["original_firstorder_Maximum"] <= 50
    assert found["original_shape_VoxelVolume"] % 8 == 0
    no_range = extract_features(hu, mask, ISOTROPIC, replace(settings, resegment_hu=None))
    assert no_range["original_shape_VoxelVolume"] == found["original_shape_VoxelVolume"]  # shape: before the range


@pytest.mark.parametrize(
    "hu, mask, settings, message",
    [
        (np.zeros((3, 3, 3)), np.zeros((3, 3, 3), bool), {}, "empty"),
        (
            np.zeros((3, 3, 3)),
            np.eye(9, 1).reshape(3, 3, 1).repeat(3, 2) * 0 + (np.arange(27) == 13).reshape(3, 3, 3),
            {},
            "one voxel",
        ),
        (np.full((3, 3, 3), np.nan), np.ones((3, 3, 3), bool), {}, "NaN"),
        (np.zeros((3, 3, 3)), np.ones((3, 3, 4), bool), {}, "shape"),
        (np.arange(27.0).reshape(3, 3, 3) * 1000, np.ones((3, 3, 3), bool), {"bin_width": 1.0}, "10,000"),
        (np.zeros((3, 3, 3)), np.ones((3, 3, 3), bool), {"bin_width": None}, "whole numbers from 1"),
        (np.zeros((1, 5, 5)), np.ones((1, 5, 5), bool), {"filters": ("LoG",)}, "LoG"),
    ],
)
def test_what_has_no_features_is_refused_in_one_line(hu, mask, settings, message):
    with pytest.raises(HarmonictError, match=message) as caught:
        extract_features(hu, mask, ISOTROPIC, FeatureSettings(**settings))
    assert "\n" not in str(caught.value)


def test_two_voxels_without_a_common_line_are_refused_by_the_families_that_need_one():
    mask = np.zeros((3, 5, 5), bool)
    mask[1, 1, 1] = mask[1, 2, 3] = True
    hu = np.arange(75.0).reshape(mask.shape)
    with pytest.raises(HarmonictError, match="GLCM is empty"):
        extract_features(hu, mask, ISOTROPIC)
    with pytest.raises(HarmonictError, match="GLRLM is empty"):
        extract_features(hu, mask, ISOTROPIC, FeatureSettings(families=("glrlm",)))
    rest = extract_features(hu, mask, ISOTROPIC, FeatureSettings(families=("firstorder", "glszm", "gldm", "ngtdm")))
    assert all(np.isfinite(v) for v in rest.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"bin_width": 0},
        {"bin_width": -1.0},
        {"bin_width": float("nan")},
        {"bin_count": 0},
        {"dimension": "4D"},
        {"distances": ()},
        {"distances": (0,)},
        {"families": ("glcmm",)},
        {"filters": ("Sobel",)},
        {"resegment_hu": (100, -100)},
    ],
)
def test_settings_that_cannot_be_are_refused_when_they_are_made(settings):
    with pytest.raises(HarmonictError):
        FeatureSettings(**settings)


def test_small_random_rois_give_finite_numbers_or_a_refusal_in_words():
    rng = np.random.default_rng(12)
    given = refused = 0
    for k in range(150):
        shape = rng.integers(1, 6, 3)
        mask = rng.random(shape) < rng.choice([0.15, 0.4, 0.8, 1.0])
        hu = np.round(rng.normal(0, rng.choice([0, 1, 300]), shape))
        settings = FeatureSettings(dimension=("2D", "3D")[k % 2], bin_count=(None, 8)[k % 3 == 0])
        for function in (extract_features, ibsi_features):
            try:
                found = function(hu, mask, (2.0, 1.0, 0.5), settings)
            except HarmonictError:
                refused += 1
                continue
            given += 1
            assert all(np.isfinite(v) for v in found.values())
    assert given > 200 and refused > 20


def test_radiomics_imports_no_torch():
    code = "import sys, harmonict.radiomics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
