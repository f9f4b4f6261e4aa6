import itertools

import numpy as np
import pytest

from harmonict.core import HarmonictError
from harmonict.radiomics.features import FeatureSettings, extract_features
from harmonict.radiomics.ibex import DIRECTIONS3, DIRECTIONS25, GLCM, GLRLM, IbexSettings, ibex_features, ibex_table

SPACING = (2.0, 0.7, 0.7)
SIX = {"GOH": 204, "GLCM": 638, "GLRLM": 33, "ID": 292, "IH": 204, "NID": 30}
SEVEN = {"GLCM25": 330, "GLCM3": 308, "GLRLM25": 33, "ID": 292, "IH": 408, "NID25": 15, "NID3": 15}


def holed_roi(shape=(4, 10, 9), seed=3):
    """HU of about 10 grey levels (widths of 16 HU) and a mask with holes, one slice of it fuller than the others."""
    rng = np.random.default_rng(seed)
    hu = rng.normal(40, 25, size=shape).astype(np.float32)
    mask = rng.random(shape) < 0.8
    mask[shape[0] // 2] |= rng.random(shape[1:]) < 0.6
    return hu, mask


def levels_of(hu, mask):
    return np.where(mask, np.floor((hu.astype(float) + 1024) / 16).astype(int) + 1, 0)


@pytest.fixture(scope="module")
def case():
    hu, mask = holed_roi()
    return hu, mask, levels_of(hu, mask), ibex_features(hu, mask, SPACING)


def test_the_set_holds_1401_features_with_unique_names_in_the_order_of_the_table(case):
    table = ibex_table()
    assert len(table) == 1401
    assert table["name"].is_unique
    assert list(case[3]) == list(table["name"])
    assert {"IBEX_GLCM25_Contrast_0_1", "IBEX_GLCM3_Contrast_all_1", "IBEX_ID_LocalStdMean_9"} <= set(table["name"])


def test_each_class_has_its_documented_number_of_features_and_glcm_with_glrlm_are_almost_half():
    table = ibex_table()
    assert table["class6"].value_counts().to_dict() == SIX
    assert table["class7"].value_counts().to_dict() == SEVEN
    assert 0.45 < (SIX["GLCM"] + SIX["GLRLM"]) / 1401 < 0.5


def test_a_name_is_made_of_its_row_in_the_table():
    for row in ibex_table().fillna({"parameter": -1}).itertuples():
        parts = ["IBEX", row.family, row.feature, row.direction, str(row.parameter)]
        assert row.name == "_".join(part for part in parts if part not in ("", "-1"))


def pair_matrix(levels, step):
    """Symmetric co-occurrence probabilities (256, 256) counted pair by pair."""
    counts = np.zeros((256, 256))
    for voxel in np.argwhere(levels):
        other = voxel + step
        if np.all(other >= 0) and np.all(other < levels.shape) and levels[tuple(other)]:
            i, j = levels[tuple(voxel)] - 1, levels[tuple(other)] - 1
            counts[i, j] += 1
            counts[j, i] += 1
    return counts


def glcm_by_hand(counts):
    p = counts / counts.sum()
    i, j = np.indices(p.shape) + 1.0
    mean = (i * p).sum()
    variance = ((i - mean) ** 2 * p).sum()
    distance = np.abs(i - j)

    def entropy(q):
        return -(q[q > 0] * np.log2(q[q > 0])).sum()

    p_sum = np.bincount((i + j).astype(int).ravel(), p.ravel())
    p_difference = np.bincount(distance.astype(int).ravel(), p.ravel())
    marginal = p.sum(1)
    product = np.outer(marginal, marginal)
    sums = np.arange(len(p_sum))
    return {
        "AutoCorrelation": (i * j * p).sum(),
        "ClusterProminence": ((i + j - 2 * mean) ** 4 * p).sum(),
        "ClusterShade": ((i + j - 2 * mean) ** 3 * p).sum(),
        "ClusterTendency": ((i + j - 2 * mean) ** 2 * p).sum(),
        "Contrast": (distance**2 * p).sum(),
        "Correlation": ((i - mean) * (j - mean) * p).sum() / variance,
        "DifferenceEntropy": entropy(p_difference),
        "Dissimilarity": (distance * p).sum(),
        "Energy": (p**2).sum(),
        "Entropy": entropy(p),
        "Homogeneity": (p / (1 + distance)).sum(),
        "Homogeneity2": (p / (1 + distance**2)).sum(),
        "InformationMeasureCorr1": (entropy(p) - entropy(product)) / entropy(marginal),
        "InformationMeasureCorr2": np.sqrt(1 - np.exp(-2 * (entropy(product) - entropy(p)))),
        "InverseDiffMomentNorm": (p / (1 + (distance / 256) ** 2)).sum(),
        "InverseDiffNorm": (p / (1 + distance / 256)).sum(),
        "InverseVariance": (p[distance > 0] / distance[distance > 0] ** 2).sum(),
        "MaxProbability": p.max(),
        "SumAverage": (sums * p_sum).sum(),
        "SumEntropy": entropy(p_sum),
        "SumVariance": ((sums - entropy(p_sum)) ** 2 * p_sum).sum(),
        "Variance": variance,
    }


@pytest.mark.parametrize(
    ("family", "direction", "offset"),
    [("GLCM25", d, o) for d in DIRECTIONS25 for o in (1, 4, 7)] + [("GLCM3", d, 1) for d in DIRECTIONS3],
)
def test_glcm_features_of_one_direction_and_offset_equal_those_of_pairs_counted_by_hand(
    case, family, direction, offset
):
    _, _, levels, features = case
    step = np.array({"GLCM25": DIRECTIONS25, "GLCM3": DIRECTIONS3}[family][direction]) * offset
    expected = glcm_by_hand(pair_matrix(levels, step))
    assert set(expected) == set(GLCM)
    for name, value in expected.items():
        assert features[f"IBEX_{family}_{name}_{direction}_{offset}"] == pytest.approx(value, rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize(("family", "directions", "offset"), [("GLCM25", DIRECTIONS25, 4), ("GLCM3", DIRECTIONS3, 1)])
def test_glcm_features_of_all_directions_are_those_of_the_summed_matrix(case, family, directions, offset):
    _, _, levels, features = case
    total = sum(pair_matrix(levels, np.array(step) * offset) for step in directions.values())
    for name, value in glcm_by_hand(total).items():
        assert features[f"IBEX_{family}_{name}_all_{offset}"] == pytest.approx(value, rel=1e-9, abs=1e-9), name


def test_degrees_point_the_way_they_do_on_the_screen():
    hu = np.zeros((1, 8, 8))
    hu[0, np.arange(8), 7 - np.arange(8)] = 100  # a bright line from bottom left to top right
    features = ibex_features(hu, np.ones(hu.shape, bool), SPACING)
    along = {d: features[f"IBEX_GLCM25_Correlation_{d}_1"] for d in DIRECTIONS25}
    assert along["45"] == pytest.approx(1)
    assert max(along["0"], along["90"], along["135"]) < 0


@pytest.mark.parametrize(("axis", "direction", "in_plane"), [(2, "0", "0"), (1, "1", "90"), (0, "2", None)])
def test_directions_0_1_and_2_of_3d_are_x_y_and_z(axis, direction, in_plane):
    hu = 50.0 * np.indices((5, 5, 5))[axis]
    features = ibex_features(hu, np.ones(hu.shape, bool), SPACING)
    across = {d: features[f"IBEX_GLCM3_Contrast_{d}_1"] for d in "012"}
    assert across.pop(direction) > 0
    assert set(across.values()) == {0}
    for d in ("0", "90"):
        assert (features[f"IBEX_GLCM25_Contrast_{d}_1"] > 0) == (d == in_plane)
        assert (features[f"IBEX_GLRLM25_RunPercentage_{d}"] == 1) == (d == in_plane)


def runs_by_hand(levels, along_x):
    """Counts (256, 20) of runs, line by line."""
    counts = np.zeros((256, 20))
    lines = levels if along_x else levels.transpose(0, 2, 1)
    for line in lines.reshape(-1, lines.shape[2]):
        for level, run in itertools.groupby(line):
            if level:
                counts[level - 1, len(list(run)) - 1] += 1
    return counts


def glrlm_by_hand(c, voxels):
    i, r = np.indices(c.shape) + 1.0
    p = c / c.sum()
    return {
        "GrayLevelNonuniformity": (c.sum(1) ** 2).sum() / c.sum(),
        "HighGrayLevelRunEmphasis": (p * i**2).sum(),
        "LongRunEmphasis": (p * r**2).sum(),
        "LongRunHighGrayLevelEmphasis": (p * r**2 * i**2).sum(),
        "LongRunLowGrayLevelEmphasis": (p * r**2 / i**2).sum(),
        "LowGrayLevelRunEmphasis": (p / i**2).sum(),
        "RunLengthNonuniformity": (c.sum(0) ** 2).sum() / c.sum(),
        "RunPercentage": c.sum() / voxels,
        "ShortRunEmphasis": (p / r**2).sum(),
        "ShortRunHighGrayLevelEmphasis": (p * i**2 / r**2).sum(),
        "ShortRunLowGrayLevelEmphasis": (p / i**2 / r**2).sum(),
    }


def test_glrlm_features_equal_those_of_runs_counted_by_hand(case):
    _, mask, levels, features = case
    x, y = runs_by_hand(levels, True), runs_by_hand(levels, False)
    assert x[:, 1:].any() and y[:, 1:].any()
    for direction, counts in {"0": x, "90": y, "all": (x + y) / 2}.items():
        expected = glrlm_by_hand(counts, mask.sum())
        assert set(expected) == set(GLRLM)
        for name, value in expected.items():
            assert features[f"IBEX_GLRLM25_{name}_{direction}"] == pytest.approx(value, rel=1e-12), (direction, name)


def window(shape, voxel, size, in_plane):
    half = size // 2
    reach = [0 if in_plane else half, half, half]
    return tuple(slice(max(v - r, 0), v + r + 1) for v, r in zip(voxel, reach, strict=True))


@pytest.mark.parametrize(("family", "in_plane"), [("NID25", True), ("NID3", False)])
@pytest.mark.parametrize("size", [3, 5, 7])
def test_nid_features_equal_those_of_neighbourhoods_taken_by_hand(case, family, in_plane, size):
    _, _, levels, features = case
    difference, count = np.zeros(257), np.zeros(257)
    for voxel in np.argwhere(levels):
        level = levels[tuple(voxel)]
        near = levels[window(levels.shape, voxel, size, in_plane)]
        neighbours = (near > 0).sum() - 1
        if neighbours:
            difference[level] += abs(level - (near.sum() - level) / neighbours)
            count[level] += 1
    i = np.flatnonzero(count).astype(float)
    s, p, n = difference[count > 0], count[count > 0] / count.sum(), count.sum()
    a, b = np.meshgrid(np.arange(len(i)), np.arange(len(i)))
    gap = np.abs(i[a] - i[b])
    expected = {
        "Coarseness": 1 / (p * s).sum(),
        "Contrast": (p[a] * p[b] * gap**2).sum() / (len(i) * (len(i) - 1)) * s.sum() / n,
        "Busyness": (p * s).sum() / np.abs(i[a] * p[a] - i[b] * p[b]).sum(),
        "Complexity": (gap * (p[a] * s[a] + p[b] * s[b]) / (p[a] + p[b])).sum() / n,
        "TextureStrength": ((p[a] + p[b]) * gap**2).sum() / s.sum(),
    }
    for name, value in expected.items():
        assert features[f"IBEX_{family}_{name}_{size}"] == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("size", [3, 9])
def test_local_features_equal_those_of_windows_taken_by_hand(case, size):
    hu, mask, levels, features = case
    rows = []
    for voxel in np.argwhere(mask):
        near = window(mask.shape, voxel, size, True)
        values = hu[near][mask[near]].astype(float)
        share = np.unique(levels[near][mask[near]], return_counts=True)[1] / len(values)
        rows.append((voxel[0], -(share * np.log2(share)).sum(), np.ptp(values), values.std()))
    rows = np.array(rows)
    largest = mask.sum(axis=(1, 2)).argmax()
    for family, part in (("ID", rows), ("IDMaxSlice", rows[rows[:, 0] == largest])):
        for column, name in enumerate(("Entropy", "Range", "Std"), start=1):
            for stat in ("Max", "Mean", "Median", "Min", "Std"):
                expected = getattr(np, stat.lower())(part[:, column])
                found = features[f"IBEX_{family}_Local{name}{stat}_{size}"]
                assert found == pytest.approx(expected, rel=1e-9, abs=1e-9), (family, name, stat)


def test_orientations_are_those_of_the_gradient_by_finite_differences():
    hu = np.random.default_rng(5).normal(size=(3, 7, 8)) * 100
    spacing = (1.0, 0.5, 0.8)
    features = ibex_features(hu, np.ones(hu.shape, bool), spacing)
    dy, dx = np.gradient(hu, 0.5, axis=1), np.gradient(hu, 0.8, axis=2)
    degrees = np.degrees(np.arctan(dy / dx))
    degrees = np.where(degrees < 0, degrees + 180, degrees).ravel()
    for p in (1, 50, 99):
        assert features[f"IBEX_GOH_Percentile_{p}"] == pytest.approx(np.percentile(degrees, p))
    centred = degrees - degrees.mean()
    assert features["IBEX_GOH_Range"] == pytest.approx(np.ptp(degrees))
    assert features["IBEX_GOH_Skewness"] == pytest.approx((centred**3).mean() / degrees.std() ** 3)
    assert features["IBEX_GOH_Kurtosis"] == pytest.approx((centred**4).mean() / degrees.std() ** 4)
    assert features["IBEX_GOH_MeanAbsoluteDeviation"] == pytest.approx(np.abs(centred).mean())
    median = np.median(degrees)
    assert features["IBEX_GOH_MedianAbsoluteDeviation"] == pytest.approx(np.median(np.abs(degrees - median)))


def test_gradients_use_the_neighbours_inside_the_roi_only(case):
    hu, mask, _, features = case

    def slope(voxel, axis):
        points = []
        for step in (-1, 0, 1):
            other = list(voxel)
            other[axis] += step
            if 0 <= other[axis] < mask.shape[axis] and mask[tuple(other)]:
                points.append((step, float(hu[tuple(other)])))
        (first, low), (last, high) = points[0], points[-1]
        return (high - low) / (last - first) if last > first else 0.0

    slopes = [(slope(voxel, 1), slope(voxel, 2)) for voxel in np.argwhere(mask)]
    degrees = [np.degrees(np.arctan2(dy, dx)) % 180 for dy, dx in slopes if (dy, dx) != (0, 0)]
    for p in (5, 50, 95):
        assert features[f"IBEX_GOH_Percentile_{p}"] == pytest.approx(np.percentile(degrees, p))


def test_a_ramp_has_its_own_orientation_in_degrees_of_space_not_of_voxels():
    y, x = np.indices((9, 9))
    hu = np.broadcast_to(100 * (2 * 0.9 * x + 0.6 * y * 2 * np.tan(np.radians(40))), (2, 9, 9))
    features = ibex_features(hu, np.ones(hu.shape, bool), (1.0, 0.6, 0.9))
    assert features["IBEX_GOH_Percentile_50"] == pytest.approx(40)
    assert features["IBEX_GOH_Range"] == pytest.approx(0, abs=1e-9)
    assert features["IBEX_GOH_PercentileArea_50"] == pytest.approx(7.5 * 180 / 32)  # the middle of its bin


def test_percentiles_of_area_run_through_the_cumulative_histogram_linearly_within_a_bin():
    hu = np.full((1, 2, 2), -1024.0)
    hu[0, 0] = 0, 40  # levels 1, 1, 65, 67
    features = ibex_features(hu, np.ones(hu.shape, bool), SPACING)
    expected = {10: 0.7, 25: 1.0, 50: 1.5, 75: 65.5, 99: 67.46}
    for p, value in expected.items():
        assert features[f"IBEX_IH_PercentileArea_{p}"] == pytest.approx(value)
    assert features["IBEX_IH_Percentile_50"] == 33  # between levels 1 and 65


def test_definitions_that_coincide_with_pyradiomics_give_the_same_numbers():
    rng = np.random.default_rng(8)
    hu = rng.normal(0, 300, size=(6, 12, 11))
    hu[0, 0, :2] = -1024, 3071  # the levels of both then run from 1 to 256
    mask = np.ones(hu.shape, bool)
    ours = ibex_features(hu, mask, SPACING)
    pairs = {"Homogeneity": "Id", "Homogeneity2": "Idm", "InverseDiffNorm": "Idn", "InverseDiffMomentNorm": "Idmn"}
    pairs |= {"InformationMeasureCorr1": "Imc1", "InformationMeasureCorr2": "Imc2", "Entropy": "JointEntropy"}
    pairs |= {"Energy": "JointEnergy", "Dissimilarity": "DifferenceAverage", "AutoCorrelation": "Autocorrelation"}
    pairs |= {"MaxProbability": "MaximumProbability", "Variance": "SumSquares"}
    for dimension, family, nid in (("2D", "GLCM25", "NID25"), ("3D", "GLCM3", "NID3")):
        settings = FeatureSettings(
            bin_width=16, dimension=dimension, merge_directions=True, families=("firstorder", "glcm", "ngtdm")
        )
        theirs = extract_features(hu, mask, SPACING, settings)
        for name in set(GLCM) - {"SumVariance"}:
            value = theirs[f"original_glcm_{pairs.get(name, name)}"]
            assert ours[f"IBEX_{family}_{name}_all_1"] == pytest.approx(value, rel=1e-9), name
        for name in ("Coarseness", "Contrast", "Busyness", "Complexity", "Strength"):
            found = ours[f"IBEX_{nid}_{name.replace('Strength', 'TextureStrength')}_3"]
            assert found == pytest.approx(theirs[f"original_ngtdm_{name}"], rel=1e-12), name
    same = {"Energy": "Energy", "GlobalEntropy": "Entropy", "GlobalMin": "Minimum", "GlobalMax": "Maximum"}
    same |= {"GlobalMean": "Mean", "GlobalMedian": "Median", "Range": "Range", "Variance": "Variance"}
    same |= {"InterQuartileRange": "InterquartileRange", "MeanAbsoluteDeviation": "MeanAbsoluteDeviation"}
    same |= {"RootMeanSquare": "RootMeanSquared", "Skewness": "Skewness", "Kurtosis": "Kurtosis"}
    same |= {"GlobalUniformity": "Uniformity", "Percentile_10": "10Percentile", "Percentile_90": "90Percentile"}
    for name, other in same.items():
        assert ours[f"IBEX_ID_{name}"] == pytest.approx(theirs[f"original_firstorder_{other}"], rel=1e-12), name
    assert ours["IBEX_ID_GlobalStd"] == pytest.approx(hu.std())
    assert ours["IBEX_ID_EnergyNorm"] == pytest.approx((hu**2).mean())


@pytest.mark.parametrize(
    ("axis", "swaps25", "swaps3"),
    [
        (2, {"45": "135"}, {"3": "4", "7": "8", "9": "10", "11": "12"}),
        (1, {"45": "135"}, {"3": "4", "5": "6", "9": "12", "10": "11"}),
        (0, {}, {"5": "6", "7": "8", "9": "11", "10": "12"}),
    ],
)
def test_a_flip_swaps_the_directions_that_it_mirrors_and_changes_nothing_else(case, axis, swaps25, swaps3):
    hu, mask, _, before = case
    after = ibex_features(np.flip(hu, axis), np.flip(mask, axis), SPACING)
    swaps = {
        "GLCM25": swaps25 | {b: a for a, b in swaps25.items()},
        "GLCM3": swaps3 | {b: a for a, b in swaps3.items()},
    }
    changed = 0
    for row in ibex_table().itertuples():
        if row.family == "GOH":
            continue  # mirrored angles
        direction = swaps.get(row.family, {}).get(row.direction, row.direction)
        name = (
            row.name if direction == row.direction else f"IBEX_{row.family}_{row.feature}_{direction}_{row.parameter}"
        )
        assert after[name] == pytest.approx(before[row.name], rel=1e-9, abs=1e-9), row.name
        changed += before[name] != pytest.approx(before[row.name], rel=1e-6)
    assert (changed > 0) == bool(swaps25 or swaps3)


def test_a_quarter_turn_swaps_rows_and_columns(case):
    hu, mask, _, before = case
    after = ibex_features(np.rot90(hu, axes=(1, 2)), np.rot90(mask, axes=(1, 2)), SPACING)
    for name in GLRLM:
        assert after[f"IBEX_GLRLM25_{name}_0"] == pytest.approx(before[f"IBEX_GLRLM25_{name}_90"], rel=1e-12)
    for name in GLCM:
        for offset in (1, 4, 7):
            found = after[f"IBEX_GLCM25_{name}_90_{offset}"]
            assert found == pytest.approx(before[f"IBEX_GLCM25_{name}_0_{offset}"], rel=1e-9, abs=1e-9)


def test_no_feature_looks_outside_the_roi(case):
    hu, mask, _, before = case
    wide = np.full(tuple(s + 9 for s in hu.shape), np.nan, np.float32)
    inside = np.zeros(wide.shape, bool)
    box = tuple(slice(4, 4 + s) for s in hu.shape)
    wide[box], inside[box] = np.where(mask, hu, np.nan), mask
    assert ibex_features(wide, inside, SPACING) == before


def test_the_levels_cut_the_range_in_equal_parts_and_hold_what_lies_outside_it():
    for value, level in ((-1024, 1), (-1008.01, 1), (-1008, 2), (0, 65), (3071.9, 256), (5000, 256), (-2000, 1)):
        features = ibex_features(np.full((1, 2, 2), value), np.ones((1, 2, 2), bool), SPACING)
        assert features["IBEX_IH_Percentile_50"] == level
    settings = IbexSettings(range_hu=(-100.0, 300.0), levels=4)
    assert ibex_features(np.full((1, 2, 2), 120.0), np.ones((1, 2, 2)), SPACING, settings)["IBEX_IH_Percentile_50"] == 3


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 9)])
def test_a_constant_roi_and_a_single_voxel_have_defined_values(shape):
    hu = np.full(shape, 40.1, np.float32)
    features = ibex_features(hu, np.ones(shape, bool), SPACING)
    values = np.array(list(features.values()))
    assert np.isfinite(values).all()
    assert features["IBEX_ID_GlobalMean"] == pytest.approx(40.1)
    spread = (
        "GlobalStd",
        "Variance",
        "Kurtosis",
        "Skewness",
        "Range",
        "GlobalEntropy",
        "LocalEntropyMax_9",
        "LocalStdMax_3",
    )
    for name in spread:
        assert features[f"IBEX_ID_{name}"] == 0
    assert all(v == 0 for name, v in features.items() if name.startswith("IBEX_GOH"))
    assert features["IBEX_NID3_Coarseness_3"] == 1e6
    assert features["IBEX_NID3_Busyness_3"] == features["IBEX_NID3_Contrast_3"] == 0
    pairs = shape != (1, 1, 1)
    assert features["IBEX_GLCM3_Correlation_all_1"] == (1 if pairs else 0)
    assert features["IBEX_GLCM3_Energy_0_1"] == (1 if pairs else 0)
    assert features["IBEX_GLCM3_Contrast_all_1"] == 0
    assert features["IBEX_GLRLM25_RunPercentage_0"] == pytest.approx(1 / shape[2])


