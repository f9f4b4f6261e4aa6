"""The feature table's guard."""

import numpy as np
import pandas as pd
import pytest

from harmonict.core import HarmonictError
from harmonict.radiomics.table import check_features, feature_classes


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "patient": [1, 2],
            "roi": ["a", "a"],
            "scan": ["s", "s"],
            "kernel": ["B30", "B30"],
            "slices": [12, 14],
            "parameter_bin_width": [25, 25],
            "diagnostics_voxels": [100, 120],
            "original_glcm_Contrast": [1.0, 2],
            "original_firstorder_Mean": [-5, 3],
        }
    )


def test_features_are_the_numbers_that_are_no_keys_protocol_or_parameters(table):
    features = check_features(table)
    assert list(features.columns) == ["original_glcm_Contrast", "original_firstorder_Mean"]
    assert features.index.tolist() == [("1", "a", "s"), ("2", "a", "s")]
    assert features.to_numpy().dtype == np.float64


def test_keys_may_be_the_index_and_a_checked_table_passes_unchanged(table):
    features = check_features(table.set_index(["patient", "roi", "scan"]))
    pd.testing.assert_frame_equal(features, check_features(table))
    pd.testing.assert_frame_equal(check_features(features), features)


def test_rows_that_failed_are_dropped_and_single_gaps_are_named(table):
    failed = table.copy()
    failed.loc[0, ["original_glcm_Contrast", "original_firstorder_Mean"]] = np.nan
    assert len(check_features(failed)) == 1
    gap = table.copy()
    gap.loc[1, "original_glcm_Contrast"] = np.nan
    with pytest.raises(HarmonictError, match="Contrast' is NaN or infinite for patient 2, roi a, scan s"):
        check_features(gap)


def test_tables_that_are_no_feature_tables_are_refused(table):
    with pytest.raises(HarmonictError, match="missing: roi"):
        check_features(table.drop(columns="roi"))
    with pytest.raises(HarmonictError, match="two rows of the feature table are patient 1"):
        check_features(pd.concat([table, table]))
    with pytest.raises(HarmonictError, match="no numeric feature"):
        check_features(table.drop(columns=["original_glcm_Contrast", "original_firstorder_Mean"]))
    with pytest.raises(HarmonictError, match="some are empty"):
        check_features(table.assign(scan=["s", None]))


def test_the_class_of_a_feature_comes_from_its_name_or_from_a_map():
    names = ["original_glcm_Contrast", "wavelet-LLH_glrlm_RunEntropy", "log-sigma-1-0-mm-3D_firstorder_Mean", "ID_Mean"]
    assert list(feature_classes(names)) == ["glcm", "glrlm", "firstorder", "ID"]
    assert list(feature_classes(["a", "b"], {"a": "GLCM", "b": "IH"})) == ["GLCM", "IH"]
    with pytest.raises(HarmonictError, match="the first is 'b'"):
        feature_classes(["a", "b"], {"a": "GLCM"})
