"""The feature table: rows (patient, roi, scan), one column per feature. A plain DataFrame, guarded here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from harmonict.core import PROTOCOL_COLUMNS, HarmonictError
from harmonict.core.cohort import COHORT_COLUMNS

KEYS = ("patient", "roi", "scan")
NOT_FEATURES = {*COHORT_COLUMNS, *PROTOCOL_COLUMNS}
NOT_FEATURE_PREFIXES = ("diagnostics_", "parameter_")
PYRADIOMICS_CLASSES = {"firstorder", "shape", "shape2D", "glcm", "glrlm", "glszm", "ngtdm", "gldm"}


def feature_columns(table: pd.DataFrame) -> list[str]:
    """The columns of a table that hold features, as `check_features` sees them."""
    return [
        name
        for name in table.columns
        if name not in NOT_FEATURES
        and name not in KEYS
        and not str(name).startswith(NOT_FEATURE_PREFIXES)
        and pd.api.types.is_numeric_dtype(table[name])
        and not pd.api.types.is_bool_dtype(table[name])
    ]


def check_features(table: pd.DataFrame) -> pd.DataFrame:
    """The features of a table, float64, indexed by (patient, roi, scan), all three text.

    The keys may be columns or index levels. A feature is a numeric column that is neither a column of the cohort table
    nor named "diagnostics_..." or "parameter_...". Rows without any value (images that failed) are dropped.
    Raises HarmonictError, naming the place, on missing or doubled keys, no feature at all, NaN and infinity.
    """
    columns = table.reset_index() if any(name is not None for name in table.index.names) else table
    missing = [key for key in KEYS if key not in columns]
    if missing:
        raise HarmonictError(f"a feature table needs the columns {', '.join(KEYS)}; missing: {', '.join(missing)}")
    keys = columns[list(KEYS)]
    if keys.isna().any(axis=None):
        raise HarmonictError(f"a feature table needs {', '.join(KEYS)} in every row; some are empty")
    names = feature_columns(columns)
    if not names:
        raise HarmonictError("the feature table has no numeric feature column")
    if len(set(names)) < len(names):
        doubled = next(name for name in names if names.count(name) > 1)
        raise HarmonictError(f"the feature table has two columns {doubled!r}")
    index = pd.MultiIndex.from_frame(keys.astype(str))
    features = pd.DataFrame(columns[names].to_numpy(np.float64), index=index, columns=names)
    features = features[features.notna().any(axis=1)]
    if features.empty:
        raise HarmonictError("the feature table has no row with values")
    if features.index.has_duplicates:
        raise HarmonictError(
            f"two rows of the feature table are {_place(features.index[features.index.duplicated()][0])}"
        )
    bad = ~np.isfinite(features.to_numpy())
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise HarmonictError(
            f"feature {names[column]!r} is NaN or infinite for {_place(features.index[row])} "
            f"({int(bad.sum())} such values in all); drop the rows or the columns"
        )
    return features


def feature_classes(names: list[str], class_map: Mapping[str, str] | None = None) -> pd.Series:
    """Feature name -> its class, from `class_map`, else from the name.

    "original_glcm_Contrast" and "wavelet-LLH_glcm_Contrast" are "glcm"; another name's class is its part before the
    first "_". Raises HarmonictError where a given map does not know a feature.
    """
    if class_map is not None:
        unknown = [name for name in names if name not in class_map]
        if unknown:
            raise HarmonictError(
                f"the class map knows no class of {len(unknown)} features, the first is {unknown[0]!r}"
            )
        return pd.Series({name: class_map[name] for name in names}, dtype=object)
    return pd.Series({name: _class_of(name) for name in names}, dtype=object)


def _class_of(name: str) -> str:
    parts = name.split("_")
    return parts[1] if len(parts) > 2 and parts[1] in PYRADIOMICS_CLASSES else parts[0]


def _place(key: tuple[str, ...]) -> str:
    return ", ".join(f"{k} {v}" for k, v in zip(KEYS, key, strict=True))