def test_on_a_single_slice_2d_and_3d_coincide():
    hu, mask = holed_roi((1, 12, 12))
    features = ibex_features(hu, mask, SPACING)
    for name in GLCM:
        for in_plane, direction in {"0": "0", "45": "4", "90": "1", "135": "3", "all": "all"}.items():
            assert features[f"IBEX_GLCM25_{name}_{in_plane}_1"] == features[f"IBEX_GLCM3_{name}_{direction}_1"]
        for through in ("2", "5", "12"):  # no pair along these
            assert features[f"IBEX_GLCM3_{name}_{through}_1"] == features[f"IBEX_GLCM3_{name}_all_1"]
    names = [name for name in features if name.startswith("IBEX_NID25")]
    assert len(names) == 15
    assert all(features[name] == features[name.replace("NID25", "NID3")] for name in names)


def test_an_offset_wider_than_the_roi_gives_zeros_and_leaves_the_others_alone():
    hu = np.random.default_rng(2).normal(size=(6, 6, 6)) * 100
    features = ibex_features(hu, np.ones(hu.shape, bool), SPACING)
    far = [v for name, v in features.items() if name.startswith("IBEX_GLCM25") and name.endswith("_7")]
    assert far == [0.0] * 110
    assert features["IBEX_GLCM25_Contrast_all_4"] > 0


