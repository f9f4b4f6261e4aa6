import pytest

from harmonict.core import HarmonictError
from harmonict.scale import map_series
from series_work import work


@pytest.mark.parametrize("jobs", [1, 2])
def test_one_bad_series_never_stops_the_rest(jobs):
    results = dict(map_series(work, ["a", "bad", "bug", "b"], jobs=jobs))
    assert results[0] == "A" and results[3] == "B"
    assert isinstance(results[1], HarmonictError) and str(results[1]) == "bad series"
    assert "ZeroDivisionError" in str(results[2])


def test_a_killed_worker_costs_its_own_series_only():
    results = dict(map_series(work, ["a", "killed", "b", "c"], jobs=2))
    assert [results[n] for n in (0, 2, 3)] == ["A", "B", "C"]
    assert "killed" in str(results[1])


def test_jobs_below_one_are_refused():
    with pytest.raises(HarmonictError):
        list(map_series(work, ["a"], jobs=0))
