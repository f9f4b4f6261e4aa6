"""The cohort table: one row per series, taken and written by everything that runs over many series."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from harmonict.core.errors import HarmonictError
from harmonict.core.files import write_whole
from harmonict.core.protocol import PROTOCOL_COLUMNS

ROLES = ("source", "target", "truth", "derived")
STATES = ("found", "left_out", "done", "failed")

COHORT_COLUMNS = (
    "path",  # file or folder of the series, relative to the table's own folder where it lies below it
    "patient",  # patient ID
    "series",  # SeriesInstanceUID, or the file's name
    "format",  # dicom, nifti, nrrd, mha
    "role",  # one of ROLES
    "derived_from",  # `series` of the row that this one was made from
    "made_by",  # name and digest of the model that made it
    "masks",  # mask files, ";" between them, each PATH or ROI=PATH
    "digest",  # SHA-256 of the source's identity, for resuming
    *PROTOCOL_COLUMNS,
    "slices",
    "rows",
    "columns",
    "spacing_z_mm",
    "spacing_y_mm",
    "spacing_x_mm",
    "body_part",
    "noise_hu",  # HU SD in uniform tissue, median over slices
    "f50_per_mm",  # frequency where the MTF measured at the skin falls to 0.5
    "state",  # one of STATES
    "reason",  # why a row was left out or failed, in words
)
_TEXT = {"path", "patient", "series", "format", "role", "derived_from", "made_by", "masks", "digest", "manufacturer"}
_TEXT |= {"model", "kernel", "body_part", "state", "reason"}


def cohort_table(rows: list[dict[str, object]]) -> pd.DataFrame:
    """Rows (dicts; missing keys stay empty, further keys become further columns) -> cohort table."""
    table = pd.DataFrame(rows)
    extra = [c for c in table.columns if c not in COHORT_COLUMNS]
    return table.reindex(columns=[*COHORT_COLUMNS, *extra])


def read_cohort(path: str | Path) -> pd.DataFrame:
    """Read a cohort table (.csv or .parquet); `path` entries come back absolute.

    Raises HarmonictError where the file is not there or has no `path` column.
    """
    path = Path(path)
    if not path.is_file():
        raise HarmonictError(f"no cohort table at {path}; `harmonict inspect FOLDER --out cohort.csv` makes one")
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str), keep_default_na=True)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise HarmonictError(f"{path} is not a cohort table: {' '.join(str(error).split())}") from None
    if "path" not in table:
        raise HarmonictError(f"{path} is not a cohort table: it has no column 'path'")
    table["path"] = [str(path.parent.resolve() / p) if isinstance(p, str) else p for p in table["path"]]
    extra = [c for c in table.columns if c not in COHORT_COLUMNS]
    return table.reindex(columns=[*COHORT_COLUMNS, *extra])


def write_cohort(table: pd.DataFrame, path: str | Path) -> None:
    """Write a cohort table as .csv or .parquet, whole or not at all (temporary name, then renamed)."""
    path = Path(path).resolve()
    if path.suffix not in (".csv", ".parquet"):
        raise HarmonictError(f"{path}: a cohort table is written as .csv or .parquet")
    table = table.copy()
    table["path"] = [_relative(p, path.parent) for p in table["path"]]
    parquet = path.suffix == ".parquet"
    write_whole(path, lambda name: (table.to_parquet if parquet else table.to_csv)(name, index=False))


def _relative(path: object, folder: Path) -> object:
    if not isinstance(path, str):
        return path
    absolute = Path(path).resolve()
    return str(absolute.relative_to(folder)) if absolute.is_relative_to(folder) else str(absolute)