def test_the_largest_slice_alone_gives_the_features_of_the_max_slice():
    hu, mask = holed_roi()
    areas = mask.sum(axis=(1, 2))
    largest = areas.argmax()
    assert (areas == areas[largest]).sum() == 1
    alone = ibex_features(hu[largest : largest + 1], mask[largest : largest + 1], SPACING)
    whole = ibex_features(hu, mask, SPACING)
    names = [name for name in whole if name.startswith("IBEX_IDMaxSlice_")]
    assert len(names) == 146
    for name in names:
        assert whole[name] == alone[name] == alone[name.replace("IDMaxSlice", "ID")]


@pytest.mark.parametrize(
    ("hu", "mask", "message"),
    [
        (np.zeros((2, 3, 4)), np.zeros((2, 3, 4), bool), "mask is empty"),
        (np.zeros((2, 3, 4)), np.ones((2, 3, 5), bool), r"\(2, 3, 5\).*\(2, 3, 4\)"),
        (np.zeros((3, 4)), np.ones((3, 4), bool), "3-D"),
        (np.full((2, 3, 4), np.nan), np.ones((2, 3, 4), bool), "NaN"),
        (np.full((2, 3, 4), np.inf), np.ones((2, 3, 4), bool), "infinite"),
        (np.zeros((2, 3, 4)), np.full((2, 3, 4), 2), "one label"),
    ],
)
def test_bad_input_is_refused_in_one_line(hu, mask, message):
    with pytest.raises(HarmonictError, match=message) as error:
        ibex_features(hu, mask, SPACING)
    assert "\n" not in str(error.value)


def test_bad_settings_and_spacing_are_refused_in_one_line():
    bad = [{"range_hu": (10.0, 10.0)}, {"range_hu": (0.0, np.inf)}, {"levels": 0}, {"levels": 1025}]
    for settings in (*bad, {"orientation_bins": 0}):
        with pytest.raises(HarmonictError, match="got"):
            IbexSettings(**settings)
    with pytest.raises(HarmonictError, match="spacing"):
        ibex_features(np.zeros((1, 2, 2)), np.ones((1, 2, 2), bool), (1.0, 0.0, 1.0))
