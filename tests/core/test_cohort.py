import pandas as pd
import pytest

from harmonict.core import HarmonictError
from harmonict.core.cohort import COHORT_COLUMNS, cohort_table, read_cohort, write_cohort


@pytest.mark.parametrize("name", ["cohort.csv", "cohort.parquet"])
def test_a_cohort_table_survives_writing_and_reading(tmp_path, name):
    inside = tmp_path / "a" / "series"
    table = cohort_table([{"path": str(inside), "patient": "0012", "kernel": "B30f", "slices": 3, "extra": 1.5}])
    write_cohort(table, tmp_path / name)
    back = read_cohort(tmp_path / name)
    assert list(back.columns) == [*COHORT_COLUMNS, "extra"]
    assert back.path[0] == str(inside) and back.patient[0] == "0012" and back.slices[0] == 3


def test_paths_are_stored_relative_to_the_table(tmp_path):
    write_cohort(cohort_table([{"path": str(tmp_path / "x")}]), tmp_path / "cohort.csv")
    assert pd.read_csv(tmp_path / "cohort.csv").path[0] == "x"


def test_what_is_no_cohort_table_is_refused_in_words(tmp_path):
    with pytest.raises(HarmonictError, match="harmonict inspect"):
        read_cohort(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(HarmonictError, match="no column 'path'"):
        read_cohort(tmp_path / "other.csv")


def test_an_unwritable_place_is_said_and_leaves_nothing(tmp_path):
    with pytest.raises(HarmonictError, match="cannot write"):
        write_cohort(cohort_table([{"path": "x"}]), tmp_path / "missing" / "cohort.csv")
    assert not list(tmp_path.iterdir())
